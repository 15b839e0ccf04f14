//! A processor's registers as gdb numbers, names and describes them.
//!
//! Spec: Debugging with GDB, "i386 Features" (Appendix G.5.5). gdb decodes instructions by the architecture that the
//! description names, so there is one description per width of code ([`View`]). The description of 16- and 32-bit
//! code on a processor with long mode also has the registers that gdb wants of a 64-bit one: a client whose file
//! is 64-bit takes them then.
//!
//! `$pc` is the linear address of the next instruction, as all addresses gdb deals in are: in real mode CS base + IP.
//! Beyond gdb's features there are those of [`SYSTEM`]. Left out: AVX-512, protection keys, bound registers.

use super::msr;
use super::regs::*;
use super::state::{Segment, X86State, attr};
use super::xsave;
use std::fmt::Write;

/// Width of the code that a description is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Width {
    /// Real mode, virtual-8086 mode, 16-bit segments.
    W16,
    /// 32-bit segments.
    W32,
    /// 64-bit mode.
    W64,
}

/// What a description depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// The code's width.
    pub width: Width,
    /// The processor has long mode.
    pub long_mode: bool,
    /// And AVX.
    pub avx: bool,
}

/// The width of the code that executes.
pub fn width(s: &X86State) -> Width {
    let long = s.efer & EFER_LMA != 0;
    let real = s.cr0 & CR0_PE == 0 || !long && s.rflags & RFLAGS_VM != 0;
    match s.cs.attributes {
        _ if real => Width::W16,
        a if long && a & attr::L != 0 => Width::W64,
        a if a & attr::DB != 0 => Width::W32,
        _ => Width::W16,
    }
}

/// Where a register's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Gpr(u8),
    Pc,
    Flags,
    Selector(u8),
    Base(u8),
    St(u8),
    Fpu(u8),
    Xmm(u8),
    Mxcsr,
    YmmHigh(u8),
    System(SystemPlace),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SystemPlace {
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
    Xcr0,
    Dr(u8),
    Dr6,
    Dr7,
    ApicBase,
    Tsc,
    TableBase(bool),
    TableLimit(bool),
    Selector(u8),
    Base(u8),
    Msr(u32),
}

struct Reg {
    name: &'static str,
    /// gdb's number.
    number: u32,
    bytes: usize,
    kind: &'static str,
    place: Place,
    feature: Feature,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Feature {
    Core,
    Sse,
    Segments,
    Avx,
    System,
}

impl Feature {
    const ALL: [Feature; 5] = [Self::Core, Self::Sse, Self::Segments, Self::Avx, Self::System];

    const fn name(self) -> &'static str {
        match self {
            Self::Core => "org.gnu.gdb.i386.core",
            Self::Sse => "org.gnu.gdb.i386.sse",
            Self::Segments => "org.gnu.gdb.i386.segments",
            Self::Avx => "org.gnu.gdb.i386.avx",
            Self::System => "org.mimus.i386.system",
        }
    }
}

/// gdb's order of the general registers: numbers in encoding order.
const ORDER64: [u8; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
const NAMES32: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];
/// As [`X86State::segments`] has them.
const SEGMENTS: [(&str, u8); 6] = [("cs", 1), ("ss", 2), ("ds", 3), ("es", 0), ("fs", 4), ("gs", 5)];
const ST: [&str; 8] = ["st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7"];
const FPU: [&str; 8] = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"];
const XMM: [&str; 16] = [
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
    "xmm14", "xmm15",
];
const YMMH: [&str; 16] = [
    "ymm0h", "ymm1h", "ymm2h", "ymm3h", "ymm4h", "ymm5h", "ymm6h", "ymm7h", "ymm8h", "ymm9h", "ymm10h", "ymm11h",
    "ymm12h", "ymm13h", "ymm14h", "ymm15h",
];

/// Registers that systems see, all of 64 bits, from number [`SYSTEM0`] on.
#[rustfmt::skip]
const SYSTEM: &[(&str, &str, SystemPlace)] = {
    use SystemPlace as P;
    &[
        ("k_gs_base", "int64", P::Msr(msr::KERNEL_GS_BASE)),
        ("cr0", "i386_cr0", P::Cr0),
        ("cr2", "int64", P::Cr2),
        ("cr3", "int64", P::Cr3),
        ("cr4", "i386_cr4", P::Cr4),
        ("cr8", "int64", P::Cr8),
        ("efer", "i386_efer", P::Efer),
        ("xcr0", "int64", P::Xcr0),
        ("cs_base", "int64", P::Base(1)),
        ("ss_base", "int64", P::Base(2)),
        ("ds_base", "int64", P::Base(3)),
        ("es_base", "int64", P::Base(0)),
        ("ldtr", "int64", P::Selector(6)),
        ("ldtr_base", "int64", P::Base(6)),
        ("tr", "int64", P::Selector(7)),
        ("tr_base", "int64", P::Base(7)),
        ("gdtr_base", "int64", P::TableBase(false)),
        ("gdtr_limit", "int64", P::TableLimit(false)),
        ("idtr_base", "int64", P::TableBase(true)),
        ("idtr_limit", "int64", P::TableLimit(true)),
        ("dr0", "int64", P::Dr(0)),
        ("dr1", "int64", P::Dr(1)),
        ("dr2", "int64", P::Dr(2)),
        ("dr3", "int64", P::Dr(3)),
        ("dr6", "int64", P::Dr6),
        ("dr7", "int64", P::Dr7),
        ("apic_base", "int64", P::ApicBase),
        ("tsc", "int64", P::Tsc),
        ("tsc_aux", "int64", P::Msr(msr::TSC_AUX)),
        ("pat", "int64", P::Msr(msr::PAT)),
        ("misc_enable", "int64", P::Msr(msr::MISC_ENABLE)),
        ("sysenter_cs", "int64", P::Msr(msr::SYSENTER_CS)),
        ("sysenter_esp", "int64", P::Msr(msr::SYSENTER_ESP)),
        ("sysenter_eip", "int64", P::Msr(msr::SYSENTER_EIP)),
        ("star", "int64", P::Msr(msr::STAR)),
        ("lstar", "int64", P::Msr(msr::LSTAR)),
        ("cstar", "int64", P::Msr(msr::CSTAR)),
        ("fmask", "int64", P::Msr(msr::FMASK)),
        ("debugctl", "int64", P::Msr(msr::DEBUGCTL)),
    ]
};

/// Number of the first register that both widths of description have beyond those of a `g` packet.
const WIDE0: u32 = 64;
const YMM0: u32 = 128;
const SYSTEM0: u32 = 160;

impl View {
    /// How many registers are in a `g` packet: the numbers below.
    pub const fn general(&self) -> u32 {
        match self.width {
            Width::W64 => 59,
            Width::W32 => 41,
            Width::W16 => 32,
        }
    }

    const fn is_64(&self) -> bool {
        matches!(self.width, Width::W64)
    }

    fn regs(&self) -> Vec<Reg> {
        let mut regs = Vec::with_capacity(160);
        let mut next = 0;
        let mut add = |name, bytes, kind, place, feature| {
            regs.push(Reg { name, number: next, bytes, kind, place, feature });
            next += 1;
        };
        // A pointer has the width of the client's architecture, which is another's if its file is 64-bit.
        let narrow = if self.long_mode { ("int32", "int32") } else { ("data_ptr", "code_ptr") };
        if self.is_64() {
            for n in ORDER64 {
                let kind = if matches!(usize::from(n), RSP | RBP) { "data_ptr" } else { "int64" };
                add(GPR_NAMES[usize::from(n)], 8, kind, Place::Gpr(n), Feature::Core);
            }
            add("rip", 8, "code_ptr", Place::Pc, Feature::Core);
        } else {
            for (n, name) in (0..).zip(NAMES32) {
                let kind = if matches!(usize::from(n), RSP | RBP) { narrow.0 } else { "int32" };
                add(name, 4, kind, Place::Gpr(n), Feature::Core);
            }
            add("eip", 4, narrow.1, Place::Pc, Feature::Core);
        }
        add("eflags", 4, "i386_eflags", Place::Flags, Feature::Core);
        for (name, n) in SEGMENTS {
            add(name, 4, "int32", Place::Selector(n), Feature::Core);
        }
        for (n, name) in (0..).zip(ST) {
            add(name, 10, "i387_ext", Place::St(n), Feature::Core);
        }
        for (n, name) in (0..).zip(FPU) {
            add(name, 4, "int", Place::Fpu(n), Feature::Core);
        }
        // Code of 16 bits has no use for them, and gdb has no way to keep registers out of `info registers`.
        if self.width != Width::W16 {
            let vectors = if self.is_64() { 16 } else { 8 };
            for (n, name) in (0..).zip(&XMM[..vectors]) {
                add(name, 16, "vec128", Place::Xmm(n), Feature::Sse);
            }
            add("mxcsr", 4, "i386_mxcsr", Place::Mxcsr, Feature::Sse);
        }
        if self.is_64() {
            add("fs_base", 8, "int64", Place::Base(4), Feature::Segments);
            add("gs_base", 8, "int64", Place::Base(5), Feature::Segments);
        }
        self.add_beyond(&mut regs);
        regs
    }

    /// What is not in a `g` packet.
    fn add_beyond(&self, regs: &mut Vec<Reg>) {
        let mut next = WIDE0;
        let mut add = |name, bytes, kind, place, feature| {
            regs.push(Reg { name, number: next, bytes, kind, place, feature });
            next += 1;
        };
        if !self.is_64() {
            if self.long_mode {
                for n in ORDER64 {
                    add(GPR_NAMES[usize::from(n)], 8, "int64", Place::Gpr(n), Feature::Core);
                }
                add("rip", 8, "int64", Place::Pc, Feature::Core);
                if self.width == Width::W32 {
                    for (n, name) in (8..).zip(&XMM[8..]) {
                        add(name, 16, "v4i32", Place::Xmm(n), Feature::Sse);
                    }
                }
            }
            add("fs_base", 8, "int64", Place::Base(4), Feature::Segments);
            add("gs_base", 8, "int64", Place::Base(5), Feature::Segments);
        }
        if self.avx && self.width != Width::W16 {
            let vectors = if self.long_mode { 16 } else { 8 };
            for ((n, name), number) in (0..).zip(&YMMH[..vectors]).zip(YMM0..) {
                let place = Place::YmmHigh(n);
                regs.push(Reg { name, number, bytes: 16, kind: "uint128", place, feature: Feature::Avx });
            }
        }
        for ((name, kind, place), number) in SYSTEM.iter().zip(SYSTEM0..) {
            let place = Place::System(*place);
            regs.push(Reg { name, number, bytes: 8, kind, place, feature: Feature::System });
        }
    }

    fn find(&self, number: u32) -> Option<Reg> {
        self.regs().into_iter().find(|r| r.number == number)
    }

    /// The target description (`qXfer:features:read`).
    pub fn target_xml(&self) -> String {
        let mut x = String::from(
            "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n<target version=\"1.0\">\n",
        );
        let architecture = match self.width {
            Width::W16 => "i8086",
            Width::W32 => "i386",
            Width::W64 => "i386:x86-64",
        };
        let _ = writeln!(x, "<architecture>{architecture}</architecture>\n<osabi>none</osabi>");
        let regs = self.regs();
        for feature in Feature::ALL {
            let mut of_it = regs.iter().filter(|r| r.feature == feature).peekable();
            if of_it.peek().is_none() {
                continue;
            }
            let _ = writeln!(x, "<feature name=\"{}\">", feature.name());
            x.push_str(&types(feature));
            for r in of_it {
                let group = match (feature, r.place) {
                    (Feature::System, _) => " group=\"system\"",
                    (_, Place::Fpu(_)) => " group=\"float\"",
                    (_, Place::Mxcsr) => " group=\"vector\"",
                    _ => "",
                };
                let (name, bits, kind, number) = (r.name, r.bytes * 8, r.kind, r.number);
                let _ =
                    writeln!(x, "<reg name=\"{name}\" bitsize=\"{bits}\" regnum=\"{number}\" type=\"{kind}\"{group}/>");
            }
            x.push_str("</feature>\n");
        }
        x.push_str("</target>\n");
        x
    }

    /// The number of a register, by its name in the description.
    pub fn number(&self, name: &str) -> Option<u32> {
        self.regs().into_iter().find(|r| r.name == name).map(|r| r.number)
    }

    /// Names of all registers of the description, in its order.
    pub fn names(&self) -> Vec<&'static str> {
        self.regs().into_iter().map(|r| r.name).collect()
    }

    /// Bytes of register `number`; `None` if there is no such register.
    pub fn size(&self, number: u32) -> Option<usize> {
        self.find(number).map(|r| r.bytes)
    }

    /// The value of register `number`, lowest byte first. `None`: there is no such register; `Some(None)`: the
    /// engine does not have it.
    pub fn get(&self, s: &X86State, number: u32) -> Option<Option<Vec<u8>>> {
        let r = self.find(number)?;
        Some(read(s, r.place).map(|value| value.to_le_bytes()[..r.bytes].to_vec()))
    }

    /// All registers of a `g` packet; what the engine does not have is `None`.
    pub fn get_general(&self, s: &X86State) -> Vec<(usize, Option<Vec<u8>>)> {
        let regs = self.regs().into_iter().filter(|r| r.number < self.general());
        regs.map(|r| (r.bytes, read(s, r.place).map(|v| v.to_le_bytes()[..r.bytes].to_vec()))).collect()
    }

    /// Changes register `number`; false if there is none, it is not of that size, or it cannot be written. A segment
    /// register gets the base of real mode in real mode; in protected mode only its visible part changes.
    pub fn set(&self, s: &mut X86State, number: u32, bytes: &[u8]) -> bool {
        let Some(r) = self.find(number).filter(|r| r.bytes == bytes.len()) else { return false };
        let mut value = [0; 16];
        value[..bytes.len()].copy_from_slice(bytes);
        let value = u128::from_le_bytes(value);
        // The upper half of a 64-bit register is not the debugger's to change by its lower one.
        match r.place {
            Place::Gpr(n) if r.bytes == 4 => {
                let n = usize::from(n);
                s.gpr[n] = if width(s) == Width::W64 { s.gpr[n] & !0xffff_ffff } else { 0 } | value as u64;
                true
            }
            place => write(s, place, value),
        }
    }
}

fn types(feature: Feature) -> String {
    let flags = |id: &str, size: u32, fields: &[(&str, u32)]| {
        let mut x = format!("<flags id=\"{id}\" size=\"{size}\">");
        for (name, bit) in fields {
            let _ = write!(x, "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
        }
        x + "</flags>\n"
    };
    match feature {
        Feature::Core => flags("i386_eflags", 4, EFLAGS),
        Feature::Sse => {
            let mut x = String::new();
            let vectors = [
                ("v4f", "ieee_single", 4),
                ("v2d", "ieee_double", 2),
                ("v16i8", "int8", 16),
                ("v8i16", "int16", 8),
                ("v4i32", "int32", 4),
                ("v2i64", "int64", 2),
            ];
            for (id, of, count) in vectors {
                let _ = writeln!(x, "<vector id=\"{id}\" type=\"{of}\" count=\"{count}\"/>");
            }
            x.push_str("<union id=\"vec128\">");
            for (name, of) in [
                ("v4_float", "v4f"),
                ("v2_double", "v2d"),
                ("v16_int8", "v16i8"),
                ("v8_int16", "v8i16"),
                ("v4_int32", "v4i32"),
                ("v2_int64", "v2i64"),
                ("uint128", "uint128"),
            ] {
                let _ = write!(x, "<field name=\"{name}\" type=\"{of}\"/>");
            }
            x.push_str("</union>\n");
            x + &flags("i386_mxcsr", 4, MXCSR)
        }
        Feature::System => flags("i386_cr0", 8, CR0) + &flags("i386_cr4", 8, CR4) + &flags("i386_efer", 8, EFER),
        Feature::Segments | Feature::Avx => String::new(),
    }
}

#[rustfmt::skip]
const EFLAGS: &[(&str, u32)] = &[
    ("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9), ("DF", 10), ("OF", 11),
    ("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21),
];
#[rustfmt::skip]
const MXCSR: &[(&str, u32)] = &[
    ("IE", 0), ("DE", 1), ("ZE", 2), ("OE", 3), ("UE", 4), ("PE", 5), ("DAZ", 6), ("IM", 7), ("DM", 8), ("ZM", 9),
    ("OM", 10), ("UM", 11), ("PM", 12), ("FZ", 15),
];
#[rustfmt::skip]
const CR0: &[(&str, u32)] = &[
    ("PE", 0), ("MP", 1), ("EM", 2), ("TS", 3), ("ET", 4), ("NE", 5), ("WP", 16), ("AM", 18), ("NW", 29), ("CD", 30),
    ("PG", 31),
];
#[rustfmt::skip]
const CR4: &[(&str, u32)] = &[
    ("VME", 0), ("PVI", 1), ("TSD", 2), ("DE", 3), ("PSE", 4), ("PAE", 5), ("MCE", 6), ("PGE", 7), ("PCE", 8),
    ("OSFXSR", 9), ("OSXMMEXCPT", 10), ("UMIP", 11), ("LA57", 12), ("VMXE", 13), ("SMXE", 14), ("FSGSBASE", 16),
    ("PCIDE", 17), ("OSXSAVE", 18), ("SMEP", 20), ("SMAP", 21), ("PKE", 22),
];
const EFER: &[(&str, u32)] = &[("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11), ("SVME", 12)];

fn segment(s: &X86State, n: u8) -> &Segment {
    s.segments()[usize::from(n)].1
}

fn segment_mut(s: &mut X86State, n: u8) -> &mut Segment {
    match n {
        0 => &mut s.es,
        1 => &mut s.cs,
        2 => &mut s.ss,
        3 => &mut s.ds,
        4 => &mut s.fs,
        5 => &mut s.gs,
        6 => &mut s.ldtr,
        _ => &mut s.tr,
    }
}

fn read(s: &X86State, place: Place) -> Option<u128> {
    Some(match place {
        Place::Gpr(n) => s.gpr[usize::from(n)].into(),
        Place::Pc => s.linear_pc().into(),
        Place::Flags => s.rflags.into(),
        Place::Selector(n) => segment(s, n).selector.into(),
        Place::Base(n) => segment(s, n).base.into(),
        Place::St(n) => fpu_area(s, 32 + 16 * usize::from(n), 10),
        Place::Fpu(n) => fpu_register(s, n),
        Place::Xmm(n) => component(s, XCR0_SSE, 160 + 16 * usize::from(n), 16, 0),
        Place::Mxcsr => component(s, XCR0_SSE, XSAVE_MXCSR, 4, MXCSR_RESET.into()),
        Place::YmmHigh(n) => component(s, XCR0_AVX, AVX_OFFSET + 16 * usize::from(n), 16, 0),
        Place::System(place) => u128::from(read_system(s, place)?),
    })
}

fn read_system(s: &X86State, place: SystemPlace) -> Option<u64> {
    use SystemPlace as P;
    Some(match place {
        P::Cr0 => s.cr0,
        P::Cr2 => s.cr2,
        P::Cr3 => s.cr3,
        P::Cr4 => s.cr4,
        P::Cr8 => s.cr8,
        P::Efer => s.efer,
        P::Xcr0 => s.xcr0,
        P::Dr(n) => s.dr[usize::from(n)],
        P::Dr6 => s.dr6,
        P::Dr7 => s.dr7,
        P::ApicBase => s.apic_base,
        P::Tsc => s.tsc,
        P::TableBase(idt) => if idt { s.idtr } else { s.gdtr }.base,
        P::TableLimit(idt) => if idt { s.idtr } else { s.gdtr }.limit.into(),
        P::Selector(n) => segment(s, n).selector.into(),
        P::Base(n) => segment(s, n).base,
        P::Msr(index) => s.msr(index)?,
    })
}

fn write(s: &mut X86State, place: Place, value: u128) -> bool {
    let low = value as u64;
    match place {
        Place::Gpr(n) => s.gpr[usize::from(n)] = low,
        Place::Pc => s.set_linear_pc(low),
        Place::Flags => s.rflags = low | RFLAGS_FIXED,
        Place::Selector(n) => write_selector(s, n, low as u16),
        Place::Base(n) => segment_mut(s, n).base = low,
        Place::St(n) => write_component(s, XCR0_X87, 32 + 16 * usize::from(n), 10, value),
        Place::Fpu(n) => write_fpu_register(s, n, low as u32),
        Place::Xmm(n) => write_component(s, XCR0_SSE, 160 + 16 * usize::from(n), 16, value),
        // What is not a flag of any processor would fault.
        Place::Mxcsr if low & !0xffff != 0 => return false,
        Place::Mxcsr => write_component(s, XCR0_SSE, XSAVE_MXCSR, 4, value),
        Place::YmmHigh(n) => write_component(s, XCR0_AVX, AVX_OFFSET + 16 * usize::from(n), 16, value),
        Place::System(place) => return write_system(s, place, low),
    }
    true
}

fn write_selector(s: &mut X86State, n: u8, selector: u16) {
    let real = width(s) == Width::W16 && (s.cr0 & CR0_PE == 0 || s.rflags & RFLAGS_VM != 0);
    let segment = segment_mut(s, n);
    if real && segment.selector != selector {
        segment.base = u64::from(selector) << 4;
    }
    segment.selector = selector;
}

fn write_system(s: &mut X86State, place: SystemPlace, value: u64) -> bool {
    use SystemPlace as P;
    match place {
        P::Cr0 => s.cr0 = value,
        P::Cr2 => s.cr2 = value,
        P::Cr3 => s.cr3 = value,
        P::Cr4 => s.cr4 = value,
        P::Cr8 => s.cr8 = value,
        P::Efer => s.efer = value,
        P::Xcr0 => s.xcr0 = value,
        P::Dr(n) => s.dr[usize::from(n)] = value,
        P::Dr6 => s.dr6 = value,
        P::Dr7 => s.dr7 = value,
        // Where the local APIC is, is the APIC's to know.
        P::ApicBase => return false,
        P::Tsc => s.tsc = value,
        P::TableBase(idt) => if idt { &mut s.idtr } else { &mut s.gdtr }.base = value,
        P::TableLimit(idt) => match u16::try_from(value) {
            Ok(limit) => if idt { &mut s.idtr } else { &mut s.gdtr }.limit = limit,
            Err(_) => return false,
        },
        P::Selector(n) => segment_mut(s, n).selector = value as u16,
        P::Base(n) => segment_mut(s, n).base = value,
        P::Msr(index) if s.msr(index).is_none() => return false,
        P::Msr(index) => s.set_msr(index, value),
    }
    true
}

/// The control word that FNINIT sets (SDM volume 1, 8.1.5).
const FCW_INIT: u16 = 0x37f;
const AVX_OFFSET: usize = xsave::LAYOUT.0[2].0 as usize;

fn in_use(s: &X86State) -> u64 {
    s.xsave
        .get(XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8)
        .map_or(0, |b| b.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
}

/// Bytes of the XSAVE area; `initial` if their component is not in use.
fn component(s: &X86State, bit: u64, offset: usize, bytes: usize, initial: u128) -> u128 {
    if in_use(s) & bit == 0 {
        return initial;
    }
    let found = s.xsave.get(offset..offset + bytes);
    found.map_or(initial, |b| b.iter().rev().fold(0, |v, b| v << 8 | u128::from(*b)))
}

fn fpu_area(s: &X86State, offset: usize, bytes: usize) -> u128 {
    component(s, XCR0_X87, offset, bytes, if offset == 0 { FCW_INIT.into() } else { 0 })
}

fn write_component(s: &mut X86State, bit: u64, offset: usize, bytes: usize, value: u128) {
    let used = in_use(s);
    let area = &mut s.xsave;
    let end = (offset + bytes).max(XSAVE_MIN).max(if bit == XCR0_AVX { AVX_OFFSET + 256 } else { 0 });
    if area.len() < end {
        area.resize(end, 0);
    }
    // The state's form has x87 and SSE in use always.
    let fresh = (XCR0_X87 | XCR0_SSE | bit) & !used;
    if fresh & XCR0_X87 != 0 {
        area[..24].fill(0);
        area[32..160].fill(0);
        area[..2].copy_from_slice(&FCW_INIT.to_le_bytes());
    }
    if fresh & XCR0_SSE != 0 {
        area[160..416].fill(0);
        area[XSAVE_MXCSR..XSAVE_MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    }
    if fresh & XCR0_AVX != 0 {
        area[AVX_OFFSET..AVX_OFFSET + 256].fill(0);
    }
    area[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8].copy_from_slice(&(used | fresh).to_le_bytes());
    area[offset..offset + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    xsave::normalise(area);
}

/// `fctrl` to `fop`, from FXSAVE's fields (SDM volume 1, table 10-2).
fn fpu_register(s: &X86State, n: u8) -> u128 {
    match n {
        0 => fpu_area(s, 0, 2),
        1 => fpu_area(s, 2, 2),
        2 => tag_word(s).into(),
        3 => fpu_area(s, 12, 2),
        4 => fpu_area(s, 8, 4),
        5 => fpu_area(s, 20, 2),
        6 => fpu_area(s, 16, 4),
        _ => fpu_area(s, 6, 2) & 0x7ff,
    }
}

fn write_fpu_register(s: &mut X86State, n: u8, value: u32) {
    let mut put = |offset, bytes, value: u32| write_component(s, XCR0_X87, offset, bytes, value.into());
    match n {
        0 => put(0, 2, value & 0xffff),
        1 => put(2, 2, value & 0xffff),
        2 => {
            let used = (0..8).filter(|i| value >> (2 * i) & 3 != 3).fold(0, |v, i| v | 1 << i);
            put(4, 1, used);
        }
        3 => put(12, 2, value & 0xffff),
        4 => put(8, 4, value),
        5 => put(20, 2, value & 0xffff),
        6 => put(16, 4, value),
        _ => put(6, 2, value & 0x7ff),
    }
}

/// The full tag word, from the abridged one and what is in the registers (SDM volume 1, 8.1.7 and table 10-2).
fn tag_word(s: &X86State) -> u16 {
    let (used, top) = (fpu_area(s, 4, 1) as u16, (fpu_area(s, 2, 2) >> 11 & 7) as u16);
    (0..8u16).fold(0, |word, physical| {
        let tag = if used >> physical & 1 == 0 {
            3
        } else {
            let value = fpu_area(s, 32 + 16 * usize::from(physical.wrapping_sub(top) & 7), 10);
            let (exponent, mantissa) = ((value >> 64) as u16 & 0x7fff, value as u64);
            match exponent {
                0 if mantissa == 0 => 1,
                0 | 0x7fff => 2,
                // Without its integer bit it is no number.
                _ if mantissa >> 63 == 0 => 2,
                _ => 0,
            }
        };
        word | tag << (2 * physical)
    })
}

#[cfg(test)]
#[path = "gdb_tests.rs"]
mod tests;
