//! the x86-64 host backend of the translator.
