//! Interrupts of a virtio-pci function: vectors, or the ISR register and INTx (§4.1.4.5,
//! §4.1.5.1.2).

use crate::pci::intx::IntxPin;
use crate::pci::msix::Msix;
use crate::virtio::device::{VirtioInterrupt, lock};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// No vector is mapped.
pub const NO_VECTOR: u16 = 0xffff;
/// ISR: a buffer was used.
const ISR_QUEUE: u8 = 1;
/// ISR: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// Interrupts of one function.
pub struct PciInterrupt {
    msix: Option<Arc<Msix>>,
    intx: Arc<IntxPin>,
    /// Below the device's locks: keeps ISR and pin together.
    state: Mutex<InterruptState>,
}

/// The saved form of [`PciInterrupt`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterruptState {
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl PciInterrupt {
    /// Interrupts of a function with `queues` queues.
    pub fn new(msix: Option<Arc<Msix>>, intx: Arc<IntxPin>, queues: u16) -> Arc<Self> {
        let queue_vectors = vec![NO_VECTOR; queues.into()];
        let state = Mutex::new(InterruptState { isr: 0, config_vector: NO_VECTOR, queue_vectors });
        Arc::new(Self { msix, intx, state })
    }

    /// A vector that exists, or none: what a driver reads back tells it.
    fn checked(&self, vector: u16) -> u16 {
        let exists = self.msix.as_ref().is_some_and(|m| vector < m.vectors());
        if exists { vector } else { NO_VECTOR }
    }

    /// Vector for configuration changes.
    pub fn config_vector(&self) -> u16 {
        lock(&self.state).config_vector
    }

    /// Sets the vector for configuration changes.
    pub fn set_config_vector(&self, vector: u16) {
        lock(&self.state).config_vector = self.checked(vector);
    }

    /// Vector of a queue.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        lock(&self.state).queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
    }

    /// Sets the vector of a queue.
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        let vector = self.checked(vector);
        if let Some(v) = lock(&self.state).queue_vectors.get_mut(usize::from(queue)) {
            *v = vector;
        }
    }

    /// Reads the ISR register, which clears it and the pin.
    pub fn take_isr(&self) -> u8 {
        let mut state = lock(&self.state);
        self.intx.set_level(false);
        std::mem::take(&mut state.isr)
    }

    /// Back to power-on.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        state.isr = 0;
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        self.intx.set_level(false);
    }

    /// The machine runs.
    pub fn start(&self) {
        self.msix.iter().for_each(|m| m.start());
    }

    /// The machine stops: what was sent is with its controller on return.
    pub fn stop(&self) {
        self.msix.iter().for_each(|m| m.stop());
    }

    /// For a snapshot.
    pub fn save(&self) -> InterruptState {
        lock(&self.state).clone()
    }

    /// Takes over a saved state; false if it has another number of queues.
    pub fn restore(&self, saved: InterruptState) -> bool {
        let mut state = lock(&self.state);
        let fits = saved.queue_vectors.len() == state.queue_vectors.len();
        if fits {
            *state = saved;
        }
        fits
    }

    fn raise(&self, isr: u8, vector: impl FnOnce(&InterruptState) -> u16) {
        let mut state = lock(&self.state);
        let Some(msix) = self.msix.as_ref().filter(|m| m.is_enabled()) else {
            state.isr |= isr;
            return self.intx.set_level(true);
        };
        let vector = vector(&state);
        drop(state);
        if vector != NO_VECTOR {
            msix.notify(vector);
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn queue(&self, queue: u16) {
        self.raise(ISR_QUEUE, |s| s.queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR));
    }
    fn config(&self) {
        self.raise(ISR_CONFIG, |s| s.config_vector);
    }
}
