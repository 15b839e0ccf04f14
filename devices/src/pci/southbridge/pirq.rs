//! The router of PCI interrupts: each of PIRQA, B, … to an interrupt of the PIC pair that software chooses, and to an
//! input of its own of the I/O APIC.
//!
//! Spec: Intel ICH9 data sheet, 316972-004, sections 13.1.11 and 5.8.6; the PIIX3 has the same registers.

use mimus_core::device::lock;
use mimus_core::irq::{IrqController, IrqLine};
use std::sync::{Arc, Mutex};

/// Route register: the router does not pass the interrupt on to the PIC pair.
pub const ROUTE_DISABLED: u8 = 0x80;
/// Bits of a route register that exist.
pub const ROUTE_BITS: u8 = 0x8f;
/// Interrupts of the PIC pair that one can be routed to: not the timer, keyboard, cascade, RTC and FPU.
const ROUTABLE: u16 = 0xdef8;

/// The router.
pub struct PirqRouter {
    /// Router-level lock.
    state: Mutex<State>,
    isa: Vec<IrqLine>,
    direct: Vec<IrqLine>,
}

struct State {
    /// Bit n: PIRQ n is asserted.
    levels: u32,
    routes: Vec<u8>,
}

impl State {
    /// Level of each interrupt of the PIC pair.
    fn isa_levels(&self) -> u16 {
        let asserted = self.routes.iter().enumerate().filter(|(n, _)| self.levels >> n & 1 != 0);
        let routed = asserted.filter(|(_, route)| *route & ROUTE_DISABLED == 0);
        routed.fold(0, |levels, (_, route)| levels | 1 << (route & 0xf)) & ROUTABLE
    }
}

impl PirqRouter {
    /// A router with `count` inputs. `isa` are the interrupts 0 to 15 of the PIC pair, driven by the router alone (an
    /// [`OrGate`](mimus_core::irq::OrGate) joins it with others); `direct` the inputs of the I/O APIC for each PIRQ, if
    /// they have any.
    pub fn new(count: usize, isa: Vec<IrqLine>, direct: Vec<IrqLine>) -> Arc<Self> {
        let state = State { levels: 0, routes: vec![ROUTE_DISABLED; count] };
        Arc::new(Self { state: Mutex::new(state), isa, direct })
    }

    /// The lines of PIRQA and so on, for the root bus.
    pub fn inputs<const N: usize>(self: &Arc<Self>) -> [IrqLine; N] {
        std::array::from_fn(|n| IrqLine::new(self.clone(), n as u32))
    }

    fn drive(&self, state: &State, silently: bool) {
        let levels = state.isa_levels();
        let isa = self.isa.iter().enumerate().map(|(n, line)| (line, levels >> n & 1 != 0));
        let direct = self.direct.iter().enumerate().map(|(n, line)| (line, state.levels >> n & 1 != 0));
        for (line, level) in isa.chain(direct) {
            match silently {
                true => line.import_level(level),
                false => line.set_level(level),
            }
        }
    }

    /// Takes over the route registers.
    pub(super) fn set_routes(&self, routes: &[u8]) {
        let mut state = lock(&self.state);
        state.routes.copy_from_slice(routes);
        self.drive(&state, false);
    }

    /// Levels of the inputs, for a snapshot.
    pub(super) fn levels(&self) -> u32 {
        lock(&self.state).levels
    }

    /// Takes over a saved state without telling the controllers, which restore their own.
    pub(super) fn restore(&self, levels: u32, routes: &[u8]) {
        let mut state = lock(&self.state);
        state.levels = levels;
        state.routes.copy_from_slice(routes);
        self.drive(&state, true);
    }

    /// True if `levels` are of inputs that exist.
    pub(super) fn fits(&self, levels: u32) -> bool {
        u64::from(levels) >> lock(&self.state).routes.len() == 0
    }
}

impl IrqController for PirqRouter {
    fn set_input(&self, pin: u32, level: bool) {
        let mut state = lock(&self.state);
        if pin as usize >= state.routes.len() {
            return;
        }
        let bit = 1 << pin;
        state.levels = state.levels & !bit | if level { bit } else { 0 };
        self.drive(&state, false);
    }
}
