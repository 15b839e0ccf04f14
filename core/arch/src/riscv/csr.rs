//! CSR numbers and names.
//!
//! Spec: vol. II, 2.2 "CSR Listing" (RV64: no `…h` halves), with Sstc, Smaia/Ssaia,
//! Smstateen, Smcsrind, Smrnmi, Smcntrpmf, Zicfiss, Zkr, V and the debug and trigger CSRs.

/// Every CSR with a standard number, sorted by number.
#[rustfmt::skip]
pub const CSRS: &[(u16, &str)] = &[
    (0x001, "fflags"), (0x002, "frm"), (0x003, "fcsr"), (0x008, "vstart"), (0x009, "vxsat"),
    (0x00a, "vxrm"), (0x00f, "vcsr"), (0x011, "ssp"), (0x015, "seed"), (0x017, "jvt"),
    (0x100, "sstatus"), (0x104, "sie"), (0x105, "stvec"), (0x106, "scounteren"),
    (0x10a, "senvcfg"), (0x10c, "sstateen0"), (0x10d, "sstateen1"), (0x10e, "sstateen2"),
    (0x10f, "sstateen3"), (0x120, "scountinhibit"), (0x140, "sscratch"), (0x141, "sepc"),
    (0x142, "scause"), (0x143, "stval"), (0x144, "sip"), (0x14d, "stimecmp"), (0x150, "siselect"),
    (0x151, "sireg"), (0x152, "sireg2"), (0x153, "sireg3"), (0x155, "sireg4"), (0x156, "sireg5"),
    (0x157, "sireg6"), (0x15c, "stopei"), (0x180, "satp"), (0x181, "srmcfg"), (0x200, "vsstatus"),
    (0x204, "vsie"), (0x205, "vstvec"), (0x240, "vsscratch"), (0x241, "vsepc"),
    (0x242, "vscause"), (0x243, "vstval"), (0x244, "vsip"), (0x24d, "vstimecmp"),
    (0x250, "vsiselect"), (0x251, "vsireg"), (0x25c, "vstopei"), (0x280, "vsatp"),
    (0x300, "mstatus"), (0x301, "misa"), (0x302, "medeleg"), (0x303, "mideleg"), (0x304, "mie"),
    (0x305, "mtvec"), (0x306, "mcounteren"), (0x308, "mvien"), (0x309, "mvip"),
    (0x30a, "menvcfg"), (0x30c, "mstateen0"), (0x30d, "mstateen1"), (0x30e, "mstateen2"),
    (0x30f, "mstateen3"), (0x320, "mcountinhibit"), (0x321, "mcyclecfg"), (0x322, "minstretcfg"),
    (0x323, "mhpmevent3"), (0x324, "mhpmevent4"), (0x325, "mhpmevent5"), (0x326, "mhpmevent6"),
    (0x327, "mhpmevent7"), (0x328, "mhpmevent8"), (0x329, "mhpmevent9"), (0x32a, "mhpmevent10"),
    (0x32b, "mhpmevent11"), (0x32c, "mhpmevent12"), (0x32d, "mhpmevent13"),
    (0x32e, "mhpmevent14"), (0x32f, "mhpmevent15"), (0x330, "mhpmevent16"),
    (0x331, "mhpmevent17"), (0x332, "mhpmevent18"), (0x333, "mhpmevent19"),
    (0x334, "mhpmevent20"), (0x335, "mhpmevent21"), (0x336, "mhpmevent22"),
    (0x337, "mhpmevent23"), (0x338, "mhpmevent24"), (0x339, "mhpmevent25"),
    (0x33a, "mhpmevent26"), (0x33b, "mhpmevent27"), (0x33c, "mhpmevent28"),
    (0x33d, "mhpmevent29"), (0x33e, "mhpmevent30"), (0x33f, "mhpmevent31"), (0x340, "mscratch"),
    (0x341, "mepc"), (0x342, "mcause"), (0x343, "mtval"), (0x344, "mip"), (0x34a, "mtinst"),
    (0x34b, "mtval2"), (0x350, "miselect"), (0x351, "mireg"), (0x352, "mireg2"),
    (0x353, "mireg3"), (0x355, "mireg4"), (0x356, "mireg5"), (0x357, "mireg6"), (0x35c, "mtopei"),
    (0x3a0, "pmpcfg0"), (0x3a2, "pmpcfg2"), (0x3a4, "pmpcfg4"), (0x3a6, "pmpcfg6"),
    (0x3a8, "pmpcfg8"), (0x3aa, "pmpcfg10"), (0x3ac, "pmpcfg12"), (0x3ae, "pmpcfg14"),
    (0x3b0, "pmpaddr0"), (0x3b1, "pmpaddr1"), (0x3b2, "pmpaddr2"), (0x3b3, "pmpaddr3"),
    (0x3b4, "pmpaddr4"), (0x3b5, "pmpaddr5"), (0x3b6, "pmpaddr6"), (0x3b7, "pmpaddr7"),
    (0x3b8, "pmpaddr8"), (0x3b9, "pmpaddr9"), (0x3ba, "pmpaddr10"), (0x3bb, "pmpaddr11"),
    (0x3bc, "pmpaddr12"), (0x3bd, "pmpaddr13"), (0x3be, "pmpaddr14"), (0x3bf, "pmpaddr15"),
    (0x3c0, "pmpaddr16"), (0x3c1, "pmpaddr17"), (0x3c2, "pmpaddr18"), (0x3c3, "pmpaddr19"),
    (0x3c4, "pmpaddr20"), (0x3c5, "pmpaddr21"), (0x3c6, "pmpaddr22"), (0x3c7, "pmpaddr23"),
    (0x3c8, "pmpaddr24"), (0x3c9, "pmpaddr25"), (0x3ca, "pmpaddr26"), (0x3cb, "pmpaddr27"),
    (0x3cc, "pmpaddr28"), (0x3cd, "pmpaddr29"), (0x3ce, "pmpaddr30"), (0x3cf, "pmpaddr31"),
    (0x3d0, "pmpaddr32"), (0x3d1, "pmpaddr33"), (0x3d2, "pmpaddr34"), (0x3d3, "pmpaddr35"),
    (0x3d4, "pmpaddr36"), (0x3d5, "pmpaddr37"), (0x3d6, "pmpaddr38"), (0x3d7, "pmpaddr39"),
    (0x3d8, "pmpaddr40"), (0x3d9, "pmpaddr41"), (0x3da, "pmpaddr42"), (0x3db, "pmpaddr43"),
    (0x3dc, "pmpaddr44"), (0x3dd, "pmpaddr45"), (0x3de, "pmpaddr46"), (0x3df, "pmpaddr47"),
    (0x3e0, "pmpaddr48"), (0x3e1, "pmpaddr49"), (0x3e2, "pmpaddr50"), (0x3e3, "pmpaddr51"),
    (0x3e4, "pmpaddr52"), (0x3e5, "pmpaddr53"), (0x3e6, "pmpaddr54"), (0x3e7, "pmpaddr55"),
    (0x3e8, "pmpaddr56"), (0x3e9, "pmpaddr57"), (0x3ea, "pmpaddr58"), (0x3eb, "pmpaddr59"),
    (0x3ec, "pmpaddr60"), (0x3ed, "pmpaddr61"), (0x3ee, "pmpaddr62"), (0x3ef, "pmpaddr63"),
    (0x5a8, "scontext"), (0x600, "hstatus"), (0x602, "hedeleg"), (0x603, "hideleg"),
    (0x604, "hie"), (0x605, "htimedelta"), (0x606, "hcounteren"), (0x607, "hgeie"),
    (0x608, "hvien"), (0x609, "hvictl"), (0x60a, "henvcfg"), (0x60c, "hstateen0"),
    (0x60d, "hstateen1"), (0x60e, "hstateen2"), (0x60f, "hstateen3"), (0x643, "htval"),
    (0x644, "hip"), (0x645, "hvip"), (0x646, "hviprio1"), (0x647, "hviprio2"), (0x64a, "htinst"),
    (0x680, "hgatp"), (0x6a8, "hcontext"), (0x740, "mnscratch"), (0x741, "mnepc"),
    (0x742, "mncause"), (0x744, "mnstatus"), (0x747, "mseccfg"), (0x7a0, "tselect"),
    (0x7a1, "tdata1"), (0x7a2, "tdata2"), (0x7a3, "tdata3"), (0x7a4, "tinfo"),
    (0x7a8, "mcontext"), (0x7b0, "dcsr"), (0x7b1, "dpc"), (0x7b2, "dscratch0"),
    (0x7b3, "dscratch1"), (0xb00, "mcycle"), (0xb02, "minstret"), (0xb03, "mhpmcounter3"),
    (0xb04, "mhpmcounter4"), (0xb05, "mhpmcounter5"), (0xb06, "mhpmcounter6"),
    (0xb07, "mhpmcounter7"), (0xb08, "mhpmcounter8"), (0xb09, "mhpmcounter9"),
    (0xb0a, "mhpmcounter10"), (0xb0b, "mhpmcounter11"), (0xb0c, "mhpmcounter12"),
    (0xb0d, "mhpmcounter13"), (0xb0e, "mhpmcounter14"), (0xb0f, "mhpmcounter15"),
    (0xb10, "mhpmcounter16"), (0xb11, "mhpmcounter17"), (0xb12, "mhpmcounter18"),
    (0xb13, "mhpmcounter19"), (0xb14, "mhpmcounter20"), (0xb15, "mhpmcounter21"),
    (0xb16, "mhpmcounter22"), (0xb17, "mhpmcounter23"), (0xb18, "mhpmcounter24"),
    (0xb19, "mhpmcounter25"), (0xb1a, "mhpmcounter26"), (0xb1b, "mhpmcounter27"),
    (0xb1c, "mhpmcounter28"), (0xb1d, "mhpmcounter29"), (0xb1e, "mhpmcounter30"),
    (0xb1f, "mhpmcounter31"), (0xc00, "cycle"), (0xc01, "time"), (0xc02, "instret"),
    (0xc03, "hpmcounter3"), (0xc04, "hpmcounter4"), (0xc05, "hpmcounter5"),
    (0xc06, "hpmcounter6"), (0xc07, "hpmcounter7"), (0xc08, "hpmcounter8"),
    (0xc09, "hpmcounter9"), (0xc0a, "hpmcounter10"), (0xc0b, "hpmcounter11"),
    (0xc0c, "hpmcounter12"), (0xc0d, "hpmcounter13"), (0xc0e, "hpmcounter14"),
    (0xc0f, "hpmcounter15"), (0xc10, "hpmcounter16"), (0xc11, "hpmcounter17"),
    (0xc12, "hpmcounter18"), (0xc13, "hpmcounter19"), (0xc14, "hpmcounter20"),
    (0xc15, "hpmcounter21"), (0xc16, "hpmcounter22"), (0xc17, "hpmcounter23"),
    (0xc18, "hpmcounter24"), (0xc19, "hpmcounter25"), (0xc1a, "hpmcounter26"),
    (0xc1b, "hpmcounter27"), (0xc1c, "hpmcounter28"), (0xc1d, "hpmcounter29"),
    (0xc1e, "hpmcounter30"), (0xc1f, "hpmcounter31"), (0xc20, "vl"), (0xc21, "vtype"),
    (0xc22, "vlenb"), (0xda0, "scountovf"), (0xdb0, "stopi"), (0xe12, "hgeip"), (0xeb0, "vstopi"),
    (0xf11, "mvendorid"), (0xf12, "marchid"), (0xf13, "mimpid"), (0xf14, "mhartid"),
    (0xf15, "mconfigptr"), (0xfb0, "mtopi"),
];

/// Numbers of the CSRs, by upper-case name; the numbered families are functions below.
#[allow(missing_docs)]
pub mod number {
    pub const FFLAGS: u16 = 0x001;
    pub const FRM: u16 = 0x002;
    pub const FCSR: u16 = 0x003;
    pub const VSTART: u16 = 0x008;
    pub const VXSAT: u16 = 0x009;
    pub const VXRM: u16 = 0x00a;
    pub const VCSR: u16 = 0x00f;
    pub const SSP: u16 = 0x011;
    pub const SEED: u16 = 0x015;
    pub const JVT: u16 = 0x017;
    pub const SSTATUS: u16 = 0x100;
    pub const SIE: u16 = 0x104;
    pub const STVEC: u16 = 0x105;
    pub const SCOUNTEREN: u16 = 0x106;
    pub const SENVCFG: u16 = 0x10a;
    pub const SSTATEEN0: u16 = 0x10c;
    pub const SSTATEEN1: u16 = 0x10d;
    pub const SSTATEEN2: u16 = 0x10e;
    pub const SSTATEEN3: u16 = 0x10f;
    pub const SCOUNTINHIBIT: u16 = 0x120;
    pub const SSCRATCH: u16 = 0x140;
    pub const SEPC: u16 = 0x141;
    pub const SCAUSE: u16 = 0x142;
    pub const STVAL: u16 = 0x143;
    pub const SIP: u16 = 0x144;
    pub const STIMECMP: u16 = 0x14d;
    pub const SISELECT: u16 = 0x150;
    pub const SIREG: u16 = 0x151;
    pub const SIREG2: u16 = 0x152;
    pub const SIREG3: u16 = 0x153;
    pub const SIREG4: u16 = 0x155;
    pub const SIREG5: u16 = 0x156;
    pub const SIREG6: u16 = 0x157;
    pub const STOPEI: u16 = 0x15c;
    pub const SATP: u16 = 0x180;
    pub const SRMCFG: u16 = 0x181;
    pub const VSSTATUS: u16 = 0x200;
    pub const VSIE: u16 = 0x204;
    pub const VSTVEC: u16 = 0x205;
    pub const VSSCRATCH: u16 = 0x240;
    pub const VSEPC: u16 = 0x241;
    pub const VSCAUSE: u16 = 0x242;
    pub const VSTVAL: u16 = 0x243;
    pub const VSIP: u16 = 0x244;
    pub const VSTIMECMP: u16 = 0x24d;
    pub const VSISELECT: u16 = 0x250;
    pub const VSIREG: u16 = 0x251;
    pub const VSTOPEI: u16 = 0x25c;
    pub const VSATP: u16 = 0x280;
    pub const MSTATUS: u16 = 0x300;
    pub const MISA: u16 = 0x301;
    pub const MEDELEG: u16 = 0x302;
    pub const MIDELEG: u16 = 0x303;
    pub const MIE: u16 = 0x304;
    pub const MTVEC: u16 = 0x305;
    pub const MCOUNTEREN: u16 = 0x306;
    pub const MVIEN: u16 = 0x308;
    pub const MVIP: u16 = 0x309;
    pub const MENVCFG: u16 = 0x30a;
    pub const MSTATEEN0: u16 = 0x30c;
    pub const MSTATEEN1: u16 = 0x30d;
    pub const MSTATEEN2: u16 = 0x30e;
    pub const MSTATEEN3: u16 = 0x30f;
    pub const MCOUNTINHIBIT: u16 = 0x320;
    pub const MCYCLECFG: u16 = 0x321;
    pub const MINSTRETCFG: u16 = 0x322;
    pub const MSCRATCH: u16 = 0x340;
    pub const MEPC: u16 = 0x341;
    pub const MCAUSE: u16 = 0x342;
    pub const MTVAL: u16 = 0x343;
    pub const MIP: u16 = 0x344;
    pub const MTINST: u16 = 0x34a;
    pub const MTVAL2: u16 = 0x34b;
    pub const MISELECT: u16 = 0x350;
    pub const MIREG: u16 = 0x351;
    pub const MIREG2: u16 = 0x352;
    pub const MIREG3: u16 = 0x353;
    pub const MIREG4: u16 = 0x355;
    pub const MIREG5: u16 = 0x356;
    pub const MIREG6: u16 = 0x357;
    pub const MTOPEI: u16 = 0x35c;
    pub const SCONTEXT: u16 = 0x5a8;
    pub const HSTATUS: u16 = 0x600;
    pub const HEDELEG: u16 = 0x602;
    pub const HIDELEG: u16 = 0x603;
    pub const HIE: u16 = 0x604;
    pub const HTIMEDELTA: u16 = 0x605;
    pub const HCOUNTEREN: u16 = 0x606;
    pub const HGEIE: u16 = 0x607;
    pub const HVIEN: u16 = 0x608;
    pub const HVICTL: u16 = 0x609;
    pub const HENVCFG: u16 = 0x60a;
    pub const HSTATEEN0: u16 = 0x60c;
    pub const HSTATEEN1: u16 = 0x60d;
    pub const HSTATEEN2: u16 = 0x60e;
    pub const HSTATEEN3: u16 = 0x60f;
    pub const HTVAL: u16 = 0x643;
    pub const HIP: u16 = 0x644;
    pub const HVIP: u16 = 0x645;
    pub const HVIPRIO1: u16 = 0x646;
    pub const HVIPRIO2: u16 = 0x647;
    pub const HTINST: u16 = 0x64a;
    pub const HGATP: u16 = 0x680;
    pub const HCONTEXT: u16 = 0x6a8;
    pub const MNSCRATCH: u16 = 0x740;
    pub const MNEPC: u16 = 0x741;
    pub const MNCAUSE: u16 = 0x742;
    pub const MNSTATUS: u16 = 0x744;
    pub const MSECCFG: u16 = 0x747;
    pub const TSELECT: u16 = 0x7a0;
    pub const TDATA1: u16 = 0x7a1;
    pub const TDATA2: u16 = 0x7a2;
    pub const TDATA3: u16 = 0x7a3;
    pub const TINFO: u16 = 0x7a4;
    pub const MCONTEXT: u16 = 0x7a8;
    pub const DCSR: u16 = 0x7b0;
    pub const DPC: u16 = 0x7b1;
    pub const DSCRATCH0: u16 = 0x7b2;
    pub const DSCRATCH1: u16 = 0x7b3;
    pub const MCYCLE: u16 = 0xb00;
    pub const MINSTRET: u16 = 0xb02;
    pub const CYCLE: u16 = 0xc00;
    pub const TIME: u16 = 0xc01;
    pub const INSTRET: u16 = 0xc02;
    pub const VL: u16 = 0xc20;
    pub const VTYPE: u16 = 0xc21;
    pub const VLENB: u16 = 0xc22;
    pub const SCOUNTOVF: u16 = 0xda0;
    pub const STOPI: u16 = 0xdb0;
    pub const HGEIP: u16 = 0xe12;
    pub const VSTOPI: u16 = 0xeb0;
    pub const MVENDORID: u16 = 0xf11;
    pub const MARCHID: u16 = 0xf12;
    pub const MIMPID: u16 = 0xf13;
    pub const MHARTID: u16 = 0xf14;
    pub const MCONFIGPTR: u16 = 0xf15;
    pub const MTOPI: u16 = 0xfb0;
    pub const PMPCFG0: u16 = 0x3a0;
    pub const PMPADDR0: u16 = 0x3b0;
    pub const MHPMEVENT3: u16 = 0x323;
    pub const MHPMCOUNTER3: u16 = 0xb03;
    pub const HPMCOUNTER3: u16 = 0xc03;
}

/// The name of CSR `number`.
pub fn name(number: u16) -> Option<&'static str> {
    CSRS.binary_search_by_key(&number, |c| c.0).ok().map(|i| CSRS[i].1)
}

/// The number of the CSR called `name`.
pub fn by_name(name: &str) -> Option<u16> {
    CSRS.iter().find(|c| c.1 == name).map(|c| c.0)
}

/// The lowest privilege that may access the CSR, from bits 9:8 (vol. II, 2.1);
/// 2 is hypervisor/VS.
pub const fn lowest_privilege(number: u16) -> u8 {
    (number >> 8 & 3) as u8
}

/// True if the CSR is read-only, from bits 11:10 (vol. II, 2.1).
pub const fn is_read_only(number: u16) -> bool {
    number >> 10 & 3 == 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_consistent() {
        assert!(CSRS.windows(2).all(|w| w[0].0 < w[1].0));
        for &(n, s) in CSRS {
            assert_eq!((name(n), by_name(s)), (Some(s), Some(n)));
        }
        assert_eq!(by_name("satp"), Some(number::SATP));
        assert_eq!(name(0x7c0), None);
        assert!(is_read_only(number::MHARTID) && !is_read_only(number::MSTATUS));
        assert_eq!(lowest_privilege(number::SATP), 1);
    }
}
