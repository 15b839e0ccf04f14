//! Random instructions, executed by the translator and by the host's processor from the same registers, flags and
//! memory.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use iced_x86::{
    Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::*;
use crate::native::{Unit, needs_alignment, unit_of};

/// Where the host has its data, at the guest's addresses, and the code around an instruction.
const HOST_CODE: u64 = 0x2000_0000;
const LEN: usize = 0x1_0000;
/// Offsets in the code's page: registers before and after.
const IN: u64 = HOST_CODE;
const OUT: u64 = HOST_CODE + 0x400;
const SAVED_SP: u64 = HOST_CODE + 0x800;
/// x87 images before and after.
const X87_IN: u64 = HOST_CODE + 0xa00;
const X87_OUT: u64 = HOST_CODE + 0xc00;
const ENTRY: u64 = HOST_CODE + 0x1000;
/// Registers that hold addresses in generated instructions: never written.
const BASE: Register = Register::RBX;
const INDEX: Register = Register::R12;
const ARITHMETIC: u64 = 0x8d5;

/// Everything an instruction can depend on or change.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Machine64 {
    gpr: [u64; 16],
    flags: u64,
    ymm: [[u64; 4]; 16],
    /// The x87 unit as FXSAVE has it: control, status and tags; registers.
    x87: [u8; 160],
}

/// Memory of this process at the addresses above.
struct HostSide {
    data: NonNull<u8>,
    code: NonNull<u8>,
}

impl HostSide {
    fn new() -> Option<HostSide> {
        let map = |at: u64, exec: ProtFlags| {
            // SAFETY: MAP_FIXED_NOREPLACE takes only addresses that nothing has.
            let p = unsafe {
                mmap_anonymous(
                    at as *mut _,
                    LEN,
                    ProtFlags::READ | ProtFlags::WRITE | exec,
                    MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
                )
            };
            p.ok().and_then(|p| NonNull::new(p.cast::<u8>()))
        };
        Some(HostSide { data: map(SHARED, ProtFlags::empty())?, code: map(HOST_CODE, ProtFlags::EXEC)? })
    }

    fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped, and this value's alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), LEN) }
    }

    fn words(&mut self, at: u64, n: usize) -> &mut [u64] {
        // SAFETY: inside the mapping, aligned, this value's alone.
        unsafe { std::slice::from_raw_parts_mut((at as *mut u8).cast::<u64>(), n) }
    }

    fn run(&mut self, insns: &[u8], before: &Machine64) -> Machine64 {
        let words = self.words(IN, 17 + 64 + 15);
        words[..16].copy_from_slice(&before.gpr);
        words[16] = before.flags | 2;
        for (i, y) in before.ymm.iter().enumerate() {
            words[32 + 4 * i..36 + 4 * i].copy_from_slice(y);
        }
        let image = self.words(X87_IN, 64);
        image.fill(0);
        for (to, from) in image.iter_mut().zip(before.x87.chunks_exact(8)) {
            *to = u64::from_le_bytes(from.try_into().unwrap());
        }
        image[3] = 0x1f80;
        let code = around(insns);
        // SAFETY: inside the mapping; the code keeps to the calling convention, given instructions that only use the
        // registers it saves and the data mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), ENTRY as *mut u8, code.len());
            let f: extern "C" fn() = std::mem::transmute(ENTRY as usize);
            f();
        }
        let words = self.words(OUT, 32 + 64);
        let mut after = *before;
        after.gpr.copy_from_slice(&words[..16]);
        after.gpr[4] = before.gpr[4];
        after.flags = words[16];
        for (i, y) in after.ymm.iter_mut().enumerate() {
            y.copy_from_slice(&words[32 + 4 * i..36 + 4 * i]);
        }
        let image = self.words(X87_OUT, 20);
        for (to, from) in after.x87.chunks_exact_mut(8).zip(image) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        after.clear_pointers();
        after
    }
}

impl Drop for HostSide {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nothing refers to it any more.
        unsafe {
            let _ = munmap(self.data.as_ptr().cast(), LEN);
            let _ = munmap(self.code.as_ptr().cast(), LEN);
        }
    }
}

/// Loads every register, executes, stores every register.
fn around(insns: &[u8]) -> Vec<u8> {
    let mut c = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
    let absolute = |c: &mut Vec<u8>, opcode: &[u8], reg: u8, at: u64| {
        c.extend(opcode);
        c.extend([0x04 | reg << 3, 0x25]);
        c.extend((at as u32).to_le_bytes());
    };
    let gpr = |c: &mut Vec<u8>, op: u8, n: u8, at: u64| absolute(c, &[0x48 | (n >> 3) << 2, op], n & 7, at);
    let ymm = |c: &mut Vec<u8>, op: u8, n: u8, at: u64| absolute(c, &[0xc5, 0x7e | (1 - (n >> 3)) << 7, op], n & 7, at);
    gpr(&mut c, 0x89, 4, SAVED_SP);
    absolute(&mut c, &[0x48, 0x0f, 0xae], 1, X87_IN);
    for n in 0..16 {
        ymm(&mut c, 0x6f, n, IN + 256 + 32 * u64::from(n));
    }
    absolute(&mut c, &[0xff], 6, IN + 128);
    c.push(0x9d);
    for n in (0..16).filter(|n| *n != 4) {
        gpr(&mut c, 0x8b, n, IN + 8 * u64::from(n));
    }
    c.extend(insns);
    for n in (0..16).filter(|n| *n != 4) {
        gpr(&mut c, 0x89, n, OUT + 8 * u64::from(n));
    }
    c.push(0x9c);
    absolute(&mut c, &[0x8f], 0, OUT + 128);
    for n in 0..16 {
        ymm(&mut c, 0x7f, n, OUT + 256 + 32 * u64::from(n));
    }
    absolute(&mut c, &[0x48, 0x0f, 0xae], 0, X87_OUT);
    // fninit; cld; vzeroupper
    c.extend([0xdb, 0xe3, 0xfc, 0xc5, 0xf8, 0x77]);
    gpr(&mut c, 0x8b, 4, SAVED_SP);
    c.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
    c
}

impl Machine64 {
    /// Where the last x87 instruction was, is another thing on each side; and so are the bytes above a register.
    fn clear_pointers(&mut self) {
        self.x87[6..32].fill(0);
        for r in self.x87[32..].chunks_exact_mut(16) {
            r[10..].fill(0);
        }
    }
}

/// An extended-precision number: of a double, or a pattern that is special.
fn extended(r: &mut Random) -> [u8; 10] {
    let (mantissa, exponent) = match r.below(8) {
        0 => (r.value(), r.next() as u16),
        1 => (0, 0),
        2 => (1 << 63, 0x7fff),
        3 => (3 << 62 | r.next() >> 2, 0x7fff),
        4 => (1 << 63, 0x3fff + r.below(20) as u16),
        _ => (r.next() | 1 << 63, 0x3fc0 + r.below(0x80) as u16),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | (r.next() as u16 & 0x8000)).to_le_bytes());
    bytes
}

fn random_x87(r: &mut Random) -> [u8; 160] {
    let mut x = [0; 160];
    let rounding = (r.below(4) << 10 | [0, 2, 3][r.below(3) as usize] << 8) as u16;
    x[..2].copy_from_slice(&(0x3f | rounding).to_le_bytes());
    x[2..4].copy_from_slice(&((r.below(8) << 11) as u16).to_le_bytes());
    x[4] = if r.below(3) == 0 { r.next() as u8 } else { 0xff };
    for i in 0..8 {
        x[32 + 16 * i..42 + 16 * i].copy_from_slice(&extended(r));
    }
    x
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Values at which arithmetic turns.
    fn value(&mut self) -> u64 {
        let v = self.next();
        match self.below(8) {
            0 => 0,
            1 => !0,
            2 => 1 << (v & 63),
            3 => (1 << (v & 63)) - 1,
            4 => v & 0xff,
            5 => v as i32 as u64,
            _ => v,
        }
    }
}

/// What random instructions are taken from.
struct Generator {
    info: InstructionInfoFactory,
    features: crate::cpuid::Features,
    integer: bool,
    vector: bool,
    x87: bool,
}

impl Generator {
    fn new(class: Class) -> Generator {
        let CpuModel::X86(model) = CpuModel::parse(GuestArch::X86_64, "max").unwrap() else { unreachable!() };
        let model = model.restricted_to(cpuid::supported()).unwrap();
        Generator {
            info: InstructionInfoFactory::new(),
            features: crate::cpuid::Features::new(&model, 0),
            integer: class == Class::Integer,
            vector: class == Class::Vector,
            x87: class == Class::X87,
        }
    }

    /// A random instruction that can run on its own, and its bytes.
    fn instruction(&mut self, r: &mut Random) -> (Instruction, Vec<u8>) {
        loop {
            let bytes = self.bytes(r);
            let insn = crate::decode::decode(&bytes, 64, 0, &self.features);
            if insn.is_invalid() || !self.suitable(&insn) {
                continue;
            }
            if let Some(done) = self.placed(r, insn) {
                return done;
            }
        }
    }

    fn bytes(&self, r: &mut Random) -> Vec<u8> {
        let mut b = Vec::new();
        if self.x87 {
            if r.below(3) > 0 {
                b.extend([0xd8 | r.below(8) as u8, r.next() as u8]);
            } else {
                b.extend([0x0f, r.next() as u8]);
            }
            b.extend((0..10).map(|_| r.next() as u8));
            return b;
        }
        if r.below(4) == 0 {
            b.push([0x66, 0xf2, 0xf3, 0xf0][r.below(4) as usize]);
        }
        match r.below(if self.vector { 8 } else { 5 }) {
            0..=2 => {
                if r.below(2) == 0 {
                    b.push(0x40 | r.below(16) as u8);
                }
                if self.vector && !self.integer || r.below(3) == 0 {
                    b.push(0x0f);
                }
            }
            3 => {
                b.push(0x40 | r.below(16) as u8);
                b.push(0x0f);
            }
            4 => {
                b.push(0x40 | r.below(16) as u8);
                b.extend([0x0f, if r.below(2) == 0 { 0x38 } else { 0x3a }]);
            }
            _ => {
                b.clear();
                b.extend([0xc4, r.next() as u8 & 0xe0 | (1 + r.below(3) as u8), r.next() as u8]);
            }
        }
        b.extend((0..12).map(|_| r.next() as u8));
        b.truncate(15);
        b
    }

    fn suitable(&mut self, insn: &Instruction) -> bool {
        use Mnemonic as M;
        let unit = unit_of(insn);
        let class = match unit {
            Unit::Integer => self.integer,
            Unit::Sse | Unit::Avx => self.vector,
            Unit::X87 | Unit::Mmx => self.x87,
        };
        let excluded = matches!(
            insn.mnemonic(),
            M::Div
                | M::Idiv
                | M::In
                | M::Out
                | M::Hlt
                | M::Cli
                | M::Sti
                | M::Cpuid
                | M::Rdtsc
                | M::Rdtscp
                | M::Rdpid
                | M::Rdrand
                | M::Rdseed
                | M::Xgetbv
                | M::Xsetbv
                | M::Syscall
                | M::Int
                | M::Int1
                | M::Int3
                | M::Ud0
                | M::Ud1
                | M::Ud2
                | M::Std
                | M::Xlatb
                | M::Ldmxcsr
                | M::Vldmxcsr
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Invd
                | M::Wbinvd
                | M::Rdmsr
                | M::Wrmsr
                | M::Rdpmc
                | M::Pause
                | M::Swapgs
                | M::Stac
                | M::Clac
                | M::Clts
                | M::Rsm
                | M::Cmpxchg16b
                | M::Sysenter
                | M::Wait
                | M::Vzeroupper
                | M::Vzeroall
                | M::Movnti
                | M::Rdfsbase
                | M::Rdgsbase
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Smsw
                | M::Sldt
                | M::Str
                | M::Sgdt
                | M::Sidt
                | M::Lar
                | M::Lsl
                | M::Verr
                | M::Verw
                | M::Xabort
                | M::Xbegin
                | M::Enqcmd
                | M::Ptwrite
                | M::Wbnoinvd
                | M::Fldcw
                | M::Fnstcw
                | M::Fnstsw
                | M::Fnstenv
                | M::Fldenv
                | M::Fnsave
                | M::Frstor
                | M::Fninit
                | M::Fnclex
                | M::Fneni
                | M::Fndisi
                | M::Fnsetpm
                | M::Fstdw
                | M::Fstsg
                | M::Frstpm
                | M::Femms
                | M::Maskmovq
                | M::Movntq
                | M::Fxsave64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Xsave64
                | M::Xsavec
                | M::Xsavec64
                | M::Xsaveopt
                | M::Xsaveopt64
                | M::Xrstor
                | M::Xrstor64
                | M::Invlpg
                | M::Nop
                | M::Reservednop
                | M::Prefetch
                | M::Prefetchw
                | M::Lds
                | M::Les
                | M::Lfs
                | M::Lgs
                | M::Lss
                | M::Arpl
                | M::Monitor
                | M::Mwait
                | M::Stmxcsr
                | M::Vstmxcsr
                | M::Fxsave
                | M::Xsave
                | M::Clflush
                | M::Clflushopt
                | M::Clwb
        );
        if !class || excluded || insn.is_string_instruction() || insn.is_privileged() || insn.is_vsib() {
            return false;
        }
        if insn.flow_control() != iced_x86::FlowControl::Next || insn.is_stack_instruction() {
            return false;
        }
        let names_system = (0..insn.op_count()).any(|i| {
            insn.op_kind(i) == OpKind::Register && {
                let register = insn.op_register(i);
                register.is_segment_register()
                    || register.is_cr()
                    || register.is_dr()
                    || register.is_tr()
                    || register.is_bnd()
            }
        });
        if names_system || insn.memory_size() == iced_x86::MemorySize::Unknown && insn.op_kind(0) == OpKind::Memory {
            return false;
        }
        let used = self.info.info(insn);
        !used.used_registers().iter().any(|u| {
            let full = u.register().full_register();
            let write = !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            full == Register::RSP || write && (full == BASE || full == INDEX)
        })
    }

    /// Gives the memory operand an address in the data.
    fn placed(&mut self, r: &mut Random, mut insn: Instruction) -> Option<(Instruction, Vec<u8>)> {
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        if (0..insn.op_count()).any(|i| {
            !matches!(
                insn.op_kind(i),
                OpKind::Register
                    | OpKind::Memory
                    | OpKind::Immediate8
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
                    | OpKind::Immediate8_2nd
            )
        }) {
            return None;
        }
        // Bit strings reach far beyond their operand.
        let strings = [Mnemonic::Bt, Mnemonic::Bts, Mnemonic::Btr, Mnemonic::Btc];
        if memory && strings.contains(&insn.mnemonic()) && insn.op_kind(1) == OpKind::Register {
            return None;
        }
        if memory || insn.mnemonic() == Mnemonic::Lea {
            insn.set_memory_base(BASE);
            insn.set_memory_index(if r.below(2) == 0 { INDEX } else { Register::None });
            insn.set_memory_index_scale(1 << r.below(4));
            insn.set_segment_prefix(Register::None);
            insn.set_memory_displ_size(8);
            // Aligned, unless nothing asks for that.
            let step = if needs_alignment(&insn) || insn.memory_size().size() > 32 { 64 } else { 1 };
            let distance = if step == 64 { r.below(128) as i64 - 64 } else { r.below(2000) as i64 - 1000 } * step;
            insn.set_memory_displacement64(distance as u64);
            if step == 64 {
                insn.set_memory_index(Register::None);
            }
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&insn, 0).ok()?;
        let bytes = encoder.take_buffer();
        let again = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        (again.code() == insn.code()).then_some((again, bytes))
    }
}

fn random_state(r: &mut Random) -> Machine64 {
    let mut m = Machine64 {
        gpr: std::array::from_fn(|_| r.value()),
        flags: r.next() & ARITHMETIC,
        ymm: std::array::from_fn(|_| std::array::from_fn(|_| r.value())),
        x87: random_x87(r),
    };
    // Doubles and singles that mean something.
    for y in &mut m.ymm {
        match r.below(4) {
            0 => *y = std::array::from_fn(|_| ((r.next() as i32) as f64 / 1024.0).to_bits()),
            1 => {
                *y = std::array::from_fn(|_| {
                    let f = |v: u64| u64::from(((v as i16) as f32 / 16.0).to_bits());
                    f(r.next()) | f(r.next()) << 32
                });
            }
            _ => {}
        }
    }
    m.gpr[3] = SHARED + 0x8000;
    m.gpr[4] = STACK;
    m.gpr[12] = r.below(64);
    m
}

fn set_guest(g: &mut Guest, m: &Machine64) {
    g.change(|s| {
        s.gpr = m.gpr;
        s.rip = CODE;
        s.rflags = m.flags | 2;
        s.mp_state = MpState::Running;
        s.xsave[..160].copy_from_slice(&m.x87);
        s.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        for (i, y) in m.ymm.iter().enumerate() {
            for (j, w) in y.iter().enumerate() {
                let at = if j < 2 { 160 + 16 * i + 8 * j } else { 576 + 16 * i + 8 * (j - 2) };
                s.xsave[at..at + 8].copy_from_slice(&w.to_le_bytes());
            }
        }
        s.xsave[512] = 7;
    });
}

fn guest_state(s: &X86State) -> Machine64 {
    let word = |at: usize| u64::from_le_bytes(s.xsave[at..at + 8].try_into().unwrap());
    let mut m = Machine64 {
        gpr: s.gpr,
        flags: s.rflags,
        ymm: std::array::from_fn(|i| {
            std::array::from_fn(|j| word(if j < 2 { 160 + 16 * i + 8 * j } else { 576 + 16 * i + 8 * (j - 2) }))
        }),
        x87: s.xsave[..160].try_into().unwrap(),
    };
    m.clear_pointers();
    m
}

/// RFLAGS bits of iced's.
fn rflags(iced: u32) -> u64 {
    let bits = [
        (iced_x86::RflagsBits::OF, RFLAGS_OF),
        (iced_x86::RflagsBits::SF, RFLAGS_SF),
        (iced_x86::RflagsBits::ZF, RFLAGS_ZF),
        (iced_x86::RflagsBits::AF, RFLAGS_AF),
        (iced_x86::RflagsBits::CF, RFLAGS_CF),
        (iced_x86::RflagsBits::PF, RFLAGS_PF),
    ];
    bits.iter().filter(|(b, _)| iced & b != 0).fold(0, |m, (_, f)| m | f)
}

/// Flags that the manual leaves undefined after a sequence; `None` if one is read in it.
fn undefined(insns: &[Instruction]) -> Option<u64> {
    let mut undefined = 0;
    for i in insns {
        if rflags(i.rflags_read()) & undefined != 0 {
            return None;
        }
        // A count of zero, which only the run shows, changes nothing.
        let counted = matches!(
            i.mnemonic(),
            Mnemonic::Shl
                | Mnemonic::Sal
                | Mnemonic::Shr
                | Mnemonic::Sar
                | Mnemonic::Rol
                | Mnemonic::Ror
                | Mnemonic::Rcl
                | Mnemonic::Rcr
                | Mnemonic::Shld
                | Mnemonic::Shrd
        );
        if !counted {
            undefined &= !rflags(i.rflags_modified());
        }
        undefined |= rflags(i.rflags_undefined());
        // The decoder takes a count that is a multiple of the width and CF for none.
        if matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
            undefined |= RFLAGS_OF;
        }
    }
    Some(undefined)
}

fn compare(g: &mut Guest, host: &mut HostSide, generator: &mut Generator, r: &mut Random, rounds: usize) {
    let mut insns_run = 0;
    while insns_run < rounds {
        let n = 1 + r.below(6) as usize;
        let (insns, mut code) = (0..n).fold((Vec::new(), Vec::new()), |(mut insns, mut code), _| {
            let (insn, bytes) = generator.instruction(r);
            insns.push(insn);
            code.extend(bytes);
            (insns, code)
        });
        let Some(undefined) = undefined(&insns) else { continue };
        insns_run += n;
        let before = random_state(r);
        for word in host.data()[0x7000 - 64..0x9000 + 64].chunks_exact_mut(8) {
            word.copy_from_slice(&r.value().to_le_bytes());
        }
        let memory = host.data().to_vec();
        g.put(SHARED, &memory);
        if std::env::var_os("TRACE").is_some() {
            eprintln!("{:?} {code:x?}", insns.iter().map(|i| format!("{i}")).collect::<Vec<_>>());
        }
        let expected = host.run(&code, &before);
        code.push(0xf4);
        g.put(CODE, &code);
        set_guest(g, &before);
        let state = g.run();
        let text: Vec<String> = insns.iter().map(|i| format!("{i} ({:?})", i.code())).collect();
        assert_eq!(state.rip, CODE + code.len() as u64, "{text:#?} {code:x?} trapped");
        let got = guest_state(&state);
        let flags = ARITHMETIC & !undefined;
        for i in 0..16 {
            assert_eq!(got.gpr[i], expected.gpr[i], "register {i}: {text:#?} {code:x?}\nbefore {before:x?}");
            assert_eq!(got.ymm[i], expected.ymm[i], "ymm{i}: {text:#?} {code:x?}\nbefore {before:x?}");
        }
        assert!(
            got.x87 == expected.x87,
            "x87: {text:#?} {code:x?}\nbefore {:x?}\ngot      {:x?}\nexpected {:x?}",
            before.x87,
            got.x87,
            expected.x87
        );
        assert_eq!(got.flags & flags, expected.flags & flags, "flags: {text:#?} {code:x?}\nbefore {before:x?}");
        let mut after = vec![0; LEN];
        g.get(SHARED, &mut after);
        assert!(after == host.data(), "memory: {text:#?} {code:x?}");
    }
}

/// What instructions are tried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Integer,
    Vector,
    X87,
}

fn against_the_host(class: Class, rounds: usize, seed: u64) {
    if !is_x86_feature_detected!("avx") {
        println!("SKIPPED (random instructions): the host has no AVX");
        return;
    }
    both(|mut g| {
        let Some(mut host) = HostSide::new() else {
            println!("SKIPPED (random instructions): the addresses are taken");
            return;
        };
        g.long();
        let mut generator = Generator::new(class);
        compare(&mut g, &mut host, &mut generator, &mut Random(seed), rounds);
    });
}

/// How many instructions: more by `MIMUS_TEST_ROUNDS`.
fn rounds() -> usize {
    std::env::var("MIMUS_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6_000)
}

fn seed() -> u64 {
    std::env::var("MIMUS_TEST_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0x1234_5678_9abc_def1)
}

#[test]
fn random_integer_instructions() {
    against_the_host(Class::Integer, rounds(), seed());
}

#[test]
fn random_vector_instructions() {
    against_the_host(Class::Vector, rounds(), seed());
}

#[test]
fn random_x87_and_mmx_instructions() {
    against_the_host(Class::X87, rounds(), seed());
}
