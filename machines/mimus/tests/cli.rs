//! The program as a user calls it: messages and exit status.

use std::path::PathBuf;
use std::process::{Command, Output};

fn mimus(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mimus")).args(args).env_remove("RUST_BACKTRACE").output().expect("mimus starts")
}

/// The one line on standard error of a run that must fail.
fn error(args: &[&str]) -> String {
    let out = mimus(args);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    assert!(text.starts_with("mimus: ") && !text.contains("internal error"), "{text}");
    text
}

fn system(args: &[&str]) -> String {
    error(&[&["system", "riscv64"], args].concat())
}

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mimus-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn image(len: usize) -> Vec<u8> {
    let mut bytes = vec![0x13; len];
    bytes[..64].fill(0);
    bytes[0] = 0x6f;
    bytes[8..16].copy_from_slice(&0x20_0000u64.to_le_bytes());
    bytes[16..24].copy_from_slice(&(len as u64).to_le_bytes());
    bytes[56..60].copy_from_slice(b"RSC\x05");
    bytes
}

#[test]
fn help_and_version_succeed() {
    for args in [
        &["-version"][..],
        &["help"],
        &["system", "riscv64", "-help"],
        &["system", "riscv64", "--version"],
        &["system", "riscv64", "-M", "help"],
        &["system", "riscv64", "-cpu", "help"],
        &["system", "riscv64", "-accel", "help"],
        &["system", "riscv64", "-device", "help"],
        &["system", "riscv64", "-netdev", "help"],
        &["system", "riscv64", "-d", "help"],
        &["system", "x86_64", "-help"],
        &["system", "x86_64", "-M", "help"],
        &["system", "i386", "-cpu", "help"],
    ] {
        let out = mimus(args);
        assert!(out.status.success() && !out.stdout.is_empty() && out.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_link_names_the_guest() {
    let dir = Dir::new("link");
    let link = dir.0.join("mimus-system-riscv64");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mimus"), &link).unwrap();
    let out = Command::new(&link).arg("-help").output().unwrap();
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("mimus system riscv64"));
}

#[test]
fn bad_kernels() {
    let dir = Dir::new("kernels");
    let mut elf = vec![0u8; 128];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    let mut short = image(1 << 20);
    short.truncate(1000);
    let cases = [
        (dir.0.join("none").to_str().unwrap().to_owned(), "no such file"),
        (dir.file("empty", b""), "is empty"),
        (dir.file("x86", &elf), "is an x86-64 ELF; this is mimus system riscv64: use "),
        (dir.file("short", &short), "truncated"),
        (dir.file("text", b"hello hello hello\n"), "not a kernel"),
        (dir.0.to_str().unwrap().to_owned(), "is a directory"),
    ];
    for (path, says) in cases {
        let text = system(&["-kernel", &path]);
        assert!(text.contains(says) && text.contains("-kernel "), "{says}: {text}");
    }
}

#[test]
fn sizes_that_do_not_fit() {
    let dir = Dir::new("sizes");
    let kernel = dir.file("Image", &image(1 << 20));
    let initrd = dir.file("initrd", &vec![1; 40 << 20]);
    let text = system(&["-m", "32M", "-kernel", &kernel, "-initrd", &initrd]);
    assert!(text.contains("it has 40 MiB") && text.contains("use -m "), "{text}");
    assert!(system(&["-m", "1", "-kernel", &kernel]).contains("-m 512M"));
    assert!(system(&["-m", "1000T", "-kernel", &kernel]).contains("this host has"));
}

#[test]
fn bad_options() {
    for (args, says) in [
        (&["-spice", "port=1"][..], "-spice is an option of QEMU that mimus does not have (yet): "),
        (&["-nographics"], "did you mean -nographic?"),
        (&["-M", "vitr", "-kernel", "x"], "did you mean virt?"),
        (&["-accel", "kmv"], "did you mean kvm?"),
        (&["-smp", "0"], "from 1 to"),
        (&["-display", "gtk"], "-nographic"),
        (&["-drive", "file=/nonexistent.img"], "truncate -s"),
        (&["-kernel"], "its value is missing"),
        (&[], "-kernel FILE"),
    ] {
        let text = system(args);
        assert!(text.contains(says), "{says}: {text}");
    }
    assert!(error(&["system", "riscv46"]).contains("did you mean riscv64?"));
    assert!(error(&["try", "x86-64"]).contains("did you mean x86_64?"));
    assert!(error(&["sytem"]).contains("did you mean system?"));
}

#[test]
fn what_no_device_uses() {
    let dir = Dir::new("unused");
    let kernel = dir.file("kernel", &image(1 << 16));
    let disk = dir.file("disk", &[0; 512]);
    let text = system(&["-kernel", &kernel, "-netdev", "user,id=n0"]);
    assert!(text.contains("-device virtio-net-pci,netdev=n0"), "{text}");
    let drive = format!("file={disk},format=raw,if=none,id=d0");
    let text = system(&["-kernel", &kernel, "-drive", &drive]);
    assert!(text.contains("-device virtio-blk-pci,drive=d0"), "{text}");
    let text = system(&["-kernel", &kernel, "-drive", &format!("file={}", dir.file("q", b"QFI\xfb\0\0\0\x03"))]);
    assert!(text.contains("qcow2") && text.contains("qemu-img convert"), "{text}");
}

#[test]
fn an_image_nobody_may_write() {
    // Not even root may write this file of the kernel's.
    let text = system(&["-kernel", "x", "-drive", "file=/sys/kernel/notes,format=raw"]);
    assert!(text.contains("cannot be written") && text.contains("readonly=on"), "{text}");
}

#[test]
fn no_address_space_for_the_guest() {
    let dir = Dir::new("no-memory");
    let kernel = dir.file("kernel", &image(1 << 16));
    let limited = format!(
        "ulimit -v 4000000; exec {} system riscv64 -m 6G -kernel {kernel} -display none",
        env!("CARGO_BIN_EXE_mimus")
    );
    let out = Command::new("sh").args(["-c", &limited]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!((out.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("-m 6144M") && text.contains("use a smaller -m"), "{text}");
}

fn x86(guest: &str, args: &[&str]) -> String {
    error(&[&["system", guest, "-accel", "null", "-display", "none"], args].concat())
}

fn bzimage() -> Vec<u8> {
    let mut b = vec![0xf4; 0x1400];
    b[..0x400].fill(0);
    let mut put = |at: usize, value: &[u8]| b[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x1f4, &0x100u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x37f_ffffu32.to_le_bytes());
    put(0x234, &[1, 0, 1]);
    put(0x238, &255u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    b
}

#[test]
fn bad_input_for_pcs() {
    let dir = Dir::new("pcs");
    let good = bzimage();
    let kernel = dir.file("bzImage", &good);
    let short = dir.file("short", &good[..0x800]);
    let riscv = dir.file("Image", &image(1 << 16));
    let large = dir.file("initrd", &vec![1; 64 << 20]);
    let bios = dir.file("bios", &[0; 100_000]);
    let cases: [(&str, &[&str], &str); 12] = [
        ("x86_64", &["-kernel", &short], "truncated"),
        (
            "x86_64",
            &["-kernel", &riscv],
            "is a riscv64 Linux Image; this is mimus system x86_64: use mimus system riscv64",
        ),
        ("i386", &["-kernel", &kernel], "is an x86-64 kernel; this is mimus system i386: use mimus system x86_64"),
        ("x86_64", &["-kernel", &kernel, "-initrd", &large], "takes an initrd only below 0x3800000"),
        (
            "x86_64",
            &["-kernel", &kernel, "-append", &"x".repeat(300)],
            "-append has 300 bytes; this kernel takes at most 255",
        ),
        ("x86_64", &["-bios", &bios], "multiple of 64 KiB"),
        ("x86_64", &["-kernel", &kernel, "-cpu", "qemu64,+avx3"], "did you mean"),
        ("x86_64", &["-kernel", &kernel, "-cpu", "qmeu64"], "did you mean \"qemu64\"?"),
        ("x86_64", &["-kernel", &kernel, "-M", "virt"], "it is a board of riscv64"),
        ("x86_64", &["-kernel", &kernel, "-M", "q35,kernel-irqchip=on"], "has no interrupt controllers of its own"),
        ("x86_64", &["-kernel", &kernel, "-M", "microvm,hpet=on"], "no property 'hpet'"),
        ("x86_64", &["-M", "microvm", "-L", "/nonexistent"], "-kernel FILE"),
    ];
    for (guest, args, says) in cases {
        let text = x86(guest, args);
        assert!(text.contains(says), "{says}: {text}");
    }
}

#[test]
fn accelerators_that_cannot() {
    let text = system(&["-accel", "kvm", "-kernel", "x"]);
    assert!(text.contains("riscv64") && text.contains("-accel tcg"), "{text}");
    let text = error(&["system", "x86_64", "-accel", "kvm,device=/nonexistent", "-M", "microvm", "-kernel", "x"]);
    assert!(text.contains("kvm"), "{text}");
}

#[test]
fn the_doctor_looks_at_the_host() {
    let out = mimus(&["doctor"]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{text}");
    for says in ["/dev/kvm", "riscv64: translated (tcg)", "boards q35, pc, microvm"] {
        assert!(text.contains(says), "{says}:\n{text}");
    }
    assert!(error(&["doctor", "who"]).contains("takes no words"));
}

#[test]
fn a_busy_port() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let forward = format!("user,hostfwd=tcp:127.0.0.1:{}-:22", listener.local_addr().unwrap().port());
    assert!(system(&["-nic", &forward, "-kernel", "x"]).contains("in use"));
}
