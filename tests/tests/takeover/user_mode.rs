//! 64-bit user code: a KVM runs it on the processor itself, so that it is an oracle for the translator.

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;
use mimus_arch::x86::{Segment, X86State};

use crate::cases::noise;
use crate::guest::*;

/// Sequences, and instructions in each. `MIMUS_TEST_ROUNDS` and `MIMUS_TEST_SEED` ask for other sequences.
const SEQUENCES: u64 = 250;
const LENGTH: usize = 60;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

/// Long mode, user, at [`USER`].
pub fn user(s: &mut X86State) {
    long(s);
    let dpl = 3 << attr::DPL_SHIFT;
    s.cs = Segment::flat(USER_CODE, attr::CODE | attr::L | dpl);
    let data = Segment::flat(USER_DATA, attr::DATA | attr::DB | dpl);
    (s.ss, s.ds, s.es, s.fs, s.gs) = (data, data, data, data, data);
    s.rip = USER;
    s.gpr[RSP] = USER_STACK - 0x100;
    s.rflags |= RFLAGS_IF;
}

struct Pick<F: FnMut() -> u64>(F);

impl<F: FnMut() -> u64> Pick<F> {
    fn below(&mut self, n: usize) -> usize {
        ((self.0)() >> 20) as usize % n
    }
    fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
    fn r64(&mut self) -> AsmRegister64 {
        self.of(&[rax, rcx, rdx, rbx, rsi, rdi, r8, r9, r10, r11])
    }
    fn r32(&mut self) -> AsmRegister32 {
        self.of(&[eax, ecx, edx, ebx, esi, edi, r8d, r9d])
    }
    fn r16(&mut self) -> AsmRegister16 {
        self.of(&[ax, cx, dx, bx, si, di, r8w, r9w])
    }
    fn r8(&mut self) -> AsmRegister8 {
        self.of(&[al, cl, dl, bl, sil, dil, r8b, r9b])
    }
    fn high(&mut self) -> AsmRegister8 {
        self.of(&[ah, ch, dh, bh, al, cl])
    }
    fn x(&mut self) -> AsmRegisterXmm {
        self.of(&[xmm0, xmm1, xmm2, xmm3, xmm4, xmm8, xmm15])
    }
    fn y(&mut self) -> AsmRegisterYmm {
        self.of(&[ymm0, ymm1, ymm2, ymm3, ymm4, ymm8, ymm15])
    }
    /// Somewhere in the data; seldom where there is none, or across pages.
    fn at(&mut self) -> AsmMemoryOperand {
        match self.below(200) {
            0 => r12 + (UNMAPPED - DATA) as i32,
            1 => r12 + (UNMAPPED - DATA) as i32 - 3,
            2..10 => r12 + 0xffb,
            _ => r12 + (self.below(0xf0) * 16) as i32 + self.of(&[0, 0, 0, 4, 8, 5]),
        }
    }
    /// The same at a multiple of 32.
    fn aligned(&mut self) -> AsmMemoryOperand {
        r12 + (self.below(0x70) * 32) as i32
    }
    fn imm(&mut self) -> i32 {
        (self.0)() as i32
    }
    fn small(&mut self) -> u32 {
        self.below(64) as u32
    }
}

fn integer<F: FnMut() -> u64>(a: &mut CodeAssembler, p: &mut Pick<F>) -> Assembled {
    let kind = p.below(46);
    one_integer(a, p, kind)?;
    // What leaves flags undefined is followed by something that defines them.
    if matches!(kind, 4 | 5 | 6 | 8 | 16..=24 | 25..=28 | 31..=34) { a.cmp(rax, rcx) } else { Ok(()) }
}

fn one_integer<F: FnMut() -> u64>(a: &mut CodeAssembler, p: &mut Pick<F>, kind: usize) -> Assembled {
    match kind {
        0 => a.add(p.r64(), p.r64()),
        1 => a.adc(p.r32(), p.r32()),
        2 => a.sub(p.r64(), qword_ptr(p.at())),
        3 => a.sbb(byte_ptr(p.at()), p.r8()),
        4 => a.xor(p.r16(), p.r16()),
        5 => a.and(p.r64(), p.imm()),
        6 => a.or(dword_ptr(p.at()), p.r32()),
        7 => a.cmp(p.high(), p.high()),
        8 => a.test(p.r8(), p.r8()),
        9 => a.mov(qword_ptr(p.at()), p.r64()),
        10 => a.mov(p.r32(), dword_ptr(p.at())),
        11 => a.mov(p.high(), p.high()),
        12 => a.movzx(p.r64(), byte_ptr(p.at())),
        13 => a.movsx(p.r32(), word_ptr(p.at())),
        14 => a.movsxd(p.r64(), p.r32()),
        15 => a.lea(p.r64(), p.r64() + p.r64() * 4 + 0x1234),
        16 => a.shl(p.r64(), p.small()),
        17 => a.shr(p.r32(), cl),
        18 => a.sar(word_ptr(p.at()), cl),
        19 => a.rol(p.r8(), p.small() & 7),
        20 => a.rcr(p.r64(), 1),
        21 => a.shld(p.r64(), p.r64(), p.small()),
        22 => a.imul_2(p.r64(), p.r64()),
        23 => a.imul_3(p.r32(), dword_ptr(p.at()), p.imm()),
        24 => a.mul(p.r64()),
        25 => a.bt(p.r64(), p.r64()),
        26 => a.bts(p.r32(), p.small() & 31),
        27 => a.btr(qword_ptr(p.aligned()), p.small()),
        28 => a.bsr(p.r64(), p.r64()),
        29 => a.bswap(p.r64()),
        30 => a.popcnt(p.r64(), qword_ptr(p.at())),
        31 => a.lzcnt(p.r32(), p.r32()),
        32 => a.tzcnt(p.r64(), p.r64()),
        33 => a.andn(p.r64(), p.r64(), p.r64()),
        34 => a.pdep(p.r64(), p.r64(), p.r64()),
        35 => a.mulx(p.r64(), p.r64(), p.r64()),
        36 => a.rorx(p.r64(), qword_ptr(p.at()), p.small()),
        37 => a.cmovl(p.r64(), p.r64()),
        38 => a.setge(p.r8()),
        39 => a.xadd(p.r64(), p.r64()),
        40 => a.lock().cmpxchg(dword_ptr(p.at()), p.r32()),
        41 => a.crc32(p.r64(), p.r64()),
        42 => a.cdq(),
        43 => a.push(p.r64()),
        44 => a.lahf(),
        _ => a.neg(p.r32()),
    }
}

fn vector<F: FnMut() -> u64>(a: &mut CodeAssembler, p: &mut Pick<F>) -> Assembled {
    match p.below(40) {
        0 => a.movups(p.x(), xmmword_ptr(p.at())),
        1 => a.movaps(xmmword_ptr(p.aligned()), p.x()),
        2 => a.addps(p.x(), p.x()),
        3 => a.mulpd(p.x(), xmmword_ptr(p.aligned())),
        4 => a.divss(p.x(), p.x()),
        5 => a.sqrtsd(p.x(), qword_ptr(p.at())),
        6 => a.cvtsi2sd(p.x(), p.r64()),
        7 => a.cvttss2si(p.r32(), p.x()),
        8 => a.ucomisd(p.x(), p.x()),
        9 => a.pshufb(p.x(), p.x()),
        10 => a.paddw(p.x(), p.x()),
        11 => a.pmaddwd(p.x(), xmmword_ptr(p.aligned())),
        12 => a.psrlq(p.x(), p.small()),
        13 => a.pcmpeqd(p.x(), p.x()),
        14 => a.punpcklbw(p.x(), p.x()),
        15 => a.pextrw(p.r32(), p.x(), p.small() & 7),
        16 => a.movd(p.x(), p.r32()),
        17 => a.pcmpistri(p.x(), p.x(), p.small()),
        18 => a.aesenc(p.x(), p.x()),
        19 => a.pclmulqdq(p.x(), p.x(), p.small() & 0x11),
        20 => a.sha256msg1(p.x(), p.x()),
        21 => a.roundps(p.x(), p.x(), p.small() & 3),
        22 => a.dpps(p.x(), p.x(), p.small()),
        23 => a.vaddps(p.y(), p.y(), ymmword_ptr(p.at())),
        24 => a.vfmadd213pd(p.y(), p.y(), p.y()),
        25 => a.vpermd(p.y(), p.y(), p.y()),
        26 => a.vpaddq(p.y(), p.y(), p.y()),
        27 => a.vpsllvd(p.y(), p.y(), p.y()),
        28 => a.vpbroadcastb(p.y(), p.x()),
        29 => a.vperm2i128(p.y(), p.y(), p.y(), p.small()),
        30 => a.vcvtph2ps(p.y(), p.x()),
        31 => a.vmovdqu(ymmword_ptr(p.at()), p.y()),
        32 => a.vblendps(p.y(), p.y(), p.y(), p.small()),
        33 => a.vpmaskmovd(ymmword_ptr(p.at()), p.y(), p.y()),
        34 => a.vptest(p.y(), p.y()),
        35 => a.vmovmskpd(p.r32(), p.y()),
        36 => a.ldmxcsr(dword_ptr(r12 + 0x1f00)),
        37 => a.vinserti128(p.y(), p.y(), xmmword_ptr(p.at()), p.small() & 1),
        38 => a.vpsadbw(p.y(), p.y(), p.y()),
        _ => a.vcvtdq2pd(p.y(), p.x()),
    }
}

fn x87<F: FnMut() -> u64>(a: &mut CodeAssembler, p: &mut Pick<F>) -> Assembled {
    match p.below(16) {
        0 => a.fld(qword_ptr(p.at())),
        1 => a.fld(tbyte_ptr(p.at())),
        2 => a.fild(dword_ptr(p.at())),
        3 => a.fstp(qword_ptr(p.at())),
        4 => a.fstp(tbyte_ptr(p.at())),
        5 => a.fadd(dword_ptr(p.at())),
        6 => a.fmulp(st1, st0),
        7 => a.fdivr(qword_ptr(p.at())),
        8 => a.fsqrt(),
        9 => a.fchs(),
        10 => a.fxch(st0, st3),
        11 => a.fcomi(st0, st1),
        12 => a.fnstsw(ax),
        13 => a.fld1(),
        14 => a.fscale(),
        _ => a.fprem(),
    }
}

fn sequence(seed: u64) -> Vec<u8> {
    let mut p = Pick(noise(seed));
    assemble(USER, 64, |a| {
        for _ in 0..LENGTH {
            match p.below(8) {
                0..4 => integer(a, &mut p)?,
                4..7 => vector(a, &mut p)?,
                _ => x87(a, &mut p)?,
            }
        }
        a.ud2()
    })
}

fn random_state(s: &mut X86State, seed: u64) {
    let mut next = noise(seed ^ 0xabcd);
    user(s);
    for (i, r) in s.gpr.iter_mut().enumerate().filter(|(i, _)| *i != RSP) {
        *r = if i % 4 == 0 { next() & 0xff } else { next() };
    }
    s.gpr[12] = DATA;
    s.rflags |= next() & (RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF);
    s.xsave = vec![0; 832];
    s.xsave[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    s.xsave[XSAVE_MXCSR..XSAVE_MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    s.xsave[XSAVE_XSTATE_BV] = 7;
    for i in 0..32 {
        s.xsave[160 + i * 8..168 + i * 8].copy_from_slice(&next().to_le_bytes());
        s.xsave[576 + i * 8..584 + i * 8].copy_from_slice(&next().to_le_bytes());
    }
}

fn listing(code: &[u8]) -> String {
    let mut text = String::new();
    for i in &mut Decoder::with_ip(64, code, USER, DecoderOptions::NONE) {
        let mut line = String::new();
        NasmFormatter::new().format(&i, &mut line);
        text.push_str(&format!("{:#x} {line}\n", i.ip()));
    }
    text
}

#[test]
fn random_sequences() {
    let name = "random_sequences";
    let _alone = alone();
    if !kvm(name) {
        return;
    }
    let mut guests = [Engine::Tcg, Engine::Kvm].map(Guest::new);
    for g in &guests {
        // The exception that ends a sequence is noted.
        for vector in 0..32u8 {
            let at = HANDLERS + u64::from(vector) * 16;
            g.gate(vector, at);
            g.code(at, 64, |a| {
                if !matches!(vector, 8 | 10..=14 | 17) {
                    a.push(0)?;
                }
                a.push(i32::from(vector))?;
                a.jmp(HANDLERS + 0x800)
            });
        }
        g.code(HANDLERS + 0x800, 64, |a| {
            a.push(rax)?;
            // Vector, error code, address, flags without IF, which user code on a KVM may see as it is not.
            for (i, from) in [8, 16, 24, 40].into_iter().enumerate() {
                a.mov(rax, qword_ptr(rsp + from))?;
                if i == 3 {
                    a.and(eax, !0x200)?;
                    a.mov(qword_ptr(rsp + from), rax)?;
                }
                a.mov(qword_ptr(TRAPS + 8 * i as u64), rax)?;
            }
            a.mov(rax, cr2)?;
            a.mov(qword_ptr(TRAPS + 32), rax)?;
            a.pop(rax)?;
            crate::cases::end(a)
        });
    }
    let mut faults = 0;
    let (first, sequences) = (number("MIMUS_TEST_SEED", 1), number("MIMUS_TEST_ROUNDS", SEQUENCES));
    for seed in first..first + sequences {
        let code = sequence(seed);
        let ends = guests.each_mut().map(|g| {
            crate::cases::data(g);
            g.store(DATA + 0x1f00, MXCSR_RESET.into());
            g.write(USER, &code);
            g.change(|s| random_state(s, seed));
            g.run_to_stop();
            g.end()
        });
        let [tcg, kvm] = ends;
        faults += u64::from(guests[0].load(TRAPS) != 6);
        let mut tcg = tcg;
        // Marks of accesses that the emulator of the handlers makes are not compared.
        let tables = PML4 as usize..(PT + 0x1000) as usize;
        tcg.memory[tables.clone()].copy_from_slice(&kvm.memory[tables]);
        if std::env::var_os("MIMUS_SHOW").is_some() {
            println!("{}", listing(&code));
        }
        compare(&format!("{name} {seed}"), &kvm, &tcg);
    }
    println!("{name}: {sequences} sequences of {LENGTH} instructions, {faults} ended early");
    assert!(faults < sequences / 2, "{faults}");
}
