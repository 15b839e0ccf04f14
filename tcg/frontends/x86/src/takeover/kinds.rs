//! Instructions by what executing them takes, and how many there were.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind};
use mimus_arch::x86::regs::*;

use crate::state::State;

/// Mnemonics told apart in the monitor; the others are summed up.
const SHOWN: usize = 24;

/// Parts of a state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub vectors: bool,
    pub control: bool,
    pub system: bool,
}

/// What of the state executing an instruction takes, beside the registers that every one has.
pub fn needs(insn: &Instruction, st: &State) -> Needs {
    use Mnemonic as M;
    let vex = insn.encoding() != EncodingKind::Legacy;
    let registers = (0..insn.op_count())
        .filter(|i| insn.op_kind(*i) == OpKind::Register)
        .map(|i| insn.op_register(i))
        .any(|r| r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k());
    let x87 = || {
        insn.cpuid_features()
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX))
    };
    let words = matches!(insn.mnemonic(), M::Ldmxcsr | M::Stmxcsr | M::Wait | M::Emms);
    let areas = insn.is_save_restore_instruction() || matches!(insn.mnemonic(), M::Xsaveopt | M::Xsaveopt64);
    let vectors = registers || words || areas || x87() || vex && vector_encoding(insn);
    let handled = vex && vectors || areas || matches!(insn.mnemonic(), M::Xgetbv | M::Xsetbv);
    Needs {
        vectors: vectors || insn.mnemonic() == M::Xgetbv,
        control: handled && st.cr4 & CR4_OSXSAVE != 0,
        system: matches!(
            insn.mnemonic(),
            M::Sysenter | M::Sysexit | M::Sysexitq | M::Syscall | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdmsr
        ) || areas,
    }
}

/// Of an instruction with a VEX prefix: not one on general registers.
fn vector_encoding(insn: &Instruction) -> bool {
    !insn.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2))
}

/// Whether it is about registers beyond those of x87, SSE and AVX, or may be.
pub fn handles_more_state(insn: &Instruction) -> bool {
    let areas = insn.is_save_restore_instruction()
        && insn.cpuid_features().iter().any(|f| {
            matches!(f, CpuidFeature::XSAVE | CpuidFeature::XSAVEC | CpuidFeature::XSAVEOPT | CpuidFeature::XSAVES)
        });
    let opmask = (0..insn.op_count())
        .any(|i| insn.op_kind(i) == OpKind::Register && (insn.op_register(i).is_k() || insn.op_register(i).is_tmm()));
    areas || opmask || matches!(insn.encoding(), EncodingKind::EVEX | EncodingKind::MVEX)
}

/// The instruction, whoever has it.
pub fn of_any_processor(bytes: &[u8], bits: u32, ip: u64) -> Instruction {
    Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE).decode()
}

/// Whether it changes what the other engine keeps elsewhere.
pub fn writes_system(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Wrmsr | Mnemonic::Swapgs | Mnemonic::Wrmsrns)
}

/// Whether it is the other engine's business, unless that was found not to be able to.
pub fn belongs_to_other(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let elsewhere = matches!(insn.flow_control(), FlowControl::Interrupt | FlowControl::Exception)
        || matches!(insn.mnemonic(), M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc | M::Pause | M::Xsetbv)
        || matches!(insn.mnemonic(), M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq)
        || matches!(insn.mnemonic(), M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd);
    elsewhere || insn.is_invalid() || insn.is_privileged() || insn.rep_without_bound()
}

trait Repeated {
    fn rep_without_bound(&self) -> bool;
}

impl Repeated for Instruction {
    /// Repeated instructions go on for long.
    fn rep_without_bound(&self) -> bool {
        self.is_string_instruction() && (self.has_rep_prefix() || self.has_repne_prefix())
    }
}

/// Instructions taken over, by their code.
pub struct Counters {
    codes: Vec<AtomicU64>,
    /// Times the other engine handed over.
    handed: AtomicU64,
    /// All instructions executed then.
    executed: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        let codes = Code::values().map(|_| AtomicU64::new(0)).collect();
        Self { codes, handed: AtomicU64::new(0), executed: AtomicU64::new(0) }
    }
}

impl Counters {
    /// One more that the other engine cannot execute; `handed_over`: it has said so.
    pub(super) fn count(&self, insn: &Instruction, handed_over: bool, pc: u64) {
        let before = self.codes[insn.code() as usize].fetch_add(1, Ordering::Relaxed);
        if handed_over {
            self.handed.fetch_add(1, Ordering::Relaxed);
        }
        if before == 0 {
            let name = name(insn.mnemonic());
            log::info!("the translator executes {name} (first before {pc:#x}), which KVM on this host cannot");
        }
    }

    /// Instructions executed in a row.
    pub(super) fn add_executed(&self, count: u32) {
        self.executed.fetch_add(count.into(), Ordering::Relaxed);
    }

    /// Whether the other engine could not execute one of the kind.
    pub(super) fn is_known(&self, insn: &Instruction) -> bool {
        self.codes[insn.code() as usize].load(Ordering::Relaxed) != 0
    }

    /// All that were counted: times handed over, instructions, instructions by mnemonic (the most frequent ones).
    pub fn statistics(&self) -> Vec<(String, u64)> {
        let mut by_name: BTreeMap<String, u64> = BTreeMap::new();
        for (code, count) in Code::values().zip(&self.codes) {
            let count = count.load(Ordering::Relaxed);
            if count != 0 {
                *by_name.entry(name(code.mnemonic())).or_default() += count;
            }
        }
        let total = by_name.values().sum();
        let mut list: Vec<_> = by_name.into_iter().collect();
        list.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let others: u64 = list.iter().skip(SHOWN).map(|(_, count)| count).sum();
        list.truncate(SHOWN);
        let mut all = vec![
            ("takeovers".to_owned(), self.handed.load(Ordering::Relaxed)),
            ("instructions in takeovers".to_owned(), self.executed.load(Ordering::Relaxed)),
            ("instructions taken over".to_owned(), total),
        ];
        all.extend(list.into_iter().map(|(name, count)| (format!("taken over: {name}"), count)));
        if others != 0 {
            all.push(("taken over: others".to_owned(), others));
        }
        all
    }
}

fn name(mnemonic: Mnemonic) -> String {
    if mnemonic == Mnemonic::INVALID { "invalid".to_owned() } else { format!("{mnemonic:?}").to_lowercase() }
}
