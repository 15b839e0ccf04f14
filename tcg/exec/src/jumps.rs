//! Where a vCPU's jumps and calls by pointer and its traps led last, always remembered. Generated code writes it: three
//! instructions at a jump that looks its target up, nothing at one that is linked, nor at a return: that is here if its
//! target was not found at once.

/// How many: the index is a byte.
const KEPT: usize = 256;
/// Not used yet: no code is there, whatever the guest.
const NOTHING: u64 = !0;

/// The last of them.
#[repr(C)]
pub(crate) struct Jumps {
    /// A ring.
    pub places: [u64; KEPT],
    /// Where the next goes.
    pub at: u8,
}

impl Default for Jumps {
    fn default() -> Jumps {
        Jumps { places: [NOTHING; KEPT], at: 0 }
    }
}

impl Jumps {
    /// One to `va`, in code that is not generated.
    pub fn push(&mut self, va: u64) {
        self.places[usize::from(self.at)] = va;
        self.at = self.at.wrapping_add(1);
    }

    /// Generated code is entered at `va`: it may have left because its look-up there failed.
    pub fn enter(&mut self, va: u64) {
        if self.places[usize::from(self.at.wrapping_sub(1))] != va {
            self.push(va);
        }
    }

    /// The last ones, oldest first.
    pub fn list(&self) -> Vec<u64> {
        let (new, old) = self.places.split_at(usize::from(self.at));
        old.iter().chain(new).copied().filter(|&va| va != NOTHING).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_in_order() {
        let mut jumps = Jumps::default();
        assert!(jumps.list().is_empty());
        (0..300).for_each(|va| jumps.push(va));
        assert_eq!(jumps.list(), (44..300).collect::<Vec<_>>());
        jumps.enter(299);
        jumps.enter(7);
        assert_eq!(jumps.list()[254..], [299, 7]);
    }
}
