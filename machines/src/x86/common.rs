//! What all x86 boards do the same way.

use std::path::Path;
use std::sync::Arc;

use mimus_core::accel::{IrqChipMode, ResetCause, ShutdownCause};
use mimus_core::arch::{CpuModel, GuestArch};
use mimus_core::device::lock;
use mimus_devices::misc::fw_cfg::{self as fw_cfg_device, FwCfg};

use super::fw_cfg::{self, Contents};
use super::layout;
use super::options::{Kind, Options};
use super::smbios;
use crate::boards;
use crate::boot::read_file;
use crate::boot::x86::Memory;
use crate::config::{ConfigError, MachineConfig, SmbiosField};
use crate::machine::{Host, MachineBuilder, MachineControl, MachineError, MachineSpec, Request};

/// Most processors: their APIC ids have 8 bits, of which 255 is for all of them.
pub const MAX_CPUS: u32 = 255;

/// The board's name in snapshots.
const fn identity(kind: Kind, arch: GuestArch) -> &'static str {
    match (kind, arch) {
        (Kind::Microvm, GuestArch::I386) => "i386-microvm",
        (Kind::Microvm, _) => "x86_64-microvm",
        (Kind::Pc, GuestArch::I386) => "i386-pc",
        (Kind::Pc, _) => "x86_64-pc",
        (Kind::Q35, GuestArch::I386) => "i386-q35",
        (Kind::Q35, _) => "x86_64-q35",
    }
}

/// Makes RAM, ports and processors.
pub fn builder(
    kind: Kind,
    config: &MachineConfig,
    options: &Options,
    memory: Memory,
    host: Host<'_>,
) -> Result<(MachineBuilder, Vec<Option<String>>), MachineError> {
    let arch = boards::guest(config)?;
    let cpus = config.smp.cpus;
    if !(1..=MAX_CPUS).contains(&cpus) {
        let reason = format!("the {} board has 1 to {MAX_CPUS} CPUs", kind.name());
        return Err(ConfigError::new("-smp", &cpus.to_string(), reason).into());
    }
    if config.boot.dtb.is_some() {
        return Err(ConfigError::new("-dtb", "", "PCs have no device tree; leave it out").into());
    }
    let cpu = match &config.cpu {
        Some(text) => CpuModel::parse(arch, text),
        None => host.accel.default_cpu(arch),
    };
    let cpu = cpu.map_err(|e| MachineError::other(format!("-cpu: {e}")))?;
    let accel = host.accel.name();
    let b = MachineBuilder::new(MachineSpec {
        board: identity(kind, arch),
        arch,
        accel: host.accel,
        accel_options: host.accel_options,
        cpu,
        smp: cpus,
        ram: layout::ranges(memory),
        host_memory: &config.host_memory,
        ports: true,
        irqchip: options.irqchip,
        emulation_failure: host.emulation_failure,
        io: host.io,
    })?;
    if let Some(mode) = options.irqchip.filter(|m| *m != IrqChipMode::User && b.irqchip_mode() != *m) {
        let value = if mode == IrqChipMode::Kernel { "kernel-irqchip=on" } else { "kernel-irqchip=split" };
        let reason = format!("accelerator {accel} has no interrupt controllers of its own; use kernel-irqchip=off");
        return Err(ConfigError::new("-machine", value, reason).into());
    }
    Ok((b, host.serials))
}

/// SMBIOS structures of the machine.
pub fn smbios_tables(
    kind: Kind,
    config: &MachineConfig,
    b: &MachineBuilder,
    memory: Memory,
) -> Result<Vec<u8>, MachineError> {
    let short = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let smp = config.smp;
    let cores = smp.clusters.max(1) * smp.cores;
    Ok(smbios::tables(&smbios::Config {
        product: kind.name().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uuid: config.firmware.uuid.unwrap_or_default(),
        fields: smbios_fields(config)?,
        sockets: short(smp.sockets),
        cores: short(cores),
        threads: short(cores * smp.threads),
        cpuid: cpuid_signature(b),
        memory,
    }))
}

/// The user's fields, with what comes from files.
fn smbios_fields(config: &MachineConfig) -> Result<Vec<SmbiosField>, MachineError> {
    let field = |f: &SmbiosField| {
        let mut f = f.clone();
        if (f.kind, f.key.as_str()) == (11, "path") {
            let text = read_file("-smbios", Path::new(&f.value))?;
            f.value = String::from_utf8(text)
                .map_err(|_| MachineError::other(format!("-smbios path={}: it is not text", f.value)))?;
        }
        Ok(f)
    };
    config.firmware.smbios.iter().map(field).collect()
}

/// CPUID leaf 1: EAX, and EDX as far as every x86-64 processor has it.
fn cpuid_signature(b: &MachineBuilder) -> (u32, u32) {
    let Some(m) = b.cpu().as_x86() else { return (0, 0) };
    let (family, model) = (u32::from(m.family), u32::from(m.model));
    let base_family = family.min(15);
    let eax = (family - base_family) << 20
        | (model >> 4) << 16
        | base_family << 8
        | (model & 0xf) << 4
        | u32::from(m.stepping & 0xf);
    (eax, 0x078b_fbff)
}

/// Width of physical addresses, for windows: what the model says, else what every 64-bit processor of these days has.
pub fn phys_bits(b: &MachineBuilder, arch: GuestArch) -> u8 {
    const LONG_MODE: u8 = 40;
    const PAE: u8 = 36;
    match b.cpu().as_x86().map(|m| m.phys_bits) {
        Some(bits) if bits != 0 => bits,
        _ if arch == GuestArch::I386 => PAE,
        _ => LONG_MODE,
    }
}

/// Puts fw_cfg in.
pub fn add_fw_cfg(b: &mut MachineBuilder, contents: &Contents<'_>) -> Result<(), MachineError> {
    let path = "/machine/fw_cfg";
    let device = FwCfg::new(b.context(path).dma());
    fw_cfg::fill(&mut lock(&device), contents)?;
    b.add_pio(path, (fw_cfg_device::PORT, fw_cfg_device::PORTS), fw_cfg_device::PORT_RULES, device)
}

/// What a device of the board asks of the machine on behalf of the guest.
#[derive(Clone)]
pub struct GuestRequests(Arc<MachineControl>);

impl GuestRequests {
    /// Requests to this machine.
    pub fn new(b: &MachineBuilder) -> Self {
        Self(Arc::new(b.control().clone()))
    }

    /// The guest turns the machine off.
    pub fn power_off(&self) {
        self.0.guest_request(Request::Shutdown(ShutdownCause::GuestPowerOff));
    }

    /// The guest sleeps.
    pub fn sleep(&self) {
        self.0.guest_request(Request::Sleep);
    }

    /// Something wakes it.
    pub fn wake(&self) {
        self.0.request(Request::Wake);
    }

    /// The guest resets the machine.
    pub fn reset(&self) {
        self.0.guest_request(Request::Reset(ResetCause::Guest));
    }
}
