//! Interrupt messages: of the ICR, of I/O APICs and of PCI devices.

use super::apic::{Mode, Published};

/// Delivery mode (section 11.6.1, "Delivery Mode").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// To all destinations.
    Fixed,
    /// To the destination that runs at the lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up; the vector is the page.
    StartUp,
}

impl Delivery {
    /// From bits 10:8 of ICR, LVT entry or message; `None` for the reserved mode and for ExtINT, which no message
    /// has here.
    pub(super) fn from_bits(value: u32) -> Option<Self> {
        Some(match value >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => return None,
        })
    }

    /// It has a vector of the interrupt table.
    pub(super) fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// Who a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    Physical(u32),
    Logical(u32),
    All,
    AllButSender,
    Sender,
}

/// An interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub(super) destination: Destination,
    pub(super) delivery: Delivery,
    pub(super) vector: u8,
    pub(super) level: bool,
}

const LEVEL: u32 = 1 << 15;
const ASSERT: u32 = 1 << 14;
/// "FFH: broadcast"; all ones in x2APIC mode.
const BROADCAST_8: u32 = 0xff;

const MSI_WINDOW: u64 = 0xfee;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_REDIRECTION_HINT: u64 = 1 << 3;

impl Message {
    /// A PCI message (section 11.11); `None` if it is none for local APICs.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != MSI_WINDOW {
            return None;
        }
        let id = (address >> 12) as u32 & 0xff;
        let logical = address & MSI_LOGICAL != 0;
        let mut delivery = Delivery::from_bits(data)?;
        // "RH=1, DM=1: the processor with the lowest priority in the group."
        if logical && address & MSI_REDIRECTION_HINT != 0 && delivery == Delivery::Fixed {
            delivery = Delivery::LowestPriority;
        }
        let destination = match logical {
            true => Destination::Logical(id),
            // Nobody has the id 255 in 8 bits.
            false if id == BROADCAST_8 => Destination::All,
            false => Destination::Physical(id),
        };
        let level = data & LEVEL != 0 && delivery.has_vector();
        Some(Self { destination, delivery, vector: data as u8, level })
    }

    /// The IPI of an ICR whose destination is `destination`, of 8 bits or, if `wide`, 32. `None` for what sends
    /// nothing: the de-assertion of INIT, reserved modes, shorthands a mode does not have (table 11-3).
    pub(super) fn from_icr(low: u32, destination: u32, wide: bool) -> Option<Self> {
        let delivery = Delivery::from_bits(low)?;
        if delivery == Delivery::Init && low & (LEVEL | ASSERT) == LEVEL {
            return None;
        }
        let broadcast = if wide { u32::MAX } else { BROADCAST_8 };
        let destination = match low >> 18 & 3 {
            0 if low & 1 << 11 != 0 => Destination::Logical(destination),
            0 if destination == broadcast => Destination::All,
            0 => Destination::Physical(destination),
            1 if delivery == Delivery::Fixed => Destination::Sender,
            1 => return None,
            2 if matches!(delivery, Delivery::Fixed) => Destination::All,
            2 => return None,
            _ => Destination::AllButSender,
        };
        Some(Self { destination, delivery, vector: low as u8, level: false })
    }

    /// Whether it is for the APIC that has published `p`; `own` if that is the sender.
    pub(super) fn is_for(&self, p: &Published, own: bool) -> bool {
        match self.destination {
            _ if p.mode == Mode::Off => false,
            Destination::All => true,
            Destination::AllButSender => !own,
            Destination::Sender => own,
            Destination::Physical(id) => p.id == id,
            Destination::Logical(mda) => matches_logical(mda, p),
        }
    }
}

/// Section 11.6.2.2, and 11.12.10.2 for x2APIC.
fn matches_logical(mda: u32, p: &Published) -> bool {
    if p.mode == Mode::X2Apic {
        return mda == u32::MAX || mda >> 16 == p.ldr >> 16 && mda & p.ldr & 0xffff != 0;
    }
    // What a sender in x2APIC mode says to more than 8 bits is for others.
    let Ok(mda) = u8::try_from(mda) else { return mda == u32::MAX };
    let ldr = (p.ldr >> 24) as u8;
    match p.model {
        0xf => mda & ldr != 0,
        0 => mda == 0xff || mda >> 4 == ldr >> 4 && mda & ldr & 0xf != 0,
        _ => false,
    }
}
