//! Processor modes, exceptions, paging.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::attr;

/// A page fault with its cause: bit 0 present, 1 write, 2 user, 4 fetch.
fn fault(
    g: &mut Guest,
    user: bool,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Option<u64> {
    // The handler pops the error code, reports it and the address, and stops.
    g.code(0x2000, 64, |a| {
        a.pop(rax)?;
        a.out(0x70, eax)?;
        a.mov(rax, cr2)?;
        a.out(0x71, eax)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    g.gate(14, 0x2000);
    if user {
        g.user(0);
        g.code(USER, 64, program);
    } else {
        g.long(0);
        g.code(CODE, 64, program);
    }
    g.bus.take();
    g.run_to_stop(0);
    g.bus.out_values(0x70).first().copied()
}

fn done(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    // User code cannot write ports: a write to the hole ends both.
    a.mov(byte_ptr(HOLE), al)
}

fn set_page(g: &Guest, page: u64, bits: u64) {
    g.store(PT + (page >> 12) * 8, page | bits);
}

#[test]
fn page_faults_have_the_right_error_codes() {
    let Some(mut g) = Setup::default().build("page_faults_have_the_right_error_codes") else { return };
    let stop = g.vcpus[0].handle();
    g.bus.set_handler(move |_, seen| {
        if matches!(seen, Seen::Write(HOLE, ..)) {
            stop.kick();
        }
        None
    });
    // Not there; read-only; the supervisor's; not to be executed.
    let (absent, readonly, supervisor, noexec) = (DATA, DATA + 0x1000, DATA + 0x2000, DATA + 0x3000);
    set_page(&g, absent, 6);
    set_page(&g, readonly, 5);
    set_page(&g, supervisor, 3);
    set_page(&g, noexec, 7 | 1 << 63);
    for page in [readonly, supervisor, noexec] {
        g.write(page, &[0xc3]);
    }
    let load = |at: u64| {
        move |a: &mut CodeAssembler| {
            a.mov(rbx, at)?;
            a.mov(al, byte_ptr(rbx))?;
            done(a)
        }
    };
    let store = |at: u64| {
        move |a: &mut CodeAssembler| {
            a.mov(rbx, at)?;
            a.mov(byte_ptr(rbx), al)?;
            done(a)
        }
    };
    let call = |at: u64| {
        move |a: &mut CodeAssembler| {
            a.mov(rbx, at)?;
            a.call(rbx)?;
            done(a)
        }
    };
    // Supervisor, with CR0.WP.
    assert_eq!(fault(&mut g, false, load(absent)), Some(0));
    assert_eq!(fault(&mut g, false, store(absent)), Some(2));
    assert_eq!(fault(&mut g, false, store(readonly)), Some(3));
    assert_eq!(fault(&mut g, false, load(supervisor)), None);
    assert_eq!(fault(&mut g, false, call(noexec)), Some(0x11));
    // User.
    assert_eq!(fault(&mut g, true, load(absent)), Some(4));
    assert_eq!(fault(&mut g, true, store(absent)), Some(6));
    assert_eq!(fault(&mut g, true, load(readonly)), None);
    assert_eq!(fault(&mut g, true, store(readonly)), Some(7));
    assert_eq!(fault(&mut g, true, load(supervisor)), Some(5));
    assert_eq!(fault(&mut g, true, call(noexec)), Some(0x15));
    assert_eq!(g.bus.out_values(0x71), [noexec & 0xffff_ffff]);
    // Without CR0.WP the supervisor writes where users only read.
    g.long(0);
    g.change(0, |s| s.cr0 &= !CR0_WP);
    g.code(CODE, 64, |a| {
        a.mov(byte_ptr(readonly), 7)?;
        done(a)
    });
    g.run_to_stop(0);
    assert_eq!(g.load(readonly) & 0xff, 7);
}

#[test]
fn accessed_and_dirty_bits() {
    let Some(mut g) = Setup::default().build("accessed_and_dirty_bits") else { return };
    for page in 0..3 {
        set_page(&g, DATA + page * 0x1000, 7);
    }
    g.long(0);
    g.code(CODE, 64, |a| {
        a.mov(al, byte_ptr(DATA))?;
        a.mov(byte_ptr(DATA + 0x1000), al)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.run_to_stop(0);
    let bits = |page: u64| g.load(PT + ((DATA >> 12) + page) * 8) & 0x60;
    assert_eq!((bits(0), bits(1), bits(2)), (0x20, 0x60, 0));
}

#[test]
fn from_real_to_long_mode_and_user() {
    let Some(mut g) = Setup::default().build("from_real_to_long_mode_and_user") else { return };
    g.real(0);
    // Pseudo-descriptor of the GDT.
    g.write(0x7000, &[0x3f, 0, GDT as u8, (GDT >> 8) as u8, 0, 0, 0, 0]);
    g.write(0x7010, &[0xff, 0x0f, IDT as u8, (IDT >> 8) as u8, 0, 0, 0, 0, 0, 0]);
    g.code(CODE, 16, |a| {
        a.cli()?;
        a.lgdt(fword_ptr(0x7000))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // jmp far KERNEL_CODE32:0x2000
        a.db(&[0xea, 0x00, 0x20, KERNEL_CODE32 as u8, 0x00])
    });
    g.code(0x2000, 32, |a| {
        a.mov(ax, i32::from(KERNEL_DATA))?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(es, ax)?;
        a.mov(esp, STACK as u32)?;
        a.out(0x70, al)?;
        a.mov(eax, cr4)?;
        a.or(eax, (CR4_PAE | CR4_OSFXSR) as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, (EFER_LME | EFER_NXE | EFER_SCE) as u32)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, (CR0_PG | CR0_WP) as u32)?;
        a.mov(cr0, eax)?;
        a.out(0x71, al)?;
        // jmp far KERNEL_CODE:0x3000
        a.db(&[0xea, 0x00, 0x30, 0x00, 0x00, KERNEL_CODE as u8, 0x00])
    });
    g.gate(0x80, 0x3800);
    g.gate(6, 0x3900);
    g.code(0x3000, 64, |a| {
        a.mov(ax, i32::from(KERNEL_DATA))?;
        a.mov(ss, ax)?;
        a.lidt(tbyte_ptr(0x7010))?;
        a.mov(ax, 0x30)?;
        a.ltr(ax)?;
        a.mov(rax, 0x1234_5678_9abc_def0u64)?;
        a.mov(qword_ptr(DATA), rax)?;
        // An exception and back.
        a.ud2()?;
        a.nop()?;
        // To user code.
        a.push(i32::from(USER_DATA))?;
        a.push(USER_STACK as i32)?;
        a.push(2)?;
        a.push(i32::from(USER_CODE))?;
        a.push(USER as i32)?;
        a.iretq()
    });
    // #UD: skips the instruction.
    g.code(0x3900, 64, |a| {
        a.add(qword_ptr(rsp), 2)?;
        a.inc(byte_ptr(DATA + 8))?;
        a.iretq()
    });
    // #PF from user code: reports CS of the frame.
    g.gate(14, 0x3a00);
    g.code(0x3a00, 64, |a| {
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.out(0x72, eax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    set_page(&g, DATA + 0x1000, 3);
    g.code(USER, 64, |a| {
        a.mov(byte_ptr(DATA + 16), 9)?;
        a.mov(byte_ptr(DATA + 0x1000), 9)
    });
    g.run_to_stop(0);
    assert_eq!((g.load(DATA), g.load(DATA + 8), g.load(DATA + 16)), (0x1234_5678_9abc_def0, 1, 9));
    let writes: Vec<_> = g.bus.take().into_iter().filter(|s| matches!(s, Seen::Out(0x70..=0x72, ..))).collect();
    assert_eq!(writes.len(), 3);
    assert_eq!(writes[2], Seen::Out(0x72, 4, USER_CODE.into()));
    let s = g.state(0);
    assert_eq!((s.cpl(), s.efer & EFER_LMA, s.tr.selector), (0, EFER_LMA, 0x30));
}

#[test]
fn flat_32bit_code_with_exceptions() {
    let Some(mut g) = Setup::default().build("flat_32bit_code_with_exceptions") else { return };
    g.protected(0);
    // A 32-bit interrupt gate for #DE.
    let handler = 0x2000u64;
    g.store(IDT, handler & 0xffff | u64::from(KERNEL_CODE32) << 16 | 0x8e00 << 32 | (handler >> 16) << 48);
    g.code(CODE, 32, |a| {
        let mut callee = a.create_label();
        let mut past = a.create_label();
        a.mov(eax, 5)?;
        a.call(callee)?;
        a.jmp(past)?;
        a.set_label(&mut callee)?;
        a.imul_3(eax, eax, 7)?;
        a.ret()?;
        a.set_label(&mut past)?;
        a.out(0x70, eax)?;
        a.xor(ecx, ecx)?;
        a.div(ecx)
    });
    g.code(0x2000, 32, |a| {
        // EIP of the fault.
        a.mov(eax, dword_ptr(esp))?;
        a.out(0x71, eax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(0x70), [35]);
    let at = g.bus.out_values(0x71)[0];
    assert!((CODE..CODE + 0x40).contains(&at), "{at:#x}");
}

#[test]
fn paging_in_32bit_mode() {
    let name = "paging_in_32bit_mode";
    let Some(mut g) = Setup::default().build(name) else { return };
    if !without(name, quirks().no_32bit_paging, "pages in long mode only") {
        return;
    }
    g.protected(0);
    g.write(PML4, &0x83u32.to_le_bytes());
    g.change(0, |s| {
        (s.cr3, s.cr4) = (PML4, CR4_PSE);
        s.cr0 |= CR0_PG;
    });
    g.code(CODE, 32, |a| {
        a.mov(eax, dword_ptr(DATA as u32))?;
        a.out(i32::from(PORT_STOP), eax)
    });
    g.store(DATA, 77);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(PORT_STOP), [77]);
}

#[test]
fn system_calls() {
    let name = "system_calls";
    let Some(mut g) = Setup::default().build(name) else { return };
    if !without(name, quirks().syscall_keeps_cpl, "leaves the privilege level alone in SYSCALL") {
        return;
    }
    g.user(0);
    g.change(0, |s| {
        s.set_msr(mimus_arch::x86::msr::STAR, 0x13 << 48 | 8 << 32);
        s.set_msr(mimus_arch::x86::msr::LSTAR, 0x2000);
    });
    g.code(USER, 64, |a| a.syscall());
    g.code(0x2000, 64, |a| a.out(i32::from(PORT_STOP), al));
    g.run_to_stop(0);
    assert_eq!(g.state(0).cpl(), 0);
}

#[test]
fn sysret_to_user_code() {
    let Some(mut g) = Setup::default().build("sysret_to_user_code") else { return };
    g.long(0);
    // SYSRET takes CS from STAR[63:48] + 16 and SS from + 8: a GDT of its own.
    let (code, data) = (0x00af_fb00_0000_ffffu64, 0x00cf_f300_0000_ffffu64);
    g.store(GDT + 0x20, data);
    g.store(GDT + 0x28, code);
    g.change(0, |s| s.set_msr(mimus_arch::x86::msr::STAR, 0x18 << 48 | 8 << 32));
    g.code(CODE, 64, |a| {
        a.mov(rcx, USER)?;
        a.mov(r11, 2u64)?;
        a.sysretq()
    });
    g.code(USER, 64, |a| a.mov(byte_ptr(HOLE), al));
    g.bus.stop_always.store(true, std::sync::atomic::Ordering::Relaxed);
    g.run_to_stop(0);
    let s = g.state(0);
    assert_eq!((s.cpl(), s.cs.selector, s.ss.selector), (3, 0x2b, 0x23));
}

#[test]
fn code_that_changes_itself() {
    let Some(mut g) = Setup::default().build("code_that_changes_itself") else { return };
    g.bus.stop_always.store(true, std::sync::atomic::Ordering::Relaxed);
    for user in [false, true] {
        if user {
            g.user(0)
        } else {
            g.long(0)
        }
        let at = if user { USER } else { CODE };
        // mov eax, 1 at a known place; its immediate is changed before the second round.
        g.code(at, 64, |a| {
            let mut again = a.create_label();
            a.xor(ebx, ebx)?;
            a.mov(ecx, 2)?;
            a.set_label(&mut again)?;
            a.db(&[0xb8, 1, 0, 0, 0])?;
            a.add(ebx, eax)?;
            a.mov(byte_ptr(at + 2 + 5 + 1), 9)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(dword_ptr(HOLE), ebx)
        });
        g.run_to_stop(0);
        assert_eq!(g.bus.take(), [Seen::Write(HOLE, 4, 10)], "user: {user}");
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let Some(mut g) = Setup::default().build("states_that_cannot_be_are_refused") else { return };
    g.long(0);
    let good = g.state(0);
    let mut refuse = |f: fn(&mut mimus_arch::x86::X86State)| {
        let mut s = good.clone();
        f(&mut s);
        let s = mimus_arch::CpuState::X86(Box::new(s));
        g.vcpus[0].set_state(&s).expect_err("refused").to_string()
    };
    assert!(refuse(|s| s.cr4 = 1 << 30).contains("control registers"));
    assert!(refuse(|s| s.cr0 &= !CR0_PE).contains("cr0"));
    assert!(refuse(|s| s.xsave.truncate(100)).contains("xsave"));
    assert!(refuse(|s| s.xsave[XSAVE_XSTATE_BV + 7] = 0x40).contains("vector"));
    assert!(refuse(|s| s.set_msr(0x1234_5678, 1)).contains("0x12345678"));
    assert!(refuse(|s| s.cs.attributes |= 1 << 30).contains("cs"));
    assert_eq!(good.cs.attributes & attr::L, attr::L);
    g.set(0, good);
}

#[test]
fn alignment_check_of_user_code() {
    let Some(mut g) = Setup::default().build("alignment_check_of_user_code") else { return };
    g.gate(17, 0x2000);
    g.code(0x2000, 64, |a| {
        a.pop(rax)?;
        a.out(0x70, eax)?;
        a.pop(rax)?;
        a.out(0x71, eax)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    g.user(0);
    g.change(0, |s| {
        s.cr0 |= CR0_AM;
        s.rflags |= RFLAGS_AC;
    });
    g.code(USER, 64, |a| {
        a.mov(ebx, DATA as u32)?;
        a.mov(eax, dword_ptr(rbx + 4))?;
        a.mov(eax, dword_ptr(rbx + 2))?;
        done(a)
    });
    g.run_to_stop(0);
    // Its error code is always 0; the aligned load before it was none's business.
    assert_eq!((g.bus.out_values(0x70), g.bus.out_values(0x71)), (vec![0], vec![USER + 8]));
}
