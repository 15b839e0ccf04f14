//! Address spaces, and the commit of changes to the region tree.
//!
//! Readers load the current [`FlatView`] without a lock. Changes are made in a
//! [`Transaction`]: rendered once, compared, told to listeners. A device that moves its
//! own region queues the change through its [`RegionHandle`]; it is applied after the
//! device's lock is released and before the access that caused it returns.

use super::flat_view::{FlatKind, FlatRange, FlatView};
use super::guest_ram::RamBlock;
use super::listener::MemoryListener;
use super::region::MemoryRegion;
use crate::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use crate::device::device::{MmioDevice, PioDevice};
use arc_swap::{ArcSwap, Guard};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// Number of an address space in its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressSpaceId(pub u32);

enum Change {
    Map { container: MemoryRegion, addr: u64, priority: i32, region: MemoryRegion },
    Unmap { container: MemoryRegion, region: MemoryRegion },
    Enable { region: MemoryRegion, on: bool },
    Direct { region: MemoryRegion, on: bool },
}

impl Change {
    fn apply(self) {
        match self {
            Self::Map { container, addr, priority, region } => container.insert(addr, priority, &region),
            Self::Unmap { container, region } => container.remove(&region),
            Self::Enable { region, on } => region.set_enabled(on),
            Self::Direct { region, on } => region.set_direct(on),
        }
    }
}

/// A set of changes to the region tree, applied together.
#[derive(Default)]
pub struct Transaction {
    changes: Vec<Change>,
}

impl Transaction {
    /// Places `region` at `addr` of `container`, or moves it there.
    pub fn map(&mut self, container: &MemoryRegion, addr: u64, region: &MemoryRegion) -> &mut Self {
        self.map_with_priority(container, addr, 0, region)
    }

    /// Places `region` with a priority; the highest is seen.
    pub fn map_with_priority(
        &mut self,
        container: &MemoryRegion,
        addr: u64,
        priority: i32,
        region: &MemoryRegion,
    ) -> &mut Self {
        let (container, region) = (container.clone(), region.clone());
        self.changes.push(Change::Map { container, addr, priority, region });
        self
    }

    /// Takes `region` out of `container`.
    pub fn unmap(&mut self, container: &MemoryRegion, region: &MemoryRegion) -> &mut Self {
        self.changes.push(Change::Unmap { container: container.clone(), region: region.clone() });
        self
    }

    /// Shows or hides a region where it is.
    pub fn set_enabled(&mut self, region: &MemoryRegion, on: bool) -> &mut Self {
        self.changes.push(Change::Enable { region: region.clone(), on });
        self
    }

    /// ROM device: reads come from RAM (true) or from the device (false).
    pub fn set_direct(&mut self, region: &MemoryRegion, on: bool) -> &mut Self {
        self.changes.push(Change::Direct { region: region.clone(), on });
        self
    }
}

#[derive(Default)]
struct Spaces {
    list: Vec<Weak<AddressSpace>>,
    next_id: u32,
}

/// The memory map of a machine: the commit lock, the queue of changes, and the address
/// spaces rendered from the region trees.
#[derive(Default)]
pub struct MemoryMap {
    /// Level 2 of the lock order: taken with no device lock held.
    commit: Mutex<Spaces>,
    /// Level 5.
    pending: Mutex<Vec<Change>>,
    has_pending: AtomicBool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryMap {
    /// No address spaces yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// An address space that shows `root`.
    pub fn address_space(self: &Arc<Self>, name: &str, root: &MemoryRegion) -> Arc<AddressSpace> {
        let mut spaces = lock(&self.commit);
        let id = AddressSpaceId(spaces.next_id);
        spaces.next_id += 1;
        let space = Arc::new(AddressSpace {
            id,
            name: name.to_owned(),
            root: root.clone(),
            view: ArcSwap::from_pointee(root.render()),
            generation: AtomicU64::new(1),
            map: self.clone(),
            listeners: Mutex::new(Vec::new()),
        });
        spaces.list.push(Arc::downgrade(&space));
        space
    }

    /// Makes changes and commits them. Never with a device lock held.
    pub fn change(&self, f: impl FnOnce(&mut Transaction)) {
        let mut t = Transaction::default();
        f(&mut t);
        self.queue(t);
        self.apply_pending();
    }

    /// Queues changes; whoever dispatched to the device applies them.
    pub fn queue(&self, t: Transaction) {
        if t.changes.is_empty() {
            return;
        }
        let mut pending = lock(&self.pending);
        pending.extend(t.changes);
        self.has_pending.store(true, Ordering::Release);
    }

    /// True if changes wait.
    pub fn has_pending(&self) -> bool {
        self.has_pending.load(Ordering::Acquire)
    }

    /// Applies queued changes. Never with a device lock held. Cheap if there are none.
    pub fn apply_pending(&self) {
        if !self.has_pending() {
            return;
        }
        let mut spaces = lock(&self.commit);
        let changes = {
            let mut pending = lock(&self.pending);
            self.has_pending.store(false, Ordering::Release);
            std::mem::take(&mut *pending)
        };
        if changes.is_empty() {
            return;
        }
        changes.into_iter().for_each(Change::apply);
        spaces.list.retain(|s| s.strong_count() > 0);
        for space in spaces.list.iter().filter_map(Weak::upgrade) {
            space.commit();
        }
    }

    /// Unbinds all devices and empties all views: the end of a machine. Devices and
    /// regions hold each other; this lets both go.
    pub fn teardown(&self) {
        let spaces = lock(&self.commit);
        for space in spaces.list.iter().filter_map(Weak::upgrade) {
            space.root.unbind_all(0);
            lock(&space.listeners).clear();
            space.view.store(Arc::new(FlatView::default()));
            space.generation.fetch_add(1, Ordering::Release);
        }
    }
}

/// One requester's view of memory.
pub struct AddressSpace {
    id: AddressSpaceId,
    name: String,
    root: MemoryRegion,
    view: ArcSwap<FlatView>,
    generation: AtomicU64,
    map: Arc<MemoryMap>,
    listeners: Mutex<Vec<Arc<dyn MemoryListener>>>,
}

impl AddressSpace {
    /// Its number.
    pub fn id(&self) -> AddressSpaceId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The region it shows.
    pub fn root(&self) -> &MemoryRegion {
        &self.root
    }

    /// The machine's memory map.
    pub fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// The current view, for a short look.
    pub fn load(&self) -> Guard<Arc<FlatView>> {
        self.view.load()
    }

    /// The current view, to keep.
    pub fn view(&self) -> Arc<FlatView> {
        self.view.load_full()
    }

    /// Changes whenever the view does. Read it *before* the view it is kept with.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Adds a listener, which is told all current ranges first.
    pub fn add_listener(&self, listener: Arc<dyn MemoryListener>) {
        let _commit = lock(&self.map.commit);
        let view = self.view();
        listener.begin();
        view.ranges().iter().for_each(|r| listener.region_add(r));
        listener.commit(&view);
        lock(&self.listeners).push(listener);
    }

    /// Removes a listener.
    pub fn remove_listener(&self, listener: &Arc<dyn MemoryListener>) {
        let _commit = lock(&self.map.commit);
        lock(&self.listeners).retain(|l| !Arc::ptr_eq(l, listener));
    }

    /// Renders again and tells listeners what changed. Under the commit lock.
    fn commit(&self) {
        let old = self.view();
        let new = Arc::new(self.root.render());
        let missing = |from: &FlatView, r: &FlatRange| !from.lookup(r.base).is_some_and(|o| o.same(r));
        let gone: Vec<_> = old.ranges().iter().filter(|r| missing(&new, r)).collect();
        let added: Vec<_> = new.ranges().iter().filter(|r| missing(&old, r)).collect();
        if gone.is_empty() && added.is_empty() {
            return;
        }
        self.view.store(new.clone());
        self.generation.fetch_add(1, Ordering::Release);
        for listener in lock(&self.listeners).iter() {
            listener.begin();
            gone.iter().for_each(|r| listener.region_del(r));
            added.iter().for_each(|r| listener.region_add(r));
            listener.commit(&new);
        }
    }

    /// Reads `size` bytes as a little-endian CPU does. A failed read gives all-ones.
    pub fn read(&self, addr: GuestPhys, size: AccessSize, attrs: MemTxAttrs) -> (u64, MemTxResult) {
        let result = self.read_inner(addr, size, attrs);
        self.map.apply_pending();
        result
    }

    fn read_inner(&self, addr: GuestPhys, size: AccessSize, attrs: MemTxAttrs) -> (u64, MemTxResult) {
        let view = self.view.load();
        let Some(range) = view.lookup(addr) else {
            return (size.mask(), MemTxResult::DecodeError);
        };
        let at = addr.0 - range.base.0;
        if range.len - at < size.bytes() {
            return self.read_across(addr, size, attrs);
        }
        match &range.kind {
            FlatKind::Ram { block, offset, .. } | FlatKind::RomDevice { block, offset, .. } => {
                match ram_load(block, offset + at, size) {
                    Some(v) => (v, MemTxResult::Ok),
                    None => (size.mask(), MemTxResult::DecodeError),
                }
            }
            FlatKind::Mmio { binding, offset } => binding.read(offset + at, size, attrs),
        }
    }

    /// An access over the border of two ranges goes byte by byte.
    fn read_across(&self, addr: GuestPhys, size: AccessSize, attrs: MemTxAttrs) -> (u64, MemTxResult) {
        let mut value = 0;
        for i in 0..size.bytes() {
            let Some(a) = addr.checked_add(i) else {
                return (size.mask(), MemTxResult::DecodeError);
            };
            match self.read_inner(a, AccessSize::B1, attrs) {
                (b, MemTxResult::Ok) => value |= b << (i * 8),
                (_, failure) => return (size.mask(), failure),
            }
        }
        (value, MemTxResult::Ok)
    }

    /// Writes `size` bytes of `value` as a little-endian CPU does. ROM ignores writes.
    pub fn write(&self, addr: GuestPhys, size: AccessSize, value: u64, attrs: MemTxAttrs) -> MemTxResult {
        let result = self.write_uncommitted(addr, size, value, attrs);
        self.map.apply_pending();
        result
    }

    /// A write that leaves queued map changes to the caller's caller.
    pub(crate) fn write_uncommitted(
        &self,
        addr: GuestPhys,
        size: AccessSize,
        value: u64,
        attrs: MemTxAttrs,
    ) -> MemTxResult {
        let view = self.view.load();
        let Some(range) = view.lookup(addr) else {
            return MemTxResult::DecodeError;
        };
        let at = addr.0 - range.base.0;
        if range.len - at < size.bytes() {
            return self.write_across(addr, size, value, attrs);
        }
        match &range.kind {
            FlatKind::Ram { readonly: true, .. } => MemTxResult::Ok,
            FlatKind::Ram { block, offset, .. } => match ram_store(block, offset + at, size, value) {
                true => MemTxResult::Ok,
                false => MemTxResult::DecodeError,
            },
            FlatKind::Mmio { binding, offset } | FlatKind::RomDevice { binding, offset, .. } => {
                binding.write(offset + at, size, value, attrs)
            }
        }
    }

    fn write_across(&self, addr: GuestPhys, size: AccessSize, value: u64, attrs: MemTxAttrs) -> MemTxResult {
        for i in 0..size.bytes() {
            let Some(a) = addr.checked_add(i) else {
                return MemTxResult::DecodeError;
            };
            let done = self.write_uncommitted(a, AccessSize::B1, value >> (i * 8) & 0xff, attrs);
            if !done.is_ok() {
                return done;
            }
        }
        MemTxResult::Ok
    }

    /// Copies bytes out, from RAM and, byte by byte, from devices (debugger, monitor).
    pub fn read_bytes(&self, addr: GuestPhys, buf: &mut [u8], attrs: MemTxAttrs) -> MemTxResult {
        let mut done = 0;
        while done < buf.len() {
            let Some(at) = addr.checked_add(done as u64) else {
                return MemTxResult::DecodeError;
            };
            let rest = &mut buf[done..];
            match self.ram_run(at, rest.len() as u64) {
                Some((block, offset, n, _)) => {
                    if !block.read(offset, &mut rest[..n as usize]) {
                        return MemTxResult::DecodeError;
                    }
                    done += n as usize;
                }
                None => match self.read(at, AccessSize::B1, attrs) {
                    (b, MemTxResult::Ok) => {
                        rest[0] = b as u8;
                        done += 1;
                    }
                    (_, failure) => return failure,
                },
            }
        }
        MemTxResult::Ok
    }

    /// Copies bytes in as the guest would: ROM ignores them, devices get single bytes.
    pub fn write_bytes(&self, addr: GuestPhys, data: &[u8], attrs: MemTxAttrs) -> MemTxResult {
        self.copy_in(addr, data, |at, byte| self.write(at, AccessSize::B1, byte.into(), attrs), false)
    }

    /// Copies bytes into RAM and ROM alike (loaders, debugger). Devices are an
    /// [`MemTxResult::AccessError`].
    pub fn load_bytes(&self, addr: GuestPhys, data: &[u8]) -> MemTxResult {
        self.copy_in(
            addr,
            data,
            |at, _| match self.load().lookup(at) {
                Some(_) => MemTxResult::AccessError,
                None => MemTxResult::DecodeError,
            },
            true,
        )
    }

    fn copy_in(
        &self,
        addr: GuestPhys,
        data: &[u8],
        other: impl Fn(GuestPhys, u8) -> MemTxResult,
        rom: bool,
    ) -> MemTxResult {
        let mut done = 0;
        while done < data.len() {
            let Some(at) = addr.checked_add(done as u64) else {
                return MemTxResult::DecodeError;
            };
            let rest = &data[done..];
            match self.ram_run(at, rest.len() as u64) {
                Some((block, offset, n, writable)) if rom || writable => {
                    if !block.write(offset, &rest[..n as usize]) {
                        return MemTxResult::DecodeError;
                    }
                    done += n as usize;
                }
                _ => {
                    let result = other(at, rest[0]);
                    if !result.is_ok() {
                        return result;
                    }
                    done += 1;
                }
            }
        }
        MemTxResult::Ok
    }

    /// The RAM at `addr`: block, offset, how many of `len` bytes, and whether the guest
    /// may write it directly.
    pub(super) fn ram_run(&self, addr: GuestPhys, len: u64) -> Option<(Arc<RamBlock>, u64, u64, bool)> {
        let view = self.view.load();
        let range = view.lookup(addr)?;
        let (block, offset) = range.ram_at(addr)?;
        let n = len.min(range.end() - addr.0);
        let writable = matches!(range.kind, FlatKind::Ram { readonly: false, .. });
        Some((block.clone(), offset, n, writable))
    }
}

impl std::fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressSpace").field("name", &self.name).finish_non_exhaustive()
    }
}

fn ram_load(block: &RamBlock, offset: u64, size: AccessSize) -> Option<u64> {
    match size {
        AccessSize::B1 => block.load::<u8>(offset).map(u64::from),
        AccessSize::B2 => block.load::<u16>(offset).map(u64::from),
        AccessSize::B4 => block.load::<u32>(offset).map(u64::from),
        AccessSize::B8 => block.load::<u64>(offset),
    }
}

fn ram_store(block: &RamBlock, offset: u64, size: AccessSize, value: u64) -> bool {
    match size {
        AccessSize::B1 => block.store(offset, value as u8),
        AccessSize::B2 => block.store(offset, value as u16),
        AccessSize::B4 => block.store(offset, value as u32),
        AccessSize::B8 => block.store(offset, value),
    }
}

/// A device's hold on one of its own regions. Changes are queued: see the module.
#[derive(Clone)]
pub struct RegionHandle {
    region: MemoryRegion,
    map: Arc<MemoryMap>,
    container: Arc<OnceLock<MemoryRegion>>,
    priority: i32,
}

impl RegionHandle {
    /// A handle for `region`, which [`RegionHandle::map`] places in `container` (the bus
    /// may name it later with [`RegionHandle::set_container`]).
    pub fn new(map: &Arc<MemoryMap>, region: MemoryRegion, container: Option<&MemoryRegion>, priority: i32) -> Self {
        let cell = OnceLock::new();
        if let Some(c) = container {
            let _ = cell.set(c.clone());
        }
        Self { region, map: map.clone(), container: Arc::new(cell), priority }
    }

    /// The region itself, for a board that maps it.
    pub fn region(&self) -> &MemoryRegion {
        &self.region
    }

    /// Names the container, once; false if it has one.
    pub fn set_container(&self, container: &MemoryRegion) -> bool {
        self.container.set(container.clone()).is_ok()
    }

    /// Routes accesses to `device` as its region number `index`.
    pub fn bind<D: MmioDevice + 'static>(&self, index: u32, device: &Arc<D>) {
        self.bind_dyn(index, device.clone());
    }

    /// The same for a trait object.
    pub fn bind_dyn(&self, index: u32, device: Arc<dyn MmioDevice>) {
        if let Some(b) = self.region.binding() {
            b.bind_mmio(device, index);
        }
    }

    /// Routes port accesses to `device` as its region number `index`.
    pub fn bind_pio(&self, index: u32, device: Arc<dyn PioDevice>) {
        if let Some(b) = self.region.binding() {
            b.bind_pio(device, index);
        }
    }

    /// Places or moves the region in its container.
    pub fn map(&self, addr: u64) {
        self.queue(|t, c| {
            t.map_with_priority(c, addr, self.priority, &self.region);
        });
    }

    /// Takes the region out of its container.
    pub fn unmap(&self) {
        self.queue(|t, c| {
            t.unmap(c, &self.region);
        });
    }

    /// Shows or hides the region where it is.
    pub fn set_enabled(&self, on: bool) {
        let mut t = Transaction::default();
        t.set_enabled(&self.region, on);
        self.map.queue(t);
    }

    /// ROM device: reads come from RAM (true) or from the device (false).
    pub fn set_direct(&self, on: bool) {
        let mut t = Transaction::default();
        t.set_direct(&self.region, on);
        self.map.queue(t);
    }

    fn queue(&self, f: impl FnOnce(&mut Transaction, &MemoryRegion)) {
        let Some(container) = self.container.get() else {
            log::warn!("region {} has no bus to be mapped in", self.region.name());
            return;
        };
        let mut t = Transaction::default();
        f(&mut t, container);
        self.map.queue(t);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{AccessRules, BusFault, MmioAccess};
    use crate::device::device::MutMmioDevice;
    use crate::memory::guest_ram::{GuestRam, RamBacking};

    const A: MemTxAttrs = MemTxAttrs::vcpu(0);

    struct Mover {
        own: RegionHandle,
        value: u64,
    }

    impl MutMmioDevice for Mover {
        fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
            Ok(self.value + a.offset)
        }
        fn mmio_write(&mut self, _: MmioAccess, value: u64) -> Result<(), BusFault> {
            self.own.map(value);
            Ok(())
        }
    }

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl MemoryListener for Log {
        fn begin(&self) {
            lock(&self.0).push("begin".into());
        }
        fn region_del(&self, r: &FlatRange) {
            lock(&self.0).push(format!("del {}", r.base));
        }
        fn region_add(&self, r: &FlatRange) {
            lock(&self.0).push(format!("add {}", r.base));
        }
        fn commit(&self, view: &Arc<FlatView>) {
            lock(&self.0).push(format!("commit {}", view.ranges().len()));
        }
    }

    fn machine() -> (Arc<MemoryMap>, Arc<AddressSpace>, Arc<RamBlock>) {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let space = map.address_space("system", &root);
        let ram = GuestRam::new();
        let block = ram.add_block("ram", 0x1000, RamBacking::Private).unwrap();
        let region = MemoryRegion::ram("ram", &block);
        map.change(|t| {
            t.map(&root, 0x8000, &region);
        });
        (map, space, block)
    }

    #[test]
    fn a_device_moves_itself() {
        let (map, space, _) = machine();
        let region = MemoryRegion::mmio("dev", 0x100, AccessRules::ANY);
        let own = RegionHandle::new(&map, region, Some(space.root()), 0);
        let device = Arc::new(Mutex::new(Mover { own: own.clone(), value: 7 }));
        own.bind(0, &device);
        own.map(0x1000);
        map.apply_pending();
        let log = Arc::new(Log::default());
        space.add_listener(log.clone());
        lock(&log.0).clear();
        let before = space.generation();
        assert_eq!(space.read(GuestPhys(0x1004), AccessSize::B4, A), (11, MemTxResult::Ok));
        assert_eq!(space.generation(), before);
        assert!(space.write(GuestPhys(0x1000), AccessSize::B4, 0x2000, A).is_ok());
        assert_eq!(*lock(&log.0), ["begin", "del 0x1000", "add 0x2000", "commit 2"]);
        assert!(space.generation() > before);
        assert_eq!(space.read(GuestPhys(0x1004), AccessSize::B4, A).1, MemTxResult::DecodeError);
        assert_eq!(space.read(GuestPhys(0x2000), AccessSize::B8, A).0, 7);
        let weak = Arc::downgrade(&device);
        drop((device, own));
        map.teardown();
        assert!(weak.upgrade().is_none(), "teardown breaks the cycle");
    }

    #[test]
    fn ram_borders_and_bytes() {
        let (map, space, block) = machine();
        let rom_ram = GuestRam::new();
        let rom = rom_ram.add_block("rom", 0x1000, RamBacking::Private).unwrap();
        let rom_region = MemoryRegion::rom("rom", &rom);
        map.change(|t| {
            t.map(space.root(), 0x9000, &rom_region);
        });
        assert!(space.load_bytes(GuestPhys(0x8ffe), &[1, 2, 3, 4]).is_ok());
        assert_eq!(space.read(GuestPhys(0x8ffe), AccessSize::B4, A), (0x0403_0201, MemTxResult::Ok));
        assert!(space.write(GuestPhys(0x8ffe), AccessSize::B4, 0, A).is_ok());
        assert_eq!(space.read(GuestPhys(0x8ffe), AccessSize::B4, A).0, 0x0403_0000);
        assert_eq!(block.load::<u16>(0xffe), Some(0));
        let mut out = [0; 4];
        assert!(space.read_bytes(GuestPhys(0x8ffe), &mut out, A).is_ok());
        assert_eq!(out, [0, 0, 3, 4]);
        assert_eq!(space.load_bytes(GuestPhys(0x9fff), &[1, 2]), MemTxResult::DecodeError);
        assert_eq!(space.read(GuestPhys(0x9ffc), AccessSize::B8, A).1, MemTxResult::DecodeError);
        assert_eq!(space.read(GuestPhys(u64::MAX), AccessSize::B8, A).1, MemTxResult::DecodeError);
    }
}
