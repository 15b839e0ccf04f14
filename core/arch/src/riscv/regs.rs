//! Register names (RISC-V ABIs Specification 1.0, "Register convention").

/// ABI names of `x0`-`x31`.
pub const XREG_NAMES: [&str; 32] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "s2",
    "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6",
];

/// ABI names of `f0`-`f31`.
pub const FREG_NAMES: [&str; 32] = [
    "ft0", "ft1", "ft2", "ft3", "ft4", "ft5", "ft6", "ft7", "fs0", "fs1", "fa0", "fa1", "fa2", "fa3", "fa4", "fa5",
    "fa6", "fa7", "fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9", "fs10", "fs11", "ft8", "ft9", "ft10", "ft11",
];

/// Number of `a0`, the first argument register.
pub const A0: usize = 10;
/// Number of `a7`, the SBI extension id.
pub const A7: usize = 17;

/// The integer register called `name`: ABI name, `x5` or `fp`.
pub fn xreg(name: &str) -> Option<usize> {
    if name == "fp" {
        return Some(8);
    }
    numbered(name, 'x').or_else(|| XREG_NAMES.iter().position(|&n| n == name))
}

/// The floating-point register called `name`: ABI name or `f5`.
pub fn freg(name: &str) -> Option<usize> {
    numbered(name, 'f').or_else(|| FREG_NAMES.iter().position(|&n| n == name))
}

fn numbered(name: &str, letter: char) -> Option<usize> {
    let digits = name.strip_prefix(letter)?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|&n| n < 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (i, name) in XREG_NAMES.iter().enumerate() {
            assert_eq!(xreg(name), Some(i));
            assert_eq!(xreg(&format!("x{i}")), Some(i));
        }
        for (i, name) in FREG_NAMES.iter().enumerate() {
            assert_eq!(freg(name), Some(i));
        }
        assert_eq!(xreg("fp"), Some(8));
        assert_eq!(xreg("x32"), None);
        assert_eq!(xreg("x"), None);
        assert_eq!((XREG_NAMES[A0], XREG_NAMES[A7]), ("a0", "a7"));
    }
}
