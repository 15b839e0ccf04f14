//! What is said when a guest crashes: registers, code, calls, the last exceptions, and what to try.

use mimus_arch::CpuState;

use crate::look::View;
use crate::registers;

/// A report on a vCPU.
pub fn text(view: &View<'_>) -> String {
    let pc = registers::pc(view.cpu);
    let advice: String = advice(view).into_iter().map(|a| format!("* {a}\n")).collect();
    format!(
        "---- vCPU {} ----\n{}\ncode at the program counter:\n{}\ncalls:\n{}\nlast exceptions and interrupts, oldest first:\n{}\nlast jumps and calls by pointer and traps, oldest first:\n{}\nwhat to try:\n{advice}",
        view.vcpu,
        registers::show(view.cpu, None),
        view.disassemble(pc, 8),
        view.backtrace(),
        view.recent(16),
        view.jumps(32),
    )
}

fn advice(view: &View<'_>) -> Vec<String> {
    let mut out = Vec::new();
    let recent = view.target.recent(view.vcpu);
    let last = recent.last().copied().unwrap_or_default();
    let pc = registers::pc(view.cpu);
    if view.target.translate(view.vcpu, pc).is_none() {
        out.push(format!("the program counter {pc:#x} is not mapped: a jump through a bad pointer, or page tables that lost the kernel; see: walk {pc:#x}"));
    }
    let repeated = recent.len() >= 8 && recent.iter().rev().take(8).all(|e| e.cause == last.cause && e.pc == last.pc);
    if repeated {
        out.push(
            "the same exception over and over: its handler does not remove the cause, or faults itself".to_owned(),
        );
    }
    match view.cpu {
        CpuState::X86(_) if last.cause == 8 => {
            out.push(
                "a double fault came last: the stack (rsp, IST) or the IDT is not usable; see: walk $rsp".to_owned(),
            );
        }
        CpuState::X86(_) if last.cause == 14 => {
            out.push(format!("a page fault came last, at {:#x}: walk {:#x}", last.value, last.value));
        }
        CpuState::Riscv(s) if s.stvec == 0 && s.mtvec == 0 => {
            out.push("no trap vector is set: the first exception went to address 0".to_owned());
        }
        CpuState::Riscv(_) if matches!(last.cause, 12 | 13 | 15) => {
            out.push(format!("a page fault came last, at {:#x}: walk {:#x}", last.value, last.value));
        }
        _ => {}
    }
    if view.symbols.is_empty() {
        out.push("give names: symbols vmlinux (mimus debug … -symbols FILE)".to_owned());
    }
    out.push("run again with -trace FILE,what=mem and ask: mimus trace last-write FILE ADDRESS".to_owned());
    out.push("with -icount shift=0 -seed 1 the run repeats exactly: break shortly before".to_owned());
    out
}
