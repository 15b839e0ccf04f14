//! Every board of this program: what `-machine` can name.

use mimus_core::arch::GuestArch;
use mimus_core::arch::riscv::models::MODELS as RISCV_MODELS;
use mimus_core::arch::x86::X86Model;

use crate::config::keyval::nearest;
use crate::config::{ConfigError, MachineConfig};
use crate::machine::{Host, Machine, MachineError};
use crate::{riscv, x86};

/// One board.
pub struct BoardEntry {
    /// The name in `-machine`.
    pub name: &'static str,
    /// Other names.
    pub aliases: &'static [&'static str],
    /// One line for `-machine help`.
    pub summary: &'static str,
    /// The guests it is a board of; for the first board of a guest it is the default.
    pub guests: &'static [GuestArch],
    /// Starts without a kernel, firmware or flash being named.
    pub own_firmware: bool,
    /// Builds a machine, paused and not powered on.
    pub build: fn(&MachineConfig, Host<'_>) -> Result<Machine, MachineError>,
}

/// The boards, the default of each guest before its others.
pub const BOARDS: &[BoardEntry] = &[
    BoardEntry {
        name: "virt",
        aliases: &[],
        summary: "RISC-V VirtIO board",
        guests: &[GuestArch::Riscv64],
        own_firmware: false,
        build: riscv::virt::build,
    },
    BoardEntry {
        name: "q35",
        aliases: &["pc-q35"],
        summary: "PC with PCI Express (Q35, ICH9)",
        guests: &[GuestArch::X86_64, GuestArch::I386],
        own_firmware: true,
        build: x86::pc::build_q35,
    },
    BoardEntry {
        name: "pc",
        aliases: &["pc-i440fx"],
        summary: "PC with PCI (440FX, PIIX3)",
        guests: &[GuestArch::X86_64, GuestArch::I386],
        own_firmware: true,
        build: x86::pc::build_pc,
    },
    BoardEntry {
        name: "microvm",
        aliases: &[],
        summary: "little more than virtio devices; starts fastest",
        guests: &[GuestArch::X86_64, GuestArch::I386],
        own_firmware: false,
        build: x86::microvm::build,
    },
];

/// The boards of a guest, the default first.
pub fn of(guest: GuestArch) -> impl Iterator<Item = &'static BoardEntry> {
    BOARDS.iter().filter(move |b| b.guests.contains(&guest))
}

/// The guest a configuration is for.
pub fn guest(config: &MachineConfig) -> Result<GuestArch, ConfigError> {
    let found = GuestArch::ALL.into_iter().find(|a| a.name() == config.guest);
    found.ok_or_else(|| ConfigError::new("system", &config.guest, "there is no such guest"))
}

/// The board a configuration asks for.
pub fn find(config: &MachineConfig) -> Result<&'static BoardEntry, ConfigError> {
    let guest = guest(config)?;
    let Some(name) = config.machine.name.as_deref() else {
        let reason = "there are no boards of this guest";
        return of(guest).next().ok_or_else(|| ConfigError::new("system", guest.name(), reason));
    };
    let named = |b: &BoardEntry| b.name == name || b.aliases.contains(&name);
    of(guest).find(|b| named(b)).ok_or_else(|| {
        let near = nearest(name, of(guest).map(|b| b.name));
        let hint = near.map_or(String::new(), |n| format!(" (did you mean {n}?)"));
        let other = BOARDS.iter().find(|b| named(b)).and_then(|b| b.guests.first());
        let reason = match other {
            Some(other) => format!("it is a board of {other}, not of {guest}; see -machine help"),
            None => format!("there is no such board{hint}; see -machine help"),
        };
        ConfigError::new("-machine", name, reason)
    })
}

/// Names and descriptions, for `-machine help`.
pub fn list(guest: GuestArch) -> Vec<(&'static str, String)> {
    let line = |(i, b): (usize, &'static BoardEntry)| {
        let default = if i == 0 { " (default)" } else { "" };
        (b.name, format!("{}{default}", b.summary))
    };
    of(guest).enumerate().map(line).collect()
}

/// CPU models and their descriptions, for `-cpu help`.
pub fn cpus(guest: GuestArch) -> Vec<(&'static str, &'static str)> {
    match guest {
        GuestArch::Riscv64 => RISCV_MODELS.to_vec(),
        GuestArch::X86_64 | GuestArch::I386 => X86Model::list().collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_name(guest: &str, board: Option<&str>) -> Result<&'static str, String> {
        let mut config = MachineConfig::new(guest);
        config.machine.name = board.map(str::to_owned);
        find(&config).map(|b| b.name).map_err(|e| e.to_string())
    }

    #[test]
    fn names_and_defaults() {
        assert_eq!(find_name("riscv64", None), Ok("virt"));
        assert_eq!(find_name("riscv64", Some("virt")), Ok("virt"));
        assert!(find_name("riscv64", Some("vitr")).unwrap_err().contains("did you mean virt?"));
        assert!(find_name("riscv65", None).unwrap_err().contains("no such guest"));
        assert!(list(GuestArch::Riscv64)[0].1.ends_with("(default)"));
        assert!(!cpus(GuestArch::X86_64).is_empty());
    }
}
