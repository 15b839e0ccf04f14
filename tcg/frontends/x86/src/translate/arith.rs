//! Integer arithmetic, logic, shifts, bits.

use iced_x86::{Mnemonic, OpKind, Register};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::{AluOp, CondF, FlagOp, Op, RmwOp, Size, Slot, Ty, UnOp, Val};

use super::operands::{Mem, gpr, is_high};
use super::{Flow, Tr, size};

fn two_operands(m: Mnemonic) -> Option<FlagOp> {
    use Mnemonic as M;
    Some(match m {
        M::Add => FlagOp::Add,
        M::Or => FlagOp::Or,
        M::Adc => FlagOp::Adc,
        M::Sbb => FlagOp::Sbb,
        M::And => FlagOp::And,
        M::Sub => FlagOp::Sub,
        M::Xor => FlagOp::Xor,
        M::Shl | M::Sal => FlagOp::Shl,
        M::Shr => FlagOp::Shr,
        M::Sar => FlagOp::Sar,
        M::Rol => FlagOp::Rol,
        M::Ror => FlagOp::Ror,
        M::Rcl => FlagOp::Rcl,
        M::Rcr => FlagOp::Rcr,
        _ => return None,
    })
}

fn one_operand(m: Mnemonic) -> Option<FlagOp> {
    Some(match m {
        Mnemonic::Inc => FlagOp::Inc,
        Mnemonic::Dec => FlagOp::Dec,
        Mnemonic::Neg => FlagOp::Neg,
        Mnemonic::Not => FlagOp::Not,
        _ => return None,
    })
}

impl Tr<'_> {
    /// Integer arithmetic; `None` if it is something else.
    pub(crate) fn arith(&mut self) -> Option<Flow> {
        use Mnemonic as M;
        let m = self.insn.mnemonic();
        if let Some(op) = two_operands(m) {
            let bytes = self.bytes(0);
            let count = matches!(m, M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr);
            let b = if count && self.insn.op_kind(1) != OpKind::Register {
                Val::Imm(i64::from(self.insn.immediate8()))
            } else {
                self.read(1, bytes)
            };
            self.modify(op, bytes, b);
            return Some(Flow::Next);
        }
        if let Some(op) = one_operand(m) {
            let bytes = self.bytes(0);
            self.modify(op, bytes, Val::Imm(0));
            return Some(Flow::Next);
        }
        match m {
            M::Cmp | M::Test => {
                let bytes = self.bytes(0);
                let a = self.read(0, bytes);
                let b = self.read(1, bytes);
                let op = if m == M::Cmp { FlagOp::Sub } else { FlagOp::And };
                self.op(Op::AluF { op, size: size(bytes), d: None, a, b });
            }
            M::Imul if self.insn.op_count() >= 2 => self.imul(),
            M::Mul | M::Imul => self.wide_multiply(m == M::Imul),
            M::Div | M::Idiv => return self.divide(m == M::Idiv),
            M::Bt | M::Bts | M::Btr | M::Btc => return self.bit_test(m),
            M::Bsf => self.scan(FlagOp::Bsf),
            M::Bsr => self.scan(FlagOp::Bsr),
            M::Popcnt => self.scan(FlagOp::Popcnt),
            M::Lzcnt => self.scan(FlagOp::Lzcnt),
            M::Tzcnt => self.scan(FlagOp::Tzcnt),
            M::Andn => self.three(FlagOp::Andn, 1, 2),
            M::Bextr => self.three(FlagOp::Bextr, 1, 2),
            M::Bzhi => self.three(FlagOp::Bzhi, 1, 2),
            M::Blsi => self.three_unary(FlagOp::Blsi),
            M::Blsr => self.three_unary(FlagOp::Blsr),
            M::Blsmsk => self.three_unary(FlagOp::Blsmsk),
            M::Rorx => self.flagless_shift(AluOp::Ror),
            M::Sarx => self.flagless_shift(AluOp::Sar),
            M::Shlx => self.flagless_shift(AluOp::Shl),
            M::Shrx => self.flagless_shift(AluOp::Shr),
            M::Shld | M::Shrd if !self.is_memory(0) => self.double_shift(m == M::Shld),
            M::Xadd => self.exchange_add(),
            M::Xchg => self.exchange(),
            M::Cmpxchg if self.is_memory(0) => self.compare_exchange(),
            // In 64-bit code registers keep their upper halves if memory was as expected.
            M::Cmpxchg8b if self.bits != 64 => self.compare_exchange_8(),
            _ => return None,
        }
        Some(Flow::Next)
    }

    /// `operand 0 = op(operand 0, b)`
    fn modify(&mut self, op: FlagOp, bytes: u32, b: Val) {
        if self.is_memory(0) {
            let Mem { base, off } = self.memory(bytes, true);
            let lock = self.insn.has_lock_prefix();
            self.op(Op::Rmw { op: RmwOp::F(op), size: size(bytes), lock, old: None, src: b, base, off });
            return;
        }
        let r = self.insn.op_register(0);
        if is_high(r) {
            let a = self.read_reg(r);
            let d = self.temp();
            self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a });
            self.op(Op::AluF { op, size: Size::B1, d: Some(d), a, b });
            self.write_reg(r, Val::Slot(d));
            return;
        }
        // XOR r, r depends on nothing.
        if op == FlagOp::Xor && b == Val::Slot(gpr(r)) && bytes >= 4 {
            self.op(Op::AluF { op, size: size(bytes), d: Some(gpr(r)), a: Val::Imm(0), b: Val::Imm(0) });
            return;
        }
        self.op(Op::AluF { op, size: size(bytes), d: Some(gpr(r)), a: Val::Slot(gpr(r)), b });
    }

    fn imul(&mut self) {
        let bytes = self.bytes(0);
        let (first, second) = if self.insn.op_count() == 3 { (1, 2) } else { (0, 1) };
        let a = self.read(first, bytes);
        let b = self.read(second, bytes);
        let d = gpr(self.insn.op_register(0));
        self.op(Op::AluF { op: FlagOp::Mul, size: size(bytes), d: Some(d), a, b });
    }

    fn wide_multiply(&mut self, signed: bool) {
        let bytes = self.bytes(0);
        let b = self.read(0, bytes);
        let (lo, hi) = (Slot(0), if bytes == 1 { Slot(0) } else { Slot(2) });
        self.op(Op::MulWideF { signed, size: size(bytes), lo, hi, a: Val::Slot(Slot(0)), b });
    }

    /// The helper divides if the quotient does not fit, and where checking a segment would come first.
    fn divide(&mut self, signed: bool) -> Option<Flow> {
        let plain = self.bits == 64 || self.flat && !self.is_based();
        let checked = self.is_memory(0) && !plain;
        if self.careful || checked {
            return Some(self.execute());
        }
        let bytes = self.bytes(0);
        let b = self.read(0, bytes);
        let (q, r) = (Slot(0), if bytes == 1 { Slot(0) } else { Slot(2) });
        let (hi, lo) = (Val::Slot(Slot(2)), Val::Slot(Slot(0)));
        self.op(Op::DivWideF { signed, size: size(bytes), q, r, hi, lo, b });
        Some(Flow::Next)
    }

    fn bit_test(&mut self, m: Mnemonic) -> Option<Flow> {
        let bytes = self.bytes(0);
        let op = match m {
            Mnemonic::Bt => FlagOp::Bt,
            Mnemonic::Bts => FlagOp::Bts,
            Mnemonic::Btr => FlagOp::Btr,
            _ => FlagOp::Btc,
        };
        let immediate = self.insn.op_kind(1) != OpKind::Register;
        let b = if immediate { Val::Imm(i64::from(self.insn.immediate8())) } else { self.read(1, bytes) };
        if !self.is_memory(0) {
            let d = gpr(self.insn.op_register(0));
            let to = (op != FlagOp::Bt).then_some(d);
            self.op(Op::AluF { op, size: size(bytes), d: to, a: Val::Slot(d), b });
            return Some(Flow::Next);
        }
        let mem = if immediate { self.memory(bytes, op != FlagOp::Bt) } else { self.bit_string(bytes, b, op)? };
        if op == FlagOp::Bt {
            let a = self.load(mem, bytes);
            self.op(Op::AluF { op, size: size(bytes), d: None, a, b });
        } else {
            let lock = self.insn.has_lock_prefix();
            let Mem { base, off } = mem;
            self.op(Op::Rmw { op: RmwOp::F(op), size: size(bytes), lock, old: None, src: b, base, off });
        }
        Some(Flow::Next)
    }

    /// A bit number in a register reaches beyond the operand: it is an offset in a bit string (SDM volume 2 "BT").
    fn bit_string(&mut self, bytes: u32, number: Val, op: FlagOp) -> Option<Mem> {
        let seg = super::operands::segment_of(self.insn, self.bits == 64);
        let wide = match bytes {
            2 => self.un(UnOp::SextH, Ty::I64, number),
            4 => self.un(UnOp::SextW, Ty::I64, number),
            _ => number,
        };
        let unit = bytes.trailing_zeros();
        let units = self.alu(AluOp::Sar, Ty::I64, wide, Val::Imm(i64::from(unit + 3)));
        let offset = self.offset();
        let d = self.temp();
        let address = self.address_bytes();
        self.op(Op::Lea { d, base: offset, index: units, shift: unit as u8, disp: 0, size: size(address) });
        Some(self.linear(seg, Val::Slot(d), bytes, op != FlagOp::Bt))
    }

    fn scan(&mut self, op: FlagOp) {
        let bytes = self.bytes(0);
        let a = self.read(1, bytes);
        let d = gpr(self.insn.op_register(0));
        self.op(Op::AluF { op, size: size(bytes), d: Some(d), a, b: Val::Imm(0) });
    }

    fn three(&mut self, op: FlagOp, first: u32, second: u32) {
        let bytes = self.bytes(0);
        let a = self.read(first, bytes);
        let b = self.read(second, bytes);
        let d = gpr(self.insn.op_register(0));
        self.op(Op::AluF { op, size: size(bytes), d: Some(d), a, b });
    }

    fn three_unary(&mut self, op: FlagOp) {
        let bytes = self.bytes(0);
        let a = self.read(1, bytes);
        let d = gpr(self.insn.op_register(0));
        self.op(Op::AluF { op, size: size(bytes), d: Some(d), a, b: Val::Imm(0) });
    }

    fn flagless_shift(&mut self, op: AluOp) {
        let bytes = self.bytes(0);
        let a = self.read(1, bytes);
        let b = if op == AluOp::Ror { Val::Imm(i64::from(self.insn.immediate8())) } else { self.read(2, bytes) };
        let d = gpr(self.insn.op_register(0));
        let ty = if bytes == 8 { Ty::I64 } else { Ty::U32 };
        self.op(Op::Alu { op, ty, d, a, b });
    }

    fn double_shift(&mut self, left: bool) {
        let bytes = self.bytes(0);
        let d = gpr(self.insn.op_register(0));
        let b = self.read(1, bytes);
        let n = match self.insn.op_kind(2) {
            OpKind::Register => Val::Slot(gpr(Register::CL)),
            _ => Val::Imm(i64::from(self.insn.immediate8())),
        };
        self.op(Op::ShiftDoubleF { left, size: size(bytes), d, a: Val::Slot(d), b, n });
    }

    fn exchange_add(&mut self) {
        let bytes = self.bytes(0);
        let source = self.insn.op_register(1);
        let b = self.read_reg(source);
        if self.is_memory(0) {
            let Mem { base, off } = self.memory(bytes, true);
            let old = self.temp();
            let lock = self.insn.has_lock_prefix();
            let op = RmwOp::F(FlagOp::Add);
            self.op(Op::Rmw { op, size: size(bytes), lock, old: Some(old), src: b, base, off });
            self.write_reg(source, Val::Slot(old));
            return;
        }
        let target = self.insn.op_register(0);
        let a = self.read_reg(target);
        let old = self.un(UnOp::Mov, Ty::I64, a);
        let sum = self.temp();
        self.op(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: sum, a });
        self.op(Op::AluF { op: FlagOp::Add, size: size(bytes), d: Some(sum), a, b });
        self.write_reg(source, old);
        self.write_reg(target, Val::Slot(sum));
    }

    fn exchange(&mut self) {
        let bytes = self.bytes(0);
        let (mem_at, reg_at) = if self.is_memory(1) { (1, 0) } else { (0, 1) };
        let r = self.insn.op_register(reg_at);
        let b = self.read_reg(r);
        if self.is_memory(mem_at) {
            let Mem { base, off } = self.memory(bytes, true);
            let old = self.temp();
            self.op(Op::Rmw { op: RmwOp::Swap, size: size(bytes), lock: true, old: Some(old), src: b, base, off });
            self.write_reg(r, Val::Slot(old));
            return;
        }
        let other = self.insn.op_register(0);
        let a = self.read_reg(other);
        let a = self.un(UnOp::Mov, Ty::I64, a);
        self.write_reg(other, b);
        self.write_reg(r, a);
    }

    /// CMPXCHG with memory: the store is made either way.
    fn compare_exchange(&mut self) {
        let bytes = self.bytes(0);
        let accumulator = Slot(0);
        let new = self.read_reg(self.insn.op_register(1));
        let Mem { base, off } = self.memory(bytes, true);
        let d = self.temp();
        let expected = Val::Slot(accumulator);
        self.op(Op::CmpXchg { d, size: size(bytes), expected, new, base, off });
        self.op(Op::AluF { op: FlagOp::Sub, size: size(bytes), d: None, a: expected, b: Val::Slot(d) });
        if bytes == 1 {
            // What was there equals AL if it was stored.
            self.op(Op::SetPart { d: accumulator, size: Size::B1, a: Val::Slot(d) });
        } else if bytes == 2 {
            self.op(Op::SetPart { d: accumulator, size: Size::B2, a: Val::Slot(d) });
        } else {
            self.op(Op::CMovF { cond: CondF::Ne, size: Size::B8, d: accumulator, a: Val::Slot(d) });
        }
    }

    /// CMPXCHG8B, by which 32-bit programs do all that is atomic at 64 bits.
    fn compare_exchange_8(&mut self) {
        let [eax, ecx, edx, ebx] = [0, 1, 2, 3].map(Slot);
        let (expected, new) = (self.pair(edx, eax), self.pair(ecx, ebx));
        let Mem { base, off } = self.memory(8, true);
        let d = self.temp();
        self.op(Op::CmpXchg { d, size: Size::B8, expected, new, base, off });
        let zero = self.temp();
        let mut next = |op, a, b| self.op(Op::Alu { op, ty: Ty::I64, d: zero, a, b });
        next(AluOp::Xor, Val::Slot(d), expected);
        next(AluOp::SetLtU, Val::Slot(zero), Val::Imm(1));
        next(AluOp::Shl, Val::Slot(zero), Val::Imm(6));
        self.op(Op::SetFlags { a: Val::Slot(zero), mask: Flags::ZF });
        // If it was as expected, they have these values.
        self.op(Op::Un { op: UnOp::ZextW, ty: Ty::I64, d: eax, a: Val::Slot(d) });
        self.op(Op::Alu { op: AluOp::Shr, ty: Ty::I64, d: edx, a: Val::Slot(d), b: Val::Imm(32) });
    }

    /// `high:low`, 32 bits each.
    fn pair(&mut self, high: Slot, low: Slot) -> Val {
        let low = self.un(UnOp::ZextW, Ty::I64, Val::Slot(low));
        let d = self.temp();
        self.op(Op::Alu { op: AluOp::Shl, ty: Ty::I64, d, a: Val::Slot(high), b: Val::Imm(32) });
        self.op(Op::Alu { op: AluOp::Or, ty: Ty::I64, d, a: Val::Slot(d), b: low });
        Val::Slot(d)
    }

    /// Flags that are only moved around.
    pub(crate) fn flag_moves(&mut self) -> Option<Flow> {
        match self.insn.mnemonic() {
            Mnemonic::Cmc => self.op(Op::FlipFlags { mask: Flags::CF }),
            Mnemonic::Clc => self.op(Op::SetFlags { a: Val::Imm(0), mask: Flags::CF }),
            Mnemonic::Stc => self.op(Op::SetFlags { a: Val::Imm(1), mask: Flags::CF }),
            Mnemonic::Lahf => {
                let d = self.temp();
                self.op(Op::GetFlags { d });
                let a = self.alu(AluOp::Or, Ty::I64, Val::Slot(d), Val::Imm(2));
                self.op(Op::SetHigh { d: Slot(0), a });
            }
            Mnemonic::Sahf => {
                let a = self.read_reg(Register::AH);
                self.op(Op::SetFlags { a, mask: Flags::ALL.without(Flags::OF) });
            }
            _ => return None,
        }
        Some(Flow::Next)
    }
}
