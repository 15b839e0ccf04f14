//! From a [`MachineConfig`] to the end of its run: the one place where the command line
//! meets boards and accelerators.

use std::process::ExitCode;

use mimus_machines::boot::BootFiles;
use mimus_machines::boot::riscv::{Parts, RAM_BASE, Ram, place};
use mimus_machines::config::MachineConfig;

/// Boards, for `-machine help`.
pub const BOARDS: &[(&str, &str)] = &[("virt", "RISC-V VirtIO board (default)")];

/// CPU models, for `-cpu help`.
pub const CPUS: &[(&str, &str)] = &[
    ("rv64", "RV64GC with the common extensions (default)"),
    ("max", "every extension there is"),
];

/// The text of `-device help` (`None`) or `-device NAME,help`.
pub fn device_help(driver: Option<&str>) -> String {
    match driver {
        None => "this build has no devices that can be added with -device\n".into(),
        Some(name) => format!("there is no device '{name}'; see -device help\n"),
    }
}

/// Builds the machine and runs it to its end. The exit status is 0 when the guest
/// powered off, or reset under `-no-reboot`; everything else is an error.
pub fn run_machine(config: MachineConfig) -> anyhow::Result<ExitCode> {
    if let Some(name) = config.machine.name.as_deref()
        && !BOARDS.iter().any(|(board, _)| *board == name)
    {
        let near = mimus_machines::config::keyval::nearest(name, BOARDS.iter().map(|(b, _)| *b));
        anyhow::bail!(
            "-machine {name}: there is no such board{}; see -machine help",
            near.map_or(String::new(), |n| format!(" (did you mean {n}?)"))
        );
    }
    let files = BootFiles::read(&config)?;
    if files.kernel.is_none() && files.firmware.is_none() && config.drives.is_empty() {
        anyhow::bail!(
            "there is nothing to run: give -kernel FILE or -bios FILE (or see: mimus try {})",
            config.guest
        );
    }
    // The device tree's size is known only once the board is built; 64 KiB is above any of ours.
    let parts = Parts {
        kernel: files.kernel.as_ref().map(|k| (k.what.as_str(), &k.value)),
        initrd: files
            .initrd
            .as_ref()
            .map(|i| (i.what.as_str(), i.value.len() as u64)),
        fdt_size: 64 << 10,
    };
    place(
        Ram {
            base: RAM_BASE,
            size: config.memory,
        },
        parts,
    )?;
    anyhow::bail!(
        "this build of mimus has no board for {} to run on",
        config.guest
    )
}
