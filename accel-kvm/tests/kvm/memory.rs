//! Memory slots: RAM, ROM, ROM devices, aliases, changes while vCPUs run.

use crate::harness::*;
use crate::interrupts::soon;
use iced_x86::code_asm::*;
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::MutMmioDevice;
use mimus_core::memory::{MemoryRegion, RamBacking};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const PAGE: u64 = 0x1000;

#[test]
fn read_only_memory() {
    let Some(mut g) = Setup::default().build("read_only_memory") else { return };
    let rom = g.guest_ram.add_block("rom", PAGE, RamBacking::Private).expect("a block");
    assert!(rom.store(0, 0x1122_3344_5566_7788u64));
    let region = MemoryRegion::rom("rom", &rom);
    g.map.change(|t| _ = t.map(&g.root, HOLE, &region));
    for user in [false, true] {
        if user {
            g.user(0)
        } else {
            g.long(0)
        }
        g.code(if user { USER } else { CODE }, 64, |a| {
            a.mov(ebx, HOLE as u32)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(qword_ptr(rbx), rbx)?;
            a.add(rax, qword_ptr(rbx))?;
            a.mov(qword_ptr(rbx + 0x2000), rax)
        });
        g.bus.stop_always.store(true, Ordering::Relaxed);
        g.run_to_stop(0);
        g.run_to_stop(0);
        let write = Seen::Write(HOLE, 8, HOLE);
        assert_eq!(g.bus.take(), [write, Seen::Write(HOLE + 0x2000, 8, 0x2244_6688_aacc_ef10)], "user: {user}");
    }
    assert_eq!(rom.load::<u64>(0), Some(0x1122_3344_5566_7788));
}

#[derive(Default)]
struct Flash(Vec<(u64, u64)>);

impl MutMmioDevice for Flash {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        self.0.push((a.offset, u64::MAX));
        Ok(0x5a)
    }
    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        self.0.push((a.offset, value));
        Ok(())
    }
}

#[test]
fn rom_devices_change_their_mind() {
    let Some(mut g) = Setup::default().build("rom_devices_change_their_mind") else { return };
    let block = g.guest_ram.add_block("flash", PAGE, RamBacking::Private).expect("a block");
    assert!(block.store(0, 0x77u64));
    let region = MemoryRegion::rom_device("flash", &block, AccessRules::sizes(AccessSize::B1, AccessSize::B8));
    let flash = Arc::new(Mutex::new(Flash::default()));
    region.binding().expect("a device").bind_mmio(flash.clone(), 0);
    g.map.change(|t| _ = t.map(&g.root, HOLE, &region));
    g.code(CODE, 64, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.movzx(eax, byte_ptr(rbx))?;
        a.mov(byte_ptr(rbx + 5), al)?;
        a.out(i32::from(PORT_STOP), eax)
    });
    g.long(0);
    g.run_to_stop(0);
    assert_eq!((g.bus.out_values(PORT_STOP), lock(&flash).0.clone()), (vec![0x77], vec![(5, 0x77)]));
    g.map.change(|t| _ = t.set_direct(&region, false));
    g.bus.take();
    g.long(0);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(PORT_STOP), [0x5a]);
    g.map.change(|t| _ = t.set_direct(&region, true));
    g.bus.take();
    g.long(0);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(PORT_STOP), [0x77]);
}

#[test]
fn aliases_and_moves() {
    let Some(mut g) = Setup::default().build("aliases_and_moves") else { return };
    let whole = MemoryRegion::ram("again", &g.ram);
    let alias = MemoryRegion::alias("window", &whole, DATA, 2 * PAGE);
    g.map.change(|t| _ = t.map(&g.root, HOLE, &alias));
    g.store(DATA, 5);
    g.code(CODE, 64, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.inc(dword_ptr(rbx))?;
        a.mov(dword_ptr(rbx + 0x1008), eax)?;
        a.out(i32::from(PORT_STOP), al)
    });
    g.long(0);
    g.run_to_stop(0);
    assert_eq!((g.load(DATA), g.load(DATA + PAGE + 8)), (6, 5));
    assert_eq!(g.statistic("memory slots"), 2);
    // Moved away, there is nothing.
    g.map.change(|t| _ = t.map(&g.root, HOLE + 0x10_0000, &alias));
    lock(&g.bus.answers).extend([9, 9]);
    g.long(0);
    g.run_to_stop(0);
    assert_eq!(g.load(DATA), 6);
    assert!(g.bus.take().contains(&Seen::Write(HOLE + 0x1008, 4, 9)));
    g.map.change(|t| _ = t.unmap(&g.root, &alias));
    assert_eq!(g.statistic("memory slots"), 1);
}

#[test]
fn many_slots_come_and_go() {
    let Some(g) = Setup::default().build("many_slots_come_and_go") else { return };
    let block = g.guest_ram.add_block("many", 500 * PAGE, RamBacking::Private).expect("a block");
    let whole = MemoryRegion::ram("many", &block);
    let windows: Vec<_> = (0..500).map(|i| MemoryRegion::alias("w", &whole, i * PAGE, PAGE)).collect();
    g.map.change(|t| {
        // With holes in between.
        for (i, w) in windows.iter().enumerate() {
            t.map(&g.root, (1 << 32) + i as u64 * 2 * PAGE, w);
        }
    });
    assert_eq!(g.statistic("memory slots"), 501);
    g.map.change(|t| windows.iter().for_each(|w| _ = t.unmap(&g.root, w)));
    assert_eq!(g.statistic("memory slots"), 1);
}

#[test]
fn ranges_that_are_not_whole_pages() {
    let Some(mut g) = Setup::default().build("ranges_that_are_not_whole_pages") else { return };
    let block = g.guest_ram.add_block("odd", 4 * PAGE, RamBacking::Private).expect("a block");
    let whole = MemoryRegion::ram("odd", &block);
    let odd = MemoryRegion::alias("odd", &whole, 0x800, 2 * PAGE);
    assert!(block.store(0x800, 0x44u32) && block.store(0x1000, 0x55u32));
    // 0x800 below a page: one whole page inside, the ends through the bus.
    g.map.change(|t| _ = t.map(&g.root, HOLE + 0x800, &odd));
    g.code(CODE, 64, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.mov(eax, dword_ptr(rbx + 0x800))?;
        a.add(eax, dword_ptr(rbx + 0x1000))?;
        a.out(i32::from(PORT_STOP), eax)
    });
    g.long(0);
    g.run_to_stop(0);
    assert_eq!(g.bus.out_values(PORT_STOP), [0x99]);
    assert_eq!(g.statistic("mmio exits"), 1);
}

#[test]
fn replaced_under_a_running_vcpu() {
    let name = "replaced_under_a_running_vcpu";
    let Some(mut g) = Setup::default().build(name) else { return };
    let a = g.guest_ram.add_block("a", PAGE, RamBacking::Private).expect("a block");
    let b = g.guest_ram.add_block("b", PAGE, RamBacking::Private).expect("a block");
    let (ra, rb) = (MemoryRegion::ram("a", &a), MemoryRegion::ram("b", &b));
    g.map.change(|t| _ = t.map(&g.root, HOLE, &ra));
    // User code reads the page for ever: were it gone for a moment, the bus would see it.
    g.user(0);
    g.code(USER, 64, |c| {
        let mut again = c.create_label();
        c.mov(ebx, HOLE as u32)?;
        c.set_label(&mut again)?;
        c.mov(rax, qword_ptr(rbx))?;
        c.inc(qword_ptr(rbx + 8))?;
        c.jmp(again)
    });
    let handle = g.vcpus[0].handle();
    let (map, root) = (g.map.clone(), g.root.clone());
    let bus = g.bus.clone();
    let vcpu = &mut g.vcpus[0];
    std::thread::scope(|s| {
        let runner = s.spawn(move || vcpu.run(&*bus));
        for i in 0..200 {
            let (old, new) = if i % 2 == 0 { (&ra, &rb) } else { (&rb, &ra) };
            map.change(|t| {
                t.unmap(&root, old);
                t.map(&root, HOLE, new);
            });
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        handle.kick();
        runner.join().expect("joined");
    });
    assert_eq!(g.bus.take(), [], "no access missed");
    assert_eq!(g.statistic("vCPUs held out"), 200);
    assert!(a.load::<u64>(8) > Some(0) && b.load::<u64>(8) > Some(0));
}

/// A guest polls an address where nothing is; RAM comes there while it does.
#[test]
fn memory_is_added_under_a_running_vcpu() {
    let Some(mut g) = Setup::default().build("memory_is_added_under_a_running_vcpu") else { return };
    let more = g.guest_ram.add_block("more", 64 * PAGE, RamBacking::Private).expect("a block");
    assert!(more.fill(0, 64 * PAGE, 0x5a));
    g.long(0);
    g.code(CODE, 64, |a| {
        let mut again = a.create_label();
        a.mov(ebx, HOLE as u32)?;
        a.set_label(&mut again)?;
        a.cmp(byte_ptr(rbx + 0x20), 0x5a)?;
        a.jne(again)?;
        a.mov(qword_ptr(rbx + 0x3f000), rbx)?;
        a.out(i32::from(PORT_STOP), al)?;
        a.hlt()
    });
    let (map, root, region) = (g.map.clone(), g.root.clone(), MemoryRegion::ram("more", &more));
    let slots = g.statistic("memory slots");
    soon(&mut g, move || map.change(|t| _ = t.map(&root, HOLE, &region)), |g| g.run_to_stop(0));
    assert_eq!(more.load::<u64>(0x3f000), Some(HOLE));
    assert_eq!(g.statistic("memory slots"), slots + 1);
    assert!(g.bus.take().iter().any(|s| matches!(s, Seen::Read(at, 1) if *at == HOLE + 0x20)), "it polled before");
}
