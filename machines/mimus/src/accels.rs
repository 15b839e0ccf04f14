//! Which accelerator runs the guest.

use std::collections::BTreeMap;

use mimus_core::accel::{Accelerator, NullAccelerator};
use mimus_core::arch::GuestArch;
use mimus_machines::config::{Accel, MachineConfig};
use mimus_tcg::TcgAccelerator;

/// An accelerator with its options.
pub struct Choice {
    /// The accelerator.
    pub accel: Box<dyn Accelerator>,
    /// `-accel` options.
    pub options: BTreeMap<String, String>,
}

/// The first of the accelerators asked for that can run the guest here; without any asked
/// for, the best.
pub fn choose(config: &MachineConfig) -> anyhow::Result<Choice> {
    let default = [Accel { name: "tcg".into(), options: Vec::new() }];
    let asked = if config.accels.is_empty() { &default[..] } else { &config.accels };
    let mut reasons = Vec::new();
    for accel in asked {
        match open(&accel.name, &config.guest) {
            Ok(found) => {
                let options = accel.options.iter().cloned().collect();
                return Ok(Choice { accel: found, options });
            }
            Err(reason) => reasons.push(format!("-accel {}: {reason}", accel.name)),
        }
    }
    anyhow::bail!("{}", reasons.join("; "))
}

fn open(name: &str, guest: &str) -> Result<Box<dyn Accelerator>, String> {
    let accel: Box<dyn Accelerator> = match name {
        "tcg" => Box::new(TcgAccelerator),
        "null" => Box::new(NullAccelerator),
        "kvm" => {
            return Err(format!(
                "the host's virtualisation runs guests of the host's architecture ({}) only; use -accel tcg for {guest}",
                std::env::consts::ARCH
            ));
        }
        _ => return Err("there is no such accelerator; use tcg".into()),
    };
    let arch = GuestArch::ALL.into_iter().find(|a| a.name() == guest).ok_or("there is no such guest")?;
    accel.probe(arch).map_err(|e| e.to_string())?;
    Ok(accel)
}
