//! The XSAVE area in its standard form, and where its components are.
//!
//! Spec: SDM volume 1 chapter 13. A processor says where its components are (CPUID leaf 0xd); Intel's all say
//! the same, which is the layout of [`X86State::xsave`](super::X86State::xsave). AMD's differ from
//! PKRU on, so that an accelerator on such a host converts.

use super::features::X86Features;
use super::regs::{XCR0_AVX, XCR0_SSE, XCR0_X87, XSAVE_MIN, XSAVE_XSTATE_BV};

/// Number of components that have a place.
pub const COMPONENTS: usize = 19;

/// Offset and size in bytes of each component, by its bit in XCR0; size 0: it has none in the area, or is
/// in the legacy region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveLayout(pub [(u32, u32); COMPONENTS]);

/// The layout of saved states.
pub const LAYOUT: XsaveLayout = XsaveLayout([
    (0, 0),       // x87: legacy region
    (0, 0),       // SSE: legacy region
    (576, 256),   // AVX
    (960, 64),    // MPX BNDREGS
    (1024, 64),   // MPX BNDCSR
    (1088, 64),   // AVX-512 opmask
    (1152, 512),  // AVX-512 ZMM_Hi256
    (1664, 1024), // AVX-512 Hi16_ZMM
    (0, 0),       // PT: supervisor
    (2688, 8),    // PKRU
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (2752, 64),   // AMX TILECFG
    (2816, 8192), // AMX TILEDATA
]);

/// The components a processor with these features has.
pub fn components(features: &X86Features) -> u64 {
    if !features.has_name("xsave") {
        return 0;
    }
    let mut mask = XCR0_X87 | XCR0_SSE;
    for (name, bits) in
        [("avx", XCR0_AVX), ("mpx", 3 << 3), ("avx512f", 7 << 5), ("pku", 1 << 9), ("amx-tile", 3 << 17)]
    {
        if features.has_name(name) {
            mask |= bits;
        }
    }
    mask
}

impl XsaveLayout {
    /// Bytes of an area with these components.
    pub fn size(&self, components: u64) -> usize {
        let ends = self.present(components).map(|(_, offset, size)| offset + size);
        ends.fold(XSAVE_MIN, usize::max)
    }

    fn present(&self, components: u64) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let all = self.0.iter().enumerate();
        let wanted = all.filter(move |(i, (_, size))| components >> i & 1 != 0 && *size > 0);
        wanted.map(|(i, (offset, size))| (i, *offset as usize, *size as usize))
    }

    /// Moves an area from this layout to another. What is not in use becomes zeros. `None` if the area is
    /// shorter than the components in use, or one of them has no place.
    pub fn convert(&self, area: &[u8], to: &XsaveLayout) -> Option<Vec<u8>> {
        let used = u64::from_le_bytes(area.get(XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8)?.try_into().ok()?);
        let mut out = vec![0; to.size(used)];
        out[..XSAVE_MIN].copy_from_slice(area.get(..XSAVE_MIN)?);
        for bit in (2..64).filter(|bit| used >> bit & 1 != 0) {
            let ((offset, size), (at, room)) = (*self.0.get(bit)?, *to.0.get(bit)?);
            if size == 0 || size != room {
                return None;
            }
            let bytes = area.get(offset as usize..(offset + size) as usize)?;
            out[at as usize..(at + size) as usize].copy_from_slice(bytes);
        }
        Some(out)
    }
}

/// Bytes of the legacy region that are the processor's constants or for software: not state.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;
const FOR_SOFTWARE: std::ops::Range<usize> = 464..512;

/// Brings an area in [`LAYOUT`] into the one form that states have, whatever the processor's optimisations made of
/// it: x87 and SSE always in use, others if they are not zero, which is their initial state; no bytes that are not
/// state; no longer than the last component in use. False, and nothing done, if it is no such area.
pub fn normalise(area: &mut Vec<u8>) -> bool {
    let Some(mut tidy) = LAYOUT.convert(area, &LAYOUT) else { return false };
    let used = u64::from_le_bytes(std::array::from_fn(|i| tidy[XSAVE_XSTATE_BV + i]));
    let mut kept = XCR0_X87 | XCR0_SSE;
    for (bit, offset, size) in LAYOUT.present(used) {
        if tidy[offset..offset + size].iter().any(|b| *b != 0) {
            kept |= 1 << bit;
        }
    }
    tidy.truncate(LAYOUT.size(kept));
    tidy[MXCSR_MASK].fill(0);
    tidy[FOR_SOFTWARE].fill(0);
    tidy[XSAVE_XSTATE_BV..XSAVE_MIN].fill(0);
    tidy[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 8].copy_from_slice(&kept.to_le_bytes());
    *area = tidy;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_form() {
        let mut area = vec![0u8; LAYOUT.size(0xe7)];
        area[XSAVE_XSTATE_BV] = 0xe6;
        area[28] = 0xff;
        area[470] = 1;
        area[600] = 3;
        assert!(normalise(&mut area));
        assert_eq!((area.len(), area[XSAVE_XSTATE_BV], area[28], area[470], area[600]), (832, 7, 0, 0, 3));
        let again = area.clone();
        assert!(normalise(&mut area) && area == again);
        assert!(!normalise(&mut vec![0; 100]));
    }

    #[test]
    fn sizes() {
        assert_eq!(LAYOUT.size(3), XSAVE_MIN);
        assert_eq!(LAYOUT.size(7), 832);
        assert_eq!(LAYOUT.size(0xe7), 2688);
        assert_eq!(LAYOUT.size(0x2e7), 2696);
        let f = X86Features::of(&["xsave", "avx", "avx512f", "pku"]);
        assert_eq!(components(&f), 0x2e7);
        assert_eq!(components(&X86Features::of(&["avx"])), 0);
    }

    #[test]
    fn conversion() {
        let mut amd = LAYOUT;
        amd.0[9] = (832, 8);
        let mut area = vec![0u8; LAYOUT.size(0x207)];
        area[XSAVE_XSTATE_BV..XSAVE_XSTATE_BV + 2].copy_from_slice(&0x207u16.to_le_bytes());
        area[576] = 1;
        area[2688] = 2;
        let moved = LAYOUT.convert(&area, &amd).unwrap();
        assert_eq!((moved.len(), moved[576], moved[832]), (840, 1, 2));
        assert_eq!(amd.convert(&moved, &LAYOUT), Some(area.clone()));
        // Too short, and a component without a place.
        assert_eq!(LAYOUT.convert(&area[..2690], &amd), None);
        area[XSAVE_XSTATE_BV + 7] = 0x80;
        assert_eq!(LAYOUT.convert(&area, &amd), None);
    }
}
