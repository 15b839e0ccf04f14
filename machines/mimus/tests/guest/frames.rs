//! Calls found by the call frame information of real files: of programs without frame pointers, through the kernel, from
//! where a program's system call is being served.

use std::path::Path;
use std::process::Command;

use mimus_machines::guests::cpio::Archive;

use crate::harness::{Commands, Dir, Mimus, commands, i386_commands, skipped, x86_64_commands};

const PROMPT: &str = "(mimus) ";

/// Opens a file, three calls deep. `main` keeps more on its stack than a frame pointer would need.
const IN_C: &str = r#"
#include <fcntl.h>
#include <unistd.h>
__attribute__((noinline)) int inner(const char *name) {
    int fd = open(name, O_RDONLY);
    __asm__ volatile("" ::: "memory");
    return fd + 1;
}
__attribute__((noinline)) int middle(const char *name) {
    char copy[200];
    for (unsigned i = 0; i < sizeof copy; i++)
        copy[i] = name[i % 5];
    __asm__ volatile("" : : "r"(copy) : "memory");
    return inner(name) + copy[3];
}
__attribute__((noinline)) int outer(const char *name, int n) {
    return n ? outer(name, n - 1) + 1 : middle(name) + 2;
}
int main(void) {
    outer("/marker", 2);
    pause();
    return 0;
}
"#;

/// The same of RISC-V, with `.eh_frame`.
const IN_RISCV: &str = r#"
        .globl _start
_start: .cfi_startproc
        .cfi_undefined ra
        la      a0, name
        call    outer
1:      li      a7, 73                  # ppoll, for ever
        li      a0, 0
        li      a1, 0
        li      a2, 0
        li      a3, 0
        ecall
        j       1b
        .cfi_endproc
outer:  .cfi_startproc
        addi    sp, sp, -64
        .cfi_adjust_cfa_offset 64
        sd      ra, 24(sp)
        .cfi_offset ra, -40
        call    middle
        ld      ra, 24(sp)
        addi    sp, sp, 64
        ret
        .cfi_endproc
middle: .cfi_startproc
        mv      s2, ra                  # kept in a register
        .cfi_register ra, s2
        addi    sp, sp, -32
        .cfi_adjust_cfa_offset 32
        jal     inner
        addi    sp, sp, 32
        jr      s2
        .cfi_endproc
inner:  .cfi_startproc
        mv      a1, a0
        li      a0, -100                # openat(AT_FDCWD, name, O_RDONLY)
        li      a2, 0
        li      a7, 56
        ecall
        ret
        .cfi_endproc
        .data
name:   .asciz "/marker"
"#;

/// And of i386, with `.debug_frame`, expressions among it.
const IN_I386: &str = r#"
        .cfi_sections .debug_frame
        .globl _start
_start: .cfi_startproc
        .cfi_undefined eip
        mov     $name, %ebx
        call    outer
1:      mov     $29, %eax               # pause
        int     $0x80
        jmp     1b
        .cfi_endproc
outer:  .cfi_startproc
        sub     $40, %esp
        .cfi_adjust_cfa_offset 40
        call    middle
        add     $40, %esp
        .cfi_adjust_cfa_offset -40
        ret
        .cfi_endproc
middle: .cfi_startproc
        .cfi_escape 0x0f, 3, 0x74, 28, 0x06     # CFA: what is at esp + 28 (DW_OP_breg4 28, deref)
        lea     4(%esp), %eax
        sub     $32, %esp
        mov     %eax, 28(%esp)
        call    inner
        add     $32, %esp
        ret
        .cfi_endproc
inner:  .cfi_startproc
        mov     $5, %eax                # open(name, O_RDONLY)
        mov     $0, %ecx
        int     $0x80
        ret
        .cfi_endproc
        .data
name:   .asciz "/marker"
"#;

/// Runs tools in a folder; false after saying that one is not there.
fn build(test: &str, dir: &Dir, steps: &[&[&str]]) -> bool {
    for step in steps {
        match Command::new(step[0]).args(&step[1..]).current_dir(&dir.0).output() {
            Ok(out) if out.status.success() => {}
            Ok(out) => {
                let why = String::from_utf8_lossy(&out.stderr).into_owned();
                // A compiler without the C library of its target.
                assert!(why.contains("cannot find"), "{step:?}: {why}");
                skipped(test, &format!("{}: {}", step[0], why.lines().next().unwrap_or_default()));
                return false;
            }
            Err(e) => {
                skipped(test, &format!("{}: {e}", step[0]));
                return false;
            }
        }
    }
    true
}

fn ask(guest: &mut Mimus, command: &str) -> String {
    guest.send(&format!("{command}\n"));
    let text = guest.wait_for(PROMPT).replace('\r', "");
    text.split_once('\n').map_or(String::new(), |(_, said)| said.to_owned())
}

/// Runs the program, stops where the kernel opens the file for it, and looks at the calls. `given`: the debugger is given the
/// program's file; else it finds what is in it in the guest's memory.
fn frames(c: &mut Commands, dir: &Dir, args: &[&str], expected: &[&str], given: bool) {
    let program = dir.path("program");
    let mut archive = Archive::default();
    archive.file("program", 0o755, &std::fs::read(&program).unwrap());
    // The kernel unpacks all archives that follow one another.
    let both = [std::fs::read(&c.initrd).unwrap(), archive.finish_gzip().unwrap()].concat();
    std::fs::write(dir.path("initrd"), both).unwrap();
    c.initrd = dir.path("initrd");
    let symbols: &[&str] = if given { &["-symbols", &program] } else { &[] };
    let mut guest = c.boot(&[args, &["-accel", "tcg", "-no-reboot"], symbols].concat());
    guest.send("\u{1}c");
    guest.wait_for(PROMPT);
    ask(&mut guest, "stop");
    if given {
        assert!(ask(&mut guest, &format!("symbols {program}")).contains(", call frames from "));
    }
    ask(&mut guest, "break do_sys_openat2");
    ask(&mut guest, "cont");
    guest.send("\u{1}c");
    guest.send("/program & last=$!\n");
    let mut calls = String::new();
    for _ in 0..100 {
        // It is said without being asked for.
        guest.wait_for("vCPU 0: breakpoint");
        guest.send("\u{1}c");
        guest.send("backtrace\nprint 424242\n");
        calls = guest.wait_for("0x67932 424242").replace('\r', "");
        guest.wait_for(PROMPT);
        if calls.contains("<inner+") {
            break;
        }
        // The shell opened something.
        ask(&mut guest, "cont");
        guest.send("\u{1}c");
    }
    let kernel = calls.find("[saved registers]").expect(&calls);
    assert!(calls[..kernel].contains("<do_sys_openat2>  [pc]"), "{calls}");
    let inner = ask(&mut guest, "print inner");
    assert!(inner.trim_end().ends_with("<inner>"), "{inner}");
    let maps = ask(&mut guest, "info maps");
    assert!(maps.lines().nth(1).is_some_and(|l| l.ends_with(" /program")), "{maps}");
    let user: Vec<&str> = calls[..].lines().skip_while(|l| !l.contains("[saved registers]")).collect();
    let mut rest = user.iter();
    for wanted in expected {
        let found = rest.find(|l| l.contains(wanted) && (l.ends_with("[CFI]") || l.ends_with("[saved registers]")));
        assert!(found.is_some(), "{wanted} is not in, or not in its place:\n{calls}");
    }
    ask(&mut guest, "delete");
    ask(&mut guest, "cont");
    guest.send("\u{1}c");
    guest.send("until grep -q State:.S /proc/$last/status; do :; done; echo pid-$last-\n");
    guest.wait_for("pid-");
    let pid = guest.wait_for("-");
    guest.send("\u{1}c");
    guest.wait_for(PROMPT);
    ask(&mut guest, "stop");
    let calls = ask(&mut guest, &format!("backtrace {pid}"));
    // Its own page tables are used, whoever runs now.
    let first = calls.lines().find(|l| l.ends_with("[saved registers]"));
    assert!(first.is_some() && calls.contains(expected.last().unwrap()), "{calls}");
    guest.send("quit\n");
    guest.end_well();
}

#[test]
fn of_a_compiled_program() {
    let test = "frames::of_a_compiled_program";
    let Some(mut c) = x86_64_commands(test) else { return };
    let dir = Dir::new("frames-x86_64");
    std::fs::write(dir.path("program.c"), IN_C).unwrap();
    let flags =
        ["-O1", "-static", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-fasynchronous-unwind-tables"];
    let compile = [&["gcc"], &flags[..], &["-o", "program", "program.c"]].concat();
    if cfg!(not(target_arch = "x86_64")) || !build(test, &dir, &[&compile]) {
        return;
    }
    let expected = ["<inner+", "<middle+", "<outer+", "<outer+", "<outer+", "<main+", "<_start+"];
    frames(&mut c, &dir, &["-M", "pc", "-nic", "none"], &expected, false);
}

#[test]
fn of_riscv() {
    let test = "frames::of_riscv";
    let Some(mut c) = commands(test) else { return };
    let dir = Dir::new("frames-riscv64");
    std::fs::write(dir.path("program.s"), IN_RISCV).unwrap();
    let (assemble, link) = ("riscv64-linux-gnu-as", "riscv64-linux-gnu-ld");
    let steps =
        [&[assemble, "-o", "program.o", "program.s"][..], &[link, "--no-relax", "-o", "program", "program.o"][..]];
    if build(test, &dir, &steps) {
        frames(&mut c, &dir, &[], &["<inner+", "<middle+", "<outer+", "<_start+"], false);
    }
}

#[test]
fn of_i386() {
    let test = "frames::of_i386";
    let Some(mut c) = i386_commands(test) else { return };
    let dir = Dir::new("frames-i386");
    std::fs::write(dir.path("program.s"), IN_I386).unwrap();
    let steps = [
        &["as", "--32", "-o", "program.o", "program.s"][..],
        &["ld", "-m", "elf_i386", "-o", "program", "program.o"][..],
    ];
    if cfg!(target_arch = "x86_64") && build(test, &dir, &steps) {
        assert!(Path::new(&dir.path("program")).exists());
        frames(&mut c, &dir, &["-M", "pc", "-nic", "none"], &["<inner+", "<middle+", "<outer+", "<_start+"], true);
    }
}
