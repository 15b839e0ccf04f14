//! Stock gdb and running guests.

use std::path::Path;
use std::process::{Command, Stdio};

use mimus_machines::guests::cpio::Archive;
use mimus_machines::guests::x86::{I386_BUSYBOX, I386_KERNEL, SEABIOS, X86_64_BUSYBOX, X86_64_KERNEL};
use mimus_machines::guests::{GuestSpec, RISCV64_BUSYBOX, RISCV64_KERNEL};

use crate::harness::{Dir, INIT, Mimus, guest, hex, skipped};

/// Whether there is a gdb for all guests; says so if not.
fn has_gdb(test: &str) -> bool {
    let has = Command::new("gdb-multiarch").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    if !has {
        skipped(test, "there is no gdb-multiarch");
    }
    has
}

/// Runs gdb with a script; all it says.
fn gdb(dir: &Dir, script: &str) -> String {
    let file = dir.path("script");
    let start = "set pagination off\nset confirm off\nset remotetimeout 100\n";
    std::fs::write(&file, format!("{start}{script}")).unwrap();
    let mut command = Command::new("timeout");
    let out = command.args(["150", "gdb-multiarch", "-nx", "-batch", "-x", &file]).output().expect("gdb runs");
    said(&out)
}

fn said(out: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

fn says(text: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(text.contains(wanted), "{wanted:?} is missing:\n{text}");
    }
}

/// The address of a symbol, from the guest's own table.
fn symbol(guest: &mut Mimus, name: &str) -> u64 {
    let line = guest.run(&format!("grep ' {name}$' /proc/kallsyms"));
    let address = line.split_whitespace().next().unwrap_or_default();
    u64::from_str_radix(address, 16).unwrap_or_else(|e| panic!("{name}: {line:?}: {e}"))
}

/// The address of the doubleword that disassembled 32-bit code loads.
fn operand(disassembly: &str) -> u64 {
    let operands = disassembly.lines().filter(|l| l.contains("mov")).flat_map(|l| l.split([' ', '\t', ',']).skip(1));
    let addresses = operands.filter_map(|o| o.strip_prefix("0xc")).filter(|o| !o.contains([':', '(']));
    let all: Vec<u64> = addresses.filter_map(|o| u64::from_str_radix(&format!("c{o}"), 16).ok()).collect();
    let found = all.iter().find(|a| all.contains(&(**a + 4)));
    *found.unwrap_or_else(|| panic!("no doubleword in\n{disassembly}"))
}

/// An architecture's Linux.
struct Linux {
    test: &'static str,
    arch: &'static str,
    kernel: &'static GuestSpec,
    image: &'static str,
    busybox: &'static GuestSpec,
    /// Physical address of a virtual one, given that of `first`.
    physical: fn(u64, u64) -> u64,
    first: &'static str,
    /// `/proc/kallsyms` has variables too.
    data_symbols: bool,
    /// What `printf` shows of the mode in the kernel.
    mode: (&'static str, &'static str),
}

impl Linux {
    fn initrd(&self, dir: &Dir, busybox: &Path) -> String {
        let mut archive = Archive::default();
        for d in ["bin", "dev", "etc", "modules"] {
            archive.directory(d);
        }
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("bin/busybox", 0o755, &std::fs::read(busybox.join("busybox")).unwrap());
        archive.file("modules/order", 0o644, b"");
        archive.file("init", 0o755, INIT.as_bytes());
        let path = dir.path("initrd.gz");
        std::fs::write(&path, archive.finish_gzip().unwrap()).unwrap();
        path
    }

    /// The session that is promised: the machine is reset under gdb's eyes and stopped at `start_kernel`.
    fn session(&self) {
        if !has_gdb(self.test) {
            return;
        }
        let Some(kernel) = guest(self.test, self.kernel) else { return };
        let Some(busybox) = guest(self.test, self.busybox) else { return };
        let dir = Dir::new(self.test);
        let (socket, initrd) = (dir.path("gdb"), self.initrd(&dir, &busybox));
        let image = kernel.join(self.image).to_str().unwrap().to_owned();
        let append = "console=ttyS0 quiet panic=-1 nokaslr";
        let server = format!("unix:{socket}");
        let mut args = vec!["system", self.arch, "-accel", "tcg", "-m", "512", "-nographic", "-kernel", &image];
        args.extend(["-initrd", &initrd, "-append", append, "-smp", "2", "-gdb", &server]);
        let mut guest = Mimus::start(&args);
        guest.wait_for("<<ready>>");
        let [first, start] = [self.first, "start_kernel"].map(|name| symbol(&mut guest, name));
        let physical = (self.physical)(start, first);
        // Some kernels' table has functions only: one of them reads it.
        let jiffies = if self.data_symbols {
            symbol(&mut guest, "jiffies")
        } else {
            let reader = symbol(&mut guest, "get_jiffies_64");
            operand(&gdb(&dir, &format!("target remote {socket}\nx/20i {reader:#x}\ndetach\n")))
        };
        let log = dir.path("packets");
        let script = format!(
            "set remotelogfile {log}\ntarget remote {socket}\ninfo threads\nmonitor system_reset\nmaintenance flush register-cache\n\
             hbreak *{start:#x}\ncontinue\nprintf \"at %lx mode {format}\\n\", $pc, {mode}\ndelete\nx/2i $pc\n\
             stepi 100\nprintf \"moved %d\\n\", $pc != {start:#x}\n\
             printf \"virtual %x\\n\", *(unsigned int*){start:#x}\n\
             maintenance packet Qqemu.PhyMemMode:1\nprintf \"physical %x\\n\", *(unsigned int*){physical:#x}\n\
             maintenance packet Qqemu.PhyMemMode:0\n\
             watch *(unsigned long*){jiffies:#x}\ncontinue\ndelete\n\
             rwatch *(unsigned long*){jiffies:#x}\ncontinue\ndelete\n\
             break *{start:#x}\nmonitor info status\ninfo registers\ndetach\n",
            format = self.mode.1,
            mode = self.mode.0,
        );
        let text = gdb(&dir, &script);
        says(
            &text,
            &[
                "Thread 1 (CPU#0 [paused])",
                "Thread 2 (CPU#1 [paused])",
                &format!("at {start:x} mode "),
                "moved 1",
                "Hardware watchpoint 2",
                "Old value = ",
                "New value = ",
                "Hardware read watchpoint 3",
                "VM status: paused",
                "detached]",
            ],
        );
        let word = |kind: &str| text.split(kind).nth(1).and_then(|t| t.split_whitespace().next()).map(str::to_owned);
        assert_eq!(word("virtual "), word("physical "), "{text}");
        let names = [(start, "start_kernel"), (physical, "start_kernel (physical)"), (jiffies, "jiffies")];
        golden::compare(self.arch, &std::fs::read_to_string(&log).unwrap(), &names);
        // It goes on as if nothing had been.
        guest.wait_for("<<ready>>");
        assert_eq!(guest.run("echo $((6 * 7))"), "42");
        guest.send("poweroff -f\n");
        guest.end_well();
        assert!(!Path::new(&socket).exists(), "the socket goes with the run");
    }
}

#[test]
fn a_session_with_gdb_riscv64() {
    Linux {
        test: "a_session_with_gdb_riscv64",
        arch: "riscv64",
        kernel: &RISCV64_KERNEL,
        image: "linux",
        busybox: &RISCV64_BUSYBOX,
        physical: |va, first| va - first + 0x8020_0000,
        first: "_start",
        data_symbols: true,
        mode: ("(int)$priv + 10 * (int)($satp >> 60)", "%d"),
    }
    .session();
}

#[test]
fn a_session_with_gdb_x86_64() {
    Linux {
        test: "a_session_with_gdb_x86_64",
        arch: "x86_64",
        kernel: &X86_64_KERNEL,
        image: "vmlinuz",
        busybox: &X86_64_BUSYBOX,
        physical: |va, _| va - 0xffff_ffff_8000_0000,
        first: "_stext",
        data_symbols: true,
        mode: ("$efer", "%lx"),
    }
    .session();
}

#[test]
fn a_session_with_gdb_i386() {
    Linux {
        test: "a_session_with_gdb_i386",
        arch: "i386",
        kernel: &I386_KERNEL,
        image: "vmlinuz",
        busybox: &I386_BUSYBOX,
        physical: |va, _| va - 0xc000_0000,
        first: "start_kernel",
        data_symbols: false,
        mode: ("$cr0", "%x"),
    }
    .session();
}

/// What gdb and the machine say to each other in that session, beside what is known to be right.
mod golden {
    use std::fmt::Write;
    use std::path::Path;
    use std::process::Command;

    use crate::harness::skipped;

    /// A packet's body, of what is noted behind `$`.
    fn body(line: &str) -> Option<&str> {
        line.split_once('$')?.1.rsplit_once('#').map(|(body, _)| body)
    }

    /// Addresses of this kernel by name, others as such; how long the instruction at a breakpoint is, is the kernel's affair.
    fn named(text: &str, names: &[(u64, &str)]) -> String {
        let is_breakpoint = ["Z0,", "Z1,", "z0,", "z1,"].iter().any(|k| text.starts_with(k));
        let text = if is_breakpoint { text.rsplit_once(',').map_or(text, |(place, _)| place) } else { text };
        let known = names.iter().find(|(at, _)| text.contains(&format!("{at:x}")));
        if let Some((at, name)) = known {
            return text.replace(&format!("0x{at:x}"), name).replace(&format!("{at:x}"), &format!("{{{name}}}"));
        }
        match text.split_once(',') {
            Some((kind, _)) if is_breakpoint => format!("{kind},{{address}}"),
            _ => text.to_owned(),
        }
    }

    fn text_of(hex: &str) -> String {
        let digits = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
        let bytes: Option<Vec<u8>> = digits.map(|d| u8::from_str_radix(d, 16).ok()).collect();
        bytes.map_or(hex.to_owned(), |b| format!("{:?}", String::from_utf8_lossy(&b)))
    }

    /// The commands, the packets that set, run, and ask for, and their replies. What is the same several times over is
    /// there once: steps.
    pub fn transcript(log: &str, names: &[(u64, &str)]) -> String {
        let mut groups: Vec<String> = Vec::new();
        let mut group = String::new();
        let mut lines = log.lines().peekable();
        while let Some(line) = lines.next() {
            if let Some(command) = line.strip_prefix("c ") {
                groups.push(std::mem::take(&mut group));
                groups.push(format!("(gdb) {}\n", named(command, names)));
                continue;
            }
            let Some(packet) = line.strip_prefix("w ").and_then(body) else { continue };
            let is = |kinds: &[&str]| kinds.iter().any(|k| packet.starts_with(k));
            if !is(&["Z", "z", "vCont;", "D", "Qqemu", "qRcmd"]) || packet == "vCont?" {
                continue;
            }
            let reply = lines.next_if(|l| l.starts_with("r ")).and_then(body).unwrap_or("(none)");
            let (packet, reply) = match packet.strip_prefix("qRcmd,") {
                Some(command) if reply != "OK" => (format!("qRcmd,{}", text_of(command)), text_of(reply)),
                Some(command) => (format!("qRcmd,{}", text_of(command)), reply.to_owned()),
                None => (named(packet, names), named(reply, names)),
            };
            if packet.starts_with("Z") && group.contains("\n> z") || packet.starts_with("vCont;s") {
                groups.push(std::mem::take(&mut group));
            }
            let _ = writeln!(group, "> {packet}\n< {reply}");
        }
        groups.push(group);
        groups.dedup();
        groups.concat()
    }

    pub fn compare(arch: &str, log: &str, names: &[(u64, &str)]) {
        let version = Command::new("gdb-multiarch").arg("--version").output().expect("gdb runs").stdout;
        let version = String::from_utf8_lossy(&version).into_owned();
        let first = version.lines().next().unwrap_or_default();
        if first.rsplit(' ').next().is_none_or(|v| !v.starts_with("13.")) {
            return skipped(&format!("golden packets of {arch}"), &format!("they are gdb 13's: {first}"));
        }
        let got = transcript(log, names);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guest/golden/gdb-{arch}.txt"));
        if std::env::var("MIMUS_GOLDEN").is_ok_and(|v| v == "write") {
            return std::fs::write(path, got).unwrap();
        }
        let wanted = std::fs::read_to_string(path).unwrap();
        assert!(got == wanted, "{arch}: wanted\n{wanted}\ngot\n{got}");
    }
}

/// A boot sector: `cli; xor ax, ax; mov ds, ax; mov word [0x600], 0x1234; again: inc word [0x600]; jmp again`.
fn boot_sector() -> Vec<u8> {
    let mut sector = vec![0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xc7, 0x06, 0x00, 0x06, 0x34, 0x12];
    sector.extend([0xff, 0x06, 0x00, 0x06, 0xeb, 0xfa]);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

/// 16-bit code is shown as what it is from the first instruction on, and gdb follows into 32-bit code.
fn firmware_and_boot_sector(test: &str, accel: &str, watches: bool) {
    if !has_gdb(test) {
        return;
    }
    let Some(bios) = guest(test, &SEABIOS) else { return };
    let dir = Dir::new(test);
    let (socket, disk) = (dir.path("gdb"), dir.path("disk"));
    std::fs::write(&disk, boot_sector()).unwrap();
    let bios = bios.join("bios-256k.bin").to_str().unwrap().to_owned();
    let (drive, server) = (format!("file={disk},format=raw,if=virtio"), format!("unix:{socket}"));
    let mut args = vec!["system", "x86_64", "-M", "pc", "-accel", accel, "-m", "64", "-bios", &bios, "-drive", &drive];
    args.extend(["-display", "none", "-serial", "none", "-monitor", "none", "-S", "-gdb", &server]);
    let mut machine = Mimus::start(&args);
    while !Path::new(&socket).exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let watch = if watches { "watch *(short*)0x600\ncontinue\ncontinue\nx/1dh 0x600\ndelete\n" } else { "" };
    let text = gdb(
        &dir,
        &format!(
            "target remote {socket}\nx/i $pc\nstepi\nx/i $pc\n\
             set $n = 0\nwhile ($cr0 & 1) == 0 && $n < 200\nstepi\nset $n = $n + 1\nend\nstepi\n\
             unset tdesc filename\nshow architecture\nx/i $pc\nprintf \"protected %d\\n\", $cr0 & 1\n\
             hbreak *0x7c00\ncontinue\nunset tdesc filename\nshow architecture\nprintf \"at %x\\n\", $pc\ndelete\n\
             x/4i $pc\nstepi 4\nx/i $pc\n{watch}monitor info status\ninfo registers cs_base eflags\nkill\n"
        ),
    );
    says(
        &text,
        &[
            "ljmp   $0xf000,$0xe05b",
            "cmpl   $0x0,%cs:",
            "(currently \"i386\")",
            "protected 1",
            "(currently \"i8086\")",
            "at 7c00",
            "movw   $0x1234,0x600",
            "incw   0x600",
            "VM status: paused",
            "cs_base        0x0",
        ],
    );
    assert!(!watches || text.contains("0x600:\t4662"), "0x1236 after two rounds:\n{text}");
    assert_eq!(machine.end().code(), Some(0), "{}", machine.transcript());
}

#[test]
fn real_mode_in_gdb_under_the_translator() {
    firmware_and_boot_sector("real_mode_in_gdb_under_the_translator", "tcg", true);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn real_mode_in_gdb_under_kvm() {
    let test = "real_mode_in_gdb_under_kvm";
    match mimus_accel_kvm::Quirks::of_host() {
        Ok(quirks) => firmware_and_boot_sector(test, "kvm", !quirks.no_watchpoints),
        Err(e) => skipped(test, &format!("/dev/kvm: {e}")),
    }
}

/// gdb starts the machine itself and talks to it through a pipe.
#[test]
fn a_pipe_to_gdb() {
    let test = "a_pipe_to_gdb";
    if !has_gdb(test) {
        return;
    }
    let dir = Dir::new(test);
    let kernel = dir.path("kernel");
    // addi a0, a0, 1; j -4
    std::fs::write(&kernel, [0x13, 0x05, 0x15, 0x00, 0x6f, 0xf0, 0xdf, 0xff].repeat(16)).unwrap();
    let mimus = env!("CARGO_BIN_EXE_mimus");
    let text = gdb(
        &dir,
        &format!(
            "target remote | {mimus} system riscv64 -M virt -bios none -kernel {kernel} -display none -serial none \
             -monitor none -S -gdb stdio\nhbreak *0x80000004\ncontinue\ncontinue\nprintf \"a0 %d\\n\", $a0\nmonitor info status\nmonitor finish\n\
             monitor xp /1wx 0x80000000\nkill\n"
        ),
    );
    says(&text, &["a0 2", "VM status: paused", "gdb runs the machine", "150513"]);
    let mut both = Mimus::riscv64(&["-kernel", &kernel, "-gdb", "stdio"]);
    assert_eq!(both.end().code(), Some(1));
    both.wait_for("-gdb stdio");
}

/// What lldb does with a guest of a few instructions, by its own idea of the protocol.
#[test]
fn a_session_with_lldb() {
    let test = "a_session_with_lldb";
    if !Command::new("lldb").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
        return skipped(test, "there is no lldb");
    }
    let dir = Dir::new(test);
    let kernel = dir.path("kernel");
    // addi a0, a0, 1; j -4
    std::fs::write(&kernel, [0x13, 0x05, 0x15, 0x00, 0x6f, 0xf0, 0xdf, 0xff].repeat(16)).unwrap();
    let mut rom = vec![0xf4u8; 0x1_0000];
    // inc ax; jmp -3
    rom[0xfff0..0xfff3].copy_from_slice(&[0x40, 0xeb, 0xfd]);
    let bios = dir.path("rom");
    std::fs::write(&bios, rom).unwrap();
    let guests: [(&[&str], &str, u64, &str); 3] = [
        (&["riscv64", "-M", "virt", "-bios", "none", "-kernel", &kernel], "a0", 0x8000_0000, "pc = 0x0000000000001004"),
        (&["x86_64", "-M", "pc", "-accel", "tcg", "-bios", &bios], "rax", 0xffff_fff0, "rip = 0x00000000fffffff1"),
        (&["i386", "-M", "pc", "-accel", "tcg", "-bios", &bios], "eax", 0xffff_fff0, "eip = 0xfffffff1"),
    ];
    for (args, register, start, after_a_step) in guests {
        let mut all = vec!["system"];
        all.extend(args);
        all.extend(["-m", "64", "-display", "none", "-serial", "none", "-monitor", "none", "-S", "-gdb", "tcp::0"]);
        let mut machine = Mimus::start(&all);
        machine.wait_for("listening on tcp:127.0.0.1:");
        let port = machine.wait_for("\n");
        let script = dir.path("lldb");
        let text = format!(
            "gdb-remote 127.0.0.1:{port}\nregister read pc\nthread step-inst\nregister read pc\n\
             breakpoint set -a {start:#x}\ncontinue\nregister read pc {register}\nmemory read {start:#x} -c 4\n\
             process plugin packet monitor info status\nprocess kill\nquit\n"
        );
        std::fs::write(&script, text).unwrap();
        let out = Command::new("timeout").args(["60", "lldb", "--batch", "-s", &script]).output().expect("lldb runs");
        let text = said(&out);
        let status = hex(b"VM status: paused");
        let frame = format!("frame #0: 0x{start:0width$x}", width = if args[0] == "i386" { 8 } else { 16 });
        says(&text, &["stop reason = breakpoint", &frame, after_a_step, &status]);
        machine.end_well();
    }
}

/// The page `docs/tutorial-debugging.md`, command by command: each that it shows is given, and says what it says.
#[test]
fn the_tutorial() {
    let test = "the_tutorial";
    if !has_gdb(test) {
        return;
    }
    let tool = |name: &str| format!("riscv64-linux-gnu-{name}");
    if !Command::new(tool("as")).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
        return skipped(test, "there is no riscv64-linux-gnu-as (binutils-riscv64-linux-gnu)");
    }
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let page = std::fs::read_to_string(docs.join("tutorial-debugging.md")).unwrap();
    let source = std::fs::read_to_string(docs.join("tutorial/sensors.S")).unwrap();
    let dir = Dir::new(test);
    let build = |source: &str| {
        std::fs::write(dir.path("sensors.S"), source).unwrap();
        for (program, args) in [
            ("as", &["-g", "-o", "sensors.o", "sensors.S"][..]),
            ("ld", &["-N", "-Ttext=0x80000000", "-o", "sensors", "sensors.o"]),
        ] {
            let out = Command::new(tool(program)).args(args).current_dir(&dir.0).output().unwrap();
            assert!(out.status.success(), "{}", said(&out));
        }
    };
    build(&source);
    let (kernel, socket) = (dir.path("sensors"), dir.path("gdb"));
    let args = ["-bios", "none", "-kernel", &kernel];
    let mut machine = Mimus::riscv64(&[&args[..], &["-S", "-gdb", &format!("unix:{socket}")]].concat());
    while !Path::new(&socket).exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // What gdb is told, and the lines between that are its answers.
    let blocks = page.split("```").skip(1).step_by(2).filter(|b| b.contains("(gdb) "));
    let lines: Vec<&str> = blocks.flat_map(str::lines).filter(|l| !l.is_empty()).collect();
    let commands: Vec<&str> = lines.iter().filter_map(|l| l.strip_prefix("(gdb) ")).collect();
    assert!(commands.len() > 15, "{commands:?}");
    let script = commands.join("\n").replace("target remote :1234", &format!("target remote {socket}"));
    let text = gdb(&dir, &format!("file {kernel}\ncd {}\n{script}\nkill\n", dir.0.display()));
    for answer in lines.iter().filter(|l| !l.starts_with("(gdb) ")) {
        assert!(text.contains(answer), "{answer:?} is missing:\n{text}");
    }
    machine.end_well();
    says(&machine.transcript(), &["noise is low", "pressure is "]);
    // Mended as the page says.
    let mended = page.split("```").find(|b| b.starts_with("\ncopy_string:")).expect("the new copy_string");
    let (before, after) = source.split_once("copy_string:\n").expect("copy_string");
    let (_, after) = after.split_once("        ret\n").expect("its end");
    build(&format!("{before}{}{after}", mended.trim_start()));
    let mut machine = Mimus::riscv64(&args);
    machine.end_well();
    let outputs = page.split("```console\n").skip(1).filter_map(|t| t.split("```").next());
    let expected = outputs.filter(|t| t.contains("all sensors read")).last().expect("the mended kernel's output");
    for line in expected.lines() {
        assert!(machine.transcript().contains(line), "{line}:\n{}", machine.transcript());
    }
}

#[test]
fn a_busy_port_is_said_so() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut mimus = Mimus::riscv64(&["-kernel", "/dev/null", "-gdb", &format!("tcp::{port}")]);
    assert_eq!(mimus.end().code(), Some(1));
    let text = mimus.wait_for("use -gdb with another port");
    assert!(text.contains(&format!("cannot listen on tcp:127.0.0.1:{port}")), "{text}");
}
