//! Blocks that jump back to their own start: the way round gets a copy of the loop's operations.
//!
//! In the copy it is known what the way there has established: guards hold, and the flags are those of the operation that
//! the closing branch tests, computed again from its operands by whoever needs them at a fault. So they are not saved each
//! time round. The copy goes on in the block behind the branch if the state there is the same.
//!
//! Guests without flags have more registers than the host, most of them in memory: in the copy, those that the loop uses
//! take the registers of some that it does not ([`Home`]). They change places on the way into the copy and back on every way
//! out of it; around what is called from the middle too, so that whoever looks finds every register where it always is.
//!
//! Loops whose accesses move by constant steps get a second copy, in which their pages are looked up beforehand
//! ([`super::windows`]). The other one is for rounds too few to be worth that.

use super::flags::{self, FlagState, Routine};
use super::windows::{Held, Windows, untouched};
use super::words;
use super::{Cold, Insn, Lower};
use crate::asm::{Cc, Fixup, RAX, RCX, RDX, Rm};
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
    /// Those of the copy with windows.
    homes_with_windows: [Option<Home>; HOMES],
    /// The plain copy is worth its place.
    gains: bool,
}

/// Registers that may have other homes in a loop.
const HOMES: usize = 8;

/// Which copy's homes are in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Homed {
    /// Every register is where it always is.
    Not,
    InPlainCopy,
    WithWindows,
}

/// What has the register of a slot for as long as a loop runs.
#[derive(Clone, Copy, Debug)]
struct Home {
    tenant: Tenant,
    reg: u8,
    /// Whose register it is.
    owner: Slot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tenant {
    /// A slot that is in memory otherwise.
    Slot(Slot),
    Held(Held),
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
        homes_with_windows: [None; HOMES],
        gains: true,
    })
}

/// Gives what the windows of such a loop hold registers that it does not use: the copy with windows calls nothing, and its ways
/// out put them back.
pub(super) fn house_windows(be: &X86_64, body: &[Op], windows: &mut Windows, looped: &mut Loop) {
    /// Products and shifts may want them whatever their operands are.
    const FIXED: [u8; 2] = [RCX, RDX];
    if windows.is_empty() {
        return;
    }
    let mut wanted: Vec<(Held, u32)> = windows.uses().collect();
    wanted.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let mut free = untouched(be, body).filter(|(reg, _)| !FIXED.contains(reg));
    for (home, (what, _)) in looped.homes_with_windows.iter_mut().zip(wanted) {
        let Some((reg, owner)) = free.next() else { break };
        windows.hold(what, reg);
        *home = Some(Home { tenant: Tenant::Held(what), reg, owner });
    }
}

/// The same for guests without flags, with the loop's windows.
pub(super) fn find_plain(be: &X86_64, ops: &[Op], start: PagePc) -> Option<(Loop, Windows)> {
    let closes = |op: &Op| matches!(*op, Op::Branch { to, .. } | Op::Jump { to } if to == start);
    let edge = ops.iter().position(closes)?;
    let body = ops.get(..=edge)?;
    // A function that calls itself comes back from there as often: its rounds are few.
    if let [.., Op::GetPc { .. }, Op::Jump { .. }] = body {
        return None;
    }
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
    if !body.iter().take(edge).all(plain) {
        return None;
    }
    let guards_hold = guards_hold(body);
    let homes = find_homes(be, body, &Windows::default());
    let gains = homes[0].is_some() || guards_hold && body.iter().any(|op| matches!(op, Op::GuardEnv { .. }));
    let mut windows = Windows::find_plain(body);
    let homes_with_windows = find_homes(be, body, &windows);
    for home in homes_with_windows.into_iter().flatten() {
        if let Tenant::Held(what) = home.tenant {
            windows.hold(what, home.reg);
        }
    }
    let found = Loop {
        edge,
        recipe: None,
        guards_hold,
        from: None,
        copy: None,
        in_copy: false,
        fp_alive: false,
        behind: None,
        homes,
        homes_with_windows,
        gains,
    };
    (gains || !windows.is_empty()).then_some((found, windows))
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

/// What a loop uses most of slots in memory and of what its windows hold, with registers of slots that it does not use.
fn find_homes(be: &X86_64, body: &[Op], windows: &Windows) -> [Option<Home>; HOMES] {
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
    let mut wanted: Vec<(Tenant, u32)> = (0..FIRST_TEMP)
        .map(Slot)
        .filter(|&slot| used(slot) > 3 && be.pin_of(slot).is_none() && be.fp_pin_of(slot).is_none())
        .map(|slot| (Tenant::Slot(slot), used(slot)))
        .collect();
    if !windows.is_empty() {
        wanted.extend(windows.uses().map(|(what, n)| (Tenant::Held(what), n)));
    }
    wanted.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let mut free = untouched(be, body);
    let mut homes = [None; HOMES];
    for (home, (tenant, _)) in homes.iter_mut().zip(wanted) {
        let Some((reg, owner)) = free.next() else { break };
        *home = Some(Home { tenant, reg, owner });
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
        self.go_round(to, dead);
        self.asm.bind_short(over);
        true
    }

    /// The jump that closes the loop. `false`: it is another one.
    pub(super) fn loop_jump(&mut self, to: PagePc) -> bool {
        let closes = self.closes_loop();
        if closes {
            self.go_round(to, Flags::ALL);
        }
        closes
    }

    /// Starts another round.
    fn go_round(&mut self, to: PagePc, dead: Flags) {
        if self.in_windows() {
            self.count_round();
            if let Some(top) = self.windowed_top {
                self.asm.jcc_back(Cc::Ae, top);
            }
        }
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

    /// The copies, behind the block.
    pub(super) fn copy_loop(&mut self) {
        let Some(Loop { edge, recipe, from: Some(from), behind: Some(behind), gains, .. }) = self.looped else {
            return;
        };
        self.asm.bind(from);
        if !self.windows.is_empty() {
            let few = self.test_rounds_left();
            self.enter_homes(Homed::WithWindows);
            self.enter_search();
            let at = self.asm.pos();
            let flags = match (recipe, self.ops.get(edge)) {
                (Some(recipe), Some(&Op::BranchF { dead, .. })) => {
                    self.flags = FlagState::carried(recipe);
                    self.flags_at_exit(dead)
                }
                _ => Routine::NONE,
            };
            self.look_windows_up(flags);
            self.search();
            self.windowed_top = Some(self.asm.pos());
            let needs = self.needs_in_windows(edge);
            let needs = std::mem::replace(&mut self.needs, needs);
            self.lower_copy(at, behind);
            self.needs = needs;
            let Some(few) = few else { return };
            self.asm.bind(few);
            if !gains {
                return self.asm.jmp_back(0);
            }
        }
        self.enter_homes(Homed::InPlainCopy);
        let at = self.asm.pos();
        self.lower_copy(at, behind);
    }

    /// The flags needed after each operation in the copy with windows: an access that has one does not fault.
    fn needs_in_windows(&self, edge: usize) -> Vec<flags::Needs> {
        let mut needs = Vec::new();
        if self.flagged {
            let safe = |i: usize| match self.ops.get(i) {
                Some(Op::Unit { insn, .. }) => !insn.aligned && self.windows.any_of(i..i + 1),
                _ => self.windows.any_of(i..i + 1),
            };
            flags::needs_but_for(self.ops, Some(edge), safe, &mut needs);
        }
        needs
    }

    /// The loop's operations once more, of which rounds but the first begin `at`; and the way out.
    fn lower_copy(&mut self, at: u32, behind: Behind) {
        let Some(Loop { edge, recipe, fp_alive, .. }) = self.looped else { return };
        if let Some(l) = &mut self.looped {
            (l.copy, l.in_copy) = (Some(at), true);
        }
        if !self.flagged {
            self.extended = words::extended_already(self.ops.get(..=edge).unwrap_or_default());
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
        self.have_homes(Homed::Not);
        if let (Some(l), false) = (&mut self.looped, self.flagged) {
            // What is behind the loop has not been executed.
            l.in_copy = false;
        }
        if matches!(self.ops.get(edge), Some(Op::Jump { .. })) {
            // Nothing is behind.
        } else if self.is_as_behind(behind) {
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

    /// Whether the operation being lowered is in the copy with windows.
    pub(super) fn in_windows(&self) -> bool {
        self.homed == Homed::WithWindows
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

    /// Whether the operation being lowered extends a word that is extended already, in a copy.
    pub(super) fn is_extended_already(&self) -> bool {
        let op = self.next.wrapping_sub(1);
        self.looped.is_some_and(|l| l.in_copy) && self.extended.contains(&op)
    }

    /// A copy's homes.
    fn homes_of(&self, homed: Homed) -> impl Iterator<Item = Home> + use<> {
        let homes = self.looped.map(|l| match homed {
            Homed::Not => [None; HOMES],
            Homed::InPlainCopy => l.homes,
            Homed::WithWindows => l.homes_with_windows,
        });
        homes.unwrap_or([None; HOMES]).into_iter().flatten()
    }

    /// Takes these homes to be in force.
    pub(super) fn have_homes(&mut self, homed: Homed) {
        if self.homed == homed {
            return;
        }
        for Home { tenant, reg, owner } in self.homes_of(self.homed) {
            self.have_pin(owner, reg);
            if let Tenant::Slot(slot) = tenant {
                self.have_pin(slot, UNPINNED);
            }
        }
        self.homed = homed;
        for Home { tenant, reg, owner } in self.homes_of(homed) {
            self.have_pin(owner, UNPINNED);
            if let Tenant::Slot(slot) = tenant {
                self.have_pin(slot, reg);
            }
        }
    }

    fn have_pin(&mut self, slot: Slot, reg: u8) {
        if let Some(pin) = self.pin.get_mut(usize::from(slot.0)) {
            *pin = reg;
        }
    }

    /// On the way into a copy.
    fn enter_homes(&mut self, homed: Homed) {
        for Home { tenant, reg, owner } in self.homes_of(homed) {
            self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(owner)), reg);
            if let Tenant::Slot(slot) = tenant {
                self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(slot)));
            }
        }
        let any = homed == Homed::WithWindows || self.homes_of(homed).next().is_some();
        self.have_homes(if any { homed } else { Homed::Not });
    }

    /// Where homes are in force, puts every register where it always is. All others and the flags stay.
    pub(super) fn leave_homes(&mut self) {
        for Home { tenant, reg, owner } in self.homes_of(self.homed) {
            if let Tenant::Slot(slot) = tenant {
                self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(slot)), reg);
            }
            self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(owner)));
        }
    }

    /// Undoes [`Lower::leave_homes`] after something was called; owners have not been written meanwhile.
    pub(super) fn return_home(&mut self) {
        for Home { tenant, reg, .. } in self.homes_of(self.homed) {
            if let Tenant::Slot(slot) = tenant {
                self.asm.mov_r_rm(true, reg, Rm::Env(self.be.slot_disp(slot)));
            }
        }
        if self.in_windows() {
            self.hold_for_round();
        }
    }

    /// The routine that saves the flags if they are not in their slot, where the block is left for code that looks at all
    /// but `dead`.
    fn flags_at_exit(&mut self, dead: Flags) -> Routine {
        self.flags_wanted_in_slot(Flags::ALL.without(dead))
    }
}
