//! Keyboards and mice, and the controllers they are on.

pub mod i8042;
mod ps2;
