//! Shortcuts of regions, given to an accelerator: follows where regions are.

use super::accelerator::{AccelError, AccelVm};
use super::irqchip::DoorbellAddress;
use crate::bus::{GuestPhys, Shortcut};
use crate::memory::{FlatKind, FlatRange, MemoryListener};
use std::os::fd::AsFd;
use std::sync::Arc;

/// Attaches the [`Shortcut`]s of an address space's regions wherever these are mapped.
pub struct Shortcuts {
    vm: Arc<dyn AccelVm>,
    pio: bool,
}

impl Shortcuts {
    /// A listener for system memory or (`pio`) the port space; `None` if the accelerator has no use for any.
    pub fn listener(vm: &Arc<dyn AccelVm>, pio: bool) -> Option<Arc<dyn MemoryListener>> {
        let useful = vm.doorbells().is_some() || vm.coalesced_io().is_some();
        useful.then(|| Arc::new(Self { vm: vm.clone(), pio }) as Arc<dyn MemoryListener>)
    }

    fn each(&self, range: &FlatRange, attach: bool) {
        let FlatKind::Mmio { binding, offset } = &range.kind else { return };
        for shortcut in binding.shortcuts() {
            let (at, len) = shortcut.range();
            // Hidden, or partly so: its writes are the device's.
            let inside = at >= *offset && at.checked_add(len).is_some_and(|end| end - offset <= range.len);
            if inside && let Err(e) = self.set(&shortcut, GuestPhys(range.base.0 + (at - offset)), attach) {
                // Without it the device sees the write.
                log::debug!("{}: {shortcut:?}: {e}", binding.name());
            }
        }
    }

    fn set(&self, shortcut: &Shortcut, addr: GuestPhys, attach: bool) -> Result<(), AccelError> {
        match shortcut {
            Shortcut::Doorbell(bell) => {
                let Some(doorbells) = self.vm.doorbells() else { return Ok(()) };
                let at = DoorbellAddress { pio: self.pio, addr, size: bell.size, value: bell.value };
                let fd = bell.fd.as_fd();
                if attach { doorbells.attach(at, fd) } else { doorbells.detach(at, fd) }
            }
            Shortcut::Coalesced { len, .. } => {
                let Some(coalesced) = self.vm.coalesced_io() else { return Ok(()) };
                if attach { coalesced.add(self.pio, addr, *len) } else { coalesced.remove(self.pio, addr, *len) }
            }
        }
    }
}

impl MemoryListener for Shortcuts {
    fn region_del(&self, range: &FlatRange) {
        self.each(range, false);
    }

    fn region_add(&self, range: &FlatRange) {
        self.each(range, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accel::{AccelCaps, CoalescedIo, CpuIo, Doorbells, Vcpu, VcpuIndex};
    use crate::bus::{AccessRules, AccessSize, Doorbell};
    use crate::memory::{MemoryMap, MemoryRegion};
    use mimus_arch::CpuModel;
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;

    /// Notes what is attached.
    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Log {
        fn say(&self, text: String) -> Result<(), AccelError> {
            self.0.lock().unwrap().push(text);
            Ok(())
        }
        fn said(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl AccelVm for Log {
        fn caps(&self) -> &AccelCaps {
            &AccelCaps { max_vcpus: 0, debug: false, icount: false }
        }
        fn create_vcpu(&self, _: VcpuIndex, _: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
            Err(AccelError::Other("no vCPUs".to_owned()))
        }
        fn doorbells(&self) -> Option<&dyn Doorbells> {
            Some(self)
        }
        fn coalesced_io(&self) -> Option<&dyn CoalescedIo> {
            Some(self)
        }
    }

    impl Doorbells for Log {
        fn attach(&self, at: DoorbellAddress, _: BorrowedFd<'_>) -> Result<(), AccelError> {
            self.say(format!("+{:x}={:?}", at.addr.0, at.value))
        }
        fn detach(&self, at: DoorbellAddress, _: BorrowedFd<'_>) -> Result<(), AccelError> {
            self.say(format!("-{:x}={:?}", at.addr.0, at.value))
        }
    }

    impl CoalescedIo for Log {
        fn add(&self, pio: bool, addr: GuestPhys, len: u32) -> Result<(), AccelError> {
            self.say(format!("collect {pio} {:x} {len}", addr.0))
        }
        fn remove(&self, _: bool, addr: GuestPhys, _: u32) -> Result<(), AccelError> {
            self.say(format!("no longer {:x}", addr.0))
        }
        fn flush(&self, _: &dyn CpuIo) {}
    }

    #[test]
    fn they_are_where_their_region_is() {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("root", u64::MAX);
        let space = map.address_space("space", &root);
        let log = Arc::new(Log::default());
        let vm: Arc<dyn AccelVm> = log.clone();
        space.add_listener(Shortcuts::listener(&vm, false).unwrap());
        let region = MemoryRegion::mmio("device", 0x1000, AccessRules::ANY);
        let fd = Arc::new(std::fs::File::open("/dev/null").unwrap());
        let bell = Doorbell { offset: 0x50, size: Some(AccessSize::B4), value: Some(3), fd };
        region.binding().unwrap().add_shortcut(Shortcut::Doorbell(bell));
        region.binding().unwrap().add_shortcut(Shortcut::Coalesced { offset: 0x800, len: 8 });
        map.change(|t| {
            t.map(&root, 0x10000, &region);
        });
        assert_eq!(log.said(), ["+10050=Some(3)", "collect false 10800 8"]);
        map.change(|t| {
            t.map(&root, 0x20000, &region);
        });
        assert_eq!(log.said(), ["-10050=Some(3)", "no longer 10800", "+20050=Some(3)", "collect false 20800 8"]);
        // Hidden by another region, all of it or a part.
        let over = MemoryRegion::mmio("over", 0x10, AccessRules::ANY);
        map.change(|t| {
            t.map_with_priority(&root, 0x20804, 1, &over);
        });
        assert_eq!(log.said(), ["-20050=Some(3)", "no longer 20800", "+20050=Some(3)"]);
        map.change(|t| {
            t.unmap(&root, &region);
        });
        assert_eq!(log.said(), ["-20050=Some(3)"]);
    }
}
