//! A processor without a translator, for unit tests of the architecture's rules.

use std::collections::HashMap;

use mimus_arch::GuestArch;
use mimus_arch::x86::X86Model;
use mimus_core::accel::SysReg;

use crate::host::{Flush, Host, Stop};
use crate::state::State;

pub(crate) struct TestHost {
    pub st: State,
    pub gpr: [u64; 16],
    pub arith: u64,
    pub ip: u64,
    pub memory: Vec<u8>,
    pub flushes: Vec<Flush>,
    pub stopped: Option<Stop>,
    pub events_checked: bool,
    pub sysregs: HashMap<SysReg, u64>,
    /// One whose device does not take what is written.
    pub refused: Option<SysReg>,
    /// What another processor stores just before the next locked cycle: address, bytes and value.
    pub raced: Option<(u64, u32, u64)>,
    /// What has been written to them.
    pub written: Vec<(SysReg, u64)>,
}

impl TestHost {
    /// With 1 MiB of memory, and everything the frontend has.
    pub fn new() -> Self {
        let model =
            X86Model::parse(GuestArch::X86_64, "max").unwrap().restricted_to(crate::cpuid::supported()).unwrap();
        Self {
            st: State::new(&model, 0),
            gpr: [0; 16],
            arith: 0,
            ip: 0,
            memory: vec![0; 1 << 20],
            flushes: Vec::new(),
            stopped: None,
            events_checked: false,
            sysregs: HashMap::new(),
            refused: None,
            raced: None,
            written: Vec::new(),
        }
    }

    pub fn put(&mut self, at: u64, bytes: u32, value: u64) {
        self.phys_write(at, bytes, value);
    }

    pub fn get(&mut self, at: u64, bytes: u32) -> u64 {
        self.phys_read(at, bytes)
    }
}

impl Host for TestHost {
    fn st(&self) -> &State {
        &self.st
    }
    fn st_mut(&mut self) -> &mut State {
        &mut self.st
    }
    fn gpr(&self, n: usize) -> u64 {
        self.gpr[n]
    }
    fn set_gpr(&mut self, n: usize, value: u64) {
        self.gpr[n] = value;
    }
    fn arith(&self) -> u64 {
        self.arith
    }
    fn set_arith(&mut self, flags: u64) {
        self.arith = flags;
    }
    fn base_changed(&mut self, _: usize) {}
    fn set_ip(&mut self, ip: u64) {
        self.ip = ip;
    }
    fn mode_changed(&mut self) {}
    fn smm_changed(&mut self) {}
    fn check_events(&mut self) {
        self.events_checked = true;
    }
    fn flush(&mut self, what: Flush) {
        self.flushes.push(what);
    }
    fn phys_read(&mut self, pa: u64, bytes: u32) -> u64 {
        let pa = pa as usize;
        let Some(from) = self.memory.get(pa..pa + bytes as usize) else { return !0 };
        let mut value = [0; 8];
        value[..from.len()].copy_from_slice(from);
        u64::from_le_bytes(value)
    }
    fn phys_write(&mut self, pa: u64, bytes: u32, value: u64) {
        let pa = pa as usize;
        if let Some(to) = self.memory.get_mut(pa..pa + bytes as usize) {
            to.copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
        }
    }
    fn phys_cmpxchg(&mut self, pa: u64, bytes: u32, old: u64, new: u64) -> bool {
        if let Some((at, bytes, value)) = self.raced.take() {
            self.phys_write(at, bytes, value);
        }
        let same = self.phys_read(pa, bytes) == old;
        if same {
            self.phys_write(pa, bytes, new);
        }
        same
    }
    fn now(&self) -> u64 {
        0
    }
    fn sysreg_read(&mut self, reg: SysReg) -> Option<u64> {
        self.sysregs.get(&reg).copied()
    }
    fn sysreg_write(&mut self, reg: SysReg, value: u64) -> Option<()> {
        if self.refused == Some(reg) {
            return None;
        }
        self.written.push((reg, value));
        self.sysregs.get_mut(&reg).map(|old| *old = value)
    }
    fn stop(&mut self, why: Stop) {
        self.stopped = Some(why);
    }
}
