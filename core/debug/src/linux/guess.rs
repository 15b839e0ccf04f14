//! Where members of a kernel's structures are, found by what must hold, for kernels that have no types (BTF).
//!
//! The first task is called `swapper`; tasks are on one ring; processes 1 and 2 are children of process 0, and each
//! process's number is also its group's; kernel threads have no memory of their own; a task that waits has its stack
//! pointer in its own stack, with an address in the scheduler there.

use std::collections::{HashMap, HashSet};

use super::Linux;
use super::memory::Memory;
use super::tasks::{Layout, MOST, NAME, Task, ring};

/// Longest `task_struct`.
const LONGEST: u64 = 16 << 10;
/// Longest stack of a task.
const STACK: u64 = 64 << 10;

/// Offsets found by what must hold.
///
/// # Errors
/// There is no such list.
pub fn tasks(m: &Memory<'_>, linux: &Linux) -> Result<(u64, Layout), String> {
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
            stack,
            mm: mm(m, &nodes, parent, first),
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

/// `mm` in `task_struct`, behind the list's node: the kernel's threads have none, a program's is also its `active_mm`, the
/// word behind it.
fn mm(m: &Memory<'_>, nodes: &[u64], parent: u64, first: u64) -> Option<u64> {
    let (word, tasks) = (m.word as u64, nodes[0].wrapping_sub(first));
    let kthreadd = nodes[2].wrapping_sub(tasks);
    let is_kernel = |i: usize| i == 0 || i == 2 || m.long(nodes[i].wrapping_add(parent)) == Some(kthreadd);
    let fits = |offset: u64| {
        (0..nodes.len()).all(|i| {
            let at = nodes[i].wrapping_add(offset);
            let Some(value) = m.long(at) else { return false };
            match value {
                // Process 1 has some; those that have ended have none any more.
                0 => i != 1,
                _ => !is_kernel(i) && m.is_kernel(value) && m.long(at.wrapping_add(word)) == Some(value),
            }
        })
    };
    (2 * word..512).step_by(m.word).find(|offset| fits(*offset)).map(|offset| tasks + offset)
}

/// Where in `task_struct` the registers of a task that waits are: on RISC-V `ra`, which `sp` follows, else the stack
/// pointer, which the registers that were pushed and a return address are at.
pub fn kept(m: &Memory<'_>, linux: &Linux, all: &[Task], l: &Layout) -> Option<u64> {
    let (word, stack_at) = (m.word as u64, l.stack?);
    let pushed = if m.word == 4 { 5 } else { 6 };
    // Whether where it goes on is in the scheduler; `None`: it is no such place.
    let place = |task: &Task, offset: u64| {
        let at = task.at.wrapping_add(offset);
        let stack = m.long(task.at.wrapping_add(stack_at))?;
        let sp = m.long(if m.riscv { at.wrapping_add(word) } else { at })?;
        if !sp.is_multiple_of(word) || sp.checked_sub(stack).is_none_or(|used| used == 0 || used > STACK) {
            return None;
        }
        let pc = m.long(if m.riscv { at } else { sp.wrapping_add(pushed * word) })?;
        let (symbol, _) = linux.names.lookup(pc).filter(|(symbol, _)| symbol.code && m.is_kernel(pc))?;
        Some(symbol.name.contains("schedule"))
    };
    let fits = |offset: u64| {
        let (mut good, mut bad, mut scheduled) = (0, 0, 0);
        for task in all {
            match place(task, offset) {
                Some(there) => (good, scheduled) = (good + 1, scheduled + usize::from(there)),
                // One that runs, and one that has just begun.
                None => bad += 1,
            }
            if bad * 4 > all.len() + 4 {
                return false;
            }
        }
        good > bad && scheduled * 2 > good
    };
    (l.name..LONGEST).step_by(m.word).find(|offset| fits(*offset))
}
