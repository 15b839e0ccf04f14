//! INTx: four shared, level-triggered interrupt wires (PCI §2.2.6).

use mimus_core::device::lock;
use mimus_core::irq::IrqLine;
use std::sync::{Arc, Mutex};

/// The four wires of a root bus, each the OR of the pins on it.
pub struct IntxRouter {
    /// How many pins drive each wire. Router-level lock.
    counts: Mutex<[u32; 4]>,
    outputs: [IrqLine; 4],
}

impl IntxRouter {
    /// Wires onto `outputs`, the lines of INTA to INTD as device 0 sees them.
    pub fn new(outputs: [IrqLine; 4]) -> Arc<Self> {
        Arc::new(Self { counts: Mutex::default(), outputs })
    }

    /// The wire that pin `pin` (0 is INTA) of device `device` is on: the swizzle of
    /// PCI-to-PCI Bridge 1.2 §9.1, which boards describe in their interrupt maps.
    pub const fn wire(device: u8, pin: u8) -> usize {
        ((device as usize) + (pin as usize)) % 4
    }

    fn drive(&self, wire: usize, on: bool, silently: bool) {
        let mut counts = lock(&self.counts);
        let count = &mut counts[wire % 4];
        *count = if on { *count + 1 } else { count.saturating_sub(1) };
        let (level, line) = (*count > 0, &self.outputs[wire % 4]);
        match silently {
            true => line.import_level(level),
            false => line.set_level(level),
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
