//! What is added to blocks when instructions are counted or traced.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mimus_core::accel::trace::words;
use mimus_core::accel::{TraceKinds, TraceSink, TracedCode};
use mimus_tcg_ir::unit::UnitMemory;
use mimus_tcg_ir::{Block, Op, PagePc, Size, Slot, Val};

use crate::frontend::CodeWindow;

const _: () = assert!(
    words::FIRST_TAG == mimus_tcg_ir::backend::trace::FIRST_TAG
        && words::ACCESS == mimus_tcg_ir::backend::trace::ACCESS
        && words::PAGE == mimus_tcg_ir::backend::trace::PAGE
);

/// What blocks are to do besides.
#[derive(Clone, Default)]
pub(crate) struct Instrumentation {
    /// Count instructions.
    pub count: bool,
    pub trace: Option<Trace>,
}

/// A trace being made.
#[derive(Clone)]
pub(crate) struct Trace {
    pub kinds: TraceKinds,
    pub sink: Arc<dyn TraceSink>,
    pub next_id: Arc<AtomicU32>,
}

impl Instrumentation {
    pub fn is_on(&self) -> bool {
        self.count || self.trace.is_some()
    }

    /// Adds operations to `block`, made from `window`. `bits`: see [`TracedCode::bits`].
    pub fn apply(&self, block: &mut Block, window: CodeWindow<'_>, bits: u8) {
        // An interrupt between blocks comes where it comes at any time.
        block.keep_all_flags();
        let old = std::mem::take(&mut block.ops);
        let mut out = Vec::with_capacity(old.len() * 2);
        // The stretches: from a mark behind a branch to the next.
        let mut first = true;
        let mut after_branch = true;
        for (i, op) in old.iter().enumerate() {
            if let Op::Insn { .. } = *op {
                out.push(*op);
                if std::mem::take(&mut after_branch) {
                    self.begin(&mut out, &old[i..], block.insns, first, window, bits);
                    first = false;
                }
                continue;
            }
            after_branch |= matches!(op, Op::Branch { .. } | Op::BranchF { .. });
            if matches!(op, Op::Rep(_)) && self.trace.as_ref().is_some_and(|t| t.kinds.memory) {
                // The call behind it does the same, and tells.
                continue;
            }
            match self.access(op) {
                Some(access) => access.around(op, current(&out), &mut out),
                None => out.push(*op),
            }
        }
        block.ops = out;
    }

    /// At the begin of a stretch, whose operations `rest` begins with.
    fn begin(&self, out: &mut Vec<Op>, rest: &[Op], total: u16, entry: bool, window: CodeWindow<'_>, bits: u8) {
        let lengths = stretch(rest);
        let insns = lengths.len() as u16;
        if self.count {
            out.push(Op::Count { insns, total: if entry { total } else { 0 } });
        }
        if let (Some(trace), Some(Op::Insn { pc, .. })) = (&self.trace, rest.first()) {
            let id = trace.next_id.fetch_add(1, Ordering::Relaxed) & (words::FIRST_TAG - 1);
            let mut bytes = vec![0; lengths.iter().map(|l| usize::from(*l)).sum()];
            let have = window.bytes(pc.0 as u32, &mut bytes).len();
            trace.sink.define(TracedCode { id, offset: pc.0 as u16, bytes: &bytes[..have], lengths: &lengths, bits });
            out.push(Op::TraceBlock { id, entry });
        }
    }

    fn access(&self, op: &Op) -> Option<MemoryAccess> {
        self.trace.as_ref().filter(|t| t.kinds.memory).and_then(|_| memory_access(op))
    }
}

/// The instruction that operations being written belong to.
fn current(out: &[Op]) -> PagePc {
    let mark = out.iter().rev().find_map(|op| match op {
        Op::Insn { pc, .. } => Some(*pc),
        _ => None,
    });
    mark.unwrap_or(PagePc(0))
}

/// Lengths of the instructions from the first on to the first branch's.
fn stretch(ops: &[Op]) -> Vec<u8> {
    let mut lengths = Vec::new();
    let mut branched = false;
    for op in ops {
        match op {
            Op::Insn { .. } if branched => break,
            Op::Insn { len, .. } => lengths.push(*len),
            Op::Branch { .. } | Op::BranchF { .. } => branched = true,
            _ => {}
        }
    }
    lengths
}

/// An operation's access to memory.
struct MemoryAccess {
    base: Val,
    off: i32,
    /// Log2 of bytes.
    size: u32,
    flags: u32,
    value: Option<Val>,
}

impl MemoryAccess {
    fn around(&self, op: &Op, pc: PagePc, out: &mut Vec<Op>) {
        let value = if self.value.is_some() { words::VALUE } else { 0 };
        let head = words::ACCESS
            | self.flags
            | value
            | self.size << words::SIZE_SHIFT
            | (pc.0 as u32 & 0xfff) << words::PC_SHIFT;
        out.push(Op::TraceAccess { head, base: self.base, off: self.off });
        out.push(*op);
        out.push(Op::TraceValue { value: self.value });
    }
}

/// What an operation does to memory. A new operation on memory gets its row here.
fn memory_access(op: &Op) -> Option<MemoryAccess> {
    // A value that is gone after the operation is not recorded.
    let unless = |value: Val, d: Option<Slot>| Some(value).filter(|v| d.is_none_or(|d| *v != Val::Slot(d)));
    let access =
        |base, off, size: Size, flags, value| Some(MemoryAccess { base, off, size: size as u32, flags, value });
    match *op {
        Op::Load { d, base, off, size, .. } => access(base, off, size, 0, Some(d.into())),
        Op::Store { src, base, off, size } => access(base, off, size, words::WRITE, Some(src)),
        Op::LoadReserved { d, base, size, .. } => access(base, 0, size, 0, Some(d.into())),
        Op::StoreConditional { d, src, base, size } => access(base, 0, size, words::UPDATE, unless(src, Some(d))),
        Op::Amo { d, src, base, size, .. } => access(base, 0, size, words::UPDATE, unless(src, d)),
        Op::Rmw { old, src, base, off, size, .. } => access(base, off, size, words::UPDATE, unless(src, old)),
        Op::CmpXchg { d, new, base, off, size, .. } => access(base, off, size, words::UPDATE, unless(new, Some(d))),
        Op::Unit { insn, a, off, .. } if insn.memory != UnitMemory::None => {
            let size = u32::from(insn.bytes).next_power_of_two().trailing_zeros();
            let flags = if insn.memory == UnitMemory::Store { words::WRITE } else { 0 };
            // A base that the instruction writes is looked at before.
            Some(MemoryAccess { base: a, off, size, flags, value: None })
        }
        Op::Insn { .. }
        | Op::Unit { .. }
        | Op::Rep(_)
        | Op::Alu { .. }
        | Op::Un { .. }
        | Op::GetPc { .. }
        | Op::Fence
        | Op::Fp { .. }
        | Op::SetEnvByte { .. }
        | Op::GuardEnv { .. }
        | Op::Guard { .. }
        | Op::GuardFits { .. }
        | Op::Call { .. }
        | Op::Lea { .. }
        | Op::SetPart { .. }
        | Op::GetHigh { .. }
        | Op::SetHigh { .. }
        | Op::LoadEnv { .. }
        | Op::StoreEnv { .. }
        | Op::AluF { .. }
        | Op::ShiftDoubleF { .. }
        | Op::MulWideF { .. }
        | Op::DivWideF { .. }
        | Op::SetCondF { .. }
        | Op::CMovF { .. }
        | Op::GetFlags { .. }
        | Op::SetFlags { .. }
        | Op::FlipFlags { .. }
        | Op::DeadFlags { .. }
        | Op::BranchF { .. }
        | Op::Branch { .. }
        | Op::Jump { .. }
        | Op::JumpReg { .. }
        | Op::Dispatch
        | Op::Count { .. }
        | Op::TraceBlock { .. }
        | Op::TraceAccess { .. }
        | Op::TraceValue { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_core::accel::VcpuIndex;
    use mimus_tcg_ir::{Cond, Ext};
    use std::sync::Mutex;

    type Defined = (u32, u16, Vec<u8>, Vec<u8>);

    #[derive(Default)]
    struct Sink(Mutex<Vec<Defined>>);

    impl TraceSink for Sink {
        fn define(&self, code: TracedCode<'_>) {
            self.0.lock().unwrap().push((code.id, code.offset, code.bytes.to_vec(), code.lengths.to_vec()));
        }
        fn take(&self, _: VcpuIndex, buffer: Vec<u32>, _: usize, _: u64) -> Vec<u32> {
            buffer
        }
    }

    #[test]
    fn stretches_and_accesses() {
        let insn = |pc, len| Op::Insn { pc: PagePc(pc), len };
        let branch = Op::Branch { cond: Cond::Eq, a: Val::Imm(0), b: Val::Slot(Slot(1)), to: PagePc(0x40) };
        let load = Op::Load { d: Slot(2), base: Slot(2).into(), off: 8, size: Size::B4, ext: Ext::Sign };
        let ops = vec![insn(0x10, 4), load, insn(0x14, 2), branch, insn(0x16, 4), Op::Jump { to: PagePc(0x10) }];
        let mut block = Block { ops, start: 0x10, len: 10, insns: 3, narrow: false, granules: 0 };
        let page: crate::frontend::CodePage = std::array::from_fn(|i| i as u8);
        let sink = Arc::new(Sink::default());
        let kinds = TraceKinds { memory: true, ..TraceKinds::default() };
        let trace = Trace { kinds, sink: sink.clone(), next_id: Arc::new(AtomicU32::new(7)) };
        let both = Instrumentation { count: true, trace: Some(trace) };
        both.apply(&mut block, CodeWindow::new(&page, None), 0);
        mimus_tcg_ir::verify::verify(&block).unwrap();
        let text = block.to_string();
        for line in ["count 2 3", "trace.entry 7", "trace.value s2", "count 1 0", "trace.block 8"] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(text.find("trace.access").unwrap() < text.find("load.b4").unwrap());
        let defined = sink.0.lock().unwrap();
        assert_eq!(defined[0], (7, 0x10, vec![0x10, 0x11, 0x12, 0x13, 0x14, 0x15], vec![4, 2]));
        assert_eq!(defined[1].1, 0x16);
    }
}
