//! The debugger's views of running guests: what it reads from their memory is what they say themselves.

use std::collections::HashSet;

use crate::harness::{
    Commands, Mimus, commands, generic_commands, i386_commands, pae_commands, skipped, x86_64_commands,
};

const PROMPT: &str = "(mimus) ";

/// A monitor's command; what it says.
fn ask(guest: &mut Mimus, command: &str) -> String {
    guest.send(&format!("{command}\n"));
    let text = guest.wait_for(PROMPT).replace('\r', "");
    // The command's echo comes first, or after what the guest's console, on the same terminal, had on its way.
    let echo = format!("{command}\n");
    text.split_once(&echo).or_else(|| text.split_once('\n')).map_or(String::new(), |(_, said)| said.to_owned())
}

/// What a guest says of itself, before it is looked at.
struct Own {
    start_kernel: u64,
    /// What process 1 executes, and where it has mapped it.
    program: String,
    maps: String,
    threads: HashSet<(String, String)>,
    modules: Vec<(String, String)>,
    log: String,
    pci: Vec<String>,
    acpi: Vec<String>,
}

impl Own {
    fn of(guest: &mut Mimus) -> Own {
        let line = guest.run("grep ' start_kernel$' /proc/kallsyms");
        let address = line.split_whitespace().next().unwrap_or_default();
        let start_kernel = u64::from_str_radix(address, 16).expect("an address");
        // Kernel threads that wait for work come and go.
        let all = guest.run("for p in /proc/[0-9]*; do echo ${p#/proc/} $(cat $p/comm 2>/dev/null); done");
        // A task's own name has 15 characters; `/proc` knows more of some.
        let short = |name: &str| name.trim().chars().take(15).collect::<String>();
        let pair = |l: &str| l.split_once(' ').map(|(a, b)| (a.to_owned(), short(b)));
        let threads = all.lines().filter_map(pair).filter(|(_, name)| !name.is_empty() && !name.contains("kworker"));
        let threads = threads.collect();
        let modules = guest.run("cat /proc/modules");
        let module = |l: &str| {
            let words: Vec<&str> = l.split_whitespace().collect();
            (words[0].to_owned(), words[5].trim_start_matches("0x").to_owned())
        };
        let modules = modules.lines().map(module).collect();
        let log = guest.run("dmesg | tail -n 1");
        let pci = guest.run(
            "for d in /sys/bus/pci/devices/*; do [ -e $d ] && echo ${d##*/} $(cat $d/vendor) $(cat $d/device) $(cat $d/class); done; true",
        );
        let acpi = guest.run("ls /sys/firmware/acpi/tables 2>/dev/null; true");
        let words = |text: String| text.lines().map(str::to_owned).collect();
        let program = guest.run("readlink /proc/1/exe");
        let maps = guest.run("cat /proc/1/maps");
        Own {
            start_kernel,
            program,
            maps,
            threads,
            modules,
            log,
            pci: words(pci),
            acpi: acpi.split_whitespace().map(str::to_owned).collect(),
        }
    }
}

/// Boots a guest, lets it tell of itself, and compares with what is seen from outside. `caller`: how the callers of the
/// idle loop are found.
fn views(c: Option<Commands>, args: &[&str], caller: &str, types: bool) {
    let Some(c) = c else { return };
    let mut guest = c.boot(&[args, &["-no-reboot"]].concat());
    let own = Own::of(&mut guest);
    guest.send("\u{1}c");
    guest.wait_for(PROMPT);
    ask(&mut guest, "stop");
    // Until it idles: its shell may still have something to do.
    let deadline = std::time::Instant::now() + crate::harness::LIMIT;
    let idles = |calls: String| calls.contains(caller) && calls.contains("<do_idle+");
    while !idles(ask(&mut guest, "backtrace")) && std::time::Instant::now() < deadline {
        ask(&mut guest, "cont");
        std::thread::sleep(std::time::Duration::from_millis(50));
        ask(&mut guest, "stop");
    }
    linux(&mut guest, &own, caller, types);
    machine(&mut guest, &own);
    // It goes on as if nothing had been.
    ask(&mut guest, "cont");
    guest.send("\u{1}c");
    assert_eq!(guest.run("echo $((6 * 7))"), "42");
    guest.send("poweroff -f\n");
    guest.end_well();
}

fn linux(guest: &mut Mimus, own: &Own, caller: &str, types: bool) {
    let value = ask(guest, "print start_kernel");
    assert!(value.starts_with(&format!("{:#x} ", own.start_kernel)), "{value}, not {:#x}", own.start_kernel);
    let account = ask(guest, "kallsyms");
    assert!(account.contains("found by vmcoreinfo") && account.contains("checked: "), "{account}");
    assert_eq!(account.contains("\nBTF: "), types, "{account}");
    let tasks = ask(guest, "info tasks");
    let seen: HashSet<(String, String)> = tasks
        .lines()
        .skip(1)
        .filter_map(|l| {
            let pid = l.split_whitespace().next()?;
            let name = l.get(l.find("0x")?..)?.split_once(' ')?.1.trim_start();
            // The file that it executes is behind two blanks.
            let name = name.split_once("  ").map_or(name, |(name, _)| name);
            let name = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
            Some((pid.to_owned(), name.to_owned()))
        })
        .collect();
    let missing: Vec<_> = own.threads.difference(&seen).collect();
    assert!(missing.is_empty(), "{missing:?} are not in\n{tasks}");
    assert!(
        seen.contains(&("0".into(), "swapper/0".into())) || seen.contains(&("0".into(), "swapper".into())),
        "{tasks}"
    );
    let init = tasks.lines().find(|l| l.split_whitespace().next() == Some("1")).unwrap_or_default();
    assert!(
        init.ends_with(&format!("  {}", own.program)) && own.program.starts_with('/'),
        "{init}, not {}",
        own.program
    );
    maps(guest, own);
    let modules = ask(guest, "info modules");
    let lines: Vec<&str> = modules.lines().skip(1).collect();
    for ((name, address), line) in own.modules.iter().zip(&lines) {
        assert!(line.starts_with(&format!("{name} ")) && line.contains(address.as_str()), "{name} {address}: {line}");
    }
    assert_eq!(own.modules.len(), lines.len(), "{modules}");
    // It may have said more since.
    let log = ask(guest, "info dmesg 20");
    let text = own.log.split_once("] ").map_or("", |(_, text)| text);
    assert!(!text.is_empty() && log.contains(text), "{log}, not {}", own.log);
    let calls = ask(guest, "backtrace");
    assert!(calls.contains(caller) && calls.lines().count() > 2, "{calls}");
    let waits = ask(guest, "backtrace 2");
    let switched = waits.starts_with("#0 ") && waits.contains("schedule+") && waits.contains("<kthreadd+0x");
    assert!(switched, "{waits}");
    // A shell that waits for a command does so in its program, whose file is named.
    let waits = ask(guest, "backtrace 1");
    let mut own_frames = waits.lines().skip_while(|l| !l.ends_with("[saved registers]"));
    let first = own_frames.next().unwrap_or_default();
    // On i386 by way of the vDSO, whose names it has with it.
    let own_frame = if first.contains("<__kernel_vsyscall+0x") { own_frames.next() } else { Some(first) };
    assert!(own_frame.is_some_and(|l| l.contains("<busybox+0x")), "{waits}");
    if types {
        let task = ask(guest, "struct task_struct init_task");
        assert!(task.contains(" comm at ") && task.contains(" pid = 0x0\n"), "{task}");
    }
    assert!(ask(guest, "info taks").contains("did you mean 'info tasks'?"));
}

/// What process 1 has mapped is what `/proc/1/maps` said.
fn maps(guest: &mut Mimus, own: &Own) {
    let seen = ask(guest, "info maps 1");
    // Device and inode are not shown.
    let line = |l: &str| {
        let w: Vec<&str> = l.split_whitespace().collect();
        format!("{} {} {} {}", w[0], w[1], w[2], w.get(5).unwrap_or(&"")).trim_end().to_owned()
    };
    let wanted: Vec<String> = own.maps.lines().map(line).collect();
    assert!(wanted.len() > 4, "{}", own.maps);
    let mut lines = seen.lines();
    assert!(lines.next().is_some_and(|l| l.starts_with("task 1 (")), "{seen}");
    for wanted in wanted {
        // What is new since are areas that the shell has grown by.
        let heap = wanted.ends_with("[heap]") || wanted.ends_with("[stack]");
        let same =
            |l: &str| if heap { l.ends_with(wanted.rsplit(' ').next().unwrap_or_default()) } else { l == wanted };
        assert!(lines.by_ref().any(same), "{wanted} is not in, or not in its place:\n{seen}");
    }
    assert!(ask(guest, "info maps 2").contains("it has mapped nothing"));
    assert!(ask(guest, "info maps 987654").contains("there is no task 987654"));
}

fn machine(guest: &mut Mimus, own: &Own) {
    let pci = ask(guest, "info pci");
    for line in &own.pci {
        let w: Vec<&str> = line.split_whitespace().collect();
        let hex = |i: usize| w[i].trim_start_matches("0x");
        let wanted = format!("[{}] {}:{} ", &hex(3)[..4], hex(1), hex(2));
        let place = format!("  {} ", w[0].rsplit(':').next().unwrap_or_default());
        assert!(pci.lines().any(|l| l.starts_with(&place) && l.contains(&wanted)), "{line} is not in\n{pci}");
    }
    if own.acpi.is_empty() {
        let tree = ask(guest, "info fdt");
        assert!(tree.contains("compatible = ") && tree.contains("cpus {"), "{tree}");
    } else {
        let tables = ask(guest, "info acpi");
        for name in own.acpi.iter().filter(|n| n.len() == 4 && **n == n.to_uppercase()) {
            assert!(tables.contains(&format!("{name} at 0x")) && !tables.contains("BAD"), "{name} is not in\n{tables}");
        }
        assert!(ask(guest, "info acpi MADT").contains("Local APIC: UID 0, APIC ID 0"));
    }
    let chips = ask(guest, "info irqchip");
    assert!(chips.contains("riscv-plic") || chips.contains("LVT Timer"), "{chips}");
    let devices = ask(guest, "info devices");
    for line in devices.lines() {
        let path = line.split_whitespace().next().unwrap_or_default();
        let device = ask(guest, &format!("info device {path}"));
        assert!(device.starts_with(path) && !device.contains("cannot be shown"), "{device}");
        assert!(line.split_whitespace().count() > 2, "{line}: what it is");
    }
    assert!(devices.lines().count() > 3, "{devices}");
    let serial = devices.lines().find_map(|l| l.split_whitespace().next().filter(|p| p.contains("serial")));
    assert!(ask(guest, &format!("info device {}", serial.expect("a UART"))).contains("IER    "));
    let map = ask(guest, "info mtree");
    assert!(map.lines().any(|l| l.ends_with(" ram    ram")) && map.contains(" device /machine/"), "{map}");
    let map = ask(guest, "info mem");
    assert!(map.lines().count() > 5, "{map}");
}

#[test]
fn riscv64() {
    views(commands("views::riscv64"), &["-accel", "tcg"], "[frame pointer]", true);
}

#[test]
fn x86_64() {
    views(x86_64_commands("views::x86_64"), &["-M", "q35", "-accel", "tcg", "-nic", "none"], "[ORC]", true);
}

#[test]
fn x86_64_microvm_under_kvm() {
    let test = "views::x86_64_microvm_under_kvm";
    match mimus_accel_kvm::Quirks::of_host() {
        Ok(quirks) if quirks.emulated_cpl0 => return skipped(test, "this host's KVM interprets supervisor code"),
        Ok(_) => {}
        Err(e) => return skipped(test, &format!("/dev/kvm: {e}")),
    }
    views(generic_commands(test), &["-M", "microvm", "-accel", "kvm", "-nic", "none"], "[ORC]", true);
}

#[test]
fn i386() {
    views(i386_commands("views::i386"), &["-M", "pc", "-accel", "tcg", "-nic", "none"], "[frame pointer]", false);
}

#[test]
fn i386_with_pae() {
    views(
        pae_commands("views::i386_with_pae"),
        &["-M", "microvm", "-accel", "tcg", "-nic", "none"],
        "[frame pointer]",
        false,
    );
}

#[test]
fn the_translator_tells_what_it_remembers() {
    let Some(c) = commands("the_translator_tells_what_it_remembers") else { return };
    let mut guest = c.boot(&["-accel", "tcg"]);
    guest.send("\u{1}c");
    guest.wait_for(PROMPT);
    ask(&mut guest, "stop");
    let all = ask(&mut guest, "info tlb");
    assert!(all.starts_with("address space ") && all.contains(", current\n"), "{all}");
    // What it remembers is what the tables say.
    let known =
        all.lines().skip(1).take_while(|l| !l.starts_with("address")).filter(|l| !l.contains("physical -")).take(5);
    for line in known.map(str::to_owned).collect::<Vec<_>>() {
        let page = line.split(' ').next().unwrap_or_default();
        let physical = line.split("physical ").nth(1).and_then(|p| p.split(' ').next()).unwrap_or_default().to_owned();
        let walk = ask(&mut guest, &format!("walk 0x{page}"));
        assert!(walk.contains(&format!("is physical {physical},")), "{line}\n{walk}");
        assert!(ask(&mut guest, &format!("info tlb 0x{page}")).contains(&physical));
    }
}
