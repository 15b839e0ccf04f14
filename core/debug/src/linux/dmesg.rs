//! The kernel's log: its ring buffer, read as it is in memory (kernel/printk/printk_ringbuffer.c's layout since 5.10).
//!
//! Descriptor `id` is entry `id % count` of two arrays; its state's upper two bits say what it is, the others are the id.
//! A text is at its position in the data ring, after the id of its descriptor; one that does not fit before the ring's end
//! is at its begin.

use super::memory::{Memory, printable};
use super::vmcoreinfo::Vmcoreinfo;

/// Largest ring of descriptors, and of text, as powers of two.
const MOST_COUNT: u64 = 20;
const MOST_DATA: u64 = 27;
/// Longest message.
const LONGEST: u64 = 4096;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub sequence: u64,
    /// Nanoseconds of the guest's uptime.
    pub time: u64,
    /// 0 (emergency) to 7 (debug).
    pub level: u8,
    pub text: String,
}

/// Where what is in the structures.
struct Layout {
    word: u64,
    descriptors: u64,
    infos: u64,
    head: u64,
    tail: u64,
    size_bits: u64,
    data: u64,
    descriptor_size: u64,
    info_size: u64,
    text_len: u64,
}

impl Layout {
    fn new(word: u64, info: &Vmcoreinfo) -> Layout {
        let of = |member: &str, otherwise| info.offset(member).unwrap_or(otherwise);
        // Without vmcoreinfo's word: the members one after another.
        let ring = of("printk_ringbuffer.desc_ring", 0);
        let text = of("printk_ringbuffer.text_data_ring", if word == 8 { 40 } else { 20 });
        Layout {
            word,
            descriptors: ring + of("prb_desc_ring.descs", word),
            infos: ring + of("prb_desc_ring.infos", 2 * word),
            head: ring + of("prb_desc_ring.head_id", 3 * word),
            tail: ring + of("prb_desc_ring.tail_id", 4 * word),
            size_bits: text + of("prb_data_ring.size_bits", 0),
            data: text + of("prb_data_ring.data", word),
            descriptor_size: info.size("prb_desc").unwrap_or(3 * word).max(1),
            info_size: info.size("printk_info").unwrap_or(88).max(1),
            text_len: of("printk_info.text_len", 16),
        }
    }
}

/// The last messages, at most so many, oldest first.
///
/// # Errors
/// What of it is not as it must be.
pub fn read(m: &Memory<'_>, prb: u64, info: &Vmcoreinfo, most: usize) -> Result<Vec<Message>, String> {
    let l = Layout::new(m.word as u64, info);
    let damaged = |what: &str| format!("dmesg: the log's {what} cannot be read or make no sense");
    let ring = m.long(prb).filter(|at| m.is_kernel(*at)).ok_or_else(|| damaged("pointer"))?;
    let long = |at: u64| m.long(ring.wrapping_add(at));
    let count_bits = m.number(ring, 4).filter(|b| (1..=MOST_COUNT).contains(b)).ok_or_else(|| damaged("count"))?;
    let size_bits = m.number(ring.wrapping_add(l.size_bits), 4).filter(|b| (4..=MOST_DATA).contains(b));
    let size_bits = size_bits.ok_or_else(|| damaged("size"))?;
    let (Some(descriptors), Some(infos), Some(data)) = (long(l.descriptors), long(l.infos), long(l.data)) else {
        return Err(damaged("arrays"));
    };
    let (Some(head), Some(tail)) = (long(l.head), long(l.tail)) else { return Err(damaged("ends")) };
    let id_bits = 8 * l.word - 2;
    let id_mask = (1u64 << id_bits) - 1;
    let count = head.wrapping_sub(tail) & id_mask;
    if count >= 1 << count_bits {
        return Err(damaged("ends"));
    }
    let mut out = Vec::new();
    let first = (count + 1).saturating_sub(most as u64);
    for i in first..=count {
        let id = tail.wrapping_add(i) & id_mask;
        let index = id & ((1 << count_bits) - 1);
        let descriptor = descriptors.wrapping_add(index * l.descriptor_size);
        let Some(state) = m.long(descriptor) else { return Err(damaged("descriptors")) };
        // Committed (1) or finalized (2), and of this id: others are being written, or reused.
        if state & id_mask != id || !matches!(state >> id_bits, 1 | 2) {
            continue;
        }
        let info = infos.wrapping_add(index * l.info_size);
        let begin = m.long(descriptor.wrapping_add(l.word));
        let next = m.long(descriptor.wrapping_add(2 * l.word));
        let (Some(begin), Some(next)) = (begin, next) else { return Err(damaged("descriptors")) };
        let length = m.number(info.wrapping_add(l.text_len), 2).unwrap_or(0);
        let Some(text) = text(m, (data, size_bits, l.word), (begin, next), id, length) else { continue };
        out.push(Message {
            sequence: m.number(info, 8).unwrap_or(0),
            time: m.number(info.wrapping_add(8), 8).unwrap_or(0),
            // Facility, then flags in the lower five bits and the level in the upper three.
            level: m.number(info.wrapping_add(l.text_len + 3), 1).unwrap_or(0) as u8 >> 5,
            text,
        });
    }
    if out.is_empty() {
        return Err("dmesg: no message of the log can be read".to_owned());
    }
    Ok(out)
}

fn text(
    m: &Memory<'_>,
    (data, size_bits, word): (u64, u64, u64),
    (begin, next): (u64, u64),
    id: u64,
    length: u64,
) -> Option<String> {
    // The lowest bit marks what has no text.
    if begin & 1 != 0 {
        return (length == 0 || next & 1 != 0).then(String::new);
    }
    let size = 1u64 << size_bits;
    // What would wrap is at the begin.
    let wraps = begin >> size_bits != next.wrapping_sub(1) >> size_bits;
    let place = if wraps { 0 } else { begin & (size - 1) };
    let block = data.wrapping_add(place);
    // The message's own number guards against text that was written over.
    if m.long(block)? != id {
        return None;
    }
    let length = length.min(LONGEST).min(size.saturating_sub(place + word));
    Some(printable(&m.bytes(block.wrapping_add(word), length as usize)?))
}

/// As `dmesg` shows them.
pub fn show(messages: &[Message]) -> String {
    let line = |m: &Message| {
        let (seconds, micros) = (m.time / 1_000_000_000, m.time / 1000 % 1_000_000);
        format!("<{}>[{seconds:5}.{micros:06}] {}\n", m.level, m.text)
    };
    messages.iter().map(line).collect()
}
