//! Calls of hot code: the return address is computed behind its check, where the store wants it, and not in `rax`, which
//! has the address of where an indirect call leads by then.

use super::mem::{Address, Slow};
use super::{Cold, Lower, Opnd, reads};
use crate::asm::{R14, R15, RAX, Rm};
use mimus_tcg_ir::backend::Stored;
use mimus_tcg_ir::{AluOp, Ext, FIRST_TEMP, Op, PagePc, Size, Slot, Ty, UnOp, Val};

/// The store of an address of code, before a jump.
#[derive(Clone, Copy, Debug)]
pub(super) struct Push {
    pc: PagePc,
    /// Index of the store.
    pub store: usize,
    base: Slot,
    off: i32,
    size: Size,
}

impl Lower<'_> {
    /// The store of a return address that begins with operation `index`, if all of it is lowered as one.
    pub(super) fn push_at(&self, index: usize) -> Option<Push> {
        if !self.info.hints.hot {
            return None;
        }
        self.stored_pc(index)
    }

    /// The same, in whatever code.
    fn stored_pc(&self, index: usize) -> Option<Push> {
        let twice = self.group.is_some() || self.stretch.is_some() || self.in_copy.is_some() || self.in_slow_group;
        if twice || !self.flagged {
            return None;
        }
        let [Op::GetPc { d: address, pc }, rest @ ..] = self.ops.get(index..)? else { return None };
        let (stored, rest) = match rest {
            [Op::Un { op: UnOp::ZextW, d, a, .. }, rest @ ..] if *a == Val::Slot(*address) => (*d, rest),
            _ => (*address, rest),
        };
        let [Op::Store { src: Val::Slot(src), base: Val::Slot(base), off, size }, rest @ ..] = rest else {
            return None;
        };
        let store = self.ops.len() - rest.len() - 1;
        let whole = if stored == *address { Size::B8 } else { Size::B4 };
        let fits = *src == stored && *size == whole && self.pin_of(*base).is_some();
        let temporary = address.0 >= FIRST_TEMP && stored.0 >= FIRST_TEMP;
        // The jump, behind what moves the stack pointer.
        let last = rest.len() <= 3 && rest.last().is_some_and(Op::is_terminal);
        let read = rest.iter().any(|op| reads(op, *address) || reads(op, stored));
        // Flags are saved where operations begin.
        let saves = (index + 1..=store).contains(&self.flags.save_before());
        let push = Push { pc: *pc, store, base: *base, off: *off, size: *size };
        (fits && temporary && last && !read && !saves).then_some(push)
    }

    /// The same in compact code, where a call shares all of its push but the store. Whether there is one.
    pub(super) fn compact_push_of_pc(&mut self, index: usize) -> bool {
        let Some(push) = self.stored_pc(index).filter(|_| self.compact) else { return false };
        let (ops, bytes) = (self.ops, push.size.bytes() as i32);
        let (store, moved) = (push.store, push.store + 1);
        let Some(check) = self.be.stubs.push_of_pc(self.narrow).filter(|_| (push.size == Size::B4) == self.narrow)
        else {
            return false;
        };
        let [stored, Op::Alu { op: AluOp::Add, ty, d, a, b: Val::Imm(by) }, ..] = ops.get(store..).unwrap_or_default()
        else {
            return false;
        };
        let ty_fits = *ty == if self.narrow { Ty::U32 } else { Ty::I64 };
        let moves = (*d, *a, *by) == (push.base, Val::Slot(push.base), (-bytes).into()) && ty_fits;
        let is_stack = self.be.config.stack == Some(push.base) && push.off == -bytes;
        if !moves || !is_stack || self.flags.save_before() == moved {
            return false;
        }
        self.next = moved;
        self.kept = false;
        self.asm.mov_ri(RAX, i64::from(push.pc.0 as u32));
        let place = self.call_check(check, Stored::Scratch);
        self.store_to(place, Opnd::Reg(RAX), push.size);
        self.flags_after(stored, self.own_now());
        self.next = moved + 1;
        self.skip = self.next;
        if let Some(op) = ops.get(moved) {
            self.flags_after(op, self.own_now());
        }
        true
    }

    /// Lowers it; `rax` stays.
    pub(super) fn push(&mut self, push: Push) {
        let Push { pc, store, base, off, size } = push;
        let Some(base) = self.pin_of(base) else { return };
        self.next = store + 1;
        self.skip = self.next;
        let (from, range) = self.translate(Address { base, off, slot: None }, size, true);
        let access = self.asm.pos();
        self.load_pc(R15, pc);
        self.store_to(Rm::Mem { base, index: Some(R14), disp: off }, Opnd::Reg(R15), size);
        let slow = Slow {
            from,
            access,
            back: self.asm.pos(),
            base,
            off,
            size,
            ext: Ext::Zero,
            value: Opnd::Imm(0),
            insn: self.insn,
            xmm: None,
            reload: self.last.map(|slot| self.be.slot_disp(slot)),
            flags: self.flags_at_fault(),
            fused: None,
            range,
            page_is_used: false,
            push: Some(pc),
            folded: None,
        };
        self.put_off(Cold::Store(slow));
        self.cached = self.last;
    }

    /// The virtual address of `pc`; the flags stay.
    pub(super) fn load_pc(&mut self, to: u8, pc: PagePc) {
        let page_base = self.be.env(self.be.config.env.page_base);
        self.mov(to, Opnd::Mem(page_base));
        self.asm.lea(true, to, to, pc.0);
    }
}
