//! A vCPU's side of a trace: the buffer that generated code writes to, and what the runtime adds.

use mimus_core::accel::trace::words;
use mimus_core::bus::GuestPhys;
use mimus_tcg_ir::Size;

use crate::env::Cpu;
use crate::frontend::{Access, GuestFrontend};
use crate::instrument::Trace;

/// Words of a buffer.
const BUFFER: usize = 192 << 10;
/// Words that are free at least when a block begins: no block writes more (4096 instructions of one byte with two
/// accesses each), nor the runtime between two blocks.
const SLACK: usize = 64 << 10;

/// Words of an access that has begun: its head and address.
const BEGUN: usize = 3;

/// A vCPU's part of a trace.
pub(crate) struct VcpuTrace {
    pub trace: Trace,
    buffer: Vec<u32>,
    /// Address space and privilege written last.
    space: Option<(u64, u8)>,
}

impl<F: GuestFrontend> Cpu<F> {
    /// Joins the trace that there is now, and hands over what it has of the one before.
    pub(crate) fn sync_trace(&mut self) {
        self.hand_over();
        self.tracing = None;
        let trace = self.machine.instrumentation().trace.clone();
        let Some(trace) = trace else {
            (self.head.trace_next, self.head.trace_limit) = (0, 0);
            return;
        };
        self.tracing = Some(Box::new(VcpuTrace { trace, buffer: vec![0; BUFFER], space: None }));
        self.rewind();
        self.trace_space();
    }

    /// Begins at the buffer's start.
    fn rewind(&mut self) {
        if let Some(tracing) = &mut self.tracing {
            let base = tracing.buffer.as_mut_ptr() as u64;
            self.head.trace_next = base;
            self.head.trace_limit = base + 4 * (tracing.buffer.len().saturating_sub(SLACK)) as u64;
            self.head.trace_page = !0;
        }
    }

    /// Gives the sink what has been written.
    fn hand_over(&mut self) {
        let now = self.io(|io| io.clock().now()).unwrap_or(self.last_time);
        self.last_time = now;
        let index = self.index();
        let Some(tracing) = &mut self.tracing else { return };
        let used = self.head.trace_next.saturating_sub(tracing.buffer.as_ptr() as u64) / 4;
        let used = (used as usize).min(tracing.buffer.len());
        let full = std::mem::take(&mut tracing.buffer);
        tracing.buffer = tracing.trace.sink.take(index, full, used, now);
        tracing.buffer.resize(BUFFER, 0);
        self.rewind();
    }

    /// The buffer is full.
    #[cold]
    pub(crate) fn trace_full(&mut self) {
        if self.tracing.is_some() {
            self.hand_over();
        }
    }

    /// Writes a record of the runtime's. In the middle of an access the code of a block has written the access's head and
    /// address behind the trace's end already ([`mimus_tcg_ir::Op::TraceAccess`]); they move on.
    fn trace_words(&mut self, record: &[u32]) {
        let begun = self.begun_access();
        if self.head.trace_next > self.head.trace_limit {
            self.hand_over();
        }
        let Some(tracing) = &mut self.tracing else { return };
        let at = (self.head.trace_next - tracing.buffer.as_ptr() as u64) as usize / 4;
        if let Some(place) = tracing.buffer.get_mut(at..at + record.len() + BEGUN) {
            let (now, next) = place.split_at_mut(record.len());
            now.copy_from_slice(record);
            next.copy_from_slice(&begun);
            self.head.trace_next += 4 * record.len() as u64;
        }
    }

    /// What is behind the trace's end.
    fn begun_access(&self) -> [u32; BEGUN] {
        let Some(tracing) = &self.tracing else { return [0; BEGUN] };
        let at = (self.head.trace_next - tracing.buffer.as_ptr() as u64) as usize / 4;
        tracing.buffer.get(at..at + BEGUN).and_then(|words| words.try_into().ok()).unwrap_or_default()
    }

    /// For frontends: the root of the page tables has been written, and the context stays.
    pub fn root_written(&mut self) {
        self.trace_space();
    }

    /// The address space or privilege may have changed.
    pub(crate) fn trace_space(&mut self) {
        self.catch_space();
        if self.tracing.is_none() {
            return;
        }
        let space = F::address_space(self);
        if let Some(tracing) = &mut self.tracing
            && tracing.space != Some(space)
        {
            tracing.space = Some(space);
            let [low, high] = halves(space.0);
            self.trace_words(&[words::SPACE, low, high, space.1.into()]);
        }
    }

    /// An exception or interrupt is taken at `pc`: see [`words::EXCEPTION`]. For frontends.
    pub fn note_exception(&mut self, cause: u64, pc: u64, value: u64) {
        self.recent.push(mimus_core::accel::RecentEvent { cause, pc, value });
        self.catch_exception(cause, pc, value);
        if self.tracing.as_ref().is_none_or(|t| !t.trace.kinds.exceptions) {
            return;
        }
        let now = self.io(|io| io.clock().now()).unwrap_or(self.last_time);
        let mut record = [words::EXCEPTION, 0, 0, 0, 0, 0, 0, 0, 0];
        for (i, value) in [cause, pc, value, now].into_iter().enumerate() {
            record[1 + 2 * i..3 + 2 * i].copy_from_slice(&halves(value));
        }
        self.trace_words(&record);
    }

    /// Whether memory is traced.
    pub(crate) fn traces_memory(&self) -> bool {
        self.tracing.as_ref().is_some_and(|t| t.trace.kinds.memory)
    }

    /// An access by the runtime itself for the current instruction; `kind`: [`words::WRITE`], [`words::UPDATE`], 0.
    pub(crate) fn trace_access(&mut self, kind: u32, va: u64, size: Size, value: u64) {
        if !self.traces_memory() {
            return;
        }
        let pc = self.current_insn().0 as u32 & 0xfff;
        let head = words::ACCESS | kind | words::VALUE | (size as u32) << words::SIZE_SHIFT | pc << words::PC_SHIFT;
        let ([a, b], [c, d]) = (halves(va), halves(value));
        self.trace_words(&[head, a, b, c, d]);
    }

    /// A load or store that a frontend made by physical addresses.
    pub fn trace_data(&mut self, writes: bool, va: u64, size: Size, value: u64) {
        self.trace_access(u32::from(writes) * words::WRITE, va, size, value);
    }

    /// `len` bytes at `va` are accessed as a whole, inside a page. For frontends' helpers that use
    /// [`Cpu::host_for_load`] and [`Cpu::host_for_store`].
    pub fn trace_bulk(&mut self, writes: bool, va: u64, len: u64) {
        if self.traces_memory() {
            let ([a, b], [c, d]) = (halves(va), halves(len));
            let pc = self.current_insn().0 as u32 & 0xfff;
            self.trace_words(&[words::BULK, kind(writes, pc), a, b, c, d]);
        }
    }

    /// An access to a device.
    pub(crate) fn trace_device(&mut self, writes: bool, pa: GuestPhys, size: Size, value: u64) {
        self.catch_device(writes, pa, value);
        self.trace_io(words::DEVICE, writes, pa.0, size, value);
    }

    /// An access to an x86 port. For frontends.
    pub fn trace_port(&mut self, writes: bool, port: u16, size: Size, value: u64) {
        self.catch_port(writes, port, value);
        self.trace_io(words::PORT, writes, port.into(), size, value);
    }

    fn trace_io(&mut self, word: u32, writes: bool, at: u64, size: Size, value: u64) {
        if self.tracing.as_ref().is_some_and(|t| t.trace.kinds.devices) {
            let ([a, b], [c, d]) = (halves(at), halves(value));
            let pc = self.current_insn().0 as u32 & 0xfff;
            let kind = kind(writes, pc) | (size as u32) << words::SIZE_SHIFT;
            self.trace_words(&[word, kind, a, b, c, d]);
        }
    }

    /// The instruction of `len` bytes at `pc` is executed by itself.
    pub(crate) fn trace_step(&mut self, pc: u64, len: u8) {
        if self.tracing.is_none() {
            return;
        }
        let mut bytes = [0; 16];
        for (i, byte) in (0..u64::from(len)).zip(&mut bytes) {
            let pa = F::debug_walk(self, pc.wrapping_add(i), Access::Fetch);
            *byte = pa.and_then(|(pa, _)| self.phys_read(pa, Size::B1)).unwrap_or(0) as u8;
        }
        let mut record = [0; 8];
        record[0] = words::STEP;
        record[1..3].copy_from_slice(&halves(pc));
        record[3] = len.into();
        for (word, four) in record[4..].iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*four);
        }
        self.trace_words(&record);
        // The page of accesses from here on is this instruction's.
        self.head.trace_page = !0;
    }
}

fn kind(writes: bool, pc: u32) -> u32 {
    let write = if writes { words::WRITE } else { 0 };
    write | pc << words::PC_SHIFT
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}
