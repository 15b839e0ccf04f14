//! The system instructions that kernels execute at every entry, without the detour by the decoder.

use iced_x86::{Instruction, Mnemonic};
use mimus_arch::x86::regs::RFLAGS_IF;

use crate::exception::Result;
use crate::frontend::{X86Cpu, ip_of, raise};
use crate::host::Host;
use crate::state::{GS, SEGMENTS};
use crate::{far, syscall};

/// What [`quick`] does: its first argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Quick {
    Cli,
    /// The block goes on with the next instruction.
    Sti,
    Swapgs,
    Syscall,
    Sysret,
    Iretq,
    Sysenter,
    Sysexit,
    Iretd,
    /// Loads the segment register that the second argument names with the third.
    Segment,
    /// Pops to the segment register that the second argument names, as many bytes as the third says.
    PopSegment,
    /// Pops the flags, as many bytes as the second argument says.
    Popf,
    Rdtsc,
}

const ALL: [Quick; 13] = {
    use Quick::*;
    [Cli, Sti, Swapgs, Syscall, Sysret, Iretq, Sysenter, Sysexit, Iretd, Segment, PopSegment, Popf, Rdtsc]
};

impl Quick {
    /// That of an instruction at privilege level 0 or, where the level does not matter, any. `goes_on`: the next
    /// instruction is in the same block.
    pub(crate) fn of(insn: &Instruction, bits: u32, kernel: bool, goes_on: bool) -> Option<Quick> {
        match insn.mnemonic() {
            Mnemonic::Cli if kernel => Some(Quick::Cli),
            Mnemonic::Sti if kernel && goes_on => Some(Quick::Sti),
            Mnemonic::Swapgs if bits == 64 && kernel => Some(Quick::Swapgs),
            Mnemonic::Syscall if bits == 64 => Some(Quick::Syscall),
            Mnemonic::Sysretq if bits == 64 => Some(Quick::Sysret),
            Mnemonic::Iretq if bits == 64 => Some(Quick::Iretq),
            Mnemonic::Sysenter => Some(Quick::Sysenter),
            Mnemonic::Sysexit => Some(Quick::Sysexit),
            Mnemonic::Iretd if bits == 32 => Some(Quick::Iretd),
            Mnemonic::Rdtsc => Some(Quick::Rdtsc),
            _ => None,
        }
    }
}

/// Executes one of them.
pub(super) fn quick(cpu: &mut X86Cpu, what: u64, a: u64, b: u64) -> u64 {
    let (pc, len) = cpu.current_insn();
    let after = cpu.wrap(pc.wrapping_add(u64::from(len)));
    cpu.guest.leave = false;
    let Some(what) = ALL.get(what as usize) else { return 0 };
    let result = run(cpu, *what, after, (a, b));
    cpu.guest.st.update_guards();
    if let Err(exception) = result {
        let pc = cpu.wrap(pc);
        raise(cpu, exception, pc);
    } else if cpu.head.exit_request == 0 && (cpu.guest.leave | cpu.code_changed()) {
        cpu.jump(after);
    }
    0
}

fn run(cpu: &mut X86Cpu, what: Quick, after: u64, (a, b): (u64, u64)) -> Result<()> {
    match what {
        Quick::Cli => cpu.guest.st.flags &= !RFLAGS_IF,
        Quick::Sti => {
            if cpu.guest.st.flags & RFLAGS_IF == 0 {
                cpu.guest.st.flags |= RFLAGS_IF;
                // Nobody looks for interrupts before the next instruction.
                if cpu.event_waits() {
                    super::system::inhibit(cpu);
                }
            }
        }
        Quick::Swapgs => swapgs(cpu),
        Quick::Syscall => {
            let next = ip_of(cpu, after);
            return syscall::syscall(cpu, next);
        }
        Quick::Sysret => return super::system::sysret(cpu, true),
        Quick::Iretq => {
            let next = ip_of(cpu, after);
            return far::iret(cpu, 8, next);
        }
        Quick::Sysenter => return syscall::sysenter(cpu),
        Quick::Sysexit => return syscall::sysexit(cpu, false),
        Quick::Iretd => {
            let next = ip_of(cpu, after);
            return far::iret(cpu, 4, next);
        }
        Quick::Segment => return super::system::load_segment(cpu, a as usize % SEGMENTS, b as u16),
        Quick::PopSegment => return super::legacy::pop_segment(cpu, a as usize % SEGMENTS, b as u32),
        Quick::Popf => return super::system::pop_flags(cpu, a as u32),
        Quick::Rdtsc => return super::system::read_tsc(cpu),
    }
    Ok(())
}

/// SWAPGS, all checks done.
pub(super) fn swapgs(cpu: &mut X86Cpu) {
    let st = &mut cpu.guest.st;
    std::mem::swap(&mut st.seg[GS].base, &mut st.msrs.kernel_gs_base);
    cpu.base_changed(GS);
}
