use super::*;
use crate::testing::{Bench, Levels, Rng, assert_round_trip, reset, restore_with};
use mimus_core::bus::MemTxAttrs;
use mimus_core::device::{Lifecycle, PioDevice};
use std::sync::atomic::{AtomicU32, Ordering};

const SCI: u32 = 9;
const SMI: u32 = 100;
const GPE_STATUS: u64 = 0x20;
const GPE_ENABLE: u64 = 0x28;
const SMI_EN: u64 = 0x30;

struct Pc {
    bench: Bench,
    levels: Arc<Levels>,
    offs: Arc<AtomicU32>,
    pm: Arc<Mutex<AcpiPm>>,
}

impl Pc {
    fn with(layout: PmLayout, smm: bool) -> Self {
        let (bench, levels, offs) = (Bench::new(), Levels::new(), Arc::new(AtomicU32::new(0)));
        let o = offs.clone();
        let power_off = Box::new(move || _ = o.fetch_add(1, Ordering::Relaxed));
        let lines = PmLines { sci: levels.line(SCI), smi: smm.then(|| levels.line(SMI)), power_off, suspend: None };
        let pm = AcpiPm::new(layout, lines, bench.timer());
        Pc { bench, levels, offs, pm }
    }

    fn new() -> Self {
        let pc = Self::with(ICH9, false);
        lock(&pc.pm).set_acpi_enabled(true);
        pc
    }

    fn at(region: u32, offset: u64, size: AccessSize) -> PioAccess {
        PioAccess { region, offset: offset as u16, size, attrs: MemTxAttrs::vcpu(0) }
    }

    fn r(&self, offset: u64, size: AccessSize) -> u32 {
        self.pm.pio_read(Self::at(REGION_BLOCK, offset, size)).unwrap() as u32
    }

    fn r16(&self, offset: u64) -> u16 {
        self.r(offset, AccessSize::B2) as u16
    }

    fn w(&self, region: u32, offset: u64, size: AccessSize, value: u32) {
        self.pm.pio_write(Self::at(region, offset, size), value.into()).unwrap();
    }

    fn w16(&self, offset: u64, value: u16) {
        self.w(REGION_BLOCK, offset, AccessSize::B2, value.into());
    }

    fn apm(&self, value: u8) {
        self.w(REGION_APM, 0, AccessSize::B1, value.into());
    }
}

#[test]
fn the_timer_counts_24_bits() {
    let pc = Pc::new();
    let read = || pc.r(PM_TIMER, AccessSize::B4);
    assert_eq!(read(), 0);
    pc.bench.advance(1_000_000_000);
    assert_eq!(read(), 3_579_545);
    pc.bench.advance(4_000_000_000);
    assert_eq!(read(), (5 * 3_579_545) & 0xff_ffff);
    assert_eq!(pc.r(PM_TIMER + 1, AccessSize::B1), read() >> 8 & 0xff);
    pc.w(REGION_BLOCK, PM_TIMER, AccessSize::B4, 0);
    assert_ne!(read(), 0, "it cannot be written");
}

#[test]
fn timer_status_and_interrupt() {
    let pc = Pc::new();
    let half = CLOCK.ns(1 << 23);
    pc.bench.advance(half);
    assert_eq!(pc.r16(0), STS_TIMER);
    pc.w16(0, STS_TIMER);
    assert_eq!(pc.r16(0), 0);
    pc.w16(2, STS_TIMER);
    pc.bench.advance(half - 1000);
    assert_eq!(pc.levels.take(), []);
    pc.bench.advance(1000);
    assert_eq!(pc.levels.take(), [(SCI, true)], "both ways");
    pc.w16(0, STS_TIMER);
    assert_eq!(pc.levels.take(), [(SCI, false)]);
    pc.bench.advance(half);
    assert_eq!(pc.levels.take(), [(SCI, true)]);
    pc.bench.advance(10 * half);
    assert_eq!(pc.levels.take(), []);
}

#[test]
fn buttons() {
    let pc = Pc::new();
    lock(&pc.pm).press_power_button();
    assert_eq!((pc.r16(0), pc.levels.take()), (STS_POWER_BUTTON, vec![]));
    pc.w16(2, 0xffff);
    assert_eq!((pc.r16(2), pc.levels.take()), (ENABLE_BITS, vec![(SCI, true)]));
    pc.w(REGION_BLOCK, 1, AccessSize::B1, 1);
    assert_eq!((pc.r16(0), pc.levels.take()), (0, vec![(SCI, false)]));
    lock(&pc.pm).press_sleep_button();
    assert_eq!(pc.r(0, AccessSize::B4), u32::from(STS_SLEEP_BUTTON) | u32::from(ENABLE_BITS) << 16);
    pc.apm(ACPI_DISABLE);
    assert_eq!(pc.levels.take(), [(SCI, true), (SCI, false)], "not ACPI's any more");
    assert_eq!(pc.r16(PM1_CONTROL), 0);
    pc.apm(ACPI_ENABLE);
    assert_eq!((pc.r16(PM1_CONTROL), pc.levels.take()), (1, vec![(SCI, true)]));
    pc.w16(PM1_CONTROL, 0);
    assert_eq!(pc.levels.take(), [(SCI, false)]);
}

#[test]
fn power_off_and_refused_sleep() {
    let pc = Pc::new();
    let off = || pc.offs.load(Ordering::Relaxed);
    pc.w16(PM1_CONTROL, 1);
    assert_eq!(off(), 0);
    pc.w16(PM1_CONTROL, 1 | 1 << 10 | CNT_SLP_EN);
    assert_eq!((off(), pc.r16(0)), (0, STS_WAKE));
    assert_eq!(pc.r16(PM1_CONTROL), 1 | 1 << 10, "SLP_EN reads as 0");
    pc.w16(0, STS_WAKE);
    pc.w(REGION_BLOCK, PM1_CONTROL + 1, AccessSize::B1, 0x20);
    assert_eq!((off(), pc.r16(0)), (1, 0));
    pc.w(REGION_BLOCK, PM1_CONTROL, AccessSize::B4, 0x2001);
    assert_eq!(off(), 2);
}

#[test]
fn general_purpose_events() {
    let pc = Pc::new();
    let line = IrqLine::new(AcpiPm::events(&pc.pm), 12);
    line.raise();
    assert_eq!(pc.r(GPE_STATUS, AccessSize::B4), 1 << 12);
    pc.w(REGION_BLOCK, GPE_ENABLE + 1, AccessSize::B1, 0x10);
    assert_eq!(pc.levels.take(), [(SCI, true)]);
    pc.w(REGION_BLOCK, GPE_STATUS, AccessSize::B2, 1 << 12);
    assert_eq!((pc.levels.take(), pc.r16(GPE_STATUS)), (vec![(SCI, false)], 0));
    line.lower();
    line.raise();
    assert_eq!(pc.levels.take(), [(SCI, true)]);
    AcpiPm::events(&pc.pm).set_input(64, true);
    assert_eq!(pc.r(GPE_ENABLE, AccessSize::B4), 1 << 12);
}

#[test]
fn piix4_has_events_apart() {
    let pc = Pc::with(PIIX4, false);
    pc.apm(ACPI_ENABLE);
    IrqLine::new(AcpiPm::events(&pc.pm), 1).raise();
    pc.w(REGION_GPE, 2, AccessSize::B1, 2);
    assert_eq!(pc.levels.take(), [(SCI, true)]);
    assert_eq!(pc.pm.pio_read(Pc::at(REGION_GPE, 0, AccessSize::B4)).unwrap(), 0x2_0002);
    assert_eq!(pc.r(GPE_STATUS, AccessSize::B4), 0);
    pc.w(REGION_GPE, 0, AccessSize::B1, 2);
    assert_eq!(pc.levels.take(), [(SCI, false)]);
    assert_eq!(lock(&pc.pm).block_len(), 0x40);
}

#[test]
fn system_management_interrupts() {
    let pc = Pc::with(ICH9, true);
    assert_eq!(pc.r(SMI_EN, AccessSize::B4), 0);
    pc.apm(0x10);
    assert_eq!(pc.levels.take(), []);
    pc.w(REGION_BLOCK, SMI_EN, AccessSize::B4, SMI_APMC | SMI_GLOBAL);
    pc.w(REGION_APM, 1, AccessSize::B1, 7);
    pc.apm(0x10);
    assert_eq!(pc.levels.take(), [(SMI, true), (SMI, false)]);
    assert_eq!(pc.r(SMI_EN + 4, AccessSize::B4), SMI_APMC);
    pc.w(REGION_BLOCK, SMI_EN + 4, AccessSize::B4, SMI_APMC);
    assert_eq!(pc.r(SMI_EN + 4, AccessSize::B4), 0);
    assert_eq!(pc.pm.pio_read(Pc::at(REGION_APM, 0, AccessSize::B2)).unwrap(), 0x710);
    // Locked, the global enable stays; the others do not.
    lock(&pc.pm).set_smi_lock(true);
    pc.w(REGION_BLOCK, SMI_EN, AccessSize::B4, 0);
    assert_eq!(pc.r(SMI_EN, AccessSize::B4), SMI_GLOBAL);
    lock(&pc.pm).set_smi_lock(false);
    pc.w(REGION_BLOCK, SMI_EN, AccessSize::B4, 0);
    assert_eq!(pc.r(SMI_EN, AccessSize::B4), 0);
    // The PIIX4's is elsewhere.
    let pc = Pc::with(PIIX4, true);
    pc.apm(0x10);
    assert_eq!(pc.levels.take(), []);
    lock(&pc.pm).set_apm_smi(true);
    pc.apm(0x10);
    assert_eq!(pc.levels.take(), [(SMI, true), (SMI, false)]);
    // Without SMM, firmware finds it set up.
    let pc = Pc::with(ICH9, false);
    pc.w(REGION_BLOCK, SMI_EN, AccessSize::B4, 0);
    assert_eq!(pc.r(SMI_EN, AccessSize::B4) & SMI_APMC, SMI_APMC);
    pc.apm(0x10);
    assert_eq!(pc.levels.take(), []);
}

#[test]
fn saved_and_restored() {
    let pc = Pc::new();
    pc.w16(2, STS_TIMER | STS_POWER_BUTTON);
    lock(&pc.pm).press_power_button();
    pc.bench.advance(CLOCK.ns(1 << 22));
    let other = Pc::with(ICH9, false);
    other.bench.advance(CLOCK.ns(1 << 22));
    assert_round_trip(&pc.pm, &other.pm);
    assert_eq!(other.levels.take(), []);
    other.pm.start();
    other.w16(0, STS_POWER_BUTTON);
    assert_eq!(other.levels.take(), [(SCI, false)]);
    other.bench.advance(CLOCK.ns(1 << 22) + 1000);
    assert_eq!(other.levels.take(), [(SCI, true)]);
    assert!(restore_with(&other.pm, "/gpe", vec![0; 4]).is_err());
    assert!(restore_with(&other.pm, "/enable", 2).is_err());
    assert!(restore_with(&other.pm, "/control", 1 << 13).is_err());
    reset(&*other.pm);
    assert_eq!((other.levels.take(), other.r(0, AccessSize::B4)), (vec![(SCI, false)], 0));
}

#[test]
fn random_accesses() {
    let mut rng = Rng(9);
    let pc = Pc::with(ICH9, true);
    for _ in 0..20_000 {
        let size = [AccessSize::B1, AccessSize::B2, AccessSize::B4][rng.below(3) as usize];
        let region = rng.below(3) as u32;
        let at = Pc::at(region, rng.below(0x80), size);
        pc.pm.pio_write(at, rng.next() >> 32).unwrap();
        pc.pm.pio_read(at).unwrap();
        pc.bench.advance(rng.below(100_000_000));
    }
    let other = Pc::with(ICH9, true);
    other.bench.advance(pc.bench.clock.now());
    assert_round_trip(&pc.pm, &other.pm);
}

struct Sleeper {
    pc: Pc,
    sleeps: Arc<AtomicU32>,
    wakes: Arc<AtomicU32>,
}

impl Sleeper {
    fn new() -> Self {
        let (bench, levels, offs) = (Bench::new(), Levels::new(), Arc::new(AtomicU32::new(0)));
        let (sleeps, wakes) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let count = |n: &Arc<AtomicU32>| -> Box<dyn Fn() + Send> {
            let n = n.clone();
            Box::new(move || _ = n.fetch_add(1, Ordering::Relaxed))
        };
        let suspend = Some(Suspend { sleep: count(&sleeps), wake: count(&wakes) });
        let lines = PmLines { sci: levels.line(SCI), smi: None, power_off: count(&offs), suspend };
        let pm = AcpiPm::new(ICH9, lines, bench.timer());
        Self { pc: Pc { bench, levels, offs, pm }, sleeps, wakes }
    }

    fn sleep(&self, sleep_type: u8) {
        self.pc.w16(PM1_CONTROL, CNT_SLP_EN | u16::from(sleep_type) << CNT_TYPE_SHIFT);
    }

    /// Sleeps, wakings asked for, power-offs.
    fn counts(&self) -> [u32; 3] {
        [&self.sleeps, &self.wakes, &self.pc.offs].map(|n| n.load(Ordering::Relaxed))
    }
}

/// A sleep is left by a button, or by what is enabled; what woke it is in the status after the reset, which ends it.
#[test]
fn sleep_and_waking() {
    let m = Sleeper::new();
    let pc = &m.pc;
    let alarm = AcpiPm::alarm(&pc.pm);
    // The alarm does nothing unless it is enabled.
    m.sleep(SLEEP_TYPE_RAM);
    assert!(lock(&pc.pm).is_asleep());
    alarm.set_level(true);
    assert_eq!(m.counts(), [1, 0, 0]);
    alarm.set_level(false);
    // A state that is saved asleep is so again, on a machine that sleeps.
    let other = Sleeper::new();
    assert_round_trip(&pc.pm, &other.pc.pm);
    assert!(lock(&other.pc.pm).is_asleep());
    assert!(restore_with(&Pc::with(ICH9, false).pm, "/asleep", true).is_err());
    lock(&pc.pm).press_power_button();
    assert_eq!((m.counts()[0], m.counts()[1] > 0), (1, true));
    lock(&pc.pm).wake();
    reset(&*pc.pm);
    assert!(!lock(&pc.pm).is_asleep());
    assert_eq!(pc.r16(PM1_EVENT), STS_WAKE | STS_POWER_BUTTON | STS_RTC);
    // Once more, by the alarm; a line that was high before is none. Any other reset is none that wakes.
    pc.w16(PM1_EVENT, u16::MAX);
    pc.w16(PM1_EVENT + 2, STS_RTC);
    m.sleep(SLEEP_TYPE_RAM);
    let before = m.counts()[1];
    alarm.import_level(true);
    alarm.set_level(true);
    assert_eq!(m.counts()[1], before);
    alarm.set_level(false);
    alarm.set_level(true);
    assert!(m.counts()[1] > before);
    reset(&*pc.pm);
    assert!(!lock(&pc.pm).is_asleep());
    assert_eq!(pc.r16(PM1_EVENT), 0);
    // One that does not sleep is not woken.
    lock(&pc.pm).wake();
    reset(&*pc.pm);
    assert_eq!(pc.r16(PM1_EVENT), 0);
    // A general-purpose event, if it is enabled.
    m.sleep(SLEEP_TYPE_RAM);
    let before = m.counts()[1];
    IrqLine::new(AcpiPm::events(&pc.pm), 3).raise();
    assert_eq!(m.counts()[1], before);
    pc.w(REGION_BLOCK, GPE_ENABLE, AccessSize::B1, 1 << 3);
    assert!(m.counts()[1] > before);
}

#[test]
fn suspend_to_disk_turns_off() {
    let m = Sleeper::new();
    m.sleep(SLEEP_TYPE_DISK);
    assert_eq!(m.counts(), [0, 0, 1]);
    m.sleep(3);
    assert_eq!((m.counts(), m.pc.r16(PM1_EVENT)), ([0, 0, 1], STS_WAKE), "no such state");
}
