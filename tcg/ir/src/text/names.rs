//! The mnemonics, each table used to write and to read.

use crate::op::*;
use crate::unit::{UnitGpr, UnitMemory};

/// A type whose values have a name each.
pub(super) trait Named: Copy + PartialEq + 'static {
    /// What the values are called in an error.
    const WHAT: &'static str;
    /// Every value and its name.
    const NAMES: &'static [(Self, &'static str)];

    /// The value's name.
    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(v, _)| *v == self).map_or("?", |(_, name)| name)
    }

    /// The value of that name.
    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, n)| *n == name).map(|(v, _)| *v)
    }
}

macro_rules! named {
    ($ty:ident, $what:literal, $($value:ident $name:literal),+ $(,)?) => {
        impl Named for $ty {
            const WHAT: &'static str = $what;
            const NAMES: &'static [($ty, &'static str)] = &[$(($ty::$value, $name)),+];
        }

        // A value added to the type and not to the table does not compile.
        const _: fn($ty) = |v| match v {
            $($ty::$value => (),)+
        };
    };
}

named!(Ty, "a type (i64, i32, u32)", I64 "i64", I32 "i32", U32 "u32");
named!(AluOp, "a two-operand operation",
    Add "add", Sub "sub", And "and", Or "or", Xor "xor", Andn "andn", Orn "orn", Xnor "xnor",
    Shl "shl", Shr "shr", Sar "sar", Rol "rol", Ror "ror",
    Mul "mul", MulHiS "mulhis", MulHiU "mulhiu", MulHiSU "mulhisu",
    DivS "divs", DivU "divu", RemS "rems", RemU "remu",
    MinS "mins", MinU "minu", MaxS "maxs", MaxU "maxu", SetLtS "setlts", SetLtU "setltu",
    Sh1Add "sh1add", Sh2Add "sh2add", Sh3Add "sh3add",
    BSet "bset", BClr "bclr", BInv "binv", BExt "bext",
);
named!(UnOp, "a one-operand operation",
    Mov "mov", SextB "sextb", SextH "sexth", SextW "sextw", ZextB "zextb", ZextH "zexth", ZextW "zextw",
    Clz "clz", Ctz "ctz", Popcnt "popcnt", Bswap "bswap", OrcB "orcb",
);
named!(Size, "a size (b1, b2, b4, b8)", B1 "b1", B2 "b2", B4 "b4", B8 "b8");
named!(Ext, "an extension (zero, sign, ones)", Zero "zero", Sign "sign", Ones "ones");
named!(AmoOp, "an atomic operation (swap, add, xor, and, or, mins, maxs, minu, maxu)",
    Swap "swap", Add "add", Xor "xor", And "and", Or "or",
    MinS "mins", MaxS "maxs", MinU "minu", MaxU "maxu",
);
named!(Cond, "a condition (eq, ne, lts, ges, ltu, geu)",
    Eq "eq", Ne "ne", LtS "lts", GeS "ges", LtU "ltu", GeU "geu",
);
named!(FpFmt, "a format (f32, f64)", F32 "f32", F64 "f64");
named!(Rm, "a rounding mode (rne, rtz, rdn, rup, rmm, dyn)",
    NearestEven "rne", ToZero "rtz", Down "rdn", Up "rup", NearestMaxMag "rmm", Dynamic "dyn",
);
named!(FpOp, "a floating-point operation",
    Add "add", Sub "sub", Mul "mul", Div "div", Sqrt "sqrt",
    MAdd "madd", MSub "msub", NMSub "nmsub", NMAdd "nmadd", Min "min", Max "max",
    Eq "eq", Lt "lt", Le "le", Class "class", Sgnj "sgnj", Sgnjn "sgnjn", Sgnjx "sgnjx",
    ToI32 "toi32", ToU32 "tou32", ToI64 "toi64", ToU64 "tou64",
    FromI32 "fromi32", FromU32 "fromu32", FromI64 "fromi64", FromU64 "fromu64",
    CvtFmt "cvtfmt", MvToInt "mvtoint", MvFromInt "mvfromint",
);
named!(CallKind, "a kind of call (pure, mayexit)", Pure "pure", MayExit "mayexit");
named!(FlagOp, "an operation with flags",
    Add "add", Adc "adc", Sub "sub", Sbb "sbb", And "and", Or "or", Xor "xor", Andn "andn",
    Neg "neg", Not "not", Inc "inc", Dec "dec", Mul "mul",
    Shl "shl", Shr "shr", Sar "sar", Rol "rol", Ror "ror", Rcl "rcl", Rcr "rcr",
    Bt "bt", Bts "bts", Btr "btr", Btc "btc", Bsf "bsf", Bsr "bsr",
    Popcnt "popcnt", Lzcnt "lzcnt", Tzcnt "tzcnt", Bextr "bextr", Bzhi "bzhi",
    Blsi "blsi", Blsr "blsr", Blsmsk "blsmsk",
);
named!(CondF, "a condition on flags (o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g)",
    O "o", No "no", B "b", Ae "ae", E "e", Ne "ne", Be "be", A "a",
    S "s", Ns "ns", P "p", Np "np", L "l", Ge "ge", Le "le", G "g",
);
named!(UnitGpr, "a general register's part (none, inrm, outrm, outreg, outax)",
    None "none", InRm "inrm", OutRm "outrm", OutReg "outreg", OutAx "outax");
named!(UnitMemory, "what memory is for (none, load, store)", None "none", Load "load", Store "store");
