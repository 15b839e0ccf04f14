//! Finding a model by its name.

use super::keyvalue::did_you_mean;
use super::model::ModelEntry;

/// All device models of a program: the lists of the class crates, one after another.
#[derive(Clone, Copy, Debug)]
pub struct Registry {
    lists: &'static [&'static [ModelEntry]],
}

/// No model has the name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no device model {name:?}{hint}; -device help lists them")]
pub struct UnknownModel {
    name: String,
    hint: String,
}

impl Registry {
    /// A registry over static lists.
    pub const fn new(lists: &'static [&'static [ModelEntry]]) -> Self {
        Self { lists }
    }

    /// Every model, in list order.
    pub fn models(&self) -> impl Iterator<Item = &'static ModelEntry> {
        self.lists.iter().flat_map(|l| l.iter())
    }

    /// The model called `name`.
    pub fn find(&self, name: &str) -> Result<&'static ModelEntry, UnknownModel> {
        self.models().find(|m| m.name == name).ok_or_else(|| UnknownModel {
            name: name.to_owned(),
            hint: did_you_mean(name, self.models().map(|m| m.name)),
        })
    }
}
