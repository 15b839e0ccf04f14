//! Repeated moves and stores, page by page: the host's own instruction on the host's addresses. What is not so simple is
//! the helper's, whose call follows.
//!
//! Where the guest's registers are the host's of the same names, all that is done within one page each is done first: short
//! ones are most.

use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Alu, Cc, Map, R14, R15, RAX, RCX, RDI, RSI, RSP, Rm, Shift};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::{Op, Rep, Size};

/// Most elements: bytes of a page.
const MAX_COUNT: i32 = 4096;

/// The call in place of the instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slow {
    /// Ways that go on page by page; none if what is in line does.
    by_pages: Option<Fixups>,
    /// Ways to the call.
    from: Fixups,
    back: u32,
    /// Index of the call.
    call: usize,
    insn: Insn,
}

/// The registers of a repeated instruction.
#[derive(Clone, Copy)]
struct Pins {
    count: u8,
    from: u8,
    to: u8,
}

impl Lower<'_> {
    pub(super) fn rep(&mut self, rep: &Rep) {
        let Some(pins) = self.rep_pins(rep) else {
            // The call does it all.
            return;
        };
        let own = pins.count == RCX && pins.to == RDI && (rep.fill.is_some() || pins.from == RSI);
        let (mut slow, mut by_pages) = (Fixups::default(), None);
        if own {
            by_pages = Some(self.rep_in_page(rep));
        } else {
            self.rep_by_pages(rep, pins, &mut slow);
        }
        let back = self.asm.pos();
        self.put_off(Cold::Rep(Slow { by_pages, from: slow, back, call: self.next, insn: self.insn }));
        self.next += 1;
        self.skip = self.next;
    }

    fn rep_pins(&self, rep: &Rep) -> Option<Pins> {
        Some(Pins { count: self.pin_of(rep.count)?, from: self.pin_of(rep.from)?, to: self.pin_of(rep.to)? })
    }

    /// All of it, if that is in one page of each operand. Gives where it goes on if not.
    fn rep_in_page(&mut self, rep: &Rep) -> Fixups {
        let (w, shift, copies) = (!rep.narrow, rep.size as u8, rep.fill.is_none());
        let context = self.be.config.context;
        let mut from = Fixups::default();
        let down = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(rep.down)));
        self.asm.ins(Map::Base, false, 0xf6, 0, down);
        self.asm.push(rep.down_mask);
        from.add(self.asm.jcc(Cc::Ne));
        let by_bytes = self.by_bytes(rep);
        if by_bytes {
            self.is_near(rep);
            from.add(self.asm.jcc(Cc::A));
        }
        let most = MAX_COUNT >> shift;
        self.asm.lea_sib(w, R14, Some(RCX), None, -1);
        self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(R14), most - 1);
        from.add(self.asm.jcc(Cc::A));
        // The last offset in a page at which it may begin.
        dynasm!(self.asm ; .arch x64 ; mov eax, most ; sub eax, ecx);
        if shift != 0 {
            self.asm.shift_i(Shift::Shl, false, Rm::Reg(RAX), shift);
        }
        if copies {
            dynasm!(self.asm ; .arch x64
                ; mov r14d, esi
                ; mov r15, rsi
                ; shr r14d, 12
                ; gs xor r15, [r14*8 + context.read_tag]
                ; cmp r15, rax
            );
            from.add(self.asm.jcc(Cc::A));
            dynasm!(self.asm ; .arch x64 ; gs mov r14, [r14*8 + context.addend] ; mov [rsp + 8], r14);
        }
        dynasm!(self.asm ; .arch x64
            ; mov r14d, edi
            ; mov r15, rdi
            ; shr r14d, 12
            ; gs xor r15, [r14*8 + context.write_tag]
            ; cmp r15, rax
        );
        from.add(self.asm.jcc(Cc::A));
        dynasm!(self.asm ; .arch x64 ; gs mov r15, [r14*8 + context.addend]);
        if copies {
            dynasm!(self.asm ; .arch x64 ; add rsi, [rsp + 8]);
        }
        if let Some(fill) = rep.fill {
            let value = self.home(fill);
            self.mov(RAX, value);
        }
        dynasm!(self.asm ; .arch x64 ; add rdi, r15);
        if by_bytes {
            self.asm.shift_i(Shift::Shl, false, Rm::Reg(RCX), shift);
        }
        self.host_rep(rep, if by_bytes { Size::B1 } else { rep.size });
        // Narrow pointers have zeros above.
        if copies {
            self.asm.alu_r_rm(Alu::Sub, w, RSI, Rm::Mem { base: RSP, index: None, disp: 8 });
        }
        self.asm.alu_r_rm(Alu::Sub, w, RDI, Rm::Reg(R15));
        from
    }

    /// Each time as many bytes as are left in both pages. `slow`: ways to the call.
    fn rep_by_pages(&mut self, rep: &Rep, Pins { count, from, to }: Pins, slow: &mut Fixups) {
        let w = !rep.narrow;
        let shift = rep.size as u8;
        let context = self.be.config.context;
        let down = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(rep.down)));
        self.asm.ins(Map::Base, false, 0xf6, 0, down);
        self.asm.push(rep.down_mask);
        slow.add(self.asm.jcc(Cc::Ne));
        // 1 to a few pages: more are the helper's.
        self.asm.lea_sib(w, R14, Some(count), None, -1);
        self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(R14), MAX_COUNT - 1);
        slow.add(self.asm.jcc(Cc::A));
        let again = self.asm.pos();
        self.asm.mov_r_rm(false, R14, Rm::Reg(count));
        if rep.size != Size::B1 {
            self.asm.shift_i(Shift::Shl, false, Rm::Reg(R14), shift);
        }
        let copies = rep.fill.is_none();
        for pointer in [Some(from).filter(|_| copies), Some(to)].into_iter().flatten() {
            self.asm.mov_r_rm(false, RAX, Rm::Reg(pointer));
            dynasm!(self.asm ; .arch x64
                ; or eax, -4096
                ; neg eax
                ; cmp r14d, eax
                ; cmova r14d, eax
            );
        }
        if rep.size != Size::B1 {
            // An element may be in two pages.
            self.asm.alu_rm_i(Alu::And, false, Rm::Reg(R14), -(rep.size.bytes() as i32));
            slow.add(self.asm.jcc(Cc::E));
        }
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], r14);
        if copies {
            self.asm.mov_r_rm(w, RAX, Rm::Reg(from));
            dynasm!(self.asm ; .arch x64
                ; mov r14d, eax
                ; shr r14d, 12
                ; mov r15, rax
                ; gs xor r15, [r14*8 + context.read_tag]
                ; cmp r15, 0xfff
            );
            slow.add(self.asm.jcc(Cc::A));
            dynasm!(self.asm ; .arch x64 ; gs add rax, [r14*8 + context.addend]);
        }
        self.asm.mov_r_rm(w, R15, Rm::Reg(to));
        dynasm!(self.asm ; .arch x64
            ; mov r14d, r15d
            ; shr r14d, 12
            ; gs xor r15, [r14*8 + context.write_tag]
            ; cmp r15, 0xfff
        );
        slow.add(self.asm.jcc(Cc::A));
        self.asm.mov_r_rm(w, R15, Rm::Reg(to));
        dynasm!(self.asm ; .arch x64 ; gs add r15, [r14*8 + context.addend]);
        if let Some(fill) = rep.fill {
            let value = self.home(fill);
            self.mov(RAX, value);
        }
        dynasm!(self.asm ; .arch x64 ; mov r14, [rsp + 8]);
        self.host_rep_apart(rep);
        for pointer in [Some(from).filter(|_| copies), Some(to)].into_iter().flatten() {
            self.asm.lea_sib(w, pointer, Some(pointer), Some((R14, 0)), 0);
        }
        if rep.size != Size::B1 {
            self.asm.shift_i(Shift::Shr, false, Rm::Reg(R14), shift);
        }
        self.asm.alu_r_rm(Alu::Sub, w, count, Rm::Reg(R14));
        self.asm.jcc_back(Cc::Ne, again);
    }

    /// From `rax` (or what it holds) to `r15`, as many bytes as `r14` says.
    fn host_rep_apart(&mut self, rep: &Rep) {
        dynasm!(self.asm ; .arch x64 ; push rsi ; push rdi ; push rcx);
        if rep.fill.is_none() {
            self.mov(RSI, Opnd::Reg(RAX));
        }
        self.mov(RDI, Opnd::Reg(R15));
        self.mov(RCX, Opnd::Reg(R14));
        let by_bytes = self.by_bytes(rep).then(|| {
            self.is_near(rep);
            let near = self.asm.jcc(Cc::A);
            self.host_rep(rep, Size::B1);
            (near, self.asm.jmp())
        });
        if let Some((near, _)) = by_bytes {
            self.asm.bind(near);
        }
        if rep.size != Size::B1 {
            self.asm.shift_i(Shift::Shr, false, Rm::Reg(RCX), rep.size as u8);
        }
        self.host_rep(rep, rep.size);
        if let Some((_, done)) = by_bytes {
            self.asm.bind(done);
        }
        dynasm!(self.asm ; .arch x64 ; pop rcx ; pop rdi ; pop rsi);
    }

    /// Whether larger elements are moved as bytes, unless they are near.
    fn by_bytes(&self, rep: &Rep) -> bool {
        self.be.moves_bytes && rep.fill.is_none() && rep.size != Size::B1
    }

    /// Compares so that `a` says: the destination is above the source by less than an element, where bytes one by one are not the
    /// same as elements. By offsets into pages, since a page may have two addresses.
    fn is_near(&mut self, rep: &Rep) {
        let most = 4096 - rep.size.bytes() as i32;
        dynasm!(self.asm ; .arch x64 ; mov eax, esi ; sub eax, edi ; and eax, 4095 ; cmp eax, most);
    }

    /// The host's instruction, for elements of this size.
    fn host_rep(&mut self, rep: &Rep, size: Size) {
        if size == Size::B2 {
            self.asm.push(0x66);
        }
        self.asm.push(0xf3);
        if size == Size::B8 {
            self.asm.push(0x48);
        }
        let opcode = if rep.fill.is_some() { 0xaa } else { 0xa4 };
        self.asm.push(opcode | u8::from(size != Size::B1));
    }

    pub(super) fn slow_rep(&mut self, slow: Slow) {
        self.insn = slow.insn;
        let mut from = slow.from;
        if let (Some(by_pages), Some(Op::Rep(rep))) = (slow.by_pages, self.ops.get(slow.call.wrapping_sub(1)))
            && let Some(pins) = self.rep_pins(rep)
        {
            self.bind(by_pages);
            if rep.narrow == self.narrow {
                // Nothing to do, perhaps. Where addresses of 32 bits are an exception, the count's upper half
                // is the helper's.
                self.asm.test_rr(!rep.narrow, pins.count);
                self.asm.jcc_back(Cc::E, slow.back);
            }
            self.rep_by_pages(rep, pins, &mut from);
            self.asm.jmp_back(slow.back);
        }
        self.bind(from);
        if let Some(Op::Call { helper, kind, ret, args }) = self.ops.get(slow.call).copied() {
            self.call(helper, kind, ret, args);
        }
        self.asm.jmp_back(slow.back);
    }
}
