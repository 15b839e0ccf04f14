//! What a debugger may have a vCPU stop at, beside addresses of code and data.

use super::exit::WatchKind;

/// A register of the system that an instruction names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SystemRegister {
    /// A RISC-V CSR.
    Csr(u16),
    /// An x86 model-specific register.
    Msr(u32),
    /// An x86 control register: CR0 to CR8.
    Control(u8),
}

/// What to stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Catch {
    /// An exception is taken: this one (RISC-V: `mcause`, x86: the vector), or any.
    Exception(Option<u64>),
    /// An interrupt is taken: this one, or any.
    Interrupt(Option<u64>),
    /// An instruction accesses a system register.
    Register {
        /// Which.
        register: SystemRegister,
        /// Reads, writes or both.
        kind: WatchKind,
    },
    /// An instruction accesses an x86 port between these two.
    Port {
        /// The first.
        first: u16,
        /// The last.
        last: u16,
        /// Reads, writes or both.
        kind: WatchKind,
    },
    /// An instruction accesses a device between these physical addresses.
    Device {
        /// The first.
        first: u64,
        /// The last.
        last: u64,
        /// Reads, writes or both.
        kind: WatchKind,
    },
    /// The mode changes to one whose number (see [`Caught::Mode`]) has `value` in the bits of `mask`, from one that
    /// has not; to any other, if there are none.
    Mode {
        /// Bits that count.
        mask: u32,
        /// What is in them.
        value: u32,
    },
    /// Another address space: to this root of page tables (`satp`, CR3), or to any.
    Space(Option<u64>),
}

/// What a vCPU stopped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caught {
    /// An exception or interrupt; its handler's first instruction is next.
    Exception {
        /// It is an interrupt.
        interrupt: bool,
        /// `mcause` without its highest bit; the vector.
        cause: u64,
        /// Address of the instruction that it was taken at.
        pc: u64,
        /// An address or error code.
        value: u64,
    },
    /// A system register was accessed.
    Register {
        /// Which.
        register: SystemRegister,
        /// It was written.
        writes: bool,
        /// What was read or written.
        value: u64,
    },
    /// A port was accessed.
    Port {
        /// Which.
        port: u16,
        /// It was written.
        writes: bool,
        /// What was read or written.
        value: u64,
    },
    /// A device was accessed.
    Device {
        /// Physical address.
        pa: u64,
        /// It was written.
        writes: bool,
        /// What was read or written.
        value: u64,
    },
    /// The mode changed. RISC-V: 0 user, 1 supervisor, 3 machine. x86: the CPL; [`MODE_KIND`], of [`MODE_REAL`] and
    /// so on; [`MODE_SMM`].
    Mode {
        /// What it was.
        from: u32,
        /// What it is.
        to: u32,
    },
    /// The root of page tables changed.
    Space {
        /// What it was.
        from: u64,
        /// What it is.
        to: u64,
    },
}

/// Bits of an x86 mode's number for its kind.
pub const MODE_KIND: u32 = 7 << 2;
/// Real mode.
pub const MODE_REAL: u32 = 0;
/// Virtual-8086 mode.
pub const MODE_V86: u32 = 1 << 2;
/// Protected mode, without long mode.
pub const MODE_PROTECTED: u32 = 2 << 2;
/// Compatibility mode of long mode.
pub const MODE_COMPATIBILITY: u32 = 3 << 2;
/// 64-bit mode.
pub const MODE_LONG: u32 = 4 << 2;
/// Bit of an x86 mode's number: system management mode.
pub const MODE_SMM: u32 = 1 << 5;

fn accesses(kind: WatchKind, writes: bool) -> bool {
    match kind {
        WatchKind::Read => !writes,
        WatchKind::Write => writes,
        WatchKind::ReadWrite => true,
    }
}

impl Catch {
    /// Whether it is for what happened.
    pub fn matches(&self, caught: &Caught) -> bool {
        match (*self, *caught) {
            (Catch::Exception(n), Caught::Exception { interrupt: false, cause, .. })
            | (Catch::Interrupt(n), Caught::Exception { interrupt: true, cause, .. }) => n.is_none_or(|n| n == cause),
            (Catch::Register { register, kind }, Caught::Register { register: r, writes, .. }) => {
                register == r && accesses(kind, writes)
            }
            (Catch::Port { first, last, kind }, Caught::Port { port, writes, .. }) => {
                (first..=last).contains(&port) && accesses(kind, writes)
            }
            (Catch::Device { first, last, kind }, Caught::Device { pa, writes, .. }) => {
                (first..=last).contains(&pa) && accesses(kind, writes)
            }
            (Catch::Mode { mask, value }, Caught::Mode { from, to }) => {
                to & mask == value && (mask == 0 || from & mask != value)
            }
            (Catch::Space(root), Caught::Space { to, .. }) => root.is_none_or(|r| r == to),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_what() {
        let fault = Caught::Exception { interrupt: false, cause: 13, pc: 0, value: 0 };
        assert!(Catch::Exception(None).matches(&fault) && Catch::Exception(Some(13)).matches(&fault));
        assert!(!Catch::Exception(Some(5)).matches(&fault) && !Catch::Interrupt(None).matches(&fault));
        let port = Caught::Port { port: 0x3f9, writes: true, value: 1 };
        let catch = |kind| Catch::Port { first: 0x3f8, last: 0x3ff, kind };
        assert!(catch(WatchKind::Write).matches(&port) && !catch(WatchKind::Read).matches(&port));
        let long = Catch::Mode { mask: MODE_KIND, value: MODE_LONG };
        assert!(long.matches(&Caught::Mode { from: MODE_PROTECTED, to: MODE_LONG }));
        assert!(!long.matches(&Caught::Mode { from: MODE_LONG, to: MODE_LONG | 3 }), "another privilege only");
        assert!(Catch::Mode { mask: 0, value: 0 }.matches(&Caught::Mode { from: 1, to: 0 }));
        assert!(!Catch::Space(Some(4)).matches(&Caught::Space { from: 4, to: 5 }));
    }
}
