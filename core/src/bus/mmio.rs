//! From one access on a region to the device bound to it: width checks, splitting,
//! byte order.

use super::access::{AccessRules, AccessSize, BusFault, MemTxAttrs, MemTxResult, MmioAccess, PioAccess};
use super::shortcut::Shortcut;
use crate::device::device::{MmioDevice, PioDevice};
use arc_swap::ArcSwapOption;
use mimus_arch::Endianness;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

enum Target {
    Mmio(Arc<dyn MmioDevice>),
    Pio(Arc<dyn PioDevice>),
}

struct Bound {
    target: Target,
    region: u32,
}

/// The device end of an MMIO or port region: made before the device, bound after.
pub struct IoBinding {
    name: String,
    rules: AccessRules,
    bound: ArcSwapOption<Bound>,
    /// Leaf lock.
    shortcuts: Mutex<Vec<Shortcut>>,
}

impl IoBinding {
    /// A binding to nothing: accesses fail with [`MemTxResult::DecodeError`].
    pub fn new(name: impl Into<String>, rules: AccessRules) -> Arc<Self> {
        Arc::new(Self { name: name.into(), rules, bound: ArcSwapOption::empty(), shortcuts: Mutex::default() })
    }

    /// The region's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Routes accesses to `device`, which sees them as its region number `region`.
    pub fn bind_mmio(&self, device: Arc<dyn MmioDevice>, region: u32) {
        self.bound.store(Some(Arc::new(Bound { target: Target::Mmio(device), region })));
    }

    /// Routes accesses to `device`, which sees them as its region number `region`.
    pub fn bind_pio(&self, device: Arc<dyn PioDevice>, region: u32) {
        self.bound.store(Some(Arc::new(Bound { target: Target::Pio(device), region })));
    }

    /// Writes that the accelerator may see to by itself. Before the region is mapped.
    pub fn add_shortcut(&self, shortcut: Shortcut) {
        self.shortcuts.lock().unwrap_or_else(PoisonError::into_inner).push(shortcut);
    }

    /// What was added.
    pub fn shortcuts(&self) -> Vec<Shortcut> {
        self.shortcuts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets go of the device.
    pub fn unbind(&self) {
        self.bound.store(None);
    }

    /// Reads `size` bytes at `offset`; the value is what a little-endian CPU loads.
    pub fn read(&self, offset: u64, size: AccessSize, attrs: MemTxAttrs) -> (u64, MemTxResult) {
        match self.try_read(offset, size, attrs) {
            Ok(v) => (v & size.mask(), MemTxResult::Ok),
            Err(f) => (size.mask(), f.into()),
        }
    }

    /// Writes what a little-endian CPU stores: `size` bytes of `value` at `offset`.
    pub fn write(&self, offset: u64, size: AccessSize, value: u64, attrs: MemTxAttrs) -> MemTxResult {
        self.try_write(offset, size, value & size.mask(), attrs).into()
    }

    fn check(&self, offset: u64, size: AccessSize) -> Result<(), BusFault> {
        let r = &self.rules;
        let width_ok = size >= r.valid_min && size <= r.valid_max;
        let aligned = offset & (size.bytes() - 1) == 0;
        (width_ok && (aligned || r.unaligned)).then_some(()).ok_or(BusFault::Access)
    }

    fn try_read(&self, offset: u64, size: AccessSize, attrs: MemTxAttrs) -> Result<u64, BusFault> {
        let bound = self.bound.load();
        let bound = bound.as_ref().ok_or(BusFault::Decode)?;
        self.check(offset, size)?;
        let unit = size.clamp(self.rules.min, self.rules.max);
        if unit > size {
            let (base, lane) = self.lane(offset, unit);
            let whole = self.device_read(bound, base, unit, attrs)?;
            return Ok(whole.checked_shr(lane).unwrap_or(0));
        }
        let mut value = 0;
        let mut done = 0;
        while done < size.bytes() {
            let part = self.device_read(bound, offset.wrapping_add(done), unit, attrs)?;
            value |= (part & unit.mask()) << (done * 8);
            done += unit.bytes();
        }
        Ok(value)
    }

    fn try_write(&self, offset: u64, size: AccessSize, value: u64, attrs: MemTxAttrs) -> Result<(), BusFault> {
        let bound = self.bound.load();
        let bound = bound.as_ref().ok_or(BusFault::Decode)?;
        self.check(offset, size)?;
        let unit = size.clamp(self.rules.min, self.rules.max);
        if unit > size {
            let (base, lane) = self.lane(offset, unit);
            let moved = value.checked_shl(lane).unwrap_or(0);
            return self.device_write(bound, base, unit, moved, attrs);
        }
        let mut done = 0;
        while done < size.bytes() {
            let part = value >> (done * 8) & unit.mask();
            self.device_write(bound, offset.wrapping_add(done), unit, part, attrs)?;
            done += unit.bytes();
        }
        Ok(())
    }

    /// The aligned unit that holds `offset`, and the bit its byte starts at in it.
    fn lane(&self, offset: u64, unit: AccessSize) -> (u64, u32) {
        let within = offset & (unit.bytes() - 1);
        (offset - within, within as u32 * 8)
    }

    fn swap(&self, value: u64, size: AccessSize) -> u64 {
        match self.rules.endian {
            Endianness::Little => value,
            Endianness::Big => value.swap_bytes() >> (64 - size.bits()),
        }
    }

    fn device_read(&self, b: &Bound, offset: u64, size: AccessSize, attrs: MemTxAttrs) -> Result<u64, BusFault> {
        let region = b.region;
        let value = match &b.target {
            Target::Mmio(d) => d.mmio_read(MmioAccess { region, offset, size, attrs }),
            Target::Pio(d) => d.pio_read(PioAccess { region, offset: offset as u16, size, attrs }),
        }?;
        Ok(self.swap(value & size.mask(), size))
    }

    fn device_write(
        &self,
        b: &Bound,
        offset: u64,
        size: AccessSize,
        value: u64,
        attrs: MemTxAttrs,
    ) -> Result<(), BusFault> {
        let region = b.region;
        let value = self.swap(value, size);
        match &b.target {
            Target::Mmio(d) => d.mmio_write(MmioAccess { region, offset, size, attrs }, value),
            Target::Pio(d) => d.pio_write(PioAccess { region, offset: offset as u16, size, attrs }, value),
        }
    }
}

impl fmt::Debug for IoBinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBinding").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::device::MutMmioDevice;
    use std::sync::Mutex;

    /// 16 bytes of registers that note the accesses made.
    #[derive(Default)]
    struct Regs {
        bytes: [u8; 16],
        log: Vec<(u64, u64)>,
    }

    impl MutMmioDevice for Regs {
        fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
            self.log.push((a.offset, a.size.bytes()));
            let mut out = [0; 8];
            let n = a.size.bytes() as usize;
            let at = a.offset as usize;
            out[..n].copy_from_slice(self.bytes.get(at..at + n).ok_or(BusFault::Device)?);
            Ok(u64::from_le_bytes(out))
        }
        fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
            self.log.push((a.offset, a.size.bytes()));
            let (at, n) = (a.offset as usize, a.size.bytes() as usize);
            self.bytes[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
            Ok(())
        }
    }

    fn bound(rules: AccessRules) -> (Arc<IoBinding>, Arc<Mutex<Regs>>) {
        let device = Arc::new(Mutex::new(Regs::default()));
        for (i, b) in device.lock().unwrap().bytes.iter_mut().enumerate() {
            *b = i as u8;
        }
        let binding = IoBinding::new("regs", rules);
        binding.bind_mmio(device.clone(), 0);
        (binding, device)
    }

    const A: MemTxAttrs = MemTxAttrs::vcpu(0);

    #[test]
    fn wide_accesses_are_split() {
        let (b, d) = bound(AccessRules::sizes(AccessSize::B1, AccessSize::B4));
        assert_eq!(b.read(0, AccessSize::B8, A), (0x0706_0504_0302_0100, MemTxResult::Ok));
        assert_eq!(d.lock().unwrap().log, [(0, 4), (4, 4)]);
    }

    #[test]
    fn narrow_accesses_take_a_lane() {
        let (b, d) = bound(AccessRules::sizes(AccessSize::B4, AccessSize::B4));
        assert_eq!(b.read(6, AccessSize::B1, A).0, 6);
        assert!(b.write(6, AccessSize::B2, 0xabcd, A).is_ok());
        assert_eq!(d.lock().unwrap().bytes[4..8], [0, 0, 0xcd, 0xab]);
    }

    #[test]
    fn sizes_and_alignment_are_enforced() {
        let (b, d) = bound(AccessRules::only(AccessSize::B4));
        assert_eq!(b.read(0, AccessSize::B1, A), (0xff, MemTxResult::AccessError));
        assert_eq!(b.write(2, AccessSize::B4, 0, A), MemTxResult::AccessError);
        assert!(d.lock().unwrap().log.is_empty());
        b.unbind();
        assert_eq!(b.read(0, AccessSize::B4, A), (0xffff_ffff, MemTxResult::DecodeError));
    }

    #[test]
    fn big_endian_registers() {
        let (b, _) = bound(AccessRules::ANY.big_endian());
        assert_eq!(b.read(0, AccessSize::B4, A).0, 0x0001_0203);
    }
}
