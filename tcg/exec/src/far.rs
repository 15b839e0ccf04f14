//! Jump entries of a context: where indirect jumps of hot code led that go to other pages (see `ContextLayout`).
//!
//! Generated code fills an entry with what it has looked up in the code arrays, so that it may say no more than these: whatever
//! takes a page of code out of them, or gives it another table, empties all entries. What is data alone does not. (An index that
//! another page of code has taken over is not empty, so that dropping the page that it had before empties the entries too.) That
//! an entry names the table's word instead of the code has it follow what becomes of the code.
#![allow(unsafe_code)]

use mimus_tcg_ir::backend::ContextLayout;

use crate::context::Context;

const L: ContextLayout = ContextLayout::STANDARD;
/// Times that a jump may lead elsewhere until it is looked at.
const PATIENCE: u32 = 256;
/// A jump that leaves its page so often within this many microseconds is to have an entry that says where it leads ...
const OFTEN: u32 = 500;
/// ... and one whose entry says something else within these is better served by the arrays alone: a wrong entry takes longer by
/// what a mispredicted branch does.
const TOO_OFTEN: u32 = 40;

/// A jump entry in memory.
#[derive(Clone, Copy)]
#[repr(C)]
struct Entry {
    target: u64,
    /// Host address of the target's word in an entry table.
    word: u64,
    /// Of the target in its page.
    offset: u32,
    /// Times until the runtime is told; all ones: now.
    patience: u32,
    /// When it was told last, in microseconds.
    since: u32,
    /// What an empty entry's `word` leads to.
    nothing: u32,
}

const _: () = assert!(
    size_of::<Entry>() == ContextLayout::JUMP_BYTES
        && std::mem::offset_of!(Entry, patience) == ContextLayout::JUMP_PATIENCE
        && std::mem::offset_of!(Entry, offset) == 16
);

impl Context {
    fn jump(&self, number: u32) -> *mut Entry {
        assert!(number < ContextLayout::JUMPS, "a jump entry");
        self.cell_at(L.jumps as usize + number as usize * ContextLayout::JUMP_BYTES).cast()
    }

    /// Empties an entry. A jump to the address that it is for then finds no code there by it, and leaves generated code to look for it.
    fn empty_jump(&mut self, number: u32) {
        let entry = self.jump(number);
        // SAFETY: in the mapping and aligned; only this vCPU's thread reads or writes it.
        unsafe {
            (*entry).target = ContextLayout::NO_JUMP;
            (*entry).word = (&raw const (*entry).nothing) as u64;
            (*entry).offset = ContextLayout::NO_JUMP as u32 & 0xfff;
        }
    }

    /// Makes entries that are all zeros empty ones.
    pub(crate) fn init_jumps(&mut self) {
        (0..ContextLayout::FAR_JUMPS).for_each(|number| self.empty_jump(number));
    }

    /// Empties what generated code has filled since this was done last.
    pub(crate) fn drop_jumps(&mut self) {
        // SAFETY: as in `empty_jump`.
        if unsafe { self.cell_at(L.jumped as usize).replace(0) } != 0 {
            self.init_jumps();
        }
    }

    /// A jump with an entry has led elsewhere as often as was allowed: whether that was too often for what its entry is for.
    pub fn judge_jump(&mut self, number: u32, now: u32) -> bool {
        let entry = self.jump(number);
        // SAFETY: as in `empty_jump`.
        let before = unsafe {
            (*entry).patience = PATIENCE - 1;
            std::mem::replace(&mut (*entry).since, now)
        };
        let limit = if number < ContextLayout::FAR_JUMPS { TOO_OFTEN } else { OFTEN };
        before != 0 && now.wrapping_sub(before) < limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::DataFill;

    const AT: u64 = 0x5000;
    const TABLE: u32 = 0x10_0000;

    /// As generated code fills an entry that leads to `AT + 8`.
    fn fill(c: &Context) {
        assert_eq!(c.code_table(AT), Some(TABLE));
        // SAFETY: as in `empty_jump`.
        unsafe {
            let entry = c.jump(3);
            ((*entry).target, (*entry).word, (*entry).offset) = (AT + 8, u64::from(TABLE) + 32, 8);
            c.cell_at(L.jumped as usize).write(1);
        }
    }

    fn is_filled(c: &Context) -> bool {
        // SAFETY: as in `empty_jump`.
        let entry = unsafe { c.jump(3).read() };
        let nothing = c.jump(3) as u64 + 28;
        assert_eq!(entry.target == ContextLayout::NO_JUMP, entry.word == nothing);
        assert_eq!(entry.offset, if entry.word == nothing { 0xffe } else { 8 });
        entry.target == AT + 8
    }

    #[test]
    fn entries_go_with_pages_of_code() {
        let data = |va| DataFill { va, host: 0x7000_0000, read: true, write: true, local: false, mapping_size: 4096 };
        type Event = fn(&mut Context);
        let (same_index, large) = (AT | 1 << 32, 0x20_0000);
        let events: [(Event, bool); 10] = [
            (Context::flush, false),
            (Context::drop_local, false),
            (|c| c.drop_page(AT), false),
            (|c| c.drop_page(AT + 0x1000), false),
            (|c| c.drop_page(0x3f_f000), false),
            (|c| c.drop_entry(AT), false),
            (|c| c.fill_code(AT, TABLE + 4096, false, 4096), false),
            // Data, or the same again.
            (|c| c.drop_page(0x9000), true),
            (|c| c.revoke_write(0x7000_0000, 1), true),
            (|c| c.fill_code(AT, TABLE, false, 4096), true),
        ];
        for (n, (event, stays)) in events.into_iter().enumerate() {
            let mut c = Context::new().unwrap();
            assert!(!is_filled(&c));
            c.fill_code(AT, TABLE, false, 4096);
            c.fill_code(AT + 0x1000, TABLE + 8192, true, 4096);
            c.fill_code(large, TABLE + 8192, true, 2 << 20);
            c.fill_data(&data(0x9000));
            fill(&c);
            event(&mut c);
            assert_eq!(is_filled(&c), stays, "{n}");
        }
        let mut c = Context::new().unwrap();
        c.fill_code(AT, TABLE, false, 4096);
        fill(&c);
        c.fill_code(same_index, TABLE + 4096, false, 4096);
        c.drop_page(AT);
        assert!(!is_filled(&c), "another page has its index");
    }

    #[test]
    fn jumps_are_judged_by_how_often_they_lead_elsewhere() {
        let mut c = Context::new().unwrap();
        for (number, limit) in [(3, TOO_OFTEN), (ContextLayout::FAR_JUMPS + 3, OFTEN)] {
            assert!(!c.judge_jump(number, 1000), "the first time");
            assert!(!c.judge_jump(number, 1000 + limit));
            assert!(c.judge_jump(number, 1000 + 2 * limit - 1));
            // SAFETY: as in `empty_jump`.
            assert_eq!(unsafe { (*c.jump(number)).patience }, PATIENCE - 1);
        }
    }
}
