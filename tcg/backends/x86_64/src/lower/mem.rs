//! Loads and stores of guest memory.
//!
//! An access looks its page up in the context's direct-mapped arrays: `va ^ tag` is the offset in the page on
//! a hit and huge otherwise, so one compare finds misses and accesses that leave the page. The address stays
//! in the base register throughout; the arrays' `addend` makes it a host address.
//!
//! In code that runs often, an access has a range entry of its own instead, as long as it seldom leaves its range:
//! no load of a tag or an addend then waits for the address. What misses looks its page up out of line, and now and then
//! asks the runtime to fill the entry.

use super::compact::Kind;
use super::flags::Routine;
use super::folded::{Checked, Folded};
use super::fuse::Fused;
use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Cc, Fixup, Map, R14, R15, RAX, Rm, Vex, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{ContextLayout, RANGE_SHIFT, Stored};
use mimus_tcg_ir::{Ext, FIRST_TEMP, Op, PagePc, Size, Slot, Val};

/// An access that the TLB did not serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slow {
    pub from: Fixup,
    /// Where the access begins, with the addend in `r14`.
    pub access: u32,
    pub back: u32,
    /// The address is `base + off`.
    pub base: u8,
    pub off: i32,
    pub size: Size,
    pub ext: Ext,
    /// What to store, or (a slot's home) where to put what was loaded.
    pub value: Opnd,
    pub insn: Insn,
    /// The vector register that a loaded value goes to as well, or that has what to store.
    pub xmm: Option<u8>,
    /// Displacement of the slot whose value `rax` must hold again.
    pub reload: Option<i32>,
    /// What saves the flags first.
    pub flags: Routine,
    /// What is done with the value in its stead.
    pub fused: Option<Fused>,
    /// The number of its range entry.
    pub range: Option<u32>,
    /// What comes next takes the addend to be that of the access's page, but for 0.
    pub page_is_used: bool,
    /// The address of code to store; `rax` holds the value of the slot to reload.
    pub push: Option<PagePc>,
    /// The load's address, if it has not been computed.
    pub folded: Option<Folded>,
}

impl Slow {
    /// What comes next takes the addend in `r14` to be that of the access's page, but for 0.
    pub(super) fn lose_page(&mut self) {
        self.page_is_used = true;
    }

    /// The bits of the runtime's descriptor that name the range entry.
    fn range_bits(&self) -> u32 {
        self.range.map_or(0, |range| (range + 1) << RANGE_SHIFT)
    }
}

/// A guest address: `base + off`, and the slot in memory that was loaded to `base` (`rax`), if one was.
#[derive(Clone, Copy)]
pub(super) struct Address {
    pub base: u8,
    pub off: i32,
    pub slot: Option<Slot>,
}

impl Lower<'_> {
    /// Gets an address's base into a register.
    pub(super) fn address(&mut self, base: Val, off: i32) -> Address {
        match (base, self.val(base)) {
            (Val::Imm(imm), _) => {
                let at = self.constant_address(imm, off);
                self.asm.mov_ri(RAX, at);
                Address { base: RAX, off: 0, slot: None }
            }
            (_, Opnd::Reg(base)) => {
                let slot = self.last.filter(|_| base == RAX);
                Address { base, off, slot }
            }
            (Val::Slot(slot), from) => {
                self.mov(RAX, from);
                Address { base: RAX, off, slot: Some(slot) }
            }
        }
    }

    /// A constant base with its offset.
    pub(super) fn constant_address(&self, imm: i64, off: i32) -> i64 {
        let at = imm.wrapping_add(i64::from(off));
        if self.narrow { i64::from(at as u32) } else { at }
    }

    /// Looks an address up in the tags at `tag` and leaves `va ^ tag` in `r15`, the array index in `r14`.
    pub(super) fn look_up(&mut self, at: Address, tag: i32) {
        self.asm.lea(true, R15, at.base, at.off);
        if at.off == 0 {
            self.asm.mov_r_rm(false, R14, Rm::Reg(at.base));
        } else {
            self.asm.mov_r_rm(false, R14, Rm::Reg(R15));
        }
        dynasm!(self.asm ; .arch x64
            ; shr r14d, 12
            ; gs xor r15, [r14*8 + tag]
        );
    }

    /// Looks up an access of `size`; `r14` is the addend after it. Gives where it goes on if that is not to be had,
    /// and its range entry.
    pub(super) fn translate(&mut self, at: Address, size: Size, write: bool) -> (Fixup, Option<u32>) {
        if let Some(range) = self.range_for(size, write) {
            return (self.compare_range(at, range, size), Some(range));
        }
        (self.translate_by_page(at, size, write), None)
    }

    /// The same by the page arrays.
    pub(super) fn translate_by_page(&mut self, at: Address, size: Size, write: bool) -> Fixup {
        let context = self.be.config.context;
        self.look_up(at, if write { context.write_tag } else { context.read_tag });
        dynasm!(self.asm ; .arch x64 ; cmp r15, 4096 - size.bytes() as i32);
        let miss = self.asm.jcc(Cc::A);
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [r14*8 + context.addend]);
        miss
    }

    /// The range entry for the access being lowered, if it is to have one.
    pub(super) fn range_for(&mut self, size: Size, write: bool) -> Option<u32> {
        let hints = &self.info.hints;
        let listed = |list: &[u16]| list.iter().any(|&pc| i32::from(pc) == self.insn.pc.0);
        let op = self.next.wrapping_sub(1);
        if !hints.hot || listed(&hints.scattered) || self.leaves_windows(op..op + 1) {
            return None;
        }
        if let Some((_, range)) = self.promised.iter().find(|(other, _)| *other == op) {
            return Some(*range);
        }
        let lent = self.lent.filter(|lent| lent.op == op).map(|lent| lent.range);
        if let Some(range) = lent.or_else(|| self.given_range(op)) {
            return Some(range);
        }
        let range = self.be.new_range(size, write, listed(&hints.parted));
        self.give_range(op, range);
        Some(range)
    }

    /// The range entry that operation `op`, which comes later, will have.
    pub(super) fn promise_range(&mut self, op: usize, size: Size) -> u32 {
        if let Some((_, range)) = self.promised.iter().find(|(other, _)| *other == op) {
            return *range;
        }
        let range = self.be.new_range(size, false, false);
        self.promised.push((op, range));
        range
    }

    /// Jumps if an address is not in a range.
    pub(super) fn outside_range(&mut self, (base, off): (u8, i32), range: u32, size: Size) -> Fixup {
        self.compare_range(Address { base, off, slot: None }, range, size)
    }

    /// Whether the access of the instruction at `pc` is to have a range entry of one part.
    pub(super) fn stays_in_range(&self, pc: i32) -> bool {
        let hints = &self.info.hints;
        hints.hot && !hints.scattered.iter().chain(&hints.parted).any(|&other| i32::from(other) == pc)
    }

    /// Compares all of an access with a range entry that is for fewer bytes, by `extra`: `r15` is the last address at which
    /// one of those may begin. `r14` is the addend after it.
    pub(super) fn compare_span(&mut self, range: u32, extra: i32) -> Fixups {
        let entry = self.range_entry(range);
        dynasm!(self.asm ; .arch x64
            ; gs sub r15, [DWORD entry]
            ; gs cmp r15, [DWORD entry + 8]
        );
        let mut miss = Fixups::one(self.asm.jcc(Cc::Ae));
        if extra != 0 {
            dynasm!(self.asm ; .arch x64 ; cmp r15, extra);
            miss.add(self.asm.jcc(Cc::B));
        }
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [DWORD entry + 16]);
        miss
    }

    /// The address to `r15`, out of line, where an access is not served that is not made by the load or store stub: one that
    /// has a range entry first has `look_up` look its page up, and goes on at `access` if that serves it, unless the runtime
    /// is to be told. Clobbers `r14`, and `rax` if it is not the base.
    pub(super) fn not_served_here(
        &mut self,
        (base, off): (u8, i32),
        (range, size): (Option<u32>, Size),
        access: u32,
        insn: Insn,
        look_up: impl FnOnce(&mut Self, Address) -> Fixup,
    ) {
        let Some(range) = range else {
            self.asm.lea(!self.narrow, R15, base, off);
            return;
        };
        let told = self.tell(range);
        let miss = look_up(self, Address { base, off, slot: None });
        self.rove((base, off), range, size);
        self.asm.jmp_back(access);
        self.asm.bind(told);
        self.asm.lea(!self.narrow, R15, base, off);
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], r15);
        self.asm.mov_ri(R14, i64::from(size as u32 | (range + 1) << RANGE_SHIFT));
        self.asm.call_abs(self.be.stubs.note);
        self.fault_entry(insn);
        dynasm!(self.asm ; .arch x64 ; mov r15, [rsp + 8]);
        let over = self.asm.jmp();
        self.asm.bind(miss);
        self.asm.lea(!self.narrow, R15, base, off);
        self.asm.bind(over);
    }

    /// Counts a miss; jumps if the runtime is to be told of it.
    fn tell(&mut self, range: u32) -> Fixup {
        let patience = self.range_entry(range) + ContextLayout::RANGE_PATIENCE as i32;
        dynasm!(self.asm ; .arch x64 ; gs sub DWORD [DWORD patience], 1);
        self.asm.jcc(Cc::B)
    }

    /// An access that missed its range entry is in a page whose addend is in `r14`: if the entry roves, it is for this page now.
    fn rove(&mut self, (base, off): (u8, i32), range: u32, size: Size) {
        if ContextLayout::range_has_parts(range) {
            return;
        }
        let (entry, roved) = (self.range_entry(range), self.be.config.context.roved);
        let roves = entry + ContextLayout::RANGE_ROVES as i32;
        let limit = 4097 - size.bytes() as i32;
        dynasm!(self.asm ; .arch x64 ; gs test BYTE [DWORD roves], 1);
        let over = self.asm.jcc(Cc::E);
        self.asm.lea(true, R15, base, off);
        dynasm!(self.asm ; .arch x64
            ; and r15, -4096
            ; gs mov [DWORD entry], r15
            ; gs mov QWORD [DWORD entry + 8], limit
            ; gs mov [DWORD entry + 16], r14
            ; gs mov BYTE [DWORD roved], 1
        );
        self.asm.bind(over);
    }

    pub(super) fn range_entry(&self, range: u32) -> i32 {
        self.be.config.context.ranges + range as i32 * ContextLayout::RANGE_BYTES as i32
    }

    /// Out of line, where an access is not served: one that has a range entry looks its page up, unless the runtime is
    /// to be told. What comes next is where that does not serve it either.
    fn not_served(&mut self, slow: &Slow, write: bool) {
        self.asm.bind(slow.from);
        self.unfold(slow);
        let Some(range) = slow.range else { return };
        let told = self.tell(range);
        let miss = self.translate_by_page(Address { base: slow.base, off: slow.off, slot: None }, slow.size, write);
        self.rove((slow.base, slow.off), range, slow.size);
        self.refold(slow);
        self.asm.jmp_back(slow.access);
        self.asm.bind(told);
        self.asm.bind(miss);
    }

    /// Compares an address with a range entry; `r14` is the addend after it.
    fn compare_range(&mut self, at: Address, range: u32, size: Size) -> Fixup {
        let entry = self.range_entry(range);
        if at.off == 0 {
            self.asm.mov_r_rm(true, R15, Rm::Reg(at.base));
        } else {
            self.asm.lea(true, R15, at.base, at.off);
        }
        if ContextLayout::range_has_parts(range) {
            // The address waits for no more than a compare and a move.
            dynasm!(self.asm ; .arch x64
                ; gs mov r14, [DWORD entry + 16]
                ; gs cmp r15, [DWORD entry + 24]
                ; gs cmovae r14, [DWORD entry + 32]
                ; gs sub r15, [DWORD entry]
            );
            if size != Size::B1 {
                let log2 = size as i8;
                dynasm!(self.asm ; .arch x64 ; ror r15, log2);
            }
            dynasm!(self.asm ; .arch x64 ; gs cmp r15, [DWORD entry + 8]);
            return self.asm.jcc(Cc::Ae);
        }
        dynasm!(self.asm ; .arch x64
            ; gs sub r15, [DWORD entry]
            ; gs cmp r15, [DWORD entry + 8]
        );
        let miss = self.asm.jcc(Cc::Ae);
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [DWORD entry + 16]);
        miss
    }

    /// The slot that `rax` holds after an access at `at` that itself left `rax` alone.
    pub(super) fn keep_base(&mut self, at: Address) -> Option<i32> {
        // A temporary's memory may not have been written.
        let slot = at.slot.filter(|slot| slot.0 < FIRST_TEMP)?;
        self.cached = Some(slot);
        Some(self.be.slot_disp(slot))
    }

    pub(super) fn load(&mut self, d: Slot, base: Val, off: i32, size: Size, ext: Ext) {
        if let Some(place) = self.grouped(base, off) {
            self.load_from(d, place, size, ext);
            return;
        }
        if self.compact {
            return self.compact_load(d, (base, off), size, ext);
        }
        if let Some(folded) = self.folded(base) {
            return self.load_by_index(d, (folded, off), size, ext);
        }
        let at = self.address(base, off);
        let look_up = self.asm.pos();
        let (from, range) = self.translate(at, size, false);
        let access = self.asm.pos();
        self.note_heads_load(look_up, access, range);
        let place = Rm::Mem { base: at.base, index: Some(R14), disp: at.off };
        let home = self.home(d);
        let xmm = self.fp_pin_to_load(d, size, ext);
        self.load_from(d, place, size, ext);
        let reload = match home {
            Opnd::Mem(_) if xmm.is_none() => None,
            _ => self.keep_base(at),
        };
        if self.divert(self.next - 1, self.before, Fixups::one(from)) {
            return;
        }
        let back = self.asm.pos();
        let insn = self.insn;
        let flags = self.flags_at_fault();
        self.put_off(Cold::Load(Slow {
            from,
            access,
            back,
            base: at.base,
            off: at.off,
            size,
            ext,
            value: home,
            xmm,
            insn,
            reload,
            flags,
            fused: None,
            range,
            page_is_used: false,
            push: None,
            folded: None,
        }));
        if range.is_none() {
            self.note_page(Some(d), base, at);
        }
    }

    /// The same with an address that was left to the load.
    pub(super) fn load_by_index(&mut self, d: Slot, (folded, off): (Folded, i32), size: Size, ext: Ext) {
        let flags = self.flags_at_fault();
        let Checked { from, access, range, place } = self.check_folded(folded, off, size);
        let value = self.home(d);
        self.load_from(d, place, size, ext);
        let back = self.asm.pos();
        let slow = Slow { value, ext, ..self.slow_by_index((folded, off), size, (from, access, back), (range, flags)) };
        self.put_off(Cold::Load(slow));
    }

    fn slow_by_index(
        &self,
        (folded, off): (Folded, i32),
        size: Size,
        (from, access, back): (Fixup, u32, u32),
        (range, flags): (u32, Routine),
    ) -> Slow {
        Slow {
            from,
            access,
            back,
            base: RAX,
            off,
            size,
            ext: Ext::Zero,
            value: Opnd::Reg(RAX),
            xmm: None,
            insn: self.insn,
            reload: None,
            flags,
            fused: None,
            range: Some(range),
            page_is_used: false,
            push: None,
            folded: Some(folded),
        }
    }

    /// A load and the operation behind it, which takes the memory as its operand.
    pub(super) fn load_fused(&mut self, (op, fused): (Op, Fused), base: Val, off: i32, size: Size) {
        let grouped = self.grouped(base, off);
        if let Some(place) = grouped {
            self.on_memory(fused, place);
        } else if self.compact {
            let place = self.compact_place((base, off), size.bytes() as u8, Stored::Unknown, Kind::LOAD);
            self.on_memory(fused, place);
        } else if let Some(folded) = self.folded(base) {
            let flags = self.flags_at_fault();
            let Checked { from, access, range, place } = self.check_folded(folded, off, size);
            self.on_memory(fused, place);
            let at = (from, access, self.asm.pos());
            let slow = self.slow_by_index((folded, off), size, at, (range, flags));
            self.put_off(Cold::Load(Slow { fused: Some(fused), ..slow }));
        } else {
            let at = self.address(base, off);
            let flags = self.flags_at_fault();
            let look_up = self.asm.pos();
            let (from, range) = self.translate(at, size, false);
            let access = self.asm.pos();
            self.note_heads_load(look_up, access, range);
            self.on_memory(fused, Rm::Mem { base: at.base, index: Some(R14), disp: at.off });
            let slow = Slow {
                from,
                access,
                back: self.asm.pos(),
                base: at.base,
                off: at.off,
                size,
                ext: Ext::Zero,
                value: Opnd::Reg(RAX),
                xmm: None,
                insn: self.insn,
                reload: None,
                flags,
                fused: Some(fused),
                range,
                page_is_used: false,
                push: None,
                folded: None,
            };
            if !self.divert(self.next - 1, self.before, Fixups::one(from)) {
                self.put_off(Cold::Load(slow));
                if range.is_none() {
                    let d = if let Op::AluF { d, .. } = op { d } else { None };
                    self.note_page(d, base, at);
                }
            }
        }
        self.flags_lost();
        self.next += 1;
        self.skip = self.next;
        self.flags_from(&op);
    }

    /// The vector register to load `d` to.
    pub(super) fn fp_pin_to_load(&self, d: Slot, size: Size, ext: Ext) -> Option<u8> {
        let whole = size == Size::B8 || size == Size::B4 && ext == Ext::Ones;
        self.be.fp_pin_of(d).filter(|_| whole && self.fp_alive)
    }

    /// `d` = memory at `place`.
    pub(super) fn load_from(&mut self, d: Slot, place: Rm, size: Size, ext: Ext) {
        if self.fp_pin_to_load(d, size, ext).is_some() {
            return self.load_fp_pin(d, place, size);
        }
        match (self.home(d), ext) {
            (Opnd::Mem(disp), Ext::Ones) if size == Size::B4 => {
                self.load_value(RAX, place, size, Ext::Zero);
                self.asm.mov_rm_r(false, Rm::Env(disp), RAX);
                self.write_box(d);
            }
            (Opnd::Reg(t), _) => self.load_value(t, place, size, ext),
            _ => {
                self.load_value(RAX, place, size, ext);
                self.finish(d);
            }
        }
    }

    /// Loads and extends.
    pub(super) fn load_value(&mut self, t: u8, place: Rm, size: Size, ext: Ext) {
        match (size, ext) {
            (Size::B1, Ext::Sign) => self.asm.ins(Map::Of, true, 0xbe, t, place),
            (Size::B1, _) => self.asm.ins(Map::Of, false, 0xb6, t, place),
            (Size::B2, Ext::Sign) => self.asm.ins(Map::Of, true, 0xbf, t, place),
            (Size::B2, _) => self.asm.ins(Map::Of, false, 0xb7, t, place),
            (Size::B4, Ext::Sign) => self.asm.movsxd(t, place),
            (Size::B4, _) => self.asm.mov_r_rm(false, t, place),
            (Size::B8, _) => self.asm.mov_r_rm(true, t, place),
        }
        if ext == Ext::Ones && size != Size::B8 {
            self.asm.mov_ri(R15, -1i64 << (8 * size.bytes()));
            self.asm.alu_r_rm(crate::asm::Alu::Or, true, t, Rm::Reg(R15));
        }
    }

    pub(super) fn slow_load(&mut self, slow: Slow) {
        self.not_served(&slow, false);
        self.asm.lea(!self.narrow, R15, slow.base, slow.off);
        self.keep_sum(&slow);
        self.save_at_fault(slow.flags);
        self.asm.mov_ri(R14, i64::from(slow.size as u32 | (slow.ext as u32) << 8 | slow.range_bits()));
        self.leave_homes();
        self.asm.call_abs(self.be.stubs.load);
        self.fault_entry(slow.insn);
        self.return_home();
        match slow.value {
            Opnd::Reg(t) => self.mov(t, Opnd::Reg(RAX)),
            Opnd::Mem(disp) => self.asm.mov_rm_r(true, Rm::Env(disp), RAX),
            Opnd::Imm(_) => {}
        }
        if let Some(xmm) = slow.xmm {
            dynasm!(self.asm ; .arch x64 ; vmovq Rx(xmm), rax);
        }
        if let Some(fused) = slow.fused {
            self.on_memory(fused, Rm::Reg(RAX));
        }
        if let Some(disp) = slow.reload {
            self.mov(RAX, Opnd::Mem(disp));
        }
        if slow.page_is_used {
            // No flag changes.
            dynasm!(self.asm ; .arch x64 ; mov r14d, 0);
        }
        self.asm.jmp_back(slow.back);
    }

    pub(super) fn store(&mut self, src: Val, base: Val, off: i32, size: Size) {
        if let Val::Slot(slot) = src
            && size >= Size::B4
            && let Some(xmm) = self.be.fp_pin_of(slot)
        {
            self.revive_fp();
            return self.store_fp_pin(xmm, base, off, size);
        }
        let cached = self.val(src);
        if let Some(place) = self.grouped(base, off) {
            self.store_to(place, cached, size);
            // `rax` was not written.
            self.cached = self.last;
            return;
        }
        if self.compact {
            return self.compact_store((src, cached), (base, off), size);
        }
        let at = self.address(base, off);
        // `rax` may have been overwritten by the base.
        let value =
            if cached == Opnd::Reg(RAX) && (at.base != RAX || base == src) { cached } else { self.home_val(src) };
        let (from, range) = self.translate(at, size, true);
        let access = self.asm.pos();
        let place = Rm::Mem { base: at.base, index: Some(R14), disp: at.off };
        self.store_to(place, value, size);
        let reload = if at.base == RAX { self.keep_base(at) } else { None };
        if self.divert(self.next - 1, self.before, Fixups::one(from)) {
            return;
        }
        let back = self.asm.pos();
        let insn = self.insn;
        let flags = self.flags_at_fault();
        self.put_off(Cold::Store(Slow {
            from,
            access,
            back,
            base: at.base,
            off: at.off,
            size,
            ext: Ext::Zero,
            value,
            xmm: None,
            insn,
            reload,
            flags,
            fused: None,
            range,
            page_is_used: false,
            push: None,
            folded: None,
        }));
    }

    /// A store of the low part of a vector register.
    fn store_fp_pin(&mut self, xmm: u8, base: Val, off: i32, size: Size) {
        let code = if size == Size::B8 { Vex::STORE_SD } else { Vex::STORE_SS };
        if let Some(place) = self.grouped(base, off) {
            self.asm.vex(code, false, xmm, 0, place);
            self.cached = self.last;
            return;
        }
        let at = self.address(base, off);
        let (from, range) = self.translate(at, size, true);
        let access = self.asm.pos();
        self.asm.vex(code, false, xmm, 0, Rm::Mem { base: at.base, index: Some(R14), disp: at.off });
        let reload = if at.base == RAX { self.keep_base(at) } else { None };
        self.put_off(Cold::Store(Slow {
            from,
            access,
            back: self.asm.pos(),
            base: at.base,
            off: at.off,
            size,
            ext: Ext::Zero,
            value: Opnd::Imm(0),
            xmm: Some(xmm),
            insn: self.insn,
            reload,
            flags: Routine::NONE,
            fused: None,
            range,
            page_is_used: false,
            push: None,
            folded: None,
        }));
    }

    /// Memory at `place` = `value`.
    pub(super) fn store_to(&mut self, place: Rm, value: Opnd, size: Size) {
        match value {
            Opnd::Imm(imm) if size != Size::B8 || fits32(imm) => self.store_imm(place, imm, size),
            value => {
                let reg = self.in_reg(value, R15);
                self.store_value(place, reg, size);
            }
        }
    }

    fn store_value(&mut self, place: Rm, reg: u8, size: Size) {
        match size {
            Size::B1 => self.asm.ins8(Map::Base, 0x88, reg, place),
            Size::B2 => {
                self.asm.push(0x66);
                self.asm.mov_rm_r(false, place, reg);
            }
            Size::B4 => self.asm.mov_rm_r(false, place, reg),
            Size::B8 => self.asm.mov_rm_r(true, place, reg),
        }
    }

    fn store_imm(&mut self, place: Rm, imm: i64, size: Size) {
        match size {
            Size::B1 => {
                self.asm.ins(Map::Base, false, 0xc6, 0, place);
                self.asm.push(imm as u8);
            }
            Size::B2 => {
                self.asm.push(0x66);
                self.asm.ins(Map::Base, false, 0xc7, 0, place);
                self.asm.push_i16(imm as i16);
            }
            Size::B4 => self.asm.mov_rm_i(false, place, imm as i32),
            Size::B8 => self.asm.mov_rm_i(true, place, imm as i32),
        }
    }

    pub(super) fn slow_store(&mut self, slow: Slow) {
        self.not_served(&slow, true);
        self.asm.lea(!self.narrow, R15, slow.base, slow.off);
        self.save_at_fault(slow.flags);
        match (slow.xmm, slow.push) {
            (Some(xmm), _) => dynasm!(self.asm ; .arch x64 ; vmovq rax, Rx(xmm)),
            (_, Some(pc)) => {
                if let Some(disp) = slow.reload {
                    self.asm.mov_rm_r(true, Rm::Env(disp), RAX);
                }
                self.load_pc(RAX, pc);
            }
            _ => self.mov(RAX, slow.value),
        }
        self.asm.mov_ri(R14, i64::from(slow.size as u32 | slow.range_bits()));
        self.leave_homes();
        self.asm.call_abs(self.be.stubs.store);
        self.fault_entry(slow.insn);
        self.return_home();
        if let Some(disp) = slow.reload {
            self.mov(RAX, Opnd::Mem(disp));
        }
        self.asm.jmp_back(slow.back);
    }
}
