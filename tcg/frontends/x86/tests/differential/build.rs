//! Random instructions with all their operand forms, and what has to come before them so that they do something.

use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind, OpKind,
    Register,
};
use mimus_arch::x86::regs::*;
use mimus_tcg_frontend_x86::cpuid::Features;

use crate::layout::*;
use crate::modify;
use crate::random::Random;
use crate::regs::{Regs, Roles};
use crate::select::{self, Class};
use crate::sequence::{Item, Sequence};
use crate::special;

/// Makes sequences.
pub struct Generator {
    features: Features,
    info: InstructionInfoFactory,
    /// By code size: 16, 32, 64: instructions that go on, and that fault.
    codes: [(Vec<Code>, Vec<Code>); 3],
    /// Of 100 accesses, and stack pointers, how many are to where they may fault, beside the few that always are.
    bad: u64,
}

/// One sequence's circumstances.
pub struct Place<'a> {
    pub r: &'a mut Random,
    pub bits: u32,
    pub roles: Roles,
    /// Registers before the sequence.
    regs: &'a Regs,
    /// Of 100 accesses, how many are to where they may fault.
    bad: u64,
}

/// General register `n` of `bytes` bytes; `high`: AH to BH for 4 to 7.
pub fn gpr(n: usize, bytes: usize, high: bool) -> Register {
    let n = n as u32;
    match bytes {
        1 if high && (4..8).contains(&n) => Register::AH + (n - 4),
        1 if n < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

impl Place<'_> {
    fn register(&mut self, bytes: usize) -> Register {
        let n = self.r.below(if self.bits == 64 { 16 } else { 8 }) as usize;
        // Without REX there are the high halves.
        let high = self.bits != 64 || self.r.chance(50);
        gpr(n, bytes, high)
    }

    fn vector(&mut self, first: Register) -> Register {
        first + self.r.below(if self.bits == 64 { 16 } else { 8 }) as u32
    }

    fn whole(&self, n: usize) -> Register {
        gpr(n, self.bits as usize / 8, false)
    }

    /// The offset that an access of `size` bytes goes to.
    fn target(&mut self, size: usize) -> u64 {
        let offset = self.address(size).wrapping_sub(data_base(self.bits));
        if self.bits == 16 { offset & 0xffff } else { offset }
    }

    fn address(&mut self, size: usize) -> u64 {
        let size = size.max(1) as u64;
        let step = if size >= 16 && self.r.chance(85) { size.next_power_of_two().min(64) } else { 1 };
        let usual = if self.r.chance(self.bad) { 16 } else { 100 };
        match self.r.below(usual) {
            // Where there is nothing at all.
            7..16 if usual == 16 => {
                self.r.pick(&[DATA + 0x8000, DATA - 0x1000, READ_ONLY, READ_ONLY + 0xff8]) + self.r.below(9)
            }
            // Over the end of a page.
            0..4 => DATA + 0x1000 * (1 + self.r.below(2)) - self.r.below(size + 1),
            // Into the page that is not writable, and past the end.
            4 => READ_ONLY - self.r.below(size + 1) + 0x800 * self.r.below(2),
            5 => DATA + DATA_LEN as u64 - self.r.below(size + 1),
            6 => DATA - self.r.below(size + 1),
            _ => DATA + 0x400 + self.r.below(0x2000) / step * step,
        }
    }

    /// The memory operand of an access of `size` bytes.
    fn memory(&mut self, insn: &mut Instruction, size: usize, vsib: Option<Register>) {
        let target = self.target(size);
        if self.bits == 16 && vsib.is_none() && self.r.chance(70) {
            return self.short_memory(insn, target);
        }
        let wild = self.r.below(200) == 0;
        let wide = self.bits == 64 && self.r.below(16) != 0;
        let bytes = if wide { 8 } else { 4 };
        let base = if wild {
            self.roles.w
        } else if self.r.below(8) == 0 {
            RSP
        } else {
            self.roles.p
        };
        let (mut displacement, mut parts) = (target, 0u64);
        let form = self.r.below(16);
        if form == 0 && vsib.is_none() {
            // No register: absolute, or relative to the instruction.
            if self.bits == 64 && self.r.chance(60) {
                insn.set_memory_base(Register::RIP);
            }
            insn.set_memory_displ_size(self.bits / 8);
            insn.set_memory_displacement64(displacement);
            return;
        }
        insn.set_memory_base(gpr(base, bytes, false));
        parts = parts.wrapping_add(self.regs.gpr[base]);
        let scale = 1 << self.r.below(4);
        if let Some(index) = vsib {
            insn.set_memory_index(index);
            insn.set_memory_index_scale(scale);
            parts = parts.wrapping_add(0x200);
        } else if self.r.chance(50) {
            insn.set_memory_index(gpr(self.roles.x, bytes, false));
            insn.set_memory_index_scale(scale);
            parts = parts.wrapping_add(self.regs.gpr[self.roles.x].wrapping_mul(u64::from(scale)));
        }
        displacement = if wild { self.r.below(256) } else { displacement.wrapping_sub(parts) };
        if !wide {
            displacement &= 0xffff_ffff;
        }
        insn.set_memory_displacement64(displacement);
        let small = displacement as i64 as i8 as i64 == displacement as i64;
        insn.set_memory_displ_size(if small && self.r.chance(50) { 1 } else { bytes as u32 });
        if self.r.below(16) == 0 {
            self.other_segment(insn);
        }
    }

    fn other_segment(&mut self, insn: &mut Instruction) {
        let segments = [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
        let n = if self.bits == 64 { 6 } else { 4 };
        insn.set_segment_prefix(segments[self.r.below(n) as usize]);
    }

    /// A memory operand with a 16-bit address.
    fn short_memory(&mut self, insn: &mut Instruction, target: u64) {
        let mut parts = 0u64;
        let form = self.r.below(8) & if self.roles.x == RDX { !2 } else { !0 };
        if form & 1 != 0 {
            insn.set_memory_base(gpr(self.roles.p, 2, false));
            parts = parts.wrapping_add(self.regs.gpr[self.roles.p]);
        }
        if form & 2 != 0 {
            // Of SI and DI alone, the decoder says base.
            let x = gpr(self.roles.x, 2, false);
            if form & 1 != 0 {
                insn.set_memory_index(x)
            } else {
                insn.set_memory_base(x)
            }
            parts = parts.wrapping_add(self.regs.gpr[self.roles.x]);
        }
        let displacement = target.wrapping_sub(parts) & 0xffff;
        insn.set_memory_displacement64(displacement);
        let small = displacement as i16 as i8 as i16 == displacement as i16;
        insn.set_memory_displ_size(if form & 3 != 0 && small { 1 } else { 2 });
        if self.r.below(16) == 0 {
            self.other_segment(insn);
        }
    }

    /// Sets operand `i` as its kind asks for; false if there is no way.
    fn operand(&mut self, insn: &mut Instruction, i: u32, kind: OpCodeOperandKind, size: usize) -> bool {
        use OpCodeOperandKind as K;
        let memory = self.r.chance(45);
        let register = match kind {
            K::r8_or_mem if !memory => self.register(1),
            K::r16_or_mem if !memory => self.register(2),
            K::r32_or_mem | K::r32_or_mem_mpx if !memory => self.register(4),
            K::r64_or_mem | K::r64_or_mem_mpx if !memory => self.register(8),
            K::mm_or_mem if !memory => Register::MM0 + self.r.below(8) as u32,
            K::xmm_or_mem if !memory => self.vector(Register::XMM0),
            K::ymm_or_mem if !memory => self.vector(Register::YMM0),
            K::r8_reg | K::r8_opcode => self.register(1),
            K::r16_reg | K::r16_rm | K::r16_opcode => self.register(2),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => self.register(4),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => self.register(8),
            K::mm_reg | K::mm_rm => Register::MM0 + self.r.below(8) as u32,
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => self.vector(Register::XMM0),
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => self.vector(Register::YMM0),
            K::seg_reg => self.r.pick(&[Register::ES, Register::SS, Register::DS, Register::FS, Register::GS]),
            K::cr_reg => Register::CR0 + self.r.pick(&[0, 2, 3, 4, 8]),
            K::dr_reg => Register::DR0 + self.r.pick(&[0, 1, 2, 3, 6, 7]),
            K::es => Register::ES,
            K::cs => Register::CS,
            K::ss => Register::SS,
            K::ds => Register::DS,
            K::fs => Register::FS,
            K::gs => Register::GS,
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + self.r.below(8) as u32,
            _ => Register::None,
        };
        if register != Register::None {
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register);
            return true;
        }
        let value = self.r.value();
        match kind {
            K::imm8 => {
                insn.set_op_kind(
                    i,
                    if i > 0 && has_immediate(insn, i) { OpKind::Immediate8_2nd } else { OpKind::Immediate8 },
                );
                if insn.op_kind(i) == OpKind::Immediate8 {
                    insn.set_immediate8(value as u8);
                } else {
                    insn.set_immediate8_2nd(value as u8);
                }
            }
            K::imm4_m2z => {
                insn.set_op_kind(i, OpKind::Immediate8);
                insn.set_immediate8(value as u8 & 3);
            }
            K::imm8_const_1 => {
                insn.set_op_kind(i, OpKind::Immediate8);
                insn.set_immediate8(1);
            }
            K::imm8sex16 => {
                insn.set_op_kind(i, OpKind::Immediate8to16);
                insn.set_immediate8to16((value as i8).into());
            }
            K::imm8sex32 => {
                insn.set_op_kind(i, OpKind::Immediate8to32);
                insn.set_immediate8to32((value as i8).into());
            }
            K::imm8sex64 => {
                insn.set_op_kind(i, OpKind::Immediate8to64);
                insn.set_immediate8to64((value as i8).into());
            }
            K::imm16 => {
                insn.set_op_kind(i, OpKind::Immediate16);
                insn.set_immediate16(value as u16);
            }
            K::imm32 => {
                insn.set_op_kind(i, OpKind::Immediate32);
                insn.set_immediate32(value as u32);
            }
            K::imm32sex64 => {
                insn.set_op_kind(i, OpKind::Immediate32to64);
                insn.set_immediate32to64((value as i32).into());
            }
            K::imm64 => {
                insn.set_op_kind(i, OpKind::Immediate64);
                insn.set_immediate64(value);
            }
            K::seg_rSI => {
                insn.set_op_kind(i, self.implicit([OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI]))
            }
            K::es_rDI => {
                insn.set_op_kind(i, self.implicit([OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI]))
            }
            K::seg_rDI => {
                insn.set_op_kind(i, self.implicit([OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI]))
            }
            K::seg_rBX_al => {
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_base(self.whole(RBX));
                insn.set_memory_index(Register::AL);
            }
            K::mem_offs => {
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_displ_size(self.bits / 8);
                insn.set_memory_displacement64(self.target(size));
            }
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                let wide = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
                let index = self.vector(if wide { Register::YMM0 } else { Register::XMM0 });
                insn.set_op_kind(i, OpKind::Memory);
                self.memory(insn, size, Some(index));
            }
            K::mem
            | K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r32_or_mem_mpx
            | K::r64_or_mem
            | K::r64_or_mem_mpx
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem => {
                insn.set_op_kind(i, OpKind::Memory);
                self.memory(insn, size, None);
            }
            _ => return false,
        }
        true
    }

    /// Of 16, 32 and 64 bits, what code has without prefixes.
    fn implicit(&self, kinds: [OpKind; 3]) -> OpKind {
        kinds[self.bits as usize / 32]
    }
}

fn has_immediate(insn: &Instruction, before: u32) -> bool {
    (0..before).any(|i| matches!(insn.op_kind(i), OpKind::Immediate8 | OpKind::Immediate16))
}

pub fn encode(bits: u32, insn: &Instruction) -> Option<(Vec<u8>, Option<usize>)> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(insn, 0).ok()?;
    let at = insn.is_ip_rel_memory_operand().then(|| encoder.get_constant_offsets().displacement_offset());
    Some((encoder.take_buffer(), at))
}

/// `mov register, value`
pub fn load(item: &mut Item, bits: u32, register: usize, value: u64) {
    let code = if bits == 64 { Code::Mov_r64_imm64 } else { Code::Mov_r32_imm32 };
    let insn = if bits == 64 {
        Instruction::with2(code, gpr(register, 8, false), value)
    } else {
        Instruction::with2(code, gpr(register, 4, false), value as u32)
    };
    if let Some((bytes, _)) = insn.ok().and_then(|i| encode(bits, &i)) {
        item.add(&bytes);
    }
}

fn writes(access: OpAccess) -> bool {
    !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
}

impl Generator {
    pub fn new(class: Class, bad: u64) -> Generator {
        let features = select::features();
        let codes = [16, 32, 64].map(|bits| select::instructions(class, bits, &features));
        Generator { features, info: InstructionInfoFactory::new(), codes, bad }
    }

    /// What the model has.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// A sequence of about `length` instructions, and the registers before it.
    pub fn sequence(&mut self, r: &mut Random, bits: u32, length: usize) -> (Sequence, Regs) {
        let roles = Roles::random(r, bits);
        let mut regs = Regs::random(r, bits, &roles);
        if r.chance(self.bad) {
            regs.faulting(r, bits, &roles);
        }
        // Some begin near a page's end.
        let start = CODE + if r.chance(20) { 0x1000 - r.below(64) } else { 0x800 + r.below(64) };
        let mut sequence = Sequence { bits, start, items: Vec::new() };
        let mut place = Place { r, bits, roles, regs: &regs, bad: self.bad };
        let mut count = 0;
        while count < length {
            let item =
                if bits != 16 && place.r.below(48) == 0 { modify::item(&mut place) } else { self.item(&mut place) };
            if let Some(item) = item {
                count += item.count;
                sequence.items.push(item);
            }
        }
        (sequence, regs)
    }

    /// Any of all instructions there are; of those that fault, few.
    fn code(&self, p: &mut Place<'_>) -> Code {
        let which = p.bits as usize / 32;
        let (go_on, fault) = &self.codes[which];
        if p.r.below(100) == 0 && !fault.is_empty() {
            return p.r.pick(fault);
        }
        p.r.pick(go_on)
    }

    fn item(&mut self, p: &mut Place<'_>) -> Option<Item> {
        let code = self.code(p);
        (0..8).find_map(|_| self.form(p, code))
    }

    /// A random form of an instruction, with what comes before it.
    fn form(&mut self, p: &mut Place<'_>, code: Code) -> Option<Item> {
        let mut item = Item::default();
        if special::is_special(code) {
            return self.special(p, code);
        }
        if code.is_jcc_short_or_near() || code.is_jmp_short_or_near() || code.is_call_near() || code.is_loop() {
            return self.branch(p, code);
        }
        if code.is_loopcc() || code.is_jcx_short() {
            return self.branch(p, code);
        }
        if code.is_jmp_near_indirect() || code.is_call_near_indirect() || code.mnemonic() == Mnemonic::Ret {
            return self.indirect(p, code);
        }
        let insn = self.instruction(p, code)?;
        let (bytes, relative) = encode(p.bits, &insn)?;
        let (bytes, shift) = self.prefixed(p, &insn, bytes);
        let insn = select::decoded(&bytes, p.bits, &self.features);
        let loaded = self.prepare(p, &insn, &mut item)?;
        if !self.acceptable(p, &insn, &bytes, &loaded) {
            return None;
        }
        let at = item.bytes.len();
        item.add(&bytes);
        item.relative.extend(relative.map(|offset| (at + shift + offset, at + shift)));
        self.clear_pointers(p, &insn, &mut item)?;
        Some(item)
    }

    /// After an image of the x87 unit was stored: where its last instruction was becomes 0 in it.
    fn clear_pointers(&self, p: &Place<'_>, insn: &Instruction, item: &mut Item) -> Option<()> {
        if !matches!(insn.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave) {
            return Some(());
        }
        item.image = true;
        let narrow = matches!(insn.memory_size().size(), 14 | 94);
        let (code, first, step) = if narrow { (Code::Mov_rm16_imm16, 6, 2) } else { (Code::Mov_rm32_imm32, 12, 4) };
        for i in 0..4 {
            let mut clear = *insn;
            clear.set_code(code);
            clear.set_op1_kind(if narrow { OpKind::Immediate16 } else { OpKind::Immediate32 });
            clear.set_memory_displacement64(insn.memory_displacement64().wrapping_add(first + step * i));
            clear.set_memory_displ_size(match (p.bits, insn.memory_base().size(), insn.memory_displ_size()) {
                (16, 2, _) | (16, 0, 2) => 2,
                (_, _, 8) => 8,
                _ => 4,
            });
            clear.set_immediate32(0);
            let (bytes, relative) = encode(p.bits, &clear)?;
            let at = item.bytes.len();
            item.add(&bytes);
            item.relative.extend(relative.map(|offset| (at + offset, at)));
        }
        Some(())
    }

    fn instruction(&mut self, p: &mut Place<'_>, code: Code) -> Option<Instruction> {
        let op = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        let size = op.memory_size().size();
        for i in 0..op.op_count() {
            if !p.operand(&mut insn, i, op.op_kind(i), size) {
                return None;
            }
        }
        let memory = (0..op.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        if op.can_use_lock_prefix() && memory && p.r.chance(25) {
            insn.set_has_lock_prefix(true);
        }
        if op.can_use_rep_prefix() && p.r.chance(60) {
            if p.r.chance(70) { insn.set_has_rep_prefix(true) } else { insn.set_has_repne_prefix(true) }
        }
        if code.mnemonic() == Mnemonic::Enter {
            insn.set_immediate16(p.r.below(0x80) as u16);
        }
        Some(insn)
    }

    /// Puts prefixes before an instruction that mean something else or nothing; answers how many bytes.
    fn prefixed(&self, p: &mut Place<'_>, insn: &Instruction, bytes: Vec<u8>) -> (Vec<u8>, usize) {
        if !p.r.chance(6)
            || matches!(insn.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave)
            || insn.op_code().encoding() != EncodingKind::Legacy && p.r.chance(80)
        {
            return (bytes, 0);
        }
        let n = if p.r.below(30) == 0 { p.r.below(15) } else { 1 + p.r.below(2) };
        let mut all: Vec<u8> = (0..n)
            .map(|_| p.r.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0xf0, 0x66, 0x40, 0x48, 0x4f]))
            .collect();
        if p.bits != 64 {
            all.retain(|b| !matches!(b, 0x40..=0x4f));
        }
        let n = all.len();
        all.extend(bytes);
        (all, n)
    }

    /// Whether an instruction stays in the data and leaves the addresses' registers alone.
    fn acceptable(&mut self, p: &Place<'_>, insn: &Instruction, bytes: &[u8], loaded: &[Register]) -> bool {
        if insn.is_invalid() {
            // #UD or #GP here: it has to be that on the host.
            // Which of the two, in lengths that only AMD's rules are known of.
            if bytes.len() > 15 && !self.features.amd {
                return false;
            }
            return !select::unknown_only_here(bytes, p.bits) && !select::truncated(bytes, p.bits, self.features.amd);
        }
        // More prefixes may have made it end early.
        if insn.len() != bytes.len() || select::excluded(insn.mnemonic()) || !select::straight(insn) {
            return false;
        }
        // The host's kernel, and the way out of a sequence.
        if insn.mnemonic() == Mnemonic::Int && matches!(insn.immediate8(), 0x80 | 0x82) {
            return false;
        }
        let faults = select::faults(insn.code());
        let roles = p.roles;
        let info = self.info.info(insn);
        let stack = insn.is_stack_instruction();
        let spoils = info.used_registers().iter().any(|u| {
            let full = u.register().full_register();
            full.is_gpr() && writes(u.access()) && {
                let n = full.number();
                roles.contains(n) || n == RSP && !stack
            }
        });
        // A far pointer may be a good one.
        if spoils && (!faults || select::loads_far(insn.mnemonic())) {
            return false;
        }
        if stack && insn.op_count() > 0 && insn.op_kind(0) == OpKind::Register {
            let full = insn.op_register(0).full_register();
            if insn.op_access_writes() && full.is_gpr() && full.number() == RSP {
                return false;
            }
        }
        let good = |r: Register| {
            r == Register::None
                || loaded.contains(&r.full_register())
                || r.is_ip()
                || r.full_register().is_gpr()
                    && (roles.contains(r.full_register().number()) || r.full_register().number() == RSP)
        };
        insn.is_vsib() && good(insn.memory_base())
            || info.used_memory().iter().all(|m| good(m.base()) && (good(m.index()) || m.index() == Register::AL))
            || faults
    }

    /// Loads what an instruction uses without naming it; answers the registers that hold addresses then.
    fn prepare(&mut self, p: &mut Place<'_>, insn: &Instruction, item: &mut Item) -> Option<Vec<Register>> {
        use Mnemonic as M;
        let free = |p: &Place<'_>, n: usize| !p.roles.contains(n);
        let mut loaded = Vec::new();
        let mut pointer = |p: &mut Place<'_>, item: &mut Item, n: usize, size: usize| -> Option<()> {
            if !free(p, n) {
                return None;
            }
            let at = p.target(size);
            load(item, p.bits, n, at);
            loaded.push(Register::RAX + n as u32);
            Some(())
        };
        if insn.is_string_instruction() {
            let info = self.info.info(insn).used_registers().to_vec();
            let uses = |n: usize| info.iter().any(|u| u.register().full_register() == Register::RAX + n as u32);
            for n in [RSI, RDI] {
                if uses(n) {
                    pointer(p, item, n, 64)?;
                }
            }
            if insn.has_rep_prefix() || insn.has_repne_prefix() {
                if !free(p, RCX) {
                    return None;
                }
                let n = if p.r.below(4) == 0 { p.r.below(200) } else { p.r.below(9) };
                load(item, p.bits, RCX, n);
            }
        }
        match insn.mnemonic() {
            M::Xlatb => pointer(p, item, RBX, 256)?,
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => pointer(p, item, RDI, 16)?,
            M::Enter | M::Leave => {
                if !free(p, RBP) {
                    return None;
                }
                // lea rbp, [rsp + 64]
                match p.bits {
                    64 => item.add(&[0x48, 0x8d, 0x6c, 0x24, 0x40]),
                    32 => item.add(&[0x8d, 0x6c, 0x24, 0x40]),
                    _ => item.add(&[0x66, 0x67, 0x8d, 0x6c, 0x24, 0x40]),
                }
                loaded.push(Register::RBP);
            }
            M::Div | M::Idiv if p.r.chance(75) => {
                if !free(p, RDX) || !free(p, RAX) {
                    return None;
                }
                let value = p.r.below(4);
                load(item, p.bits, RDX, value);
                // movzx eax, al
                if p.r.chance(30) {
                    item.add(&[0x0f, 0xb6, 0xc0]);
                }
            }
            M::Mov | M::Pop if writes_segment(insn) => selector(p, insn, item)?,
            // In memory there may be the selector whose limit is the processor's number.
            M::Lsl if insn.op_kind(1) == OpKind::Memory => return None,
            // Or in a register.
            M::Lsl => examined(p, insn, item)?,
            M::Lar | M::Verr | M::Verw if p.r.chance(80) => examined(p, insn, item)?,
            M::Wrfsbase | M::Wrgsbase => {
                let n = insn.op_register(0).full_register().number();
                if !free(p, n) || n == RSP {
                    return None;
                }
                let value = p.r.below(64);
                load(item, 64, n, value);
            }
            M::Bt | M::Bts | M::Btr | M::Btc
                if insn.op_kind(0) == OpKind::Memory && insn.op_kind(1) == OpKind::Register =>
            {
                let n = insn.op_register(1).full_register().number();
                if !free(p, n) || n == RSP {
                    return None;
                }
                let value = p.r.below(0x4000).wrapping_sub(0x2000);
                load(item, p.bits, n, value);
            }
            M::Pop if insn.op_kind(0) == OpKind::Register && insn.op_register(0).full_register() == Register::RSP => {
                return None;
            }
            _ => {}
        }
        if insn.is_vsib() {
            // vmovdqu index, [small numbers]
            let wide = matches!(insn.mnemonic(), M::Vpgatherqd | M::Vpgatherqq | M::Vgatherqps | M::Vgatherqpd);
            let at = if wide { SMALL64 } else { SMALL32 } + p.r.below(8) * 8 - data_base(p.bits);
            let n = insn.memory_index().number() as u32;
            let load = Instruction::with2(
                Code::VEX_Vmovdqu_ymm_ymmm256,
                Register::YMM0 + n,
                iced_x86::MemoryOperand::with_displ(at, p.bits / 8),
            );
            item.add(&encode(p.bits, &load.ok()?)?.0);
        }
        Some(loaded)
    }

    /// An instruction that cannot go elsewhere, for the inside of an item; at most 15 bytes.
    fn filler(&mut self, p: &mut Place<'_>) -> Vec<u8> {
        for _ in 0..20 {
            let code = self.code(p);
            if select::faults(code) || code.op_code().op_count() == 0 || code.is_jcc_short_or_near() {
                continue;
            }
            let Some(item) = self.form(p, code) else { continue };
            if item.count == 1 && item.relative.is_empty() {
                let insn = select::decoded(&item.bytes, p.bits, &self.features);
                if !insn.is_invalid()
                    && insn.flow_control() == iced_x86::FlowControl::Next
                    && !insn.is_stack_instruction()
                {
                    return item.bytes;
                }
            }
        }
        vec![0x90]
    }

    /// A near branch over an instruction, or a loop around one.
    fn branch(&mut self, p: &mut Place<'_>, code: Code) -> Option<Item> {
        let kind = code.op_code().op_kind(0);
        let wide = p.bits == 64;
        use OpCodeOperandKind as K;
        let near = match kind {
            K::br64_1 | K::br64_4 if wide => OpKind::NearBranch64,
            // Of those who heed the prefix.
            K::br16_1 | K::br16_2 if wide && self.features.amd && p.r.below(20) == 0 => {
                return narrow_branch(p, code);
            }
            K::br32_1 | K::br32_4 if !wide => OpKind::NearBranch32,
            K::br16_1 | K::br16_2 if p.bits == 16 => OpKind::NearBranch16,
            K::br16_1 | K::br16_2 if !wide && p.r.below(20) == 0 => OpKind::NearBranch16,
            _ => return None,
        };
        let inside = self.filler(p);
        let counted = code.is_loop() || code.is_loopcc();
        if counted && !p.roles.contains(RCX) && p.r.chance(70) {
            return self.turns(p, code, near, inside);
        }
        if counted && p.roles.contains(RCX) {
            return None;
        }
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(near);
        let length = encode(p.bits, &insn)?.0.len();
        set_branch(&mut insn, (length + inside.len()) as u64);
        let mut item = Item { skips: true, leaves: near == OpKind::NearBranch16 && p.bits != 16, ..Item::default() };
        item.add(&encode(p.bits, &insn)?.0);
        item.add(&inside);
        Some(item)
    }

    /// `mov ecx, n`, an instruction, and back to it.
    fn turns(&mut self, p: &mut Place<'_>, code: Code, near: OpKind, inside: Vec<u8>) -> Option<Item> {
        let body = select::decoded(&inside, p.bits, &self.features);
        let info = self.info.info(&body);
        if near == OpKind::NearBranch16 && p.bits != 16
            || info.used_registers().iter().any(|u| u.register().full_register() == Register::RCX && writes(u.access()))
        {
            return None;
        }
        let mut item = Item::default();
        let n = 1 + p.r.below(6);
        load(&mut item, p.bits, RCX, n);
        let back = item.bytes.len();
        item.add(&inside);
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(near);
        set_branch(&mut insn, back as u64);
        let mut encoder = Encoder::new(p.bits);
        encoder.encode(&insn, item.bytes.len() as u64).ok()?;
        item.add(&encoder.take_buffer());
        Some(item)
    }

    /// A near jump, call or return to the next instruction.
    fn indirect(&mut self, p: &mut Place<'_>, code: Code) -> Option<Item> {
        use Code::*;
        let count = if p.bits == 64 { 16 } else { 8 };
        let n = (0..count).find(|&n| !p.roles.contains(n) && n != RSP && p.r.chance(30))?;
        if p.bits == 32 {
            return indirect_32(p, code, n as u8);
        }
        if p.bits == 16 {
            return indirect_16(code, n as u8);
        }
        if matches!(code, Jmp_rm16 | Call_rm16 | Retnw | Retnw_imm16) {
            // Of those who heed the prefix.
            return (self.features.amd && p.r.chance(10)).then(|| indirect_narrow(code, n as u8));
        }
        let tail: Vec<u8> = match code {
            Jmp_rm64 => {
                let insn = Instruction::with1(code, gpr(n, 8, false)).ok()?;
                encode(64, &insn)?.0
            }
            Call_rm64 => {
                let insn = Instruction::with1(code, gpr(n, 8, false)).ok()?;
                encode(64, &insn)?.0
            }
            Retnq => {
                let push = Instruction::with1(Push_r64, gpr(n, 8, false)).ok()?;
                let mut bytes = encode(64, &push)?.0;
                bytes.push(0xc3);
                bytes
            }
            Retnq_imm16 => {
                let push = Instruction::with1(Push_r64, gpr(n, 8, false)).ok()?;
                let mut bytes = encode(64, &push)?.0;
                bytes.extend([0xc2, p.r.below(4) as u8 * 8, 0]);
                bytes
            }
            _ => return None,
        };
        let mut item = Item::default();
        if p.r.chance(6) {
            // To where no code can be.
            let to = p.r.pick(&W_VALUE);
            load(&mut item, 64, n, to);
            item.add(&tail);
            item.leaves = true;
            return Some(item);
        }
        // lea n, [rip + what follows]
        item.add(&[0x48 | (n as u8 >> 3) << 2, 0x8d, 0x05 | (n as u8 & 7) << 3, tail.len() as u8, 0, 0, 0]);
        item.add(&tail);
        Some(item)
    }
}

/// A jump or call with a 16-bit displacement, whose target is truncated: nothing is there.
fn narrow_branch(p: &mut Place<'_>, code: Code) -> Option<Item> {
    let op = code.op_code();
    let mut bytes = vec![0x66];
    if op.address_size() == 32 {
        bytes.push(0x67);
    }
    if op.table() == iced_x86::OpCodeTableKind::T0F {
        bytes.push(0x0f);
    }
    bytes.push(op.op_code() as u8);
    let short = op.op_kind(0) == OpCodeOperandKind::br16_1;
    bytes.extend(if short { vec![p.r.below(16) as u8] } else { vec![p.r.below(16) as u8, 0] });
    let mut item = Item { leaves: true, ..Item::default() };
    item.add(&bytes);
    Some(item)
}

/// A near jump, call or return in 64-bit code to an address of 16 bits, where nothing is.
fn indirect_narrow(code: Code, n: u8) -> Item {
    use Code::*;
    let mut item = Item { leaves: true, ..Item::default() };
    let with_register = |opcode: &[u8], form: u8| {
        let mut bytes = vec![0x66];
        if n >= 8 {
            bytes.push(0x41);
        }
        bytes.extend(opcode);
        bytes.push(form | n & 7);
        bytes
    };
    match code {
        Jmp_rm16 => item.add(&with_register(&[0xff], 0xe0)),
        Call_rm16 => item.add(&with_register(&[0xff], 0xd0)),
        _ => {
            item.add(&with_register(&[], 0x50));
            item.add(if code == Retnw { &[0x66, 0xc3] } else { &[0x66, 0xc2, 4, 0] });
        }
    }
    item
}

/// A near jump, call or return in 32-bit code, to the next instruction, whose address a call tells.
fn indirect_32(p: &mut Place<'_>, code: Code, n: u8) -> Option<Item> {
    use Code::*;
    let tail = match code {
        Jmp_rm32 => vec![vec![0xff, 0xe0 | n]],
        Call_rm32 => vec![vec![0xff, 0xd0 | n]],
        Jmp_rm16 => vec![vec![0x66, 0xff, 0xe0 | n]],
        Call_rm16 => vec![vec![0x66, 0xff, 0xd0 | n]],
        Retnd => vec![vec![0x50 | n], vec![0xc3]],
        Retnd_imm16 => vec![vec![0x50 | n], vec![0xc2, 4, 0]],
        Retnw => vec![vec![0x66, 0x50 | n], vec![0x66, 0xc3]],
        Retnw_imm16 => vec![vec![0x66, 0x50 | n], vec![0x66, 0xc2, 4, 0]],
        _ => return None,
    };
    // Those of 16 bits lead to where nothing is.
    if matches!(code, Jmp_rm16 | Call_rm16 | Retnw | Retnw_imm16) && !p.r.chance(10) {
        return None;
    }
    let length: usize = tail.iter().map(|t| t.len()).sum();
    let mut item = Item { leaves: matches!(code, Jmp_rm16 | Call_rm16 | Retnw | Retnw_imm16), ..Item::default() };
    item.add(&[0xe8, 0, 0, 0, 0]);
    item.add(&[0x58 | n]);
    item.add(&[0x83, 0xc0 | n, 4 + length as u8]);
    tail.iter().for_each(|t| item.add(t));
    Some(item)
}

/// A near jump, call or return in 16-bit code, to the next instruction.
fn indirect_16(code: Code, n: u8) -> Option<Item> {
    use Code::*;
    // movzx reg, reg of 16 bits: a wide target is inside the segment.
    let wide = [0x66, 0x0f, 0xb7, 0xc0 | n << 3 | n];
    let tail: Vec<Vec<u8>> = match code {
        Jmp_rm16 => vec![vec![0xff, 0xe0 | n]],
        Call_rm16 => vec![vec![0xff, 0xd0 | n]],
        Retnw => vec![vec![0x50 | n], vec![0xc3]],
        Retnw_imm16 => vec![vec![0x50 | n], vec![0xc2, 2, 0]],
        Jmp_rm32 => vec![wide.to_vec(), vec![0x66, 0xff, 0xe0 | n]],
        Call_rm32 => vec![wide.to_vec(), vec![0x66, 0xff, 0xd0 | n]],
        Retnd => vec![wide.to_vec(), vec![0x66, 0x50 | n], vec![0x66, 0xc3]],
        Retnd_imm16 => vec![wide.to_vec(), vec![0x66, 0x50 | n], vec![0x66, 0xc2, 4, 0]],
        _ => return None,
    };
    let length: usize = tail.iter().map(|t| t.len()).sum();
    let mut item = Item::default();
    // call $+3; pop reg; add reg, what follows
    item.add(&[0xe8, 0, 0]);
    item.add(&[0x58 | n]);
    item.add(&[0x83, 0xc0 | n, 4 + length as u8]);
    tail.iter().for_each(|t| item.add(t));
    Some(item)
}

trait WritesFirst {
    fn op_access_writes(&self) -> bool;
}

impl WritesFirst for Instruction {
    fn op_access_writes(&self) -> bool {
        self.mnemonic() == Mnemonic::Pop
    }
}

fn set_branch(insn: &mut Instruction, to: u64) {
    match insn.op0_kind() {
        OpKind::NearBranch16 => insn.set_near_branch16(to as u16),
        OpKind::NearBranch32 => insn.set_near_branch32(to as u32),
        _ => insn.set_near_branch64(to),
    }
}

fn writes_segment(insn: &Instruction) -> bool {
    insn.op_kind(0) == OpKind::Register && insn.op_register(0).is_segment_register()
}

/// Makes the selector that an instruction looks at one that the host's tables have as the guest's.
fn examined(p: &mut Place<'_>, insn: &Instruction, item: &mut Item) -> Option<()> {
    let operand = if matches!(insn.mnemonic(), Mnemonic::Verr | Mnemonic::Verw) { 0 } else { 1 };
    if insn.op_kind(operand) != OpKind::Register {
        return Some(());
    }
    let n = insn.op_register(operand).full_register().number();
    if p.roles.contains(n) || n == RSP {
        return None;
    }
    let value = p.r.pick(&[
        0, 3, 8, 0x0b, 0x10, 0x18, 0x20, 0x23, 0x28, 0x2a, 0x2b, 0x30, 0x33, 0x40, 0x43, 0x07, 0x0f, 0x1f, 0x27, 0x2f,
        0x3f, 0x83,
    ]);
    load(item, p.bits, n, value);
    Some(())
}

/// Makes the selector that an instruction loads one of those that there are.
fn selector(p: &mut Place<'_>, insn: &Instruction, item: &mut Item) -> Option<()> {
    let value = p.r.pick(&[
        0x2b, 0x2b, 0x2b, 0x28, 0x29, 0x33, 0x23, 0, 3, 0x18, 0x10, 0x4b, 0x83, 0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f,
        0x37, 0x3f, 0x0e,
    ]);
    if insn.mnemonic() == Mnemonic::Pop {
        // push imm8
        item.add(&[0x6a, value]);
        return Some(());
    }
    if insn.op_kind(1) != OpKind::Register {
        return None;
    }
    let n = insn.op_register(1).full_register().number();
    if p.roles.contains(n) || n == RSP {
        return None;
    }
    load(item, p.bits, n, value.into());
    Some(())
}
