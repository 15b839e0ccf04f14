//! The ISA bus: serial ports and the clock of every PC, and what `-device isa-…` is put on.

use std::sync::{Arc, Mutex};

use mimus_core::accel::ShutdownCause;
use mimus_core::backend::CharBackend;
use mimus_core::bus::Shortcut;
use mimus_core::device::lock;
use mimus_core::irq::IrqLine;
use mimus_core::memory::MemoryRegion;
use mimus_devices::char::ns16550::{self, Ns16550};
use mimus_devices::isa::{IsaBus, IsaRequest};
use mimus_devices::misc::pvpanic::PanicEvent;
use mimus_devices::timer::mc146818::{self, Mc146818};

use super::interrupts::Interrupts;
use crate::config::{ConfigError, MachineConfig};
use crate::machine::{MachineBuilder, MachineError, Request, time};

/// The clock's interrupt.
pub const IRQ_RTC: u32 = 8;

/// Puts the serial ports in that have something, of at most `most`; tells which are there.
pub fn add_serials(
    b: &mut MachineBuilder,
    ints: &Interrupts,
    config: &MachineConfig,
    serials: &[Option<String>],
    most: usize,
) -> Result<Vec<bool>, MachineError> {
    if serials.len() > most {
        let board = config.machine.name.as_deref().unwrap_or("default");
        let reason = format!("the {board} board has {most} serial ports");
        return Err(ConfigError::new("-serial", &format!("(number {})", serials.len()), reason).into());
    }
    for (i, id) in serials.iter().enumerate() {
        let path = format!("/machine/serial.{i}");
        let Some(id) = id else { continue };
        let backend: Arc<dyn CharBackend> = b.context(&path).char_backend(id)?;
        let (port, irq) = ns16550::PC_PORTS[i];
        let uart = Ns16550::new(ints.line(irq), Some(backend));
        b.add_pio(&path, (port, ns16550::SIZE), ns16550::PORT_RULES, uart)?;
    }
    Ok(serials.iter().map(Option::is_some).collect())
}

/// Puts the clock in. `cmos` is what firmware finds beside the time.
pub fn add_rtc(
    b: &mut MachineBuilder,
    ints: &Interrupts,
    config: &MachineConfig,
    cmos: &[(u8, u8)],
) -> Result<(Arc<Mutex<Mc146818>>, IrqLine), MachineError> {
    let (timer, offset) = time::rtc(b.services(), &config.rtc)?;
    let irq = ints.line(IRQ_RTC);
    let rtc = Mc146818::new(irq.clone(), timer, offset);
    cmos.iter().for_each(|(at, value)| lock(&rtc).set_ram(*at, *value));
    let region = MemoryRegion::mmio("/machine/rtc", mc146818::PORTS, mc146818::RULES);
    if let Some(binding) = region.binding() {
        binding.bind_pio(rtc.clone(), 0);
        // The index does nothing until the data is accessed.
        binding.add_shortcut(Shortcut::Coalesced { offset: mc146818::INDEX, len: 1 });
    }
    b.map_ports(0x70, &region)?;
    b.add_device("/machine/rtc", rtc.clone())?;
    Ok((rtc, irq))
}

/// The bus that `-device isa-…` models sit on.
pub fn bus(b: &MachineBuilder, ints: &Interrupts) -> IsaBus {
    let control = b.control().clone();
    let shut_down = move |cause| control.guest_request(Request::Shutdown(cause));
    IsaBus::new((0..16).map(|n| ints.line(n)).collect(), move |request| match request {
        IsaRequest::Exit(code) => shut_down(ShutdownCause::GuestExit(code)),
        IsaRequest::Panic(PanicEvent::Panicked) => shut_down(ShutdownCause::GuestPanic),
        IsaRequest::Panic(PanicEvent::ShutDown) => shut_down(ShutdownCause::GuestPowerOff),
        IsaRequest::Panic(PanicEvent::CrashLoaded) => {
            log::info!("the guest's kernel crashed; its crash kernel goes on")
        }
    })
}
