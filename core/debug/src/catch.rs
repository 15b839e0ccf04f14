//! `catch`: what it takes, and what is said when something was caught.

use mimus_arch::CpuState;
use mimus_arch::riscv::csr;
use mimus_core::accel::catch::*;
use mimus_core::accel::{Catch, Caught, SystemRegister, WatchKind};

/// What `catch` takes.
pub const USAGE: &str = "catch exception [N], interrupt [N], csr|msr|cr REGISTER [r|w|rw], port|device FIRST[-LAST] \
                         [r|w|rw], mode [NAME] or process [ROOT]";

/// x86's model-specific registers that have short names.
const MSRS: [(&str, u32); 18] = [
    ("tsc", 0x10),
    ("apic_base", 0x1b),
    ("sysenter_cs", 0x174),
    ("sysenter_esp", 0x175),
    ("sysenter_eip", 0x176),
    ("misc_enable", 0x1a0),
    ("debugctl", 0x1d9),
    ("pat", 0x277),
    ("tsc_deadline", 0x6e0),
    ("efer", 0xc000_0080),
    ("star", 0xc000_0081),
    ("lstar", 0xc000_0082),
    ("cstar", 0xc000_0083),
    ("fmask", 0xc000_0084),
    ("fs_base", 0xc000_0100),
    ("gs_base", 0xc000_0101),
    ("kernel_gs_base", 0xc000_0102),
    ("tsc_aux", 0xc000_0103),
];

/// Modes by name: what of a mode's number counts, and what it is.
const RISCV_MODES: [(&str, u32, u32); 3] = [("user", 3, 0), ("supervisor", 3, 1), ("machine", 3, 3)];
const X86_MODES: [(&str, u32, u32); 8] = [
    ("user", 3, 3),
    ("kernel", 3, 0),
    ("real", MODE_KIND, MODE_REAL),
    ("v86", MODE_KIND, MODE_V86),
    ("protected", MODE_KIND, MODE_PROTECTED),
    ("compatibility", MODE_KIND, MODE_COMPATIBILITY),
    ("long", MODE_KIND, MODE_LONG),
    ("smm", MODE_SMM, MODE_SMM),
];

/// The value of an expression, or why it has none.
pub type Number<'a> = &'a dyn Fn(&str) -> Result<u64, String>;

/// Parses what stands behind `catch`, without its condition.
///
/// # Errors
/// What is wrong, in one line.
pub fn parse(text: &str, cpu: &CpuState, number: Number<'_>) -> Result<Catch, String> {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    let kind = match words.last() {
        Some(&"r") => WatchKind::Read,
        Some(&"w") => WatchKind::Write,
        _ => WatchKind::ReadWrite,
    };
    let accesses = matches!(words.first(), Some(&("csr" | "msr" | "cr" | "port" | "device" | "mmio")));
    if accesses && matches!(words.last(), Some(&("r" | "w" | "rw"))) {
        words.pop();
    }
    let what = words.first().copied().ok_or(USAGE)?;
    let rest = words[1..].join(" ");
    let given = (!rest.is_empty()).then_some(rest.as_str());
    let needed = || given.ok_or_else(|| format!("catch {what}: which? {USAGE}"));
    Ok(match what {
        "exception" => Catch::Exception(given.map(number).transpose()?),
        "interrupt" => Catch::Interrupt(given.map(number).transpose()?),
        "csr" | "msr" | "cr" => Catch::Register { register: register(what, needed()?, number)?, kind },
        "port" => {
            let (first, last) = range(needed()?, number)?;
            let port = |n: u64| u16::try_from(n).map_err(|_| format!("{n:#x} is no port: they go up to 0xffff"));
            Catch::Port { first: port(first)?, last: port(last)?, kind }
        }
        "device" | "mmio" => {
            let (first, last) = range(needed()?, number)?;
            Catch::Device { first, last, kind }
        }
        "mode" => {
            let (mask, value) = given.map_or(Ok((0, 0)), |name| mode(name, cpu))?;
            Catch::Mode { mask, value }
        }
        "process" | "space" => Catch::Space(given.map(number).transpose()?),
        _ => return Err(format!("catch {what}: there is no such event; {USAGE}")),
    })
}

/// FIRST-LAST or one.
fn range(text: &str, number: Number<'_>) -> Result<(u64, u64), String> {
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first.trim())?, number(last.trim())?),
        None => {
            let n = number(text)?;
            (n, n)
        }
    };
    if first > last { Err(format!("{text}: the last is before the first")) } else { Ok((first, last)) }
}

fn register(what: &str, text: &str, number: Number<'_>) -> Result<SystemRegister, String> {
    // A mistyped name is no number, nor a symbol.
    let named = |of: Option<u64>| of.map_or_else(|| number(text).map_err(|_| no_register(what, text)), Ok);
    let lower = text.to_lowercase();
    Ok(match what {
        "csr" => {
            let n = named(csr::by_name(&lower).map(u64::from))?;
            SystemRegister::Csr(u16::try_from(n).ok().filter(|n| *n < 4096).ok_or("CSRs are below 0x1000")?)
        }
        "msr" => {
            let known = MSRS.iter().find(|(name, _)| *name == lower).map(|(_, n)| u64::from(*n));
            SystemRegister::Msr(u32::try_from(named(known)?).map_err(|_| format!("{text}: MSRs have 32 bits"))?)
        }
        _ => {
            let n = lower.strip_prefix("cr").and_then(|n| n.parse().ok());
            SystemRegister::Control(u8::try_from(named(n)?).map_err(|_| format!("{text} is no control register"))?)
        }
    })
}

fn no_register(what: &str, text: &str) -> String {
    let names: Vec<&str> = match what {
        "csr" => csr::CSRS.iter().map(|(_, name)| *name).collect(),
        "msr" => msr_names().collect(),
        _ => vec!["0", "2", "3", "4", "8"],
    };
    let lower = text.to_lowercase();
    let near = names.into_iter().map(|n| (strsim::damerau_levenshtein(n, &lower), n)).filter(|(d, _)| *d <= 2).min();
    let what = what.to_uppercase();
    match near {
        Some((_, near)) if what != "CR" => format!("there is no {what} {text}; did you mean {near}?"),
        _ => format!("there is no {what} {text}; Tab lists the names, and numbers will do"),
    }
}

fn modes(cpu: &CpuState) -> &'static [(&'static str, u32, u32)] {
    if matches!(cpu, CpuState::X86(_)) { &X86_MODES } else { &RISCV_MODES }
}

fn mode(name: &str, cpu: &CpuState) -> Result<(u32, u32), String> {
    let found = modes(cpu).iter().find(|m| m.0 == name);
    found.map(|m| (m.1, m.2)).ok_or_else(|| {
        let names: Vec<&str> = modes(cpu).iter().map(|m| m.0).collect();
        format!("{name} is no mode; there are {}", names.join(", "))
    })
}

/// Names of modes.
pub fn mode_names(cpu: &CpuState) -> impl Iterator<Item = &'static str> {
    modes(cpu).iter().map(|m| m.0)
}

/// Model-specific registers that have short names.
pub fn msr_names() -> impl Iterator<Item = &'static str> {
    MSRS.iter().map(|m| m.0)
}

/// A mode in words.
fn mode_name(number: u32, cpu: &CpuState) -> String {
    if !matches!(cpu, CpuState::X86(_)) {
        return RISCV_MODES.iter().find(|m| m.2 == number).map_or("?", |m| m.0).to_owned();
    }
    let kind = X86_MODES.iter().find(|m| m.1 == MODE_KIND && m.2 == number & MODE_KIND).map_or("?", |m| m.0);
    format!("{kind} CPL {}{}", number & 3, if number & MODE_SMM != 0 { " SMM" } else { "" })
}

/// A system register's name.
fn register_name(register: SystemRegister) -> String {
    match register {
        SystemRegister::Csr(n) => csr::name(n).map_or_else(|| format!("CSR {n:#x}"), str::to_owned),
        SystemRegister::Msr(n) => {
            let known = MSRS.iter().find(|m| m.1 == n);
            known.map_or_else(|| format!("MSR {n:#x}"), |m| format!("MSR {n:#x} ({})", m.0))
        }
        SystemRegister::Control(n) => format!("CR{n}"),
    }
}

/// What was caught, in words.
pub fn describe(caught: &Caught, cpu: &CpuState) -> String {
    let access = |what: String, writes: bool, value: u64| {
        if writes { format!("{what} was written: {value:#x}") } else { format!("{what} was read: {value:#x}") }
    };
    match *caught {
        Caught::Exception { interrupt, cause, pc, value } => {
            let what = if interrupt { "interrupt" } else { "exception" };
            let more = if interrupt { String::new() } else { format!(", value {value:#x}") };
            format!("{what} {cause} at {pc:#x}{more}")
        }
        Caught::Register { register, writes, value } => access(register_name(register), writes, value),
        Caught::Port { port, writes, value } => access(format!("port {port:#x}"), writes, value),
        Caught::Device { pa, writes, value } => access(format!("the device at {pa:#x}"), writes, value),
        Caught::Mode { from, to } => format!("from mode {} to {}", mode_name(from, cpu), mode_name(to, cpu)),
        Caught::Space { from, to } => format!("from address space {from:#x} to {to:#x}"),
    }
}

/// What conditions call by name: `$_value`, `$_address`, `$_cause`.
pub fn variable(caught: &Caught, name: &str) -> Option<u64> {
    let (address, value) = match *caught {
        Caught::Exception { cause, pc, value, .. } => {
            if name == "_cause" {
                return Some(cause);
            }
            (pc, value)
        }
        Caught::Register { register, value, .. } => {
            let number = match register {
                SystemRegister::Csr(n) => n.into(),
                SystemRegister::Msr(n) => n.into(),
                SystemRegister::Control(n) => n.into(),
            };
            (number, value)
        }
        Caught::Port { port, value, .. } => (port.into(), value),
        Caught::Device { pa, value, .. } => (pa, value),
        Caught::Mode { from, to } => (from.into(), to.into()),
        Caught::Space { from, to } => (from, to),
    };
    match name {
        "_value" => Some(value),
        "_address" => Some(address),
        _ => None,
    }
}

/// Whether a name is one of [`variable`].
pub fn is_variable(name: &str) -> bool {
    matches!(name, "_value" | "_address" | "_cause")
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_arch::riscv::RiscvState;
    use mimus_arch::x86::X86State;

    fn number(text: &str) -> Result<u64, String> {
        let hex = text.strip_prefix("0x").map(|h| u64::from_str_radix(h, 16));
        hex.unwrap_or_else(|| text.parse()).map_err(|_| format!("{text} is not a number"))
    }

    #[test]
    fn what_it_takes() {
        let riscv = CpuState::Riscv(Box::new(RiscvState::new(0, 0, 0)));
        let x86 = CpuState::X86(Box::new(X86State::reset(true)));
        let of = |text: &str| parse(text, &riscv, &number);
        assert_eq!(of("exception"), Ok(Catch::Exception(None)));
        assert_eq!(of("interrupt 7"), Ok(Catch::Interrupt(Some(7))));
        let register = SystemRegister::Csr(0x180);
        assert_eq!(of("csr satp w"), Ok(Catch::Register { register, kind: WatchKind::Write }));
        assert_eq!(of("csr 0x180"), Ok(Catch::Register { register, kind: WatchKind::ReadWrite }));
        let device = Catch::Device { first: 0x1000_0000, last: 0x1000_00ff, kind: WatchKind::Read };
        assert_eq!(of("device 0x10000000-0x100000ff r"), Ok(device));
        assert_eq!(of("mode user"), Ok(Catch::Mode { mask: 3, value: 0 }));
        assert_eq!(of("process"), Ok(Catch::Space(None)));
        let x = |text: &str| parse(text, &x86, &number);
        let lstar = Catch::Register { register: SystemRegister::Msr(0xc000_0082), kind: WatchKind::ReadWrite };
        assert_eq!(x("msr LSTAR rw"), Ok(lstar));
        let cr3 = Catch::Register { register: SystemRegister::Control(3), kind: WatchKind::Write };
        assert_eq!((x("cr CR3 w"), x("cr 3 w")), (Ok(cr3), Ok(cr3)));
        assert_eq!(x("port 0x3f8"), Ok(Catch::Port { first: 0x3f8, last: 0x3f8, kind: WatchKind::ReadWrite }));
        assert_eq!(x("mode long"), Ok(Catch::Mode { mask: MODE_KIND, value: MODE_LONG }));
        for (text, says) in [
            ("", "catch exception"),
            ("port", "which?"),
            ("port 0x10000", "no port"),
            ("port 5-4", "before"),
            ("mode real", "user, supervisor, machine"),
            ("csr nonsense", "there is no CSR nonsense"),
            ("csr mcuase", "did you mean mcause?"),
            ("csr 0x1000", "below"),
            ("lightning", "no such event"),
        ] {
            assert!(of(text).unwrap_err().contains(says), "{text}: {:?}", of(text));
        }
    }

    #[test]
    fn in_words() {
        let x86 = CpuState::X86(Box::new(X86State::reset(true)));
        let mode = Caught::Mode { from: MODE_PROTECTED, to: MODE_LONG | MODE_SMM };
        assert_eq!(describe(&mode, &x86), "from mode protected CPL 0 to long CPL 0 SMM");
        let port = Caught::Port { port: 0x3f8, writes: true, value: 65 };
        assert_eq!(describe(&port, &x86), "port 0x3f8 was written: 0x41");
        assert_eq!((variable(&port, "_value"), variable(&port, "_address")), (Some(65), Some(0x3f8)));
        let msr = Caught::Register { register: SystemRegister::Msr(0xc000_0080), writes: false, value: 1 };
        assert_eq!(describe(&msr, &x86), "MSR 0xc0000080 (efer) was read: 0x1");
    }
}
