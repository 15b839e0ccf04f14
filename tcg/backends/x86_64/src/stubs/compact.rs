//! Stubs of compact code: what its accesses, jumps and guards share.

use super::{Addresses, Emitter};
use dynasm::dynasm;
use dynasmrt::{DynasmApi, DynasmLabelApi};
use mimus_tcg_ir::backend::compact_access;
use mimus_tcg_ir::flags::FLAGS;

impl Emitter<'_> {
    /// Jumps of compact code to other pages and to addresses.
    pub(super) fn compact_jumps(&mut self, a: &mut Addresses) {
        let env = &self.b.config.env;
        let (kick, page_base) = (self.env(env.kick), self.env(env.page_base));
        let (tag, table) = (self.b.config.context.exec_tag, self.b.config.context.exec_table);
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.cross = self.here();
        dynasm!(self.ops ; .arch x64
            ; cdqe
            ; add rax, [rbp + page_base]
            ; cmp DWORD [rbp + kick], 0
            ; jne >kicked
            ; mov r14d, eax
            ; shr r14d, 12
            ; gs cmp r15d, [r14*8 + table]
            ; jne >miss
            ; mov r15, rax
            ; and r15, -4096
            ; gs cmp r15, [r14*8 + tag]
            ; jne >miss
            ; mov [rbp + page_base], r15
            ; mov r14, rax
            ; ret
            ; kicked:
            ; add rsp, 8
        );
        self.jump_to(a.kicked);
        dynasm!(self.ops ; .arch x64 ; miss:);
        self.jump_to(a.link);
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.crossed = self.here();
        dynasm!(self.ops ; .arch x64 ; mov rax, r14 ; jmp ->look_up);
        a.indirect = self.indirect(a, true);
        a.back = self.indirect(a, false);
    }

    /// See [`Addresses::indirect`] and [`Addresses::back`].
    fn indirect(&mut self, a: &Addresses, noted: bool) -> usize {
        let env = &self.b.config.env;
        let (kick, page_base) = (self.env(env.kick), self.env(env.page_base));
        let (tag, table) = (self.b.config.context.exec_tag, self.b.config.context.exec_table);
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        dynasm!(self.ops ; .arch x64
            ; cmp DWORD [rbp + kick], 0
            ; jne >kicked
        );
        if noted {
            self.note_jump();
        }
        dynasm!(self.ops ; .arch x64
            ; mov r14d, eax
            ; shr r14d, 12
            ; mov r15, rax
            ; and r15, -4096
            ; gs cmp r15, [r14*8 + tag]
            ; jne >miss
            ; mov [rbp + page_base], r15
        );
        self.entry(table);
        dynasm!(self.ops ; .arch x64 ; ret ; kicked: ; add rsp, 8);
        self.jump_to(a.kicked);
        dynasm!(self.ops ; .arch x64 ; miss: ; add rsp, 8 ; jmp ->probe_miss);
        entry
    }

    /// Guards of compact code that do not hold.
    pub(super) fn compact_guards(&mut self, a: &mut Addresses) {
        let function = self.b.config.fns.access;
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.careful_by_table = self.here();
        dynasm!(self.ops ; .arch x64 ; ->careful_by_table:);
        self.save(&self.b.pinned);
        self.bury_if_alive();
        dynasm!(self.ops ; .arch x64
            ; lea rdi, [rbp - 128]
            ; xor esi, esi
            ; xor edx, edx
            ; xor ecx, ecx
            ; mov r8, [rsp]
            ; sub rsp, 8
            ; mov rax, QWORD function as i64
            ; call rax
            // The alignment and the return address both go: the block is left.
            ; add rsp, 16
        );
        self.restore(self.b.caller_saved());
        self.jump_to(a.careful);
        if let Some(v) = self.b.config.vector {
            let guard = self.env(self.b.config.env.guest + v.guard);
            a.revive_unless = self.here();
            dynasm!(self.ops ; .arch x64
                ; test [rbp + guard], r14b
                ; jne ->careful_by_table
                ; jmp ->revive
            );
        }
    }

    /// The checks of compact code.
    pub(super) fn checks(&mut self, a: &mut Addresses) {
        let ask = self.ask_for_access(None);
        for write in [false, true] {
            for bytes in [1, 2, 4, 8, 10, 16, 32] {
                a.checks.push((compact_access(bytes, write, false), self.check(bytes, (write, false), ask)));
            }
            for bytes in [16, 32] {
                a.checks.push((compact_access(bytes, write, true), self.check(bytes, (write, true), ask)));
            }
        }
        let stack = self.b.config.stack.and_then(|slot| self.b.pin_of(slot));
        for (write, (bytes, narrow)) in [false, true].into_iter().flat_map(|w| [(w, (4, true)), (w, (8, false))]) {
            if let Some(reg) = stack {
                let entry = self.stack_check(reg, bytes, write, narrow);
                a.stack_checks.push(((bytes, write, narrow), entry));
                if write {
                    a.pushes_of_pc.push((narrow, self.push_of_pc(narrow, entry)));
                }
            }
        }
        if self.b.config.flags {
            let disp = self.b.slot_disp(FLAGS);
            dynasm!(self.ops ; .arch x64 ; .align 16);
            a.save_flags = self.here();
            dynasm!(self.ops ; .arch x64
                ; lahf
                ; seto al
                ; mov [rbp + disp], ax
                ; ret
            );
        }
    }

    /// See [`Addresses::stack_check`].
    fn stack_check(&mut self, reg: u8, bytes: u8, write: bool, narrow: bool) -> usize {
        let by = if write { -i32::from(bytes) } else { i32::from(bytes) };
        let ask = self.ask_for_access(Some((reg, by, narrow)));
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        if narrow {
            dynasm!(self.ops ; .arch x64 ; mov r15d, Rd(reg));
        } else {
            dynasm!(self.ops ; .arch x64 ; mov r15, Rq(reg));
        }
        match (write, narrow) {
            (false, _) => {}
            (true, true) => dynasm!(self.ops ; .arch x64 ; add r15d, by),
            (true, false) => dynasm!(self.ops ; .arch x64 ; add r15, by),
        }
        self.check_address(bytes, (write, false), ask, Some((reg, by, narrow)));
        entry
    }

    /// See [`Addresses::push_of_pc`]; `check`: the push's.
    fn push_of_pc(&mut self, narrow: bool, check: usize) -> usize {
        let page_base = self.env(self.b.config.env.page_base);
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        dynasm!(self.ops ; .arch x64 ; cdqe ; add rax, [rbp + page_base]);
        if narrow {
            dynasm!(self.ops ; .arch x64 ; mov eax, eax);
        }
        self.jump_to(check);
        entry
    }

    /// Moves the stack pointer, behind an access that has not left the block.
    fn move_stack(&mut self, moved: Option<(u8, i32, bool)>) {
        match moved {
            None => {}
            Some((reg, by, true)) => dynasm!(self.ops ; .arch x64 ; add Rd(reg), by),
            Some((reg, by, false)) => dynasm!(self.ops ; .arch x64 ; add Rq(reg), by),
        }
    }

    fn check(&mut self, bytes: u8, kind: (bool, bool), ask: usize) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        self.check_address(bytes, kind, ask, None);
        entry
    }

    /// A check of the address in `r15`. `ask`: see [`Emitter::ask_for_access`].
    fn check_address(&mut self, bytes: u8, (write, aligned): (bool, bool), ask: usize, moved: Option<(u8, i32, bool)>) {
        let context = self.b.config.context;
        let tag = if write { context.write_tag } else { context.read_tag };
        let size = i32::from(bytes);
        dynasm!(self.ops ; .arch x64
            ; mov r14d, r15d
            ; shr r14d, 12
            ; gs xor r15, [r14*8 + tag]
        );
        if aligned {
            // An aligned offset in the page has no other bits than these.
            let offset = 0x1000 - size;
            dynasm!(self.ops ; .arch x64 ; test r15, !offset ; jne >miss);
        } else {
            dynasm!(self.ops ; .arch x64 ; cmp r15, 4096 - size ; ja >miss);
        }
        dynasm!(self.ops ; .arch x64
            // The address again: nothing else holds it.
            ; gs add r15, [r14*8 + tag]
            ; gs mov r14, [r14*8 + context.addend]
            ; add r14, r15
        );
        self.move_stack(moved);
        dynasm!(self.ops ; .arch x64
            ; ret
            ; miss:
            ; gs xor r15, [r14*8 + tag]
            ; mov r14d, compact_access(bytes, write, aligned) as i32
        );
        self.jump_to(ask);
    }

    /// Where a check goes on that has not found the page: `r15` address, `r14d` access. `moved`: of the stack.
    fn ask_for_access(&mut self, moved: Option<(u8, i32, bool)>) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        // The runtime looks at slots for what is stored.
        self.save(&self.b.pinned);
        dynasm!(self.ops ; .arch x64 ; push rax);
        if self.b.has_vectors() {
            self.test_alive();
            dynasm!(self.ops ; .arch x64 ; jne >alive);
        }
        self.access_of_compact(false, moved);
        if self.b.has_vectors() {
            dynasm!(self.ops ; .arch x64 ; alive: ; call ->bury);
            self.access_of_compact(true, moved);
        }
        entry
    }

    fn access_of_compact(&mut self, revive: bool, moved: Option<(u8, i32, bool)>) {
        let function = self.b.config.fns.access;
        let exit_request = self.env(self.b.config.env.exit_request);
        dynasm!(self.ops ; .arch x64
            ; lea rdi, [rbp - 128]
            ; mov rsi, r15
            ; mov edx, r14d
            ; mov rcx, [rsp]
            ; mov r8, [rsp + 8]
            ; mov rax, QWORD function as i64
            ; call rax
            ; mov r14, rax
            ; pop rax
        );
        self.restore(self.b.caller_saved());
        dynasm!(self.ops ; .arch x64
            ; cmp DWORD [rbp + exit_request], 0
            ; jne ->abandon
        );
        self.move_stack(moved);
        if revive {
            dynasm!(self.ops ; .arch x64 ; jmp ->revive);
        } else {
            dynasm!(self.ops ; .arch x64 ; ret);
        }
    }
}
