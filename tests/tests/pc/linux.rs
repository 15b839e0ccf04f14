//! Debian's kernel to a shell: under the translator, and under KVM with hardware behind it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mimus_accel_kvm::{KvmAccelerator, Quirks};
use mimus_core::accel::Accelerator;
use mimus_core::arch::GuestArch;
use mimus_machines::config::{Drive, DriveInterface};
use mimus_machines::guests::cpio::Archive;
use mimus_machines::guests::x86::{MODULES, X86_64_BUSYBOX, X86_64_KERNEL};
use mimus_machines::guests::{self, GuestSpec};
use mimus_machines::machine::RunEnd;

use mimus_tcg::TcgAccelerator;

use crate::harness::{Pc, Setup, skipped};

const LIMIT: Duration = Duration::from_secs(120);

/// KVM, if it runs a whole Linux here at speed, or why not.
fn kvm() -> Result<Box<dyn Accelerator>, String> {
    KvmAccelerator.probe(GuestArch::X86_64).map_err(|e| e.to_string())?;
    match Quirks::of_host() {
        Ok(q) if q.emulated_cpl0 => {
            Err("this host's KVM interprets supervisor code (no hardware virtualisation behind it)".into())
        }
        Ok(_) => Ok(Box::new(KvmAccelerator)),
        Err(e) => Err(format!("/dev/kvm: {e}")),
    }
}

fn installed(spec: &GuestSpec) -> Result<PathBuf, String> {
    let cache = guests::cache_dir().map_err(|e| e.to_string())?;
    guests::installed(spec, &cache)
        .ok_or_else(|| format!("guest {} is not here: cargo xtask guests fetches it", spec.name))
}

/// Tells what it finds, does a little of everything, and powers off.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
for m in $(cat /modules/order); do
    insmod /modules/$m
done
echo "<<cpus $(grep -c ^processor /proc/cpuinfo)>>"
echo "<<sum $(dd bs=1M count=8 </dev/zero 2>/dev/null | md5sum)>>"
echo "<<disk $(dd if=/dev/vda bs=1 count=9 2>/dev/null)>>"
for n in $(seq "$(grep -c ^processor /proc/cpuinfo)"); do (i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done) & done
wait
echo "<<irqs $(grep -c virtio /proc/interrupts)>>"
poweroff -f
"#;

fn initrd(kernel: &Path, busybox: &Path) -> Vec<u8> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "modules"] {
        archive.directory(dir);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, &std::fs::read(busybox).unwrap());
    for module in MODULES {
        archive.file(&format!("modules/{module}"), 0o644, &std::fs::read(kernel.join(module)).unwrap());
    }
    archive.file("modules/order", 0o644, MODULES.join("\n").as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    archive.finish_gzip().unwrap()
}

fn wait_for(pc: &Pc, text: &str) {
    let deadline = Instant::now() + LIMIT;
    while !pc.output_text().contains(text) {
        assert!(Instant::now() < deadline, "{text:?} does not come; the serial port said:\n{}", pc.output_text());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn boots(test: &str, board: &str, cpus: u32, irqchip: &str) {
    match kvm() {
        Ok(accel) => boots_under(test, accel, board, cpus, irqchip),
        Err(why) => skipped(test, &why),
    }
}

fn translated(test: &str, board: &str, cpus: u32) {
    boots_under(test, Box::new(TcgAccelerator), board, cpus, "off");
}

fn boots_under(test: &str, accel: Box<dyn Accelerator>, board: &str, cpus: u32, irqchip: &str) {
    let files = installed(&X86_64_KERNEL).and_then(|k| Ok((k, installed(&X86_64_BUSYBOX)?)));
    let (kernel, busybox) = match files {
        Ok(files) => files,
        Err(why) => return skipped(test, &why),
    };
    let mut setup = Setup::new(board).cpus(cpus).option("kernel-irqchip", irqchip);
    if accel.name() == "tcg" {
        // Several machines live at once in a run of the tests, and code caches share the lowest 2 GiB.
        setup.accel_options = [("tb-size".to_owned(), "24M".to_owned())].into();
    }
    setup.accel = accel;
    setup.config.boot.kernel = Some(kernel.join("vmlinuz"));
    setup.config.boot.initrd = Some(setup.file("initrd", &initrd(&kernel, &busybox.join("busybox"))));
    setup.config.boot.append = Some("console=ttyS0 panic=-1".into());
    let mut disk = b"mimusdisk".to_vec();
    disk.resize(1 << 20, 0);
    let (file, interface) = (Some(setup.file("disk.img", &disk)), DriveInterface::Virtio);
    setup.config.drives.push(Drive { file, interface, format: Some("raw".into()), ..Drive::default() });
    let mut pc = setup.start();
    pc.machine.resume();
    wait_for(&pc, "<<irqs ");
    assert_eq!(pc.machine.wait(), RunEnd::PowerOff);
    let text = pc.output_text();
    for says in [&format!("<<cpus {cpus}>>")[..], "<<sum 96995b58d4cbf6aaa9041b4f00c7f6ae", "<<disk mimusdisk>>"] {
        assert!(text.contains(says), "{says}:\n{text}");
    }
}

#[test]
fn microvm_boots_debian_translated() {
    translated("microvm_boots_debian_translated", "microvm", 1);
}

#[test]
fn q35_boots_debian_translated_with_four_cpus() {
    translated("q35_boots_debian_translated_with_four_cpus", "q35", 4);
}

#[test]
fn pc_boots_debian_translated() {
    translated("pc_boots_debian_translated", "pc", 2);
}

#[test]
fn microvm_boots_debian() {
    boots("microvm_boots_debian", "microvm", 1, "on");
}

#[test]
fn microvm_boots_debian_with_four_cpus() {
    boots("microvm_boots_debian_with_four_cpus", "microvm", 4, "on");
}

#[test]
fn q35_boots_debian() {
    boots("q35_boots_debian", "q35", 1, "on");
}

#[test]
fn q35_boots_debian_with_four_cpus() {
    for irqchip in ["on", "split", "off"] {
        boots("q35_boots_debian_with_four_cpus", "q35", 4, irqchip);
    }
}

#[test]
fn pc_boots_debian() {
    boots("pc_boots_debian", "pc", 2, "on");
}
