//! The translator's share of a virtual machine: code store, host backend, the list of vCPUs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use mimus_core::accel::{Names, TraceKinds, TraceSink, Tracer};
use mimus_core::memory::{AddressSpace, CodeWriteListener, FlatView, MemoryListener, RamBlock};
use mimus_tcg_ir::Block;
use mimus_tcg_ir::backend::{BackendConfig, ContextLayout, Emitted, HostBackend, Optimise, Stubs};

use crate::code::CodeStore;
use crate::code::mapping::CodeMapping;
use crate::env::{Cpu, KICK_EVENT, Peer, Request};
use crate::frontend::{GuestFrontend, Helper};
use crate::instrument::{Instrumentation, Trace};
use crate::perf::PerfMap;
use crate::runtime;

/// Bytes of address space for translated code unless `tb-size` says otherwise.
const DEFAULT_CODE: usize = 192 << 20;
/// Bytes of code for each entry table there is room for. A page of guest code makes about twice as much, so
/// that the code is full first.
const CODE_PER_TABLE: usize = 8 << 10;
/// Bytes at the start of the code that the backend's stubs may take.
const STUBS: usize = 16 << 10;

/// A [`HostBackend`] as a trait object: called once per block, not per instruction.
pub(crate) trait Emitter: Send + Sync {
    fn emit(&self, block: &Block, at: usize, entry_guard: Option<u32>, out: &mut Vec<u8>, info: &mut Emitted);
    fn link_word(&self, field: usize, target: usize) -> u32;
    fn disassemble(&self, code: &[u8], at: usize) -> String;
}

impl<B: HostBackend> Emitter for B {
    fn emit(&self, block: &Block, at: usize, entry_guard: Option<u32>, out: &mut Vec<u8>, info: &mut Emitted) {
        HostBackend::emit(self, block, at, entry_guard, out, info);
    }
    fn link_word(&self, field: usize, target: usize) -> u32 {
        HostBackend::link_word(self, field, target)
    }
    fn disassemble(&self, code: &[u8], at: usize) -> String {
        HostBackend::disassemble(self, code, at)
    }
}

/// In place of a backend when the interpreter runs everything: a block's code is one byte, its identity.
struct NoEmitter;

impl Emitter for NoEmitter {
    fn emit(&self, _: &Block, _: usize, _: Option<u32>, out: &mut Vec<u8>, info: &mut Emitted) {
        out.clear();
        out.push(0xcc);
        *info = Emitted::default();
    }
    fn link_word(&self, _: usize, _: usize) -> u32 {
        0
    }
    fn disassemble(&self, _: &[u8], _: usize) -> String {
        "(interpreted)".to_string()
    }
}

/// How to set the translator up.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Bytes of address space for translated code.
    pub code_size: usize,
    /// Interpret the IR instead of compiling it.
    pub interpret: bool,
    /// Count instructions, for a clock that follows them.
    pub count: bool,
    /// Which optimisations to use.
    pub optimise: Optimise,
    /// Which registers have host registers: [`GuestFrontend::PIN_ORDER_NARROW`].
    pub narrow: bool,
    /// Measure how long translation takes.
    pub time_translation: bool,
    /// Tell `perf` what generated code is.
    pub perf_map: bool,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            code_size: DEFAULT_CODE,
            interpret: false,
            count: false,
            optimise: Optimise::from_environment(),
            narrow: false,
            time_translation: false,
            perf_map: false,
        }
    }
}

/// Memory as a vCPU sees it in a mode of its own (x86 SMM). Nobody has told of any until the first commit.
#[derive(Default)]
pub(crate) struct AlternateMemory {
    view: Mutex<Option<Arc<FlatView>>>,
    generation: AtomicU64,
}

impl AlternateMemory {
    pub fn view(&self) -> Option<Arc<FlatView>> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Follows the memory for a machine that lives on: the memory holds its listeners, and the machine the memory.
struct Listener<F: GuestFrontend>(Weak<Machine<F>>);

impl<F: GuestFrontend> MemoryListener for Listener<F> {
    fn commit(&self, _view: &Arc<FlatView>) {
        if let Some(machine) = self.0.upgrade() {
            machine.memory_changed();
        }
    }
}

/// Follows the alternate memory for a machine that lives on.
struct AlternateListener<F: GuestFrontend>(Weak<Machine<F>>);

impl<F: GuestFrontend> MemoryListener for AlternateListener<F> {
    fn commit(&self, view: &Arc<FlatView>) {
        let Some(machine) = self.0.upgrade() else { return };
        *machine.alternate.view.lock().unwrap_or_else(PoisonError::into_inner) = Some(view.clone());
        machine.alternate.generation.fetch_add(1, Ordering::Release);
        machine.memory_changed();
    }
}

/// One virtual machine under the translator.
pub struct Machine<F: GuestFrontend> {
    pub(crate) memory: Arc<AddressSpace>,
    pub(crate) alternate: AlternateMemory,
    pub(crate) store: CodeStore,
    pub(crate) emitter: Box<dyn Emitter>,
    pub(crate) stubs: Stubs,
    pub(crate) helpers: Vec<Helper<F>>,
    pub(crate) interpret: bool,
    pub(crate) optimise: Optimise,
    /// Nanoseconds spent on translation, if they are measured.
    pub(crate) translation_time: Option<AtomicU64>,
    pub(crate) perf_map: Option<PerfMap>,
    pub(crate) cuts: crate::debug::Cuts,
    instrumentation: RwLock<Arc<Instrumentation>>,
    /// Whether there is any.
    instrumented: AtomicBool,
    peers: RwLock<Arc<Vec<Arc<Peer<F>>>>>,
    /// Held for reading by vCPUs in generated code; for writing, to empty the code cache.
    gate: RwLock<()>,
    /// The code cache is about to be emptied, by the one who holds the other.
    closing: AtomicBool,
    /// A thread looks where vCPUs are (see `sampling`).
    pub(crate) watched: AtomicBool,
    turn: Mutex<()>,
}

impl<F: GuestFrontend> Machine<F> {
    /// A machine without vCPUs, over `memory`, that compiles with `B`.
    ///
    /// # Errors
    /// One line: what the host lacks.
    pub fn new<B: HostBackend + 'static>(
        memory: Arc<AddressSpace>,
        config: EngineConfig,
    ) -> Result<Arc<Machine<F>>, String> {
        let mapping = CodeMapping::new(config.code_size, (config.code_size / CODE_PER_TABLE).max(512), F::CODE_ALIGN)
            .map_err(|e| format!("code cache: {e}"))?;
        let helpers = F::helpers();
        // Where runs are to repeat, code is made once: which blocks there are does not depend on when it was made anew.
        let optimise = match config.optimise {
            Optimise::Tiered if config.count => Optimise::Usual,
            other => other,
        };
        let backend_config = BackendConfig {
            env: Cpu::<F>::layout(),
            context: ContextLayout::STANDARD,
            fns: runtime::functions::<F>(),
            helpers: helpers.iter().map(|h| h.entry).collect(),
            pin_order: if config.narrow { F::PIN_ORDER_NARROW } else { F::PIN_ORDER }.to_vec(),
            vector: F::VECTOR,
            stack: F::STACK,
            fp_pin_order: F::FP_PIN_ORDER.to_vec(),
            fp_flags: F::FP_FLAGS,
            code_align: F::CODE_ALIGN,
            optimise,
            flags: F::FLAGS,
            code_base: mapping.code_base(),
        };
        let (emitter, stubs): (Box<dyn Emitter>, Stubs) = if config.interpret {
            (Box::new(NoEmitter), Stubs::default())
        } else {
            let mut code = Vec::new();
            let (backend, stubs) = B::new(backend_config, &mut code)?;
            assert!(code.len() <= STUBS, "the backend's stubs take {} bytes", code.len());
            mapping.write_code(0, &code);
            (Box::new(backend), stubs)
        };
        let perf_map = config.perf_map.then(|| PerfMap::new(mapping.code_base(), STUBS)).transpose()?;
        Ok(Arc::new(Machine {
            memory,
            alternate: AlternateMemory::default(),
            store: CodeStore::new(mapping, STUBS, optimise),
            emitter,
            stubs,
            helpers,
            interpret: config.interpret,
            optimise,
            translation_time: config.time_translation.then(AtomicU64::default),
            perf_map,
            cuts: Default::default(),
            instrumentation: RwLock::new(Arc::new(Instrumentation { count: config.count, trace: None })),
            instrumented: AtomicBool::new(config.count),
            peers: RwLock::new(Arc::new(Vec::new())),
            gate: RwLock::new(()),
            closing: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            turn: Mutex::new(()),
        }))
    }

    /// What blocks do besides.
    pub(crate) fn instrumentation(&self) -> Arc<Instrumentation> {
        self.instrumentation.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether blocks do anything besides.
    pub(crate) fn is_instrumented(&self) -> bool {
        self.instrumented.load(Ordering::SeqCst)
    }

    fn set_trace(&self, trace: Option<Trace>) {
        let mut place = self.instrumentation.write().unwrap_or_else(PoisonError::into_inner);
        *place = Arc::new(Instrumentation { trace, ..**place });
        self.instrumented.store(place.is_on(), Ordering::SeqCst);
        drop(place);
        self.flush_code();
    }

    /// Who is to follow the memory.
    pub fn listener(self: &Arc<Self>) -> Arc<dyn MemoryListener> {
        Arc::new(Listener(Arc::downgrade(self)))
    }

    /// Who is to follow the memory that vCPUs see by [`Cpu::use_alternate_memory`].
    pub fn alternate_listener(self: &Arc<Self>) -> Arc<dyn MemoryListener> {
        Arc::new(AlternateListener(Arc::downgrade(self)))
    }

    /// Changes whenever a view of memory does. Read it before the view it is kept with.
    pub(crate) fn memory_generation(&self) -> u64 {
        self.memory.generation().wrapping_add(self.alternate.generation.load(Ordering::Acquire))
    }

    /// Each vCPU takes the new views, and forgets the old ones' addresses, at its next kick check.
    fn memory_changed(&self) {
        for peer in self.peers().iter() {
            peer.cell.kick(KICK_EVENT);
        }
    }

    /// Every vCPU.
    pub(crate) fn peers(&self) -> Arc<Vec<Arc<Peer<F>>>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn add_peer(&self, peer: Arc<Peer<F>>) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = peers.to_vec();
        list.push(peer);
        *peers = Arc::new(list);
    }

    /// Forgets all vCPUs: they hold the machine, and it them.
    pub(crate) fn forget_peers(&self) {
        *self.peers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Vec::new());
    }

    /// What a vCPU holds while it looks up and executes code. Waits while the code cache is emptied.
    pub(crate) fn pass(&self) -> RwLockReadGuard<'_, ()> {
        if self.closing.load(Ordering::SeqCst) {
            drop(self.turn.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the code cache. Called by a vCPU that is outside guest code, or by another thread.
    pub fn flush_code(&self) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.closing.store(true, Ordering::SeqCst);
        let peers = self.peers();
        // Every vCPU leaves guest code because it was kicked. It does not come back before the gate has closed, where it might
        // stay, since nobody kicks it again: one that does not see that the gate is about to close sees its kick before it enters.
        for peer in peers.iter() {
            peer.post(Request::FlushAll);
        }
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let (bytes, blocks, pages) = self.store.statistics();
        log::debug!("code cache full: {bytes} bytes, {blocks} blocks, {pages} pages dropped");
        self.store.clear();
        // One that did what it was asked above in the middle of a helper may have looked up code since.
        for peer in peers.iter() {
            peer.post(Request::FlushAll);
        }
        self.closing.store(false, Ordering::SeqCst);
    }

    /// Counters with their names: what is in the code cache, what has been translated in all, and how long that took.
    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        let (bytes, blocks, pages) = self.store.statistics();
        let all = self.store.translated();
        let time = self.translation_time.as_ref().map(|t| t.load(Ordering::Relaxed));
        let mut list = vec![
            ("code bytes", bytes as u64),
            ("blocks", blocks as u64),
            ("code pages", pages as u64),
            ("blocks translated", all.blocks),
            ("guest instructions translated", all.insns),
            ("guest code bytes translated", all.guest_bytes),
            ("host code bytes made", all.host_bytes),
        ];
        list.extend(self.store.counts().list());
        list.extend(time.map(|nanoseconds| ("translation ns", nanoseconds)));
        list
    }

    /// How addresses of the guest's are called, for `perf`.
    pub fn name_code(&self, names: Names) {
        if let Some(map) = &self.perf_map {
            map.set_names(names);
        }
    }
}

impl<F: GuestFrontend> Tracer for Machine<F> {
    fn start_trace(&self, kinds: TraceKinds, sink: Arc<dyn TraceSink>) {
        self.set_trace(Some(Trace { kinds, sink, next_id: Arc::default() }));
    }
    fn stop_trace(&self) {
        self.set_trace(None);
    }
}

impl<F: GuestFrontend> CodeWriteListener for Machine<F> {
    fn code_written(&self, block: &RamBlock, offset: u64, len: u64) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let page = at & !4095;
            let next = (page + 4096).min(end);
            let host = block.host_ptr(page) as u64;
            self.store.store_to_code(host, (at - page) as u32, (next - at) as u32, block.page_flags(page / 4096));
            at = next;
        }
    }
}
