//! Blocks that jump back to their own start: the way round gets a copy of the loop's operations.
//!
//! In the copy it is known what the way there has established: guards hold, and the flags are those of the operation that
//! the closing branch tests, computed again from its operands by whoever needs them at a fault. So they are not saved each
//! time round. The copy goes on in the block behind the branch if the state there is the same.
//!
//! Guests without flags have more registers than the host, most of them in memory: in the copy, those that the loop uses
//! take the registers of some that it does not ([`Home`]). They change places on the way into the copy and back on every way
//! out of it; around what is called from the middle too, so that whoever looks finds every register where it always is.

use super::flags::{self, FlagState, Routine};
use super::{Cold, Insn, Lower};
use crate::asm::{Cc, Fixup, RAX, Rm};
use crate::{UNPINNED, X86_64};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{FIRST_TEMP, Op, PagePc, SLOTS, Slot};

/// The loop of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loop {
    /// Index of the branch that closes it.
    pub edge: usize,
    /// What makes the flags around it, in guests that have flags.
    recipe: Option<mimus_tcg_ir::flags::Recipe>,
    /// Nothing in it is called: what was guarded stays so.
    guards_hold: bool,
    /// The jump to the copy, once the branch has been lowered.
    from: Option<Fixup>,
    /// Where the copy begins, once it is being made.
    copy: Option<u32>,
    /// The operations being lowered are the copy's.
    pub in_copy: bool,
    /// Vector registers have the values of their slots at the branch, the first time round.
    fp_alive: bool,
    /// What is behind the branch.
    behind: Option<Behind>,
    homes: [Option<Home>; HOMES],
}

/// Registers that may have other homes in a loop.
const HOMES: usize = 6;

/// A slot of memory that has the register of another one for as long as a loop runs.
#[derive(Clone, Copy, Debug)]
struct Home {
    slot: Slot,
    reg: u8,
    /// Whose register it is.
    owner: Slot,
}

/// The state behind the closing branch.
#[derive(Clone, Copy, Debug)]
struct Behind {
    at: u32,
    flags: FlagState,
    cached: Option<Slot>,
    boxed: u64,
    fp_alive: bool,
}

/// The loop of a block that begins at `start`, if it is worth a copy.
pub(super) fn find(ops: &[Op], start: PagePc) -> Option<Loop> {
    // What counts and traces comes at the block's entry, with nothing in the host's flags.
    if ops.iter().any(Op::is_instrumentation) {
        return None;
    }
    let closes = |op: &Op| match *op {
        Op::BranchF { to, .. } | Op::Branch { to, .. } | Op::Jump { to } => to == start,
        _ => false,
    };
    let edge = ops.iter().position(closes)?;
    if !matches!(ops.get(edge), Some(Op::BranchF { .. })) || ops.iter().skip(edge + 1).any(closes) {
        return None;
    }
    let recipe = Some(flags::around(ops.get(..edge)?)?);
    let calls = |op: &Op| matches!(op, Op::Call { .. } | Op::Rep(_));
    let guards_hold = !ops.iter().take(edge).any(calls);
    Some(Loop {
        edge,
        recipe,
        guards_hold,
        from: None,
        copy: None,
        in_copy: false,
        fp_alive: false,
        behind: None,
        homes: [None; HOMES],
    })
}

/// The same for guests without flags.
pub(super) fn find_plain(be: &X86_64, ops: &[Op], start: PagePc) -> Option<Loop> {
    let closes = |op: &Op| matches!(*op, Op::Branch { to, .. } | Op::Jump { to } if to == start);
    let edge = ops.iter().position(closes)?;
    let body = ops.get(..=edge)?;
    let plain = |op: &Op| {
        matches!(
            op,
            Op::Insn { .. }
                | Op::Alu { .. }
                | Op::Un { .. }
                | Op::GetPc { .. }
                | Op::Load { .. }
                | Op::Store { .. }
                | Op::Fp { .. }
                | Op::SetEnvByte { .. }
                | Op::GuardEnv { .. }
                | Op::Branch { .. }
        )
    };
    if !body.iter().all(plain) || !matches!(ops.get(edge), Some(Op::Branch { .. })) {
        return None;
    }
    let guards_hold = guards_hold(body);
    let homes = find_homes(be, body);
    let gains = homes[0].is_some() || guards_hold && body.iter().any(|op| matches!(op, Op::GuardEnv { .. }));
    gains.then_some(Loop {
        edge,
        recipe: None,
        guards_hold,
        from: None,
        copy: None,
        in_copy: false,
        fp_alive: false,
        behind: None,
        homes,
    })
}

/// Whether what the bytes of the hot state were found or made to be the first time round is so later.
fn guards_hold(body: &[Op]) -> bool {
    let same_byte = |op: &Op, to: i32, is: u8| match *op {
        Op::SetEnvByte { off, val } => off != to || val == is,
        Op::GuardEnv { off, .. } => off != to,
        _ => true,
    };
    body.iter().all(|op| match *op {
        Op::SetEnvByte { off, val } => body.iter().all(|other| same_byte(other, off, val)),
        _ => true,
    })
}

/// The slots in memory that a loop uses most, with registers of those that it does not use.
fn find_homes(be: &X86_64, body: &[Op]) -> [Option<Home>; HOMES] {
    let mut uses = [0u32; SLOTS];
    for op in body {
        let mut count = |slot: Slot, by: u32| {
            if let Some(n) = uses.get_mut(usize::from(slot.0)) {
                *n += by;
            }
        };
        for_each_read(op, |slot| count(slot, 2));
        // Each time round waits for the memory that the one before wrote.
        for_each_written(op, |slot| count(slot, 3));
    }
    for op in body {
        // Floating-point operations want theirs in memory or in vector registers.
        if let Op::Fp { .. } = op {
            let forget = |slot: Slot| {
                if let Some(n) = uses.get_mut(usize::from(slot.0)).filter(|_| be.pin_of(slot).is_none()) {
                    *n = 0;
                }
            };
            let mut touched = Vec::new();
            for_each_read(op, |slot| touched.push(slot));
            for_each_written(op, |slot| touched.push(slot));
            touched.into_iter().for_each(forget);
        }
    }
    let used = |slot: Slot| uses.get(usize::from(slot.0)).copied().unwrap_or(0);
    let mut free = be.pinned.iter().filter(|&&(_, owner)| used(owner) == 0 && owner.0 < FIRST_TEMP);
    let mut wanted: Vec<Slot> = (0..FIRST_TEMP)
        .map(Slot)
        .filter(|&slot| used(slot) > 3 && be.pin_of(slot).is_none() && be.fp_pin_of(slot).is_none())
        .collect();
    wanted.sort_by_key(|&slot| std::cmp::Reverse(used(slot)));
    let mut homes = [None; HOMES];
    for (home, slot) in homes.iter_mut().zip(wanted) {
        let Some(&(reg, owner)) = free.next() else { break };
        *home = Some(Home { slot, reg, owner });
    }
    homes
}

impl Lower<'_> {
    /// Whether the branch being lowered closes the block's loop.
    fn closes_loop(&self) -> bool {
        self.looped.is_some_and(|l| l.edge + 1 == self.next)
    }

    /// The branch that closes the loop, taken if the host's flags are so. `false`: it is another one.
    pub(super) fn loop_branch(&mut self, cc: Cc, to: PagePc, dead: Flags) -> bool {
        if !self.closes_loop() {
            return false;
        }
        let over = self.asm.jcc_short(cc.invert());
        self.test_kick();
        if let Some(l) = &mut self.looped {
            match l.copy {
                Some(at) => self.asm.jcc_back(Cc::E, at),
                None => {
                    l.from = Some(self.asm.jcc(Cc::E));
                    l.fp_alive = self.fp_alive;
                }
            }
        }
        let from = self.asm.jmp();
        let flags = self.flags_at_exit(dead);
        self.put_off(Cold::Kick { from, to, flags });
        self.asm.bind_short(over);
        true
    }

    /// After operation `index`: remembers what is behind the closing branch.
    pub(super) fn note_loop_end(&mut self, index: usize) {
        let behind = Behind {
            at: self.asm.pos(),
            flags: self.flags,
            cached: self.cached,
            boxed: self.boxed,
            fp_alive: self.fp_alive,
        };
        if let Some(l) = self.looped.as_mut().filter(|l| l.edge == index && l.behind.is_none()) {
            l.behind = Some(behind);
        }
    }

    /// Whether guards are known to hold.
    pub(super) fn guarded_by_loop(&self) -> bool {
        self.looped.is_some_and(|l| l.in_copy && l.guards_hold)
    }

    /// The copy, behind the block.
    pub(super) fn copy_loop(&mut self) {
        let Some(Loop { edge, recipe, from: Some(from), behind: Some(behind), fp_alive, .. }) = self.looped else {
            return;
        };
        self.asm.bind(from);
        self.enter_homes();
        let at = self.asm.pos();
        if let Some(l) = &mut self.looped {
            (l.copy, l.in_copy) = (Some(at), true);
        }
        self.insn = Insn { pc: self.start, len: 0, left: 0 };
        (self.cached, self.last, self.group, self.boxed) = (None, None, None, 0);
        (self.kept, self.skip, self.kept_half) = (false, 0, None);
        match recipe {
            Some(recipe) => self.flags = FlagState::carried(recipe),
            None => self.fp_alive = fp_alive,
        }
        for i in 0..=edge {
            self.lower_at(i);
        }
        self.leave_homes();
        self.have_homes(false);
        if let (Some(l), false) = (&mut self.looped, self.flagged) {
            // What is behind the loop has not been executed.
            l.in_copy = false;
        }
        if self.is_as_behind(behind) {
            self.asm.jmp_back(behind.at);
        } else {
            for i in edge + 1..self.ops.len() {
                self.lower_at(i);
            }
        }
        if let Some(l) = &mut self.looped {
            l.in_copy = false;
        }
    }

    /// Whether the code behind the closing branch can go on from here; makes it so if it is easy.
    fn is_as_behind(&mut self, behind: Behind) -> bool {
        if self.flagged {
            return self.flags.is_like(&behind.flags) && self.cached == behind.cached && self.boxed == behind.boxed;
        }
        if behind.boxed & !self.boxed != 0 || behind.fp_alive && !self.fp_alive {
            return false;
        }
        // Temporaries die with the branch.
        if let Some(slot) = behind.cached.filter(|slot| slot.0 < FIRST_TEMP && self.cached != behind.cached) {
            let home = self.home(slot);
            self.mov(RAX, home);
        }
        true
    }

    /// The loop's homes.
    fn homes(&self) -> impl Iterator<Item = Home> + use<> {
        self.looped.map_or([None; HOMES], |l| l.homes).into_iter().flatten()
    }

    /// Takes the loop's homes to be in force, or not.
    pub(super) fn have_homes(&mut self, homed: bool) {
        if self.homed != homed {
            self.homed = homed;
            for Home { slot, reg, owner } in self.homes() {
                let (slot_has, owner_has) = if homed { (reg, UNPINNED) } else { (UNPINNED, reg) };
                for (place, has) in [(slot, slot_has), (owner, owner_has)] {
                    if let Some(pin) = self.pin.get_mut(usize::from(place.0)) {
                        *pin = has;
                    }
                }
            }
        }
    }

    /// On the way into the copy.
    fn enter_homes(&mut self) {
        for Home { slot, reg, owner } in self.homes() {
            self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(owner)), reg);
            self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(slot)));
        }
        let any = self.homes().next().is_some();
        self.have_homes(any);
    }

    /// Where homes are in force, puts every register where it always is. All others and the flags stay.
    pub(super) fn leave_homes(&mut self) {
        if self.homed {
            for Home { slot, reg, owner } in self.homes() {
                self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(slot)), reg);
                self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(owner)));
            }
        }
    }

    /// Undoes [`Lower::leave_homes`]; owners have not been written meanwhile.
    pub(super) fn return_home(&mut self) {
        if self.homed {
            for Home { slot, reg, .. } in self.homes() {
                self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(slot)));
            }
        }
    }

    /// The routine that saves the flags if they are not in their slot, where the block is left for code that looks at all
    /// but `dead`.
    fn flags_at_exit(&mut self, dead: Flags) -> Routine {
        self.flags_wanted_in_slot(Flags::ALL.without(dead))
    }
}
