//! What tests and benchmarks boot, in the same cache as `mimus try`.

use std::path::PathBuf;

use mimus_machines::guests::{self, GuestSpec, Progress, init};

struct Lines;

impl Progress for Lines {
    fn step(&self, text: &str) {
        println!("  {text}");
    }

    fn download(&self, _done: u64, _total: u64) {}
}

/// Kernel and initrd of the riscv64 benchmark.
pub struct Bench {
    /// Kernel.
    pub kernel: PathBuf,
    /// Initrd of busybox and the timed phases.
    pub initrd: PathBuf,
}

/// Fetches what the riscv64 benchmark boots.
pub fn bench() -> anyhow::Result<Bench> {
    let kernel = ensure(&guests::RISCV64)?;
    let busybox = ensure(&guests::RISCV64_BUSYBOX)?;
    let initrd = init::bench_initrd(&busybox, &busybox.join("busybox"))?;
    Ok(Bench { kernel: kernel.join("linux"), initrd })
}

/// Fetches everything.
pub fn fetch() -> anyhow::Result<()> {
    bench()?;
    let dir = ensure(&guests::RISCV64)?;
    init::shell_initrd(&dir)?;
    ensure(&guests::RISCV64_FIRMWARE)?;
    for spec in [&guests::x86::X86_64_KERNEL, &guests::x86::X86_64_BUSYBOX, &guests::x86::SEABIOS] {
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
