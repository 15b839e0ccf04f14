//! CSRs, privileged instructions, fences and cache-block management: mostly calls of helpers.

use super::Translator;
use crate::decode::{ArgsCbo, ArgsFence, ArgsVma};
use crate::helper_ids::{self, CACHE_BLOCK, CSR_CLEAR, CSR_OP_SHIFT, CSR_RD_IS_X0, CSR_READ, CSR_SET, CSR_WRITE};
use crate::helper_ids::{SFENCE_HAS_ADDRESS, SFENCE_HAS_ASID};
use mimus_arch::riscv::csr::number;
use mimus_tcg_ir::{AluOp, CallKind, Cond, Op, Rm, Size, Ty, Val};

/// What a CSR instruction does.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum CsrOp {
    Write,
    Set,
    Clear,
}

/// Whether code after a write of the CSR executes as it would have before: the block goes on.
fn is_plain_csr(csr: i32) -> bool {
    use number::*;
    matches!(csr as u16, FFLAGS | FRM | FCSR | SSCRATCH | SEPC | SCAUSE | STVAL | MSCRATCH | MEPC | MCAUSE | MTVAL)
}

impl Translator<'_> {
    /// A CSR instruction; `source` is the register's value or the immediate, `is_zero` whether the
    /// instruction names x0 or 0: then `csrrs` and `csrrc` do not write (vol. I, chapter Zicsr).
    pub(super) fn csr(&mut self, op: CsrOp, rd: i32, csr: i32, source: Val, is_zero: bool) -> bool {
        if csr as u16 == number::FFLAGS && !self.cfg.careful && (op == CsrOp::Write || is_zero) {
            return self.fflags(op, rd, source);
        }
        let op = match op {
            CsrOp::Write => CSR_WRITE,
            _ if is_zero => CSR_READ,
            CsrOp::Set => CSR_SET,
            CsrOp::Clear => CSR_CLEAR,
        };
        let x0 = if rd == 0 { CSR_RD_IS_X0 } else { 0 };
        let what = csr as u64 | op << CSR_OP_SHIFT | x0;
        let ret = (rd != 0).then(|| self.dest(rd));
        self.call(helper_ids::CSR, ret, [Val::Imm(what as i64), source, self.raw()]);
        if op != CSR_READ && !is_plain_csr(csr) {
            self.end_at_next();
        }
        true
    }

    /// `frflags`, or (`op` is a write) `fsflags`.
    fn fflags(&mut self, op: CsrOp, rd: i32, source: Val) -> bool {
        let write = op == CsrOp::Write;
        self.fp_guard(Rm::NearestEven);
        if write {
            self.fp_written();
        }
        let ret = (rd != 0).then(|| self.dest(rd));
        let args = [Val::Imm(write.into()), source, Val::Imm(0)];
        self.emit(Op::Call { helper: helper_ids::FFLAGS, kind: CallKind::Pure, ret, args });
        true
    }

    fn call_raw(&mut self, helper: u16) {
        self.call(helper, None, [self.raw(), Val::Imm(0), Val::Imm(0)]);
    }

    /// An instruction whose helper sets the pc.
    pub(super) fn leave(&mut self, helper: u16) -> bool {
        self.call_raw(helper);
        self.end(Op::Dispatch);
        true
    }

    /// The host is TSO: of all orderings only that of a store before a load needs an instruction. Device
    /// output counts as a store, input as a load. `fence.tso` (fm = 8) leaves just that ordering out.
    pub(super) fn memory_fence(&mut self, a: ArgsFence) -> bool {
        const OUTPUT_OR_WRITE: i32 = 0b0101;
        const INPUT_OR_READ: i32 = 0b1010;
        if a.fm != 8 && a.pred & OUTPUT_OR_WRITE != 0 && a.succ & INPUT_OR_READ != 0 {
            self.emit(Op::Fence);
        }
        true
    }

    pub(super) fn instruction_fence(&mut self) -> bool {
        self.call_raw(helper_ids::FENCE_I);
        self.end_at_next();
        true
    }

    pub(super) fn pause_hint(&mut self) -> bool {
        self.call_raw(helper_ids::PAUSE);
        true
    }

    pub(super) fn fence_translation(&mut self, a: ArgsVma) -> bool {
        let address = if a.rs1 != 0 { SFENCE_HAS_ADDRESS } else { 0 };
        let asid = if a.rs2 != 0 { SFENCE_HAS_ASID } else { 0 };
        let flags = u64::from(self.insn) << 32 | address | asid;
        let args = [self.x(a.rs1), self.x(a.rs2), Val::Imm(flags as i64)];
        self.call(helper_ids::SFENCE_VMA, None, args);
        self.end_at_next();
        true
    }

    /// `sfence.w.inval` and `sfence.inval.ir`. `sinval.vma` is done at once, so nothing is left to order.
    pub(super) fn fence_invalidation(&mut self) -> bool {
        self.call_raw(helper_ids::SFENCE_INVAL);
        true
    }

    /// `cbo.zero` as stores: kernels clear pages by it. If it is illegal, or its address is not the block's first (off which
    /// the stores are checked together), a careful block asks the helper.
    pub(super) fn zero_cache_block(&mut self, a: ArgsCbo) -> bool {
        if self.cfg.careful {
            return self.cache_block(helper_ids::CBO_ZERO, a);
        }
        self.emit(Op::GuardEnv { off: helper_ids::HOT_CBZ_BAD, mask: 1 });
        let (base, d) = (self.x(a.rs1), self.temp());
        self.emit(Op::Alu { op: AluOp::And, ty: Ty::I64, d, a: base, b: Val::Imm(CACHE_BLOCK as i64 - 1) });
        self.emit(Op::Guard { cond: Cond::Ne, a: d.into(), b: Val::Imm(0) });
        for off in (0..CACHE_BLOCK as i32).step_by(8) {
            self.emit(Op::Store { src: Val::Imm(0), base, off, size: Size::B8 });
        }
        true
    }

    pub(super) fn cache_block(&mut self, kind: u64, a: ArgsCbo) -> bool {
        let args = [self.x(a.rs1), Val::Imm(kind as i64), self.raw()];
        self.call(helper_ids::CBO, None, args);
        true
    }
}
