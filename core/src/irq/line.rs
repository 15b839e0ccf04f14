//! Interrupt lines: wires from a device to one input of a controller.

use super::controller::IrqController;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A wire. Clones are the same wire; repeated levels go no further.
#[derive(Clone)]
pub struct IrqLine(Arc<Wire>);

struct Wire {
    /// Level last driven. Written under `drive`.
    level: AtomicBool,
    /// Keeps levels in order when two threads drive the line.
    drive: Mutex<()>,
    sink: Option<(Arc<dyn IrqController>, u32)>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IrqLine {
    /// A wire to input `pin` of `controller`, low.
    pub fn new(controller: Arc<dyn IrqController>, pin: u32) -> Self {
        Self::wire(Some((controller, pin)))
    }

    /// A wire to nowhere.
    pub fn disconnected() -> Self {
        Self::wire(None)
    }

    fn wire(sink: Option<(Arc<dyn IrqController>, u32)>) -> Self {
        Self(Arc::new(Wire { level: AtomicBool::new(false), drive: Mutex::new(()), sink }))
    }

    /// Drives the wire.
    pub fn set_level(&self, level: bool) {
        if self.0.level.load(Ordering::Acquire) == level {
            return;
        }
        let _order = lock(&self.0.drive);
        if self.0.level.swap(level, Ordering::AcqRel) != level {
            self.send(level);
        }
    }

    /// Drives it high.
    pub fn raise(&self) {
        self.set_level(true);
    }

    /// Drives it low.
    pub fn lower(&self) {
        self.set_level(false);
    }

    /// Drives it high, then low, for edge-triggered inputs; from high, only low.
    pub fn pulse(&self) {
        let _order = lock(&self.0.drive);
        if !self.0.level.swap(false, Ordering::AcqRel) {
            self.send(true);
        }
        self.send(false);
    }

    /// Takes over a level after a restore without telling the controller, which restores
    /// its own inputs.
    pub fn import_level(&self, level: bool) {
        let _order = lock(&self.0.drive);
        self.0.level.store(level, Ordering::Release);
        if let Some((controller, pin)) = &self.0.sink {
            controller.import_input(*pin, level);
        }
    }

    /// The level last driven.
    pub fn level(&self) -> bool {
        self.0.level.load(Ordering::Acquire)
    }

    fn send(&self, level: bool) {
        if let Some((controller, pin)) = &self.0.sink {
            controller.set_input(*pin, level);
        }
    }
}

impl Default for IrqLine {
    fn default() -> Self {
        Self::disconnected()
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqLine({})", if self.level() { "high" } else { "low" })
    }
}

/// Several lines onto one: high while any is (PCI INTx).
pub struct OrGate {
    levels: Mutex<Vec<bool>>,
    output: IrqLine,
}

impl OrGate {
    /// A gate without inputs that drives `output`.
    pub fn new(output: IrqLine) -> Arc<Self> {
        Arc::new(Self { levels: Mutex::new(Vec::new()), output })
    }

    /// A new input.
    pub fn input(self: &Arc<Self>) -> IrqLine {
        let mut levels = lock(&self.levels);
        levels.push(false);
        IrqLine::new(self.clone(), (levels.len() - 1) as u32)
    }
}

impl IrqController for OrGate {
    fn set_input(&self, pin: u32, level: bool) {
        let mut levels = lock(&self.levels);
        if let Some(l) = levels.get_mut(pin as usize) {
            *l = level;
        }
        self.output.set_level(levels.contains(&true));
    }

    fn import_input(&self, pin: u32, level: bool) {
        let mut levels = lock(&self.levels);
        if let Some(l) = levels.get_mut(pin as usize) {
            *l = level;
        }
        self.output.import_level(levels.contains(&true));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);

    impl IrqController for Log {
        fn set_input(&self, pin: u32, level: bool) {
            lock(&self.0).push((pin, level));
        }
    }

    #[test]
    fn repeats_are_filtered() {
        let log = Arc::new(Log::default());
        let line = IrqLine::new(log.clone(), 4);
        line.lower();
        line.raise();
        line.raise();
        line.clone().lower();
        line.pulse();
        line.import_level(true);
        line.raise();
        line.lower();
        let want = [(4, true), (4, false), (4, true), (4, false), (4, false)];
        assert_eq!(*lock(&log.0), want);
        IrqLine::disconnected().raise();
    }

    #[test]
    fn or_gate() {
        let log = Arc::new(Log::default());
        let gate = OrGate::new(IrqLine::new(log.clone(), 0));
        let (a, b) = (gate.input(), gate.input());
        a.raise();
        b.raise();
        a.lower();
        b.lower();
        assert_eq!(*lock(&log.0), [(0, true), (0, false)]);
        a.import_level(true);
        b.import_level(true);
        a.lower();
        assert_eq!(lock(&log.0).len(), 2, "restoring is silent");
        b.lower();
        assert_eq!(lock(&log.0)[2], (0, false));
    }
}
