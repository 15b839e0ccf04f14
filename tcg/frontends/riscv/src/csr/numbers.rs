//! CSR addresses (privileged manual, tables 3 to 8).

/// Accrued floating-point exceptions.
pub const FFLAGS: u16 = 0x001;
/// Dynamic rounding mode.
pub const FRM: u16 = 0x002;
/// `frm` and `fflags` together.
pub const FCSR: u16 = 0x003;

/// Supervisor status.
pub const SSTATUS: u16 = 0x100;
/// Supervisor interrupt enables.
pub const SIE: u16 = 0x104;
/// Supervisor trap vector.
pub const STVEC: u16 = 0x105;
/// Counters U-mode may read.
pub const SCOUNTEREN: u16 = 0x106;
/// Supervisor environment configuration.
pub const SENVCFG: u16 = 0x10a;
/// Supervisor scratch register.
pub const SSCRATCH: u16 = 0x140;
/// Supervisor exception pc.
pub const SEPC: u16 = 0x141;
/// Supervisor trap cause.
pub const SCAUSE: u16 = 0x142;
/// Supervisor trap value.
pub const STVAL: u16 = 0x143;
/// Supervisor interrupts pending.
pub const SIP: u16 = 0x144;
/// Supervisor timer compare (Sstc).
pub const STIMECMP: u16 = 0x14d;
/// Supervisor address translation and protection.
pub const SATP: u16 = 0x180;

/// Machine status.
pub const MSTATUS: u16 = 0x300;
/// ISA and extensions.
pub const MISA: u16 = 0x301;
/// Exceptions delegated to S-mode.
pub const MEDELEG: u16 = 0x302;
/// Interrupts delegated to S-mode.
pub const MIDELEG: u16 = 0x303;
/// Machine interrupt enables.
pub const MIE: u16 = 0x304;
/// Machine trap vector.
pub const MTVEC: u16 = 0x305;
/// Counters S-mode may read.
pub const MCOUNTEREN: u16 = 0x306;
/// Machine environment configuration.
pub const MENVCFG: u16 = 0x30a;
/// Counters that do not count.
pub const MCOUNTINHIBIT: u16 = 0x320;
/// First event selector; they end at 0x33f.
pub const MHPMEVENT3: u16 = 0x323;
/// Last event selector.
pub const MHPMEVENT31: u16 = 0x33f;
/// Machine scratch register.
pub const MSCRATCH: u16 = 0x340;
/// Machine exception pc.
pub const MEPC: u16 = 0x341;
/// Machine trap cause.
pub const MCAUSE: u16 = 0x342;
/// Machine trap value.
pub const MTVAL: u16 = 0x343;
/// Machine interrupts pending.
pub const MIP: u16 = 0x344;
/// PMP configuration of entries 0 to 7.
pub const PMPCFG0: u16 = 0x3a0;
/// PMP configuration of entries 8 to 15.
pub const PMPCFG2: u16 = 0x3a2;
/// PMP address 0; they end at 0x3bf.
pub const PMPADDR0: u16 = 0x3b0;
/// PMP address 15.
pub const PMPADDR15: u16 = 0x3bf;

/// Machine cycle counter.
pub const MCYCLE: u16 = 0xb00;
/// Machine instructions-retired counter.
pub const MINSTRET: u16 = 0xb02;
/// First machine performance counter.
pub const MHPMCOUNTER3: u16 = 0xb03;
/// Last machine performance counter.
pub const MHPMCOUNTER31: u16 = 0xb1f;
/// Cycle counter.
pub const CYCLE: u16 = 0xc00;
/// Wall-clock time.
pub const TIME: u16 = 0xc01;
/// Instructions retired.
pub const INSTRET: u16 = 0xc02;
/// First performance counter.
pub const HPMCOUNTER3: u16 = 0xc03;
/// Last performance counter.
pub const HPMCOUNTER31: u16 = 0xc1f;

/// Vendor.
pub const MVENDORID: u16 = 0xf11;
/// Architecture.
pub const MARCHID: u16 = 0xf12;
/// Implementation.
pub const MIMPID: u16 = 0xf13;
/// Hart number.
pub const MHARTID: u16 = 0xf14;
/// Configuration structure (none: 0).
pub const MCONFIGPTR: u16 = 0xf15;
