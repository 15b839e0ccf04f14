//! RISC-V machine code without an assembler: encodings (vol. I, chapter 2) and programs with labels.

/// Number of an integer register.
pub type Reg = u32;

/// Integer registers by their ABI names.
pub mod reg {
    use super::Reg;
    pub const ZERO: Reg = 0;
    pub const RA: Reg = 1;
    pub const SP: Reg = 2;
    pub const T0: Reg = 5;
    pub const T1: Reg = 6;
    pub const T2: Reg = 7;
    pub const S0: Reg = 8;
    pub const S1: Reg = 9;
    pub const A0: Reg = 10;
    pub const A1: Reg = 11;
    pub const A2: Reg = 12;
    pub const A3: Reg = 13;
    pub const A4: Reg = 14;
    pub const A5: Reg = 15;
    pub const A6: Reg = 16;
    pub const A7: Reg = 17;
    pub const S2: Reg = 18;
    pub const S3: Reg = 19;
    pub const T3: Reg = 28;
    pub const T4: Reg = 29;
    pub const T5: Reg = 30;
    pub const T6: Reg = 31;
}

/// Instructions without operands.
pub mod insn {
    pub const ECALL: u32 = 0x73;
    pub const EBREAK: u32 = 0x0010_0073;
    pub const MRET: u32 = 0x3020_0073;
    pub const SRET: u32 = 0x1020_0073;
    pub const WFI: u32 = 0x1050_0073;
    pub const FENCE: u32 = 0x0ff0_000f;
    pub const FENCE_I: u32 = 0x100f;
    pub const SFENCE_ALL: u32 = 0x1200_0073;
    pub const NOP: u32 = 0x13;
    /// `pause`: for loops that wait, since harts may be more than the host's CPUs.
    pub const PAUSE: u32 = 0x0100_000f;
}

/// R format.
pub const fn r(opcode: u32, funct3: u32, funct7: u32, rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode
}

/// I format.
pub const fn i(opcode: u32, funct3: u32, rd: Reg, rs1: Reg, imm: i32) -> u32 {
    (imm as u32) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode
}

/// S format.
pub const fn s(funct3: u32, rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    let imm = imm as u32;
    (imm >> 5 & 127) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (imm & 31) << 7 | 0x23
}

/// The offset of a B format.
pub const fn b_offset(offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 12 & 1) << 31 | (o >> 5 & 63) << 25 | (o >> 1 & 15) << 8 | (o >> 11 & 1) << 7
}

/// B format.
pub const fn b(funct3: u32, rs1: Reg, rs2: Reg, offset: i32) -> u32 {
    rs2 << 20 | rs1 << 15 | funct3 << 12 | b_offset(offset) | 0x63
}

/// `jal`.
pub const fn jal(rd: Reg, offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 20 & 1) << 31 | (o >> 1 & 0x3ff) << 21 | (o >> 11 & 1) << 20 | (o >> 12 & 0xff) << 12 | rd << 7 | 0x6f
}

/// `jalr rd, imm(rs1)`.
pub const fn jalr(rd: Reg, rs1: Reg, imm: i32) -> u32 {
    i(0x67, 0, rd, rs1, imm)
}

/// `addi`.
pub const fn addi(rd: Reg, rs1: Reg, imm: i32) -> u32 {
    i(0x13, 0, rd, rs1, imm)
}

/// `slli`.
pub const fn slli(rd: Reg, rs1: Reg, by: u32) -> u32 {
    i(0x13, 1, rd, rs1, by as i32)
}

/// `add`.
pub const fn add(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 0, 0, rd, rs1, rs2)
}

/// `sub`.
pub const fn sub(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 0, 32, rd, rs1, rs2)
}

/// `xor`.
pub const fn xor(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 4, 0, rd, rs1, rs2)
}

/// `or`.
pub const fn or(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r(0x33, 6, 0, rd, rs1, rs2)
}

/// `ld`.
pub const fn ld(rd: Reg, rs1: Reg, imm: i32) -> u32 {
    i(0x03, 3, rd, rs1, imm)
}

/// `lw`.
pub const fn lw(rd: Reg, rs1: Reg, imm: i32) -> u32 {
    i(0x03, 2, rd, rs1, imm)
}

/// `sd`.
pub const fn sd(rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    s(3, rs2, rs1, imm)
}

/// `sw`.
pub const fn sw(rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    s(2, rs2, rs1, imm)
}

/// `csrrw`.
pub const fn csrrw(rd: Reg, csr: u16, rs1: Reg) -> u32 {
    i(0x73, 1, rd, rs1, csr as i32)
}

/// `csrrs`.
pub const fn csrrs(rd: Reg, csr: u16, rs1: Reg) -> u32 {
    i(0x73, 2, rd, rs1, csr as i32)
}

/// `csrrsi`.
pub const fn csrrsi(rd: Reg, csr: u16, bits: u32) -> u32 {
    i(0x73, 6, rd, bits, csr as i32)
}

/// `csrrci`.
pub const fn csrrci(rd: Reg, csr: u16, bits: u32) -> u32 {
    i(0x73, 7, rd, bits, csr as i32)
}

/// `lr.d` (acquire, release).
pub const fn lr_d(rd: Reg, rs1: Reg) -> u32 {
    r(0x2f, 3, 2 << 2 | 3, rd, rs1, 0)
}

/// `sc.d` (acquire, release).
pub const fn sc_d(rd: Reg, rs2: Reg, rs1: Reg) -> u32 {
    r(0x2f, 3, 3 << 2 | 3, rd, rs1, rs2)
}

/// `lr.w` (acquire, release).
pub const fn lr_w(rd: Reg, rs1: Reg) -> u32 {
    r(0x2f, 2, 2 << 2 | 3, rd, rs1, 0)
}

/// `sc.w` (acquire, release).
pub const fn sc_w(rd: Reg, rs2: Reg, rs1: Reg) -> u32 {
    r(0x2f, 2, 3 << 2 | 3, rd, rs1, rs2)
}

/// Read-modify-write operations, by `funct5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amo {
    Swap = 1,
    Add = 0,
    Xor = 4,
    And = 12,
    Or = 8,
    Min = 16,
    Max = 20,
    Minu = 24,
    Maxu = 28,
}

/// `amo<op>.d` (acquire, release).
pub const fn amo_d(op: Amo, rd: Reg, rs2: Reg, rs1: Reg) -> u32 {
    r(0x2f, 3, (op as u32) << 2 | 3, rd, rs1, rs2)
}

/// `amo<op>.w` (acquire, release).
pub const fn amo_w(op: Amo, rd: Reg, rs2: Reg, rs1: Reg) -> u32 {
    r(0x2f, 2, (op as u32) << 2 | 3, rd, rs1, rs2)
}

enum Fixup {
    Branch,
    Jump,
    Address(Reg),
}

/// A program being written.
pub struct Asm {
    base: u64,
    code: Vec<u8>,
    labels: Vec<(&'static str, usize)>,
    fixups: Vec<(usize, &'static str, Fixup)>,
}

impl Asm {
    /// A program that will be at `base`.
    pub fn new(base: u64) -> Asm {
        Asm { base, code: Vec::new(), labels: Vec::new(), fixups: Vec::new() }
    }

    /// Adds instructions.
    pub fn op(&mut self, insns: impl IntoIterator<Item = u32>) -> &mut Asm {
        for insn in insns {
            self.code.extend(insn.to_le_bytes());
        }
        self
    }

    /// Adds a compressed instruction.
    pub fn half(&mut self, insn: u16) -> &mut Asm {
        self.code.extend(insn.to_le_bytes());
        self
    }

    /// Names this place.
    pub fn label(&mut self, name: &'static str) -> &mut Asm {
        assert!(self.labels.iter().all(|(n, _)| *n != name), "{name} twice");
        self.labels.push((name, self.code.len()));
        self
    }

    /// Branches to a label: `funct3` 0 `beq`, 1 `bne`, 4 `blt`, 5 `bge`, 6 `bltu`, 7 `bgeu`.
    pub fn branch(&mut self, funct3: u32, rs1: Reg, rs2: Reg, to: &'static str) -> &mut Asm {
        self.fixups.push((self.code.len(), to, Fixup::Branch));
        self.op([b(funct3, rs1, rs2, 0)])
    }

    /// `bnez`.
    pub fn bnez(&mut self, rs: Reg, to: &'static str) -> &mut Asm {
        self.branch(1, rs, 0, to)
    }

    /// `beqz`.
    pub fn beqz(&mut self, rs: Reg, to: &'static str) -> &mut Asm {
        self.branch(0, rs, 0, to)
    }

    /// `jal` to a label.
    pub fn jump(&mut self, rd: Reg, to: &'static str) -> &mut Asm {
        self.fixups.push((self.code.len(), to, Fixup::Jump));
        self.op([jal(rd, 0)])
    }

    /// The address of a label.
    pub fn la(&mut self, rd: Reg, of: &'static str) -> &mut Asm {
        self.fixups.push((self.code.len(), of, Fixup::Address(rd)));
        self.op([0, 0])
    }

    /// A constant, 12 bits at a time.
    pub fn li(&mut self, rd: Reg, value: u64) -> &mut Asm {
        let low = (value as i64) << 52 >> 52;
        if low as u64 == value {
            return self.op([addi(rd, 0, low as i32)]);
        }
        let high = value.wrapping_sub(low as u64) as i64 >> 12;
        self.li(rd, high as u64).op([slli(rd, rd, 12), addi(rd, rd, low as i32)])
    }

    /// Where the next instruction goes.
    pub fn here(&self) -> u64 {
        self.base + self.code.len() as u64
    }

    /// Address of a label that is already there.
    pub fn address(&self, name: &str) -> u64 {
        let (_, at) = self.labels.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no label {name}"));
        self.base + *at as u64
    }

    /// The machine code.
    pub fn finish(&mut self) -> Vec<u8> {
        for (at, name, fixup) in std::mem::take(&mut self.fixups) {
            let offset = (self.address(name) - self.base) as i32 - at as i32;
            let word = u32::from_le_bytes(self.code[at..at + 4].try_into().unwrap_or_default());
            let mut put = |at: usize, insn: u32| self.code[at..at + 4].copy_from_slice(&insn.to_le_bytes());
            match fixup {
                Fixup::Branch => put(at, word | b_offset(offset)),
                Fixup::Jump => put(at, word | jal(0, offset)),
                Fixup::Address(rd) => {
                    put(at, (offset.wrapping_add(0x800) as u32 & 0xffff_f000) | rd << 7 | 0x17);
                    put(at + 4, addi(rd, rd, offset << 20 >> 20));
                }
            }
        }
        self.code.clone()
    }
}
