//! CPU models over all architectures: what `-cpu NAME,feature=on,…` parses to.

use crate::guest_arch::GuestArch;
use crate::riscv::models::RiscvModel;
use crate::x86::models::X86Model;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A CPU model with its features settled, as the user asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CpuModel {
    /// A RISC-V hart.
    Riscv(RiscvModel),
    /// An x86 processor, of either width.
    X86(X86Model),
}

/// A `-cpu` argument that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The model name is unknown.
    #[error("unknown CPU model {name:?} for {arch}{hint}; models: {known}")]
    UnknownModel { name: String, arch: GuestArch, hint: String, known: String },
    /// A feature name is unknown.
    #[error("CPU model {model}: no feature {feature:?}{hint}")]
    UnknownFeature { model: String, feature: String, hint: String },
    /// A feature's value cannot be read.
    #[error("CPU model {model}: {feature}={value:?} is not understood: use {expected}")]
    BadValue { model: String, feature: String, value: String, expected: &'static str },
    /// Features exclude or need each other.
    #[error("CPU model {model}: {reason}")]
    Conflict { model: String, reason: String },
    /// There are no CPU models for the architecture.
    #[error("guest architecture {0} has no CPU models")]
    NoModels(GuestArch),
}

impl CpuModel {
    /// Parses a `-cpu` argument (`rv64`, `max`, `rv64,zba=off`).
    pub fn parse(arch: GuestArch, text: &str) -> Result<Self, ModelError> {
        match arch {
            GuestArch::Riscv64 => RiscvModel::parse(text).map(Self::Riscv),
            GuestArch::X86_64 | GuestArch::I386 => X86Model::parse(arch, text).map(Self::X86),
            other => Err(ModelError::NoModels(other)),
        }
    }

    /// The model used when no `-cpu` is given.
    pub fn default_for(arch: GuestArch) -> Result<Self, ModelError> {
        match arch {
            GuestArch::Riscv64 => Ok(Self::Riscv(RiscvModel::default())),
            GuestArch::X86_64 | GuestArch::I386 => Ok(Self::X86(X86Model::default_for(arch))),
            other => Err(ModelError::NoModels(other)),
        }
    }

    /// The architecture the model belongs to.
    pub fn arch(&self) -> GuestArch {
        match self {
            Self::Riscv(_) => GuestArch::Riscv64,
            Self::X86(m) => m.arch,
        }
    }

    /// The model's name, without its features.
    pub fn name(&self) -> &str {
        match self {
            Self::Riscv(m) => &m.name,
            Self::X86(m) => &m.name,
        }
    }

    /// The RISC-V model, if it is one.
    pub fn as_riscv(&self) -> Option<&RiscvModel> {
        match self {
            Self::Riscv(m) => Some(m),
            _ => None,
        }
    }

    /// The x86 model, if it is one.
    pub fn as_x86(&self) -> Option<&X86Model> {
        match self {
            Self::X86(m) => Some(m),
            _ => None,
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Riscv(m) => m.fmt(f),
            Self::X86(m) => m.fmt(f),
        }
    }
}

/// The candidate closest to `word`, if close enough to be a typing mistake.
pub(crate) fn closest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (strsim::damerau_levenshtein(word, c), c))
        .filter(|&(d, c)| d <= 1 + c.len().min(word.len()) / 4)
        .min_by_key(|&(d, _)| d)
        .map(|(_, c)| c)
}

/// `; did you mean "x"?` or nothing.
pub(crate) fn hint<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> String {
    closest(word, candidates).map(|c| format!("; did you mean {c:?}?")).unwrap_or_default()
}
