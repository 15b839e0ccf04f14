//! Which accelerator runs the guest.

use std::collections::BTreeMap;
use std::sync::Arc;

use mimus_accel_kvm::KvmAccelerator;
use mimus_core::accel::{Accelerator, EmulationFallback, NullAccelerator};
use mimus_core::arch::GuestArch;
use mimus_machines::boards;
use mimus_machines::config::{Accel, MachineConfig};
use mimus_tcg::{TcgAccelerator, TcgFallback};

/// An accelerator with its options.
pub struct Choice {
    /// The accelerator.
    pub accel: Box<dyn Accelerator>,
    /// `-accel` options.
    pub options: BTreeMap<String, String>,
}

impl Choice {
    /// Who finishes instructions that the accelerator cannot execute.
    pub fn emulation_failure(&self) -> Option<Arc<dyn EmulationFallback>> {
        (self.accel.name() == "kvm").then(|| Arc::new(TcgFallback) as Arc<dyn EmulationFallback>)
    }
}

/// The first of the accelerators asked for that can run the guest here; without any asked
/// for, the best.
pub fn choose(config: &MachineConfig) -> anyhow::Result<Choice> {
    let arch = boards::guest(config)?;
    if config.accels.is_empty() {
        let mut choice = best(arch)?;
        add_cpu_pm(config, choice.accel.name(), &mut choice.options);
        return Ok(choice);
    }
    let mut reasons = Vec::new();
    for (i, accel) in config.accels.iter().enumerate() {
        let others = config.accels[i + 1..].iter().any(|a| open_with(a, arch).is_ok());
        match open_with(accel, arch) {
            Ok(_) if accel.name == "kvm" && others && kvm_interprets() => {
                reasons.push(format!("-accel kvm: {INTERPRETS}"));
            }
            Ok(found) => {
                for reason in reasons {
                    log::warn!("{reason}; using {}", accel.name);
                }
                let mut options: BTreeMap<_, _> = accel.options.iter().cloned().collect();
                add_cpu_pm(config, &accel.name, &mut options);
                return Ok(Choice { accel: found, options });
            }
            Err(reason) => reasons.push(format!("-accel {}: {reason}", accel.name)),
        }
    }
    anyhow::bail!("{}", reasons.join("; "))
}

/// Why a KVM is not taken if there is anything else.
const INTERPRETS: &str = "this host's KVM has no hardware behind it and interprets system software, some 100 times \
                          slower than hardware does";

/// `-overcommit cpu-pm=on` is the accelerator's to do.
fn add_cpu_pm(config: &MachineConfig, accel: &str, options: &mut BTreeMap<String, String>) {
    if config.host_memory.cpu_pm && accel == "kvm" {
        options.entry("cpu-pm".to_owned()).or_insert_with(|| "on".to_owned());
    }
}

/// Whether the guest's code is the host's.
pub fn runs_directly(arch: GuestArch) -> bool {
    match std::env::consts::ARCH {
        "x86_64" => matches!(arch, GuestArch::X86_64 | GuestArch::I386),
        host => arch.name() == host,
    }
}

/// KVM where it has hardware behind it, else the translator, else what there is.
fn best(arch: GuestArch) -> anyhow::Result<Choice> {
    let choice = |accel| Ok(Choice { accel, options: BTreeMap::new() });
    let kvm = runs_directly(arch).then(|| open("kvm", arch));
    let slow = matches!(kvm, Some(Ok(_))) && kvm_interprets();
    match (kvm, open("tcg", arch)) {
        (Some(Ok(kvm)), _) if !slow => choice(kvm),
        (_, Ok(tcg)) => {
            if slow {
                log::info!("{INTERPRETS}: the translator runs the guest");
            }
            choice(tcg)
        }
        (Some(Ok(kvm)), Err(_)) => {
            eprintln!("mimus: {INTERPRETS}");
            choice(kvm)
        }
        (Some(Err(kvm)), Err(tcg)) => anyhow::bail!("{kvm}; {tcg}"),
        (None, Err(tcg)) => anyhow::bail!("{tcg}"),
    }
}

/// Whether the host's KVM has no hardware behind it, found by running a few instructions.
#[cfg(target_arch = "x86_64")]
pub fn kvm_interprets() -> bool {
    mimus_accel_kvm::Quirks::of_host().is_ok_and(|q| q.emulated_cpl0)
}

/// There is no KVM of another architecture's guests.
#[cfg(not(target_arch = "x86_64"))]
pub fn kvm_interprets() -> bool {
    false
}

/// An accelerator by name, if it can run the guest here.
pub fn open(name: &str, arch: GuestArch) -> Result<Box<dyn Accelerator>, String> {
    open_with(&Accel { name: name.to_owned(), options: Vec::new() }, arch)
}

/// The one that was asked for, if it can run the guest with its options.
fn open_with(wanted: &Accel, arch: GuestArch) -> Result<Box<dyn Accelerator>, String> {
    let accel: Box<dyn Accelerator> = match wanted.name.as_str() {
        "tcg" => Box::new(TcgAccelerator),
        "null" => Box::new(NullAccelerator),
        "kvm" => Box::new(KvmAccelerator),
        _ => return Err("there is no such accelerator; use tcg".into()),
    };
    accel.probe_with(arch, &wanted.options.iter().cloned().collect()).map_err(|e| e.to_string())?;
    Ok(accel)
}
