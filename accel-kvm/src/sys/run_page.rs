// UNSAFE: the page shared with the kernel.
//! The `kvm_run` page of a vCPU.
//!
//! A mapping of our own beside that of `kvm-ioctls`, so that other threads can set `immediate_exit` as
//! long as they hold it. Everything else is used by the vCPU's thread only, between two `KVM_RUN`s.
#![allow(unsafe_code)]

use kvm_bindings::*;
use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

/// A port access; `count` of them in a row with string instructions.
#[derive(Clone, Copy, Debug)]
pub struct IoExit {
    pub write: bool,
    pub size: u8,
    pub port: u16,
    pub count: u32,
    offset: usize,
}

/// A memory access that no slot takes.
#[derive(Clone, Copy, Debug)]
pub struct MmioExit {
    pub addr: u64,
    pub len: u32,
    pub write: bool,
    pub data: [u8; 8],
}

/// An error inside the kernel's part.
#[derive(Clone, Debug)]
pub struct InternalError {
    pub suberror: u32,
    pub data: Vec<u64>,
    /// Instruction bytes of an emulation failure, if the kernel gives them.
    pub insn: Vec<u8>,
}

/// An access to a model-specific register.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub struct MsrExit {
    pub index: u32,
    pub data: u64,
}

/// The page.
pub struct RunPage {
    map: MmapRaw,
}

impl RunPage {
    /// Maps it; `size` is what `KVM_GET_VCPU_MMAP_SIZE` says.
    pub fn map(vcpu: &impl AsRawFd, size: usize) -> io::Result<Self> {
        assert!(size >= size_of::<kvm_run>(), "the kernel's page holds kvm_run");
        Ok(Self { map: MmapOptions::new().len(size).map_raw(vcpu.as_raw_fd())? })
    }

    fn run(&self) -> *mut kvm_run {
        self.map.as_mut_ptr().cast()
    }

    /// Makes the next (or a running) `KVM_RUN` return; any thread.
    pub fn set_immediate_exit(&self, on: bool) {
        self.immediate().store(on.into(), Ordering::SeqCst);
    }

    /// True if it is set.
    pub fn immediate_exit(&self) -> bool {
        self.immediate().load(Ordering::Relaxed) != 0
    }

    fn immediate(&self) -> &AtomicU8 {
        // SAFETY: the mapping is as long as kvm_run and lives as long as self; this byte is accessed as an
        // atomic only.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run()).immediate_exit) }
    }

    /// Why `KVM_RUN` returned.
    pub fn exit_reason(&self) -> u32 {
        // SAFETY: as above; the vCPU's thread is outside KVM_RUN, so nobody writes.
        unsafe { (&raw const (*self.run()).exit_reason).read() }
    }

    /// The access of `KVM_EXIT_IO`.
    pub fn io(&self) -> IoExit {
        // SAFETY: any bytes are valid for the plain integers of every exit's struct.
        let io = unsafe { (&raw const (*self.run()).__bindgen_anon_1.io).read() };
        IoExit {
            write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            size: io.size,
            port: io.port,
            count: io.count,
            offset: io.data_offset as usize,
        }
    }

    fn io_element(&self, io: &IoExit, i: u32) -> *mut u8 {
        let size = usize::from(io.size);
        let at = io.offset + i as usize * size;
        assert!(i < io.count && size <= 8 && at + size <= self.map.len(), "I/O data is inside the run pages");
        self.map.as_mut_ptr().wrapping_add(at)
    }

    /// Value number `i` of a port write.
    pub fn io_value(&self, io: &IoExit, i: u32) -> u64 {
        let from = self.io_element(io, i);
        let mut bytes = [0; 8];
        // SAFETY: `size` bytes at `from` were checked to be inside the mapping; at most 8.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), io.size.into()) };
        u64::from_le_bytes(bytes)
    }

    /// Answers value number `i` of a port read.
    pub fn set_io_value(&self, io: &IoExit, i: u32, value: u64) {
        let to = self.io_element(io, i);
        let bytes = value.to_le_bytes();
        // SAFETY: as in `io_value`.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(to, io.size.into()) };
    }

    /// The access of `KVM_EXIT_MMIO`.
    pub fn mmio(&self) -> MmioExit {
        // SAFETY: as in `io`.
        let m = unsafe { (&raw const (*self.run()).__bindgen_anon_1.mmio).read() };
        MmioExit { addr: m.phys_addr, len: m.len.min(8), write: m.is_write != 0, data: m.data }
    }

    /// Answers a read of `KVM_EXIT_MMIO`.
    pub fn set_mmio_data(&self, data: [u8; 8]) {
        // SAFETY: inside the mapping; the kernel reads it in the next KVM_RUN.
        unsafe { (&raw mut (*self.run()).__bindgen_anon_1.mmio.data).write(data) };
    }

    /// What `KVM_EXIT_INTERNAL_ERROR` says.
    pub fn internal_error(&self) -> InternalError {
        // SAFETY: as in `io`; both views of the union are plain integers.
        let (e, insn) = unsafe {
            let u = &raw const (*self.run()).__bindgen_anon_1;
            let failure = (&raw const (*u).emulation_failure).read();
            ((&raw const (*u).internal).read(), failure.__bindgen_anon_1.__bindgen_anon_1)
        };
        let data = e.data[..e.data.len().min(e.ndata as usize)].to_vec();
        // data[0] is `flags`: bit 0 says that instruction bytes follow.
        let has_bytes = e.suberror == KVM_INTERNAL_ERROR_EMULATION
            && data.len() >= 3
            && data[0] & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        let len = if has_bytes { usize::from(insn.insn_size).min(15) } else { 0 };
        InternalError { suberror: e.suberror, data, insn: insn.insn_bytes[..len].to_vec() }
    }

    /// Reason of `KVM_EXIT_FAIL_ENTRY`, the processor's own number.
    pub fn fail_entry(&self) -> u64 {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).__bindgen_anon_1.fail_entry.hardware_entry_failure_reason).read() }
    }

    /// Kind and data of `KVM_EXIT_SYSTEM_EVENT`.
    pub fn system_event(&self) -> u32 {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).__bindgen_anon_1.system_event.type_).read() }
    }
}

#[cfg(target_arch = "x86_64")]
impl RunPage {
    /// Vector of `KVM_EXIT_IOAPIC_EOI`.
    pub fn eoi_vector(&self) -> u8 {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).__bindgen_anon_1.eoi.vector).read() }
    }

    /// The stop of `KVM_EXIT_DEBUG`.
    pub fn debug(&self) -> kvm_debug_exit_arch {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).__bindgen_anon_1.debug.arch).read() }
    }

    /// The access of `KVM_EXIT_X86_RDMSR` and `_WRMSR`.
    pub fn msr(&self) -> MsrExit {
        // SAFETY: as in `io`.
        let m = unsafe { (&raw const (*self.run()).__bindgen_anon_1.msr).read() };
        MsrExit { index: m.index, data: m.data }
    }

    /// Answers it: `None` gives the guest a general protection fault.
    pub fn answer_msr(&self, data: Option<u64>) {
        // SAFETY: inside the mapping; the kernel reads it in the next KVM_RUN.
        unsafe {
            let m = &raw mut (*self.run()).__bindgen_anon_1.msr;
            (&raw mut (*m).error).write(data.is_none().into());
            if let Some(data) = data {
                (&raw mut (*m).data).write(data);
            }
        }
    }

    /// In system management mode at the last exit.
    pub fn in_smm(&self) -> bool {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).flags).read() & KVM_RUN_X86_SMM as u16 != 0 }
    }

    /// RFLAGS.IF at the last exit.
    pub fn if_flag(&self) -> bool {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).if_flag).read() != 0 }
    }

    /// True if an interrupt can be queued now.
    pub fn ready_for_interrupt(&self) -> bool {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).ready_for_interrupt_injection).read() != 0 }
    }

    /// Has `KVM_RUN` return as soon as an interrupt can be queued.
    pub fn request_interrupt_window(&self, on: bool) {
        // SAFETY: inside the mapping; the kernel reads it in KVM_RUN.
        unsafe { (&raw mut (*self.run()).request_interrupt_window).write(on.into()) };
    }

    /// CR8 at the last exit, without a local APIC in the kernel.
    pub fn cr8(&self) -> u64 {
        // SAFETY: as in `io`.
        unsafe { (&raw const (*self.run()).cr8).read() }
    }

    /// CR8 from the next entry on.
    pub fn set_cr8(&self, value: u64) {
        // SAFETY: inside the mapping; the kernel reads it in KVM_RUN.
        unsafe { (&raw mut (*self.run()).cr8).write(value) };
    }

    /// Which sets of registers every return of `KVM_RUN` copies to the page.
    pub fn set_valid_regs(&self, sets: u32) {
        // SAFETY: inside the mapping; the kernel reads it in KVM_RUN.
        unsafe { (&raw mut (*self.run()).kvm_valid_regs).write(sets.into()) };
    }

    /// The copied registers.
    pub fn sync_regs(&self) -> kvm_sync_regs {
        // SAFETY: as in `io`; the union's only meaning on x86 is this struct of plain integers.
        unsafe { (&raw const (*self.run()).s.regs).read() }
    }

    /// Changes the page's registers and has the next `KVM_RUN` take `sets` of them over.
    pub fn set_sync_regs(&self, sets: u32, regs: &kvm_sync_regs) {
        // SAFETY: inside the mapping; the kernel reads it in KVM_RUN.
        unsafe {
            (&raw mut (*self.run()).s.regs).write(*regs);
            (&raw mut (*self.run()).kvm_dirty_regs).write(sets.into());
        }
    }

    /// After a `KVM_RUN` that took registers over: not again. (The kernel clears it only if it got that far.)
    pub fn clear_dirty_regs(&self) {
        // SAFETY: inside the mapping; the kernel reads it in KVM_RUN.
        unsafe { (&raw mut (*self.run()).kvm_dirty_regs).write(0) };
    }
}
