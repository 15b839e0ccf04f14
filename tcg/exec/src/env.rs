//! The vCPU's environment: what generated code, helpers and the runtime share.
#![allow(unsafe_code)]

use std::cell::{Cell, UnsafeCell};
use std::collections::HashMap;
use std::mem::offset_of;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mimus_core::accel::{CpuIo, RemoteFence, VcpuExit, VcpuIndex};
use mimus_core::memory::FlatView;
use mimus_tcg_ir::backend::{DIVISORS, Divisor, EnvLayout};
use mimus_tcg_ir::{Block, SLOTS, Slot};

use crate::access::RamWindow;
use crate::code::PageKey;
use crate::engine::Machine;
use crate::frontend::{Access, GuestFrontend, Helper, MemFault};
use crate::hostfp;
use crate::mmu::Mmu;

/// `run` is to return to the run loop.
pub(crate) const KICK_LEAVE: u32 = 1;
/// A pin or the memory map changed.
pub(crate) const KICK_EVENT: u32 = 2;
/// The vCPU halted itself.
pub(crate) const KICK_HALT: u32 = 4;
/// The code cache is full.
pub(crate) const KICK_FULL: u32 = 8;
/// The vCPU asked for its own events to be looked at.
pub(crate) const KICK_SELF: u32 = 16;
/// A request is in the mailbox.
pub(crate) const KICK_REQUEST: u32 = 32;

/// Places in which compact blocks count how often they begin: as many as are in use at a time, if they can be.
pub(crate) const HEATS: usize = 1 << 16;

/// Entry tables of pages of code that a vCPU remembers.
const CODE_TABLES: usize = 512;

/// The part of the environment that is the same for every guest.
#[repr(C)]
pub struct EnvHead {
    /// Virtual address of the page the running block began in. Valid while generated code runs.
    pub page_base: u64,
    /// Non-zero: leave generated code at the next check.
    pub(crate) kick: AtomicU32,
    /// Set by helpers and runtime functions to abandon the block and go on at `pc`.
    pub exit_request: u32,
    /// Guest registers and temporaries.
    pub slots: [u64; SLOTS],
    /// The guest's program counter.
    pub pc: u64,
    pub(crate) exit_code: u32,
    /// See `mimus_tcg_ir::backend::pack_insn`.
    pub(crate) cur_insn: u32,
    /// Address reserved by a load-reserved; all ones if none.
    pub reserve_addr: u64,
    /// Value it loaded.
    pub reserve_value: u64,
    /// See `count`: instructions that may still be executed.
    pub(crate) budget: Cell<i32>,
    /// See `count`.
    pub(crate) count_left: u32,
    /// See `tracing`: host addresses in the trace's buffer.
    pub(crate) trace_next: u64,
    pub(crate) trace_limit: u64,
    /// Page of the stretch traced last.
    pub(crate) trace_page: u64,
    /// See `EnvLayout::vector_dead`, and what follows it there.
    pub(crate) vector_dead: u8,
    pub(crate) mxcsr: u32,
    pub(crate) host_mxcsr: u32,
    /// Where `unit_probe` was asked about.
    pub(crate) unit_va: u64,
    pub(crate) unit_buffer: UnitBuffer,
    /// See `jumps`.
    pub(crate) jumps: crate::jumps::Jumps,
    /// How often compact blocks may still begin until one is asked about.
    pub(crate) heat: [u16; HEATS],
    pub(crate) divisors: [Divisor; DIVISORS],
    /// See `EnvLayout::page_span`. Set after the kick word, and reset before it is.
    pub(crate) page_span: AtomicU64,
}

impl EnvHead {
    /// Has generated code left.
    pub(crate) fn ask(&self, bits: u32) {
        self.kick.fetch_or(bits, Ordering::SeqCst);
        self.page_span.store(0, Ordering::SeqCst);
    }

    /// What has been asked, which is forgotten. Who asks meanwhile is found again: their word is set before the span is, and the
    /// span is reset before the word. (It may stay 0 until the next that asks: jumps take longer then.)
    pub(crate) fn take_asked(&self) -> u32 {
        self.page_span.store(4096, Ordering::SeqCst);
        self.kick.swap(0, Ordering::SeqCst)
    }
}

/// See `EnvLayout::unit_buffer`.
#[repr(C, align(32))]
pub(crate) struct UnitBuffer(pub [u8; 96]);

/// What other threads see of a vCPU.
pub(crate) struct Mailbox {
    pub index: VcpuIndex,
    /// Levels of the interrupt pins, as the frontend numbers them.
    pub pins: AtomicU64,
    /// The vCPU may be executing guest code, or hold what it read from its contexts.
    pub in_guest: AtomicBool,
    /// It sees the alternate memory.
    pub alternate: AtomicBool,
    /// Requests, and whether there are any.
    requests: Mutex<Vec<Request>>,
    /// Times that it was found in generated code (see `sampling`).
    pub samples: AtomicU32,
    pending: AtomicBool,
}

/// What one vCPU asks of another (see [`Cpu::process_requests`]).
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// Withdraw store permission from host pages: those from an address on that have a bit set.
    RevokeWrite(u64, u64),
    /// Forget every translation.
    FlushAll,
    Fence(RemoteFence),
}

impl Mailbox {
    pub fn new(index: VcpuIndex) -> Mailbox {
        Mailbox {
            index,
            pins: AtomicU64::new(0),
            in_guest: AtomicBool::new(false),
            alternate: AtomicBool::new(false),
            requests: Mutex::new(Vec::new()),
            samples: AtomicU32::new(0),
            pending: AtomicBool::new(false),
        }
    }

    fn post(&self, request: Request) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        self.pending.store(true, Ordering::SeqCst);
    }

    fn take(&self) -> Vec<Request> {
        if !self.pending.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A vCPU under the translator.
#[repr(C)]
pub struct Cpu<F: GuestFrontend> {
    pub head: EnvHead,
    /// The frontend's own.
    pub guest: F::State,
    /// Cached translations.
    pub mmu: Mmu,
    pub(crate) machine: Arc<Machine<F>>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) view: Arc<FlatView>,
    pub(crate) view_generation: u64,
    /// `view` is the alternate memory's.
    pub(crate) alternate: bool,
    pub(crate) ram_window: Cell<RamWindow>,
    /// Host pages of code with a physical address that leads there, by the host address; to be verified.
    pub(crate) code_places: [(u64, u64); 16],
    /// Entry tables of pages of code entered of late, until the code cache is emptied.
    pub(crate) code_tables: Box<[(PageKey, u32); CODE_TABLES]>,
    /// `None` while in use.
    pub(crate) scratch: Option<Box<crate::translate::Scratch>>,
    /// Blocks by the address of their (unused) code, when the interpreter runs everything.
    pub(crate) interp_blocks: HashMap<usize, Rc<Block>>,
    /// A store withdrew code.
    pub(crate) code_changed: bool,
    /// The instruction at this address is to be executed by itself.
    pub(crate) step_at: Option<u64>,
    /// Waits for an interrupt.
    pub halted: bool,
    pub(crate) debug: crate::debug::DebugState,
    pub(crate) counting: crate::count::Counting,
    pub(crate) tracing: Option<Box<crate::tracing::VcpuTrace>>,
    /// The virtual clock when it was looked at last for the trace.
    pub(crate) last_time: u64,
    pub(crate) recent: crate::recent::Recent,
    pub(crate) samples: crate::sampling::Samples,
    pub(crate) gathering: crate::gather::Gathering,
    /// Generated code runs.
    pub(crate) in_generated: bool,
    /// A trap to take once generated code has been left: `head.pc` is its instruction's.
    pub(crate) fault_later: Option<(u64, Access, MemFault)>,
    /// Why `run` is to return.
    pub(crate) stopped: Option<VcpuExit>,
    /// The guest is another engine's, which has this vCPU execute single instructions.
    pub(crate) lent: Option<Box<crate::lent::Lent>>,
    /// Valid while `running`.
    io: Option<NonNull<dyn CpuIo>>,
    running: bool,
}

// SAFETY: what is not Send is `io`, which is set and used by the thread inside `run` only, the `Rc`s of
// `interp_blocks`, which never leave this value, and `ram_window`, whose block `view` keeps alive.
unsafe impl<F: GuestFrontend> Send for Cpu<F> {}

impl<F: GuestFrontend> Cpu<F> {
    /// A vCPU of `machine`.
    ///
    /// # Errors
    /// The host has no address space left.
    pub(crate) fn new(machine: Arc<Machine<F>>, mailbox: Arc<Mailbox>, guest: F::State) -> std::io::Result<Cpu<F>> {
        let view = machine.memory.view();
        let counting = crate::count::Counting::new(machine.instrumentation().count);
        Ok(Cpu {
            head: EnvHead {
                page_base: 0,
                kick: AtomicU32::new(0),
                exit_request: 0,
                slots: [0; SLOTS],
                pc: 0,
                exit_code: 0,
                cur_insn: 0,
                reserve_addr: !0,
                reserve_value: 0,
                budget: Cell::new(0),
                count_left: 0,
                trace_next: 0,
                trace_limit: 0,
                trace_page: 0,
                vector_dead: 0xff,
                mxcsr: 0,
                host_mxcsr: hostfp::HOST_DEFAULT,
                unit_va: 0,
                unit_buffer: UnitBuffer([0; 96]),
                jumps: Default::default(),
                heat: [crate::runtime::HEAT; HEATS],
                divisors: Default::default(),
                page_span: AtomicU64::new(4096),
            },
            guest,
            mmu: Mmu::new(!0)?,
            machine,
            mailbox,
            view,
            view_generation: 0,
            alternate: false,
            ram_window: Cell::new(RamWindow::NONE),
            code_places: [(0, 0); 16],
            code_tables: Box::new([(PageKey::new(0, 0), 0); CODE_TABLES]),
            scratch: None,
            interp_blocks: HashMap::new(),
            code_changed: false,
            step_at: None,
            halted: false,
            debug: Default::default(),
            counting,
            tracing: None,
            last_time: 0,
            recent: Default::default(),
            samples: Default::default(),
            gathering: Default::default(),
            in_generated: false,
            fault_later: None,
            stopped: None,
            lent: None,
            io: None,
            running: false,
        })
    }

    /// Where generated code finds things.
    pub(crate) fn layout() -> EnvLayout {
        let head = offset_of!(Cpu<F>, head);
        let at = |offset: usize| (head + offset) as i32;
        EnvLayout {
            slots: at(offset_of!(EnvHead, slots)),
            page_base: at(offset_of!(EnvHead, page_base)),
            pc: at(offset_of!(EnvHead, pc)),
            kick: at(offset_of!(EnvHead, kick)),
            page_span: at(offset_of!(EnvHead, page_span)),
            exit_request: at(offset_of!(EnvHead, exit_request)),
            exit_code: at(offset_of!(EnvHead, exit_code)),
            cur_insn: at(offset_of!(EnvHead, cur_insn)),
            reserve_addr: at(offset_of!(EnvHead, reserve_addr)),
            reserve_value: at(offset_of!(EnvHead, reserve_value)),
            vector_dead: at(offset_of!(EnvHead, vector_dead)),
            mxcsr: at(offset_of!(EnvHead, mxcsr)),
            host_mxcsr: at(offset_of!(EnvHead, host_mxcsr)),
            unit_va: at(offset_of!(EnvHead, unit_va)),
            unit_buffer: at(offset_of!(EnvHead, unit_buffer)),
            guest: offset_of!(Cpu<F>, guest) as i32,
            budget: at(offset_of!(EnvHead, budget)),
            count_left: at(offset_of!(EnvHead, count_left)),
            trace_next: at(offset_of!(EnvHead, trace_next)),
            trace_limit: at(offset_of!(EnvHead, trace_limit)),
            trace_page: at(offset_of!(EnvHead, trace_page)),
            jumps: at(offset_of!(EnvHead, jumps.places)),
            jumps_at: at(offset_of!(EnvHead, jumps.at)),
            heat: at(offset_of!(EnvHead, heat)),
            heats: HEATS as u32,
            divisors: at(offset_of!(EnvHead, divisors)),
        }
    }

    /// This vCPU's number.
    pub fn index(&self) -> VcpuIndex {
        self.mailbox.index
    }

    /// A slot's value.
    pub fn slot(&self, slot: Slot) -> u64 {
        self.head.slots[slot.0 as usize]
    }

    /// Sets a slot.
    pub fn set_slot(&mut self, slot: Slot, value: u64) {
        self.head.slots[slot.0 as usize] = value;
    }

    /// Levels of the interrupt pins, as numbered by `GuestFrontend::pin_bit`.
    pub fn pins(&self) -> u64 {
        self.mailbox.pins.load(Ordering::SeqCst)
    }

    /// Clears and then sets pins from the vCPU's own thread: those that guest software can change, and the
    /// timer pins, which the machine raises and the vCPU lowers.
    pub fn change_pins(&mut self, clear: u64, set: u64) {
        if clear != 0 {
            self.mailbox.pins.fetch_and(!clear, Ordering::SeqCst);
        }
        if set != 0 {
            self.mailbox.pins.fetch_or(set, Ordering::SeqCst);
            self.check_events();
        }
    }

    /// For a helper that has also called [`Cpu::jump`]: `run` returns to the run loop.
    pub fn leave_run_loop(&mut self) {
        self.head.ask(KICK_LEAVE);
    }

    /// `run` returns with `exit` before another guest instruction; for a helper that has also called [`Cpu::jump`].
    pub fn stop(&mut self, exit: VcpuExit) {
        self.stopped = Some(exit);
        self.head.ask(KICK_LEAVE);
    }

    /// For helpers: virtual address of the instruction that called, and its length in bytes.
    pub fn current_insn(&self) -> (u64, u8) {
        let (pc, len) = mimus_tcg_ir::backend::unpack_insn(self.head.cur_insn);
        (self.head.page_base.wrapping_add_signed(i64::from(pc.0)), len)
    }

    /// For helpers of kind `MayExit`: leave the block and go on at `pc`.
    pub fn jump(&mut self, pc: u64) {
        self.head.pc = pc;
        self.abandon();
    }

    /// For helpers of kind `MayExit` that have set `head.pc`: leave the block.
    pub fn abandon(&mut self) {
        self.head.exit_request = 1;
        self.give_back(false);
    }

    /// Have interrupts (and `halted`) looked at before the next guest instruction that can be: after
    /// something was unmasked, say. With [`Cpu::jump`], before the very next.
    pub fn check_events(&mut self) {
        self.head.ask(KICK_SELF);
    }

    /// Halts until [`GuestFrontend::wakes`]; for a helper that has also called [`Cpu::jump`].
    pub fn halt(&mut self) {
        self.halted = true;
        self.head.ask(KICK_HALT);
    }

    /// Makes the context of the current address space current.
    pub fn switch_context(&mut self) {
        let key = F::context_key(self);
        let base = self.mmu.switch(key);
        if self.running {
            set_gs_base(base);
        }
        self.trace_space();
    }

    /// Calls out to the machine, with the host's floating-point control word. `None` outside `run`.
    pub fn io<R>(&self, f: impl FnOnce(&dyn CpuIo) -> R) -> Option<R> {
        let io = self.io?;
        // SAFETY: set from a reference that outlives `run`, and cleared before `run` returns.
        let io = unsafe { io.as_ref() };
        if !self.counting.on {
            return Some(hostfp::with_host(|| f(io)));
        }
        self.sync_clock(io);
        let result = hostfp::with_host(|| f(io));
        self.look_at_deadline(io);
        Some(result)
    }

    /// Calls out to the machine for something that may wait for other vCPUs (a firmware call): meanwhile
    /// this vCPU counts as outside guest code. The helper leaves the block afterwards.
    pub fn io_outside_guest<R>(&mut self, f: impl FnOnce(&dyn CpuIo) -> R) -> Option<R> {
        self.mailbox.in_guest.store(false, Ordering::SeqCst);
        let result = self.io(f);
        self.mailbox.in_guest.store(true, Ordering::SeqCst);
        // What was posted meanwhile is done before guest code goes on.
        self.process_requests();
        self.head.exit_request = 1;
        result
    }

    /// Does what other vCPUs asked for, and takes a new memory map if there is one.
    pub(crate) fn process_requests(&mut self) {
        for request in self.mailbox.clone().take() {
            match request {
                Request::RevokeWrite(host, pages) => self.mmu.revoke_write(host, pages),
                Request::FlushAll => {
                    self.mmu.flush_all();
                    self.code_tables.fill((PageKey::new(0, 0), 0));
                    // They are known by where their code was.
                    self.interp_blocks.clear();
                }
                Request::Fence(fence) => F::remote_fence(self, fence),
            }
        }
        self.refresh_view(false);
    }

    /// Takes new views of memory, if there are any or another is wanted.
    pub(crate) fn refresh_view(&mut self, other: bool) {
        let machine = &self.machine;
        let generation = machine.memory_generation();
        let stale = generation != self.view_generation;
        if stale || other {
            self.view_generation = generation;
            let alternate = if self.alternate { machine.alternate.view() } else { None };
            self.view = alternate.unwrap_or_else(|| machine.memory.view());
            self.ram_window.set(RamWindow::NONE);
        }
        if stale {
            self.mmu.flush_all();
        }
    }

    /// Whether the machine has memory for [`Cpu::use_alternate_memory`].
    pub fn has_alternate_memory(&self) -> bool {
        F::ALTERNATE_MEMORY && self.machine.alternate.view().is_some()
    }

    /// Announces that the alternate memory will be used; false if something from outside has the vCPU leave first.
    pub fn announce_alternate_memory(&mut self) -> bool {
        self.mailbox.alternate.store(true, Ordering::SeqCst);
        let leaves = self.head.kick.load(Ordering::SeqCst) & KICK_LEAVE != 0;
        self.mailbox.alternate.store(!leaves, Ordering::SeqCst);
        !leaves
    }

    /// Accesses from now on see the alternate memory, or no longer. Part of what
    /// [`GuestFrontend::context_key`] depends on; generated code is left before anything else is accessed.
    pub fn use_alternate_memory(&mut self, on: bool) {
        if self.alternate != on {
            self.alternate = on;
            self.mailbox.alternate.store(on, Ordering::SeqCst);
            self.refresh_view(true);
        }
    }

    /// Prepares to run guest code on this thread, does so with `f`, and puts the thread's state back.
    pub(crate) fn with_io<R>(&mut self, io: &dyn CpuIo, f: impl FnOnce(&mut Self) -> R) -> R {
        // SAFETY: only extends the reference's lifetime; `io` is cleared before this function returns.
        let io: NonNull<dyn CpuIo> = unsafe { std::mem::transmute(NonNull::from(io)) };
        self.io = Some(io);
        self.running = true;
        let host_fp = hostfp::read();
        hostfp::write(hostfp::HOST_DEFAULT);
        F::enter_run(self);
        self.switch_context();
        let result = f(self);
        F::leave_run(self);
        hostfp::write(host_fp);
        self.running = false;
        self.io = None;
        result
    }

    /// A byte of the frontend's hot state, for the interpreter.
    pub(crate) fn hot_byte(&self, offset: i32) -> u8 {
        assert!((offset as usize) < size_of::<F::State>());
        // SAFETY: inside the state; frontends let generated code touch only plain bytes there.
        unsafe { std::ptr::from_ref(&self.guest).cast::<u8>().add(offset as usize).read() }
    }

    /// Sets a byte of the frontend's hot state, for the interpreter.
    pub(crate) fn set_hot_byte(&mut self, offset: i32, value: u8) {
        assert!((offset as usize) < size_of::<F::State>());
        // SAFETY: as in `hot_byte`.
        unsafe { std::ptr::from_mut(&mut self.guest).cast::<u8>().add(offset as usize).write(value) };
    }

    /// Whether the vCPU is inside `run`, its floating-point flags and mode in the host's control word.
    pub fn is_running(&self) -> bool {
        self.running
    }
}

/// Loads the GS base, which generated code finds the current context by.
fn set_gs_base(base: u64) {
    // SAFETY: the engine checked for FSGSBASE; nothing else in the process uses GS.
    unsafe { std::arch::asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags)) };
}

/// A vCPU in memory that its handles keep alive: they write its kick word.
pub(crate) struct CpuCell<F: GuestFrontend>(UnsafeCell<Cpu<F>>);

// SAFETY: the contents are used by the owning `Vcpu` (which is not shared) alone, but for `kick`, an atomic.
unsafe impl<F: GuestFrontend> Sync for CpuCell<F> {}

impl<F: GuestFrontend> CpuCell<F> {
    pub fn new(cpu: Cpu<F>) -> Arc<CpuCell<F>> {
        Arc::new(CpuCell(UnsafeCell::new(cpu)))
    }

    /// The vCPU, for generated code and for its owner.
    pub fn as_ptr(&self) -> *mut Cpu<F> {
        self.0.get()
    }

    /// Makes the vCPU leave generated code.
    pub fn kick(&self, bits: u32) {
        let head = self.0.get();
        // As `EnvHead::ask`.
        // SAFETY: only the atomics are touched, through raw pointer projections.
        unsafe {
            (*std::ptr::addr_of!((*head).head.kick)).fetch_or(bits, Ordering::SeqCst);
            (*std::ptr::addr_of!((*head).head.page_span)).store(0, Ordering::SeqCst);
        }
    }
}

/// A vCPU as other vCPUs and the machine reach it.
pub(crate) struct Peer<F: GuestFrontend> {
    pub mailbox: Arc<Mailbox>,
    pub cell: Arc<CpuCell<F>>,
}

impl<F: GuestFrontend> Peer<F> {
    /// Posts a request; it is done before the vCPU next enters guest code.
    pub fn post(&self, request: Request) {
        self.mailbox.post(request);
        self.cell.kick(KICK_REQUEST);
    }

    /// Waits until the vCPU is not in guest code that it entered before an earlier [`Peer::post`].
    pub fn wait_outside(&self) {
        let mut spins = 0u32;
        while self.mailbox.pending.load(Ordering::SeqCst) && self.mailbox.in_guest.load(Ordering::SeqCst) {
            spins += 1;
            if spins < 100 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl<F: GuestFrontend> Helper<F> {
    /// A helper from a function item (not a closure that captures).
    pub fn new<H>(name: &'static str, call: fn(&mut Cpu<F>, u64, u64, u64) -> u64, item: H) -> Helper<F>
    where
        H: Fn(&mut Cpu<F>, u64, u64, u64) -> u64 + Copy + 'static,
    {
        const { assert!(size_of::<H>() == 0, "a helper is a plain function") };
        let _ = item;
        Helper { call, entry: shim::<F, H> as *const () as usize, name }
    }
}

/// The C entry of helper `H`.
extern "C" fn shim<F, H>(cpu: *mut Cpu<F>, a: u64, b: u64, c: u64) -> u64
where
    F: GuestFrontend,
    H: Fn(&mut Cpu<F>, u64, u64, u64) -> u64 + Copy + 'static,
{
    // SAFETY: H is a zero-sized function item (checked in `Helper::new`, which was given a value of it).
    let h: H = unsafe { NonNull::<H>::dangling().read() };
    // SAFETY: generated code passes its environment, which nothing else borrows while it runs.
    h(unsafe { &mut *cpu }, a, b, c)
}
