//! How often code had to be made again, and other vCPUs be stopped for it: for `info accel`.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the machine was made.
#[derive(Default)]
pub struct Counts {
    /// Pages that became code while a TLB might let stores through to them.
    pub revocations: AtomicU64,
    /// Vcpus that were asked to withdraw store permission, all together.
    pub asked: AtomicU64,
    /// Blocks withdrawn by stores to their pages.
    pub overwritten: AtomicU64,
    /// Blocks withdrawn to be made anew for running often.
    pub renewed: AtomicU64,
    /// Translations of what another vCPU had translated meanwhile.
    pub twice: AtomicU64,
    /// Instructions executed with care.
    pub careful: AtomicU64,
    /// Times that memory was gathered, and pages of it.
    pub gathered: AtomicU64,
    pub pages_gathered: AtomicU64,
}

impl Counts {
    pub(crate) fn add(count: &AtomicU64, n: usize) {
        count.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Counts with their names.
    pub(crate) fn list(&self) -> [(&'static str, u64); 8] {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("revocations of store permission", of(&self.revocations)),
            ("vCPUs asked for one", of(&self.asked)),
            ("blocks overwritten", of(&self.overwritten)),
            ("blocks made anew", of(&self.renewed)),
            ("blocks made twice", of(&self.twice)),
            ("instructions executed with care", of(&self.careful)),
            ("times that memory was gathered", of(&self.gathered)),
            ("pages gathered", of(&self.pages_gathered)),
        ]
    }
}
