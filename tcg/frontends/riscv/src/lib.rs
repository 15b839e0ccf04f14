//! the RISC-V guest frontend of the translator.
