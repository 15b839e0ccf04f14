//! Blocks that go on over their page's end.

use super::{CodeStore, PageKey};
use mimus_tcg_ir::backend::Optimise;

impl CodeStore {
    /// Whether blocks of `page` may run on into the page with entry table `next`: in code that runs often, and behind which
    /// there has always been that page.
    pub fn runs_on(&self, page: PageKey, next: u32) -> bool {
        let inner = self.lock();
        let known = inner.hints.get(&page);
        let hot = known.map_or(self.optimise == Optimise::Forced, |known| known.hints.hot);
        hot && known.is_none_or(|known| !known.stays)
            && inner.pages.get(&page).is_some_and(|p| p.next_table == 0 || p.next_table == next)
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
