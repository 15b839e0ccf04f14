//! boards, boot protocols and machine configuration.
