//! The code emitted once, at the start of the code cache: the way in and out, the look-up of an address, and
//! the calls of the runtime's functions, which save what C does not preserve.
//!
//! Stubs that can abandon a block (a fault, a helper that changed the program counter) drop their return
//! address, leave every pinned register loaded and go on at `dispatch`.

mod compact;

use crate::X86_64;
use dynasm::dynasm;
use dynasmrt::x64::X64Relocation;
use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler};
use mimus_tcg_ir::backend::{ExitCode, Stubs, compact_access};
use mimus_tcg_ir::{SLOTS, Slot};

type Ops = VecAssembler<X64Relocation>;

/// Host addresses of the stubs that blocks use. Those without a return are jumped to.
#[derive(Debug, Default)]
pub struct Addresses {
    /// Looks `pc` up and continues there.
    pub dispatch: usize,
    /// Exit with [`ExitCode::Lookup`] for the address in `rax` (bit 0 is ignored where code is 2-aligned).
    pub probe_miss: usize,
    /// Exit with [`ExitCode::Kicked`] for the address in `rax` (bit 0 is ignored where code is 2-aligned).
    pub kicked: usize,
    /// Exit with [`ExitCode::Careful`] for the address in `rax`.
    pub careful: usize,
    /// Called: `r15` address, `r14d` descriptor → `rax`. Clobbers the scratch registers, as all below.
    pub load: usize,
    /// Called: `r15` address, `r14d` size, `rax` value.
    pub store: usize,
    /// Called: `r15` address, `r14d` descriptor, `rax` value → `rax`.
    pub atomic: usize,
    /// Called: `r15` address, `r14d` size, `rax` expected, the frame's second word new → `rax`.
    pub cmpxchg: usize,
    /// Called: `rdx:rax` signed dividend, `r14` divisor → `rax` quotient, `rdx` remainder; or carry: it cannot
    /// be done.
    pub divide: usize,
    /// Called: `r14` packed operation.
    pub fp: usize,
    /// Called: vector registers from memory to the host's, which run under the guest's MXCSR. Every general register stays.
    pub revive: usize,
    /// A byte for each value of MXCSR's flags: these in RISC-V's order.
    pub fp_flags: usize,
    /// Called: vector registers to memory, if they are in the host's. Every general register stays.
    pub bury: usize,
    /// 16 bytes for each [`FpMask`].
    pub fp_masks: usize,
    /// Called: `r15` address, `r14d` bytes.
    pub unit_load: usize,
    /// Called: `r15` address, `r14d` bytes.
    pub unit_probe: usize,
    /// Called: `r14d` bytes.
    pub unit_store: usize,
    /// Called: `r15` address, `r14d` descriptor: an access missed its range entry.
    pub note: usize,
    /// Called by the cold code of a link site; does not return to it.
    pub link: usize,
    /// Called by a compact block that has begun often; goes on in it, or in its place.
    pub warm: usize,
    /// Called: the trace's buffer is full.
    pub trace_full: usize,
    /// The same as `careful` and `kicked` for an offset from the page, in `eax`.
    careful_at: usize,
    kicked_at: usize,
    /// Called: the code at the address in `rax`, whose bit 0 is ignored where code is 2-aligned, to `rax`, for who called to
    /// jump there: the host predicts each such jump by itself. Leaves if it has to.
    pub indirect: usize,
    /// The same for a return, which is not remembered.
    pub back: usize,
    /// Called by a jump to the offset `eax` from the page: returns if the page there has the entry table `r15d`; `page_base`
    /// is that page's then, and `r14` the whole address. Goes on as [`Addresses::link`] otherwise.
    pub cross: usize,
    /// Where such a jump leads before it is linked, in case it is reached because its guard was seen first.
    pub crossed: usize,
    /// Called: leaves for careful execution of the instruction that the side table has for the call.
    pub careful_by_table: usize,
    /// Called: the same if the guard byte has any of the bits in `r14b`; else as [`Addresses::revive`].
    pub revive_unless: usize,
    /// Called: see [`Addresses::check`].
    checks: Vec<(u32, usize)>,
    /// Called: see [`Addresses::stack_check`].
    stack_checks: Vec<((u8, bool, bool), usize)>,
    /// Called: see [`Addresses::push_of_pc`].
    pushes_of_pc: Vec<(bool, usize)>,
    /// Called: the host's flags to their slot; `rax` is clobbered. For guests with flags.
    pub save_flags: usize,
    /// Called: arguments in `rax`, `r14`, `r15` → `rax`; per helper, for calls that may leave the block.
    pub helpers_may_exit: Vec<usize>,
    /// The same for pure calls.
    pub helpers_pure: Vec<usize>,
}

impl Addresses {
    /// What to jump to with an offset from the page in `eax` in place of the address in `rax` that `exit` takes.
    pub fn with_offset(&self, exit: usize) -> usize {
        if exit == self.kicked { self.kicked_at } else { self.careful_at }
    }

    /// The check of compact code for an access of `bytes`. Called: `r15` address → `r14` the host's. Every register stays
    /// but `r15` and the flags.
    pub fn check(&self, bytes: u8, write: bool, aligned: bool) -> Option<usize> {
        let access = compact_access(bytes, write, aligned);
        self.checks.iter().find(|(of, _)| *of == access).map(|(_, at)| *at)
    }

    /// The same for a push (`write`) or pop, if it has one: it has moved the stack pointer, too, when it returns.
    pub fn stack_check(&self, bytes: u8, write: bool, narrow: bool) -> Option<usize> {
        self.stack_checks.iter().find(|(of, _)| *of == (bytes, write, narrow)).map(|(_, at)| *at)
    }

    /// The same for a push of the address at the offset `eax` from the page, which `rax` is when it returns.
    pub fn push_of_pc(&self, narrow: bool) -> Option<usize> {
        self.pushes_of_pc.iter().find(|(of, _)| *of == narrow).map(|(_, at)| *at)
    }
}

/// Constants for values in vector registers; singles are NaN-boxed there.
#[derive(Clone, Copy)]
pub enum FpMask {
    /// To be set above a single.
    Box,
    SignOfDouble,
    SignOfSingle,
    AllButSignOfDouble,
    AllButSignOfSingle,
}

impl FpMask {
    const VALUES: [u64; 5] = [0xffff_ffff_0000_0000, 1 << 63, 1 << 31, !(1 << 63), !(1 << 31)];
}

/// Writes the stubs into `out`.
pub fn emit(backend: &X86_64, out: &mut Vec<u8>) -> Result<(Stubs, Addresses), String> {
    let base = backend.config.code_base;
    let table_end = base + 64 + 8 * backend.config.helpers.len();
    if i32::try_from(table_end).is_err() {
        return Err(format!("the code cache at {base:#x} is not below 2 GiB: map it with MAP_32BIT"));
    }
    let mut e = Emitter { b: backend, ops: VecAssembler::new(base) };
    let mut a = Addresses::default();
    let mut stubs = Stubs { miss: base, ..Stubs::default() };
    e.miss();
    let table = e.helper_table();
    e.vectors(&mut a);
    e.fp_masks(&mut a);
    stubs.enter = e.enter_and_exit();
    e.leaving(&mut a);
    stubs.dispatch = e.dispatch();
    a.dispatch = stubs.dispatch;
    e.accesses(&mut a);
    e.checks(&mut a);
    e.divide(&mut a);
    e.fp(&mut a);
    e.link(&mut a);
    e.compact_jumps(&mut a);
    e.compact_guards(&mut a);
    e.trace_full(&mut a);
    e.helper_calls(&mut a, table);
    let code = e.ops.finalize().map_err(|error| format!("assembling the stubs: {error}"))?;
    out.clear();
    out.extend_from_slice(&code);
    Ok((stubs, a))
}

struct Emitter<'a> {
    b: &'a X86_64,
    ops: Ops,
}

impl Emitter<'_> {
    fn here(&self) -> usize {
        self.b.config.code_base + self.ops.offset().0
    }

    /// Displacement of an environment field.
    fn env(&self, offset: i32) -> i32 {
        self.b.env(offset)
    }

    fn save(&mut self, pins: &[(u8, Slot)]) {
        for &(reg, slot) in pins {
            let disp = self.b.slot_disp(slot);
            dynasm!(self.ops ; .arch x64 ; mov [rbp + disp], Rq(reg));
        }
    }

    fn restore(&mut self, pins: &[(u8, Slot)]) {
        for &(reg, slot) in pins {
            let disp = self.b.slot_disp(slot);
            dynasm!(self.ops ; .arch x64 ; mov Rq(reg), [rbp + disp]);
        }
    }

    /// What an entry table's zero leads to: the page is in `page_base`, the offset in `r14`.
    fn miss(&mut self) {
        let (page_base, pc) = (self.env(self.b.config.env.page_base), self.env(self.b.config.env.pc));
        let exit_code = self.env(self.b.config.env.exit_code);
        dynasm!(self.ops ; .arch x64
            ; mov rax, [rbp + page_base]
            ; add rax, r14
            ; mov [rbp + pc], rax
            ; mov DWORD [rbp + exit_code], ExitCode::Lookup as i32
            ; jmp ->exit
        );
    }

    /// The helpers' addresses; gives the table's own.
    fn helper_table(&mut self) -> i32 {
        dynasm!(self.ops ; .arch x64 ; .align 8);
        let table = self.here() as i32;
        for &helper in &self.b.config.helpers {
            dynasm!(self.ops ; .arch x64 ; .u64 helper as u64);
        }
        table
    }

    /// `extern "C" fn(env, code)`. The frame: six saved registers and 24 bytes, of which generated code may
    /// use the lowest 16, leave `rsp` aligned.
    fn enter_and_exit(&mut self) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let enter = self.here();
        dynasm!(self.ops ; .arch x64
            ; push rbx ; push rbp ; push r12 ; push r13 ; push r14 ; push r15
            ; sub rsp, 24
            ; lea rbp, [rdi + 128]
            ; mov rax, rsi
        );
        self.restore(&self.b.pinned);
        dynasm!(self.ops ; .arch x64
            ; jmp rax
            ; .align 16
            ; ->exit:
        );
        self.bury_if_alive();
        self.save(&self.b.pinned);
        dynasm!(self.ops ; .arch x64
            ; add rsp, 24
            ; pop r15 ; pop r14 ; pop r13 ; pop r12 ; pop rbp ; pop rbx
            ; ret
        );
        enter
    }

    /// Exits for the address in `rax`.
    fn leaving(&mut self, a: &mut Addresses) {
        let (pc, exit_code) = (self.env(self.b.config.env.pc), self.env(self.b.config.env.exit_code));
        let align = self.b.config.code_align as i32;
        a.probe_miss = self.here();
        dynasm!(self.ops ; .arch x64
            ; ->probe_miss:
            ; mov r14d, ExitCode::Lookup as i32
            ; jmp >out
        );
        a.careful = self.here();
        dynasm!(self.ops ; .arch x64
            ; mov r14d, ExitCode::Careful as i32
            ; jmp >out
        );
        a.kicked = self.here();
        dynasm!(self.ops ; .arch x64
            ; mov r14d, ExitCode::Kicked as i32
            ; out:
            ; and rax, -align
            ; mov [rbp + pc], rax
            ; mov [rbp + exit_code], r14d
            ; jmp ->exit
        );
        let page_base = self.env(self.b.config.env.page_base);
        a.careful_at = self.here();
        dynasm!(self.ops ; .arch x64 ; cdqe ; add rax, [rbp + page_base]);
        self.jump_to(a.careful);
        a.kicked_at = self.here();
        dynasm!(self.ops ; .arch x64 ; cdqe ; add rax, [rbp + page_base]);
        self.jump_to(a.kicked);
    }

    /// Continues at `pc`, with every pinned register loaded.
    fn dispatch(&mut self) -> usize {
        let env = &self.b.config.env;
        let (pc, kick, exit_request) = (self.env(env.pc), self.env(env.kick), self.env(env.exit_request));
        let (page_base, exit_code) = (self.env(env.page_base), self.env(env.exit_code));
        let (tag, table) = (self.b.config.context.exec_tag, self.b.config.context.exec_table);
        dynasm!(self.ops ; .arch x64
            // Entered with the return address of an abandoned block's call on the stack.
            ; .align 16
            ; ->abandon:
            ; add rsp, 8
        );
        let dispatch = self.here();
        dynasm!(self.ops ; .arch x64
            ; ->dispatch:
            ; mov DWORD [rbp + exit_request], 0
            ; cmp DWORD [rbp + kick], 0
            ; jne >kicked
            ; mov rax, [rbp + pc]
            ; ->look_up:
        );
        self.note_jump();
        dynasm!(self.ops ; .arch x64
            ; mov r14d, eax
            ; shr r14d, 12
            ; mov r15, rax
            ; and r15, -4096
            ; gs cmp r15, [r14*8 + tag]
            ; jne ->probe_miss
            ; mov [rbp + page_base], r15
        );
        self.entry(table);
        dynasm!(self.ops ; .arch x64
            ; jmp rax
            ; kicked:
            ; mov DWORD [rbp + exit_code], ExitCode::Kicked as i32
            ; jmp ->exit
        );
        dispatch
    }

    /// Remembers the address in `rax`, which is looked up. Clobbers `r14`.
    fn note_jump(&mut self) {
        let env = &self.b.config.env;
        if env.jumps != 0 {
            let (ring, at) = (self.env(env.jumps), self.env(env.jumps_at));
            dynasm!(self.ops ; .arch x64
                ; movzx r14d, BYTE [rbp + at]
                ; mov [rbp + r14*8 + ring], rax
                ; inc BYTE [rbp + at]
            );
        }
    }

    /// The code of the address in `rax` by the entry table of page number `r14`: to `rax`. `r14` is the offset then.
    fn entry(&mut self, table: i32) {
        let code_base = self.b.config.code_base as i32;
        dynasm!(self.ops ; .arch x64
            ; gs mov r15d, [r14*8 + table]
            ; mov r14d, eax
        );
        if self.b.config.code_align == 1 {
            dynasm!(self.ops ; .arch x64 ; and r14d, 0xfff ; mov eax, [r15 + r14*4]);
        } else {
            dynasm!(self.ops ; .arch x64 ; and r14d, 0xffe ; mov eax, [r15 + r14*2]);
        }
        dynasm!(self.ops ; .arch x64 ; add eax, code_base);
    }

    /// Loads, stores and atomics that the TLB does not serve.
    fn accesses(&mut self, a: &mut Addresses) {
        let fns = self.b.config.fns;
        let load: fn(&mut Self) = |e| {
            dynasm!(e.ops ; .arch x64
                ; mov rsi, r15
                ; mov edx, r14d
                ; mov rcx, [rsp]
            );
        };
        a.load = self.access(fns.load, load);
        a.note = self.access(fns.note, load);
        let unit_load = self.access(fns.unit_load, load);
        let unit_probe = self.access(fns.unit_probe, load);
        let unit_store = self.access(fns.unit_store, |e| dynasm!(e.ops ; .arch x64 ; mov esi, r14d));
        if self.b.config.vector.is_some() {
            a.unit_load = self.crossing_load(unit_load);
            a.unit_probe = self.crossing_probe(unit_probe);
            a.unit_store = self.crossing_store(unit_store);
        }
        a.store = self.access(fns.store, |e| {
            dynasm!(e.ops ; .arch x64
                ; mov rsi, r15
                ; mov rdx, rax
                ; mov ecx, r14d
                ; mov r8, [rsp]
            )
        });
        a.atomic = self.access(fns.atomic, |e| {
            dynasm!(e.ops ; .arch x64
                ; mov rsi, r15
                ; mov edx, r14d
                ; mov rcx, rax
                ; mov r8, [rsp]
            )
        });
        a.cmpxchg = self.access(fns.cmpxchg, |e| {
            dynasm!(e.ops ; .arch x64
                ; mov rsi, r15
                ; mov edx, r14d
                ; mov rcx, rax
                ; mov r8, [rsp + 16]
                ; mov r9, [rsp]
            )
        });
    }

    /// Signed division of 128 by 64 bits: as unsigned, with a check of what would not fit.
    fn divide(&mut self, a: &mut Addresses) {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.divide = self.here();
        dynasm!(self.ops ; .arch x64
            ; push r14
            ; push rdx
            ; test rdx, rdx
            ; jns >divisor
            ; neg rax
            ; adc rdx, 0
            ; neg rdx
            ; divisor:
            ; test r14, r14
            ; jns >check
            ; neg r14
            ; check:
            // Also for a divisor of zero.
            ; cmp rdx, r14
            ; jae >fail
            ; div r14
            ; pop r14
            ; test r14, r14
            ; jns >sign
            ; neg rdx
            ; sign:
            ; xor r14, [rsp]
            ; lea rsp, [rsp + 8]
            ; jns >positive
            ; neg rax
            ; test rax, rax
            ; jg >no
            ; clc
            ; ret
            ; positive:
            ; test rax, rax
            ; js >no
            ; clc
            ; ret
            ; fail:
            ; lea rsp, [rsp + 16]
            ; no:
            ; stc
            ; ret
        );
    }

    /// Calls a function that may ask to abandon the block, then returns to the block, with vector registers where they
    /// were.
    fn access(&mut self, function: usize, arguments: fn(&mut Self)) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        self.save(self.b.caller_saved());
        if !self.b.has_vectors() {
            arguments(self);
            self.access_call(function, false);
            return entry;
        }
        self.test_alive();
        dynasm!(self.ops ; .arch x64 ; jne >alive);
        arguments(self);
        self.access_call(function, false);
        dynasm!(self.ops ; .arch x64
            ; alive:
            ; call ->bury
        );
        arguments(self);
        self.access_call(function, true);
        entry
    }

    fn access_call(&mut self, function: usize, revive: bool) {
        let exit_request = self.env(self.b.config.env.exit_request);
        dynasm!(self.ops ; .arch x64
            ; lea rdi, [rbp - 128]
            ; sub rsp, 8
            ; mov rax, QWORD function as i64
            ; call rax
            ; add rsp, 8
        );
        self.restore(self.b.caller_saved());
        dynasm!(self.ops ; .arch x64
            ; cmp DWORD [rbp + exit_request], 0
            ; jne ->abandon
        );
        if revive {
            dynasm!(self.ops ; .arch x64 ; jmp ->revive);
        } else {
            dynasm!(self.ops ; .arch x64 ; ret);
        }
    }

    /// Compares for vector registers being in memory.
    fn test_alive(&mut self) {
        let dead = self.env(self.b.config.env.vector_dead);
        dynasm!(self.ops ; .arch x64 ; cmp BYTE [rbp + dead], -1);
    }

    /// Puts vector registers into memory, if they are in the host's.
    fn bury_if_alive(&mut self) {
        if self.b.has_vectors() {
            self.test_alive();
            dynasm!(self.ops ; .arch x64
                ; je >dead
                ; call ->bury
                ; dead:
            );
        }
    }

    /// Moves vector registers between memory and the host's, and MXCSR with them. Every general register stays.
    fn vectors(&mut self, a: &mut Addresses) {
        let Some(v) = self.b.config.vector else { return self.fp_pins(a) };
        let env = &self.b.config.env;
        let hot = |offset: i32| env.guest + offset;
        let (dead, scratch) = (self.env(env.vector_dead), self.env(env.mxcsr));
        let host = self.env(env.host_mxcsr);
        let (guest, guard) = (self.env(hot(v.mxcsr)), self.env(hot(v.guard)));
        let registers = self.env(hot(v.registers));
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.revive = self.here();
        dynasm!(self.ops ; .arch x64
            ; ->revive:
            ; push rax
            ; mov eax, [rbp + guest]
            ; or eax, 0x1f80
            ; mov [rbp + scratch], eax
            ; ldmxcsr [rbp + scratch]
            ; mov al, [rbp + guard]
            ; mov [rbp + dead], al
            ; test al, BYTE v.upper as i8
            ; pop rax
            ; jne >narrow
        );
        // The host runs 128-bit code faster if it knows that the upper halves are zeros; loading zeros does not tell it.
        dynasm!(self.ops ; .arch x64 ; movaps xmm0, [rbp + registers + 16]);
        for n in 1..16 {
            dynasm!(self.ops ; .arch x64 ; orps xmm0, [rbp + registers + 16 + 32 * n]);
        }
        dynasm!(self.ops ; .arch x64 ; ptest xmm0, xmm0 ; je >narrow);
        for n in 0..16u8 {
            dynasm!(self.ops ; .arch x64 ; vmovups Ry(n), [rbp + registers + 32 * i32::from(n)]);
        }
        dynasm!(self.ops ; .arch x64 ; ret ; narrow:);
        for n in 0..16u8 {
            dynasm!(self.ops ; .arch x64 ; vmovups Rx(n), [rbp + registers + 32 * i32::from(n)]);
        }
        dynasm!(self.ops ; .arch x64
            ; ret
            ; .align 16
            ; ->bury:
            ; push rax
            ; stmxcsr [rbp + scratch]
            ; mov eax, [rbp + scratch]
            ; and eax, 0x3f
            ; or [rbp + guest], eax
            ; ldmxcsr [rbp + host]
            ; test BYTE [rbp + dead], v.upper as i8
            ; mov BYTE [rbp + dead], -1
            ; pop rax
            ; jne >narrow
        );
        for n in 0..16u8 {
            dynasm!(self.ops ; .arch x64 ; vmovups [rbp + registers + 32 * i32::from(n)], Ry(n));
        }
        dynasm!(self.ops ; .arch x64 ; vzeroupper ; ret ; narrow:);
        for n in 0..16u8 {
            dynasm!(self.ops ; .arch x64 ; movups [rbp + registers + 32 * i32::from(n)], Rx(n));
        }
        dynasm!(self.ops ; .arch x64 ; ret);
    }

    /// The same for floating-point slots.
    fn fp_pins(&mut self, a: &mut Addresses) {
        if !self.b.has_vectors() {
            return;
        }
        let dead = self.env(self.b.config.env.vector_dead);
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.revive = self.here();
        dynasm!(self.ops ; .arch x64
            ; ->revive:
            ; mov BYTE [rbp + dead], 0
        );
        let b = self.b;
        let pins = || (0..SLOTS as u8).filter_map(|n| Some((b.fp_pin_of(Slot(n))?, b.slot_disp(Slot(n)))));
        for (reg, disp) in pins() {
            dynasm!(self.ops ; .arch x64 ; vmovsd Rx(reg), QWORD [rbp + disp]);
        }
        dynasm!(self.ops ; .arch x64 ; ret ; .align 16 ; ->bury:);
        for (reg, disp) in pins() {
            dynasm!(self.ops ; .arch x64 ; vmovsd QWORD [rbp + disp], Rx(reg));
        }
        dynasm!(self.ops ; .arch x64 ; mov BYTE [rbp + dead], -1 ; ret);
        a.bury = self.here();
        self.test_alive();
        dynasm!(self.ops ; .arch x64 ; jne ->bury ; ret);
    }

    /// Masks for single and double values in vector registers.
    fn fp_masks(&mut self, a: &mut Addresses) {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.fp_masks = self.here();
        for mask in FpMask::VALUES {
            dynasm!(self.ops ; .arch x64 ; .u64 mask ; .u64 0);
        }
        a.fp_flags = self.here();
        for host in 0..64u8 {
            // IE, ZE, OE, UE and PE to NV, DZ, OF, UF and NX.
            let flags = (host & 1) << 4 | (host & 4) << 1 | (host & 8) >> 1 | (host & 16) >> 3 | host >> 5;
            dynasm!(self.ops ; .arch x64 ; .u8 flags);
        }
    }

    /// Goes to `slow` unless the `r14d` bytes at `r15` are in two pages that are both in the tags at `tag`; then `rcx` and
    /// `rdx` are the pages' host addresses. Uses `rax`, and has pushed `rax`, `rcx` and `rdx`.
    fn two_pages(&mut self, tag: i32, slow: usize) {
        let addend = self.b.config.context.addend;
        dynasm!(self.ops ; .arch x64
            ; push rax
            ; push rcx
            ; push rdx
            ; mov eax, r15d
            ; and eax, 0xfff
            ; add eax, r14d
            ; cmp eax, 4096
            ; jbe >no
            ; mov eax, r15d
            ; shr eax, 12
            ; mov rdx, r15
            ; and rdx, -4096
            ; gs cmp rdx, [rax*8 + tag]
            ; jne >no
            ; mov rcx, rdx
            ; gs add rcx, [rax*8 + addend]
            ; add rdx, 4096
            ; mov eax, edx
            ; shr eax, 12
            ; gs cmp rdx, [rax*8 + tag]
            ; jne >no
            ; gs add rdx, [rax*8 + addend]
            ; jmp >yes
            ; no:
            ; pop rdx
            ; pop rcx
            ; pop rax
        );
        self.jump_to(slow);
        dynasm!(self.ops ; .arch x64 ; yes:);
    }

    fn jump_to(&mut self, target: usize) {
        // Both are in the code cache.
        let rel = target.wrapping_sub(self.here() + 5) as i32;
        dynasm!(self.ops ; .arch x64 ; .u8 0xe9 ; .i32 rel);
    }

    /// The load of a unit's operand that two pages share: vectors stay where they are.
    fn crossing_load(&mut self, slow: usize) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        self.two_pages(self.b.config.context.read_tag, slow);
        let buffer = self.env(self.b.config.env.unit_buffer);
        // The end of one page and the start of the other, side by side; then the operand out of their middle.
        for i in 0..4 {
            dynasm!(self.ops ; .arch x64
                ; mov rax, [rcx + 4096 - 32 + 8 * i]
                ; mov [rbp + buffer + 32 + 8 * i], rax
            );
        }
        for i in 0..4 {
            dynasm!(self.ops ; .arch x64
                ; mov rax, [rdx + 8 * i]
                ; mov [rbp + buffer + 64 + 8 * i], rax
            );
        }
        dynasm!(self.ops ; .arch x64
            ; and r15d, 0xfff
            ; sub r15d, 4096 - 32
        );
        for i in 0..4 {
            dynasm!(self.ops ; .arch x64
                ; mov rax, [rbp + r15 + buffer + 32 + 8 * i]
                ; mov [rbp + buffer + 8 * i], rax
            );
        }
        dynasm!(self.ops ; .arch x64 ; pop rdx ; pop rcx ; pop rax ; ret);
        entry
    }

    fn crossing_probe(&mut self, slow: usize) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        self.two_pages(self.b.config.context.write_tag, slow);
        let va = self.env(self.b.config.env.unit_va);
        dynasm!(self.ops ; .arch x64
            ; mov [rbp + va], r15
            ; pop rdx ; pop rcx ; pop rax
            ; ret
        );
        entry
    }

    fn crossing_store(&mut self, slow: usize) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        let (va, buffer) = (self.env(self.b.config.env.unit_va), self.env(self.b.config.env.unit_buffer));
        dynasm!(self.ops ; .arch x64 ; mov r15, [rbp + va]);
        self.two_pages(self.b.config.context.write_tag, slow);
        // Not a byte beside the operand is written: it may be another vCPU's.
        dynasm!(self.ops ; .arch x64
            ; and r15d, 0xfff
            ; add rcx, r15
            ; sub r15d, 4096
            ; neg r15d
            // rcx: the operand's start, r15: bytes in the first page; rdx: the operand's start if it were before the second
            ; sub rdx, r15
            ; push rsi
            ; xor esi, esi
            ; first:
            ; movzx eax, BYTE [rbp + rsi + buffer]
            ; mov [rcx + rsi], al
            ; inc esi
            ; cmp esi, r15d
            ; jb <first
            ; second:
            ; movzx eax, BYTE [rbp + rsi + buffer]
            ; mov [rdx + rsi], al
            ; inc esi
            ; cmp esi, r14d
            ; jb <second
            ; pop rsi ; pop rdx ; pop rcx ; pop rax
            ; ret
        );
        entry
    }

    /// A floating-point operation in software, from slots to slot.
    fn fp(&mut self, a: &mut Addresses) {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.fp = self.here();
        if self.b.config.fp_pin_order.is_empty() {
            return self.fp_call();
        }
        self.test_alive();
        dynasm!(self.ops ; .arch x64 ; jne >alive);
        self.fp_call();
        // The block goes on with its registers alive.
        dynasm!(self.ops ; .arch x64 ; alive: ; sub rsp, 8 ; call >function ; add rsp, 8 ; jmp ->revive ; function:);
        self.fp_call();
    }

    fn fp_call(&mut self) {
        let function = self.b.config.fns.fp;
        self.save(&self.b.pinned);
        self.bury_if_alive();
        dynasm!(self.ops ; .arch x64
            ; lea rdi, [rbp - 128]
            ; mov rsi, r14
            ; sub rsp, 8
            ; mov rax, QWORD function as i64
            ; call rax
            ; add rsp, 8
        );
        self.restore(&self.b.pinned);
        dynasm!(self.ops ; .arch x64 ; ret);
    }

    /// Links the jump whose cold code called and goes where the runtime says.
    fn link(&mut self, a: &mut Addresses) {
        a.link = self.go_on_where(self.b.config.fns.link);
        a.warm = self.go_on_where(self.b.config.fns.warm);
    }

    /// Called between blocks: goes on at the host address that `function` answers, which is given the return address.
    fn go_on_where(&mut self, function: usize) -> usize {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        let entry = self.here();
        self.save(self.b.caller_saved());
        self.bury_if_alive();
        dynasm!(self.ops ; .arch x64
            ; lea rdi, [rbp - 128]
            ; mov rsi, [rsp]
            ; sub rsp, 8
            ; mov rax, QWORD function as i64
            ; call rax
            // The alignment and the return address both go: the block is left.
            ; add rsp, 16
        );
        self.restore(self.b.caller_saved());
        dynasm!(self.ops ; .arch x64 ; jmp rax);
        entry
    }

    /// Has the trace's buffer taken away. Registers stay, `rax` and vectors too.
    fn trace_full(&mut self, a: &mut Addresses) {
        dynasm!(self.ops ; .arch x64 ; .align 16);
        a.trace_full = self.here();
        self.save(self.b.caller_saved());
        dynasm!(self.ops ; .arch x64 ; push rax);
        self.beside_vectors(Self::trace_call);
    }

    /// A call of the runtime and the return to the block, with vectors put away meanwhile where they are alive.
    fn beside_vectors(&mut self, call: fn(&mut Self)) {
        if self.b.has_vectors() {
            self.test_alive();
            dynasm!(self.ops ; .arch x64 ; jne >alive);
        }
        call(self);
        dynasm!(self.ops ; .arch x64 ; ret);
        if self.b.has_vectors() {
            dynasm!(self.ops ; .arch x64 ; alive: ; call ->bury);
            call(self);
            dynasm!(self.ops ; .arch x64 ; jmp ->revive);
        }
    }

    fn trace_call(&mut self) {
        let function = self.b.config.fns.trace_full;
        dynasm!(self.ops ; .arch x64
            ; lea rdi, [rbp - 128]
            ; mov rax, QWORD function as i64
            ; call rax
            ; pop rax
        );
        self.restore(self.b.caller_saved());
    }

    /// An entry per helper that pushes its number, and the two bodies.
    fn helper_calls(&mut self, a: &mut Addresses, table: i32) {
        let exit_request = self.env(self.b.config.env.exit_request);
        dynasm!(self.ops ; .arch x64 ; .align 16 ; ->helper_may_exit:);
        self.save(&self.b.pinned);
        self.helper_body(table);
        self.restore(&self.b.pinned);
        dynasm!(self.ops ; .arch x64
            ; cmp DWORD [rbp + exit_request], 0
            ; jne ->abandon
            ; ret
            ; .align 16
            ; ->helper_pure:
        );
        self.save(self.b.caller_saved());
        self.helper_body(table);
        self.restore(self.b.caller_saved());
        dynasm!(self.ops ; .arch x64 ; ret);
        for number in 0..self.b.config.helpers.len() as i32 {
            a.helpers_may_exit.push(self.here());
            dynasm!(self.ops ; .arch x64 ; push number ; jmp ->helper_may_exit);
            a.helpers_pure.push(self.here());
            dynasm!(self.ops ; .arch x64 ; push number ; jmp ->helper_pure);
        }
    }

    fn helper_body(&mut self, table: i32) {
        self.bury_if_alive();
        dynasm!(self.ops ; .arch x64
            ; mov rsi, rax
            ; mov rdx, r14
            ; mov rcx, r15
            ; lea rdi, [rbp - 128]
            ; pop rax
            ; sub rsp, 8
            ; call QWORD [rax*8 + table]
            ; add rsp, 8
        );
    }
}
