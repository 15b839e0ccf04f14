//! Events that a debugger catches: exceptions, accesses to system registers, ports and devices, changes of mode and of
//! address space.
//!
//! The runtime and the frontends tell what happens where it happens; with nothing to catch that is one test. The stop
//! is after the instruction: helpers leave their block, and an instruction of generated code that is about to access a
//! device is abandoned and executed carefully, as at a watchpoint.

use mimus_core::accel::{AccelError, Catch, Caught, DebugStop, SystemRegister};
use mimus_core::bus::GuestPhys;

use crate::env::Cpu;
use crate::frontend::GuestFrontend;

/// What a vCPU catches.
#[derive(Default)]
pub(crate) struct Catches {
    wanted: Vec<Catch>,
    /// Root of the page tables and mode when they were looked at last.
    space: (u64, u32),
    /// They may be others since: an instruction changes them bit by bit.
    pub moved: bool,
}

impl Catches {
    fn any(&self, caught: &Caught) -> bool {
        self.wanted.iter().any(|c| c.matches(caught))
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }
}

impl<F: GuestFrontend> Cpu<F> {
    pub(crate) fn add_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        if let Catch::Register { register, .. } = catch {
            F::can_catch(register).map_err(AccelError::Other)?;
        }
        self.debug.catches.space = self.space_and_mode();
        self.debug.catches.wanted.push(catch);
        Ok(())
    }

    pub(crate) fn drop_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        let wanted = &mut self.debug.catches.wanted;
        let at = wanted.iter().position(|c| *c == catch);
        let at = at.ok_or_else(|| AccelError::Other("nothing of the kind is caught".to_owned()))?;
        wanted.remove(at);
        self.debug.drop_stop();
        Ok(())
    }

    fn space_and_mode(&self) -> (u64, u32) {
        (F::address_space(self).0, F::operating_mode(self))
    }

    /// The guest stops after the current instruction if this is caught.
    fn caught(&mut self, caught: Caught) -> bool {
        let hit = self.debug.catches.any(&caught);
        if hit {
            self.debug.stop_for(DebugStop::Caught(caught));
            // The helper leaves its block as if that had changed.
            self.code_changed = true;
            self.check_events();
        }
        hit
    }

    /// An exception or interrupt is about to be taken.
    #[inline]
    pub(crate) fn catch_exception(&mut self, cause: u64, pc: u64, value: u64) {
        if !self.debug.catches.is_empty() {
            let (interrupt, cause) = (cause >> 63 != 0, cause << 1 >> 1);
            self.caught(Caught::Exception { interrupt, cause, pc, value });
        }
    }

    /// The address space or the mode may have changed.
    #[inline]
    pub(crate) fn catch_space(&mut self) {
        if !self.debug.catches.is_empty() {
            self.space_changed();
        }
    }

    #[cold]
    fn space_changed(&mut self) {
        if self.space_and_mode() != self.debug.catches.space {
            self.debug.catches.moved = true;
            self.code_changed = true;
            self.check_events();
        }
    }

    /// Between two instructions: the guest stops if a change of address space or mode is caught.
    pub(crate) fn settle_space(&mut self) {
        if !std::mem::take(&mut self.debug.catches.moved) {
            return;
        }
        let now = self.space_and_mode();
        let before = std::mem::replace(&mut self.debug.catches.space, now);
        if before.0 != now.0 {
            self.caught(Caught::Space { from: before.0, to: now.0 });
        }
        if before.1 != now.1 {
            self.caught(Caught::Mode { from: before.1, to: now.1 });
        }
    }

    /// For frontends: an instruction has accessed a system register. True if the guest is to stop after it: the
    /// helper leaves its block.
    #[inline]
    pub fn note_register(&mut self, register: SystemRegister, writes: bool, value: u64) -> bool {
        !self.debug.catches.is_empty() && self.caught(Caught::Register { register, writes, value })
    }

    /// An access to a port.
    #[inline]
    pub(crate) fn catch_port(&mut self, writes: bool, port: u16, value: u64) {
        if !self.debug.catches.is_empty() {
            self.caught(Caught::Port { port, writes, value });
        }
    }

    /// A device is accessed.
    #[inline]
    pub(crate) fn catch_device(&mut self, writes: bool, pa: GuestPhys, value: u64) {
        if !self.debug.catches.is_empty() {
            let caught = Caught::Device { pa: pa.0, writes, value };
            if !self.debug.is_recording() {
                self.caught(caught);
            } else if self.debug.catches.any(&caught) {
                self.debug.record(DebugStop::Caught(caught));
            }
        }
    }

    /// Before an instruction's access to a device: whether it is to be executed carefully instead, so that the guest
    /// stops right after it.
    #[inline]
    pub(crate) fn device_caught(&self, writes: bool, pa: GuestPhys) -> bool {
        !self.debug.catches.is_empty()
            && !self.debug.is_recording()
            && self.debug.catches.any(&Caught::Device { pa: pa.0, writes, value: 0 })
    }
}
