//! Instructions in 64-bit supervisor code that a KVM without hardware cannot execute, by kind.

use iced_x86::code_asm::*;

use crate::cases::{Body, run_long};
use crate::guest::*;

#[test]
fn atomics_and_bits() {
    let cases: &[(&str, Body)] = cases! {
        "cmpxchg16b fails": |a| a.cmpxchg16b(xmmword_ptr(r12));
        "lock cmpxchg16b stores": |a| {
            a.mov(rax, qword_ptr(r12 + 16))?;
            a.mov(rdx, qword_ptr(r12 + 24))?;
            a.lock().cmpxchg16b(xmmword_ptr(r12 + 16))
        };
        "cmpxchg16b misaligned": |a| a.cmpxchg16b(xmmword_ptr(r12 + 8));
        "cmpxchg16b unmapped": |a| a.cmpxchg16b(xmmword_ptr(UNMAPPED as i32));
        "cmpxchg16b read-only": |a| a.lock().cmpxchg16b(xmmword_ptr(READ_ONLY as i32));
        "popcnt 64": |a| a.popcnt(rbx, rcx);
        "popcnt 32": |a| a.popcnt(ebx, dword_ptr(r12 + 4));
        "popcnt 16": |a| a.popcnt(bx, cx);
        "popcnt of 0": |a| { a.xor(ecx, ecx)?; a.popcnt(rbx, rcx) };
        "popcnt unmapped": |a| a.popcnt(rbx, qword_ptr(UNMAPPED as i32 + 8));
        "popcnt across pages": |a| a.popcnt(rbx, qword_ptr(UNMAPPED as i32 - 4));
        "popcnt not canonical": |a| { a.mov(rcx, 0x8000_0000_0000u64)?; a.popcnt(rbx, qword_ptr(rcx)) };
        "popcnt stack fault": |a| {
            a.mov(rbx, rsp)?;
            a.mov(rbp, 0x8000_0000_0000u64)?;
            a.popcnt(rax, qword_ptr(rbp))
        };
        "popcnt of a device": |a| a.popcnt(rbx, qword_ptr(HOLE as i32));
        "crc32 8": |a| a.crc32(ebx, cl);
        "crc32 16": |a| a.crc32(ebx, cx);
        "crc32 32": |a| a.crc32(ebx, dword_ptr(r12 + 12));
        "crc32 64": |a| a.crc32(rbx, rcx);
        "adcx": |a| { a.stc()?; a.adcx(rbx, rcx) };
        "adox": |a| a.adox(rbx, qword_ptr(r12));
        "andn": |a| a.andn(rbx, rcx, rdx);
        "bextr": |a| a.bextr(rbx, rcx, rdx);
        "blsi": |a| a.blsi(rbx, rcx);
        "blsr": |a| a.blsr(ebx, ecx);
        "blsmsk": |a| a.blsmsk(rbx, qword_ptr(r12));
        "bzhi": |a| a.bzhi(rbx, rcx, rdx);
        "pdep": |a| a.pdep(rbx, rcx, rdx);
        "pext": |a| a.pext(rbx, rcx, qword_ptr(r12));
        "mulx": |a| a.mulx(rbx, rcx, rsi);
        "rorx": |a| a.rorx(rbx, rcx, 13);
        "sarx": |a| a.sarx(rbx, rcx, rdx);
        "shlx": |a| a.shlx(ebx, ecx, edx);
        "shrx": |a| a.shrx(rbx, qword_ptr(r12), rdx);
        "a loop of them": |a| {
            let mut again = a.create_label();
            a.mov(esi, 100)?;
            a.set_label(&mut again)?;
            a.popcnt(rcx, rdx)?;
            a.add(rdx, rcx)?;
            a.crc32(rdx, rsi)?;
            a.dec(esi)?;
            a.jnz(again)
        };
    };
    run_long("atomics_and_bits", cases, true);
}

#[test]
fn x87_and_mmx() {
    let cases: &[(&str, Body)] = cases! {
        "fwait": |a| a.wait();
        "fldcw, fnstcw": |a| { a.fninit()?; a.mov(word_ptr(r12), 0x27f)?; a.fldcw(word_ptr(r12))?; a.fnstcw(word_ptr(r12 + 2)) };
        "fld, fst": |a| {
            a.fninit()?;
            a.fld(qword_ptr(r12 + 0x400))?;
            a.fld(dword_ptr(r12 + 0x504))?;
            a.fld(tbyte_ptr(r12 + 0x600))?;
            a.fst(qword_ptr(r12 + 0x700))?;
            a.fstp(tbyte_ptr(r12 + 0x708))
        };
        "fild, fist": |a| {
            a.fild(word_ptr(r12))?;
            a.fild(dword_ptr(r12 + 4))?;
            a.fild(qword_ptr(r12 + 8))?;
            a.fistp(qword_ptr(r12 + 0x720))?;
            a.fist(dword_ptr(r12 + 0x728))?;
            a.fisttp(dword_ptr(r12 + 0x72c))
        };
        "arithmetic": |a| {
            a.fninit()?;
            a.fld(qword_ptr(r12 + 0x400))?;
            a.fadd(qword_ptr(r12 + 0x408))?;
            a.fmul(dword_ptr(r12 + 0x500))?;
            a.fld1()?;
            a.fsub_2(st0, st1)?;
            a.fdivp(st1, st0)?;
            a.fsqrt()?;
            a.fchs()?;
            a.fabs()
        };
        "functions": |a| {
            a.fninit()?;
            a.fldpi()?;
            a.fsin()?;
            a.fldl2e()?;
            a.fcos()?;
            a.fpatan()?;
            a.fld1()?;
            a.fscale()?;
            a.f2xm1()?;
            a.fld1()?;
            a.fyl2x()?;
            a.fldln2()?;
            a.fprem()?;
            a.frndint()
        };
        "comparisons": |a| {
            a.fninit()?;
            a.fld(qword_ptr(r12 + 0x400))?;
            a.fld(qword_ptr(r12 + 0x408))?;
            a.fcom_2(st0, st1)?;
            a.fnstsw(ax)?;
            a.fcomi(st0, st1)?;
            a.fcmovb(st0, st1)?;
            a.ftst()?;
            a.fxam()?;
            a.fnstsw(word_ptr(r12 + 0x740))
        };
        "bcd": |a| { a.fninit()?; a.fbld(ptr(r12 + 0x610))?; a.fbstp(ptr(r12 + 0x750)) };
        "stack": |a| { a.fninit()?; a.fld1()?; a.fldz()?; a.fxch(st0, st1)?; a.fincstp()?; a.ffree(st2)?; a.fdecstp() };
        "environment": |a| {
            a.fninit()?;
            a.fldlg2()?;
            a.fnstenv(ptr(r12 + 0x800))?;
            a.fldz()?;
            a.fldenv(ptr(r12 + 0x800))?;
            // The addresses in it are not compared.
            a.and(qword_ptr(r12 + 0x80c), 0)?;
            a.and(qword_ptr(r12 + 0x814), 0)
        };
        "save and restore": |a| {
            a.fninit()?;
            a.fldpi()?;
            a.fnsave(ptr(r12 + 0x900))?;
            a.fld1()?;
            a.frstor(ptr(r12 + 0x900))?;
            a.and(qword_ptr(r12 + 0x90c), 0)?;
            a.and(qword_ptr(r12 + 0x914), 0)
        };
        "a masked exception": |a| { a.fninit()?; a.fld1()?; a.fdiv(qword_ptr(r12 + 0x430))?; a.fnstsw(ax)?; a.fnclex() };
        "an exception": |a| {
            a.fninit()?;
            a.mov(word_ptr(r12), 0x37b)?;
            a.fldcw(word_ptr(r12))?;
            a.fld1()?;
            a.fdiv(qword_ptr(r12 + 0x430))?;
            a.fnstsw(ax)?;
            a.wait()
        };
        "after it": |a| { a.fnclex()?; a.fninit() };
        "stack overflow": |a| {
            a.fninit()?;
            for _ in 0..9 { a.fld1()?; }
            a.fnstsw(ax)
        };
        "unmapped": |a| a.fld(qword_ptr(UNMAPPED as i32));
        "store to a read-only page": |a| { a.fninit()?; a.fld1()?; a.fstp(qword_ptr(READ_ONLY as i32)) };
        "mmx": |a| {
            a.fninit()?;
            a.movd(mm0, ebx)?;
            a.movq(mm1, qword_ptr(r12))?;
            a.paddb(mm0, mm1)?;
            a.pshufw(mm2, mm1, 0x1b)?;
            a.pmaddwd(mm1, mm2)?;
            a.psrlq(mm2, 5)?;
            a.packuswb(mm1, mm0)?;
            a.movq(qword_ptr(r12 + 0x780), mm1)?;
            a.movntq(qword_ptr(r12 + 0x788), mm2)?;
            a.pmovmskb(eax, mm0)?;
            a.pinsrw(mm3, ecx, 2)?;
            a.emms()
        };
    };
    run_long("x87_and_mmx", cases, true);
}

#[test]
fn sse() {
    let cases: &[(&str, Body)] = cases! {
        "moves": |a| {
            a.movd(xmm0, ebx)?;
            a.movq(xmm1, rcx)?;
            a.movq(rdx, xmm1)?;
            a.movss(xmm2, dword_ptr(r12))?;
            a.movsd_2(xmm3, qword_ptr(r12 + 8))?;
            a.movhps(xmm2, qword_ptr(r12 + 16))?;
            a.movlps(qword_ptr(r12 + 0x700), xmm3)?;
            a.movhpd(qword_ptr(r12 + 0x708), xmm2)?;
            a.movmskps(eax, xmm2)?;
            a.movmskpd(ebx, xmm2)?;
            a.lddqu(xmm4, xmmword_ptr(r12 + 3))?;
            a.movntdqa(xmm5, xmmword_ptr(r12 + 32))?;
            a.movddup(xmm6, xmm1)?;
            a.movshdup(xmm7, xmm4)
        };
        "arithmetic": |a| {
            a.movups(xmm0, xmmword_ptr(r12 + 0x500))?;
            a.movups(xmm1, xmmword_ptr(r12 + 0x510))?;
            a.movupd(xmm2, xmmword_ptr(r12 + 0x400))?;
            a.addps(xmm0, xmm1)?;
            a.mulps(xmm1, xmmword_ptr(r12 + 0x500))?;
            a.subpd(xmm2, xmmword_ptr(r12 + 0x410))?;
            a.divpd(xmm2, xmm2)?;
            a.sqrtps(xmm3, xmm0)?;
            a.minps(xmm3, xmm1)?;
            a.maxsd(xmm2, xmm0)?;
            a.haddps(xmm0, xmm1)?;
            a.addsubpd(xmm2, xmm3)?;
            a.rsqrtss(xmm8, xmm1)
        };
        "conversions": |a| {
            a.cvtsi2sd(xmm0, rbx)?;
            a.cvttsd2si(rcx, qword_ptr(r12 + 0x400))?;
            a.cvtps2pd(xmm1, qword_ptr(r12 + 0x500))?;
            a.cvtpd2ps(xmm2, xmmword_ptr(r12 + 0x400))?;
            a.cvtdq2ps(xmm3, xmmword_ptr(r12))?;
            a.cvtps2dq(xmm4, xmmword_ptr(r12 + 0x500))?;
            a.roundpd(xmm5, xmm1, 1)
        };
        "comparisons": |a| {
            a.movsd_2(xmm0, qword_ptr(r12 + 0x400))?;
            a.ucomisd(xmm0, qword_ptr(r12 + 0x408))?;
            a.setb(al)?;
            a.comisd(xmm0, qword_ptr(r12 + 0x420))?;
            a.cmpps(xmm1, xmmword_ptr(r12 + 0x500), 1)?;
            a.pcmpeqb(xmm2, xmm2)?;
            a.pcmpgtd(xmm3, xmmword_ptr(r12))?;
            a.ptest(xmm2, xmm3)
        };
        "integers": |a| {
            a.movdqu(xmm0, xmmword_ptr(r12))?;
            a.movdqu(xmm1, xmmword_ptr(r12 + 16))?;
            a.paddq(xmm0, xmm1)?;
            a.pmuludq(xmm1, xmm0)?;
            a.pshufd(xmm2, xmm1, 0x4e)?;
            a.pshufb(xmm2, xmm0)?;
            a.psadbw(xmm3, xmm2)?;
            a.pmaddubsw(xmm0, xmm2)?;
            a.pblendw(xmm1, xmm0, 0x5a)?;
            a.pextrq(rax, xmm1, 1)?;
            a.pinsrd(xmm4, ecx, 3)?;
            a.pmovsxbw(xmm5, xmm4)?;
            a.phminposuw(xmm6, xmm1)?;
            a.mpsadbw(xmm7, xmm1, 5)?;
            a.psrldq(xmm1, 3)?;
            a.pmovmskb(edx, xmm1)?;
            a.palignr(xmm9, xmm0, 7)
        };
        "strings": |a| {
            a.movdqu(xmm0, xmmword_ptr(r12))?;
            a.pcmpistri(xmm0, xmmword_ptr(r12 + 1), 0x0c)?;
            a.setc(bl)?;
            a.mov(eax, 9)?;
            a.mov(edx, 16)?;
            a.pcmpestrm(xmm0, xmm0, 0x44)
        };
        "ciphers": |a| {
            a.movdqu(xmm1, xmmword_ptr(r12))?;
            a.aesenc(xmm1, xmmword_ptr(r12 + 16))?;
            a.aesdeclast(xmm1, xmm0)?;
            a.aeskeygenassist(xmm2, xmm1, 0x1b)?;
            a.pclmulqdq(xmm2, xmm1, 0x11)?;
            a.sha256rnds2(xmm3, xmm1)?;
            a.sha1msg1(xmm4, xmm2)
        };
        "mxcsr": |a| {
            a.mov(dword_ptr(r12), 0x3f80)?;
            a.ldmxcsr(dword_ptr(r12))?;
            a.cvtpd2ps(xmm0, xmmword_ptr(r12 + 0x400))?;
            a.stmxcsr(dword_ptr(r12 + 4))?;
            a.mov(dword_ptr(r12), 0x1f80)?;
            a.ldmxcsr(dword_ptr(r12))
        };
        "mxcsr with a reserved bit": |a| { a.mov(dword_ptr(r12), 0x1_1f80)?; a.ldmxcsr(dword_ptr(r12)) };
        "masked store": |a| {
            a.lea(rdi, qword_ptr(r12 + 0xa00))?;
            a.movdqu(xmm0, xmmword_ptr(r12))?;
            a.movdqu(xmm1, xmmword_ptr(r12 + 16))?;
            a.maskmovdqu(xmm0, xmm1)
        };
        "#GP of a misaligned operand": |a| a.addps(xmm0, xmmword_ptr(r12 + 0x501));
        "#PF of a load": |a| a.movss(xmm0, dword_ptr(UNMAPPED as i32 + 4));
        "#PF in the second page": |a| a.pmovsxwd(xmm0, qword_ptr(UNMAPPED as i32 - 2));
        "#PF of a store": |a| a.movhps(qword_ptr(READ_ONLY as i32 + 8), xmm0);
        "#XM": |a| {
            a.mov(dword_ptr(r12), 0x1d80)?;
            a.ldmxcsr(dword_ptr(r12))?;
            a.movups(xmm0, xmmword_ptr(r12 + 0x500))?;
            a.divps(xmm0, xmmword_ptr(r12 + 0x510))
        };
        "after it": |a| { a.mov(dword_ptr(r12), 0x1f80)?; a.ldmxcsr(dword_ptr(r12)) };
        "devices": |a| {
            a.movq(xmm0, qword_ptr(HOLE as i32 + 8))?;
            a.addpd(xmm0, xmmword_ptr(HOLE as i32 + 0x40))?;
            a.movss(dword_ptr(HOLE as i32 + 0x20), xmm0)
        };
    };
    run_long("sse", cases, true);
}

#[test]
fn avx() {
    let cases: &[(&str, Body)] = cases! {
        "arithmetic": |a| {
            a.vmovups(ymm0, ymmword_ptr(r12 + 0x500))?;
            a.vmovupd(ymm1, ymmword_ptr(r12 + 0x400))?;
            a.vaddps(ymm2, ymm0, ymmword_ptr(r12 + 0x501))?;
            a.vmulpd(ymm3, ymm1, ymm1)?;
            a.vfmadd231ps(ymm2, ymm0, ymm0)?;
            a.vsqrtpd(ymm4, ymm1)?;
            a.vhaddps(ymm5, ymm0, ymm2)?;
            a.vcvtps2ph(xmmword_ptr(r12 + 0x700), ymm0, 0)?;
            a.vcvtph2ps(ymm6, xmmword_ptr(r12))
        };
        "integers and permutations": |a| {
            a.vmovdqu(ymm0, ymmword_ptr(r12))?;
            a.vpaddd(ymm1, ymm0, ymm0)?;
            a.vpermq(ymm2, ymm1, 0x1b)?;
            a.vperm2f128(ymm3, ymm0, ymm2, 0x21)?;
            a.vpermd(ymm4, ymm0, ymm3)?;
            a.vpsllvd(ymm5, ymm0, ymm1)?;
            a.vpbroadcastw(ymm6, word_ptr(r12 + 6))?;
            a.vbroadcastsd(ymm7, xmm0)?;
            a.vextracti128(xmmword_ptr(r12 + 0x720), ymm4, 1)?;
            a.vpmovmskb(eax, ymm5)?;
            a.vptest(ymm0, ymm1)?;
            a.vpblendvb(ymm8, ymm0, ymm1, ymm2)
        };
        "gathers and masked moves": |a| {
            a.vpcmpeqd(ymm1, ymm1, ymm1)?;
            a.vpsrld(ymm2, ymm1, 25)?;
            a.vpand(ymm2, ymm2, ymmword_ptr(r12))?;
            // ymm0, [r12 + ymm2 * 4], ymm1
            a.db(&[0xc4, 0xc2, 0x75, 0x90, 0x04, 0x94])?;
            a.vmovdqu(ymm3, ymmword_ptr(r12))?;
            a.vpmaskmovd(ymmword_ptr(r12 + 0x740), ymm3, ymm0)?;
            a.vmaskmovps(ymm4, ymm3, ymmword_ptr(r12 + 0x500))
        };
        "three operands keep the upper half clear": |a| {
            a.vpcmpeqd(ymm0, ymm0, ymm0)?;
            a.vaddss(xmm0, xmm0, xmm0)?;
            a.vmovd(xmm1, ebx)?;
            a.vpxor(xmm2, xmm2, xmm2)?;
            a.vzeroupper()
        };
        "vmxcsr": |a| { a.vstmxcsr(dword_ptr(r12))?; a.vldmxcsr(dword_ptr(r12)) };
        "a device": |a| { a.vmovdqu(ymm9, ymmword_ptr(HOLE as i32 + 0x100))?; a.vmovdqu(ymmword_ptr(HOLE as i32 + 0x40), ymm9) };
        "#PF across pages": |a| a.vmovdqu(ymmword_ptr(UNMAPPED as i32 - 16), ymm0);
        "#PF of a masked load": |a| { a.vpcmpeqd(ymm1, ymm1, ymm1)?; a.vmaskmovps(ymm4, ymm1, ymmword_ptr(UNMAPPED as i32)) };
        "no #PF where the mask is clear": |a| { a.vpxor(ymm1, ymm1, ymm1)?; a.vmaskmovps(ymm4, ymm1, ymmword_ptr(UNMAPPED as i32)) };
        "vzeroall": |a| a.vzeroall();
    };
    run_long("avx", cases, true);
}

#[test]
fn state_areas() {
    let cases: &[(&str, Body)] = cases! {
        "xgetbv": |a| { a.xor(ecx, ecx)?; a.xgetbv() };
        "xgetbv of another": |a| { a.mov(ecx, 5)?; a.xgetbv() };
        "xsave": |a| {
            a.fninit()?;
            a.fld1()?;
            a.vpcmpeqd(ymm3, ymm3, ymm3)?;
            a.mov(eax, 7)?;
            a.xor(edx, edx)?;
            a.xsave64(ptr(r12 + 0xc00))?;
            a.and(qword_ptr(r12 + 0xc08), 0)?;
            a.and(qword_ptr(r12 + 0xc10), 0)?;
            a.mov(word_ptr(r12 + 0xc06), 0)
        };
        "xrstor": |a| {
            a.vzeroall()?;
            a.mov(eax, 7)?;
            a.xor(edx, edx)?;
            a.xrstor64(ptr(r12 + 0xc00))
        };
        "xrstor of initial state": |a| {
            a.and(qword_ptr(r12 + 0xe00), 0)?;
            a.mov(eax, 6)?;
            a.xor(edx, edx)?;
            a.xrstor(ptr(r12 + 0xc00))
        };
        "xrstor of a bad header": |a| {
            a.mov(qword_ptr(r12 + 0xe10), 1)?;
            a.mov(eax, 7)?;
            a.xor(edx, edx)?;
            a.xrstor(ptr(r12 + 0xc00))
        };
        "xsave misaligned": |a| { a.mov(eax, 7)?; a.xor(edx, edx)?; a.xsave(ptr(r12 + 0xc20)) };
        "xsetbv without x87": |a| { a.xor(ecx, ecx)?; a.mov(eax, 6)?; a.xor(edx, edx)?; a.xsetbv() };
        "xsetbv": |a| { a.xor(ecx, ecx)?; a.mov(eax, 3)?; a.xor(edx, edx)?; a.xsetbv()?; a.xgetbv() };
        "avx is off": |a| a.vpxor(ymm0, ymm0, ymm0);
        "avx is on": |a| {
            a.xor(ecx, ecx)?;
            a.mov(eax, 7)?;
            a.xor(edx, edx)?;
            a.xsetbv()?;
            a.vpxor(ymm0, ymm0, ymm0)
        };
    };
    run_long("state_areas", cases, false);
}

/// With bits of CR0 set, which are clear afterwards even if there was an exception.
fn with_cr0(a: &mut CodeAssembler, bits: i32, f: Body) -> Assembled {
    let mut after = a.create_label();
    a.lea(r15, ptr(after))?;
    a.mov(rax, cr0)?;
    a.or(eax, bits)?;
    a.mov(cr0, rax)?;
    f(a)?;
    a.set_label(&mut after)?;
    a.mov(rax, cr0)?;
    a.and(eax, !bits)?;
    a.mov(cr0, rax)
}

#[test]
fn system() {
    let cases: &[(&str, Body)] = cases! {
        "int n": |a| a.int(0x2f);
        "int3": |a| a.int3();
        "int1": |a| a.int1();
        "ud0": |a| a.db(&[0x0f, 0xff, 0xc0]);
        "ud1": |a| a.db(&[0x0f, 0xb9, 0xc0]);
        "ud2": |a| a.ud2();
        "stac without smap": |a| a.stac();
        "smap": |a| {
            a.mov(rax, cr4)?;
            a.or(eax, 1 << 21)?;
            a.mov(cr4, rax)?;
            a.stac()?;
            a.popcnt(rbx, qword_ptr(r12))?;
            a.pushfq()?;
            a.pop(rdi)?;
            a.clac()
        };
        "#PF of smap": |a| a.popcnt(rbx, qword_ptr(r12));
        "no smap": |a| {
            a.mov(rax, cr4)?;
            a.and(eax, !(1 << 21))?;
            a.mov(cr4, rax)
        };
        "invpcid": |a| { a.xor(eax, eax)?; a.mov(eax, 2)?; a.and(qword_ptr(r12), 0)?; a.invpcid(rax, xmmword_ptr(r12)) };
        "invpcid of no kind": |a| { a.mov(eax, 4)?; a.invpcid(rax, xmmword_ptr(r12)) };
        "verr": |a| { a.mov(eax, i32::from(USER_DATA))?; a.verr(ax) };
        "verw": |a| { a.mov(eax, i32::from(KERNEL_CODE))?; a.verw(ax) };
        "lar": |a| { a.mov(ecx, i32::from(USER_CODE))?; a.lar(eax, ecx) };
        "lar of nothing": |a| { a.mov(ecx, 0x58)?; a.lar(eax, ecx) };
        "lsl": |a| { a.mov(ecx, i32::from(KERNEL_DATA))?; a.lsl(rax, rcx) };
        "rdtscp": |a| {
            for _ in 0..2 {
                a.mov(r10, r11)?;
                a.rdtscp()?;
                a.shl(rdx, 32)?;
                a.lea(r11, qword_ptr(rax + rdx))?;
            }
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.add(rax, rdx)?;
            // Time goes on, and not backwards, whoever is asked.
            a.cmp(r10, r11)?;
            a.seta(bl)?;
            a.cmp(r11, rax)?;
            a.seta(bh)?;
            a.sub(rax, r10)?;
            a.shr(rax, 40)?;
            a.xor(edx, edx)?;
            a.xor(r10d, r10d)?;
            a.xor(r11d, r11d)?;
            a.test(ebx, ebx)
        };
        "#NM of x87": |a| with_cr0(a, 8, |a| a.fld1());
        "#NM of sse": |a| with_cr0(a, 8, |a| a.addps(xmm0, xmm1));
        "#NM of fwait": |a| with_cr0(a, 8, |a| a.wait());
        "#NM of avx": |a| with_cr0(a, 8, |a| a.vpxor(ymm0, ymm0, ymm0));
        "#UD of sse with EM": |a| with_cr0(a, 4, |a| a.addps(xmm0, xmm1));
        "#NM of x87 with EM": |a| with_cr0(a, 4, |a| a.fld1());
        "single steps": |a| {
            a.pushfq()?;
            a.or(qword_ptr(rsp), 0x100)?;
            a.popfq()?;
            a.popcnt(rbx, rcx)?;
            a.nop()
        };
        "after sti": |a| { a.sti()?; a.popcnt(rbx, rcx)?; a.cli() };
        "sysenter": |a| {
            let mut target = a.create_label();
            a.mov(edi, esp)?;
            a.xor(edx, edx)?;
            for (msr, value) in [(0x174u32, 8u32), (0x175, 0x7f00)] {
                a.mov(ecx, msr)?;
                a.mov(eax, value)?;
                a.wrmsr()?;
            }
            a.mov(ecx, 0x176u32)?;
            a.lea(rax, ptr(target))?;
            a.wrmsr()?;
            a.sysenter()?;
            a.set_label(&mut target)?;
            a.mov(ebx, esp)?;
            a.mov(esp, edi)
        };
    };
    run_long("system", cases, false);
}
