//! A machine that KVM runs goes on under the translator, and back: registers, vector registers, local APIC, interrupts
//! and timers move as one state.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mimus_accel_kvm::KvmAccelerator;
use mimus_core::accel::{AccelCaps, AccelError, AccelVm, Accelerator, Unavailable, VmConfig};
use mimus_core::arch::GuestArch;
use mimus_machines::machine::RunEnd;
use mimus_tcg::{TcgAccelerator, TcgFallback};

use crate::harness::{Pc, Setup, bzimage, skipped};

/// Where the program keeps its state.
const TICKS: u64 = 0x20_0000;
const SUM: u64 = 0x20_0008;
const ROUNDS: u64 = 0x20_0010;
/// Ticks that the program waits for.
const ENOUGH: u64 = 40;

/// The kernel's code, at its 64-bit entry point: an interrupt table, the local APIC's timer, and a loop that computes
/// with x87, SSE and integer registers until there were enough ticks.
fn program() -> Vec<u8> {
    let mut code = vec![0xfa, 0xbc, 0x00, 0x00, 0x21, 0x00]; // cli; mov esp, 0x210000
    let mut put = |bytes: &[u8]| code.extend(bytes);
    let dword = |v: u32| v.to_le_bytes();
    // The handler's code goes to 0x202000: inc qword [TICKS]; mov dword [0xfee000b0], 0 (EOI); iretq.
    let handler: &[u8] = &[
        0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, // inc qword [0x200000]
        0x50, 0xb8, 0xb0, 0x00, 0xe0, 0xfe, // push rax; mov eax, 0xfee000b0
        0xc7, 0x00, 0, 0, 0, 0, // mov dword [rax], 0
        0x58, 0x48, 0xcf, // pop rax; iretq
    ];
    for (i, chunk) in handler.chunks(8).enumerate() {
        let mut bytes = [0x90; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        put(&[0x48, 0xb8]); // mov rax, chunk
        put(&bytes);
        put(&[0x48, 0x89, 0x04, 0x25]); // mov [at], rax
        put(&dword(0x20_2000 + 8 * i as u32));
    }
    // Gate 0x40 of the table at 0x201000: the code segment that is loaded now.
    put(&[0x66, 0x8c, 0xc8]); // mov ax, cs
    put(&[0xc1, 0xe0, 0x10, 0x0d, 0x00, 0x20, 0x00, 0x00]); // shl eax, 16; or eax, 0x2000
    put(&[0x89, 0x04, 0x25]); // mov [gate], eax
    put(&dword(0x20_1400));
    put(&[0xc7, 0x04, 0x25]); // mov dword [gate + 4], 0x208e00
    put(&dword(0x20_1404));
    put(&dword(0x20_8e00));
    put(&[0x48, 0xc7, 0x04, 0x25]); // mov qword [gate + 8], 0
    put(&dword(0x20_1408));
    put(&dword(0));
    for (at, value) in [(TICKS, 0u32), (SUM, 0), (ROUNDS, 0)] {
        put(&[0x48, 0xc7, 0x04, 0x25]);
        put(&dword(at as u32));
        put(&dword(value));
    }
    // lidt [0x203000]
    put(&[0x66, 0xc7, 0x04, 0x25]);
    put(&dword(0x20_3000));
    put(&[0xff, 0x0f]);
    put(&[0x48, 0xc7, 0x04, 0x25]);
    put(&dword(0x20_3002));
    put(&dword(0x20_1000));
    put(&[0x0f, 0x01, 0x1c, 0x25]);
    put(&dword(0x20_3000));
    // Local APIC: on, divide by 16, timer periodic with vector 0x40, some milliseconds.
    for (register, value) in [(0xf0u32, 0x1ffu32), (0x3e0, 3), (0x320, 0x2_0040), (0x380, 500_000)] {
        put(&[0xb8]); // mov eax, register
        put(&dword(0xfee0_0000 + register));
        put(&[0xc7, 0x00]); // mov dword [rax], value
        put(&dword(value));
    }
    // cr4.OSFXSR; fninit; fldz; xorps xmm0; rbx = 0; sti
    put(&[0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x06, 0x00, 0x00, 0x0f, 0x22, 0xe0]);
    put(&[0xdb, 0xe3, 0xd9, 0xee, 0x0f, 0x57, 0xc0, 0x31, 0xdb, 0xfb]);
    // round: inc rbx; cvtsi2sd xmm1, rbx; addsd xmm0, xmm1; fld1; faddp;
    let round = [0x48, 0xff, 0xc3, 0xf2, 0x48, 0x0f, 0x2a, 0xcb, 0xf2, 0x0f, 0x58, 0xc1, 0xd9, 0xe8, 0xde, 0xc1];
    put(&round);
    // Some time with nothing: mov ecx, 200; dec ecx; jnz
    put(&[0xb9]);
    put(&dword(200));
    put(&[0xff, 0xc9, 0x75, 0xfc]);
    // cmp qword [TICKS], ENOUGH; jb round
    put(&[0x48, 0x83, 0x3c, 0x25]);
    put(&dword(TICKS as u32));
    put(&[ENOUGH as u8]);
    let back = round.len() as u8 + 5 + 4 + 9 + 2;
    put(&[0x72, back.wrapping_neg()]);
    // The sums, and how many rounds.
    put(&[0xfa, 0xf2, 0x48, 0x0f, 0x2d, 0xc0]); // cli; cvtsd2si rax, xmm0
    put(&[0x48, 0x89, 0x04, 0x25]); // mov [SUM], rax
    put(&dword(SUM as u32));
    put(&[0xdf, 0x3c, 0x25]); // fistp qword [ROUNDS]
    put(&dword(ROUNDS as u32));
    put(&[0x48, 0x89, 0x1c, 0x25]); // mov [ROUNDS + 8], rbx
    put(&dword(ROUNDS as u32 + 8));
    put(&[0x66, 0xba, 0xf4, 0x00, 0xb0, 0x21, 0xee, 0xf4, 0xeb, 0xfd]); // out 0xf4, 0x21; hlt
    code
}

fn kernel() -> Vec<u8> {
    let (mut kernel, code) = (bzimage(), program());
    assert!(code.len() < 0x800);
    kernel[0x600..0x600 + code.len()].copy_from_slice(&code);
    kernel
}

fn machine(accel: &str, board: &str, mode: &str) -> Pc {
    let mut setup = Setup::new(board).kernel(&kernel()).device("isa-debug-exit");
    setup.config.memory = 64 << 20;
    if accel == "kvm" {
        setup = setup.option("kernel-irqchip", mode);
        setup.accel = Box::new(KvmAccelerator);
        setup.emulation_failure = Some(Arc::new(TcgFallback));
    } else {
        setup.accel = Box::new(SmallTcg);
    }
    setup.start()
}

/// The translator with a small code cache: several machines' have room in one process.
struct SmallTcg;

impl Accelerator for SmallTcg {
    fn name(&self) -> &'static str {
        TcgAccelerator.name()
    }

    fn probe(&self, guest: GuestArch) -> Result<AccelCaps, Unavailable> {
        TcgAccelerator.probe(guest)
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn AccelVm>, AccelError> {
        let mut config = config.clone();
        config.options.insert("tb-size".to_owned(), "8M".to_owned());
        TcgAccelerator.create_vm(&config)
    }
}

fn wait_for_ticks(pc: &Pc, ticks: u64) {
    let until = Instant::now() + Duration::from_secs(120);
    while pc.load(TICKS, 8) < ticks {
        assert!(Instant::now() < until, "{} ticks came", pc.load(TICKS, 8));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Starts under one engine, is moved to the other and back, and ends with what it computed.
#[test]
fn engines_take_turns() {
    let name = "engines_take_turns";
    if let Err(why) = KvmAccelerator.probe(GuestArch::X86_64) {
        return skipped(name, &why.to_string());
    }
    for (board, mode) in [("q35", "on"), ("q35", "split"), ("microvm", "off")] {
        let mut pc = machine("kvm", board, mode);
        let mut moves = 0;
        for (i, accel) in ["tcg", "kvm", "tcg", "kvm"].into_iter().enumerate() {
            pc.machine.resume();
            wait_for_ticks(&pc, 5 * (i as u64 + 1));
            pc.machine.pause();
            let ticks = pc.load(TICKS, 8);
            assert!(ticks < ENOUGH, "it was not stopped in between");
            let mut file = std::io::Cursor::new(Vec::new());
            pc.machine.save(&mut file).unwrap();
            drop(pc);
            pc = machine(accel, board, mode);
            pc.machine.restore(&mut &file.into_inner()[..]).unwrap_or_else(|e| panic!("{board} to {accel}: {e}"));
            assert_eq!(pc.load(TICKS, 8), ticks);
            moves += 1;
        }
        pc.machine.resume();
        assert_eq!(pc.machine.wait(), RunEnd::Exit(0x21 << 1 | 1), "{board}");
        let (sum, counted, rounds) = (pc.load(SUM, 8), pc.load(ROUNDS, 8), pc.load(ROUNDS + 8, 8));
        assert_eq!((moves, counted), (4, rounds), "{board} {mode}");
        assert_eq!(sum, rounds * (rounds + 1) / 2, "{board} {mode}");
        assert!(pc.load(TICKS, 8) >= ENOUGH && rounds > 4);
    }
}
