//! The decision tree: which bits to look at, in which order.

use crate::model::Pattern;
use std::collections::BTreeMap;

/// A pattern, or the patterns of a group in order: what a leaf of the tree holds.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Bits that are fixed, and to the same values, in all of the unit's patterns.
    pub mask: u32,
    pub value: u32,
    /// Indices of the patterns.
    pub patterns: Vec<usize>,
}

/// The units of the patterns of one width.
pub fn units(patterns: &[Pattern], width: u32) -> Vec<Unit> {
    let mut units: BTreeMap<usize, Unit> = BTreeMap::new();
    for (index, pattern) in patterns.iter().enumerate().filter(|(_, p)| p.bits.width == width) {
        let (mask, value) = (pattern.bits.mask, pattern.bits.value);
        let unit = units.entry(pattern.unit).or_insert(Unit { mask, value, patterns: Vec::new() });
        unit.mask &= mask & !(unit.value ^ value);
        unit.value &= unit.mask;
        unit.patterns.push(index);
    }
    units.into_values().collect()
}

/// A node of the tree.
#[derive(Debug)]
pub enum Node {
    /// `insn & mask` is one of the values, or there is no match.
    Switch { mask: u32, cases: Vec<(u32, Node)> },
    /// No bit is fixed in all: try each.
    Any(Vec<Node>),
    /// `insn & mask == value` is still to be tested (0 when everything was).
    Leaf { mask: u32, value: u32, patterns: Vec<usize> },
}

/// Builds the tree over `units`, of which the bits of `tested` were compared already.
pub fn build(units: Vec<Unit>, tested: u32) -> Node {
    if let [unit] = &units[..] {
        let mask = unit.mask & !tested;
        return Node::Leaf { mask, value: unit.value & mask, patterns: unit.patterns.clone() };
    }
    let common = units.iter().fold(!tested, |mask, unit| mask & unit.mask);
    if common == 0 {
        return Node::Any(units.into_iter().map(|unit| build(vec![unit], tested)).collect());
    }
    let mut cases: BTreeMap<u32, Vec<Unit>> = BTreeMap::new();
    for unit in units {
        cases.entry(unit.value & common).or_default().push(unit);
    }
    let cases = cases.into_iter().map(|(value, units)| (value, build(units, tested | common)));
    Node::Switch { mask: common, cases: cases.collect() }
}
