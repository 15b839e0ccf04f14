//! The debugger's commands by name, and what is said of them.

use crate::info;

/// Commands: name, arguments, what it does.
pub const COMMANDS: &[(&str, &str, &str)] = &[
    ("help", "[COMMAND|VIEW]", "this list, or more of one of it"),
    ("registers", "[NAME|all]", "registers of the current vCPU, changed ones marked (short: r)"),
    ("set", "NAME|[ADDRESS] = EXPR", "changes a register, or 8 bytes of memory (u8[…], u16[…], u32[…]: fewer)"),
    ("print", "EXPR", "value of an expression, in hexadecimal and decimal, and the symbol there (short: p)"),
    ("disassemble", "[ADDRESS] [N]", "N instructions (short: u)"),
    ("x", "[/NFU] ADDRESS", "memory: N units, format x d u c s i, unit b h w g; xp: physical addresses"),
    ("find", "ADDRESS BYTES VALUE|\"TEXT\"", "where in BYTES of memory from ADDRESS on a value or text is"),
    ("dump", "FILE ADDRESS BYTES", "writes memory to a file of the host"),
    ("backtrace", "[PID]", "the calls that led here, or of a task that waits, and how each was found (short: bt)"),
    ("step", "[N] [branch|call|return|exception]", "executes N instructions, or up to the N-th such (short: s)"),
    ("next", "", "executes an instruction, over a call (short: n)"),
    ("finish", "", "runs until the function returns"),
    ("until", "EXPR", "steps until the expression is not 0, at most 10 million instructions"),
    ("continue", "", "lets the machine run until it stops (short: c)"),
    ("stop", "", "stops the machine"),
    ("break", "PLACE [if EXPR]", "stops before a place: address, symbol, FILE:LINE (short: b)"),
    (
        "catch",
        "EVENT [if EXPR]",
        "stops at exceptions, interrupts, accesses to CSRs, MSRs, ports, devices, changes of mode, process",
    ),
    ("watch", "ADDRESS [BYTES] [r|w|rw] [if EXPR]", "stops after an access"),
    ("delete", "[NUMBER]", "removes breakpoints and watchpoints, or all (short: d)"),
    ("vcpu", "[N]", "the vCPUs and where they are; makes another the current one"),
    ("symbols", "FILE [BIAS]", "loads names: ELF (vmlinux) or System.map"),
    ("walk", "ADDRESS", "the page-table walk of an address, every entry decoded"),
    ("report", "", "all of the above that one wants to see after a crash"),
    (
        "kallsyms",
        "[FILE]",
        "reads names, types and modules of the Linux that runs from its memory; writes a System.map",
    ),
    ("struct", "TYPE [ADDRESS]", "members of a structure of the Linux that runs, and what they hold"),
    // Its arguments are in a table of their own.
    ("info", "[VIEW]", "shows what VIEW says; 'info' alone lists them"),
];

pub(crate) const SHORT: &[(&str, &str)] = &[
    ("r", "registers"),
    ("p", "print"),
    ("u", "disassemble"),
    ("disas", "disassemble"),
    ("bt", "backtrace"),
    ("s", "step"),
    ("si", "step"),
    ("n", "next"),
    ("ni", "next"),
    ("c", "continue"),
    ("cont", "continue"),
    ("b", "break"),
    ("d", "delete"),
    ("xp", "x"),
];

/// What one may type.
const EXAMPLES: &[(&str, &[&str])] = &[
    ("registers", &["registers", "registers all", "registers satp"]),
    ("set", &["set $a0 = 5", "set u32[jiffies] = 0"]),
    ("print", &["print $sp + 8", "print u32[init_task + 4]", "print 'A'"]),
    ("disassemble", &["disassemble", "disassemble start_kernel 20", "disassemble $pc - 16 8"]),
    ("x", &["x/8xg $sp", "x/s $a1", "x/4i $pc", "xp/4xw 0x80000000"]),
    ("find", &["find 0xffffffff81000000 0x1000000 \"Linux version\"", "find $sp 4096 0xdeadbeef"]),
    ("dump", &["dump stack.bin $sp 4096"]),
    ("backtrace", &["backtrace", "backtrace 1"]),
    ("step", &["step", "step 1000", "step branch", "step 5 call", "step exception"]),
    ("until", &["until $a0 == 0", "until $pc == memcpy"]),
    ("break", &["break start_kernel", "break 0x80000000", "break kernel/fork.c:2800", "break memcpy if $a2 > 4096"]),
    (
        "catch",
        &[
            "catch exception 13",
            "catch interrupt",
            "catch csr satp w",
            "catch msr efer",
            "catch cr 3 w",
            "catch port 0x3f8-0x3ff w if $_value == 'A'",
            "catch device 0x10000000-0x100000ff",
            "catch mode user",
            "catch process",
        ],
    ),
    ("watch", &["watch jiffies_64 8 w", "watch $sp - 8 8 rw if u64[$sp - 8] == 0"]),
    ("delete", &["delete 2", "delete"]),
    ("symbols", &["symbols vmlinux", "symbols module.o 0xffffffffc0000000", "symbols busybox"]),
    ("walk", &["walk $sp", "walk 0xffffffff80000000"]),
    ("kallsyms", &["kallsyms", "kallsyms System.map"]),
    ("struct", &["struct task_struct init_task", "struct list_head"]),
];

/// The width of what is explained, so that what is said of it is in a column.
const COLUMN: usize = 34;

/// A command or view in a line.
pub fn line(name: &str, about: &str) -> String {
    match name.chars().count() < COLUMN {
        true => format!("{name:<COLUMN$} {about}\n"),
        false => format!("{name}\n{:COLUMN$} {about}\n", ""),
    }
}

/// Whether there is an argument that is not in brackets.
pub fn needs(arguments: &str) -> bool {
    let mut depth = 0;
    arguments.chars().any(|c| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        depth == 0 && !matches!(c, ']' | ' ')
    })
}

/// The list of commands.
pub fn help() -> String {
    let commands = COMMANDS.iter().filter(|c| c.0 != "info");
    commands.map(|(name, arguments, about)| line(&format!("{name} {arguments}"), about)).collect::<String>()
        + &info::help()
}

/// `help`, and `help NAME`.
pub fn about(topic: &str) -> String {
    let topic = topic.trim();
    if topic.is_empty() {
        return help();
    }
    if let Some(view) = topic.strip_prefix("info ").and_then(|name| info::about(name.trim())) {
        return view;
    }
    let name = SHORT.iter().find(|(short, _)| *short == topic).map_or(topic, |(_, long)| long);
    let Some((name, arguments, about)) = COMMANDS.iter().find(|c| c.0 == name) else {
        if let Some(view) = info::about(topic) {
            return view;
        }
        let all = COMMANDS.iter().map(|c| c.0).chain(info::names());
        let near = all.map(|n| (strsim::damerau_levenshtein(n, topic), n)).filter(|(d, _)| *d <= 2).min();
        return near.map_or_else(
            || format!("there is no command '{topic}'; 'help' alone lists them\n"),
            |(_, near)| format!("there is no command '{topic}'; did you mean '{near}'?\n"),
        );
    };
    let mut out = format!("{name} {arguments}\n  {about}\n");
    let shorts: Vec<&str> = SHORT.iter().filter(|(_, long)| long == name).map(|(short, _)| *short).collect();
    if !shorts.is_empty() {
        out.push_str(&format!("  also: {}\n", shorts.join(", ")));
    }
    if *name == "info" {
        return out + &info::help();
    }
    for example in EXAMPLES.iter().find(|e| e.0 == *name).map_or(&[][..], |e| e.1) {
        out.push_str(&format!("    {example}\n"));
    }
    if *name == "catch" {
        out.push_str(&format!("  {}\n  Conditions may use $_value, $_address and $_cause.\n", crate::catch::USAGE));
    }
    if arguments.contains("EXPR") || arguments.contains("ADDRESS") || arguments.contains("PLACE") {
        out.push_str(
            "  Addresses and conditions are expressions: numbers, 'A', registers ($a0), symbols, u8[…] to u64[…] for memory, \
             C's operators.\n",
        );
    }
    out
}
