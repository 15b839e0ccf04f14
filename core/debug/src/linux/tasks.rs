//! The tasks of a Linux kernel: from `init_task` along the list of processes, with their threads.
//!
//! Where members are in `task_struct` is different in every configuration. BTF says it; a kernel without is asked by what
//! must be true of its tasks: see [`super::guess`].

use super::Linux;
use super::btf::Btf;
use super::guess;
use super::mappings;
use super::memory::{Memory, printable};

/// Most tasks listed.
pub(super) const MOST: usize = 65_536;
/// Bytes of a name.
pub(super) const NAME: usize = 16;

/// A task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Virtual address of its `task_struct`.
    pub at: u64,
    pub pid: u32,
    pub tgid: u32,
    /// Its parent's process number.
    pub parent: u32,
    /// R, S, D …, as `ps` has them; `?`: not known.
    pub state: char,
    /// The vCPU it runs on or did last.
    pub cpu: Option<u32>,
    pub running: bool,
    /// It has no address space of its own.
    pub kernel: bool,
    /// Virtual address of its `mm_struct`, where it is known.
    pub mm: Option<u64>,
    /// The lowest address of its stack in the kernel.
    pub stack: Option<u64>,
    pub name: String,
}

/// Offsets in `task_struct`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub(super) tasks: u64,
    pub(super) pid: u64,
    pub(super) tgid: u64,
    pub(super) name: u64,
    pub(super) parent: u64,
    pub(super) state: Option<u64>,
    pub(super) exit_state: Option<u64>,
    pub(super) mm: Option<u64>,
    pub(super) on_cpu: Option<u64>,
    pub(super) cpu: Option<u64>,
    pub(super) stack: Option<u64>,
    /// `signal`, `thread_head` there, `thread_node`.
    pub(super) threads: Option<(u64, u64, u64)>,
}

impl Layout {
    /// As the kernel's types say.
    pub fn of_types(types: &Btf) -> Option<Layout> {
        let at = |path| types.member("task_struct", path).map(|m| m.offset());
        let head = types.member("signal_struct", "thread_head").map(|m| m.offset());
        Some(Layout {
            tasks: at("tasks")?,
            pid: at("pid")?,
            tgid: at("tgid")?,
            name: at("comm")?,
            parent: at("real_parent")?,
            state: at("__state").or_else(|| at("state")),
            exit_state: at("exit_state"),
            mm: at("mm"),
            stack: at("stack"),
            on_cpu: at("on_cpu"),
            cpu: at("thread_info.cpu").or_else(|| at("cpu")),
            threads: at("signal").zip(head).zip(at("thread_node")).map(|((s, h), n)| (s, h, n)),
        })
    }
}

/// The first task, and where members are.
fn layout(m: &Memory<'_>, linux: &Linux) -> Result<(u64, Layout), String> {
    match linux.types.as_ref().and_then(Layout::of_types) {
        Some(layout) => Ok((linux.symbol("init_task")?, layout)),
        None => guess::tasks(m, linux),
    }
}

/// The tasks, processes in the order of their list, each followed by its other threads.
///
/// # Errors
/// What of it is not as it must be.
pub fn read(m: &Memory<'_>, linux: &Linux) -> Result<Vec<Task>, String> {
    let (first, layout) = layout(m, linux)?;
    let leaders = ring(m, first.wrapping_add(layout.tasks), MOST)
        .ok_or("tasks: the list that begins at init_task is broken: it is being changed, or memory is damaged")?;
    let mut out = Vec::new();
    for node in leaders {
        let leader = node.wrapping_sub(layout.tasks);
        out.push(task(m, &layout, leader).ok_or_else(|| format!("tasks: the one at {leader:#x} cannot be read"))?);
        let Some((signal, head, node)) = layout.threads else { continue };
        let Some(signal) = m.long(leader.wrapping_add(signal)) else { continue };
        let others = ring(m, signal.wrapping_add(head), MOST - out.len().min(MOST)).unwrap_or_default();
        let others = others.into_iter().skip(1).map(|n| n.wrapping_sub(node)).filter(|at| *at != leader);
        out.extend(others.filter_map(|at| task(m, &layout, at)));
        if out.len() >= MOST {
            break;
        }
    }
    Ok(out)
}

/// The nodes of a list from its head on, the head first; `None` if it is none. Every node is pointed back at.
pub fn ring(m: &Memory<'_>, head: u64, most: usize) -> Option<Vec<u64>> {
    let (mut out, mut at) = (vec![head], head);
    loop {
        let next = m.long(at).filter(|next| m.is_kernel(*next))?;
        if m.long(next.wrapping_add(m.word as u64))? != at {
            return None;
        }
        if next == head {
            return Some(out);
        }
        if out.len() >= most {
            return None;
        }
        out.push(next);
        at = next;
    }
}

fn task(m: &Memory<'_>, l: &Layout, at: u64) -> Option<Task> {
    let number = |offset: u64| m.number(at.wrapping_add(offset), 4).map(|n| n as u32);
    let parent = m.long(at.wrapping_add(l.parent))?;
    let parent = m.number(parent.wrapping_add(l.tgid), 4).map_or(0, |n| n as u32);
    let pid = number(l.pid)?;
    let state = match (l.exit_state.and_then(number), l.state) {
        (Some(exit @ 1..), _) => letter(exit),
        (_, Some(state)) => m.long(at.wrapping_add(state)).map_or('?', |s| letter(s as u32)),
        _ => '?',
    };
    let mm = match l.mm {
        Some(mm) => Some(m.long(at.wrapping_add(mm))?),
        None => None,
    };
    Some(Task {
        at,
        pid,
        tgid: number(l.tgid)?,
        parent,
        state,
        cpu: l.cpu.and_then(number),
        running: l.on_cpu.and_then(number) == Some(1),
        kernel: mm.map_or(pid == 0 || pid == 2 || parent == 2, |mm| mm == 0),
        mm: mm.filter(|mm| *mm != 0),
        stack: l.stack.and_then(|stack| m.long(at.wrapping_add(stack))),
        name: m.text(at.wrapping_add(l.name), NAME)?,
    })
}

/// A state's letter (fs/proc/array.c: `task_state_array`; an idle kernel thread sleeps without being counted).
fn letter(state: u32) -> char {
    const IDLE: u32 = 0x402;
    const LETTERS: [(u32, char); 7] =
        [(0x1, 'S'), (0x2, 'D'), (0x4, 'T'), (0x8, 't'), (0x10, 'X'), (0x20, 'Z'), (0x40, 'P')];
    if state & IDLE == IDLE {
        return 'I';
    }
    LETTERS.iter().find(|(bit, _)| state & bit != 0).map_or('R', |(_, letter)| *letter)
}

/// What the kernel keeps of a task while another runs: where it goes on, and registers by DWARF's numbers.
///
/// # Errors
/// It cannot be found out where.
pub fn kept(m: &Memory<'_>, linux: &Linux, all: &[Task], task: &Task) -> Result<(u64, Vec<(usize, u64)>), String> {
    let load = |at: u64| m.long(at).ok_or_else(|| format!("there is no memory at {at:#x}"));
    let first = if m.riscv { "thread.ra" } else { "thread.sp" };
    let told = linux.types.as_ref().and_then(|types| types.member("task_struct", first));
    let offset = match told {
        Some(member) => member.offset(),
        None => guess::kept(m, linux, all, &layout(m, linux)?.1).ok_or(
            "it was not found where this kernel keeps the registers of tasks that wait: it has no types (BTF), and too \
             few of its tasks wait; let it boot further",
        )?,
    };
    let at = task.at.wrapping_add(offset);
    if m.riscv {
        // `ra`, `sp`, then s0 to s11, which are x8, x9, x18 to x27.
        let numbers = [2, 8, 9].into_iter().chain(18..28);
        let kept: Result<_, String> = (1..).zip(numbers).map(|(i, n)| Ok((n, load(at.wrapping_add(8 * i))?))).collect();
        return Ok((load(at)?, kept?));
    }
    // The stack holds what the switch pushed (`struct inactive_task_frame`), then the return address: r15 to r12, rbx, rbp;
    // in 32-bit kernels flags, esi, edi, ebx, ebp.
    let (numbers, sp): (&[Option<usize>], _) = match m.word {
        8 => (&[Some(15), Some(14), Some(13), Some(12), Some(3), Some(6)], 7),
        _ => (&[None, Some(6), Some(7), Some(3), Some(5)], 4),
    };
    let (top, word) = (load(at)?, m.word as u64);
    let mut kept = Vec::new();
    for (i, number) in (0..).zip(numbers) {
        if let Some(number) = number {
            kept.push((*number, load(top.wrapping_add(word * i))?));
        }
    }
    let ra = top.wrapping_add(word * numbers.len() as u64);
    kept.push((sp, ra.wrapping_add(word)));
    Ok((load(ra)?, kept))
}

/// A table of them, with the files that those of programs execute.
pub fn show(m: &Memory<'_>, linux: &Linux, tasks: &[Task]) -> String {
    let areas = mappings::Layout::find(m, linux, tasks).ok();
    let mut out = format!("{:>7} {:>7} {:>7} state cpu {:<18} name\n", "pid", "process", "parent", "task_struct");
    for t in tasks {
        let cpu = t.cpu.map_or("-".to_owned(), |c| c.to_string());
        let name = if t.kernel { format!("[{}]", t.name) } else { t.name.clone() };
        let mark = if t.running { '*' } else { ' ' };
        let file = areas.as_ref().zip(t.mm).and_then(|(areas, mm)| areas.program(m, mm));
        let file = file.map_or(String::new(), |file| format!("  {file}"));
        out.push_str(&format!(
            "{:>7} {:>7} {:>7} {}{mark}    {cpu:>3} {:<#18x} {name}{file}\n",
            t.pid, t.tgid, t.parent, t.state, t.at
        ));
    }
    printable_lines(&out)
}

fn printable_lines(text: &str) -> String {
    text.lines().map(|l| printable(l.as_bytes()) + "\n").collect()
}
