//! Translated code: where it lives ([`mapping`]) and what is known about it ([`store`]).

pub mod mapping;
pub mod store;

pub use store::{CodeStore, PageKey, Published, Resolved};
