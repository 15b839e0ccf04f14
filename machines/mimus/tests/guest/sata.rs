//! The SATA controller of `q35`: firmware, boot loader and kernel from its disk, a CD-ROM beside it.

use sha2::{Digest, Sha256};

use mimus_machines::guests::x86::SEABIOS;

use crate::firmware::grub_disk;
use crate::harness::{Dir, Mimus, guest, hex, sata_commands};

/// SeaBIOS and GRUB boot Debian's kernel from the disk; Linux reads and writes it by queued commands, from several
/// processes at once, and reads a CD-ROM.
#[test]
fn seabios_and_grub_from_a_sata_disk_on_q35() {
    let test = "seabios_and_grub_from_a_sata_disk_on_q35";
    let (Some(c), Some(_)) = (sata_commands(test), guest(test, &SEABIOS)) else { return };
    let dir = Dir::new(test);
    let Some(disk) = grub_disk(test, &dir, &c) else { return };
    let (data, disc) = (dir.0.join("data.img"), dir.0.join("disc.iso"));
    std::fs::File::create(&data).unwrap().set_len(16 << 20).unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i ^ i >> 9) as u8).collect();
    std::fs::write(&disc, &bytes).unwrap();
    let drives = [
        format!("file={disk},format=raw,if=ide"),
        format!("file={},format=raw,if=none,id=d1", data.display()),
        format!("file={},format=raw,if=ide,index=3,media=cdrom", disc.display()),
    ];
    let args = [
        &["system", "x86_64", "-accel", "tcg", "-nic", "none", "-m", "512", "-nographic", "-M", "q35", "-smp", "2"][..],
        &["-drive", &drives[0], "-drive", &drives[1], "-device", "ide-hd,drive=d1,bus=ide.5,serial=DATA5"],
        &["-drive", &drives[2]],
    ]
    .concat();
    let mut guest = Mimus::start(&args);
    guest.wait_for("SeaBIOS");
    guest.wait_for("GRUB");
    guest.wait_for("<<ready>>");
    guest.run("grep -q loaded-by-grub /proc/cmdline");
    // Links come up behind the modules.
    // Linux looks for disks at the same time: which is sda differs. One has a partition.
    guest.run("for i in $(seq 600); do [ -b /dev/sda ] && [ -b /dev/sdb ] && [ -b /dev/sr0 ] && ls /dev/sd?1 >/dev/null 2>&1 && break; sleep 0.1; done");
    guest.run("S=$(ls /dev/sd?1); S=${S%1}; D=/dev/sda; [ $S != /dev/sda ] || D=/dev/sdb; [ -b $D ]");
    let log = guest.run("dmesg | grep -i -E 'ata[0-9]|ahci'");
    assert!(log.contains("NCQ (depth 32)") && log.contains("0x3f impl"), "{log}");
    assert!(!log.contains("exception") && !log.contains("failed command"), "{log}");
    assert!(guest.run("grep ahci /proc/interrupts").contains("MSI"));
    // What GRUB read the kernel's first sector from, as the host has it.
    let first = &std::fs::read(&disk).unwrap()[..4 << 20];
    let sum = guest.run("dd if=$S bs=64k count=64 2>/dev/null | sha256sum");
    assert_eq!(sum.split_whitespace().next(), Some(hex(&Sha256::digest(first)).as_str()));
    let sum = guest.run("sha256sum /dev/sr0");
    assert_eq!(sum.split_whitespace().next(), Some(hex(&Sha256::digest(&bytes)).as_str()));
    guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null");
    guest.run("for i in 0 1 2 3; do dd if=/tmp/data of=$D bs=256k skip=$((i*16)) seek=$((i*16)) count=16 conv=notrunc,fsync 2>/dev/null & done; wait");
    let sum = guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum <$D");
    assert_eq!(guest.run("sha256sum </tmp/data"), sum);
    guest.send("poweroff -f\n");
    guest.end_well();
    let written = std::fs::read(&data).unwrap();
    assert_eq!(sum.split_whitespace().next(), Some(hex(&Sha256::digest(&written)).as_str()));
}
