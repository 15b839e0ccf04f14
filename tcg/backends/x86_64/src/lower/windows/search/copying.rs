//! Loops that copy: each round stores what it, or the one before it, has loaded, at a constant distance from where it was. The
//! rounds whose pages have been looked up are made at once, by the host's vectors, if source and destination are not too near
//! to each other. The last of them is made by the loop itself, for what it leaves in slots.

use super::super::super::Lower;
use super::super::{Analysis, Linear, Width, Windows};
use super::{BUDGET, Limit, Moves, Search, limit};
use crate::asm::{Alu, Cc, Fixup, R14, R15, RAX, RSP, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{FIRST_TEMP, Op, SLOTS, Size, Slot, Ty, UnOp, Val};

/// Bytes that a round may copy.
const MOST: i64 = 256;
/// Those of a vector, and of a page.
const VECTOR: i32 = 32;
const PAGE: i32 = 4096;

/// What a round copies.
#[derive(Debug)]
pub(super) struct Copies {
    /// Where from and where to, and an access of each one's window.
    from: (Linear, usize),
    to: (Linear, usize),
    bytes: i32,
    /// How far ahead of what is copied, or behind it, it may be stored.
    ahead: i32,
    behind: i32,
    /// Slots that have words when a round begins, so far from where it copies from.
    carried: Vec<(Slot, i32)>,
}

impl Copies {
    /// Whether the loop copies little at times: rounds of many bytes are not for that.
    pub(super) fn may_be_short(&self) -> bool {
        self.bytes < 32
    }
}

/// A load or a store: where it is when the round begins, its operation, and what it moves by.
type Place = (Linear, usize, i64);

/// Finds out what a round copies.
struct Finder<'a> {
    windows: &'a Windows,
    end: &'a Analysis,
    now: Analysis,
    /// Where the words in slots have been loaded from.
    words: [Option<Linear>; SLOTS],
    loads: Vec<Place>,
    /// With where what is stored comes from.
    stores: Vec<(Place, Linear)>,
    limits: Vec<Limit>,
    size: Option<Size>,
}

impl Finder<'_> {
    fn place(&mut self, index: usize, base: Val, off: i32, size: Size) -> Option<Place> {
        self.windows.of(index)?;
        if *self.size.get_or_insert(size) != size {
            return None;
        }
        let mut at = self.now.value(base)?;
        at.k = at.k.wrapping_add(off.into());
        let (at, step) = self.end.resolve(at)?;
        Some((at, index, step))
    }

    fn word(&self, slot: Slot) -> Option<Linear> {
        self.words.get(usize::from(slot.0)).copied().flatten()
    }

    /// Goes past an operation. `None`: the loop does something else.
    fn step(&mut self, index: usize, op: &Op, closes: bool) -> Option<()> {
        let mut word = None;
        match *op {
            Op::Insn { .. } => return Some(()),
            Op::Load { base, off, size, .. } => {
                let load = self.place(index, base, off, size)?;
                word = Some(load.0);
                self.loads.push(load);
            }
            Op::Store { src: Val::Slot(src), base, off, size } => {
                let from = self.word(src)?;
                let to = self.place(index, base, off, size)?;
                self.stores.push((to, from));
            }
            Op::Un { op: UnOp::Mov, ty: Ty::I64, a: Val::Slot(a), .. } => word = self.word(a),
            Op::Alu { .. } | Op::Un { .. } => {
                let mut other = false;
                for_each_read(op, |slot| other |= self.word(slot).is_some());
                if other {
                    return None;
                }
            }
            Op::Branch { cond, a, b, .. } => {
                let limit = limit(&self.now, self.end, (cond, a, b), closes)?;
                self.limits.extend(limit);
            }
            Op::Jump { .. } if closes => {}
            _ => return None,
        }
        self.now.step(op);
        for_each_written(op, |d| {
            if let Some(place) = self.words.get_mut(usize::from(d.0)) {
                *place = word;
            }
        });
        Some(())
    }

    fn body(&mut self, body: &[Op]) -> Option<()> {
        body.iter().enumerate().try_for_each(|(i, op)| self.step(i, op, i + 1 == body.len()))
    }
}

/// Slots that a round reads before it writes them, and that nothing but a load has written at its end: where from, when the next
/// round begins.
fn carried(body: &[Op], windows: &Windows, end: &Analysis) -> Vec<(Slot, Linear)> {
    let (mut words, mut read, mut done) = ([None; SLOTS], [false; SLOTS], [false; SLOTS]);
    let mut now = Analysis::new(Width::Whole);
    for (i, op) in body.iter().enumerate() {
        for_each_read(op, |slot| {
            let n = usize::from(slot.0);
            if done.get(n) == Some(&false) {
                read.iter_mut().skip(n).take(1).for_each(|r| *r = true);
            }
        });
        let word = match *op {
            Op::Load { base, off, .. } if windows.of(i).is_some() => now.value(base).and_then(|mut at| {
                at.k = at.k.wrapping_add(off.into());
                let (mut at, step) = end.resolve(at)?;
                at.k = at.k.wrapping_sub(step);
                Some(at)
            }),
            Op::Un { op: UnOp::Mov, ty: Ty::I64, a: Val::Slot(a), .. } => {
                words.get(usize::from(a.0)).copied().flatten()
            }
            _ => None,
        };
        now.step(op);
        for_each_written(op, |d| {
            words.iter_mut().skip(usize::from(d.0)).take(1).for_each(|w| *w = word);
            done.iter_mut().skip(usize::from(d.0)).take(1).for_each(|w| *w = true);
        });
    }
    let slots = (0..FIRST_TEMP).map(Slot);
    let carried = |slot: Slot| {
        let n = usize::from(slot.0);
        words.get(n).copied().flatten().filter(|_| read.get(n) == Some(&true)).map(|word| (slot, word))
    };
    slots.filter_map(carried).collect()
}

/// How far ahead of what a round copies it may be stored, and how far behind, so that each load finds what all rounds at once
/// would: what has been stored to its place before it if that is behind, what has not yet if it is ahead.
fn distances(
    loads: &[Place],
    stores: &[(Place, Linear)],
    from: Linear,
    (size, bytes): (i64, i64),
) -> Option<(i64, i64)> {
    let (mut ahead, mut behind) = (i64::from(VECTOR), 1);
    for (at, load, _) in loads {
        let loaded = at.k.wrapping_sub(from.k);
        if !(0..2 * bytes).contains(&loaded) {
            return None;
        }
        for (stored, ((_, store, _), _)) in (0i64..).map(|n| n * size).zip(stores) {
            // In this round, the next, and the one before: those beyond are nearer the wrong way around.
            let (later, earlier) = if store > load { (0, -bytes) } else { (bytes, 0) };
            ahead = ahead.max(loaded - (stored + later) + size);
            behind = behind.max(stored + earlier - loaded + size);
        }
    }
    Some((ahead, behind))
}

/// How the loop with this body copies, if it does nothing else.
pub(super) fn find(body: &[Op], windows: &mut Windows, end: &Analysis, written: &[bool; SLOTS]) -> Option<Search> {
    let carried = carried(body, windows, end);
    let moves = Moves::of(body, end, written, |slot| carried.iter().any(|(there, _)| *there == slot))?;
    let mut words = [None; SLOTS];
    for (slot, from) in &carried {
        words.iter_mut().skip(usize::from(slot.0)).take(1).for_each(|w| *w = Some(*from));
    }
    let now = Analysis::new(Width::Whole);
    let (loads, stores, limits) = (Vec::new(), Vec::new(), Vec::new());
    let mut finder = Finder { windows: &*windows, end, now, words, loads, stores, limits, size: None };
    finder.body(body)?;
    let Finder { mut stores, loads, limits, size, .. } = finder;
    stores.sort_by_key(|((to, ..), _)| to.k);
    let (&((to, to_op, step), from), size) = (stores.first()?, i64::from(size?.bytes()));
    let bytes = size * stores.len() as i64;
    let first_load = loads.first()?;
    let together = (0i64..).zip(&stores).all(|(n, ((at, _, by), word))| {
        let off = n * size;
        *by == step
            && (at.terms, at.k) == (to.terms, to.k.wrapping_add(off))
            && (word.terms, word.k) == (from.terms, from.k.wrapping_add(off))
    });
    let loads_move = loads.iter().all(|(at, _, by)| *by == step && at.terms == from.terms);
    // All of them are reached with one addend, that of one page.
    let window = |op| windows.of(op).map(|w| w.place);
    let one_window = loads.iter().all(|(_, op, _)| window(*op) == window(first_load.1))
        && stores.iter().all(|((_, op, _), _)| window(*op) == window(to_op));
    // What is kept from round to round is among what the next one stores.
    let kept = carried.iter().all(|(_, word)| (0..bytes).contains(&word.k.wrapping_sub(from.k)));
    let easy = from.is_easy() && to.is_easy();
    // Linux copies byte by byte, eight a round, to find out what that takes beside words at any address: at once, it would
    // take less, and guests would be told that such words are slow.
    let probe = size == 1 && stores.len() > 1;
    let fits = step == bytes
        && !probe
        && bytes <= MOST
        && (bytes % 8 == 0 || bytes.count_ones() == 1)
        && (carried.is_empty() || size == 8);
    let (ahead, behind) = distances(&loads, &stores, from, (size, bytes))?;
    // What was loaded in the round before has to be in the window's page as well.
    if !(together && loads_move && one_window && kept && easy && fits && windows.extend(first_load.1, from, bytes)) {
        return None;
    }
    let carried = carried.iter().map(|(slot, word)| (*slot, word.k.wrapping_sub(from.k) as i32)).collect();
    let (from, to, bytes) = ((from, first_load.1), (to, to_op), bytes as i32);
    let copies = Copies { from, to, bytes, ahead: ahead as i32, behind: behind as i32, carried };
    let (steps, constants, pointers) = (Vec::new(), Vec::new(), Vec::new());
    Some(Search { steps, constants, pointers, limits, moves, copies: Some(copies) })
}

impl Lower<'_> {
    /// `r15` = the host address of a place in the window of operation `op`.
    fn place_in_window(&mut self, at: &Linear, op: usize) {
        self.compute(at);
        if let Some((reg, place)) = self.windows.of(op).map(|w| (w.reg, w.place)) {
            let addend = reg.map_or(self.kept(place), Rm::Reg);
            self.asm.alu_r_rm(Alu::Add, true, R15, addend);
        }
    }

    /// Copies `rax` rounds less one, if they are worth it; `rax` is how many have been made after it.
    pub(super) fn copy_rounds(&mut self, copies: &Copies) -> [Fixup; 2] {
        let budget = self.kept(BUDGET);
        self.asm.alu_rm_i(Alu::Sub, true, Rm::Reg(RAX), 1);
        if copies.bytes < 8 {
            // By eight bytes at a time.
            self.asm.alu_rm_i(Alu::And, true, Rm::Reg(RAX), -8);
        }
        let enough = if self.forced() { 1 } else { (128 / copies.bytes).max(2) };
        self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(RAX), enough);
        let few = self.asm.jcc(Cc::L);
        self.asm.mov_rm_r(true, budget, RAX);
        self.place_in_window(&copies.from.0, copies.from.1);
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], r15);
        self.place_in_window(&copies.to.0, copies.to.1);
        self.asm.mov_r_rm(true, R14, Rm::Reg(R15));
        self.asm.mov_r_rm(true, R15, Rm::Mem { base: RSP, index: None, disp: 8 });
        let apart = self.test_distance(copies);
        self.asm.mov_r_rm(true, RAX, budget);
        let bytes = copies.bytes;
        dynasm!(self.asm ; .arch x64 ; imul rax, rax, bytes ; sub rax, 32);
        let rest = self.asm.jcc(Cc::B);
        let more = self.asm.pos();
        dynasm!(self.asm ; .arch x64
            ; vmovdqu ymm0, [r15]
            ; vmovdqu [r15 + r14], ymm0
            ; add r15, 32
            ; sub rax, 32
        );
        self.asm.jcc_back(Cc::Ae, more);
        dynasm!(self.asm ; .arch x64 ; vzeroupper);
        self.asm.bind(rest);
        dynasm!(self.asm ; .arch x64 ; add rax, 32);
        let done = self.asm.jcc(Cc::E);
        let word = self.asm.pos();
        dynasm!(self.asm ; .arch x64
            ; vmovq xmm0, QWORD [r15]
            ; vmovq QWORD [r15 + r14], xmm0
            ; add r15, 8
            ; sub rax, 8
        );
        self.asm.jcc_back(Cc::Ne, word);
        self.asm.bind(done);
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], r15);
        self.asm.mov_r_rm(true, RAX, budget);
        [few, apart]
    }

    /// `r14` = `r14` - `r15`; jumps if they are too near to each other. Clobbers `rax`.
    ///
    /// Memory may be at several host addresses, but at the same offset into its page at each; so only that is looked at.
    /// Nothing is changed by what is copied to where it is.
    fn test_distance(&mut self, copies: &Copies) -> Fixup {
        let (ahead, behind) = (copies.ahead, copies.behind);
        dynasm!(self.asm ; .arch x64
            ; sub r14, r15
            ; lea eax, [r14 - ahead]
            ; and eax, PAGE - 1
            ; cmp eax, PAGE - behind - ahead
        );
        let far = self.asm.jcc(Cc::Be);
        dynasm!(self.asm ; .arch x64 ; cmp eax, PAGE - ahead);
        let near = self.asm.jcc(Cc::Ne);
        self.asm.bind(far);
        near
    }

    /// Slots that a round has words in when it begins.
    pub(super) fn load_carried(&mut self, copies: &Copies) {
        if copies.carried.is_empty() {
            return;
        }
        self.asm.mov_r_rm(true, R15, Rm::Mem { base: RSP, index: None, disp: 8 });
        for &(slot, off) in &copies.carried {
            self.asm.mov_r_rm(true, RAX, Rm::Mem { base: R15, index: None, disp: off });
            let home = self.rm(slot);
            self.asm.mov_rm_r(true, home, RAX);
        }
    }
}
