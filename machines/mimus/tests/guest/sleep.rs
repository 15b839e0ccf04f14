//! Suspend to RAM: Linux sleeps and comes back, through SeaBIOS, through OVMF and without firmware, by the monitor and by the RTC's
//! alarm, with its memory, a program that runs, its disk and its network.

use std::path::Path;
use std::time::{Duration, Instant};

use mimus_machines::guests::firmware::OVMF;
use mimus_machines::guests::x86::SEABIOS;
use sha2::{Digest, Sha256};

use crate::firmware::flash;
use crate::harness::{Dir, LIMIT, Mimus, generic_commands, guest, hex};
use crate::network::serve;

/// A command of the monitor, and what it printed.
fn monitor(guest: &mut Mimus, command: &str) -> String {
    guest.send("\x01c");
    guest.wait_for("(mimus) ");
    guest.send(&format!("{command}\n"));
    let output = guest.wait_for("(mimus) ");
    guest.send("\x01c");
    output
}

fn wait_until_asleep(guest: &mut Mimus) {
    let deadline = Instant::now() + LIMIT;
    while !monitor(guest, "info status").contains("suspended") {
        assert!(Instant::now() < deadline, "it does not sleep:\n{}", guest.transcript());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What has to be as it was.
struct Before<'a> {
    sum: String,
    disk: String,
    page: &'a str,
    server: u16,
}

impl Before<'_> {
    fn check(&self, guest: &mut Mimus) {
        assert_eq!(guest.run("sha256sum /tmp/data"), self.sum, "memory");
        assert_eq!(guest.run("grep -c ^processor /proc/cpuinfo"), "2");
        let disk = guest.run("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=64k 2>/dev/null | sha256sum");
        assert_eq!(disk, self.disk);
        let page = guest.run(&format!("wget -q -O - http://10.0.2.2:{}/", self.server));
        assert_eq!(page, self.page);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Firmware {
    None,
    SeaBios,
    /// OVMF with this code.
    Ovmf(&'static str),
}

/// The options that start `firmware`, or `None` after saying why there is none.
fn options(test: &str, dir: &Dir, firmware: Firmware) -> Option<Vec<String>> {
    let file = match firmware {
        Firmware::None => return Some(Vec::new()),
        Firmware::SeaBios => guest(test, &SEABIOS)?.join("bios-256k.bin"),
        Firmware::Ovmf(code) => {
            let [code, vars] = flash(dir, &guest(test, &OVMF)?, code);
            return Some(["-drive".into(), code, "-drive".into(), vars].into());
        }
    };
    Some(vec!["-bios".into(), Path::to_str(&file).unwrap().into()])
}

fn sleeps(test: &str, board: &str, firmware: Firmware) {
    let Some(c) = generic_commands(test) else { return };
    let dir = Dir::new(test);
    let contents = vec![0x5a; 1 << 20];
    std::fs::write(dir.path("disk.img"), &contents).unwrap();
    let drive = format!("file={},format=raw,if=virtio", dir.path("disk.img"));
    let mut args = vec!["-accel", "tcg", "-M", board, "-smp", "2", "-no-reboot", "-drive", &drive];
    args.extend(["-nic", "user,model=virtio-net-pci"]);
    let Some(start) = options(test, &dir, firmware) else { return };
    args.extend(start.iter().map(String::as_str));
    let mut guest = c.boot(&args);
    assert!(guest.run("cat /sys/power/mem_sleep").contains("[deep]"), "S3 is there, and what Linux prefers");
    let page = "what a web server has";
    let before = Before {
        sum: guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null; sha256sum /tmp/data"),
        disk: format!("{}  -", hex(&Sha256::digest(&contents))),
        page,
        server: serve(page.as_bytes().to_vec()),
    };
    before.check(&mut guest);
    guest.run("(n=0; while [ ! -e /tmp/enough ]; do n=$((n+1)); done; echo $n > /tmp/counted) & true");

    guest.send("echo mem > /sys/power/state; echo \"<<woke $?>>\"\n");
    wait_until_asleep(&mut guest);
    // Time goes on for devices, not for processors; the host may stop the machine meanwhile.
    monitor(&mut guest, "stop");
    let deadline = Instant::now() + LIMIT;
    while monitor(&mut guest, "info status").contains("suspended") {
        assert!(Instant::now() < deadline, "it does not stop:\n{}", guest.transcript());
        std::thread::sleep(Duration::from_millis(50));
    }
    let answer = monitor(&mut guest, "system_wakeup");
    assert!(answer.contains("does not sleep"), "{answer}\n{}", guest.transcript());
    monitor(&mut guest, "cont");
    wait_until_asleep(&mut guest);
    monitor(&mut guest, "system_wakeup");
    guest.wait_for("<<woke 0>>");
    guest.wait_for("<<status 0>>");
    before.check(&mut guest);

    // By the alarm, some seconds from now: the command comes back by itself.
    let rtc = "/sys/class/rtc/rtc0";
    guest.run(&format!("echo 0 > {rtc}/wakealarm; echo +4 > {rtc}/wakealarm; T=$(cat {rtc}/wakealarm)"));
    guest.run("echo mem > /sys/power/state");
    guest.run(&format!("test $(cat {rtc}/since_epoch) -ge $T"));
    before.check(&mut guest);
    guest.run("touch /tmp/enough; wait; test $(cat /tmp/counted) -gt 0");
    assert_eq!(guest.run("cat /sys/power/suspend_stats/success"), "2");
    guest.send("poweroff -f\n");
    guest.end_well();
}

#[test]
fn q35_sleeps_and_wakes_through_seabios() {
    sleeps("q35_sleeps_and_wakes_through_seabios", "q35", Firmware::SeaBios);
}

#[test]
fn pc_sleeps_and_wakes_through_seabios() {
    sleeps("pc_sleeps_and_wakes_through_seabios", "pc", Firmware::SeaBios);
}

#[test]
fn q35_sleeps_and_wakes_without_firmware() {
    sleeps("q35_sleeps_and_wakes_without_firmware", "q35", Firmware::None);
}

/// Whose processors find system management mode at its place again.
#[test]
fn q35_sleeps_and_wakes_through_ovmf() {
    sleeps("q35_sleeps_and_wakes_through_ovmf", "q35", Firmware::Ovmf("code-secboot.fd"));
}

#[test]
fn pc_sleeps_and_wakes_through_ovmf() {
    sleeps("pc_sleeps_and_wakes_through_ovmf", "pc", Firmware::Ovmf("code.fd"));
}
