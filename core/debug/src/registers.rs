//! Registers by name.
//!
//! Those that are looked at all the time are in a list of their own; every other that gdb knows can be asked for too.

use mimus_arch::CpuState;
use mimus_arch::riscv::csr;
use mimus_arch::riscv::gdb as riscv_gdb;
use mimus_arch::riscv::regs::{FREG_NAMES, XREG_NAMES, freg};
use mimus_arch::riscv::{Privilege, RiscvState};
use mimus_arch::x86::gdb as x86_gdb;
use mimus_arch::x86::state::attr;
use mimus_arch::x86::{Segment, X86State};

/// x86's general registers, in encoding order.
pub const X86_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// A reference to each register that has a name.
fn each(state: &mut CpuState) -> Vec<(&'static str, &mut u64)> {
    match state {
        CpuState::Riscv(s) => riscv(s),
        CpuState::X86(s) => x86(s),
        _ => Vec::new(),
    }
}

fn riscv(s: &mut RiscvState) -> Vec<(&'static str, &mut u64)> {
    let mut all = vec![("pc", &mut s.pc)];
    all.extend(XREG_NAMES.into_iter().zip(&mut s.x).skip(1));
    all.extend([
        ("mstatus", &mut s.mstatus),
        ("mie", &mut s.mie),
        ("mip", &mut s.mip),
        ("mtvec", &mut s.mtvec),
        ("mscratch", &mut s.mscratch),
        ("mepc", &mut s.mepc),
        ("mcause", &mut s.mcause),
        ("mtval", &mut s.mtval),
        ("medeleg", &mut s.medeleg),
        ("mideleg", &mut s.mideleg),
        ("mcounteren", &mut s.mcounteren),
        ("menvcfg", &mut s.menvcfg),
        ("stvec", &mut s.stvec),
        ("scounteren", &mut s.scounteren),
        ("sscratch", &mut s.sscratch),
        ("sepc", &mut s.sepc),
        ("scause", &mut s.scause),
        ("stval", &mut s.stval),
        ("satp", &mut s.satp),
        ("stimecmp", &mut s.stimecmp),
    ]);
    all
}

fn x86(s: &mut X86State) -> Vec<(&'static str, &mut u64)> {
    let mut all = vec![("rip", &mut s.rip), ("rflags", &mut s.rflags)];
    all.extend(X86_NAMES.into_iter().zip(&mut s.gpr));
    all.extend([
        ("cr0", &mut s.cr0),
        ("cr2", &mut s.cr2),
        ("cr3", &mut s.cr3),
        ("cr4", &mut s.cr4),
        ("cr8", &mut s.cr8),
        ("efer", &mut s.efer),
        ("xcr0", &mut s.xcr0),
        ("dr6", &mut s.dr6),
        ("dr7", &mut s.dr7),
        ("fs_base", &mut s.fs.base),
        ("gs_base", &mut s.gs.base),
        ("cs_base", &mut s.cs.base),
    ]);
    all
}

/// All registers by name.
pub fn list(state: &CpuState) -> Vec<(&'static str, u64)> {
    each(&mut state.clone()).into_iter().map(|(name, value)| (name, *value)).collect()
}

/// A register's own name: `x10` and `fp` are `a0` and `s0`, `pc` and `sp` are x86's too.
fn canonical<'a>(name: &'a str, state: &CpuState) -> &'a str {
    match (state, name) {
        (CpuState::X86(_), "pc") => "rip",
        (CpuState::X86(_), "sp") => "rsp",
        (CpuState::Riscv(_), "fp") => "s0",
        (CpuState::Riscv(_), _) => {
            let number = name.strip_prefix('x').and_then(|n| n.parse::<usize>().ok());
            number.and_then(|n| XREG_NAMES.get(n).copied()).unwrap_or(name)
        }
        _ => name,
    }
}

/// The general registers' names in 32-bit code.
const NAMES32: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];

/// x86's registers as gdb is told of them in 64-bit code: all there are.
const ALL_X86: x86_gdb::View = x86_gdb::View { width: x86_gdb::Width::W64, long_mode: true, avx: true };

/// gdb's number of a register of RISC-V.
fn riscv_number(name: &str) -> Option<u32> {
    let float = || freg(name).map(|i| riscv_gdb::F0 + i as u32);
    let system = || csr::by_name(name).map(|n| riscv_gdb::CSR0 + u32::from(n));
    if name == "priv" { Some(riscv_gdb::PRIV) } else { float().or_else(system) }
}

/// A register's value. `pc` is the address of the instruction, also where x86's `rip` is an offset in a segment.
pub fn get(state: &CpuState, name: &str) -> Option<u64> {
    let name = &name.to_ascii_lowercase();
    if name == "pc" {
        return Some(pc(state));
    }
    let known = canonical(name, state);
    if known == "zero" {
        return Some(0);
    }
    if let Some((_, value)) = list(state).into_iter().find(|(n, _)| *n == known) {
        return Some(value);
    }
    match state {
        CpuState::Riscv(s) => riscv_gdb::get(s, riscv_number(name)?),
        CpuState::X86(s) => {
            if let Some(i) = NAMES32.iter().position(|n| n == name) {
                return Some(s.gpr[i] & 0xffff_ffff);
            }
            match name.as_str() {
                "eip" => return Some(s.rip & 0xffff_ffff),
                "kernel_gs_base" => return get(state, "k_gs_base"),
                _ => {}
            }
            let bytes = ALL_X86.get(s, ALL_X86.number(name)?)??;
            (bytes.len() <= 8).then(|| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
        }
        _ => None,
    }
}

/// Changes a register; false if there is none of that name.
pub fn set(state: &mut CpuState, name: &str, value: u64) -> bool {
    let lower = name.to_ascii_lowercase();
    let name = canonical(&lower, state).to_owned();
    if let Some((_, place)) = each(state).into_iter().find(|(n, _)| *n == name) {
        *place = value;
        return true;
    }
    match state {
        CpuState::Riscv(s) => riscv_number(&name).is_some_and(|n| riscv_gdb::set(s, n, value)),
        CpuState::X86(s) => {
            if let Some(i) = NAMES32.iter().position(|n| *n == name) {
                s.gpr[i] = value & 0xffff_ffff;
                return true;
            }
            let number = ALL_X86.number(if name == "kernel_gs_base" { "k_gs_base" } else { &name });
            let Some((number, size)) = number.and_then(|n| Some((n, ALL_X86.size(n)?))) else { return false };
            size <= 8 && ALL_X86.set(s, number, &value.to_le_bytes()[..size])
        }
        _ => false,
    }
}

/// Names that [`get`] knows, those of the list first.
pub fn names(state: &CpuState) -> Vec<&'static str> {
    let mut all: Vec<&'static str> = list(state).into_iter().map(|(name, _)| name).collect();
    all.push("pc");
    match state {
        CpuState::Riscv(_) => {
            all.push("priv");
            all.extend(FREG_NAMES);
            all.extend(csr::CSRS.iter().map(|(_, name)| *name));
        }
        CpuState::X86(_) => {
            all.extend(ALL_X86.names());
            all.extend(NAMES32);
        }
        _ => {}
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|name| seen.insert(*name) && get(state, name).is_some());
    all
}

/// The program counter as a virtual address.
pub fn pc(state: &CpuState) -> u64 {
    match state {
        CpuState::X86(s) if bits(state) == 64 => s.rip,
        CpuState::X86(s) => s.cs.base.wrapping_add(s.rip) & 0xffff_ffff,
        CpuState::Riscv(s) => s.pc,
        _ => 0,
    }
}

/// For disassembly: 16, 32 or 64 bits; 0 for RISC-V.
pub fn bits(state: &CpuState) -> u8 {
    const LMA: u64 = 1 << 10;
    match state {
        CpuState::X86(s) if s.efer & LMA != 0 && s.cs.attributes & attr::L != 0 => 64,
        CpuState::X86(s) if s.cs.attributes & attr::DB != 0 => 32,
        CpuState::X86(_) => 16,
        _ => 0,
    }
}

/// Stack pointer, frame pointer and, where there is one, the return address's register.
pub fn frame(state: &CpuState) -> (u64, u64, Option<u64>) {
    let value = |name| get(state, name).unwrap_or(0);
    match state {
        CpuState::X86(_) => (value("rsp"), value("rbp"), None),
        _ => (value("sp"), value("s0"), Some(value("ra"))),
    }
}

/// A register as it is shown.
struct Shown {
    /// As the manual of the present mode calls it.
    label: &'static str,
    /// As [`list`] does.
    name: &'static str,
    value: u64,
    digits: usize,
}

/// What [`show`] shows.
fn shown(state: &CpuState) -> Vec<Shown> {
    const LMA: u64 = 1 << 10;
    let narrow = match state {
        CpuState::X86(s) => bits(state) != 64 && s.efer & LMA == 0 && s.gpr.iter().all(|r| r >> 32 == 0),
        _ => false,
    };
    let one = |(name, value): (&'static str, u64)| {
        // A machine without long mode, or not in it.
        let label = if narrow { short(name)? } else { name };
        Some(Shown { label, name, value, digits: if narrow { 8 } else { 16 } })
    };
    list(state).into_iter().filter_map(one).collect()
}

/// The name in 32-bit code; `None` of what is not there.
fn short(name: &'static str) -> Option<&'static str> {
    match name {
        "rip" => Some("eip"),
        "rflags" => Some("eflags"),
        "cr8" | "xcr0" => None,
        _ => match X86_NAMES.iter().position(|n| *n == name) {
            Some(i) => NAMES32.get(i).copied(),
            None => Some(name),
        },
    }
}

/// Rows of four, those that differ from `before` marked with `*`, then what they say in words.
pub fn show(state: &CpuState, before: Option<&CpuState>) -> String {
    let old = before.map(list).unwrap_or_default();
    let mut out = String::new();
    for row in shown(state).chunks(4) {
        for Shown { label, name, value, digits } in row {
            let changed = old.iter().any(|(n, v)| n == name && v != value);
            out.push_str(&format!("{label:>10}{}{value:0digits$x}  ", if changed { '*' } else { ' ' }));
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out + &in_words(state)
}

/// Whether a name is a register's also without `$`: others are rather symbols.
pub fn is_usual(state: &CpuState, name: &str) -> bool {
    let known = canonical(name, state);
    let more = ["pc", "sp", "zero", "eip"].contains(&known) || NAMES32.contains(&known);
    more || list(state).iter().any(|(n, _)| *n == known)
}

/// All that there are: as [`show`], then the others.
pub fn show_all(state: &CpuState, before: Option<&CpuState>) -> String {
    let known = list(state).len();
    let others: Vec<_> = names(state).into_iter().skip(known).filter_map(|n| Some((n, get(state, n)?))).collect();
    let mut out = show(state, before);
    for row in others.chunks(4) {
        for (name, value) in row {
            out.push_str(&format!("{name:>14} {value:016x}  "));
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    let CpuState::X86(s) = state else { return out };
    // What has more than 64 bits.
    for name in ALL_X86.names() {
        let value = ALL_X86.number(name).and_then(|n| ALL_X86.get(s, n)).flatten().filter(|v| v.len() > 8);
        if let Some(value) = value.filter(|v| v.iter().any(|b| *b != 0)) {
            let digits: String = value.iter().rev().map(|b| format!("{b:02x}")).collect();
            out.push_str(&format!("{name:>14} {digits}\n"));
        }
    }
    out
}

/// Bits that are set, highest first.
fn bits_set(value: u64, names: &[(u32, &str)]) -> String {
    let set: Vec<&str> = names.iter().rev().filter(|(bit, _)| value >> bit & 1 != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "-".to_owned() } else { set.join(" ") }
}

/// RFLAGS (SDM volume 1, 3.4.3).
const RFLAGS: [(u32, &str); 16] = [
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (8, "TF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (16, "RF"),
    (17, "VM"),
    (18, "AC"),
    (19, "VIF"),
    (20, "VIP"),
    (21, "ID"),
];
/// Control registers (SDM volume 3, 2.5).
const CR0: [(u32, &str); 11] = [
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];
const CR4: [(u32, &str); 23] = [
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (14, "SMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
    (23, "CET"),
    (24, "PKS"),
];
const EFER: [(u32, &str); 6] = [(0, "SCE"), (8, "LME"), (10, "LMA"), (11, "NXE"), (12, "SVME"), (14, "FFXSR")];
/// `mstatus` (privileged specification, 3.1.6).
const MSTATUS: [(u32, &str); 14] = [
    (1, "SIE"),
    (3, "MIE"),
    (5, "SPIE"),
    (6, "UBE"),
    (7, "MPIE"),
    (8, "SPP"),
    (17, "MPRV"),
    (18, "SUM"),
    (19, "MXR"),
    (20, "TVM"),
    (21, "TW"),
    (22, "TSR"),
    (36, "SBE"),
    (63, "SD"),
];

fn in_words(state: &CpuState) -> String {
    match state {
        CpuState::Riscv(s) => riscv_words(s),
        CpuState::X86(s) => x86_words(s, bits(state)),
        _ => String::new(),
    }
}

fn riscv_words(s: &RiscvState) -> String {
    const STATES: [&str; 4] = ["Off", "Initial", "Clean", "Dirty"];
    let mode = match s.privilege {
        Privilege::User => "user",
        Privilege::Supervisor => "supervisor",
        Privilege::Machine => "machine",
    };
    let unit = |bit: u32| STATES[(s.mstatus >> bit & 3) as usize];
    let scheme = crate::walk::scheme(&CpuState::Riscv(Box::new(s.clone()))).map_or("Bare", |s| s.name);
    format!(
        "mode {mode}{}\nmstatus: {} MPP={} FS={} VS={}\nsatp: {scheme} ASID={:#x} table at {:#x}\n",
        if s.waiting { ", waiting for an interrupt" } else { "" },
        bits_set(s.mstatus, &MSTATUS),
        s.mstatus >> 11 & 3,
        unit(13),
        unit(9),
        s.satp >> 44 & 0xffff,
        (s.satp & ((1 << 44) - 1)) << 12,
    )
}

fn x86_words(s: &X86State, bits: u8) -> String {
    const PE: u64 = 1;
    const VM: u64 = 1 << 17;
    const LMA: u64 = 1 << 10;
    let mode = match () {
        () if s.cr0 & PE == 0 => "real-address mode",
        () if s.efer & LMA != 0 && bits == 64 => "64-bit mode",
        () if s.efer & LMA != 0 => "compatibility mode",
        () if s.rflags & VM != 0 => "virtual-8086 mode",
        () => "protected mode",
    };
    let smm = if s.events.smm { ", system management mode" } else { "" };
    let mut out = format!(
        "{mode}, {bits}-bit code, CPL {}{smm}\nrflags: {} IOPL={}\ncr0: {}\ncr4: {}\nefer: {}\n",
        s.cpl(),
        bits_set(s.rflags, &RFLAGS),
        s.rflags >> 12 & 3,
        bits_set(s.cr0, &CR0),
        bits_set(s.cr4, &CR4),
        bits_set(s.efer, &EFER)
    );
    for (name, segment) in s.segments() {
        out.push_str(&format!("{name:>6} {}\n", segment_words(segment)));
    }
    for (name, table) in [("gdtr", &s.gdtr), ("idtr", &s.idtr)] {
        out.push_str(&format!("{name:>6}      base {:016x} limit {:08x}\n", table.base, table.limit));
    }
    out
}

/// A segment register, its type in words (SDM volume 3, tables 3-1 and 3-2).
fn segment_words(s: &Segment) -> String {
    let a = s.attributes;
    let kind = a & 0xf;
    let is = |bit: u32| a >> bit & 1 != 0;
    let words = match () {
        () if !is(7) => "not present".to_owned(),
        () if !is(4) => match kind {
            1 => "available 16-bit TSS".to_owned(),
            2 => "LDT".to_owned(),
            3 => "busy 16-bit TSS".to_owned(),
            9 => "available TSS".to_owned(),
            11 => "busy TSS".to_owned(),
            _ => format!("system type {kind}"),
        },
        () if kind & 8 != 0 => {
            let width = match (is(13), is(14)) {
                (true, _) => "64-bit",
                (_, true) => "32-bit",
                _ => "16-bit",
            };
            let read = if kind & 2 != 0 { " readable" } else { "" };
            format!("{width} code{read}{}", if kind & 4 != 0 { " conforming" } else { "" })
        }
        () => {
            let write = if kind & 2 != 0 { " writable" } else { "" };
            format!("data{write}{}", if kind & 4 != 0 { " expands down" } else { "" })
        }
    };
    format!("{:04x} base {:016x} limit {:08x} DPL {} {words}", s.selector, s.base, s.limit, a >> 5 & 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_changes() {
        let before = CpuState::Riscv(Box::new(RiscvState::new(0, 0, 0x1000)));
        let mut state = before.clone();
        assert!(set(&mut state, "x10", 5) && set(&mut state, "sp", 7) && !set(&mut state, "rax", 1));
        assert_eq!((get(&state, "a0"), get(&state, "x2"), get(&state, "zero")), (Some(5), Some(7), Some(0)));
        assert_eq!((pc(&state), bits(&state)), (0x1000, 0));
        let text = show(&state, Some(&before));
        assert!(text.contains("a0*0000000000000005") && text.contains("ra 0000"), "{text}");
        let mut x86 = CpuState::X86(Box::new(X86State::reset(true)));
        assert_eq!((pc(&x86), bits(&x86)), (0xffff_fff0, 16));
        assert!(set(&mut x86, "sp", 9));
        assert_eq!(frame(&x86).0, 9);
        // The address of the instruction, not the offset in the segment.
        assert_eq!(
            (get(&x86, "pc"), get(&x86, "rip"), get(&x86, "eip")),
            (Some(0xffff_fff0), Some(0xfff0), Some(0xfff0))
        );
        let text = show(&x86, None);
        assert!(text.contains("real-address mode, 16-bit code, CPL 0") && text.contains("    cs f000 base"), "{text}");
        assert!(text.contains("esp 00000009") && !text.contains("r8 "), "{text}");
    }

    #[test]
    fn every_register_that_has_a_name() {
        let mut riscv = CpuState::Riscv(Box::new(RiscvState::new(0, 0, 0x1000)));
        for name in names(&riscv) {
            assert!(get(&riscv, name).is_some(), "{name}");
        }
        assert!(set(&mut riscv, "fa0", 0x77) && set(&mut riscv, "mstatus", 0x2 | 1 << 13 | 3 << 11));
        assert_eq!(
            (get(&riscv, "fa0"), get(&riscv, "sstatus"), get(&riscv, "priv")),
            (Some(0x77), Some(0x2002), Some(3))
        );
        assert_eq!(get(&riscv, "pmpaddr0"), Some(0));
        let text = show(&riscv, None);
        assert!(text.contains("mode machine\nmstatus: SIE MPP=3 FS=Initial VS=Off\nsatp: Bare"), "{text}");
        assert!(show_all(&riscv, None).contains("fa0 0000000000000077"));
        let mut x86 = CpuState::X86(Box::new(X86State::reset(true)));
        for name in names(&x86) {
            assert!(get(&x86, name).is_some(), "{name}");
        }
        assert!(set(&mut x86, "ds", 0x28) && set(&mut x86, "EAX", 5) && !set(&mut x86, "nobody", 1));
        assert_eq!((get(&x86, "ds"), get(&x86, "rax"), get(&x86, "CS")), (Some(0x28), Some(5), Some(0xf000)));
        let before = x86.clone();
        set(&mut x86, "eax", 6);
        assert!(show(&x86, Some(&before)).contains("eax*00000006  "), "{}", show(&x86, Some(&before)));
        assert!(show_all(&x86, None).contains("idtr_limit 000000000000ffff"), "{}", show_all(&x86, None));
    }
}
