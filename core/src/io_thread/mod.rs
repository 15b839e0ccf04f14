//! The event loop host I/O and timers run on.
