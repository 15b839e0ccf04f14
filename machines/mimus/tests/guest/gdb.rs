//! Stock gdb and a running kernel.

use std::process::{Command, Stdio};

use crate::harness::{Dir, Mimus, commands, skipped};

/// Where the kernel is loaded.
const KERNEL: u64 = 0x8020_0000;

/// The address of a symbol, from the guest's own table.
fn symbol(guest: &mut Mimus, name: &str) -> u64 {
    let line = guest.run(&format!("grep ' {name}$' /proc/kallsyms"));
    let address = line.split_whitespace().next().unwrap_or_default();
    u64::from_str_radix(address, 16).unwrap_or_else(|e| panic!("{name}: {line:?}: {e}"))
}

#[test]
fn a_session_with_gdb() {
    const NAME: &str = "a_session_with_gdb";
    if !Command::new("gdb-multiarch").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
        return skipped(NAME, "there is no gdb-multiarch");
    }
    let Some(c) = commands(NAME) else { return };
    let dir = Dir::new(NAME);
    let socket = dir.path("gdb");
    let mut guest = c.boot(&["-smp", "2", "-gdb", &format!("unix:{socket}")]);
    let [banner, start, schedule, jiffies] =
        ["linux_banner", "_start", "schedule", "jiffies"].map(|name| symbol(&mut guest, name));
    let physical = banner - start + KERNEL;
    let script = format!(
        "set pagination off\nset confirm off\nset remotetimeout 100\ntarget remote {socket}\ninfo threads\n\
         break *{schedule:#x}\ncontinue\nprintf \"at %lx mode %d\\n\", $pc, $priv\ndelete\n\
         stepi 100\nprintf \"moved %d\\n\", $pc != {schedule:#x}\n\
         printf \"virtual %s\\n\", (char*){banner:#x}\n\
         maintenance packet Qqemu.PhyMemMode:1\nx/1s {physical:#x}\nmaintenance packet Qqemu.PhyMemMode:0\n\
         watch *(unsigned long*){jiffies:#x}\ncontinue\ndelete\n\
         rwatch *(unsigned long*){jiffies:#x}\ncontinue\ndelete\n\
         printf \"satp mode %d\\n\", (int)($satp >> 60)\nmonitor info status\ndetach\n"
    );
    let file = dir.path("script");
    std::fs::write(&file, script).unwrap();
    let out = Command::new("gdb-multiarch").args(["-nx", "-batch", "-x", &file]).output().expect("gdb runs");
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    for wanted in [
        "Thread 1 (CPU#0 [paused])",
        "Thread 2 (CPU#1 [paused])",
        &format!("at {schedule:x} mode 1"),
        "moved 1",
        "virtual Linux version",
        &format!("{physical:#x}:\t\"Linux version"),
        "Hardware watchpoint 2",
        "Old value = ",
        "New value = ",
        "Hardware read watchpoint 3",
        "VM status: paused",
        "detached]",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is missing:\n{text}");
    }
    // It goes on as if nothing had been.
    assert_eq!(guest.run("echo $((6 * 7))"), "42");
    guest.send("poweroff -f\n");
    guest.end_well();
    assert!(!std::path::Path::new(&socket).exists(), "the socket goes with the run");
}

#[test]
fn a_busy_port_is_said_so() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut mimus = Mimus::riscv64(&["-kernel", "/dev/null", "-gdb", &format!("tcp::{port}")]);
    assert_eq!(mimus.end().code(), Some(1));
    let text = mimus.wait_for("use -gdb with another port");
    assert!(text.contains(&format!("cannot listen on tcp:127.0.0.1:{port}")), "{text}");
}
