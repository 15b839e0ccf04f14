//! Guest code on the boards: the same programs on the host's KVM, where it has one, and under the translator.
//!
//! A KVM without hardware behind it executes some million instructions a second of
//! supervisor code: enough for firmware and a boot sector, not for a kernel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mimus_accel_kvm::{KvmAccelerator, Quirks};
use mimus_core::arch::GuestArch;
use mimus_machines::config::{Bios, Drive, DriveInterface};
use mimus_machines::machine::RunEnd;
use mimus_machines::x86::rom;
use mimus_tcg::TcgFallback;

use crate::harness::{Pc, Setup, skipped};

/// Longest wait for firmware: an emulating KVM on a busy host, where what takes ten seconds has taken two minutes.
pub const LIMIT: Duration = Duration::from_secs(300);

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The host's KVM.
    Kvm,
    /// The translator.
    Tcg,
}

impl Engine {
    /// Of these who may run the interrupt controllers, those it can.
    fn modes(self, modes: &'static [&'static str]) -> impl Iterator<Item = &'static str> {
        modes.iter().copied().filter(move |m| self == Self::Kvm || *m == "off")
    }
}

/// The machine on an engine, running, or why there is none, told under the test's name.
pub fn on(engine: Engine, test: &str, setup: Setup) -> Option<Pc> {
    let setup = match engine {
        Engine::Kvm => {
            Setup { accel: Box::new(KvmAccelerator), emulation_failure: Some(Arc::new(TcgFallback)), ..setup }
        }
        Engine::Tcg => setup.translated(),
    };
    if let Err(why) = setup.accel.probe(GuestArch::X86_64) {
        skipped(test, &why.to_string());
        return None;
    }
    match setup.try_build() {
        Ok(mut pc) => {
            pc.machine.power_on().unwrap();
            pc.machine.resume();
            Some(pc)
        }
        Err(e) if e.to_string().starts_with("there is no BIOS") => {
            skipped(test, &e.to_string());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// The same programs on both engines.
macro_rules! programs {
    ($($name:ident,)*) => {
        mod kvm {
            $(#[test]
            fn $name() {
                super::$name(super::Engine::Kvm);
            })*
        }
        mod tcg {
            $(#[test]
            fn $name() {
                super::$name(super::Engine::Tcg);
            })*
        }
    };
}

programs! {
    seabios_comes_to_its_boot_line,
    a_boot_sector_from_a_disk,
    the_first_of_the_boot_order,
    the_first_of_the_boot_order_on_sata,
    interrupt_controllers_in_every_mode,
    a_kernel_through_the_bios,
    firmware_goes_on_in_another_machine,
    a_kernel_without_firmware,
    a_pvh_kernel,
    a_guest_resets_itself,
    processors_start_each_other,
}

pub fn wait_for(pc: &Pc, text: &str) {
    let deadline = Instant::now() + LIMIT;
    while !pc.output_text().contains(text) {
        if Instant::now() >= deadline {
            panic!("{text:?} does not come; {}; the serial port said:\n{}", pc.bootstrap(), pc.output_text());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A boot sector: it prints `text` on the serial port, then ends the run through the exit port.
fn boot_sector(text: &str) -> Vec<u8> {
    let mut code = vec![
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x1c, 0x7c, // mov si, text
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz +3
        0xee, // out dx, al
        0xeb, 0xf8, // jmp lodsb
        0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xb0, 0x15, // mov al, 0x15
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp hlt
    ];
    assert_eq!(code.len(), 0x1c);
    code.extend(text.bytes().chain([0]));
    assert!(code.len() <= 510);
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code.resize(1 << 20, 0);
    code
}

fn with_disk(board: &str, contents: &[u8]) -> Setup {
    let mut setup = Setup::new(board).device("isa-debug-exit");
    let file = setup.file("disk.img", contents);
    let interface = DriveInterface::Virtio;
    setup.config.drives.push(Drive { file: Some(file), interface, format: Some("raw".into()), ..Drive::default() });
    setup
}

fn seabios_comes_to_its_boot_line(engine: Engine) {
    for board in ["q35", "pc"] {
        let Some(pc) = on(engine, "seabios_comes_to_its_boot_line", Setup::new(board)) else { return };
        wait_for(&pc, "SeaBIOS (version");
        wait_for(&pc, "Booting from");
    }
}

fn a_boot_sector_from_a_disk(engine: Engine) {
    for board in ["q35", "pc"] {
        let text = format!("the boot sector on {board}\r\n");
        let setup = with_disk(board, &boot_sector(&text));
        let Some(mut pc) = on(engine, "a_boot_sector_from_a_disk", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x15 << 1 | 1), "{}", pc.output_text());
        assert!(pc.output_text().contains(&text), "{}", pc.output_text());
    }
}

/// Of two disks that can be booted, the one with the lower `bootindex=`, wherever it is.
fn the_first_of_the_boot_order(engine: Engine) {
    for first in [0u32, 1] {
        let mut setup = Setup::new("q35").device("isa-debug-exit");
        for disk in [0, 1] {
            let file = setup.file(&format!("{disk}.img"), &boot_sector(&format!("from disk {disk}\r\n")));
            let text = format!("file={},format=raw,bootindex={}", file.display(), disk ^ first);
            setup.config.drives.push(Drive::parse(&text).unwrap());
        }
        let Some(mut pc) = on(engine, "the_first_of_the_boot_order", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x15 << 1 | 1), "{}", pc.output_text());
        assert!(pc.output_text().contains(&format!("from disk {first}\r\n")), "{}", pc.output_text());
    }
}

/// The same of disks on the SATA controller, beside a virtio one that is last.
fn the_first_of_the_boot_order_on_sata(engine: Engine) {
    for first in [0u32, 1] {
        let mut setup = Setup::new("q35").device("isa-debug-exit");
        for disk in [0, 1, 2] {
            let file = setup.file(&format!("{disk}.img"), &boot_sector(&format!("from disk {disk}\r\n")));
            let (index, interface) = if disk == 2 { (2, "virtio") } else { (disk ^ first, "ide") };
            let text = format!("file={},format=raw,if={interface},bootindex={index}", file.display());
            setup.config.drives.push(Drive::parse(&text).unwrap());
        }
        let Some(mut pc) = on(engine, "the_first_of_the_boot_order_on_sata", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x15 << 1 | 1), "{}", pc.output_text());
        assert!(pc.output_text().contains(&format!("from disk {first}\r\n")), "{}", pc.output_text());
    }
}

/// Whoever runs the interrupt controllers, the disk's interrupts and the timer's come.
fn interrupt_controllers_in_every_mode(engine: Engine) {
    // The accelerator's own are what the other tests have.
    for mode in engine.modes(&["split", "off"]) {
        let text = format!("kernel-irqchip={mode}\r\n");
        let setup = with_disk("q35", &boot_sector(&text)).option("kernel-irqchip", mode).cpus(2);
        let Some(mut pc) = on(engine, "interrupt_controllers_in_every_mode", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x15 << 1 | 1), "{mode}: {}", pc.output_text());
        assert!(pc.output_text().contains(&text), "{}", pc.output_text());
    }
}

/// The BIOS finds the ROM that boots `-kernel`: its set-up code runs, with everything in its place.
fn a_kernel_through_the_bios(engine: Engine) {
    let mut kernel = crate::harness::bzimage();
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xc0, // mov ax, 0x2000; mov es, ax
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x31, 0xf6, // xor si, si
        0x26, 0x8a, 0x04, // mov al, es:[si]
        0x46, // inc si
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz +3
        0xee, // out dx, al
        0xeb, 0xf5, // jmp -11
        0xba, 0xf4, 0x00, 0xb0, 0x07, 0xee, // mov dx, 0xf4; mov al, 7; out dx, al
        0xf4, 0xeb, 0xfd, // hlt; jmp hlt
    ];
    kernel[0x26c..0x26c + code.len()].copy_from_slice(&code);
    let mut setup = Setup::new("q35").kernel(&kernel).device("isa-debug-exit");
    let Some(bios) = rom::find_bios(&[], rom::PC_BIOS) else {
        return skipped("a_kernel_through_the_bios", "there is no BIOS; install seabios");
    };
    setup.config.boot.bios = Bios::File(bios);
    setup.config.boot.append = Some("the command line".into());
    setup.config.boot.initrd = Some(setup.file("initrd", b"an initrd"));
    let Some(mut pc) = on(engine, "a_kernel_through_the_bios", setup) else { return };
    assert_eq!(pc.machine.wait(), RunEnd::Exit(7 << 1 | 1), "{}", pc.output_text());
    assert!(pc.output_text().contains("the command line"), "{}", pc.output_text());
    // Protected-mode code, the header's fields, the initrd.
    assert_eq!(pc.bytes(0x10_0000, 3), [0xf4, 0xeb, 0xfd]);
    let initrd = pc.load(0x1_0218, 4);
    assert_eq!((pc.bytes(initrd, 9), pc.load(0x1_021c, 4)), (b"an initrd".to_vec(), 9));
    assert_eq!((pc.load(0x1_0228, 4), pc.load(0x1_0211, 1) & 0x80), (0x2_0000, 0x80));
}

/// Firmware is saved while it runs, restored into another machine, whose interrupt controllers somebody else runs,
/// or whose processor the other engine is, and comes to its boot line there.
fn firmware_goes_on_in_another_machine(engine: Engine) {
    let name = "firmware_goes_on_in_another_machine";
    let moves = match engine {
        Engine::Kvm => [("on", Engine::Kvm, "off"), ("split", Engine::Kvm, "on"), ("on", Engine::Tcg, "off")],
        Engine::Tcg => [("off", Engine::Tcg, "off"), ("off", Engine::Kvm, "on"), ("off", Engine::Kvm, "split")],
    };
    for (from, other, to) in moves {
        // Firmware that waits by a counter that has leapt waits for up to a quarter of an hour.
        if (engine, other) == (Engine::Tcg, Engine::Kvm) && Quirks::of_host().is_ok_and(|q| q.tsc_fixed) {
            let why = "this host's KVM shows the guest the host's time-stamp counter, whatever is restored";
            skipped(&format!("{name}, to {other:?} {to}"), why);
            continue;
        }
        let setup = |mode: &str| Setup::new("q35").option("kernel-irqchip", mode);
        let Some(mut pc) = on(engine, name, setup(from)) else { return };
        // Early enough that there is something left to do.
        match engine {
            Engine::Kvm => std::thread::sleep(Duration::from_millis(500)),
            Engine::Tcg => wait_for(&pc, "SeaBIOS (version"),
        }
        let mut file = std::io::Cursor::new(Vec::new());
        pc.machine.save(&mut file).unwrap();
        let said = pc.output_text();
        drop(pc);
        let Some(mut goes_on) = on(other, name, setup(to)) else { return };
        goes_on
            .machine
            .restore(&mut &file.into_inner()[..])
            .unwrap_or_else(|e| panic!("{from} to {other:?} {to}: {e}"));
        goes_on.serial.take(usize::MAX);
        goes_on.machine.resume();
        if !said.contains("Booting from") {
            wait_for(&goes_on, "Booting from");
        }
    }
}

/// A kernel entered directly: 64-bit code that prints, then powers off the way ACPI says.
fn a_kernel_without_firmware(engine: Engine) {
    for (board, off) in [("microvm", &POWER_OFF_GED[..]), ("q35", &POWER_OFF_PM[..])] {
        let kernel = kernel_of(&[&PRINT_OK[..], off].concat());
        let Some(mut pc) = on(engine, "a_kernel_without_firmware", Setup::new(board).kernel(&kernel)) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::PowerOff, "{board}: {}", pc.output_text());
        assert_eq!(pc.output_text(), "OK", "{board}");
    }
}

/// An ELF with Xen's note that names a 32-bit entry point (PVH): it finds what the start info says - command line, module
/// and ACPI's root pointer - and exits with 0x15.
fn a_pvh_kernel(engine: Engine) {
    const AT: u64 = 0x10_0000;
    /// XEN_ELFNOTE_PHYS32_ENTRY.
    const NOTE: u32 = 18;
    let code = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        let mut bad = a.create_label();
        let mut end = a.create_label();
        a.cmp(dword_ptr(ebx), 0x336e_c578)?;
        a.jne(bad)?;
        a.cmp(dword_ptr(ebx + 12), 1)?;
        a.jne(bad)?;
        a.mov(eax, dword_ptr(ebx + 24))?;
        a.cmp(byte_ptr(eax), i32::from(b'p'))?;
        a.jne(bad)?;
        a.mov(eax, dword_ptr(ebx + 16))?;
        a.mov(eax, dword_ptr(eax))?;
        a.cmp(byte_ptr(eax), i32::from(b'i'))?;
        a.jne(bad)?;
        a.mov(eax, dword_ptr(ebx + 32))?;
        a.cmp(dword_ptr(eax), i32::from_le_bytes(*b"RSD "))?;
        a.jne(bad)?;
        a.mov(al, 0x15)?;
        a.jmp(end)?;
        a.set_label(&mut bad)?;
        a.mov(al, 1)?;
        a.set_label(&mut end)?;
        a.out(0xf4, al)?;
        a.hlt()?;
        a.assemble(AT)
    };
    let code = code().unwrap();
    let notes: Vec<u8> =
        [&4u32.to_le_bytes()[..], &4u32.to_le_bytes(), &NOTE.to_le_bytes(), b"Xen\0", &(AT as u32).to_le_bytes()]
            .concat();
    // Header, two program headers, notes, code.
    let (notes_at, code_at) = (176u64, 256u64);
    let mut elf = vec![0; code_at as usize];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &AT.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    for (n, kind, offset, address, len) in
        [(0, 1u32, code_at, AT, code.len() as u64), (1, 4, notes_at, 0, notes.len() as u64)]
    {
        let header: Vec<u8> = [kind, 5].iter().flat_map(|w| w.to_le_bytes()).collect();
        put(64 + 56 * n, &header);
        let words: Vec<u8> = [offset, address, address, len, len, 4].iter().flat_map(|w| w.to_le_bytes()).collect();
        put(72 + 56 * n, &words);
    }
    put(notes_at as usize, &notes);
    elf.extend(code);
    for board in ["microvm", "pc", "q35"] {
        let mut setup = Setup::new(board).kernel(&elf).device("isa-debug-exit");
        setup.config.boot.append = Some("pvh".into());
        setup.config.boot.initrd = Some(setup.file("initrd", b"initrd"));
        let Some(mut pc) = on(engine, "a_pvh_kernel", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x15 << 1 | 1), "{board}");
    }
}

/// A kernel with this code at its 64-bit entry point.
fn kernel_of(code: &[u8]) -> Vec<u8> {
    let mut kernel = crate::harness::bzimage();
    kernel[0x600..0x600 + code.len()].copy_from_slice(code);
    kernel
}

/// A guest resets the machine; the second time it finds what it left in memory, and powers off.
fn a_guest_resets_itself(engine: Engine) {
    let reset_pm = [0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd]; // mov dx, 0xcf9; mov al, 6; out
    let reset_ged = [0xb8, 0x02, 0x02, 0xa0, 0xfe, 0xc6, 0x00, 0x42, 0xf4, 0xeb, 0xfd]; // mov byte [0xfea00202], 0x42
    for (board, reset, off) in
        [("q35", &reset_pm[..], &POWER_OFF_PM[..]), ("microvm", &reset_ged[..], &POWER_OFF_GED[..])]
    {
        let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee]; // print R
        code.extend([0xb8, 0x00, 0x00, 0x20, 0x00]); // mov eax, 0x200000
        code.extend([0x80, 0x38, 0x01, 0x74, 3 + reset.len() as u8]); // cmp byte [rax], 1; je off
        code.extend([0xc6, 0x00, 0x01]); // mov byte [rax], 1
        code.extend(reset);
        code.extend(off);
        let setup = Setup::new(board).kernel(&kernel_of(&code));
        let Some(mut pc) = on(engine, "a_guest_resets_itself", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::PowerOff, "{board}");
        assert_eq!(pc.output_text(), "RR", "{board}");
    }
}

/// INIT and start-up IPIs to all other processors, by whoever has the local APICs.
fn processors_start_each_other(engine: Engine) {
    for mode in engine.modes(&["on", "split", "off"]) {
        // At 0x8000, in real mode: cli; xor ax, ax; mov ds, ax; lock inc byte [0x8800]; hlt.
        let ap: [u8; 16] = [0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xf0, 0xfe, 0x06, 0x00, 0x88, 0xf4, 0xeb, 0xfd, 0, 0, 0];
        let mut code = Vec::new();
        for (half, at) in ap.chunks(8).zip([0x8000u32, 0x8008]) {
            code.extend([0x48, 0xb9]); // mov rcx, half
            code.extend(half);
            code.extend([0x48, 0x89, 0x0c, 0x25]); // mov [at], rcx
            code.extend(at.to_le_bytes());
        }
        code.extend([0xc6, 0x04, 0x25, 0x00, 0x88, 0x00, 0x00, 0x00]); // mov byte [0x8800], 0
        code.extend([0xb8, 0xf0, 0x00, 0xe0, 0xfe, 0xc7, 0x00, 0xff, 0x01, 0x00, 0x00]); // enable the local APIC
        code.extend([0xb8, 0x00, 0x03, 0xe0, 0xfe]); // mov eax, 0xfee00300
        for command in [0xc_4500u32, 0xc_4608] {
            code.extend([0xc7, 0x00]); // mov dword [rax], command
            code.extend(command.to_le_bytes());
        }
        code.extend([0xf3, 0x90]); // pause
        code.extend([0x80, 0x3c, 0x25, 0x00, 0x88, 0x00, 0x00, 0x02, 0x75, 0xf4]); // cmp byte [0x8800], 2; jne pause
        code.extend(PRINT_OK);
        code.extend(POWER_OFF_PM);
        let setup = Setup::new("q35").kernel(&kernel_of(&code)).cpus(3).option("kernel-irqchip", mode);
        let Some(mut pc) = on(engine, "processors_start_each_other", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::PowerOff, "{mode}");
        assert_eq!((pc.output_text(), pc.load(0x8800, 1)), ("OK".into(), 2), "{mode}");
    }
}

const PRINT_OK: [u8; 10] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'O', 0xee, // mov al, 'O'; out dx, al
    0xb0, b'K', 0xee, // mov al, 'K'; out dx, al
];
/// `mov byte [0xfea00200], 0x34; hlt`
const POWER_OFF_GED: [u8; 11] = [0xb8, 0x00, 0x02, 0xa0, 0xfe, 0xc6, 0x00, 0x34, 0xf4, 0xeb, 0xfd];
/// `mov dx, 0x604; mov ax, 0x2001; out dx, ax; hlt`
const POWER_OFF_PM: [u8; 13] = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x01, 0x20, 0x66, 0xef, 0xf4, 0xeb, 0xfd];
