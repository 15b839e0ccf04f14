//! the translator's runtime (blocks, code cache, software TLB, execution loop).
