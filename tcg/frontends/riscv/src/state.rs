//! The privileged state of one hart: everything the generated code does not
//! keep in the engine's register slots.
//!
//! Section numbers are those of the RISC-V Privileged Architecture manual,
//! version 20250508, chapter 3 (machine level) and 12 (supervisor level).

use mimus_arch::riscv::models::{MmuMode, RiscvModel};
use mimus_arch::riscv::{Ext, Features, Privilege};

use crate::csr::CsrEffect;
use crate::pmp::Pmp;
use crate::trap::{CboOp, check_cbo};

/// Bits of `mstatus` and `sstatus`.
pub mod mstatus {
    /// Supervisor interrupts enabled.
    pub const SIE: u64 = 1 << 1;
    /// Machine interrupts enabled.
    pub const MIE: u64 = 1 << 3;
    /// `SIE` before the last trap into S-mode.
    pub const SPIE: u64 = 1 << 5;
    /// `MIE` before the last trap into M-mode.
    pub const MPIE: u64 = 1 << 7;
    /// Mode before the last trap into S-mode (1 bit).
    pub const SPP: u64 = 1 << 8;
    /// Position of `MPP`.
    pub const MPP_SHIFT: u32 = 11;
    /// Mode before the last trap into M-mode (2 bits).
    pub const MPP: u64 = 3 << MPP_SHIFT;
    /// Position of `FS`.
    pub const FS_SHIFT: u32 = 13;
    /// Floating-point unit status: 0 off, 1 initial, 2 clean, 3 dirty.
    pub const FS: u64 = 3 << FS_SHIFT;
    /// Loads and stores use the privilege in `MPP`.
    pub const MPRV: u64 = 1 << 17;
    /// S-mode may access user pages.
    pub const SUM: u64 = 1 << 18;
    /// Loads may read execute-only pages.
    pub const MXR: u64 = 1 << 19;
    /// Trap `satp` accesses and `sfence.vma` of S-mode.
    pub const TVM: u64 = 1 << 20;
    /// Trap `wfi` below M-mode.
    pub const TW: u64 = 1 << 21;
    /// Trap `sret` of S-mode.
    pub const TSR: u64 = 1 << 22;
    /// `UXL` = 2: user mode is 64-bit (read-only here).
    pub const UXL_64: u64 = 2 << 32;
    /// `SXL` = 2: supervisor mode is 64-bit (read-only here).
    pub const SXL_64: u64 = 2 << 34;
    /// `UXL` field.
    pub const UXL: u64 = 3 << 32;
    /// Some extension state is dirty (computed).
    pub const SD: u64 = 1 << 63;

    /// The bits software can change through `mstatus`.
    pub const WRITABLE: u64 = SIE | MIE | SPIE | MPIE | SPP | MPP | FS | MPRV | SUM | MXR | TVM | TW | TSR;
    /// The bits software can change through `sstatus`.
    pub const S_WRITABLE: u64 = SIE | SPIE | SPP | FS | SUM | MXR;
    /// The bits software can see through `sstatus`.
    pub const S_READABLE: u64 = S_WRITABLE | UXL | SD;
}

/// Bits of `mip`, `mie`, `mideleg` and their supervisor views.
pub mod irq {
    /// Supervisor software interrupt.
    pub const SSI: u64 = 1 << 1;
    /// Machine software interrupt.
    pub const MSI: u64 = 1 << 3;
    /// Supervisor timer interrupt.
    pub const STI: u64 = 1 << 5;
    /// Machine timer interrupt.
    pub const MTI: u64 = 1 << 7;
    /// Supervisor external interrupt.
    pub const SEI: u64 = 1 << 9;
    /// Machine external interrupt.
    pub const MEI: u64 = 1 << 11;
    /// Every supervisor-level interrupt: what `mideleg` can delegate.
    pub const S_ALL: u64 = SSI | STI | SEI;
    /// Every implemented interrupt.
    pub const ALL: u64 = S_ALL | MSI | MTI | MEI;
    /// Among the pins, not in `mip`: `stimecmp` has been reached.
    pub const TIMER_PIN: u64 = 1 << 32;
}

/// Bits of `menvcfg` and `senvcfg`.
pub mod envcfg {
    /// Fences order device I/O as memory too. No effect on a TSO host's
    /// generated fences, stored only.
    pub const FIOM: u64 = 1;
    /// Position of `CBIE`.
    pub const CBIE_SHIFT: u32 = 4;
    /// `cbo.inval` below: 0 illegal, 1 acts as flush, 3 invalidates.
    pub const CBIE: u64 = 3 << CBIE_SHIFT;
    /// `cbo.clean` and `cbo.flush` allowed below.
    pub const CBCFE: u64 = 1 << 6;
    /// `cbo.zero` allowed below.
    pub const CBZE: u64 = 1 << 7;
    /// Hardware updates the A and D bits (Svadu); otherwise Svade.
    pub const ADUE: u64 = 1 << 61;
    /// Page-based memory types on (Svpbmt).
    pub const PBMTE: u64 = 1 << 62;
    /// `stimecmp` on (Sstc).
    pub const STCE: u64 = 1 << 63;
    /// The bits `senvcfg` has.
    pub const SENVCFG: u64 = FIOM | CBIE | CBCFE | CBZE;
}

/// `fp_bad`: `mstatus.FS` is Off, so that every floating-point instruction is
/// illegal.
pub const FP_BAD_OFF: u8 = 1;
/// `fp_bad`: `frm` holds a rounding mode the host FPU does not have (4,
/// round to nearest with ties away, or the reserved 5 to 7).
pub const FP_BAD_FRM: u8 = 2;

/// What a hart implements; fixed for its lifetime.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HartConfig {
    /// The extensions, for the decoder and the flags below.
    pub features: Features,
    /// `mhartid`.
    pub hart_id: u64,
    /// `misa`, including MXL (bits 63:62 = 2).
    pub misa: u64,
    /// The largest `satp.MODE`: 8 Sv39, 9 Sv48, 10 Sv57 (each larger mode
    /// includes the smaller ones), 0 for Bare only.
    pub max_satp_mode: u8,
    /// PMP entries, 0 to 16.
    pub pmp_entries: u8,
    /// `cycle`, `time` and `instret` (Zicntr).
    pub zicntr: bool,
    /// `hpmcounter3` to `hpmcounter31` (Zihpm).
    pub zihpm: bool,
    /// `stimecmp` (Sstc).
    pub sstc: bool,
    /// Hardware A/D updating selectable by `menvcfg.ADUE` (Svadu).
    pub svadu: bool,
    /// Page-based memory types (Svpbmt).
    pub svpbmt: bool,
    /// 64 KiB pages of 16 entries (Svnapot).
    pub svnapot: bool,
    /// Cache-block management (Zicbom).
    pub zicbom: bool,
    /// Cache-block zeroing (Zicboz).
    pub zicboz: bool,
}

impl HartConfig {
    /// What a hart of `model` has, as far as this module implements it.
    pub fn new(model: &RiscvModel, hart_id: u64) -> Self {
        let has = |ext| model.features.has(ext);
        Self {
            features: model.features,
            hart_id,
            misa: model.features.misa(),
            max_satp_mode: match model.mmu {
                MmuMode::Sv39 => 8,
                MmuMode::Sv48 => 9,
                MmuMode::Sv57 => 10,
            },
            pmp_entries: model.pmp_entries.min(16),
            zicntr: has(Ext::Zicntr),
            zihpm: has(Ext::Zihpm),
            sstc: has(Ext::Sstc),
            svadu: has(Ext::Svadu),
            svpbmt: has(Ext::Svpbmt),
            svnapot: has(Ext::Svnapot),
            zicbom: has(Ext::Zicbom),
            zicboz: has(Ext::Zicboz),
        }
    }

    /// Whether `misa` has the extension of this letter.
    pub const fn has_letter(&self, letter: u8) -> bool {
        self.misa >> (letter - b'A') & 1 != 0
    }

    /// The bits of a pc that can be set: all but bit 0, or without compressed
    /// instructions all but bits 1 and 0 (section 3.1.14).
    pub const fn pc_mask(&self) -> u64 {
        if self.has_letter(b'C') { !1 } else { !3 }
    }
}

impl Default for HartConfig {
    /// Hart 0 of the default model.
    fn default() -> Self {
        Self::new(&RiscvModel::default(), 0)
    }
}

/// A counter derived from a running source: `source - base` while it counts,
/// the frozen value in `base` while `mcountinhibit` stops it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counter {
    base: u64,
    stopped: bool,
}

impl Counter {
    /// The counter's value when its source stands at `source`.
    pub const fn value(&self, source: u64) -> u64 {
        if self.stopped { self.base } else { source.wrapping_sub(self.base) }
    }

    /// Makes the counter read `value` when its source stands at `source`.
    pub const fn set(&mut self, source: u64, value: u64) {
        self.base = if self.stopped { value } else { source.wrapping_sub(value) };
    }

    /// Stops or starts the counter, keeping its value.
    pub const fn set_stopped(&mut self, source: u64, stopped: bool) {
        let value = self.value(source);
        self.stopped = stopped;
        self.set(source, value);
    }

    /// While the hart does not run, its counters hold their values instead:
    /// they neither count nor depend on what the source does meanwhile.
    pub const fn suspend(&mut self, source: u64) {
        self.base = self.value(source);
    }

    /// Undoes [`Counter::suspend`].
    pub const fn resume(&mut self, source: u64) {
        let value = self.base;
        self.set(source, value);
    }

    /// The value of a suspended counter.
    pub const fn suspended(&self) -> u64 {
        self.base
    }

    /// A suspended counter with this value.
    pub const fn at(value: u64, stopped: bool) -> Self {
        Self { base: value, stopped }
    }

    /// Whether `mcountinhibit` stops the counter.
    pub const fn is_stopped(&self) -> bool {
        self.stopped
    }
}

/// The privileged state of one hart. Integer and floating-point registers and
/// the pc live in the engine's slots and are passed where needed.
///
/// `fp_bad`, `fp_dirty` and `cbz_bad` are read and written by generated code at offsets 0
/// to 2.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Hart {
    /// Why floating-point instructions cannot run as generated:
    /// [`FP_BAD_OFF`], [`FP_BAD_FRM`].
    pub fp_bad: u8,
    /// Set to 1 by generated code that wrote floating-point state; folded into
    /// `mstatus.FS` by [`Hart::fold_fp_dirty`].
    pub fp_dirty: u8,
    /// Not 0 where `cbo.zero` is illegal.
    pub cbz_bad: u8,
    /// The current privilege mode.
    pub privilege: Privilege,
    /// Dynamic rounding mode, 3 bits as in `fcsr`.
    pub frm: u8,
    /// Accrued exception flags not in the host FPU: NV DZ OF UF NX in bits 4
    /// to 0. The complete `fflags` is this OR what the host FPU accrued.
    pub fflags: u8,
    /// What CSR accesses changed since [`Hart::take_effects`].
    pub effects: CsrEffect,
    /// What the hart implements.
    pub config: HartConfig,
    /// `mstatus` without SD; FS may lag behind `fp_dirty`.
    pub(crate) mstatus: u64,
    /// Software-written bits of `mip`: SSIP, STIP, SEIP.
    pub mip_soft: u64,
    /// `mie`.
    pub mie: u64,
    /// `medeleg`.
    pub medeleg: u64,
    /// `mideleg`.
    pub mideleg: u64,
    /// `mtvec`.
    pub mtvec: u64,
    /// `mscratch`.
    pub mscratch: u64,
    /// `mepc`.
    pub mepc: u64,
    /// `mcause`.
    pub mcause: u64,
    /// `mtval`.
    pub mtval: u64,
    /// `mcounteren`.
    pub mcounteren: u64,
    /// `mcountinhibit` (CY and IR).
    pub(crate) mcountinhibit: u64,
    /// `menvcfg`.
    pub(crate) menvcfg: u64,
    /// `stvec`.
    pub stvec: u64,
    /// `sscratch`.
    pub sscratch: u64,
    /// `sepc`.
    pub sepc: u64,
    /// `scause`.
    pub scause: u64,
    /// `stval`.
    pub stval: u64,
    /// `scounteren`.
    pub scounteren: u64,
    /// `senvcfg`.
    pub senvcfg: u64,
    /// `satp`.
    pub(crate) satp: u64,
    /// `stimecmp`, in ticks of the `time` counter.
    pub stimecmp: u64,
    /// `mcycle`.
    pub cycle: Counter,
    /// `minstret`.
    pub instret: Counter,
    /// Physical memory protection.
    pub pmp: Pmp,
}

impl Hart {
    /// A hart just out of reset (section 3.4): M-mode, interrupts and
    /// translation off, FPU off, PMP entries off and unlocked.
    pub fn new(config: HartConfig) -> Self {
        Self {
            fp_bad: FP_BAD_OFF,
            fp_dirty: 0,
            cbz_bad: u8::from(!config.zicboz),
            privilege: Privilege::Machine,
            frm: 0,
            fflags: 0,
            effects: CsrEffect::empty(),
            config,
            mstatus: mstatus::UXL_64 | mstatus::SXL_64,
            mip_soft: 0,
            mie: 0,
            medeleg: 0,
            mideleg: 0,
            mtvec: 0,
            mscratch: 0,
            mepc: 0,
            mcause: 0,
            mtval: 0,
            mcounteren: 0,
            mcountinhibit: 0,
            menvcfg: 0,
            stvec: 0,
            sscratch: 0,
            sepc: 0,
            scause: 0,
            stval: 0,
            scounteren: 0,
            senvcfg: 0,
            satp: 0,
            // No timer interrupt before the first write.
            stimecmp: u64::MAX,
            cycle: Counter::default(),
            instret: Counter::default(),
            pmp: Pmp::new(config.pmp_entries),
        }
    }

    /// Returns the hart to its reset state, keeping its configuration. The
    /// caller resets what lives outside: registers, pc, host FPU, pins, TLB.
    pub fn reset(&mut self) {
        *self = Self::new(self.config);
    }

    /// Moves `fp_dirty` into `mstatus.FS` and clears it.
    pub fn fold_fp_dirty(&mut self) {
        if self.fp_dirty != 0 {
            self.fp_dirty = 0;
            if self.mstatus & mstatus::FS != 0 {
                self.mstatus |= mstatus::FS;
            }
        }
    }

    /// `mstatus` as software reads it: FS up to date, SD computed.
    pub fn mstatus(&mut self) -> u64 {
        self.fold_fp_dirty();
        let sd = if self.mstatus & mstatus::FS == mstatus::FS { mstatus::SD } else { 0 };
        self.mstatus | sd
    }

    /// Replaces the bits of `mstatus` in `mask` by those of `value`, within
    /// what is writable, and records what that changes.
    pub fn write_mstatus(&mut self, value: u64, mask: u64) {
        self.fold_fp_dirty();
        let old = self.mstatus;
        let mut mask = mask & mstatus::WRITABLE;
        if !self.config.has_letter(b'F') {
            mask &= !mstatus::FS;
        }
        let mut new = old & !mask | value & mask;
        // MPP is WARL: the reserved encoding keeps the old mode.
        if Privilege::from_bits(new >> mstatus::MPP_SHIFT).is_none() {
            new = new & !mstatus::MPP | old & mstatus::MPP;
        }
        self.mstatus = new;
        let changed = old ^ new;
        let mut effects = CsrEffect::empty();
        let mut translation = mstatus::MPRV | mstatus::SUM | mstatus::MXR;
        if new & mstatus::MPRV != 0 {
            translation |= mstatus::MPP;
        }
        if changed & translation != 0 {
            effects |= CsrEffect::TRANSLATION;
        }
        if changed & new & (mstatus::MIE | mstatus::SIE) != 0 {
            effects |= CsrEffect::INTERRUPTS;
        }
        if changed & mstatus::FS != 0 {
            self.update_fp_bad();
            effects |= CsrEffect::FP_STATE;
        }
        self.record(effects);
    }

    /// Whether the FPU is on (`mstatus.FS` is not Off).
    pub const fn fp_enabled(&self) -> bool {
        self.mstatus & mstatus::FS != 0
    }

    /// Sets the dynamic rounding mode (3 bits).
    pub fn set_frm(&mut self, frm: u8) {
        self.frm = frm & 7;
        self.update_fp_bad();
    }

    /// Recomputes `fp_bad` from `mstatus.FS` and `frm`.
    pub(crate) fn update_fp_bad(&mut self) {
        self.fp_bad = 0;
        if !self.fp_enabled() {
            self.fp_bad |= FP_BAD_OFF;
        }
        if self.frm >= 4 {
            self.fp_bad |= FP_BAD_FRM;
        }
    }

    /// Changes the privilege mode.
    pub(crate) fn enter_mode(&mut self, mode: Privilege) {
        self.privilege = mode;
        self.update_cbz_bad();
    }

    /// Recomputes `cbz_bad` from the mode, `menvcfg` and `senvcfg`.
    pub(crate) fn update_cbz_bad(&mut self) {
        self.cbz_bad = u8::from(check_cbo(self, CboOp::Zero).is_err());
    }

    /// Adds to the recorded effects; every effect also ends the block.
    pub(crate) fn record(&mut self, effects: CsrEffect) {
        if !effects.is_empty() {
            self.effects |= effects | CsrEffect::BLOCK_END;
        }
    }

    /// Returns the effects recorded since the last call and forgets them.
    pub fn take_effects(&mut self) -> CsrEffect {
        std::mem::replace(&mut self.effects, CsrEffect::empty())
    }

    /// The privilege loads and stores are checked with: `mstatus.MPP` while
    /// `mstatus.MPRV` is set, else the current one (section 3.1.6.3).
    pub fn data_privilege(&self) -> Privilege {
        if self.mstatus & mstatus::MPRV != 0 && self.privilege == Privilege::Machine {
            // MPP never holds the reserved encoding (write_mstatus).
            Privilege::from_bits(self.mstatus >> mstatus::MPP_SHIFT).unwrap_or(Privilege::User)
        } else {
            self.privilege
        }
    }

    /// `mstatus.SUM`: S-mode loads and stores may access user pages.
    pub const fn sum(&self) -> bool {
        self.mstatus & mstatus::SUM != 0
    }

    /// `mstatus.MXR`: loads may read execute-only pages.
    pub const fn mxr(&self) -> bool {
        self.mstatus & mstatus::MXR != 0
    }

    /// `satp`.
    pub const fn satp(&self) -> u64 {
        self.satp
    }

    /// The address-space identifier in `satp`.
    pub const fn asid(&self) -> u16 {
        (self.satp >> 44) as u16
    }

    /// `menvcfg`.
    pub const fn menvcfg(&self) -> u64 {
        self.menvcfg
    }

    /// Whether `stimecmp` has been reached at `time`. At its maximum it never is: that is how it is turned off.
    pub const fn timer_due(&self, time: u64) -> bool {
        self.stimecmp != u64::MAX && time >= self.stimecmp
    }

    /// Whether `stimecmp` drives STIP (Sstc turned on by `menvcfg.STCE`).
    pub const fn sstc_enabled(&self) -> bool {
        self.menvcfg & envcfg::STCE != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_generated_code_are_where_it_expects_them() {
        assert_eq!(std::mem::offset_of!(Hart, fp_bad), 0);
        assert_eq!(std::mem::offset_of!(Hart, fp_dirty), 1);
        assert_eq!(std::mem::offset_of!(Hart, cbz_bad), 2);
    }

    #[test]
    fn fp_dirty_folds_into_fs() {
        let mut hart = Hart::new(HartConfig::default());
        hart.fp_dirty = 1;
        assert_eq!(hart.mstatus() & mstatus::FS, 0, "Off stays Off");
        assert_eq!(hart.fp_dirty, 0);
        hart.write_mstatus(1 << mstatus::FS_SHIFT, mstatus::FS);
        assert_eq!(hart.fp_bad, 0);
        assert_eq!(hart.mstatus() & mstatus::SD, 0);
        hart.fp_dirty = 1;
        assert_eq!(hart.mstatus() & (mstatus::FS | mstatus::SD), mstatus::FS | mstatus::SD);
        hart.fp_dirty = 1;
        hart.write_mstatus(2 << mstatus::FS_SHIFT, mstatus::FS);
        assert_eq!(hart.mstatus() & mstatus::FS, 2 << mstatus::FS_SHIFT, "a write of Clean wins over earlier dirt");
        hart.set_frm(4);
        assert_eq!(hart.fp_bad, FP_BAD_FRM);
        hart.write_mstatus(0, mstatus::FS);
        assert_eq!(hart.fp_bad, FP_BAD_FRM | FP_BAD_OFF);
    }

    #[test]
    fn counters_stop_and_keep_their_value() {
        let mut counter = Counter::default();
        assert_eq!(counter.value(7), 7);
        counter.set(10, 100);
        assert_eq!(counter.value(15), 105);
        counter.set_stopped(20, true);
        assert_eq!(counter.value(1000), 110);
        counter.set(1000, 5);
        assert_eq!(counter.value(2000), 5);
        counter.set_stopped(3000, false);
        assert_eq!(counter.value(3004), 9);
    }

    #[test]
    fn mpp_never_takes_the_reserved_mode() {
        let mut hart = Hart::new(HartConfig::default());
        hart.write_mstatus(1 << mstatus::MPP_SHIFT, mstatus::MPP);
        hart.write_mstatus(2 << mstatus::MPP_SHIFT, mstatus::MPP);
        assert_eq!(hart.mstatus() & mstatus::MPP, 1 << mstatus::MPP_SHIFT);
    }

    #[test]
    fn mprv_gives_data_the_previous_mode() {
        let mut hart = Hart::new(HartConfig::default());
        hart.write_mstatus(mstatus::MPRV, mstatus::MPRV | mstatus::MPP);
        assert_eq!(hart.data_privilege(), Privilege::User);
        assert!(hart.take_effects().contains(CsrEffect::TRANSLATION));
        hart.write_mstatus(0, mstatus::MPRV);
        assert_eq!(hart.data_privilege(), Privilege::Machine);
    }
}
