//! The x87 unit: in the host's while the vCPU runs, with every exception masked.
//!
//! What the guest sees of control and status is put together here: its own exception masks, and the summary bits that
//! the host does not set because it masks.
//!
//! Where the last instruction and its operand were is kept of those executed with an exception unmasked: a handler finds
//! what it asks for, and translated code, which runs only with all masked, need not remember.
//!
//! Spec: SDM volume 1 chapter 8.
#![allow(unsafe_code)]

use std::arch::asm;

use iced_x86::Instruction;

use crate::frontend::X86Guest;
use crate::native::uses_mmx;
use crate::state::FxArea;

/// All exceptions masked.
const MASKS: u16 = 0x3f;
/// ES and B.
const SUMMARY: u16 = 0x8080;
/// The top of the stack, of the status word.
const TOP: u16 = 0x3800;
const FCW: usize = 0;
const FSW: usize = 2;
const MXCSR: usize = 24;

pub(crate) fn word(area: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([area[at], area[at + 1]])
}

pub(crate) fn set_word(area: &mut [u8], at: usize, value: u16) {
    area[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Puts an image (as FXSAVE writes it) into the host's unit. MXCSR and the XMM registers are the host's to lose.
fn restore(image: &FxArea) {
    let mut mxcsr = 0u32;
    let mut copy = *image;
    // SAFETY: 512 aligned bytes; the control word masks everything (see `load`), MXCSR is put back. Rust code does not
    // use the x87 registers.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack));
        copy.0[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        copy.0[MXCSR + 4..MXCSR + 8].fill(0);
        asm!(
            "fxrstor64 [{}]", in(reg) &copy,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack)
        );
    }
}

/// The host's unit as an image.
fn save() -> FxArea {
    let mut image = FxArea([0; 512]);
    // SAFETY: 512 aligned bytes.
    unsafe { asm!("fxsave64 [{}]", in(reg) &mut image, options(nostack, preserves_flags)) };
    image
}

/// Loads the guest's x87 registers into the host.
pub(crate) fn load(guest: &mut X86Guest) {
    if std::mem::replace(&mut guest.fpu_loaded, true) {
        return;
    }
    let image = guest.st.fx;
    load_image(guest, &image);
}

/// Takes them back, and leaves the host's unit as a program begins with it.
pub(crate) fn unload(guest: &mut X86Guest) {
    if !std::mem::replace(&mut guest.fpu_loaded, false) {
        return;
    }
    guest.st.fx = image(guest);
    // SAFETY: the initial state of the unit.
    unsafe { asm!("fninit", options(nostack, preserves_flags)) };
}

/// Loads an image: from now on its control word is the guest's.
pub(crate) fn load_image(guest: &mut X86Guest, image: &FxArea) {
    let mut host = *image;
    let fcw = word(&host.0, FCW);
    guest.st.fcw = control(fcw);
    set_word(&mut host.0, FCW, fcw | MASKS);
    let fsw = word(&host.0, FSW);
    set_word(&mut host.0, FSW, fsw & !SUMMARY);
    // Where the last instruction was is kept here.
    host.0[8..24].fill(0);
    restore(&host);
}

/// The guest's x87 registers as an image, XMM registers and MXCSR zero.
pub(crate) fn image(guest: &X86Guest) -> FxArea {
    let mut image = save();
    image.0[24..32].fill(0);
    image.0[160..].fill(0);
    set_word(&mut image.0, FCW, guest.st.fcw);
    let fsw = word(&image.0, FSW);
    set_word(&mut image.0, FSW, status(guest.st.fcw, fsw));
    let p = &guest.st.fpu_pointers;
    set_word(&mut image.0, 6, p.opcode);
    image.0[8..16].copy_from_slice(&p.ip.to_le_bytes());
    image.0[16..24].copy_from_slice(&p.dp.to_le_bytes());
    image
}

/// A control word as it reads: bit 6 is one, the other reserved bits are zero.
const fn control(fcw: u16) -> u16 {
    fcw & 0x1f3f | 0x40
}

/// The status word as the guest sees it.
pub(crate) fn status(fcw: u16, fsw: u16) -> u16 {
    let pending = fsw & !fcw & MASKS != 0;
    fsw & !SUMMARY | if pending { SUMMARY } else { 0 }
}

/// The host's status word.
pub(crate) fn host_status() -> u16 {
    let fsw: u16;
    // SAFETY: reads the unit.
    unsafe { asm!("fnstsw ax", out("ax") fsw, options(nostack, preserves_flags, nomem)) };
    fsw
}

/// An unmasked exception waits for the next instruction that looks.
pub(crate) fn pending(guest: &X86Guest) -> bool {
    guest.st.fcw & MASKS != MASKS && host_status() & !guest.st.fcw & MASKS != 0
}

/// Sets the guest's control word.
pub(crate) fn set_control(guest: &mut X86Guest, fcw: u16) {
    guest.st.fcw = control(fcw);
    let host = fcw | MASKS;
    // SAFETY: every exception is masked.
    unsafe { asm!("fldcw [{}]", in(reg) &host, options(nostack, preserves_flags, readonly)) };
}

/// FNINIT
pub(crate) fn init(guest: &mut X86Guest) {
    guest.st.fcw = 0x37f;
    guest.st.fpu_pointers = Default::default();
    // SAFETY: every exception is masked afterwards.
    unsafe { asm!("fninit", options(nostack, preserves_flags)) };
}

/// What every MMX instruction does: the top of the stack is register 0, and all are valid (SDM volume 1 section 9.5.1).
pub(crate) fn enter_mmx(guest: &mut X86Guest) {
    let mut image = with_top_reset(guest);
    image.0[4] = 0xff;
    load_image(guest, &image);
}

/// An instruction's store has faulted. Intel's processors leave the top of the stack where MMX instructions put it, and
/// nothing else changes (measured).
pub(crate) fn after_fault_of_store(guest: &mut X86Guest, insn: Option<Instruction>) {
    if insn.is_some_and(|insn| uses_mmx(&insn)) {
        let image = with_top_reset(guest);
        load_image(guest, &image);
    }
}

/// Whether it matters what [`after_fault_of_store`] is told.
pub(crate) fn minds_faults_of_stores(guest: &X86Guest) -> bool {
    !guest.st.features.amd && host_status() & TOP != 0
}

fn with_top_reset(guest: &X86Guest) -> FxArea {
    let old = image(guest);
    let top = usize::from(word(&old.0, FSW) >> 11 & 7);
    let mut new = old;
    for n in 0..8 {
        let from = 32 + 16 * ((n + 8 - top) % 8);
        new.0[32 + 16 * n..48 + 16 * n].copy_from_slice(&old.0[from..from + 16]);
    }
    set_word(&mut new.0, FSW, word(&old.0, FSW) & !TOP);
    new
}

/// FNCLEX
pub(crate) fn clear_exceptions() {
    // SAFETY: clears flags.
    unsafe { asm!("fnclex", options(nostack, preserves_flags)) };
}
