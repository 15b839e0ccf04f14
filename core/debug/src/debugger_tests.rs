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
    fn resume(&self) {}
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
    assert_eq!(d.complete("dis").1, ["disassemble"]);
}

#[test]
fn views_and_their_names() {
    let d = Debugger::new(Fake::new());
    assert!(run(&d, "info").contains("info tasks ") && help().contains("info device PATH"));
    assert!(run(&d, "info tsks").contains("did you mean 'info tasks'?"));
    assert!(run(&d, "info xyzzy").contains("'info' alone lists them"));
    assert_eq!(d.complete("info ta"), (5, vec!["tasks".to_owned()]));
    assert!(run(&d, "info pci").contains("no PCI bus"));
    assert!(run(&d, "info device x").contains("info devices"));
    assert!(run(&d, "info tlb").contains("-accel tcg"));
    assert!(run(&d, "info acpi").contains("info fdt") && run(&d, "info dtb").contains("info acpi"));
    assert!(run(&d, "kallsyms").contains("paging is off"));
    for line in ["struct task_struct", "info tasks", "info lsmod", "info dmesg 5", "backtrace 1"] {
        assert!(run(&d, line).contains("'kallsyms' says why"), "{line}");
    }
}
