//! The board's side of the wiring: the only thing a device's constructor sees.

use super::device::{MmioDevice, PioDevice, lock};
use super::keyvalue::{OptionError, did_you_mean};
use super::registry::UnknownModel;
use crate::accel::VcpuHandle;
use crate::backend::{BlockBackend, CharBackend, NetBackend};
use crate::bus::AccessRules;
use crate::clock::{ClockKind, Clocks, Timer};
use crate::error::HostError;
use crate::inputs::Inputs;
use crate::io_thread::IoThreadHandle;
use crate::irq::{IrqLine, MsiTarget};
use crate::memory::{AddressSpace, DmaHandle, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamError, RegionHandle};
use std::any::{Any, TypeId};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// Why a device cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// An option is wrong.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// No such model.
    #[error(transparent)]
    Model(#[from] UnknownModel),
    /// RAM cannot be had.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The host refuses something.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A backend's id is unknown.
    #[error("{path}: no {kind} backend {id:?}{hint}")]
    NoBackend { path: String, kind: &'static str, id: String, hint: String },
    /// A backend belongs to another device.
    #[error("{path}: {kind} backend {id:?} is used by {user} already")]
    BackendInUse { path: String, kind: &'static str, id: String, user: String },
    /// The board does not provide what the device needs.
    #[error("{path}: this device needs {what}, which its bus does not have")]
    Missing { path: String, what: String },
    /// Anything else, in one line.
    #[error("{path}: {reason}")]
    Invalid { path: String, reason: String },
}

/// Host backends of one kind by id, each usable by one device.
struct Table<T: ?Sized> {
    kind: &'static str,
    entries: BTreeMap<String, (Arc<T>, Option<String>)>,
}

impl<T: ?Sized> Table<T> {
    fn new(kind: &'static str) -> Mutex<Self> {
        Mutex::new(Self { kind, entries: BTreeMap::new() })
    }

    fn add(&mut self, id: &str, backend: Arc<T>) -> bool {
        !self.entries.contains_key(id) && self.entries.insert(id.to_owned(), (backend, None)).is_none()
    }

    fn claim(&mut self, id: &str, path: &str, wrap: impl FnOnce(Arc<T>) -> Arc<T>) -> Result<Arc<T>, BuildError> {
        let kind = self.kind;
        let (path_, id_) = (path.to_owned(), id.to_owned());
        let hint = did_you_mean(id, self.entries.keys().map(String::as_str));
        match self.entries.get_mut(id) {
            None => Err(BuildError::NoBackend { path: path_, kind, id: id_, hint }),
            Some((_, Some(user))) if user != path => {
                Err(BuildError::BackendInUse { path: path_, kind, id: id_, user: user.clone() })
            }
            Some((backend, user)) => {
                if user.is_none() {
                    *backend = wrap(backend.clone());
                }
                *user = Some(path_);
                Ok(backend.clone())
            }
        }
    }

    fn list(&self) -> Vec<(String, Arc<T>, Option<String>)> {
        self.entries.iter().map(|(id, (b, user))| (id.clone(), b.clone(), user.clone())).collect()
    }
}

/// The host backends of a machine, by the ids of the configuration.
pub struct Backends {
    block: Mutex<Table<dyn BlockBackend>>,
    char: Mutex<Table<dyn CharBackend>>,
    net: Mutex<Table<dyn NetBackend>>,
    inputs: OnceLock<Arc<Inputs>>,
}

impl Default for Backends {
    fn default() -> Self {
        Self {
            block: Table::new("block"),
            char: Table::new("character"),
            net: Table::new("network"),
            inputs: OnceLock::new(),
        }
    }
}

macro_rules! backends {
    ($($field:ident, $trait:path, $add:ident, $list:ident, $release:ident;)*) => { $(
        /// Adds a backend; false if the id is taken.
        pub fn $add(&self, id: &str, backend: Arc<dyn $trait>) -> bool {
            lock(&self.$field).add(id, backend)
        }

        /// All of them: id, backend, path of the device that uses it.
        pub fn $list(&self) -> Vec<(String, Arc<dyn $trait>, Option<String>)> {
            lock(&self.$field).list()
        }

        /// Removes a backend.
        pub fn $release(&self, id: &str) -> Option<Arc<dyn $trait>> {
            lock(&self.$field).entries.remove(id).map(|e| e.0)
        }
    )* };
}

impl Backends {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What devices get from backends passes through `inputs` from now on: before any is claimed.
    pub fn set_inputs(&self, inputs: Arc<Inputs>) {
        let _ = self.inputs.set(inputs);
    }

    /// What they pass through, if anything.
    pub fn inputs(&self) -> Option<&Arc<Inputs>> {
        self.inputs.get()
    }

    backends! {
        block, BlockBackend, add_block, list_block, remove_block;
        char, CharBackend, add_char, list_char, remove_char;
        net, NetBackend, add_net, list_net, remove_net;
    }
}

/// What every device of a machine shares.
#[derive(Clone)]
pub struct Services {
    /// The memory map.
    pub map: Arc<MemoryMap>,
    /// System memory.
    pub memory: Arc<AddressSpace>,
    /// RAM blocks.
    pub ram: Arc<GuestRam>,
    /// The clocks.
    pub clocks: Clocks,
    /// The I/O thread.
    pub io_thread: IoThreadHandle,
    /// Host backends.
    pub backends: Arc<Backends>,
    /// vCPUs, for interrupt controllers; empty until they exist.
    pub vcpus: Vec<Arc<dyn VcpuHandle>>,
    /// The accelerator has doorbells ([`AccelVm::doorbells`](crate::accel::AccelVm::doorbells)).
    pub doorbells: bool,
}

/// The wiring of one device while it is built. The board or bus fills it in with the
/// `with_…` methods, then hands it to [`DeviceModel::build`](super::DeviceModel::build).
pub struct DeviceContext<'a> {
    path: String,
    services: &'a Services,
    mmio_bus: Option<MemoryRegion>,
    pio_bus: Option<MemoryRegion>,
    irqs: HashMap<String, IrqLine>,
    msi: Option<MsiTarget>,
    dma: Option<DmaHandle>,
    attachments: HashMap<TypeId, Box<dyn Any + Send>>,
    regions: Vec<(String, RegionHandle)>,
}

impl<'a> DeviceContext<'a> {
    /// Nothing wired; regions are made in system memory.
    pub fn new(services: &'a Services, path: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            services,
            mmio_bus: Some(services.memory.root().clone()),
            pio_bus: None,
            irqs: HashMap::new(),
            msi: None,
            dma: None,
            attachments: HashMap::new(),
            regions: Vec::new(),
        }
    }

    /// Memory-mapped regions go into `bus` instead of system memory.
    pub fn with_mmio_bus(mut self, bus: &MemoryRegion) -> Self {
        self.mmio_bus = Some(bus.clone());
        self
    }

    /// Port regions go into `bus`.
    pub fn with_pio_bus(mut self, bus: &MemoryRegion) -> Self {
        self.pio_bus = Some(bus.clone());
        self
    }

    /// The device's interrupt output `name` drives `line`.
    pub fn with_irq(mut self, name: &str, line: IrqLine) -> Self {
        self.irqs.insert(name.to_owned(), line);
        self
    }

    /// The device can send messages.
    pub fn with_msi(mut self, msi: MsiTarget) -> Self {
        self.msi = Some(msi);
        self
    }

    /// The device reaches memory through `dma`; otherwise directly, ungated.
    pub fn with_dma(mut self, dma: DmaHandle) -> Self {
        self.dma = Some(dma);
        self
    }

    /// Hands the device something its bus defines (a PCI slot, a virtio transport).
    pub fn with_attachment<T: Any + Send>(mut self, attachment: T) -> Self {
        self.attachments.insert(TypeId::of::<T>(), Box::new(attachment));
        self
    }

    /// The device's stable id: `/machine/virtio-mmio.0/virtio-blk-device`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What all devices share.
    pub fn services(&self) -> &'a Services {
        self.services
    }

    /// A region of `len` bytes of registers, not mapped yet.
    pub fn mmio_region(&mut self, name: &str, len: u64, rules: AccessRules) -> RegionHandle {
        let region = MemoryRegion::mmio(format!("{}:{name}", self.path), len, rules);
        self.keep(name, region, self.mmio_bus.clone())
    }

    /// `len` ports, not mapped yet.
    pub fn pio_region(&mut self, name: &str, len: u64, rules: AccessRules) -> RegionHandle {
        let region = MemoryRegion::mmio(format!("{}:{name}", self.path), len, rules);
        self.keep(name, region, self.pio_bus.clone())
    }

    /// A block of RAM of the device's own (video memory), not mapped yet.
    pub fn ram_region(&mut self, name: &str, len: u64) -> Result<RegionHandle, BuildError> {
        let full = format!("{}:{name}", self.path);
        let block = self.services.ram.add_block(&full, len, RamBacking::Private)?;
        Ok(self.keep(name, MemoryRegion::ram(full, &block), self.mmio_bus.clone()))
    }

    /// Flash and the like: reads from a RAM block of its own, writes to the device.
    pub fn rom_device_region(&mut self, name: &str, len: u64, rules: AccessRules) -> Result<RegionHandle, BuildError> {
        let full = format!("{}:{name}", self.path);
        let block = self.services.ram.add_block(&full, len, RamBacking::Private)?;
        Ok(self.keep(name, MemoryRegion::rom_device(full, &block, rules), self.mmio_bus.clone()))
    }

    fn keep(&mut self, name: &str, region: MemoryRegion, bus: Option<MemoryRegion>) -> RegionHandle {
        let handle = RegionHandle::new(&self.services.map, region, bus.as_ref(), 0);
        self.regions.push((name.to_owned(), handle.clone()));
        handle
    }

    /// The regions made so far, by name: the board maps what the device does not.
    pub fn regions(&self) -> &[(String, RegionHandle)] {
        &self.regions
    }

    /// The region called `name`.
    pub fn region(&self, name: &str) -> Option<&RegionHandle> {
        self.regions.iter().find(|r| r.0 == name).map(|r| &r.1)
    }

    /// Routes a region to the finished device, as its region number `index`.
    pub fn bind<D: MmioDevice + 'static>(&self, region: &RegionHandle, index: u32, device: &Arc<D>) {
        region.bind(index, device);
    }

    /// Routes a port region to the finished device, as its region number `index`.
    pub fn bind_pio<D: PioDevice + 'static>(&self, region: &RegionHandle, index: u32, device: &Arc<D>) {
        region.bind_pio(index, device.clone());
    }

    /// The interrupt output `name`; goes nowhere if the board did not connect it.
    pub fn irq_line(&self, name: &str) -> IrqLine {
        self.irqs.get(name).cloned().unwrap_or_default()
    }

    /// The way to send messages.
    pub fn msi_target(&self) -> Result<MsiTarget, BuildError> {
        self.msi.clone().ok_or_else(|| self.missing("message-signalled interrupts"))
    }

    /// The way to guest memory.
    pub fn dma(&self) -> DmaHandle {
        self.dma.clone().unwrap_or_else(|| DmaHandle::ungated(self.services.memory.clone()))
    }

    /// A timer on the virtual clock; bind it when the device is finished.
    pub fn timer(&self) -> Timer {
        self.services.io_thread.timer(ClockKind::Virtual)
    }

    /// A timer on another clock.
    pub fn timer_on(&self, kind: ClockKind) -> Timer {
        self.services.io_thread.timer(kind)
    }

    /// Has `timer` call `tick` on the device, locked, on the I/O thread.
    pub fn bind_timer<D: Send + 'static>(&self, timer: &Timer, device: &Arc<Mutex<D>>, tick: fn(&mut D)) {
        let device: Weak<Mutex<D>> = Arc::downgrade(device);
        timer.bind(move || {
            if let Some(d) = device.upgrade() {
                tick(&mut lock(&d));
            }
        });
    }

    /// The I/O thread.
    pub fn io_thread(&self) -> &'a IoThreadHandle {
        &self.services.io_thread
    }

    /// The clocks.
    pub fn clocks(&self) -> &'a Clocks {
        &self.services.clocks
    }

    /// The vCPUs, for interrupt controllers.
    pub fn vcpus(&self) -> &'a [Arc<dyn VcpuHandle>] {
        &self.services.vcpus
    }

    /// The block backend `id`, for this device alone.
    pub fn block_backend(&self, id: &str) -> Result<Arc<dyn BlockBackend>, BuildError> {
        let inputs = self.services.backends.inputs.get();
        let wrap = |b| match inputs {
            Some(i) => i.disk(b),
            None => b,
        };
        lock(&self.services.backends.block).claim(id, &self.path, wrap)
    }

    /// The character backend `id`, for this device alone.
    pub fn char_backend(&self, id: &str) -> Result<Arc<dyn CharBackend>, BuildError> {
        let inputs = self.services.backends.inputs.get();
        let wrap = |b| match inputs {
            Some(i) => i.char(id, b),
            None => b,
        };
        lock(&self.services.backends.char).claim(id, &self.path, wrap)
    }

    /// The network backend `id`, for this device alone.
    pub fn net_backend(&self, id: &str) -> Result<Arc<dyn NetBackend>, BuildError> {
        let inputs = self.services.backends.inputs.get();
        let wrap = |b| match inputs {
            Some(i) => i.net(id, b),
            None => b,
        };
        lock(&self.services.backends.net).claim(id, &self.path, wrap)
    }

    /// What the bus attached, by type.
    pub fn attachment<T: Any + Send>(&self) -> Result<&T, BuildError> {
        let found = self.attachments.get(&TypeId::of::<T>()).and_then(|a| a.downcast_ref());
        found.ok_or_else(|| self.missing(std::any::type_name::<T>()))
    }

    /// Takes what the bus attached, by type.
    pub fn take_attachment<T: Any + Send>(&mut self) -> Result<T, BuildError> {
        let taken = self.attachments.remove(&TypeId::of::<T>()).and_then(|a| a.downcast().ok());
        taken.map(|b| *b).ok_or_else(|| self.missing(std::any::type_name::<T>()))
    }

    /// An error that names this device.
    pub fn invalid(&self, reason: impl Into<String>) -> BuildError {
        BuildError::Invalid { path: self.path.clone(), reason: reason.into() }
    }

    fn missing(&self, what: &str) -> BuildError {
        BuildError::Missing { path: self.path.clone(), what: what.to_owned() }
    }

    /// A context for a part of this device, at `PATH/name`, on the same buses and memory.
    pub fn child(&self, name: &str) -> DeviceContext<'a> {
        DeviceContext {
            path: format!("{}/{name}", self.path),
            services: self.services,
            mmio_bus: self.mmio_bus.clone(),
            pio_bus: self.pio_bus.clone(),
            irqs: self.irqs.clone(),
            msi: self.msi.clone(),
            dma: self.dma.clone(),
            attachments: HashMap::new(),
            regions: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{AccessSize, BusFault, GuestPhys, MemTxAttrs, MmioAccess};
    use crate::device::{Device, DeviceModel, ModelEntry, MutLifecycle, MutMmioDevice, Options, Registry};
    use crate::io_thread::IoThread;
    use crate::snapshot::{SaveRestore, Schema, SnapshotError, Stateless};
    use serde::Deserialize;
    use std::sync::mpsc;

    /// Counts ticks of a timer; writing register 0 arms it.
    struct Ticker {
        timer: Timer,
        irq: IrqLine,
        count: u64,
    }

    impl Ticker {
        fn tick(&mut self) {
            self.count += 1;
            self.irq.raise();
        }
    }

    impl MutMmioDevice for Ticker {
        fn mmio_read(&mut self, _: MmioAccess) -> Result<u64, BusFault> {
            Ok(self.count)
        }
        fn mmio_write(&mut self, _: MmioAccess, value: u64) -> Result<(), BusFault> {
            self.timer.arm(value);
            Ok(())
        }
    }
    impl MutLifecycle for Ticker {}
    impl SaveRestore for Ticker {
        const SCHEMA: Schema = Schema::new("ticker", 1);
        type State = Stateless;
        fn save_state(&self) -> Stateless {
            Stateless {}
        }
        fn restore_state(&mut self, _: Stateless) -> Result<(), SnapshotError> {
            Ok(())
        }
    }

    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "kebab-case")]
    struct TickerConfig {
        chardev: Option<String>,
        base: u64,
    }

    struct TickerModel;
    impl DeviceModel for TickerModel {
        const NAME: &'static str = "ticker";
        const SUMMARY: &'static str = "counts";
        type Config = TickerConfig;
        fn build(config: TickerConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
            if let Some(id) = &config.chardev {
                ctx.char_backend(id)?;
            }
            let timer = ctx.timer();
            let region = ctx.mmio_region("regs", 0x100, AccessRules::ANY);
            let irq = ctx.irq_line("irq");
            let device = Arc::new(Mutex::new(Ticker { timer: timer.clone(), irq, count: 0 }));
            ctx.bind(&region, 0, &device);
            ctx.bind_timer(&timer, &device, Ticker::tick);
            region.map(config.base);
            Ok(device)
        }
    }

    const MODELS: Registry = Registry::new(&[&[ModelEntry::of::<TickerModel>()]]);

    struct Tell(Mutex<mpsc::Sender<(u32, bool)>>);
    impl crate::irq::IrqController for Tell {
        fn set_input(&self, pin: u32, level: bool) {
            let _ = lock(&self.0).send((pin, level));
        }
    }

    #[test]
    fn a_device_from_options_to_interrupt() {
        let clocks = Clocks::new();
        let io = IoThread::spawn("io-test", &clocks).unwrap();
        let map = MemoryMap::new();
        let memory = map.address_space("system", &MemoryRegion::container("system", u64::MAX));
        let services = Services {
            map: map.clone(),
            memory: memory.clone(),
            ram: GuestRam::new(),
            clocks: clocks.clone(),
            io_thread: io.handle().clone(),
            backends: Backends::new(),
            vcpus: Vec::new(),
            doorbells: false,
        };
        let (name, options) = Options::parse_with_first("ticker,base=0x1000", "driver").unwrap();
        let entry = MODELS.find(&name.unwrap()).unwrap();
        assert_eq!((entry.properties)(), ["chardev", "base"]);
        let (tx, rx) = mpsc::channel();
        let line = IrqLine::new(Arc::new(Tell(Mutex::new(tx))), 3);
        let mut ctx = DeviceContext::new(&services, "/machine/ticker").with_irq("irq", line);
        let device = (entry.build)(&options, &mut ctx).unwrap();
        map.apply_pending();
        let attrs = MemTxAttrs::vcpu(0);
        assert!(memory.write(GuestPhys(0x1000), AccessSize::B4, 10, attrs).is_ok());
        clocks.virt.advance(10);
        assert_eq!(rx.recv_timeout(std::time::Duration::from_secs(5)), Ok((3, true)));
        assert_eq!(memory.read(GuestPhys(0x1000), AccessSize::B4, attrs).0, 1);
        device.restore(&device.save().unwrap()).unwrap();

        assert!(MODELS.find("tikcer").unwrap_err().to_string().contains("did you mean \"ticker\""));
        let bad = Options::parse("chardev=nope").unwrap();
        let text = (entry.build)(&bad, &mut ctx).err().map(|e| e.to_string()).unwrap();
        assert_eq!(text, "/machine/ticker: no character backend \"nope\"");
        map.teardown();
    }
}
