//! `-d` and `-D`: what is logged, and where to.
//!
//! Our crates log through `log` with the item as target: `log::debug!(target: "int", …)`.
//! Errors and warnings are shown always; `MIMUS_LOG` takes env_logger's directives.

use std::fs::File;

use env_logger::{Builder, Target};
use log::LevelFilter;
use mimus_core::error::why_not_made;
use mimus_machines::config::LogConfig;

/// Starts the logger. A second call in one process leaves the first.
pub fn start(config: &LogConfig) -> anyhow::Result<()> {
    let mut builder = Builder::new();
    builder.filter_level(LevelFilter::Warn).parse_env("MIMUS_LOG");
    // What guests do wrong or expect of us is of interest to who asks for it only.
    for quiet in ["guest_errors", "unimp"] {
        builder.filter_module(quiet, LevelFilter::Off);
    }
    for item in &config.items {
        let target = item.replace("dev:", "dev::");
        builder.filter_module(&target, LevelFilter::Trace);
    }
    let to_file = match &config.file {
        Some(path) => {
            let failed = |e| anyhow::anyhow!("-D {}: {}", path.display(), why_not_made(path, &e));
            let file = File::create(path).map_err(failed)?;
            builder.target(Target::Pipe(Box::new(file)));
            true
        }
        None => false,
    };
    builder.format(move |out, record| {
        use std::io::Write;
        match record.level() {
            // In raw mode a newline does not return the carriage.
            level @ (log::Level::Error | log::Level::Warn) => {
                let word = if level == log::Level::Error { "" } else { "warning: " };
                write!(out, "mimus: {word}{}{}", record.args(), if to_file { "\n" } else { crate::terminal::newline() })
            }
            _ => write!(
                out,
                "{}: {}{}",
                record.target(),
                record.args(),
                if to_file { "\n" } else { crate::terminal::newline() }
            ),
        }
    });
    let _ = builder.try_init();
    Ok(())
}
