//! A guest in a child process, and what to boot in it.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mimus_machines::guests::cpio::Archive;
use mimus_machines::guests::{self, GuestSpec, Progress, x86};

/// Longest wait for one thing: a loaded machine, not a fast one.
pub const LIMIT: Duration = Duration::from_secs(150);

/// A program that is ended whatever happens.
pub struct Mimus {
    child: Child,
    input: Option<ChildStdin>,
    output: Arc<Output>,
    readers: [JoinHandle<()>; 2],
    /// Bytes of the output that waits have passed.
    seen: usize,
}

#[derive(Default)]
struct Output {
    bytes: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

impl Output {
    fn collect(self: Arc<Self>, mut from: impl Read) {
        let mut buffer = [0; 4096];
        loop {
            let n = from.read(&mut buffer).unwrap_or(0);
            let mut state = self.bytes.lock().unwrap();
            state.0.extend_from_slice(&buffer[..n]);
            state.1 |= n == 0;
            drop(state);
            self.more.notify_all();
            if n == 0 {
                return;
            }
        }
    }
}

impl Mimus {
    /// Starts `mimus` with its standard input and output in our hands.
    pub fn start(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mimus"));
        command.args(args).env_remove("RUST_BACKTRACE");
        Self::of(command)
    }

    /// Starts any program that way.
    pub fn of(mut command: Command) -> Self {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("mimus starts");
        let output = Arc::<Output>::default();
        let (stdout, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let readers = [Box::new(stdout) as Box<dyn Read + Send>, Box::new(errors)].map(|stream| {
            let output = output.clone();
            std::thread::spawn(move || output.collect(stream))
        });
        Self { input: child.stdin.take(), child, output, readers, seen: 0 }
    }

    /// Starts `mimus system riscv64` with the usual options, then `args`.
    pub fn riscv64(args: &[&str]) -> Self {
        let usual = ["system", "riscv64", "-M", "virt", "-m", "512", "-nographic"];
        Self::start(&[&usual[..], args].concat())
    }

    /// All output so far, for messages.
    pub fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.output.bytes.lock().unwrap().0).into_owned()
    }

    /// Waits until `text` comes, after what earlier waits found; gives what came before it.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        let mut state = self.output.bytes.lock().unwrap();
        loop {
            let new = &state.0[self.seen..];
            if let Some(at) = new.windows(text.len()).position(|w| w == text.as_bytes()) {
                let before = String::from_utf8_lossy(&new[..at]).into_owned();
                self.seen += at + text.len();
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.1 {
                let why = if state.1 { "it ended" } else { "no sign of it" };
                let all = String::from_utf8_lossy(&state.0);
                let tail: Vec<&str> = all.lines().rev().take(40).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                panic!("waiting for {text:?}: {why}; the last lines:\n{}", tail.join("\n"));
            }
            state = self.output.more.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Types text.
    pub fn send(&mut self, text: &str) {
        let input = self.input.as_mut().expect("input is open");
        input.write_all(text.as_bytes()).and_then(|()| input.flush()).expect("the guest reads");
    }

    /// Has the [`command_initrd`]'s first process run a command; its output, if it succeeded.
    pub fn run(&mut self, command: &str) -> String {
        self.send(&format!("{command}\n"));
        let output = self.wait_for("<<status ");
        let status = self.wait_for(">>");
        assert_eq!(status, "0", "{command}:\n{output}");
        output.trim().replace('\r', "")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it is there");
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.child.try_wait().expect("it can be waited for");
            // What it said last may still be on its way.
            if let Some(status) = status.filter(|_| self.readers.iter().all(JoinHandle::is_finished)) {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.transcript());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end, which must be a success.
    pub fn end_well(&mut self) {
        let status = self.end();
        assert_eq!(status.code(), Some(0), "{}", self.transcript());
    }
}

impl Drop for Mimus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory that goes away.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mimus-guest-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    /// A path in it, as text.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// In hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

struct Quiet;

impl Progress for Quiet {
    fn step(&self, _text: &str) {}
    fn download(&self, _done: u64, _total: u64) {}
}

/// Says on the real standard error, which the test runner does not keep to itself, that a
/// test does not run.
pub fn skipped(test: &str, reason: &str) {
    // In one piece: tests run side by side.
    let _ = std::io::stderr().write_all(format!("SKIPPED ({test}): {reason}\n").as_bytes());
}

/// The files of a guest, fetched if need be; `None` after saying so if it is not to be had.
pub fn guest(test: &str, spec: &GuestSpec) -> Option<PathBuf> {
    let files = guests::cache_dir().and_then(|cache| guests::ensure(spec, &cache, &Quiet));
    files.map_err(|e| skipped(test, &format!("guest {}: {e}", spec.name))).ok()
}

/// A kernel and [`command_initrd`].
pub struct Commands {
    /// What `mimus system` is told first.
    machine: &'static [&'static str],
    pub kernel: String,
    pub initrd: String,
}

/// Debian's kernel with a first process that runs the commands it is sent.
pub fn commands(test: &str) -> Option<Commands> {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    let specs = [&guests::RISCV64_KERNEL, &guests::RISCV64_BUSYBOX];
    commands_of(test, &["riscv64", "-M", "virt"], specs, "linux", &MODULES, &INITRD)
}

/// The same for a PC; [`Commands::boot`] is told the board.
pub fn x86_64_commands(test: &str) -> Option<Commands> {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    let specs = [&x86::X86_64_KERNEL, &x86::X86_64_BUSYBOX];
    commands_of(test, &["x86_64"], specs, "vmlinuz", x86::MODULES, &INITRD)
}

/// The same with the kernel for all PCs, not only clouds' ones.
pub fn generic_commands(test: &str) -> Option<Commands> {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    let specs = [&x86::X86_64_GENERIC, &x86::X86_64_BUSYBOX];
    commands_of(test, &["x86_64"], specs, "vmlinuz", x86::MODULES, &INITRD)
}

/// The same with the modules of SATA disks only.
pub fn sata_commands(test: &str) -> Option<Commands> {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    let specs = [&x86::X86_64_SATA, &x86::X86_64_BUSYBOX];
    commands_of(test, &["x86_64"], specs, "vmlinuz", x86::SATA_MODULES, &INITRD)
}

/// The same for a 32-bit PC without PAE.
pub fn i386_commands(test: &str) -> Option<Commands> {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    let specs = [&x86::I386_KERNEL, &x86::I386_BUSYBOX];
    commands_of(test, &["i386"], specs, "vmlinuz", x86::MODULES, &INITRD)
}

/// The same for a 32-bit PC with PAE.
pub fn pae_commands(test: &str) -> Option<Commands> {
    static INITRD: OnceLock<PathBuf> = OnceLock::new();
    let specs = [&x86::I386_PAE, &x86::I386_BUSYBOX];
    commands_of(test, &["i386"], specs, "vmlinuz", x86::MODULES, &INITRD)
}

fn commands_of(
    test: &str,
    machine: &'static [&'static str],
    [kernel, busybox]: [&GuestSpec; 2],
    file: &str,
    modules: &[&str],
    initrd: &OnceLock<PathBuf>,
) -> Option<Commands> {
    let name = kernel.name;
    let (kernel, busybox) = (guest(test, kernel)?, guest(test, busybox)?);
    let initrd = initrd.get_or_init(|| command_initrd(name, &kernel, &busybox.join("busybox"), modules));
    let text = |p: &Path| p.to_str().unwrap().to_owned();
    Some(Commands { machine, kernel: text(&kernel.join(file)), initrd: text(initrd) })
}

/// Modules in the order they are loaded.
const MODULES: [&str; 7] = [
    "virtio_mmio.ko.xz",
    "failover.ko.xz",
    "net_failover.ko.xz",
    "virtio_net.ko.xz",
    "virtio_blk.ko.xz",
    "virtio-rng.ko.xz",
    "virtio_balloon.ko.xz",
];

/// Runs what it reads, a line at a time, and says how it ended.
pub const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
stty -echo
echo 3 > /proc/sys/kernel/printk
for m in $(cat /modules/order); do
    case $m in *.xz) xzcat /modules/$m > /tmp/m.ko ;; *) cp /modules/$m /tmp/m.ko ;; esac
    insmod /tmp/m.ko
done
ip link set lo up
if ip link set eth0 up 2>/dev/null; then
    ip addr add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
    echo nameserver 10.0.2.3 > /etc/resolv.conf
fi
echo '<<ready>>'
while read -r line; do
    eval "$line"
    echo "<<status $?>>"
done
"#;

/// In the cache of this test run: static busybox, the kernel's modules, [`INIT`].
fn command_initrd(name: &str, kernel: &Path, busybox: &Path, modules: &[&str]) -> PathBuf {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "etc", "modules"] {
        archive.directory(dir);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, &std::fs::read(busybox).unwrap());
    for module in modules {
        archive.file(&format!("modules/{module}"), 0o644, &std::fs::read(kernel.join(module)).unwrap());
    }
    archive.file("modules/order", 0o644, modules.join("\n").as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("commands-{name}-{}.gz", std::process::id()));
    std::fs::write(&path, archive.finish_gzip().unwrap()).unwrap();
    path
}

impl Commands {
    /// Boots it with more options, up to where it takes commands.
    pub fn boot(&self, args: &[&str]) -> Mimus {
        let usual = ["-m", "512", "-nographic"];
        let own = ["-kernel", &self.kernel, "-initrd", &self.initrd, "-append", "console=ttyS0 quiet panic=-1"];
        let mut guest = Mimus::start(&[&["system"], self.machine, &usual, &own, args].concat());
        guest.wait_for("<<ready>>");
        guest
    }
}
