//! The parts of a machine while a board puts it together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use mimus_core::accel::{
    AccelVm, Accelerator, EmulationFallback, IrqChip, IrqChipMode, Shortcuts, Vcpu, VcpuHandle, VcpuIndex, VmConfig,
};
use mimus_core::arch::{CpuModel, GuestArch};
use mimus_core::backend::InputSink;
use mimus_core::bus::{AccessRules, PioSpace};
use mimus_core::clock::{Clocks, Shift};
use mimus_core::device::{Backends, BuildError, Device, DeviceContext, MmioDevice, PioDevice, Services};
use mimus_core::error::{HostError, why_not_made};
use mimus_core::io_thread::{IoThread, IoThreadHandle};
use mimus_core::memory::{
    AddressSpace, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock, RamLock, RamOptions, RamSource,
};
use mimus_core::vcpu::thread::current_vcpu;
use mimus_core::vcpu::{PinTimers, VcpuThreads};
use mimus_devices::pci::PciBus;

use super::MachineError;
use super::control::{MachineControl, Request};
use super::cpu_io::{CpuHooks, MachineIo};
use super::machine::{Board, Machine, Parts, Policy};
use crate::config::{HostMemory, MemoryKind, MemoryLock};

/// What a machine is made from, whatever its board.
pub struct MachineSpec<'a> {
    /// The board's name, with its version if it has any: what snapshots are checked for.
    pub board: &'static str,
    /// The guest.
    pub arch: GuestArch,
    /// How to run it.
    pub accel: &'a dyn Accelerator,
    /// `-accel` options.
    pub accel_options: BTreeMap<String, String>,
    /// The CPU asked for.
    pub cpu: CpuModel,
    /// Number of vCPUs.
    pub smp: u32,
    /// Where RAM is, in the order in which it fills the RAM block.
    pub ram: Vec<RamRange>,
    /// Where RAM comes from.
    pub host_memory: &'a HostMemory,
    /// There are x86 ports.
    pub ports: bool,
    /// Who runs the interrupt controllers that an accelerator may run; `None`: it decides.
    pub irqchip: Option<IrqChipMode>,
    /// Who finishes instructions that the accelerator cannot execute.
    pub emulation_failure: Option<Arc<dyn EmulationFallback>>,
    /// The host's side.
    pub io: HostIo,
}

/// A stretch of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

/// What of the host a machine is connected to. Made first: character devices register
/// with its I/O thread when they are opened.
pub struct HostIo {
    clocks: Clocks,
    thread: IoThread,
    backends: Arc<Backends>,
}

impl HostIo {
    /// Starts the I/O thread; there are no back ends yet.
    pub fn new() -> Result<Self, HostError> {
        let clocks = Clocks::new();
        let thread = IoThread::spawn("io-0", &clocks)?;
        Ok(Self { clocks, thread, backends: Backends::new() })
    }

    /// The I/O thread.
    pub fn handle(&self) -> &IoThreadHandle {
        self.thread.handle()
    }

    /// Has time and chance follow from the instructions executed and the seed, as far as the user wants that.
    ///
    /// # Errors
    /// The file of `-record` or `-replay`.
    pub fn repeatable(&self, config: &crate::config::MachineConfig) -> Result<(), MachineError> {
        let mut seed = config.seed;
        if let Some(icount) = &config.icount {
            let shift = icount.shift.map_or(Shift::Auto, Shift::Fixed);
            self.handle().count_instructions(shift, icount.sleep);
            if icount.shift.is_some() {
                seed = self.pass_inputs(config)?.or(seed);
            }
        }
        if let Some(number) = seed {
            mimus_core::outside::seed(number, &self.clocks.virt);
        }
        Ok(())
    }

    /// Has what comes from outside come at instructions' numbers. The seed of a run that is recorded or replayed.
    fn pass_inputs(&self, config: &crate::config::MachineConfig) -> Result<Option<u64>, MachineError> {
        let inputs = self.handle().inputs();
        self.backends.set_inputs(inputs.clone());
        if let Some(file) = &config.replay {
            let failed = |e| MachineError::Other(format!("-replay: {e}"));
            return inputs.replay(file).map(Some).map_err(failed);
        }
        let Some(file) = &config.record else { return Ok(None) };
        let seed = config.seed.unwrap_or(1);
        let failed = |e| MachineError::Other(format!("-record {}: {}", file.display(), why_not_made(file, &e)));
        inputs.record(file, seed).map(|()| Some(seed)).map_err(failed)
    }

    /// Disks, networks and character devices by name.
    pub fn backends(&self) -> &Arc<Backends> {
        &self.backends
    }
}

/// A machine without its devices: memory, clocks, vCPUs. Nothing runs.
pub struct MachineBuilder {
    board: &'static str,
    ram: Arc<RamBlock>,
    main: MemoryRegion,
    cpu: CpuModel,
    services: Services,
    ports: Option<Arc<PioSpace>>,
    io_thread: IoThread,
    control: MachineControl,
    requests: Receiver<Request>,
    vm: Arc<dyn AccelVm>,
    irqchip: Option<Arc<dyn IrqChip>>,
    vcpus: Vec<Box<dyn Vcpu>>,
    threads: VcpuThreads,
    devices: Vec<(String, Arc<dyn Device>)>,
    spaces: Vec<Arc<AddressSpace>>,
    pci: Vec<Arc<PciBus>>,
    inputs: Vec<Arc<dyn InputSink>>,
}

impl MachineBuilder {
    /// Makes memory, clocks, the I/O thread and the vCPUs.
    pub fn new(spec: MachineSpec<'_>) -> Result<Self, MachineError> {
        let HostIo { clocks, thread: io_thread, backends } = spec.io;
        let ram = GuestRam::new();
        let size = spec.ram.iter().map(|r| r.len).sum::<u64>();
        ram.lock_in_memory(ram_lock(spec.host_memory));
        let block = ram.add_block_with("ram", size, &ram_options(spec.host_memory));
        let block = block.map_err(|e| MachineError::Other(format!("-m {}M: {e}", size >> 20)))?;
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let memory = map.address_space("memory", &root);
        let main = MemoryRegion::ram("ram", &block);
        map_ram(&map, &root, &main, &spec.ram);
        let ports = spec.ports.then(|| PioSpace::new(&map));
        let config = VmConfig {
            arch: spec.arch,
            memory: memory.clone(),
            ram: ram.clone(),
            smp: spec.smp,
            clock: clocks.virt.clone(),
            options: spec.accel_options,
        };
        let vm = spec.accel.create_vm(&config)?;
        let most = vm.caps().max_vcpus;
        if spec.smp > most {
            let text = format!("-smp {}: accelerator {} has at most {most} vCPUs", spec.smp, spec.accel.name());
            return Err(MachineError::Other(text));
        }
        let irqchip = vm.create_irqchip(spec.irqchip.unwrap_or(vm.irqchip_mode()))?;
        let cpu = vm.filter_cpu_model(&spec.cpu)?;
        let mut vcpus: Vec<_> = (0..spec.smp).map(|i| vm.create_vcpu(VcpuIndex(i), &cpu)).collect::<Result<_, _>>()?;
        if let Some(fallback) = &spec.emulation_failure {
            let hook = fallback.create(&config)?;
            vcpus.iter_mut().for_each(|v| v.set_emulation_failure(hook.clone()));
        }
        let handles: Vec<_> = vcpus.iter().map(|v| v.handle()).collect();
        if let (Some(counted), Some(first)) = (clocks.virt.counted(), handles.first()) {
            let first = Arc::downgrade(first);
            counted.set_wake(move || {
                // On its own thread it sees to it by itself.
                if current_vcpu().is_none()
                    && let Some(vcpu) = first.upgrade()
                {
                    vcpu.signal().wake();
                }
            });
        }
        let (control, requests) = MachineControl::new();
        let events = control.clone();
        let threads = VcpuThreads::new(handles.clone(), move |event| events.vcpu_event(event));
        control.set_threads(&threads);
        let hooked = map.clone();
        io_thread.handle().set_after_hook(move || hooked.apply_pending());
        let services = Services {
            map,
            memory,
            ram,
            clocks,
            io_thread: io_thread.handle().clone(),
            backends,
            vcpus: handles,
            doorbells: vm.doorbells().is_some(),
        };
        Ok(Self {
            board: spec.board,
            ram: block,
            main,
            cpu,
            services,
            ports,
            io_thread,
            control,
            requests,
            vm,
            irqchip,
            vcpus,
            threads,
            devices: Vec::new(),
            spaces: Vec::new(),
            pci: Vec::new(),
            inputs: Vec::new(),
        })
    }

    /// What devices share.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Main RAM.
    pub fn ram(&self) -> &Arc<RamBlock> {
        &self.ram
    }

    /// All of the RAM block as a region, to make aliases of.
    pub fn ram_region(&self) -> &MemoryRegion {
        &self.main
    }

    /// The ports, if there are any.
    pub fn ports(&self) -> Option<&Arc<PioSpace>> {
        self.ports.as_ref()
    }

    /// The interrupt controllers that the accelerator runs.
    pub fn irqchip(&self) -> Option<&Arc<dyn IrqChip>> {
        self.irqchip.as_ref()
    }

    /// Who runs the interrupt controllers.
    pub fn irqchip_mode(&self) -> IrqChipMode {
        self.irqchip.as_ref().map_or(IrqChipMode::User, |c| c.mode())
    }

    /// The accelerator's part.
    pub fn vm(&self) -> &Arc<dyn AccelVm> {
        &self.vm
    }

    /// The memory vCPUs see.
    pub fn memory(&self) -> &Arc<AddressSpace> {
        &self.services.memory
    }

    /// The CPU model as the accelerator runs it.
    pub fn cpu(&self) -> &CpuModel {
        &self.cpu
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &[Arc<dyn VcpuHandle>] {
        &self.services.vcpus
    }

    /// The vCPUs' threads, for firmware that turns them off.
    pub fn threads(&self) -> &VcpuThreads {
        &self.threads
    }

    /// The way to ask things of the machine.
    pub fn control(&self) -> &MachineControl {
        &self.control
    }

    /// The context for a device at `path`.
    pub fn context(&self, path: &str) -> DeviceContext<'_> {
        let ctx = DeviceContext::new(&self.services, path);
        match &self.ports {
            Some(ports) => ctx.with_pio_bus(ports.root()),
            None => ctx,
        }
    }

    /// Takes a device in. Devices are reset and restored in this order.
    pub fn add_device(&mut self, path: &str, device: Arc<dyn Device>) -> Result<(), MachineError> {
        if self.devices.iter().any(|d| d.0 == path) {
            let reason = "there are two devices of this name; give another id=".to_owned();
            return Err(BuildError::Invalid { path: path.to_owned(), reason }.into());
        }
        self.devices.push((path.to_owned(), device));
        Ok(())
    }

    /// Takes in a device with one block of registers at a fixed address.
    pub fn add_mmio<D: Device + MmioDevice>(
        &mut self,
        path: &str,
        (base, len): (u64, u64),
        rules: AccessRules,
        device: Arc<D>,
    ) -> Result<(), MachineError> {
        let region = MemoryRegion::mmio(path, len, rules);
        if let Some(binding) = region.binding() {
            binding.bind_mmio(device.clone(), 0);
        }
        self.map(base, &region);
        self.add_device(path, device)
    }

    /// Takes in a device with one block of ports.
    pub fn add_pio<D: Device + PioDevice>(
        &mut self,
        path: &str,
        (base, len): (u16, u64),
        rules: AccessRules,
        device: Arc<D>,
    ) -> Result<(), MachineError> {
        self.map_pio(path, (base, len), rules, 0, device.clone())?;
        self.add_device(path, device)
    }

    /// Maps ports of a device, as its region number `index`.
    pub fn map_pio<D: PioDevice + 'static>(
        &self,
        name: &str,
        (base, len): (u16, u64),
        rules: AccessRules,
        index: u32,
        device: Arc<D>,
    ) -> Result<(), MachineError> {
        let region = MemoryRegion::mmio(name, len, rules);
        if let Some(binding) = region.binding() {
            binding.bind_pio(device, index);
        }
        self.map_ports(base, &region)
    }

    /// Maps a region in the port space.
    pub fn map_ports(&self, base: u16, region: &MemoryRegion) -> Result<(), MachineError> {
        let name = region.name();
        let ports = self.ports.as_ref().ok_or_else(|| MachineError::other(format!("{name}: there are no ports")))?;
        self.services.map.change(|t| {
            t.map(ports.root(), base.into(), region);
        });
        Ok(())
    }

    /// Keeps an address space, beside the one of system memory, for as long as the machine lives.
    pub fn keep_address_space(&mut self, space: Arc<AddressSpace>) {
        self.spaces.push(space);
    }

    /// Takes note of a keyboard or mouse.
    pub fn add_input(&mut self, sink: Arc<dyn InputSink>) {
        self.inputs.push(sink);
    }

    /// Takes note of a PCI bus, for whoever looks at the machine from outside.
    pub fn add_pci_bus(&mut self, bus: &Arc<PciBus>) {
        self.pci.push(bus.clone());
    }

    /// Maps a region in system memory.
    pub fn map(&self, address: u64, region: &MemoryRegion) {
        let memory = &self.services.memory;
        self.services.map.change(|t| {
            t.map(memory.root(), address, region);
        });
    }

    /// A ROM with these contents at its start.
    pub fn add_rom(&self, name: &str, (base, len): (u64, u64), contents: &[u8]) -> Result<Arc<RamBlock>, MachineError> {
        let block = self.services.ram.add_block(name, len, RamBacking::Private)?;
        if !block.write(0, contents) {
            return Err(MachineError::Other(format!("{name}: {} bytes do not fit {len}", contents.len())));
        }
        self.map(base, &MemoryRegion::rom(name, &block));
        Ok(block)
    }

    /// Starts the vCPUs' threads; the machine is ready, and paused.
    pub fn finish(
        self,
        board: Box<dyn Board>,
        hooks: impl Into<CpuHooks>,
        policy: Policy,
    ) -> Result<Machine, MachineError> {
        let s = &self.services;
        all_used(&s.backends)?;
        let timers = PinTimers::new(&s.io_thread, &s.vcpus);
        let ports = self.ports.clone();
        let hooks = CpuHooks { ports: self.ports, ..hooks.into() };
        let io = MachineIo::new(&s.memory, &s.clocks.virt, &self.threads, timers, hooks);
        s.map.apply_pending();
        // Not before: each change of the map on the way here would cost a call to the accelerator.
        if let Some(listener) = self.vm.memory_listener() {
            s.memory.add_listener(listener);
        }
        follow_shortcuts(&self.vm, &s.memory, ports.as_deref());
        self.threads.spawn(self.vcpus, io.clone())?;
        Ok(Machine::new(Parts {
            name: self.board,
            cpu: self.cpu,
            board,
            policy,
            control: self.control,
            requests: self.requests,
            services: self.services,
            io_thread: self.io_thread,
            vm: self.vm,
            threads: self.threads,
            io,
            devices: self.devices,
            pci: self.pci,
            inputs: self.inputs,
            _spaces: self.spaces,
        }))
    }
}

fn ram_lock(memory: &HostMemory) -> RamLock {
    match memory.lock {
        MemoryLock::Off => RamLock::Off,
        MemoryLock::On => RamLock::Now,
        MemoryLock::OnFault => RamLock::OnFault,
    }
}

/// The host memory of main RAM.
fn ram_options(memory: &HostMemory) -> RamOptions {
    let Some(b) = &memory.backend else { return RamOptions { prealloc: memory.prealloc, ..RamOptions::default() } };
    let source = match &b.kind {
        MemoryKind::Ram => RamSource::Anonymous,
        MemoryKind::Memfd { huge } => RamSource::Memfd { huge: *huge },
        MemoryKind::File { path } => RamSource::File(path.clone()),
    };
    RamOptions { source, share: b.share, prealloc: b.prealloc || memory.prealloc }
}

/// Has the accelerator see to the writes that it can see to by itself.
fn follow_shortcuts(vm: &Arc<dyn AccelVm>, memory: &Arc<AddressSpace>, ports: Option<&PioSpace>) {
    let spaces = [(Some(memory), false), (ports.map(PioSpace::space), true)];
    for (space, pio) in spaces {
        if let Some((space, listener)) = space.zip(Shortcuts::listener(vm, pio)) {
            space.add_listener(listener);
        }
    }
}

/// Maps the ranges, lowest offset in the block first.
fn map_ram(map: &MemoryMap, root: &MemoryRegion, main: &MemoryRegion, ranges: &[RamRange]) {
    let mut offset = 0;
    map.change(|t| {
        for range in ranges.iter().filter(|r| r.len > 0) {
            // One range is the block itself: fewer steps to render.
            let region = match ranges.len() {
                1 => main.clone(),
                _ => MemoryRegion::alias(format!("ram-{:x}", range.base), main, offset, range.len),
            };
            t.map(root, range.base, &region);
            offset += range.len;
        }
    });
}

/// A network or disk that no device uses is a mistake: the guest would go without it.
fn all_used(backends: &Backends) -> Result<(), MachineError> {
    let unused = |(id, user): (String, Option<String>)| user.is_none().then_some(id);
    let error = |option: &str, id: &str, device: &str| {
        MachineError::Other(format!("{option} id={id}: no device uses it; add -device {device}={id}"))
    };
    if let Some(id) = backends.list_net().into_iter().find_map(|(id, _, user)| unused((id, user))) {
        return Err(error("-netdev", &id, "virtio-net-pci,netdev"));
    }
    match backends.list_block().into_iter().find_map(|(id, _, user)| unused((id, user))) {
        Some(id) => Err(error("-drive", &id, "virtio-blk-pci,drive")),
        None => Ok(()),
    }
}
