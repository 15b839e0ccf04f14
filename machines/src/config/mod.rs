//! The schema of a machine: what a user may ask for, as data.
//!
//! The command line fills in a [`MachineConfig`]; a file or a management protocol can do
//! the same, since every type here is serde. Boards are built from it and from nothing
//! else. The value syntax of each option ([`options`], [`chardev`], [`network`]) turns
//! text into these types; its errors name the option, the key and what is accepted.

pub mod chardev;
pub mod firmware;
pub mod keyval;
pub mod memory;
pub mod network;
pub mod options;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use chardev::{CharBackend, Chardev, SocketAddress};
pub use firmware::{BootOrder, FirmwareConfig, FwCfgItem, ItemData, SmbiosField};
pub use keyval::KeyValues;
pub use memory::{HostMemory, MemoryBackend, MemoryKind, MemoryLock};
pub use network::{HostForward, Netdev, NetdevBackend, Nic, Protocol, UserNet};

/// An option whose value cannot be used. Prints as one line: `-smp cpus=x: …`.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error("{option} {value}: {reason}")]
pub struct ConfigError {
    /// The option, with its dash.
    pub option: String,
    /// The value as the user wrote it.
    pub value: String,
    /// What is wrong and what to write instead.
    pub reason: String,
}

impl ConfigError {
    /// An error about `option`'s `value`.
    pub fn new(option: &str, value: &str, reason: impl Into<String>) -> Self {
        ConfigError { option: option.into(), value: value.into(), reason: reason.into() }
    }
}

/// A whole machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Guest architecture, as in `mimus system <guest>`: `riscv64`.
    pub guest: String,
    /// `-machine`: the board; `None` is the guest's default board.
    #[serde(default)]
    pub machine: MachineType,
    /// `-cpu`: model and features, for the board to interpret; `None` is the default model.
    #[serde(default)]
    pub cpu: Option<String>,
    /// `-smp`
    #[serde(default)]
    pub smp: Smp,
    /// `-m`: RAM in bytes.
    #[serde(default = "default_memory")]
    pub memory: u64,
    /// Where that comes from.
    #[serde(default)]
    pub host_memory: HostMemory,
    /// What to boot.
    #[serde(default)]
    pub boot: BootConfig,
    /// What firmware and systems are told.
    #[serde(default)]
    pub firmware: FirmwareConfig,
    /// `-drive`, in order.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// `-device`, in order, as written (`driver,key=value,…`): the device's own properties
    /// decide how it is read.
    #[serde(default)]
    pub devices: Vec<String>,
    /// `-netdev`, in order.
    #[serde(default)]
    pub netdevs: Vec<Netdev>,
    /// `-nic`, in order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// `-chardev`, in order.
    #[serde(default)]
    pub chardevs: Vec<Chardev>,
    /// `-serial`: one for each serial port, in order.
    #[serde(default)]
    pub serials: Vec<CharBackend>,
    /// `-monitor`
    #[serde(default)]
    pub monitor: CharBackend,
    /// `-accel`, first choice first; empty is the best that works.
    #[serde(default)]
    pub accels: Vec<Accel>,
    /// `-rtc`
    #[serde(default)]
    pub rtc: Rtc,
    /// `-icount`: time by counting instructions.
    #[serde(default)]
    pub icount: Option<Icount>,
    /// `-record`: where to write what comes from outside.
    #[serde(default)]
    pub record: Option<PathBuf>,
    /// `-replay`: what came from outside, to come again.
    #[serde(default)]
    pub replay: Option<PathBuf>,
    /// `-trace`: where to, and what, as written.
    #[serde(default)]
    pub trace: Option<String>,
    /// `-symbols`: files with names of the guest's addresses.
    #[serde(default)]
    pub symbols: Vec<PathBuf>,
    /// `-seed`: what all chance follows from.
    #[serde(default)]
    pub seed: Option<u64>,
    /// `-no-reboot`: a reset by the guest ends the run.
    #[serde(default)]
    pub no_reboot: bool,
    /// `-no-shutdown`: a power-off by the guest stops the machine instead of ending the run.
    #[serde(default)]
    pub no_shutdown: bool,
    /// `-S`: do not start the CPUs until told to.
    #[serde(default)]
    pub start_paused: bool,
    /// `-gdb` and `-s`: where a debugger's server listens, as written.
    #[serde(default)]
    pub gdb: Option<String>,
    /// `-nodefaults`: only the devices asked for.
    #[serde(default)]
    pub no_defaults: bool,
    /// `-snapshot`: writes to drives go to a temporary overlay.
    #[serde(default)]
    pub snapshot: bool,
    /// `-name`
    #[serde(default)]
    pub name: Option<String>,
    /// `-d` and `-D`
    #[serde(default)]
    pub log: LogConfig,
    /// `-L`: further directories to look for firmware in.
    #[serde(default)]
    pub data_dirs: Vec<PathBuf>,
    /// `-pidfile`: where to write the process id.
    #[serde(default)]
    pub pidfile: Option<PathBuf>,
}

/// RAM of a machine that names no size: 512 MiB. QEMU's 128 MiB do not hold a
/// distribution's kernel and initrd.
pub const DEFAULT_MEMORY: u64 = 512 << 20;

fn default_memory() -> u64 {
    DEFAULT_MEMORY
}

impl MachineConfig {
    /// A machine of `guest` with every default.
    pub fn new(guest: &str) -> Self {
        MachineConfig {
            guest: guest.into(),
            machine: MachineType::default(),
            cpu: None,
            smp: Smp::default(),
            memory: DEFAULT_MEMORY,
            host_memory: HostMemory::default(),
            boot: BootConfig::default(),
            firmware: FirmwareConfig::default(),
            drives: Vec::new(),
            devices: Vec::new(),
            netdevs: Vec::new(),
            nics: Vec::new(),
            chardevs: Vec::new(),
            serials: Vec::new(),
            monitor: CharBackend::None,
            accels: Vec::new(),
            rtc: Rtc::default(),
            icount: None,
            record: None,
            replay: None,
            seed: None,
            trace: None,
            symbols: Vec::new(),
            no_reboot: false,
            no_shutdown: false,
            start_paused: false,
            gdb: None,
            no_defaults: false,
            snapshot: false,
            name: None,
            log: LogConfig::default(),
            data_dirs: Vec::new(),
            pidfile: None,
        }
    }

    /// Checks what can be checked without a board: that names are unique and that
    /// what refers to a name finds it.
    pub fn validate(&self) -> Result<(), ConfigError> {
        unique("-chardev", self.chardevs.iter().map(|c| c.id.as_str()))?;
        unique("-netdev", self.netdevs.iter().map(|n| n.id.as_str()))?;
        unique("-drive", self.drives.iter().filter_map(|d| d.id.as_deref()))?;
        let known: Vec<&str> = self.chardevs.iter().map(|c| c.id.as_str()).collect();
        for (option, backend) in self.serials.iter().map(|s| ("-serial", s)).chain([("-monitor", &self.monitor)]) {
            if let CharBackend::Chardev { id } = backend
                && !known.contains(&id.as_str())
            {
                let reason = format!(
                    "there is no chardev of that name; {}",
                    known_names(&known, "give one with -chardev BACKEND,id=NAME")
                );
                return Err(ConfigError::new(option, &format!("chardev:{id}"), reason));
            }
        }
        self.validate_journal()?;
        self.validate_stdio()
    }

    /// Inputs are noted and repeated by numbers of instructions.
    fn validate_journal(&self) -> Result<(), ConfigError> {
        let named = [("-record", &self.record), ("-replay", &self.replay)];
        let Some((option, Some(file))) = named.iter().find(|(_, file)| file.is_some()) else { return Ok(()) };
        let fails = |why: &str| Err(ConfigError::new(option, &file.display().to_string(), why));
        match (&self.icount, &self.replay) {
            (_, Some(_)) if self.record.is_some() => fails("a run that is repeated is not recorded: give one of both"),
            (Some(Icount { shift: Some(_), .. }), _) => Ok(()),
            _ => fails("it needs time that is instructions: add -icount shift=0 (or another number)"),
        }
    }

    /// Only one thing can read the terminal (the monitor may share with a serial port).
    fn validate_stdio(&self) -> Result<(), ConfigError> {
        let uses = |b: &CharBackend| matches!(b, CharBackend::Stdio { .. });
        let plain = self
            .serials
            .iter()
            .chain([&self.monitor])
            .chain(self.chardevs.iter().map(|c| &c.backend))
            .filter(|b| uses(b))
            .count();
        if plain > 0 && self.gdb.as_deref() == Some("stdio") {
            return Err(ConfigError::new(
                "-gdb",
                "stdio",
                "the terminal is in use already: add -serial none -monitor none (or file:PATH, pty, …)",
            ));
        }
        if plain > 1 {
            return Err(ConfigError::new(
                if uses(&self.monitor) { "-monitor" } else { "-serial" },
                "stdio",
                "the terminal is in use already; to share it between a serial port and the monitor, use -serial mon:stdio",
            ));
        }
        Ok(())
    }
}

fn unique<'a>(option: &str, names: impl Iterator<Item = &'a str>) -> Result<(), ConfigError> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(ConfigError::new(option, &format!("id={name}"), "this id is given twice: each must differ"));
        }
    }
    Ok(())
}

/// "known: a, b", or what to do if there are none.
fn known_names(known: &[&str], none: &str) -> String {
    if known.is_empty() { none.into() } else { format!("known: {}", known.join(", ")) }
}

/// `-machine TYPE,key=value,…`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineType {
    /// Name of the board; `None` is the guest's default.
    pub name: Option<String>,
    /// Its properties (except `accel`, which goes to [`MachineConfig::accels`]), in order.
    pub options: Vec<(String, String)>,
}

/// `-smp`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Smp {
    /// vCPUs present at the start.
    pub cpus: u32,
    /// vCPUs that can be present.
    pub max_cpus: u32,
    /// Sockets.
    pub sockets: u32,
    /// Clusters in each socket.
    pub clusters: u32,
    /// Cores in each cluster.
    pub cores: u32,
    /// Threads of each core.
    pub threads: u32,
}

impl Default for Smp {
    fn default() -> Self {
        Smp { cpus: 1, max_cpus: 1, sockets: 1, clusters: 1, cores: 1, threads: 1 }
    }
}

/// `-kernel`, `-initrd`, `-append`, `-dtb`, `-bios`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootConfig {
    /// Kernel image.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: Option<String>,
    /// Device tree to hand over instead of the board's own.
    pub dtb: Option<PathBuf>,
    /// Firmware.
    pub bios: Bios,
}

/// `-bios`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bios {
    /// What is built in (for RISC-V, the built-in SBI).
    #[default]
    Default,
    /// No firmware: the first instruction is the kernel's, in the CPU's highest mode.
    None,
    /// A file.
    File(PathBuf),
}

/// `-drive`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Drive {
    /// Image or block device.
    pub file: Option<PathBuf>,
    /// What the drive is attached to.
    pub interface: DriveInterface,
    /// Format of the image; `None` is by content, which must be unambiguous.
    pub format: Option<String>,
    /// Name for `-device …,drive=ID`.
    pub id: Option<String>,
    /// Which of several drives on the same interface.
    pub index: Option<u32>,
    /// `readonly=on`
    pub read_only: bool,
    /// `snapshot=on`: writes are lost at the end.
    pub snapshot: bool,
    /// `media=cdrom`
    pub cdrom: bool,
    /// `cache=` mode; `None` is write-back.
    pub cache: Option<CacheMode>,
    /// `discard=unmap`: guest discards punch holes.
    pub discard: bool,
    /// `serial=`, as the guest reads it.
    pub serial: Option<String>,
    /// `bootindex=`: the place in the order in which firmware tries devices.
    pub boot_index: Option<u32>,
}

/// `if=` of `-drive`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriveInterface {
    /// A virtio-blk device of the board's default transport.
    #[default]
    Virtio,
    /// Nothing: a `-device` names it by id.
    None,
    /// A port of the board's SATA controller.
    Ide,
    /// A bank of the board's CFI flash.
    Pflash,
}

/// `cache=` of `-drive`, with QEMU's meanings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// Host page cache; flushes reach the disk.
    #[default]
    Writeback,
    /// Each write reaches the disk.
    Writethrough,
    /// No host page cache (`O_DIRECT`).
    None,
    /// No host page cache, and each write reaches the disk.
    Directsync,
    /// Flushes are ignored.
    Unsafe,
}

/// `-accel`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accel {
    /// `tcg` or `kvm`.
    pub name: String,
    /// Its properties, in order.
    #[serde(default)]
    pub options: Vec<(String, String)>,
}

/// `-icount`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Icount {
    /// An instruction takes `2^shift` ns; `None`: what keeps pace with the host (`auto`).
    pub shift: Option<u32>,
    /// The host's time passes too while the guest waits.
    #[serde(default = "yes")]
    pub sleep: bool,
}

fn yes() -> bool {
    true
}

/// `-rtc`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rtc {
    /// What the clock shows at the start.
    pub base: RtcBase,
    /// What drives it.
    pub clock: RtcClock,
}

/// `base=` of `-rtc`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RtcBase {
    /// The host's time, UTC.
    #[default]
    Utc,
    /// The host's local time.
    Localtime,
    /// Seconds since 1970-01-01T00:00:00Z.
    Seconds(i64),
}

/// `clock=` of `-rtc`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RtcClock {
    /// The host's wall clock, adjustments included.
    #[default]
    Host,
    /// The host's monotonic clock.
    Rt,
    /// The guest's virtual time: stops with the machine.
    Vm,
}

/// `-d` and `-D`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// What to log; names of [`options::LOG_ITEMS`].
    pub items: Vec<String>,
    /// Where to; `None` is standard error.
    pub file: Option<PathBuf>,
}
