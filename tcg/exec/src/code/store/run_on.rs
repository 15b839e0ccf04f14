//! Blocks that go on over their page's end.

use super::{CodeStore, PageKey};
use mimus_tcg_ir::backend::Optimise;

impl CodeStore {
    /// Whether blocks of `page` may run on into the page with entry table `next`: in code that runs often, and behind which
    /// there has always been that page. It is remembered that they may.
    pub fn runs_on(&self, page: PageKey, next: u32) -> bool {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let known = inner.hints.get(&page);
        let hot = known.map_or(self.optimise == Optimise::Forced, |known| known.hints.hot);
        let may = hot && known.is_none_or(|known| !known.stays);
        let place = inner.pages.get_mut(&page).filter(|p| may && (p.next_table == 0 || p.next_table == next));
        place.is_some_and(|p| {
            p.ran_on = true;
            true
        })
    }

    /// Whether there may be blocks of `page` that run on.
    pub fn has_run_on(&self, page: PageKey) -> bool {
        self.lock().pages.get(&page).is_some_and(|p| p.ran_on)
    }

    /// Behind `page` there is not always the same page: its blocks are made anew, and do not run on.
    pub fn stay(&self, page: PageKey) {
        let mut inner = self.lock();
        let known = inner.hints.entry(page).or_default();
        known.stays = true;
        known.hints.hot |= self.optimise == Optimise::Forced;
        self.withdraw_and_outdate(&mut inner, page);
    }
}
