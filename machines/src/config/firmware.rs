//! What firmware and systems are told: `-boot`, `-fw_cfg`, `-uuid`, `-smbios`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, KeyValues};

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FirmwareConfig {
    /// `-boot`
    pub order: BootOrder,
    /// `-fw_cfg`, in order.
    pub items: Vec<FwCfgItem>,
    /// `-uuid`, most significant byte first.
    pub uuid: Option<[u8; 16]>,
    /// `-smbios type=…`: type, key and value, in order.
    pub smbios: Vec<SmbiosField>,
}

/// `-boot order=cdn,once=d,menu=on,strict=on,splash-time=5000,reboot-timeout=5000`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootOrder {
    /// What to try, first to last: `a` floppy, `c` disk, `d` optical disk, `n` network.
    pub order: Option<String>,
    /// The same for the first start only.
    pub once: Option<String>,
    /// Whether firmware offers a menu.
    pub menu: Option<bool>,
    /// How long it does, in ms.
    pub splash_time: Option<u16>,
    /// Whether what is not in the list is left alone.
    pub strict: bool,
    /// How long to wait before trying again when nothing boots, in ms; -1 for never.
    pub reboot_timeout: Option<i32>,
}

impl BootOrder {
    /// `-boot order=…`, or the letters alone.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-boot", text, Some("order"))?;
        let letters = |kv: &mut KeyValues, key| match kv.take(key) {
            Some(order) if order.chars().all(|c| "acdn".contains(c)) && !repeats(&order) => Ok(Some(order)),
            Some(order) => Err(kv.error(format!(
                "{key}={order}: it is letters of a (floppy), c (disk), d (optical disk) and n (network), each once"
            ))),
            None => Ok(None),
        };
        let (order, once) = (letters(&mut kv, "order")?, letters(&mut kv, "once")?);
        let splash_time = kv.take_number("splash-time")?.map(|n| u16::try_from(n).map_err(|_| n));
        let splash_time =
            splash_time.transpose().map_err(|n| kv.error(format!("splash-time={n}: at most 65535 ms")))?;
        let reboot_timeout =
            match kv.take("reboot-timeout") {
                None => None,
                Some(text) => Some(text.parse().ok().filter(|n| (-1..=0xffff).contains(n)).ok_or_else(|| {
                    kv.error(format!("reboot-timeout={text}: it is 0 to 65535 (ms), or -1 for never"))
                })?),
            };
        if kv.take("splash").is_some() {
            return Err(kv.error("splash= is a picture, and there is no graphical display: leave it out"));
        }
        let (menu, strict) = (kv.take_bool("menu")?, kv.take_bool("strict")?.unwrap_or(false));
        kv.finish()?;
        Ok(Self { order, once, menu, splash_time, strict, reboot_timeout })
    }
}

fn repeats(letters: &str) -> bool {
    letters.char_indices().any(|(i, c)| letters[..i].contains(c))
}

/// `-fw_cfg name=opt/org.example/x,file=PATH` or `string=TEXT`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FwCfgItem {
    /// The name.
    pub name: String,
    /// What it holds.
    pub data: ItemData,
}

/// The contents of an item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ItemData {
    /// Those of a file.
    File(PathBuf),
    /// These bytes, without an end mark.
    Text(String),
}

impl FwCfgItem {
    /// `[name=]NAME,file=PATH` or `[name=]NAME,string=TEXT`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-fw_cfg", text, Some("name"))?;
        let name = kv.take("name").filter(|n| !n.is_empty());
        let name = name.ok_or_else(|| kv.error("name= is missing: -fw_cfg name=opt/org.example/x,string=text"))?;
        if kv.take("gen_id").is_some() {
            return Err(kv.error("gen_id= names an object that makes data, and there is none: use file= or string="));
        }
        let data = match (kv.take("file"), kv.take("string")) {
            (Some(path), None) => ItemData::File(path.into()),
            (None, Some(text)) => ItemData::Text(text),
            _ => return Err(kv.error("give one of file=PATH and string=TEXT")),
        };
        kv.finish()?;
        Ok(Self { name, data })
    }
}

/// A field of an SMBIOS structure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmbiosField {
    /// Type of the structure.
    pub kind: u8,
    /// Name of the field.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Fields of each structure that can be set.
const SMBIOS_FIELDS: &[(u8, &[&str])] = &[
    (0, &["vendor", "version", "date", "release", "uefi"]),
    (1, &["manufacturer", "product", "version", "serial", "uuid", "sku", "family"]),
    (2, &["manufacturer", "product", "version", "serial", "asset", "location"]),
    (3, &["manufacturer", "version", "serial", "asset", "sku"]),
    (4, &["sock_pfx", "manufacturer", "version", "serial", "asset", "part"]),
    (11, &["value", "path"]),
    (17, &["loc_pfx", "manufacturer", "serial", "asset", "part"]),
];

/// `-smbios type=1,serial=X,uuid=…`: the fields it sets.
pub fn parse_smbios(text: &str) -> Result<Vec<SmbiosField>, ConfigError> {
    let mut kv = KeyValues::parse("-smbios", text, None)?;
    if kv.take("file").is_some() {
        return Err(
            kv.error("file= is a whole structure in binary form, which is not taken: give its fields with type=")
        );
    }
    let kinds: Vec<String> = SMBIOS_FIELDS.iter().map(|f| f.0.to_string()).collect();
    let types = || format!("type= is one of {}", kinds.join(", "));
    let kind = kv.take_number("type")?.ok_or_else(|| kv.error(types()))?;
    let found = SMBIOS_FIELDS.iter().find(|(k, _)| u64::from(*k) == kind);
    let (kind, keys) = *found.ok_or_else(|| kv.error(format!("type={kind}: {}", types())))?;
    let mut fields = Vec::new();
    for key in keys {
        for value in kv.take_all(key) {
            let invalid = match *key {
                "uuid" => parse_uuid(&value).is_none().then_some("a UUID as 01234567-89ab-cdef-0123-456789abcdef"),
                "release" => parse_release(&value).is_none().then_some("MAJOR.MINOR, each at most 255"),
                "uefi" => (!matches!(value.as_str(), "on" | "off")).then_some("on or off"),
                _ => value.contains('\0').then_some("text"),
            };
            if let Some(expected) = invalid {
                return Err(kv.error(format!("{key}={value}: it is {expected}")));
            }
            fields.push(SmbiosField { kind, key: (*key).to_owned(), value });
        }
    }
    kv.finish()?;
    Ok(fields)
}

/// `MAJOR.MINOR`
pub fn parse_release(text: &str) -> Option<[u8; 2]> {
    let (major, minor) = text.split_once('.')?;
    Some([major.parse().ok()?, minor.parse().ok()?])
}

/// A UUID with or without dashes, most significant byte first.
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let dashes: Vec<usize> = text.match_indices('-').map(|m| m.0).collect();
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let formed = dashes.is_empty() || dashes == [8, 13, 18, 23];
    if !formed || digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

/// `-uuid UUID`
pub fn uuid_option(text: &str) -> Result<[u8; 16], ConfigError> {
    let error = || ConfigError::new("-uuid", text, "it is written as 01234567-89ab-cdef-0123-456789abcdef");
    parse_uuid(text).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_orders() {
        let b = BootOrder::parse("order=cd,once=n,menu=on,splash-time=3000,strict=on,reboot-timeout=-1").unwrap();
        assert_eq!((b.order.as_deref(), b.once.as_deref(), b.menu), (Some("cd"), Some("n"), Some(true)));
        assert_eq!((b.strict, b.splash_time, b.reboot_timeout), (true, Some(3000), Some(-1)));
        assert_eq!(BootOrder::parse("dc").unwrap().order.as_deref(), Some("dc"));
        for bad in ["x", "cc", "order=c,once=z", "menu=maybe", "splash-time=70000", "reboot-timeout=x", "ordre=c"] {
            let text = BootOrder::parse(bad).unwrap_err().to_string();
            assert!(text.starts_with("-boot ") && text.lines().count() == 1, "{text}");
        }
    }

    #[test]
    fn items() {
        let item = FwCfgItem::parse("name=opt/x,string=a,,b").unwrap();
        assert_eq!(item, FwCfgItem { name: "opt/x".into(), data: ItemData::Text("a,b".into()) });
        assert_eq!(FwCfgItem::parse("opt/x,file=/f").unwrap().data, ItemData::File("/f".into()));
        for bad in ["string=x", "name=opt/x", "name=opt/x,file=a,string=b", "opt/x,gen_id=a", "opt/x,string=a,sting=b"]
        {
            assert!(FwCfgItem::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn identities() {
        let uuid = uuid_option("01234567-89ab-cdef-0123-456789ABCDEF").unwrap();
        assert_eq!(uuid[..4], [1, 0x23, 0x45, 0x67]);
        assert_eq!(parse_uuid("0123456789abcdef0123456789abcdef"), Some(uuid));
        for bad in ["", "01234567-89ab-cdef-0123-456789abcde", "0123-4567", "g123456789abcdef0123456789abcdef"] {
            assert!(uuid_option(bad).is_err(), "{bad}");
        }
        let fields = parse_smbios("type=1,serial=s 1,product=p").unwrap();
        assert!(fields.contains(&SmbiosField { kind: 1, key: "serial".into(), value: "s 1".into() }));
        assert_eq!(parse_smbios("type=11,value=a,value=b").unwrap().len(), 2);
        for (bad, says) in [
            ("serial=x", "type= is one of 0, 1"),
            ("type=9", "type=9"),
            ("type=1,serail=x", "did you mean serial?"),
            ("type=1,uuid=x", "a UUID"),
            ("type=0,release=1", "MAJOR.MINOR"),
            ("file=x", "binary form"),
        ] {
            let text = parse_smbios(bad).unwrap_err().to_string();
            assert!(text.contains(says), "{bad}: {text}");
        }
    }
}
