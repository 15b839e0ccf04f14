//! What the x86 port devices have in common.

use mimus_core::bus::{AccessRules, AccessSize};

/// Access rules of byte-wide ISA ports: wider accesses are split, at any alignment.
pub const BYTE_PORTS: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B1).with_unaligned();
