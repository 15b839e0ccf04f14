//! The finished machine.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use mimus_core::accel::{AccelVm, CpuIo, ResetKind, ShutdownCause, StartRequest, VcpuIndex};
use mimus_core::arch::{CpuModel, CpuState, StateGroups};
use mimus_core::backend::{BlockRequest, InputSink};
use mimus_core::device::{Device, Drain, ResetPhase, Services};
use mimus_core::io_thread::IoThread;
use mimus_core::memory::AddressSpace;
use mimus_core::vcpu::{VcpuThreads, WorkError};
use mimus_devices::pci::PciBus;

use super::MachineError;
use super::control::{MachineControl, Notice, Request, RunEnd, RunState};
use super::cpu_io::MachineIo;

/// How long a stop waits for requests in flight before it says so and goes on.
const DRAIN_TIME: Duration = Duration::from_secs(30);

/// What a board does for its machine once that is built.
pub trait Board: Send {
    /// Loads what is booted into memory, at power-on and after each reset, and says how
    /// each vCPU starts (missing: off).
    fn boot(&self, services: &Services) -> Result<Vec<PowerOn>, MachineError>;

    /// Whether the guest sleeps with its memory kept.
    fn asleep(&self) -> bool {
        false
    }

    /// The reset that comes wakes it.
    fn waking(&self) {}

    /// In place of [`Board::boot`] after such a reset: how each vCPU starts, with memory left as it is.
    fn wake(&self, services: &Services) -> Result<Vec<PowerOn>, MachineError> {
        self.boot(services)
    }

    /// Presses the power button; false if there is none.
    fn press_power_button(&self) -> bool {
        false
    }
}

/// Changes the state a vCPU has after reset to the one it is to start in.
pub type SetUp = Arc<dyn Fn(&mut CpuState) + Send + Sync>;

/// How a vCPU starts.
#[derive(Clone)]
pub enum PowerOn {
    /// Not, until another starts it.
    Off,
    /// Nor this, which until then has its reset state with changes.
    OffWith(SetUp),
    /// At the architecture's reset vector.
    AtReset,
    /// At an address with arguments.
    At(StartRequest),
    /// From its reset state with changes.
    With(SetUp),
}

/// What the user wants done at the guest's reset and power-off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// A reset by the guest ends the run, or pauses with `no_shutdown`.
    pub no_reboot: bool,
    /// A power-off pauses instead of ending the run.
    pub no_shutdown: bool,
}

pub(super) struct Parts {
    pub name: &'static str,
    pub cpu: CpuModel,
    pub board: Box<dyn Board>,
    pub policy: Policy,
    pub control: MachineControl,
    pub requests: Receiver<Request>,
    pub services: Services,
    pub io_thread: IoThread,
    pub vm: Arc<dyn AccelVm>,
    pub threads: VcpuThreads,
    pub io: Arc<MachineIo>,
    pub devices: Vec<(String, Arc<dyn Device>)>,
    pub pci: Vec<Arc<PciBus>>,
    pub inputs: Vec<Arc<dyn InputSink>>,
    /// What nobody else keeps.
    pub _spaces: Vec<Arc<AddressSpace>>,
}

/// A machine. Paused when built; ended when dropped.
pub struct Machine {
    pub(super) parts: Parts,
    ended: bool,
}

impl Machine {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts, ended: false }
    }

    /// The way for other threads to ask things of it.
    pub fn control(&self) -> MachineControl {
        self.parts.control.clone()
    }

    /// What its devices share: memory, clocks, back ends.
    pub fn services(&self) -> &Services {
        &self.parts.services
    }

    /// What takes what a person does: keyboards and mice.
    pub fn inputs(&self) -> &[Arc<dyn InputSink>] {
        &self.parts.inputs
    }

    /// The CPU model as the accelerator runs it.
    pub fn cpu(&self) -> &CpuModel {
        &self.parts.cpu
    }

    /// Its devices by path, in reset order.
    pub fn devices(&self) -> impl Iterator<Item = (&str, &Arc<dyn Device>)> {
        self.parts.devices.iter().map(|(path, device)| (path.as_str(), device))
    }

    /// Its PCI buses.
    pub fn pci_buses(&self) -> &[Arc<PciBus>] {
        &self.parts.pci
    }

    /// The device at a path.
    pub fn device(&self, path: &str) -> Option<&Arc<dyn Device>> {
        self.parts.devices.iter().find(|d| d.0 == path).map(|d| &d.1)
    }

    /// The vCPUs' threads.
    pub fn threads(&self) -> &VcpuThreads {
        &self.parts.threads
    }

    /// The machine as its vCPUs see it: memory, ports, interrupt controllers.
    pub fn io(&self) -> Arc<dyn CpuIo + Send + Sync> {
        self.parts.io.clone()
    }

    /// The accelerator's part.
    pub fn vm(&self) -> &Arc<dyn AccelVm> {
        &self.parts.vm
    }

    /// What it does now.
    pub fn state(&self) -> RunState {
        self.parts.control.state()
    }

    /// The state of a vCPU.
    pub fn vcpu_state(&self, vcpu: VcpuIndex, groups: StateGroups) -> Result<CpuState, WorkError> {
        self.parts.threads.run_on_sync(vcpu, move |v| v.get_state(groups))
    }

    /// Powers it on: all devices and vCPUs are reset, and what is booted is in memory. It
    /// stays paused.
    pub fn power_on(&mut self) -> Result<(), MachineError> {
        self.reset_all(ResetKind::Cold)
    }

    /// Lets it run.
    pub fn resume(&mut self) {
        let p = &self.parts;
        if self.state().runs() {
            return;
        }
        let asleep = p.board.asleep();
        p.control.set_state(if asleep { RunState::Suspended } else { RunState::Running });
        p.devices.iter().for_each(|d| d.1.start());
        p.services.map.apply_pending();
        p.services.clocks.virt.start();
        if let Some(clock) = p.vm.guest_clock() {
            clock.start();
        }
        if !asleep {
            p.threads.resume();
        }
    }

    /// The guest sleeps: no processor runs until it is woken.
    fn sleep(&mut self) {
        self.parts.threads.pause();
        self.make_collected_writes();
        self.parts.control.guest_request_done();
        if self.state() == RunState::Running {
            self.parts.control.set_state(RunState::Suspended);
        }
    }

    /// Wakes it, if it sleeps: a reset that leaves its memory as it is.
    fn wake(&mut self) -> Result<(), MachineError> {
        if !self.parts.board.asleep() {
            return Ok(());
        }
        self.parts.board.waking();
        self.reset_parts(ResetKind::Warm)?;
        let starts = self.parts.board.wake(&self.parts.services)?;
        self.start_vcpus(starts)?;
        self.go_on_after_reset();
        Ok(())
    }

    fn go_on_after_reset(&mut self) {
        if self.state() == RunState::Suspended {
            self.parts.control.set_state(RunState::Running);
        }
        if self.state() == RunState::Running {
            self.parts.threads.resume();
        }
    }

    /// Pauses it: no vCPU runs, time stands, no device has anything in flight.
    pub fn pause(&mut self) {
        if self.state().runs() {
            self.stop_as(RunState::Paused);
        }
    }

    fn stop_as(&mut self, state: RunState) {
        let p = &self.parts;
        p.threads.pause();
        self.make_collected_writes();
        if let Some(clock) = p.vm.guest_clock() {
            clock.stop();
        }
        p.services.clocks.virt.stop();
        p.services.io_thread.barrier();
        // Where time is instructions, requests of disks would wait for those that are not executed now.
        if p.services.backends.inputs().is_some() {
            p.services.backends.list_block().iter().for_each(|(_, disk, _)| disk.drain());
        }
        let drain = Drain::new();
        p.devices.iter().for_each(|d| d.1.stop(&drain));
        if !drain.wait(DRAIN_TIME) {
            log::warn!("the host has not finished some I/O of the guest after {} s", DRAIN_TIME.as_secs());
        }
        p.services.map.apply_pending();
        p.control.set_state(state);
    }

    /// Devices are looked at from outside now: writes that the accelerator kept for later are made.
    fn make_collected_writes(&self) {
        if let Some(collected) = self.parts.vm.coalesced_io() {
            collected.flush(&*self.parts.io);
        }
    }

    /// Resets it. It goes on if it was running.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        self.reset_all(ResetKind::Warm)?;
        self.go_on_after_reset();
        Ok(())
    }

    /// Three-phase reset of all devices, then the vCPUs, then the boot images. The vCPUs
    /// are left paused.
    fn reset_all(&mut self, kind: ResetKind) -> Result<(), MachineError> {
        self.reset_parts(kind)?;
        let starts = self.parts.board.boot(&self.parts.services)?;
        self.start_vcpus(starts)
    }

    /// All devices, then the vCPUs, which are powered off.
    fn reset_parts(&mut self, kind: ResetKind) -> Result<(), MachineError> {
        let p = &self.parts;
        p.threads.pause();
        self.make_collected_writes();
        p.control.guest_request_done();
        for phase in [ResetPhase::Enter, ResetPhase::Hold, ResetPhase::Exit] {
            p.devices.iter().for_each(|d| d.1.reset(phase));
            p.services.map.apply_pending();
        }
        p.io.reset_timers(&p.services.vcpus);
        for i in (0..p.threads.count() as u32).map(VcpuIndex) {
            p.threads.power_off(i);
            self.on_vcpu(i, move |v| v.reset(kind, None))?;
        }
        Ok(())
    }

    fn start_vcpus(&mut self, starts: Vec<PowerOn>) -> Result<(), MachineError> {
        let p = &self.parts;
        for (i, start) in (0..).map(VcpuIndex).zip(starts) {
            match start {
                PowerOn::Off => {}
                PowerOn::AtReset => _ = p.threads.power_on(i, None),
                PowerOn::At(request) => _ = p.threads.power_on(i, Some(request)),
                PowerOn::OffWith(change) => self.change_state(i, change)?,
                PowerOn::With(change) => {
                    self.change_state(i, change)?;
                    p.threads.power_on(i, None);
                }
            }
        }
        Ok(())
    }

    fn change_state(&self, vcpu: VcpuIndex, change: SetUp) -> Result<(), MachineError> {
        let set = self.on_vcpu(vcpu, move |v| {
            let mut state = v.get_state(StateGroups::All);
            change(&mut state);
            v.set_state(&state)
        })?;
        set.map_err(|e| MachineError::Other(format!("vCPU {vcpu}: {e}")))
    }

    pub(super) fn on_vcpu<R: Send + 'static>(
        &self,
        vcpu: VcpuIndex,
        f: impl FnOnce(&mut dyn mimus_core::accel::Vcpu) -> R + Send + 'static,
    ) -> Result<R, MachineError> {
        let result = self.parts.threads.run_on_sync(vcpu, f);
        result.map_err(|e| MachineError::Other(format!("vCPU {vcpu}: {e}")))
    }

    /// Carries out requests until the run ends.
    pub fn wait(&mut self) -> RunEnd {
        loop {
            let Ok(request) = self.parts.requests.recv() else {
                return RunEnd::Failed("nobody is left to ask the machine anything".to_owned());
            };
            if let Some(end) = self.carry_out(request) {
                return end;
            }
        }
    }

    /// Carries out one request; what it was if it ends the run.
    pub fn carry_out(&mut self, request: Request) -> Option<RunEnd> {
        match request {
            Request::Continue => self.go_on(),
            Request::Stop => {
                self.pause();
                None
            }
            Request::Reset(cause) => {
                if cause == mimus_core::accel::ResetCause::TripleFault {
                    self.parts.threads.pause();
                    self.parts.control.notify(Notice::TripleFault);
                }
                let by_guest = !matches!(cause, mimus_core::accel::ResetCause::HostRequest);
                if by_guest && self.parts.policy.no_reboot {
                    if !self.parts.policy.no_shutdown {
                        return Some(RunEnd::Reset);
                    }
                    // As it was: a debugger may want to look.
                    self.stop_as(RunState::Shutdown);
                    return None;
                }
                self.reset().err().map(|e| RunEnd::Failed(e.to_string()))
            }
            Request::Shutdown(cause) => self.shut_down(cause),
            Request::Sleep => {
                self.sleep();
                None
            }
            Request::Wake => self.wake().err().map(|e| RunEnd::Failed(e.to_string())),
            Request::PowerButton => {
                if !self.parts.board.press_power_button() {
                    log::warn!("this board has no power button: power off in the guest, or quit");
                }
                None
            }
            Request::Sync => {
                self.flush_disks();
                None
            }
            Request::Quit(cause) => Some(RunEnd::Quit(cause)),
            Request::Failed(vcpu, error) => {
                self.stop_as(RunState::InternalError);
                Some(RunEnd::Failed(format!("vCPU {vcpu} cannot go on: {error}")))
            }
            Request::Answer(done) => {
                // Whoever asked may have given up.
                let _ = done.try_send(());
                None
            }
            Request::Debug(vcpu, stop) => {
                self.parts.control.notify(Notice::Debug(vcpu, stop));
                self.pause();
                None
            }
        }
    }

    fn go_on(&mut self) -> Option<RunEnd> {
        // After a power-off there is nothing to go on with but a reset.
        if self.state() == RunState::Shutdown
            && let Err(e) = self.reset_all(ResetKind::Cold)
        {
            return Some(RunEnd::Failed(e.to_string()));
        }
        self.resume();
        None
    }

    fn shut_down(&mut self, cause: ShutdownCause) -> Option<RunEnd> {
        if self.parts.policy.no_shutdown {
            self.stop_as(RunState::Shutdown);
            return None;
        }
        Some(match cause {
            ShutdownCause::GuestExit(code) => RunEnd::Exit(code),
            ShutdownCause::GuestPanic | ShutdownCause::TripleFault => RunEnd::Panic,
            _ => RunEnd::PowerOff,
        })
    }

    /// Asks all disks to put what they have on stable storage; does not wait.
    pub fn flush_disks(&self) {
        for (_, disk, _) in self.parts.services.backends.list_block() {
            disk.submit(
                BlockRequest::flush(),
                Box::new(|result, _| {
                    if let Err(e) = result {
                        log::error!("a disk cannot be flushed: {e}");
                    }
                }),
            );
        }
    }

    /// Ends it: everything in flight is finished, disks and character devices are flushed,
    /// all threads are gone.
    pub fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        if self.state().runs() {
            self.stop_as(RunState::Ended);
        }
        self.parts.control.set_state(RunState::Ended);
        self.flush_disks();
        self.parts.threads.stop();
        let backends = &self.parts.services.backends;
        backends.list_block().iter().for_each(|(_, disk, _)| disk.drain());
        backends.list_char().iter().for_each(|(_, chr, _)| chr.flush());
        self.parts.io_thread.stop();
        self.parts.services.map.teardown();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}
