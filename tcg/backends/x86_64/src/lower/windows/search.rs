//! Loops that look for something: each round loads the next word and leaves if a condition on it holds, as a C library's
//! `strlen` and `memchr` do where the guest has no vectors.
//!
//! Once windows have been looked up, four rounds at a time are tried on the host's vectors: what a round computes of the words
//! it has loaded, and whether it would leave. As long as none of four does they are skipped; the loop's own operations do the rest, and the
//! last of the rounds that could have been skipped, after which every slot has what a round leaves in it. What is
//! loaded ahead is in pages that have been looked up, and is loaded again by the round that leaves.
//!
//! Conditions on what moves by constants bound how many rounds may be tried. All of it is for guests without flags, whose
//! loads may be made in any order.

mod copying;

use self::copying::Copies;
use super::super::Lower;
use super::{Analysis, COUNTER, FIRST_KEPT, Linear, MAX, Width, Windows};
use crate::asm::{Alu, Cc, Fixup, Map, R14, R15, RAX, RSP, Rm, Shift, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{AluOp, Cond, Ext, FIRST_TEMP, Op, SLOTS, Size, Slot, Ty, UnOp, Val};

/// Where the number of rounds to try is kept, then that of groups of four.
const BUDGET: Slot = Slot((FIRST_KEPT + MAX - 1) as u8);
/// Whether rounds have been run since the loop was entered.
const SINCE_ENTRY: Slot = Slot((FIRST_KEPT + MAX - 2) as u8);
/// Rounds that run before any are tried: most strings are short.
const FEW: i32 = 8;
/// Loads of a round: each has a pointer of its own.
const MAX_LOADS: usize = 2;
/// The first of the vector registers for values; those before it are for what leads out, and scratch.
const FIRST_VECTOR: u8 = 2;

/// What is done to four words at once.
#[derive(Clone, Copy, Debug)]
enum Step {
    Load {
        d: u8,
        pointer: u8,
        size: Size,
        ext: Ext,
    },
    Alu {
        op: AluOp,
        d: u8,
        a: u8,
        b: u8,
    },
    Shift {
        op: AluOp,
        d: u8,
        a: u8,
        by: i8,
    },
    /// The round leaves if they are equal, or if they are not.
    Leave {
        if_equal: bool,
        a: u8,
        b: u8,
    },
}

/// A condition that holds for as many rounds as `step` is contained in `more` - `less`.
#[derive(Clone, Copy, Debug)]
struct Limit {
    more: Linear,
    less: Linear,
    /// It does not hold at all under this condition of `more` compared with `less`.
    never: Option<Cc>,
    step: u64,
}

/// How such a loop is tried.
#[derive(Debug)]
pub(super) struct Search {
    steps: Vec<Step>,
    /// What does not change in the loop, with its registers.
    constants: Vec<(Val, u8)>,
    /// The address of each load, its window's operation, and the bytes it moves by each round.
    pointers: Vec<(Linear, usize, i32)>,
    limits: Vec<Limit>,
    moves: Moves,
    /// What the loop copies, if it does nothing else; there are no steps then.
    copies: Option<Copies>,
}

/// What rounds do to slots that the next one reads.
#[derive(Debug, Default)]
struct Moves {
    /// What slots are changed by in a round.
    by: Vec<(Slot, i32)>,
    /// Sums of such slots, as they are when a round begins.
    sums: Vec<(Slot, Linear)>,
}

/// Finds out what a round does.
struct Finder<'a> {
    windows: &'a Windows,
    /// At the end of the body.
    end: Analysis,
    /// Before the operation looked at.
    now: Analysis,
    written: [bool; SLOTS],
    /// Vector registers of slots that depend on what was loaded.
    vector: [Option<u8>; SLOTS],
    found: Search,
}

impl Finder<'_> {
    fn vector_of(&self, val: Val) -> Option<u8> {
        match val {
            Val::Slot(slot) => self.vector.get(usize::from(slot.0)).copied().flatten(),
            Val::Imm(_) => None,
        }
    }

    fn is_written(&self, slot: Slot) -> bool {
        self.written.get(usize::from(slot.0)).copied().unwrap_or(true)
    }

    /// A register that nothing is in.
    fn register(&self) -> Option<u8> {
        (FIRST_VECTOR..16).find(|reg| {
            let constant = self.found.constants.iter().any(|(_, taken)| taken == reg);
            !constant && !self.vector.contains(&Some(*reg))
        })
    }

    /// The register of an operand, which depends on what was loaded or never changes.
    fn operand(&mut self, val: Val) -> Option<u8> {
        if let Some(reg) = self.vector_of(val) {
            return Some(reg);
        }
        if matches!(val, Val::Slot(slot) if self.is_written(slot)) {
            return None;
        }
        if let Some((_, reg)) = self.found.constants.iter().find(|(constant, _)| *constant == val) {
            return Some(*reg);
        }
        // Constants stay: they come from the other end.
        let free = (FIRST_VECTOR..16).rev().find(|reg| {
            let used = self.found.steps.iter().any(|step| step.writes() == Some(*reg));
            !used && !self.found.constants.iter().any(|(_, taken)| taken == reg)
        })?;
        self.found.constants.push((val, free));
        Some(free)
    }

    /// What an operation computes of four rounds; `None`: nothing that is understood.
    fn step(&mut self, op: &Op) -> Option<u8> {
        match *op {
            Op::Un { op: UnOp::Mov, ty: Ty::I64, a, .. } => self.vector_of(a),
            Op::Alu { op: op @ (AluOp::Shl | AluOp::Shr), ty: Ty::I64, a, b: Val::Imm(by), .. } => {
                let (a, by) = (self.vector_of(a)?, i8::try_from(by).ok().filter(|by| (0..64).contains(by))?);
                let d = self.register()?;
                self.found.steps.push(Step::Shift { op, d, a, by });
                Some(d)
            }
            Op::Alu { op, ty: Ty::I64, a, b, .. } if is_lanewise(op) => {
                let (a, b) = (self.operand(a)?, self.operand(b)?);
                let d = self.register()?;
                self.found.steps.push(Step::Alu { op, d, a, b });
                Some(d)
            }
            _ => None,
        }
    }

    fn load(&mut self, index: usize, op: &Op) -> Option<u8> {
        let Op::Load { base, off, size, ext, .. } = *op else { return None };
        self.windows.of(index)?;
        let mut at = self.now.value(base)?;
        at.k = at.k.wrapping_add(off.into());
        let (at, step) = self.end.resolve(at)?;
        let pointer = self.found.pointers.len();
        let fits = step == i64::from(size.bytes()) && at.is_easy() && ext != Ext::Ones && pointer < MAX_LOADS;
        let d = if fits { self.register()? } else { return None };
        self.found.pointers.push((at, index, step as i32));
        self.found.steps.push(Step::Load { d, pointer: pointer as u8, size, ext });
        Some(d)
    }

    /// A branch that is not taken, or taken, for as long as the loop goes on.
    fn branch(&mut self, cond: Cond, a: Val, b: Val, closes: bool) -> Option<()> {
        if self.vector_of(a).is_some() || self.vector_of(b).is_some() {
            let if_equal = match cond {
                Cond::Eq => !closes,
                Cond::Ne => closes,
                _ => return None,
            };
            let (a, b) = (self.operand(a)?, self.operand(b)?);
            self.found.steps.push(Step::Leave { if_equal, a, b });
            return Some(());
        }
        let limit = limit(&self.now, &self.end, (cond, a, b), closes)?;
        self.found.limits.extend(limit);
        Some(())
    }
}

/// How long a branch on what moves, or stays, goes the way that keeps the loop; `None` within: for ever.
fn limit(now: &Analysis, end: &Analysis, (cond, a, b): (Cond, Val, Val), closes: bool) -> Option<Option<Limit>> {
    let (first, second) = (now.value(a)?, now.value(b)?);
    let ((a, a_step), (b, b_step)) = (end.resolve(first)?, end.resolve(second)?);
    if a_step == 0 && b_step == 0 {
        // As it was in the round before, unless that found something else in a slot.
        let same = |value: Linear| value.terms().all(|(slot, _)| end.step_of(slot).is_some());
        return (same(first) && same(second)).then_some(None);
    }
    let goes_on = if closes { cond } else { inverse(cond) };
    let (more, less, step, never) = match goes_on {
        Cond::Ne if a_step > b_step => (b, a, a_step - b_step, None),
        Cond::Ne => (a, b, b_step - a_step, None),
        Cond::LtU => (b, a, a_step - b_step, Some(Cc::B)),
        Cond::GeU => (a, b, b_step - a_step, Some(Cc::B)),
        Cond::LtS => (b, a, a_step - b_step, Some(Cc::L)),
        Cond::GeS => (a, b, b_step - a_step, Some(Cc::L)),
        Cond::Eq => return None,
    };
    // If one of them stays, the other one meets it before it wraps around.
    let meets = a_step == 0 || b_step == 0;
    let step = u64::try_from(step).ok().filter(|step| step.is_power_of_two() && meets)?;
    (more.is_easy() && less.is_easy()).then_some(Some(Limit { more, less, never, step }))
}

impl Step {
    fn writes(self) -> Option<u8> {
        match self {
            Step::Load { d, .. } | Step::Alu { d, .. } | Step::Shift { d, .. } => Some(d),
            Step::Leave { .. } => None,
        }
    }
}

fn is_lanewise(op: AluOp) -> bool {
    use AluOp::{Add, And, Andn, Or, Orn, Sub, Xnor, Xor};
    matches!(op, Add | Sub | And | Or | Xor | Andn | Orn | Xnor)
}

fn inverse(cond: Cond) -> Cond {
    match cond {
        Cond::Eq => Cond::Ne,
        Cond::Ne => Cond::Eq,
        Cond::LtS => Cond::GeS,
        Cond::GeS => Cond::LtS,
        Cond::LtU => Cond::GeU,
        Cond::GeU => Cond::LtU,
    }
}

impl Search {
    /// How to try rounds of the loop with this body, if it is such a loop.
    pub(super) fn find(body: &[Op], windows: &mut Windows) -> Option<Search> {
        if windows.is_empty() || windows.list.len() + 2 > MAX || !is_x86_feature_detected!("avx2") {
            return None;
        }
        let mut end = Analysis::new(Width::Whole);
        let mut written = [false; SLOTS];
        for op in body {
            end.step(op);
            for_each_written(op, |d| written.iter_mut().skip(usize::from(d.0)).take(1).for_each(|w| *w = true));
        }
        if let Some(copy) = copying::find(body, windows, &end, &written) {
            return Some(copy);
        }
        let moves = Moves::of(body, &end, &written, |_| false)?;
        let found = Search {
            steps: Vec::new(),
            constants: Vec::new(),
            pointers: Vec::new(),
            limits: Vec::new(),
            moves,
            copies: None,
        };
        let now = Analysis::new(Width::Whole);
        let mut finder = Finder { windows, end, now, written, vector: [None; SLOTS], found };
        for (i, op) in body.iter().enumerate() {
            let closes = i + 1 == body.len();
            let vector = match *op {
                Op::Insn { .. } => continue,
                Op::Alu { .. } | Op::Un { .. } | Op::GetPc { .. } => finder.step(op),
                Op::Load { .. } => Some(finder.load(i, op)?),
                Op::Branch { cond, a, b, .. } => {
                    finder.branch(cond, a, b, closes)?;
                    continue;
                }
                Op::Jump { .. } if closes => continue,
                _ => return None,
            };
            finder.now.step(op);
            for_each_written(op, |d| {
                if let Some(place) = finder.vector.get_mut(usize::from(d.0)) {
                    *place = vector;
                }
            });
        }
        let looks = finder.found.steps.iter().any(|step| matches!(step, Step::Leave { .. }));
        (looks && !finder.found.pointers.is_empty()).then_some(finder.found)
    }
}

impl Moves {
    /// Those of a loop in which a round needs nothing else of the one before it, but what `is_known`.
    fn of(body: &[Op], end: &Analysis, written: &[bool; SLOTS], is_known: impl Fn(Slot) -> bool) -> Option<Moves> {
        let mut moves = Moves::default();
        for slot in (0..FIRST_TEMP).map(Slot).filter(|slot| written.get(usize::from(slot.0)) == Some(&true)) {
            match end.step_of(slot) {
                Some(0) | None => {}
                Some(by) if fits32(by) => moves.by.push((slot, by as i32)),
                Some(_) => return None,
            }
        }
        let mut done = [false; SLOTS];
        let mut all = true;
        for op in body {
            for_each_read(op, |slot| {
                let n = usize::from(slot.0);
                let carried = written.get(n) == Some(&true) && done.get(n) == Some(&false);
                if !carried || is_known(slot) || slot.0 < FIRST_TEMP && end.step_of(slot).is_some() {
                    return;
                }
                match end.resolve(Linear::of(slot)).filter(|(sum, _)| slot.0 < FIRST_TEMP && sum.is_easy()) {
                    Some((sum, _)) if moves.sums.iter().all(|(there, _)| *there != slot) => {
                        moves.sums.push((slot, sum))
                    }
                    Some(_) => {}
                    None => all = false,
                }
            });
            for_each_written(op, |d| done.iter_mut().skip(usize::from(d.0)).take(1).for_each(|w| *w = true));
        }
        all.then_some(moves)
    }
}

impl Lower<'_> {
    fn kept(&self, slot: Slot) -> Rm {
        Rm::Env(self.be.slot_disp(slot))
    }

    /// On the way into the copy with windows.
    pub(in super::super) fn enter_search(&mut self) {
        if self.windows.search.is_some() {
            self.asm.mov_rm_i(true, self.kept(SINCE_ENTRY), 0);
        }
    }

    /// Skips rounds that do not leave, once windows have been looked up. Clobbers `rax`, `r14`, `r15`.
    pub(in super::super) fn search(&mut self) {
        // Vector registers have something in them.
        let Some(search) = self.windows.search.take().filter(|_| !self.fp_alive) else { return };
        let counter = self.windows.counter.map_or(self.kept(COUNTER), Rm::Reg);
        let mut skip: Vec<Fixup> = Vec::new();
        self.asm.mov_r_rm(true, RAX, counter);
        if !self.forced() && search.copies.as_ref().is_none_or(Copies::may_be_short) {
            self.asm.alu_rm_i(Alu::Cmp, true, self.kept(SINCE_ENTRY), 0);
            let since = self.asm.jcc(Cc::Ne);
            self.asm.mov_rm_i(true, self.kept(SINCE_ENTRY), 1);
            self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(RAX), FEW);
            skip.push(self.asm.jcc(Cc::Be));
            self.asm.mov_ri(RAX, FEW.into());
            self.asm.mov_rm_r(true, counter, RAX);
            skip.push(self.asm.jmp());
            self.asm.bind(since);
        }
        if self.has_fp_pins && search.copies.is_none() {
            let dead = Rm::Env(self.be.env(self.be.config.env.vector_dead));
            self.asm.ins(Map::Base, false, 0x80, 7, dead);
            self.asm.push(0);
            skip.push(self.asm.jcc(Cc::E));
        }
        self.asm.mov_rm_r(true, self.kept(BUDGET), RAX);
        for limit in &search.limits {
            skip.extend(self.keep_limit(limit));
        }
        if let Some(copies) = &search.copies {
            skip.extend(self.copy_rounds(copies));
            self.move_on(&search.moves, counter);
            self.load_carried(copies);
            return skip.into_iter().for_each(|from| self.asm.bind(from));
        }
        self.asm.shift_i(Shift::Shr, true, Rm::Reg(RAX), 2);
        self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(RAX), if self.forced() { 1 } else { 4 });
        skip.push(self.asm.jcc(Cc::B));
        self.asm.mov_rm_r(true, self.kept(BUDGET), RAX);
        self.load_constants(&search);
        self.load_pointers(&search);
        self.try_rounds(&search);
        self.skip_rounds(&search, counter);
        skip.into_iter().for_each(|from| self.asm.bind(from));
    }

    /// `rax` and the budget = the lesser of `rax` and what a condition allows.
    fn keep_limit(&mut self, limit: &Limit) -> Option<Fixup> {
        let budget = self.kept(BUDGET);
        self.compute(&limit.more);
        self.asm.mov_r_rm(true, RAX, Rm::Reg(R15));
        self.compute(&limit.less);
        self.asm.alu_r_rm(Alu::Sub, true, RAX, Rm::Reg(R15));
        let never = limit.never.map(|cc| self.asm.jcc(cc));
        self.asm.shift_i(Shift::Shr, true, Rm::Reg(RAX), limit.step.trailing_zeros() as u8);
        self.asm.alu_r_rm(Alu::Cmp, true, RAX, budget);
        self.asm.cmov(Cc::A, true, RAX, budget);
        self.asm.mov_rm_r(true, budget, RAX);
        never
    }

    fn load_constants(&mut self, search: &Search) {
        for &(val, t) in &search.constants {
            match self.home_val(val) {
                super::Opnd::Reg(reg) => {
                    dynasm!(self.asm ; .arch x64 ; vmovq Rx(t), Rq(reg) ; vpbroadcastq Ry(t), Rx(t))
                }
                super::Opnd::Mem(disp) => dynasm!(self.asm ; .arch x64 ; vpbroadcastq Ry(t), QWORD [rbp + disp]),
                super::Opnd::Imm(0) => dynasm!(self.asm ; .arch x64 ; vpxor Rx(t), Rx(t), Rx(t)),
                super::Opnd::Imm(imm) => {
                    self.asm.mov_ri(R15, imm);
                    dynasm!(self.asm ; .arch x64 ; vmovq Rx(t), r15 ; vpbroadcastq Ry(t), Rx(t));
                }
            }
        }
    }

    /// `r15`, and `r14` if there are two = host addresses of loads.
    fn load_pointers(&mut self, search: &Search) {
        for (i, (at, op, _)) in search.pointers.iter().enumerate() {
            let Some((reg, place)) = self.windows.of(*op).map(|w| (w.reg, w.place)) else { return };
            if i == 1 {
                dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], r15);
            }
            self.compute(at);
            let addend = reg.map_or(self.kept(place), Rm::Reg);
            self.asm.alu_r_rm(Alu::Add, true, R15, addend);
            if i == 1 {
                self.asm.mov_r_rm(true, R14, Rm::Reg(R15));
                self.asm.mov_r_rm(true, R15, Rm::Mem { base: RSP, index: None, disp: 8 });
            }
        }
    }

    /// Tries four rounds after four, `rax` times at most; leaves in `rax` how often there are left.
    fn try_rounds(&mut self, search: &Search) {
        let top = self.asm.pos();
        let mut leaves = false;
        for step in &search.steps {
            match *step {
                Step::Load { d, pointer, size, ext } => {
                    self.load_lanes(d, [R15, R14][usize::from(pointer & 1)], size, ext)
                }
                Step::Alu { op, d, a, b } => self.on_lanes(op, d, a, b),
                Step::Shift { op: AluOp::Shl, d, a, by } => dynasm!(self.asm ; .arch x64 ; vpsllq Ry(d), Ry(a), by),
                Step::Shift { d, a, by, .. } => dynasm!(self.asm ; .arch x64 ; vpsrlq Ry(d), Ry(a), by),
                Step::Leave { if_equal, a, b } => {
                    let t = u8::from(leaves);
                    if if_equal {
                        dynasm!(self.asm ; .arch x64 ; vpcmpeqq Ry(t), Ry(a), Ry(b));
                    } else {
                        dynasm!(self.asm ; .arch x64 ; vpxor Ry(t), Ry(a), Ry(b));
                    }
                    if leaves {
                        dynasm!(self.asm ; .arch x64 ; vpor ymm0, ymm0, ymm1);
                    }
                    leaves = true;
                }
            }
        }
        dynasm!(self.asm ; .arch x64 ; vptest ymm0, ymm0);
        let out = self.asm.jcc(Cc::Ne);
        for (reg, (_, _, step)) in [R15, R14].into_iter().zip(&search.pointers) {
            self.asm.alu_rm_i(Alu::Add, true, Rm::Reg(reg), 4 * step);
        }
        self.asm.alu_rm_i(Alu::Sub, true, Rm::Reg(RAX), 1);
        self.asm.jcc_back(Cc::Ne, top);
        self.asm.bind(out);
    }

    fn load_lanes(&mut self, d: u8, at: u8, size: Size, ext: Ext) {
        match (size, ext) {
            (Size::B8, _) => dynasm!(self.asm ; .arch x64 ; vmovdqu Ry(d), [Rq(at)]),
            (Size::B4, Ext::Sign) => dynasm!(self.asm ; .arch x64 ; vpmovsxdq Ry(d), OWORD [Rq(at)]),
            (Size::B4, _) => dynasm!(self.asm ; .arch x64 ; vpmovzxdq Ry(d), OWORD [Rq(at)]),
            (Size::B2, Ext::Sign) => {
                dynasm!(self.asm ; .arch x64 ; vmovq Rx(d), QWORD [Rq(at)] ; vpmovsxwq Ry(d), Rx(d))
            }
            (Size::B2, _) => dynasm!(self.asm ; .arch x64 ; vmovq Rx(d), QWORD [Rq(at)] ; vpmovzxwq Ry(d), Rx(d)),
            (Size::B1, Ext::Sign) => {
                dynasm!(self.asm ; .arch x64 ; vmovd Rx(d), DWORD [Rq(at)] ; vpmovsxbq Ry(d), Rx(d))
            }
            (Size::B1, _) => dynasm!(self.asm ; .arch x64 ; vmovd Rx(d), DWORD [Rq(at)] ; vpmovzxbq Ry(d), Rx(d)),
        }
    }

    fn on_lanes(&mut self, op: AluOp, d: u8, a: u8, b: u8) {
        match op {
            AluOp::Add => dynasm!(self.asm ; .arch x64 ; vpaddq Ry(d), Ry(a), Ry(b)),
            AluOp::Sub => dynasm!(self.asm ; .arch x64 ; vpsubq Ry(d), Ry(a), Ry(b)),
            AluOp::And => dynasm!(self.asm ; .arch x64 ; vpand Ry(d), Ry(a), Ry(b)),
            AluOp::Or => dynasm!(self.asm ; .arch x64 ; vpor Ry(d), Ry(a), Ry(b)),
            AluOp::Xor => dynasm!(self.asm ; .arch x64 ; vpxor Ry(d), Ry(a), Ry(b)),
            AluOp::Andn => dynasm!(self.asm ; .arch x64 ; vpandn Ry(d), Ry(b), Ry(a)),
            AluOp::Orn => dynasm!(self.asm ; .arch x64
                ; vpcmpeqd ymm1, ymm1, ymm1 ; vpxor ymm1, ymm1, Ry(b) ; vpor Ry(d), ymm1, Ry(a)),
            // Exclusive or with ones: "exclusive nor".
            _ => dynasm!(self.asm ; .arch x64
                ; vpcmpeqd ymm1, ymm1, ymm1 ; vpxor ymm1, ymm1, Ry(b) ; vpxor Ry(d), ymm1, Ry(a)),
        }
    }

    /// Moves what moves on by all rounds that do not leave but the last, which is for the loop itself.
    fn skip_rounds(&mut self, search: &Search, counter: Rm) {
        dynasm!(self.asm ; .arch x64 ; vzeroupper ; neg rax);
        self.asm.alu_r_rm(Alu::Add, true, RAX, self.kept(BUDGET));
        let none = self.asm.jcc(Cc::E);
        dynasm!(self.asm ; .arch x64 ; lea rax, [rax * 4 - 1]);
        self.move_on(&search.moves, counter);
        self.asm.bind(none);
    }
    /// Takes `rax` rounds to have been made.
    fn move_on(&mut self, moves: &Moves, counter: Rm) {
        self.asm.alu_rm_r(Alu::Sub, true, counter, RAX);
        for &(slot, by) in &moves.by {
            dynasm!(self.asm ; .arch x64 ; imul r14, rax, by);
            let home = self.rm(slot);
            self.asm.alu_rm_r(Alu::Add, true, home, R14);
        }
        for (slot, sum) in &moves.sums {
            self.compute(sum);
            let home = self.rm(*slot);
            self.asm.mov_rm_r(true, home, R15);
        }
    }
}
