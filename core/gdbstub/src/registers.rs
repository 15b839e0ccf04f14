//! Registers in packets `g`, `G`, `p`, `P`, and their description, by architecture.

use crate::packet::{from_hex, to_hex};
use mimus_arch::riscv::gdb as riscv;
use mimus_arch::x86::gdb::{View, Width, width};
use mimus_arch::{CpuModel, CpuState, GuestArch};

/// What of a machine's CPU model matters to a debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// The architecture.
    pub arch: GuestArch,
    /// x86: 256-bit vectors.
    pub avx: bool,
}

impl Model {
    /// Of a CPU model.
    pub fn of(cpu: &CpuModel) -> Self {
        let avx = matches!(cpu, CpuModel::X86(m) if m.features.has_name("avx"));
        Self { arch: cpu.arch(), avx }
    }
}

/// What lldb asks of the machine and of its process: architecture and word size.
pub fn triple(model: Model) -> String {
    let name = match model.arch {
        GuestArch::X86_64 => "x86_64",
        GuestArch::I386 => "i386",
        other => other.name(),
    };
    let bytes = if model.arch.is_64_bit() { 8 } else { 4 };
    format!("triple:{};endian:little;ptrsize:{bytes};", to_hex(format!("{name}-unknown-none").as_bytes()))
}

/// A description with what lldb wants to know besides: which registers are the ones it follows frames by.
pub fn for_lldb(description: &str) -> String {
    const GENERIC: [(&str, &[&str]); 5] = [
        ("pc", &["pc", "rip", "eip"]),
        ("sp", &["sp", "rsp", "esp"]),
        ("fp", &["fp", "rbp", "ebp"]),
        ("ra", &["ra"]),
        ("flags", &["eflags"]),
    ];
    let names = GENERIC.iter().flat_map(|(generic, names)| names.iter().map(move |name| (generic, name)));
    names.fold(description.to_owned(), |xml, (generic, name)| {
        xml.replace(&format!("<reg name=\"{name}\""), &format!("<reg name=\"{name}\" generic=\"{generic}\""))
    })
}

/// How a client numbers registers, by the description it was given last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// RISC-V.
    Riscv,
    /// x86, by the width of the code.
    X86(View),
}

impl Layout {
    /// What a client takes for granted that reads no description.
    pub fn of_model(model: Model) -> Self {
        let long_mode = model.arch == GuestArch::X86_64;
        let width = if long_mode { Width::W64 } else { Width::W32 };
        match model.arch {
            GuestArch::X86_64 | GuestArch::I386 => Self::X86(View { width, long_mode, avx: model.avx }),
            _ => Self::Riscv,
        }
    }

    /// The one for the code that a vCPU executes.
    pub fn of_state(model: Model, state: &CpuState) -> Self {
        match (Self::of_model(model), state.as_x86()) {
            (Self::X86(view), Some(s)) => Self::X86(View { width: width(s), ..view }),
            (layout, _) => layout,
        }
    }

    /// The target description.
    pub fn description(&self) -> String {
        match self {
            Self::Riscv => riscv::target_xml(),
            Self::X86(view) => view.target_xml(),
        }
    }

    /// One register in target byte order; `x`s if it is not to be had.
    pub fn read(&self, state: &CpuState, number: u32) -> Option<String> {
        match self {
            Self::Riscv => {
                let s = state.as_riscv()?;
                Some(value_hex(riscv::get(s, number)?, riscv::size(number)?))
            }
            Self::X86(view) => {
                let value = view.get(state.as_x86()?, number)?;
                Some(value.map_or_else(|| "xx".repeat(view.size(number).unwrap_or(0)), |v| to_hex(&v)))
            }
        }
    }

    /// Changes one register; false if there is none such, or not of that size.
    pub fn write(&self, state: &mut CpuState, number: u32, hex: &str) -> bool {
        let Some(bytes) = from_hex(hex) else { return false };
        match self {
            Self::Riscv => {
                let Some(s) = state.as_riscv_mut() else { return false };
                if riscv::size(number) != Some(bytes.len()) {
                    return false;
                }
                let mut value = [0; 8];
                value[..bytes.len()].copy_from_slice(&bytes);
                riscv::set(s, number, u64::from_le_bytes(value))
            }
            Self::X86(view) => state.as_x86_mut().is_some_and(|s| view.set(s, number, &bytes)),
        }
    }

    /// How many registers are in a `g` packet, and the bytes of each.
    fn general(&self) -> Vec<usize> {
        let sizes = |n, size: &dyn Fn(u32) -> Option<usize>| (0..n).filter_map(size).collect();
        match self {
            Self::Riscv => sizes(riscv::GENERAL, &riscv::size),
            Self::X86(view) => sizes(view.general(), &|n| view.size(n)),
        }
    }

    /// The registers of a `g` packet.
    pub fn read_general(&self, state: &CpuState) -> Option<String> {
        match self {
            Self::Riscv => (0..riscv::GENERAL).map(|n| self.read(state, n)).collect(),
            Self::X86(view) => {
                let all = view.get_general(state.as_x86()?);
                Some(all.into_iter().map(|(size, v)| v.map_or_else(|| "xx".repeat(size), |v| to_hex(&v))).collect())
            }
        }
    }

    /// Changes the registers of a `G` packet; those it has as `x` stay.
    pub fn write_general(&self, state: &mut CpuState, hex: &str) -> bool {
        let sizes = self.general();
        if !hex.is_ascii() || hex.len() != 2 * sizes.iter().sum::<usize>() {
            return false;
        }
        let mut at = 0;
        (0..).zip(sizes).all(|(number, size)| {
            let value = &hex[at..at + 2 * size];
            at += 2 * size;
            value.bytes().all(|b| b == b'x') || self.write(state, number, value)
        })
    }
}

fn value_hex(value: u64, size: usize) -> String {
    to_hex(&value.to_le_bytes()[..size.min(8)])
}
