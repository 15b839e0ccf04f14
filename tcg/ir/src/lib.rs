//! the translator's intermediate representation, its text form, verifier and interpreter.
