//! `vCont`, `c`, `s`: what each vCPU is to do.

use crate::packet::number;
use crate::target::Action;

/// Which vCPUs a thread id means: gdb's threads are numbered from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// `-1`.
    All,
    /// `0`.
    Any,
    /// A vCPU, from 0.
    One(u32),
}

impl Threads {
    /// Parses an id; `None` if it is none, or of no vCPU of `vcpus`.
    pub fn parse(text: &str, vcpus: u32) -> Option<Threads> {
        match text {
            "-1" => Some(Threads::All),
            "0" => Some(Threads::Any),
            _ => {
                let n = u32::try_from(number(text)?).ok()?;
                (1..=vcpus).contains(&n).then(|| Threads::One(n - 1))
            }
        }
    }

    /// Whether it means `vcpu`, where `current` is the vCPU that is looked at.
    fn has(self, vcpu: u32, current: u32) -> bool {
        match self {
            Threads::All => true,
            Threads::Any => vcpu == current,
            Threads::One(n) => vcpu == n,
        }
    }
}

/// The actions of `vCont;ACTIONS`: for each vCPU the first that means it, else none.
pub fn vcont(text: &str, vcpus: u32, current: u32, interrupts: bool) -> Option<Vec<Action>> {
    let mut actions = vec![None; vcpus as usize];
    for part in text.split(';') {
        let (what, who) = part.split_once(':').unwrap_or((part, "-1"));
        let who = Threads::parse(who, vcpus)?;
        let action = match what.as_bytes().first()? {
            b'c' | b'C' => Action::Run,
            b's' | b'S' => Action::Step { interrupts },
            _ => return None,
        };
        for (vcpu, slot) in (0..).zip(&mut actions) {
            if slot.is_none() && who.has(vcpu, current) {
                *slot = Some(action);
            }
        }
    }
    let actions: Vec<Action> = actions.into_iter().map(|a| a.unwrap_or(Action::Hold)).collect();
    actions.iter().any(|a| *a != Action::Hold).then_some(actions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions() {
        let step = Action::Step { interrupts: false };
        let of = |text| vcont(text, 3, 1, false);
        assert_eq!(of("c").unwrap(), [Action::Run; 3]);
        assert_eq!(of("s:2;c").unwrap(), [Action::Run, step, Action::Run]);
        assert_eq!(of("s:1").unwrap(), [step, Action::Hold, Action::Hold]);
        assert_eq!(of("C05:0").unwrap(), [Action::Hold, Action::Run, Action::Hold]);
        for bad in ["", "x", "c:9", "s:-2", "t:1", "c;;c", "c:"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
