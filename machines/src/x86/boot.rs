//! What a PC starts with: firmware at the reset vector, or a kernel entered directly.
//!
//! Without firmware the board does what firmware would have: it sets the chipset up
//! ([`SetUpChipset`]), puts the tables in memory and hands over a memory map. Images are
//! read again at each reset, so that no copy of them is kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mimus_core::arch::CpuState;
use mimus_core::arch::x86::{X86State, msr};
use mimus_core::bus::{GuestPhys, MemTxAttrs};
use mimus_core::device::Services;
use mimus_core::snapshot::SnapshotError;

use super::acpi::{self, TableSet};
use super::layout;
use super::options::Kind;
use super::smbios;
use crate::boot::x86::{self as direct, Entry, Handover, Image, Memory};
use crate::boot::{BootError, Named, read_file};
use crate::config::MachineConfig;
use crate::machine::{Board, MachineError, PowerOn, SetUp};

/// Where the ACPI root pointer is: the BIOS area is searched for it (ACPI 6.5 §5.2.5.1).
const RSDP: u64 = 0xf_0000;
/// Where the SMBIOS entry point is.
const SMBIOS_ANCHOR: u64 = 0xf_0040;

/// Where real mode ends.
const REAL_MODE_END: u32 = 1 << 20;

/// What firmware would do to the chipset, after a reset and before a kernel.
pub type SetUpChipset = Box<dyn Fn() -> Result<(), SnapshotError> + Send>;
/// Presses the power button; false if nobody listens.
pub type PressPowerButton = Box<dyn Fn() -> bool + Send>;

/// How a board sleeps with its memory kept.
pub struct Sleep {
    /// Whether it does.
    pub asleep: Box<dyn Fn() -> bool + Send>,
    /// The reset that comes wakes it.
    pub waking: Box<dyn Fn() + Send>,
}

/// Does something at each start but the first.
pub struct Started {
    before: AtomicBool,
    again: Box<dyn Fn() + Send>,
}

impl Started {
    /// Not yet.
    pub fn new(again: impl Fn() + Send + 'static) -> Self {
        Self { before: AtomicBool::new(false), again: Box::new(again) }
    }

    fn next(&self) {
        if self.before.swap(true, Ordering::Relaxed) {
            (self.again)();
        }
    }
}

/// A PC's part in resets.
pub struct PcBoard {
    /// Which board.
    pub kind: Kind,
    /// The machine.
    pub config: MachineConfig,
    /// Its RAM.
    pub memory: Memory,
    /// Firmware starts it; otherwise a kernel does.
    pub firmware: bool,
    /// ACPI tables, if it has them.
    pub acpi: Option<TableSet>,
    /// SMBIOS structures.
    pub smbios: Vec<u8>,
    /// What is added to the kernel's command line.
    pub cmdline: String,
    /// The chipset.
    pub set_up: SetUpChipset,
    /// The power button.
    pub power_button: PressPowerButton,
    /// Sleep, if it does.
    pub sleep: Option<Sleep>,
    /// Where the FACS is that the tables say, without firmware; 0: nowhere.
    pub facs: AtomicU64,
    /// All vCPUs are powered on, and the accelerator has them wait.
    pub all_on: bool,
    /// What changes after the first start (`-boot once=`).
    pub started: Started,
    /// RAM was used before: what images leave zero must be made so.
    pub used: AtomicBool,
}

impl Board for PcBoard {
    fn boot(&self, services: &Services) -> Result<Vec<PowerOn>, MachineError> {
        self.started.next();
        Ok(self.others_wait(match self.firmware {
            true => PowerOn::AtReset,
            false => PowerOn::With(self.enter_kernel(services)?),
        }))
    }

    fn asleep(&self) -> bool {
        self.sleep.as_ref().is_some_and(|s| (s.asleep)())
    }

    fn waking(&self) {
        if let Some(sleep) = &self.sleep {
            (sleep.waking)();
        }
    }

    /// Firmware finds by itself that it is to resume. Without it the board does what it would: the chipset is set up, and
    /// the system goes on at its waking vector (ACPI 6.5 section 16.3.2).
    fn wake(&self, services: &Services) -> Result<Vec<PowerOn>, MachineError> {
        if self.firmware {
            return Ok(self.others_wait(PowerOn::AtReset));
        }
        let vector = self.waking_vector(services);
        if !(1..REAL_MODE_END).contains(&vector) {
            log::warn!("the guest slept with waking vector {vector:#x}, which is none in real mode: it starts anew");
            return self.boot(services);
        }
        (self.set_up)().map_err(|e| MachineError::other(e.to_string()))?;
        services.map.apply_pending();
        Ok(self.others_wait(PowerOn::With(resume(vector))))
    }

    fn press_power_button(&self) -> bool {
        (self.power_button)()
    }
}

impl PcBoard {
    fn others_wait(&self, first: PowerOn) -> Vec<PowerOn> {
        // What firmware sets up on each processor, it does.
        let others = match (self.firmware, self.all_on) {
            (true, true) => PowerOn::AtReset,
            (true, false) => PowerOn::Off,
            (false, true) => PowerOn::With(with_memory_types(|_| ())),
            (false, false) => PowerOn::OffWith(with_memory_types(|_| ())),
        };
        let mut out = vec![others; self.config.smp.cpus as usize];
        out[0] = first;
        out
    }

    /// What the system has written into the FACS.
    fn waking_vector(&self, services: &Services) -> u32 {
        let (facs, mut bytes) = (self.facs.load(Ordering::Relaxed), [0; 4]);
        let at = GuestPhys(facs + acpi::fixed::FACS_WAKING_VECTOR);
        match facs != 0 && services.memory.read_bytes(at, &mut bytes, MemTxAttrs::default()).is_ok() {
            true => u32::from_le_bytes(bytes),
            false => 0,
        }
    }

    /// Loads a kernel and what belongs to it; returns how the first CPU enters it.
    fn enter_kernel(&self, services: &Services) -> Result<SetUp, MachineError> {
        let Some(path) = &self.config.boot.kernel else {
            return Err(MachineError::other("there is nothing to run: give -kernel FILE or -bios FILE"));
        };
        let what = format!("-kernel {}", path.display());
        let image = direct::load_kernel(&what, read_file("-kernel", path)?, &self.config.guest)?;
        let initrd = self.read_initrd()?;
        let cmdline = self.cmdline();
        direct::check_cmdline(&image, &cmdline)?;
        let acpi_len = self.acpi.as_ref().map_or(0, |t| t.len() as u64).next_multiple_of(64);
        let tables = acpi_len + self.smbios.len() as u64;
        let initrd_size = initrd.as_ref().map(|i| (i.what.as_str(), i.value.len() as u64));
        let placement = direct::place(self.memory, (&what, &image), initrd_size, tables)?;

        (self.set_up)().map_err(|e| MachineError::other(e.to_string()))?;
        services.map.apply_pending();
        let zero = self.used.swap(true, Ordering::Relaxed);
        load(services, &what, &image, zero)?;
        if let (Some(initrd), Some(range)) = (&initrd, &placement.initrd) {
            write(services, &initrd.what, range.start, &initrd.value)?;
        }
        let rsdp = self.write_tables(services, placement.tables.start, acpi_len)?;
        let handover = Handover {
            initrd: placement.initrd.as_ref().map(|r| (r.start, r.end - r.start)),
            rsdp,
            memory: layout::e820(self.kind, self.memory, placement.tables.clone()),
            ..Handover::default()
        };
        for (address, data) in image.hand_over(&cmdline, &seed()?, handover) {
            write(services, "the boot parameters", address, &data)?;
        }
        Ok(start(image.entry()))
    }

    fn read_initrd(&self) -> Result<Option<Named<Vec<u8>>>, BootError> {
        let Some(path) = &self.config.boot.initrd else { return Ok(None) };
        let value = read_file("-initrd", path)?;
        Ok(Some(Named { what: format!("-initrd {}", path.display()), value }))
    }

    fn cmdline(&self) -> String {
        let given = self.config.boot.append.as_deref().unwrap_or_default();
        match (given.is_empty(), self.cmdline.is_empty()) {
            (false, false) => format!("{given} {}", self.cmdline),
            (false, true) => given.to_owned(),
            (true, _) => self.cmdline.clone(),
        }
    }

    /// Writes tables, root pointer and entry point; returns where the root pointer is.
    fn write_tables(&self, services: &Services, base: u64, acpi_len: u64) -> Result<u64, MachineError> {
        let smbios_at = base + acpi_len;
        write(services, "the SMBIOS tables", smbios_at, &self.smbios)?;
        let anchor = smbios::anchor(self.smbios.len(), smbios_at);
        write(services, "the SMBIOS entry point", SMBIOS_ANCHOR, &anchor)?;
        let Some(set) = &self.acpi else {
            // No stale one of an earlier run.
            write(services, "the BIOS area", RSDP, &[0; 8])?;
            return Ok(0);
        };
        self.facs.store(set.facs().map_or(0, |at| base + at as u64), Ordering::Relaxed);
        write(services, "the ACPI tables", base, &set.place(base))?;
        write(services, "the ACPI root pointer", RSDP, &set.rsdp(base))?;
        Ok(RSDP)
    }
}

/// The registers at the kernel's entry, and memory types as firmware leaves them.
fn start(entry: Entry) -> SetUp {
    with_memory_types(move |s| entry.apply(s))
}

/// Real mode at the waking vector: "CS = vector >> 4, IP = vector & 0fh".
fn resume(vector: u32) -> SetUp {
    with_memory_types(move |s| {
        s.cs.selector = (vector >> 4) as u16;
        s.cs.base = u64::from(s.cs.selector) << 4;
        s.rip = u64::from(vector & 0xf);
    })
}

fn with_memory_types(apply: impl Fn(&mut X86State) + Send + Sync + 'static) -> SetUp {
    /// IA32_MTRR_DEF_TYPE: MTRRs on, write-back by default (SDM vol. 3, 12.11.2.1).
    const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
    Arc::new(move |state: &mut CpuState| {
        let Some(s) = state.as_x86_mut() else { return };
        apply(s);
        if s.msr(msr::MTRR_DEF_TYPE).is_some() {
            s.set_msr(msr::MTRR_DEF_TYPE, MTRR_WRITE_BACK);
        }
    })
}

fn seed() -> Result<[u8; 32], MachineError> {
    let mut seed = [0; 32];
    let read = mimus_core::outside::random(&mut seed);
    read.map_err(|e| MachineError::other(format!("/dev/urandom: {e}")))?;
    Ok(seed)
}

fn load(services: &Services, what: &str, image: &Image, zero: bool) -> Result<(), MachineError> {
    for piece in image.pieces() {
        write(services, what, piece.address, piece.data)?;
        if zero {
            let len = piece.data.len() as u64;
            clear(services, what, piece.address + len, piece.memory_size.saturating_sub(len))?;
        }
    }
    Ok(())
}

fn clear(services: &Services, what: &str, mut address: u64, mut len: u64) -> Result<(), MachineError> {
    let zeros = [0; 4096];
    while len > 0 {
        let n = len.min(zeros.len() as u64);
        write(services, what, address, &zeros[..n as usize])?;
        (address, len) = (address + n, len - n);
    }
    Ok(())
}

fn write(services: &Services, what: &str, address: u64, data: &[u8]) -> Result<(), MachineError> {
    if data.is_empty() || services.memory.load_bytes(GuestPhys(address), data).is_ok() {
        return Ok(());
    }
    let end = address.saturating_add(data.len() as u64);
    Err(MachineError::other(format!("{what} is to be at {address:#x}..{end:#x}, where this machine has no memory")))
}
