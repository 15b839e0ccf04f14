//! vocabulary and mechanism shared by accelerators, devices and boards.
