//! The views of `info`: one table of them, and what shows each.

use crate::linux::mappings::{self, Layout};
use crate::linux::programs::Space;
use crate::linux::{Linux, dmesg, modules, tasks};
use crate::look::{Number, View};
use crate::{devices, firmware, pci};

type Show = fn(&str, &View<'_>, Number<'_>) -> Result<String, String>;

/// A view.
pub struct Info {
    pub name: &'static str,
    pub arguments: &'static str,
    pub about: &'static str,
    /// It shows a Linux guest's own structures.
    linux: bool,
    show: Show,
}

const fn info(name: &'static str, arguments: &'static str, about: &'static str, linux: bool, show: Show) -> Info {
    Info { name, arguments, about, linux, show }
}

/// All views but those of the debugger's own state.
pub const VIEWS: &[Info] = &[
    info("mem", "[ADDRESS [LAST]]", "what the page tables map, as ranges; from an address on", false, mem),
    info("mtree", "", "the physical address space", false, |_, v, _| Ok(v.regions())),
    info("tlb", "[ADDRESS]", "translations that the accelerator remembers", false, tlb),
    info("exceptions", "", "the last exceptions and interrupts", false, |_, v, _| Ok(v.recent(32))),
    info("jumps", "", "where the last jumps and calls by pointer and traps led", false, |_, v, _| Ok(v.jumps(256))),
    info("irqchip", "", "interrupt controllers", false, |_, v, _| devices::irqchips(&v.target.devices()?)),
    info("devices", "", "devices, by path", false, |_, v, _| Ok(devices::list(&v.target.devices()?))),
    info("device", "PATH", "registers of a device", false, |path, v, _| devices::show(path, &v.target.devices()?)),
    info("pci", "", "PCI functions with their BARs and capabilities", false, |_, v, _| Ok(pci::show(&v.target.pci()))),
    info("acpi", "[TABLE]", "ACPI tables in the guest's memory", false, |t, v, _| firmware::acpi(t, v.target)),
    info("fdt", "[NODE]", "the device tree in the guest's memory", false, |n, v, _| firmware::fdt(n, v.target)),
    info("tasks", "", "tasks of the Linux that runs, and what programs execute", true, show_tasks),
    info("maps", "[PID]", "what a program has mapped: files, heap, stack", true, show_maps),
    info("modules", "", "its modules", true, show_modules),
    info("dmesg", "[N]", "the last N messages of its log", true, show_dmesg),
];

/// Views of the debugger's own state.
const OWN: &[(&str, &str, &str)] = &[
    ("breakpoints", "", "breakpoints and watchpoints"),
    ("symbols", "", "how many names are known"),
    ("line", "ADDRESS", "the source line of an address"),
];

/// Other names of views: QEMU's, and those of a shell.
const ALIASES: &[(&str, &str)] = &[
    ("pic", "irqchip"),
    ("lapic", "irqchip"),
    ("ioapic", "irqchip"),
    ("qtree", "devices"),
    ("ps", "tasks"),
    ("lsmod", "modules"),
    ("log", "dmesg"),
    ("dtb", "fdt"),
];

/// Whether what is asked for shows names of the guest's kernel.
pub fn needs_linux(rest: &str) -> bool {
    let name = rest.split(' ').next().unwrap_or_default();
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
    let own = ["exceptions", "jumps", "symbols", "line", "tlb"].contains(&name);
    own || VIEWS.iter().any(|v| v.linux && v.name == name)
}

/// Whether a view takes an address.
pub fn takes_address(name: &str) -> bool {
    let all = OWN.iter().map(|o| (o.0, o.1)).chain(VIEWS.iter().map(|v| (v.name, v.arguments)));
    all.into_iter().any(|(n, arguments)| n == name && arguments.contains("ADDRESS"))
}

/// Names of all views.
pub fn names() -> impl Iterator<Item = &'static str> {
    OWN.iter().map(|o| o.0).chain(VIEWS.iter().map(|v| v.name))
}

/// The list.
pub fn help() -> String {
    let all = OWN.iter().copied().chain(VIEWS.iter().map(|v| (v.name, v.arguments, v.about)));
    all.map(|(name, arguments, about)| crate::help::line(&format!("info {name} {arguments}"), about)).collect()
}

/// What is said of one.
pub fn about(name: &str) -> Option<String> {
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
    let mut all = OWN.iter().copied().chain(VIEWS.iter().map(|v| (v.name, v.arguments, v.about)));
    let (name, arguments, about) = all.find(|(n, _, _)| *n == name)?;
    let aliases: Vec<&str> = ALIASES.iter().filter(|(_, long)| *long == name).map(|(alias, _)| *alias).collect();
    let also = if aliases.is_empty() { String::new() } else { format!("  also: info {}\n", aliases.join(", info ")) };
    Some(format!("info {name} {arguments}\n  {about}\n{also}"))
}

/// A view's text.
pub fn show(name: &str, rest: &str, view: &View<'_>, number: Number<'_>) -> Result<String, String> {
    if name.is_empty() {
        return Ok(help());
    }
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
    if let Some(found) = VIEWS.iter().find(|v| v.name == name) {
        return (found.show)(rest, view, number);
    }
    let near = names().map(|n| (strsim::damerau_levenshtein(n, name), n)).filter(|(d, _)| *d <= 2).min();
    Err(near.map_or_else(
        || format!("info {name}: there is no such view; 'info' alone lists them"),
        |(_, near)| format!("info {name}: there is no such view; did you mean 'info {near}'?"),
    ))
}

fn linux<'a>(view: &'a View<'_>) -> Result<&'a Linux, String> {
    view.linux.ok_or_else(|| "no Linux was found in the guest's memory; 'kallsyms' says why".to_owned())
}

fn show_tasks(_: &str, view: &View<'_>, _: Number<'_>) -> Result<String, String> {
    let linux = linux(view)?;
    let m = linux.memory(view.target, view.cpu)?;
    Ok(tasks::show(&m, linux, &tasks::read(&m, linux)?))
}

fn show_maps(rest: &str, view: &View<'_>, number: Number<'_>) -> Result<String, String> {
    let linux = linux(view)?;
    let m = linux.memory(view.target, view.cpu)?;
    let all = tasks::read(&m, linux)?;
    let found;
    let space = if rest.is_empty() {
        found = Layout::find(&m, linux, &all).map(drop);
        found
            .and_then(|()| view.space().ok_or_else(|| "no program's memory is in use here: info maps PID".to_owned()))?
    } else {
        let pid = number(rest)?;
        let task = all.iter().find(|t| u64::from(t.pid) == pid);
        let task = task.ok_or_else(|| format!("there is no task {pid}; 'info tasks' lists them"))?;
        &Space::of(&m, linux, &all, task)?
    };
    let title = format!("task {} ({})\n", space.task.pid, space.task.name);
    Ok(title + &mappings::show(&space.mappings))
}

fn show_modules(_: &str, view: &View<'_>, _: Number<'_>) -> Result<String, String> {
    let linux = linux(view)?;
    Ok(modules::show(&modules::read(&linux.memory(view.target, view.cpu)?, linux)?))
}

fn show_dmesg(rest: &str, view: &View<'_>, number: Number<'_>) -> Result<String, String> {
    let linux = linux(view)?;
    let most = if rest.is_empty() { 1 << 20 } else { number(rest)? };
    let messages = linux.dmesg(&linux.memory(view.target, view.cpu)?, most.min(1 << 20) as usize)?;
    Ok(dmesg::show(&messages))
}

fn mem(rest: &str, view: &View<'_>, number: Number<'_>) -> Result<String, String> {
    let mut words = rest.split_whitespace();
    let first = words.next().map_or(Ok(0), number)?;
    let last = words.next().map_or(Ok(u64::MAX), number)?;
    Ok(view.mappings(2000, (first, last)))
}

fn tlb(rest: &str, view: &View<'_>, number: Number<'_>) -> Result<String, String> {
    let only = if rest.is_empty() { None } else { Some(number(rest)? & !0xfff) };
    let entries = view.target.tlb(view.vcpu)?;
    let wanted = entries.iter().filter(|e| only.is_none_or(|page| page == e.va));
    let mut out = String::new();
    let mut space = None;
    for e in wanted {
        if space != Some(e.space) {
            let current = if e.current { ", current" } else { "" };
            out.push_str(&format!("address space {:#x}{current}\n", e.space));
            space = Some(e.space);
        }
        let pa = e.pa.map_or("-".to_owned(), |pa| format!("{pa:#x}"));
        let rights: String =
            [(e.read, 'r'), (e.write, 'w'), (e.execute, 'x')].map(|(on, c)| if on { c } else { '-' }).iter().collect();
        out.push_str(&format!("{:016x} {rights} physical {pa}{}\n", e.va, view.named(e.va)));
    }
    match (out.is_empty(), only) {
        (false, _) => Ok(out),
        (true, Some(page)) => Ok(format!("no translation of {page:#x} is remembered; see: walk {page:#x}\n")),
        (true, None) => Ok("no translation is remembered\n".to_owned()),
    }
}

/// `struct TYPE [ADDRESS]`
pub fn structure(rest: &str, view: &View<'_>, number: Number<'_>) -> Result<String, String> {
    let linux = linux(view)?;
    let types = linux.types.as_ref().ok_or("struct: this kernel has no types in its memory (CONFIG_DEBUG_INFO_BTF)")?;
    let (name, place) = rest.trim().split_once(' ').unwrap_or((rest.trim(), ""));
    if name.is_empty() {
        return Err("the type is missing: struct task_struct init_task".to_owned());
    }
    let members = types.members(name).ok_or_else(|| match types.near(name) {
        Some(near) => format!("struct {name}: there is no such type; did you mean {near}?"),
        None => format!("struct {name}: there is no such type"),
    })?;
    let at = if place.is_empty() { None } else { Some(number(place)?) };
    let m = linux.memory(view.target, view.cpu)?;
    let mut out = format!("struct {name}, {} bytes\n", types.size_of(name).unwrap_or(0));
    for (name, member) in members {
        let bits = member.bits.map_or(String::new(), |bits| format!(":{bits}"));
        let value = at.map_or(String::new(), |at| {
            let field = at.wrapping_add(member.offset());
            match member.size {
                1 | 2 | 4 | 8 if !member.is_composite() => match m.number(field, member.size as usize) {
                    Some(value) => {
                        let value = match member.bits {
                            Some(bits) => {
                                value >> (member.bit % 8) & (1u64.checked_shl(bits).unwrap_or(0).wrapping_sub(1))
                            }
                            None => value,
                        };
                        let named = if m.is_kernel(value) { view.named(value) } else { String::new() };
                        format!(" = {value:#x}{named}")
                    }
                    None => " (no memory)".to_owned(),
                },
                size => format!(" at {field:#x}, {size} bytes"),
            }
        });
        out.push_str(&format!("{:>6} {name}{bits}{value}\n", member.offset()));
    }
    Ok(out)
}
