//! The log of written pages against the truth.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_core::memory::PAGE_DIRTY;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

/// Pages of RAM whose flag is set; clears them.
fn dirty(g: &Guest) -> BTreeSet<u64> {
    let take = |page: &u64| g.ram.page_flags(*page).fetch_and(!PAGE_DIRTY, Ordering::Relaxed) & PAGE_DIRTY != 0;
    (0..g.ram.page_count()).filter(take).collect()
}

/// Writes one byte to each of the pages in the list at [`DATA`] (32-bit numbers, 0 ends), then stops.
fn program(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    let mut end = a.create_label();
    a.mov(esi, DATA as u32)?;
    a.set_label(&mut again)?;
    a.mov(eax, dword_ptr(rsi))?;
    a.test(eax, eax)?;
    a.jz(end)?;
    a.shl(rax, 12)?;
    a.mov(byte_ptr(rax), cl)?;
    a.add(esi, 4)?;
    a.jmp(again)?;
    a.set_label(&mut end)?;
    a.mov(byte_ptr(HOLE), cl)
}

fn list(g: &Guest, pages: &BTreeSet<u64>) {
    for (i, page) in pages.iter().chain([&0]).enumerate() {
        assert!(g.ram.store(DATA + i as u64 * 4, *page as u32));
    }
}

/// Page tables get accessed and dirty bits set.
fn tables() -> BTreeSet<u64> {
    (PML4 >> 12..=PT >> 12).collect()
}

fn log_tells_the_truth(name: &str, setup: Setup) {
    let Some(mut g) = setup.build(name) else { return };
    g.code(CODE, 64, program);
    g.code(USER, 64, program);
    g.bus.stop_always.store(true, Ordering::Relaxed);
    let vm = g.vm.clone();
    let log = vm.dirty_log().expect("a log");
    // Written before it starts.
    list(&g, &BTreeSet::from([0x50, 0x51]));
    g.long(0);
    g.run_to_stop(0);
    log.start().expect("started");
    dirty(&g);
    let mut random = 12345u64;
    for round in 0..12 {
        let pages: BTreeSet<u64> = (0..1 + round * 7)
            .map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                0x100 + (random >> 33) % 0x300
            })
            .collect();
        list(&g, &pages);
        dirty(&g);
        if round % 2 == 0 {
            g.long(0)
        } else {
            g.user(0)
        }
        g.run_to_stop(0);
        log.sync().expect("synced");
        let seen = dirty(&g);
        assert_eq!(seen.difference(&tables()).copied().collect::<BTreeSet<_>>(), pages, "round {round}");
        log.sync().expect("synced");
        assert_eq!(dirty(&g), BTreeSet::new(), "nothing new");
    }
    // The last writes come with the stop, and then no more.
    list(&g, &BTreeSet::from([0x60]));
    dirty(&g);
    g.user(0);
    g.run_to_stop(0);
    log.stop().expect("stopped");
    assert!(dirty(&g).contains(&0x60));
    g.user(0);
    g.run_to_stop(0);
    log.sync().expect("synced");
    assert_eq!(dirty(&g), BTreeSet::new());
}

#[test]
fn bitmaps() {
    log_tells_the_truth("bitmaps", Setup::default());
}

#[test]
fn rings() {
    log_tells_the_truth("rings", Setup::default().option("dirty-ring-size", "1024"));
}

#[test]
fn a_full_ring_loses_nothing() {
    let name = "a_full_ring_loses_nothing";
    let Some(mut g) = Setup::default().option("dirty-ring-size", "1024").build(name) else { return };
    // 3000 pages in a block of their own; a ring has 1024 entries, some of them reserved.
    const FIRST: u64 = 0x1000_0000 >> 12;
    const PAGES: u64 = 3000;
    let block = g.guest_ram.add_block("more", PAGES << 12, mimus_core::memory::RamBacking::Private).expect("a block");
    let region = mimus_core::memory::MemoryRegion::ram("more", &block);
    let vm = g.vm.clone();
    let log = vm.dirty_log().expect("a log");
    log.start().expect("started");
    // Memory that is added while the log runs is in it.
    g.map.change(|t| _ = t.map(&g.root, FIRST << 12, &region));
    g.code(USER, 64, |a| {
        let mut again = a.create_label();
        a.mov(eax, (FIRST << 12) as u32)?;
        a.mov(ecx, PAGES as u32)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rax), ecx)?;
        a.add(eax, 0x1000)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(byte_ptr(HOLE), al)
    });
    g.bus.stop_always.store(true, Ordering::Relaxed);
    g.user(0);
    g.run_to_stop(0);
    // Taken away, it is not lost either.
    g.map.change(|t| _ = t.unmap(&g.root, &region));
    log.sync().expect("synced");
    let missing = (0..PAGES).filter(|p| block.page_flags(*p).load(Ordering::Relaxed) & PAGE_DIRTY == 0).count();
    assert_eq!(missing, 0);
    assert!(g.statistic("full dirty rings") > 0);
}
