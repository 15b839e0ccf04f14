//! The guests: a few instructions that count for ever, at known addresses.

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use iced_x86::code_asm::*;

    /// Offsets in the ROM, which is seen at [`ROM`] and executes there.
    pub const REAL: u64 = 0x100;
    pub const PROTECTED: u64 = 0x200;
    pub const LOOP32: u64 = 0x240;
    pub const FUNCTION32: u64 = 0x280;
    pub const LONG: u64 = 0x300;
    pub const LOOP64: u64 = 0x340;
    pub const FUNCTION64: u64 = 0x380;
    const GDT: usize = 0x80;
    const GDT_POINTER: usize = 0xb0;

    pub const BUSY: u64 = 0x400;
    /// Where [`busy`] ends.
    pub const END: u64 = 0x5f0;
    const HANDLER: u64 = 0x600;
    const IDT_POINTER: usize = 0x620;
    const IDT: usize = 0x1000;

    pub const ROM: u64 = 0xf_0000;
    /// What [`busy`] works on, and how much of it.
    pub const DATA: u64 = 0x1_0000;
    pub const DATA_LEN: usize = 0x1000;
    /// What the loops count in; in 64-bit mode virtual addresses from 2 MiB on are those from 0 again.
    pub const JIFFIES: u64 = 0x508;

    /// [`rom`] whose loop gives way to one of `rounds` rounds, at [`BUSY`]: arithmetic with flags, calls, x87 and SSE
    /// instructions, string instructions and software interrupts. It ends at [`END`].
    pub fn busy(long: bool, rounds: u32) -> Vec<u8> {
        let mut rom = rom(long);
        let mut put = |at: u64, bytes: &[u8]| rom[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        let handler = (ROM + HANDLER) as u32;
        // One gate, for interrupt 0x80.
        let gate = u64::from(handler & 0xffff) | u64::from(handler >> 16) << 48 | 0x8e00_u64 << 32;
        let (selector, size) = if long { (0x18, 16) } else { (8, 8) };
        put((IDT + 0x80 * size) as u64, &(gate | selector << 16).to_le_bytes());
        if long {
            put((IDT + 0x80 * size + 8) as u64, &0u64.to_le_bytes());
        }
        let limit = (0x81 * size - 1) as u16;
        let base = ROM + IDT as u64;
        put(IDT_POINTER as u64, &[&limit.to_le_bytes()[..], &base.to_le_bytes()[..]].concat());
        macro_rules! program {
            ($bits:literal, $ptr:ident, $iret:ident, $ax:ident $bx:ident $dx:ident) => {{
                let code = assemble($bits, ROM + BUSY, |a| {
                    let (mut again, mut odd, mut function, mut past) =
                        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
                    a.mov($ax, cr4)?;
                    a.or($ax, 0x600)?;
                    a.mov(cr4, $ax)?;
                    a.lidt(ptr(ROM + IDT_POINTER as u64))?;
                    a.mov(ebp, rounds as i32)?;
                    a.fninit()?;
                    a.set_label(&mut again)?;
                    a.inc(dword_ptr(DATA))?;
                    a.mov($ax, $ptr(DATA))?;
                    a.imul_3($ax, $ax, 0x123_4567)?;
                    a.ror($ax, 7)?;
                    a.adc($bx, $ax)?;
                    a.jnp(odd)?;
                    a.sbb($dx, $bx)?;
                    a.set_label(&mut odd)?;
                    a.call(function)?;
                    a.cvtsi2sd(xmm0, eax)?;
                    a.addsd(xmm1, xmm0)?;
                    a.shufpd(xmm2, xmm1, 1)?;
                    a.fild(dword_ptr(DATA))?;
                    a.fldpi()?;
                    a.fmulp(st1, st0)?;
                    a.fstp(qword_ptr(DATA + 16))?;
                    a.int(0x80)?;
                    a.mov(esi, DATA as i32)?;
                    a.mov(edi, DATA as i32 + 0x100)?;
                    a.mov(ecx, 3)?;
                    a.rep().movsd()?;
                    a.dec(ebp)?;
                    a.jnz(again)?;
                    a.jmp(past)?;
                    a.set_label(&mut function)?;
                    a.push($bx)?;
                    a.lea($bx, $ptr($bx + $ax * 4))?;
                    a.xchg($ptr(DATA + 8), $bx)?;
                    a.pop($bx)?;
                    a.ret()?;
                    a.set_label(&mut past)?;
                    a.jmp(ROM + END)
                });
                let handler = assemble($bits, ROM + HANDLER, |a| {
                    a.add(dword_ptr(DATA + 32), 3)?;
                    a.$iret()
                });
                assert!(BUSY + code.len() as u64 <= END);
                (code, handler)
            }};
        }
        let (code, handler) = if long {
            program!(64, qword_ptr, iretq, rax rbx rdx)
        } else {
            program!(32, dword_ptr, iretd, eax ebx edx)
        };
        put(BUSY, &code);
        put(HANDLER, &handler);
        put(END, &[0xeb, 0xfe]);
        let (at, bits) = if long { (LOOP64, 64) } else { (LOOP32, 32) };
        put(at, &assemble(bits, ROM + at, |a| a.jmp(ROM + BUSY)));
        rom
    }

    fn assemble(bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
        let mut a = CodeAssembler::new(bits).expect("an assembler");
        f(&mut a).and_then(|()| a.assemble(at)).expect("code")
    }

    /// A ROM that goes from real mode to protected mode and, if `long`, on to 64-bit mode.
    pub fn rom(long: bool) -> Vec<u8> {
        let mut rom = vec![0xf4; 0x1_0000];
        let mut put = |at: u64, bytes: &[u8]| rom[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        // jmp f000:0100
        put(0xfff0, &[0xea, 0x00, 0x01, 0x00, 0xf0]);
        // 8: 32-bit code, 0x10: data, 0x18: 64-bit code.
        for (i, entry) in
            [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_9b00_0000_ffff_u64].iter().enumerate()
        {
            put((GDT + 8 * i) as u64, &entry.to_le_bytes());
        }
        put(GDT_POINTER as u64, &[&[0x1f, 0][..], &(ROM as u32 + GDT as u32).to_le_bytes()].concat());
        let mut real = assemble(16, REAL, |a| {
            a.cli()?;
            for r in [eax, ebx, ecx, edx, esi, edi, ebp] {
                a.xor(r, r)?;
            }
            a.mov(ds, ax)?;
            a.mov(es, ax)?;
            a.mov(ss, ax)?;
            a.mov(sp, 0x7c00)?;
            a.mov(word_ptr(0x500), 0x1234)?;
            a.inc(word_ptr(0x500))
        });
        real.extend([0x2e, 0x66, 0x0f, 0x01, 0x16, GDT_POINTER as u8, 0]); // lgdt cs:[GDT_POINTER]
        real.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0]); // mov eax, cr0; or al, 1; mov cr0, eax
        real.extend([0x66, 0xea, 0x00, 0x02, 0x0f, 0x00, 0x08, 0x00]); // jmp 8:PROTECTED
        put(REAL, &real);
        let mut protected = assemble(32, ROM + PROTECTED, |a| {
            a.mov(eax, 0x10)?;
            for s in [ds, es, ss] {
                a.mov(s, eax)?;
            }
            a.mov(esp, 0x7c00)?;
            if !long {
                return a.jmp(ROM + LOOP32);
            }
            // Tables: the first 2 MiB, twice.
            for (at, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83), (0x3008, 0x83)] {
                a.mov(dword_ptr(at), entry)?;
            }
            a.mov(eax, cr4)?;
            a.or(eax, 0x20)?;
            a.mov(cr4, eax)?;
            a.mov(eax, 0x1000)?;
            a.mov(cr3, eax)?;
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.or(ah, 1)?;
            a.wrmsr()?;
            a.mov(eax, cr0)?;
            a.or(eax, 0x8000_0000u32 as i32)?;
            a.mov(cr0, eax)
        });
        if long {
            protected.extend([0xea, 0x00, 0x03, 0x0f, 0x00, 0x18, 0x00]); // jmp 0x18:LONG
            // It is longer than the gap to the 32-bit loop, which is not there then.
            put(PROTECTED, &protected);
        } else {
            put(PROTECTED, &protected);
            put(
                LOOP32,
                &assemble(32, ROM + LOOP32, |a| {
                    let mut again = a.create_label();
                    a.set_label(&mut again)?;
                    a.inc(dword_ptr(JIFFIES))?;
                    a.call(ROM + FUNCTION32)?;
                    a.mov(eax, dword_ptr(JIFFIES))?;
                    a.jmp(again)
                }),
            );
            put(
                FUNCTION32,
                &assemble(32, ROM + FUNCTION32, |a| {
                    a.push(ebx)?;
                    a.mov(ebx, eax)?;
                    a.pop(ebx)?;
                    a.ret()
                }),
            );
        }
        put(
            LONG,
            &assemble(64, ROM + LONG, |a| {
                a.mov(eax, 0x10)?;
                a.mov(ss, eax)?;
                a.mov(ds, eax)?;
                a.mov(esp, 0x7c00)?;
                a.xor(eax, eax)?;
                a.mov(r15, 0x1234_5678_9abc_def0u64)?;
                a.jmp(ROM + LOOP64)
            }),
        );
        put(
            LOOP64,
            &assemble(64, ROM + LOOP64, |a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.inc(qword_ptr(JIFFIES))?;
                a.call(ROM + FUNCTION64)?;
                a.mov(rax, qword_ptr(JIFFIES))?;
                a.jmp(again)
            }),
        );
        put(
            FUNCTION64,
            &assemble(64, ROM + FUNCTION64, |a| {
                a.push(rbx)?;
                a.mov(rbx, rax)?;
                a.pop(rbx)?;
                a.ret()
            }),
        );
        rom
    }
}

pub mod riscv {
    use mimus_tests::riscv::reg::*;
    use mimus_tests::riscv::*;

    /// Where the firmware's kernel is, and RAM begins.
    pub const KERNEL: u64 = 0x8020_0000;
    pub const RAM: u64 = 0x8000_0000;
    /// What hart `n` counts is at `JIFFIES + 8 n`.
    pub const JIFFIES: u64 = 0x8040_0000;

    const AGAIN: u64 = RAM + 0x40;
    const FUNCTION: u64 = RAM + 0x80;
    const TRAP: u64 = RAM + 0xc0;

    fn pad(a: &mut Asm, to: u64) -> &mut Asm {
        while a.here() < to {
            a.op([addi(ZERO, ZERO, 0)]);
        }
        a
    }

    /// Counts, calls a function and traps, for ever, in M-mode.
    pub fn bare() -> Asm {
        let mut asm = Asm::new(RAM);
        let a = &mut asm;
        a.li(S0, JIFFIES).la(T1, "trap").op([csrrw(ZERO, 0x305, T1)]);
        pad(a, AGAIN).label("again").op([ld(T0, S0, 0), addi(T0, T0, 1), sd(T0, S0, 0)]);
        a.jump(RA, "function").op([insn::ECALL]).jump(ZERO, "again");
        pad(a, FUNCTION).label("function").op([xor(A3, A0, T0), jalr(ZERO, RA, 0)]);
        pad(a, TRAP).label("trap").op([csrrs(T2, 0x341, ZERO), addi(T2, T2, 4), csrrw(ZERO, 0x341, T2), insn::MRET]);
        asm
    }

    /// As a kernel of two harts, each of which counts for itself.
    pub fn two_harts() -> Asm {
        let mut asm = Asm::new(KERNEL);
        let a = &mut asm;
        a.li(S0, JIFFIES);
        // HSM: start hart 1.
        a.li(A0, 1).la(A1, "second").li(A2, 0).li(A7, 0x48_534d).li(A6, 0).op([insn::ECALL]).jump(ZERO, "again");
        a.label("second").li(S0, JIFFIES + 8);
        a.label("again").op([ld(T0, S0, 0), addi(T0, T0, 1), sd(T0, S0, 0)]).jump(ZERO, "again");
        asm
    }
}
