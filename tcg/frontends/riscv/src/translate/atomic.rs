//! The atomics. Acquire and release need nothing: on the hosts in question (TSO) they are full barriers as
//! lowered.

use super::Translator;
use crate::decode::{ArgsAmo, ArgsLr};
use mimus_tcg_ir::{AmoOp, Ext, Op, Size};

impl Translator<'_> {
    pub(super) fn load_reserved(&mut self, size: Size, a: ArgsLr) -> bool {
        let base = self.x(a.rs1);
        let d = self.dest_or_temp(a.rd);
        self.emit(Op::LoadReserved { d, base, size, ext: Ext::Sign });
        true
    }

    pub(super) fn store_conditional(&mut self, size: Size, a: ArgsAmo) -> bool {
        let (src, base) = (self.x(a.rs2), self.x(a.rs1));
        let d = self.dest_or_temp(a.rd);
        self.emit(Op::StoreConditional { d, src, base, size });
        true
    }

    pub(super) fn amo(&mut self, op: AmoOp, size: Size, a: ArgsAmo) -> bool {
        let (src, base) = (self.x(a.rs2), self.x(a.rs1));
        let d = (a.rd != 0).then(|| self.dest(a.rd));
        self.emit(Op::Amo { op, d, src, base, size });
        true
    }
}
