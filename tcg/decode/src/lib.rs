//! decode tables to decoder, disassembler and encoding sweeps, at build time.
