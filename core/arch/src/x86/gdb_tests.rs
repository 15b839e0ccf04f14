//! Descriptions and values.

use super::*;

const WIDTHS: [Width; 3] = [Width::W16, Width::W32, Width::W64];

fn views() -> impl Iterator<Item = View> {
    WIDTHS.into_iter().flat_map(|width| {
        [(true, true), (true, false), (false, false)]
            .into_iter()
            .filter(move |c| c.0 || width != Width::W64)
            .map(move |(long_mode, avx)| View { width, long_mode, avx })
    })
}

fn view(width: Width) -> View {
    View { width, long_mode: true, avx: true }
}

fn number(view: &View, name: &str) -> u32 {
    view.regs().iter().find(|r| r.name == name).unwrap_or_else(|| panic!("{name}")).number
}

fn get(view: &View, s: &X86State, name: &str) -> u128 {
    let bytes = view.get(s, number(view, name)).flatten().unwrap_or_else(|| panic!("{name}"));
    bytes.iter().rev().fold(0, |v, b| v << 8 | u128::from(*b))
}

fn set(view: &View, s: &mut X86State, name: &str, value: u128) -> bool {
    let number = number(view, name);
    let size = view.size(number).unwrap_or_default();
    view.set(s, number, &value.to_le_bytes()[..size])
}

#[test]
fn every_described_register_can_be_read_and_nothing_else() {
    let s = X86State::reset(true);
    for view in views() {
        let xml = view.target_xml();
        for number in 0..400 {
            let described = xml.matches(&format!("regnum=\"{number}\"")).count();
            assert!(described < 2, "{number}");
            assert_eq!(view.get(&s, number).is_some(), described == 1, "{view:?} {number}");
            assert_eq!(view.size(number).is_some(), described == 1);
        }
        let general = view.get_general(&s);
        assert_eq!(general.len() as u32, view.general(), "{view:?}");
        for name in ["eflags", "cs", "st7", "fop", "fs_base", "k_gs_base", "cr3", "efer", "lstar", "gdtr_base"] {
            assert_eq!(xml.matches(&format!("name=\"{name}\"")).count(), 1, "{name}");
        }
        let wide = view.long_mode;
        assert_eq!(xml.contains("\"r15\""), wide);
        let vectors = view.width != Width::W16;
        assert_eq!(xml.contains("\"xmm15\""), wide && vectors);
        assert_eq!(xml.contains("\"mxcsr\""), vectors);
        assert_eq!(xml.contains("\"ymm0h\""), view.avx && vectors);
        assert_eq!(xml.contains("\"eax\""), view.width != Width::W64);
    }
}

#[test]
fn the_numbers_are_gdbs_own() {
    let v = view(Width::W64);
    for (name, n) in [("rax", 0), ("rbx", 1), ("rsp", 7), ("rip", 16), ("eflags", 17), ("gs", 23), ("fctrl", 32)] {
        assert_eq!(number(&v, name), n);
    }
    assert_eq!((number(&v, "xmm0"), number(&v, "mxcsr")), (40, 56));
    let v = view(Width::W16);
    for (name, n) in [("eax", 0), ("esp", 4), ("eip", 8), ("eflags", 9), ("cs", 10), ("st0", 16), ("fop", 31)] {
        assert_eq!(number(&v, name), n);
    }
}

#[test]
fn what_is_written_is_read() {
    for view in views() {
        let mut s = X86State::reset(true);
        for r in view.regs() {
            let value = match r.place {
                Place::Flags => 0x246,
                Place::Mxcsr => 0x1fa0,
                Place::Fpu(1) => 0x3800,
                Place::Fpu(2) => 0xffff,
                Place::System(SystemPlace::Cr0) => 0x11,
                Place::System(SystemPlace::Cr8) => 5,
                Place::System(SystemPlace::Efer) => 0x100,
                _ => 0x1234 + u128::from(r.number),
            };
            let settable = match r.place {
                Place::System(SystemPlace::ApicBase) => false,
                Place::System(SystemPlace::Msr(m)) => s.msr(m).is_some(),
                _ => true,
            };
            let fop = if r.name == "fop" { 0x7ff } else { 0xffff };
            let value = if matches!(r.place, Place::Fpu(_)) { value & fop } else { value };
            assert_eq!(set(&view, &mut s, r.name, value), settable, "{view:?} {}", r.name);
            if settable {
                assert_eq!(get(&view, &s, r.name), value, "{view:?} {}", r.name);
            }
            assert!(!view.set(&mut s, r.number, &[0; 3]), "a wrong size");
        }
        assert!(!view.set(&mut s, 999, &[0; 8]));
        assert_eq!(s.check(), Ok(()));
    }
}

#[test]
fn the_program_counter_is_linear() {
    let mut s = X86State::reset(true);
    assert_eq!(width(&s), Width::W16);
    let v = view(Width::W16);
    assert_eq!(get(&v, &s, "eip"), 0xffff_fff0);
    assert_eq!(get(&v, &s, "rip"), 0xffff_fff0);
    assert!(set(&v, &mut s, "eip", 0xffff_1234));
    assert_eq!((s.rip, s.cs.base), (0x1234, 0xffff_0000));
    assert!(set(&v, &mut s, "ds", 0x40));
    assert_eq!(get(&v, &s, "ds_base"), 0x400);
    (s.cr0, s.efer, s.cs.attributes) = (0x8000_0011, 0x500, attr::CODE | attr::L);
    assert_eq!(width(&s), Width::W64);
    let v = view(Width::W64);
    s.gpr[0] = 0x1234_5678_9abc_def0;
    assert!(set(&v, &mut s, "rip", 0xffff_ffff_8100_0000));
    assert_eq!(s.rip, 0xffff_ffff_8100_0000);
    assert!(set(&v, &mut s, "ds", 0x18));
    assert_eq!(s.ds.base, 0x400, "in protected mode a descriptor decides");
    // Through a description for narrow code.
    assert!(set(&view(Width::W32), &mut s, "eax", 5));
    assert_eq!(s.gpr[0], 0x1234_5678_0000_0005);
    s.cs.attributes = attr::CODE | attr::DB;
    assert_eq!(width(&s), Width::W32);
    s.cs.attributes = attr::CODE;
    assert_eq!(width(&s), Width::W16);
}

#[test]
fn x87_tags() {
    let mut s = X86State::reset(true);
    let v = view(Width::W64);
    assert_eq!(get(&v, &s, "ftag"), 0xffff, "empty");
    assert!(set(&v, &mut s, "fstat", 6 << 11));
    // ST0 is physical register 6: one; ST1 is 7: zero; ST2 is 0: infinity.
    assert!(set(&v, &mut s, "st0", 0x3fff << 64 | 1 << 63));
    assert!(set(&v, &mut s, "st2", 0x7fff << 64 | 1 << 63));
    assert!(set(&v, &mut s, "ftag", 0x0ffc));
    assert_eq!(get(&v, &s, "ftag"), 0b01_00_11_11_11_11_11_10);
}

#[test]
fn components_not_in_use_are_initial() {
    let mut s = X86State::reset(true);
    s.xsave[XSAVE_XSTATE_BV] = 0;
    let v = view(Width::W64);
    assert_eq!((get(&v, &s, "fctrl"), get(&v, &s, "mxcsr"), get(&v, &s, "xmm3")), (0x37f, 0x1f80, 0));
    assert!(set(&v, &mut s, "ymm2h", 7));
    assert_eq!((get(&v, &s, "ymm2h"), get(&v, &s, "ymm1h"), get(&v, &s, "fctrl")), (7, 0, 0x37f));
}
