//! What `-d in_asm,op,out_asm,exec,int` prints, through the `log` crate: one target per item, level trace.

use log::{Level, log_enabled, trace};
use mimus_tcg_ir::{Block, Op};

use crate::engine::Emitter;
use crate::frontend::{CodeWindow, GuestFrontend};

/// A block was translated.
pub(crate) fn block<F: GuestFrontend>(va: u64, code: CodeWindow<'_>, block: &Block) {
    if log_enabled!(target: "in_asm", Level::Trace) {
        let page = va & !4095;
        for op in &block.ops {
            if let Op::Insn { pc, .. } = op {
                let at = page.wrapping_add_signed(i64::from(pc.0));
                let (text, _) = F::disassemble(code, pc.0 as u32, at);
                trace!(target: "in_asm", "{at:016x}: {text}");
            }
        }
    }
    if log_enabled!(target: "op", Level::Trace) {
        trace!(target: "op", "{va:016x}:\n{block}");
    }
}

/// A block's code was published.
pub(crate) fn code(va: u64, code: &[u8], host: usize, emitter: &dyn Emitter) {
    if log_enabled!(target: "out_asm", Level::Trace) {
        trace!(target: "out_asm", "{va:016x} at {host:#x}:\n{}", emitter.disassemble(code, host));
    }
}
