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
    let cases: [(&str, &[&str], &str); 14] = [
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
        ("x86_64", &["-kernel", &kernel, "-cpu", "qemu64,avx3=1"], "no feature \"avx3\"; did you mean"),
        ("x86_64", &["-drive", "if=pflash,format=raw,file=none.fd"], "no such file; give a firmware image"),
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
    let text = error(&["system", "x86_64", "-accel", "tcg", "-kernel", &kernel, "-cpu", "host"]);
    assert!(text.contains("-accel kvm only; use -cpu max"), "{text}");
}

#[test]
fn accelerators_that_cannot() {
    let text = system(&["-accel", "kvm", "-kernel", "x"]);
    assert!(text.contains("riscv64") && text.contains("-accel tcg"), "{text}");
    let text = error(&["system", "x86_64", "-accel", "kvm,device=/nonexistent", "-M", "microvm", "-kernel", "x"]);
    assert!(text.contains("kvm"), "{text}");
}

/// A kernel that leaves through the exit port with 5: `mov al, 2; out 0xf4, al; hlt`.
fn leaving_kernel() -> Vec<u8> {
    let mut kernel = bzimage();
    for entry in [0x400, 0x600] {
        kernel[entry..entry + 5].copy_from_slice(&[0xb0, 2, 0xe6, 0xf4, 0xf4]);
    }
    kernel
}

/// `-accel a -accel b`, `-machine accel=a:b`: the first that works runs the guest, and each that does not is told in a
/// line.
#[test]
fn the_first_accelerator_that_works() {
    let dir = Dir::new("first-accel");
    let kernel = dir.file("kernel", &leaving_kernel());
    let run = |args: &[&str]| {
        let machine = ["system", "x86_64", "-kernel", &kernel, "-m", "64", "-display", "none", "-nic", "none"];
        let out = mimus(&[&machine[..], &["-device", "isa-debug-exit"], args].concat());
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let (code, text) = run(&["-M", "microvm", "-accel", "kvm,device=/nonexistent", "-accel", "tcg"]);
    assert_eq!((code, text.lines().count()), (Some(5), 1), "{text}");
    assert!(text.contains("/nonexistent does not exist") && text.ends_with("using tcg\n"), "{text}");
    // Where KVM works it is taken, but for one that interprets, which tells; where not, it tells why.
    for args in [&["-M", "microvm,accel=kvm:tcg"][..], &["-M", "microvm", "-accel", "kvm", "-accel", "tcg"]] {
        let (code, text) = run(args);
        assert_eq!(code, Some(5), "{text}");
        let says = ["-accel kvm: ", "CPU model"].iter().any(|says| text.contains(says));
        assert!(text.is_empty() || text.lines().count() == 1 && says, "{text}");
    }
    // Without an alternative it runs the guest, or says what to do.
    for args in
        [&["-M", "microvm,accel=kvm"][..], &["-M", "microvm", "-enable-kvm"], &["-M", "microvm", "--accel", "kvm"]]
    {
        let (code, text) = run(args);
        assert!(text.lines().count() <= 1, "{text}");
        // A feature of the model that the host's KVM lacks is told.
        let ran = code == Some(5) && (text.is_empty() || text.starts_with("mimus: warning: CPU model"));
        assert!(ran || code == Some(1) && text.contains("-accel tcg"), "{code:?}: {text}");
    }
}

/// Each refusal is a line that says what to do instead.
#[test]
fn kvm_refuses_in_one_line() {
    let dir = Dir::new("refusals");
    let kernel = dir.file("kernel", &leaving_kernel());
    let run = |args: &[&str]| error(&[&["system", "x86_64", "-display", "none", "-kernel", &kernel], args].concat());
    let not_kvm = dir.file("plain", b"no device");
    let (absent, wrong) = ("kvm,device=/nonexistent".to_owned(), format!("kvm,device={not_kvm}"));
    for (args, says) in [
        (&["-accel", "kvm:tcg"][..], "-accel kvm -accel tcg"),
        (&["-accel", "kmv:tcg"], "-accel kmv -accel tcg"),
        (&["-M", "q35,accel=kmv:tcg"], "did you mean kvm?"),
        (&["-M", "q35,accel=hvf:kvm"], "hvf is an accelerator of QEMU"),
        (&["-accel", &absent], "-accel tcg"),
        (&["-accel", &absent, "-accel", &wrong], "; -accel kvm: "),
        (&["-accel", &wrong], "is not KVM's device: use /dev/kvm, or -accel tcg"),
    ] {
        let text = run(args);
        assert!(text.contains(says), "{says}: {text}");
    }
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED (kvm_refuses_in_one_line, with KVM): /dev/kvm: {e}");
        return;
    }
    for (args, says) in [
        (&["-accel", "kvm,devcie=/dev/kvm"][..], "there are kernel-irqchip"),
        (&["-accel", "kvm", "-smp", "400"], "1 to 255"),
        (&["-accel", "kvm,dirty-ring-size=3"], "dirty-ring-size"),
        (&["-accel", "kvm", "-M", "q35,kernel-irqchip=maybe"], "kernel-irqchip"),
    ] {
        let text = run(args);
        assert!(text.contains(says), "{says}: {text}");
    }
}

/// Who may not open the device is told how to get the permission.
#[test]
fn kvm_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let dir = Dir::new("permission");
    let (node, kernel) = (dir.file("kvm", b""), dir.file("kernel", &leaving_kernel()));
    std::fs::set_permissions(&node, PermissionsExt::from_mode(0o000)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mimus"));
    command.args(["system", "x86_64", "-display", "none", "-kernel", &kernel, "-accel", &format!("kvm,device={node}")]);
    if std::fs::File::open(&node).is_ok() {
        // The administrator may open everything.
        command.uid(65534).gid(65534);
    }
    match command.output() {
        Ok(out) => {
            let text = String::from_utf8(out.stderr).unwrap();
            assert_eq!((out.status.code(), text.lines().count()), (Some(1), 1), "{text}");
            assert!(text.contains("usermod -aG kvm") && text.contains("-accel tcg"), "{text}");
        }
        Err(e) => eprintln!("SKIPPED (kvm_without_permission): mimus cannot be run as another user: {e}"),
    }
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
