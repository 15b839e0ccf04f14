//! Instructions of x86's vector, x87 and MMX units, as [`Op::Unit`](crate::Op::Unit) carries them: taken apart far
//! enough that general registers and memory operands can be placed anew, and no further. A host with these units
//! executes them one to one, so results, flags and exceptions are those of the instruction itself.

use crate::flags::Flags;

/// Which operand of the instruction is a general register, and what happens to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UnitGpr {
    /// None.
    #[default]
    None,
    /// The register-or-memory operand is read (`movd xmm, r32`).
    InRm,
    /// The register-or-memory operand is written (`movd r32, xmm`).
    OutRm,
    /// The register operand is written (`pmovmskb r32, xmm`).
    OutReg,
    /// AX is written (`fnstsw ax`): the low two bytes of the result.
    OutAx,
}

/// What the memory operand is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UnitMemory {
    /// There is none.
    #[default]
    None,
    Load,
    Store,
}

/// An instruction, by its encoding (SDM volume 2 chapter 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UnitInsn {
    /// Opcode map: 0 one-byte opcodes (x87), 1 `0f`, 2 `0f 38`, 3 `0f 3a`.
    pub map: u8,
    /// Prefix that belongs to the opcode: 0 none, 1 `66`, 2 `f3`, 3 `f2`.
    pub prefix: u8,
    pub opcode: u8,
    /// VEX-coded.
    pub vex: bool,
    /// REX.W or VEX.W.
    pub w: bool,
    /// VEX.L: 32-byte vectors.
    pub wide: bool,
    /// Without a ModRM byte (`emms`, `vzeroupper`).
    pub bare: bool,
    /// Number of the register operand, or what extends the opcode.
    pub reg: u8,
    /// Number of VEX's third operand, 0 if there is none.
    pub v: u8,
    /// Number of the register-or-memory operand if it is a vector, MMX or x87 register.
    pub rm: u8,
    pub imm: Option<u8>,
    pub gpr: UnitGpr,
    pub memory: UnitMemory,
    /// Bytes of the memory operand: 1 to 32.
    pub bytes: u8,
    /// The memory operand must be aligned to its size.
    pub aligned: bool,
    /// Sets all six flags.
    pub sets_flags: bool,
    /// Flags it tests.
    pub reads_flags: Flags,
}

/// Where the register-or-memory operand is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnitPlace {
    /// A register by number.
    Reg(u8),
    /// `[base + index + disp]`.
    Mem { base: u8, index: Option<u8>, disp: i32 },
}

impl UnitInsn {
    /// Whether the instruction names a vector, MMX or x87 register, or an opcode extension, as its register operand
    /// (and not a general register).
    pub const fn own_reg(&self) -> bool {
        !matches!(self.gpr, UnitGpr::OutReg)
    }

    /// Appends the instruction's bytes, for 64-bit code, with its register operand `reg` and the other one at `place`.
    pub fn encode(&self, reg: u8, place: UnitPlace, out: &mut Vec<u8>) {
        const PREFIX: [u8; 4] = [0, 0x66, 0xf3, 0xf2];
        let (x, b) = match place {
            UnitPlace::Reg(r) => (0, r >> 3 & 1),
            UnitPlace::Mem { base, index, .. } => (index.unwrap_or(0) >> 3 & 1, base >> 3 & 1),
        };
        let (x, b) = if self.bare { (0, 0) } else { (x, b) };
        let r = reg >> 3 & 1;
        if self.vex {
            let tail = (!self.v & 15) << 3 | u8::from(self.wide) << 2 | self.prefix & 3;
            if self.map == 1 && !self.w && x | b == 0 {
                out.extend([0xc5, (1 - r) << 7 | tail]);
            } else {
                out.extend([0xc4, (1 - r) << 7 | (1 - x) << 6 | (1 - b) << 5 | self.map]);
                out.push(u8::from(self.w) << 7 | tail);
            }
        } else {
            if self.prefix != 0 {
                out.push(PREFIX[usize::from(self.prefix & 3)]);
            }
            let rex = u8::from(self.w) << 3 | r << 2 | x << 1 | b;
            if rex != 0 {
                out.push(0x40 | rex);
            }
            match self.map {
                0 => {}
                1 => out.push(0x0f),
                2 => out.extend([0x0f, 0x38]),
                _ => out.extend([0x0f, 0x3a]),
            }
        }
        out.push(self.opcode);
        if !self.bare {
            modrm(reg, place, out);
        }
        out.extend(self.imm);
    }
}

fn modrm(reg: u8, place: UnitPlace, out: &mut Vec<u8>) {
    let r = (reg & 7) << 3;
    match place {
        UnitPlace::Reg(m) => out.push(0xc0 | r | m & 7),
        UnitPlace::Mem { base, index, disp } => {
            // A base of rbp or r13 has no form without a displacement.
            let mode = match disp {
                0 if base & 7 != 5 => 0x00,
                -128..=127 => 0x40,
                _ => 0x80,
            };
            match index {
                Some(index) => out.extend([mode | r | 4, (index & 7) << 3 | base & 7]),
                None if base & 7 == 4 => out.extend([mode | r | 4, 0x24]),
                None => out.push(mode | r | base & 7),
            }
            match mode {
                0x00 => {}
                0x40 => out.push(disp as u8),
                _ => out.extend(disp.to_le_bytes()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(insn: UnitInsn, reg: u8, place: UnitPlace) -> Vec<u8> {
        let mut out = Vec::new();
        insn.encode(reg, place, &mut out);
        out
    }

    /// Against what an assembler makes of them.
    #[test]
    fn encodings() {
        let paddb = UnitInsn { map: 1, prefix: 1, opcode: 0xfc, ..UnitInsn::default() };
        let mem = |base, index, disp| UnitPlace::Mem { base, index, disp };
        // paddb xmm9, xmm2; paddb xmm1, [rbp]; paddb xmm1, [r12 + 0x100]; paddb xmm1, [rax + r14 + 8]
        assert_eq!(bytes(paddb, 9, UnitPlace::Reg(2)), [0x66, 0x44, 0x0f, 0xfc, 0xca]);
        assert_eq!(bytes(paddb, 1, mem(5, None, 0)), [0x66, 0x0f, 0xfc, 0x4d, 0x00]);
        assert_eq!(bytes(paddb, 1, mem(12, None, 0x100)), [0x66, 0x41, 0x0f, 0xfc, 0x8c, 0x24, 0, 1, 0, 0]);
        assert_eq!(bytes(paddb, 1, mem(0, Some(14), 8)), [0x66, 0x42, 0x0f, 0xfc, 0x4c, 0x30, 0x08]);
        // vaddpd ymm1, ymm2, ymm3; vaddpd ymm1, ymm2, [rax + r14]; vzeroupper
        let vaddpd = UnitInsn { map: 1, prefix: 1, opcode: 0x58, vex: true, wide: true, v: 2, ..UnitInsn::default() };
        assert_eq!(bytes(vaddpd, 1, UnitPlace::Reg(3)), [0xc5, 0xed, 0x58, 0xcb]);
        assert_eq!(bytes(vaddpd, 1, mem(0, Some(14), 0)), [0xc4, 0xa1, 0x6d, 0x58, 0x0c, 0x30]);
        let vzeroupper = UnitInsn { map: 1, opcode: 0x77, vex: true, bare: true, ..UnitInsn::default() };
        assert_eq!(bytes(vzeroupper, 0, UnitPlace::Reg(0)), [0xc5, 0xf8, 0x77]);
        // fadd qword [rcx]; fsqrt; pshufd xmm0, xmm1, 0x1b; cvtsi2sd xmm0, r10
        let fadd = UnitInsn { opcode: 0xdc, ..UnitInsn::default() };
        assert_eq!(bytes(fadd, 0, mem(1, None, 0)), [0xdc, 0x01]);
        let fsqrt = UnitInsn { opcode: 0xd9, ..UnitInsn::default() };
        assert_eq!(bytes(fsqrt, 7, UnitPlace::Reg(2)), [0xd9, 0xfa]);
        let pshufd = UnitInsn { map: 1, prefix: 1, opcode: 0x70, imm: Some(0x1b), ..UnitInsn::default() };
        assert_eq!(bytes(pshufd, 0, UnitPlace::Reg(1)), [0x66, 0x0f, 0x70, 0xc1, 0x1b]);
        let cvtsi2sd = UnitInsn { map: 1, prefix: 3, opcode: 0x2a, w: true, ..UnitInsn::default() };
        assert_eq!(bytes(cvtsi2sd, 0, UnitPlace::Reg(10)), [0xf2, 0x49, 0x0f, 0x2a, 0xc2]);
    }
}
