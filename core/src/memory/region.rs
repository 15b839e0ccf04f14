//! The tree of memory regions, and how it is rendered to a [`FlatView`].
//!
//! Where siblings overlap, the one with the higher priority is seen; at equal priority,
//! the one mapped last. The tree changes only through a
//! [`Transaction`](super::Transaction).

use super::flat_view::{FlatKind, FlatRange, FlatView};
use super::guest_ram::RamBlock;
use crate::bus::{AccessRules, GuestPhys, IoBinding};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A region: cheap to clone, clones are the same region.
#[derive(Clone)]
pub struct MemoryRegion(Arc<Node>);

struct Node {
    name: String,
    len: u64,
    kind: Kind,
    enabled: AtomicBool,
    children: Mutex<Vec<Child>>,
}

enum Kind {
    Container,
    Ram { block: Arc<RamBlock>, offset: u64, readonly: bool },
    RomDevice { block: Arc<RamBlock>, offset: u64, binding: Arc<IoBinding>, direct: AtomicBool },
    Mmio(Arc<IoBinding>),
    Alias { target: MemoryRegion, offset: u64 },
    Reserved,
}

#[derive(Clone)]
struct Child {
    addr: u64,
    priority: i32,
    region: MemoryRegion,
}

/// Aliases may not nest deeper: a loop of them is the builder's mistake.
const MAX_DEPTH: u32 = 32;

impl MemoryRegion {
    fn new(name: impl Into<String>, len: u64, kind: Kind) -> Self {
        Self(Arc::new(Node {
            name: name.into(),
            len,
            kind,
            enabled: AtomicBool::new(true),
            children: Mutex::new(Vec::new()),
        }))
    }

    /// A region that only holds others. `u64::MAX` for a whole address space.
    pub fn container(name: impl Into<String>, len: u64) -> Self {
        Self::new(name, len, Kind::Container)
    }

    /// A whole RAM block.
    pub fn ram(name: impl Into<String>, block: &Arc<RamBlock>) -> Self {
        Self::new(name, block.len(), Kind::Ram { block: block.clone(), offset: 0, readonly: false })
    }

    /// A whole RAM block that the guest cannot write.
    pub fn rom(name: impl Into<String>, block: &Arc<RamBlock>) -> Self {
        Self::new(name, block.len(), Kind::Ram { block: block.clone(), offset: 0, readonly: true })
    }

    /// Reads come from `block`, writes go to the bound device; reads do too while
    /// [`set_direct`](super::Transaction::set_direct) is false (a flash chip giving status).
    pub fn rom_device(name: impl Into<String>, block: &Arc<RamBlock>, rules: AccessRules) -> Self {
        let name = name.into();
        let binding = IoBinding::new(name.clone(), rules);
        let (block, len) = (block.clone(), block.len());
        Self::new(name, len, Kind::RomDevice { block, offset: 0, binding, direct: AtomicBool::new(true) })
    }

    /// `len` bytes of a device, which is bound later ([`MemoryRegion::binding`]).
    pub fn mmio(name: impl Into<String>, len: u64, rules: AccessRules) -> Self {
        let name = name.into();
        let binding = IoBinding::new(name.clone(), rules);
        Self::new(name, len, Kind::Mmio(binding))
    }

    /// A window of `len` bytes on `target` from `offset`.
    pub fn alias(name: impl Into<String>, target: &MemoryRegion, offset: u64, len: u64) -> Self {
        Self::new(name, len, Kind::Alias { target: target.clone(), offset })
    }

    /// Hides what lies below it, and decodes to nothing.
    pub fn reserved(name: impl Into<String>, len: u64) -> Self {
        Self::new(name, len, Kind::Reserved)
    }

    /// The region's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// The device end of an MMIO or ROM-device region.
    pub fn binding(&self) -> Option<&Arc<IoBinding>> {
        match &self.0.kind {
            Kind::Mmio(b) | Kind::RomDevice { binding: b, .. } => Some(b),
            _ => None,
        }
    }

    /// The block of a RAM, ROM or ROM-device region.
    pub fn ram_block(&self) -> Option<&Arc<RamBlock>> {
        match &self.0.kind {
            Kind::Ram { block, .. } | Kind::RomDevice { block, .. } => Some(block),
            _ => None,
        }
    }

    /// True unless disabled.
    pub fn is_enabled(&self) -> bool {
        self.0.enabled.load(Ordering::Relaxed)
    }

    /// True if both are the same region.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn children(&self) -> std::sync::MutexGuard<'_, Vec<Child>> {
        self.0.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_enabled(&self, on: bool) {
        self.0.enabled.store(on, Ordering::Relaxed);
    }

    pub(super) fn set_direct(&self, on: bool) {
        if let Kind::RomDevice { direct, .. } = &self.0.kind {
            direct.store(on, Ordering::Relaxed);
        }
    }

    /// Places `region`, or moves it if it is here already.
    pub(super) fn insert(&self, addr: u64, priority: i32, region: &MemoryRegion) {
        let mut children = self.children();
        children.retain(|c| !c.region.same(region));
        let at = children.partition_point(|c| c.priority > priority);
        children.insert(at, Child { addr, priority, region: region.clone() });
    }

    pub(super) fn remove(&self, region: &MemoryRegion) {
        self.children().retain(|c| !c.region.same(region));
    }

    /// Unbinds every device in the tree, so that devices and regions, which hold each
    /// other, can be freed.
    pub(super) fn unbind_all(&self, depth: u32) {
        if let Some(b) = self.binding() {
            b.unbind();
        }
        if depth >= MAX_DEPTH {
            return;
        }
        if let Kind::Alias { target, .. } = &self.0.kind {
            target.unbind_all(depth + 1);
        }
        let children = self.children().clone();
        for c in children {
            c.region.unbind_all(depth + 1);
        }
    }

    /// The map seen through this region as root.
    pub fn render(&self) -> FlatView {
        let mut out = Painter { spans: Vec::new() };
        self.paint(&mut out, 0, Clip { start: 0, end: i128::from(u64::MAX) }, 0);
        FlatView::from_sorted(out.into_ranges())
    }

    fn paint(&self, out: &mut Painter, base: i128, clip: Clip, depth: u32) {
        if !self.is_enabled() || depth > MAX_DEPTH {
            return;
        }
        let clip = clip.and(base, base + i128::from(self.0.len));
        if clip.is_empty() {
            return;
        }
        let kind = match &self.0.kind {
            Kind::Container => {
                let children = self.children().clone();
                for c in children {
                    c.region.paint(out, base + i128::from(c.addr), clip, depth + 1);
                }
                return;
            }
            Kind::Alias { target, offset } => {
                return target.paint(out, base - i128::from(*offset), clip, depth + 1);
            }
            Kind::Reserved => None,
            Kind::Ram { block, offset, readonly } => {
                Some(FlatKind::Ram { block: block.clone(), offset: *offset, readonly: *readonly })
            }
            Kind::Mmio(binding) => Some(FlatKind::Mmio { binding: binding.clone(), offset: 0 }),
            Kind::RomDevice { block, offset, binding, direct } => Some(if direct.load(Ordering::Relaxed) {
                FlatKind::RomDevice { block: block.clone(), offset: *offset, binding: binding.clone() }
            } else {
                FlatKind::Mmio { binding: binding.clone(), offset: 0 }
            }),
        };
        out.fill(clip, base, kind);
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryRegion({:?}, {:#x} bytes)", self.0.name, self.0.len)
    }
}

#[derive(Clone, Copy)]
struct Clip {
    start: i128,
    end: i128,
}

impl Clip {
    fn and(self, start: i128, end: i128) -> Self {
        Self { start: self.start.max(start), end: self.end.min(end) }
    }

    fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

/// What is painted so far: sorted spans, first come first served. `None` is reserved.
struct Painter {
    spans: Vec<(Clip, Option<FlatKind>)>,
}

impl Painter {
    /// Paints `clip` where nothing is yet. `base` is where the region's byte 0 would be.
    fn fill(&mut self, clip: Clip, base: i128, kind: Option<FlatKind>) {
        let mut at = clip.start;
        let mut i = self.spans.partition_point(|s| s.0.end <= at);
        while at < clip.end {
            let gap_end = self.spans.get(i).map_or(clip.end, |s| s.0.start.min(clip.end));
            if at < gap_end {
                let span = Clip { start: at, end: gap_end };
                self.spans.insert(i, (span, kind.as_ref().map(|k| shifted(k, at - base))));
                i += 1;
            }
            at = self.spans.get(i).map_or(clip.end, |s| s.0.end.max(gap_end));
            i += 1;
        }
    }

    fn into_ranges(self) -> Vec<FlatRange> {
        let range = |(span, kind): (Clip, Option<FlatKind>)| {
            Some(FlatRange {
                base: GuestPhys(u64::try_from(span.start).ok()?),
                len: u64::try_from(span.end - span.start).ok()?,
                kind: kind?,
            })
        };
        self.spans.into_iter().filter_map(range).collect()
    }
}

fn shifted(kind: &FlatKind, by: i128) -> FlatKind {
    // The clip never starts before the region does, so the shift fits.
    let by = u64::try_from(by).unwrap_or(0);
    let mut kind = kind.clone();
    match &mut kind {
        FlatKind::Ram { offset, .. } | FlatKind::RomDevice { offset, .. } | FlatKind::Mmio { offset, .. } => {
            *offset += by
        }
    }
    kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::guest_ram::{GuestRam, RamBacking};

    fn shape(root: &MemoryRegion) -> Vec<(u64, u64, String, u64)> {
        let describe = |r: &FlatRange| match &r.kind {
            FlatKind::Ram { block, offset, .. } => (block.name().to_owned(), *offset),
            FlatKind::RomDevice { block, offset, .. } => (format!("rom:{}", block.name()), *offset),
            FlatKind::Mmio { binding, offset } => (binding.name().to_owned(), *offset),
        };
        let view = root.render();
        let out = view.ranges().iter().map(|r| {
            let (name, offset) = describe(r);
            (r.base.0, r.len, name, offset)
        });
        out.collect()
    }

    #[test]
    fn priorities_aliases_and_holes() {
        let ram = GuestRam::new();
        let block = ram.add_block("ram", 0x10000, RamBacking::Private).unwrap();
        let root = MemoryRegion::container("system", u64::MAX);
        let main = MemoryRegion::ram("ram", &block);
        root.insert(0, 0, &main);
        let dev = MemoryRegion::mmio("uart", 0x1000, AccessRules::ANY);
        root.insert(0x4000, 1, &dev);
        let high = MemoryRegion::alias("ram-high", &main, 0x8000, 0x2000);
        root.insert(0x1_0000_0000, 0, &high);
        let hole = MemoryRegion::reserved("hole", 0x1000);
        root.insert(0xf000, 5, &hole);
        let ram_name = || "ram".to_owned();
        assert_eq!(
            shape(&root),
            [
                (0, 0x4000, ram_name(), 0),
                (0x4000, 0x1000, "uart".to_owned(), 0),
                (0x5000, 0xa000, ram_name(), 0x5000),
                (0x1_0000_0000, 0x2000, ram_name(), 0x8000),
            ]
        );
        dev.set_enabled(false);
        root.remove(&hole);
        assert_eq!(shape(&root)[0], (0, 0x10000, ram_name(), 0));
    }

    #[test]
    fn later_wins_at_equal_priority_and_moves_work() {
        let root = MemoryRegion::container("system", 0x10000);
        let a = MemoryRegion::mmio("a", 0x2000, AccessRules::ANY);
        let b = MemoryRegion::mmio("b", 0x2000, AccessRules::ANY);
        root.insert(0, 0, &a);
        root.insert(0x1000, 0, &b);
        assert_eq!(shape(&root)[1], (0x1000, 0x2000, "b".to_owned(), 0));
        root.insert(0x1000, 0, &a);
        assert_eq!(shape(&root), [(0x1000, 0x2000, "a".to_owned(), 0)]);
        root.insert(0xf000, 0, &a);
        assert_eq!(shape(&root)[1], (0xf000, 0x1000, "a".to_owned(), 0));
    }

    #[test]
    fn whole_space_and_alias_loops_end() {
        let root = MemoryRegion::container("system", u64::MAX);
        let all = MemoryRegion::mmio("all", u64::MAX, AccessRules::ANY);
        root.insert(0x1000, -1, &all);
        assert_eq!(shape(&root)[0].1, u64::MAX - 0x1000);
        let loop_ = MemoryRegion::alias("loop", &root, 0, 0x1000);
        root.insert(0, 0, &loop_);
        assert!(!shape(&root).is_empty());
    }

    #[test]
    fn rom_device_switches_to_registers() {
        let ram = GuestRam::new();
        let block = ram.add_block("flash", 0x1000, RamBacking::Private).unwrap();
        let flash = MemoryRegion::rom_device("flash0", &block, AccessRules::ANY);
        assert_eq!(shape(&flash)[0].2, "rom:flash");
        flash.set_direct(false);
        assert_eq!(shape(&flash)[0].2, "flash0");
    }
}
