//! Guest code on the translator, without a machine.

mod random;
