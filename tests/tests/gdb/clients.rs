//! Debuggers that come and go while the guest works.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use mimus_gdbstub::packet::{Framer, Incoming, encode};
use mimus_gdbstub::{Address, Listener, Server};
use mimus_machines::machine::{Notice, Request, RunState};
use mimus_tests::cpus::alone;

use crate::harness::{Debuggee, Engine, LIMIT, Setup, event_of};
use crate::programs;

/// Visits in an ordinary test run; `MIMUS_GDB_VISITS` says otherwise.
const VISITS: u32 = 100;

fn visits() -> u32 {
    std::env::var("MIMUS_GDB_VISITS").ok().and_then(|v| v.parse().ok()).unwrap_or(VISITS)
}

/// A served guest, which runs.
struct Served {
    guest: Debuggee,
    server: Arc<Server>,
    socket: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new(guest: Debuggee) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("gdb");
        let server = Listener::bind(&Address::Unix(socket.clone())).unwrap().serve(guest.target.clone()).unwrap();
        let told = server.clone();
        guest.control.observe(move |notice| {
            if let Some(event) = event_of(notice) {
                told.event(event);
            }
        });
        guest.control.request(Request::Continue);
        Self { guest, server, socket, _dir: dir }
    }

    fn connect(&self) -> Visitor {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Visitor { stream, framer: Framer::default() }
    }
}

struct Visitor {
    stream: UnixStream,
    framer: Framer,
}

impl Visitor {
    fn send(&mut self, body: &str) {
        self.stream.write_all(&encode(body.as_bytes())).unwrap();
    }

    fn ask(&mut self, body: &str) -> String {
        self.send(body);
        let mut byte = [0];
        loop {
            self.stream.read_exact(&mut byte).unwrap_or_else(|e| panic!("{body}: {e}"));
            if let Some(Incoming::Packet(reply)) = self.framer.feed(byte[0]) {
                return String::from_utf8(reply).unwrap();
            }
        }
    }
}

/// What a visitor does; `at` is an address in the loop of the guest, `data` what it counts in.
fn visit(mut v: Visitor, n: u32, at: u64, data: u64) {
    match n % 8 {
        // Comes and is gone.
        0 => {}
        1 => {
            assert!(v.ask("?").starts_with("T05"));
            assert_eq!(v.ask("D"), "OK");
        }
        2 => {
            assert_eq!(v.ask(&format!("Z0,{at:x},4")), "OK");
            assert!(v.ask("vCont;c").contains("swbreak"));
            assert_eq!(v.ask(&format!("z0,{at:x},4")), "OK");
            assert_eq!(v.ask("D"), "OK");
        }
        // Leaves everything behind.
        3 => {
            assert_eq!(v.ask(&format!("Z0,{at:x},4")), "OK");
            v.send("vCont;c");
        }
        4 => {
            assert_eq!(v.ask(&format!("Z1,{at:x},4")), "OK");
            for _ in 0..5 {
                assert!(v.ask("vCont;s:1;c").starts_with("T05thread:"));
            }
        }
        5 => {
            v.send("vCont;c");
            std::thread::sleep(Duration::from_micros(u64::from(n) % 700));
            v.stream.write_all(&[3]).unwrap();
        }
        // In the middle of a packet, while it is being stopped.
        6 => v.stream.write_all(b"$m80000").unwrap(),
        _ => {
            let watch = v.ask(&format!("Z2,{data:x},8"));
            if watch == "OK" {
                v.send("c");
            }
        }
    }
}

fn come_and_go(guest: Debuggee, visits: u32, at: u64, counters: &[u64]) {
    let served = Served::new(guest);
    let mut before: Vec<u64> = counters.iter().map(|c| served.guest.word(*c)).collect();
    for n in 0..visits {
        let mut visitor = served.connect();
        if n % 8 == 1 {
            // It stands still as long as somebody is there.
            visitor.ask("?");
            let still: Vec<u64> = counters.iter().map(|c| served.guest.word(*c)).collect();
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(still, counters.iter().map(|c| served.guest.word(*c)).collect::<Vec<_>>(), "visit {n}");
        }
        visit(visitor, n, at, counters[0]);
        if n % 10 == 0 {
            for (counter, before) in counters.iter().zip(&mut before) {
                served.guest.wait_for(*counter, *before + 1);
                *before = served.guest.word(*counter);
            }
        }
    }
    // The last has to be seen off, then it runs as if nothing had been.
    assert_eq!(served.connect().ask("D"), "OK");
    for counter in counters {
        let now = served.guest.word(*counter);
        served.guest.wait_for(*counter, now + 100_000);
    }
    assert_eq!(served.guest.control.state(), RunState::Running);
    served.server.end();
}

#[test]
fn come_and_go_riscv64() {
    let _one = alone();
    let mut program = programs::riscv::two_harts();
    let kernel = program.finish();
    let at = program.address("again");
    let guest = Setup::new("riscv64", "virt", 2).kernel(&kernel, false).start(Engine::Jit);
    come_and_go(guest, visits(), at, &[programs::riscv::JIFFIES, programs::riscv::JIFFIES + 8]);
}

/// Debuggers are quicker than the machine's own thread: what one has asked for and not waited for is not taken for
/// what the next asks for.
#[test]
fn come_and_go_while_the_machine_is_slow() {
    let _one = alone();
    let mut program = programs::riscv::two_harts();
    let kernel = program.finish();
    let at = program.address("again");
    let guest = Setup::new("riscv64", "virt", 2).kernel(&kernel, false).start(Engine::Jit);
    guest.control.observe(|notice| {
        if matches!(notice, Notice::State(RunState::Running)) {
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    come_and_go(guest, 26, at, &[programs::riscv::JIFFIES, programs::riscv::JIFFIES + 8]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn come_and_go_x86() {
    let _one = alone();
    for (arch, at) in [("x86_64", programs::x86::LOOP64), ("i386", programs::x86::LOOP32)] {
        let rom = programs::x86::rom(arch == "x86_64");
        let guest = Setup::new(arch, "pc", 1).rom(&rom).start(Engine::Jit);
        come_and_go(guest, visits(), programs::x86::ROM + at, &[programs::x86::JIFFIES]);
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn come_and_go_kvm() {
    use mimus_core::accel::Accelerator;
    let why = mimus_accel_kvm::KvmAccelerator.probe(mimus_core::arch::GuestArch::X86_64).err();
    if let Some(why) = why {
        return crate::harness::skipped("come_and_go_kvm", &why.to_string());
    }
    let guest = Setup::new("x86_64", "pc", 1).rom(&programs::x86::rom(true)).start(Engine::Kvm);
    let at = programs::x86::ROM + programs::x86::LOOP64;
    // A KVM that does not report watched accesses never stops for one: that visitor hangs up.
    come_and_go(guest, visits().min(200), at, &[programs::x86::JIFFIES]);
}

/// All vCPUs are threads; each can be stepped alone, held, or run.
#[test]
fn each_vcpu_is_a_thread() {
    let _one = alone();
    for engine in [Engine::Jit, Engine::Interp] {
        let mut program = programs::riscv::two_harts();
        let kernel = program.finish();
        let at = program.address("again");
        let guest = Setup::new("riscv64", "virt", 2).kernel(&kernel, false).start(engine);
        guest.control.request(Request::Continue);
        guest.wait_for(programs::riscv::JIFFIES + 8, 1);
        guest.control.request(Request::Stop);
        while guest.control.state() == RunState::Running {
            std::thread::yield_now();
        }
        let mut c = guest.client();
        assert_eq!(c.ask("qfThreadInfo"), "m1,2");
        // One steps, the other is held.
        let pc = |c: &mut crate::harness::Client, thread: u32| {
            assert_eq!(c.ask(&format!("Hg{thread}")), "OK");
            c.ask("p20")
        };
        let (first, second) = (pc(&mut c, 1), pc(&mut c, 2));
        assert_eq!(c.ask("vCont;s:2"), "T05thread:2;");
        assert_eq!(pc(&mut c, 1), first);
        assert_ne!(pc(&mut c, 2), second);
        let held = guest.word(programs::riscv::JIFFIES);
        // A breakpoint that both run into: the one that is run finds it.
        assert_eq!(c.ask(&format!("Z0,{at:x},4")), "OK");
        assert_eq!(c.ask("vCont;c:2"), "T05thread:2;swbreak:;");
        assert_eq!(guest.word(programs::riscv::JIFFIES), held);
        // One is stepped while the other runs: either may stop first.
        let reply = c.ask("vCont;s:1;c");
        assert!(reply.starts_with("T05thread:1;") || reply.starts_with("T05thread:2;swbreak"), "{reply}");
        assert_eq!(c.ask(&format!("z0,{at:x},4")), "OK");
        assert_eq!(c.ask("Hc1"), "OK");
        c.send(b"c");
        std::thread::sleep(Duration::from_millis(20));
        let second = guest.word(programs::riscv::JIFFIES + 8);
        guest.wait_for(programs::riscv::JIFFIES, held + 1000);
        assert!(guest.word(programs::riscv::JIFFIES + 8) <= second + 1, "the other is held");
        assert!(c.interrupt().starts_with("T02thread:"));
        assert_eq!(c.ask("D"), "OK");
        guest.wait_for(programs::riscv::JIFFIES + 8, second + 1000);
    }
}

/// A guest that crashes is there to be looked at, and begins anew when it goes on.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_triple_fault_can_be_looked_at() {
    let _one = alone();
    let mut rom = programs::x86::rom(false);
    // lidt cs:[0xb8], which is an empty table; ud2
    rom[0xb8..0xbe].fill(0);
    rom[0x100..0x108].copy_from_slice(&[0x2e, 0x0f, 0x01, 0x1e, 0xb8, 0x00, 0x0f, 0x0b]);
    let mut setup = Setup::new("i386", "pc", 1).rom(&rom);
    setup.config.no_reboot = true;
    let guest = setup.start(Engine::Jit);
    let mut c = guest.client();
    for _ in 0..2 {
        assert_eq!(c.ask("vCont;c"), "T05thread:1;");
        assert_eq!(guest.control.state(), RunState::Shutdown);
        assert_eq!(c.ask("p8"), "06010f00");
        assert_eq!(c.ask("mf0106,2"), "0f0b");
    }
}
