//! A Linux guest seen from outside: its names, types, tasks, modules and log, read from its memory alone.
//!
//! * [`vmcoreinfo`]: the kernel's own account of where its tables are;
//! * [`kallsyms`]: its names; found by their structure where vmcoreinfo says nothing;
//! * [`btf`]: its types, if it has them;
//! * [`guess`]: where members of structures are, without types;
//! * [`tasks`], [`modules`], [`dmesg`]: what is made of these;
//! * [`mappings`], [`page_cache`], [`programs`]: what programs have mapped, and the names of what they execute.
//!
//! Kernels of 5.10 and later, 32-bit and 64-bit. Nothing depends on where the kernel is (KASLR).

pub mod btf;
pub mod dmesg;
mod guess;
pub mod kallsyms;
pub mod mappings;
pub mod memory;
pub mod modules;
mod page_cache;
pub mod programs;
pub mod tasks;
pub mod vmcoreinfo;

use std::sync::Arc;

use mimus_arch::CpuState;
use mimus_arch::x86::msr;

use crate::orc::Orc;
use crate::symbols::{Names, Symbol};
use crate::target::Target;
use btf::Btf;
use memory::Memory;
use vmcoreinfo::Vmcoreinfo;

/// What is known of a kernel.
pub struct Linux {
    info: Vmcoreinfo,
    /// Its names.
    pub names: Arc<Names>,
    /// Its types, if it has them.
    pub types: Option<Btf>,
    /// How it finds callers, on x86-64.
    pub orc: Option<Orc>,
    places: kallsyms::Places,
    image: (u64, u64),
    /// How it was found, and what was compared: for people.
    pub account: String,
}

/// Memory as the kernel has it.
///
/// # Errors
/// Paging is off.
pub fn memory<'a>(target: &'a dyn Target, cpu: &CpuState) -> Result<Memory<'a>, String> {
    Memory::new(target, cpu).ok_or_else(|| "paging is off on this vCPU: no kernel is up yet; continue".to_owned())
}

impl Linux {
    /// Finds the kernel that a vCPU's page tables map.
    ///
    /// # Errors
    /// Paging is off, or there is no Linux.
    pub fn find(target: &dyn Target, cpu: &CpuState) -> Result<Linux, String> {
        let m = memory(target, cpu)?;
        Linux::find_in(&m, cpu).or_else(|e| {
            // With page-table isolation a program's tables lack the kernel.
            if m.riscv { Err(e) } else { Linux::find_in(&m.isolated(), cpu) }
        })
    }

    fn find_in(m: &Memory<'_>, cpu: &CpuState) -> Result<Linux, String> {
        let info = Vmcoreinfo::find(m).unwrap_or_default();
        let told = told(&info);
        let (places, symbols, how) = match told.map(|p| (p, kallsyms::read(m, &p))) {
            Some((places, Ok(symbols))) => (places, symbols, "by vmcoreinfo"),
            other => {
                let places = kallsyms::search(m).ok_or_else(|| match other {
                    Some((_, Err(why))) => why,
                    _ => "no Linux kernel's names are in memory (5.10 or later, with kallsyms); continue until it is \
                          up, or load names from a file: symbols vmlinux"
                        .to_owned(),
                })?;
                (places, kallsyms::read(m, &places)?, "by their structure")
            }
        };
        let image = image(m, &symbols);
        let names = Names::from_list(symbols);
        let mut account = format!("{} names, found {how} at {:#x}\n", names.len(), places.names);
        if !info.release().is_empty() {
            account.push_str(&format!("Linux {}", info.release()));
            account.push_str(&info.build_id().map_or("\n".to_owned(), |id| format!(", build {id}\n")));
        }
        account.push_str(&compare(m, cpu, &names)?);
        let mut linux = Linux { info, names: Arc::new(names), types: None, orc: None, places, image, account };
        linux.read_types(m);
        linux.orc = linux.read_orc(m);
        if let Some(orc) = &linux.orc {
            linux.account.push_str(&format!("ORC: {} entries\n", orc.len()));
        }
        Ok(linux)
    }

    fn read_types(&mut self, m: &Memory<'_>) {
        let (Ok(start), Ok(stop)) = (self.symbol("__start_BTF"), self.symbol("__stop_BTF")) else {
            self.account.push_str("no BTF: members of structures are found by what must hold\n");
            return;
        };
        match Btf::read(m, start, stop) {
            Ok(types) => {
                self.account.push_str(&format!("BTF: {} types\n", types.len()));
                self.types = Some(types);
            }
            Err(e) => self.account.push_str(&format!("{e}\n")),
        }
    }

    fn read_orc(&self, m: &Memory<'_>) -> Option<Orc> {
        let part = |name: &str| {
            let (start, stop) =
                (self.symbol(&format!("__start_{name}")).ok()?, self.symbol(&format!("__stop_{name}")).ok()?);
            Some((m.bytes(start, usize::try_from(stop.checked_sub(start)?).ok()?)?, start))
        };
        let (distances, address) = part("orc_unwind_ip")?;
        Orc::new(&distances, address, &part("orc_unwind")?.0)
    }

    /// Memory as this kernel has it, whatever the vCPU executes.
    ///
    /// # Errors
    /// It is not mapped: paging is off, or another system runs.
    pub fn memory<'a>(&self, target: &'a dyn Target, cpu: &CpuState) -> Result<Memory<'a>, String> {
        let m = memory(target, cpu)?;
        if self.is_there(&m) {
            return Ok(m);
        }
        let m = m.isolated();
        if self.is_there(&m) { Ok(m) } else { Err("the Linux that was found before is gone; see: kallsyms".to_owned()) }
    }

    /// Whether this kernel still runs: the guest was not reset, nor has another kernel been started.
    pub fn is_there(&self, m: &Memory<'_>) -> bool {
        let same = self.info.release().is_empty() || self.info.is_there(m);
        same && m.number(self.places.num_syms, 4).is_some_and(|n| n as usize == self.names.len())
    }

    /// The address of one of the kernel's names.
    ///
    /// # Errors
    /// It has none such.
    pub fn symbol(&self, name: &str) -> Result<u64, String> {
        let found = self.names.address(name).or_else(|| self.info.symbol(name));
        found.ok_or_else(|| format!("the guest's kernel has no name {name}"))
    }

    /// The kernel's image, about: virtual addresses.
    pub fn image(&self) -> (u64, u64) {
        self.image
    }

    /// The kernel's log.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn dmesg(&self, m: &Memory<'_>, most: usize) -> Result<Vec<dmesg::Message>, String> {
        let prb = self.symbol("prb");
        let prb = prb.map_err(|_| "dmesg: this kernel does not tell where its log is (prb); it is older than 5.10")?;
        dmesg::read(m, prb, &self.info, most)
    }
}

/// Where vmcoreinfo says the names are (6.0 and later).
fn told(info: &Vmcoreinfo) -> Option<kallsyms::Places> {
    Some(kallsyms::Places {
        num_syms: info.symbol("kallsyms_num_syms")?,
        names: info.symbol("kallsyms_names")?,
        token_table: info.symbol("kallsyms_token_table")?,
        token_index: info.symbol("kallsyms_token_index")?,
        offsets: info.symbol("kallsyms_offsets")?,
        relative_base: info.symbol("kallsyms_relative_base")?,
    })
}

/// From the first to the last of the kernel's names; a little more, for data behind the last of them.
fn image(m: &Memory<'_>, symbols: &[Symbol]) -> (u64, u64) {
    let all = symbols.iter().map(|s| s.address).filter(|a| m.is_kernel(*a));
    let (from, to) = all.fold((u64::MAX, 0), |(from, to), a| (from.min(a), to.max(a)));
    // No image has more; a damaged table must not have all of memory searched.
    (from, to.saturating_add(1 << 20).min(from.saturating_add(256 << 20)))
}

/// Compares the names with what else is known of the kernel.
fn compare(m: &Memory<'_>, cpu: &CpuState, names: &Names) -> Result<String, String> {
    let mut out = String::new();
    if let Some(at) = names.address("linux_banner") {
        let text = m.text(at, 256).unwrap_or_default();
        if !text.starts_with("Linux version ") {
            return Err(format!(
                "kallsyms: linux_banner, at {at:#x}, holds no banner: these are not the names of what runs"
            ));
        }
        out.push_str(&format!("checked: linux_banner is {:?}\n", text.trim_end_matches('.')));
    }
    let (register, value) = match cpu {
        CpuState::Riscv(s) => ("stvec", s.stvec & !3),
        CpuState::X86(s) if m.word == 8 => ("LSTAR", s.msr(msr::LSTAR).unwrap_or(0)),
        CpuState::X86(s) => ("SYSENTER_EIP", s.msr(msr::SYSENTER_EIP).unwrap_or(0)),
        _ => return Ok(out),
    };
    if let Some((symbol, 0)) = names.lookup(value).filter(|_| m.is_kernel(value)) {
        out.push_str(&format!("checked: {register} is {}\n", symbol.name));
    }
    Ok(out)
}

#[cfg(test)]
#[path = "tests.rs"]
pub(crate) mod tests;
