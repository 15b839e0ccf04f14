//! INTx: four shared, level-triggered interrupt wires (PCI §2.2.6).

use mimus_core::device::lock;
use mimus_core::irq::IrqLine;
use std::sync::{Arc, Mutex};

/// The wire that a pin is on: device number, pin (0 is INTA).
pub type IntxMap = fn(u8, u8) -> usize;

/// The wires of a root bus, each the OR of the pins on it.
pub struct IntxRouter {
    /// How many pins drive each wire. Router-level lock.
    counts: Mutex<Vec<u32>>,
    outputs: Vec<IrqLine>,
    map: IntxMap,
}

impl IntxRouter {
    /// Wires onto `outputs`, the lines of INTA to INTD as device 0 sees them, and the pins on them as
    /// [`IntxRouter::wire`] says.
    pub fn new(outputs: [IrqLine; 4]) -> Arc<Self> {
        Self::with_map(outputs.to_vec(), Self::wire)
    }

    /// Wires onto `outputs`, with pins on them as `map` says.
    pub fn with_map(outputs: Vec<IrqLine>, map: IntxMap) -> Arc<Self> {
        Arc::new(Self { counts: Mutex::new(vec![0; outputs.len()]), outputs, map })
    }

    /// The wire that pin `pin` (0 is INTA) of device `device` is on: the swizzle of
    /// PCI-to-PCI Bridge 1.2 §9.1, which boards describe in their interrupt maps.
    pub const fn wire(device: u8, pin: u8) -> usize {
        ((device as usize) + (pin as usize)) % 4
    }

    /// The wire that pin `pin` of device `device` is on here.
    pub fn wire_of(&self, device: u8, pin: u8) -> usize {
        (self.map)(device, pin)
    }

    fn drive(&self, wire: usize, on: bool, silently: bool) {
        let mut counts = lock(&self.counts);
        let Some((count, line)) = counts.get_mut(wire).zip(self.outputs.get(wire)) else { return };
        *count = if on { *count + 1 } else { count.saturating_sub(1) };
        match silently {
            true => line.import_level(*count > 0),
            false => line.set_level(*count > 0),
        }
    }
}

/// The interrupt pin of one function.
pub struct IntxPin {
    router: Option<Arc<IntxRouter>>,
    wire: usize,
    /// Device-level lock, or below one.
    state: Mutex<PinState>,
}

#[derive(Clone, Copy, Default)]
struct PinState {
    /// The function wants an interrupt (status register bit 3).
    asserted: bool,
    /// Command register bit 10.
    disabled: bool,
    /// What the wire sees.
    driven: bool,
}

impl IntxPin {
    /// A pin on wire `wire` of `router`; on nothing without one.
    pub fn new(router: Option<Arc<IntxRouter>>, wire: usize) -> Arc<Self> {
        Arc::new(Self { router, wire, state: Mutex::default() })
    }

    /// The function wants an interrupt, or no longer.
    pub fn set_level(&self, asserted: bool) {
        self.change(false, |s| s.asserted = asserted);
    }

    /// Command register bit 10.
    pub fn set_disabled(&self, disabled: bool) {
        self.change(false, |s| s.disabled = disabled);
    }

    /// Takes over a saved state without telling the controller, which restores its own.
    pub fn restore(&self, asserted: bool, disabled: bool) {
        self.change(true, |s| (s.asserted, s.disabled) = (asserted, disabled));
    }

    /// True if the function wants an interrupt.
    pub fn is_asserted(&self) -> bool {
        lock(&self.state).asserted
    }

    fn change(&self, silently: bool, f: impl FnOnce(&mut PinState)) {
        let mut s = lock(&self.state);
        f(&mut s);
        let wanted = s.asserted && !s.disabled;
        if wanted != s.driven {
            s.driven = wanted;
            if let Some(router) = &self.router {
                router.drive(self.wire, wanted, silently);
            }
        }
    }
}
