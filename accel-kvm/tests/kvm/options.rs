//! Options, models, refusals.

use crate::harness::*;
use iced_x86::code_asm::*;
use mimus_accel_kvm::KvmAccelerator;
use mimus_arch::{CpuModel, GuestArch};
use mimus_core::accel::*;
use mimus_core::clock::VirtualClock;
use mimus_core::memory::{GuestRam, MemoryMap, MemoryRegion};

/// Makes a VM with this configuration; the error's text.
fn refusal(setup: &Setup, arch: GuestArch) -> String {
    attempt(setup, arch).expect_err("it was made")
}

fn attempt(setup: &Setup, arch: GuestArch) -> Result<(), String> {
    let map = MemoryMap::new();
    let root = MemoryRegion::container("system", 1 << 32);
    let memory = map.address_space("system", &root);
    let config = VmConfig { arch, ..config(setup, &memory, &GuestRam::new(), &VirtualClock::new()) };
    KvmAccelerator.create_vm(&config).map(drop).map_err(|e| e.to_string())
}

#[test]
fn refusals_say_what_to_do() {
    // None of these needs KVM.
    let text = refusal(&Setup::default(), GuestArch::Riscv64);
    assert!(text.contains("riscv64") && text.contains("-accel tcg"), "{text}");
    assert!(KvmAccelerator.probe(GuestArch::Aarch64).unwrap_err().to_string().contains("aarch64"));
    let text = refusal(&Setup::default().option("tb-size", "1"), GuestArch::X86_64);
    assert!(text.contains("tb-size") && text.contains("kernel-irqchip"), "{text}");
    let text = refusal(&Setup::default().option("device", "/dev/no-such-kvm"), GuestArch::X86_64);
    assert!(text.contains("/dev/no-such-kvm does not exist") && text.contains("modprobe"), "{text}");
    let text = refusal(&Setup::default().option("device", "/dev/null"), GuestArch::X86_64);
    assert!(text.contains("/dev/null is not KVM's device"), "{text}");
    let text = refusal(&Setup::default(), GuestArch::Ppc64le);
    assert!(!text.contains('\n'), "one line: {text}");
}

#[test]
fn too_many_vcpus() {
    let Some(g) = Setup::default().build("too_many_vcpus") else { return };
    let most = g.vm.caps().max_vcpus;
    let text = refusal(&Setup::default().smp(most + 1), GuestArch::X86_64);
    assert!(text.contains(&format!("use -smp {most} or less")), "{text}");
}

#[test]
fn options_take_effect() {
    let name = "options_take_effect";
    let setup = |key, value| Setup::default().option(key, value);
    let Some(g) = setup("kernel-irqchip", "split").build(name) else { return };
    assert_eq!(g.vm.irqchip_mode(), IrqChipMode::Split);
    for (key, value) in [("halt-poll-ns", "0"), ("dirty-ring-size", "4096"), ("pit-reinject", "off")] {
        assert!(setup(key, value).build(name).is_some(), "{key}");
    }
    let Some(g) = Setup { mode: IrqChipMode::Kernel, ..setup("pit-reinject", "off") }.build(name) else { return };
    assert_eq!(g.vm.irqchip_mode(), IrqChipMode::Kernel, "the default");
    let again = g.vm.create_irqchip(IrqChipMode::Kernel);
    assert!(again.err().is_some_and(|e| e.to_string().contains("once, before vCPUs")));
}

#[test]
fn sixty_four_vcpus() {
    let Some(mut g) = Setup::mode(IrqChipMode::Kernel).smp(64).build("sixty_four_vcpus") else { return };
    assert_eq!(g.vcpus.len(), 64);
    assert_eq!(g.state(63).mp_state, mimus_arch::x86::MpState::WaitForSipi);
}

#[test]
fn cpuid_shows_the_model() {
    let name = "cpuid_shows_the_model";
    let setup = Setup { model: "qemu64,-cx16,-kvmclock".to_owned(), ..Setup::default().smp(2) };
    let Some(mut g) = setup.build(name) else { return };
    g.long(0);
    g.code(CODE, 64, |a| {
        for (leaf, register) in [(0, ebx), (1, ecx), (1, ebx), (0x4000_0001, eax)] {
            a.mov(eax, leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.mov(eax, register)?;
            a.out(0x70, eax)?;
        }
        a.out(i32::from(PORT_STOP), al)
    });
    g.run_to_stop(0);
    let values = g.bus.out_values(0x70);
    assert_eq!(values[0], 0x6874_7541, "Auth(enticAMD)");
    assert_eq!(values[1] >> 13 & 1, 0, "CMPXCHG16B is off");
    assert_eq!(values[1] & 1, 1, "SSE3 is part of the model");
    assert_eq!(values[2] >> 16 & 0xff, 2, "two processors");
    assert_eq!(values[3] & 8, 0, "no kvmclock");
}

#[test]
fn models_are_filtered_by_the_host() {
    let name = "models_are_filtered_by_the_host";
    let Some(g) = Setup::default().build(name) else { return };
    let filter = |text: &str| g.vm.filter_cpu_model(&CpuModel::parse(GuestArch::X86_64, text).expect("a model"));
    let host = filter("host").expect("the host's");
    let host = host.as_x86().expect("x86");
    assert!(host.features.has_name("sse2") && !host.brand.is_empty() && host.family > 0);
    // No processor has both: 3DNow! left before AVX-512 came.
    let error = filter("qemu64,+3dnow,+avx512f").expect_err("refused").to_string();
    assert!(error.contains("3dnow") && error.contains("leave it out"), "{error}");
}

#[test]
fn quirks_are_found_by_probing() {
    let name = "quirks_are_found_by_probing";
    if Setup::default().build(name).is_none() {
        return;
    }
    let start = std::time::Instant::now();
    let quirks = quirks();
    println!("{:?} in {:?}", quirks.names(), start.elapsed());
    // A KVM with hardware behind it shows none of those that come from emulation.
    if !quirks.emulated_cpl0 {
        assert!(!quirks.syscall_keeps_cpl && !quirks.no_32bit_paging, "{quirks:?}");
    }
}

/// A guest that may keep its processor while it waits is woken all the same.
#[test]
fn waiting_on_the_processor() {
    let name = "waiting_on_the_processor";
    let setup = Setup::mode(IrqChipMode::Kernel).option("cpu-pm", "on");
    if Setup::default().build(name).is_some()
        && let Err(e) = attempt(&setup, GuestArch::X86_64)
    {
        assert!(e.contains("leave cpu-pm=on out"), "{e}");
        return skipped(name, e);
    }
    let Some(mut g) = setup.build(name) else { return };
    g.long(0);
    g.gate(0x70, 0x2000);
    g.code(0x2000, 64, |a| a.out(i32::from(PORT_STOP), al));
    g.code(CODE, 64, |a| {
        a.mov(ebx, 0xfee0_0000u32)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 0x70)?;
        a.mov(dword_ptr(rbx + 0x380), 1_000_000)?;
        a.sti()?;
        a.hlt()?;
        a.hlt()
    });
    g.run_to_stop(0);
}

/// The deadline timer is offered whoever runs the local APIC: one outside of the kernel is told what the counters show.
#[test]
fn deadline_timers_and_nested_guests() {
    let name = "deadline_timers_and_nested_guests";
    for mode in [IrqChipMode::User, IrqChipMode::Split, IrqChipMode::Kernel] {
        let Some(g) = Setup::mode(mode).build(name) else { return };
        let model = CpuModel::parse(GuestArch::X86_64, "max").expect("a model");
        let filtered = g.vm.filter_cpu_model(&model).expect("filtered");
        let features = filtered.as_x86().expect("x86").features.to_string();
        let deadline = features.split([' ', ',']).any(|f| f == "tsc-deadline");
        assert!(deadline, "{mode:?}: {features}");
    }
    let Some(mut g) = Setup::default().build(name) else { return };
    let tsc = g.vm.tsc().expect("counters");
    assert!(tsc.hz() >= 1_000_000);
    g.long(0);
    g.code(CODE, 64, |a| {
        a.rdtsc()?;
        a.mov(dword_ptr(DATA), eax)?;
        a.mov(dword_ptr(DATA + 4), edx)?;
        a.out(i32::from(PORT_STOP), al)
    });
    let before = tsc.now(VcpuIndex(0));
    g.run_to_stop(0);
    let (seen, after) = (g.load(DATA), tsc.now(VcpuIndex(0)));
    assert!((before..=after).contains(&seen), "{before} {seen} {after}");
    for nested in ["vmx", "svm"] {
        let model = CpuModel::parse(GuestArch::X86_64, &format!("qemu64,+{nested}")).expect("a model");
        // A host may have one of them.
        if let Err(e) = g.vm.filter_cpu_model(&model) {
            assert!(e.to_string().contains("nested virtualisation"), "{e}");
        }
    }
}
