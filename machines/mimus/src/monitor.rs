//! The monitor: commands typed by a person to a running machine.
//!
//! Names and effects are those of QEMU's human monitor. Commands act on [`Control`], which
//! the running machine implements; a command is one row of [`COMMANDS`].

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Weak};

use mimus_core::backend::{CharBackend, CharEvent, InputEvent};
use mimus_machines::config::keyval::nearest;

use crate::input;
use crate::line_editor::LineEditor;

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
    /// What a person does with keyboard and mouse; what to say if nothing takes it.
    fn input(&self, events: &[InputEvent]) -> String;
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
    /// What a line of the debugger may go on with, `more` being commands of others.
    fn complete(&self, line: &str, more: &[&str]) -> (usize, Vec<String>) {
        let _ = more;
        (line.len(), Vec::new())
    }
    /// Ends what a command of the debugger waits for.
    fn interrupt(&self) {}
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
    (&["cont", "c", "continue"], "let it go on; where it stops at a breakpoint is said then", |c| quietly(|| c.cont())),
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
    let rows = COMMANDS.iter().filter(|c| c.0[0] != "help");
    let ours: String = rows.map(|(names, about, _)| mimus_debug::help::line(names[0], about)).collect();
    let input: String = input::COMMANDS.iter().map(|(name, about)| mimus_debug::help::line(name, about)).collect();
    let more = input + &mimus_debug::help::line(TRACE.0, TRACE.1) + &mimus_debug::help::help();
    // What has another meaning here.
    let ours_only = |line: &&str| !["continue", "stop"].contains(&line.split(' ').next().unwrap_or_default());
    let more: String = more.lines().filter(ours_only).map(|line| format!("{line}\n")).collect();
    format!("{ours}{more}")
}

const TRACE: (&str, &str) = ("trace start FILE,…|stop", "traces what is executed, as -trace does");

/// `help NAME` of a command of ours.
fn help_of(name: &str) -> Option<String> {
    if name == "trace" {
        return Some(format!("{}\n  {}\n    trace start boot.trc,what=mem\n", TRACE.0, TRACE.1));
    }
    if let Some((usage, about)) = input::COMMANDS.iter().find(|(usage, _)| usage.split(' ').next() == Some(name)) {
        return Some(format!("{usage}\n  {about}\n"));
    }
    let (names, about, _) = COMMANDS.iter().find(|(names, _, _)| names.contains(&name))?;
    let also = if names.len() > 1 { format!("  also: {}\n", names[1..].join(", ")) } else { String::new() };
    Some(format!("{}\n  {about}\n{also}", names[0]))
}

/// First words of lines that are ours.
fn names() -> Vec<&'static str> {
    let ours = COMMANDS.iter().map(|(names, _, _)| names[0]).chain(input_names());
    ours.chain(["trace", "trace start", "trace stop"]).collect()
}

fn input_names() -> impl Iterator<Item = &'static str> {
    input::COMMANDS.iter().filter_map(|(usage, _)| usage.split(' ').next())
}

/// What a line may go on with.
pub fn complete(line: &str, control: &dyn Control) -> (usize, Vec<String>) {
    control.complete(line, &names())
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
    if let Some(text) = line.strip_prefix("help ").and_then(help_of) {
        return text;
    }
    own(&line, control).or_else(|| control.debugger(&line)).unwrap_or_else(|| unknown(&line))
}

fn own(line: &str, control: &dyn Control) -> Option<String> {
    if let Some(events) = input::parse(line) {
        return Some(events.map_or_else(|why| format!("{why}\n"), |events| control.input(&events)));
    }
    let (_, _, action) = COMMANDS.iter().find(|(names, _, _)| names.contains(&line))?;
    Some(action(control))
}

/// The same at the debugger's prompt: its own commands come first, and end with the stop that they wait for.
pub fn execute_debugger(line: &str, control: &dyn Control) -> String {
    let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    let more = line.strip_prefix("help ").filter(|name| name.contains('_') || *name == "trace").and_then(help_of);
    let named = ["info ", "sendkey"].iter().any(|name| line.starts_with(name));
    let ours = || (named || line.contains('_')).then(|| own(&line, control)).flatten();
    more.or_else(ours).or_else(|| control.debugger(&line)).unwrap_or_else(|| unknown(&line))
}

/// What to say about a command that is not there.
pub fn unknown(line: &str) -> String {
    let word = line.split(' ').next().unwrap_or_default();
    let ours = COMMANDS.iter().flat_map(|(names, _, _)| names.iter().copied());
    let debuggers = mimus_debug::help::COMMANDS.iter().map(|c| c.0).chain(input_names());
    let near = nearest(line, ours).or_else(|| nearest(word, debuggers));
    format!(
        "there is no command '{line}'; {}\n",
        near.map_or("type 'help' for the list".into(), |n| format!("did you mean '{n}'?"))
    )
}

/// A monitor on a character device of its own.
pub fn serve(device: &Arc<dyn CharBackend>, control: Arc<dyn Control>) -> std::io::Result<Arc<Session>> {
    let output = Arc::new(Output { device: Arc::downgrade(device), waiting: Mutex::default() });
    let more = output.clone();
    device.set_writable_listener(Box::new(move || more.print(&[])));
    let greeted = output.clone();
    let greet = move || greeted.print(format!("{GREETING}{PROMPT}").replace('\n', "\r\n").as_bytes());
    if device.has_connections() {
        device.set_event_listener(Box::new(move |event| {
            if event == CharEvent::Opened {
                greet();
            }
        }));
    } else {
        greet();
    }
    let session = Arc::new(Session::start(move || control.clone(), move |bytes: &[u8]| output.print(bytes))?);
    // Completion asks vCPUs, and this is called on the thread that devices wait for.
    let (keys, typed) = channel::<Vec<u8>>();
    let typed_at = session.clone();
    std::thread::Builder::new().name("monitor-keys".into()).spawn(move || {
        for bytes in typed {
            typed_at.typed(&bytes);
        }
    })?;
    let keys = Mutex::new(keys);
    device.set_receiver(Box::new(move |typed| {
        let _ = keys.lock().unwrap_or_else(|e| e.into_inner()).send(typed.to_vec());
        typed.len()
    }));
    Ok(session)
}

/// What is printed to a device that takes only some of it at a time.
struct Output {
    device: Weak<dyn CharBackend>,
    waiting: Mutex<VecDeque<u8>>,
}

impl Output {
    fn print(&self, bytes: &[u8]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(|e| e.into_inner());
        waiting.extend(bytes);
        let Some(device) = self.device.upgrade() else { return waiting.clear() };
        while !waiting.is_empty() {
            let taken = device.write(waiting.as_slices().0);
            if taken == 0 {
                // Its listener calls.
                return;
            }
            waiting.drain(..taken);
        }
    }
}

type Print = Arc<dyn Fn(&[u8]) + Send + Sync>;
type Machine = Arc<dyn Fn() -> Arc<dyn Control> + Send + Sync>;

/// A monitor's side of a terminal: a line being typed, and a thread for what waits for the machine, so that the keyboard
/// never does.
pub struct Session {
    editor: Mutex<LineEditor>,
    machine: Machine,
    print: Print,
    lines: Sender<String>,
    /// Lines that are being executed, or wait for it.
    waiting: Arc<AtomicUsize>,
}

impl Session {
    /// `machine` waits until there is one.
    pub fn start(
        machine: impl Fn() -> Arc<dyn Control> + Send + Sync + 'static,
        print: impl Fn(&[u8]) + Send + Sync + 'static,
    ) -> std::io::Result<Session> {
        let (machine, print): (Machine, Print) = (Arc::new(machine), Arc::new(print));
        let (lines, received) = channel::<String>();
        let waiting = Arc::<AtomicUsize>::default();
        let (m, p, w) = (machine.clone(), print.clone(), waiting.clone());
        std::thread::Builder::new().name("monitor".into()).spawn(move || {
            for line in received {
                let text = execute(&line, m().as_ref());
                w.fetch_sub(1, Ordering::SeqCst);
                answer(&*p, &text);
            }
        })?;
        Ok(Session { editor: Mutex::default(), machine, print, lines, waiting })
    }

    /// Takes what was typed.
    pub fn typed(&self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == 0x03 && self.waiting.load(Ordering::SeqCst) > 0 {
                (self.machine)().interrupt();
                continue;
            }
            let mut echo = Vec::new();
            let mut editor = self.editor.lock().unwrap_or_else(|e| e.into_inner());
            // A vCPU that makes steps is not to be asked for its registers' names.
            let idle = self.waiting.load(Ordering::SeqCst) == 0;
            let words = |line: &str| match idle {
                true => complete(line, (self.machine)().as_ref()),
                false => (line.len(), Vec::new()),
            };
            let line = editor.feed(*byte, &mut echo, PROMPT, &words);
            drop(editor);
            (self.print)(&echo);
            if let Some(line) = line {
                self.line(line);
            }
        }
    }

    fn line(&self, line: String) {
        let words = line.split_whitespace().collect::<Vec<_>>().join(" ");
        // What stops or ends the machine does not wait behind what waits for it to stop; what is done at once is.
        let urgent = ["stop", "s", "quit", "q"].contains(&words.as_str());
        let quick = self.waiting.load(Ordering::SeqCst) == 0
            && (words.is_empty() || COMMANDS.iter().any(|(names, _, _)| names.contains(&words.as_str())));
        if urgent || quick {
            return answer(&*self.print, &execute(&line, (self.machine)().as_ref()));
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _ = self.lines.send(line);
    }

    /// Says something that nobody asked for.
    pub fn announce(&self, text: &str) {
        (self.print)(b"\r\n");
        answer(&*self.print, text);
    }
}

fn answer(print: &dyn Fn(&[u8]), text: &str) {
    print(format!("{text}{PROMPT}").replace('\n', "\r\n").as_bytes());
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
        fn input(&self, events: &[InputEvent]) -> String {
            assert_eq!(events.len(), 2);
            self.0.lock().unwrap().push("input");
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
        for run in [execute, execute_debugger] {
            assert_eq!(run("sendkey  a", &fake), "");
            assert_eq!(fake.0.lock().unwrap().pop(), Some("input"));
            assert!(run("sendkey qq", &fake).contains("no key"));
        }
        assert!(execute("sendkeys a", &fake).contains("did you mean 'sendkey'?"));
        assert!(execute("help mouse_move", &fake).starts_with("mouse_move DX"));
        assert!(execute("sytem_reset", &fake).contains("did you mean 'system_reset'?"));
        assert!(execute("help", &fake).lines().count() > COMMANDS.len());
        assert!(execute("disasemble", &fake).contains("did you mean 'disassemble'?"));
        assert_eq!(execute("", &fake), "");
    }

    #[test]
    fn help_of_our_commands() {
        let fake = Fake::default();
        assert_eq!(execute("help cont", &fake).lines().next(), Some("cont"));
        assert!(execute("help trace", &fake).contains("trace start boot.trc"));
        let all = execute("help", &fake);
        for name in ["system_reset ", "trace start", "info tasks ", "break ", "info status "] {
            assert!(all.lines().any(|l| l.starts_with(name)), "{name} is not in\n{all}");
        }
        let of = |name: &str| all.lines().filter(|l| l.split(' ').next() == Some(name)).count();
        assert_eq!((of("stop"), of("continue"), of("help"), of("cont")), (1, 0, 1, 1), "{all}");
    }

    /// A device that takes little at a time gets all of it, and who connects is greeted.
    #[test]
    fn long_answers() {
        type Listener<T> = Mutex<Option<Box<dyn Fn(T) + Send + Sync>>>;
        #[derive(Default)]
        struct Narrow {
            all: Mutex<(Vec<u8>, bool)>,
            writable: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
            events: Listener<CharEvent>,
        }
        impl CharBackend for Narrow {
            fn write(&self, data: &[u8]) -> usize {
                let mut all = self.all.lock().unwrap();
                // Every other time it is full.
                all.1 = !all.1;
                let taken = if all.1 { data.len().min(7) } else { 0 };
                all.0.extend(&data[..taken]);
                taken
            }
            fn set_receiver(&self, _: mimus_core::backend::char::CharReceiver) {}
            fn input_ready(&self) {}
            fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
                *self.writable.lock().unwrap() = Some(listener);
            }
            fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
                *self.events.lock().unwrap() = Some(listener);
            }
            fn has_connections(&self) -> bool {
                true
            }
        }
        let narrow = Arc::new(Narrow::default());
        let device: Arc<dyn CharBackend> = narrow.clone();
        let session = serve(&device, Arc::new(Fake::default())).unwrap();
        assert!(narrow.all.lock().unwrap().0.is_empty(), "nobody is there");
        for event in [CharEvent::Opened, CharEvent::Closed] {
            narrow.events.lock().unwrap().as_ref().expect("it listens")(event);
        }
        session.typed(b"help\r");
        let wanted = format!("{GREETING}{PROMPT}help\n{}{PROMPT}", help()).replace('\n', "\r\n");
        let writable = narrow.writable.lock().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while narrow.all.lock().unwrap().0 != wanted.as_bytes() {
            assert!(std::time::Instant::now() < end, "{}", String::from_utf8_lossy(&narrow.all.lock().unwrap().0));
            writable.as_ref().expect("somebody waits for it")();
        }
    }

    /// What waits for the machine does not hold up the keyboard, and Ctrl-C ends it.
    #[test]
    fn commands_that_wait() {
        struct Waits(Mutex<std::sync::mpsc::Receiver<()>>, Sender<()>);
        impl Control for Waits {
            fn status(&self) -> String {
                "running".into()
            }
            fn stop(&self) {}
            fn cont(&self) {}
            fn reset(&self) {}
            fn powerdown(&self) {}
            fn wakeup(&self) -> String {
                String::new()
            }
            fn input(&self, _: &[InputEvent]) -> String {
                String::new()
            }
            fn sync(&self) {}
            fn quit(&self) {}
            fn registers(&self) -> String {
                String::new()
            }
            fn accelerator(&self) -> String {
                String::new()
            }
            fn debugger(&self, line: &str) -> Option<String> {
                if line == "finish" {
                    let _ = self.0.lock().unwrap().recv();
                }
                Some(format!("did {line}\n"))
            }
            fn interrupt(&self) {
                let _ = self.1.send(());
            }
        }
        let (end, ended) = channel();
        let control: Arc<dyn Control> = Arc::new(Waits(Mutex::new(ended), end));
        let (said, heard) = channel();
        let print = move |bytes: &[u8]| _ = said.send(String::from_utf8_lossy(bytes).into_owned());
        let session = Session::start(move || control.clone(), print).unwrap();
        let mut all = String::new();
        let mut until = |text: &str| {
            while !all.contains(text) {
                all.push_str(&heard.recv_timeout(std::time::Duration::from_secs(120)).expect(text));
            }
        };
        session.typed(b"finish\rregisters\rstop\r");
        // "stop" is answered while "finish" waits; what else was typed comes after it.
        until("stop\r\n(mimus) ");
        session.typed(b"\x03");
        until("did registers\r\n");
        let (a, b) = (all.find("did finish"), all.find("did registers"));
        assert!(a.is_some() && a < b, "{all}");
        session.announce("vCPU 0: breakpoint\n");
        assert!(heard.recv_timeout(std::time::Duration::from_secs(120)).is_ok());
    }
}
