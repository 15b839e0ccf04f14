//! Options of `-accel kvm,…`.

use mimus_core::accel::{AccelError, IrqChipMode};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Name of the accelerator.
pub const NAME: &str = "kvm";

/// Bytes of an entry of a dirty ring.
pub const RING_ENTRY: u64 = 16;

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmOptions {
    /// The device node.
    pub device: PathBuf,
    /// Who runs the interrupt controllers; `None`: the board's choice, and the kernel without one.
    pub irqchip: Option<IrqChipMode>,
    /// Entries of each vCPU's dirty ring, a power of two; 0: a bitmap per slot.
    pub dirty_ring: u32,
    /// How long the kernel polls before a halted vCPU's thread sleeps; `None`: the host's default.
    pub halt_poll_ns: Option<u32>,
    /// Whether waiting guests keep their processor of the host (`HLT`, `MWAIT` and `PAUSE` do not exit).
    pub cpu_pm: bool,
    /// Whether PIT ticks that could not be delivered are delivered later.
    pub pit_reinject: bool,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self {
            device: PathBuf::from("/dev/kvm"),
            irqchip: None,
            dirty_ring: 0,
            halt_poll_ns: None,
            cpu_pm: false,
            pit_reinject: true,
        }
    }
}

const KNOWN: &str = "kernel-irqchip, dirty-ring-size, halt-poll-ns, cpu-pm, pit-reinject, device";

fn wrong(option: &str, reason: String) -> AccelError {
    AccelError::Option { accel: NAME, option: option.to_owned(), reason }
}

fn on_off(option: &str, value: &str) -> Result<bool, AccelError> {
    match value {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => Err(wrong(option, format!("{value:?} is not understood: use on or off"))),
    }
}

impl KvmOptions {
    /// Reads the `key=value` pairs; hyphens and underscores are the same.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Self, AccelError> {
        let mut out = Self::default();
        for (key, value) in options {
            match key.replace('_', "-").as_str() {
                "device" => out.device = PathBuf::from(value),
                "kernel-irqchip" => {
                    out.irqchip = Some(match value.as_str() {
                        "on" => IrqChipMode::Kernel,
                        "split" => IrqChipMode::Split,
                        "off" => IrqChipMode::User,
                        _ => {
                            let reason = format!("{value:?} is not understood: use on, split or off");
                            return Err(wrong(key, reason));
                        }
                    });
                }
                "dirty-ring-size" => {
                    let entries: Option<u32> = value.parse().ok();
                    let fits = |n: &u32| *n == 0 || n.is_power_of_two() && (256..=65536).contains(n);
                    out.dirty_ring = entries.filter(fits).ok_or_else(|| {
                        let expected = "use a power of two from 256 to 65536, or 0 for none";
                        wrong(key, format!("{value:?} is not a number of entries: {expected}"))
                    })?;
                }
                "halt-poll-ns" => {
                    let ns = value.parse().ok().filter(|ns| *ns <= 1_000_000_000);
                    let reason = || format!("{value:?} is not a time: use 0 to 1000000000 (nanoseconds)");
                    out.halt_poll_ns = Some(ns.ok_or_else(|| wrong(key, reason()))?);
                }
                "cpu-pm" => out.cpu_pm = on_off(key, value)?,
                "pit-reinject" => out.pit_reinject = on_off(key, value)?,
                _ => return Err(wrong(key, format!("there is no such option; there are {KNOWN}"))),
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<KvmOptions, String> {
        let pairs = text.split(',').filter_map(|p| p.split_once('='));
        let map = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        KvmOptions::parse(&map).map_err(|e| e.to_string())
    }

    #[test]
    fn all_options() {
        assert_eq!(parse(""), Ok(KvmOptions::default()));
        let o = parse("kernel_irqchip=split,dirty-ring-size=4096,halt-poll-ns=0,pit-reinject=off").unwrap();
        assert_eq!(o.irqchip, Some(IrqChipMode::Split));
        assert_eq!((o.dirty_ring, o.halt_poll_ns, o.pit_reinject), (4096, Some(0), false));
    }

    #[test]
    fn mistakes_are_explained() {
        assert!(parse("tb-size=1").unwrap_err().contains("there are kernel-irqchip"));
        assert!(parse("kernel-irqchip=maybe").unwrap_err().contains("on, split or off"));
        assert!(parse("dirty-ring-size=1000").unwrap_err().contains("power of two"));
        assert!(parse("halt-poll-ns=-1").unwrap_err().contains("nanoseconds"));
        assert!(parse("pit-reinject=1").unwrap_err().contains("on or off"));
        assert!(parse("cpu-pm=on").unwrap().cpu_pm && parse("cpu-pm=x").unwrap_err().contains("on or off"));
    }
}
