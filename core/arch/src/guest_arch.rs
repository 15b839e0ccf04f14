//! The guest architectures by name, and the facts about each that loaders,
//! debuggers and boards ask for.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Byte order of memory accesses or of a device's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Endianness {
    /// Least significant byte at the lowest address.
    Little,
    /// Most significant byte at the lowest address.
    Big,
}

/// A guest architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum GuestArch {
    /// Intel 64 / AMD64.
    X86_64,
    /// 32-bit x86.
    I386,
    /// RISC-V with XLEN = 64.
    Riscv64,
    /// Arm A-profile, AArch64 state.
    Aarch64,
    /// 64-bit Power, little-endian.
    Ppc64le,
}

/// `e_machine` values (ELF gABI, "ELF header").
const EM_386: u16 = 3;
const EM_PPC64: u16 = 21;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const EM_RISCV: u16 = 243;

impl GuestArch {
    /// Every architecture, in the order help texts list them.
    pub const ALL: [GuestArch; 5] = [Self::X86_64, Self::I386, Self::Riscv64, Self::Aarch64, Self::Ppc64le];

    /// The name used on the command line and in snapshots.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::I386 => "i386",
            Self::Riscv64 => "riscv64",
            Self::Aarch64 => "aarch64",
            Self::Ppc64le => "ppc64le",
        }
    }

    /// The ELF `e_machine` number.
    pub const fn elf_machine(self) -> u16 {
        match self {
            Self::X86_64 => EM_X86_64,
            Self::I386 => EM_386,
            Self::Riscv64 => EM_RISCV,
            Self::Aarch64 => EM_AARCH64,
            Self::Ppc64le => EM_PPC64,
        }
    }

    /// The architecture of an ELF file, from `e_machine`, word size and byte order.
    pub fn from_elf(machine: u16, is_64: bool, endian: Endianness) -> Option<Self> {
        let arch = Self::ALL.into_iter().find(|a| a.elf_machine() == machine)?;
        (arch.is_64_bit() == is_64 && arch.endianness() == endian).then_some(arch)
    }

    /// True for architectures with 64-bit general registers.
    pub const fn is_64_bit(self) -> bool {
        !matches!(self, Self::I386)
    }

    /// Byte order of data accesses.
    pub const fn endianness(self) -> Endianness {
        Endianness::Little
    }

    /// Smallest page of the MMU, in bytes.
    pub const fn page_size(self) -> u64 {
        match self {
            Self::Ppc64le => 65536,
            _ => 4096,
        }
    }

    /// The name gdb knows the architecture by (`set architecture`).
    pub const fn gdb_name(self) -> &'static str {
        match self {
            Self::X86_64 => "i386:x86-64",
            Self::I386 => "i386",
            Self::Riscv64 => "riscv:rv64",
            Self::Aarch64 => "aarch64",
            Self::Ppc64le => "powerpc:common64",
        }
    }
}

impl fmt::Display for GuestArch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An architecture name that is not one of [`GuestArch::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown guest architecture {0:?}: use x86_64, i386, riscv64, aarch64 or ppc64le")]
pub struct UnknownArch(pub String);

impl FromStr for GuestArch {
    type Err = UnknownArch;

    fn from_str(s: &str) -> Result<Self, UnknownArch> {
        match s {
            "x86_64" | "x86-64" | "amd64" => Ok(Self::X86_64),
            "i386" | "i486" | "i586" | "i686" | "x86" => Ok(Self::I386),
            "riscv64" | "rv64" => Ok(Self::Riscv64),
            "aarch64" | "arm64" => Ok(Self::Aarch64),
            "ppc64le" | "powerpc64le" => Ok(Self::Ppc64le),
            _ => Err(UnknownArch(s.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for arch in GuestArch::ALL {
            assert_eq!(arch.name().parse(), Ok(arch));
            assert_eq!(GuestArch::from_elf(arch.elf_machine(), arch.is_64_bit(), Endianness::Little), Some(arch));
        }
        assert!("mips".parse::<GuestArch>().unwrap_err().to_string().contains("riscv64"));
        assert_eq!(GuestArch::from_elf(243, false, Endianness::Little), None);
    }
}
