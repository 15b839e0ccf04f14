//! Translated code: where it lives ([`mapping`]) and what is known about it ([`store`]).

mod counts;
pub mod mapping;
pub mod store;

pub use counts::Counts;
pub use store::{CodeStore, PageKey, Published, Resolved};
