//! device models and host back ends.

pub mod net;
