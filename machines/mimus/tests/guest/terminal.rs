//! The terminal: keys that belong to mimus, and its settings afterwards.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::harness::{LIMIT, commands};

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

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.seen.windows(text.len()).any(|w| w == text.as_bytes()) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", String::from_utf8_lossy(&self.seen));
            let mut buffer = [0; 4096];
            match self.master.read(&mut buffer) {
                Ok(n) => self.seen.extend_from_slice(&buffer[..n]),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        self.seen.clear();
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
