//! Expressions over registers, symbols and memory: what conditions and addresses are written in.
//!
//! Numbers are unsigned and 64 bits wide; `0x` is hexadecimal. Names are registers (with `$` always) or symbols.
//! `'A'` is the code of a character. `[a]` is the 8 bytes at `a`, `u8[a]`, `u16[a]`, `u32[a]`, `u64[a]` fewer or as many. Operators and their
//! precedences are C's: `|| && | ^ & == != < <= > >= << >> + - * / % ! ~ -`.

/// Where an expression gets values from.
pub trait Values {
    fn register(&self, name: &str) -> Option<u64>;
    /// The same of a name without `$`: a symbol may have it too.
    fn usual_register(&self, name: &str) -> Option<u64> {
        self.register(name)
    }
    /// What to say of a register that is not there.
    fn no_register(&self, name: &str) -> String {
        format!("there is no register {name}")
    }
    /// A symbol's address, or why there is none.
    fn symbol(&self, name: &str) -> Result<u64, String>;
    /// `bytes` at a virtual address.
    fn memory(&self, address: u64, bytes: usize) -> Option<u64>;
}

/// Deepest nesting.
const DEEPEST: u32 = 64;

/// The value of an expression.
///
/// # Errors
/// What is wrong, in one line.
pub fn eval(text: &str, values: &dyn Values) -> Result<u64, String> {
    let mut p = Parser { rest: text.trim(), values, depth: 0 };
    let value = p.binary(0)?;
    if p.rest.is_empty() { Ok(value) } else { Err(format!("{text:?}: {:?} is not understood", p.rest)) }
}

struct Parser<'a> {
    rest: &'a str,
    values: &'a dyn Values,
    depth: u32,
}

/// Operators by precedence, longer ones first.
const OPERATORS: &[&[&str]] = &[
    &["||"],
    &["&&"],
    &["|"],
    &["^"],
    &["&"],
    &["==", "!="],
    &["<=", ">=", "<", ">"],
    &["<<", ">>"],
    &["+", "-"],
    &["*", "/", "%"],
];

impl<'a> Parser<'a> {
    fn eat(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    /// An operator of this precedence: not the begin of a longer one.
    fn operator(&mut self, level: usize) -> Option<&'static str> {
        let longest =
            OPERATORS.iter().flat_map(|o| o.iter()).filter(|o| self.rest.starts_with(**o)).max_by_key(|o| o.len())?;
        let found = OPERATORS[level].iter().find(|o| *o == longest)?;
        self.eat(found);
        Some(found)
    }

    fn binary(&mut self, level: usize) -> Result<u64, String> {
        if level == OPERATORS.len() {
            return self.unary();
        }
        let mut a = self.binary(level + 1)?;
        while let Some(operator) = self.operator(level) {
            let b = self.binary(level + 1)?;
            a = apply(operator, a, b)?;
        }
        Ok(a)
    }

    fn unary(&mut self) -> Result<u64, String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err("this is nested too deeply".to_owned());
        }
        let value = if self.eat("-") {
            self.unary()?.wrapping_neg()
        } else if self.eat("!") {
            u64::from(self.unary()? == 0)
        } else if self.eat("~") {
            !self.unary()?
        } else if self.eat("*") {
            let at = self.unary()?;
            self.load(at, 8)?
        } else {
            self.primary()?
        };
        self.depth -= 1;
        Ok(value)
    }

    fn load(&self, at: u64, bytes: usize) -> Result<u64, String> {
        self.values.memory(at, bytes).ok_or_else(|| format!("there is no memory at {at:#x}"))
    }

    /// What is behind the first quote.
    fn character(&mut self, rest: &'a str) -> Result<u64, String> {
        let (first, after) = rest.split_at(rest.chars().next().map_or(0, char::len_utf8));
        let (value, after) = match (first, after.chars().next()) {
            ("\\", Some(letter)) => {
                let value = match letter {
                    'n' => 10,
                    'r' => 13,
                    't' => 9,
                    '0' => 0,
                    other => other as u64,
                };
                (value, &after[letter.len_utf8()..])
            }
            _ => (first.chars().next().map_or(0, |c| c as u64), after),
        };
        let rest =
            after.strip_prefix('\'').filter(|_| !first.is_empty()).ok_or("a ' is missing: characters are 'A'")?;
        self.rest = rest.trim_start();
        Ok(value)
    }

    fn primary(&mut self) -> Result<u64, String> {
        if let Some((word, _)) = self.rest.split_once('[').filter(|(word, _)| {
            word.strip_prefix('u').is_some_and(|bits| !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit()))
        }) && !["u8", "u16", "u32", "u64"].contains(&word)
        {
            return Err(format!("{word}[…]: there are u8, u16, u32 and u64"));
        }
        for (name, bytes) in [("u8[", 1), ("u16[", 2), ("u32[", 4), ("u64[", 8), ("[", 8)] {
            if self.eat(name) {
                let at = self.binary(0)?;
                if !self.eat("]") {
                    return Err("a ] is missing".to_owned());
                }
                return self.load(at, bytes);
            }
        }
        if self.eat("(") {
            let value = self.binary(0)?;
            return if self.eat(")") { Ok(value) } else { Err("a ) is missing".to_owned()) };
        }
        if let Some(rest) = self.rest.strip_prefix('\'') {
            return self.character(rest);
        }
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || "_.$@".contains(c))).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        if word.is_empty() {
            return Err(if rest.is_empty() {
                "a value is missing at the end".to_owned()
            } else {
                format!("{rest:?} is not understood")
            });
        }
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return crate::trace::filter::number(word);
        }
        if let Some(name) = word.strip_prefix('$') {
            return self.values.register(name).ok_or_else(|| self.values.no_register(name));
        }
        match self.values.usual_register(word) {
            Some(value) => Ok(value),
            None => self.values.symbol(word).or_else(|e| self.values.register(word).ok_or(e)),
        }
    }
}

fn apply(operator: &str, a: u64, b: u64) -> Result<u64, String> {
    let shift = |b: u64| u32::try_from(b).unwrap_or(u32::MAX);
    Ok(match operator {
        "||" => u64::from(a != 0 || b != 0),
        "&&" => u64::from(a != 0 && b != 0),
        "|" => a | b,
        "^" => a ^ b,
        "&" => a & b,
        "==" => u64::from(a == b),
        "!=" => u64::from(a != b),
        "<=" => u64::from(a <= b),
        ">=" => u64::from(a >= b),
        "<" => u64::from(a < b),
        ">" => u64::from(a > b),
        "<<" => a.checked_shl(shift(b)).unwrap_or(0),
        ">>" => a.checked_shr(shift(b)).unwrap_or(0),
        "+" => a.wrapping_add(b),
        "-" => a.wrapping_sub(b),
        "*" => a.wrapping_mul(b),
        "/" => a.checked_div(b).ok_or("division by zero")?,
        _ => a.checked_rem(b).ok_or("division by zero")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake;
    impl Values for Fake {
        fn register(&self, name: &str) -> Option<u64> {
            (name == "a0").then_some(7)
        }
        fn symbol(&self, name: &str) -> Result<u64, String> {
            if name == "jiffies" { Ok(0x1000) } else { Err(format!("{name}: there is no such symbol")) }
        }
        fn memory(&self, address: u64, bytes: usize) -> Option<u64> {
            (address < 0x2000).then_some(address * 0x100 + bytes as u64)
        }
    }

    #[test]
    fn values_and_precedence() {
        for (text, value) in [
            ("1 + 2 * 3", 7),
            ("(1+2)*3", 9),
            ("$a0 == 7 && a0 != 8", 1),
            ("u32[jiffies + 8]", 0x10_0804),
            ("*jiffies", 0x10_0008),
            ("[0x10]", 0x1008),
            ("1 << 4 | 3", 0x13),
            ("-1 >> 60", 15),
            ("!0 + ~0", 0),
            ("5 <= 5", 1),
            ("10 % 4 - 1", 1),
            ("a0&3", 3),
            ("'A' + 1", 66),
            ("'\\n' == 10 && '\\'' == 39 && ' ' == 32", 1),
        ] {
            assert_eq!(eval(text, &Fake), Ok(value), "{text}");
        }
    }

    #[test]
    fn errors_say_what() {
        for (text, says) in [
            ("1 +", "missing at the end"),
            ("nobody", "no such symbol"),
            ("$zz", "no register zz"),
            ("[0x5000]", "no memory at 0x5000"),
            ("(1", ") is missing"),
            ("1 / 0", "division by zero"),
            ("1 2", "not understood"),
            ("'A", "' is missing"),
            ("'", "' is missing"),
            ("'\\", "' is missing"),
        ] {
            assert!(eval(text, &Fake).unwrap_err().contains(says), "{text}: {:?}", eval(text, &Fake));
        }
        assert!(eval(&"(".repeat(10_000), &Fake).is_err());
        assert!(eval(&"-".repeat(10_000), &Fake).is_err());
    }
}
