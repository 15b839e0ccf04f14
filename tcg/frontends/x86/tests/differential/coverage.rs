//! What has been executed, against what the model advertises.

use std::collections::BTreeSet;

use iced_x86::Code;
use mimus_tcg_frontend_x86::cpuid::Features;

use crate::regs::{Exit, Outcome};
use crate::select;
use crate::sequence::Sequence;

/// Of one instruction (one of the decoder's codes).
#[derive(Clone, Copy, Default)]
struct Count {
    completed: u64,
    faulted: u64,
}

/// Counts of a run.
pub struct Coverage {
    /// By code size (16, 32, 64) and code.
    counts: [Vec<Count>; 3],
    /// Instructions that were completed.
    pub completed: u64,
    /// Exceptions that ended a sequence, by vector.
    pub exceptions: [u64; 32],
}

impl Coverage {
    pub fn new() -> Coverage {
        let codes = Code::values().count();
        Coverage { counts: [(); 3].map(|()| vec![Count::default(); codes]), completed: 0, exceptions: [0; 32] }
    }

    /// Notes what a sequence has executed, as far as it is certain: not what a branch may have skipped.
    pub fn note(&mut self, sequence: &Sequence, outcome: &Outcome) {
        let counts = &mut self.counts[sequence.bits as usize / 32];
        let rip = outcome.regs.rip;
        let fault = match outcome.exit {
            Exit::Exception { vector, .. } => {
                self.exceptions[usize::from(vector & 31)] += 1;
                true
            }
            Exit::End => false,
            Exit::Never => return,
        };
        let end = sequence.start + sequence.code().len() as u64;
        let left = !(sequence.start..=end).contains(&rip);
        let (mut last, mut gone) = (std::ptr::null(), false);
        let itemised = sequence.itemised();
        if left && !itemised.iter().any(|(_, item)| item.leaves) {
            return;
        }
        for (insn, item) in itemised {
            let first = !std::ptr::eq(item, last);
            // Behind the first that may have left, nothing is certain.
            if left && first && gone {
                break;
            }
            gone |= item.leaves;
            last = item;
            let count = &mut counts[insn.code() as usize];
            if insn.ip() == rip && fault {
                count.faulted += 1;
            }
            if insn.ip() >= rip && !left {
                break;
            }
            if first || !item.skips {
                count.completed += 1;
                self.completed += 1;
            }
        }
    }

    /// Instructions of the model that have been neither executed nor tried.
    fn missing(&self, bits: u32, features: &Features) -> Vec<Code> {
        let counts = &self.counts[bits as usize / 32];
        let mut codes = select::advertised(bits, features);
        codes.retain(|&c| {
            select::tried(c, bits, features) && counts[c as usize].completed + counts[c as usize].faulted == 0
        });
        codes
    }

    /// A paragraph for code of `bits` bits, and how many instructions are missing.
    pub fn report(&self, bits: u32, features: &Features) -> (String, usize) {
        let counts = &self.counts[bits as usize / 32];
        let advertised = select::advertised(bits, features);
        let missing = self.missing(bits, features);
        let of = |wanted: &dyn Fn(Code) -> bool| -> Vec<Code> {
            advertised.iter().copied().filter(|&c| wanted(c)).collect()
        };
        let count = |c: Code| counts[c as usize];
        let completed = of(&|c| count(c).completed != 0);
        let faulted = of(&|c| count(c).completed == 0 && count(c).faulted != 0);
        let both = of(&|c| count(c).completed != 0 && count(c).faulted != 0);
        let not_tried: BTreeSet<String> =
            of(&|c| !select::tried(c, bits, features)).iter().map(|c| format!("{:?}", c.mnemonic())).collect();
        let fewest = completed.iter().map(|&c| count(c).completed).min().unwrap_or(0);
        let mut text = format!(
            "{bits}-bit code: the model advertises {} instructions; {} completed (the rarest {fewest} times), {} of them \
             faulted too; {} only faulted; {} never came\n",
            advertised.len(),
            completed.len(),
            both.len(),
            faulted.len(),
            missing.len(),
        );
        text += &format!("  only faulted: {}\n", list(&faulted));
        if !missing.is_empty() {
            text += &format!("  never: {}\n", list(&missing));
        }
        text += &format!("  not against a host: {}\n", not_tried.into_iter().collect::<Vec<_>>().join(" "));
        (text, missing.len())
    }
}

fn list(codes: &[Code]) -> String {
    codes.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join(" ")
}
