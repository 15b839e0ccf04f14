// UNSAFE: gives memory to the kernel for the bare loop.
//! What an exit costs: our handling on top of the kernel's own, and QEMU's whole beside ours.
//!
//! `cargo bench -p mimus-accel-kvm`. Each row is the same guest loop, in turn under a bare `KVM_RUN` loop that only
//! answers, and under the accelerator with a bus that only counts; the times are CPU time of the thread per exit, the
//! least of many batches, since other work on the host only adds. With `qemu-system-x86_64` on the path, the loop
//! runs there as firmware too; its time is CPU time of the process, and ours beside it that of the vCPU's thread.
#![allow(unsafe_code)]

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    println!("SKIPPED (exits): there is no support for this host's architecture yet");
}

#[cfg(target_arch = "x86_64")]
fn main() {
    x86::main();
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Kvm, VcpuExit as Exit, VcpuFd, VmFd};
    use mimus_accel_kvm::KvmAccelerator;
    use mimus_arch::x86::state::attr;
    use mimus_arch::x86::{MpState, Segment};
    use mimus_arch::{CpuModel, GuestArch, StateGroups};
    use mimus_core::accel::*;
    use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
    use mimus_core::clock::VirtualClock;
    use mimus_core::memory::*;
    use rustix::time::{ClockId, clock_gettime};
    use std::collections::BTreeMap;
    use std::io::Write;
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    const RAM: u64 = 0x8_0000;
    const CODE: u16 = 0x1000;
    /// Exits of a batch, and batches of a row.
    const BATCH: u64 = 2000;
    const BATCHES: usize = 40;
    /// Exits that QEMU makes in its longer run.
    const QEMU_EXITS: u32 = 200_000;

    /// `out 0x80, al`
    const PORT: &[u8] = &[0xe6, 0x80];
    /// `mov [0x10000000], al`: a store where there is no memory.
    const STORE: &[u8] = &[0x67, 0xa2, 0, 0, 0, 0x10];
    /// The same with a load.
    const LOAD: &[u8] = &[0x67, 0xa0, 0, 0, 0, 0x10];

    /// `l: body; dec ecx; jnz l`: the loop that all make, in 16-bit mode with a large data segment.
    fn repeated(body: &[u8]) -> Vec<u8> {
        let back = -(body.len() as i32 + 4);
        [body, &[0x66, 0x49, 0x75, back as u8]].concat()
    }

    /// `sti; l: hlt; jmp l`, and a handler: `out 0x80, al; iret`.
    const HALT: &[u8] = &[0xfb, 0xf4, 0xeb, 0xfd];
    const HANDLER: &[u8] = &[0xe6, 0x80, 0xcf];
    const HANDLER_AT: u16 = 0x2000;
    const VECTOR: u8 = 0x40;

    fn cpu_time() -> Duration {
        let t = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    }

    /// The loop with nothing of ours.
    struct Bare {
        _vm: VmFd,
        vcpu: VcpuFd,
        _ram: Arc<RamBlock>,
    }

    impl Bare {
        fn new(kvm: &Kvm, code: &[u8]) -> Self {
            let vm = kvm.create_vm().expect("a VM");
            vm.set_tss_address(0xfeff_d000).expect("a place");
            let ram = GuestRam::new().add_block("bare", RAM, RamBacking::Private).expect("RAM");
            assert!(ram.write(CODE.into(), code));
            let region = kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: 0,
                memory_size: RAM,
                userspace_addr: ram.host_ptr(0) as u64,
            };
            // SAFETY: the block is RAM bytes long and lives as long as the VM.
            unsafe { vm.set_user_memory_region(region) }.expect("memory");
            let vcpu = vm.create_vcpu(0).expect("a vCPU");
            let mut sregs = vcpu.get_sregs().expect("registers");
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            (sregs.ds.limit, sregs.ds.g) = (u32::MAX, 1);
            vcpu.set_sregs(&sregs).expect("registers");
            let mut regs = vcpu.get_regs().expect("registers");
            (regs.rip, regs.rsp, regs.rflags) = (CODE.into(), 0x8000, 2);
            vcpu.set_regs(&regs).expect("registers");
            Self { _vm: vm, vcpu, _ram: ram }
        }

        fn batch(&mut self) -> Duration {
            let start = cpu_time();
            for _ in 0..BATCH {
                match self.vcpu.run().expect("a run") {
                    Exit::MmioRead(_, data) => data.fill(0),
                    Exit::IoOut(..) | Exit::MmioWrite(..) => {}
                    other => panic!("{other:?}"),
                }
            }
            cpu_time() - start
        }
    }

    /// A bus that counts, and kicks every [`BATCH`] exits.
    struct Bus {
        clock: Arc<VirtualClock>,
        memory: Arc<AddressSpace>,
        count: AtomicU64,
        stop_every: u64,
        handle: Arc<dyn VcpuHandle>,
    }

    impl Bus {
        fn see(&self) {
            let count = self.count.load(Ordering::Relaxed) + 1;
            self.count.store(count, Ordering::Release);
            if count.is_multiple_of(self.stop_every) {
                self.handle.kick();
            }
        }
    }

    impl CpuIo for Bus {
        fn mem_read(&self, _: VcpuIndex, _: GuestPhys, _: AccessSize, _: MemTxAttrs) -> (u64, MemTxResult) {
            self.see();
            (0, MemTxResult::Ok)
        }
        fn mem_write(&self, _: VcpuIndex, _: GuestPhys, _: AccessSize, _: MemTxAttrs, _: u64) -> MemTxResult {
            self.see();
            MemTxResult::Ok
        }
        fn pio_write(&self, _: VcpuIndex, _: u16, _: AccessSize, _: u64) {
            self.see();
        }
        fn acknowledge_interrupt(&self, _: VcpuIndex) -> Option<u8> {
            self.handle.set_pin(CpuPin::Intr, false);
            Some(VECTOR)
        }
        fn clock(&self) -> &VirtualClock {
            &self.clock
        }
        fn memory(&self) -> &AddressSpace {
            &self.memory
        }
    }

    struct Ours {
        vcpu: Box<dyn Vcpu>,
        bus: Arc<Bus>,
        chip: Option<Arc<dyn IrqChip>>,
        _vm: Arc<dyn AccelVm>,
    }

    impl Ours {
        fn new(code: &[u8], mode: IrqChipMode, stop_every: u64) -> Self {
            let map = MemoryMap::new();
            let root = MemoryRegion::container("system", 1 << 32);
            let memory = map.address_space("system", &root);
            let ram = GuestRam::new();
            let block = ram.add_block("ram", RAM, RamBacking::Private).expect("RAM");
            assert!(block.write(CODE.into(), code) && block.write(HANDLER_AT.into(), HANDLER));
            let entry = [HANDLER_AT as u8, (HANDLER_AT >> 8) as u8, 0, 0];
            assert!(block.write(u64::from(VECTOR) * 4, &entry));
            let clock = VirtualClock::new();
            let (smp, options) = (1, BTreeMap::new());
            let (m, c) = (memory.clone(), clock.clone());
            let config = VmConfig { arch: GuestArch::X86_64, memory: m, ram, smp, clock: c, options };
            let vm = KvmAccelerator.create_vm(&config).expect("a VM");
            memory.add_listener(vm.memory_listener().expect("a listener"));
            map.change(|t| _ = t.map(&root, 0, &MemoryRegion::ram("ram", &block)));
            let chip = vm.create_irqchip(mode).expect("controllers");
            let model = CpuModel::default_for(GuestArch::X86_64).expect("a model");
            let mut vcpu = vm.create_vcpu(VcpuIndex(0), &model).expect("a vCPU");
            let mut state = vcpu.get_state(StateGroups::All);
            let s = state.as_x86_mut().expect("x86");
            s.cs = Segment::real(0, attr::CODE);
            s.ds = Segment::flat(0, attr::DATA);
            (s.rip, s.gpr[4], s.mp_state) = (CODE.into(), 0x8000, MpState::Running);
            vcpu.set_state(&state).expect("a state");
            // The local APIC on, by its state.
            if let Some((_, lapic)) = chip.as_ref().and_then(|c| c.devices().pop()) {
                let mut apics: mimus_arch::x86::irqchip::LapicsState =
                    lapic.save().expect("saved").decode().expect("read");
                apics.apics[0].svr = 0x1ff;
                let payload = mimus_core::snapshot::Payload::encode(irqchip::LAPIC_SCHEMA, &apics).expect("encoded");
                lapic.restore(&payload).expect("restored");
            }
            let handle = vcpu.handle();
            let bus = Arc::new(Bus { clock, memory, count: AtomicU64::new(0), stop_every, handle });
            Self { vcpu, bus, chip, _vm: vm }
        }

        fn batch(&mut self) -> Duration {
            let start = cpu_time();
            let exit = self.vcpu.run(&*self.bus);
            let time = cpu_time() - start;
            assert!(matches!(exit, VcpuExit::Kicked), "{exit:?}");
            time
        }
    }

    /// Least time per exit in ns of both, in turn.
    fn compare(kvm: &Kvm, code: &[u8]) -> (f64, f64) {
        let (mut bare, mut ours) = (Bare::new(kvm, code), Ours::new(code, IrqChipMode::User, BATCH));
        let (mut least_bare, mut least_ours) = (Duration::MAX, Duration::MAX);
        for _ in 0..BATCHES {
            least_bare = least_bare.min(bare.batch());
            least_ours = least_ours.min(ours.batch());
        }
        let each = |d: Duration| d.as_nanos() as f64 / BATCH as f64;
        (each(least_bare), each(least_ours))
    }

    /// Time from the interrupt to its handler's `OUT` at the bus, ns, least and middle of many: the vCPU is halted.
    fn wake_up(mode: IrqChipMode) -> (f64, f64) {
        let ours = Ours::new(HALT, mode, u64::MAX);
        let (bus, handle) = (ours.bus.clone(), ours.vcpu.handle());
        let gsi = ours.chip.as_ref().map(|c| c.gsi());
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (runner_bus, runner_stop, signal) = (bus.clone(), stop.clone(), handle.signal().clone());
        let mut vcpu = ours.vcpu;
        let runner = std::thread::spawn(move || {
            while !runner_stop.load(Ordering::Relaxed) {
                match vcpu.run(&*runner_bus) {
                    VcpuExit::Halted => _ = signal.wait(None),
                    VcpuExit::Kicked => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        let mut times = Vec::new();
        for i in 0..400 {
            std::thread::sleep(Duration::from_micros(300));
            let start = Instant::now();
            match &gsi {
                Some(gsi) => _ = gsi.msi(0xfee0_0000, VECTOR.into(), mimus_core::bus::Requester::Unspecified),
                None => handle.set_pin(CpuPin::Intr, true),
            }
            while bus.count.load(Ordering::Acquire) <= i {
                assert!(start.elapsed() < Duration::from_secs(10), "interrupt {i} is lost");
                std::hint::spin_loop();
            }
            times.push(start.elapsed().as_nanos() as f64);
        }
        stop.store(true, Ordering::Relaxed);
        handle.kick();
        runner.join().expect("joined");
        times.sort_by(f64::total_cmp);
        (times[0], times[times.len() / 2])
    }

    /// Firmware that makes `exits` exits, then leaves by the debug-exit port 0xf4. It starts at the reset vector and
    /// gives DS a limit of 4 GiB first: below 1 MiB that machine has memory everywhere.
    fn firmware(body: &[u8], exits: u32) -> Vec<u8> {
        let mut rom = vec![0xf4; 0x1_0000];
        // lgdt cs:[0x7f0]; mov eax, cr0; or al, 1; mov cr0, eax; jmp $+2
        let mut code =
            vec![0x66, 0x2e, 0x0f, 0x01, 0x16, 0xf0, 0x07, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xeb, 0];
        // mov bx, 8; mov ds, bx; and al, 0xfe; mov cr0, eax; mov ecx, exits
        code.extend([0xbb, 8, 0, 0x8e, 0xdb, 0x24, 0xfe, 0x0f, 0x22, 0xc0, 0x66, 0xb9]);
        code.extend(exits.to_le_bytes());
        rom[0x7f0..0x7f6].copy_from_slice(&[0x0f, 0, 0x00, 0x08, 0xff, 0xff]);
        rom[0x800..0x808].fill(0);
        rom[0x808..0x810].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]);
        code.extend(repeated(body));
        // mov al, 0; out 0xf4, al; hlt
        code.extend([0xb0, 0x00, 0xe6, 0xf4, 0xf4]);
        rom[..code.len()].copy_from_slice(&code);
        // jmp near to the start of the segment.
        rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
        rom
    }

    /// CPU seconds of one run of QEMU.
    fn qemu_run(rom: &[u8]) -> Option<f64> {
        let path = std::env::temp_dir().join(format!("mimus-exits-{}.bin", std::process::id()));
        std::fs::write(&path, rom).ok()?;
        let before = children_time()?;
        let status = Command::new("qemu-system-x86_64")
            .args(["-accel", "kvm", "-M", "isapc", "-m", "4", "-display", "none", "-nodefaults", "-no-user-config"])
            .args(["-vga", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-bios"])
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let _ = std::fs::remove_file(&path);
        (status.ok()?.code() == Some(1)).then_some(children_time()? - before)
    }

    /// CPU seconds of children that have ended: fields 16 and 17 of `/proc/self/stat`, in ticks of 10 ms.
    fn children_time() -> Option<f64> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some((fields.get(13)?.parse::<f64>().ok()? + fields.get(14)?.parse::<f64>().ok()?) / 100.0)
    }

    /// QEMU's time per exit in ns: the longer run less one with next to no exits.
    fn qemu(body: &[u8]) -> Option<f64> {
        let (long, short) = (firmware(body, QEMU_EXITS), firmware(body, 1));
        let mut least = (f64::MAX, f64::MAX);
        for _ in 0..3 {
            least = (least.0.min(qemu_run(&long)?), least.1.min(qemu_run(&short)?));
        }
        Some((least.0 - least.1) * 1e9 / f64::from(QEMU_EXITS))
    }

    pub fn main() {
        if let Err(e) = KvmAccelerator.probe(GuestArch::X86_64) {
            println!("SKIPPED (exits): {e}");
            return;
        }
        let kvm = Kvm::new().expect("opened before");
        println!("CPU time per exit, ns                 bare KVM_RUN     ours    on top     QEMU");
        let rows = [("port write (PIO)", PORT), ("register write (MMIO)", STORE), ("register read (MMIO)", LOAD)];
        for (name, body) in rows {
            let (bare, ours) = compare(&kvm, &repeated(body));
            let qemu = qemu(body).map_or("      --".to_owned(), |ns| format!("{ns:8.0}"));
            println!("{name:<37} {bare:12.0} {ours:8.0} {:9.0} {qemu}", ours - bare);
        }
        println!("Halted vCPU, interrupt to its handler's port write, ns       least   middle");
        for (name, mode) in
            [("controllers in the kernel (MSI)", IrqChipMode::Kernel), ("outside (INTR)", IrqChipMode::User)]
        {
            let (least, middle) = wake_up(mode);
            println!("{name:<59} {least:7.0} {middle:8.0}");
        }
        let _ = std::io::stdout().flush();
    }
}
