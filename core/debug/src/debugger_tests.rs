//! The debugger against a machine of one vCPU and a page of memory.

use super::*;
use crate::target::Region;
use mimus_arch::riscv::RiscvState;
use mimus_core::accel::RecentEvent;

/// Instructions are two bytes and do nothing; 0x9002-like words are calls for `next`.
struct Fake {
    cpu: Mutex<CpuState>,
    memory: Mutex<Vec<u8>>,
    points: Mutex<Vec<Point>>,
    resumed: std::sync::atomic::AtomicBool,
}

impl Fake {
    fn new() -> Arc<Fake> {
        let mut s = RiscvState::new(0, 0, 0x100);
        s.x[8] = 0x800;
        s.stvec = 0x40;
        s.medeleg = 0xffff;
        let mut memory = vec![0; 4096];
        memory[0x7f8] = 0x34;
        memory[0x7f9] = 0x12;
        memory[0x200..0x205].copy_from_slice(b"hello");
        Arc::new(Fake {
            cpu: Mutex::new(CpuState::Riscv(Box::new(s))),
            memory: Mutex::new(memory),
            points: Mutex::default(),
            resumed: Default::default(),
        })
    }
    fn pc(&self) -> u64 {
        registers::pc(&self.cpu.lock().unwrap())
    }
    fn advance(&self) {
        let pc = self.pc() + 2;
        let mut cpu = self.cpu.lock().unwrap();
        registers::set(&mut cpu, "pc", pc);
        let a0 = registers::get(&cpu, "a0").unwrap();
        registers::set(&mut cpu, "a0", a0 + 1);
    }
}

impl Target for Fake {
    fn vcpus(&self) -> u32 {
        1
    }
    fn state(&self, _: u32) -> Result<CpuState, String> {
        Ok(self.cpu.lock().unwrap().clone())
    }
    fn set_state(&self, _: u32, state: CpuState) -> Result<(), String> {
        *self.cpu.lock().unwrap() = state;
        Ok(())
    }
    fn translate(&self, _: u32, va: u64) -> Option<(u64, u64)> {
        (va < 4096).then(|| (va, 4096 - va))
    }
    fn read(&self, pa: u64, to: &mut [u8]) -> bool {
        let memory = self.memory.lock().unwrap();
        memory.get(pa as usize..pa as usize + to.len()).map(|from| to.copy_from_slice(from)).is_some()
    }
    fn write(&self, pa: u64, from: &[u8]) -> bool {
        let mut memory = self.memory.lock().unwrap();
        memory.get_mut(pa as usize..pa as usize + from.len()).map(|to| to.copy_from_slice(from)).is_some()
    }
    fn insert(&self, point: Point) -> Result<(), String> {
        self.points.lock().unwrap().push(point);
        Ok(())
    }
    fn remove(&self, point: Point) -> Result<(), String> {
        self.points.lock().unwrap().retain(|p| *p != point);
        Ok(())
    }
    fn running(&self) -> bool {
        false
    }
    fn go(&self) -> Stop {
        for _ in 0..1000 {
            self.advance();
            if self.points.lock().unwrap().contains(&Point::Break { va: self.pc() }) {
                return Stop::Breakpoint { vcpu: 0 };
            }
        }
        Stop::Paused
    }
    fn resume(&self) {
        self.resumed.store(true, std::sync::atomic::Ordering::SeqCst);
    }
    fn step(&self, vcpu: u32, n: u64, _: StepKind) -> Result<Stop, String> {
        (0..n).for_each(|_| self.advance());
        Ok(Stop::Step { vcpu })
    }
    fn pause(&self) {}
    fn recent(&self, _: u32) -> Vec<RecentEvent> {
        vec![RecentEvent { cause: 13, pc: 0x102, value: 0xdead }]
    }
    fn jumps(&self, _: u32) -> Vec<u64> {
        vec![0x100, 0x200, 0x300, 0x200, 0x300, 0x200, 0x300, 0x104]
    }
    fn disassemble(&self, _: u8, _: &[u8], _: u64) -> (String, usize) {
        ("c.nop".to_owned(), 2)
    }
    fn regions(&self) -> Vec<Region> {
        vec![Region { base: 0, len: 4096, kind: "ram", name: "ram".to_owned() }]
    }
}

fn run(d: &Debugger, line: &str) -> String {
    d.execute(line).unwrap_or_else(|| panic!("{line}"))
}

#[test]
fn stepping_and_breaking() {
    let fake = Fake::new();
    let d = Debugger::new(fake.clone());
    assert!(d.execute("nonsense").is_none());
    assert!(run(&d, "step").contains("=> 0000000000000102"));
    assert!(run(&d, "s 9").contains("=> 0000000000000114"));
    assert!(run(&d, "r").contains("a0*000000000000000a"), "{}", run(&d, "r"));
    assert_eq!(run(&d, "break 0x140 if a0 > 20"), "1: break 0x140 if a0 > 20 at 0x140\n");
    assert!(run(&d, "c").contains("breakpoint\n=> 0000000000000140"));
    assert!(run(&d, "info breakpoints").contains("hit 1 times"));
    assert_eq!(run(&d, "delete 1"), "");
    assert!(fake.points.lock().unwrap().is_empty());
    run(&d, "b 0x160 if a0 == 0");
    assert_eq!(run(&d, "c").lines().next(), Some("stopped"), "its condition never holds");
    assert!(run(&d, "until a0 % 16 == 0").contains("=>"));
    assert_eq!(registers::get(&fake.state(0).unwrap(), "a0").unwrap() % 16, 0);
    assert!(run(&d, "break nobody").contains("no symbols"));
    assert!(run(&d, "delete 77").contains("no such breakpoint"));
    run(&d, "catch exception 13");
    assert!(fake.points.lock().unwrap().contains(&Point::Catch(Catch::Exception(Some(13)))));
    assert!(run(&d, "catch csr satp w if $_value != 0").contains("catch csr satp"));
    assert!(run(&d, "catch port 1-0").contains("before the first"));
    assert!(
        run(&d, "s 2 call").contains("=>") && run(&d, "s return").contains("=>") && run(&d, "s 1 + 2").contains("=>")
    );
    assert!(run(&d, "step -1").contains("forwards only"));
    assert!(run(&d, "step 5 foo").contains("[branch|call|return|exception]"), "{}", run(&d, "step 5 foo"));
    assert!(run(&d, "catch csr stap").contains("there is no CSR stap; did you mean satp?"));
    run(&d, "watch 0x200 4 rw");
    assert!(fake.points.lock().unwrap().contains(&Point::Watch { va: 0x200, len: 4, kind: WatchKind::ReadWrite }));
}

#[test]
fn looking() {
    let d = Debugger::new(Fake::new());
    assert_eq!(run(&d, "x/5xb 0x200"), "0000000000000200: 68 65 6c 6c 6f\n");
    assert_eq!(run(&d, "x/s 0x200"), "0000000000000200: \"hello\"\n");
    assert_eq!(run(&d, "xp/1dw 0x7f8"), "00000000000007f8: 4660\n");
    assert!(run(&d, "x/2zz 0").contains("no format"));
    assert_eq!(run(&d, "find 0 4096 \"hello\""), "0000000000000200\n");
    assert_eq!(run(&d, "find 0 4096 0x1234"), "00000000000007f8\n");
    assert_eq!(run(&d, "p u16[0x7f8] + 1"), "0x1235 4661\n");
    assert_eq!(run(&d, "set u16[0x7f8] = 0x1111"), "");
    assert_eq!(run(&d, "p u16[0x7f8]"), "0x1111 4369\n");
    assert!(run(&d, "p u24[0x7f8]").contains("u24[…]: there are u8, u16, u32 and u64"));
    assert!(run(&d, "vcpu").starts_with("* vCPU 0 at 00000000") && run(&d, "vcpu 7").contains("they are 0 to 0"));
    run(&d, "set a0 = 0x77");
    assert_eq!(run(&d, "p $a0"), "0x77 119\n");
    assert!(run(&d, "bt").contains("#1  0000000000001111"), "{}", run(&d, "bt"));
    assert!(run(&d, "walk 5").contains("paging is off"));
    assert!(run(&d, "info mtree").contains("ram"));
    let jumps = run(&d, "info jumps");
    let at = |va: u64| format!("{va:016x}");
    let wanted = [at(0x100), at(0x200), at(0x300), "  (these 2 3 times)".to_owned(), at(0x104)];
    assert_eq!(jumps.lines().collect::<Vec<_>>(), wanted);
    assert!(run(&d, "info exceptions").contains("exception 13 (load page fault) at 0000000000000102"));
    let report = run(&d, "report");
    assert!(report.contains("walk 0xdead") && report.contains("calls:"), "{report}");
    assert!(run(&d, "x 0x5000").contains("no memory"));
    assert_eq!(d.complete("dis", &[]).1, ["disassemble"]);
}

#[test]
fn views_and_their_names() {
    let d = Debugger::new(Fake::new());
    assert!(run(&d, "info").contains("info tasks ") && crate::help::help().contains("info device PATH"));
    assert!(run(&d, "info tsks").contains("did you mean 'info tasks'?"));
    assert!(run(&d, "info xyzzy").contains("'info' alone lists them"));
    assert_eq!(d.complete("info ta", &[]), (5, vec!["tasks".to_owned()]));
    assert!(run(&d, "info pci").contains("no PCI bus"));
    assert!(run(&d, "info device x").contains("info devices"));
    assert!(run(&d, "info tlb").contains("-accel tcg"));
    assert!(run(&d, "info acpi").contains("info fdt") && run(&d, "info dtb").contains("info acpi"));
    assert!(run(&d, "kallsyms").contains("paging is off"));
    for line in ["struct task_struct", "info tasks", "info lsmod", "info dmesg 5", "backtrace 1"] {
        assert!(run(&d, line).contains("'kallsyms' says why"), "{line}");
    }
}

#[test]
fn help_of_each_command_and_view() {
    let d = Debugger::new(Fake::new());
    for (name, arguments, about) in COMMANDS {
        let said = run(&d, &format!("help {name}"));
        assert!(said.starts_with(&format!("{name} {arguments}\n  {about}\n")), "{said}");
        if help::needs(arguments) {
            let wrong = run(&d, name);
            assert!(wrong.contains(&format!("see: help {name}")), "{name}: {wrong}");
        }
    }
    for name in info::names() {
        assert!(run(&d, &format!("help info {name}")).starts_with(&format!("info {name}")), "{name}");
    }
    assert!(run(&d, "help ps").starts_with("info tasks"));
    assert!(run(&d, "help bt").contains("also: bt") && run(&d, "help brek").contains("did you mean 'break'?"));
    assert!(run(&d, "help xyzzy").contains("'help' alone lists them"));
    assert!(run(&d, "help").lines().all(|l| l.chars().count() < 160), "{}", run(&d, "help"));
}

#[test]
fn completion_of_arguments() {
    let d = Debugger::new(Fake::new());
    let of = |line: &str| d.complete(line, &["system_reset", "info status"]);
    assert_eq!(of("sys"), (0, vec!["system_reset".to_owned()]));
    assert_eq!(of("info st"), (5, vec!["status".to_owned()]));
    assert_eq!(of("help info tas"), (5, vec!["info tasks".to_owned()]));
    assert_eq!(of("catch exc"), (6, vec!["exception".to_owned()]));
    assert_eq!(of("catch csr sat"), (10, vec!["satp".to_owned()]));
    assert_eq!(of("catch mode s"), (11, vec!["supervisor".to_owned()]));
    assert_eq!(of("catch csr satp r"), (15, vec!["r".to_owned(), "rw".to_owned()]));
    assert_eq!(of("step 4 ca"), (7, vec!["call".to_owned()]));
    assert_eq!(of("p 1 + $mtv"), (6, vec!["$mtvec".to_owned(), "$mtval".to_owned()]));
    assert_eq!(of("x/4i $sat"), (5, vec!["$satp".to_owned()]));
    assert_eq!(of("nonsense"), (0, vec![]));
    let dir = std::env::temp_dir().join(format!("mimus-completion-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("folder")).unwrap();
    std::fs::write(dir.join("file"), "").unwrap();
    let line = format!("symbols {}/f", dir.display());
    let found = of(&line);
    std::fs::remove_dir_all(&dir).unwrap();
    let path = |name: &str| format!("{}/{name}", dir.display());
    assert_eq!(found, (8, vec![path("file"), path("folder/")]));
    let map = std::env::temp_dir().join(format!("mimus-completion-{}.map", std::process::id()));
    std::fs::write(&map, "0000000000000100 T start_kernel\n0000000000000200 D jiffies\n").unwrap();
    d.load_symbols(&map, 0).unwrap();
    std::fs::remove_file(&map).unwrap();
    assert_eq!(of("break star"), (6, vec!["start_kernel".to_owned()]));
    assert_eq!(of("info line ji"), (10, vec!["jiffies".to_owned()]));
    assert!(run(&d, "p $mtvex").contains("did you mean mtvec?"), "{}", run(&d, "p $mtvex"));
    assert_eq!(run(&d, "p 'A'"), "0x41 65\n");
}

/// Stops that nobody waits for: a breakpoint's is told, a condition that does not hold lets the machine go on.
#[test]
fn stops_that_no_command_waits_for() {
    let fake = Fake::new();
    let d = Debugger::new(fake.clone());
    run(&d, "break 0x100");
    let stop = Stop::Breakpoint { vcpu: 0 };
    assert!(d.unawaited(stop).is_some_and(|text| text.contains("vCPU 0: breakpoint\n=> 0000000000000100")));
    run(&d, "delete");
    run(&d, "break 0x100 if a0 == 77");
    assert_eq!(d.unawaited(stop), None);
    assert!(fake.resumed.swap(false, std::sync::atomic::Ordering::SeqCst));
    // Another debugger's.
    run(&d, "delete");
    assert_eq!((d.unawaited(stop), d.unawaited(Stop::Paused)), (None, None));
    assert!(!fake.resumed.load(std::sync::atomic::Ordering::SeqCst));
}
