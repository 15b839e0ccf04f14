//! The disassembler against a list of known texts, and against binutils where they are installed.

use mimus_arch::riscv::Ext;
use mimus_tcg_frontend_riscv::decode::{PATTERNS, Pattern};
use mimus_tcg_frontend_riscv::disasm::disassemble;
use std::fmt::Write;
use std::process::Command;

const AS: &str = "riscv64-linux-gnu-as";
const OBJDUMP: &str = "riscv64-linux-gnu-objdump";
const MARCH: &str = "-march=rv64gc_zicsr_zifencei_zihintpause_zicbom_zicboz_zba_zbb_zbs_svinval_zawrs";

fn installed(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Encodings of every pattern, with operands from a fixed sequence.
fn samples() -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut insns = Vec::new();
    for pattern in PATTERNS.iter().filter(|p| !p.reserved && known(p)) {
        for _ in 0..40 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bits = (state >> 32) as u32 & if pattern.width == 16 { 0xffff } else { u32::MAX };
            let insn = bits & !pattern.mask | pattern.value;
            if disassemble(insn, 0).is_some() && !skipped(insn) {
                insns.push(insn);
            }
        }
    }
    insns
}

/// Whether binutils 2.40 know the instruction.
fn known(pattern: &Pattern) -> bool {
    !pattern.extensions.iter().any(|e| matches!(e, Ext::Zicond | Ext::Zcb | Ext::Zimop | Ext::Zcmop))
}

/// Where binutils and the tables differ on purpose, or show reserved bits.
fn skipped(insn: u32) -> bool {
    // Fences: reserved fm and registers, empty sets ("unknown"); rounding modes 5 and 6.
    let fence = insn & 0x7f == 0x0f && insn & 0x7000 != 0x2000;
    let rounded = matches!(insn & 0x7f, 0x43 | 0x47 | 0x4b | 0x4f | 0x53) && matches!(insn >> 12 & 7, 5 | 6);
    // CSRs that only one of the two has a name for.
    let csr = insn & 0x7f == 0x73 && insn & 0x7000 != 0;
    // Conversions that are always exact: with a rounding mode other than 0, binutils refuse them.
    let exact = matches!(insn & 0xfee0_007f, 0xd200_0053 | 0x4200_0053) && insn & 0x7000 != 0;
    // Compressed HINTs: c.nop spelt as c.addi, shifts by 0 as c.slli64 and so on.
    let hint = insn == 1 || insn & 0xffff_f07f == 0x0002 || insn & 0xffff_f87f == 0x8001;
    fence || rounded || csr || exact || hint
}

fn normal(text: &str) -> String {
    let text = text.split(['<', '#']).next().unwrap_or("").trim();
    let text = text.replace(['\t', ' '], " ").replace("0x", "");
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").trim_end_matches(",dyn").to_owned()
}

/// The list says what binutils say (but for `dyn`, which is left out), of instructions at 0x1000.
#[test]
fn golden_list() {
    let mut seen = 0;
    for line in include_str!("disasm.golden").lines().filter(|line| !line.starts_with('#')) {
        let (insn, text) = line.split_once(' ').unwrap();
        let insn = u32::from_str_radix(insn, 16).unwrap();
        assert_eq!(disassemble(insn, 0x1000).as_deref(), Some(text), "{insn:#x}");
        seen += 1;
    }
    assert!(seen > PATTERNS.iter().filter(|p| !p.reserved).count());
}

#[test]
fn texts_without_a_common_spelling() {
    let cases = [
        (0x0330_000f, "fence rw,rw"),
        (0x8330_000f, "fence rw,rw"),
        (0x0100_000f, "pause"),
        (0x0ff0_000f, "fence iorw,iorw"),
        (0x0000_000f, "fence 0,0"),
        (0x7c05_1073, "csrrw zero,0x7c0,a0"),
        (0x02c5_d553, "fadd.d fa0,fa1,fa2,unknown5"),
    ];
    for (insn, text) in cases {
        assert_eq!(disassemble(insn, 0).as_deref(), Some(text));
    }
}

#[test]
fn agrees_with_objdump() {
    if !installed(AS) || !installed(OBJDUMP) {
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            format!("SKIPPED (objdump): {AS} and {OBJDUMP} are not installed\n").as_bytes(),
        );
        return;
    }
    let insns = samples();
    let mut source = String::new();
    for insn in &insns {
        let _ = writeln!(source, ".insn {}, {insn:#x}", if insn & 3 == 3 { 4 } else { 2 });
    }
    let dir = std::env::temp_dir().join(format!("mimus-objdump-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (asm, object) = (dir.join("t.s"), dir.join("t.o"));
    std::fs::write(&asm, source).unwrap();
    assert!(Command::new(AS).arg(MARCH).arg("-o").arg(&object).arg(&asm).status().unwrap().success());
    let output = Command::new(OBJDUMP).args(["-d", "-M", "no-aliases"]).arg(&object).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let listing = String::from_utf8(output.stdout).unwrap();
    let mut theirs = listing.lines().filter_map(|line| {
        let (address, rest) = line.split_once(":\t")?;
        let pc = u64::from_str_radix(address.trim(), 16).ok()?;
        Some((pc, rest.split_once('\t')?.1.to_owned()))
    });
    let mut wrong = Vec::new();
    for insn in insns {
        let (pc, text) = theirs.next().expect("a line per instruction");
        let ours = disassemble(insn, pc).unwrap();
        if normal(&ours) != normal(&text) {
            wrong.push(format!("{insn:#x}: {ours} / {text}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong[..wrong.len().min(60)].join("\n"));
}
