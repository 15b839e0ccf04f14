//! Registers: KVM's structs to [`X86State`] and back, one group at a time.

use kvm_bindings::*;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Events, Exception, Interrupt, attr};
use mimus_arch::x86::{MpState, Segment, TableRegister, X86State};

/// General registers.
pub fn regs_to(state: &mut X86State, r: &kvm_regs) {
    state.gpr =
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

/// General registers.
pub fn regs_from(state: &X86State) -> kvm_regs {
    let g = &state.gpr;
    kvm_regs {
        rax: g[RAX],
        rbx: g[RBX],
        rcx: g[RCX],
        rdx: g[RDX],
        rsi: g[RSI],
        rdi: g[RDI],
        rsp: g[RSP],
        rbp: g[RBP],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: state.rip,
        rflags: state.rflags | RFLAGS_FIXED,
    }
}

fn segment_to(s: &kvm_segment) -> Segment {
    let bit = |on: u8, mask: u32| if on != 0 { mask } else { 0 };
    let attributes = u32::from(s.type_) & attr::TYPE
        | bit(s.s, attr::S)
        | (u32::from(s.dpl) & 3) << attr::DPL_SHIFT
        | bit(s.present, attr::P)
        | bit(s.avl, attr::AVL)
        | bit(s.l, attr::L)
        | bit(s.db, attr::DB)
        | bit(s.g, attr::G)
        | bit(s.unusable, attr::UNUSABLE);
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes }
}

fn segment_from(s: &Segment) -> kvm_segment {
    let bit = |mask: u32| u8::from(s.attributes & mask != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & attr::TYPE) as u8,
        present: bit(attr::P),
        dpl: s.dpl(),
        db: bit(attr::DB),
        s: bit(attr::S),
        l: bit(attr::L),
        g: bit(attr::G),
        avl: bit(attr::AVL),
        unusable: bit(attr::UNUSABLE),
        padding: 0,
    }
}

fn table_to(t: &kvm_dtable) -> TableRegister {
    TableRegister { base: t.base, limit: t.limit }
}

fn table_from(t: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

/// Segments, tables and control registers. `kvm_sregs` and `kvm_sregs2` have the same fields for them.
macro_rules! common_sregs_to {
    ($state:ident, $s:ident) => {
        $state.cs = segment_to(&$s.cs);
        $state.ds = segment_to(&$s.ds);
        $state.es = segment_to(&$s.es);
        $state.fs = segment_to(&$s.fs);
        $state.gs = segment_to(&$s.gs);
        $state.ss = segment_to(&$s.ss);
        $state.tr = segment_to(&$s.tr);
        $state.ldtr = segment_to(&$s.ldt);
        $state.gdtr = table_to(&$s.gdt);
        $state.idtr = table_to(&$s.idt);
        $state.cr0 = $s.cr0;
        $state.cr2 = $s.cr2;
        $state.cr3 = $s.cr3;
        $state.cr4 = $s.cr4;
        $state.cr8 = $s.cr8;
        $state.efer = $s.efer;
        $state.apic_base = $s.apic_base;
    };
}

macro_rules! common_sregs_from {
    ($state:ident, $t:ident { $($more:tt)* }) => {
        $t {
            cs: segment_from(&$state.cs),
            ds: segment_from(&$state.ds),
            es: segment_from(&$state.es),
            fs: segment_from(&$state.fs),
            gs: segment_from(&$state.gs),
            ss: segment_from(&$state.ss),
            tr: segment_from(&$state.tr),
            ldt: segment_from(&$state.ldtr),
            gdt: table_from(&$state.gdtr),
            idt: table_from(&$state.idtr),
            cr0: $state.cr0,
            cr2: $state.cr2,
            cr3: $state.cr3,
            cr4: $state.cr4,
            cr8: $state.cr8,
            efer: $state.efer,
            apic_base: $state.apic_base,
            $($more)*
        }
    };
}

/// From the synchronised registers, which have no PDPTRs.
pub fn sregs_to(state: &mut X86State, s: &kvm_sregs) {
    common_sregs_to!(state, s);
    state.pdptrs = None;
}

/// To the synchronised registers: an accepted interrupt is an event, not a bit here.
pub fn sregs_from(state: &X86State) -> kvm_sregs {
    common_sregs_from!(state, kvm_sregs { interrupt_bitmap: [0; 4] })
}

/// With PDPTRs.
pub fn sregs2_to(state: &mut X86State, s: &kvm_sregs2) {
    common_sregs_to!(state, s);
    let valid = s.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    state.pdptrs = valid.then_some(s.pdptrs);
}

/// With PDPTRs.
pub fn sregs2_from(state: &X86State) -> kvm_sregs2 {
    let flags = if state.pdptrs.is_some() { u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) } else { 0 };
    common_sregs_from!(state, kvm_sregs2 { flags, pdptrs: state.pdptrs.unwrap_or_default() })
}

/// What is between two instructions.
pub fn events_to(state: &mut X86State, e: &kvm_vcpu_events) {
    let x = &e.exception;
    let exception = (x.injected != 0 || x.pending != 0).then(|| Exception {
        vector: x.nr,
        error_code: (x.has_error_code != 0).then_some(x.error_code),
        payload: (x.pending != 0 && e.exception_has_payload != 0).then_some(e.exception_payload),
    });
    let i = &e.interrupt;
    let shadow = u32::from(i.shadow);
    let intr = state.events.intr;
    state.events = Events {
        exception,
        interrupt: (i.injected != 0).then_some(Interrupt { vector: i.nr, soft: i.soft != 0 }),
        shadow_sti: shadow & KVM_X86_SHADOW_INT_STI != 0,
        shadow_mov_ss: shadow & KVM_X86_SHADOW_INT_MOV_SS != 0,
        // The kernel does not tell.
        held_breakpoints: 0,
        intr,
        nmi_injected: e.nmi.injected != 0,
        nmi_pending: e.nmi.pending != 0,
        nmi_masked: e.nmi.masked != 0,
        smm: e.smi.smm != 0,
        smi_pending: e.smi.pending != 0,
        smm_inside_nmi: e.smi.smm_inside_nmi != 0,
        init_latched: e.smi.latched_init != 0,
        triple_fault: e.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 && e.triple_fault.pending != 0,
        sipi_vector: e.sipi_vector as u8,
    };
}

/// Which parts of the events the kernel has.
#[derive(Clone, Copy, Debug)]
pub struct EventCaps {
    /// `KVM_CAP_EXCEPTION_PAYLOAD` is on.
    pub payload: bool,
    /// `KVM_CAP_X86_SMM`.
    pub smm: bool,
    /// `KVM_CAP_X86_TRIPLE_FAULT_EVENT` is on.
    pub triple_fault: bool,
}

/// What is between two instructions.
pub fn events_from(state: &X86State, caps: EventCaps) -> kvm_vcpu_events {
    let s = &state.events;
    let mut e = kvm_vcpu_events {
        sipi_vector: s.sipi_vector.into(),
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(x) = &s.exception {
        e.exception.nr = x.vector;
        e.exception.has_error_code = x.error_code.is_some().into();
        e.exception.error_code = x.error_code.unwrap_or(0);
        if let Some(payload) = x.payload.filter(|_| caps.payload) {
            e.exception.pending = 1;
            e.exception_has_payload = 1;
            e.exception_payload = payload;
        } else {
            e.exception.injected = 1;
        }
    }
    if caps.payload {
        e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(i) = &s.interrupt {
        e.interrupt.injected = 1;
        e.interrupt.nr = i.vector;
        e.interrupt.soft = i.soft.into();
    }
    let shadow = |on: bool, bit: u32| if on { bit as u8 } else { 0 };
    e.interrupt.shadow =
        shadow(s.shadow_sti, KVM_X86_SHADOW_INT_STI) | shadow(s.shadow_mov_ss, KVM_X86_SHADOW_INT_MOV_SS);
    e.nmi.injected = s.nmi_injected.into();
    e.nmi.pending = s.nmi_pending.into();
    e.nmi.masked = s.nmi_masked.into();
    if caps.smm {
        e.flags |= KVM_VCPUEVENT_VALID_SMM;
        e.smi.smm = s.smm.into();
        e.smi.pending = s.smi_pending.into();
        e.smi.smm_inside_nmi = s.smm_inside_nmi.into();
        e.smi.latched_init = s.init_latched.into();
    }
    if caps.triple_fault {
        e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        e.triple_fault.pending = s.triple_fault.into();
    }
    e
}

/// Debug registers.
pub fn debug_to(state: &mut X86State, d: &kvm_debugregs) {
    (state.dr, state.dr6, state.dr7) = (d.db, d.dr6, d.dr7);
}

/// Debug registers.
pub fn debug_from(state: &X86State) -> kvm_debugregs {
    kvm_debugregs { db: state.dr, dr6: state.dr6, dr7: state.dr7, flags: 0, reserved: [0; 9] }
}

/// Whether it executes.
pub fn mp_to(mp: &kvm_mp_state) -> MpState {
    match mp.mp_state {
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_UNINITIALIZED => MpState::WaitForSipi,
        KVM_MP_STATE_INIT_RECEIVED => MpState::InitReceived,
        KVM_MP_STATE_SIPI_RECEIVED => MpState::SipiReceived,
        _ => MpState::Running,
    }
}

/// Whether it executes.
pub fn mp_from(mp: MpState) -> kvm_mp_state {
    let mp_state = match mp {
        MpState::Running => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        MpState::WaitForSipi => KVM_MP_STATE_UNINITIALIZED,
        MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        MpState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: EventCaps = EventCaps { payload: true, smm: true, triple_fault: true };

    #[test]
    fn registers_round_trip() {
        let mut s = X86State::reset(true);
        s.gpr = std::array::from_fn(|i| i as u64 * 0x1111);
        s.cs = Segment { selector: 8, base: 5, limit: 0xffff_ffff, attributes: attr::CODE | attr::L | attr::G };
        s.ss.attributes |= 3 << attr::DPL_SHIFT;
        s.ldtr = Segment::UNUSABLE;
        s.pdptrs = Some([1, 2, 3, 4]);
        s.cr8 = 9;
        let mut t = X86State::reset(true);
        regs_to(&mut t, &regs_from(&s));
        sregs2_to(&mut t, &sregs2_from(&s));
        debug_to(&mut t, &debug_from(&s));
        assert_eq!(t, s);
        sregs_to(&mut t, &sregs_from(&s));
        assert_eq!((t.pdptrs, t.cs), (None, s.cs));
    }

    #[test]
    fn events_round_trip() {
        let mut s = X86State::reset(true);
        s.events = Events {
            exception: Some(Exception { vector: 14, error_code: Some(2), payload: Some(0x1234) }),
            interrupt: Some(Interrupt { vector: 0x40, soft: true }),
            shadow_sti: true,
            nmi_pending: true,
            nmi_masked: true,
            smi_pending: true,
            triple_fault: true,
            sipi_vector: 0x9f,
            ..Events::default()
        };
        let mut t = X86State::reset(true);
        events_to(&mut t, &events_from(&s, ALL));
        assert_eq!(t, s);
        // Without payloads the exception is as good as delivered to the processor.
        let none = EventCaps { payload: false, smm: false, triple_fault: false };
        let e = events_from(&s, none);
        assert_eq!((e.exception.injected, e.exception.pending), (1, 0));
        assert_eq!(e.flags & (KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_TRIPLE_FAULT), 0);
    }

    #[test]
    fn mp_states_round_trip() {
        use MpState::*;
        for mp in [Running, Halted, WaitForSipi, InitReceived, SipiReceived] {
            assert_eq!(mp_to(&mp_from(mp)), mp);
        }
    }
}
