//! Guest code to IR.
//!
//! A block is translated for one *code mode* ([`State::code_mode`]): code and stack size, whether segments are flat,
//! privilege. Integer instructions and near control flow become operations; all else calls the helper
//! [`EXECUTE`](crate::helper_ids::EXECUTE), which leaves the block if what comes after may differ.
//!
//! Slots: 0 to 15 general registers, 16 to 21 bases of ES, CS, SS, DS, FS and GS, 22 the flags. Destinations are
//! written after the last access of an instruction that can fault.
//!
//! Code segments have limits: where they are not 4 GiB, a block begins with a check that all of it is inside, and is
//! executed one instruction at a time if it is not. Near branches check where they lead before they change anything;
//! in 64-bit mode, that the address is canonical. Jumps in 16-bit code wrap at 64 KiB.

mod arith;
mod dead;
mod flow;
mod follow;
mod moves;
mod operands;
mod string;
mod unit;

pub(crate) use flow::count_bytes;
pub(crate) use operands::{is_high, segment as segment_number, segment_of};

use std::mem::offset_of;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use mimus_arch::x86::state::Segment;
use mimus_tcg_exec::frontend::{CodeWindow, TranslateMode};
use mimus_tcg_ir::{Block, CallKind, Cond, Ext, Op, PagePc, Size, Slot, Ty, Val};

use crate::decode::{self, MAX_LEN, Packed, fetch, maker_options, pack};
use crate::exec::quick::Quick;
use crate::helper_ids;
use crate::length::length;
use crate::state::{CS, CodeMode, FS, GS, State};

/// Slot of the first segment base.
pub const BASE0: u8 = 16;
/// Most instructions in a block.
const MAX_INSNS: u16 = 96;

/// Whether the instruction goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// The next instruction follows.
    Next,
    /// The block has its terminal.
    End,
}

/// One block in the making.
pub(crate) struct Tr<'a> {
    block: &'a mut Block,
    insn: &'a Instruction,
    /// The instruction's.
    bytes: &'a [u8],
    /// Code size: 16, 32 or 64.
    bits: u32,
    /// CS, DS, ES and SS need no check and have base 0.
    flat: bool,
    /// Stack pointer width in bytes.
    stack: u32,
    /// Real or virtual-8086 mode.
    real: bool,
    /// Protected mode at privilege level 0.
    kernel: bool,
    /// FS, GS: need no check, but have a base.
    based: [bool; 2],
    /// Alignment is checked.
    aligned: bool,
    careful: bool,
    /// Decoded as AMD's processors do.
    amd: bool,
    /// The code segment has a limit, or other checks.
    limited: bool,
    pc: PagePc,
    next: PagePc,
    temps: u8,
    /// Guards that hold here: see [`State::guards`].
    guards: u8,
}

/// Translates a block, or one instruction.
pub fn translate(state: &State, code: CodeWindow<'_>, start: u16, mode: TranslateMode, block: &mut Block) {
    block.clear(start);
    let code_mode = CodeMode(code.mode());
    let bits = code_mode.bits();
    let careful = mode == TranslateMode::Careful;
    let limited = bits != 64 && !code_mode.flat();
    let mut at = u32::from(start);
    let mut guards = 0;
    // The end of what the block may have.
    let limit = 4096 + if careful { 0 } else { u32::from(code.runs_on()) };
    block.narrow = bits != 64;
    // For all but what may reach into the next page.
    let within = code.page_from(start);
    let mut decoder = decode::decoder(within, bits, u64::from(at), &state.features);
    let mut insn = Instruction::default();
    let mut may_follow = !careful && !limited && bits != 16 && code.goes_on_elsewhere();
    let mut followed = false;
    loop {
        let mut copied = [0; MAX_LEN];
        let done = at.wrapping_sub(start.into()) as usize;
        let bytes = match within.get(done..done.saturating_add(MAX_LEN)).filter(|_| !followed) {
            Some(bytes) => {
                debug_assert_eq!(decoder.position(), done);
                decoder.decode_out(&mut insn);
                decode::to_model(&mut insn, bytes, bits, &state.features);
                bytes
            }
            None => {
                let have = fetch(code, at, &mut copied);
                let bytes = &copied[..have];
                insn = decode::decode(bytes, bits, u64::from(at), &state.features);
                bytes
            }
        };
        let have = bytes.len();
        let len = if insn.is_invalid() { have.clamp(1, 1.max(insn.len())) } else { insn.len() };
        // Only the first instruction of a block may reach past that.
        let crosses = at + len as u32 > limit || insn.is_invalid() && have < MAX_LEN;
        let first = block.insns == 0;
        if crosses && !first {
            block.ops.push(Op::Jump { to: PagePc(at as i32) });
            break;
        }
        let goes_to =
            may_follow.then(|| follow::dispatches(code, start.into(), at, &insn, bits, &state.features)).flatten();
        if let Some(to) = goes_to {
            block.ops.push(Op::Insn { pc: PagePc(at as i32), len: len as u8 });
            block.cover_next(at as u16, len as u8);
            (at, may_follow, followed) = (to, false, true);
            continue;
        }
        let mut tr = Tr {
            bytes: &bytes[..len],
            block: &mut *block,
            insn: &insn,
            bits,
            flat: code_mode.flat(),
            stack: code_mode.stack_bytes(),
            real: code_mode.real(),
            kernel: code_mode.kernel(),
            based: [code_mode.whole(FS), code_mode.whole(GS)],
            aligned: code_mode.aligned(),
            careful,
            amd: code_mode.amd(),
            limited,
            pc: PagePc(at as i32),
            next: PagePc((at + len as u32) as i32),
            temps: 0,
            guards,
        };
        let too_long = tr.insn.is_invalid() && have == MAX_LEN && is_too_long(code, at, code_mode);
        let flow = tr.instruction(len as u8, too_long);
        guards = tr.guards;
        block.cover_next(at as u16, len as u8);
        at += len as u32;
        if flow == Flow::End {
            break;
        }
        if careful || at >= limit || block.insns >= MAX_INSNS || code.has_block(at) {
            block.ops.push(Op::Jump { to: PagePc(at as i32) });
            break;
        }
    }
    // A limit is checked where a block begins: flags would be seen there.
    if !careful && !limited {
        dead::mark(block, code, bits, &state.features);
    }
    if limited && !careful {
        let last = PagePc(i32::from(block.start) + i32::from(block.len) - 1);
        if let Some(Op::GetPc { pc, .. }) = block.ops.get_mut(1) {
            *pc = last;
        }
    }
}

/// Whether blocks may run on over a page's end: limits are checked by pages.
pub fn runs_on(mode: u16) -> bool {
    let mode = CodeMode(mode);
    mode.bits() == 64 || mode.flat()
}

/// Whether the instruction at `start` reaches into the next page.
pub fn crosses_page(code: CodeWindow<'_>, start: u16) -> bool {
    let mut bytes = [0; MAX_LEN];
    let have = fetch(code, u32::from(start), &mut bytes).min(4096 - usize::from(start));
    let mode = CodeMode(code.mode());
    have < MAX_LEN && is_truncated(&bytes[..have], mode.bits(), mode.amd())
}

/// Whether an instruction that does not exist has more than 15 bytes, which is another exception.
fn is_too_long(code: CodeWindow<'_>, at: u32, mode: CodeMode) -> bool {
    let mut bytes = [0; 2 * MAX_LEN];
    let have = code.bytes(at, &mut bytes).len();
    length(&bytes[..have], mode.bits(), mode.amd()).is_none_or(|len| len > MAX_LEN)
}

/// Whether more bytes could make an instruction of these.
fn is_truncated(bytes: &[u8], bits: u32, amd: bool) -> bool {
    let mut decoder = iced_x86::Decoder::new(bits, bytes, maker_options(amd));
    // What does not exist has a length too, which a processor finds first.
    decoder.decode().is_invalid() && length(bytes, bits, amd).is_none()
}

impl Tr<'_> {
    fn op(&mut self, op: Op) {
        if matches!(op, Op::Call { .. }) {
            self.guards = 0;
        }
        self.block.ops.push(op);
    }

    /// Whether accesses to a segment without a base of its own are accesses at their offset: nothing to add or check.
    fn is_plain(&self) -> bool {
        !self.aligned && (self.bits == 64 || self.flat)
    }

    /// Whether the stack pointer is an address as it is, and how wide: 4 or 8 bytes.
    fn plain_stack(&self) -> Option<(Size, Ty)> {
        match (self.is_plain(), self.bits, self.stack) {
            (true, 64, 8) => Some((Size::B8, Ty::I64)),
            (true, 32 | 16, 4) => Some((Size::B4, Ty::U32)),
            _ => None,
        }
    }

    /// The instruction for a helper.
    fn packed(&self) -> Packed {
        pack(self.bytes, self.bits)
    }

    /// A fresh temporary.
    fn temp(&mut self) -> Slot {
        let t = Slot::temp(self.temps);
        self.temps += 1;
        t
    }

    /// `too_long`: an instruction may not have so many bytes.
    fn instruction(&mut self, len: u8, too_long: bool) -> Flow {
        self.op(Op::Insn { pc: self.pc, len });
        if self.limited {
            self.check_limit();
        }
        if self.insn.is_invalid() {
            self.op(Op::Call {
                helper: helper_ids::INVALID,
                kind: CallKind::MayExit,
                ret: None,
                args: [Val::Imm(i64::from(too_long)), Val::Imm(0), Val::Imm(0)],
            });
            self.op(Op::Dispatch);
            return Flow::End;
        }
        let (before, guards) = (self.block.ops.len(), self.guards);
        if let Some(flow) = self.arith().or_else(|| self.moves()).or_else(|| self.control()).or_else(|| self.unit()) {
            return flow;
        }
        // Nothing of an attempt that was given up stays.
        self.block.ops.truncate(before);
        self.temps = 0;
        self.guards = guards;
        self.execute()
    }

    /// Checks that the instruction, or at the beginning of a block all of it, is inside the code segment.
    fn check_limit(&mut self) {
        if self.careful {
            return self.check_code(helper_ids::CODE_ITSELF, Val::Imm(0), 0);
        }
        if self.block.insns != 0 {
            return;
        }
        // The last byte's address is put in when the block is complete.
        let last = self.offset_of_pc(self.pc);
        self.guard_limit(last);
    }

    /// In careful mode: checks an address in code, `#GP(0)`; before it, that `pushed` bytes can be pushed.
    fn check_code(&mut self, what: i64, ip: Val, pushed: u32) {
        self.op(Op::Call {
            helper: helper_ids::CODE,
            kind: CallKind::MayExit,
            ret: None,
            args: [Val::Imm(what), ip, Val::Imm(pushed.into())],
        });
    }

    /// Leaves to careful mode if an offset is beyond the code segment.
    fn guard_limit(&mut self, ip: Val) {
        let d = self.temp();
        let off = offset_of!(State, seg) + CS * size_of::<Segment>() + offset_of!(Segment, limit);
        self.op(Op::LoadEnv { d, off: off as i32, size: Size::B4, ext: Ext::Zero });
        self.op(Op::Guard { cond: Cond::LtU, a: Val::Slot(d), b: ip });
    }

    /// Whether the block certainly has the next instruction too.
    fn goes_on(&self) -> bool {
        !self.careful && self.next.0 + MAX_LEN as i32 <= 4096 && self.block.insns + 1 < MAX_INSNS
    }

    /// Leaves the instruction to the helper.
    fn execute(&mut self) -> Flow {
        let nothing = [Val::Imm(0), Val::Imm(0)];
        let quick = Quick::of(self.insn, self.bits, self.kernel, self.goes_on()).map(|what| (what, nothing));
        if let Some((what, [a, b])) = quick.or_else(|| self.quick_with_operand()) {
            self.op(Op::Call {
                helper: helper_ids::QUICK,
                kind: CallKind::MayExit,
                ret: None,
                args: [Val::Imm(what as i64), a, b],
            });
            return self.after_helper();
        }
        let offset = if (0..self.insn.op_count()).any(|i| self.insn.op_kind(i) == OpKind::Memory) {
            self.offset()
        } else {
            Val::Imm(0)
        };
        let [low, high] = self.packed();
        self.op(Op::Call {
            helper: helper_ids::EXECUTE,
            kind: CallKind::MayExit,
            ret: None,
            args: [Val::Imm(low as i64), Val::Imm(high as i64), offset],
        });
        self.after_helper()
    }

    /// Loads of segment registers and flags.
    fn quick_with_operand(&mut self) -> Option<(Quick, [Val; 2])> {
        let insn = self.insn;
        let bytes = insn.stack_pointer_increment().unsigned_abs();
        let to = if insn.op_kind(0) == OpKind::Register { insn.op_register(0) } else { Register::None };
        let loaded = to.is_segment_register() && to != Register::CS;
        let seg = Val::Imm(segment_number(to) as i64);
        match insn.mnemonic() {
            Mnemonic::Mov if loaded => {
                let selector = self.read(1, 2);
                Some((Quick::Segment, [seg, selector]))
            }
            Mnemonic::Pop if loaded => Some((Quick::PopSegment, [seg, Val::Imm(bytes.into())])),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq if !self.real => {
                Some((Quick::Popf, [Val::Imm(bytes.into()), Val::Imm(0)]))
            }
            _ => None,
        }
    }

    fn after_helper(&mut self) -> Flow {
        if always_leaves(self.insn) {
            self.op(Op::Dispatch);
            return Flow::End;
        }
        Flow::Next
    }
}

/// Instructions after which the helper has set the instruction pointer in any case.
fn always_leaves(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Int | Int1
            | Int3
            | Hlt
            | Iret
            | Iretd
            | Iretq
            | Retf
            | Syscall
            | Sysret
            | Sysretq
            | Sysenter
            | Sysexit
            | Sysexitq
            | Ud0
            | Ud1
            | Ud2
            | Rsm
    ) || matches!(
        insn.code(),
        Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
    )
}

/// The IR's size of `bytes`.
pub(crate) fn size(bytes: u32) -> Size {
    match bytes {
        1 => Size::B1,
        2 => Size::B2,
        4 => Size::B4,
        _ => Size::B8,
    }
}
