//! Reading.

use super::names::Named;
use crate::flags::Flags;
use crate::op::*;
use crate::unit::UnitInsn;

/// Where the text is wrong, and what was expected there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: expected {expected}, found {found}")]
pub struct ParseError {
    /// Line number, from 1.
    pub line: usize,
    pub expected: String,
    pub found: String,
}

/// What is left to read of a line.
///
/// Public for formats that embed the text form, such as test files.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    rest: &'a str,
    line: usize,
}

type Parsed<T> = Result<T, ParseError>;

/// The line without its comment and the blanks around.
pub fn strip_comment(line: &str) -> &str {
    line.split('#').next().unwrap_or("").trim()
}

/// Reads one block; nothing but blank lines and comments may surround it.
///
/// # Errors
/// The first line that is not in the text form.
pub fn parse(text: &str) -> Parsed<Block> {
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    let block = parse_lines(&mut lines)?;
    for (number, line) in lines {
        Cursor::new(line, number).end()?;
    }
    Ok(block)
}

/// Reads one block from numbered lines, up to and with its closing brace.
///
/// # Errors
/// The first line that is not in the text form.
pub fn parse_lines<'a>(lines: &mut impl Iterator<Item = (usize, &'a str)>) -> Parsed<Block> {
    let mut lines = lines.filter(|(_, line)| !strip_comment(line).is_empty());
    let mut last = 1;
    let Some((number, header)) = lines.next() else {
        return Err(end_of_text(last, "block"));
    };
    let mut block = parse_header(Cursor::new(header, number))?;
    last = number;
    for (number, line) in lines {
        let mut cursor = Cursor::new(line, number);
        if cursor.eat("}") {
            cursor.end()?;
            return Ok(block);
        }
        block.ops.push(parse_op(&mut cursor)?);
        cursor.end()?;
        last = number;
    }
    Err(end_of_text(last, "} at the block's end"))
}

fn end_of_text(line: usize, expected: &str) -> ParseError {
    ParseError { line, expected: expected.into(), found: "the end of the text".into() }
}

fn parse_header(mut c: Cursor<'_>) -> Parsed<Block> {
    c.expect("block")?;
    let mut field = |name: &str| -> Parsed<u16> {
        c.expect(name)?;
        c.expect("=")?;
        c.ranged(0, u16::MAX.into(), "a number below 65536").map(|v| v as u16)
    };
    let (start, len, insns) = (field("start")?, field("len")?, field("insns")?);
    let narrow = c.eat("narrow");
    c.expect("{")?;
    c.end()?;
    Ok(Block { ops: Vec::new(), start, len, insns, narrow, granules: 0 })
}

/// Reads one operation, leaving what follows it on the line.
///
/// # Errors
/// The text is not an operation.
pub fn parse_op(c: &mut Cursor<'_>) -> Parsed<Op> {
    let before = c.clone();
    if let Some(d) = c.try_slot() {
        if c.eat(",") {
            let second = c.slot()?;
            c.expect("=")?;
            return parse_pair(c, d, second);
        }
        c.expect("=")?;
        return parse_value(c, d);
    }
    let (word, at) = c.mnemonic("an operation")?;
    match word.split() {
        ("insn", []) => {
            let pc = c.page_pc()?;
            Ok(Op::Insn { pc, len: c.byte()? })
        }
        ("store", [size]) => {
            let size = at.name(size)?;
            let (base, off) = c.address()?;
            c.expect(",")?;
            Ok(Op::Store { src: c.val()?, base, off, size })
        }
        ("amo", [op, size]) => parse_amo(c, None, at.name(op)?, at.name(size)?),
        ("rmw", [op, size, lock @ ..]) => parse_rmw(c, None, &at, op, size, lock),
        ("f", [op, size]) => parse_alu_f(c, None, at.name(op)?, at.name(size)?),
        ("storeenv", [size]) => {
            let (size, off) = (at.name(size)?, c.env_offset()?);
            c.expect(",")?;
            Ok(Op::StoreEnv { src: c.val()?, off, size })
        }
        ("setflags", []) => {
            let mask = c.flags()?;
            c.expect(",")?;
            Ok(Op::SetFlags { a: c.val()?, mask })
        }
        ("flipflags", []) => Ok(Op::FlipFlags { mask: c.flags()? }),
        ("deadflags", []) => Ok(Op::DeadFlags { mask: c.flags()? }),
        ("brf", [cond]) => {
            let cond = at.name(cond)?;
            c.expect("->")?;
            let to = c.page_pc()?;
            let dead = if c.eat("dead") { c.flags()? } else { Flags::NONE };
            Ok(Op::BranchF { cond, to, dead })
        }
        ("fence", []) => Ok(Op::Fence),
        ("env", []) => {
            let off = c.env_offset()?;
            c.expect("=")?;
            Ok(Op::SetEnvByte { off, val: c.byte()? })
        }
        ("guard", []) => {
            c.expect("env")?;
            let off = c.env_offset()?;
            c.expect("&")?;
            Ok(Op::GuardEnv { off, mask: c.byte()? })
        }
        ("guard", ["fits"]) => {
            let a = c.val()?;
            c.expect(",")?;
            Ok(Op::GuardFits { a, bits: c.byte()? })
        }
        ("guard", [cond]) => {
            let cond = at.name(cond)?;
            let (a, b) = c.two_vals()?;
            Ok(Op::Guard { cond, a, b })
        }
        ("call", [kind]) => parse_call(c, None, at.name(kind)?),
        ("br", [cond]) => {
            let cond = at.name(cond)?;
            let (a, b) = c.two_vals()?;
            c.expect("->")?;
            Ok(Op::Branch { cond, a, b, to: c.page_pc()? })
        }
        ("count", []) => {
            let mut count = || Ok(c.ranged(0, u16::MAX.into(), "a number of instructions")? as u16);
            Ok(Op::Count { insns: count()?, total: count()? })
        }
        ("trace", ["entry"]) => Ok(Op::TraceBlock { id: c.word32()?, entry: true }),
        ("trace", ["block"]) => Ok(Op::TraceBlock { id: c.word32()?, entry: false }),
        ("trace", ["access"]) => {
            let head = c.word32()?;
            let (base, off) = c.address()?;
            Ok(Op::TraceAccess { head, base, off })
        }
        ("trace", ["value"]) => Ok(Op::TraceValue { value: Some(c.val()?) }),
        ("trace", ["done"]) => Ok(Op::TraceValue { value: None }),
        ("unit", []) => parse_unit(c, None),
        ("rep", [size, wide @ ..]) => {
            let size = at.name(size)?;
            let narrow = match wide {
                [] => true,
                ["wide"] => false,
                _ => return Err(at.error("wide, or nothing")),
            };
            c.expect("[")?;
            let to = c.slot()?;
            c.expect("]")?;
            c.expect(",")?;
            let copies = c.eat("[");
            let source = c.slot()?;
            if copies {
                c.expect("]")?;
            }
            let (fill, from) = if copies { (None, source) } else { (Some(source), to) };
            c.expect(",")?;
            let count = c.slot()?;
            c.expect("unless")?;
            c.expect("env")?;
            let down = c.env_offset()?;
            c.expect("&")?;
            Ok(Op::Rep(Rep { size, fill, count, from, to, narrow, down, down_mask: c.byte()? }))
        }
        ("jump", []) => Ok(Op::Jump { to: c.page_pc()? }),
        ("jumpreg", []) => parse_jump_reg(c),
        ("dispatch", []) => Ok(Op::Dispatch),
        _ => Err(before.error("an operation")),
    }
}

/// Reads an operation after `D =`.
fn parse_value(c: &mut Cursor<'_>, d: Slot) -> Parsed<Op> {
    let (word, at) = c.mnemonic("an operation with a result")?;
    match word.split() {
        ("getpc", []) => Ok(Op::GetPc { d, pc: c.page_pc()? }),
        ("load", [size, ext]) => {
            let (size, ext) = (at.name(size)?, at.name(ext)?);
            let (base, off) = c.address()?;
            Ok(Op::Load { d, base, off, size, ext })
        }
        ("lr", [size, ext]) => {
            let (size, ext) = (at.name(size)?, at.name(ext)?);
            Ok(Op::LoadReserved { d, base: c.plain_address()?, size, ext })
        }
        ("sc", [size]) => {
            let size = at.name(size)?;
            let base = c.plain_address()?;
            c.expect(",")?;
            Ok(Op::StoreConditional { d, src: c.val()?, base, size })
        }
        ("amo", [op, size]) => parse_amo(c, Some(d), at.name(op)?, at.name(size)?),
        ("fp", [op, fmt, rm]) => {
            let (op, fmt, rm) = (at.name(op)?, at.name(fmt)?, at.name(rm)?);
            parse_fp(c, op, fmt, rm, d)
        }
        ("call", [kind]) => parse_call(c, Some(d), at.name(kind)?),
        ("rmw", [op, size, lock @ ..]) => parse_rmw(c, Some(d), &at, op, size, lock),
        ("f", [op, size]) => parse_alu_f(c, Some(d), at.name(op)?, at.name(size)?),
        ("lea", [size]) => {
            let size = at.name(size)?;
            let (base, index) = c.two_vals()?;
            c.expect(",")?;
            let shift = c.byte()?;
            c.expect(",")?;
            let disp = c.ranged(i32::MIN.into(), i32::MAX.into(), "a 32-bit displacement")? as i32;
            Ok(Op::Lea { d, base, index, shift, disp, size })
        }
        ("unit", []) => parse_unit(c, Some(d)),
        ("part", [size]) => Ok(Op::SetPart { d, size: at.name(size)?, a: c.val()? }),
        ("gethigh", []) => Ok(Op::GetHigh { d, a: c.slot()? }),
        ("sethigh", []) => Ok(Op::SetHigh { d, a: c.val()? }),
        ("loadenv", [size, ext]) => {
            let (size, ext) = (at.name(size)?, at.name(ext)?);
            Ok(Op::LoadEnv { d, off: c.env_offset()?, size, ext })
        }
        (name @ ("shld" | "shrd"), [size]) => {
            let size = at.name(size)?;
            let (a, b, n) = c.three_vals()?;
            Ok(Op::ShiftDoubleF { left: name == "shld", size, d, a, b, n })
        }
        ("set", [cond]) => Ok(Op::SetCondF { cond: at.name(cond)?, d }),
        ("cmov", [cond, size]) => Ok(Op::CMovF { cond: at.name(cond)?, size: at.name(size)?, d, a: c.val()? }),
        ("getflags", []) => Ok(Op::GetFlags { d }),
        ("cmpxchg", [size]) => {
            let size = at.name(size)?;
            let (base, off) = c.address()?;
            c.expect(",")?;
            let (expected, new) = c.two_vals()?;
            Ok(Op::CmpXchg { d, size, expected, new, base, off })
        }
        (op, [ty]) => {
            if let Some(op) = AluOp::from_name(op) {
                let ty = at.name(ty)?;
                let (a, b) = c.two_vals()?;
                Ok(Op::Alu { op, ty, d, a, b })
            } else if let Some(op) = UnOp::from_name(op) {
                Ok(Op::Un { op, ty: at.name(ty)?, d, a: c.val()? })
            } else {
                Err(at.error("an operation with a result"))
            }
        }
        _ => Err(at.error("an operation with a result")),
    }
}

/// Reads an operation after `D, D =`.
fn parse_pair(c: &mut Cursor<'_>, first: Slot, second: Slot) -> Parsed<Op> {
    let what = "an operation with two results (mulwide, divwide)";
    let (word, at) = c.mnemonic(what)?;
    let (name, sign, size) = match word.split() {
        (name @ ("mulwide" | "divwide"), [sign @ ("s" | "u"), size]) => (name, *sign, at.name(size)?),
        _ => return Err(at.error(what)),
    };
    let signed = sign == "s";
    if name == "mulwide" {
        let (a, b) = c.two_vals()?;
        return Ok(Op::MulWideF { signed, size, lo: first, hi: second, a, b });
    }
    let (hi, lo, b) = c.three_vals()?;
    Ok(Op::DivWideF { signed, size, q: first, r: second, hi, lo, b })
}

fn parse_alu_f(c: &mut Cursor<'_>, d: Option<Slot>, op: FlagOp, size: Size) -> Parsed<Op> {
    let a = c.val()?;
    let unary = crate::verify::is_unary(op) && !c.rest.starts_with(',');
    if !unary {
        c.expect(",")?;
    }
    let b = if unary { Val::Imm(0) } else { c.val()? };
    Ok(Op::AluF { op, size, d, a, b })
}

fn parse_rmw(
    c: &mut Cursor<'_>,
    old: Option<Slot>,
    at: &Cursor<'_>,
    op: &str,
    size: &str,
    lock: &[&str],
) -> Parsed<Op> {
    let op = if op == "swap" { RmwOp::Swap } else { RmwOp::F(at.name(op)?) };
    let size = at.name(size)?;
    let lock = match lock {
        [] => false,
        ["lock"] => true,
        _ => return Err(at.error("lock, or nothing")),
    };
    let (base, off) = c.address()?;
    c.expect(",")?;
    Ok(Op::Rmw { op, size, lock, old, src: c.val()?, base, off })
}

fn parse_amo(c: &mut Cursor<'_>, d: Option<Slot>, op: AmoOp, size: Size) -> Parsed<Op> {
    let base = c.plain_address()?;
    c.expect(",")?;
    Ok(Op::Amo { op, d, src: c.val()?, base, size })
}

fn parse_fp(c: &mut Cursor<'_>, op: FpOp, fmt: FpFmt, rm: Rm, d: Slot) -> Parsed<Op> {
    let a = c.slot()?;
    let mut operands = [a; 3];
    for (i, operand) in operands.iter_mut().enumerate().skip(1) {
        if i < crate::verify::fp_arity(op) {
            c.expect(",")?;
        } else if !c.eat(",") {
            break;
        }
        *operand = c.slot()?;
    }
    let [a, b, c] = operands;
    Ok(Op::Fp { op, fmt, rm, d, a, b, c })
}

fn parse_call(c: &mut Cursor<'_>, ret: Option<Slot>, kind: CallKind) -> Parsed<Op> {
    let helper = c.ranged(0, u16::MAX.into(), "a helper's number (below 65536)")? as u16;
    c.expect("(")?;
    let (a, b) = c.two_vals()?;
    c.expect(",")?;
    let args = [a, b, c.val()?];
    c.expect(")")?;
    Ok(Op::Call { helper, kind, ret, args })
}

fn parse_jump_reg(c: &mut Cursor<'_>) -> Parsed<Op> {
    let base = c.slot()?;
    let off = c.offset()?;
    let hint = if c.eat("call") {
        JumpHint::Call
    } else if c.eat("ret") {
        JumpHint::Return
    } else {
        JumpHint::None
    };
    let link = if c.eat("link") {
        let d = c.slot()?;
        c.expect("=")?;
        Some((d, c.page_pc()?))
    } else {
        None
    };
    Ok(Op::JumpReg { base, off, link, hint })
}

/// An instruction by its parts, then `, A + 0x8`.
fn parse_unit(c: &mut Cursor<'_>, d: Option<Slot>) -> Parsed<Op> {
    let mut insn = UnitInsn { map: c.byte()?, prefix: c.byte()?, opcode: c.byte()?, ..UnitInsn::default() };
    while !c.eat(",") {
        let at = c.clone();
        match c.word("a part of an instruction, or `,`")? {
            "vex" => insn.vex = true,
            "w" => insn.w = true,
            "wide" => insn.wide = true,
            "bare" => insn.bare = true,
            "aligned" => insn.aligned = true,
            "sets" => insn.sets_flags = true,
            "reads" => insn.reads_flags = c.flags()?,
            "reg" => insn.reg = c.byte()?,
            "v" => insn.v = c.byte()?,
            "rm" => insn.rm = c.byte()?,
            "imm" => insn.imm = Some(c.byte()?),
            "gpr" => {
                let at = c.clone();
                insn.gpr = at.name(c.word("a general register's part")?)?;
            }
            memory @ ("load" | "store") => {
                insn.memory = at.name(memory)?;
                insn.bytes = c.byte()?;
            }
            _ => return Err(at.error("a part of an instruction, or `,`")),
        }
    }
    Ok(Op::Unit { insn, d, a: c.val()?, off: c.offset()? })
}

/// A mnemonic, split at its dots into up to four parts.
struct Mnemonic<'a> {
    parts: [&'a str; 4],
    count: usize,
}

impl<'a> Mnemonic<'a> {
    /// The first part, and the others.
    fn split(&self) -> (&'a str, &[&'a str]) {
        (self.parts[0], &self.parts[1..self.count.max(1)])
    }
}

impl<'a> Cursor<'a> {
    /// A cursor at the start of a line; comments are left out.
    pub fn new(line: &'a str, number: usize) -> Self {
        Cursor { rest: strip_comment(line), line: number }
    }

    /// An error about what comes next.
    pub fn error(&self, expected: &str) -> ParseError {
        let found = match self.rest {
            "" => "the end of the line".into(),
            rest => format!("`{}`", rest.split_whitespace().next().unwrap_or("")),
        };
        ParseError { line: self.line, expected: expected.into(), found }
    }

    fn advance(&mut self, bytes: usize) {
        self.rest = self.rest[bytes..].trim_start();
    }

    /// The word (letters, digits, `_` and `.`) that comes next; may be empty.
    fn peek_word(&self) -> &'a str {
        let is_word = |ch: char| ch.is_ascii_alphanumeric() || ch == '_' || ch == '.';
        let end = self.rest.find(|ch| !is_word(ch)).unwrap_or(self.rest.len());
        &self.rest[..end]
    }

    /// Takes the next word.
    ///
    /// # Errors
    /// There is none.
    pub fn word(&mut self, expected: &str) -> Parsed<&'a str> {
        let word = self.peek_word();
        if word.is_empty() {
            return Err(self.error(expected));
        }
        self.advance(word.len());
        Ok(word)
    }

    /// Takes `token` if it comes next: a whole word, or punctuation.
    pub fn eat(&mut self, token: &str) -> bool {
        let found = match self.peek_word() {
            "" => self.rest.starts_with(token),
            word => word == token,
        };
        if found {
            self.advance(token.len());
        }
        found
    }

    /// Takes `token`.
    ///
    /// # Errors
    /// Something else comes next.
    pub fn expect(&mut self, token: &str) -> Parsed<()> {
        if self.eat(token) { Ok(()) } else { Err(self.error(&format!("`{token}`"))) }
    }

    /// Checks that the line is used up.
    ///
    /// # Errors
    /// It is not.
    pub fn end(&self) -> Parsed<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.error("the end of the line")) }
    }

    /// Takes what is left of the line.
    pub fn remainder(&mut self) -> &'a str {
        std::mem::take(&mut self.rest)
    }

    /// Takes a mnemonic; the cursor returned stands at its start, for errors.
    fn mnemonic(&mut self, expected: &str) -> Parsed<(Mnemonic<'a>, Cursor<'a>)> {
        let at = self.clone();
        let word = self.word(expected)?;
        let mut parts = Mnemonic { parts: [""; 4], count: 0 };
        for part in word.split('.') {
            let Some(place) = parts.parts.get_mut(parts.count) else {
                return Err(at.error(expected));
            };
            *place = part;
            parts.count += 1;
        }
        Ok((parts, at))
    }

    /// The value called `name` (part of the mnemonic at the cursor).
    fn name<T: Named>(&self, name: &str) -> Parsed<T> {
        T::from_name(name).ok_or_else(|| self.error(T::WHAT))
    }

    fn unsigned(&mut self, expected: &str) -> Parsed<u64> {
        let at = self.clone();
        let word = self.word(expected)?;
        let digits = word.strip_prefix("0x");
        let value = match digits {
            // The parsing function would accept a sign; a word has none.
            Some(hex) => u64::from_str_radix(hex, 16),
            None => word.parse(),
        };
        value.map_err(|_| at.error(expected))
    }

    /// Takes a number with an optional sign, from `min` to `max`.
    ///
    /// # Errors
    /// It is not a number in that range: `expected` says what it should be.
    pub fn ranged(&mut self, min: i128, max: i128, expected: &str) -> Parsed<i128> {
        let at = self.clone();
        let negative = self.eat("-");
        if !negative {
            self.eat("+");
        }
        let magnitude = i128::from(self.unsigned(expected).map_err(|_| at.error(expected))?);
        let value = if negative { -magnitude } else { magnitude };
        if (min..=max).contains(&value) { Ok(value) } else { Err(at.error(expected)) }
    }

    /// Takes a 64-bit number, signed or unsigned.
    ///
    /// # Errors
    /// It is not one.
    pub fn u64(&mut self) -> Parsed<u64> {
        self.ranged(i64::MIN.into(), u64::MAX.into(), "a 64-bit number").map(|v| v as u64)
    }

    /// Takes a number below 256.
    ///
    /// # Errors
    /// It is not one.
    pub fn byte(&mut self) -> Parsed<u8> {
        self.ranged(0, 255, "a number below 256").map(|v| v as u8)
    }

    /// Takes a code address: `+0x10`.
    ///
    /// # Errors
    /// It is not one.
    pub fn page_pc(&mut self) -> Parsed<PagePc> {
        let what = "a code address (+0x10: an offset from the block's page, with its sign)";
        if !self.rest.starts_with(['+', '-']) {
            return Err(self.error(what));
        }
        self.ranged(i32::MIN.into(), i32::MAX.into(), what).map(|v| PagePc(v as i32))
    }

    fn try_slot(&mut self) -> Option<Slot> {
        let word = self.peek_word();
        let digits = word.strip_prefix(['s', 't'])?;
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let number: u8 = digits.parse().ok()?;
        let (first, end) = if word.starts_with('t') { (FIRST_TEMP, SLOTS as u8) } else { (0, FIRST_TEMP) };
        let slot = first.checked_add(number).filter(|slot| *slot < end)?;
        self.advance(word.len());
        Some(Slot(slot))
    }

    /// Takes a slot.
    ///
    /// # Errors
    /// It is not one.
    pub fn slot(&mut self) -> Parsed<Slot> {
        let at = self.clone();
        self.try_slot().ok_or_else(|| at.error(&format!("a slot (s0-s{}, t0-t{})", FIRST_TEMP - 1, TEMPS - 1)))
    }

    fn val(&mut self) -> Parsed<Val> {
        if let Some(slot) = self.try_slot() {
            return Ok(Val::Slot(slot));
        }
        let at = self.clone();
        self.u64().map(|v| Val::Imm(v as i64)).map_err(|_| at.error("a slot or a 64-bit constant"))
    }

    fn two_vals(&mut self) -> Parsed<(Val, Val)> {
        let a = self.val()?;
        self.expect(",")?;
        Ok((a, self.val()?))
    }

    fn three_vals(&mut self) -> Parsed<(Val, Val, Val)> {
        let (a, b) = self.two_vals()?;
        self.expect(",")?;
        Ok((a, b, self.val()?))
    }

    /// Takes a set of flags: `cpazso`, or `-`.
    ///
    /// # Errors
    /// It is not one.
    pub fn flags(&mut self) -> Parsed<Flags> {
        let at = self.clone();
        let letters = if self.eat("-") { "-" } else { self.peek_word() };
        if letters != "-" {
            self.advance(letters.len());
        }
        Flags::from_letters(letters).ok_or_else(|| at.error("flags (letters of cpazso, or -)"))
    }

    /// ` + 0x8`, ` - 0x8`, or nothing.
    fn offset(&mut self) -> Parsed<i32> {
        if !self.rest.starts_with(['+', '-']) {
            return Ok(0);
        }
        self.ranged(i32::MIN.into(), i32::MAX.into(), "a 32-bit offset").map(|v| v as i32)
    }

    /// `[A + 0x8]`
    fn address(&mut self) -> Parsed<(Val, i32)> {
        self.expect("[")?;
        let base = self.val()?;
        let off = self.offset()?;
        self.expect("]")?;
        Ok((base, off))
    }

    /// `[A]`
    fn plain_address(&mut self) -> Parsed<Val> {
        self.expect("[")?;
        let base = self.val()?;
        self.expect("]")?;
        Ok(base)
    }

    /// `[0x4]`
    fn word32(&mut self) -> Parsed<u32> {
        Ok(self.ranged(0, u32::MAX.into(), "a word")? as u32)
    }

    fn env_offset(&mut self) -> Parsed<i32> {
        self.expect("[")?;
        let off = self.ranged(i32::MIN.into(), i32::MAX.into(), "a 32-bit offset")?;
        self.expect("]")?;
        Ok(off as i32)
    }
}

const TEMPS: usize = SLOTS - FIRST_TEMP as usize;

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY_FORM: &str = "\
block start=0x10 len=8 insns=2 {
  insn +0x10 4
  s5 = add.i64 s6, 0x10
  t15 = rol.u32 -0x8000000000000000, t0
  s5 = clz.i32 s63
  s5 = getpc -0x80000000
  s5 = load.b4.sign [s6 + 0x8]
  s5 = load.b8.zero [-0x10 - 0x80000000]
  s5 = load.b4.ones [s6]
  store.b1 [s6 - 0x1], 0x7f
  s1 = lr.b8.sign [s2]
  s1 = sc.b4 [s2], s3
  s1 = amo.maxu.b4 [s2], s3
  amo.swap.b8 [0x1000], -0x1
  fence
  s40 = fp.add.f64.dyn s41, s42
  s40 = fp.add.f64.rne s41, s42, s43
  s40 = fp.sqrt.f32.rtz s41
  s40 = fp.sqrt.f32.rtz s41, s42
  s40 = fp.sqrt.f32.rtz s41, s41, s0
  s40 = fp.nmadd.f32.rmm s41, s41, s41
  env[0x4] = 0x1
  env[-0x4] = 0xff
  guard env[0x4] & 0x3
  s1 = call.pure 3(s1, 0x0, -0x1)
  call.mayexit 65535(s1, s2, s3)
  s1 = lea.b4 s2, s3, 2, -0x10
  s1 = lea.b8 0x0, s3, 0, 0x7fffffff
  s1 = part.b2 s2
  s1 = gethigh s2
  s1 = sethigh 0x7f
  s1 = loadenv.b4.sign [0x10]
  storeenv.b8 [0x10], s2
  s1 = f.add.b1 s1, 0x1
  f.sub.b8 s1, s2
  s1 = f.neg.b4 s1
  s1 = f.inc.b4 s1, 0x1
  s1 = shld.b2 s1, s2, 0x3
  s1 = shrd.b8 s1, s2, s3
  s0, s2 = mulwide.u.b8 s0, s3
  s0, s2 = divwide.s.b4 s2, s0, s3
  s1 = set.np
  s1 = cmov.le.b4 s2
  s1 = getflags
  setflags cpazso, s2
  flipflags c
  rmw.add.b4 [s1 + 0x8], s2
  rep.b4 [s7], [s6], s1 unless env[0x10] & 0x4
  rep.b1.wide [s7], s0, s1 unless env[0x10] & 0x4
  call.mayexit 1(0x0, 0x0, 0x0)
  unit 1 1 0xfc aligned reg 9 load 16, s1 + 0x8
  s1 = unit 3 1 0x16 vex w v 5 rm 3 imm 0x1 gpr outrm, 0x0
  unit 1 0 0x77 vex wide bare sets reads cz, 0x0
  s1 = rmw.swap.b1.lock [s1], s2
  s1 = cmpxchg.b8 [s1 - 0x8], s2, s3
  insn +0x14 4
  brf.g -> +0x40
  brf.b -> -0x4 dead czo
  deadflags zs
  br.lts s1, 0x7fffffffffffffff -> +0x40
  jump -0x4
  jumpreg s5
  jumpreg s5 + 0x8 call link s1 = +0x18
  jumpreg s5 - 0x8 ret
  jumpreg s5 link t0 = -0x18
  dispatch
}";

    #[test]
    fn round_trip() {
        let block = parse(EVERY_FORM).unwrap();
        assert_eq!(block.to_string(), EVERY_FORM);
        assert_eq!(parse(&block.to_string()), Ok(block));
    }

    #[test]
    fn blanks_and_comments() {
        let block = parse("# one\n\nblock start=16 len=4 insns=1{ # two\ns1=add.i32 s2,0xffffffffffffffff\n}\n#");
        let add = Op::Alu { op: AluOp::Add, ty: Ty::I32, d: Slot(1), a: Slot(2).into(), b: Val::Imm(-1) };
        assert_eq!(block.unwrap().ops, [add]);
    }

    fn error(op: &str) -> String {
        parse(&format!("block start=0 len=4 insns=1 {{\n{op}\n}}")).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_the_line_and_what_was_expected() {
        assert_eq!(error("frob s1"), "line 2: expected an operation, found `frob`");
        assert_eq!(error("s1 = add.i16 s2, 1"), "line 2: expected a type (i64, i32, u32), found `add.i16`");
        assert_eq!(error("s1 = add.i64 s2"), "line 2: expected `,`, found the end of the line");
        assert_eq!(error("s1 = add.i64 s2, x"), "line 2: expected a slot or a 64-bit constant, found `x`");
        assert_eq!(error("s1 = s2"), "line 2: expected an operation with a result, found `s2`");
        assert_eq!(error("s64 = mov.i64 s2"), "line 2: expected an operation, found `s64`");
        assert_eq!(error("jumpreg s64"), "line 2: expected a slot (s0-s63, t0-t15), found `s64`");
        assert_eq!(error("fence fence"), "line 2: expected the end of the line, found `fence`");
        assert_eq!(error("insn +0x10 256"), "line 2: expected a number below 256, found `256`");
        assert!(error("jump 16").starts_with("line 2: expected a code address"));
        assert!(error("s1 = add.i64 s2, 0x10000000000000000").contains("64-bit constant"));
        assert!(error("s1 = load.b4.sign.x.y [s2]").starts_with("line 2: expected an operation"));
        assert!(error("\u{e9}").starts_with("line 2: expected an operation, found"));
        assert!(parse("").unwrap_err().to_string().contains("expected block"));
        assert!(parse("block start=0 len=4 insns=1 {").unwrap_err().to_string().contains("expected }"));
        assert!(parse("block start=0 len=4 insns=1 {\n}\nx").unwrap_err().to_string().starts_with("line 3"));
        assert!(parse("block start=65536 len=4 insns=1 {").unwrap_err().to_string().contains("65536"));
    }
}
