//! Runs the cases of `tests/files` through the interpreter, and their blocks through the text form.

mod common;

use std::path::{Path, PathBuf};

use mimus_tcg_ir::filetest::{Case, parse};
use mimus_tcg_ir::text;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("tests/files is part of the crate")
        .map(|entry| entry.expect("tests/files can be listed").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "ir"))
        .collect();
    files.sort();
    files
}

fn cases(path: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(path).expect("a test file can be read");
    parse(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn interpreter_gives_what_the_cases_expect() {
    let (mut count, mut failures) = (0, Vec::new());
    for path in files() {
        for case in cases(&path) {
            count += 1;
            if let Err(e) = case.interpret(common::soft_fp) {
                failures.push(format!("{}: {e}", path.display()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(count >= 60, "only {count} cases were found");
}

#[test]
fn blocks_survive_the_text_form() {
    for path in files() {
        for case in cases(&path) {
            let printed = case.block.to_string();
            assert_eq!(text::parse(&printed).as_ref(), Ok(&case.block), "{}: {}", path.display(), case.name);
        }
    }
}

fn error(text: &str) -> String {
    parse(text).map_or_else(|e| e.to_string(), |cases| format!("{} cases", cases.len()))
}

#[test]
fn errors_name_the_line() {
    const BLOCK: &str = "block start=0 len=4 insns=1 {\ninsn +0 4\njump +4\n}\n";
    assert_eq!(error(""), "0 cases");
    assert_eq!(error(&format!("case a\n{BLOCK}expect next 0x80000004\n")), "1 cases");
    assert!(error("s1 = 2").starts_with("line 1: expected `case`, found `s1`"));
    assert!(error("case a\npage 0x80000010").starts_with("line 2: expected the address of a page"));
    assert!(error("case a\nt1 = 2").starts_with("line 2: expected a guest slot"));
    assert!(error("case a\nmem.b3 0 = 2").starts_with("line 2: expected a guest slot, env"));
    assert!(error("case a").starts_with("line 1: expected a block"));
    assert!(error(&format!("case a\n{BLOCK}")).starts_with("line 1: expected an outcome"));
    assert!(error(&format!("case a\n{BLOCK}s1 = 2")).starts_with("line 6: expected `expect`, found `s1`"));
    assert!(error(&format!("case a\n{BLOCK}expect next 1\nexpect next 1")).starts_with("line 7: expected one"));
    let unsound = error("case a\nblock start=0 len=4 insns=2 {\ninsn +0 4\njump +4\n}");
    assert!(unsound.starts_with("line 2: expected a block that verifies, found block: insns is 2"), "{unsound}");
}

#[test]
fn a_wrong_expectation_is_reported() {
    let text = "case wrong\nblock start=0 len=4 insns=1 {\ninsn +0 4\ns1 = mov.i64 5\njump +4\n}\n\
        expect next 0x80000008\nexpect s1 = 6\nexpect env[1] = 1\nexpect mem.b1 0x10 = 1\nexpect fflags 1\n";
    let cases = parse(text).expect("the text is in the format");
    let error = cases[0].interpret(common::soft_fp).expect_err("nothing is as expected");
    assert_eq!(
        error,
        "case wrong (line 1):\nexpected Next(80000008), got Next(80000004)\ns1: expected 0x6, got 0x5\n\
         env[0x1]: expected 0x1, got 0x0\nmemory: not the same pages are mapped\nfflags: expected 0x1, got 0x0"
    );
}
