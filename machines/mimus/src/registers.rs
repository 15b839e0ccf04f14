//! `info registers`: a vCPU's state for people.

use mimus_core::arch::CpuState;
use mimus_core::arch::riscv::RiscvState;
use mimus_core::arch::x86::{Segment, X86State};

/// The registers of one vCPU, several on a line.
pub fn show(state: &CpuState) -> String {
    match state {
        CpuState::Riscv(s) => riscv(s),
        CpuState::X86(s) => x86(s),
        _ => String::new(),
    }
}

fn rows(values: &[(String, u64)]) -> String {
    let mut out = String::new();
    for row in values.chunks(4) {
        let line: Vec<String> = row.iter().map(|(name, value)| format!("{name:>8} {value:016x}")).collect();
        out.push_str(&format!("{}\n", line.join(" ")));
    }
    out
}

fn named(values: &[(&str, u64)]) -> Vec<(String, u64)> {
    values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

fn riscv(s: &RiscvState) -> String {
    let mut values = named(&[("pc", s.pc)]);
    values.extend(s.x.iter().enumerate().skip(1).map(|(i, x)| (format!("x{i}"), *x)));
    values.extend(named(&[
        ("mstatus", s.mstatus),
        ("mie", s.mie),
        ("mip", s.mip),
        ("mtvec", s.mtvec),
        ("mepc", s.mepc),
        ("mcause", s.mcause),
        ("mtval", s.mtval),
        ("medeleg", s.medeleg),
        ("mideleg", s.mideleg),
        ("stvec", s.stvec),
        ("sepc", s.sepc),
        ("scause", s.scause),
        ("stval", s.stval),
        ("satp", s.satp),
        ("stimecmp", s.stimecmp),
    ]));
    format!("mode {:?}{}\n{}", s.privilege, if s.waiting { ", waiting" } else { "" }, rows(&values))
}

fn x86(s: &X86State) -> String {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let mut out = format!("{}, privilege {}, {:?}\n", mode(s), s.cpl(), s.mp_state);
    let mut values = named(&[("rip", s.rip), ("rflags", s.rflags)]);
    values.extend(NAMES.iter().zip(s.gpr).map(|(name, value)| ((*name).to_owned(), value)));
    values.extend(named(&[
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("cr8", s.cr8),
        ("efer", s.efer),
        ("xcr0", s.xcr0),
        ("apicbase", s.apic_base),
        ("dr0", s.dr[0]),
        ("dr1", s.dr[1]),
        ("dr2", s.dr[2]),
        ("dr3", s.dr[3]),
        ("dr6", s.dr6),
        ("dr7", s.dr7),
        ("tsc", s.tsc),
    ]));
    out.push_str(&rows(&values));
    for (name, segment) in s.segments() {
        out.push_str(&segment_line(name, segment));
    }
    for (name, table) in [("gdtr", &s.gdtr), ("idtr", &s.idtr)] {
        out.push_str(&format!("{name:>8}      base {:016x} limit {:08x}\n", table.base, table.limit));
    }
    out
}

fn segment_line(name: &str, s: &Segment) -> String {
    format!("{name:>8} {:04x} base {:016x} limit {:08x} rights {:05x}\n", s.selector, s.base, s.limit, s.attributes)
}

/// The mode, from CR0.PE, RFLAGS.VM, EFER.LMA and CS's L and D (SDM vol. 3, 2.2).
fn mode(s: &X86State) -> &'static str {
    use mimus_core::arch::x86::state::attr;
    const PE: u64 = 1;
    const VM: u64 = 1 << 17;
    const LMA: u64 = 1 << 10;
    let code = s.cs.attributes;
    match () {
        () if s.cr0 & PE == 0 => "real mode",
        () if s.rflags & VM != 0 => "virtual-8086 mode",
        () if s.efer & LMA != 0 && code & attr::L != 0 => "64-bit mode",
        () if s.efer & LMA != 0 => "compatibility mode",
        () if code & attr::DB != 0 => "protected mode, 32-bit",
        () => "protected mode, 16-bit",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x86_at_reset() {
        let text = show(&CpuState::X86(Box::new(X86State::reset(true))));
        assert!(text.starts_with("real mode, privilege 0, Running\n"), "{text}");
        assert!(text.contains("     rip 000000000000fff0") && text.contains("base 00000000ffff0000"), "{text}");
        let mut long = X86State::reset(false);
        (long.cr0, long.efer, long.cs.attributes) = (0x8000_0001, 0x500, 0xa09b);
        assert!(show(&CpuState::X86(Box::new(long))).starts_with("64-bit mode, privilege 0, WaitForSipi"));
    }
}
