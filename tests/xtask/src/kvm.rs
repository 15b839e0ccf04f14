//! `cargo xtask bench kvm`: what exits and starts cost under KVM, in whole programs, beside QEMU's.
//!
//! The guests are ROMs of a few instructions, the same for both; each figure is the least of several runs made in
//! turn. Exits are CPU time of the process per exit: a run with many less one with next to none.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Exits of the longer run, and of the shorter.
const EXITS: u32 = 200_000;
/// Wake-ups of the longer run.
const WAKE_UPS: u32 = 5000;
const RUNS: usize = 3;
const STARTS: usize = 20;
/// Least a machine's other memory may be mapped as, to count as guest RAM.
const RAM: u64 = 2 << 30;
/// Where serial port and exit port are.
const SERIAL: u16 = 0x3f8;
const EXIT: u16 = 0xf4;

/// Runs all of it.
pub fn bench(args: &[&str]) -> anyhow::Result<()> {
    if let Some(other) = args.first() {
        bail!("bench kvm takes no {other}");
    }
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("SKIPPED (bench kvm): /dev/kvm: {e}");
        return Ok(());
    }
    crate::cargo(&["build", "--release", "-p", "mimus"])?;
    crate::cargo(&["bench", "-q", "-p", "mimus-accel-kvm", "--bench", "exits"])?;
    let dir = std::env::temp_dir().join(format!("mimus-bench-kvm-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = whole_programs(&dir);
    let _ = std::fs::remove_dir_all(&dir);
    result
}

/// One of the two programs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Mimus,
    Qemu,
}

impl Program {
    /// The command of a PC with this ROM.
    fn command(self, rom: &Path, memory: &str) -> Command {
        let mut c = match self {
            Self::Mimus => {
                let mut c = Command::new(crate::root().join("target/release/mimus"));
                c.args(["system", "x86_64"]);
                c
            }
            Self::Qemu => Command::new("qemu-system-x86_64"),
        };
        c.args(["-accel", "kvm", "-M", "pc,kernel-irqchip=on", "-m", memory, "-nodefaults"]);
        c.args(["-display", "none", "-monitor", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-bios"]);
        c.arg(rom).stdin(Stdio::null()).stderr(Stdio::null());
        if self == Self::Qemu {
            c.args(["-vga", "none", "-no-user-config", "-net", "none"]);
        }
        c
    }
}

fn whole_programs(dir: &Path) -> anyhow::Result<()> {
    let both = [Program::Mimus, Program::Qemu];
    println!("\nWhole programs, CPU time per exit, ns        mimus     QEMU   ratio");
    for (name, body, count) in rows() {
        let long = write(dir, "long", &rom(&body, count))?;
        let short = write(dir, "short", &rom(&body, 1))?;
        let mut least = [[f64::MAX; 2]; 2];
        for _ in 0..RUNS {
            for (i, program) in both.into_iter().enumerate() {
                for (j, rom) in [&long, &short].into_iter().enumerate() {
                    least[i][j] = least[i][j].min(cpu_time(program.command(rom, "8"))?);
                }
            }
        }
        let each = least.map(|[long, short]| (long - short) * 1e9 / f64::from(count));
        println!("{name:<42} {:8.0} {:8.0} {:7.2}", each[0], each[1], each[0] / each[1]);
    }
    let hello = write(dir, "hello", &rom_of(&[&out(SERIAL, b'x')[..], &[0xfa, 0xf4, 0xeb, 0xfd]].concat()))?;
    let mut start = [f64::MAX; 2];
    let mut memory = [(u64::MAX, u64::MAX); 2];
    for _ in 0..STARTS {
        for (i, program) in both.into_iter().enumerate() {
            let (ms, resident) = first_instruction(program.command(&hello, "2G"))?;
            start[i] = start[i].min(ms);
            memory[i] = memory[i].min(resident);
        }
    }
    println!("\n2 GiB machine                              mimus     QEMU   ratio");
    println!("start to first guest instruction, ms     {:7.1} {:8.1} {:7.2}", start[0], start[1], start[0] / start[1]);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let row = |name: &str, of: fn(&(u64, u64)) -> u64| {
        let [a, b] = [mib(of(&memory[0])), mib(of(&memory[1]))];
        println!("{name:<40} {a:7.1} {b:8.1} {:7.2}", a / b);
    };
    row("resident beyond guest RAM, MiB", |m| m.0);
    row("  of that its own (not of files), MiB", |m| m.1);
    Ok(())
}

fn rows() -> Vec<(&'static str, Vec<u8>, u32)> {
    // mov [0x10000000], al and back: there is no memory.
    let (store, load) = ([0x67, 0xa2, 0, 0, 0, 0x10].to_vec(), [0x67, 0xa0, 0, 0, 0, 0x10].to_vec());
    // The same with a device's register, that of the HPET.
    let hpet = [0x67, 0xa1, 0, 0, 0xd0, 0xfe].to_vec();
    vec![
        ("port write (PIO)", out(0x80, 0)[2..].to_vec(), EXITS),
        ("write where nothing is (MMIO)", store, EXITS),
        ("read where nothing is (MMIO)", load, EXITS),
        ("read of a device's register (MMIO)", hpet, EXITS),
        ("timer armed, HLT, wake-up", halt(), WAKE_UPS),
    ]
}

/// `mov al, value; out port, al`, through DX where the port is above 255.
fn out(port: u16, value: u8) -> Vec<u8> {
    match u8::try_from(port) {
        Ok(port) => vec![0xb0, value, 0xe6, port],
        Err(_) => vec![0xba, port as u8, (port >> 8) as u8, 0xb0, value, 0xee],
    }
}

/// Arms the interval timer for 100 ticks (84 µs), halts, and is woken by it.
fn halt() -> Vec<u8> {
    // cli; the counter in mode 0; sti; hlt
    [&[0xfa][..], &out(0x43, 0x30), &out(0x40, 100), &out(0x40, 0), &[0xfb, 0xf4]].concat()
}

/// A ROM that makes a loop of `body`, `count` times, and leaves by the exit port.
fn rom(body: &[u8], count: u32) -> Vec<u8> {
    let mut code = set_up();
    code.extend([0x66, 0xb9]);
    code.extend(count.to_le_bytes());
    // body; dec ecx; jnz body
    let back = body.len() + 4;
    code.extend(body);
    code.extend(match i8::try_from(back) {
        Ok(_) => [0x66, 0x49, 0x75, (back as u8).wrapping_neg()],
        Err(_) => [0xf4; 4],
    });
    code.extend(out(EXIT, 0));
    code.push(0xf4);
    rom_of(&code)
}

/// DS with a limit of 4 GiB; a stack; the PIC with the timer's vector 0x40, whose handler ends the interrupt; the local APIC.
fn set_up() -> Vec<u8> {
    // lgdt cs:[0x7f0]; mov eax, cr0; or al, 1; mov cr0, eax; jmp $+2
    let mut code =
        vec![0x66, 0x2e, 0x0f, 0x01, 0x16, 0xf0, 0x07, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xeb, 0];
    // mov bx, 8; mov ds, bx; and al, 0xfe; mov cr0, eax; xor bx, bx; mov ss, bx; mov sp, 0x8000
    code.extend([0xbb, 8, 0, 0x8e, 0xdb, 0x24, 0xfe, 0x0f, 0x22, 0xc0, 0x31, 0xdb, 0x8e, 0xd3, 0xbc, 0, 0x80]);
    // mov word [0x100], 0x7e0; mov word [0x102], 0xf000
    code.extend([0xc7, 0x06, 0x00, 0x01, 0xe0, 0x07, 0xc7, 0x06, 0x02, 0x01, 0x00, 0xf0]);
    for (port, value) in [(0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0xa1, 0xff)] {
        code.extend(out(port, value));
    }
    // The local APIC on, with the PIC on its LINT0, as firmware leaves it: mov dword [address], value.
    for (address, value) in [(0xfee0_00f0u32, 0x1ffu32), (0xfee0_0350, 0x700)] {
        code.extend([0x66, 0x67, 0xc7, 0x05]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    code
}

/// 64 KiB at the top of the address space that start with `code`.
fn rom_of(code: &[u8]) -> Vec<u8> {
    let mut rom = vec![0xf4; 0x1_0000];
    rom[..code.len()].copy_from_slice(code);
    rom[0x7f0..0x7f6].copy_from_slice(&[0x0f, 0, 0x00, 0x08, 0xff, 0xff]);
    rom[0x800..0x808].fill(0);
    rom[0x808..0x810].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]);
    // push ax; mov al, 0x20; out 0x20, al; pop ax; iret
    rom[0x7e0..0x7e7].copy_from_slice(&[0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf]);
    // jmp far 0xf000:0
    rom[0xfff0..0xfff5].copy_from_slice(&[0xea, 0, 0, 0x00, 0xf0]);
    rom
}

fn write(dir: &Path, name: &str, rom: &[u8]) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, rom).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// CPU seconds of a run that ends by the exit port.
fn cpu_time(mut command: Command) -> anyhow::Result<f64> {
    let before = children_time()?;
    let status = command.stdout(Stdio::null()).status().with_context(|| format!("{command:?}"))?;
    if status.code() != Some(1) {
        bail!("{command:?}: {status}");
    }
    Ok(children_time()? - before)
}

/// CPU seconds of children that have ended.
pub fn children_time() -> anyhow::Result<f64> {
    // Fields 16 and 17, in ticks of 10 ms (proc_pid_stat(5)).
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').map_or(Vec::new(), |(_, rest)| rest.split_whitespace().collect());
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok());
    let (user, system) = ticks(13).zip(ticks(14)).context("/proc/self/stat")?;
    Ok((user + system) / 100.0)
}

/// Wall time from the program's start to the guest's first output, in ms, and what is resident then.
fn first_instruction(mut command: Command) -> anyhow::Result<(f64, (u64, u64))> {
    command.args(["-serial", "stdio"]).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    let mut byte = [0];
    let read = child.stdout.take().context("a pipe")?.read_exact(&mut byte);
    let ms = start.elapsed().as_secs_f64() * 1e3;
    std::thread::sleep(Duration::from_millis(20));
    let resident = resident(&child);
    let _ = child.kill();
    let _ = child.wait();
    read.with_context(|| format!("{command:?} says nothing"))?;
    Ok((ms, resident?))
}

/// Resident bytes of all mappings but guest RAM; of those, anonymous ones.
fn resident(child: &Child) -> anyhow::Result<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps", child.id()))?;
    let (mut size, mut all, mut own) = (0, 0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(kib)) = (words.next(), words.next().and_then(|n| n.parse::<u64>().ok())) else { continue };
        match key {
            "Size:" => size = kib << 10,
            "Rss:" if size < RAM => all += kib << 10,
            "Anonymous:" if size < RAM => own += kib << 10,
            _ => {}
        }
    }
    Ok((all, own))
}
