//! The sink that code is assembled into: dynasm's interface over a caller's buffer, encoders for the forms
//! whose operands are only known when a block is translated (a guest register may be a host register or a
//! memory operand), and forward jumps within a block.

use dynasmrt::{AssemblyOffset, DynasmApi};
use mimus_tcg_ir::Size;
use mimus_tcg_ir::unit::{UnitInsn, UnitPlace};

pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const RDX: u8 = 2;
pub const RSP: u8 = 4;
pub const RBP: u8 = 5;
pub const RSI: u8 = 6;
pub const RDI: u8 = 7;
pub const R14: u8 = 14;
pub const R15: u8 = 15;

/// A register-or-memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rm {
    /// A general register by number.
    Reg(u8),
    /// `[rbp + disp]`: the environment.
    Env(i32),
    /// `[base + index + disp]`.
    Mem { base: u8, index: Option<u8>, disp: i32 },
    /// `[base + index << shift + disp]`, of instructions on general registers.
    Scaled { base: u8, index: u8, shift: u8, disp: i32 },
}

/// Opcode map of an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Map {
    /// One-byte opcodes.
    Base,
    /// `0f xx`.
    Of,
}

/// The eight classic operations, by their opcode-extension number.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Alu {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Shifts and rotates, by their opcode-extension number.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Shift {
    Rol = 0,
    Ror = 1,
    Rcl = 2,
    Rcr = 3,
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// What a VEX prefix says of the operation: `map` 2 is 0f38, 3 is 0f3a; `pp` 0 is none, 1 is 66, 2 is f3, 3
/// is f2.
#[derive(Clone, Copy)]
pub struct Vex {
    map: u8,
    pp: u8,
    opcode: u8,
}

impl Vex {
    /// `reg = !v & rm`
    pub const ANDN: Vex = Vex::new(2, 0, 0xf2);
    /// `reg = rm << v`
    pub const SHLX: Vex = Vex::new(2, 1, 0xf7);
    /// `reg = rm >> v`, signed
    pub const SARX: Vex = Vex::new(2, 2, 0xf7);
    /// `reg = rm >> v`
    pub const SHRX: Vex = Vex::new(2, 3, 0xf7);
    /// `reg:v = rdx * rm`; the high half if both are one register
    pub const MULX: Vex = Vex::new(2, 3, 0xf6);
    /// `reg = v`'s bit field of `rm`
    pub const BEXTR: Vex = Vex::new(2, 0, 0xf7);
    /// `reg = rm` without the bits from number `v` on
    pub const BZHI: Vex = Vex::new(2, 0, 0xf5);
    /// `reg` = the bits of `v` that `rm` has ones for, put together at the bottom
    pub const PEXT: Vex = Vex::new(2, 2, 0xf5);
    /// `blsr` (`reg` 1), `blsmsk` (2), `blsi` (3): `v` is the destination
    pub const BLS: Vex = Vex::new(2, 0, 0xf3);
    /// `reg = rm` rotated right by the byte that follows; `v` is 0
    pub const RORX: Vex = Vex::new(3, 3, 0xf0);

    /// Vector register `reg` = the double at `rm`; `v` is 0
    pub const MOVSD: Vex = Vex::new(1, 3, 0x10);
    /// Vector register `reg` = the single at `rm`; `v` is 0
    pub const MOVSS: Vex = Vex::new(1, 2, 0x10);

    /// The double at `rm` = vector register `reg`; `v` is 0
    pub const STORE_SD: Vex = Vex::new(1, 3, 0x11);
    /// The single at `rm` = vector register `reg`; `v` is 0
    pub const STORE_SS: Vex = Vex::new(1, 2, 0x11);

    const fn new(map: u8, pp: u8, opcode: u8) -> Vex {
        Vex { map, pp, opcode }
    }
}

/// Condition codes, by their encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Cc {
    O = 0,
    No = 1,
    B = 2,
    Ae = 3,
    E = 4,
    Ne = 5,
    Be = 6,
    A = 7,
    S = 8,
    Ns = 9,
    P = 10,
    Np = 11,
    L = 12,
    Ge = 13,
    Le = 14,
    G = 15,
}

impl Cc {
    /// The opposite condition.
    pub fn invert(self) -> Cc {
        match self {
            Cc::B => Cc::Ae,
            Cc::Ae => Cc::B,
            Cc::E => Cc::Ne,
            Cc::Ne => Cc::E,
            Cc::Be => Cc::A,
            Cc::A => Cc::Be,
            Cc::S => Cc::Ns,
            Cc::Ns => Cc::S,
            Cc::O => Cc::No,
            Cc::No => Cc::O,
            Cc::P => Cc::Np,
            Cc::Np => Cc::P,
            Cc::L => Cc::Ge,
            Cc::Ge => Cc::L,
            Cc::Le => Cc::G,
            Cc::G => Cc::Le,
        }
    }

    /// The condition after the compare's operands have been exchanged.
    pub fn swap(self) -> Cc {
        match self {
            Cc::B => Cc::A,
            Cc::A => Cc::B,
            Cc::Ae => Cc::Be,
            Cc::Be => Cc::Ae,
            Cc::L => Cc::G,
            Cc::G => Cc::L,
            Cc::Ge => Cc::Le,
            Cc::Le => Cc::Ge,
            other => other,
        }
    }
}

/// A rel32 field to fill in once its target is known: its offset in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixup(pub u32);

/// A rel8 field to fill in once its target is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortFixup(u32);

/// The mode field of ModRM for a displacement behind a base, and its bytes: a base of rbp or r13 has no form without one.
fn mode_of(base: u8, disp: i32) -> (u8, usize) {
    if disp == 0 && base & 7 != 5 {
        (0x00, 0)
    } else if fits8(disp) {
        (0x40, 1)
    } else {
        (0x80, 4)
    }
}

/// The sink: code that will run at host address `at`.
pub struct Asm<'a> {
    buf: &'a mut Vec<u8>,
    at: usize,
}

impl Extend<u8> for Asm<'_> {
    fn extend<T: IntoIterator<Item = u8>>(&mut self, iter: T) {
        self.buf.extend(iter);
    }
}

impl<'b> Extend<&'b u8> for Asm<'_> {
    fn extend<T: IntoIterator<Item = &'b u8>>(&mut self, iter: T) {
        self.buf.extend(iter);
    }
}

impl DynasmApi for Asm<'_> {
    #[inline]
    fn offset(&self) -> AssemblyOffset {
        AssemblyOffset(self.buf.len())
    }

    #[inline]
    fn push(&mut self, byte: u8) {
        self.buf.push(byte);
    }

    fn align(&mut self, alignment: usize, with: u8) {
        while !(self.at + self.buf.len()).is_multiple_of(alignment) {
            self.buf.push(with);
        }
    }

    #[inline]
    fn push_i32(&mut self, value: i32) {
        self.buf.extend_from_slice(&value.to_le_bytes());
    }

    #[inline]
    fn push_i64(&mut self, value: i64) {
        self.buf.extend_from_slice(&value.to_le_bytes());
    }
}

/// Whether `v` fits a sign-extended byte.
#[inline]
fn fits8(v: i32) -> bool {
    i32::from(v as i8) == v
}

/// Whether `v` fits a sign-extended 32-bit immediate.
#[inline]
pub fn fits32(v: i64) -> bool {
    i64::from(v as i32) == v
}

impl<'a> Asm<'a> {
    /// An empty sink over `buf` (whose contents go) for code to run at `at`.
    pub fn new(buf: &'a mut Vec<u8>, at: usize) -> Asm<'a> {
        buf.clear();
        Asm { buf, at }
    }

    /// Offset of the next byte.
    #[inline]
    pub fn pos(&self) -> u32 {
        self.buf.len() as u32
    }

    /// Host address of the next byte.
    pub fn here(&self) -> usize {
        self.at + self.buf.len()
    }

    /// The low `n` bytes of `word`: stored all at once, since a copy of unknown length is a call.
    #[inline]
    fn put(&mut self, word: u64, n: usize) {
        let end = self.buf.len() + n;
        self.buf.extend_from_slice(&word.to_le_bytes());
        self.buf.truncate(end);
    }

    /// REX prefix (if needed), opcode, ModRM, SIB and displacement. `byte_reg` and `byte_rm` say that the
    /// operand is an 8-bit register, for which numbers 4–7 need a REX to mean `spl`–`dil`.
    #[inline]
    fn enc(&mut self, map: Map, w: bool, opcode: u8, reg: u8, rm: Rm, byte: (bool, bool)) {
        let (b, x, rm_byte) = match rm {
            Rm::Reg(r) => (r >> 3, 0, byte.1 && (4..8).contains(&r)),
            Rm::Env(_) => (0, 0, false),
            Rm::Mem { base, index, .. } => (base >> 3, index.unwrap_or(0) >> 3, false),
            Rm::Scaled { base, index, .. } => (base >> 3, index >> 3, false),
        };
        let rex = u8::from(w) << 3 | (reg >> 3) << 2 | x << 1 | b;
        // The bytes so far, and how many bits they have.
        let (mut word, mut bits) = (0u64, 0u32);
        if rex != 0 || rm_byte || (byte.0 && (4..8).contains(&reg)) {
            (word, bits) = (u64::from(0x40 | rex), 8);
        }
        if map != Map::Base {
            word |= 0x0f << bits;
            bits += 8;
        }
        word |= u64::from(opcode) << bits;
        bits += 8;
        self.enc_operand(word, bits, (reg & 7) << 3, rm);
    }

    /// The rest of an instruction of which `word` has the first `bits`: `r` is the register's field of ModRM.
    fn enc_operand(&mut self, word: u64, bits: u32, r: u8, rm: Rm) {
        let n = bits as usize / 8;
        let with = |modrm: u8| word | u64::from(modrm) << bits;
        match rm {
            Rm::Reg(m) => self.put(with(0xc0 | r | (m & 7)), n + 1),
            Rm::Env(disp) if fits8(disp) => self.put(with(0x40 | r | 5) | u64::from(disp as u8) << (bits + 8), n + 2),
            Rm::Env(disp) => {
                self.put(with(0x80 | r | 5), n + 1);
                self.put(u64::from(disp as u32), 4);
            }
            Rm::Mem { base, index, disp } => {
                let (mode, after) = mode_of(base, disp);
                let sib = match index {
                    Some(index) => Some((index & 7) << 3 | (base & 7)),
                    None => (base & 7 == 4).then_some(0x24),
                };
                match sib {
                    Some(sib) => self.put(with(mode | r | 4) | u64::from(sib) << (bits + 8), n + 2),
                    None => self.put(with(mode | r | (base & 7)), n + 1),
                }
                self.put(u64::from(disp as u32), after);
            }
            Rm::Scaled { base, index, shift, disp } => self.enc_scaled(word, bits, r, (base, index, shift), disp),
        }
    }

    /// The same for an operand with a scaled index.
    fn enc_scaled(&mut self, word: u64, bits: u32, r: u8, (base, index, shift): (u8, u8, u8), disp: i32) {
        let (mode, after) = mode_of(base, disp);
        let sib = shift << 6 | (index & 7) << 3 | (base & 7);
        let word = word | u64::from(mode | r | 4) << bits | u64::from(sib) << (bits + 8);
        self.put(word, bits as usize / 8 + 2);
        self.put(u64::from(disp as u32), after);
    }

    /// An instruction with a register (or opcode extension) and a register-or-memory operand.
    #[inline]
    pub fn ins(&mut self, map: Map, w: bool, opcode: u8, reg: u8, rm: Rm) {
        self.enc(map, w, opcode, reg, rm, (false, false));
    }

    /// The same where both registers are 8-bit ones.
    #[inline]
    pub fn ins8(&mut self, map: Map, opcode: u8, reg: u8, rm: Rm) {
        self.enc(map, false, opcode, reg, rm, (true, true));
    }

    /// An instruction in its form of `size`; `opcode` is the byte form's, the others' is one more.
    pub fn sized(&mut self, map: Map, size: Size, opcode: u8, reg: u8, rm: Rm) {
        match size {
            Size::B1 => self.ins8(map, opcode, reg, rm),
            Size::B2 => {
                self.buf.push(0x66);
                self.ins(map, false, opcode | 1, reg, rm);
            }
            Size::B4 => self.ins(map, false, opcode | 1, reg, rm),
            Size::B8 => self.ins(map, true, opcode | 1, reg, rm),
        }
    }

    /// The same where the register field extends the opcode.
    pub fn sized_ext(&mut self, map: Map, size: Size, opcode: u8, ext: u8, rm: Rm) {
        match size {
            Size::B1 => self.enc(map, false, opcode, ext, rm, (false, true)),
            _ => self.sized(map, size, opcode, ext, rm),
        }
    }

    /// An instruction without a byte form, at 2, 4 or 8 bytes.
    pub fn wide(&mut self, map: Map, size: Size, opcode: u8, reg: u8, rm: Rm) {
        if size == Size::B2 {
            self.buf.push(0x66);
        }
        self.ins(map, size == Size::B8, opcode, reg, rm);
    }

    /// The low bytes of a constant that an instruction of `size` takes, at most 4.
    pub fn imm_sized(&mut self, size: Size, imm: i64) {
        self.put(imm as u64, size.bytes().min(4) as usize);
    }

    /// `op rm, imm` at `size`; the constant is within 32 bits, sign-extended.
    pub fn alu_sized_i(&mut self, op: Alu, size: Size, rm: Rm, imm: i64) {
        let imm = match size {
            Size::B1 => i64::from(imm as i8),
            Size::B2 => i64::from(imm as i16),
            _ => i64::from(imm as i32),
        };
        if size != Size::B1 && fits8(imm as i32) {
            // 0x83: like 0x81, with a byte.
            self.sized_ext(Map::Base, size, 0x83, op as u8, rm);
            self.buf.push(imm as u8);
        } else {
            self.sized_ext(Map::Base, size, 0x80, op as u8, rm);
            self.imm_sized(size, imm);
        }
    }

    /// An instruction of the vector, x87 or MMX units.
    pub fn unit(&mut self, insn: &UnitInsn, reg: u8, rm: Rm) {
        let place = match rm {
            Rm::Reg(r) => UnitPlace::Reg(r),
            Rm::Env(disp) => UnitPlace::Mem { base: RBP, index: None, disp },
            Rm::Mem { base, index, disp } => UnitPlace::Mem { base, index, disp },
            Rm::Scaled { .. } => return debug_assert!(false, "units have no scaled operands"),
        };
        insn.encode(reg, place, self.buf);
    }

    /// A VEX-coded instruction on general registers.
    pub fn vex(&mut self, code: Vex, w: bool, reg: u8, v: u8, rm: Rm) {
        // Encode the tail with the plain encoder, then drop its REX for the VEX bits.
        let (b, x) = match rm {
            Rm::Reg(r) => (r >> 3, 0),
            Rm::Env(_) => (0, 0),
            Rm::Mem { base, index, .. } => (base >> 3, index.unwrap_or(0) >> 3),
            Rm::Scaled { base, index, .. } => (base >> 3, index >> 3),
        };
        let low = match rm {
            Rm::Reg(r) => Rm::Reg(r & 7),
            Rm::Env(d) => Rm::Env(d),
            Rm::Mem { base, index, disp } => {
                // The bases whose low bits are those of rsp and rbp encode as those do.
                Rm::Mem { base: base & 7, index: index.map(|i| i & 7), disp }
            }
            Rm::Scaled { base, index, shift, disp } => Rm::Scaled { base: base & 7, index: index & 7, shift, disp },
        };
        self.buf.push(0xc4);
        self.buf.push((!(reg >> 3) & 1) << 7 | (!x & 1) << 6 | (!b & 1) << 5 | code.map);
        self.buf.push(u8::from(w) << 7 | (!v & 15) << 3 | code.pp);
        self.enc(Map::Base, false, code.opcode, reg & 7, low, (false, false));
    }

    /// `mov reg, rm`.
    #[inline]
    pub fn mov_r_rm(&mut self, w: bool, reg: u8, rm: Rm) {
        self.ins(Map::Base, w, 0x8b, reg, rm);
    }

    /// `mov rm, reg`.
    #[inline]
    pub fn mov_rm_r(&mut self, w: bool, rm: Rm, reg: u8) {
        self.ins(Map::Base, w, 0x89, reg, rm);
    }

    /// `mov reg, imm` in its shortest form; leaves the flags alone.
    pub fn mov_ri(&mut self, reg: u8, imm: i64) {
        if let Ok(imm) = u32::try_from(imm) {
            if reg >= 8 {
                self.buf.push(0x41);
            }
            self.buf.push(0xb8 | (reg & 7));
            self.buf.extend_from_slice(&imm.to_le_bytes());
        } else if fits32(imm) {
            self.ins(Map::Base, true, 0xc7, 0, Rm::Reg(reg));
            self.push_i32(imm as i32);
        } else {
            self.buf.push(0x48 | (reg >> 3));
            self.buf.push(0xb8 | (reg & 7));
            self.push_i64(imm);
        }
    }

    /// `mov rm, imm32` (sign-extended if `w`).
    #[inline]
    pub fn mov_rm_i(&mut self, w: bool, rm: Rm, imm: i32) {
        self.ins(Map::Base, w, 0xc7, 0, rm);
        self.push_i32(imm);
    }

    /// `op reg, rm`.
    #[inline]
    pub fn alu_r_rm(&mut self, op: Alu, w: bool, reg: u8, rm: Rm) {
        self.ins(Map::Base, w, (op as u8) << 3 | 3, reg, rm);
    }

    /// `op rm, reg`.
    #[inline]
    pub fn alu_rm_r(&mut self, op: Alu, w: bool, rm: Rm, reg: u8) {
        self.ins(Map::Base, w, (op as u8) << 3 | 1, reg, rm);
    }

    /// `op rm, imm`.
    #[inline]
    pub fn alu_rm_i(&mut self, op: Alu, w: bool, rm: Rm, imm: i32) {
        if fits8(imm) {
            self.ins(Map::Base, w, 0x83, op as u8, rm);
            self.buf.push(imm as u8);
        } else if rm == Rm::Reg(RAX) {
            if w {
                self.buf.push(0x48);
            }
            self.buf.push((op as u8) << 3 | 5);
            self.push_i32(imm);
        } else {
            self.ins(Map::Base, w, 0x81, op as u8, rm);
            self.push_i32(imm);
        }
    }

    /// `shift rm, imm`; nothing if the count is zero.
    pub fn shift_i(&mut self, op: Shift, w: bool, rm: Rm, count: u8) {
        match count {
            0 => {}
            1 => self.ins(Map::Base, w, 0xd1, op as u8, rm),
            _ => {
                self.ins(Map::Base, w, 0xc1, op as u8, rm);
                self.buf.push(count);
            }
        }
    }

    /// `lea reg, [base + disp]` (or a plain move if there is nothing to add).
    pub fn lea(&mut self, w: bool, reg: u8, base: u8, disp: i32) {
        if disp == 0 {
            self.mov_r_rm(w, reg, Rm::Reg(base));
        } else {
            self.ins(Map::Base, w, 0x8d, reg, Rm::Mem { base, index: None, disp });
        }
    }

    /// `lea reg, [base + index << shift + disp]`; without a base the displacement takes four bytes.
    pub fn lea_scaled(&mut self, reg: u8, base: Option<u8>, index: u8, shift: u8, disp: i32) {
        let rex = 0x48 | (reg >> 3) << 2 | (index >> 3) << 1 | base.map_or(0, |b| b >> 3);
        let sib = shift << 6 | (index & 7) << 3 | base.map_or(5, |b| b & 7);
        let r = (reg & 7) << 3;
        let (mode, len) = match base {
            None => (0x00, 4),
            Some(b) if disp == 0 && b & 7 != 5 => (0x00, 0),
            Some(_) if fits8(disp) => (0x40, 1),
            Some(_) => (0x80, 4),
        };
        self.buf.extend_from_slice(&[rex, 0x8d, mode | r | 4, sib]);
        self.put(u64::from(disp as u32), len);
    }

    /// `lea reg, [base + index << shift + disp]`, 32 or 64 bits wide, of which `base` or `index` may be missing.
    pub fn lea_sib(&mut self, w: bool, reg: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        // Index 4 means none.
        let (index, shift) = index.unwrap_or((4, 0));
        let rex = u8::from(w) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base.map_or(0, |b| b >> 3);
        if rex != 0 {
            self.buf.push(0x40 | rex);
        }
        let sib = shift << 6 | (index & 7) << 3 | base.map_or(5, |b| b & 7);
        let (mode, len) = match base {
            None => (0x00, 4),
            Some(b) if disp == 0 && b & 7 != 5 => (0x00, 0),
            Some(_) if fits8(disp) => (0x40, 1),
            Some(_) => (0x80, 4),
        };
        self.buf.extend_from_slice(&[0x8d, mode | (reg & 7) << 3 | 4, sib]);
        self.put(u64::from(disp as u32), len);
    }

    /// `movsxd reg, rm`.
    #[inline]
    pub fn movsxd(&mut self, reg: u8, rm: Rm) {
        if reg == RAX && rm == Rm::Reg(RAX) {
            self.buf.extend_from_slice(&[0x48, 0x98]);
        } else {
            self.ins(Map::Base, true, 0x63, reg, rm);
        }
    }

    /// `test reg, reg`.
    #[inline]
    pub fn test_rr(&mut self, w: bool, reg: u8) {
        self.ins(Map::Base, w, 0x85, reg, Rm::Reg(reg));
    }

    /// `setcc reg8`.
    pub fn setcc(&mut self, cc: Cc, reg: u8) {
        self.ins8(Map::Of, 0x90 | cc as u8, 0, Rm::Reg(reg));
    }

    /// `cmovcc reg, rm`.
    pub fn cmov(&mut self, cc: Cc, w: bool, reg: u8, rm: Rm) {
        self.ins(Map::Of, w, 0x40 | cc as u8, reg, rm);
    }

    /// `jcc rel32` to be bound later.
    #[inline]
    pub fn jcc(&mut self, cc: Cc) -> Fixup {
        self.buf.extend_from_slice(&[0x0f, 0x80 | cc as u8, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }

    /// `jmp rel32` to be bound later.
    pub fn jmp(&mut self) -> Fixup {
        self.buf.extend_from_slice(&[0xe9, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }

    /// `jcc rel8` to be bound later, within reach.
    pub fn jcc_short(&mut self, cc: Cc) -> ShortFixup {
        self.buf.extend_from_slice(&[0x70 | cc as u8, 0]);
        ShortFixup(self.pos() - 1)
    }

    /// `jmp rel8` to be bound later, within reach.
    pub fn jmp_short(&mut self) -> ShortFixup {
        self.buf.extend_from_slice(&[0xeb, 0]);
        ShortFixup(self.pos() - 1)
    }

    /// `jcc` back to an offset in the block.
    pub fn jcc_back(&mut self, cc: Cc, target: u32) {
        let rel = target as i32 - (self.pos() as i32 + 2);
        if fits8(rel) {
            self.buf.extend_from_slice(&[0x70 | cc as u8, rel as u8]);
        } else {
            let fixup = self.jcc(cc);
            self.bind_to(fixup, target);
        }
    }

    /// `jmp` back to an offset in the block.
    pub fn jmp_back(&mut self, target: u32) {
        let rel = target as i32 - (self.pos() as i32 + 2);
        if fits8(rel) {
            self.buf.extend_from_slice(&[0xeb, rel as u8]);
        } else {
            let fixup = self.jmp();
            self.bind_to(fixup, target);
        }
    }

    /// `call` of an offset in the block, behind or ahead.
    pub fn call_back(&mut self, target: u32) {
        let target = self.at + target as usize;
        self.call_abs(target);
    }

    /// `jcc` to a host address.
    pub fn jcc_abs(&mut self, cc: Cc, target: usize) {
        self.buf.extend_from_slice(&[0x0f, 0x80 | cc as u8]);
        self.rel32(target);
    }

    /// `jmp` to a host address.
    pub fn jmp_abs(&mut self, target: usize) {
        self.buf.push(0xe9);
        self.rel32(target);
    }

    /// `call` of a host address.
    pub fn call_abs(&mut self, target: usize) {
        self.buf.push(0xe8);
        self.rel32(target);
    }

    fn rel32(&mut self, target: usize) {
        let next = self.here() + 4;
        self.push_i32(target.wrapping_sub(next) as i32);
    }

    /// Makes a jump lead to the next byte.
    pub fn bind(&mut self, fixup: Fixup) {
        let here = self.pos();
        self.bind_to(fixup, here);
    }

    /// Makes a jump lead to an offset in the block.
    pub fn bind_to(&mut self, fixup: Fixup, target: u32) {
        let at = fixup.0 as usize;
        let rel = target.wrapping_sub(fixup.0 + 4);
        if let Some(field) = self.buf.get_mut(at..at + 4) {
            field.copy_from_slice(&rel.to_le_bytes());
        }
    }

    /// Makes a short jump lead to the next byte.
    pub fn bind_short(&mut self, fixup: ShortFixup) {
        let rel = self.pos() - (fixup.0 + 1);
        debug_assert!(rel < 128, "short jump out of reach");
        if let Some(field) = self.buf.get_mut(fixup.0 as usize) {
            *field = rel as u8;
        }
    }

    /// How many bytes to put before an instruction with a patched field `lead` bytes from its start, so that
    /// the field is 4-byte aligned in memory.
    fn padding(&self, lead: usize) -> usize {
        (self.here() + lead).wrapping_neg() & 3
    }

    /// Aligns the field of the jump that follows, by prefixes that jumps ignore in 64-bit mode (a `cs`
    /// override). Unlike no-ops, they cost no slot and do not come between a compare and its jump.
    pub fn pad_jump(&mut self, lead: usize) {
        for _ in 0..self.padding(lead) {
            self.buf.push(0x2e);
        }
    }

    /// The same by a no-op, for an instruction that has no room for prefixes within the 15 bytes allowed.
    pub fn pad_nop(&mut self, lead: usize) {
        let nop: &[u8] = match self.padding(lead) {
            0 => &[],
            1 => &[0x90],
            2 => &[0x66, 0x90],
            _ => &[0x0f, 0x1f, 0x00],
        };
        self.buf.extend_from_slice(nop);
    }
}
