//! Disks: data that last over a reboot, read-only and temporary disks.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::harness::{Dir, commands, hex};

const MIB: u64 = 1 << 20;

fn sha256(path: &Path, len: u64) -> String {
    use std::io::Read;
    let mut hash = Sha256::new();
    let mut file = std::fs::File::open(path).unwrap().take(len);
    std::io::copy(&mut file, &mut HashWriter(&mut hash)).unwrap();
    hex(&hash.finalize())
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or("")
}

/// 200 MB of random bytes, hashed as they are written; then again after a reboot.
fn writes_last(test: &str, device: &[&str]) {
    let Some(c) = commands(test) else { return };
    let dir = Dir::new(test);
    let path = dir.0.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(256 * MIB).unwrap();
    let drive = format!("file={},format=raw,if=none,id=d0", path.display());
    let mut guest = c.boot(&[&["-smp", "2", "-drive", &drive], device].concat());
    assert_eq!(guest.run("cat /sys/block/vda/size"), (256 * MIB / 512).to_string());
    let written = guest.run(
        "dd if=/dev/urandom bs=1M count=200 2>/dev/null | tee /tmp/data | sha256sum; \
         dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null && rm /tmp/data",
    );
    let hash = first_word(&written).to_owned();
    assert_eq!(hash.len(), 64, "{written}");
    guest.send("reboot -f\n");
    guest.wait_for("<<ready>>");
    let read = guest.run("dd if=/dev/vda bs=1M count=200 2>/dev/null | sha256sum");
    assert_eq!(first_word(&read), hash);
    guest.send("poweroff -f\n");
    guest.end_well();
    assert_eq!(sha256(&path, 200 * MIB), hash, "on the host");
}

#[test]
fn two_hundred_megabytes_over_virtio_mmio() {
    writes_last("two_hundred_megabytes_over_virtio_mmio", &["-m", "1G", "-device", "virtio-blk-device,drive=d0"]);
}

#[test]
fn two_hundred_megabytes_over_virtio_pci() {
    writes_last("two_hundred_megabytes_over_virtio_pci", &["-m", "1G", "-device", "virtio-blk-pci,drive=d0"]);
}

#[test]
fn read_only_and_temporary_disks() {
    let Some(c) = commands("read_only_and_temporary_disks") else { return };
    let dir = Dir::new("ro");
    let data: Vec<u8> = (0..MIB as usize).map(|i| ((i * 7) >> 3) as u8).collect();
    for name in ["ro.img", "tmp.img"] {
        std::fs::write(dir.path(name), &data).unwrap();
    }
    let mut guest = c.boot(&[
        "-no-reboot",
        "-drive",
        &format!("file={},format=raw,if=none,id=ro,readonly=on", dir.path("ro.img")),
        "-device",
        "virtio-blk-pci,drive=ro,serial=READONLY",
        "-drive",
        &format!("file={},format=raw,if=none,id=tmp,snapshot=on", dir.path("tmp.img")),
        "-device",
        "virtio-blk-pci,drive=tmp,serial=TEMPORARY",
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-balloon-pci",
    ]);
    guest.run("for d in /sys/block/vd?; do ln -s /dev/${d##*/} /tmp/$(cat $d/serial); done");
    assert_eq!(guest.run("cat /sys/block/vd?/ro").lines().filter(|l| *l == "1").count(), 1);
    guest.run("! dd if=/dev/zero of=/tmp/READONLY bs=4k count=1 conv=fsync");
    guest.run("dd if=/dev/zero of=/tmp/TEMPORARY bs=64k count=2 conv=fsync && echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(guest.run("dd if=/tmp/TEMPORARY bs=64k count=2 2>/dev/null | tr -d '\\000' | wc -c"), "0");
    assert_eq!(guest.run("dd if=/dev/hwrng bs=32 count=1 2>/dev/null | wc -c"), "32");
    guest.send("poweroff -f\n");
    guest.end_well();
    for name in ["ro.img", "tmp.img"] {
        assert_eq!(std::fs::read(dir.path(name)).unwrap(), data, "{name} is as it was");
    }
}
