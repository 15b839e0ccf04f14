//! What the `virt` board boots, and from where.
//!
//! Three ways in: the built-in SBI enters the kernel in S-mode on hart 0; `-bios FILE`
//! starts firmware in M-mode on all harts through the reset code in mask ROM; `-bios
//! none` starts the kernel itself that way. Images are read again at each reset, so that
//! no copy of them is kept.

use std::sync::atomic::{AtomicBool, Ordering};

use mimus_core::accel::StartRequest;
use mimus_core::bus::GuestPhys;
use mimus_core::device::Services;

use super::{fdt, map};
use crate::boot::riscv::{KERNEL_OFFSET, Parts, Placement, Ram, place};
use crate::boot::{BootFiles, Kernel, KernelFormat, Named};
use crate::config::{Bios, MachineConfig};
use crate::machine::{Board, MachineError, PowerOn};

/// Room kept for the board's device tree, which grows with what is in it.
const FDT_ROOM: u64 = 64 << 10;

/// The `virt` board's part in resets.
pub(super) struct VirtBoot {
    pub config: MachineConfig,
    /// The tree but for the initrd's place and the seed.
    pub fdt: fdt::FdtConfig,
    /// The first bank of flash has an image: that is what starts, after `-bios`.
    pub flash: bool,
    /// RAM was used before: what images leave zero must be made so.
    pub used: AtomicBool,
}

/// Where execution starts and what it is told.
struct Start {
    /// First instruction of the firmware, or of the kernel if there is none.
    entry: u64,
    /// What firmware hands over to; 0 for nothing.
    next: u64,
    fdt: u64,
}

impl Board for VirtBoot {
    fn boot(&self, services: &Services) -> Result<Vec<PowerOn>, MachineError> {
        let files = BootFiles::read(&self.config)?;
        let mut placement = self.place(&files)?;
        if self.config.boot.bios == Bios::None {
            lower_to_ram_base(&files, &mut placement);
        }
        let zero = self.used.swap(true, Ordering::Relaxed);
        let firmware = match &files.firmware {
            Some(firmware) => Some(load_firmware(services, firmware, &placement, zero)?),
            None => None,
        };
        if let (Some(kernel), Some(range)) = (&files.kernel, &placement.kernel) {
            load(services, kernel, range.start, zero)?;
        }
        if let (Some(initrd), Some(range)) = (&files.initrd, &placement.initrd) {
            write(services, &initrd.what, range.start, &initrd.value)?;
        }
        let tree = self.device_tree(&files, &placement)?;
        write(services, "the device tree", placement.fdt, &tree)?;
        let flash = self.flash.then_some(map::FLASH.base);
        let next = placement.entry.or(flash);
        let Some(entry) = firmware.or(next) else {
            return Err(MachineError::other("there is nothing to run: give -kernel FILE or -bios FILE"));
        };
        let start = Start { entry, next: next.unwrap_or(0), fdt: placement.fdt };
        if self.config.boot.bios == Bios::Default {
            let request = StartRequest { pc: start.entry, arg0: 0, arg1: start.fdt };
            return Ok(vec![PowerOn::At(request)]);
        }
        write(services, "the reset code", map::MROM.base, &reset_code(&start))?;
        Ok(vec![PowerOn::AtReset; self.config.smp.cpus as usize])
    }
}

impl VirtBoot {
    fn ram(&self) -> Ram {
        Ram { base: map::DRAM_BASE, size: self.config.memory }
    }

    fn place(&self, files: &BootFiles) -> Result<Placement, MachineError> {
        let fdt_size = files.dtb.as_ref().map_or(0, |d| d.value.len() as u64).max(FDT_ROOM);
        let parts = Parts {
            kernel: files.kernel.as_ref().map(|k| (k.what.as_str(), &k.value)),
            initrd: files.initrd.as_ref().map(|i| (i.what.as_str(), i.value.len() as u64)),
            fdt_size,
        };
        Ok(place(self.ram(), parts)?)
    }

    fn device_tree(&self, files: &BootFiles, placement: &Placement) -> Result<Vec<u8>, MachineError> {
        if let Some(dtb) = &files.dtb {
            return Ok(dtb.value.clone());
        }
        let mut config = self.fdt.clone();
        config.initrd = placement.initrd.clone();
        let seed = mimus_core::outside::random(&mut config.rng_seed);
        seed.map_err(|e| MachineError::other(format!("/dev/urandom: {e}")))?;
        let blob = fdt::build(&config).map_err(|e| MachineError::other(format!("the device tree: {e}")))?;
        if blob.len() as u64 > FDT_ROOM {
            let text = format!("the device tree has {} bytes, more than {FDT_ROOM}: is -append that long?", blob.len());
            return Err(MachineError::other(text));
        }
        Ok(blob)
    }
}

/// Without firmware, an image without addresses of its own begins where RAM does.
fn lower_to_ram_base(files: &BootFiles, placement: &mut Placement) {
    let moves = match files.kernel.as_ref().map(|k| k.value.format) {
        Some(KernelFormat::Raw) => true,
        Some(KernelFormat::LinuxImage { text_offset, .. }) => text_offset == 0,
        Some(KernelFormat::Elf) | None => false,
    };
    if moves && let (Some(range), Some(entry)) = (&mut placement.kernel, &mut placement.entry) {
        *range = range.start - KERNEL_OFFSET..range.end - KERNEL_OFFSET;
        *entry -= KERNEL_OFFSET;
    }
}

/// Loads firmware and returns its entry.
fn load_firmware(
    services: &Services,
    firmware: &Named<Kernel>,
    placement: &Placement,
    zero: bool,
) -> Result<u64, MachineError> {
    let k = &firmware.value;
    let (range, entry) = match k.format {
        KernelFormat::Elf => {
            let (low, high) = k.extent().unwrap_or_default();
            (low..high, k.entry)
        }
        _ => (map::DRAM_BASE..map::DRAM_BASE.saturating_add(k.memory_size()), map::DRAM_BASE + k.entry),
    };
    let others = [("-kernel", &placement.kernel), ("-initrd", &placement.initrd)];
    for (option, other) in others.into_iter().filter_map(|(o, r)| Some((o, r.as_ref()?))) {
        if range.start < other.end && other.start < range.end {
            return Err(MachineError::other(format!(
                "{} needs {:#x}..{:#x}, where {option} goes ({:#x}..{:#x})",
                firmware.what, range.start, range.end, other.start, other.end
            )));
        }
    }
    load(services, firmware, range.start, zero)?;
    Ok(entry)
}

/// Copies an image to memory: an ELF where it says, anything else to `base`.
fn load(services: &Services, image: &Named<Kernel>, base: u64, zero: bool) -> Result<(), MachineError> {
    let base = if image.value.format == KernelFormat::Elf { 0 } else { base };
    for segment in &image.value.segments {
        let address = base.saturating_add(segment.address);
        write(services, &image.what, address, &segment.data)?;
        if zero {
            let rest = segment.memory_size.saturating_sub(segment.data.len() as u64);
            clear(services, &image.what, address.saturating_add(segment.data.len() as u64), rest)?;
        }
    }
    Ok(())
}

fn clear(services: &Services, what: &str, mut address: u64, mut len: u64) -> Result<(), MachineError> {
    let zeros = [0; 4096];
    while len > 0 {
        let n = len.min(zeros.len() as u64);
        write(services, what, address, &zeros[..n as usize])?;
        (address, len) = (address.saturating_add(n), len - n);
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

/// The code at the reset vector, as on QEMU's board: `a0` is the hart, `a1` the device
/// tree, `a2` OpenSBI's `fw_dynamic_info`; then it goes to `start.entry`.
fn reset_code(start: &Start) -> Vec<u8> {
    // RISC-V ISA manual, volume I; the data follows the six instructions.
    const CODE: [u32; 6] = [
        0x0000_0297, // auipc t0, 0
        0x0282_8613, // addi  a2, t0, 40
        0xf140_2573, // csrr  a0, mhartid
        0x0202_b583, // ld    a1, 32(t0)
        0x0182_b283, // ld    t0, 24(t0)
        0x0002_8067, // jr    t0
    ];
    // OpenSBI, docs/firmware/fw_dynamic.md: magic "OSBI", version 2, next stage, its mode
    // (S), options, preferred boot hart (any).
    let info = [0x4942_534f, 2, start.next, 1, 0, u64::MAX];
    let words = CODE.iter().flat_map(|w| w.to_le_bytes());
    let data = [start.entry, start.fdt].into_iter().chain(info);
    words.chain(data.flat_map(u64::to_le_bytes)).collect()
}
