//! What is said when a guest crashes: registers, code, calls, the last exceptions, and what to try.

use mimus_arch::CpuState;
use mimus_arch::riscv::RiscvState;
use mimus_arch::x86::X86State;
use mimus_core::accel::RecentEvent;

use crate::look::{View, cause_name, x86_handler};
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
    let pc = registers::pc(view.cpu);
    if view.target.translate(view.vcpu, pc).is_none() {
        out.push(format!("the program counter {pc:#x} is not mapped: a jump through a bad pointer, or page tables that lost the kernel; see: walk {pc:#x}"));
    }
    if let Some(last) = recent.last()
        && recent.len() >= 8
        && recent.iter().rev().take(8).all(|e| e.cause == last.cause && e.pc == last.pc)
    {
        out.push(
            "the same exception over and over: its handler does not remove the cause, or faults itself".to_owned(),
        );
    }
    match view.cpu {
        CpuState::X86(s) => x86(view, s, &recent, &mut out),
        CpuState::Riscv(s) => riscv(s, recent.last(), &mut out),
        _ => {}
    }
    if view.symbols.is_empty() {
        out.push("give names: symbols vmlinux (mimus debug … -symbols FILE)".to_owned());
    }
    if recent.is_empty() {
        out.push("run again with -accel tcg: the translator remembers the last exceptions and jumps".to_owned());
    }
    out.push("run again with -accel tcg -trace FILE,what=mem and ask: mimus trace last-write FILE ADDRESS".to_owned());
    out.push("with -icount shift=0 -seed 1 the run repeats exactly: break shortly before".to_owned());
    out
}

const INTERRUPT: u64 = 1 << 63;

/// A processor shuts down when it cannot deliver a fault, nor the double fault after it (SDM volume 3, 7.15): the first
/// of them is the one to look at.
fn x86(view: &View<'_>, s: &X86State, recent: &[RecentEvent], out: &mut Vec<String>) {
    let exceptions: Vec<&RecentEvent> = recent.iter().filter(|e| e.cause & INTERRUPT == 0).collect();
    let (first, doubled) = match exceptions.as_slice() {
        [.., first, last] if last.cause == 8 => (Some(*first), true),
        [.., last] => (Some(*last), last.cause == 8),
        [] => (None, false),
    };
    let vector = first.map(|e| e.cause).filter(|v| *v < 32);
    if let Some(fault) = first {
        let name = cause_name(false, false, fault.cause);
        let which = if doubled { "came before the double fault" } else { "came last" };
        let more = match fault.cause {
            14 => format!(", at address {0:#x}; see: walk {0:#x}", fault.value),
            10..=13 if fault.value != 0 => format!(", error code {:#x}", fault.value),
            _ => String::new(),
        };
        out.push(format!("exception {} {name} {which}, of the instruction at {:#x}{more}", fault.cause, fault.pc));
        began_with(view, &exceptions, out);
    } else if s.cr2 != 0 {
        out.push(format!("CR2: the last page fault was at {0:#x}; see: walk {0:#x}", s.cr2));
    }
    if let Some(vector) = vector.filter(|v| *v != 8).filter(|_| doubled) {
        let name = cause_name(false, false, vector);
        match x86_handler(view.target, view.vcpu, s, vector) {
            None => out.push(format!(
                "the IDT (at {:#x}, limit {:#x}) has no gate that can be used for {vector} {name}",
                s.idtr.base, s.idtr.limit
            )),
            Some(_) => out.push(
                "the IDT has a handler: the stack (rsp, or the TSS' IST or rsp0) cannot be used; see: walk $rsp"
                    .to_owned(),
            ),
        }
    }
}

/// An instruction that the processor does not have, whose exception could not be delivered: the others follow from it.
fn began_with(view: &View<'_>, exceptions: &[&RecentEvent], out: &mut Vec<String>) {
    let Some(last) = exceptions.last() else { return };
    let began = exceptions.iter().rev().take_while(|e| e.pc == last.pc).last();
    let Some(began) = began.filter(|e| e.cause == 6) else { return };
    let code = view.disassemble(began.pc, 1);
    let text = code.trim().trim_start_matches("=>").trim_start();
    out.push(format!(
        "exception 6 #UD began it: the processor does not execute {text}; if the program is right, its CPU model lacks a feature: try -cpu max"
    ));
}

fn riscv(s: &RiscvState, last: Option<&RecentEvent>, out: &mut Vec<String>) {
    if s.stvec == 0 && s.mtvec == 0 {
        out.push("no trap vector is set: the first exception went to address 0".to_owned());
    }
    let Some(last) = last.filter(|e| e.cause & INTERRUPT == 0) else { return };
    if matches!(last.cause, 12 | 13 | 15) {
        out.push(format!("a page fault came last, at {0:#x}; see: walk {0:#x}", last.value));
    } else if last.cause == 2 {
        out.push(format!("an illegal instruction came last; see: disassemble {:#x}", last.pc));
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
