//! Packets: `$body#checksum`, with acknowledgements around them (E.1 "Overview").

/// Longest body taken, in bytes; said to the client as `PacketSize`.
pub const MAX_BODY: usize = 0x4000;

/// What a client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A packet's body, unescaped.
    Packet(Vec<u8>),
    /// Ctrl-C outside a packet.
    Interrupt,
    /// The last packet did not arrive well.
    Resend,
    /// A packet with a wrong checksum, or too long.
    Damaged,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Outside,
    Body,
    Escape,
    Checksum(Option<u8>),
}

/// Finds packets in a stream of bytes.
#[derive(Default)]
pub struct Framer {
    state: State,
    body: Vec<u8>,
    sum: u8,
    too_long: bool,
}

impl Framer {
    /// Takes a byte.
    pub fn feed(&mut self, byte: u8) -> Option<Incoming> {
        match self.state {
            State::Outside => match byte {
                b'$' => {
                    *self = Framer { state: State::Body, body: std::mem::take(&mut self.body), ..Framer::default() };
                    self.body.clear();
                    None
                }
                0x03 => Some(Incoming::Interrupt),
                b'-' => Some(Incoming::Resend),
                _ => None,
            },
            State::Body if byte == b'#' => {
                self.state = State::Checksum(None);
                None
            }
            // The start of a packet cannot be inside one: the end of that was lost.
            State::Body if byte == b'$' => {
                (self.sum, self.too_long) = (0, false);
                self.body.clear();
                None
            }
            State::Body if byte == b'}' => {
                self.sum = self.sum.wrapping_add(byte);
                self.state = State::Escape;
                None
            }
            State::Body => self.push(byte, byte),
            State::Escape => {
                self.state = State::Body;
                self.push(byte, byte ^ 0x20)
            }
            State::Checksum(None) => {
                let digit = hex_digit(byte);
                self.state = if digit.is_some() { State::Checksum(digit) } else { State::Outside };
                digit.is_none().then_some(Incoming::Damaged)
            }
            State::Checksum(Some(high)) => {
                self.state = State::Outside;
                let good = hex_digit(byte).is_some_and(|low| high << 4 | low == self.sum) && !self.too_long;
                Some(if good { Incoming::Packet(std::mem::take(&mut self.body)) } else { Incoming::Damaged })
            }
        }
    }

    fn push(&mut self, sent: u8, meant: u8) -> Option<Incoming> {
        self.sum = self.sum.wrapping_add(sent);
        if self.body.len() < MAX_BODY {
            self.body.push(meant);
        } else {
            self.too_long = true;
        }
        None
    }
}

/// A packet with this body.
pub fn encode(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 4);
    out.push(b'$');
    for &byte in body {
        if matches!(byte, b'#' | b'$' | b'}' | b'*') {
            out.extend([b'}', byte ^ 0x20]);
        } else {
            out.push(byte);
        }
    }
    let sum = out[1..].iter().fold(0u8, |s, b| s.wrapping_add(*b));
    out.extend(format!("#{sum:02x}").bytes());
    out
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|d| d as u8)
}

/// Bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Hexadecimal digits as bytes; `None` if they are none, or an odd number.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let byte = |pair: &[u8]| Some(hex_digit(pair[0])? << 4 | hex_digit(pair[1])?);
    text.as_bytes().chunks(2).map(byte).collect()
}

/// A hexadecimal number of at most 16 digits.
pub fn number(text: &str) -> Option<u64> {
    let fine = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    if fine { u64::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(f: &mut Framer, bytes: &[u8]) -> Vec<Incoming> {
        bytes.iter().filter_map(|b| f.feed(*b)).collect()
    }

    #[test]
    fn packets_acknowledgements_and_interrupts() {
        let mut f = Framer::default();
        let got = feed(&mut f, b"+$g#67\x03$m1,2#fc-$X}\x03}]#");
        let g = Incoming::Packet(b"g".to_vec());
        assert_eq!(got, [g, Incoming::Interrupt, Incoming::Packet(b"m1,2".to_vec()), Incoming::Resend]);
        let sum = b"X}\x03}]".iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!(feed(&mut f, format!("{sum:02x}").as_bytes()), [Incoming::Packet(b"X#}".to_vec())]);
    }

    #[test]
    fn damage() {
        let mut f = Framer::default();
        assert_eq!(feed(&mut f, b"$g#68$g#6x$g#xx"), vec![Incoming::Damaged; 3]);
        assert_eq!(feed(&mut f, b"$lost$g#67"), [Incoming::Packet(b"g".to_vec())]);
        let long = vec![b'a'; MAX_BODY + 1];
        feed(&mut f, b"$");
        feed(&mut f, &long);
        let sum = long.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!(feed(&mut f, format!("#{sum:02x}").as_bytes()), [Incoming::Damaged]);
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(feed(&mut Framer::default(), &encode(&all)), [Incoming::Packet(all)]);
        assert_eq!(encode(b"OK"), b"$OK#9a");
    }

    #[test]
    fn numbers() {
        assert_eq!((number("ffffffffffffffff"), number("0")), (Some(u64::MAX), Some(0)));
        assert_eq!((number(""), number("+1"), number("10000000000000000"), number("g")), (None, None, None, None));
        assert_eq!((from_hex("00fF"), from_hex("0"), from_hex("0é")), (Some(vec![0, 255]), None, None));
    }
}
