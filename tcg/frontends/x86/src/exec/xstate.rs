//! Control words and state images of the x87 and SSE units: FLDCW to XSAVE.
//!
//! Spec: SDM volume 1 chapters 8, 10, 13; volume 2 "FXSAVE", "XSAVE", "XSAVEC", "XRSTOR".

use iced_x86::{Instruction, Mnemonic, Register};
use mimus_arch::x86::regs::*;

use super::Exec;
use super::vector::{check_unit, load, store};
use crate::control::set_pkru;
use crate::cpuid::compacted_size;
use crate::exception::{Exception, Result};
use crate::fpu;
use crate::frontend::taken;
use crate::host::Host;
use crate::native::Unit;
use crate::state::FxArea;

type Run = fn(&mut Exec<'_>) -> Result<()>;

const HEADER: usize = 512;
const YMM: usize = 576;

pub(super) fn find(insn: &Instruction) -> Option<Run> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Fldcw => |x| {
            check_unit(x, Unit::X87)?;
            let fcw = x.read(0, 2)? as u16;
            fpu::set_control(&mut x.cpu.guest, fcw);
            Ok(())
        },
        M::Fnstcw => |x| {
            check_unit(x, Unit::X87)?;
            let fcw = x.cpu.guest.st.fcw;
            x.write(0, 2, u64::from(fcw))
        },
        M::Fnstsw => |x| {
            check_unit(x, Unit::X87)?;
            let status = fpu::status(x.cpu.guest.st.fcw, fpu::host_status());
            x.write(0, 2, u64::from(status))
        },
        M::Fninit => |x| {
            check_unit(x, Unit::X87)?;
            fpu::init(&mut x.cpu.guest);
            Ok(())
        },
        M::Fnclex => |x| {
            check_unit(x, Unit::X87)?;
            fpu::clear_exceptions();
            Ok(())
        },
        M::Wait => wait,
        M::Fneni | M::Fndisi | M::Fnsetpm => |x| check_unit(x, Unit::X87),
        M::Fnstenv | M::Fnsave => store_environment,
        M::Fldenv | M::Frstor => load_environment,
        M::Ldmxcsr | M::Vldmxcsr => |x| {
            check_unit(x, sse_or_avx(x))?;
            let value = x.read(0, 4)? as u32;
            if value & !x.cpu.guest.st.mxcsr_mask() != 0 {
                return Err(Exception::GP0);
            }
            x.cpu.guest.st.mxcsr = value;
            Ok(())
        },
        M::Stmxcsr | M::Vstmxcsr => |x| {
            check_unit(x, sse_or_avx(x))?;
            let value = x.cpu.guest.st.mxcsr;
            x.write(0, 4, u64::from(value))
        },
        M::Fxsave | M::Fxsave64 => fxsave,
        M::Fxrstor | M::Fxrstor64 => fxrstor,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => |x| xsave(x, false),
        M::Xsavec | M::Xsavec64 => |x| xsave(x, true),
        M::Xrstor | M::Xrstor64 => |x| xrstor(x, false),
        // No component is the supervisor's alone: these differ by the privilege they ask for.
        M::Xsaves | M::Xsaves64 => |x| {
            supervisor(x)?;
            xsave(x, true)
        },
        M::Xrstors | M::Xrstors64 => |x| {
            supervisor(x)?;
            xrstor(x, true)
        },
        _ => return None,
    })
}

fn sse_or_avx(x: &Exec<'_>) -> Unit {
    if matches!(x.insn.mnemonic(), Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr) { Unit::Avx } else { Unit::Sse }
}

fn wait(x: &mut Exec<'_>) -> Result<()> {
    let both = CR0_MP | CR0_TS;
    if x.cpu.guest.st.cr0 & both == both {
        return Err(Exception::NM);
    }
    if fpu::pending(&x.cpu.guest) { Err(Exception::plain(VECTOR_MF)) } else { Ok(()) }
}

/// The tag word of an FNSTENV image from the abridged one: empty, zero, special, valid.
fn full_tags(image: &FxArea) -> u16 {
    let top = fpu::word(&image.0, 2) >> 11 & 7;
    (0..8).fold(0, |tags, register| {
        let kind = if image.0[4] >> register & 1 == 0 {
            3
        } else {
            let st = (register + 8 - top) % 8;
            let at = 32 + 16 * usize::from(st);
            let mut mantissa = [0; 8];
            mantissa.copy_from_slice(&image.0[at..at + 8]);
            let mantissa = u64::from_le_bytes(mantissa);
            let exponent = fpu::word(&image.0, at + 8) & 0x7fff;
            match (exponent, mantissa) {
                (0, 0) => 1,
                (0, _) | (0x7fff, _) => 2,
                (_, m) if m >> 63 == 0 => 2,
                _ => 0,
            }
        };
        tags | kind << (2 * register)
    })
}

/// Whether the environment has 28 bytes, and whether it is protected mode's.
fn environment_bytes(x: &Exec<'_>) -> usize {
    match x.insn.memory_size().size() {
        14 | 94 => 14,
        _ => 28,
    }
}

/// Faults if one of these bytes may not be accessed. Images are looked at in places first, whose order is the processor's
/// affair (as measured on AMD's): the first byte and the last, but for FXSAVE and FXRSTOR the last comes first.
fn look_at(x: &mut Exec<'_>, places: &[u64], write: bool) -> Result<()> {
    for &place in places {
        let at = x.cpu.wrap(place);
        let there = if write { x.cpu.host_for_store(at).is_ok() } else { x.cpu.host_for_load(at).is_ok() };
        if !there {
            return Err(taken(x.cpu, at));
        }
    }
    Ok(())
}

/// The linear address of an FNSTENV or FNSAVE image of words of `step` bytes, all of which may be accessed. The first word
/// is looked at before anything of the last byte.
fn environment_address(x: &mut Exec<'_>, total: u32, step: u32, write: bool) -> Result<u64> {
    let whole = x.aligned_address(total, step, write);
    let at = x.aligned_address(step, step, write)?;
    let end = x.cpu.wrap(at.wrapping_add(u64::from(step) - 1));
    // Over a page's end, the next page's beginning is the address.
    let second = if end & !4095 == at & !4095 { at } else { end & !4095 };
    look_at(x, &[at, second], write)?;
    let at = whole?;
    look_at(x, &[at.wrapping_add(u64::from(total) - 1)], write)?;
    Ok(at)
}

fn store_environment(x: &mut Exec<'_>) -> Result<()> {
    check_unit(x, Unit::X87)?;
    let image = fpu::image(&x.cpu.guest);
    let bytes = environment_bytes(x);
    let saves = x.insn.mnemonic() == Mnemonic::Fnsave;
    let mut out = [0u8; 108];
    let step = bytes / 7;
    let p = x.cpu.guest.st.fpu_pointers;
    let mut put = |i: usize, value: u32| {
        let value = if step == 4 && i < 3 { value | 0xffff_0000 } else { value };
        out[i * step..(i + 1) * step].copy_from_slice(&value.to_le_bytes()[..step]);
    };
    put(0, u32::from(fpu::word(&image.0, 0)));
    put(1, u32::from(fpu::word(&image.0, 2)));
    put(2, u32::from(full_tags(&image)));
    put(3, p.ip as u32);
    put(4, u32::from(p.cs) | u32::from(p.opcode) << 16);
    put(5, p.dp as u32);
    put(6, u32::from(p.ds) | if step == 4 { 0xffff_0000 } else { 0 });
    let total = if saves { bytes + 80 } else { bytes };
    if saves {
        for i in 0..8 {
            let at = 32 + 16 * i;
            out[bytes + 10 * i..bytes + 10 * i + 10].copy_from_slice(&image.0[at..at + 10]);
        }
    }
    let at = environment_address(x, total as u32, step as u32, true)?;
    store(x, at, &out[..total])?;
    if saves {
        fpu::init(&mut x.cpu.guest);
    } else {
        let fcw = x.cpu.guest.st.fcw | 0x3f;
        fpu::set_control(&mut x.cpu.guest, fcw);
    }
    Ok(())
}

fn load_environment(x: &mut Exec<'_>) -> Result<()> {
    check_unit(x, Unit::X87)?;
    let bytes = environment_bytes(x);
    let restores = x.insn.mnemonic() == Mnemonic::Frstor;
    let total = if restores { bytes + 80 } else { bytes };
    let step = bytes / 7;
    let at = environment_address(x, total as u32, step as u32, false)?;
    let mut from = [0u8; 108];
    load(x, at, &mut from[..total])?;
    let word = |i: usize| fpu::word(&from, i * step);
    let mut image = fpu::image(&x.cpu.guest);
    let old_top = fpu::word(&image.0, 2) >> 11 & 7;
    fpu::set_word(&mut image.0, 0, word(0));
    fpu::set_word(&mut image.0, 2, word(1));
    let tags = word(2);
    image.0[4] = (0..8).fold(0, |abridged, r| abridged | u8::from(tags >> (2 * r) & 3 != 3) << r);
    let new_top = word(1) >> 11 & 7;
    if restores {
        for i in 0..8 {
            let at = 32 + 16 * i;
            image.0[at..at + 10].copy_from_slice(&from[bytes + 10 * i..bytes + 10 * i + 10]);
        }
    } else {
        // The image's registers are relative to the top, which moves.
        let old = image.0;
        for i in 0..8 {
            let physical = (i + usize::from(new_top)) % 8;
            let was = (physical + 8 - usize::from(old_top)) % 8;
            image.0[32 + 16 * i..48 + 16 * i].copy_from_slice(&old[32 + 16 * was..48 + 16 * was]);
        }
    }
    let p = &mut x.cpu.guest.st.fpu_pointers;
    if step == 4 {
        p.ip = u64::from(fpu::word(&from, 12)) | u64::from(fpu::word(&from, 14)) << 16;
        (p.cs, p.opcode) = (fpu::word(&from, 16), fpu::word(&from, 18) & 0x7ff);
        p.dp = u64::from(fpu::word(&from, 20)) | u64::from(fpu::word(&from, 22)) << 16;
        p.ds = fpu::word(&from, 24);
    } else {
        (p.ip, p.cs, p.opcode) = (word(3).into(), word(4), 0);
        (p.dp, p.ds) = (word(5).into(), word(6));
    }
    fpu::load_image(&mut x.cpu.guest, &image);
    Ok(())
}

fn check_fx(x: &Exec<'_>) -> Result<()> {
    let cr0 = x.cpu.guest.st.cr0;
    if cr0 & CR0_EM != 0 {
        return Err(Exception::UD);
    }
    if cr0 & CR0_TS != 0 { Err(Exception::NM) } else { Ok(()) }
}

fn check_xsave(x: &Exec<'_>) -> Result<()> {
    if x.cpu.guest.st.cr4 & CR4_OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    if x.cpu.guest.st.cr0 & CR0_TS != 0 { Err(Exception::NM) } else { Ok(()) }
}

fn supervisor(x: &Exec<'_>) -> Result<()> {
    check_xsave(x)?;
    x.cpu.need_cpl0()
}

/// XMM registers an image holds in this mode.
fn xmm_count(x: &Exec<'_>) -> usize {
    if x.cpu.guest.st.is_64bit() { 16 } else { 8 }
}

fn put_xmm(x: &Exec<'_>, area: &mut [u8]) {
    for i in 0..xmm_count(x) {
        for j in 0..2 {
            let at = 160 + 16 * i + 8 * j;
            area[at..at + 8].copy_from_slice(&x.cpu.guest.st.vec[i][j].to_le_bytes());
        }
    }
}

fn get_word(area: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&area[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn get_xmm(x: &mut Exec<'_>, area: &[u8]) {
    for i in 0..xmm_count(x) {
        for j in 0..2 {
            x.cpu.guest.st.vec[i][j] = get_word(area, 160 + 16 * i + 8 * j);
        }
    }
}

/// The legacy region as FXSAVE and XSAVE write it: x87 with pointers in the form of the operand size.
fn x87_region(x: &Exec<'_>) -> FxArea {
    let mut image = fpu::image(&x.cpu.guest);
    use Mnemonic as M;
    let wide = matches!(x.insn.mnemonic(), M::Fxsave64 | M::Xsave64 | M::Xsavec64 | M::Xsaveopt64 | M::Xsaves64);
    if !wide {
        let p = &x.cpu.guest.st.fpu_pointers;
        image.0[8..12].copy_from_slice(&(p.ip as u32).to_le_bytes());
        image.0[12..16].copy_from_slice(&u32::from(p.cs).to_le_bytes());
        image.0[16..20].copy_from_slice(&(p.dp as u32).to_le_bytes());
        image.0[20..24].copy_from_slice(&u32::from(p.ds).to_le_bytes());
    }
    image
}

fn put_mxcsr(x: &Exec<'_>, area: &mut [u8]) {
    area[24..28].copy_from_slice(&x.cpu.guest.st.mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&x.cpu.guest.st.mxcsr_mask().to_le_bytes());
}

fn fxsave(x: &mut Exec<'_>) -> Result<()> {
    check_fx(x)?;
    let at = x.aligned_address(512, 4, true)?;
    if at % 16 != 0 {
        return Err(Exception::GP0);
    }
    look_at(x, &[at.wrapping_add(511), at], true)?;
    let mut image = x87_region(x);
    put_mxcsr(x, &mut image.0);
    put_xmm(x, &mut image.0);
    // The last 96 bytes are for software, and in 32-bit modes so are the upper registers' places.
    let used = 160 + 16 * xmm_count(x);
    store(x, at, &image.0[..used])
}

fn set_x87(x: &mut Exec<'_>, area: &[u8]) {
    let mut image = FxArea([0; 512]);
    image.0[..24].copy_from_slice(&area[..24]);
    image.0[32..160].copy_from_slice(&area[32..160]);
    let wide = matches!(x.insn.mnemonic(), Mnemonic::Fxrstor64 | Mnemonic::Xrstor64 | Mnemonic::Xrstors64);
    let p = &mut x.cpu.guest.st.fpu_pointers;
    p.opcode = fpu::word(area, 6) & 0x7ff;
    (p.ip, p.dp) = (get_word(area, 8), get_word(area, 16));
    if wide {
        // The unit keeps linear addresses of 57 bits.
        let kept = |address: u64| ((address << 7) as i64 >> 7) as u64;
        (p.ip, p.dp) = (kept(p.ip), kept(p.dp));
    } else {
        p.ip &= 0xffff_ffff;
        p.dp &= 0xffff_ffff;
    }
    fpu::load_image(&mut x.cpu.guest, &image);
}

fn mxcsr_of(x: &Exec<'_>, area: &[u8]) -> Result<u32> {
    let value = get_word(area, 24) as u32;
    if value & !x.cpu.guest.st.mxcsr_mask() != 0 { Err(Exception::GP0) } else { Ok(value) }
}

fn fxrstor(x: &mut Exec<'_>) -> Result<()> {
    check_fx(x)?;
    let at = x.aligned_address(512, 4, false)?;
    if at % 16 != 0 {
        return Err(Exception::GP0);
    }
    look_at(x, &[at.wrapping_add(511), at], false)?;
    let mut area = [0; 512];
    load(x, at, &mut area)?;
    let mxcsr = mxcsr_of(x, &area)?;
    set_x87(x, &area);
    x.cpu.guest.st.mxcsr = mxcsr;
    get_xmm(x, &area);
    Ok(())
}

/// Components that the instruction asks for and XCR0 has.
fn requested(x: &Exec<'_>) -> u64 {
    (x.reg(Register::EAX) | x.reg(Register::EDX) << 32) & x.cpu.guest.st.xcr0
}

/// Components that are not in their initial state (SDM volume 1 section 13.6).
fn in_use(x: &Exec<'_>, image: &FxArea) -> u64 {
    let mut components = 0;
    let initial_x87 = fpu::word(&image.0, 0) == 0x37f
        && image.0[2..8].iter().all(|&b| b == 0)
        && image.0[32..160].iter().all(|&b| b == 0);
    if !initial_x87 {
        components |= XCR0_X87;
    }
    let count = xmm_count(x);
    if x.cpu.guest.st.vec[..count].iter().any(|v| v[0] | v[1] != 0) {
        components |= XCR0_SSE;
    }
    if x.cpu.guest.st.vec[..count].iter().any(|v| v[2] | v[3] != 0) {
        components |= XCR0_AVX;
    }
    if x.cpu.guest.st.pkru != 0 {
        components |= XCR0_PKRU;
    }
    components
}

fn xsave(x: &mut Exec<'_>, compact: bool) -> Result<()> {
    check_xsave(x)?;
    let wanted = requested(x);
    let features = &x.cpu.guest.st.features;
    let total = if compact { compacted_size(wanted) } else { features.xsave_size(wanted) };
    let pkru_at = if compact { u64::from(total) - 8 } else { features.pkru_offset().into() };
    let at = x.aligned_address(total, 1, true)?;
    if at % 64 != 0 {
        return Err(Exception::GP0);
    }
    look_at(x, &[at, at.wrapping_add(u64::from(total) - 1)], true)?;
    let image = x87_region(x);
    let mut used = in_use(x, &image);
    if compact && x.cpu.guest.st.mxcsr != MXCSR_RESET {
        used |= XCR0_SSE;
    }
    let optimised = compact || matches!(x.insn.mnemonic(), Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    let mut header = [0; 64];
    if !compact {
        load(x, at.wrapping_add(HEADER as u64), &mut header)?;
    }
    let old = if compact { 0 } else { get_word(&header, 0) };
    let bv = old & !wanted | used & wanted;
    let skip = |component: u64| wanted & component == 0 || optimised && used & component == 0;
    if !skip(XCR0_X87) {
        store(x, at, &image.0[..24])?;
        store(x, at.wrapping_add(32), &image.0[32..160])?;
    }
    if wanted & (XCR0_SSE | XCR0_AVX) != 0 {
        let mut area = [0; 512];
        put_mxcsr(x, &mut area);
        if !compact || bv & XCR0_SSE != 0 {
            store(x, at.wrapping_add(24), &area[24..32])?;
        }
        if !skip(XCR0_SSE) {
            put_xmm(x, &mut area);
            let end = 160 + 16 * xmm_count(x);
            store(x, at.wrapping_add(160), &area[160..end])?;
        }
    }
    if !skip(XCR0_AVX) {
        let mut high = [0; 256];
        for i in 0..xmm_count(x) {
            for j in 0..2 {
                high[16 * i + 8 * j..16 * i + 8 * j + 8].copy_from_slice(&x.cpu.guest.st.vec[i][2 + j].to_le_bytes());
            }
        }
        let end = 16 * xmm_count(x);
        store(x, at.wrapping_add(YMM as u64), &high[..end])?;
    }
    if !skip(XCR0_PKRU) {
        let pkru = u64::from(x.cpu.guest.st.pkru).to_le_bytes();
        store(x, at.wrapping_add(pkru_at), &pkru)?;
    }
    header[..8].copy_from_slice(&bv.to_le_bytes());
    let written = if compact {
        header[8..16].copy_from_slice(&(1 << 63 | wanted).to_le_bytes());
        16
    } else {
        8
    };
    store(x, at.wrapping_add(HEADER as u64), &header[..written])
}

/// `supervisor`: XRSTORS, which takes the compacted form alone.
fn xrstor(x: &mut Exec<'_>, supervisor: bool) -> Result<()> {
    check_xsave(x)?;
    let wanted = requested(x);
    let at = x.aligned_address(576, 1, false)?;
    if at % 64 != 0 {
        return Err(Exception::GP0);
    }
    let header = at.wrapping_add(HEADER as u64);
    // Intel's processors begin with XCOMP_BV (measured).
    let first = if x.cpu.guest.st.features.amd { at } else { header.wrapping_add(8) };
    look_at(x, &[first, header], false)?;
    let mut area = [0; 832];
    load(x, at, &mut area[..576])?;
    let (bv, compact) = (get_word(&area, HEADER), get_word(&area, HEADER + 8));
    let total =
        if compact >> 63 != 0 { compacted_size(wanted & compact) } else { x.cpu.guest.st.features.xsave_size(wanted) };
    let st = &x.cpu.guest.st;
    let (format_ok, reserved) = if compact >> 63 != 0 {
        let known = bv & !compact == 0 && compact & !(1 << 63) & !st.xcr0 == 0;
        (known && (supervisor || st.features.has("xsavec")), 16..64)
    } else {
        (compact == 0 && !supervisor, 8..24)
    };
    let reserved = area[HEADER + reserved.start..HEADER + reserved.end].iter().any(|&b| b != 0);
    if !format_ok || reserved || bv & !st.xcr0 != 0 {
        return Err(Exception::GP0);
    }
    look_at(x, &[at.wrapping_add(u64::from(total) - 1)], false)?;
    // Only what is loaded is read.
    let st = &x.cpu.guest.st;
    let pkru_at = if compact >> 63 != 0 { compacted_size(compact) - 8 } else { st.features.pkru_offset() };
    let loaded = wanted & bv;
    if loaded & XCR0_AVX != 0 {
        load(x, at.wrapping_add(YMM as u64), &mut area[YMM..])?;
    }
    let mut pkru = [0; 8];
    if loaded & XCR0_PKRU != 0 {
        load(x, at.wrapping_add(pkru_at.into()), &mut pkru)?;
    }
    let loads_mxcsr =
        if compact >> 63 != 0 { wanted & bv & XCR0_SSE != 0 } else { wanted & (XCR0_SSE | XCR0_AVX) != 0 };
    if loads_mxcsr {
        x.cpu.guest.st.mxcsr = mxcsr_of(x, &area)?;
    } else if compact >> 63 != 0 && wanted & XCR0_SSE != 0 {
        x.cpu.guest.st.mxcsr = MXCSR_RESET;
    }
    if wanted & XCR0_X87 != 0 {
        if bv & XCR0_X87 != 0 {
            set_x87(x, &area[..512]);
        } else {
            let mut initial = [0; 512];
            initial[..2].copy_from_slice(&0x37fu16.to_le_bytes());
            set_x87(x, &initial);
        }
    }
    let zero = [0; 832];
    if wanted & XCR0_SSE != 0 {
        let from = if bv & XCR0_SSE != 0 { &area } else { &zero };
        get_xmm(x, &from[..512]);
    }
    if wanted & XCR0_AVX != 0 {
        let from = if bv & XCR0_AVX != 0 { &area } else { &zero };
        for i in 0..xmm_count(x) {
            for j in 0..2 {
                x.cpu.guest.st.vec[i][2 + j] = get_word(from, YMM + 16 * i + 8 * j);
            }
        }
    }
    if wanted & XCR0_PKRU != 0 {
        set_pkru(x.cpu, u32::from_le_bytes([pkru[0], pkru[1], pkru[2], pkru[3]]));
    }
    Ok(())
}
