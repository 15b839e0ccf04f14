//! The tasks of a Linux kernel: from `init_task` along the list of processes, with their threads.
//!
//! Where members are in `task_struct` is different in every configuration. BTF says it; a kernel without is asked by what
//! must be true of its tasks: the first is called `swapper`, they are on one ring, processes 1 and 2 are children of
//! process 0, and each process's number is also its group's.

use std::collections::{HashMap, HashSet};

use super::Linux;
use super::btf::Btf;
use super::memory::{Memory, printable};

/// Most tasks listed.
const MOST: usize = 65_536;
/// Bytes of a name.
const NAME: usize = 16;
/// Longest `task_struct`.
const LONGEST: u64 = 16 << 10;

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
    pub name: String,
}

/// Offsets in `task_struct`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    tasks: u64,
    pid: u64,
    tgid: u64,
    name: u64,
    parent: u64,
    state: Option<u64>,
    exit_state: Option<u64>,
    mm: Option<u64>,
    on_cpu: Option<u64>,
    cpu: Option<u64>,
    /// `signal`, `thread_head` there, `thread_node`.
    threads: Option<(u64, u64, u64)>,
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
            on_cpu: at("on_cpu"),
            cpu: at("thread_info.cpu").or_else(|| at("cpu")),
            threads: at("signal").zip(head).zip(at("thread_node")).map(|((s, h), n)| (s, h, n)),
        })
    }
}

/// The tasks, processes in the order of their list, each followed by its other threads.
///
/// # Errors
/// What of it is not as it must be.
pub fn read(m: &Memory<'_>, linux: &Linux) -> Result<Vec<Task>, String> {
    let (first, layout) = match linux.types.as_ref().and_then(Layout::of_types) {
        Some(layout) => (linux.symbol("init_task")?, layout),
        None => guess(m, linux)?,
    };
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
    Some(Task {
        at,
        pid,
        tgid: number(l.tgid)?,
        parent,
        state,
        cpu: l.cpu.and_then(number),
        running: l.on_cpu.and_then(number) == Some(1),
        kernel: match l.mm {
            Some(mm) => m.long(at.wrapping_add(mm))? == 0,
            None => pid == 0 || pid == 2 || parent == 2,
        },
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

/// Offsets found by what must hold.
fn guess(m: &Memory<'_>, linux: &Linux) -> Result<(u64, Layout), String> {
    let names = match linux.symbol("init_task") {
        Ok(at) => find_name(m, at, at.saturating_add(LONGEST)),
        Err(_) => {
            let (from, to) = linux.image();
            find_name(m, from, to)
        }
    };
    let found = names.into_iter().find_map(|name| Layout::guess(m, name));
    found.ok_or_else(|| {
        "tasks: the kernel has no BTF, and no init_task with a list of tasks was found; break later in its boot"
            .to_owned()
    })
}

/// Where the first task's name may be.
fn find_name(m: &Memory<'_>, from: u64, to: u64) -> Vec<u64> {
    let mut found = Vec::new();
    m.pages(from, to, &mut |va, page| {
        for (i, piece) in page.chunks_exact(m.word).enumerate() {
            let at = va + (i * m.word) as u64;
            if piece.starts_with(b"swap") && (from..to).contains(&at) {
                let rest = &page[i * m.word..];
                if rest.starts_with(b"swapper/0\0") || rest.starts_with(b"swapper\0") {
                    found.push(at);
                }
            }
        }
        found.len() > 256
    });
    found
}

impl Layout {
    /// From where the first task's name is: its address, and offsets from it.
    fn guess(m: &Memory<'_>, name: u64) -> Option<(u64, Layout)> {
        let word = m.word as u64;
        let named = |at: u64| {
            let mut text = [0; NAME];
            m.read(at, &mut text)
                && text
                    .iter()
                    .position(|b| *b == 0)
                    .is_some_and(|end| end > 0 && text[..end].iter().all(|b| (0x20..0x7f).contains(b)))
        };
        // The list of processes is the longest ring of what has a name in the same place.
        let mut best: Option<(u64, Vec<u64>)> = None;
        for distance in (word..LONGEST / 2).step_by(m.word) {
            let head = name - distance;
            let Some(next) = m.long(head).filter(|next| *next != head && m.is_kernel(*next)) else { continue };
            if m.long(next.wrapping_add(word)) != Some(head) || !named(next.wrapping_add(distance)) {
                continue;
            }
            let Some(nodes) = ring(m, head, MOST) else { continue };
            let all = nodes.iter().all(|n| named(n.wrapping_add(distance)));
            if all && nodes.len() >= 3 && best.as_ref().is_none_or(|(_, b)| nodes.len() > b.len()) {
                best = Some((distance, nodes));
            }
        }
        let (distance, nodes) = best?;
        let from_list = |node: u64, offset: u64| node.wrapping_add(offset);
        let pids = (0..distance).step_by(4).find(|offset| is_pid(m, &nodes, *offset))?;
        // Processes 1 and 2 have process 0 for a parent.
        let tgid = pids + 4;
        let parent = (tgid + 4..distance).step_by(4).filter(|o| o.is_multiple_of(word)).find_map(|offset| {
            let of = |i: usize| m.long(from_list(nodes[i], offset));
            let (a, b, own) = (of(1)?, of(2)?, of(0)?);
            (a == b && a == own && a < nodes[0] && nodes[0] - a < LONGEST).then_some((offset, a))
        })?;
        let (parent, first) = parent;
        let tasks = nodes[0] - first;
        let bases: HashSet<u64> = nodes.iter().map(|n| n.wrapping_sub(tasks)).collect();
        if !nodes.iter().all(|n| m.long(from_list(*n, parent)).is_some_and(|p| bases.contains(&p))) {
            return None;
        }
        // The state is before the pointer to the stack, the first of the members that point to memory of whole pages.
        let stack = (word..tasks.min(128)).step_by(m.word).find(|offset| {
            let mut seen = HashMap::new();
            nodes.iter().all(|n| {
                let stack = m.long(n.wrapping_sub(tasks).wrapping_add(*offset));
                stack.is_some_and(|s| s & 0xfff == 0 && m.is_kernel(s) && seen.insert(s, ()).is_none())
            })
        });
        let layout = Layout {
            tasks,
            pid: tasks + pids,
            tgid: tasks + tgid,
            name: tasks + distance,
            parent: tasks + parent,
            state: stack.map(|s| s - word),
            // `struct thread_info` of x86 ends with it, before the state.
            cpu: stack.filter(|s| !m.riscv && *s >= 2 * word).map(|s| s - word - 4),
            ..Layout::default()
        };
        Some((first, layout))
    }
}

/// Whether a process's number and its group's are behind the list's node by so much, in all tasks.
fn is_pid(m: &Memory<'_>, nodes: &[u64], offset: u64) -> bool {
    let mut seen = HashSet::new();
    nodes.iter().enumerate().all(|(i, node)| {
        let pid = m.number(node.wrapping_add(offset), 4);
        let tgid = m.number(node.wrapping_add(offset + 4), 4);
        let right = match i {
            0..=2 => pid == Some(i as u64),
            _ => pid.is_some_and(|p| (3..1 << 22).contains(&p)),
        };
        right && pid == tgid && seen.insert(pid)
    })
}

/// What the kernel keeps of a task while another runs: where it goes on, and registers by DWARF's numbers.
///
/// # Errors
/// The kernel has no types that say where.
pub fn kept(m: &Memory<'_>, linux: &Linux, task: &Task) -> Result<(u64, Vec<(usize, u64)>), String> {
    let types =
        linux.types.as_ref().ok_or("this kernel has no types (BTF) that say where a task's registers are kept")?;
    let member = |path: &str| {
        let member = types.member("task_struct", path).map(|f| task.at.wrapping_add(f.offset()));
        member.ok_or_else(|| format!("task_struct has no {path} here"))
    };
    let load = |at: u64| m.long(at).ok_or_else(|| format!("there is no memory at {at:#x}"));
    let sp = load(member("thread.sp")?)?;
    if m.riscv {
        // s0 to s11 are x8, x9, x18 to x27; the return address is another member.
        let saved = member("thread.s")?;
        let numbers = [8, 9].into_iter().chain(18..28);
        let mut kept = vec![(2, sp)];
        for (i, number) in (0..).zip(numbers) {
            kept.push((number, load(saved.wrapping_add(8 * i))?));
        }
        return Ok((load(member("thread.ra")?)?, kept));
    }
    // The stack holds what the switch pushed (`struct inactive_task_frame`): r15 to r12, rbx, rbp, the return address.
    let mut kept = Vec::new();
    for (i, number) in (0..).zip([15, 14, 13, 12, 3, 6]) {
        kept.push((number, load(sp.wrapping_add(8 * i))?));
    }
    kept.push((7, sp.wrapping_add(56)));
    Ok((load(sp.wrapping_add(48))?, kept))
}

/// The physical address of a task's topmost page table; `None` of the kernel's own threads, and where no types say it.
pub fn page_tables(m: &Memory<'_>, linux: &Linux, task: &Task) -> Option<u64> {
    let types = linux.types.as_ref()?;
    let mm = m.long(task.at.wrapping_add(types.member("task_struct", "mm")?.offset())).filter(|mm| *mm != 0)?;
    m.translate(m.long(mm.wrapping_add(types.member("mm_struct", "pgd")?.offset()))?)
}

/// A table of them.
pub fn show(tasks: &[Task]) -> String {
    let mut out = format!("{:>7} {:>7} {:>7} state cpu {:<18} name\n", "pid", "process", "parent", "task_struct");
    for t in tasks {
        let cpu = t.cpu.map_or("-".to_owned(), |c| c.to_string());
        let name = if t.kernel { format!("[{}]", t.name) } else { t.name.clone() };
        let mark = if t.running { '*' } else { ' ' };
        out.push_str(&format!(
            "{:>7} {:>7} {:>7} {}{mark}    {cpu:>3} {:<#18x} {name}\n",
            t.pid, t.tgid, t.parent, t.state, t.at
        ));
    }
    printable_lines(&out)
}

fn printable_lines(text: &str) -> String {
    text.lines().map(|l| printable(l.as_bytes()) + "\n").collect()
}
