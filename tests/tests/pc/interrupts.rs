//! Interrupts from a device's pin to the vector a CPU takes, through the models.

use std::time::{Duration, Instant};

use mimus_core::accel::{SysReg, VcpuIndex};

use crate::harness::{Pc, Setup, bzimage};

const BSP: VcpuIndex = VcpuIndex(0);
const IOAPIC: u64 = 0xfec0_0000;
const LAPIC: u64 = 0xfee0_0000;

fn wait_until(what: &str, happens: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !happens() {
        assert!(Instant::now() < deadline, "{what}: not in 120 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn start(cpus: u32) -> Pc {
    Setup::new("microvm").kernel(&bzimage()).cpus(cpus).start()
}

fn route(pc: &Pc, pin: u64, entry: u64) {
    for (half, value) in [(1, entry >> 32), (0, entry & 0xffff_ffff)] {
        pc.store(IOAPIC, 4, 0x10 + pin * 2 + half);
        pc.store(IOAPIC + 0x10, 4, value);
    }
}

fn enable_lapic(pc: &Pc) {
    pc.store(LAPIC + 0xf0, 4, 0x1ff);
}

/// The serial port's transmitter interrupt, the way the board's tables say it goes.
#[test]
fn the_serial_port_through_the_io_apic() {
    let pc = start(1);
    enable_lapic(&pc);
    route(&pc, 4, 0x51);
    assert_eq!(pc.io.acknowledge_interrupt(BSP), None);
    pc.outb(0x3f9, 2);
    assert_eq!(pc.io.acknowledge_interrupt(BSP), Some(0x51));
    pc.store(LAPIC + 0xb0, 4, 0);
    assert_eq!(pc.io.acknowledge_interrupt(BSP), None);
}

#[test]
fn the_serial_port_through_the_pic() {
    let pc = start(1);
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)] {
        pc.outb(port, value);
    }
    pc.outb(0x3f9, 2);
    assert_eq!(pc.io.acknowledge_interrupt(BSP), Some(0x24));
}

#[test]
fn the_interval_timer_is_on_input_2() {
    let mut pc = start(1);
    enable_lapic(&pc);
    route(&pc, 2, 0x30);
    // Counter 0, mode 2, 1000 counts: less than a millisecond.
    for (port, value) in [(0x43, 0x34), (0x40, 0xe8), (0x40, 3)] {
        pc.outb(port, value);
    }
    pc.machine.resume();
    wait_until("a tick comes", || pc.io.acknowledge_interrupt(BSP) == Some(0x30));
}

#[test]
fn messages_and_system_registers() {
    let pc = start(2);
    enable_lapic(&pc);
    assert_eq!(pc.io.sysreg_read(BSP, SysReg::Msr(0x1b)), Some(0xfee0_0900));
    assert_eq!(pc.io.sysreg_read(VcpuIndex(1), SysReg::Msr(0x1b)), Some(0xfee0_0800));
    assert_eq!(pc.io.sysreg_write(BSP, SysReg::Cr8, 3), Some(()));
    assert_eq!((pc.load(LAPIC + 0x80, 4), pc.io.sysreg_read(BSP, SysReg::Cr8)), (0x30, Some(3)));
    assert_eq!(pc.io.sysreg_read(BSP, SysReg::Msr(0x10)), None);
}

#[test]
fn start_up_messages_start_a_processor() {
    let mut pc = start(2);
    let ap = VcpuIndex(1);
    pc.machine.resume();
    wait_until("the first processor starts", || pc.machine.threads().is_on(BSP));
    assert!(!pc.machine.threads().is_on(ap));
    let command = |value: u64| {
        pc.store(LAPIC + 0x310, 4, 1 << 24);
        pc.store(LAPIC + 0x300, 4, value);
    };
    command(0x4500);
    command(0x4609);
    wait_until("the second starts", || pc.machine.threads().is_on(ap));
    let state = pc.machine.vcpu_state(ap, mimus_core::arch::StateGroups::All).unwrap();
    assert_eq!(state.pc(), 0x9000);
}
