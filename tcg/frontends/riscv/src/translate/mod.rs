//! From guest code to IR: one [`Block`] at a time.
//!
//! A block is a superblock: it goes on past conditional branches, each a side exit, until an unconditional
//! jump, an instruction that changes how the following ones execute, or the end of the page.
//!
//! | module | instructions |
//! |---|---|
//! | `methods` | which operation each is: the generated trait's methods |
//! | `base` | RV64I |
//! | `bitmanip` | Zba, Zbb, Zbs, Zicond where one IR operation is not enough; Zimop |
//! | `atomic` | A |
//! | `float` | F and D |
//! | `follow` | which side of a branch a block goes on at |
//! | `fold` | what compilers make of several instructions, in fewer operations |
//! | `system` | CSRs, privileged instructions, fences, cache-block management |
//!
//! Compressed instructions call the methods of the base instructions they stand for.

mod atomic;
mod base;
mod bitmanip;
mod float;
mod fold;
mod follow;
mod methods;
mod system;

use crate::decode::{decode16, decode32, insn_len};
use crate::helper_ids;
use mimus_arch::riscv::{Ext, Features};
use mimus_tcg_ir::interp;
use mimus_tcg_ir::{AluOp, Block, CallKind, Op, PagePc, Slot, Ty, UnOp, Val};

/// Instructions in a block, if the configuration does not say otherwise.
pub const DEFAULT_MAX_INSNS: u16 = 48;
/// Instructions of a block that is a loop.
const LONGEST_LOOP: u16 = 144;
/// Side exits of a block.
const MAX_SIDE_EXITS: u32 = 6;
/// Bytes of a page.
const PAGE: u32 = 4096;

/// What the code being translated runs on.
#[derive(Clone, Copy, Debug)]
pub struct TranslateConfig {
    features: Features,
    /// Translate a single instruction, with the checks that ordinary blocks assume to pass.
    pub careful: bool,
    /// Guest instructions in a block, at most (at least one is translated).
    pub max_insns: u16,
}

impl TranslateConfig {
    /// Ordinary blocks for a guest with these extensions and what they contain.
    pub fn new(features: Features) -> TranslateConfig {
        TranslateConfig { features: features.closed(), careful: false, max_insns: DEFAULT_MAX_INSNS }
    }

    /// The same guest, one instruction at a time.
    pub fn careful(self) -> TranslateConfig {
        TranslateConfig { careful: true, max_insns: 1, ..self }
    }

    /// Guest instructions in a block that is a loop, at most.
    fn longest_loop(&self) -> u16 {
        if self.max_insns < DEFAULT_MAX_INSNS { self.max_insns } else { LONGEST_LOOP }
    }

    /// The guest's extensions.
    pub fn features(&self) -> Features {
        self.features
    }
}

/// Guest code as the translator sees it.
pub trait CodeWindow {
    /// The halfword at byte `offset` (even) of the page that the block begins in; offsets from 4096 up are
    /// in the next page. `None` if that page is not available.
    fn halfword(&self, offset: u32) -> Option<u16>;

    /// Whether a block is to end at `offset`, between two instructions, as there is another.
    fn has_block(&self, _offset: u32) -> bool {
        false
    }

    /// Whether a block may go on anywhere in the page after a jump.
    fn goes_on_elsewhere(&self) -> bool {
        true
    }

    /// Bytes of the next page that a block may have.
    fn runs_on(&self) -> u32 {
        0
    }
}

impl<F: Fn(u32) -> Option<u16>> CodeWindow for F {
    fn halfword(&self, offset: u32) -> Option<u16> {
        self(offset)
    }
}

impl CodeWindow for mimus_tcg_exec::frontend::CodeWindow<'_> {
    fn halfword(&self, offset: u32) -> Option<u16> {
        mimus_tcg_exec::frontend::CodeWindow::halfword(self, offset)
    }

    fn has_block(&self, offset: u32) -> bool {
        mimus_tcg_exec::frontend::CodeWindow::has_block(self, offset)
    }

    fn goes_on_elsewhere(&self) -> bool {
        mimus_tcg_exec::frontend::CodeWindow::goes_on_elsewhere(self)
    }

    fn runs_on(&self) -> u32 {
        mimus_tcg_exec::frontend::CodeWindow::runs_on(self).into()
    }
}

/// The block's first instruction reaches into a page that the [`CodeWindow`] does not have. Make it
/// available and translate again, or raise the fetch fault of that page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NeedNextPage;

/// Translates the code at byte offset `start` of a page into `block`, whose contents are replaced.
///
/// # Errors
/// [`NeedNextPage`]; `block` is empty then.
pub fn translate_block<W: CodeWindow + ?Sized>(
    block: &mut Block,
    code: &W,
    start: u16,
    cfg: &TranslateConfig,
) -> Result<(), NeedNextPage> {
    block.clear(start);
    let mut tr = Translator::new(block, cfg);
    let mut pc = u32::from(start);
    while let Some((insn, len)) = fetch(code, pc) {
        // A loop may go on in the next page; everything else ends with the last instruction that is whole in this one.
        let leaves = pc + u32::from(len) > PAGE && pc != u32::from(start);
        if leaves && !(code.runs_on() != 0 && follow::is_loop(code, u32::from(start), pc)) {
            break;
        }
        tr.follow = match cfg.careful {
            true => None,
            false => follow::follows(code, u32::from(start), pc, insn, len)
                .or_else(|| follow::dispatches(code, u32::from(start), pc, insn, len).filter(|_| !tr.went_on)),
        };
        tr.instruction(pc, insn, len);
        pc = tr.next;
        if tr.ended {
            tr.drop_dead();
            return Ok(());
        }
        let full = tr.block.insns >= cfg.max_insns || tr.exits >= MAX_SIDE_EXITS;
        let full = full && !(tr.block.insns < cfg.longest_loop() && follow::is_loop(code, u32::from(start), pc));
        if pc >= PAGE + code.runs_on() || cfg.careful || full || pc < PAGE && code.has_block(pc) {
            break;
        }
    }
    if tr.block.insns == 0 {
        return Err(NeedNextPage);
    }
    tr.emit(Op::Jump { to: PagePc(pc as i32) });
    tr.drop_dead();
    Ok(())
}

/// The instruction at `pc` and its length, if the window has all of it.
#[inline]
fn fetch<W: CodeWindow + ?Sized>(code: &W, pc: u32) -> Option<(u32, u8)> {
    let low = code.halfword(pc)?;
    let len = insn_len(low);
    if len == 2 {
        return Some((u32::from(low), len));
    }
    let high = code.halfword(pc + 2)?;
    Some((u32::from(high) << 16 | u32::from(low), len))
}

/// State of the translation of a block.
struct Translator<'a> {
    block: &'a mut Block,
    cfg: &'a TranslateConfig,
    /// Offset of the current instruction.
    pc: u32,
    /// Offset of the next one.
    next: u32,
    /// Bits of the current instruction.
    insn: u32,
    /// Temporaries of the current instruction used so far.
    temps: u8,
    /// A terminal was emitted.
    ended: bool,
    exits: u32,
    /// The current instruction is a branch or a jump, and the block is to go on there.
    follow: Option<u32>,
    /// A jump has been followed.
    went_on: bool,
    /// A register known to hold an address relative to the page, from `auipc`; 0 if none.
    pc_reg: u8,
    pc_value: PagePc,
    /// Bits of `HOT_FP_BAD` known to be clear.
    fp_known: u8,
    /// What is known of integer registers.
    known: fold::Known,
    /// `HOT_FP_DIRTY` is known to be set.
    fp_dirty: bool,
}

impl<'a> Translator<'a> {
    fn new(block: &'a mut Block, cfg: &'a TranslateConfig) -> Translator<'a> {
        Translator {
            block,
            cfg,
            pc: 0,
            next: 0,
            insn: 0,
            temps: 0,
            ended: false,
            exits: 0,
            follow: None,
            went_on: false,
            pc_reg: 0,
            pc_value: PagePc(0),
            fp_known: 0,
            known: fold::Known::default(),
            fp_dirty: false,
        }
    }

    /// Translates one instruction.
    fn instruction(&mut self, pc: u32, insn: u32, len: u8) {
        self.pc = pc;
        self.next = pc + u32::from(len);
        self.insn = insn;
        self.temps = 0;
        self.block.cover_next(pc as u16, len);
        self.emit(Op::Insn { pc: self.here(), len });
        let mark = self.block.ops.len();
        let legal = if len == 2 { decode16(self, insn as u16) } else { decode32(self, insn) };
        if !legal {
            self.block.ops.truncate(mark);
            self.call(helper_ids::ILLEGAL, None, [self.raw(), Val::Imm(0), Val::Imm(0)]);
            self.end(Op::Dispatch);
        }
    }

    #[inline]
    fn emit(&mut self, op: Op) {
        self.known.note(&op);
        self.block.ops.push(op);
    }

    /// Emits the block's terminal.
    fn end(&mut self, op: Op) {
        self.emit(op);
        self.ended = true;
    }

    /// Ends the block; the next instruction follows.
    fn end_at_next(&mut self) {
        self.end(Op::Jump { to: self.next_pc() });
    }

    fn here(&self) -> PagePc {
        PagePc(self.pc as i32)
    }

    fn next_pc(&self) -> PagePc {
        PagePc(self.next as i32)
    }

    /// The address `offset` bytes from the current instruction.
    fn relative(&self, offset: i32) -> PagePc {
        PagePc((self.pc as i32).wrapping_add(offset))
    }

    /// The instruction's bits, as a helper's argument.
    fn raw(&self) -> Val {
        Val::Imm(i64::from(self.insn))
    }

    fn temp(&mut self) -> Slot {
        self.temps += 1;
        Slot::temp(self.temps - 1)
    }

    /// An integer register as an operand.
    #[inline]
    fn x(&self, reg: i32) -> Val {
        if reg == 0 { Val::Imm(0) } else { Val::Slot(Slot(reg as u8)) }
    }

    /// An integer register where the IR wants a slot.
    fn x_slot(&mut self, reg: i32) -> Slot {
        if reg != 0 {
            return Slot(reg as u8);
        }
        let zero = self.temp();
        self.emit(Op::Un { op: UnOp::Mov, ty: Ty::I64, d: zero, a: Val::Imm(0) });
        zero
    }

    /// The slot of an integer register that is about to be written.
    #[inline]
    fn dest(&mut self, reg: i32) -> Slot {
        if reg as u8 == self.pc_reg {
            self.pc_reg = 0;
        }
        Slot(reg as u8)
    }

    /// The slot of an integer register that is about to be written by an operation with side effects: a
    /// temporary for x0.
    fn dest_or_temp(&mut self, reg: i32) -> Slot {
        if reg == 0 { self.temp() } else { self.dest(reg) }
    }

    /// A helper call that may leave the block, after which nothing is known about the hart's state.
    fn call(&mut self, helper: u16, ret: Option<Slot>, args: [Val; 3]) {
        self.emit(Op::Call { helper, kind: CallKind::MayExit, ret, args });
        self.fp_known = 0;
        self.fp_dirty = false;
        self.pc_reg = 0;
    }

    /// `rd = a`
    fn mov(&mut self, rd: i32, a: Val) -> bool {
        if rd != 0 && self.x(rd) != a {
            let d = self.dest(rd);
            self.emit(Op::Un { op: UnOp::Mov, ty: Ty::I64, d, a });
        }
        true
    }

    /// `rd = op(rs1)`
    fn unary(&mut self, op: UnOp, ty: Ty, rd: i32, rs1: i32) -> bool {
        match self.x(rs1) {
            Val::Imm(value) => self.mov(rd, Val::Imm(interp::un(op, ty, value as u64) as i64)),
            a if rd != 0 => {
                let d = self.dest(rd);
                self.emit(Op::Un { op, ty, d, a });
                true
            }
            _ => true,
        }
    }

    /// `rd = op(a, b)`, with constants folded and additions of zero made moves.
    fn binary(&mut self, op: AluOp, ty: Ty, rd: i32, a: Val, b: Val) -> bool {
        if rd == 0 {
            return true;
        }
        if self.fold(op, ty, rd, a, b) {
            return true;
        }
        let value = match (op, a, b) {
            (_, Val::Imm(x), Val::Imm(y)) => {
                return self.mov(rd, Val::Imm(interp::alu(op, ty, x as u64, y as u64) as i64));
            }
            (AluOp::Add | AluOp::Sub | AluOp::Or | AluOp::Xor, value, Val::Imm(0)) => Some(value),
            (AluOp::Add | AluOp::Or | AluOp::Xor, Val::Imm(0), value) => Some(value),
            _ => None,
        };
        match (value, ty) {
            (Some(value), Ty::I64) => return self.mov(rd, value),
            (Some(value), Ty::I32) if self.known.is_word(value) => return self.mov(rd, value),
            (Some(value), Ty::I32) => {
                let d = self.dest(rd);
                self.emit(Op::Un { op: UnOp::SextW, ty: Ty::I64, d, a: value });
            }
            _ => {
                let d = self.dest(rd);
                self.emit(Op::Alu { op, ty, d, a, b });
            }
        }
        true
    }

    /// Whether a jump to `to` raises instruction-address-misaligned (only without compressed instructions).
    fn misaligned(&self, to: PagePc) -> bool {
        to.0 & 2 != 0 && !self.cfg.features.has(Ext::Zca)
    }
}
