//! The compression of a vCPU's words: predictions that come true cost next to nothing.

use mimus_core::accel::trace::words;

/// Entries of the table of words, a power of two.
const WORDS: usize = 1 << 16;
/// Entries of the table of places, a power of two.
const PLACES: usize = 1 << 14;

/// An encoded stretch: what differed of the words, and of what follows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub words: Vec<u8>,
    pub args: Vec<u8>,
    /// Words with what follows them, as they were.
    pub count: u64,
}

/// What an instruction accessed last.
#[derive(Clone, Copy, Default)]
struct Place {
    address: u64,
    stride: u64,
    value: u64,
}

/// Entries of the table of memory, a power of two. All tables together stay in a core's own cache.
const MEMORY: usize = 1 << 14;
/// No record takes more bytes behind its word than this for each of its words.
const WORST: usize = 5;

/// The predictions, the same on both sides.
struct Model {
    /// What was last loaded from or stored to addresses.
    memory: Box<[(u64, u64); MEMORY]>,
    next: Box<[u32; WORDS]>,
    places: Box<[Place; PLACES]>,
    last: u32,
    before: u32,
    /// The stretch of code that is executed.
    code: u32,
    page: u64,
    pc: u64,
}

/// A table, made where it stays: it is too large for a stack.
fn table<T: Clone, const N: usize>(entry: T) -> Box<[T; N]> {
    match vec![entry; N].into_boxed_slice().try_into() {
        Ok(table) => table,
        Err(_) => unreachable!("it has this many entries"),
    }
}

impl Default for Model {
    fn default() -> Model {
        Model {
            memory: table((0, 0)),
            next: table(0),
            places: table(Place::default()),
            last: 0,
            before: 0,
            code: 0,
            page: 0,
            pc: 0,
        }
    }
}

impl Model {
    fn slot(&self) -> usize {
        let mixed = self.last.wrapping_mul(0x9e37_79b1) ^ self.before.wrapping_mul(0x85eb_ca6b);
        (mixed >> 16) as usize % WORDS
    }

    fn step(&mut self, word: u32) {
        self.before = self.last;
        self.last = word;
        if word < words::FIRST_TAG {
            self.code = word;
        }
    }

    /// What memory at `address` is believed to hold; else what the instruction had last.
    fn value(&self, address: u64, otherwise: u64) -> u64 {
        let (at, value) = self.memory[memory_slot(address)];
        if at == address { value } else { otherwise }
    }

    fn place(&mut self, head: u32) -> &mut Place {
        let mixed = (head ^ self.code.wrapping_mul(0x9e37_79b1)).wrapping_mul(0x85eb_ca6b);
        &mut self.places[(mixed >> 18) as usize % PLACES]
    }
}

/// Neighbours in memory are neighbours in the table; a word's parts are elsewhere.
fn memory_slot(address: u64) -> usize {
    ((address >> 3) ^ (address >> 17) ^ (address & 7) << 10) as usize % MEMORY
}

/// Bytes being written: room for them has been made before.
#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    used: usize,
}

impl Out {
    /// Begins anew, with room for so many.
    fn reserve(&mut self, room: usize) {
        self.used = 0;
        if self.bytes.len() < room {
            self.bytes.resize(room, 0);
        }
    }

    fn push(&mut self, byte: u8) {
        self.bytes[self.used] = byte;
        self.used += 1;
    }

    fn written(&self) -> Vec<u8> {
        self.bytes[..self.used].to_vec()
    }
}

/// A number with a flag.
#[inline]
fn put_flagged(out: &mut Out, value: u64, flag: bool) {
    let first = u8::from(flag) | (value as u8 & 0x3f) << 1;
    if value >> 6 == 0 {
        out.push(first);
    } else {
        out.push(first | 0x80);
        put(out, value >> 6);
    }
}

fn get_flagged(input: &mut &[u8]) -> Option<(u64, bool)> {
    let (&first, rest) = input.split_first()?;
    *input = rest;
    let low = u64::from(first >> 1 & 0x3f);
    let high = if first >= 0x80 { get(input)? } else { 0 };
    Some((high << 6 | low, first & 1 != 0))
}

#[inline]
fn put(out: &mut Out, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn get(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = input.split_first()?;
        *input = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// A difference of either sign as a small number.
fn zigzag(difference: u64) -> u64 {
    difference << 1 ^ ((difference as i64) >> 63) as u64
}

fn unzigzag(value: u64) -> u64 {
    value >> 1 ^ (value & 1).wrapping_neg()
}

fn pair(words: &[u32]) -> u64 {
    match *words {
        [low, high, ..] => u64::from(low) | u64::from(high) << 32,
        _ => 0,
    }
}

fn push_pair(out: &mut Vec<u32>, value: u64) {
    out.extend([value as u32, (value >> 32) as u32]);
}

/// The bits of a value that an access of this size has.
fn mask(head: u32) -> u64 {
    match head >> words::SIZE_SHIFT & 7 {
        0 => 0xff,
        1 => 0xffff,
        2 => 0xffff_ffff,
        _ => !0,
    }
}

/// Encodes one vCPU's words.
#[derive(Default)]
pub struct Encoder {
    model: Model,
    words: Out,
    args: Out,
}

impl Encoder {
    /// Encodes `input`, whole records.
    pub fn encode(&mut self, input: &[u32]) -> Encoded {
        let (model, out, args) = (&mut self.model, &mut self.words, &mut self.args);
        // A word that is not the one expected: the run before it, and its own bits, each of up to 10 and 5 bytes.
        out.reserve(15 * input.len() + 16);
        args.reserve(WORST * input.len() + 16);
        let mut run = 0u64;
        let mut rest = input;
        while let Some((&word, after)) = rest.split_first() {
            let slot = model.slot();
            if model.next[slot] == word {
                run += 1;
            } else {
                model.next[slot] = word;
                put(out, run);
                // Tags are above all numbers: their bits to the bottom.
                put(out, word.rotate_left(2).into());
                run = 0;
            }
            model.step(word);
            rest = after;
            if word >= words::FIRST_TAG {
                rest = if word & words::ACCESS == 0 {
                    let (record, after) = after.split_at(words::payload(word).min(after.len()));
                    payload(model, word, record, args);
                    after
                } else {
                    access(model, word, after, args)
                };
            }
        }
        put(out, run);
        Encoded { words: out.written(), args: args.written(), count: input.len() as u64 }
    }
}

/// An access, whose address and value `input` begins with; what follows them.
#[inline]
fn access<'a>(model: &mut Model, word: u32, input: &'a [u32], out: &mut Out) -> &'a [u32] {
    let Some((address, mut rest)) = input.split_first_chunk::<2>() else { return &[] };
    let (address, place) = (pair(address), *model.place(word));
    let differs = zigzag(address.wrapping_sub(place.address.wrapping_add(place.stride)));
    let mut now = Place { stride: address.wrapping_sub(place.address), address, ..place };
    if word & words::VALUE != 0 {
        let Some((value, after)) = rest.split_first_chunk::<2>() else { return &[] };
        rest = after;
        let value = pair(value) & mask(word);
        let slot = memory_slot(address);
        let (at, known) = model.memory[slot];
        let as_expected = value == if at == address { known } else { place.value };
        put_flagged(out, differs, as_expected);
        if !as_expected {
            put(out, zigzag(value.wrapping_sub(place.value)));
        }
        model.memory[slot] = (address, value);
        now.value = value;
    } else {
        put_flagged(out, differs, false);
    }
    *model.place(word) = now;
    rest
}

fn payload(model: &mut Model, word: u32, args: &[u32], out: &mut Out) {
    let u64_at = |i: usize| pair(args.get(i..).unwrap_or_default());
    match word {
        words::PAGE => {
            put(out, zigzag((u64_at(0) as i64 >> 12).wrapping_sub(model.page as i64 >> 12) as u64));
            model.page = u64_at(0);
        }
        words::STEP => {
            put(out, zigzag(u64_at(0).wrapping_sub(model.pc)));
            model.pc = u64_at(0);
            args.iter().skip(2).for_each(|word| put(out, (*word).into()));
        }
        words::EXCEPTION => {
            put(out, u64_at(0).rotate_left(1));
            for i in [2, 4, 6] {
                put(out, u64_at(i));
            }
        }
        _ => args.iter().for_each(|word| put(out, (*word).into())),
    }
}

/// Undoes an [`Encoder`].
#[derive(Default)]
pub struct Decoder(Model);

impl Decoder {
    /// The words of a stretch that was encoded next. `None`: it is damaged. Whatever the input, no more words than
    /// `limit` come out.
    pub fn decode(&mut self, mut coded: &[u8], mut args: &[u8], limit: usize) -> Option<Vec<u32>> {
        let model = &mut self.0;
        let mut out = Vec::new();
        let mut run = get(&mut coded)?;
        loop {
            let slot = model.slot();
            let word = if run > 0 {
                run -= 1;
                model.next[slot]
            } else if coded.is_empty() {
                return Some(out);
            } else {
                let word = u32::try_from(get(&mut coded)?).ok()?.rotate_right(2);
                model.next[slot] = word;
                run = get(&mut coded)?;
                word
            };
            model.step(word);
            out.push(word);
            if word >= words::FIRST_TAG {
                unpayload(model, word, &mut args, &mut out)?;
            }
            if out.len() > limit {
                return None;
            }
        }
    }
}

fn unpayload(model: &mut Model, word: u32, args: &mut &[u8], out: &mut Vec<u32>) -> Option<()> {
    match word {
        _ if word & words::ACCESS != 0 => {
            let (difference, expected) = get_flagged(args)?;
            let place = *model.place(word);
            let address = place.address.wrapping_add(place.stride).wrapping_add(unzigzag(difference));
            let mut now = Place { stride: address.wrapping_sub(place.address), address, ..place };
            push_pair(out, address);
            if word & words::VALUE != 0 {
                now.value = match expected {
                    true => model.value(address, place.value),
                    false => place.value.wrapping_add(unzigzag(get(args)?)),
                };
                push_pair(out, now.value);
                model.memory[memory_slot(address)] = (address, now.value);
            }
            *model.place(word) = now;
        }
        words::PAGE => {
            let page = (model.page as i64 >> 12).wrapping_add(unzigzag(get(args)?) as i64);
            model.page = (page << 12) as u64;
            push_pair(out, model.page);
        }
        words::STEP => {
            model.pc = model.pc.wrapping_add(unzigzag(get(args)?));
            push_pair(out, model.pc);
            for _ in 2..words::payload(word) {
                out.push(u32::try_from(get(args)?).ok()?);
            }
        }
        words::EXCEPTION => {
            push_pair(out, get(args)?.rotate_right(1));
            for _ in 0..3 {
                push_pair(out, get(args)?);
            }
        }
        _ => {
            for _ in 0..words::payload(word) {
                out.push(u32::try_from(get(args)?).ok()?);
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(head: u32, address: u64, value: u64) -> Vec<u32> {
        let mut words = vec![words::ACCESS | words::VALUE | head];
        push_pair(&mut words, address);
        push_pair(&mut words, value);
        words
    }

    #[test]
    fn loops_cost_little_and_come_back_the_same() {
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        for round in 0..3 {
            let mut input = vec![words::PAGE, 0x1000, 0xffff_ffff];
            for i in 0..10_000u64 {
                input.push(5);
                input.extend(access(3 << words::SIZE_SHIFT, 0xffff_8000_0000_0000 + 8 * i, i));
                input.push(6);
                input.extend(access(words::WRITE | 2 << words::SIZE_SHIFT, 0x2000 + round, i & 0xffff_ffff));
            }
            input.extend([words::SPACE, 1, 2, 3]);
            input.extend([words::EXCEPTION, 13, 0x8000_0000, 1, 2, 3, 4, 5, 6]);
            input.extend([words::STEP, 0x10, 0, 4, 1, 2, 3, 4]);
            let out = encoder.encode(&input);
            assert!(out.words.len() < 200, "{}", out.words.len());
            assert!(out.args.len() < 61_000, "{}", out.args.len());
            assert_eq!(decoder.decode(&out.words, &out.args, input.len()), Some(input));
        }
    }

    /// Whatever is in a damaged file: no panic, no unbounded output.
    #[test]
    fn damage() {
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as u8
        };
        for _ in 0..2000 {
            let (words, args): (Vec<u8>, Vec<u8>) =
                ((0..40).map(|_| random()).collect(), (0..40).map(|_| random()).collect());
            if let Some(out) = Decoder::default().decode(&words, &args, 1000) {
                assert!(out.len() <= 1000 + 16);
            }
        }
    }

    /// Records that nothing predicts take the most bytes.
    #[test]
    fn there_is_room_for_the_worst() {
        let mut seed = 3u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            seed ^ seed >> 29
        };
        let mut input = Vec::new();
        for i in 0..20_000u32 {
            let record = match i % 8 {
                0 => vec![words::STEP],
                1 => vec![words::EXCEPTION],
                2 => vec![words::PAGE],
                3 => vec![words::SPACE],
                4 => vec![words::DEVICE],
                5 => vec![words::BULK],
                6 => vec![random() as u32 % words::FIRST_TAG],
                _ => vec![
                    words::ACCESS
                        | words::VALUE
                        | 3 << words::SIZE_SHIFT
                        | (random() as u32 & 0xfff) << words::PC_SHIFT,
                ],
            };
            let len = words::payload(record[0]);
            input.extend(record);
            let page = input.last() == Some(&words::PAGE);
            input.extend((0..len).map(|n| if page && n == 0 { 0x1000 } else { random() as u32 }));
        }
        let out = Encoder::default().encode(&input);
        assert_eq!(Decoder::default().decode(&out.words, &out.args, input.len()), Some(input));
    }

    #[test]
    fn numbers() {
        for value in [0, 1, 0x3f, 0x40, 0x7f, 0x80, u64::MAX, 1 << 63] {
            let mut out = Out::default();
            out.reserve(20);
            put_flagged(&mut out, value, value & 4 != 0);
            assert_eq!(get_flagged(&mut &out.written()[..]), Some((value, value & 4 != 0)));
            out.reserve(20);
            put(&mut out, value);
            assert_eq!(get(&mut &out.written()[..]), Some(value));
            assert_eq!(unzigzag(zigzag(value)), value);
        }
        assert_eq!(zigzag(u64::MAX), 1);
        assert_eq!(get(&mut &[0xff; 12][..]), None);
    }
}
