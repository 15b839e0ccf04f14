//! The end of building a PC, the same for each board: firmware is told of it, and it becomes a machine.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use super::acpi::{SleepStates, TableSet};
use super::boot::{PcBoard, PressPowerButton, Sleep, Started};
use super::common;
use super::fw_cfg::Contents;
use super::interrupts::{Interrupts, mask_pic};
use super::options::Kind;
use super::smm::SmiFeatures;
use crate::boot::x86::Memory;
use crate::config::MachineConfig;
use crate::machine::boot_list::BootList;
use crate::machine::{CpuHooks, Machine, MachineBuilder, MachineError, Policy};

/// What a board says of itself at the end.
pub struct Parts<'a> {
    /// Which board.
    pub kind: Kind,
    /// The machine.
    pub config: &'a MachineConfig,
    /// Its RAM.
    pub memory: Memory,
    /// Firmware starts it; otherwise a kernel does.
    pub firmware: bool,
    /// ACPI tables, if it has them.
    pub acpi: Option<TableSet>,
    /// Its sleep states.
    pub sleep_states: Option<SleepStates>,
    /// What firmware is to boot from.
    pub boot_list: BootList,
    /// What firmware may negotiate of SMIs.
    pub smi: Option<Arc<Mutex<SmiFeatures>>>,
    /// What is added to the kernel's command line.
    pub cmdline: String,
    /// What firmware would do to the chipset beside the interrupt controllers.
    pub set_up: Box<dyn Fn() + Send>,
    /// The power button.
    pub power_button: PressPowerButton,
    /// Sleep, if it does.
    pub sleep: Option<Sleep>,
    /// What changes after the first start (`-boot once=`).
    pub started: Started,
}

/// Makes the machine. It is paused and not powered on yet.
pub fn finish(mut b: MachineBuilder, ints: Interrupts, p: Parts<'_>) -> Result<Machine, MachineError> {
    let smbios = common::smbios_tables(p.kind, p.config, &b, p.memory)?;
    let contents = Contents {
        config: p.config,
        memory: p.memory,
        acpi: p.acpi.as_ref(),
        smbios: &smbios,
        kernel: p.firmware,
        boot_list: p.boot_list,
        smi: p.smi,
        sleep: p.sleep_states,
    };
    common::add_fw_cfg(&mut b, &contents)?;
    let (pic, set_up) = (ints.pic, p.set_up);
    let board = PcBoard {
        kind: p.kind,
        config: p.config.clone(),
        memory: p.memory,
        firmware: p.firmware,
        acpi: p.acpi,
        smbios,
        cmdline: p.cmdline,
        set_up: Box::new(move || {
            set_up();
            mask_pic(&*pic)
        }),
        power_button: p.power_button,
        sleep: p.sleep,
        facs: AtomicU64::new(0),
        all_on: ints.accelerator_starts,
        started: p.started,
        used: AtomicBool::new(false),
    };
    let policy = Policy { no_reboot: p.config.no_reboot, no_shutdown: p.config.no_shutdown };
    b.finish(Box::new(board), CpuHooks { interrupts: ints.hooks, ..CpuHooks::default() }, policy)
}
