//! The terminal: keys that belong to mimus, and its settings afterwards.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::harness::{Dir, LIMIT, commands};

/// A pseudo-terminal with a program on it.
struct Terminal {
    master: File,
    /// Keeps the terminal, and its settings, when the program is gone.
    slave: File,
    seen: Vec<u8>,
}

impl Terminal {
    fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let flags = rustix::fs::fcntl_getfl(&master).unwrap();
        rustix::fs::fcntl_setfl(&master, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
        Terminal { master: File::from(master), slave, seen: Vec::new() }
    }

    fn settings(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    fn spawn(&self, args: &[&str]) -> std::process::Child {
        let end = || self.slave.try_clone().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mimus"));
        command.args(args).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap()
    }

    /// Waits for a text; gives what there is up to and behind it.
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        while !self.seen.windows(text.len()).any(|w| w == text.as_bytes()) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", String::from_utf8_lossy(&self.seen));
            let mut buffer = [0; 4096];
            match self.master.read(&mut buffer) {
                Ok(n) => self.seen.extend_from_slice(&buffer[..n]),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.seen)).into_owned()
    }

    /// Types keys, and waits for what they bring.
    fn keys(&mut self, keys: &str, text: &str) {
        self.send(keys);
        self.wait_for(text);
    }

    fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }
}

#[test]
fn keys_reach_the_guest_and_ctrl_a_x_leaves_all_as_it_was() {
    let test = "keys_reach_the_guest_and_ctrl_a_x_leaves_all_as_it_was";
    let Some(c) = commands(test) else { return };
    let mut terminal = Terminal::new();
    let before = format!("{:?}", terminal.settings());
    let kernel = ["-kernel", &c.kernel, "-initrd", &c.initrd, "-append", "console=ttyS0 quiet"];
    let args = [&["system", "riscv64", "-m", "512", "-nographic"], &kernel[..]].concat();
    let mut child = terminal.spawn(&args);
    terminal.wait_for("<<ready>>");
    let raw = terminal.settings();
    assert!(!raw.local_modes.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG));
    terminal.send("\x01h");
    terminal.wait_for("Ctrl-A");
    // Ctrl-C is the guest's: it ends the guest's sleep, not mimus.
    terminal.send("trap 'echo interrupt''ed' INT; sleep 100\n");
    std::thread::sleep(Duration::from_millis(500));
    terminal.send("echo $((40 + 2))-alive\x15\x03");
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "Ctrl-C ended it");
    terminal.send("\x01x");
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(format!("{:?}", terminal.settings()), before);
}

#[test]
fn a_signal_and_an_error_leave_the_terminal_as_it_was() {
    let test = "a_signal_and_an_error_leave_the_terminal_as_it_was";
    let Some(c) = commands(test) else { return };
    let mut terminal = Terminal::new();
    let before = format!("{:?}", terminal.settings());
    let args = ["system", "riscv64", "-m", "512", "-nographic", "-kernel", &c.kernel, "-append", "console=ttyS0"];
    let mut child = terminal.spawn(&args);
    terminal.wait_for("Linux version");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(format!("{:?}", terminal.settings()), before);
    let mut child = terminal.spawn(&["system", "riscv64", "-nographic", "-kernel", "/nonexistent/kernel"]);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(format!("{:?}", terminal.settings()), before);
}

/// A RISC-V program that says "!" and jumps to itself.
fn endless(dir: &Dir) -> String {
    // lui t0, 0x10000; li t1, '!'; sb t1, 0(t0); j .
    let mut bytes = [0x1000_02b7u32, 0x0210_0313, 0x0062_8023, 0x0000_006f].map(u32::to_le_bytes).concat();
    bytes.resize(4096, 0);
    std::fs::write(dir.path("program"), bytes).unwrap();
    dir.path("program")
}

#[test]
fn the_monitor_has_editing_history_and_completion() {
    let dir = Dir::new("monitor-editing");
    let mut terminal = Terminal::new();
    let program = endless(&dir);
    let args = ["system", "riscv64", "-accel", "tcg", "-m", "64", "-bios", "none", "-nographic", "-kernel", &program];
    let mut child = terminal.spawn(&args);
    terminal.wait_for("!");
    terminal.keys("\x01c", "(mimus) ");
    // Completed, and a letter put right in the middle.
    terminal.keys("info sta\t\r", "VM status: running");
    terminal.keys("syste\t", "system_");
    terminal.keys("\t\t", "system_powerdown  system_reset");
    terminal.keys("\x03inf statuss\x1b[D\x7f\x01\x01\x1b[C\x1b[C\x1b[Co\r", "VM status: running");
    terminal.keys("\x1b[A\r", "VM status: running");
    // A breakpoint is told when it is hit, and what waits for the machine leaves the keyboard free.
    terminal.keys("break 0x8000000c\r", "vCPU 0: breakpoint");
    terminal.keys("delete\r", "delete\r\n(mimus) ");
    terminal.keys("until $a0 == 77\r", "until");
    terminal.keys("\x03", "stopped");
    terminal.keys("print $pc\r", "0x8000000c ");
    // It goes on soon.
    terminal.keys("continue\r", "(mimus) ");
    while {
        terminal.send("info status\r");
        !terminal.wait_for("\r\n(mimus) ").contains("running")
    } {}
    terminal.send("\x01x");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_debuggers_prompt_has_them_too() {
    let dir = Dir::new("prompt-editing");
    let mut terminal = Terminal::new();
    let program = endless(&dir);
    let args = ["debug", "riscv64", "-accel", "tcg", "-m", "64", "-bios", "none", "-kernel", &program];
    let mut child = terminal.spawn(&args);
    terminal.wait_for("(debug) ");
    terminal.keys("disas\t $pc 1\r", "=> 0000000000001000");
    terminal.keys("info mtr\t\r", " ram    ram");
    terminal.keys("print $mtve\t\r", "0x0 0");
    terminal.keys("\x1b[A\x1b[A\r", " ram    ram");
    terminal.keys("catch csr sat\t w\r", "1: catch csr satp w");
    terminal.keys("info status\r", "VM status: ");
    terminal.keys("c\r", "!");
    // A Ctrl-C of the terminal is a signal to those in its foreground: here, to the program.
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    terminal.wait_for("stopped");
    terminal.send("quit\r");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
