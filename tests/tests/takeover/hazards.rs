//! What KVM must notice of an instruction that somebody else executed: page tables, dirty pages, interrupts.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use mimus_arch::x86::regs::*;
use mimus_core::accel::{CpuPin, VcpuExit};
use mimus_core::memory::{PAGE_DIRTY, PAGE_SIZE};

use crate::bus::lock;
use crate::guest::*;
use crate::user_mode::user;

/// User code reads a page, faults into supervisor code that maps another page there with an instruction KVM cannot
/// execute, and reads it again.
#[test]
fn page_tables_written_by_the_translator() {
    let entry = PT + (DATA >> 12) * 8;
    let guest = on_both("page_tables_written_by_the_translator", |g| {
        g.store(DATA, 1);
        g.store(DATA + 0x1000, 2);
        g.store(DATA + 0x2000, (DATA + 0x1000) | 0x67);
        g.gate(14, HANDLERS);
        g.code(HANDLERS, 64, |a| {
            let mut over = a.create_label();
            a.add(rsp, 8)?;
            a.inc(r8)?;
            a.cmp(r8, 2)?;
            a.je(over)?;
            a.movq(xmm0, qword_ptr(DATA + 0x2000))?;
            a.movq(qword_ptr(entry), xmm0)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.add(qword_ptr(rsp), 8)?;
            a.iretq()?;
            a.set_label(&mut over)?;
            crate::cases::end(a)
        });
        g.code(USER, 64, |a| {
            a.mov(rbx, qword_ptr(DATA))?;
            // Eight bytes.
            a.mov(rcx, qword_ptr(UNMAPPED))?;
            a.add(rbx, qword_ptr(DATA))?;
            a.mov(rcx, qword_ptr(UNMAPPED))
        });
        g.change(user);
    });
    let Some(mut guest) = guest else { return };
    assert_eq!(guest.state().gpr[RBX], 3, "the second read is of the new page");
    if quirks().emulated_cpl0 && quirks().shadow_paging {
        assert_eq!(guest.statistic("page tables forgotten"), 1);
    }
}

/// Stores to what can be no page table cost nothing.
#[test]
fn data_is_no_page_table() {
    let guest = on_both("data_is_no_page_table", |g| {
        crate::cases::data(g);
        g.code(CODE, 64, |a| {
            let mut again = a.create_label();
            a.mov(ecx, 20)?;
            a.set_label(&mut again)?;
            a.movups(xmm0, xmmword_ptr(DATA + 0x10))?;
            a.paddd(xmm0, xmmword_ptr(DATA + 0x20))?;
            a.movhps(qword_ptr(DATA + 0x18), xmm0)?;
            // The stack, and a page that was empty.
            a.movq(qword_ptr(rsp - 8), xmm0)?;
            a.movq(qword_ptr(DATA + 0x3000), xmm0)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            crate::cases::end(a)
        });
        g.change(long);
    });
    let Some(guest) = guest else { return };
    assert_eq!(guest.statistic("page tables forgotten"), 0);
    assert_eq!(guest.statistic("takeovers") > 0, quirks().emulated_cpl0);
}

#[test]
fn dirty_pages_are_logged() {
    let name = "dirty_pages_are_logged";
    let _alone = alone();
    if !kvm(name) {
        return;
    }
    let mut g = Guest::new(Engine::Kvm);
    g.code(CODE, 64, |a| {
        a.movss(dword_ptr(DATA + 0x2ffe), xmm0)?;
        a.fnstenv(ptr(DATA + 0x5000))?;
        a.mov(byte_ptr(DATA + 0x7000), 1)?;
        crate::cases::end(a)
    });
    g.change(long);
    let log = g.vm.dirty_log().unwrap();
    log.start().unwrap();
    log.sync().unwrap();
    for page in 0..g.ram.page_count() {
        g.ram.page_flags(page).fetch_and(!PAGE_DIRTY, Ordering::Relaxed);
    }
    let ram = g.ram.clone();
    let vm = g.vm.clone();
    g.run_to_stop();
    vm.dirty_log().unwrap().stop().unwrap();
    let pages = DATA / PAGE_SIZE..DATA / PAGE_SIZE + 10;
    let dirty: Vec<u64> = pages
        .filter(|p| ram.page_flags(*p).load(Ordering::Relaxed) & PAGE_DIRTY != 0)
        .map(|p| p - DATA / PAGE_SIZE)
        .collect();
    assert_eq!(dirty, [2, 3, 5, 7]);
}

/// A loop that the translator executes for the most part is interrupted, and goes on.
#[test]
fn interrupts_come_between_takeovers() {
    let name = "interrupts_come_between_takeovers";
    let _alone = alone();
    if !kvm(name) {
        return;
    }
    let mut g = Guest::new(Engine::Kvm);
    g.gate(0x40, HANDLERS);
    g.code(HANDLERS, 64, |a| {
        a.inc(r8)?;
        a.iretq()
    });
    g.code(CODE, 64, |a| {
        let mut again = a.create_label();
        a.sti()?;
        a.set_label(&mut again)?;
        a.popcnt(rax, rcx)?;
        a.inc(rcx)?;
        a.cmp(r8, 5)?;
        a.jb(again)?;
        a.cli()?;
        crate::cases::end(a)
    });
    g.change(long);
    let (handle, bus) = (g.vcpu.handle(), g.bus.clone());
    let ringer = std::thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(120);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(3));
            lock(&bus.vectors).push_back(0x40);
            handle.set_pin(CpuPin::Intr, true);
            while !lock(&bus.vectors).is_empty() && Instant::now() < until {
                std::thread::yield_now();
            }
        }
    });
    let exit = g.run();
    ringer.join().unwrap();
    assert!(matches!(exit, VcpuExit::Kicked), "{exit:?}");
    let state = g.state();
    assert_eq!(state.gpr[8], 5);
    assert_eq!(state.gpr[RAX], u64::from((state.gpr[RCX] - 1).count_ones()));
}

/// How long takeovers take, with `MIMUS_MEASURE` set; else only that the loops end as they should.
#[test]
fn costs() {
    let name = "costs";
    let _alone = alone();
    if !kvm(name) || !quirks().emulated_cpl0 {
        return skipped(name, "no KVM that emulates");
    }
    let rounds: u64 = if std::env::var_os("MIMUS_MEASURE").is_some() { 20_000 } else { 50 };
    let bodies: [(&str, crate::cases::Body); 6] = [
        ("cpuid alone", |a| a.cpuid()),
        // CPUID is KVM's: each round is a takeover.
        ("popcnt, cpuid", |a| {
            a.popcnt(esi, edi)?;
            a.cpuid()
        }),
        ("fwait, cpuid", |a| {
            a.wait()?;
            a.cpuid()
        }),
        ("addpd, cpuid", |a| {
            a.addpd(xmm0, xmm1)?;
            a.cpuid()
        }),
        ("popcnt", |a| a.popcnt(esi, edi)),
        ("addpd", |a| a.addpd(xmm0, xmm1)),
    ];
    for (what, body) in bodies {
        let mut g = Guest::new(Engine::Kvm);
        g.code(CODE, 64, |a| {
            let mut again = a.create_label();
            a.mov(r8d, rounds as i32)?;
            a.set_label(&mut again)?;
            body(a)?;
            a.dec(r8d)?;
            a.jnz(again)?;
            crate::cases::end(a)
        });
        g.change(long);
        let begin = Instant::now();
        g.run_to_stop();
        let ns = begin.elapsed().as_nanos() as u64 / rounds;
        let (handed, all) = (g.statistic("takeovers"), g.statistic("instructions in takeovers"));
        println!("{what}: {ns} ns a round, {handed} takeovers, {all} instructions in them");
        assert_eq!(g.state().gpr[8], 0);
        assert_eq!(handed > 0, what != "cpuid alone");
    }
}
