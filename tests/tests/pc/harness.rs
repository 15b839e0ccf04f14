//! A machine from a command-line-like description, and what a test does with it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use mimus_core::accel::{Accelerator, CpuIo, EmulationFallback, NullAccelerator, VcpuIndex};
use mimus_core::arch::{CpuState, StateGroups};
use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs};
use mimus_devices::char::host::RingBuf;
use mimus_machines::boards;
use mimus_machines::config::{CharBackend, MachineConfig};
use mimus_machines::machine::{Host, HostIo, Machine, MachineError, Request, RunEnd};

/// A kernel that a 64-bit boot accepts: `HLT` and a jump back to it at both entry points.
pub fn bzimage() -> Vec<u8> {
    const CODE: usize = 0x1000;
    let mut b = vec![0xf4; 0x400 + CODE];
    b[..0x400].fill(0);
    let mut put = |at: usize, value: &[u8]| b[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x1f4, &(CODE as u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &3u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(0x400, &[0xf4, 0xeb, 0xfd]);
    put(0x600, &[0xf4, 0xeb, 0xfd]);
    b
}

/// A machine under test, with files of its own.
pub struct Pc {
    pub machine: Machine,
    pub serial: Arc<RingBuf>,
    pub io: Arc<dyn CpuIo + Send + Sync>,
    _files: tempfile::TempDir,
}

/// What a test asks for.
pub struct Setup {
    pub config: MachineConfig,
    pub accel: Box<dyn Accelerator>,
    /// `-accel …,key=value`
    pub accel_options: BTreeMap<String, String>,
    pub emulation_failure: Option<Arc<dyn EmulationFallback>>,
    pub files: tempfile::TempDir,
}

impl Setup {
    /// A board of x86_64 without network, on the `null` accelerator.
    pub fn new(board: &str) -> Self {
        let mut config = MachineConfig::new("x86_64");
        config.machine.name = Some(board.to_owned());
        config.memory = 256 << 20;
        config.no_defaults = true;
        config.serials = vec![CharBackend::Null];
        let files = tempfile::tempdir().unwrap();
        Self {
            config,
            accel: Box::new(NullAccelerator),
            accel_options: BTreeMap::new(),
            emulation_failure: None,
            files,
        }
    }

    /// `-machine key=value`
    pub fn option(mut self, key: &str, value: &str) -> Self {
        self.config.machine.options.push((key.to_owned(), value.to_owned()));
        self
    }

    /// `-smp`
    pub fn cpus(mut self, n: u32) -> Self {
        (self.config.smp.cpus, self.config.smp.max_cpus, self.config.smp.cores) = (n, n, n);
        self
    }

    /// On the translator, with a small code cache: tests run side by side in one address space.
    #[cfg(target_arch = "x86_64")]
    pub fn translated(mut self) -> Self {
        self.accel = Box::new(mimus_tcg::TcgAccelerator);
        self.accel_options = [("tb-size".to_owned(), "8M".to_owned())].into();
        self
    }

    /// `-device`
    pub fn device(mut self, text: &str) -> Self {
        self.config.devices.push(text.to_owned());
        self
    }

    /// A file beside the machine.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// `-kernel`, a file with these bytes.
    pub fn kernel(mut self, bytes: &[u8]) -> Self {
        self.config.boot.kernel = Some(self.file("kernel", bytes));
        self
    }

    /// Builds it; not powered on.
    pub fn try_build(self) -> Result<Pc, MachineError> {
        let io = HostIo::new().unwrap();
        let serial = RingBuf::new(1 << 20);
        io.backends().add_char("serial", serial.clone());
        let board = boards::find(&self.config)?;
        let host = Host {
            accel: &*self.accel,
            accel_options: self.accel_options,
            emulation_failure: self.emulation_failure,
            io,
            serials: vec![Some("serial".to_owned())],
        };
        mimus_machines::machine::backends::open(&self.config, host.io.backends())?;
        let machine = (board.build)(&self.config, host)?;
        let io = machine.io();
        Ok(Pc { machine, serial, io, _files: self.files })
    }

    /// Builds it and powers it on.
    pub fn start(self) -> Pc {
        let mut pc = self.try_build().unwrap_or_else(|e| panic!("{e}"));
        pc.machine.power_on().unwrap_or_else(|e| panic!("{e}"));
        pc
    }
}

const BSP: VcpuIndex = VcpuIndex(0);

fn size(bytes: u64) -> AccessSize {
    AccessSize::from_bytes(bytes).unwrap()
}

impl Pc {
    /// `IN AL`
    pub fn inb(&self, port: u16) -> u8 {
        self.io.pio_read(BSP, port, AccessSize::B1) as u8
    }

    /// `OUT AL`
    pub fn outb(&self, port: u16, value: u8) {
        self.io.pio_write(BSP, port, AccessSize::B1, value.into());
    }

    /// `IN` of some bytes.
    pub fn input(&self, port: u16, bytes: u64) -> u64 {
        self.io.pio_read(BSP, port, size(bytes))
    }

    /// `OUT` of some bytes.
    pub fn output(&self, port: u16, bytes: u64, value: u64) {
        self.io.pio_write(BSP, port, size(bytes), value);
    }

    /// A load by the bootstrap processor.
    pub fn load(&self, address: u64, bytes: u64) -> u64 {
        self.io.mem_read(BSP, GuestPhys(address), size(bytes), MemTxAttrs::vcpu(0)).0
    }

    /// A store by it.
    pub fn store(&self, address: u64, bytes: u64, value: u64) {
        let _ = self.io.mem_write(BSP, GuestPhys(address), size(bytes), MemTxAttrs::vcpu(0), value);
    }

    /// Bytes of memory.
    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let read = self.machine.services().memory.read_bytes(GuestPhys(address), &mut out, MemTxAttrs::default());
        assert!(read.is_ok(), "{address:#x}");
        out
    }

    /// What the guest wrote to the first serial port.
    pub fn output_text(&self) -> String {
        String::from_utf8_lossy(&self.serial.contents()).into_owned()
    }

    /// The number of the file `name` of fw_cfg.
    pub fn fw_cfg_key(&self, name: &str) -> Option<u16> {
        self.fw_cfg_entry(name).map(|entry| entry.0)
    }

    /// The file `name` of fw_cfg, by its ports.
    pub fn fw_cfg_file(&self, name: &str) -> Option<Vec<u8>> {
        let (key, len) = self.fw_cfg_entry(name)?;
        self.output(0x510, 2, key.into());
        Some((0..len).map(|_| self.inb(0x511)).collect())
    }

    /// Its number and length.
    fn fw_cfg_entry(&self, name: &str) -> Option<(u16, usize)> {
        let select = |key: u16| self.output(0x510, 2, key.into());
        let number = |bytes: &[u8]| bytes.iter().fold(0u32, |n, b| n << 8 | u32::from(*b));
        let read = |len: usize| (0..len).map(|_| self.inb(0x511)).collect::<Vec<u8>>();
        select(0x19);
        let count = number(&read(4));
        for _ in 0..count {
            let entry = read(64);
            let found: Vec<u8> = entry[8..].iter().copied().take_while(|b| *b != 0).collect();
            if found == name.as_bytes() {
                return Some((number(&entry[4..6]) as u16, number(&entry[..4]) as usize));
            }
        }
        None
    }

    /// Where the bootstrap processor is, for messages.
    pub fn bootstrap(&self) -> String {
        match self.machine.vcpu_state(BSP, StateGroups::All) {
            Ok(CpuState::X86(s)) => {
                format!("{:?} at {:#x}:{:#x}, flags {:#x}, {:?}", s.mp_state, s.cs.base, s.rip, s.rflags, s.events)
            }
            other => format!("{other:?}"),
        }
    }

    /// Carries out what was asked of the machine so far; how the run ended, if it did.
    pub fn settle(&mut self) -> Option<RunEnd> {
        // A request behind all others, which ends the wait.
        self.machine.control().request(Request::Quit(mimus_machines::machine::control::QuitCause::Monitor));
        match self.machine.wait() {
            RunEnd::Quit(_) => None,
            end => Some(end),
        }
    }
}

/// Says on the real standard error, which the test runner does not keep to itself, that a test does not run.
pub fn skipped(test: &str, reason: &str) {
    // In one piece: tests run side by side.
    let _ = std::io::stderr().write_all(format!("SKIPPED ({test}): {reason}\n").as_bytes());
}

/// A little-endian number in a table.
pub fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    (0..width).map(|i| u64::from(bytes[at + i]) << (8 * i)).sum()
}

/// The ACPI tables of a machine that was booted without firmware, by signature, found as a system finds them.
pub fn acpi_tables(pc: &Pc) -> Vec<(String, Vec<u8>)> {
    let rsdp = (0xe_0000..0x10_0000).step_by(16).find(|at| pc.bytes(*at, 8) == b"RSD PTR ").expect("a root pointer");
    let rsdp = pc.bytes(rsdp, 36);
    let sum = |b: &[u8]| b.iter().fold(0u8, |s, x| s.wrapping_add(*x));
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let table = |address: u64| {
        let len = pc.load(address + 4, 4) as usize;
        let bytes = pc.bytes(address, len);
        assert!(sum(&bytes) == 0 || bytes.starts_with(b"FACS"));
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    };
    let xsdt = table(number(&rsdp, 24, 8)).1;
    let mut out: Vec<_> = xsdt[36..].chunks(8).map(|c| table(number(c, 0, 8))).collect();
    let fadt = out.iter().find(|t| t.0 == "FACP").expect("a FADT").1.clone();
    out.push(table(number(&fadt, 140, 8)));
    out
}

/// The LAPIC's registers.
const LAPIC: u64 = 0xfee0_0000;

/// Code that gives `vector` a gate to `handler` in the table at `idt`, loads that (its pointer is at `idtr`), and turns
/// the local APIC on, whose address it leaves in RBX. Spoils RAX.
pub fn handle_interrupts(
    a: &mut CodeAssembler,
    handler: CodeLabel,
    idt: u64,
    idtr: u64,
    vector: u64,
) -> Result<(), IcedError> {
    a.lea(rax, ptr(handler))?;
    // Low word, selector and type, middle word, high half of the gate.
    a.mov(ebx, (idt + vector * 16) as u32)?;
    a.mov(word_ptr(rbx), ax)?;
    a.shr(rax, 16)?;
    a.mov(dword_ptr(rbx + 2), 0x8e00_0010u32 as i32)?;
    a.mov(word_ptr(rbx + 6), ax)?;
    a.mov(qword_ptr(rbx + 8), 0)?;
    a.mov(ebx, idtr as u32)?;
    a.lidt(ptr(rbx))?;
    a.mov(ebx, LAPIC as u32)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}
