//! RISC-V platform-level interrupt controller.
//!
//! Spec: RISC-V PLIC specification 1.0.0, with the SiFive memory map (chapter 3 there).
//! Modelled: level-triggered gateways, priorities, enables, thresholds, claim/complete, up to 1023 sources.
//! Checked with: Linux irq-sifive-plic, OpenSBI, U-Boot.

use std::sync::{Arc, Mutex, PoisonError};

use mimus_core::accel::{CpuPin, VcpuHandle};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{MutLifecycle, MutMmioDevice, ResetPhase};
use mimus_core::irq::IrqController;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

const PENDING: u64 = 0x1000;
const ENABLE: u64 = 0x2000;
const ENABLE_STRIDE: u64 = 0x80;
const CONTEXT: u64 = 0x20_0000;
const CONTEXT_STRIDE: u64 = 0x1000;
/// Bytes of the register map.
pub const SIZE: u64 = 0x60_0000;
/// Accesses the region takes.
pub const RULES: AccessRules = AccessRules::only(AccessSize::B4);
/// Highest priority.
const MAX_PRIORITY: u32 = 7;

/// Where a context's interrupt goes.
pub struct PlicTarget {
    /// The hart.
    pub vcpu: Arc<dyn VcpuHandle>,
    /// `Meip` or `Seip`.
    pub pin: CpuPin,
}

/// The registers, as saved. Bit arrays hold source `n` in bit `n % 32` of word `n / 32`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    priority: Vec<u32>,
    pending: Vec<u32>,
    /// Claimed and not completed: the gateway forwards nothing.
    claimed: Vec<u32>,
    /// Level of the inputs.
    level: Vec<u32>,
    /// Per context.
    enable: Vec<Vec<u32>>,
    threshold: Vec<u32>,
}

/// A PLIC.
pub struct Plic {
    s: State,
    sources: usize,
    targets: Vec<PlicTarget>,
    /// Level of each context's output.
    output: Vec<bool>,
}

/// A PLIC as the board wires it.
pub struct PlicIrqs(Arc<Mutex<Plic>>);

impl Plic {
    /// A PLIC with sources 1 to `sources`, whose context `i` drives `targets[i]`.
    pub fn new(sources: u32, targets: Vec<PlicTarget>) -> Arc<Mutex<Plic>> {
        let sources = sources.min(1023) as usize;
        let words = sources / 32 + 1;
        let s = empty(sources, words, targets.len());
        let output = vec![false; targets.len()];
        Arc::new(Mutex::new(Plic { s, sources, targets, output }))
    }

    /// The controller to make interrupt lines with; pin `n` is source `n`.
    pub fn irqs(plic: &Arc<Mutex<Plic>>) -> Arc<dyn IrqController> {
        Arc::new(PlicIrqs(plic.clone()))
    }

    fn set_source(&mut self, source: usize, level: bool) {
        if source == 0 || source > self.sources {
            return;
        }
        set_bit(&mut self.s.level, source, level);
        if level && !bit(&self.s.claimed, source) {
            set_bit(&mut self.s.pending, source, true);
        }
        self.update();
    }

    /// The source a context would claim: highest priority, then lowest number.
    fn best(&self, context: usize) -> Option<usize> {
        let mut best: Option<(u32, usize)> = None;
        let words = self.s.pending.iter().zip(&self.s.enable[context]).enumerate();
        for (word, (pending, enable)) in words {
            let mut ready = pending & enable;
            while ready != 0 {
                let source = word * 32 + ready.trailing_zeros() as usize;
                ready &= ready - 1;
                let priority = self.s.priority[source];
                if priority > self.s.threshold[context] && best.is_none_or(|(p, _)| priority > p) {
                    best = Some((priority, source));
                }
            }
        }
        best.map(|(_, source)| source)
    }

    fn update(&mut self) {
        for context in 0..self.targets.len() {
            let level = self.best(context).is_some();
            if self.output[context] != level {
                self.output[context] = level;
                let target = &self.targets[context];
                target.vcpu.set_pin(target.pin, level);
            }
        }
    }

    fn claim(&mut self, context: usize) -> u32 {
        // A claim ignores the threshold (section 9): "may be attempted at any time".
        let threshold = std::mem::take(&mut self.s.threshold[context]);
        let source = self.best(context).unwrap_or(0);
        self.s.threshold[context] = threshold;
        if source != 0 {
            set_bit(&mut self.s.pending, source, false);
            set_bit(&mut self.s.claimed, source, true);
            self.update();
        }
        source as u32
    }

    fn complete(&mut self, context: usize, source: u32) {
        let source = source as usize;
        let exists = source != 0 && source <= self.sources;
        // Section 10: ignored for a source that is not enabled. One not claimed has no request open.
        if !exists || !bit(&self.s.enable[context], source) || !bit(&self.s.claimed, source) {
            return;
        }
        set_bit(&mut self.s.claimed, source, false);
        if bit(&self.s.level, source) {
            set_bit(&mut self.s.pending, source, true);
        }
        self.update();
    }

    fn enable_word(&mut self, offset: u64) -> Option<&mut u32> {
        let context = ((offset - ENABLE) / ENABLE_STRIDE) as usize;
        let word = ((offset - ENABLE) % ENABLE_STRIDE / 4) as usize;
        self.s.enable.get_mut(context)?.get_mut(word)
    }

    fn context(&self, offset: u64) -> Option<(usize, u64)> {
        let context = ((offset - CONTEXT) / CONTEXT_STRIDE) as usize;
        (context < self.targets.len()).then_some((context, (offset - CONTEXT) % CONTEXT_STRIDE))
    }

    fn read(&mut self, offset: u64) -> u32 {
        match offset {
            0..PENDING => self.s.priority.get(offset as usize / 4).copied().unwrap_or(0),
            PENDING..ENABLE => self.s.pending.get((offset - PENDING) as usize / 4).copied().unwrap_or(0),
            ENABLE..CONTEXT => self.enable_word(offset).map_or(0, |w| *w),
            _ => match self.context(offset) {
                Some((context, 0)) => self.s.threshold[context],
                Some((context, 4)) => self.claim(context),
                _ => 0,
            },
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            0..PENDING => {
                let source = offset as usize / 4;
                if source != 0 && source <= self.sources {
                    self.s.priority[source] = value & MAX_PRIORITY;
                }
            }
            PENDING..ENABLE => {}
            ENABLE..CONTEXT => {
                let exist = existing(self.sources, ((offset - ENABLE) % ENABLE_STRIDE / 4) as usize);
                if let Some(word) = self.enable_word(offset) {
                    *word = value & exist;
                }
            }
            _ => match self.context(offset) {
                Some((context, 0)) => self.s.threshold[context] = value & MAX_PRIORITY,
                Some((context, 4)) => return self.complete(context, value),
                _ => {}
            },
        }
        self.update();
    }
}

impl IrqController for PlicIrqs {
    fn set_input(&self, pin: u32, level: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).set_source(pin as usize, level);
    }
}

fn empty(sources: usize, words: usize, contexts: usize) -> State {
    State {
        priority: vec![0; sources + 1],
        pending: vec![0; words],
        claimed: vec![0; words],
        level: vec![0; words],
        enable: vec![vec![0; words]; contexts],
        threshold: vec![0; contexts],
    }
}

/// The bits of word `word` that stand for sources: 1 to `sources`.
fn existing(sources: usize, word: usize) -> u32 {
    let below = match (sources + 1).saturating_sub(word * 32) {
        0 => 0,
        n @ 1..32 => (1 << n) - 1,
        _ => u32::MAX,
    };
    if word == 0 { below & !1 } else { below }
}

fn bit(words: &[u32], n: usize) -> bool {
    words[n / 32] >> (n % 32) & 1 != 0
}

fn set_bit(words: &mut [u32], n: usize, on: bool) {
    let mask = 1 << (n % 32);
    if on {
        words[n / 32] |= mask;
    } else {
        words[n / 32] &= !mask;
    }
}

impl MutMmioDevice for Plic {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(u64::from(self.read(a.offset)))
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        self.write(a.offset, value as u32);
        Ok(())
    }
}

impl MutLifecycle for Plic {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => {
                let level = std::mem::take(&mut self.s.level);
                let words = level.len();
                self.s = State { level, ..empty(self.sources, words, self.targets.len()) };
            }
            ResetPhase::Hold => self.update(),
            // Lines that are still high after all devices' reset are requests.
            ResetPhase::Exit => {
                self.s.pending.copy_from_slice(&self.s.level);
                self.update();
            }
        }
    }
}

impl SaveRestore for Plic {
    const SCHEMA: Schema = Schema::new("riscv-plic", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let words = self.sources / 32 + 1;
        let arrays = [&state.pending, &state.claimed, &state.level];
        let fits = state.priority.len() == self.sources + 1
            && arrays.iter().all(|a| a.len() == words)
            && state.enable.len() == self.targets.len()
            && state.enable.iter().all(|e| e.len() == words)
            && state.threshold.len() == self.targets.len();
        if !fits {
            return Err(SnapshotError::Invalid {
                schema: Self::SCHEMA.name,
                field: "enable",
                reason: format!("made for another number of sources or harts than {}", self.sources),
            });
        }
        let stray = |words: &[u32]| words.iter().enumerate().any(|(i, w)| w & !existing(self.sources, i) != 0);
        if arrays.iter().any(|a| stray(a)) || state.enable.iter().any(|e| stray(e)) {
            return Err(SnapshotError::invalid(Self::SCHEMA, "pending", "bits of sources that do not exist"));
        }
        if state.priority.iter().chain(&state.threshold).any(|&p| p > MAX_PRIORITY) {
            return Err(SnapshotError::invalid(Self::SCHEMA, "priority", format!("above {MAX_PRIORITY}")));
        }
        self.s = state;
        // Driven whatever they were, as the vCPUs may have been reset meanwhile.
        for context in 0..self.targets.len() {
            self.output[context] = self.best(context).is_some();
            let target = &self.targets[context];
            target.vcpu.set_pin(target.pin, self.output[context]);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "plic_tests.rs"]
mod tests;
