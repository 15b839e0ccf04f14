//! Which operation each instruction is: the methods the decoder calls. A new line in a table wants a line here.

use super::Translator;
use super::system::CsrOp;
use crate::decode::*;
use crate::helper_ids;
use mimus_arch::riscv::Ext as Extension;
use mimus_tcg_ir::{AluOp, AmoOp, Cond, Ext, FpFmt, FpOp, Size, Ty, UnOp, Val};

/// Methods that pass their arguments on: `name(Args) => function(leading arguments)`.
macro_rules! forward {
    ($($name:ident($args:ident) => $function:ident($($lead:expr),*);)*) => {
        $(fn $name(&mut self, args: $args) -> bool {
            self.$function($($lead,)* args)
        })*
    };
}

/// Unary integer operations: `name => op, type`.
macro_rules! unary {
    ($($name:ident => $op:ident, $ty:ident;)*) => {
        $(fn $name(&mut self, args: ArgsR2) -> bool {
            self.unary(UnOp::$op, Ty::$ty, args.rd, args.rs1)
        })*
    };
}

/// CSR instructions: `register form, immediate form => op`.
macro_rules! csr {
    ($($reg:ident, $imm:ident => $op:ident;)*) => {
        $(fn $reg(&mut self, a: ArgsCsr) -> bool {
            let source = self.x(a.rs1);
            self.csr(CsrOp::$op, a.rd, a.csr, source, a.rs1 == 0)
        }
        fn $imm(&mut self, a: ArgsCsri) -> bool {
            self.csr(CsrOp::$op, a.rd, a.csr, Val::Imm(i64::from(a.uimm)), a.uimm == 0)
        })*
    };
}

/// Instructions without arguments: `name => function(arguments)`.
macro_rules! plain {
    ($($name:ident => $function:ident($($lead:expr),*);)*) => {
        $(fn $name(&mut self) -> bool {
            self.$function($($lead),*)
        })*
    };
}

impl Translate for Translator<'_> {
    #[inline(always)]
    fn has(&self, extension: Extension) -> bool {
        self.cfg.features().has(extension)
    }

    // RV64I
    forward! {
        lui(ArgsU) => load_upper();
        auipc(ArgsU) => add_upper_pc();
        jal(ArgsJ) => jump_and_link();
        jalr(ArgsI) => jump_and_link_reg();
        beq(ArgsB) => branch(Cond::Eq);
        bne(ArgsB) => branch(Cond::Ne);
        blt(ArgsB) => branch(Cond::LtS);
        bge(ArgsB) => branch(Cond::GeS);
        bltu(ArgsB) => branch(Cond::LtU);
        bgeu(ArgsB) => branch(Cond::GeU);
        lb(ArgsI) => load(Size::B1, Ext::Sign);
        lh(ArgsI) => load(Size::B2, Ext::Sign);
        lw(ArgsI) => load(Size::B4, Ext::Sign);
        ld(ArgsI) => load(Size::B8, Ext::Zero);
        lbu(ArgsI) => load(Size::B1, Ext::Zero);
        lhu(ArgsI) => load(Size::B2, Ext::Zero);
        lwu(ArgsI) => load(Size::B4, Ext::Zero);
        sb(ArgsS) => store(Size::B1);
        sh(ArgsS) => store(Size::B2);
        sw(ArgsS) => store(Size::B4);
        sd(ArgsS) => store(Size::B8);
        addi(ArgsI) => add_imm();
        slti(ArgsI) => op_imm(AluOp::SetLtS, Ty::I64);
        sltiu(ArgsI) => op_imm(AluOp::SetLtU, Ty::I64);
        xori(ArgsI) => op_imm(AluOp::Xor, Ty::I64);
        ori(ArgsI) => op_imm(AluOp::Or, Ty::I64);
        andi(ArgsI) => op_imm(AluOp::And, Ty::I64);
        slli(ArgsShift) => op_shift(AluOp::Shl, Ty::I64);
        srli(ArgsShift) => op_shift(AluOp::Shr, Ty::I64);
        srai(ArgsShift) => op_shift(AluOp::Sar, Ty::I64);
        add(ArgsR) => op_reg(AluOp::Add, Ty::I64);
        sub(ArgsR) => op_reg(AluOp::Sub, Ty::I64);
        sll(ArgsR) => op_reg(AluOp::Shl, Ty::I64);
        slt(ArgsR) => op_reg(AluOp::SetLtS, Ty::I64);
        sltu(ArgsR) => op_reg(AluOp::SetLtU, Ty::I64);
        xor(ArgsR) => op_reg(AluOp::Xor, Ty::I64);
        srl(ArgsR) => op_reg(AluOp::Shr, Ty::I64);
        sra(ArgsR) => op_reg(AluOp::Sar, Ty::I64);
        or(ArgsR) => op_reg(AluOp::Or, Ty::I64);
        and(ArgsR) => op_reg(AluOp::And, Ty::I64);
        addiw(ArgsI) => op_imm(AluOp::Add, Ty::I32);
        slliw(ArgsShift) => op_shift(AluOp::Shl, Ty::I32);
        srliw(ArgsShift) => op_shift(AluOp::Shr, Ty::I32);
        sraiw(ArgsShift) => op_shift(AluOp::Sar, Ty::I32);
        addw(ArgsR) => op_reg(AluOp::Add, Ty::I32);
        subw(ArgsR) => op_reg(AluOp::Sub, Ty::I32);
        sllw(ArgsR) => op_reg(AluOp::Shl, Ty::I32);
        srlw(ArgsR) => op_reg(AluOp::Shr, Ty::I32);
        sraw(ArgsR) => op_reg(AluOp::Sar, Ty::I32);
        fence(ArgsFence) => memory_fence();
    }

    // Zifencei, Zihintpause
    plain! {
        fence_i => instruction_fence();
        pause => pause_hint();
    }

    // M
    forward! {
        mul(ArgsR) => op_reg(AluOp::Mul, Ty::I64);
        mulh(ArgsR) => op_reg(AluOp::MulHiS, Ty::I64);
        mulhsu(ArgsR) => op_reg(AluOp::MulHiSU, Ty::I64);
        mulhu(ArgsR) => op_reg(AluOp::MulHiU, Ty::I64);
        mulw(ArgsR) => op_reg(AluOp::Mul, Ty::I32);
        div(ArgsR) => op_reg(AluOp::DivS, Ty::I64);
        divu(ArgsR) => op_reg(AluOp::DivU, Ty::I64);
        rem(ArgsR) => op_reg(AluOp::RemS, Ty::I64);
        remu(ArgsR) => op_reg(AluOp::RemU, Ty::I64);
        divw(ArgsR) => op_reg(AluOp::DivS, Ty::I32);
        divuw(ArgsR) => op_reg(AluOp::DivU, Ty::I32);
        remw(ArgsR) => op_reg(AluOp::RemS, Ty::I32);
        remuw(ArgsR) => op_reg(AluOp::RemU, Ty::I32);
    }

    // A
    forward! {
        lr_w(ArgsLr) => load_reserved(Size::B4);
        sc_w(ArgsAmo) => store_conditional(Size::B4);
        amoswap_w(ArgsAmo) => amo(AmoOp::Swap, Size::B4);
        amoadd_w(ArgsAmo) => amo(AmoOp::Add, Size::B4);
        amoxor_w(ArgsAmo) => amo(AmoOp::Xor, Size::B4);
        amoand_w(ArgsAmo) => amo(AmoOp::And, Size::B4);
        amoor_w(ArgsAmo) => amo(AmoOp::Or, Size::B4);
        amomin_w(ArgsAmo) => amo(AmoOp::MinS, Size::B4);
        amomax_w(ArgsAmo) => amo(AmoOp::MaxS, Size::B4);
        amominu_w(ArgsAmo) => amo(AmoOp::MinU, Size::B4);
        amomaxu_w(ArgsAmo) => amo(AmoOp::MaxU, Size::B4);
        lr_d(ArgsLr) => load_reserved(Size::B8);
        sc_d(ArgsAmo) => store_conditional(Size::B8);
        amoswap_d(ArgsAmo) => amo(AmoOp::Swap, Size::B8);
        amoadd_d(ArgsAmo) => amo(AmoOp::Add, Size::B8);
        amoxor_d(ArgsAmo) => amo(AmoOp::Xor, Size::B8);
        amoand_d(ArgsAmo) => amo(AmoOp::And, Size::B8);
        amoor_d(ArgsAmo) => amo(AmoOp::Or, Size::B8);
        amomin_d(ArgsAmo) => amo(AmoOp::MinS, Size::B8);
        amomax_d(ArgsAmo) => amo(AmoOp::MaxS, Size::B8);
        amominu_d(ArgsAmo) => amo(AmoOp::MinU, Size::B8);
        amomaxu_d(ArgsAmo) => amo(AmoOp::MaxU, Size::B8);
    }

    // F
    forward! {
        flw(ArgsI) => fp_load(Size::B4);
        fsw(ArgsS) => fp_store(Size::B4);
        fmadd_s(ArgsFr4Rm) => fp_fused(FpOp::MAdd, FpFmt::F32);
        fmsub_s(ArgsFr4Rm) => fp_fused(FpOp::MSub, FpFmt::F32);
        fnmsub_s(ArgsFr4Rm) => fp_fused(FpOp::NMSub, FpFmt::F32);
        fnmadd_s(ArgsFr4Rm) => fp_fused(FpOp::NMAdd, FpFmt::F32);
        fadd_s(ArgsFrRm) => fp_arith(FpOp::Add, FpFmt::F32);
        fsub_s(ArgsFrRm) => fp_arith(FpOp::Sub, FpFmt::F32);
        fmul_s(ArgsFrRm) => fp_arith(FpOp::Mul, FpFmt::F32);
        fdiv_s(ArgsFrRm) => fp_arith(FpOp::Div, FpFmt::F32);
        fsqrt_s(ArgsFr2Rm) => fp_unary(FpOp::Sqrt, FpFmt::F32);
        fsgnj_s(ArgsFr) => fp_exact(FpOp::Sgnj, FpFmt::F32);
        fsgnjn_s(ArgsFr) => fp_exact(FpOp::Sgnjn, FpFmt::F32);
        fsgnjx_s(ArgsFr) => fp_exact(FpOp::Sgnjx, FpFmt::F32);
        fmin_s(ArgsFr) => fp_exact(FpOp::Min, FpFmt::F32);
        fmax_s(ArgsFr) => fp_exact(FpOp::Max, FpFmt::F32);
        feq_s(ArgsFr) => fp_compare(FpOp::Eq, FpFmt::F32);
        flt_s(ArgsFr) => fp_compare(FpOp::Lt, FpFmt::F32);
        fle_s(ArgsFr) => fp_compare(FpOp::Le, FpFmt::F32);
        fcvt_w_s(ArgsFr2Rm) => fp_to_int(FpOp::ToI32, FpFmt::F32);
        fcvt_s_w(ArgsFr2Rm) => fp_from_int(FpOp::FromI32, FpFmt::F32);
        fcvt_wu_s(ArgsFr2Rm) => fp_to_int(FpOp::ToU32, FpFmt::F32);
        fcvt_s_wu(ArgsFr2Rm) => fp_from_int(FpOp::FromU32, FpFmt::F32);
        fcvt_l_s(ArgsFr2Rm) => fp_to_int(FpOp::ToI64, FpFmt::F32);
        fcvt_s_l(ArgsFr2Rm) => fp_from_int(FpOp::FromI64, FpFmt::F32);
        fcvt_lu_s(ArgsFr2Rm) => fp_to_int(FpOp::ToU64, FpFmt::F32);
        fcvt_s_lu(ArgsFr2Rm) => fp_from_int(FpOp::FromU64, FpFmt::F32);
        fcvt_s_d(ArgsFr2Rm) => fp_unary(FpOp::CvtFmt, FpFmt::F32);
        fmv_x_w(ArgsR2) => fp_to_x(FpOp::MvToInt, FpFmt::F32);
        fclass_s(ArgsR2) => fp_to_x(FpOp::Class, FpFmt::F32);
        fmv_w_x(ArgsR2) => fp_from_x(FpFmt::F32);
    }

    // D
    forward! {
        fld(ArgsI) => fp_load(Size::B8);
        fsd(ArgsS) => fp_store(Size::B8);
        fmadd_d(ArgsFr4Rm) => fp_fused(FpOp::MAdd, FpFmt::F64);
        fmsub_d(ArgsFr4Rm) => fp_fused(FpOp::MSub, FpFmt::F64);
        fnmsub_d(ArgsFr4Rm) => fp_fused(FpOp::NMSub, FpFmt::F64);
        fnmadd_d(ArgsFr4Rm) => fp_fused(FpOp::NMAdd, FpFmt::F64);
        fadd_d(ArgsFrRm) => fp_arith(FpOp::Add, FpFmt::F64);
        fsub_d(ArgsFrRm) => fp_arith(FpOp::Sub, FpFmt::F64);
        fmul_d(ArgsFrRm) => fp_arith(FpOp::Mul, FpFmt::F64);
        fdiv_d(ArgsFrRm) => fp_arith(FpOp::Div, FpFmt::F64);
        fsqrt_d(ArgsFr2Rm) => fp_unary(FpOp::Sqrt, FpFmt::F64);
        fsgnj_d(ArgsFr) => fp_exact(FpOp::Sgnj, FpFmt::F64);
        fsgnjn_d(ArgsFr) => fp_exact(FpOp::Sgnjn, FpFmt::F64);
        fsgnjx_d(ArgsFr) => fp_exact(FpOp::Sgnjx, FpFmt::F64);
        fmin_d(ArgsFr) => fp_exact(FpOp::Min, FpFmt::F64);
        fmax_d(ArgsFr) => fp_exact(FpOp::Max, FpFmt::F64);
        feq_d(ArgsFr) => fp_compare(FpOp::Eq, FpFmt::F64);
        flt_d(ArgsFr) => fp_compare(FpOp::Lt, FpFmt::F64);
        fle_d(ArgsFr) => fp_compare(FpOp::Le, FpFmt::F64);
        fcvt_w_d(ArgsFr2Rm) => fp_to_int(FpOp::ToI32, FpFmt::F64);
        fcvt_d_w(ArgsFr2Rm) => fp_from_int(FpOp::FromI32, FpFmt::F64);
        fcvt_wu_d(ArgsFr2Rm) => fp_to_int(FpOp::ToU32, FpFmt::F64);
        fcvt_d_wu(ArgsFr2Rm) => fp_from_int(FpOp::FromU32, FpFmt::F64);
        fcvt_l_d(ArgsFr2Rm) => fp_to_int(FpOp::ToI64, FpFmt::F64);
        fcvt_d_l(ArgsFr2Rm) => fp_from_int(FpOp::FromI64, FpFmt::F64);
        fcvt_lu_d(ArgsFr2Rm) => fp_to_int(FpOp::ToU64, FpFmt::F64);
        fcvt_d_lu(ArgsFr2Rm) => fp_from_int(FpOp::FromU64, FpFmt::F64);
        fcvt_d_s(ArgsFr2Rm) => fp_unary(FpOp::CvtFmt, FpFmt::F64);
        fmv_x_d(ArgsR2) => fp_to_x(FpOp::MvToInt, FpFmt::F64);
        fclass_d(ArgsR2) => fp_to_x(FpOp::Class, FpFmt::F64);
        fmv_d_x(ArgsR2) => fp_from_x(FpFmt::F64);
    }

    // Zba
    forward! {
        add_uw(ArgsR) => op_uw(AluOp::Add);
        sh1add(ArgsR) => op_reg(AluOp::Sh1Add, Ty::I64);
        sh1add_uw(ArgsR) => op_uw(AluOp::Sh1Add);
        sh2add(ArgsR) => op_reg(AluOp::Sh2Add, Ty::I64);
        sh2add_uw(ArgsR) => op_uw(AluOp::Sh2Add);
        sh3add(ArgsR) => op_reg(AluOp::Sh3Add, Ty::I64);
        sh3add_uw(ArgsR) => op_uw(AluOp::Sh3Add);
        slli_uw(ArgsShift) => shift_left_uw();
    }

    // Zbb
    forward! {
        andn(ArgsR) => op_reg(AluOp::Andn, Ty::I64);
        orn(ArgsR) => op_reg(AluOp::Orn, Ty::I64);
        xnor(ArgsR) => op_reg(AluOp::Xnor, Ty::I64);
        max(ArgsR) => op_reg(AluOp::MaxS, Ty::I64);
        maxu(ArgsR) => op_reg(AluOp::MaxU, Ty::I64);
        min(ArgsR) => op_reg(AluOp::MinS, Ty::I64);
        minu(ArgsR) => op_reg(AluOp::MinU, Ty::I64);
        rol(ArgsR) => op_reg(AluOp::Rol, Ty::I64);
        ror(ArgsR) => op_reg(AluOp::Ror, Ty::I64);
        rori(ArgsShift) => op_shift(AluOp::Ror, Ty::I64);
        rolw(ArgsR) => op_reg(AluOp::Rol, Ty::I32);
        rorw(ArgsR) => op_reg(AluOp::Ror, Ty::I32);
        roriw(ArgsShift) => op_shift(AluOp::Ror, Ty::I32);
    }
    unary! {
        clz => Clz, I64;
        ctz => Ctz, I64;
        cpop => Popcnt, I64;
        clzw => Clz, I32;
        ctzw => Ctz, I32;
        cpopw => Popcnt, I32;
        sext_b => SextB, I64;
        sext_h => SextH, I64;
        zext_h => ZextH, I64;
        orc_b => OrcB, I64;
        rev8 => Bswap, I64;
    }

    // Zbs
    forward! {
        bclr(ArgsR) => op_reg(AluOp::BClr, Ty::I64);
        bclri(ArgsShift) => op_shift(AluOp::BClr, Ty::I64);
        bext(ArgsR) => op_reg(AluOp::BExt, Ty::I64);
        bexti(ArgsShift) => op_shift(AluOp::BExt, Ty::I64);
        binv(ArgsR) => op_reg(AluOp::BInv, Ty::I64);
        binvi(ArgsShift) => op_shift(AluOp::BInv, Ty::I64);
        bset(ArgsR) => op_reg(AluOp::BSet, Ty::I64);
        bseti(ArgsShift) => op_shift(AluOp::BSet, Ty::I64);
    }

    // Zicsr
    csr! {
        csrrw, csrrwi => Write;
        csrrs, csrrsi => Set;
        csrrc, csrrci => Clear;
    }

    // Zicond, Zimop
    forward! {
        czero_eqz(ArgsR) => zero_if(false);
        czero_nez(ArgsR) => zero_if(true);
        mop(ArgsMop) => may_be();
        c_mop(ArgsCMop) => compressed_may_be();
    }

    // Privileged, Zawrs: to wait for a store is to give others time
    plain! {
        wrs_nto => pause_hint();
        wrs_sto => pause_hint();
        ecall => leave(helper_ids::ECALL);
        ebreak => leave(helper_ids::EBREAK);
        sret => leave(helper_ids::SRET);
        mret => leave(helper_ids::MRET);
        wfi => leave(helper_ids::WFI);
        sfence_w_inval => fence_invalidation();
        sfence_inval_ir => fence_invalidation();
    }
    forward! {
        sfence_vma(ArgsVma) => fence_translation();
        sinval_vma(ArgsVma) => fence_translation();
        cbo_inval(ArgsCbo) => cache_block(helper_ids::CBO_INVAL);
        cbo_clean(ArgsCbo) => cache_block(helper_ids::CBO_CLEAN);
        cbo_flush(ArgsCbo) => cache_block(helper_ids::CBO_FLUSH);
        cbo_zero(ArgsCbo) => zero_cache_block();
    }
}
