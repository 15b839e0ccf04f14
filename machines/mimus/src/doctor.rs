//! `mimus doctor`: what works on this host, and what to do about what does not.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use mimus_core::arch::GuestArch;
use mimus_machines::boards;
use mimus_machines::boot::{SUPPORTED_GUESTS, human};
use mimus_machines::guests::{self, GuestSpec};
use mimus_machines::x86::rom;

use crate::{accels, host, system};

const USAGE: &str = "\
usage: mimus doctor

Looks at this machine and says which guests run here and how fast, what of the host's
virtualisation (KVM) can be used, and which firmware and ready-made guests are at hand.
Nothing is changed.
";

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Good,
    Note,
    Bad,
}

/// What is printed.
#[derive(Default)]
struct Report(String);

impl Report {
    fn heading(&mut self, text: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        self.0.push_str(&format!("{gap}{text}\n"));
    }

    fn line(&mut self, mark: Mark, text: &str) {
        let mark = match mark {
            Mark::Good => "  ok   ",
            Mark::Note => "  -    ",
            Mark::Bad => "  NO   ",
        };
        self.0.push_str(&format!("{mark}{text}\n"));
    }
}

/// Runs `mimus doctor`. It succeeds if anything can be run.
pub fn main(words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    if let Some(word) = words.first() {
        if word == "-help" || word == "--help" || word == "-h" {
            print!("{USAGE}");
            return Ok(ExitCode::SUCCESS);
        }
        anyhow::bail!("doctor {}: it takes no words", word.to_string_lossy());
    }
    let mut report = Report::default();
    machine(&mut report);
    virtualisation(&mut report);
    let any = guests_here(&mut report);
    files(&mut report);
    print!("{}", report.0);
    Ok(if any { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn machine(r: &mut Report) {
    r.heading(&system::version());
    let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "of unknown release".into());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let model = read("/proc/cpuinfo").and_then(|t| cpu_model(&t).map(str::to_owned));
    let model = model.map_or(String::new(), |m| format!(", {m}"));
    r.line(Mark::Good, &format!("{} host, Linux {kernel}, {cpus} CPUs{model}", std::env::consts::ARCH));
    match host::memory() {
        Some((total, available)) => {
            let mark = if available < 256 << 20 { Mark::Bad } else { Mark::Good };
            r.line(mark, &format!("{} of memory, {} available", human(total), human(available)));
        }
        None => r.line(Mark::Note, "how much memory there is cannot be found out (/proc/meminfo)"),
    }
}

fn cpu_model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

fn cpu_flags(cpuinfo: &str) -> Vec<&str> {
    let line = cpuinfo.lines().find(|l| l.starts_with("flags"));
    line.and_then(|l| l.split_once(':')).map_or_else(Vec::new, |(_, f)| f.split_whitespace().collect())
}

fn virtualisation(r: &mut Report) {
    r.heading("Virtualisation of the host (-accel kvm)");
    hardware(r);
    device(r);
    #[cfg(target_arch = "x86_64")]
    abilities(r);
}

/// The processor's flags and the module that uses them.
fn hardware(r: &mut Report) {
    let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu_flags(&cpuinfo);
    let inside = if flags.contains(&"hypervisor") { "; this host is itself a virtual machine" } else { "" };
    match ["vmx", "svm"].into_iter().find(|f| flags.contains(f)) {
        Some(flag) => r.line(Mark::Good, &format!("the processor virtualises ({flag}){inside}")),
        None if std::env::consts::ARCH == "x86_64" => {
            let advice = if inside.is_empty() {
                ": turn it on in the firmware setup (Intel VT-x, AMD-V)"
            } else {
                ": its host would have to allow nested virtualisation"
            };
            r.line(Mark::Note, &format!("the processor shows no virtualisation (vmx, svm){inside}{advice}"));
        }
        None => {}
    }
    let modules: Vec<_> = ["kvm_intel", "kvm_amd"].into_iter().filter(|m| module(m).exists()).collect();
    for name in &modules {
        let nested = read(&format!("/sys/module/{name}/parameters/nested"));
        let nested = match nested.as_deref() {
            Some("Y" | "1") => "virtual machines inside guests are allowed",
            Some(_) => "virtual machines inside guests are not allowed",
            None => "whether guests may have virtual machines is unknown",
        };
        r.line(Mark::Good, &format!("module {name} is loaded; {nested}"));
    }
    if modules.is_empty() && module("kvm").exists() {
        r.line(Mark::Note, "KVM is there, with neither kvm_intel nor kvm_amd behind it");
    }
}

fn module(name: &str) -> std::path::PathBuf {
    Path::new("/sys/module").join(name)
}

/// The device node, as this user sees it.
fn device(r: &mut Report) {
    let arch = SUPPORTED_GUESTS.iter().filter_map(|g| arch(g)).find(|a| accels::runs_directly(*a));
    let Some(arch) = arch else {
        return r.line(Mark::Note, "no guest of this program has the host's architecture");
    };
    match accels::open("kvm", arch) {
        Ok(_) => r.line(Mark::Good, "/dev/kvm can be used"),
        Err(why) => r.line(Mark::Bad, &why),
    }
}

#[cfg(target_arch = "x86_64")]
fn abilities(r: &mut Report) {
    let Ok(a) = mimus_accel_kvm::Abilities::of_host() else { return };
    let counts = format!(
        "interface {}, up to {} vCPUs ({} recommended), {} memory slots",
        a.version, a.max_vcpus, a.recommended_vcpus, a.memory_slots
    );
    r.line(Mark::Good, &counts);
    for (what, there) in &a.list {
        r.line(
            if *there { Mark::Good } else { Mark::Note },
            &format!("{}{what}", if *there { "" } else { "without " }),
        );
    }
    match mimus_accel_kvm::Quirks::of_host() {
        Ok(q) if q.emulated_cpl0 => r.line(
            Mark::Bad,
            "it interprets system software instruction by instruction (no hardware behind it): some 100 times \
             slower than it should be, and what it lacks the translator executes for it; use -accel tcg for whole \
             systems (it is what you get without -accel, and with -accel kvm -accel tcg)",
        ),
        Ok(_) => r.line(Mark::Good, "system software runs on the processor itself"),
        Err(e) => r.line(Mark::Bad, &format!("a trial run failed: {e}")),
    }
    if let Ok(q) = mimus_accel_kvm::Quirks::of_host() {
        let names = q.names();
        if !names.is_empty() {
            r.line(Mark::Note, &format!("differs from a processor in: {}", names.join(", ")));
        }
    }
}

fn arch(guest: &str) -> Option<GuestArch> {
    GuestArch::ALL.into_iter().find(|a| a.name() == guest)
}

/// Who runs each guest; true if any is run.
fn guests_here(r: &mut Report) -> bool {
    r.heading("Guests (mimus system GUEST)");
    let mut any = false;
    for guest in SUPPORTED_GUESTS {
        let Some(arch) = arch(guest) else { continue };
        let boards: Vec<&str> = boards::of(arch).map(|b| b.name).collect();
        let mut how = Vec::new();
        if accels::open("tcg", arch).is_ok() {
            how.push("translated (tcg)");
        }
        if accels::runs_directly(arch) && accels::open("kvm", arch).is_ok() {
            how.push(if accels::kvm_interprets() { "interpreted (kvm)" } else { "directly (kvm)" });
        }
        any |= !how.is_empty();
        let (mark, how) = match how.is_empty() {
            true => (Mark::Bad, "nothing here runs it".to_owned()),
            false => (Mark::Good, how.join(", ")),
        };
        r.line(mark, &format!("{guest}: {how}; boards {}", boards.join(", ")));
    }
    any
}

/// Firmware and ready-made guests.
fn files(r: &mut Report) {
    r.heading("Firmware and ready-made guests");
    match rom::find_bios(&[], rom::PC_BIOS) {
        Some(path) => r.line(Mark::Good, &format!("BIOS of PCs: {}", path.display())),
        None => {
            r.line(Mark::Note, "no BIOS for PCs: install the package seabios (a kernel starts without it: -kernel)")
        }
    }
    let Ok(cache) = guests::cache_dir() else {
        return r.line(Mark::Bad, "there is no place for ready-made guests: set HOME or XDG_CACHE_HOME");
    };
    let all: [&GuestSpec; 4] =
        [&guests::RISCV64, &guests::x86::X86_64_KERNEL, &guests::x86::X86_64_BUSYBOX, &guests::x86::SEABIOS];
    let there: Vec<&str> = all.iter().filter(|s| guests::installed(s, &cache).is_some()).map(|s| s.name).collect();
    let text = if there.is_empty() { "none yet".to_owned() } else { there.join(", ") };
    r.line(Mark::Note, &format!("in {}: {text}", cache.display()));
    let apt = ["apt-get", "dpkg-deb"].into_iter().all(on_path);
    match apt {
        true => r.line(Mark::Good, "apt and dpkg are here: mimus try fetches guests"),
        false => r.line(Mark::Note, "no apt and dpkg: guests cannot be fetched, give kernels of your own"),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| d.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuinfo() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 1 GHz\nflags\t\t: fpu vmx hypervisor\n";
        assert_eq!(cpu_model(text), Some("A CPU @ 1 GHz"));
        assert_eq!(cpu_flags(text), ["fpu", "vmx", "hypervisor"]);
        assert!(cpu_flags("").is_empty());
    }

    #[test]
    fn the_report_has_marks() {
        let mut r = Report::default();
        r.heading("A");
        r.line(Mark::Good, "x");
        r.heading("B");
        r.line(Mark::Bad, "y");
        assert_eq!(r.0, "A\n  ok   x\n\nB\n  NO   y\n");
    }
}
