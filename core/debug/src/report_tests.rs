//! What is advised after crashes.

use super::*;
use crate::linux::tests::Ram;
use crate::symbols::Symbols;
use crate::target::Target;

fn event(cause: u64, pc: u64, value: u64) -> RecentEvent {
    RecentEvent { cause, pc, value }
}

fn x86_advice(recent: &[RecentEvent], cr2: u64, limit: u16) -> String {
    let ram = Ram::new(8, 0xffff_ffff_8100_0000, vec![0; 0x3000]);
    let CpuState::X86(mut s) = ram.state(0).unwrap() else { panic!("it is x86") };
    (s.cr0, s.cr2, s.idtr.base, s.idtr.limit) = (s.cr0 | 1, cr2, 0xffff_ffff_8100_0000, limit);
    let (symbols, state) = (Symbols::default(), CpuState::X86(s.clone()));
    let view = View::new(&ram, 0, &state, &symbols);
    let mut out = Vec::new();
    x86(&view, &s, recent, &mut out);
    out.join("\n")
}

#[test]
fn after_a_triple_fault() {
    let text = x86_advice(&[event(14, 0x1000, 0x60_0000), event(8, 0x1000, 0)], 0x60_0000, 0);
    assert!(text.contains("exception 14 #PF came before the double fault, of the instruction at 0x1000"), "{text}");
    assert!(
        text.contains("walk 0x600000") && text.contains("limit 0x0) has no gate that can be used for 14 #PF"),
        "{text}"
    );
    let text = x86_advice(&[event(13, 0x1000, 0x10), event(8, 0x1000, 0)], 0, 0);
    assert!(text.contains("13 #GP came before") && text.contains("error code 0x10"), "{text}");
    // What began it, if that is an instruction that there is not.
    let lost = [event(6, 0x1000, 0), event(13, 0x1000, 0x33), event(8, 0x1000, 0)];
    let text = x86_advice(&lost, 0, 0);
    assert!(text.contains("13 #GP came before") && text.contains("#UD began it"), "{text}");
    assert!(text.contains("does not execute 0000000000001000") && text.contains("-cpu max"), "{text}");
    assert!(!x86_advice(&[event(6, 0x900, 0), event(13, 0x1000, 0x33), event(8, 0x1000, 0)], 0, 0).contains("#UD"));
    // Where nothing is remembered.
    assert_eq!(x86_advice(&[], 0x1234, 0), "CR2: the last page fault was at 0x1234; see: walk 0x1234");
    assert_eq!(x86_advice(&[], 0, 0), "");
    // Only an interrupt.
    assert_eq!(x86_advice(&[event(INTERRUPT | 32, 0x1000, 0)], 0, 0), "");
}

#[test]
fn after_a_trap() {
    let mut s = RiscvState::new(0, 0, 0x1000);
    let mut out = Vec::new();
    riscv(&s, Some(&event(13, 0x100, 0x77)), &mut out);
    assert!(out[0].contains("no trap vector") && out[1].ends_with("walk 0x77"), "{out:?}");
    s.mtvec = 4;
    out.clear();
    riscv(&s, Some(&event(2, 0x100, 0)), &mut out);
    assert_eq!(out, ["an illegal instruction came last; see: disassemble 0x100"]);
}
