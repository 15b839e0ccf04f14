//! Each mnemonic becomes the IR operation its name says: a list next to the tables, to catch slips in either.

use mimus_arch::riscv::Features;
use mimus_tcg_frontend_riscv::decode::{PATTERNS, Pattern};
use mimus_tcg_frontend_riscv::translate::{TranslateConfig, translate_block};
use mimus_tcg_ir::*;

fn config() -> TranslateConfig {
    let isa = "rv64imafdc_zicsr_zifencei_zba_zbb_zbs";
    let mut config = TranslateConfig::new(Features::parse_isa_string(isa).unwrap());
    config.max_insns = 1;
    config
}

/// The operations of `pattern` with rd = 10, rs1 = 11, rs2 = 12, rs3 = 13 and rounding mode 1 where free.
fn ops(pattern: &Pattern) -> Vec<Op> {
    let fields = 10 << 7 | 1 << 12 | 11 << 15 | 12 << 20 | 13 << 27;
    let insn = fields & !pattern.mask | pattern.value;
    let code = |at: u32| Some(if at & 2 == 0 { insn as u16 } else { (insn >> 16) as u16 });
    let mut block = Block::default();
    translate_block(&mut block, &code, 0, &config()).unwrap();
    block.ops
}

fn patterns(width: u8) -> impl Iterator<Item = &'static Pattern> {
    PATTERNS.iter().filter(move |p| p.width == width && !p.reserved)
}

/// Operation, slots of result and operands, rounding mode.
fn fp_expected(name: &str) -> Option<(FpOp, FpFmt, bool)> {
    let mut words = name.split('.');
    let (op, first, second) = (words.next()?, words.next()?, words.next());
    let fmt = |word| match word {
        "s" => Some(FpFmt::F32),
        "d" => Some(FpFmt::F64),
        _ => None,
    };
    let own = fmt(second.and(fmt(first).map(|_| first)).unwrap_or(first));
    Some(match (op, first, second) {
        ("fadd", ..) => (FpOp::Add, own?, true),
        ("fsub", ..) => (FpOp::Sub, own?, true),
        ("fmul", ..) => (FpOp::Mul, own?, true),
        ("fdiv", ..) => (FpOp::Div, own?, true),
        ("fsqrt", ..) => (FpOp::Sqrt, own?, true),
        ("fmadd", ..) => (FpOp::MAdd, own?, true),
        ("fmsub", ..) => (FpOp::MSub, own?, true),
        ("fnmsub", ..) => (FpOp::NMSub, own?, true),
        ("fnmadd", ..) => (FpOp::NMAdd, own?, true),
        ("fmin", ..) => (FpOp::Min, own?, false),
        ("fmax", ..) => (FpOp::Max, own?, false),
        ("fsgnj", ..) => (FpOp::Sgnj, own?, false),
        ("fsgnjn", ..) => (FpOp::Sgnjn, own?, false),
        ("fsgnjx", ..) => (FpOp::Sgnjx, own?, false),
        ("feq", ..) => (FpOp::Eq, own?, false),
        ("flt", ..) => (FpOp::Lt, own?, false),
        ("fle", ..) => (FpOp::Le, own?, false),
        ("fclass", ..) => (FpOp::Class, own?, false),
        ("fmv", "x", Some("w")) => (FpOp::MvToInt, FpFmt::F32, false),
        ("fmv", "x", Some("d")) => (FpOp::MvToInt, FpFmt::F64, false),
        ("fmv", "w", Some("x")) => (FpOp::MvFromInt, FpFmt::F32, false),
        ("fmv", "d", Some("x")) => (FpOp::MvFromInt, FpFmt::F64, false),
        ("fcvt", "s" | "d", Some("s" | "d")) => (FpOp::CvtFmt, fmt(first)?, true),
        ("fcvt", "w", Some(f)) => (FpOp::ToI32, fmt(f)?, true),
        ("fcvt", "wu", Some(f)) => (FpOp::ToU32, fmt(f)?, true),
        ("fcvt", "l", Some(f)) => (FpOp::ToI64, fmt(f)?, true),
        ("fcvt", "lu", Some(f)) => (FpOp::ToU64, fmt(f)?, true),
        ("fcvt", f, Some("w")) => (FpOp::FromI32, fmt(f)?, true),
        ("fcvt", f, Some("wu")) => (FpOp::FromU32, fmt(f)?, true),
        ("fcvt", f, Some("l")) => (FpOp::FromI64, fmt(f)?, true),
        ("fcvt", f, Some("lu")) => (FpOp::FromU64, fmt(f)?, true),
        _ => return None,
    })
}

#[test]
fn floating_point() {
    let mut seen = 0;
    for pattern in patterns(32).filter(|p| matches!(p.value & 0x7f, 0x43 | 0x47 | 0x4b | 0x4f | 0x53)) {
        let (op, fmt, rounds) = fp_expected(pattern.name).unwrap_or_else(|| panic!("{}", pattern.name));
        let found = ops(pattern).into_iter().find_map(|found| match found {
            Op::Fp { op, fmt, rm, d, a, b, c } => Some((op, fmt, rm, d, [a, b, c])),
            _ => None,
        });
        let (found_op, found_fmt, rm, d, operands) = found.unwrap();
        assert_eq!((found_op, found_fmt), (op, fmt), "{}", pattern.name);
        assert_eq!(rm == Rm::ToZero, rounds, "{}", pattern.name);
        use FpOp::*;
        let to_x = matches!(op, Eq | Lt | Le | Class | ToI32 | ToU32 | ToI64 | ToU64 | MvToInt);
        let from_x = matches!(op, FromI32 | FromU32 | FromI64 | FromU64 | MvFromInt);
        assert_eq!(d, Slot(if to_x { 10 } else { 42 }), "{}", pattern.name);
        let arity = mimus_tcg_ir::verify::fp_arity(op);
        let expected = [Slot(if from_x { 11 } else { 43 }), Slot(44), Slot(45)];
        assert_eq!(operands[..arity], expected[..arity], "{}", pattern.name);
        seen += 1;
    }
    assert_eq!(seen, 2 * 28 + 2);
}

#[test]
fn atomics() {
    for pattern in patterns(32).filter(|p| p.name.starts_with("amo")) {
        let (name, width) = pattern.name.split_once('.').unwrap();
        let size = if width == "w" { Size::B4 } else { Size::B8 };
        let op = match name {
            "amoswap" => AmoOp::Swap,
            "amoadd" => AmoOp::Add,
            "amoxor" => AmoOp::Xor,
            "amoand" => AmoOp::And,
            "amoor" => AmoOp::Or,
            "amomin" => AmoOp::MinS,
            "amomax" => AmoOp::MaxS,
            "amominu" => AmoOp::MinU,
            "amomaxu" => AmoOp::MaxU,
            _ => panic!("{name}"),
        };
        let (src, base) = (Val::Slot(Slot(12)), Val::Slot(Slot(11)));
        assert_eq!(ops(pattern)[1], Op::Amo { op, d: Some(Slot(10)), src, base, size }, "{}", pattern.name);
    }
}

#[test]
fn branches_loads_and_stores() {
    let find = |name: &str| ops(patterns(32).find(|p| p.name == name).unwrap())[1];
    let (a, b) = (Val::Slot(Slot(11)), Val::Slot(Slot(12)));
    let conds = [
        ("beq", Cond::Eq),
        ("bne", Cond::Ne),
        ("blt", Cond::LtS),
        ("bge", Cond::GeS),
        ("bltu", Cond::LtU),
        ("bgeu", Cond::GeU),
    ];
    for (name, expected) in conds {
        assert!(matches!(find(name), Op::Branch { cond, a: x, b: y, .. } if cond == expected && x == a && y == b));
    }
    let loads = [
        ("lb", Size::B1, Ext::Sign),
        ("lh", Size::B2, Ext::Sign),
        ("lw", Size::B4, Ext::Sign),
        ("lbu", Size::B1, Ext::Zero),
        ("lhu", Size::B2, Ext::Zero),
        ("lwu", Size::B4, Ext::Zero),
    ];
    for (name, size, ext) in loads {
        // The immediate's bits are those of rs2 and rs3: 0x68c.
        assert_eq!(find(name), Op::Load { d: Slot(10), base: a, off: 0x68c, size, ext }, "{name}");
    }
    for (name, size) in [("sb", Size::B1), ("sh", Size::B2), ("sw", Size::B4), ("sd", Size::B8)] {
        // Those of rs3 and rd: 0x68a.
        assert_eq!(find(name), Op::Store { src: b, base: a, off: 0x68a, size }, "{name}");
    }
}

#[test]
fn integer_operations() {
    use AluOp::*;
    let list = [
        ("add", Add, Ty::I64),
        ("sub", Sub, Ty::I64),
        ("sll", Shl, Ty::I64),
        ("slt", SetLtS, Ty::I64),
        ("sltu", SetLtU, Ty::I64),
        ("xor", Xor, Ty::I64),
        ("srl", Shr, Ty::I64),
        ("sra", Sar, Ty::I64),
        ("or", Or, Ty::I64),
        ("and", And, Ty::I64),
        ("addw", Add, Ty::I32),
        ("subw", Sub, Ty::I32),
        ("sllw", Shl, Ty::I32),
        ("srlw", Shr, Ty::I32),
        ("sraw", Sar, Ty::I32),
        ("mul", Mul, Ty::I64),
        ("mulh", MulHiS, Ty::I64),
        ("mulhsu", MulHiSU, Ty::I64),
        ("mulhu", MulHiU, Ty::I64),
        ("div", DivS, Ty::I64),
        ("divu", DivU, Ty::I64),
        ("rem", RemS, Ty::I64),
        ("remu", RemU, Ty::I64),
        ("mulw", Mul, Ty::I32),
        ("divw", DivS, Ty::I32),
        ("divuw", DivU, Ty::I32),
        ("remw", RemS, Ty::I32),
        ("remuw", RemU, Ty::I32),
        ("sh1add", Sh1Add, Ty::I64),
        ("sh2add", Sh2Add, Ty::I64),
        ("sh3add", Sh3Add, Ty::I64),
        ("andn", Andn, Ty::I64),
        ("orn", Orn, Ty::I64),
        ("xnor", Xnor, Ty::I64),
        ("max", MaxS, Ty::I64),
        ("maxu", MaxU, Ty::I64),
        ("min", MinS, Ty::I64),
        ("minu", MinU, Ty::I64),
        ("rol", Rol, Ty::I64),
        ("ror", Ror, Ty::I64),
        ("rolw", Rol, Ty::I32),
        ("rorw", Ror, Ty::I32),
        ("bclr", BClr, Ty::I64),
        ("bext", BExt, Ty::I64),
        ("binv", BInv, Ty::I64),
        ("bset", BSet, Ty::I64),
    ];
    for (name, op, ty) in list {
        let pattern = patterns(32).find(|p| p.name == name).unwrap();
        let (a, b) = (Val::Slot(Slot(11)), Val::Slot(Slot(12)));
        assert_eq!(ops(pattern)[1], Op::Alu { op, ty, d: Slot(10), a, b }, "{name}");
    }
    let constants = [
        ("slti", SetLtS, Ty::I64, 0x68c),
        ("sltiu", SetLtU, Ty::I64, 0x68c),
        ("xori", Xor, Ty::I64, 0x68c),
        ("ori", Or, Ty::I64, 0x68c),
        ("andi", And, Ty::I64, 0x68c),
        ("addi", Add, Ty::I64, 0x68c),
        ("addiw", Add, Ty::I32, 0x68c),
        ("slli", Shl, Ty::I64, 12),
        ("srli", Shr, Ty::I64, 12),
        ("srai", Sar, Ty::I64, 12),
        ("slliw", Shl, Ty::I32, 12),
        ("srliw", Shr, Ty::I32, 12),
        ("sraiw", Sar, Ty::I32, 12),
        ("rori", Ror, Ty::I64, 12),
        ("roriw", Ror, Ty::I32, 12),
        ("bclri", BClr, Ty::I64, 12),
        ("bexti", BExt, Ty::I64, 12),
        ("binvi", BInv, Ty::I64, 12),
        ("bseti", BSet, Ty::I64, 12),
    ];
    for (name, op, ty, imm) in constants {
        let pattern = patterns(32).find(|p| p.name == name).unwrap();
        let (a, b) = (Val::Slot(Slot(11)), Val::Imm(imm));
        assert_eq!(ops(pattern)[1], Op::Alu { op, ty, d: Slot(10), a, b }, "{name}");
    }
}

/// What a compressed instruction does is what its expansion does (vol. I, table "RVC instruction listings").
#[test]
fn compressed_expansions() {
    let cases = [
        (0x0808, 0x0101_0513, "c.addi4spn a0,sp,16"),
        (0x1fe0, 0x3fc1_0413, "c.addi4spn s0,sp,1020"),
        (0x7139, 0xfc01_0113, "c.addi16sp sp,-64"),
        (0x617d, 0x1f01_0113, "c.addi16sp sp,496"),
        (0x45c8, 0x00c5_a503, "c.lw a0,12(a1)"),
        (0x5dfc, 0x07c5_a783, "c.lw a5,124(a1)"),
        (0x7de8, 0x0f85_b503, "c.ld a0,248(a1)"),
        (0xc1ec, 0x04b5_a223, "c.sw a1,68(a1)"),
        (0xf1b0, 0x06c5_b023, "c.sd a2,96(a1)"),
        (0x2da8, 0x0585_b507, "c.fld fa0,88(a1)"),
        (0xada8, 0x04a5_bc27, "c.fsd fa0,88(a1)"),
        (0x52fd, 0xfff0_0293, "c.li t0,-1"),
        (0x357d, 0xfff5_051b, "c.addiw a0,-1"),
        (0x757d, 0xffff_f537, "c.lui a0,0xfffff"),
        (0x657d, 0x0001_f537, "c.lui a0,0x1f"),
        (0x157d, 0xfff5_0513, "c.addi a0,-1"),
        (0x917d, 0x03f5_5513, "c.srli a0,0x3f"),
        (0x9505, 0x4215_5513, "c.srai a0,0x21"),
        (0x9979, 0xffe5_7513, "c.andi a0,-2"),
        (0x8d0d, 0x40b5_0533, "c.sub a0,a1"),
        (0x8d2d, 0x00b5_4533, "c.xor a0,a1"),
        (0x8d4d, 0x00b5_6533, "c.or a0,a1"),
        (0x8d6d, 0x00b5_7533, "c.and a0,a1"),
        (0x9d0d, 0x40b5_053b, "c.subw a0,a1"),
        (0x9d2d, 0x00b5_053b, "c.addw a0,a1"),
        (0x1506, 0x0215_1513, "c.slli a0,0x21"),
        (0x557e, 0x0fc1_2503, "c.lwsp a0,252(sp)"),
        (0x757e, 0x1f81_3503, "c.ldsp a0,504(sp)"),
        (0x357e, 0x1f81_3507, "c.fldsp fa0,504(sp)"),
        (0xdfaa, 0x0ea1_2e23, "c.swsp a0,252(sp)"),
        (0xffaa, 0x1ea1_3c23, "c.sdsp a0,504(sp)"),
        (0xbfaa, 0x1ea1_3c27, "c.fsdsp fa0,504(sp)"),
        (0x8082, 0x0000_8067, "c.jr ra"),
        (0x852e, 0x00b0_0533, "c.mv a0,a1"),
        (0x952e, 0x00b5_0533, "c.add a0,a1"),
        (0xb001, 0x801f_f06f, "c.j 0xfffffffffffff800"),
        (0xaffd, 0x7fe0_006f, "c.j 0x7fe"),
        (0xd101, 0xf005_00e3, "c.beqz a0,0xffffffffffffff00"),
        (0xed7d, 0x0e05_1f63, "c.bnez a0,0xfe"),
    ];
    let one = |insn: u32| {
        let code = |at: u32| Some(if at & 2 == 0 { insn as u16 } else { (insn >> 16) as u16 });
        let mut block = Block::default();
        translate_block(&mut block, &code, 0, &config()).unwrap();
        // The mark and a jump to the next instruction differ in the length.
        let own = |op: &Op| !matches!(op, Op::Insn { .. } | Op::Jump { to: PagePc(2 | 4) });
        block.ops.retain(own);
        block.ops
    };
    for (short, long, text) in cases {
        let shown = mimus_tcg_frontend_riscv::disasm::disassemble(short, 0).unwrap();
        assert_eq!(shown, text, "{short:#x}");
        assert_eq!(one(short), one(long), "{text}");
    }
}
