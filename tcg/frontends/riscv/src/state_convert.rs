//! The hart's privileged state to and from [`RiscvState`], the form that
//! debugger, monitor and snapshots exchange.
//!
//! Both ways the hart is not running: its counters are suspended and the host
//! FPU's flags have been folded into [`Hart::fflags`].

use mimus_arch::riscv::RiscvState;

use crate::state::{Counter, Hart, envcfg, irq, mstatus};

impl Hart {
    /// The hart's state with these pin levels; registers, pc and `waiting`
    /// are left at reset values.
    pub fn to_arch(&mut self, pins: u64) -> RiscvState {
        let mut state = RiscvState::new(self.config.hart_id, self.config.misa, 0);
        state.privilege = self.privilege;
        state.fcsr = u64::from(self.frm) << 5 | u64::from(self.fflags);
        state.mstatus = self.mstatus();
        state.medeleg = self.medeleg;
        state.mideleg = self.mideleg;
        state.mie = self.mie;
        state.mip = self.mip(pins);
        state.pins = pins & irq::ALL & !irq::SSI;
        state.mtvec = self.mtvec;
        state.mcounteren = self.mcounteren;
        state.mcountinhibit = self.mcountinhibit;
        state.menvcfg = self.menvcfg;
        state.mscratch = self.mscratch;
        state.mepc = self.mepc;
        state.mcause = self.mcause;
        state.mtval = self.mtval;
        state.mcycle = self.cycle.suspended();
        state.minstret = self.instret.suspended();
        state.pmpcfg = *self.pmp.configs();
        state.pmpaddr = *self.pmp.addresses();
        state.stvec = self.stvec;
        state.scounteren = self.scounteren;
        state.senvcfg = self.senvcfg;
        state.sscratch = self.sscratch;
        state.sepc = self.sepc;
        state.scause = self.scause;
        state.stval = self.stval;
        state.satp = self.satp;
        state.stimecmp = self.stimecmp;
        state
    }

    /// Replaces the hart's state by `state`, made legal as CSR writes would.
    ///
    /// Of `mip` only SSIP and, without Sstc, a STIP that no pin accounts for are
    /// taken: the pins, and so SEIP, are driven again by what they are connected to.
    ///
    /// # Errors
    /// One line, the hart unchanged, when the state is of another kind of hart.
    pub fn set_arch(&mut self, state: &RiscvState) -> Result<(), String> {
        self.check_arch(state)?;
        let seip = self.mip_soft & irq::SEI;
        let pc_mask = self.config.pc_mask();
        *self = Self::new(self.config);
        self.enter_mode(state.privilege);
        self.fflags = state.fcsr as u8 & 0x1f;
        self.frm = (state.fcsr >> 5) as u8 & 7;
        self.write_mstatus(state.mstatus, mstatus::WRITABLE);
        self.update_fp_bad();
        self.set_menvcfg(state.menvcfg);
        self.set_senvcfg(state.senvcfg);
        self.medeleg = state.medeleg & crate::csr::MEDELEG_WRITABLE;
        self.mideleg = state.mideleg & irq::S_ALL;
        self.mie = state.mie & irq::ALL;
        let software = if self.sstc_enabled() { irq::SSI } else { irq::SSI | irq::STI };
        // Taken as software's, the level of a firmware's timer would stay for ever.
        self.mip_soft = state.mip & !state.pins & software | seip;
        self.mtvec = state.mtvec & !2;
        self.mcounteren = state.mcounteren & 0xffff_ffff;
        self.mcountinhibit = state.mcountinhibit & 5;
        self.mscratch = state.mscratch;
        self.mepc = state.mepc & pc_mask;
        self.mcause = state.mcause;
        self.mtval = state.mtval;
        self.cycle = Counter::at(state.mcycle, state.mcountinhibit & 1 != 0);
        self.instret = Counter::at(state.minstret, state.mcountinhibit & 4 != 0);
        self.pmp.restore(state.pmpcfg, state.pmpaddr);
        self.stvec = state.stvec & !2;
        self.scounteren = state.scounteren & 0xffff_ffff;
        self.sscratch = state.sscratch;
        self.sepc = state.sepc & pc_mask;
        self.scause = state.scause;
        self.stval = state.stval;
        self.satp = state.satp;
        self.stimecmp = state.stimecmp;
        Ok(())
    }

    /// Whether a hart of this configuration can be in `state`.
    fn check_arch(&self, state: &RiscvState) -> Result<(), String> {
        let hart = self.config.hart_id;
        if state.mhartid != hart {
            return Err(format!("hart {hart}: the state is of hart {}", state.mhartid));
        }
        if state.misa != self.config.misa {
            return Err(format!(
                "hart {hart}: the state has misa {:#x}, the CPU model {:#x}: use the model the state was saved with",
                state.misa, self.config.misa
            ));
        }
        if !self.is_legal_satp(state.satp) {
            return Err(format!("hart {hart}: satp {:#x} has a mode the CPU model lacks", state.satp));
        }
        if !state.v.is_empty() || state.mseccfg != 0 {
            return Err(format!("hart {hart}: the state has vector registers or mseccfg, which TCG lacks"));
        }
        Ok(())
    }

    /// Leaves the hart as SBI firmware hands it to a supervisor: S-mode, all
    /// that can be delegated to it but its own environment calls, counters,
    /// timer and cache operations open, memory accessible.
    pub fn enter_supervisor(&mut self) {
        const SUPERVISOR_CALL: u64 = 1 << 9;
        const ALL_OF_MEMORY: u64 = (1 << 54) - 1;
        self.enter_mode(mimus_arch::riscv::Privilege::Supervisor);
        self.medeleg = crate::csr::MEDELEG_WRITABLE & !SUPERVISOR_CALL;
        self.mideleg = irq::S_ALL;
        self.mcounteren = 0xffff_ffff;
        // cycle, time and instret for user mode too: C libraries read `time`, and a kernel without the SBI's
        // counter extension leaves what firmware set.
        self.scounteren = 7;
        let mut environment = envcfg::SENVCFG | envcfg::PBMTE | envcfg::STCE;
        // Both named: the supervisor asks for the one it wants, and Svade is
        // what it gets until then.
        if !self.config.features.has(mimus_arch::riscv::Ext::Svade) {
            environment |= envcfg::ADUE;
        }
        self.set_menvcfg(environment);
        let (mut config, mut address) = ([0; 16], [0; 16]);
        (config[0], address[0]) = (0x1f, ALL_OF_MEMORY);
        self.pmp.restore(config, address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::HartConfig;
    use mimus_arch::riscv::Privilege;

    /// A state with every field different from its reset value.
    fn busy() -> RiscvState {
        let config = HartConfig::default();
        let mut state = RiscvState::new(config.hart_id, config.misa, 0);
        state.privilege = Privilege::Supervisor;
        state.fcsr = 0x71;
        state.mstatus |= 0x8000_0000_0002_78aa;
        state.medeleg = 0xb109;
        state.mideleg = 0x222;
        state.mie = 0x2aa;
        state.mip = 2;
        state.mtvec = 0x8000_0001;
        state.mcounteren = 7;
        state.mcountinhibit = 4;
        state.menvcfg = 1 << 63 | 0xf1;
        state.mscratch = 1;
        state.mepc = 0x8000_0002;
        state.mcause = 1 << 63 | 7;
        state.mtval = 4;
        state.mcycle = 5;
        state.minstret = 6;
        state.pmpcfg = [0x9f, 0x18, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x1f];
        state.pmpaddr = std::array::from_fn(|i| i as u64 * 0x1000);
        state.stvec = 0xffff_ffff_8000_0000;
        state.scounteren = 7;
        state.senvcfg = 0x80;
        state.sscratch = 8;
        state.sepc = 10;
        state.scause = 12;
        state.stval = 13;
        state.satp = 9 << 60 | 7 << 44 | 0x8_0000;
        state.stimecmp = 99;
        state
    }

    #[test]
    fn a_state_survives_the_hart() {
        let mut hart = Hart::new(HartConfig::default());
        let state = busy();
        hart.set_arch(&state).unwrap();
        assert_eq!(hart.to_arch(0), state);
        assert_eq!(hart.fp_bad, 0);
        hart.cycle.resume(1000);
        assert_eq!(hart.cycle.value(1001), 6);
        hart.instret.resume(1000);
        assert_eq!(hart.instret.value(2000), 6, "stopped by mcountinhibit");
        hart.cycle.suspend(1010);
        assert_eq!(hart.to_arch(0).mcycle, 15);
    }

    #[test]
    fn a_reset_hart_is_a_reset_state() {
        let config = HartConfig::default();
        let mut hart = Hart::new(config);
        assert_eq!(hart.to_arch(0), RiscvState::new(config.hart_id, config.misa, 0));
    }

    #[test]
    fn states_of_other_harts_are_refused() {
        let mut hart = Hart::new(HartConfig::default());
        let mut refused = |change: fn(&mut RiscvState), why: &str| {
            let mut state = busy();
            change(&mut state);
            let message = hart.set_arch(&state).unwrap_err();
            assert!(message.contains(why), "{message}");
            assert_eq!(hart.stimecmp, u64::MAX, "unchanged");
        };
        refused(|s| s.mhartid = 1, "of hart 1");
        refused(|s| s.misa = 0, "misa");
        refused(|s| s.satp = 1 << 60, "satp");
        refused(|s| s.v = vec![0], "vector");
    }

    #[test]
    fn hostile_values_are_made_legal() {
        let mut state = busy();
        state.mstatus = !(1 << 11);
        state.pmpcfg = [0xff; 16];
        state.fcsr = !0;
        state.mip = !0;
        state.menvcfg = !0;
        let mut hart = Hart::new(HartConfig::default());
        hart.set_arch(&state).unwrap();
        assert!(Privilege::from_bits(hart.mstatus >> mstatus::MPP_SHIFT).is_some());
        assert_eq!(hart.mip_soft, irq::SSI);
        assert_eq!(hart.pmp.configs(), &[0x9f; 16]);
    }

    #[test]
    fn a_supervisor_starts_with_everything_open() {
        let mut hart = Hart::new(HartConfig::default());
        hart.enter_supervisor();
        assert_eq!(hart.privilege, Privilege::Supervisor);
        assert_eq!(hart.pmp.page_permissions(0x8000_0000, Privilege::User), Some(crate::pmp::Permissions::ALL));
        assert!(hart.sstc_enabled());
        assert_eq!(hart.medeleg >> 9 & 1, 0);
    }
}
