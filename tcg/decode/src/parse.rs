//! Reads the notation described in the crate's documentation.

use crate::model::*;
use crate::{Error, Source};

/// Reads all files, in order, into one set of tables.
pub fn parse(sources: &[Source<'_>]) -> Result<Tables, Error> {
    let mut parser = Parser::default();
    for source in sources {
        parser.extensions.clear();
        for (index, line) in source.text.lines().enumerate() {
            let place = Place { file: source.name.to_owned(), line: index + 1 };
            let line = line.split('#').next().unwrap_or("").trim();
            if !line.is_empty() {
                parser.line(line, &place)?;
            }
        }
        if parser.group.is_some() {
            let place = Place { file: source.name.to_owned(), line: source.text.lines().count() };
            return Err(place.error("the group is still open at the end of the file; close it with '}'"));
        }
    }
    Ok(parser.tables)
}

#[derive(Default)]
struct Parser {
    tables: Tables,
    extensions: Vec<String>,
    /// Number of the open group.
    group: Option<usize>,
    units: usize,
}

/// The right side of a format or pattern.
#[derive(Default)]
struct Body {
    bits: Bits,
    format: Option<usize>,
    set: Option<usize>,
    assigns: Vec<(String, Value)>,
}

impl Parser {
    fn line(&mut self, line: &str, place: &Place) -> Result<(), Error> {
        match line.as_bytes()[0] {
            b'{' => self.open_group(place),
            b'}' => match self.group.take() {
                Some(_) => Ok(()),
                None => Err(place.error("'}' without an open group")),
            },
            b'%' => self.field(line, place),
            b'&' => self.set(line, place),
            b'@' => self.format(line, place),
            _ => match line.strip_prefix("extension ") {
                Some(names) => {
                    self.extensions = names.split_whitespace().map(str::to_owned).collect();
                    Ok(())
                }
                None => self.pattern(line, place),
            },
        }
    }

    fn open_group(&mut self, place: &Place) -> Result<(), Error> {
        if self.group.is_some() {
            return Err(place.error("a group inside a group; write its patterns in order in one group"));
        }
        self.group = Some(self.units);
        self.units += 1;
        Ok(())
    }

    fn field(&mut self, line: &str, place: &Place) -> Result<(), Error> {
        let mut words = line[1..].split_whitespace();
        let name = identifier(words.next(), place)?;
        if self.tables.fields.iter().any(|f| f.name == name) {
            return Err(place.error(format!("field %{name} is defined twice")));
        }
        let mut field = Field { name, place: place.clone(), parts: Vec::new(), shift: 0, add: 0 };
        for word in words {
            if let Some(shift) = word.strip_prefix("<<") {
                field.shift = number(shift, place)? as u32;
            } else if let Some(add) = word.strip_prefix('+') {
                field.add = number(add, place)?;
            } else {
                let part = part(word, place)?;
                if part.signed && !field.parts.is_empty() {
                    return Err(place.error(format!("{word}: only the first part can be signed")));
                }
                field.parts.push(part);
            }
        }
        let bits = field.parts.iter().map(|p| p.len).sum::<u32>() + field.shift;
        if field.parts.is_empty() || bits > 32 {
            return Err(place.error(format!("field %{} has {bits} bits; it takes 1 to 32", field.name)));
        }
        self.tables.fields.push(field);
        Ok(())
    }

    fn set(&mut self, line: &str, place: &Place) -> Result<(), Error> {
        let mut words = line[1..].split_whitespace();
        let name = identifier(words.next(), place)?;
        if self.tables.sets.iter().any(|s| s.name == name) {
            return Err(place.error(format!("argument set &{name} is defined twice")));
        }
        let mut args: Vec<Arg> = Vec::new();
        for word in words {
            let (arg, kind) = word.split_once(':').unwrap_or((word, "dec"));
            let arg = Arg { name: identifier(Some(arg), place)?, kind: identifier(Some(kind), place)? };
            if args.iter().any(|a| a.name == arg.name) {
                return Err(place.error(format!("argument {} is listed twice", arg.name)));
            }
            args.push(arg);
        }
        if args.is_empty() {
            return Err(place.error(format!("argument set &{name} is empty; leave the set out instead")));
        }
        self.tables.sets.push(ArgSet { name, place: place.clone(), args });
        Ok(())
    }

    fn format(&mut self, line: &str, place: &Place) -> Result<(), Error> {
        let mut words = line[1..].split_whitespace();
        let name = identifier(words.next(), place)?;
        if self.tables.formats.iter().any(|f| f.name == name) {
            return Err(place.error(format!("format @{name} is defined twice")));
        }
        let body = self.body(words, place)?;
        if body.format.is_some() {
            return Err(place.error("a format cannot use another format"));
        }
        let Body { bits, set, assigns, .. } = body;
        self.tables.formats.push(Format { name, place: place.clone(), bits, set, assigns });
        self.tables.used_formats.push(false);
        Ok(())
    }

    fn pattern(&mut self, line: &str, place: &Place) -> Result<(), Error> {
        let (code, text) = match line.split_once(" : ") {
            Some((code, text)) => (code, text.trim()),
            None => (line, ""),
        };
        let mut words = code.split_whitespace();
        let method = identifier(words.next(), place)?;
        let mut body = self.body(words, place)?;
        if let Some(index) = body.format {
            self.tables.used_formats[index] = true;
            let format = &self.tables.formats[index];
            body.bits = merge(format, body.bits, place)?;
            body.set = body.set.or(format.set);
            for (arg, value) in &format.assigns {
                if !body.assigns.iter().any(|(a, _)| a == arg) {
                    body.assigns.push((arg.clone(), *value));
                }
            }
        }
        let unit = match self.group {
            Some(unit) => unit,
            None => {
                self.units += 1;
                self.units - 1
            }
        };
        let reserved = method == "illegal";
        if reserved && !text.is_empty() || !reserved && text.is_empty() {
            return Err(place.error("every pattern but an illegal one needs ' : ' and a display text"));
        }
        let values = if reserved { Vec::new() } else { self.values(&body, place)? };
        let display = self.display(text, body.set, place)?;
        self.tables.patterns.push(Pattern {
            place: place.clone(),
            mnemonic: text.split([' ', '{']).next().unwrap_or("").to_owned(),
            method,
            bits: body.bits,
            set: if reserved { None } else { body.set },
            values,
            extensions: self.extensions.clone(),
            display,
            unit,
        });
        Ok(())
    }

    /// Bits, format, argument set and assignments.
    fn body<'w>(&self, words: impl Iterator<Item = &'w str>, place: &Place) -> Result<Body, Error> {
        let mut body = Body::default();
        for word in words {
            if word.bytes().all(|b| matches!(b, b'0' | b'1' | b'.' | b'-')) {
                push_bits(&mut body.bits, word, place)?;
            } else if let Some(name) = word.strip_prefix('@') {
                body.format = Some(index(&self.tables.formats, |f| &f.name, name, '@', place)?);
            } else if let Some(name) = word.strip_prefix('&') {
                body.set = Some(index(&self.tables.sets, |s| &s.name, name, '&', place)?);
            } else {
                let assign = self.assign(word, place)?;
                body.assigns.push(assign);
            }
        }
        if !matches!(body.bits.width, 16 | 32) {
            return Err(place.error(format!("{} bits in the pattern; write 16 or 32", body.bits.width)));
        }
        Ok(body)
    }

    fn assign(&self, word: &str, place: &Place) -> Result<(String, Value), Error> {
        let (arg, value) = match word.split_once('=') {
            Some((arg, value)) => (arg, value),
            None => (word.strip_prefix('%').unwrap_or(word), word),
        };
        let value = match value.strip_prefix('%') {
            Some(name) => Value::Field(index(&self.tables.fields, |f| &f.name, name, '%', place)?),
            None => Value::Const(number(value, place)?),
        };
        Ok((identifier(Some(arg), place)?, value))
    }

    /// The value of each argument of the set.
    fn values(&self, body: &Body, place: &Place) -> Result<Vec<Value>, Error> {
        let args: &[Arg] = body.set.map_or(&[], |set| &self.tables.sets[set].args);
        for (name, _) in &body.assigns {
            if !args.iter().any(|arg| arg.name == *name) {
                return Err(place.error(format!("'{name}' is not an argument of the pattern's set")));
            }
        }
        args.iter()
            .map(|arg| {
                let found = body.assigns.iter().find(|(name, _)| *name == arg.name);
                found
                    .map(|(_, value)| *value)
                    .ok_or_else(|| place.error(format!("argument '{}' has no value; add {0}=…", arg.name)))
            })
            .collect()
    }

    fn display(&self, text: &str, set: Option<usize>, place: &Place) -> Result<Vec<Piece>, Error> {
        let args: &[Arg] = set.map_or(&[], |set| &self.tables.sets[set].args);
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let Some((inside, after)) = after.split_once('}') else {
                return Err(place.error("'{' without '}' in the display text"));
            };
            let (name, kind) = inside.split_once(':').map_or((inside, None), |(n, k)| (n, Some(k)));
            let Some(arg) = args.iter().find(|arg| arg.name == name) else {
                return Err(place.error(format!("'{{{name}}}' is not an argument of the pattern's set")));
            };
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            let kind = identifier(Some(kind.unwrap_or(&arg.kind)), place)?;
            pieces.push(Piece::Arg { name: name.to_owned(), kind });
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(pieces)
    }
}

/// Adds a run of bit characters below those already there.
fn push_bits(bits: &mut Bits, word: &str, place: &Place) -> Result<(), Error> {
    for char in word.bytes() {
        if bits.width == 32 {
            return Err(place.error("more than 32 bits in the pattern; write 16 or 32"));
        }
        bits.width += 1;
        bits.mask = bits.mask << 1 | u32::from(matches!(char, b'0' | b'1'));
        bits.value = bits.value << 1 | u32::from(char == b'1');
        bits.field = bits.field << 1 | u32::from(char == b'.');
    }
    Ok(())
}

/// A pattern's bits laid over its format's.
fn merge(format: &Format, bits: Bits, place: &Place) -> Result<Bits, Error> {
    let base = format.bits;
    if base.width != bits.width {
        let name = &format.name;
        return Err(place.error(format!("format @{name} has {} bits, the pattern {}", base.width, bits.width)));
    }
    if base.mask & bits.mask & (base.value ^ bits.value) != 0 {
        return Err(place.error(format!("fixed bits contradict those of format @{}", format.name)));
    }
    let mask = base.mask | bits.mask;
    let field = (base.field | bits.field) & !mask;
    Ok(Bits { width: bits.width, mask, value: base.value | bits.value, field })
}

fn part(word: &str, place: &Place) -> Result<Part, Error> {
    let bad = || place.error(format!("'{word}' is not LSB:LEN or LSB:sLEN"));
    let (lsb, len) = word.split_once(':').ok_or_else(bad)?;
    let (len, signed) = len.strip_prefix('s').map_or((len, false), |len| (len, true));
    let (lsb, len) = (lsb.parse::<u32>().map_err(|_| bad())?, len.parse::<u32>().map_err(|_| bad())?);
    if len == 0 || lsb > 31 || len > 32 - lsb {
        return Err(place.error(format!("'{word}' is not within 32 bits")));
    }
    Ok(Part { lsb, len, signed })
}

fn identifier(word: Option<&str>, place: &Place) -> Result<String, Error> {
    let word = word.unwrap_or("");
    let good = word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && !word.starts_with(|c: char| c.is_ascii_digit())
        && !word.is_empty();
    if good {
        return Ok(word.to_owned());
    }
    Err(place.error(format!("'{word}' is not a name; use a-z, 0-9 and _, not starting with a digit")))
}

fn number(word: &str, place: &Place) -> Result<i32, Error> {
    word.parse().map_err(|_| place.error(format!("'{word}' is not a decimal number")))
}

fn index<T>(all: &[T], key: fn(&T) -> &String, name: &str, sigil: char, place: &Place) -> Result<usize, Error> {
    let found = all.iter().position(|item| key(item) == name);
    found.ok_or_else(|| place.error(format!("{sigil}{name} is not defined above")))
}
