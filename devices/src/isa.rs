//! Devices of the ISA bus as models: names and options for `-device`.
//!
//! The board attaches an [`IsaBus`] and names the port space with
//! [`DeviceContext::with_pio_bus`](mimus_core::device::DeviceContext::with_pio_bus).

use crate::char::ns16550::{self, Ns16550};
use crate::misc::debugcon::{self, DebugCon};
use crate::misc::isa_debug_exit::{self, IsaDebugExit};
use crate::misc::pvpanic::{self, PanicEvent, PvPanic};
use mimus_core::bus::AccessRules;
use mimus_core::device::{BuildError, Device, DeviceContext, DeviceModel, ModelEntry, PioDevice};
use mimus_core::irq::{IrqLine, OrGate};
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// All of them.
pub const MODELS: &[ModelEntry] = &[
    ModelEntry::of::<IsaSerial>(),
    ModelEntry::of::<IsaDebugCon>(),
    ModelEntry::of::<IsaDebugExitModel>(),
    ModelEntry::of::<PvPanicModel>(),
];

/// Number of interrupts.
const IRQS: u32 = 16;

/// What a device of the bus asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsaRequest {
    /// End with this exit code.
    Exit(u32),
    /// The guest crashed or wants to be turned off.
    Panic(PanicEvent),
}

/// The ISA bus of a board; clones are the same bus.
#[derive(Clone)]
pub struct IsaBus(Arc<Bus>);

struct Bus {
    gates: Vec<Arc<OrGate>>,
    serial_ports: AtomicU32,
    request: Box<dyn Fn(IsaRequest) + Send + Sync>,
}

impl IsaBus {
    /// A bus whose interrupts are `irqs`, 0 to 15, driven by it alone. `request` must not wait.
    ///
    /// # Panics
    /// If there are not 16: the board's mistake.
    pub fn new(irqs: Vec<IrqLine>, request: impl Fn(IsaRequest) + Send + Sync + 'static) -> Self {
        assert_eq!(irqs.len(), IRQS as usize, "an ISA bus has 16 interrupts");
        let gates = irqs.into_iter().map(OrGate::new).collect();
        Self(Arc::new(Bus { gates, serial_ports: AtomicU32::new(0), request: Box::new(request) }))
    }

    /// A line onto an interrupt, which others may share; `None` above 15.
    pub fn irq(&self, number: u32) -> Option<IrqLine> {
        self.0.gates.get(number as usize).map(OrGate::input)
    }

    /// The board has made the first `ports` serial ports itself.
    pub fn skip_serial_ports(&self, ports: u32) {
        self.0.serial_ports.fetch_max(ports, Ordering::Relaxed);
    }

    /// The number of the next serial port that does not say which it is.
    fn next_serial(&self) -> u32 {
        self.0.serial_ports.fetch_add(1, Ordering::Relaxed)
    }
}

/// Puts a finished device at `port`.
fn at_ports<D: PioDevice + 'static>(
    ctx: &mut DeviceContext<'_>,
    port: u16,
    len: u64,
    rules: AccessRules,
    device: &Arc<D>,
) -> Result<(), BuildError> {
    if u64::from(port) + len > mimus_core::bus::pio::PIO_PORTS {
        return Err(ctx.invalid(format!("iobase={port:#x}: ports end at 0xffff")));
    }
    let region = ctx.pio_region("ports", len, rules);
    ctx.bind_pio(&region, 0, device);
    region.map(port.into());
    Ok(())
}

fn bus(ctx: &DeviceContext<'_>) -> Result<IsaBus, BuildError> {
    ctx.attachment::<IsaBus>().cloned().map_err(|_| ctx.invalid("this machine has no ISA bus"))
}

/// Options of `isa-serial`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct IsaSerialConfig {
    /// Which of the PC's four ports, from 0; the next by default.
    pub index: Option<u32>,
    /// First port; that of the index by default.
    pub iobase: Option<u16>,
    /// Interrupt; that of the index by default.
    pub irq: Option<u32>,
    /// The character device it is connected to.
    pub chardev: Option<String>,
}

/// `isa-serial`.
pub struct IsaSerial;

impl DeviceModel for IsaSerial {
    const NAME: &'static str = "isa-serial";
    const SUMMARY: &'static str = "serial port (16550A) on ISA ports";
    type Config = IsaSerialConfig;

    fn build(c: IsaSerialConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let bus = bus(ctx)?;
        let index = c.index.unwrap_or_else(|| bus.next_serial());
        let known = ns16550::PC_PORTS.get(index as usize);
        let (Some(port), Some(irq)) = (c.iobase.or(known.map(|k| k.0)), c.irq.or(known.map(|k| k.1))) else {
            return Err(ctx.invalid(format!("serial port {index} has no usual place; give iobase= and irq=")));
        };
        let irq = bus.irq(irq).ok_or_else(|| ctx.invalid(format!("irq={irq}: interrupts are 0 to 15")))?;
        let host = c.chardev.map(|id| ctx.char_backend(&id)).transpose()?;
        let uart = Ns16550::new(irq, host);
        at_ports(ctx, port, ns16550::SIZE, ns16550::PORT_RULES, &uart)?;
        Ok(uart)
    }
}

/// Options of `isa-debugcon`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct IsaDebugConConfig {
    /// The port; 0xe9 by default.
    pub iobase: Option<u16>,
    /// The character device that is written to.
    pub chardev: Option<String>,
}

/// `isa-debugcon`.
pub struct IsaDebugCon;

impl DeviceModel for IsaDebugCon {
    const NAME: &'static str = "isa-debugcon";
    const SUMMARY: &'static str = "debug output of firmware on an ISA port";
    type Config = IsaDebugConConfig;

    fn build(c: IsaDebugConConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let id = c.chardev.ok_or_else(|| ctx.invalid("chardev= says where the output goes; it is missing"))?;
        let port = DebugCon::new(ctx.char_backend(&id)?);
        at_ports(ctx, c.iobase.unwrap_or(debugcon::PORT_BOCHS), 1, debugcon::RULES, &port)?;
        Ok(port)
    }
}

/// Options of `isa-debug-exit`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct IsaDebugExitConfig {
    /// First port; 0xf4 by default.
    pub iobase: Option<u16>,
    /// Number of ports; 4 by default.
    pub iosize: Option<u16>,
}

/// `isa-debug-exit`.
pub struct IsaDebugExitModel;

impl DeviceModel for IsaDebugExitModel {
    const NAME: &'static str = "isa-debug-exit";
    const SUMMARY: &'static str = "a port that ends the program with an exit code";
    type Config = IsaDebugExitConfig;

    fn build(c: IsaDebugExitConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let bus = bus(ctx)?;
        let port = IsaDebugExit::new(move |code| (bus.0.request)(IsaRequest::Exit(code)));
        let size = c.iosize.map_or(isa_debug_exit::PORTS, u64::from);
        if size == 0 {
            return Err(ctx.invalid("iosize=0: there is at least one port"));
        }
        at_ports(ctx, c.iobase.unwrap_or(isa_debug_exit::PORT), size, isa_debug_exit::RULES, &port)?;
        Ok(port)
    }
}

/// Options of `pvpanic`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct PvPanicConfig {
    /// The port; 0x505 by default.
    pub ioport: Option<u16>,
}

/// `pvpanic`.
pub struct PvPanicModel;

impl DeviceModel for PvPanicModel {
    const NAME: &'static str = "pvpanic";
    const SUMMARY: &'static str = "a port by which the guest says that it crashed";
    type Config = PvPanicConfig;

    fn build(c: PvPanicConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let bus = bus(ctx)?;
        let port = PvPanic::new(move |event| (bus.0.request)(IsaRequest::Panic(event)));
        at_ports(ctx, c.ioport.unwrap_or(pvpanic::PORT), 1, pvpanic::RULES, &port)?;
        Ok(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Levels;
    use mimus_core::bus::{AccessSize, MemTxAttrs, PioSpace};
    use mimus_core::clock::Clocks;
    use mimus_core::device::{Backends, Options, Registry, Services};
    use mimus_core::io_thread::IoThread;
    use mimus_core::memory::{GuestRam, MemoryMap, MemoryRegion};
    use std::sync::Mutex;

    struct Pc {
        services: Services,
        _io: IoThread,
        pio: Arc<PioSpace>,
        levels: Arc<Levels>,
        requests: Arc<Mutex<Vec<IsaRequest>>>,
        isa: IsaBus,
    }

    impl Pc {
        fn new() -> Self {
            let clocks = Clocks::new();
            let io = IoThread::spawn("io-test", &clocks).unwrap();
            let map = MemoryMap::new();
            let services = Services {
                map: map.clone(),
                memory: map.address_space("system", &MemoryRegion::container("system", u64::MAX)),
                ram: GuestRam::new(),
                clocks,
                io_thread: io.handle().clone(),
                backends: Backends::new(),
                vcpus: Vec::new(),
                doorbells: false,
            };
            let (levels, requests) = (Levels::new(), Arc::new(Mutex::new(Vec::new())));
            let r = requests.clone();
            let irqs = (0..16).map(|n| levels.line(n)).collect();
            let isa = IsaBus::new(irqs, move |request| r.lock().unwrap().push(request));
            Pc { services, _io: io, pio: PioSpace::new(&map), levels, requests, isa }
        }

        fn add(&self, text: &str) -> Result<Arc<dyn Device>, String> {
            let (name, options) = Options::parse_with_first(text, "driver").unwrap();
            let ctx = DeviceContext::new(&self.services, "/machine/x").with_attachment(self.isa.clone());
            let model = Registry::new(&[MODELS]).find(&name.unwrap()).unwrap();
            let device = (model.build)(&options, &mut ctx.with_pio_bus(self.pio.root()));
            self.services.map.apply_pending();
            device.map_err(|e| e.to_string())
        }

        fn out(&self, port: u16, value: u8) {
            self.pio.write(port, AccessSize::B1, value.into(), MemTxAttrs::vcpu(0));
        }
    }

    #[test]
    fn serial_ports_find_their_places() {
        let pc = Pc::new();
        let uarts: Vec<_> = (0..4).map(|_| pc.add("isa-serial").unwrap()).collect();
        // The transmitter-empty interrupt, of the first and the third: they share theirs.
        pc.out(0x3f9, 2);
        pc.out(0x3e9, 2);
        assert_eq!(pc.levels.take(), [(4, true)]);
        uarts[0].reset(mimus_core::device::ResetPhase::Enter);
        uarts[0].reset(mimus_core::device::ResetPhase::Hold);
        assert_eq!(pc.levels.take(), []);
        pc.out(0x3e9, 0);
        assert_eq!(pc.levels.take(), [(4, false)]);
        assert!(pc.add("isa-serial").err().unwrap().contains("iobase="));
        pc.add("isa-serial,iobase=0x200,irq=7").unwrap();
        pc.out(0x201, 2);
        assert_eq!(pc.levels.take(), [(7, true)]);
        assert!(pc.add("isa-serial,index=0,irq=16").err().unwrap().contains("0 to 15"));
        assert!(pc.add("isa-serial,iobase=0xfffc,irq=3").err().unwrap().contains("0xffff"));
        assert!(pc.add("isa-serial,index=0,chardev=x").is_err());
    }

    #[test]
    fn the_board_has_the_first() {
        let pc = Pc::new();
        pc.isa.skip_serial_ports(1);
        let _uart = pc.add("isa-serial").unwrap();
        pc.out(0x2f9, 2);
        assert_eq!(pc.levels.take(), [(3, true)]);
    }

    #[test]
    fn ports_that_ask() {
        let pc = Pc::new();
        pc.add("isa-debug-exit,iobase=0x501,iosize=2").unwrap();
        pc.add("pvpanic").unwrap();
        pc.out(0x502, 1);
        pc.out(0x505, 1);
        assert_eq!(*pc.requests.lock().unwrap(), [IsaRequest::Exit(3), IsaRequest::Panic(PanicEvent::Panicked)]);
        assert!(pc.add("isa-debugcon").err().unwrap().contains("chardev="));
        assert!(pc.add("isa-debug-exit,iosize=0").is_err());
        assert!(pc.add("pvpanic,port=1").is_err());
    }
}
