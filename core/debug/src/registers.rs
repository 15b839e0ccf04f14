//! Registers by name.

use mimus_arch::CpuState;
use mimus_arch::riscv::RiscvState;
use mimus_arch::riscv::regs::XREG_NAMES;
use mimus_arch::x86::X86State;
use mimus_arch::x86::state::attr;

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

/// A register's value.
pub fn get(state: &CpuState, name: &str) -> Option<u64> {
    let name = canonical(name, state);
    if name == "zero" {
        return Some(0);
    }
    list(state).into_iter().find(|(n, _)| *n == name).map(|(_, value)| value)
}

/// Changes a register; false if there is none of that name.
pub fn set(state: &mut CpuState, name: &str, value: u64) -> bool {
    let name = canonical(name, state).to_owned();
    match each(state).into_iter().find(|(n, _)| *n == name) {
        Some((_, place)) => *place = value,
        None => return false,
    }
    true
}

/// The program counter as a virtual address.
pub fn pc(state: &CpuState) -> u64 {
    match state {
        CpuState::X86(s) if bits(state) == 64 => s.rip,
        CpuState::X86(s) => s.cs.base.wrapping_add(s.rip) & 0xffff_ffff,
        _ => get(state, "pc").unwrap_or(0),
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

/// Rows of four, those that differ from `before` marked with `*`.
pub fn show(state: &CpuState, before: Option<&CpuState>) -> String {
    let old = before.map(list).unwrap_or_default();
    let mut out = String::new();
    for row in list(state).chunks(4) {
        for (name, value) in row {
            let changed = old.iter().any(|(n, v)| n == name && v != value);
            out.push_str(&format!("{name:>10}{}{value:016x}", if changed { '*' } else { ' ' }));
        }
        out.push('\n');
    }
    out
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
    }
}
