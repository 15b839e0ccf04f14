//! As much of telnet as a serial line needs (RFC 854; options of RFC 856, 857, 858).

const IAC: u8 = 255;
const DONT: u8 = 254;
const DO: u8 = 253;
const WILL: u8 = 251;
const SB: u8 = 250;
const BREAK: u8 = 243;
const SE: u8 = 240;
const BINARY: u8 = 0;
const ECHO: u8 = 1;
const SUPPRESS_GO_AHEAD: u8 = 3;

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Data,
    /// After IAC.
    Command,
    /// The option of WILL, WONT, DO or DONT.
    Option(u8),
    /// Inside a subnegotiation; true after IAC.
    Sub(bool),
}

/// What was received so far.
#[derive(Default)]
pub(super) struct Telnet {
    expect: Expect,
    /// The client sends 8-bit data: CR is not followed by NUL.
    binary: bool,
    after_cr: bool,
}

/// What a server begins with: character at a time, echoed by the guest, all 8 bits.
const SERVER: [u8; 12] = [IAC, WILL, ECHO, IAC, WILL, SUPPRESS_GO_AHEAD, IAC, WILL, BINARY, IAC, DO, BINARY];

impl Telnet {
    /// What is sent first.
    pub(super) fn greeting(server: bool) -> &'static [u8] {
        if server { &SERVER } else { &[] }
    }

    /// One byte of data as it is sent.
    pub(super) fn encode(byte: u8) -> impl Iterator<Item = u8> {
        std::iter::repeat_n(byte, if byte == IAC { 2 } else { 1 })
    }

    /// The data in what was received, and how many breaks there were.
    pub(super) fn decode(&mut self, input: &[u8]) -> (Vec<u8>, usize) {
        let (mut data, mut breaks) = (Vec::with_capacity(input.len()), 0);
        for &byte in input {
            self.expect = match (self.expect, byte) {
                (Expect::Data, IAC) => Expect::Command,
                (Expect::Data, _) => self.data(byte, &mut data),
                (Expect::Command, IAC) => self.data(byte, &mut data),
                (Expect::Command, BREAK) => {
                    breaks += 1;
                    Expect::Data
                }
                (Expect::Command, SB) => Expect::Sub(false),
                (Expect::Command, WILL..=DONT) => Expect::Option(byte),
                (Expect::Command, _) => Expect::Data,
                (Expect::Option(verb), option) => {
                    if option == BINARY && verb < DO {
                        self.binary = verb == WILL;
                    }
                    Expect::Data
                }
                (Expect::Sub(true), SE) => Expect::Data,
                (Expect::Sub(after_iac), _) => Expect::Sub(byte == IAC && !after_iac),
            };
        }
        (data, breaks)
    }

    fn data(&mut self, byte: u8, data: &mut Vec<u8>) -> Expect {
        // RFC 854, "the sequence CR NUL": a bare carriage return.
        let padding = byte == 0 && self.after_cr && !self.binary;
        if !padding {
            data.push(byte);
        }
        self.after_cr = byte == b'\r';
        Expect::Data
    }
}
