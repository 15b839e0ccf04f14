//! What must hold for the tables beyond their syntax.

use crate::Error;
use crate::model::*;
use std::collections::HashMap;

/// Checks everything; see the crate's documentation.
pub fn check(tables: &Tables) -> Result<(), Error> {
    methods(tables)?;
    field_bits(tables)?;
    overlaps(tables)?;
    unused(tables)
}

/// One method, one argument set.
fn methods(tables: &Tables) -> Result<(), Error> {
    let mut seen: HashMap<&str, &Pattern> = HashMap::new();
    for pattern in tables.patterns.iter().filter(|p| !p.reserved()) {
        let first = seen.entry(&pattern.method).or_insert(pattern);
        if first.set != pattern.set {
            let (name, place) = (&pattern.method, &first.place);
            let message = format!("'{name}' has another argument set than at {}:{}", place.file, place.line);
            return Err(pattern.place.error(message));
        }
    }
    Ok(())
}

/// Every `.` is read by a field, and fields stay within the encoding.
fn field_bits(tables: &Tables) -> Result<(), Error> {
    for pattern in tables.patterns.iter().filter(|p| !p.reserved()) {
        let mut read = 0;
        for value in &pattern.values {
            if let Value::Field(index) = value {
                read |= tables.fields[*index].mask();
            }
        }
        let unread = pattern.bits.field & !read;
        if unread != 0 {
            let message = format!("bits {unread:#x} are in no field; write '-' if they are to be ignored");
            return Err(pattern.place.error(message));
        }
        if read & !ones(pattern.bits.width) != 0 {
            return Err(pattern.place.error("a field reads bits beyond the 16 of the encoding"));
        }
    }
    Ok(())
}

fn overlaps(tables: &Tables) -> Result<(), Error> {
    for (index, later) in tables.patterns.iter().enumerate() {
        for earlier in &tables.patterns[..index] {
            let Place { file, line } = &earlier.place;
            if earlier.unit != later.unit && earlier.overlaps(later) {
                let message = format!("overlaps the pattern at {file}:{line}; put both in a group {{ }}");
                return Err(later.place.error(message));
            }
            let always = earlier.extensions.iter().all(|name| later.extensions.contains(name));
            if earlier.unit == later.unit && always && earlier.covers(later) {
                let message = format!("can never match: the pattern at {file}:{line} comes first");
                return Err(later.place.error(message));
            }
        }
    }
    Ok(())
}

fn unused(tables: &Tables) -> Result<(), Error> {
    let mut fields = vec![false; tables.fields.len()];
    let mut sets = vec![false; tables.sets.len()];
    for pattern in &tables.patterns {
        for value in &pattern.values {
            if let Value::Field(index) = value {
                fields[*index] = true;
            }
        }
        if let Some(set) = pattern.set {
            sets[set] = true;
        }
    }
    let unused = |sigil: char, name: &str, place: &Place| place.error(format!("{sigil}{name} is not used; remove it"));
    for (format, used) in tables.formats.iter().zip(&tables.used_formats) {
        if !used {
            return Err(unused('@', &format.name, &format.place));
        }
    }
    for (field, used) in tables.fields.iter().zip(fields) {
        if !used {
            return Err(unused('%', &field.name, &field.place));
        }
    }
    for (set, used) in tables.sets.iter().zip(sets) {
        if !used {
            return Err(unused('&', &set.name, &set.place));
        }
    }
    Ok(())
}
