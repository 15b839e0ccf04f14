//! System management mode and A20 in whole programs.

use super::*;

/// Shown over RAM at SMBASE in system management mode only.
const SMRAM: u64 = 0x3_0000;
const SMRAM_LEN: u64 = 0x1_0000;
const HANDLER: u64 = 0x8000;
const AREA: u64 = 0x8000;

impl Guest {
    /// Gives the machine memory for system management mode, with a handler.
    fn smram(&self, handler: &[u8]) -> Arc<RamBlock> {
        let block = self.all_ram.add_block("smram", SMRAM_LEN, RamBacking::Private).unwrap();
        assert!(block.write(HANDLER, handler));
        let map = self.io.memory.map().clone();
        let root = MemoryRegion::container("smm", u64::MAX);
        let space = map.address_space("smm", &root);
        let system = self.io.memory.root();
        let below = MemoryRegion::alias("below", system, 0, system.len());
        map.change(|t| {
            t.map(&root, 0, &below).map_with_priority(&root, SMRAM, 1, &MemoryRegion::ram("smram", &block));
        });
        space.add_listener(self.machine.alternate_listener());
        block
    }

    fn pin(&self, pin: CpuPin, level: bool) {
        self.vcpu.handle().set_pin(pin, level);
    }

    fn pulse(&self, pin: CpuPin) {
        self.pin(pin, true);
        self.pin(pin, false);
    }
}

fn word(block: &RamBlock, at: u64) -> u64 {
    let mut bytes = [0; 8];
    assert!(block.read(at, &mut bytes));
    u64::from_le_bytes(bytes)
}

/// inc dword [0x9000] (of SMRAM: CS is SMBASE's); mov al,'S'; out 0xe9,al; rsm
const COUNT: [u8; 12] = [0x2e, 0x66, 0xff, 0x06, 0x00, 0x90, 0xb0, b'S', 0xe6, 0xe9, 0x0f, 0xaa];

#[test]
fn an_smi_sees_other_memory() {
    both(|mut g| {
        let smram = g.smram(&COUNT);
        g.long();
        // mov rax,[0x39000]; mov ebx,7; hlt
        g.put(CODE, &[0x48, 0x8b, 0x04, 0x25, 0x00, 0x90, 0x03, 0x00, 0xbb, 7, 0, 0, 0, 0xf4]);
        g.put_u64(0x3_9000, 0x1122);
        g.change(|s| s.gpr[R15] = 0x1234_5678_9abc);
        g.pulse(CpuPin::Smi);
        assert!(g.state().events.smi_pending);
        let s = g.run();
        assert_eq!((s.gpr[RAX], s.gpr[RBX], s.gpr[R15], s.events.smm), (0x1122, 7, 0x1234_5678_9abc, false));
        assert_eq!((word(&smram, 0x9000), g.u64_at(0x3_9000)), (1, 0x1122));
        assert_eq!((word(&smram, AREA + 0x7f78), word(&smram, AREA + 0x7efc) as u32), (CODE, 0x3_0064));
        assert_eq!(*g.io.output.lock().unwrap(), b"S");
    });
}

#[test]
fn a_halt_goes_on_after_an_smi() {
    both(|mut g| {
        let smram = g.smram(&COUNT);
        g.long();
        g.put(CODE, &[0xf4, 0xbb, 9, 0, 0, 0, 0xf4]);
        assert_eq!(g.run().rip, CODE + 1);
        for n in 1..=2 {
            g.pulse(CpuPin::Smi);
            let s = g.run();
            assert_eq!((s.rip, s.gpr[RBX], s.mp_state), (CODE + 1, 0, MpState::Halted), "{n}");
            assert_eq!((word(&smram, 0x9000), word(&smram, AREA + 0x7ec9) & 0xff), (n, 1));
        }
        // The state is a halt's in a snapshot too.
        let state = g.state();
        g.set(state);
        g.pulse(CpuPin::Smi);
        assert_eq!((g.run().rip, word(&smram, 0x9000)), (CODE + 1, 3));
        g.pulse(CpuPin::Nmi);
        // The handler at 0xa020 halts.
        assert_eq!(g.run().rip, 0xa021);
    });
}

#[test]
fn nmis_and_smis_wait_in_the_mode() {
    both(|mut g| {
        // hlt; inc dword cs:[0x9000]; rsm
        let smram = g.smram(&[0xf4, 0x2e, 0x66, 0xff, 0x06, 0x00, 0x90, 0x0f, 0xaa]);
        g.long();
        g.put(CODE, &[0x90, 0xf4]);
        g.pulse(CpuPin::Smi);
        let s = g.run();
        assert_eq!((s.rip, s.events.smm, s.cs.base, s.cr0 & CR0_PE), (HANDLER + 1, true, SMRAM, 0));
        // Neither wakes it.
        g.pulse(CpuPin::Nmi);
        g.pulse(CpuPin::Smi);
        let s = g.run();
        assert_eq!((s.rip, s.events.smm, s.events.smi_pending), (HANDLER + 1, true, true));
        // A saved state goes on in the mode.
        let mut state = g.state();
        state.mp_state = MpState::Running;
        g.set(state);
        // The second SMI comes before the NMI.
        let s = g.run();
        assert_eq!((s.rip, s.events.smm, word(&smram, 0x9000)), (HANDLER + 1, true, 1));
        g.change(|s| s.mp_state = MpState::Running);
        assert_eq!((g.run().rip, word(&smram, 0x9000)), (0xa021, 2));
    });
}

#[test]
fn smbase_is_moved_and_survives_init() {
    both(|mut g| {
        // mov dword cs:[0xff00],0x31000; rsm
        let smram = g.smram(&[0x2e, 0x66, 0xc7, 0x06, 0x00, 0xff, 0x00, 0x10, 0x03, 0x00, 0x0f, 0xaa]);
        assert!(smram.write(0x1000 + HANDLER, &COUNT));
        g.long();
        g.put(CODE, &[0x90, 0xf4, 0x90, 0xf4]);
        g.pulse(CpuPin::Smi);
        g.run();
        g.pulse(CpuPin::Smi);
        g.run();
        // CS's base is the new SMBASE: the counter is at its 0x9000.
        assert_eq!(word(&smram, 0x1000 + 0x9000), 1);
        let smbase = |s: &X86State| s.msr(mimus_arch::x86::msr::SMBASE);
        g.vcpu.reset(ResetKind::Init, None);
        assert_eq!(smbase(&g.state()), Some(0x3_1000));
        g.vcpu.reset(ResetKind::Warm, None);
        assert_eq!(smbase(&g.state()), Some(SMRAM));
    });
}

/// In the mode an INIT waits, in a saved state too; it comes behind RSM, before the next instruction and before NMIs.
#[test]
fn an_init_waits_in_the_mode() {
    both(|mut g| {
        // hlt; inc dword cs:[0x9000]; rsm
        let smram = g.smram(&[0xf4, 0x2e, 0x66, 0xff, 0x06, 0x00, 0x90, 0x0f, 0xaa]);
        g.long();
        g.put(CODE, &[0x90, 0xf4]);
        let handle = g.vcpu.handle();
        *g.io.handle.lock().unwrap() = Some(handle.clone());
        assert!(!handle.in_smm());
        g.pulse(CpuPin::Smi);
        assert_eq!(g.run().rip, HANDLER + 1);
        assert!(handle.in_smm());
        g.pulse(CpuPin::Init);
        g.pulse(CpuPin::Nmi);
        let s = g.run();
        assert_eq!((s.rip, s.events.smm, s.events.init_latched), (HANDLER + 1, true, true));
        let mut state = g.state();
        state.mp_state = MpState::Running;
        g.set(state);
        assert!(matches!(g.vcpu.run(&g.io), VcpuExit::Kicked), "the machine has it leave");
        let s = g.state();
        assert_eq!((s.rip, s.events.smm, s.events.init_latched), (CODE, false, false));
        assert_eq!((*g.io.inits.lock().unwrap(), word(&smram, 0x9000), handle.in_smm()), (1, 1, false));
        // A reset leaves none.
        g.pulse(CpuPin::Smi);
        g.run();
        g.pulse(CpuPin::Init);
        g.vcpu.reset(ResetKind::Warm, None);
        assert!(!g.state().events.init_latched && !handle.in_smm());
    });
}

#[test]
fn rsm_is_no_instruction_elsewhere() {
    both(|mut g| {
        g.long();
        g.put(CODE, &[0x0f, 0xaa]);
        assert_eq!(g.run().rip, 0xa061);
        // Nor is there an SMI without memory for it.
        g.put(CODE, &[0xf4]);
        g.change(|s| (s.rip, s.mp_state) = (CODE, MpState::Running));
        g.pulse(CpuPin::Smi);
        let s = g.run();
        assert_eq!((s.rip, s.events.smm, s.events.smi_pending), (CODE + 1, false, false));
    });
}

#[test]
fn a20_masks_bit_20() {
    both(|mut g| {
        g.real();
        // mov ax,0xffff; mov ds,ax; mov bx,[0x510] (1 MiB + 0x500); mov cx,es:[0x500]; hlt
        g.put(CODE, &[0xb8, 0xff, 0xff, 0x8e, 0xd8, 0x8b, 0x1e, 0x10, 0x05, 0x26, 0x8b, 0x0e, 0x00, 0x05, 0xf4]);
        g.put_u64(0x500, 0x1111);
        g.put_u64(0x10_0500, 0x2222);
        let read = |g: &mut Guest| {
            g.change(|s| (s.rip, s.mp_state) = (0, MpState::Running));
            let s = g.run();
            (s.gpr[RBX] & 0xffff, s.gpr[RCX] & 0xffff)
        };
        assert_eq!(read(&mut g), (0x2222, 0x1111));
        g.pin(CpuPin::A20Mask, true);
        assert_eq!(read(&mut g), (0x1111, 0x1111));
        g.pin(CpuPin::A20Mask, false);
        assert_eq!(read(&mut g), (0x2222, 0x1111));
    });
}

/// A port's access that raises an SMI, which its handler has executed again until its device is there: three times.
fn restarted(g: &mut Guest, code: &[u8]) -> Arc<RamBlock> {
    // inc dword cs:[0x9000]; cmp dword cs:[0x9000],3; jae +6; mov byte cs:[0xfec8],0xff; rsm
    let smram = g.smram(&[
        0x2e, 0x66, 0xff, 0x06, 0x00, 0x90, 0x2e, 0x66, 0x83, 0x3e, 0x00, 0x90, 3, 0x73, 6, 0x2e, 0xc6, 0x06, 0xc8,
        0xfe, 0xff, 0x0f, 0xaa,
    ]);
    g.long();
    g.put(CODE, code);
    *g.io.handle.lock().unwrap() = Some(g.vcpu.handle());
    smram
}

/// What the area says of the last access: the I/O trap doubleword and the registers of the restart.
fn access(smram: &RamBlock) -> (u64, [u64; 4]) {
    let at = |offset: u64| word(smram, AREA + offset);
    (at(0x7ec0) & 0xffff_ffff, [0x7ea0, 0x7ea8, 0x7eb0, 0x7eb8].map(at))
}

#[test]
fn io_instructions_are_restarted() {
    let port = u64::from(SMIS) << 16;
    both(|mut g| {
        // out SMIS,al; inc ebx; hlt
        let smram = restarted(&mut g, &[0xe6, SMIS as u8, 0xff, 0xc3, 0xf4]);
        g.change(|s| (s.gpr[RAX], s.gpr[RCX]) = (0x41, 0x77));
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RBX], word(&smram, 0x9000) as u32), (CODE + 5, 1, 3));
        assert_eq!(*g.io.output.lock().unwrap(), b"AAA", "executed three times");
        assert_eq!(access(&smram), (port | 0x12, [CODE, 0x77, 0, 0]));
        assert_eq!(word(&smram, AREA + 0x7f78), CODE + 2, "RIP is behind it");
    });
    both(|mut g| {
        // mov edx,SMIS; in eax,dx; hlt
        let smram = restarted(&mut g, &[0xba, SMIS as u8, 0, 0, 0, 0xed, 0xf4]);
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RAX]), (CODE + 7, u64::from(SMIS) * 0x0101_0101));
        assert_eq!((access(&smram).0, *g.io.reads.lock().unwrap()), (port | 0x43, 3));
    });
    both(|mut g| {
        // mov edx,SMIS; rep outsb; hlt: the first element is written three times.
        let smram = restarted(&mut g, &[0xba, SMIS as u8, 0, 0, 0, 0xf3, 0x6e, 0xf4]);
        g.put(DATA, b"xyz");
        g.change(|s| (s.gpr[RCX], s.gpr[RSI]) = (3, DATA));
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RCX], s.gpr[RSI]), (CODE + 8, 0, DATA + 3));
        assert_eq!(*g.io.output.lock().unwrap(), b"xxxyz");
        assert_eq!(access(&smram), (port | 0x1e, [CODE + 5, 1, DATA + 2, 0]));
        assert_eq!(word(&smram, AREA + 0x7f78), CODE + 7, "the last one ends it");
        assert_eq!(word(&smram, 0x9000) as u32, 5);
    });
    both(|mut g| {
        // mov edx,SMIS; rep insw; hlt
        let smram = restarted(&mut g, &[0xba, SMIS as u8, 0, 0, 0, 0xf3, 0x66, 0x6d, 0xf4]);
        g.change(|s| (s.gpr[RCX], s.gpr[RDI]) = (2, DATA));
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RCX], s.gpr[RDI]), (CODE + 9, 0, DATA + 4));
        let value = u64::from(SMIS) * 0x0101;
        assert_eq!((g.u64_at(DATA), *g.io.reads.lock().unwrap()), (value << 16 | value, 4));
        assert_eq!(access(&smram), (port | 0x2f, [CODE + 5, 1, 0, DATA + 2]));
    });
}

/// What comes from elsewhere says nothing of the instruction before it; nor does one that came with no instruction of I/O.
#[test]
fn smis_from_elsewhere_restart_nothing() {
    both(|mut g| {
        // The handler asks for a restart, in vain: mov byte cs:[0xfec8],0xff; inc dword cs:[0x9000]; rsm
        let handler = [0x2e, 0xc6, 0x06, 0xc8, 0xfe, 0xff, 0x2e, 0x66, 0xff, 0x06, 0x00, 0x90, 0x0f, 0xaa];
        let smram = g.smram(&handler);
        g.long();
        // out 0xe9,al; inc ebx; hlt
        g.put(CODE, &[0xe6, 0xe9, 0xff, 0xc3, 0xf4]);
        g.pulse(CpuPin::Smi);
        let s = g.run();
        assert_eq!((s.rip, s.gpr[RBX], word(&smram, 0x9000) as u32), (CODE + 5, 1, 1));
        assert_eq!((access(&smram).0, g.io.output.lock().unwrap().len()), (0, 1));
    });
}

/// Steps and breakpoints behind an I/O instruction that raises an SMI come when the mode is left (APM volume 2 section
/// 10.2.4).
#[test]
fn debug_exceptions_wait_for_the_end_of_the_mode() {
    both(|mut g| {
        let smram = restarted(&mut g, &[0xe6, SMIS as u8, 0x90, 0xf4]);
        g.change(|s| {
            s.rflags |= RFLAGS_TF;
            s.cr4 |= CR4_DE;
            s.dr[2] = SMIS.into();
            s.dr7 = 0x400 | 0x200_0010;
        });
        let s = g.run();
        assert_eq!((s.rip, g.u64_at(s.gpr[RSP]), s.dr6 & 0x400f), (0xa011, CODE + 2, 0x4004));
        assert_eq!((word(&smram, 0x9000) as u32, g.io.output.lock().unwrap().len()), (3, 3));
        let trap = u64::from(SMIS) << 16 | 4 << 12 | 1 << 11 | 0x12;
        assert_eq!(access(&smram).0, trap);
    });
}
