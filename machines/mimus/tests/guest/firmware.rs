//! PCs started by firmware under the translator: SeaBIOS, OVMF, GRUB from disks, memtest86+ (under KVM, too); ways to end.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mimus_machines::guests::firmware::{GRUB_EFI, GRUB_PC, MEMTEST, OVMF};
use mimus_machines::guests::x86::SEABIOS;

use crate::boot::partitioned_disk;
use crate::harness::{Commands, Dir, Mimus, generic_commands, guest, i386_commands, skipped, x86_64_commands};

const APPEND: &str = "console=ttyS0 quiet panic=-1";
/// A machine whose network, a boot device too, firmware does not wait for.
const PC: [&str; 7] = ["-accel", "tcg", "-nic", "none", "-m", "512", "-nographic"];

fn x86_64(args: &[&str]) -> Mimus {
    Mimus::start(&[&["system", "x86_64"], &PC[..], args].concat())
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn grub_config(root: &str) -> String {
    format!(
        "serial --unit=0\nterminal_output serial\nlinux {root}/vmlinuz {APPEND} loaded-by-grub\ninitrd {root}/initrd.gz\nboot\n"
    )
}

/// A disk that a BIOS boots: GRUB in its boot sector and behind it, kernel and initrd in a FAT partition. `None` after
/// saying so if GRUB's program does not run here.
pub fn grub_disk(test: &str, dir: &Dir, c: &Commands) -> Option<String> {
    let modules = ["biosdisk", "part_msdos", "fat", "linux", "normal", "configfile", "serial", "terminal"];
    let grub = grub_core(test, dir, &modules, None)?;
    let path = dir.path("disk.img");
    let read = |p: &str| std::fs::read(p).unwrap();
    let (kernel, initrd, config) = (read(&c.kernel), read(&c.initrd), grub_config("/boot"));
    let files = [("boot/vmlinuz", &kernel[..]), ("boot/initrd.gz", &initrd), ("boot/grub/grub.cfg", config.as_bytes())];
    partitioned_disk(Path::new(&path), 0x0c, &files);
    install_grub(&path, &grub, dir);
    Some(path)
}

/// Makes GRUB with these modules and, if there is one, a file of commands to begin with, as `core.img`; where it is from.
fn grub_core(test: &str, dir: &Dir, modules: &[&str], config: Option<&str>) -> Option<PathBuf> {
    let grub = guest(test, &GRUB_PC)?;
    let program = grub.join("grub-mkimage");
    let mut make = Command::new(&program);
    make.arg("-d").arg(&grub).args(["-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-o", &dir.path("core.img")]);
    if let Some(config) = config {
        std::fs::write(dir.path("early.cfg"), config).unwrap();
        make.args(["-c", &dir.path("early.cfg")]);
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(program, mode).unwrap();
    let made = make.args(modules).env("LD_LIBRARY_PATH", &grub).output();
    if !made.as_ref().is_ok_and(|o| o.status.success()) {
        skipped(test, &format!("grub-mkimage does not run here: {made:?}"));
        return None;
    }
    Some(grub)
}

/// Puts the GRUB that was made at the beginning of a disk.
fn install_grub(path: &str, grub: &Path, dir: &Dir) {
    // The boot sector loads what is in the next sector, which knows its own length; the partition is behind both.
    let disk = std::fs::File::options().write(true).open(path).unwrap();
    disk.write_all_at(&std::fs::read(grub.join("boot.img")).unwrap()[..440], 0).unwrap();
    // Take the drive that the BIOS says (GRUB Manual, "BIOS installation": the check is for broken ones).
    disk.write_all_at(&[0x90, 0x90], 0x66).unwrap();
    disk.write_all_at(&std::fs::read(dir.path("core.img")).unwrap(), 512).unwrap();
}

fn power_off(guest: &mut Mimus) {
    guest.send("poweroff -f\n");
    guest.end_well();
}

/// From the disk, over a reboot by the guest, with the power button pressed in between.
#[test]
fn seabios_and_grub_from_a_virtio_disk_on_q35() {
    let test = "seabios_and_grub_from_a_virtio_disk_on_q35";
    let (Some(c), Some(bios)) = (x86_64_commands(test), guest(test, &SEABIOS)) else { return };
    let dir = Dir::new(test);
    let Some(disk) = grub_disk(test, &dir, &c) else { return };
    let drive = format!("file={disk},format=raw,if=virtio");
    let bios = text(&bios.join("bios-256k.bin"));
    let mut guest = x86_64(&["-M", "q35", "-smp", "2", "-bios", &bios, "-drive", &drive]);
    for boot in 0..2 {
        guest.wait_for("SeaBIOS");
        guest.wait_for("GRUB");
        guest.wait_for("<<ready>>");
        guest.run("grep -q loaded-by-grub /proc/cmdline");
        assert_eq!(guest.run("grep -c ^processor /proc/cpuinfo"), "2");
        assert_eq!(guest.run("cat /sys/class/dmi/id/product_name"), "q35");
        if boot == 0 {
            let presses = "/sys/firmware/acpi/interrupts/ff_pwr_btn";
            let before = guest.run(&format!("cat {presses}"));
            assert!(before.contains("enabled"), "{before}");
            guest.send("\x01c");
            guest.wait_for("(mimus)");
            guest.send("system_powerdown\n");
            guest.wait_for("(mimus)");
            guest.send("\x01c");
            guest.run(&format!(
                "for i in $(seq 50); do grep -q ' 1 ' {presses} && break; sleep 0.1; done; grep ' 1 ' {presses}"
            ));
            guest.send("reboot -f\n");
        }
    }
    power_off(&mut guest);
}

#[test]
fn seabios_and_grub_from_a_virtio_disk_on_pc() {
    let test = "seabios_and_grub_from_a_virtio_disk_on_pc";
    let Some(c) = x86_64_commands(test) else { return };
    let dir = Dir::new(test);
    let (Some(disk), Some(_)) = (grub_disk(test, &dir, &c), guest(test, &SEABIOS)) else { return };
    let drive = format!("file={disk},format=raw,if=none,id=d0");
    let mut guest = x86_64(&["-M", "pc", "-no-reboot", "-drive", &drive, "-device", "virtio-blk-pci,drive=d0"]);
    guest.wait_for("GRUB");
    guest.wait_for("<<ready>>");
    guest.run("grep -q loaded-by-grub /proc/cmdline && test -b /dev/vda1");
    power_off(&mut guest);
}

fn seabios_boots(test: &str, commands: Option<Commands>, board: &str, smp: &str, machine: &str) {
    let (Some(c), Some(bios)) = (commands, guest(test, &SEABIOS)) else { return };
    let bios = text(&bios.join("bios-256k.bin"));
    let mut guest = c.boot(&["-accel", "tcg", "-nic", "none", "-M", board, "-smp", smp, "-no-reboot", "-bios", &bios]);
    assert!(guest.transcript().contains("SeaBIOS"));
    assert_eq!(guest.run("grep -c ^processor /proc/cpuinfo"), smp);
    assert_eq!(guest.run("uname -m"), machine);
    power_off(&mut guest);
}

#[test]
fn seabios_boots_the_amd64_kernel() {
    let test = "seabios_boots_the_amd64_kernel";
    seabios_boots(test, x86_64_commands(test), "pc", "1", "x86_64");
}

#[test]
fn seabios_boots_the_amd64_kernel_with_four_vcpus() {
    let test = "seabios_boots_the_amd64_kernel_with_four_vcpus";
    seabios_boots(test, x86_64_commands(test), "q35", "4", "x86_64");
}

#[test]
fn seabios_boots_the_686_kernel() {
    let test = "seabios_boots_the_686_kernel";
    seabios_boots(test, i386_commands(test), "q35", "1", "i686");
}

#[test]
fn seabios_boots_the_generic_kernel() {
    let test = "seabios_boots_the_generic_kernel";
    seabios_boots(test, generic_commands(test), "pc", "1", "x86_64");
}

#[test]
fn seabios_boots_the_generic_kernel_with_four_vcpus() {
    let test = "seabios_boots_the_generic_kernel_with_four_vcpus";
    seabios_boots(test, generic_commands(test), "q35", "4", "x86_64");
}

#[test]
fn seabios_boots_the_686_kernel_with_four_vcpus() {
    let test = "seabios_boots_the_686_kernel_with_four_vcpus";
    seabios_boots(test, i386_commands(test), "pc", "4", "i686");
}

/// Both banks, and a copy of the variables.
pub fn flash(dir: &Dir, ovmf: &Path, code: &str) -> [String; 2] {
    std::fs::copy(ovmf.join("vars.fd"), dir.path("vars.fd")).unwrap();
    [
        format!("if=pflash,format=raw,readonly=on,file={}", ovmf.join(code).display()),
        format!("if=pflash,format=raw,file={}", dir.path("vars.fd")),
    ]
}

fn variables_were_written(dir: &Dir, ovmf: &Path) {
    let read = |p: &Path| std::fs::read(p).unwrap();
    assert_ne!(read(&dir.0.join("vars.fd")), read(&ovmf.join("vars.fd")), "boot entries are kept in the variables");
}

#[test]
fn ovmf_and_its_shell() {
    let test = "ovmf_and_its_shell";
    let Some(ovmf) = guest(test, &OVMF) else { return };
    let dir = Dir::new(test);
    let [code, vars] = flash(&dir, &ovmf, "code.fd");
    let mut guest = x86_64(&["-M", "q35", "-no-reboot", "-drive", &code, "-drive", &vars]);
    guest.wait_for("UEFI Interactive Shell");
    // It looks for a script to start with.
    guest.send("\x1b");
    guest.wait_for("Shell>");
    guest.send("reset -s\r");
    guest.end_well();
}

/// A disk with GRUB on its EFI system partition.
#[test]
fn ovmf_and_grub_from_a_disk() {
    let test = "ovmf_and_grub_from_a_disk";
    let Some(c) = x86_64_commands(test) else { return };
    let (Some(ovmf), Some(grub)) = (guest(test, &OVMF), guest(test, &GRUB_EFI)) else { return };
    let dir = Dir::new(test);
    let read = |p: &Path| std::fs::read(p).unwrap();
    let (kernel, initrd) = (read(Path::new(&c.kernel)), read(Path::new(&c.initrd)));
    let (grub, config) = (read(&grub.join("grubx64.efi")), grub_config("/boot"));
    let files = [
        ("EFI/BOOT/BOOTX64.EFI", &grub[..]),
        ("EFI/debian/grub.cfg", config.as_bytes()),
        ("boot/vmlinuz", &kernel),
        ("boot/initrd.gz", &initrd),
    ];
    partitioned_disk(&dir.0.join("disk.img"), 0xef, &files);
    let [code, vars] = flash(&dir, &ovmf, "code.fd");
    let drive = format!("file={},format=raw,if=virtio", dir.path("disk.img"));
    let mut guest = x86_64(&["-M", "q35", "-no-reboot", "-drive", &code, "-drive", &vars, "-drive", &drive]);
    guest.wait_for("<<ready>>");
    guest.run("grep -q loaded-by-grub /proc/cmdline && test -d /sys/firmware/efi/efivars");
    power_off(&mut guest);
    variables_were_written(&dir, &ovmf);
}

/// Whose power management it places elsewhere than a BIOS does.
#[test]
fn ovmf_on_pc_boots_the_kernel() {
    let test = "ovmf_on_pc_boots_the_kernel";
    let (Some(c), Some(ovmf)) = (x86_64_commands(test), guest(test, &OVMF)) else { return };
    let dir = Dir::new(test);
    let [code, vars] = flash(&dir, &ovmf, "code.fd");
    let board = ["-accel", "tcg", "-nic", "none", "-M", "pc", "-no-reboot"];
    let mut guest = c.boot(&[&board[..], &["-drive", &code, "-drive", &vars]].concat());
    guest.run("test -d /sys/firmware/efi");
    power_off(&mut guest);
}

/// Its variables are in the hands of system management mode.
#[test]
fn ovmf_with_secure_boot_boots_the_kernel() {
    let test = "ovmf_with_secure_boot_boots_the_kernel";
    let (Some(c), Some(ovmf)) = (x86_64_commands(test), guest(test, &OVMF)) else { return };
    let dir = Dir::new(test);
    let [code, vars] = flash(&dir, &ovmf, "code-secboot.fd");
    let firmware = ["-drive", &code, "-drive", &vars];
    let board = ["-accel", "tcg", "-nic", "none", "-M", "q35", "-smp", "2", "-no-reboot"];
    let mut guest = c.boot(&[&board[..], &firmware].concat());
    guest.run("test -d /sys/firmware/efi");
    power_off(&mut guest);
    variables_were_written(&dir, &ovmf);
}

/// Runs its tests up to moving inversions; with `MIMUS_LONG_TESTS`, a whole pass.
fn memtest(test: &str, file: &str) {
    let Some(files) = guest(test, &MEMTEST) else { return };
    let kernel = text(&files.join(file));
    let machine = ["system", "x86_64", "-accel", "tcg", "-nic", "none", "-M", "q35", "-m", "64", "-nographic"];
    let mut guest = Mimus::start(&[&machine[..], &["-kernel", &kernel, "-append", "console=ttyS0,115200"]].concat());
    guest.wait_for("Status: Testing");
    guest.wait_for("[Moving inversions");
    if std::env::var_os("MIMUS_LONG_TESTS").is_some() {
        // The last test waits for minutes, but shows how it goes on.
        let late = Instant::now() + Duration::from_secs(900);
        while !guest.transcript().contains("Pass:  1 ") && Instant::now() < late {
            guest.wait_for("Time:  ");
        }
        assert!(guest.transcript().contains("Pass:  1 "));
    }
    let shown = guest.transcript();
    let errors = shown.rsplit("Errors: ").next().unwrap();
    assert!(errors.starts_with('0') && !shown.contains("Failing"), "{errors}");
}

#[test]
fn memtest_of_64_bits() {
    memtest("memtest_of_64_bits", "x64.bin");
}

#[test]
fn memtest_of_32_bits() {
    memtest("memtest_of_32_bits", "ia32.bin");
}

/// On the host's KVM, with what its kernel cannot execute done by the translator: to the screen of its tests.
#[cfg(target_arch = "x86_64")]
#[test]
fn memtest_under_kvm() {
    let test = "memtest_under_kvm";
    if let Err(why) = mimus_accel_kvm::Quirks::of_host() {
        return skipped(test, &format!("KVM: {why}"));
    }
    let Some(files) = guest(test, &MEMTEST) else { return };
    let kernel = text(&files.join("x64.bin"));
    // With firmware, and without.
    let long = std::env::var_os("MIMUS_LONG_TESTS").is_some();
    for board in if long { &["microvm", "q35"][..] } else { &["microvm"] } {
        let machine = ["system", "x86_64", "--accel", "kvm", "-nic", "none", "-M", board, "-m", "64", "-nographic"];
        let mut guest =
            Mimus::start(&[&machine[..], &["-kernel", &kernel, "-append", "console=ttyS0,115200"]].concat());
        // When it shows which test runs depends on how long each takes.
        guest.wait_for("Status: Testing");
        guest.wait_for("Errors: 0");
    }
}

/// A BIOS and a boot loader that switch between real and protected mode: as far as GRUB's prompt.
#[cfg(target_arch = "x86_64")]
#[test]
fn grub_from_a_disk_under_kvm() {
    let test = "grub_from_a_disk_under_kvm";
    if let Err(why) = mimus_accel_kvm::Quirks::of_host() {
        return skipped(test, &format!("KVM: {why}"));
    }
    if std::env::var_os("MIMUS_LONG_TESTS").is_none() {
        return skipped(test, "it takes a minute where KVM interprets supervisor code: set MIMUS_LONG_TESTS=1");
    }
    if guest(test, &SEABIOS).is_none() {
        return;
    }
    let dir = Dir::new(test);
    let config = "serial --unit=0\nterminal_output serial\nterminal_input serial\n";
    // It unpacks itself by some ten million instructions; those for all modules are ten times as many.
    let Some(grub) = grub_core(test, &dir, &["biosdisk", "part_msdos", "serial", "terminal"], Some(config)) else {
        return;
    };
    let path = dir.path("disk.img");
    let mut disk = vec![0; 4 << 20];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&path, disk).unwrap();
    install_grub(&path, &grub, &dir);
    let drive = format!("file={path},format=raw");
    let machine = ["system", "x86_64", "-accel", "kvm", "-nic", "none", "-M", "pc", "-m", "64", "-nographic"];
    let mut guest = Mimus::start(&[&machine[..], &["-drive", &drive]].concat());
    guest.wait_for("GRUB loading");
    guest.wait_for("Welcome to GRUB");
    guest.wait_for("grub rescue>");
    guest.send("ls\r");
    guest.wait_for("(hd0)");
}

/// The FADT's register, the keyboard controller, a triple fault, port 0xcf9: what `reboot=` says.
#[test]
fn ways_to_reset() {
    let test = "ways_to_reset";
    let Some(c) = x86_64_commands(test) else { return };
    for way in ["acpi", "kbd", "triple", "pci"] {
        let append = format!("{APPEND} reboot={way},force");
        let own = ["-M", "q35", "-no-reboot", "-kernel", &c.kernel, "-initrd", &c.initrd, "-append", &append];
        let mut guest = x86_64(&own);
        guest.wait_for("<<ready>>");
        guest.send("reboot -f\n");
        guest.end_well();
    }
}

/// A20 passes at reset, not when neither the keyboard controller nor port 0x92 lets it, and by port 0x92 again; then,
/// once it is enabled, an APM command is an SMI whose handler, at the default SMBASE, has run before the next
/// instruction. CL counts what went well.
#[rustfmt::skip]
const A20_AND_SMI: [u8; 153] = [
    // cli; xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7000; dec ax; mov es,ax; mov cl,1
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x70, 0x48, 0x8e, 0xc0, 0xb1, 0x01,
    // mov byte [0x500],0x11; mov byte [es:0x510],0x22; cmp byte [0x500],0x11; jne end; inc cx
    0xc6, 0x06, 0x00, 0x05, 0x11, 0x26, 0xc6, 0x06, 0x10, 0x05, 0x22, 0x80, 0x3e, 0x00, 0x05, 0x11, 0x75, 0x67, 0x41,
    // mov al,0xdd; out 0x64,al; xor al,al; out 0x92,al; cmp byte [es:0x510],0x11; jne end; inc cx
    0xb0, 0xdd, 0xe6, 0x64, 0x30, 0xc0, 0xe6, 0x92, 0x26, 0x80, 0x3e, 0x10, 0x05, 0x11, 0x75, 0x56, 0x41,
    // mov al,2; out 0x92,al; cmp byte [es:0x510],0x22; jne end; inc cx
    0xb0, 0x02, 0xe6, 0x92, 0x26, 0x80, 0x3e, 0x10, 0x05, 0x22, 0x75, 0x49, 0x41,
    // mov eax,0x8000f840; mov bx,0x601; call config; mov al,0x44; mov bx,0x80; call config
    0x66, 0xb8, 0x40, 0xf8, 0x00, 0x80, 0xbb, 0x01, 0x06, 0xe8, 0x41, 0x00, 0xb0, 0x44, 0xbb, 0x80, 0x00, 0xe8, 0x39, 0x00,
    // mov ax,0x3000; mov fs,ax; mov dword [fs:0x8000],0x050206c6; mov dword [fs:0x8004],0x00aa0f77
    0xb8, 0x00, 0x30, 0x8e, 0xe0, 0x64, 0x66, 0xc7, 0x06, 0x00, 0x80, 0xc6, 0x06, 0x02, 0x05, 0x64, 0x66, 0xc7, 0x06, 0x04, 0x80, 0x77, 0x0f, 0xaa, 0x00,
    // out 0xb2,al; cmp byte [0x502],0x77; je end; inc cx
    0xe6, 0xb2, 0x80, 0x3e, 0x02, 0x05, 0x77, 0x74, 0x12, 0x41,
    // mov dx,0x630; mov al,0x21; out dx,al; out 0xb2,al; cmp byte [0x502],0x77; jne end; mov cl,0x20
    0xba, 0x30, 0x06, 0xb0, 0x21, 0xee, 0xe6, 0xb2, 0x80, 0x3e, 0x02, 0x05, 0x77, 0x75, 0x02, 0xb1, 0x20,
    // end: mov al,cl; out 0xf4,al; hlt
    0x88, 0xc8, 0xe6, 0xf4, 0xf4,
    // config: mov dx,0xcf8; out dx,eax; mov dx,0xcfc; xchg ax,bx; out dx,ax; xchg ax,bx; ret
    0xba, 0xf8, 0x0c, 0x66, 0xef, 0xba, 0xfc, 0x0c, 0x93, 0xef, 0x93, 0xc3,
];

#[test]
fn a_rom_finds_a20_and_smis() {
    let dir = Dir::new("rom");
    let mut rom = vec![0xff; 64 << 10];
    rom[..A20_AND_SMI.len()].copy_from_slice(&A20_AND_SMI);
    // The reset vector: jmp 0xf000:0
    rom[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0, 0xf0]);
    std::fs::write(dir.path("rom.bin"), &rom).unwrap();
    let exit = ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"];
    for (machine, engine, code) in [("q35", "jit", 0x20), ("q35", "interp", 0x20), ("q35,smm=off", "jit", 5)] {
        let accel = format!("tcg,engine={engine}");
        let own = ["system", "x86_64", "-M", machine, "-accel", &accel, "-nic", "none", "-m", "64", "-nographic"];
        let mut guest = Mimus::start(&[&own[..], &["-bios", &dir.path("rom.bin")], &exit].concat());
        assert_eq!(guest.end().code(), Some(code << 1 | 1), "{machine}, {engine}");
    }
}

/// What is said of firmware that cannot be.
#[test]
fn mistakes_with_firmware() {
    let dir = Dir::new("firmware-mistakes");
    let file = |name: &str, len: u64| {
        let path = dir.path(name);
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    };
    let (odd, big) = (file("odd.fd", 5000), file("big.fd", 17 << 20));
    let (volume, vars) = (file("code.fd", 0x37_c000), file("vars.fd", 64 << 10));
    std::fs::File::options().write(true).open(&volume).unwrap().write_all_at(b"_FVH", 40).unwrap();
    let pflash = |path: &str| format!("if=pflash,format=raw,file={path}");
    let cases: [(&[&str], &str); 9] = [
        (&["-bios", &odd], "5000 bytes"),
        (&["-bios", &big], "at most 16 MiB"),
        (&["-bios", "/nonexistent/x.fd"], "no such file"),
        (&["-bios", &volume], "belongs in flash"),
        (&["-drive", &pflash(&odd)], "odd.fd: it has"),
        (&["-drive", &pflash(&big)], "at most 8 MiB"),
        (&["-drive", &pflash("/nonexistent/x.fd")], "no such file"),
        (&["-drive", &pflash(&vars), "-bios", &volume], "leave one out"),
        (&["-M", "q35,smm=perhaps"], "on or off"),
    ];
    for (args, says) in cases {
        let mut guest = x86_64(args);
        let status = guest.end();
        let output = guest.transcript();
        assert_eq!(status.code(), Some(1), "{args:?}: {output}");
        assert!(output.contains(says), "{args:?}: {output}");
        assert_eq!(output.trim_end().lines().count(), 1, "{args:?}: {output}");
    }
}
