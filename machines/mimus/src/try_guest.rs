//! `mimus try <guest>`: a ready-made Linux at a shell, with nothing to prepare.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use mimus_machines::guests::{self, GuestSpec, Progress, init};

use crate::system;

const USAGE: &str = "\
usage: mimus try <guest> [options]

Fetches Debian's kernel and installer through this machine's own package sources into
the cache (once), and boots it to a shell with the network up. Leave with Ctrl-A x.
Options are those of `mimus system`, for example -smp 4 or -m 1G.

guests: riscv64
  --fetch-only    only fetch
";

/// Runs `mimus try …`.
pub fn main(words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let mut words = words.into_iter();
    let guest = words.next().map(|w| w.to_string_lossy().into_owned());
    let spec = match guest.as_deref() {
        Some("riscv64") => &guests::RISCV64,
        Some("-help" | "--help" | "help" | "-h") => {
            print!("{USAGE}");
            return Ok(ExitCode::SUCCESS);
        }
        Some(other) => anyhow::bail!("try {other}: there is no such guest; there is riscv64"),
        None => anyhow::bail!("try: the guest is missing: mimus try riscv64"),
    };
    let mut extra: Vec<OsString> = words.collect();
    let fetch_only = extra.iter().any(|w| w == "--fetch-only");
    extra.retain(|w| w != "--fetch-only");
    if extra.iter().any(|w| w == "-help" || w == "--help") {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    let (kernel, initrd) = fetch(spec)?;
    if fetch_only {
        println!("kernel {}\ninitrd {}", kernel.to_string_lossy(), initrd.to_string_lossy());
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("Booting Debian 13 (riscv64). Leave with Ctrl-A x; Ctrl-A h for help.");
    // What comes later on a command line wins, so the user's options follow ours.
    let mut line: Vec<OsString> =
        ["-M", "virt", "-m", "512M", "-nographic", "-no-reboot"].iter().map(Into::into).collect();
    line.extend(["-kernel".into(), kernel, "-initrd".into(), initrd, "-append".into(), init::SHELL_APPEND.into()]);
    if !extra.iter().any(|w| matches!(w.to_str(), Some("-nic" | "--nic" | "-netdev" | "--netdev"))) {
        line.extend(["-netdev", "user,id=net0", "-device", "virtio-net-device,netdev=net0"].iter().map(OsString::from));
    }
    line.extend(extra);
    system::main("riscv64", line)
}

fn fetch(spec: &GuestSpec) -> anyhow::Result<(OsString, OsString)> {
    let cache = guests::cache_dir()?;
    let dir = match guests::installed(spec, &cache) {
        Some(dir) => dir,
        None => {
            eprintln!("Fetching {} through this machine's package sources into {} (once).", spec.name, cache.display());
            let bar = Bar::new();
            let dir = guests::ensure(spec, &cache, &bar);
            bar.0.finish_and_clear();
            dir?
        }
    };
    Ok((dir.join("linux").into(), init::shell_initrd(&dir)?.into()))
}

/// Progress on a terminal; lines where there is none.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));
        Bar(bar)
    }
}

impl Progress for Bar {
    fn step(&self, text: &str) {
        if self.0.is_hidden() {
            eprintln!("{text}");
        }
        self.0.set_message(text.to_owned());
    }

    fn download(&self, done: u64, total: u64) {
        if self.0.length() != Some(total) {
            self.0.set_length(total);
            if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {eta}") {
                self.0.set_style(style.progress_chars("=> "));
            }
        }
        self.0.set_position(done.min(total));
    }
}
