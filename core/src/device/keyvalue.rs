//! `key=value,…` options as configuration structs.
//!
//! `virtio-blk-device,drive=hd0,serial=a,,b` is a first word, then keys and values; `,,`
//! is a comma; a key alone is `key=on`. [`Options::to_config`] is a serde deserializer:
//! no option has a parser of its own. Booleans are `on`/`off`/`true`/`false`/`yes`/`no`;
//! unsigned numbers are decimal or `0x…`, with `K`, `M`, `G`, `T` for powers of 1024.

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};
use std::cell::Cell;
use std::fmt;

/// Options as text: ordered keys and values, no key twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pairs: Vec<(String, String)>,
    /// Keys that somebody else takes out before [`Options::to_config`].
    others: Vec<&'static str>,
}

/// An option that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError {
    /// The key does not exist.
    #[error("{of}: no property {key:?}{hint}; properties: {known}")]
    UnknownKey { of: String, key: String, hint: String, known: String },
    /// The value is not understood.
    #[error("{of}: {key}={value:?}: {reason}")]
    BadValue { of: String, key: String, value: String, reason: String },
    /// The key is there twice.
    #[error("{key} is given twice")]
    Twice { key: String },
    /// `=value` without a key, or nothing between commas.
    #[error("{text:?}: a key=value is missing its key")]
    NoKey { text: String },
    /// Something is missing or contradictory.
    #[error("{of}: {reason}")]
    Invalid { of: String, reason: String },
}

/// `; did you mean "x"?`, if a candidate is close enough.
pub fn did_you_mean<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> String {
    let distance = |c: &'a str| (strsim::damerau_levenshtein(word, c), c);
    let close = |&(d, c): &(usize, &str)| d <= 1 + c.len().min(word.len()) / 4;
    let best = candidates.map(distance).filter(close).min_by_key(|x| x.0);
    best.map(|(_, c)| format!("; did you mean {c:?}?")).unwrap_or_default()
}

/// Splits at single commas; `,,` is a comma.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, parts.last_mut()) {
            (',', Some(part)) if chars.peek() == Some(&',') => {
                chars.next();
                part.push(',');
            }
            (',', _) => parts.push(String::new()),
            (c, Some(part)) => part.push(c),
            (_, None) => {}
        }
    }
    parts
}

/// Reads an unsigned number with `0x` and `K`/`M`/`G`/`T` (powers of 1024).
pub fn parse_number(text: &str) -> Option<u64> {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric());
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return digits(hex).then(|| u64::from_str_radix(hex, 16).ok()).flatten();
    }
    let shift = match text.bytes().last()? {
        b'k' | b'K' => 10,
        b'm' | b'M' => 20,
        b'g' | b'G' => 30,
        b't' | b'T' => 40,
        _ => 0,
    };
    let number = if shift == 0 { text } else { &text[..text.len() - 1] };
    if !digits(number) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "on" | "true" | "yes" => Some(true),
        "off" | "false" | "no" => Some(false),
        _ => None,
    }
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses `key=value,…`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut out = Self::new();
        if !text.is_empty() {
            for part in split(text) {
                out.add_part(&part)?;
            }
        }
        Ok(out)
    }

    /// Parses `first,key=value,…`; `first` may be given as `KEY=first` anywhere instead
    /// (`driver=virtio-blk-device,…`). The first word is `None` if there is none.
    pub fn parse_with_first(text: &str, first_key: &str) -> Result<(Option<String>, Self), OptionError> {
        let mut out = Self::new();
        let mut first = None;
        for (i, part) in split(text).into_iter().enumerate() {
            if i == 0 && !part.is_empty() && !part.contains('=') {
                first = Some(part);
            } else if !(i == 0 && part.is_empty()) {
                out.add_part(&part)?;
            }
        }
        if first.is_none() {
            first = out.take(first_key);
        }
        Ok((first, out))
    }

    fn add_part(&mut self, part: &str) -> Result<(), OptionError> {
        let (key, value) = part.split_once('=').unwrap_or((part, "on"));
        if key.is_empty() {
            return Err(OptionError::NoKey { text: part.to_owned() });
        }
        self.set(key, value)
    }

    /// Adds one; an error if the key is there.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), OptionError> {
        if self.get(key).is_some() {
            return Err(OptionError::Twice { key: key.to_owned() });
        }
        self.pairs.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|p| p.0 == key).map(|p| p.1.as_str())
    }

    /// Takes a key out (`id`, `bus`: the machine's, not the device's).
    pub fn take(&mut self, key: &str) -> Option<String> {
        let at = self.pairs.iter().position(|p| p.0 == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// Keys which there are beside those of a configuration struct, that are taken out before: errors name them too.
    pub fn allow_others(&mut self, keys: &[&'static str]) {
        self.others.extend(keys);
    }

    /// All pairs, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Reads a configuration struct; `of` names the option or device in errors. A key the
    /// struct does not have is an error, whether it says `deny_unknown_fields` or not.
    pub fn to_config<T: DeserializeOwned>(&self, of: &str) -> Result<T, OptionError> {
        T::deserialize(Root { options: self, of })
    }
}

/// The field names of a configuration struct (and serde aliases).
pub fn property_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let found = Cell::new(&[][..]);
    let _ = T::deserialize(FieldLister(&found));
    found.get()
}

struct FieldLister<'a>(&'a Cell<&'static [&'static str]>);

impl<'de> Deserializer<'de> for FieldLister<'_> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Self::Error> {
        Err(de::Error::custom("only the fields are wanted"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.0.set(fields);
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        option unit unit_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

impl de::Error for OptionError {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Self::Invalid { of: String::new(), reason: msg.to_string() }
    }
}

/// The reason without a subject, for wrapping.
fn reason_of(e: OptionError) -> String {
    match e {
        OptionError::Invalid { of, reason } if of.is_empty() => reason,
        other => other.to_string(),
    }
}

struct Root<'a> {
    options: &'a Options,
    of: &'a str,
}

impl Root<'_> {
    fn named(&self, e: OptionError) -> OptionError {
        match e {
            OptionError::Invalid { of, reason } if of.is_empty() => {
                OptionError::Invalid { of: self.of.to_owned(), reason }
            }
            other => other,
        }
    }
}

impl<'de> Deserializer<'de> for Root<'_> {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        let pairs = Pairs { root: &self, at: 0 };
        visitor.visit_map(pairs).map_err(|e| self.named(e))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        if let Some((key, _)) = self.options.iter().find(|(k, _)| !fields.contains(k)) {
            let known: Vec<&str> = self.options.others.iter().chain(fields).copied().collect();
            return Err(OptionError::UnknownKey {
                of: self.of.to_owned(),
                key: key.to_owned(),
                hint: did_you_mean(key, known.iter().copied()),
                known: if known.is_empty() { "none".to_owned() } else { known.join(", ") },
            });
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, OptionError> {
        if !self.options.is_empty() {
            return self.deserialize_struct(name, &[], visitor);
        }
        visitor.visit_unit()
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.deserialize_unit_struct("", visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        option seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Pairs<'a> {
    root: &'a Root<'a>,
    at: usize,
}

impl<'de> MapAccess<'de> for Pairs<'_> {
    type Error = OptionError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, OptionError> {
        let Some((key, _)) = self.root.options.pairs.get(self.at) else {
            return Ok(None);
        };
        let key: StrDeserializer<'_, OptionError> = key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, OptionError> {
        let Some((key, value)) = self.root.options.pairs.get(self.at) else {
            return Err(de::Error::custom("a value is asked for twice"));
        };
        self.at += 1;
        seed.deserialize(Value(value)).map_err(|e| OptionError::BadValue {
            of: self.root.of.to_owned(),
            key: key.clone(),
            value: value.clone(),
            reason: reason_of(e),
        })
    }
}

/// One value.
struct Value<'a>(&'a str);

impl Value<'_> {
    fn wrong(&self, expected: &str) -> OptionError {
        de::Error::custom(format!("expected {expected}"))
    }

    fn unsigned(&self, max: u64) -> Result<u64, OptionError> {
        let hint = "a number, such as 4096, 0x1000 or 4K";
        let n = parse_number(self.0).ok_or_else(|| self.wrong(hint))?;
        if n > max {
            return Err(self.wrong(&format!("at most {max}")));
        }
        Ok(n)
    }

    fn signed(&self, min: i64, max: i64) -> Result<i64, OptionError> {
        let n = self.0.parse().ok().or_else(|| parse_number(self.0).and_then(|n| i64::try_from(n).ok()));
        n.filter(|n| (min..=max).contains(n)).ok_or_else(|| self.wrong(&format!("a number from {min} to {max}")))
    }
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_str(self.0)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_bool(parse_bool(self.0).ok_or_else(|| self.wrong("on or off"))?)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_u64(self.unsigned(u8::MAX.into())?)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_u64(self.unsigned(u16::MAX.into())?)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_u64(self.unsigned(u32::MAX.into())?)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_u64(self.unsigned(u64::MAX)?)
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_i64(self.signed(i8::MIN.into(), i8::MAX.into())?)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_i64(self.signed(i16::MIN.into(), i16::MAX.into())?)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_i64(self.signed(i32::MIN.into(), i32::MAX.into())?)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_i64(self.signed(i64::MIN, i64::MAX)?)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_f64(self.0.parse().map_err(|_| self.wrong("a number"))?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        if !variants.contains(&self.0) {
            let hint = did_you_mean(self.0, variants.iter().copied());
            return Err(self.wrong(&format!("one of {}{hint}", variants.join(", "))));
        }
        visitor.visit_enum(IntoDeserializer::<OptionError>::into_deserializer(self.0))
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Default, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Cache {
        #[default]
        WriteBack,
        None,
    }

    #[derive(Debug, PartialEq, Default, Deserialize)]
    #[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
    struct Config {
        drive: String,
        serial: Option<String>,
        queue_size: u16,
        ram_size: u64,
        read_only: bool,
        cache: Cache,
        offset: i32,
    }

    fn config(text: &str) -> Result<Config, OptionError> {
        Options::parse_with_first(text, "driver")?.1.to_config("disk")
    }

    #[test]
    fn all_kinds_of_value() {
        let text = "disk,drive=hd0,serial=a,,b=c,queue-size=0x80,ram-size=4G,read-only,cache=none,offset=-3";
        let want = Config {
            drive: "hd0".into(),
            serial: Some("a,b=c".into()),
            queue_size: 128,
            ram_size: 4 << 30,
            read_only: true,
            cache: Cache::None,
            offset: -3,
        };
        assert_eq!(config(text).unwrap(), want);
        assert_eq!(config("disk").unwrap(), Config::default());
        let (first, rest) = Options::parse_with_first("drive=x,driver=disk", "driver").unwrap();
        assert_eq!((first.as_deref(), rest.get("drive")), (Some("disk"), Some("x")));
        assert_eq!(property_names::<Config>()[..3], ["drive", "serial", "queue-size"]);
    }

    #[test]
    fn mistakes_are_explained() {
        let text = |t: &str| config(t).unwrap_err().to_string();
        let unknown = text("disk,driv=hd0");
        assert!(unknown.starts_with("disk: no property \"driv\"; did you mean \"drive\"?"), "{unknown}");
        assert!(unknown.contains("properties: drive, serial, queue-size"), "{unknown}");
        let mut taken = Options::parse("buss=x").unwrap();
        taken.allow_others(&["id", "bus"]);
        let unknown = taken.to_config::<Config>("disk").unwrap_err().to_string();
        assert!(
            unknown.contains("did you mean \"bus\"?") && unknown.contains("properties: id, bus, drive,"),
            "{unknown}"
        );
        assert_eq!(text("disk,queue-size=64K"), "disk: queue-size=\"64K\": expected at most 65535");
        assert!(text("disk,queue-size=-1").contains("expected a number"));
        assert!(text("disk,read-only=maybe").contains("on or off"));
        assert!(text("disk,cache=wb").contains("one of write-back, none"));
        assert!(text("disk,drive=a,drive=b").contains("given twice"));
        assert!(text("disk,=b").contains("missing its key"));
        assert!(text("disk,ram-size=99999999T").contains("expected a number"));
    }

    #[test]
    fn numbers() {
        assert_eq!(parse_number("1k"), Some(1024));
        for bad in ["", "k", "0x", "+1", "1.5G", "0x1K", "é", "18446744073709551616"] {
            assert_eq!(parse_number(bad), None, "{bad}");
        }
    }
}
