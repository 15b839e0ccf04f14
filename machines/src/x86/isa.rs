//! Devices on the ISA bus: serial ports and the clock of every PC, and the models that
//! `-device isa-…` names.

use std::sync::{Arc, Mutex};

use mimus_core::accel::ShutdownCause;
use mimus_core::backend::CharBackend;
use mimus_core::bus::AccessRules;
use mimus_core::device::{BuildError, Device, DeviceContext, DeviceModel, ModelEntry, PioDevice, lock};
use mimus_core::irq::IrqLine;
use mimus_devices::char::ns16550::{self, Ns16550};
use mimus_devices::misc::debugcon::{self, DebugCon};
use mimus_devices::misc::isa_debug_exit::{self, IsaDebugExit};
use mimus_devices::misc::pvpanic::{self, PanicEvent, PvPanic};
use mimus_devices::timer::mc146818::{self, Mc146818};
use serde::Deserialize;

use super::interrupts::Interrupts;
use crate::config::{ConfigError, MachineConfig};
use crate::machine::{MachineBuilder, MachineControl, MachineError, Request, time};

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
    b.add_pio("/machine/rtc", (0x70, mc146818::PORTS), mc146818::RULES, rtc.clone())?;
    Ok((rtc, irq))
}

/// The models that `-device` can name.
pub const MODELS: &[ModelEntry] =
    &[ModelEntry::of::<DebugExitModel>(), ModelEntry::of::<DebugConModel>(), ModelEntry::of::<PvPanicModel>()];

/// A device with one block of ports at `port`.
fn on_ports<D: Device + PioDevice>(
    ctx: &mut DeviceContext<'_>,
    (port, len): (u16, u64),
    rules: AccessRules,
    device: Arc<D>,
) -> Result<Arc<dyn Device>, BuildError> {
    if !ctx.has_ports() {
        return Err(ctx.invalid("this board has no ports"));
    }
    let region = ctx.pio_region("ports", len, rules);
    region.bind_pio(0, device.clone());
    region.map(port.into());
    Ok(device)
}

fn control(ctx: &DeviceContext<'_>) -> Result<MachineControl, BuildError> {
    ctx.attachment::<MachineControl>().cloned()
}

/// Options of [`DebugExitModel`].
#[derive(Debug, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct DebugExitConfig {
    iobase: u16,
    iosize: u64,
}

impl Default for DebugExitConfig {
    fn default() -> Self {
        Self { iobase: isa_debug_exit::PORT, iosize: isa_debug_exit::PORTS }
    }
}

/// `isa-debug-exit`
pub struct DebugExitModel;

impl DeviceModel for DebugExitModel {
    const NAME: &'static str = "isa-debug-exit";
    const SUMMARY: &'static str = "writing N to its port ends mimus with status 2 N + 1";
    type Config = DebugExitConfig;

    fn build(c: DebugExitConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        if !(1..=16).contains(&c.iosize) {
            return Err(ctx.invalid(format!("iosize={}: it is from 1 to 16", c.iosize)));
        }
        let control = control(ctx)?;
        let device = IsaDebugExit::new(move |code| {
            control.guest_request(Request::Shutdown(ShutdownCause::GuestExit(code)));
        });
        on_ports(ctx, (c.iobase, c.iosize), isa_debug_exit::RULES, device)
    }
}

/// Options of [`DebugConModel`].
#[derive(Debug, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct DebugConConfig {
    iobase: u16,
    chardev: Option<String>,
}

impl Default for DebugConConfig {
    fn default() -> Self {
        Self { iobase: debugcon::PORT_BOCHS, chardev: None }
    }
}

/// `isa-debugcon`
pub struct DebugConModel;

impl DeviceModel for DebugConModel {
    const NAME: &'static str = "isa-debugcon";
    const SUMMARY: &'static str = "what is written to its port goes to a character device (iobase=0x402 for firmware)";
    type Config = DebugConConfig;

    fn build(c: DebugConConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let id = c.chardev.ok_or_else(|| ctx.invalid("chardev= is missing: name one made with -chardev"))?;
        let device = DebugCon::new(ctx.char_backend(&id)?);
        on_ports(ctx, (c.iobase, 1), debugcon::RULES, device)
    }
}

/// Options of [`PvPanicModel`].
#[derive(Debug, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct PvPanicConfig {
    ioport: u16,
}

impl Default for PvPanicConfig {
    fn default() -> Self {
        Self { ioport: pvpanic::PORT }
    }
}

/// `pvpanic`
pub struct PvPanicModel;

impl DeviceModel for PvPanicModel {
    const NAME: &'static str = "pvpanic";
    const SUMMARY: &'static str = "by which a guest's kernel says that it crashed";
    type Config = PvPanicConfig;

    fn build(c: PvPanicConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let control = control(ctx)?;
        let device = PvPanic::new(move |event| match event {
            PanicEvent::Panicked => control.guest_request(Request::Shutdown(ShutdownCause::GuestPanic)),
            PanicEvent::ShutDown => control.guest_request(Request::Shutdown(ShutdownCause::GuestPowerOff)),
            PanicEvent::CrashLoaded => log::info!("the guest's kernel crashed; its crash kernel goes on"),
        });
        on_ports(ctx, (c.ioport, 1), pvpanic::RULES, device)
    }
}
