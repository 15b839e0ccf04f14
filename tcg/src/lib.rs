//! the dynamic binary translator as an accelerator.
