//! Guest RAM from the host's pool of huge pages, with guest code that runs in it.

use std::sync::Arc;

use iced_x86::code_asm::*;
use mimus_accel_kvm::KvmAccelerator;
use mimus_core::accel::Accelerator;
use mimus_core::arch::GuestArch;
use mimus_machines::config::MemoryBackend;
use mimus_machines::machine::RunEnd;
use mimus_tcg::TcgFallback;

use crate::harness::{Setup, bzimage, skipped};

const ENTRY: u64 = 0x10_0200;
const MEMORY: u64 = 32 << 20;
const PAGE: u64 = 2 << 20;
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Enough free pages in the pool, for as long as this lives.
struct Pool {
    before: Option<String>,
}

fn free_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

impl Pool {
    /// Enlarges the pool if it is too small and that is allowed.
    fn with(pages: u64) -> Result<Self, String> {
        let size = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        if !size.lines().any(|l| l.strip_prefix("Hugepagesize:").is_some_and(|s| s.trim() == "2048 kB")) {
            return Err("the host's huge pages are not of 2 MiB".into());
        }
        let free = free_pages();
        if free >= pages {
            return Ok(Self { before: None });
        }
        let before = std::fs::read_to_string(POOL).map_err(|e| format!("{POOL}: {e}"))?;
        let now: u64 = before.trim().parse().map_err(|e| format!("{POOL}: {e}"))?;
        let wanted = (now + pages - free).to_string();
        std::fs::write(POOL, wanted).map_err(|e| format!("{free} huge pages are free, and {POOL}: {e}"))?;
        let pool = Self { before: Some(before) };
        match free_pages() {
            free if free < pages => Err(format!("the host gives no more than {free} huge pages")),
            _ => Ok(pool),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = std::fs::write(POOL, before);
        }
    }
}

/// Writes its own address to every MiB from the second on, reads them back, and leaves with 0.
fn program() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut build = || -> Result<(), IcedError> {
        let (mut write, mut read, mut end) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, 2 << 20)?;
        a.set_label(&mut write)?;
        a.mov(dword_ptr(rbx), ebx)?;
        a.add(ebx, 1 << 20)?;
        a.cmp(ebx, MEMORY as i32)?;
        a.jb(write)?;
        a.mov(ebx, 2 << 20)?;
        a.mov(al, 1)?;
        a.set_label(&mut read)?;
        a.cmp(dword_ptr(rbx), ebx)?;
        a.jne(end)?;
        a.add(ebx, 1 << 20)?;
        a.cmp(ebx, MEMORY as i32)?;
        a.jb(read)?;
        a.mov(al, 0)?;
        a.set_label(&mut end)?;
        a.mov(dx, 0xf4)?;
        a.out(dx, al)?;
        a.hlt()
    };
    build().unwrap();
    a.assemble(ENTRY).unwrap()
}

/// KiB of mappings of huge pages in use.
fn huge_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let fields = text.lines().filter_map(|l| l.strip_prefix("Shared_Hugetlb:").or(l.strip_prefix("Private_Hugetlb:")));
    fields.filter_map(|n| n.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).sum()
}

#[test]
fn a_guest_in_huge_pages() {
    let name = "a_guest_in_huge_pages";
    if let Err(why) = KvmAccelerator.probe(GuestArch::X86_64) {
        return skipped(name, &why.to_string());
    }
    let _pool = match Pool::with(MEMORY / PAGE) {
        Ok(pool) => pool,
        Err(why) => return skipped(name, &why),
    };
    for share in ["on", "off"] {
        let mut kernel = bzimage();
        let code = program();
        kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
        let mut setup = Setup::new("microvm").kernel(&kernel).device("isa-debug-exit");
        setup.config.memory = MEMORY;
        let text = format!("memory-backend-memfd,id=m,hugetlb=on,hugetlbsize=2M,share={share}");
        setup.config.host_memory.backend = Some(MemoryBackend::parse(&text).unwrap());
        let setup = Setup { accel: Box::new(KvmAccelerator), emulation_failure: Some(Arc::new(TcgFallback)), ..setup };
        let mut pc = setup.start();
        pc.machine.resume();
        assert_eq!(pc.machine.wait(), RunEnd::Exit(1), "share={share}");
        assert_eq!(pc.load(MEMORY - PAGE / 2, 4), MEMORY - PAGE / 2);
        // All of RAM but the first page at least was written.
        let used = huge_kib();
        assert!(used >= (MEMORY - PAGE) >> 10, "share={share}: {used} KiB of huge pages are used");
    }
}
