//! IEEE 754 arithmetic in integers, the reference for guest floating point.
