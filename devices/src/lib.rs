//! device models and host back ends.
