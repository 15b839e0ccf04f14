//! Atomic accesses: natively where the TLB serves the address and it is aligned, through the runtime otherwise.

use super::mem::Address;
use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, Map, R14, R15, RAX, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{ATOMIC_LOAD_RESERVED, ATOMIC_STORE_CONDITIONAL};
use mimus_tcg_ir::{AmoOp, Ext, Size, Slot, Val};

/// An atomic access that the TLB did not serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slow {
    from: Fixups,
    back: u32,
    base: u8,
    descriptor: u32,
    value: Option<Opnd>,
    d: Option<Slot>,
    insn: Insn,
}

/// Place in the frame that a constant operand is put in.
const FRAME: Rm = Rm::Mem { base: crate::asm::RSP, index: None, disp: 8 };

impl Lower<'_> {
    /// Jumps out unless the page is in the tags at `tag` and the address aligned; then `r14` is the addend.
    fn translate_aligned(&mut self, at: Address, size: Size, tag: i32) -> Fixup {
        let addend = self.be.config.context.addend;
        self.look_up(at, tag);
        // An aligned offset in the page has no other bits than these.
        let offset = 0x1000 - size.bytes() as i32;
        dynasm!(self.asm ; .arch x64 ; test r15, !offset);
        let miss = self.asm.jcc(Cc::Ne);
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [r14*8 + addend]);
        miss
    }

    fn push_slow(&mut self, from: Fixups, at: Address, descriptor: u32, value: Option<Opnd>, d: Option<Slot>) {
        let (back, insn) = (self.asm.pos(), self.insn);
        self.put_off(Cold::Atomic(Slow { from, back, base: at.base, descriptor, value, d, insn }));
    }

    pub(super) fn slow_atomic(&mut self, slow: Slow) {
        self.bind(slow.from);
        self.mov(R15, Opnd::Reg(slow.base));
        if let Some(value) = slow.value {
            self.mov(RAX, value);
        }
        self.asm.mov_ri(R14, i64::from(slow.descriptor));
        self.asm.call_abs(self.be.stubs.atomic);
        self.fault_entry(slow.insn);
        if let Some(d) = slow.d {
            match self.rm(d) {
                Rm::Reg(t) => self.mov(t, Opnd::Reg(RAX)),
                place => self.asm.mov_rm_r(true, place, RAX),
            }
        }
        self.asm.jmp_back(slow.back);
    }

    /// The address of an atomic access; it is never taken from what `rax` held.
    fn atomic_address(&mut self, base: Val) -> Address {
        let from = self.home_val(base);
        Address { base: self.in_reg(from, RAX), off: 0, slot: None }
    }

    pub(super) fn load_reserved(&mut self, d: Slot, base: Val, size: Size, ext: Ext) {
        let at = self.atomic_address(base);
        let miss = self.translate_aligned(at, size, self.be.config.context.read_tag);
        let env = &self.be.config.env;
        let (addr, value) = (self.be.env(env.reserve_addr), self.be.env(env.reserve_value));
        let host = Rm::Mem { base: at.base, index: Some(R14), disp: 0 };
        if ext == Ext::Ones {
            // Needs r15 for the constant; the address is saved first.
            self.asm.mov_rm_r(true, Rm::Env(addr), at.base);
            self.load_value(RAX, host, size, ext);
            self.asm.mov_rm_r(true, Rm::Env(value), RAX);
            self.set(d, RAX);
        } else {
            self.load_value(R15, host, size, ext);
            self.asm.mov_rm_r(true, Rm::Env(addr), at.base);
            self.asm.mov_rm_r(true, Rm::Env(value), R15);
            self.set(d, R15);
        }
        let descriptor = size as u32 | (ext as u32) << 8 | ATOMIC_LOAD_RESERVED << 16;
        self.push_slow(Fixups::one(miss), at, descriptor, None, Some(d));
    }

    pub(super) fn store_conditional(&mut self, d: Slot, src: Val, base: Val, size: Size) {
        let src = self.home_val(src);
        let at = self.atomic_address(base);
        let env = &self.be.config.env;
        let (addr, value) = (self.be.env(env.reserve_addr), self.be.env(env.reserve_value));
        self.asm.alu_rm_r(Alu::Cmp, true, Rm::Env(addr), at.base);
        let mut from = Fixups::one(self.asm.jcc(Cc::Ne));
        from.add(self.translate_aligned(at, size, self.be.config.context.write_tag));
        self.host_address(at);
        let src_reg = self.in_reg(src, R15);
        self.mov(RAX, Opnd::Mem(value));
        self.lock_cmpxchg(size, src_reg);
        self.asm.setcc(Cc::Ne, RAX);
        self.asm.ins8(Map::Of, 0xb6, RAX, Rm::Reg(RAX));
        self.asm.mov_rm_i(true, Rm::Env(addr), -1);
        self.set(d, RAX);
        let descriptor = size as u32 | ATOMIC_STORE_CONDITIONAL << 16;
        self.push_slow(from, at, descriptor, Some(src), Some(d));
    }

    /// `r14` becomes the host address.
    fn host_address(&mut self, at: Address) {
        self.asm.alu_r_rm(Alu::Add, true, R14, Rm::Reg(at.base));
    }

    /// `lock cmpxchg [r14], reg`.
    fn lock_cmpxchg(&mut self, size: Size, reg: u8) {
        self.locked(size, 0xb0, Map::Of, reg, true);
    }

    /// A read-modify-write of `[r14]`; the opcode is the byte form's.
    fn locked(&mut self, size: Size, opcode: u8, map: Map, reg: u8, lock: bool) {
        let place = Rm::Mem { base: R14, index: None, disp: 0 };
        if lock {
            self.asm.push(0xf0);
        }
        match size {
            Size::B1 => self.asm.ins8(map, opcode, reg, place),
            Size::B2 => {
                self.asm.push(0x66);
                self.asm.ins(map, false, opcode | 1, reg, place);
            }
            Size::B4 => self.asm.ins(map, false, opcode | 1, reg, place),
            Size::B8 => self.asm.ins(map, true, opcode | 1, reg, place),
        }
    }

    pub(super) fn amo(&mut self, op: AmoOp, d: Option<Slot>, src: Val, base: Val, size: Size) {
        let src = self.home_val(src);
        let at = self.atomic_address(base);
        // The old value is sign-extended.
        let descriptor = size as u32 | (Ext::Sign as u32) << 8 | (op as u32) << 16;
        let plain = match op {
            AmoOp::Add => Some(Alu::Add),
            AmoOp::And => Some(Alu::And),
            AmoOp::Or => Some(Alu::Or),
            AmoOp::Xor => Some(Alu::Xor),
            _ => None,
        };
        let direct = op == AmoOp::Swap || plain.is_some() && (d.is_none() || op == AmoOp::Add);
        if !direct && size < Size::B4 {
            // The loop below works in 32 or 64 bits.
            let from = Fixups::one(self.asm.jmp());
            return self.push_slow(from, at, descriptor, Some(src), d);
        }
        let miss = self.translate_aligned(at, size, self.be.config.context.write_tag);
        self.host_address(at);
        match (op, plain, d) {
            (AmoOp::Swap, ..) => {
                self.mov(RAX, src);
                // An exchange with memory is locked without saying so.
                self.locked(size, 0x86, Map::Base, RAX, false);
            }
            (AmoOp::Add, _, Some(_)) => {
                self.mov(RAX, src);
                self.locked(size, 0xc0, Map::Of, RAX, true);
            }
            (_, Some(alu), None) => {
                let src = self.in_reg(src, RAX);
                self.locked(size, (alu as u8) << 3, Map::Base, src, true);
            }
            _ => self.amo_loop(op, plain, src, size),
        }
        if let Some(d) = d {
            self.sign_extend(size);
            self.set(d, RAX);
        }
        self.push_slow(Fixups::one(miss), at, descriptor, Some(src), d);
    }

    /// Compare-and-exchange until nobody interferes; the old value is left in `rax`.
    fn amo_loop(&mut self, op: AmoOp, plain: Option<Alu>, src: Opnd, size: Size) {
        let w = size == Size::B8;
        let src = match src {
            Opnd::Reg(r) => Rm::Reg(r),
            Opnd::Mem(disp) => Rm::Env(disp),
            Opnd::Imm(imm) => {
                self.asm.mov_ri(R15, imm);
                self.asm.mov_rm_r(true, FRAME, R15);
                FRAME
            }
        };
        let place = Rm::Mem { base: R14, index: None, disp: 0 };
        self.asm.mov_r_rm(w, RAX, place);
        let again = self.asm.pos();
        if let Some(alu) = plain {
            self.asm.mov_r_rm(w, R15, Rm::Reg(RAX));
            self.asm.alu_r_rm(alu, w, R15, src);
        } else {
            // The old value is the new one if it stands in this relation to the operand.
            let cc = match op {
                AmoOp::MinS => Cc::L,
                AmoOp::MaxS => Cc::G,
                AmoOp::MinU => Cc::B,
                _ => Cc::A,
            };
            self.asm.mov_r_rm(w, R15, src);
            self.asm.alu_r_rm(Alu::Cmp, w, RAX, Rm::Reg(R15));
            self.asm.cmov(cc, w, R15, Rm::Reg(RAX));
        }
        self.lock_cmpxchg(size, R15);
        self.asm.jcc_back(Cc::Ne, again);
    }

    /// Sign-extends `rax`.
    fn sign_extend(&mut self, size: Size) {
        match size {
            Size::B1 => self.asm.ins(Map::Of, true, 0xbe, RAX, Rm::Reg(RAX)),
            Size::B2 => self.asm.ins(Map::Of, true, 0xbf, RAX, Rm::Reg(RAX)),
            Size::B4 => self.asm.movsxd(RAX, Rm::Reg(RAX)),
            Size::B8 => {}
        }
    }
}
