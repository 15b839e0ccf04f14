//! `mimus try <guest>`: a ready-made Linux at a shell, with nothing to prepare.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use mimus_machines::config::keyval::nearest;
use mimus_machines::guests::{self, GuestSpec, Progress, init, x86};

use crate::system;

const USAGE: &str = "\
usage: mimus try <guest> [options]

Fetches Debian's kernel and a userland through this machine's own package sources into
the cache (once), and boots it to a shell with the network up. Leave with Ctrl-A x.
Options are those of `mimus system`, for example -smp 4 or -m 1G.

guests: riscv64, x86_64, i386
  --fetch-only    only fetch
";

/// A ready-made guest.
struct Guest {
    name: &'static str,
    /// What it is, for the user.
    what: &'static str,
    /// Board and network device.
    board: &'static str,
    network: &'static str,
    /// Fetches kernel and initrd.
    fetch: fn() -> anyhow::Result<(PathBuf, PathBuf)>,
}

const GUESTS: [Guest; 3] = [
    Guest {
        name: "riscv64",
        what: "Debian 13 (riscv64)",
        board: "virt",
        network: "virtio-net-device,netdev=net0",
        fetch: || {
            let dir = fetch(&guests::RISCV64)?;
            Ok((dir.join("linux"), init::shell_initrd(&dir)?))
        },
    },
    Guest {
        name: "x86_64",
        what: "Debian 12's kernel and busybox (x86_64)",
        board: "q35",
        network: "virtio-net-pci,netdev=net0",
        fetch: || pc(&x86::X86_64_KERNEL, &x86::X86_64_BUSYBOX),
    },
    Guest {
        name: "i386",
        what: "Debian 12's kernel and busybox (i386)",
        board: "q35",
        network: "virtio-net-pci,netdev=net0",
        fetch: || pc(&x86::I386_PAE, &x86::I386_BUSYBOX),
    },
];

/// Runs `mimus try …`.
pub fn main(words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let mut words = words.into_iter();
    let names: Vec<&str> = GUESTS.iter().map(|g| g.name).collect();
    let Some(name) = words.next().map(|w| w.to_string_lossy().into_owned()) else {
        anyhow::bail!("try: the guest is missing: mimus try {}", names.join("|"));
    };
    if matches!(name.as_str(), "-help" | "--help" | "help" | "-h") {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    let Some(guest) = GUESTS.iter().find(|g| g.name == name) else {
        let near = nearest(&name, names.iter().copied()).map_or(String::new(), |n| format!(" (did you mean {n}?)"));
        anyhow::bail!("try {name}: there is no such guest{near}; there are {}", names.join(", "));
    };
    let mut extra: Vec<OsString> = words.collect();
    let fetch_only = extra.iter().any(|w| w == "--fetch-only");
    extra.retain(|w| w != "--fetch-only");
    if extra.iter().any(|w| w == "-help" || w == "--help") {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    let (kernel, initrd) = (guest.fetch)()?;
    if fetch_only {
        println!("kernel {}\ninitrd {}", kernel.display(), initrd.display());
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("Booting {}. Leave with Ctrl-A x; Ctrl-A h for help.", guest.what);
    // What comes later on a command line wins, so the user's options follow ours.
    let mut line: Vec<OsString> =
        ["-M", guest.board, "-m", "512M", "-nographic", "-no-reboot"].iter().map(Into::into).collect();
    line.extend(["-kernel".into(), kernel.into(), "-initrd".into(), initrd.into()]);
    line.extend(["-append".into(), init::SHELL_APPEND.into()]);
    if !extra.iter().any(|w| matches!(w.to_str(), Some("-nic" | "--nic" | "-netdev" | "--netdev"))) {
        line.extend(["-netdev", "user,id=net0", "-device", guest.network].iter().map(OsString::from));
    }
    line.extend(extra);
    system::main(guest.name, line)
}

/// Kernel and initrd of a PC.
fn pc(kernel: &GuestSpec, busybox: &GuestSpec) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (kernel, busybox) = (fetch(kernel)?, fetch(busybox)?);
    let initrd = init::busybox_shell_initrd(&kernel, &busybox.join("busybox"), x86::MODULES)?;
    Ok((kernel.join("vmlinuz"), initrd))
}

fn fetch(spec: &GuestSpec) -> anyhow::Result<PathBuf> {
    let cache = guests::cache_dir()?;
    if let Some(dir) = guests::installed(spec, &cache) {
        return Ok(dir);
    }
    eprintln!("Fetching {} through this machine's package sources into {} (once).", spec.name, cache.display());
    let bar = Bar::new();
    let dir = guests::ensure(spec, &cache, &bar);
    bar.0.finish_and_clear();
    Ok(dir?)
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
