//! Guest code on the boards, run by the host's KVM where it has one.
//!
//! A KVM without hardware behind it executes some million instructions a second of
//! supervisor code: enough for firmware and a boot sector, not for a kernel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mimus_accel_kvm::{KvmAccelerator, Repairs};
use mimus_core::accel::Accelerator;
use mimus_core::arch::GuestArch;
use mimus_machines::config::{Drive, DriveInterface};
use mimus_machines::machine::RunEnd;

use crate::harness::{Pc, Setup};

/// Longest wait for firmware: an emulating KVM on a busy host.
const LIMIT: Duration = Duration::from_secs(120);

/// The machine on KVM, or why there is none, told under the test's name.
fn on_kvm(test: &str, setup: Setup) -> Option<Pc> {
    if let Err(why) = KvmAccelerator.probe(GuestArch::X86_64) {
        println!("SKIPPED ({test}): {why}");
        return None;
    }
    let setup =
        Setup { accel: Box::new(KvmAccelerator), emulation_failure: Some(Arc::new(Repairs::default())), ..setup };
    match setup.try_build() {
        Ok(mut pc) => {
            pc.machine.power_on().unwrap();
            pc.machine.resume();
            Some(pc)
        }
        Err(e) if e.to_string().starts_with("there is no BIOS") => {
            println!("SKIPPED ({test}): {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn wait_for(pc: &Pc, text: &str) {
    let deadline = Instant::now() + LIMIT;
    while !pc.output_text().contains(text) {
        assert!(Instant::now() < deadline, "{text:?} does not come; the serial port said:\n{}", pc.output_text());
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

#[test]
fn seabios_comes_to_its_boot_line() {
    for board in ["q35", "pc"] {
        let Some(pc) = on_kvm("seabios_comes_to_its_boot_line", Setup::new(board)) else { return };
        wait_for(&pc, "SeaBIOS (version");
        wait_for(&pc, "Booting from");
    }
}

#[test]
fn a_boot_sector_from_a_disk() {
    for board in ["q35", "pc"] {
        let text = format!("the boot sector on {board}\r\n");
        let setup = with_disk(board, &boot_sector(&text));
        let Some(mut pc) = on_kvm("a_boot_sector_from_a_disk", setup) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x15 << 1 | 1), "{}", pc.output_text());
        assert!(pc.output_text().contains(&text), "{}", pc.output_text());
    }
}

/// Firmware is saved while it runs, restored into another machine, and comes to its boot line there.
#[test]
fn firmware_goes_on_in_another_machine() {
    let name = "firmware_goes_on_in_another_machine";
    let Some(mut pc) = on_kvm(name, Setup::new("q35")) else { return };
    std::thread::sleep(Duration::from_millis(500));
    let mut file = std::io::Cursor::new(Vec::new());
    pc.machine.save(&mut file).unwrap();
    drop(pc);
    let Some(mut other) = on_kvm(name, Setup::new("q35")) else { return };
    other.machine.restore(&mut &file.into_inner()[..]).unwrap();
    other.serial.take(usize::MAX);
    other.machine.resume();
    wait_for(&other, "Booting from");
}

/// A kernel entered directly: 64-bit code that prints, then powers off the way ACPI says.
#[test]
fn a_kernel_without_firmware() {
    for (board, off) in [("microvm", &POWER_OFF_GED[..]), ("q35", &POWER_OFF_PM[..])] {
        let mut kernel = crate::harness::bzimage();
        let code = [&PRINT_OK[..], off].concat();
        kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
        let Some(mut pc) = on_kvm("a_kernel_without_firmware", Setup::new(board).kernel(&kernel)) else { return };
        assert_eq!(pc.machine.wait(), RunEnd::PowerOff, "{board}: {}", pc.output_text());
        assert_eq!(pc.output_text(), "OK", "{board}");
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
