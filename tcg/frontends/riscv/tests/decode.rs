//! Sweeps over encodings: each means one instruction or none, and every part of the decoder agrees which.

use mimus_arch::riscv::Features;
use mimus_tcg_frontend_riscv::decode::{PATTERNS, Pattern, find16, find32};
use mimus_tcg_frontend_riscv::disasm::disassemble;
use mimus_tcg_frontend_riscv::helper_ids::ILLEGAL;
use mimus_tcg_frontend_riscv::translate::{TranslateConfig, translate_block};
use mimus_tcg_ir::verify::verify;
use mimus_tcg_ir::{Block, Op};

const EVERYTHING: &str =
    "rv64imafdc_zicsr_zifencei_zihintpause_zicbom_zicboz_zba_zbb_zbs_svinval_zicond_zawrs_zcb_zimop_zcmop";

fn config(isa: &str) -> TranslateConfig {
    TranslateConfig::new(Features::parse_isa_string(isa).unwrap())
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }
}

/// The patterns of a width, by the low seven bits of what they match.
struct Linear(Vec<Vec<&'static Pattern>>);

impl Linear {
    fn new(width: u8) -> Linear {
        let of = |low: u32| {
            let near = |p: &&Pattern| p.width == width && (p.value ^ low) & p.mask & 0x7f == 0;
            PATTERNS.iter().filter(near).collect()
        };
        Linear((0..128).map(of).collect())
    }

    /// What the tables say, read from top to bottom.
    fn find(&self, insn: u32) -> Option<&'static Pattern> {
        let mut matches = self.0[(insn & 0x7f) as usize].iter().filter(|p| insn & p.mask == p.value);
        let first = matches.next()?;
        for other in matches {
            assert_eq!(other.group, first.group, "{insn:#x} is {first:?} and {other:?}");
        }
        (!first.reserved).then_some(first)
    }
}

/// Translates `insn` and answers whether it is legal.
fn legal(insn: u32, cfg: &TranslateConfig, block: &mut Block) -> bool {
    let code = |at: u32| Some(if at & 2 == 0 { insn as u16 } else { (insn >> 16) as u16 });
    translate_block(block, &code, 0, cfg).unwrap();
    if let Err(error) = verify(block) {
        panic!("{insn:#x} ({:?}): {error}\n{:?}", disassemble(insn, 0), block.ops);
    }
    assert_eq!(block.insns, 1);
    !block.ops.iter().any(|op| matches!(op, Op::Call { helper: ILLEGAL, .. }))
}

/// Whether the rounding mode makes an instruction illegal.
fn reserved_rounding(pattern: &Pattern, insn: u32) -> bool {
    let computes = matches!(insn & 0x7f, 0x43 | 0x47 | 0x4b | 0x4f | 0x53);
    computes && pattern.mask & 0x7000 == 0 && matches!(insn >> 12 & 7, 5 | 6)
}

#[test]
fn all_compressed_encodings() {
    let linear = Linear::new(16);
    let mut cfg = config(EVERYTHING);
    cfg.max_insns = 1;
    let careful = cfg.careful();
    let mut block = Block::default();
    for insn in (0..=u16::MAX).filter(|insn| insn & 3 != 3) {
        let expected = linear.find(insn.into());
        let found = find16(insn, |_| true);
        assert_eq!(found, expected, "{insn:#06x}");
        assert_eq!(disassemble(insn.into(), 0x1000).is_some(), expected.is_some(), "{insn:#06x}");
        assert_eq!(legal(insn.into(), &cfg, &mut block), expected.is_some(), "{insn:#06x}");
        assert_eq!(legal(insn.into(), &careful, &mut block), expected.is_some(), "{insn:#06x}");
    }
}

fn check32(insn: u32, linear: &Linear, cfg: &TranslateConfig, block: &mut Block) {
    let expected = linear.find(insn);
    assert_eq!(find32(insn, |_| true), expected, "{insn:#010x}");
    let expected = expected.is_some_and(|pattern| !reserved_rounding(pattern, insn));
    assert_eq!(legal(insn, cfg, block), expected, "{insn:#010x}");
}

#[test]
fn structured_sweep() {
    let linear = Linear::new(32);
    let mut cfg = config(EVERYTHING);
    cfg.max_insns = 1;
    let mut block = Block::default();
    for opcode in 0..32 {
        for rest in 0..1 << 15 {
            let (funct3, rs2, funct7) = (rest & 7, rest >> 3 & 31, rest >> 8);
            let fields = opcode << 2 | 3 | funct3 << 12 | rs2 << 20 | funct7 << 25;
            for (rd, rs1) in [(0, 0), (10, 11), (0, 5)] {
                check32(fields | rd << 7 | rs1 << 15, &linear, &cfg, &mut block);
            }
        }
    }
}

#[test]
fn random_operands_of_every_pattern() {
    let linear = Linear::new(32);
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut cfg = config(EVERYTHING);
    cfg.max_insns = 1;
    let careful = cfg.careful();
    let mut block = Block::default();
    for pattern in PATTERNS.iter().filter(|p| p.width == 32) {
        for _ in 0..1000 {
            let insn = random.next() & !pattern.mask | pattern.value;
            check32(insn, &linear, &cfg, &mut block);
            check32(insn, &linear, &careful, &mut block);
            let pc = u64::from(random.next()) << 32 | u64::from(random.next());
            let text = disassemble(insn, pc).unwrap();
            assert!(!text.contains(['{', '}']), "{text}");
        }
    }
    for _ in 0..500_000 {
        check32(random.next() | 3, &linear, &cfg, &mut block);
    }
}

#[test]
fn reserved_encodings_are_illegal() {
    let cfg = config(EVERYTHING);
    let mut block = Block::default();
    let reserved = [
        (0x0000, "defined illegal"),
        (0x0010, "c.addi4spn with 0"),
        (0x9000, "quadrant 0, reserved beside Zcb"),
        (0x2001, "c.addiw to x0"),
        (0x6001, "c.lui of 0"),
        (0x6881, "c.mop is up to 15"),
        (0x6101, "c.addi16sp of 0"),
        (0x9c79, "reserved in c.not's row"),
        (0x4002, "c.lwsp to x0"),
        (0x6002, "c.ldsp to x0"),
        (0x8002, "c.jr of x0"),
        (0xffff_ffff, "all ones"),
        (0x0000_001f, "longer than 32 bits"),
        (0x0200_101b, "slliw by 32 or more"),
        (0x0000_7003, "load, funct3 111"),
        (0x0000_4023, "store, funct3 100"),
        (0x0000_2063, "branch, funct3 010"),
        (0x0000_1067, "jalr, funct3 001"),
        (0x0000_0873, "ecall with rd"),
        (0x0020_0073, "uret"),
        (0x7b20_0073, "dret"),
        (0x1010_202f, "lr.w with rs2"),
        (0x0000_002f, "amo, funct3 000"),
        (0x02b5_7053, "fadd.d is legal"),
        (0x02b5_5053, "fadd.d with rounding mode 5"),
        (0x02b5_6053, "fadd.d with rounding mode 6"),
        (0x04b5_7053, "fadd.h"),
        (0x06b5_7053, "fadd.q"),
        (0x0000_4073, "csr, funct3 100"),
        (0x0030_200f, "cbo of kind 3"),
        (0x0000_208f, "cbo with rd"),
    ];
    for (insn, what) in reserved {
        assert_eq!(legal(insn, &cfg_one(cfg), &mut block), what.ends_with("is legal"), "{insn:#x}: {what}");
    }
}

fn cfg_one(mut cfg: TranslateConfig) -> TranslateConfig {
    cfg.max_insns = 1;
    cfg
}

#[test]
fn absent_extensions_are_illegal() {
    let mut block = Block::default();
    let base = cfg_one(config("rv64i_zicsr"));
    let cases = [
        ("rv64im", 0x02c5_8533, "mul a0,a1,a2"),
        ("rv64im", 0x02c5_c533, "div a0,a1,a2"),
        ("rv64ia", 0x1005_a52f, "lr.w a0,(a1)"),
        ("rv64ia", 0x00c5_a52f, "amoadd.w a0,a2,(a1)"),
        ("rv64if", 0x00c5_f553, "fadd.s fa0,fa1,fa2"),
        ("rv64id", 0x02c5_f553, "fadd.d fa0,fa1,fa2"),
        ("rv64id", 0x0005_b507, "fld fa0,0(a1)"),
        ("rv64ic", 0x852e, "c.mv a0,a1"),
        ("rv64idc", 0x2188, "c.fld fa0,0(a1)"),
        ("rv64i_zba", 0x08c5_853b, "add.uw a0,a1,a2"),
        ("rv64i_zbb", 0x6025_9513, "cpop a0,a1"),
        ("rv64i_zbs", 0x28c5_9533, "bset a0,a1,a2"),
        ("rv64i_zifencei", 0x0000_100f, "fence.i"),
        ("rv64i_zicbom", 0x0015_200f, "cbo.clean (a0)"),
        ("rv64i_zicboz", 0x0045_200f, "cbo.zero (a0)"),
        ("rv64i_zicond", 0x0ec5_d533, "czero.eqz a0,a1,a2"),
        ("rv64i_zawrs", 0x00d0_0073, "wrs.nto"),
        ("rv64i_zcb", 0x8188, "c.lbu a0,0(a1)"),
        ("rv64i_zcb_zbb", 0x9d65, "c.sext.b a0"),
        ("rv64ic_zcmop", 0x6081, "c.mop.1"),
        ("rv64i_zimop", 0x81c5_c573, "mop.r.0 a0,a1"),
        ("rv64i_svinval", 0x1600_0073, "sinval.vma zero,zero"),
        ("rv64i_zicsr", 0x0010_2573, "csrrs a0,fflags,zero"),
    ];
    for (isa, insn, text) in cases {
        assert_eq!(disassemble(insn, 0).unwrap(), text);
        let present = cfg_one(config(isa));
        assert!(legal(insn, &present, &mut block), "{text} on {isa}");
        let absent = if isa == "rv64i_zicsr" { cfg_one(config("rv64i")) } else { base };
        assert!(!legal(insn, &absent, &mut block), "{text}");
    }
    // c.fld needs D as well as C; pause without Zihintpause is a fence that orders nothing.
    assert!(!legal(0x2188, &cfg_one(config("rv64ic")), &mut block));
    assert!(legal(0x0100_000f, &base, &mut block));
    assert_eq!(block.ops.len(), 2);
}
