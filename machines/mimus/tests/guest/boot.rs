//! Ways to boot: the built-in SBI, OpenSBI, U-Boot, UEFI; Debian's installer.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use mimus_machines::guests;
use sha2::{Digest, Sha256};

use crate::harness::{Dir, Mimus, commands, guest, hex};

fn boots(test: &str, smp: &str, args: &[&str]) {
    let Some(c) = commands(test) else { return };
    let mut guest = c.boot(&[&["-smp", smp, "-no-reboot"], args].concat());
    assert_eq!(guest.run("grep -c ^processor /proc/cpuinfo"), smp);
    assert_eq!(guest.run("uname -m"), "riscv64");
    // Work on all of them at once, with the same result on each.
    let hashes = guest.run("for i in 1 2 3 4 5 6 7 8; do yes | head -c 1000000 | sha256sum & done; wait");
    let expected = format!("{}  -", hex(&Sha256::digest("y\n".repeat(500_000))));
    let right = hashes.lines().filter(|l| *l == expected).count();
    assert_eq!(right, 8, "{hashes}");
    guest.send("poweroff -f\n");
    guest.end_well();
}

#[test]
fn one_vcpu() {
    boots("one_vcpu", "1", &[]);
}

#[test]
fn four_vcpus() {
    boots("four_vcpus", "4", &[]);
}

#[test]
fn four_vcpus_with_every_optimisation_forced() {
    boots("four_vcpus_with_every_optimisation_forced", "4", &["-accel", "tcg,opt=force"]);
}

#[test]
fn eight_vcpus_through_opensbi_dynamic() {
    let test = "eight_vcpus_through_opensbi_dynamic";
    let Some(firmware) = guest(test, &guests::RISCV64_FIRMWARE) else { return };
    boots(test, "8", &["-bios", firmware.join("fw_dynamic.bin").to_str().unwrap()]);
}

#[test]
fn opensbi_jump() {
    let Some(firmware) = guest("opensbi_jump", &guests::RISCV64_FIRMWARE) else { return };
    boots("opensbi_jump", "1", &["-bios", firmware.join("fw_jump.bin").to_str().unwrap()]);
}

#[test]
fn the_interpreter_agrees_on_the_first_lines() {
    // The whole boot takes the interpreter minutes: its first messages show that it runs the
    // same kernel the same way.
    let test = "the_interpreter_agrees_on_the_first_lines";
    let Some(c) = commands(test) else { return };
    let lines = |accel: &str| {
        let args = ["-kernel", &c.kernel, "-append", "earlycon=sbi console=ttyS0", "-accel", accel];
        let mut guest = Mimus::riscv64(&args);
        let text = guest.wait_for("Kernel command line");
        let untimed = text.lines().filter_map(|l| l.split_once("] ")).map(|l| l.1.to_owned());
        untimed.collect::<Vec<_>>()
    };
    let (jit, interpreter) = (lines("tcg"), lines("tcg,engine=interp"));
    assert!(jit.len() > 10, "{jit:?}");
    assert_eq!(jit, interpreter);
}

/// Where the disk's one partition begins.
const PARTITION: u64 = 1 << 20;

/// A partition, as a file of its own.
struct Partition(File);

impl Read for Partition {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Partition {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Seek for Partition {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => SeekFrom::Start(PARTITION + at),
            other => other,
        };
        self.0.seek(to)?.checked_sub(PARTITION).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// A disk with a FAT partition of this kind that holds these files; their directories are made.
pub fn partitioned_disk(path: &Path, kind: u8, files: &[(&str, &[u8])]) {
    const BYTES: u64 = 96 << 20;
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(PARTITION + BYTES).unwrap();
    // Master boot record: one entry (bootable, by LBA), then the signature.
    let mut entry = [0; 16];
    (entry[0], entry[4]) = (0x80, kind);
    entry[8..12].copy_from_slice(&((PARTITION / 512) as u32).to_le_bytes());
    entry[12..].copy_from_slice(&((BYTES / 512) as u32).to_le_bytes());
    file.write_all_at(&entry, 446).unwrap();
    file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    let mut partition = Partition(file);
    partition.seek(SeekFrom::Start(0)).unwrap();
    let size = fatfs::FormatVolumeOptions::new().total_sectors((BYTES / 512) as u32);
    fatfs::format_volume(&mut partition, size).unwrap();
    partition.seek(SeekFrom::Start(0)).unwrap();
    let disk = fatfs::FileSystem::new(partition, fatfs::FsOptions::new()).unwrap();
    for (name, bytes) in files {
        let mut dir = disk.root_dir();
        let mut parts: Vec<&str> = name.split('/').collect();
        let name = parts.pop().unwrap();
        for part in parts {
            dir = dir.create_dir(part).unwrap();
        }
        dir.create_file(name).unwrap().write_all(bytes).unwrap();
    }
}

/// A disk with what U-Boot's standard boot looks for.
fn extlinux_disk(path: &Path, kernel: &str, initrd: &str) {
    let config = "timeout 1\ndefault debian\nlabel debian\n  kernel /linux\n  initrd /initrd.gz\n  \
                  append console=ttyS0 quiet panic=-1\n";
    let (linux, rd) = (std::fs::read(kernel).unwrap(), std::fs::read(initrd).unwrap());
    let files = [("extlinux/extlinux.conf", config.as_bytes()), ("linux", &linux), ("initrd.gz", &rd)];
    partitioned_disk(path, 0x0c, &files);
}

#[test]
fn opensbi_and_u_boot_from_a_disk() {
    let test = "opensbi_and_u_boot_from_a_disk";
    let (Some(c), Some(firmware)) = (commands(test), guest(test, &guests::RISCV64_FIRMWARE)) else { return };
    let dir = Dir::new("u-boot");
    extlinux_disk(&dir.0.join("disk.img"), &c.kernel, &c.initrd);
    let mut guest = Mimus::riscv64(&[
        "-smp",
        "4",
        "-no-reboot",
        "-bios",
        firmware.join("fw_jump.bin").to_str().unwrap(),
        "-kernel",
        firmware.join("u-boot-smode.bin").to_str().unwrap(),
        "-drive",
        &format!("file={},if=virtio,format=raw", dir.path("disk.img")),
    ]);
    guest.wait_for("OpenSBI");
    guest.wait_for("U-Boot");
    guest.wait_for("<<ready>>");
    assert_eq!(guest.run("grep -c ^processor /proc/cpuinfo"), "4");
    guest.send("poweroff -f\n");
    guest.end_well();
}

#[test]
fn uefi_in_flash() {
    let test = "uefi_in_flash";
    let (Some(c), Some(firmware)) = (commands(test), guest(test, &guests::RISCV64_FIRMWARE)) else { return };
    let dir = Dir::new("uefi");
    std::fs::copy(firmware.join("edk2-vars.fd"), dir.path("vars.fd")).unwrap();
    let code = firmware.join("edk2-code.fd");
    let mut guest = c.boot(&[
        "-m",
        "1G",
        "-no-reboot",
        "-drive",
        &format!("if=pflash,unit=0,format=raw,readonly=on,file={}", code.display()),
        "-drive",
        &format!("if=pflash,unit=1,format=raw,file={}", dir.path("vars.fd")),
    ]);
    let efi = guest.run("ls /sys/firmware/efi");
    assert!(efi.contains("systab"), "{efi}");
    guest.send("poweroff -f\n");
    guest.end_well();
    // Firmware keeps its boot entries in the variables.
    let before = std::fs::read(firmware.join("edk2-vars.fd")).unwrap();
    assert_ne!(std::fs::read(dir.path("vars.fd")).unwrap(), before);
}

#[test]
fn the_installer_asks_its_first_question() {
    let test = "the_installer_asks_its_first_question";
    let Some(files) = guest(test, &guests::RISCV64) else { return };
    let (kernel, initrd) = (files.join("linux"), files.join("initrd.gz"));
    let mut guest = Mimus::riscv64(&[
        "-m",
        "1G",
        "-kernel",
        kernel.to_str().unwrap(),
        "-initrd",
        initrd.to_str().unwrap(),
        "-append",
        // With `url` among the words it runs on this console alone. Otherwise a second one runs on tty1, and reads
        // /var/lib/dpkg/status while the first has it renamed: its menu fails with a read of address 8 then.
        "console=ttyS0 once.url",
    ]);
    guest.wait_for("Select a language");
    guest.wait_for("English");
}

#[test]
fn a_cold_try_and_its_shell() {
    let test = "a_cold_try_and_its_shell";
    if guest(test, &guests::RISCV64).is_none() {
        return;
    }
    let mut guest = Mimus::start(&["try", "riscv64"]);
    guest.wait_for("network up");
    guest.wait_for("# ");
    guest.send("echo $((6 * 7))\n");
    guest.wait_for("42");
    guest.send("poweroff\n");
    guest.end_well();
}
