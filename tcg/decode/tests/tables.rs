//! The generator refuses tables that are wrong, and says where.

use mimus_tcg_decode::{Options, Source, generate};

const HEAD: &str = "extension I\n%rd 7:5\n%rs1 15:5\n&r2 rd:x rs1:x\n\
    @r2 ------- ----- ..... ... ..... ....... &r2 %rd %rs1\n";

fn run(text: &str) -> Result<String, String> {
    let text = format!("{HEAD}{text}");
    let sources = [Source { name: "t.decode", text: &text }];
    let options = Options { extension: "Ext", display: "show" };
    generate(&sources, &options).map_err(|error| error.to_string())
}

fn refused(text: &str, message: &str) {
    let error = run(text).unwrap_err();
    assert!(error.contains(message), "{error}");
    assert!(error.starts_with("t.decode:"), "{error}");
}

const A: &str = "a 0000000 ----- ..... 000 ..... 0110011 @r2 : a {rd},{rs1}\n";

#[test]
fn good_table() {
    let source = run(A).unwrap();
    assert!(source.contains("fn a(&mut self, args: ArgsR2) -> bool;"));
    assert!(source.contains("pub fn decode32"));
    assert!(source.contains("show::x(out, i64::from(args.rd), pc);"));
}

#[test]
fn overlaps() {
    let b = "b 0000000 ----- 00001 000 ..... 0110011 &r2 rs1=1 %rd : b {rd}\n";
    refused(&format!("{A}{b}"), "overlaps the pattern at t.decode:6");
    assert!(run(&format!("{{\n{b}{A}}}\n")).is_ok());
    refused(&format!("{{\n{A}{b}}}\n"), "can never match");
    refused(&format!("{{\n{b}{A}"), "still open");
}

#[test]
fn unused_things() {
    refused("%imm 20:s12\na 0000000 ----- ..... 000 ..... 0110011 @r2 : a\n", "%imm is not used");
    refused("", "@r2 is not used");
    refused(&format!("{A}&q z\n"), "&q is not used");
    refused("a 0000000 ..... ..... 000 ..... 0110011 @r2 : a\n", "in no field");
}

#[test]
fn syntax() {
    refused("a 0000000 ----- ..... 000 ..... 011001 @r2 : a\n", "31 bits");
    refused("a 0000000 ----- ..... 000 ..... 0110011 @r3 : a\n", "@r3 is not defined");
    refused("a 0000000 ----- ..... 000 ..... 0110011 @r2\n", "display text");
    refused("a 0000000 ----- ..... 000 ..... 0110011 @r2 : a {x}\n", "not an argument");
    refused("a 0000000 ----- ..... 000 ..... 0110011 &r2 %rd : a\n", "'rs1' has no value");
    refused("a 0000000 ----- ..... 000 ..... 0110011 @r2 imm=1 : a\n", "not an argument");
    refused("%big 0:32 0:1\n", "33 bits");
    refused("%bad 30:4\n", "not within 32 bits");
    refused("%bad 30\n", "not LSB:LEN");
    refused("}\n", "without an open group");
    refused(&format!("{A}a 0000000 ----- ----- 001 ----- 0110011 : a\n"), "another argument set");
}
