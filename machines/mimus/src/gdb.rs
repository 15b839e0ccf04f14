//! `-gdb` and `-s`: the machine as a debugger's target.

use std::sync::Arc;
use std::time::Duration;

use mimus_core::accel::VcpuIndex;
use mimus_gdbstub::registers::Model;
use mimus_gdbstub::{Address, Event, Listener, Server, vm};
use mimus_machines::config::MachineConfig;
use mimus_machines::machine::control::QuitCause;
use mimus_machines::machine::{Machine, Notice, Request, RunState};

use crate::monitor;
use crate::run::Operator;

/// Where the configuration has a debugger's server, if it has one.
pub fn address(config: &MachineConfig) -> anyhow::Result<Option<Address>> {
    let parsed = config.gdb.as_deref().map_or(Ok(None), Address::parse);
    parsed.map_err(anyhow::Error::msg)
}

/// Opens the socket; early, so that one that is taken ends the run before it begins.
pub fn listen(config: &MachineConfig) -> anyhow::Result<Option<Listener>> {
    let Some(address) = address(config)? else { return Ok(None) };
    let listener = Listener::bind(&address).map_err(|e| {
        let what_to_do = match e.kind() {
            std::io::ErrorKind::AddrInUse => ": another program listens there; use -gdb with another port or path",
            _ => "",
        };
        anyhow::anyhow!("-gdb: cannot listen on {address}: {e}{what_to_do}")
    })?;
    if matches!(address, Address::Tcp { port: 0, .. }) {
        eprintln!("mimus: gdb: listening on {}", listener.address());
    }
    Ok(Some(listener))
}

/// Serves debuggers of `machine`.
pub fn serve(listener: Listener, machine: &Machine, operator: &Arc<Operator>) -> anyhow::Result<Arc<Server>> {
    let (threads, memory) = (machine.threads().clone(), machine.services().memory.clone());
    let target = vm::Vm::new(Model::of(machine.cpu()), threads, memory, Arc::new(Debugged(operator.clone())));
    let server = listener.serve(Arc::new(target))?;
    let told = server.clone();
    machine.control().observe(move |notice| {
        told.event(match notice {
            Notice::Debug(VcpuIndex(vcpu), stop) => Event::Stop(vcpu, stop),
            Notice::State(state) if state.runs() => Event::Running,
            // Told by `Server::end`, which waits until the client knows.
            Notice::State(RunState::Ended) | Notice::TripleFault => return,
            Notice::State(_) => Event::Stopped,
        });
    });
    Ok(server)
}

struct Debugged(Arc<Operator>);

impl vm::Operator for Debugged {
    fn running(&self) -> bool {
        self.0.control.state().runs()
    }
    fn resume(&self) {
        self.0.control.request(Request::Continue);
    }
    fn stop(&self) {
        self.0.control.request(Request::Stop);
    }
    fn settle(&self, limit: Duration) -> bool {
        self.0.control.settle(limit)
    }
    fn kill(&self) {
        self.0.control.request(Request::Quit(QuitCause::Monitor));
    }
    fn monitor(&self, line: &str) -> String {
        // They wait for a stop, which gdb has to be told.
        const RUN: [&str; 8] = ["step", "si", "next", "n", "ni", "finish", "until", "continue"];
        if line.split_whitespace().next().is_some_and(|word| RUN.contains(&word)) {
            return "gdb runs the machine: use its own stepi, nexti, finish and continue\n".to_owned();
        }
        monitor::execute(line, &*self.0)
    }
}
