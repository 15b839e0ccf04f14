//! What tests and benchmarks boot, in the same cache as `mimus try`.

use std::path::{Path, PathBuf};

use mimus_machines::guests::{self, GuestSpec, Progress, firmware, init, userland, x86};

struct Lines;

impl Progress for Lines {
    fn step(&self, text: &str) {
        println!("  {text}");
    }

    fn download(&self, _done: u64, _total: u64) {}
}

/// What a benchmark boots.
pub struct Bench {
    /// Kernel.
    pub kernel: PathBuf,
    /// Initrd of busybox, the timed phases and programs.
    pub initrd: PathBuf,
    /// The busybox in it.
    pub busybox: PathBuf,
    /// The script of the phases in it.
    pub phases: PathBuf,
    /// The unpacked programs of a distribution, for jobs.
    pub userland: Option<PathBuf>,
}

/// Fetches a distribution's programs for a guest: unpacked, and as an archive.
pub fn userland(arch: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
    let spec = match arch {
        "x86_64" => &userland::X86_64,
        "i386" => &userland::I386,
        _ => &userland::RISCV64,
    };
    println!("{}:", spec.name);
    Ok(userland::ensure(spec, &guests::cache_dir()?, &Lines)?)
}

/// Fetches what the benchmark of a guest boots.
pub fn bench(arch: &str, programs: Option<&Path>) -> anyhow::Result<Bench> {
    let (kernel, file, busybox) = match arch {
        "x86_64" => (&x86::X86_64_KERNEL, "vmlinuz", &x86::X86_64_BUSYBOX),
        "i386" => (&x86::I386_KERNEL, "vmlinuz", &x86::I386_BUSYBOX),
        _ => (&guests::RISCV64, "linux", &guests::RISCV64_BUSYBOX),
    };
    let kernel = ensure(kernel)?.join(file);
    let dir = ensure(busybox)?;
    let busybox = dir.join("busybox");
    let initrd = init::bench_initrd(&dir, &busybox, programs)?;
    let phases = dir.join("bench-phases.sh");
    guests::write_atomically(&phases, init::BENCH_PHASES)?;
    Ok(Bench { kernel, initrd, busybox, phases, userland: None })
}

/// Fetches everything.
pub fn fetch() -> anyhow::Result<()> {
    let dir = ensure(&guests::RISCV64)?;
    init::shell_initrd(&dir)?;
    let others = [
        &guests::RISCV64_BUSYBOX,
        &guests::RISCV64_KERNEL,
        &guests::RISCV64_FIRMWARE,
        &x86::X86_64_KERNEL,
        &x86::X86_64_GENERIC,
        &x86::X86_64_SATA,
        &x86::X86_64_BUSYBOX,
        &x86::I386_KERNEL,
        &x86::I386_PAE,
        &x86::I386_BUSYBOX,
        &x86::SEABIOS,
        &firmware::OVMF,
        &firmware::GRUB_PC,
        &firmware::GRUB_EFI,
        &firmware::MEMTEST,
    ];
    for spec in others {
        ensure(spec)?;
    }
    Ok(())
}

fn ensure(spec: &GuestSpec) -> anyhow::Result<PathBuf> {
    let cache = guests::cache_dir()?;
    if guests::installed(spec, &cache).is_none() {
        println!("{}:", spec.name);
    }
    let dir = guests::ensure(spec, &cache, &Lines)?;
    println!("{} is in {}", spec.name, dir.display());
    Ok(dir)
}
