//! Frame information structures (Serial ATA 2.6 section 10.3) as they are in guest memory.

use crate::block::ata::{Registers, TaskFile};

/// Bytes of a command FIS that matter.
pub const COMMAND_LEN: usize = 20;
/// Register, host to device.
const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const PIO_SETUP: u8 = 0x5f;
const SET_DEVICE_BITS: u8 = 0xa1;
/// C: it is a command, not device control.
const IS_COMMAND: u8 = 1 << 7;
/// I: an interrupt comes with it.
const INTERRUPT: u8 = 1 << 6;
/// D: the transfer goes to the host.
const TO_HOST: u8 = 1 << 5;

/// Places in the area of received FISes (AHCI section 4.2.1).
pub const AT_PIO_SETUP: u64 = 0x20;
/// Of register FISes.
pub const AT_REGISTERS: u64 = 0x40;
/// Of Set Device Bits.
pub const AT_DEVICE_BITS: u64 = 0x58;
/// Of what is none of them.
pub const AT_UNKNOWN: u64 = 0x60;

/// What a command FIS is.
pub enum HostFis {
    /// A command.
    Command(TaskFile),
    /// The control register.
    Control(u8),
}

/// Takes one apart; `None` if it is no register FIS.
pub fn parse(b: &[u8; COMMAND_LEN]) -> Option<HostFis> {
    if b[0] != HOST_TO_DEVICE {
        return None;
    }
    if b[1] & IS_COMMAND == 0 {
        return Some(HostFis::Control(b[15]));
    }
    let lba = [b[4], b[5], b[6], b[8], b[9], b[10], 0, 0];
    Some(HostFis::Command(TaskFile {
        command: b[2],
        features: u16::from_le_bytes([b[3], b[11]]),
        lba: u64::from_le_bytes(lba),
        count: u16::from_le_bytes([b[12], b[13]]),
        device: b[7],
    }))
}

/// Register, device to host.
pub fn registers(r: &Registers, status: u8, error: u8, interrupt: bool) -> [u8; 20] {
    let l = r.lba.to_le_bytes();
    let c = r.count.to_le_bytes();
    let flags = if interrupt { INTERRUPT } else { 0 };
    [
        DEVICE_TO_HOST,
        flags,
        status,
        error,
        l[0],
        l[1],
        l[2],
        r.device,
        l[3],
        l[4],
        l[5],
        0,
        c[0],
        c[1],
        0,
        0,
        0,
        0,
        0,
        0,
    ]
}

/// PIO Setup before `bytes` are moved; `after` is the status behind them.
pub fn pio_setup(r: &Registers, to_host: bool, status: u8, after: u8, bytes: u64) -> [u8; 20] {
    let mut fis = registers(r, status, 0, true);
    fis[0] = PIO_SETUP;
    fis[1] |= if to_host { TO_HOST } else { 0 };
    fis[15] = after;
    fis[16..18].copy_from_slice(&(bytes.min(0xffff) as u16).to_le_bytes());
    fis
}

/// Set Device Bits: these queued commands are done.
pub fn device_bits(status: u8, error: u8, done: u32) -> [u8; 8] {
    let d = done.to_le_bytes();
    // BSY and DRQ are not in it.
    [SET_DEVICE_BITS, INTERRUPT, status & 0x77, error, d[0], d[1], d[2], d[3]]
}
