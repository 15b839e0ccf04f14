//! The host's own processor.
//!
//! Code and data are at fixed addresses. An exception's signal handler, which is a few instructions of assembly, copies
//! the state it finds and leaves like a sequence that came to its end.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::cell::Cell;
use std::ptr::NonNull;

use mimus_arch::x86::regs::{RFLAGS_IF, RFLAGS_TF, VECTOR_PF};

use crate::layout::*;
use crate::regs::{AREA, Exit, Outcome, Regs};

/// What the assembly knows of the control page.
#[repr(C, align(64))]
struct Control {
    gpr: [u64; 16],
    flags: u64,
    /// 0x88: where to begin; then the same as a far pointer.
    entry: u64,
    far: [u16; 4],
    fs_base: u64,
    gs_base: u64,
    /// 0xa8: DS, ES, SS, and SS on the way out.
    data: [u16; 4],
    _pad0: [u64; 10],
    /// 0x100
    out_gpr: [u64; 16],
    out_flags: u64,
    /// 0x188: 0 at the end, 1 by a signal.
    kind: u64,
    /// 0x190
    selectors: [u16; 4],
    out_fs_base: u64,
    out_gs_base: u64,
    _pad1: [u64; 11],
    /// 0x200: the host's own.
    saved: [u64; 6],
    /// 0x230: whether single steps are counted; how many there were.
    stepping: u64,
    steps: u64,
    _pad2: [u64; 24],
    /// 0x300
    signal: [u64; 32],
    /// 0x400
    area: [u8; AREA],
    _pad3: [u8; 1024 - AREA],
    /// 0x800
    out_area: [u8; AREA],
    _pad4: [u8; 0x800 - AREA],
    /// 0x1000: where the steps led.
    trail: [u64; TRAIL],
}

const _: () = {
    assert!(std::mem::offset_of!(Control, out_gpr) == 0x100);
    assert!(std::mem::offset_of!(Control, kind) == 0x188);
    assert!(std::mem::offset_of!(Control, saved) == 0x200);
    assert!(std::mem::offset_of!(Control, signal) == 0x300);
    assert!(std::mem::offset_of!(Control, area) == 0x400);
    assert!(std::mem::offset_of!(Control, out_area) == 0x800);
    assert!(std::mem::offset_of!(Control, stepping) == 0x230);
    assert!(std::mem::offset_of!(Control, trail) == 0x1000);
    assert!(TRAIL == 0x200 && LEAVE == 0x2400_3f00);
    assert!(std::mem::size_of::<Control>() <= CONTROL_LEN);
    assert!(CONTROL == 0x3000_0000);
};

global_asm!(
    ".globl mimus_differential_enter",
    ".globl mimus_differential_leave",
    ".globl mimus_differential_signal",
    // All registers from the control page; edi: whether 32-bit code is entered.
    "mimus_differential_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    // The code was written at another address than it is fetched from: only something that serialises makes sure that no
    // earlier one's is executed (SDM volume 3, "Self-Modifying Code").
    "mov rax, rsp",
    "mov ecx, ss",
    "push rcx",
    "push rax",
    "pushfq",
    "mov ecx, cs",
    "push rcx",
    "lea rcx, [rip + 12f]",
    "push rcx",
    "iretq",
    "12:",
    "mov qword ptr ds:[0x30000200], rsp",
    "rdfsbase rax",
    "mov qword ptr ds:[0x30000208], rax",
    "rdgsbase rax",
    "mov qword ptr ds:[0x30000210], rax",
    "stmxcsr dword ptr ds:[0x30000218]",
    "mov dword ptr ds:[0x30000220], edi",
    "mov dword ptr ds:[0x30000224], 1",
    "mov ds, word ptr ds:[0x300000a8]",
    "mov es, word ptr ds:[0x300000aa]",
    "mov ss, word ptr ds:[0x300000ac]",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov eax, 7",
    "xor edx, edx",
    "mov ecx, 0x30000400",
    "xrstor64 [rcx]",
    "mov rax, qword ptr ds:[0x30000098]",
    "wrfsbase rax",
    "mov rax, qword ptr ds:[0x300000a0]",
    "wrgsbase rax",
    "cmp dword ptr ds:[0x30000220], 0",
    "jne 2f",
    "push qword ptr ds:[0x30000080]",
    "popfq",
    "call 3f",
    "jmp qword ptr ds:[0x30000088]",
    "2:",
    "push qword ptr ds:[0x30000080]",
    "popfq",
    "call 3f",
    "jmp fword ptr ds:[0x30000090]",
    // The return address goes with the stack pointer: it is taken off before.
    "3:",
    "pop qword ptr ds:[0x30000228]",
    "mov rax, qword ptr ds:[0x30000000]",
    "mov rcx, qword ptr ds:[0x30000008]",
    "mov rdx, qword ptr ds:[0x30000010]",
    "mov rbx, qword ptr ds:[0x30000018]",
    "mov rsp, qword ptr ds:[0x30000020]",
    "mov rbp, qword ptr ds:[0x30000028]",
    "mov rsi, qword ptr ds:[0x30000030]",
    "mov rdi, qword ptr ds:[0x30000038]",
    "mov r8, qword ptr ds:[0x30000040]",
    "mov r9, qword ptr ds:[0x30000048]",
    "mov r10, qword ptr ds:[0x30000050]",
    "mov r11, qword ptr ds:[0x30000058]",
    "mov r12, qword ptr ds:[0x30000060]",
    "mov r13, qword ptr ds:[0x30000068]",
    "mov r14, qword ptr ds:[0x30000070]",
    "mov r15, qword ptr ds:[0x30000078]",
    "jmp qword ptr ds:[0x30000228]",
    // The end of a sequence.
    "mimus_differential_leave:",
    "mov qword ptr ds:[0x30000100], rax",
    "mov qword ptr ds:[0x30000108], rcx",
    "mov qword ptr ds:[0x30000110], rdx",
    "mov qword ptr ds:[0x30000118], rbx",
    "mov qword ptr ds:[0x30000120], rsp",
    "mov qword ptr ds:[0x30000128], rbp",
    "mov qword ptr ds:[0x30000130], rsi",
    "mov qword ptr ds:[0x30000138], rdi",
    "mov qword ptr ds:[0x30000140], r8",
    "mov qword ptr ds:[0x30000148], r9",
    "mov qword ptr ds:[0x30000150], r10",
    "mov qword ptr ds:[0x30000158], r11",
    "mov qword ptr ds:[0x30000160], r12",
    "mov qword ptr ds:[0x30000168], r13",
    "mov qword ptr ds:[0x30000170], r14",
    "mov qword ptr ds:[0x30000178], r15",
    "mov rsp, qword ptr ds:[0x30000200]",
    "pushfq",
    "pop qword ptr ds:[0x30000180]",
    "mov qword ptr ds:[0x30000188], 0",
    "mov eax, 7",
    "xor edx, edx",
    "mov ecx, 0x30000800",
    "xsave64 [rcx]",
    "4:",
    "push 2",
    "popfq",
    "mov ss, word ptr ds:[0x300000ae]",
    "mov word ptr ds:[0x30000190], ds",
    "mov word ptr ds:[0x30000192], es",
    "mov word ptr ds:[0x30000194], fs",
    "mov word ptr ds:[0x30000196], gs",
    "rdfsbase rax",
    "mov qword ptr ds:[0x30000198], rax",
    "rdgsbase rax",
    "mov qword ptr ds:[0x300001a0], rax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov rax, qword ptr ds:[0x30000208]",
    "wrfsbase rax",
    "mov rax, qword ptr ds:[0x30000210]",
    "wrgsbase rax",
    "fninit",
    "vzeroupper",
    "ldmxcsr dword ptr ds:[0x30000218]",
    "mov dword ptr ds:[0x30000224], 0",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // (signal, information, context)
    "mimus_differential_signal:",
    "push 2",
    "popfq",
    "cmp dword ptr ds:[0x30000224], 0",
    "jne 5f",
    // An exception of the test itself: write(2, …), exit_group(101).
    "mov eax, 1",
    "mov edi, 2",
    "lea rsi, [rip + 6f]",
    "mov edx, 46",
    "syscall",
    "mov eax, 231",
    "mov edi, 101",
    "syscall",
    "6: .ascii \"differential: an exception outside a sequence\\n\"",
    "5:",
    // A single step that is to be counted: SIGTRAP, vector 1.
    "cmp dword ptr ds:[0x30000230], 0",
    "je 7f",
    "cmp edi, 5",
    "jne 7f",
    "cmp qword ptr [rdx + 200], 1",
    "jne 7f",
    "mov rcx, qword ptr [rdx + 168]",
    "mov eax, dword ptr ds:[0x30000238]",
    // The code that enters is stepped too: nothing counts before the sequence is reached.
    "cmp eax, -1",
    "jne 10f",
    "cmp rcx, qword ptr ds:[0x30000088]",
    "jne 9f",
    "10:",
    "cmp rcx, 0x24003f00",
    "je 8f",
    "inc dword ptr ds:[0x30000238]",
    "cmp eax, 0x200",
    "jae 9f",
    "mov qword ptr [rax * 8 + 0x30001000], rcx",
    "9:",
    // The kernel's way back keeps NT and ID, and loads the rest.
    "mov eax, dword ptr [rdx + 176]",
    "and eax, 0x204000",
    "or eax, 2",
    "push rax",
    "popfq",
    "ret",
    // The last one, on the way out: from here without them.
    "8:",
    "and dword ptr [rdx + 176], 0xfffffeff",
    "mov dword ptr ds:[0x30000230], 2",
    "jmp 9b",
    "7:",
    "lea rsi, [rdx + 40]",
    "mov edi, 0x30000300",
    "mov ecx, 23",
    "rep movsq",
    "mov rsi, qword ptr [rdx + 224]",
    "mov edi, 0x30000800",
    "mov ecx, 104",
    "rep movsq",
    "mov qword ptr ds:[0x30000188], 1",
    "mov rsp, qword ptr ds:[0x30000200]",
    "jmp 4b",
);

unsafe extern "C" {
    fn mimus_differential_enter(compat: u32);
    fn mimus_differential_leave();
    fn mimus_differential_signal();
}

/// Memory mapped twice: at its address, and where it can be written whatever its protection.
struct Pages {
    at: u64,
    alias: NonNull<u8>,
    len: usize,
}

impl Pages {
    /// `prot` of the whole; of the pages from `read_only` on, without writing.
    fn new(at: u64, len: usize, prot: i32, read_only: Option<u64>) -> Result<Pages, String> {
        // SAFETY: plain system calls; MAP_FIXED_NOREPLACE takes only addresses that nothing has.
        unsafe {
            let file = libc::memfd_create(c"differential".as_ptr(), 0);
            if file < 0 || libc::ftruncate(file, len as i64) != 0 {
                return Err("no memory file".to_owned());
            }
            let fixed = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
            let here = libc::mmap(at as *mut _, len, prot, fixed, file, 0);
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let alias = libc::mmap(std::ptr::null_mut(), len, both, libc::MAP_SHARED, file, 0);
            libc::close(file);
            // All pages are there: what is missing is told apart from what is forbidden.
            if here as u64 == at {
                (0..len).step_by(4096).for_each(|i| {
                    std::ptr::read_volatile((at as *const u8).add(i));
                });
            }
            if here as u64 != at || alias == libc::MAP_FAILED {
                return Err(format!("{at:#x} is taken"));
            }
            if let Some(from) = read_only {
                libc::mprotect(from as *mut _, (at + len as u64 - from) as usize, prot & !libc::PROT_WRITE);
            }
            let alias = NonNull::new(alias.cast()).ok_or("mapped at 0")?;
            Ok(Pages { at, alias, len })
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped, and this value's alone while no sequence runs.
        unsafe { std::slice::from_raw_parts_mut(self.alias.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nothing refers to it any more.
        unsafe {
            libc::munmap(self.at as *mut _, self.len);
            libc::munmap(self.alias.as_ptr().cast(), self.len);
        }
    }
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// Puts a descriptor into the process's local table; false if the kernel knows of none.
fn local_descriptor(i: usize, local: &Local) -> bool {
    let contents = if local.code { 2 } else { u32::from(local.down) };
    // `struct user_desc`: its number, base and limit, and bits.
    let bits = u32::from(local.wide) | contents << 1 | u32::from(!local.full) << 3 | u32::from(!local.present) << 5;
    let description = [i as u32, local.base as u32, local.limit, bits];
    const WRITE: i32 = 0x11;
    // SAFETY: reads the 16 bytes.
    unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, description.as_ptr(), 16) == 0 }
}

/// The host.
pub struct Host {
    data: Pages,
    code: Pages,
    control: Pages,
    old: [libc::sigaction; SIGNALS.len()],
    /// Whether the kernel lets programs have local descriptors.
    pub local: bool,
    _stack: Vec<u8>,
    old_stack: libc::stack_t,
    /// Alternate stacks are a thread's.
    _here: std::marker::PhantomData<Cell<()>>,
}

/// XCR0 as the host's kernel has set it.
pub fn components() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: a host that has AVX has it (see [`Host::new`]).
    unsafe { std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

impl Host {
    /// Takes over the signals of exceptions, for this thread's sequences.
    ///
    /// # Errors
    /// What the host lacks.
    pub fn new() -> Result<Host, String> {
        if !is_x86_feature_detected!("avx") {
            return Err("the host has no AVX".to_owned());
        }
        // SAFETY: reads the auxiliary vector.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 == 0 {
            return Err("the host's kernel does not allow FSGSBASE".to_owned());
        }
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let mut host = Host {
            data: Pages::new(DATA, DATA_LEN, both, Some(READ_ONLY))?,
            code: Pages::new(CODE, CODE_LEN, both | libc::PROT_EXEC, Some(LEAVE & !0xfff))?,
            control: Pages::new(CONTROL, CONTROL_LEN, both, None)?,
            // SAFETY: all zeros are valid ones.
            old: unsafe { std::mem::zeroed() },
            local: false,
            _stack: vec![0; 1 << 16],
            // SAFETY: as above.
            old_stack: unsafe { std::mem::zeroed() },
            _here: std::marker::PhantomData,
        };
        // SAFETY: the handler is written for just this; the stack outlives its registration (see `drop`).
        unsafe {
            let stack =
                libc::stack_t { ss_sp: host._stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: host._stack.len() };
            libc::sigaltstack(&stack, &mut host.old_stack);
            for (signal, old) in SIGNALS.into_iter().zip(&mut host.old) {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = mimus_differential_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(signal, &action, old);
            }
        }
        host.local = LOCAL.iter().enumerate().all(|(i, local)| local_descriptor(i, local));
        let leave = (mimus_differential_leave as *const () as usize as u64).to_le_bytes();
        let at = (LEAVE - CODE) as usize;
        // jmp [rip + 2], and the address, aligned.
        host.code.bytes()[at..at + 8].copy_from_slice(&[0xff, 0x25, 2, 0, 0, 0, 0xcc, 0xcc]);
        host.code.bytes()[at + 8..at + 16].copy_from_slice(&leave);
        Ok(host)
    }

    /// Runs a sequence that was laid out at `start`; `stepped`: one instruction at a time.
    pub fn run(&mut self, bits: u32, start: u64, code: &[u8], before: &Regs, memory: &[u8], stepped: bool) -> Outcome {
        self.data.bytes().copy_from_slice(memory);
        let at = (start - CODE) as usize;
        let end = at + code.len();
        let text = self.code.bytes();
        text[at..end].copy_from_slice(code);
        let after = start + code.len() as u64;
        let mut way_out = Vec::new();
        if bits == 64 {
            way_out.push(0xe9);
            way_out.extend(((LEAVE - after - 5) as u32).to_le_bytes());
        } else {
            way_out.extend(if bits == 16 { &[0x66, 0xea][..] } else { &[0xea] });
            way_out.extend((LEAVE as u32).to_le_bytes());
            way_out.extend(CODE64.to_le_bytes());
        }
        text[end..end + way_out.len()].copy_from_slice(&way_out);
        let c = self.control.bytes().as_mut_ptr().cast::<Control>();
        // SAFETY: the control page is one `Control`; the assembly keeps to the calling convention, whatever the
        // sequence does to registers.
        unsafe {
            (*c).gpr = before.gpr;
            (*c).flags = before.flags | if stepped { RFLAGS_TF } else { 0 };
            ((*c).stepping, (*c).steps) = (u64::from(stepped), u64::from(u32::MAX));
            let entry = start - code_base(bits);
            let (code, data) = if bits == 16 { (CODE16, DATA16) } else { (CODE32, DATA32) };
            (*c).entry = entry;
            (*c).far = [entry as u16, (entry >> 16) as u16, code, 0];
            (*c).data = [data, data, data, DATA32];
            ((*c).fs_base, (*c).gs_base) = (before.fs_base, before.gs_base);
            (*c).area = before.area;
            mimus_differential_enter(u32::from(bits != 64));
            outcome(&*c, after, code_base(bits), self.data.bytes().to_vec())
        }
    }
}

fn outcome(c: &Control, end: u64, base: u64, memory: Vec<u8>) -> Outcome {
    let mut regs = Regs {
        gpr: c.out_gpr,
        rip: end,
        flags: c.out_flags | RFLAGS_IF,
        area: c.out_area,
        selectors: c.selectors,
        fs_base: c.out_fs_base,
        gs_base: c.out_gs_base,
    };
    let mut exit = Exit::End;
    if c.kind != 0 {
        // The order of `gregset_t`: R8 to R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP.
        const ORDER: [usize; 16] = [8, 9, 10, 11, 12, 13, 14, 15, 7, 6, 5, 3, 2, 0, 1, 4];
        let s = &c.signal;
        for (i, n) in ORDER.into_iter().enumerate() {
            regs.gpr[n] = s[i];
        }
        (regs.rip, regs.flags) = (s[16].wrapping_add(base), s[17]);
        let vector = s[20] as u8;
        let address = if vector == VECTOR_PF { s[22] } else { 0 };
        // Linux hides which of its own pages there are.
        let hidden = u32::from(address >= (1 << 47) - 4096);
        exit = Exit::Exception { vector, error: s[19] as u32 & !hidden, address };
    }
    if c.stepping == 2 {
        regs.flags |= RFLAGS_TF;
    }
    let steps = if c.stepping == 0 { 0 } else { c.steps };
    let trail = c.trail[..TRAIL.min(steps as usize)].to_vec();
    Outcome { regs, memory, exit, steps, trail }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: puts back what was.
        unsafe {
            for (signal, old) in SIGNALS.into_iter().zip(&self.old) {
                libc::sigaction(signal, old, std::ptr::null_mut());
            }
            libc::sigaltstack(&self.old_stack, std::ptr::null_mut());
        }
    }
}
