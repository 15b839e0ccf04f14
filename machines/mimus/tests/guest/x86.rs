//! PCs under the translator: Debian's kernels on each board, disks, networks, ends.

use sha2::{Digest, Sha256};

use crate::harness::{
    Commands, Dir, Mimus, generic_commands, guest, hex, i386_commands, pae_commands, x86_64_commands,
};
use crate::network::{data, serve};

const TCG: [&str; 4] = ["-accel", "tcg", "-nic", "none"];

/// Boots, looks at the processors, hashes on all of them at once, turns off.
fn boots(commands: Option<Commands>, board: &str, smp: &str, machine: &str, more: &[&str]) {
    boots_under(&TCG, commands, board, smp, machine, more);
}

fn boots_under(tcg: &[&str], commands: Option<Commands>, board: &str, smp: &str, machine: &str, more: &[&str]) {
    let Some(c) = commands else { return };
    let mut guest = c.boot(&[&["-M", board, "-smp", smp, "-no-reboot"], tcg, more].concat());
    assert_eq!(guest.run("grep -c ^processor /proc/cpuinfo"), smp);
    assert_eq!(guest.run("uname -m"), machine);
    let hashes = guest.run("for i in 1 2 3 4; do yes | head -c 1000000 | sha256sum & done; wait");
    let expected = format!("{}  -", hex(&Sha256::digest("y\n".repeat(500_000))));
    assert_eq!(hashes.lines().filter(|l| *l == expected).count(), 4, "{hashes}");
    let log = guest.run("dmesg");
    for complaint in ["BUG:", "Oops", "WARNING:", "unchecked MSR", "Call Trace", "soft lockup", "inconsistent"] {
        assert!(!log.contains(complaint), "{complaint}:\n{log}");
    }
    guest.send("poweroff -f\n");
    guest.end_well();
    let text = guest.transcript();
    assert!(!text.contains("unchecked MSR"), "{text}");
}

#[test]
fn cloud_kernel_on_q35() {
    boots(x86_64_commands("cloud_kernel_on_q35"), "q35", "1", "x86_64", &[]);
}

#[test]
fn cloud_kernel_on_microvm_with_four_vcpus() {
    boots(x86_64_commands("cloud_kernel_on_microvm_with_four_vcpus"), "microvm", "4", "x86_64", &[]);
}

#[test]
fn cloud_kernel_with_every_optimisation_forced() {
    let commands = x86_64_commands("cloud_kernel_with_every_optimisation_forced");
    boots_under(&["-accel", "tcg,opt=force", "-nic", "none"], commands, "q35", "4", "x86_64", &[]);
}

#[test]
fn generic_kernel_on_pc_with_four_vcpus() {
    boots(generic_commands("generic_kernel_on_pc_with_four_vcpus"), "pc", "4", "x86_64", &[]);
}

#[test]
fn i386_kernel_on_pc() {
    boots(i386_commands("i386_kernel_on_pc"), "pc", "1", "i686", &[]);
}

#[test]
fn i386_kernel_on_q35_with_four_vcpus() {
    boots(i386_commands("i386_kernel_on_q35_with_four_vcpus"), "q35", "4", "i686", &[]);
}

#[test]
fn pae_kernel_on_microvm_with_four_vcpus() {
    boots(pae_commands("pae_kernel_on_microvm_with_four_vcpus"), "microvm", "4", "i686", &["-m", "1G"]);
}

#[test]
fn models_have_what_they_say() {
    let Some(c) = x86_64_commands("models_have_what_they_say") else { return };
    for (model, has, lacks) in
        [("qemu64", "cx16", "ssse3"), ("x86-64-v2", "sse4_2", "avx"), ("x86-64-v3", "avx2", "aes")]
    {
        let mut guest = c.boot(&[&["-M", "microvm", "-no-reboot", "-cpu", model], &TCG[..]].concat());
        let flags = guest.run("grep -m1 ^flags /proc/cpuinfo");
        let flag = |name: &str| flags.split_whitespace().any(|f| f == name);
        assert!(flag(has) && !flag(lacks), "{model}: {flags}");
        guest.send("poweroff -f\n");
        guest.end_well();
    }
}

#[test]
fn the_default_model_needs_no_mitigations() {
    let Some(c) = x86_64_commands("the_default_model_needs_no_mitigations") else { return };
    let mut guest = c.boot(&[&["-M", "microvm", "-no-reboot"], &TCG[..]].concat());
    let all = guest.run("cd /sys/devices/system/cpu/vulnerabilities && grep . *");
    assert!(!all.contains("Vulnerable") && !all.contains("Retpolines"), "{all}");
    for flaw in ["meltdown", "mds", "l1tf", "spec_store_bypass", "retbleed"] {
        assert!(all.contains(&format!("{flaw}:Not affected")), "{all}");
    }
    guest.send("poweroff -f\n");
    guest.end_well();
}

/// By the PS/2 keyboard: Linux restarts at Ctrl-Alt-Delete if nobody has told it otherwise.
#[test]
fn keys_from_the_monitor() {
    let Some(c) = generic_commands("keys_from_the_monitor") else { return };
    let mut guest = c.boot(&[&["-M", "pc", "-no-reboot"], &TCG[..]].concat());
    assert_eq!(guest.run("cat /proc/sys/kernel/ctrl-alt-del"), "1");
    guest.send("\x01c");
    guest.wait_for("(mimus) ");
    guest.send("sendkey ctrl-alt-delet\n");
    guest.wait_for("did you mean");
    guest.send("sendkey ctrl-alt-delete\n");
    guest.end_well();
}

#[test]
fn a_disk_keeps_its_data_over_a_reboot() {
    let test = "a_disk_keeps_its_data_over_a_reboot";
    let Some(c) = x86_64_commands(test) else { return };
    let dir = Dir::new(test);
    let path = dir.0.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let drive = format!("file={},format=raw,if=virtio", path.display());
    let mut guest = c.boot(&[&["-M", "q35", "-smp", "2", "-drive", &drive], &TCG[..]].concat());
    assert_eq!(guest.run("cat /sys/block/vda/size"), "65536");
    guest.run("dd if=/dev/urandom bs=1M count=16 of=/tmp/data 2>/dev/null");
    let hash = guest.run("dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null && sha256sum </tmp/data");
    guest.send("reboot -f\n");
    guest.wait_for("<<ready>>");
    assert_eq!(guest.run("dd if=/dev/vda bs=1M count=16 2>/dev/null | sha256sum"), hash);
    guest.send("poweroff -f\n");
    guest.end_well();
    let written = std::fs::read(&path).unwrap();
    let on_host = hex(&Sha256::digest(&written[..16 << 20]));
    assert_eq!(hash.split_whitespace().next(), Some(on_host.as_str()));
}

#[test]
fn a_32_bit_guest_downloads() {
    let Some(c) = i386_commands("a_32_bit_guest_downloads") else { return };
    let body = data();
    let hash = hex(&Sha256::digest(&body));
    let server = serve(body);
    let net = ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"];
    let mut guest = c.boot(&[&["-M", "q35", "-no-reboot", "-accel", "tcg"], &net[..]].concat());
    let got = guest.run(&format!("wget -q -O - http://10.0.2.2:{server}/data | sha256sum"));
    assert_eq!(got.split_whitespace().next(), Some(hash.as_str()));
    guest.run("ping -c 1 10.0.2.2 >/dev/null");
    // A reset ends a run that is not to be rebooted.
    guest.send("reboot -f\n");
    guest.end_well();
}

fn tries(test: &str, name: &str, specs: &[&mimus_machines::guests::GuestSpec]) {
    if specs.iter().any(|spec| guest(test, spec).is_none()) {
        return;
    }
    let mut guest = Mimus::start(&["try", name, "-accel", "tcg"]);
    guest.wait_for("network up");
    guest.wait_for("# ");
    guest.send("echo $((6 * 7))\n");
    guest.wait_for("42");
    guest.send("poweroff\n");
    guest.end_well();
}

#[test]
fn try_x86_64() {
    use mimus_machines::guests::x86::{X86_64_BUSYBOX, X86_64_KERNEL};
    tries("try_x86_64", "x86_64", &[&X86_64_KERNEL, &X86_64_BUSYBOX]);
}

#[test]
fn try_i386() {
    use mimus_machines::guests::x86::{I386_BUSYBOX, I386_PAE};
    tries("try_i386", "i386", &[&I386_PAE, &I386_BUSYBOX]);
}
