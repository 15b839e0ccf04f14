//! A runtime just large enough to execute blocks: memory for code and context, an environment, and the
//! functions that stubs call, over guest memory of a few pages.
#![allow(unsafe_code)]

use crate::X86_64;
use mimus_tcg_ir::backend::*;
use mimus_tcg_ir::flags::{self, FLAGS, Flags};
use mimus_tcg_ir::interp::{self, CallOutcome, Fault, InterpHost};
use mimus_tcg_ir::*;
use mimus_tcg_softfloat::riscv::{self, RvFpOp};
use mimus_tcg_softfloat::{Flags as FpFlags, FloatStatus, Rounding};
use std::arch::asm;
use std::mem::offset_of;
use std::sync::atomic::Ordering;

/// Virtual address of guest memory: 4 pages. The first two are in the TLB, the third for reads only, the
/// fourth not at all.
pub const DATA: u64 = 0xffff_ffc0_1234_5000;
/// Bytes of guest memory.
pub const DATA_LEN: u64 = 4 * 4096;
/// The same memory is here once more, with the same TLB entries.
pub const ALIAS: u64 = DATA + (1 << 20);
/// Page of the code.
pub const CODE: u64 = 0xffff_ffff_8020_3000;
/// Where a fault, or a helper that leaves, continues.
pub const TRAP: u64 = 0xffff_ffff_8777_7002;
/// Number of the helper for floating-point flags.
pub const HELPER_FP_FLAGS: u16 = 2;
/// Bytes of code memory.
const CODE_SIZE: usize = 1 << 20;

/// What a block changes.
#[repr(C)]
#[derive(Clone, PartialEq, Debug)]
pub struct Guest {
    pub slots: [u64; SLOTS],
    pub reserve_addr: u64,
    pub reserve_value: u64,
    pub hot: [u8; 16],
    pub data: Vec<u8>,
    pub flags: u8,
    pub rounding: u8,
    /// Instruction that faulted or left.
    pub left_at: Option<(PagePc, u8)>,
}

/// The environment as generated code sees it.
#[repr(C)]
pub struct Env {
    pub page_base: u64,
    pub pc: u64,
    pub kick: u32,
    pub exit_request: u32,
    pub exit_code: u32,
    pub cur_insn: u32,
    pub vector_dead: u32,
    pub mxcsr: u32,
    pub host_mxcsr: u32,
    pub unit_va: u64,
    pub unit_buffer: [u8; 96],
    pub heat: u16,
    pub divisors: [Divisor; DIVISORS],
    pub page_span: u64,
    pub guest: Guest,
    /// Blocks in the code memory, by address, to resolve return addresses.
    pub blocks: Vec<(u64, Emitted)>,
    pub dispatch: usize,
    pub links: u32,
    /// Host address to link every site to, if any: `(pc, host address, entry table if in another page)`.
    pub targets: Vec<(u64, usize, u32)>,
}

impl Env {
    /// Sets the kick word as the runtime does.
    pub fn set_kick(&mut self, kick: u32) {
        self.kick = kick;
        self.page_span = if kick == 0 { 4096 } else { 0 };
    }
}

/// Mappings, and the backend under test.
pub struct Machine {
    pub backend: X86_64,
    pub stubs: Stubs,
    pub code: *mut u8,
    pub blocks_at: usize,
    pub context: *mut u8,
    pub tables: *mut u32,
    data: *mut u8,
}

fn map(len: usize, prot: i32, flags: i32) -> *mut u8 {
    // SAFETY: a fresh anonymous mapping, checked for failure.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED, "mmap of {len} bytes");
    at.cast()
}

/// How slots are given to registers, to test every way.
pub fn pins(variant: usize) -> Vec<Slot> {
    match variant {
        // Integer registers of every kind pinned, others in memory.
        0 => [2u8, 1, 10, 11, 8, 12, 13, 14, 15, 9, 5].map(Slot).to_vec(),
        1 => vec![],
        // Few, with a floating-point slot and a temporary.
        2 => [10u8, 20, 33, 5, 64, 11].map(Slot).to_vec(),
        _ => (0..11u8).map(|n| Slot(n * 2)).collect(),
    }
}

impl Machine {
    pub fn new(pin_order: Vec<Slot>) -> Machine {
        Machine::with_code_align(pin_order, 2)
    }

    /// A machine whose code is aligned so.
    pub fn with_code_align(pin_order: Vec<Slot>, code_align: u32) -> Machine {
        Machine::optimising(pin_order, code_align, Optimise::from_environment())
    }

    /// The same with these optimisations.
    pub fn optimising(pin_order: Vec<Slot>, code_align: u32, optimise: Optimise) -> Machine {
        let guest = offset_of!(Env, guest);
        let config = BackendConfig {
            env: EnvLayout {
                slots: (guest + offset_of!(Guest, slots)) as i32,
                page_base: offset_of!(Env, page_base) as i32,
                pc: offset_of!(Env, pc) as i32,
                kick: offset_of!(Env, kick) as i32,
                page_span: offset_of!(Env, page_span) as i32,
                exit_request: offset_of!(Env, exit_request) as i32,
                exit_code: offset_of!(Env, exit_code) as i32,
                cur_insn: offset_of!(Env, cur_insn) as i32,
                reserve_addr: (guest + offset_of!(Guest, reserve_addr)) as i32,
                reserve_value: (guest + offset_of!(Guest, reserve_value)) as i32,
                vector_dead: offset_of!(Env, vector_dead) as i32,
                mxcsr: offset_of!(Env, mxcsr) as i32,
                host_mxcsr: offset_of!(Env, host_mxcsr) as i32,
                unit_va: offset_of!(Env, unit_va) as i32,
                unit_buffer: offset_of!(Env, unit_buffer) as i32,
                guest: (guest + offset_of!(Guest, hot)) as i32,
                heat: offset_of!(Env, heat) as i32,
                heats: 1,
                divisors: offset_of!(Env, divisors) as i32,
                ..EnvLayout::default()
            },
            context: ContextLayout::STANDARD,
            fns: RuntimeFns {
                load: load as *const () as usize,
                store: store as *const () as usize,
                atomic: atomic as *const () as usize,
                cmpxchg: cmpxchg as *const () as usize,
                unit_load: 0,
                unit_probe: 0,
                unit_store: 0,
                note: note as *const () as usize,
                fp: fp as *const () as usize,
                link: link as *const () as usize,
                trace_full: 0,
                access: access as *const () as usize,
                warm: warm as *const () as usize,
            },
            helpers: [helper_pure as *const (), helper_may_exit as *const (), helper_fp_flags as *const ()]
                .map(|helper| helper as usize)
                .to_vec(),
            pin_order,
            vector: None,
            stack: Some(Slot(4)),
            fp_pin_order: if code_align == 2 { (34..48).map(Slot).collect() } else { Vec::new() },
            fp_flags: (code_align == 2).then(|| FpFlagsHelper {
                helper: HELPER_FP_FLAGS,
                flags: (offset_of!(Guest, flags) - offset_of!(Guest, hot)) as i32,
            }),
            code_align,
            optimise,
            flags: code_align == 1,
            code_base: 0,
        };
        let m = Machine::with_config(config);
        let l = ContextLayout::STANDARD;
        for page in 0..3u64 {
            let va = DATA + page * 4096;
            for (va, start) in [(va, DATA), (va - DATA + ALIAS, ALIAS)] {
                m.context_entry(l.read_tag, va, va);
                m.context_entry(l.addend, va, (m.data as u64).wrapping_sub(start));
                if page < 2 {
                    m.context_entry(l.write_tag, va, va);
                }
            }
        }
        m
    }

    /// A machine with an empty context; `config` says everything but where the code is.
    pub fn with_config(config: BackendConfig) -> Machine {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let code = map(CODE_SIZE, rw | libc::PROT_EXEC, libc::MAP_32BIT);
        let context = map(ContextLayout::SIZE, rw, 0);
        let tables = map(4 * 8192, rw, libc::MAP_32BIT).cast::<u32>();
        let data = map(DATA_LEN as usize, rw, 0);
        let config = BackendConfig { code_base: code as usize, ..config };
        let mut out = Vec::new();
        let (backend, stubs) = X86_64::new(config, &mut out).expect("a host that can");
        let m = Machine { backend, stubs, code, blocks_at: 0, context, tables, data };
        m.write_code(code as usize, &out);
        let l = ContextLayout::STANDARD;
        for tags in [l.read_tag, l.write_tag, l.exec_tag] {
            // Zero is an empty entry everywhere but in the first one.
            m.context_entry(tags, 0, !0);
        }
        m.empty_jumps();
        Machine { blocks_at: code as usize + out.len(), ..m }
    }

    /// Sets the context's entry for `va` in the array at `array`.
    pub fn context_entry(&self, array: i32, va: u64, value: u64) {
        let index = (va >> 12) as usize & (ContextLayout::ENTRIES - 1);
        // SAFETY: inside the context's mapping.
        unsafe { self.context.add(array as usize).cast::<u64>().add(index).write(value) }
    }

    /// Empties the context's jump entries.
    pub fn empty_jumps(&self) {
        let entries = ContextLayout::STANDARD.jumps as usize;
        for n in 0..ContextLayout::FAR_JUMPS as usize {
            // SAFETY: inside the context's mapping. The last word stays zero.
            unsafe {
                let entry = self.context.add(entries + n * ContextLayout::JUMP_BYTES).cast::<[u64; 3]>();
                entry.write([ContextLayout::NO_JUMP, entry as u64 + 28, 0xffe]);
            }
        }
    }

    /// Fills the range entries that the next block's accesses will have, if `fills` says so; empties the others.
    pub fn fill_next_ranges(&self, mut fills: impl FnMut(u32) -> bool) {
        CONTEXT_PTR.set(self.context);
        DATA_PTR.set(self.data);
        for (kind, used) in (0..).zip(&self.backend.ranges) {
            let next = used.load(Ordering::Relaxed);
            let size = size_of_log2(kind & 3);
            for n in next..next + 24 {
                let number = ContextLayout::range(n, size, kind & 4 != 0, kind & 8 != 0);
                let at = ContextLayout::STANDARD.ranges as usize + number as usize * ContextLayout::RANGE_BYTES;
                // SAFETY: an entry in the context's mapping, which only this thread uses.
                unsafe { self.context.add(at).cast::<[u64; 5]>().write([0; 5]) };
                if fills(number) {
                    let pages = if kind & 4 != 0 { 2 } else { 3 };
                    fill_range(DATA, size as u32 | (number + 1) << RANGE_SHIFT, pages);
                }
            }
        }
    }

    /// What the context adds to an address of guest memory.
    pub fn data_addend(&self) -> u64 {
        (self.data as u64).wrapping_sub(DATA)
    }

    pub fn write_code(&self, at: usize, bytes: &[u8]) {
        let offset = at - self.code as usize;
        assert!(offset + bytes.len() <= CODE_SIZE);
        // SAFETY: checked to be inside the mapping; no code runs meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code.add(offset), bytes.len()) }
    }

    /// Sets a word of the entry tables.
    pub fn write_word(&self, at: *mut u32, value: u32) {
        let offset = at as usize - self.tables as usize;
        assert!(offset < 4 * 8192);
        // SAFETY: checked to be inside the tables' mapping.
        unsafe { at.write(value) }
    }

    /// Enters generated code at `code` with the environment at `env`, which is laid out as the backend was told.
    pub fn enter(&self, env: *mut u8, code: usize) {
        let enter = self.stubs.enter;
        // SAFETY: `enter` is a C function of this signature; generated code finds its context by the gs base, which
        // nothing else on this host uses.
        unsafe {
            asm!("wrgsbase {}", in(reg) self.context);
            let enter: extern "C" fn(*mut u8, usize) = std::mem::transmute(enter);
            enter(env, code);
        }
    }

    /// Runs `code` on `env` with the guest's memory in place; gives how it ended.
    pub fn run(&self, env: &mut Env, code: usize) -> (ExitCode, u64) {
        let len = DATA_LEN as usize;
        // SAFETY: both are `DATA_LEN` bytes.
        unsafe { std::ptr::copy_nonoverlapping(env.guest.data.as_ptr(), self.data, len) };
        let normal: u32 = 0x1f80;
        let control = [0, 3, 1, 2].map(|rc: u32| rc << 13)[usize::from(env.guest.rounding)] | normal;
        let mut status = control;
        let enter = self.stubs.enter;
        env.page_base = CODE;
        // The runtime's functions reach guest memory through the environment.
        // SAFETY: `enter` is a C function of this signature; the gs base and MXCSR are what generated code
        // expects, and nothing else on this host uses the gs base.
        unsafe {
            DATA_PTR.set(self.data);
            CONTEXT_PTR.set(self.context);
            asm!("wrgsbase {}", in(reg) self.context);
            asm!("ldmxcsr [{}]", in(reg) &status);
            let enter: extern "C" fn(*mut Env, usize) = std::mem::transmute(enter);
            enter(env, code);
            asm!("stmxcsr [{}]", in(reg) &mut status);
            asm!("ldmxcsr [{}]", in(reg) &normal);
            std::ptr::copy_nonoverlapping(self.data, env.guest.data.as_mut_ptr(), len);
        }
        env.guest.flags |= riscv_flags(status);
        (ExitCode::from_raw(env.exit_code), env.pc)
    }
}

thread_local! {
    /// Times that the runtime was told of a jump.
    pub static JUMPS_NOTED: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
    static DATA_PTR: std::cell::Cell<*mut u8> = const { std::cell::Cell::new(std::ptr::null_mut()) };
    static CONTEXT_PTR: std::cell::Cell<*mut u8> = const { std::cell::Cell::new(std::ptr::null_mut()) };
}

impl Guest {
    pub fn new() -> Guest {
        Guest {
            slots: [0; SLOTS],
            reserve_addr: !0,
            reserve_value: 0,
            hot: [0; 16],
            data: vec![0; DATA_LEN as usize],
            flags: 0,
            rounding: 0,
            left_at: None,
        }
    }

    pub fn env(self) -> Env {
        Env {
            page_base: CODE,
            pc: 0,
            kick: 0,
            page_span: 4096,
            exit_request: 0,
            exit_code: !0,
            cur_insn: 0,
            vector_dead: 0xff,
            mxcsr: 0,
            host_mxcsr: 0x1f80,
            unit_va: 0,
            unit_buffer: [0; 96],
            heat: 1,
            divisors: Default::default(),
            guest: self,
            blocks: Vec::new(),
            dispatch: 0,
            links: 0,
            targets: Vec::new(),
        }
    }

    fn fp_op(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, abc: [u64; 3]) -> u64 {
        let mut status = FloatStatus::riscv(rounding(self.rounding));
        let op = RvFpOp::from_index(op as u8).expect("an operation");
        let fmt = match fmt {
            FpFmt::F32 => riscv::FpFmt::F32,
            FpFmt::F64 => riscv::FpFmt::F64,
        };
        let rm = match rm {
            Rm::NearestEven => riscv::Rm::NearestEven,
            Rm::ToZero => riscv::Rm::ToZero,
            Rm::Down => riscv::Rm::Down,
            Rm::Up => riscv::Rm::Up,
            Rm::NearestMaxMag => riscv::Rm::NearestMaxMag,
            Rm::Dynamic => riscv::Rm::Dynamic,
        };
        let result = riscv::exec(op, fmt, rm, abc[0], abc[1], abc[2], &mut status);
        self.flags |= (status.flags & FpFlags::ALL).bits();
        result
    }
}

fn rounding(n: u8) -> Rounding {
    [Rounding::NearestEven, Rounding::ToZero, Rounding::Down, Rounding::Up][usize::from(n)]
}

/// Result of the pure helper.
fn pure_result(a: [u64; 3]) -> u64 {
    a[0].wrapping_mul(3) ^ a[1].rotate_left(7) ^ a[2].wrapping_add(0x55)
}

/// The helper that may leave: changes a slot, and leaves for one argument in four.
fn may_exit(slots: &mut [u64; SLOTS], a: [u64; 3]) -> (u64, bool) {
    slots[10] = slots[10].wrapping_add(a[1]);
    slots[20] ^= a[2];
    slots[33] = slots[33].rotate_left(1) ^ slots[usize::from(FLAGS.0)];
    slots[usize::from(FLAGS.0)] ^= Flags::ALL.pack() & 0x4501;
    (pure_result(a), a[0] & 3 == 0)
}

fn in_data(va: u64, size: Size) -> Option<usize> {
    let off = va.wrapping_sub(if va < ALIAS { DATA } else { ALIAS });
    (off <= DATA_LEN - u64::from(size.bytes())).then_some(off as usize)
}

fn get(data: &[u8], at: usize, size: Size) -> u64 {
    let n = size.bytes() as usize;
    let mut raw = [0u8; 8];
    raw[..n].copy_from_slice(&data[at..at + n]);
    u64::from_le_bytes(raw)
}

fn put(data: &mut [u8], at: usize, size: Size, value: u64) {
    let n = size.bytes() as usize;
    data[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
}

/// What the interpreter and the slow paths share, over some guest memory.
struct Access<'a> {
    data: &'a mut [u8],
    reserve_addr: &'a mut u64,
    reserve_value: &'a mut u64,
}

impl Access<'_> {
    fn aligned(va: u64, size: Size) -> Result<usize, Fault> {
        if va & u64::from(size.bytes() - 1) != 0 {
            return Err(Fault);
        }
        in_data(va, size).ok_or(Fault)
    }

    fn load(&self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let at = in_data(va, size).ok_or(Fault)?;
        Ok(interp::extend(get(self.data, at, size), size, ext))
    }

    fn store(&mut self, va: u64, val: u64, size: Size) -> Result<(), Fault> {
        let at = in_data(va, size).ok_or(Fault)?;
        put(self.data, at, size, val);
        Ok(())
    }

    fn load_reserved(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let at = Self::aligned(va, size)?;
        let value = interp::extend(get(self.data, at, size), size, ext);
        (*self.reserve_addr, *self.reserve_value) = (va, value);
        Ok(value)
    }

    fn store_conditional(&mut self, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        let at = Self::aligned(va, size)?;
        let held = *self.reserve_addr == va
            && get(self.data, at, size) == interp::extend(*self.reserve_value, size, Ext::Zero);
        *self.reserve_addr = !0;
        if held {
            put(self.data, at, size, val);
        }
        Ok(u64::from(!held))
    }

    fn rmw(&mut self, va: u64, size: Size, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> {
        let at = in_data(va, size).ok_or(Fault)?;
        let old = get(self.data, at, size);
        put(self.data, at, size, new(old));
        Ok(old)
    }

    fn amo(&mut self, op: AmoOp, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        let at = Self::aligned(va, size)?;
        let old = get(self.data, at, size);
        put(self.data, at, size, interp::amo(op, size, old, val));
        Ok(interp::extend(old, size, Ext::Sign))
    }
}

/// The interpreter's side.
pub struct Oracle {
    pub guest: Guest,
    pub insn: (PagePc, u8),
    /// Condition flags whose values are open: by the manuals, by the block.
    pub undefined: Flags,
    pub dropped: Flags,
    pub code_align: u64,
}

impl Oracle {
    fn access(&mut self) -> Access<'_> {
        let g = &mut self.guest;
        Access { data: &mut g.data, reserve_addr: &mut g.reserve_addr, reserve_value: &mut g.reserve_value }
    }

    fn note<T>(&mut self, result: Result<T, Fault>) -> Result<T, Fault> {
        if result.is_err() {
            self.guest.left_at = Some(self.insn);
        }
        result
    }
}

impl InterpHost for Oracle {
    fn slot(&self, slot: Slot) -> u64 {
        self.guest.slots[usize::from(slot.0)]
    }
    fn set_slot(&mut self, slot: Slot, value: u64) {
        self.guest.slots[usize::from(slot.0)] = value;
    }
    fn page_base(&self) -> u64 {
        CODE
    }
    fn begin_insn(&mut self, pc: PagePc, len: u8) {
        self.insn = (pc, len);
    }
    fn load(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let result = self.access().load(va, size, ext);
        self.note(result)
    }
    fn store(&mut self, va: u64, val: u64, size: Size) -> Result<(), Fault> {
        let result = self.access().store(va, val, size);
        self.note(result)
    }
    fn load_reserved(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        let result = self.access().load_reserved(va, size, ext);
        self.note(result)
    }
    fn store_conditional(&mut self, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        let result = self.access().store_conditional(va, val, size);
        self.note(result)
    }
    fn amo(&mut self, op: AmoOp, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        let result = self.access().amo(op, va, val, size);
        self.note(result)
    }
    fn rmw(&mut self, va: u64, size: Size, _lock: bool, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> {
        let result = self.access().rmw(va, size, new);
        self.note(result)
    }
    fn flags_written(&mut self, written: Flags, undefined: Flags, dropped: Flags) {
        self.undefined = self.undefined.without(written).union(undefined);
        self.dropped = self.dropped.without(written).union(dropped);
    }
    fn code_align(&self) -> u64 {
        self.code_align
    }
    fn fence(&mut self) {}
    fn fp(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64) -> u64 {
        self.guest.fp_op(op, fmt, rm, [a, b, c])
    }
    /// Nothing here has the units: careful mode is to do it.
    fn unit(&mut self, _: &mimus_tcg_ir::unit::UnitInsn, _: Option<Slot>, _: Val, _: u64) -> Result<bool, Fault> {
        Ok(false)
    }
    fn env_byte(&self, off: i32) -> u8 {
        self.guest.hot[off as usize]
    }
    fn set_env_byte(&mut self, off: i32, val: u8) {
        self.guest.hot[off as usize] = val;
    }
    fn call(&mut self, helper: u16, args: [u64; 3]) -> (u64, CallOutcome) {
        if helper == 0 {
            return (pure_result(args), CallOutcome::Continue);
        }
        if helper == HELPER_FP_FLAGS {
            let old = self.guest.flags;
            if args[0] != 0 {
                self.guest.flags = args[1] as u8 & 31;
            }
            return (old.into(), CallOutcome::Continue);
        }
        let (result, leave) = may_exit(&mut self.guest.slots, args);
        if leave {
            self.guest.left_at = Some(self.insn);
            return (result, CallOutcome::Leave);
        }
        (result, CallOutcome::Continue)
    }
}

/// The environment that generated code passed.
///
/// # Safety
/// `env` is the one `Machine::run` was given, which nothing else uses while code runs.
unsafe fn env_of<'a>(env: *mut Env) -> &'a mut Env {
    // SAFETY: as the caller promises.
    unsafe { &mut *env }
}

impl Env {
    fn slow<T>(&mut self, ret: u64, f: impl FnOnce(&mut Access<'_>) -> Result<T, Fault>) -> Option<T> {
        // SAFETY: the data pages' mapping, of this thread only.
        let data = unsafe { std::slice::from_raw_parts_mut(DATA_PTR.get(), DATA_LEN as usize) };
        let mut access =
            Access { data, reserve_addr: &mut self.guest.reserve_addr, reserve_value: &mut self.guest.reserve_value };
        match f(&mut access) {
            Ok(value) => Some(value),
            Err(Fault) => {
                let (at, info) = self.block_of(ret);
                let entry = info.faults.iter().find(|e| at + u64::from(e.host) == ret);
                let entry = entry.expect("a side-table entry for the return address");
                self.guest.left_at = Some((entry.pc, entry.len));
                self.leave();
                None
            }
        }
    }

    /// The block that a return address is in.
    fn block_of(&self, ret: u64) -> (u64, &Emitted) {
        let found = self.blocks.iter().filter(|b| b.0 <= ret).max_by_key(|b| b.0);
        found.map(|(at, info)| (*at, info)).expect("a block")
    }

    fn leave(&mut self) {
        self.exit_request = 1;
        self.pc = TRAP;
    }
}

fn size_of_log2(n: u32) -> Size {
    [Size::B1, Size::B2, Size::B4, Size::B8][n as usize]
}

fn ext_of(n: u32) -> Ext {
    [Ext::Zero, Ext::Sign, Ext::Ones][n as usize]
}

/// An access that is not made by `load` or `store` missed its range entry.
extern "C" fn note(_: *mut Env, va: u64, desc: u32) {
    if let Some(number) = ContextLayout::jump_of_word(desc) {
        let at = ContextLayout::STANDARD.jumps as usize + number as usize * ContextLayout::JUMP_BYTES;
        // SAFETY: an entry in the context's mapping, which only this thread uses.
        unsafe { CONTEXT_PTR.get().add(at + ContextLayout::JUMP_PATIENCE).cast::<u32>().write(1) };
        JUMPS_NOTED.set(JUMPS_NOTED.get() + 1);
        return clobber();
    }
    let number = (desc >> RANGE_SHIFT).wrapping_sub(1);
    fill_range(va, desc, if ContextLayout::range_is_write(number) { 2 } else { 3 });
    clobber();
}

/// After an access that missed its range entry, if it has one: makes it the first `pages` of guest memory.
fn fill_range(va: u64, desc: u32, pages: u64) {
    let size = u64::from(size_of_log2(desc & 0xff).bytes());
    let limit = pages * 4096 - size + 1;
    let Some(number) = (desc >> RANGE_SHIFT).checked_sub(1).filter(|_| va.wrapping_sub(DATA) < limit) else { return };
    let at = ContextLayout::STANDARD.ranges as usize + number as usize * ContextLayout::RANGE_BYTES;
    // SAFETY: an entry in the context's mapping, which only this thread uses.
    unsafe {
        let entry = CONTEXT_PTR.get().add(at).cast::<[u64; 5]>();
        let addend = (DATA_PTR.get() as u64).wrapping_sub(DATA);
        // Every other miss is to be told.
        entry.byte_add(ContextLayout::RANGE_PATIENCE).cast::<u32>().write(1);
        if ContextLayout::range_has_parts(number) {
            // All of it is one part or the other, and the other leads nowhere.
            let limit = pages * 4096 / size;
            let parts = if va & 8 == 0 { [addend, !0, !0] } else { [!0, DATA, addend] };
            entry.write([DATA, limit, parts[0], parts[1], parts[2]]);
        } else {
            entry.write([DATA, limit, addend, 0, 0]);
        }
    }
}

/// Overwrites the registers that a C function may, as compiled ones seldom all do.
fn clobber() {
    // SAFETY: declared clobbers only.
    unsafe {
        asm!("mov rcx, -1", "mov rdx, -2", "mov rsi, -3", "mov rdi, -4", "mov r8, -5", "mov r9, -6",
             "mov r10, -7", "mov r11, -8", "vpcmpeqd xmm0, xmm0, xmm0", "vmovaps xmm1, xmm0", "vmovaps xmm2, xmm0",
             out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r9") _, out("r10") _,
             out("r11") _, out("xmm0") _, out("xmm1") _, out("xmm2") _);
    }
}

extern "C" fn load(env: *mut Env, va: u64, desc: u32, ret: u64) -> u64 {
    // SAFETY: called by generated code with its environment.
    let env = unsafe { env_of(env) };
    let size = size_of_log2(desc & 0xff);
    let value = env.slow(ret, |a| a.load(va, size, ext_of(desc >> 8 & 0xff)));
    fill_range(va, desc, 3);
    clobber();
    value.unwrap_or(0xbad)
}

extern "C" fn store(env: *mut Env, va: u64, value: u64, desc: u32, ret: u64) {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    env.slow(ret, |a| a.store(va, value, size_of_log2(desc & 0xff)));
    fill_range(va, desc, 2);
    clobber();
}

extern "C" fn atomic(env: *mut Env, va: u64, desc: u32, value: u64, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let size = size_of_log2(desc & 0xff);
    let before = Flags::unpack(env.guest.slots[usize::from(FLAGS.0)]);
    let result = env.slow(ret, |a| match desc >> 16 {
        ATOMIC_LOAD_RESERVED => a.load_reserved(va, size, ext_of(desc >> 8 & 0xff)),
        ATOMIC_STORE_CONDITIONAL => a.store_conditional(va, value, size),
        kind => {
            if let Some(op) = rmw_of_kind(kind & 0xff) {
                return a.rmw(va, size, &mut |memory| rmw_eval(op, size, memory, value, before).0);
            }
            use AmoOp::*;
            let op = [Swap, Add, Xor, And, Or, MinS, MaxS, MinU, MaxU][kind as usize];
            a.amo(op, va, value, size)
        }
    });
    if let (Some(op), Some(old)) = (rmw_of_kind(desc >> 16 & 0xff), result) {
        env.guest.slots[usize::from(FLAGS.0)] =
            if op == RmwOp::Swap { before.pack() } else { rmw_eval(op, size, old, value, before).1.pack() };
    }
    clobber();
    result.unwrap_or(0xbad)
}

extern "C" fn access(env: *mut Env, va: u64, word: u32, rax: u64, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let (bytes, write, _) = compact_access_of(word);
    let (at, info) = env.block_of(ret);
    let entry = *info.faults.iter().find(|e| at + u64::from(e.host) == ret).expect("a side-table entry");
    let slots = env.guest.slots;
    if let Some(recipe) = info.recipes.get(usize::from(entry.recipe)) {
        let flags = recipe.flags(|slot| slots[usize::from(slot.0)]);
        env.guest.slots[usize::from(FLAGS.0)] = flags.pack();
    }
    if bytes == 0 {
        clobber();
        return env.page_base.wrapping_add_signed(entry.pc.0.into());
    }
    let size = size_of_log2(bytes.ilog2());
    let value = match entry.stored {
        Stored::Unknown => None,
        Stored::Scratch => Some(rax),
        Stored::Slot(slot) => Some(slots[usize::from(slot.0)]),
        Stored::Imm(imm) => Some(imm as u64),
    };
    let host = match (write, value) {
        (false, _) => env.slow(ret, |a| a.load(va, size, Ext::Zero)).map(|value| {
            env.unit_buffer[..8].copy_from_slice(&value.to_le_bytes());
            env.unit_buffer.as_ptr() as u64
        }),
        (true, Some(value)) => {
            let stored = env.slow(ret, |a| a.store(va, value, size));
            stored.map(|()| env.unit_buffer.as_ptr() as u64)
        }
        // The code stores itself: guest memory is in one piece here.
        (true, None) => env.slow(ret, |_| in_data(va, size).ok_or(Fault)).map(|at| DATA_PTR.get() as u64 + at as u64),
    };
    clobber();
    host.unwrap_or(0xbad)
}

extern "C" fn warm(env: *mut Env, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let (at, _) = env.block_of(ret);
    assert!(ret - at < 32, "at a block's beginning");
    env.heat = 1;
    clobber();
    ret
}

fn rmw_eval(op: RmwOp, size: Size, memory: u64, src: u64, before: Flags) -> (u64, Flags) {
    match op {
        RmwOp::Swap => (src, before),
        RmwOp::F(op) => {
            let (value, flags) = flags::eval(op, size, memory, src, before);
            (value.unwrap_or(memory), flags)
        }
    }
}

extern "C" fn cmpxchg(env: *mut Env, va: u64, size: u32, expected: u64, new: u64, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let size = size_of_log2(size);
    let expected = interp::extend(expected, size, Ext::Zero);
    let result = env.slow(ret, |a| a.rmw(va, size, &mut |old| if old == expected { new } else { old }));
    clobber();
    result.unwrap_or(0xbad)
}

extern "C" fn fp(env: *mut Env, packed: u64) {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let [op, fmt, rm, d, a, b, c, _] = packed.to_le_bytes();
    let fmt = [FpFmt::F32, FpFmt::F64][usize::from(fmt)];
    let rm = [Rm::NearestEven, Rm::ToZero, Rm::Down, Rm::Up, Rm::NearestMaxMag, Rm::Dynamic][usize::from(rm)];
    let op = super::random::FP_OPS[usize::from(op)];
    let abc = [a, b, c].map(|s| env.guest.slots[usize::from(s)]);
    env.guest.slots[usize::from(d)] = env.guest.fp_op(op, fmt, rm, abc);
    clobber();
}

extern "C" fn link(env: *mut Env, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    env.links += 1;
    let (block_at, info) = env.block_of(ret);
    let site = *info.sites.iter().find(|s| block_at + u64::from(s.return_offset) == ret).expect("a site");
    env.pc = env.page_base.wrapping_add(site.to.0 as i64 as u64);
    clobber();
    let Some(&(_, target, table)) = env.targets.iter().find(|t| t.0 == env.pc) else {
        return env.dispatch as u64;
    };
    let field = block_at + u64::from(site.patch);
    assert_eq!(field & 3, 0, "alignment of a patched field");
    // SAFETY: fields of the block being executed, in a mapping that is writable too.
    unsafe {
        (field as *mut u32).write((target as u64).wrapping_sub(field + 4) as u32);
        if site.guard == u32::MAX {
            assert_eq!(table, 0, "a link within the page");
        } else {
            let guard = (block_at + u64::from(site.guard)) as *mut u32;
            assert!(guard.is_aligned());
            guard.write(table);
            env.page_base = env.pc & !0xfff;
        }
    }
    target as u64
}

extern "C" fn helper_pure(_env: *mut Env, a: u64, b: u64, c: u64) -> u64 {
    clobber();
    pure_result([a, b, c])
}

extern "C" fn helper_fp_flags(env: *mut Env, write: u64, value: u64, _: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let mut control = 0u32;
    // SAFETY: both are on four bytes of `control`; every exception stays masked.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut control) };
    let old = env.guest.flags | riscv_flags(control);
    if write != 0 {
        env.guest.flags = value as u8 & 31;
        control &= !0x3f;
        // SAFETY: as above.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &control) };
    }
    clobber();
    old.into()
}

/// IE, ZE, OE, UE, PE of MXCSR as NV, DZ, OF, UF, NX.
fn riscv_flags(mxcsr: u32) -> u8 {
    [(0, 16), (2, 8), (3, 4), (4, 2), (5, 1)]
        .iter()
        .map(|(from, to)| if mxcsr >> from & 1 != 0 { *to } else { 0 })
        .sum()
}

extern "C" fn helper_may_exit(env: *mut Env, a: u64, b: u64, c: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let (result, leave) = may_exit(&mut env.guest.slots, [a, b, c]);
    if leave {
        env.guest.left_at = Some(unpack_insn(env.cur_insn));
        env.leave();
    }
    clobber();
    result
}
