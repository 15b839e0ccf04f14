//! How long an instruction is that does not exist: a processor finds the length first, and says `#GP` of more than
//! fifteen bytes, `#UD` of what is shorter (APM volume 3 section 1.1, SDM volume 2 section 2.3.11).
//!
//! Opcodes that mean nothing have lengths too. AMD's processors take those of the one-byte and VEX maps to be like their
//! neighbours, and most of the two-byte map (0F) to have no ModRM byte.

/// What comes before the opcode.
#[derive(Default)]
struct Prefixes {
    count: usize,
    /// 66
    operand: bool,
    /// 67
    address: bool,
    /// The REX prefix, if one is right before the opcode.
    rex: u8,
}

impl Prefixes {
    fn of(bytes: &[u8], bits: u32) -> Prefixes {
        let mut p = Prefixes::default();
        for &b in bytes {
            let rex = if bits == 64 && b & 0xf0 == 0x40 { b } else { 0 };
            match b {
                0x66 => p.operand = true,
                0x67 => p.address = true,
                0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
                _ if rex != 0 => {}
                _ => break,
            }
            p.rex = rex;
            p.count += 1;
        }
        p
    }
}

/// What follows the opcode.
#[derive(Clone, Copy)]
struct Rest {
    modrm: bool,
    immediate: usize,
}

const fn rest(modrm: bool, immediate: usize) -> Rest {
    Rest { modrm, immediate }
}

/// The length of the instruction that `bytes` begin with, as far as it can be told from them: `None` if more are needed.
pub fn length(bytes: &[u8], bits: u32, amd: bool) -> Option<usize> {
    let p = Prefixes::of(bytes, bits);
    let mut at = p.count;
    let opcode = *bytes.get(at)?;
    let wide = p.rex & 8 != 0;
    let operand = if wide || p.operand == (bits == 16) { 4 } else { 2 };
    let branch = if bits == 64 && !amd { 4 } else { operand };
    let mut registers_only = false;
    let mut two_byte = |opcode: u8, branch: usize| {
        registers_only = matches!(opcode, 0x20..=0x23);
        two_byte(opcode, branch, amd)
    };
    let address = match (bits, p.address) {
        (64, false) => 8,
        (32, false) | (64, true) | (16, true) => 4,
        _ => 2,
    };
    at += 1;
    // The byte behind these tells whether they begin a VEX prefix; behind REX they do not for AMD's processors, and what they
    // begin does not exist for Intel's (both measured).
    let is_vex = |bytes: &[u8]| Some(bits == 64 && (p.rex == 0 || !amd) || bits != 64 && *bytes.get(at)? >= 0xc0);
    let rest = match opcode {
        0x0f => {
            let second = *bytes.get(at)?;
            at += 1;
            match second {
                0x38 | 0x3a => {
                    bytes.get(at)?;
                    at += 1;
                    rest(true, usize::from(second == 0x3a))
                }
                _ => two_byte(second, branch),
            }
        }
        0xc4 | 0xc5 if is_vex(bytes)? => {
            let map = if opcode == 0xc5 { 1 } else { *bytes.get(at)? & 31 };
            at += if opcode == 0xc5 { 1 } else { 2 };
            let opcode = *bytes.get(at)?;
            at += 1;
            match map {
                1 => two_byte(opcode, 4),
                map => rest(true, usize::from(map == 3)),
            }
        }
        0x62 if is_vex(bytes)? => {
            let map = *bytes.get(at)? & 7;
            at += 3;
            let opcode = *bytes.get(at)?;
            at += 1;
            if map == 1 { two_byte(opcode, 4) } else { rest(true, usize::from(map == 3)) }
        }
        // XOP, of which nothing is left.
        0x8f if amd && *bytes.get(at)? & 31 >= 8 => {
            let map = *bytes.get(at)? & 31;
            at += 2;
            bytes.get(at)?;
            at += 1;
            rest(true, if map == 10 { 4 } else { 0 })
        }
        0xe8 | 0xe9 => rest(false, branch),
        _ => one_byte(opcode, bytes.get(at).copied(), operand, address, wide)?,
    };
    if rest.modrm {
        at = modrm(bytes, at, address, registers_only)?;
    }
    let end = at + rest.immediate;
    (bytes.len() >= end).then_some(end)
}

fn one_byte(opcode: u8, next: Option<u8>, operand: usize, address: usize, wide: bool) -> Option<Rest> {
    Some(match opcode {
        0x00..=0x3f => match opcode & 7 {
            0..=3 => rest(true, 0),
            4 => rest(false, 1),
            5 => rest(false, operand),
            _ => rest(false, 0),
        },
        0x62 | 0x63 | 0x84..=0x8f | 0xc4 | 0xc5 | 0xd0..=0xd3 | 0xd8..=0xdf | 0xfe | 0xff => rest(true, 0),
        0x69 | 0x81 | 0xc7 => rest(true, operand),
        0x6b | 0x80 | 0x82 | 0x83 | 0xc0 | 0xc1 | 0xc6 => rest(true, 1),
        0x68 | 0xa9 => rest(false, operand),
        0x6a | 0x70..=0x7f | 0xa8 | 0xb0..=0xb7 | 0xcd | 0xd4 | 0xd5 | 0xe0..=0xe7 | 0xeb => rest(false, 1),
        0x9a | 0xea => rest(false, operand + 2),
        0xa0..=0xa3 => rest(false, address),
        0xb8..=0xbf => rest(false, if wide { 8 } else { operand }),
        0xc2 | 0xca => rest(false, 2),
        0xc8 => rest(false, 3),
        // TEST alone has an immediate.
        0xf6 | 0xf7 if next? >> 3 & 7 < 2 => rest(true, if opcode == 0xf6 { 1 } else { operand }),
        0xf6 | 0xf7 => rest(true, 0),
        _ => rest(false, 0),
    })
}

fn two_byte(opcode: u8, branch: usize, amd: bool) -> Rest {
    match opcode {
        // UD1 and UD0.
        0xb9 | 0xff if !amd => rest(true, 0),
        0x04..=0x0c
        | 0x0e
        | 0x24..=0x27
        | 0x30..=0x3f
        | 0x77
        | 0x7a
        | 0x7b
        | 0xa0..=0xa2
        | 0xa6..=0xaa
        | 0xb9
        | 0xff => rest(false, 0),
        0xc8..=0xcf => rest(false, 0),
        0x80..=0x8f => rest(false, branch),
        0x0f | 0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 => rest(true, 1),
        // EXTRQ and INSERTQ.
        0x78 if amd => rest(true, 2),
        _ => rest(true, 0),
    }
}

/// Where the ModRM byte's operand ends.
fn modrm(bytes: &[u8], at: usize, address: usize, registers_only: bool) -> Option<usize> {
    let byte = *bytes.get(at)?;
    let (mode, rm) = (byte >> 6, byte & 7);
    let mut end = at + 1;
    if mode == 3 || registers_only {
        return Some(end);
    }
    if address == 2 {
        return Some(end + if mode == 0 { 2 * usize::from(rm == 6) } else { usize::from(mode) });
    }
    let mut base = rm;
    if rm == 4 {
        base = *bytes.get(end)? & 7;
        end += 1;
    }
    Some(
        end + match mode {
            0 if base == 5 => 4,
            0 => 0,
            1 => 1,
            _ => 4,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn random(state: &mut u64) -> u8 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 32) as u8
    }

    /// Of instructions that exist, the decoder knows the same length.
    #[test]
    fn lengths_of_instructions_that_exist() {
        let mut state = 0x1234_5678_9abc_def1;
        let mut tried = 0;
        for i in 0..1_500_000u32 {
            let bits = [16, 32, 64][i as usize % 3];
            let mut bytes: [u8; 15] = std::array::from_fn(|_| random(&mut state));
            let at = (i / 3 % 4) as usize;
            match i / 12 % 6 {
                0 => bytes[at] = 0x0f,
                1 => bytes[at..at + 2].copy_from_slice(&[0x0f, 0x38]),
                2 => bytes[at..at + 2].copy_from_slice(&[0x0f, 0x3a]),
                3 => bytes[at..at + 2].copy_from_slice(&[0xc5, 0xf9]),
                4 => {
                    let map = 0xe1 + bytes[14] % 3;
                    bytes[at..at + 2].copy_from_slice(&[0xc4, map]);
                }
                _ => {}
            }
            for prefix in &mut bytes[..at] {
                *prefix = [0x66, 0x67, 0x2e, 0xf3, 0x48, 0x41][usize::from(*prefix) % if bits == 64 { 6 } else { 4 }];
            }
            let mut decoder = Decoder::new(bits, &bytes, DecoderOptions::AMD);
            let insn = decoder.decode();
            // Other makers' and earlier ones, and those whose length is in dispute.
            let xop = insn.op_code().encoding() == iced_x86::EncodingKind::XOP;
            let other = bytes
                .windows(2)
                .take(insn.len())
                .any(|w| w[0] == 0x0f && matches!(w[1], 0x78 | 0xa6 | 0xa7 | 0xb9 | 0xff));
            if insn.is_invalid() || xop || other {
                continue;
            }
            tried += 1;
            assert_eq!(length(&bytes, bits, true), Some(insn.len()), "{bits}: {bytes:02x?} {insn}");
        }
        assert!(tried > 300_000, "{tried}");
    }

    /// As measured on a processor of AMD's.
    #[test]
    fn lengths_of_what_does_not_exist() {
        let check = |bytes: &[u8], len: usize| {
            let mut all = bytes.to_vec();
            all.resize(20, 0);
            assert_eq!(length(&all, 64, true), Some(len), "{bytes:02x?}");
        };
        for (bytes, len) in [
            (&[0x06][..], 1),
            (&[0x82, 0xc0], 3),
            (&[0x82, 0x05], 7),
            (&[0x9a], 7),
            (&[0xd4], 2),
            (&[0x0f, 0x0a], 2),
            (&[0x0f, 0xff, 0xc0], 2),
            (&[0x0f, 0xb9, 0xc0], 2),
            (&[0x0f, 0x24, 0xc0], 2),
            (&[0x0f, 0x78, 0xc0], 5),
            (&[0x0f, 0x71, 0x84, 0x24], 9),
            (&[0x0f, 0x38, 0x0c, 0x05], 8),
            (&[0x0f, 0x3a, 0x00, 0xc0], 5),
            (&[0xc5, 0xf8, 0x04], 3),
            (&[0xc5, 0xf8, 0x80], 7),
            (&[0xc5, 0xf8, 0x00, 0xc0], 4),
            (&[0xc4, 0xe4, 0x79, 0x11, 0x84, 0x24], 10),
            (&[0xc4, 0xe3, 0x79, 0x00, 0xc0], 6),
            (&[0x48, 0xc5, 0xf8], 3),
            (&[0x48, 0xc4, 0xe2], 3),
            (&[0x48, 0x62, 0xf1], 3),
            (&[0x8f, 0xe8, 0x78, 0x00, 0xc0], 5),
            (&[0x8f, 0xea, 0x78, 0x00, 0xc0], 9),
        ] {
            check(bytes, len);
        }
        // Of Intel's, a VEX prefix behind REX is one.
        assert_eq!(length(&[0x48, 0xc5, 0xf8, 0x73, 0xf3, 0x98], 64, false), Some(6));
    }
}
