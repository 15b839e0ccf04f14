//! The monitor: commands typed by a person to a running machine.
//!
//! Names and effects are those of QEMU's human monitor. Commands act on [`Control`], which
//! the running machine implements; a command is one row of [`COMMANDS`].

use std::sync::{Arc, Mutex};

use mimus_core::backend::CharBackend;
use mimus_machines::config::keyval::nearest;

/// What the monitor can do to a machine. All calls return at once.
pub trait Control: Send + Sync {
    /// Whether it runs, in a word: `running`, `paused`, `shutdown`.
    fn status(&self) -> String;
    /// Stops all vCPUs.
    fn stop(&self);
    /// Lets the vCPUs go on.
    fn cont(&self);
    /// Resets the machine.
    fn reset(&self);
    /// Asks the guest to power off.
    fn powerdown(&self);
    /// Wakes a guest that sleeps; what to say if it does not.
    fn wakeup(&self) -> String;
    /// Writes out what disks have pending.
    fn sync(&self);
    /// Ends the run.
    fn quit(&self);
    /// Registers of the vCPUs, or why they cannot be shown.
    fn registers(&self) -> String;
    /// The accelerator, and what it counted.
    fn accelerator(&self) -> String;
    /// A command of the debugger, or `trace`; `None`: it has none of that name. Waits for the machine.
    fn debugger(&self, line: &str) -> Option<String> {
        let _ = line;
        None
    }
}

/// What is printed when the monitor gets the keyboard.
pub const GREETING: &str = "mimus monitor - type 'help' for the commands\n";
/// Printed before each line.
pub const PROMPT: &str = "(mimus) ";

type Action = fn(&dyn Control) -> String;

const COMMANDS: &[(&[&str], &str, Action)] = &[
    (&["help", "?"], "this list", |_| help()),
    (&["info status"], "whether the machine runs", |c| format!("VM status: {}\n", c.status())),
    (&["info registers"], "registers of the vCPUs", |c| c.registers()),
    (&["info accel"], "what the accelerator counted", |c| c.accelerator()),
    (&["info version"], "the version", |_| format!("{}\n", env!("CARGO_PKG_VERSION"))),
    (&["stop", "s"], "stop the machine", |c| quietly(|| c.stop())),
    (&["cont", "c"], "let it go on", |c| quietly(|| c.cont())),
    (&["system_reset"], "reset the machine", |c| quietly(|| c.reset())),
    (&["system_powerdown"], "ask the guest to power off", |c| quietly(|| c.powerdown())),
    (&["system_wakeup"], "wake a guest that sleeps", |c| c.wakeup()),
    (&["quit", "q"], "end mimus", |c| quietly(|| c.quit())),
];

/// A command that prints nothing.
fn quietly(action: impl Fn()) -> String {
    action();
    String::new()
}

fn help() -> String {
    let ours: String = COMMANDS.iter().map(|(names, about, _)| format!("{:<32} {about}\n", names[0])).collect();
    let trace = "trace start FILE,…|stop          traces what is executed, as -trace does\n";
    format!("{ours}{trace}{}", mimus_debug::debugger::help())
}

/// Runs one command and returns what to print.
pub fn execute(line: &str, control: &dyn Control) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let line = words.join(" ");
    if line.is_empty() {
        return String::new();
    }
    if line == "info" {
        return help();
    }
    match COMMANDS.iter().find(|(names, _, _)| names.contains(&line.as_str())) {
        Some((_, _, action)) => action(control),
        None => control.debugger(&line).unwrap_or_else(|| unknown(&line)),
    }
}

/// What to say about a command that is not there.
pub fn unknown(line: &str) -> String {
    let word = line.split(' ').next().unwrap_or_default();
    let ours = COMMANDS.iter().flat_map(|(names, _, _)| names.iter().copied());
    let debuggers = mimus_debug::debugger::COMMANDS.iter().map(|c| c.0);
    let near = nearest(line, ours).or_else(|| nearest(word, debuggers));
    format!(
        "there is no command '{line}'; {}\n",
        near.map_or("type 'help' for the list".into(), |n| format!("did you mean '{n}'?"))
    )
}

/// A monitor on a character device of its own.
pub fn serve(device: &Arc<dyn CharBackend>, control: Arc<dyn Control>) {
    let (output, editor) = (Arc::downgrade(device), Mutex::new(LineEditor::default()));
    device.write(format!("{GREETING}{PROMPT}").replace('\n', "\r\n").as_bytes());
    // Commands wait for the machine, which may wait for the thread that this is called on.
    let (lines, waiting) = std::sync::mpsc::channel::<String>();
    let answers = output.clone();
    let answer = move || {
        for line in waiting {
            let Some(output) = answers.upgrade() else { return };
            let answer = execute(&line, control.as_ref());
            output.write(format!("{answer}{PROMPT}").replace('\n', "\r\n").as_bytes());
        }
    };
    if let Err(e) = std::thread::Builder::new().name("monitor".into()).spawn(answer) {
        log::error!("there is no monitor: {e}");
    }
    device.set_receiver(Box::new(move |typed| {
        let Some(output) = output.upgrade() else {
            return typed.len();
        };
        let mut editor = editor.lock().unwrap_or_else(|e| e.into_inner());
        for byte in typed {
            let mut echo = Vec::new();
            let line = editor.feed(*byte, &mut echo);
            output.write(&echo);
            if let Some(line) = line {
                let _ = lines.send(line);
            }
        }
        typed.len()
    }));
}

/// Longest line kept; the rest of a longer one is dropped.
const MAX_LINE: usize = 4096;

/// A line being typed on a raw terminal.
#[derive(Debug, Default)]
pub struct LineEditor {
    line: Vec<u8>,
}

impl LineEditor {
    /// Takes a byte; echoes into `echo`; a finished line is returned.
    pub fn feed(&mut self, byte: u8, echo: &mut Vec<u8>) -> Option<String> {
        match byte {
            b'\r' | b'\n' => {
                echo.extend(b"\r\n");
                return Some(String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned());
            }
            0x08 | 0x7f => echo.extend(self.line.pop().map_or(&b""[..], |_| b"\x08 \x08")),
            // Ctrl-U and Ctrl-C: away with the line.
            0x15 | 0x03 => {
                for _ in self.line.drain(..) {
                    echo.extend(b"\x08 \x08");
                }
            }
            0x20..=0x7e if self.line.len() < MAX_LINE => {
                self.line.push(byte);
                echo.push(byte);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake(Mutex<Vec<&'static str>>);

    impl Control for Fake {
        fn status(&self) -> String {
            "running".into()
        }
        fn stop(&self) {
            self.0.lock().unwrap().push("stop");
        }
        fn cont(&self) {
            self.0.lock().unwrap().push("cont");
        }
        fn reset(&self) {
            self.0.lock().unwrap().push("reset");
        }
        fn powerdown(&self) {
            self.0.lock().unwrap().push("powerdown");
        }
        fn wakeup(&self) -> String {
            self.0.lock().unwrap().push("wakeup");
            String::new()
        }
        fn sync(&self) {}
        fn quit(&self) {
            self.0.lock().unwrap().push("quit");
        }
        fn registers(&self) -> String {
            "pc 0\n".into()
        }
        fn accelerator(&self) -> String {
            "null\n".into()
        }
    }

    #[test]
    fn commands() {
        let fake = Fake::default();
        assert_eq!(execute(" info   status ", &fake), "VM status: running\n");
        for line in ["stop", "c", "system_reset", "system_powerdown", "system_wakeup", "q"] {
            assert_eq!(execute(line, &fake), "");
        }
        assert_eq!(*fake.0.lock().unwrap(), ["stop", "cont", "reset", "powerdown", "wakeup", "quit"]);
        assert!(execute("sytem_reset", &fake).contains("did you mean 'system_reset'?"));
        assert!(execute("help", &fake).lines().count() > COMMANDS.len());
        assert!(execute("disasemble", &fake).contains("did you mean 'disassemble'?"));
        assert_eq!(execute("", &fake), "");
    }

    #[test]
    fn editing() {
        let (mut editor, mut echo) = (LineEditor::default(), Vec::new());
        let lines: Vec<String> =
            b"stpo\x7f\x7fop\rxx\x15c\n".iter().filter_map(|b| editor.feed(*b, &mut echo)).collect();
        assert_eq!(lines, ["stop", "c"]);
    }
}
