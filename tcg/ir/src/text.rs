//! The text form of a block: written by [`std::fmt::Display`], read by [`parse`], exactly the same both ways.
//!
//! ```text
//! block start=0x10 len=8 insns=2 {
//!   insn +0x10 4
//!   t0 = and.i64 s6, 0xff8
//!   s5 = load.b4.sign [t0 + 0x8]
//!   insn +0x14 4
//!   br.lts s5, -0x1 -> +0x40
//!   jump +0x18
//! }
//! ```
//!
//! One operation a line; blanks do not matter, `#` begins a comment. Slots are `s0`–`s63` and the temporaries
//! `t0`–`t15`; constants are decimal or `0x…`, with a sign (64-bit ones may be written unsigned); a code address
//! is its signed offset from the block's page, `+0x10` or `-0x4`. A block whose addresses are 32 bits says `narrow`
//! before its brace. `A` below is a slot or constant, `D` a slot:
//!
//! | text | operation |
//! |---|---|
//! | `insn +0x10 4` | `Insn`, with its length in bytes |
//! | `D = add.i64 A, A` | `Alu`; types `i64`, `i32`, `u32` |
//! | `D = clz.i32 A` | `Un` |
//! | `D = getpc +0x1000` | `GetPc` |
//! | `D = load.b4.sign [A + 0x8]` | `Load`; `b1` `b2` `b4` `b8`; `zero`, `sign`, `ones`; `[A]` when the offset is 0 |
//! | `store.b8 [A - 0x8], A` | `Store` |
//! | `D = lr.b4.sign [A]` | `LoadReserved` |
//! | `D = sc.b4 [A], A` | `StoreConditional` |
//! | `D = amo.add.b4 [A], A` | `Amo`; without `D =` when the old value is dropped |
//! | `fence` | `Fence` |
//! | `D = fp.add.f64.dyn D, D` | `Fp`; rounding `rne`, `rtz`, `rdn`, `rup`, `rmm`, `dyn`; operands left out are the first again |
//! | `env[0x4] = 0x1` | `SetEnvByte` |
//! | `s1 = unit 1 1 0xfc vex reg 9 v 1 rm 2 imm 0x5 gpr inrm load 16 aligned sets reads cz, s2 + 0x8` | `Unit`: map, prefix, opcode, then what there is |
//! | `rep.b8.wide [s7], [s6], s1 unless env[0x10] & 0x4`, `rep.b1 [s7], s0, s1 unless env[0x10] & 0x4` | `Rep` |
//! | `guard env[0x4] & 0x3` | `GuardEnv` |
//! | `guard.ltu A, A` | `Guard`; conditions as in `br` |
//! | `guard.fits A, 0x30` | `GuardFits` |
//! | `D = call.pure 3(A, A, A)` | `Call` of helper 3; `call.mayexit`; without `D =` when there is no result |
//! | `br.ltu A, A -> +0x40` | `Branch`; `eq`, `ne`, `lts`, `ges`, `ltu`, `geu` |
//! | `D = lea.b8 A, A, 2, 0x10` | `Lea`: base, index, shift, displacement |
//! | `D = part.b1 A`, `D = gethigh D`, `D = sethigh A` | `SetPart`, `GetHigh`, `SetHigh` |
//! | `D = loadenv.b4.zero [0x10]`, `storeenv.b4 [0x10], A` | `LoadEnv`, `StoreEnv` |
//! | `D = f.add.b4 A, A` | `AluF`; without `D =` when only the flags count, with one operand where the operation has one |
//! | `D = shld.b4 A, A, A` | `ShiftDoubleF`; `shrd` |
//! | `D, D = mulwide.s.b8 A, A` | `MulWideF`; `s`, `u` |
//! | `D, D = divwide.s.b8 A, A, A` | `DivWideF`: high, low, divisor |
//! | `D = set.ne`, `D = cmov.ne.b4 A` | `SetCondF`, `CMovF`; conditions as in x86 mnemonics |
//! | `D = getflags`, `setflags cpazso, A`, `flipflags c` | `GetFlags`, `SetFlags`, `FlipFlags` |
//! | `rmw.add.b4.lock [A + 0x8], A` | `Rmw`; without `.lock` when not atomic; `D =` when the old value is wanted |
//! | `D = cmpxchg.b4 [A + 0x8], A, A` | `CmpXchg`: expected, new |
//! | `brf.ne -> +0x40 dead cpazso` | `BranchF`; `dead` where there are dead flags |
//! | `deadflags cpazso` | `DeadFlags` |
//! | `count 3 7` | `Count`: instructions, total |
//! | `trace.entry 7`, `trace.block 7` | `TraceBlock` |
//! | `trace.access 7 [A + 0x8]`, `trace.value A`, `trace.done` | `TraceAccess`, `TraceValue` |
//! | `jump +0x14` | `Jump` |
//! | `jumpreg D + 0x8 call link D = +0x18` | `JumpReg`; offset, hint (`call`, `ret`) and link only where present |
//! | `dispatch` | `Dispatch` |
//!
//! Reading checks the syntax and the range of every number, not the rules of [`crate::verify`].

mod names;
mod parse;
mod print;

pub use parse::{Cursor, ParseError, parse, parse_lines, parse_op, strip_comment};
