//! The options of `mimus system <guest>`, and how they become a [`MachineConfig`].

use std::path::PathBuf;

use clap::{CommandFactory, Parser};
use mimus_machines::config::firmware::{parse_smbios, uuid_option};
use mimus_machines::config::options::{parse_log_items, parse_memory};
use mimus_machines::config::{
    Accel, Bios, BootOrder, CharBackend, Chardev, ConfigError, Drive, DriveInterface, FwCfgItem, Icount, MachineConfig,
    MachineType, MemoryBackend, MemoryKind, Netdev, Nic, Rtc, Smp,
};

/// Options of a machine. Words are QEMU's; each may have one dash or two.
#[derive(Debug, Default, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
pub struct SystemArgs {
    /// Board and its properties; `help` lists them
    #[arg(long = "machine", alias = "M", value_name = "NAME,KEY=VALUE…", allow_hyphen_values = true)]
    pub machine: Vec<String>,
    /// CPU model; `help` lists them
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// How to run guest code, first choice first; `help` lists them
    #[arg(long, value_name = "NAME,KEY=VALUE…")]
    pub accel: Vec<String>,
    /// The same as -accel kvm
    #[arg(long)]
    pub enable_kvm: bool,
    /// Number of vCPUs, or cpus=N,sockets=N,cores=N,threads=N
    #[arg(long, value_name = "N")]
    pub smp: Option<String>,
    /// RAM, as 512M or 2G; a number alone counts MiB
    #[arg(long = "m", value_name = "SIZE")]
    pub memory: Option<String>,
    /// RAM from elsewhere: memory-backend-ram|memfd|file,id=ID,size=SIZE…, with -machine memory-backend=ID
    #[arg(long, value_name = "KIND,id=…")]
    pub object: Vec<String>,
    /// RAM from files in this directory, such as /dev/hugepages
    #[arg(long, value_name = "DIR")]
    pub mem_path: Option<PathBuf>,
    /// Take all RAM from the host at the start
    #[arg(long)]
    pub mem_prealloc: bool,
    /// Keep RAM from being swapped out: mem-lock=on|on-fault; cpu-pm=on
    #[arg(long, value_name = "KEY=VALUE…")]
    pub overcommit: Vec<String>,
    /// Kernel: Linux Image or bzImage, gzip'ed or not, or ELF
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Device tree to use instead of the board's own
    #[arg(long, value_name = "FILE")]
    pub dtb: Option<PathBuf>,
    /// Firmware; `none` runs the kernel with none, `default` uses what is built in
    #[arg(long, value_name = "FILE")]
    pub bios: Option<String>,
    /// What firmware boots: order=cdn,once=d,menu=on,strict=on
    #[arg(long, value_name = "ORDER…", allow_hyphen_values = true)]
    pub boot: Option<String>,
    /// Give firmware and guest data: name=opt/…,file=PATH or string=TEXT
    #[arg(long = "fw_cfg", value_name = "name=…")]
    pub fw_cfg: Vec<String>,
    /// Identity of the machine
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<String>,
    /// What the machine says of itself: type=N,KEY=VALUE…
    #[arg(long, value_name = "type=…")]
    pub smbios: Vec<String>,
    /// Disk: file=…,if=virtio|none|pflash,format=raw,readonly=on,id=…,snapshot=on
    #[arg(long, value_name = "KEY=VALUE…")]
    pub drive: Vec<String>,
    /// Do not write to the disks' files; changes are lost at the end
    #[arg(long)]
    pub snapshot: bool,
    /// Device and its properties; `help` lists them
    #[arg(long, value_name = "NAME,KEY=VALUE…")]
    pub device: Vec<String>,
    /// Network: user,id=…,hostfwd=tcp:127.0.0.1:2222-:22; `help` lists them
    #[arg(long, value_name = "user,id=…")]
    pub netdev: Vec<String>,
    /// Network and card in one: user,model=…,hostfwd=…; `none` for no card
    #[arg(long, value_name = "user…")]
    pub nic: Vec<String>,
    /// Host end of a character device; `help` lists them
    #[arg(long, value_name = "BACKEND,id=…")]
    pub chardev: Vec<String>,
    /// Serial port: mon:stdio, stdio, none, file:PATH, pty, tcp:HOST:PORT, unix:PATH, chardev:ID
    #[arg(long, value_name = "BACKEND")]
    pub serial: Vec<String>,
    /// Monitor: none, stdio, or as -serial
    #[arg(long, value_name = "BACKEND")]
    pub monitor: Option<String>,
    /// What firmware writes to port 0xe9, as -serial (port 0x402: -device isa-debugcon,iobase=0x402,chardev=ID)
    #[arg(long, value_name = "BACKEND")]
    pub debugcon: Option<String>,
    /// Serial port and monitor in this terminal (Ctrl-A h for help)
    #[arg(long)]
    pub nographic: bool,
    /// Only `none` is there
    #[arg(long, value_name = "none")]
    pub display: Option<String>,
    /// Only the devices asked for
    #[arg(long)]
    pub nodefaults: bool,
    /// End when the guest resets
    #[arg(long)]
    pub no_reboot: bool,
    /// Stop instead of ending when the guest powers off
    #[arg(long)]
    pub no_shutdown: bool,
    /// Do not start the CPUs; the monitor's `cont` does
    #[arg(long = "S")]
    pub paused: bool,
    /// Debugger: tcp::PORT, tcp:HOST:PORT, unix:PATH or none; no host is this one only
    #[arg(long, value_name = "ADDRESS")]
    pub gdb: Option<String>,
    /// The same as -gdb tcp::1234
    #[arg(long = "s")]
    pub gdb_1234: bool,
    /// Clock: base=utc|localtime|DATE,clock=host|rt|vm
    #[arg(long, value_name = "KEY=VALUE…")]
    pub rtc: Option<String>,
    /// Time by counting instructions: shift=N|auto,sleep=on|off; one takes 2^N ns
    #[arg(long, value_name = "shift=N")]
    pub icount: Option<String>,
    /// What all chance follows from: with -icount shift=N, runs repeat exactly
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// With -icount shift=N: writes down what comes from outside, for -replay
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    pub record: Option<PathBuf>,
    /// Runs again as it was recorded; other options as then
    #[arg(long, value_name = "FILE")]
    pub replay: Option<PathBuf>,
    /// Names of addresses for the monitor and the debugger: ELF (vmlinux) or System.map
    #[arg(long, value_name = "FILE")]
    pub symbols: Vec<PathBuf>,
    /// Trace what is executed: FILE,what=blocks+mem+devices,range=A-B,addr=A-B,space=ROOT,vcpu=N,mode=user|kernel
    #[arg(long, value_name = "FILE,KEY=VALUE…")]
    pub trace: Option<String>,
    /// Name of the machine
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Log these items; `help` lists them
    #[arg(long = "d", value_name = "ITEM,ITEM")]
    pub log: Option<String>,
    /// Log to this file instead of standard error
    #[arg(long = "D", value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Directory to look for firmware in, too
    #[arg(long = "L", value_name = "DIR")]
    pub data_dir: Vec<PathBuf>,
    /// Write the process id to this file
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// These options
    #[arg(long, alias = "h")]
    pub help: bool,
    /// The version
    #[arg(long)]
    pub version: bool,
    /// Disk image, the same as -drive file=…
    #[arg(value_name = "IMAGE")]
    pub image: Option<PathBuf>,
}

/// The text of `-help`.
pub fn help(guest: &str) -> String {
    let mut out = format!(
        "usage: mimus system {guest} [options] [disk image]\n\noptions (one dash or two; a value follows or, with two dashes, after an =):\n"
    );
    for arg in SystemArgs::command().get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let value = arg
            .get_value_names()
            .filter(|_| arg.get_action().takes_values())
            .and_then(|v| v.first())
            .map_or(String::new(), |v| format!(" {v}"));
        let about = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let head = format!("-{long}{value}");
        out.push_str(&format!("  {head:<28} {about}\n"));
    }
    let (board, kernel) = match guest {
        "x86_64" | "i386" => ("q35", "vmlinuz"),
        _ => ("virt", "Image"),
    };
    out.push_str(&format!(
        "\nexample:\n  mimus system {guest} -M {board} -m 1G -smp 2 -nographic -kernel {kernel} -initrd initrd.gz -append console=ttyS0\n"
    ));
    out
}

impl SystemArgs {
    /// The machine these options describe.
    pub fn into_config(self, guest: &str) -> anyhow::Result<MachineConfig> {
        let mut config = MachineConfig::new(guest);
        self.cpus_and_memory(&mut config)?;
        self.boot(&mut config)?;
        self.firmware(&mut config)?;
        self.disks_and_devices(&mut config)?;
        self.consoles(&mut config)?;
        config.rtc = self.rtc.as_deref().map(Rtc::parse).transpose()?.unwrap_or_default();
        config.icount = self.icount.as_deref().map(Icount::parse).transpose()?;
        config.seed = self.seed;
        (config.record, config.replay) = (self.record.clone(), self.replay.clone());
        config.trace = self.trace.clone();
        config.symbols = self.symbols.clone();
        crate::tracing::check(&config)?;
        config.no_reboot = self.no_reboot;
        config.no_shutdown = self.no_shutdown;
        config.start_paused = self.paused;
        config.no_defaults = self.nodefaults;
        config.gdb = self.gdb.clone().or(self.gdb_1234.then(|| "tcp::1234".to_owned()));
        crate::gdb::address(&config)?;
        config.name = self.name;
        config.log.items = self.log.as_deref().map(parse_log_items).transpose()?.unwrap_or_default();
        config.log.file = self.log_file;
        config.data_dirs = self.data_dir;
        config.pidfile = self.pidfile;
        config.validate()?;
        Ok(config)
    }

    fn cpus_and_memory(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        for text in &self.machine {
            let (machine, accels) = MachineType::parse(text)?;
            config.machine.name = machine.name.or(config.machine.name.take());
            config.machine.options.extend(machine.options);
            config.accels.extend(accels);
        }
        for text in &self.accel {
            config.accels.push(Accel::parse(text)?);
        }
        if self.enable_kvm {
            config.accels.push(Accel::parse("kvm")?);
        }
        config.cpu = self.cpu.clone();
        if let Some(text) = &self.smp {
            config.smp = Smp::parse(text)?;
        }
        if let Some(text) = &self.memory {
            config.memory = parse_memory(text)?;
        }
        self.host_memory(config)
    }

    fn host_memory(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        let given = parse_all(&self.object, MemoryBackend::parse)?;
        let mut id = None;
        config.machine.options.retain(|(key, value)| {
            let backend = key == "memory-backend";
            if backend {
                id = Some(value.clone());
            }
            !backend
        });
        let memory = &mut config.host_memory;
        self.overcommit.iter().try_for_each(|text| memory.overcommit(text))?;
        memory.choose(&given, id.as_deref())?;
        memory.prealloc = self.mem_prealloc;
        if let Some(path) = &self.mem_path {
            anyhow::ensure!(memory.backend.is_none(), "-mem-path: it does not go with -machine memory-backend=");
            let kind = MemoryKind::File { path: path.clone() };
            memory.backend = Some(MemoryBackend { id: "ram".into(), size: None, kind, share: false, prealloc: false });
        }
        match memory.backend.as_ref().and_then(|b| b.size) {
            Some(size) if self.memory.is_none() => config.memory = size,
            Some(size) if size != config.memory => anyhow::bail!(
                "-m {}: the memory backend has {} MiB: they must be the same, or leave -m out",
                self.memory.as_deref().unwrap_or_default(),
                size >> 20
            ),
            _ => {}
        }
        Ok(())
    }

    fn firmware(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        let firmware = &mut config.firmware;
        firmware.order = self.boot.as_deref().map(BootOrder::parse).transpose()?.unwrap_or_default();
        firmware.items = parse_all(&self.fw_cfg, FwCfgItem::parse)?;
        firmware.uuid = self.uuid.as_deref().map(uuid_option).transpose()?;
        firmware.smbios = parse_all(&self.smbios, parse_smbios)?.into_iter().flatten().collect();
        Ok(())
    }

    fn boot(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        let boot = &mut config.boot;
        boot.kernel = self.kernel.clone();
        boot.initrd = self.initrd.clone();
        boot.append = self.append.clone();
        boot.dtb = self.dtb.clone();
        boot.bios = match self.bios.as_deref() {
            None | Some("default") => Bios::Default,
            Some("none") => Bios::None,
            Some(file) => Bios::File(firmware_path(file, &self.data_dir)),
        };
        for (option, given) in [("-initrd", boot.initrd.is_some()), ("-append", boot.append.is_some())] {
            if given && boot.kernel.is_none() {
                anyhow::bail!("{option}: it goes with a kernel, and there is none: add -kernel FILE");
            }
        }
        Ok(())
    }

    fn disks_and_devices(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        config.snapshot = self.snapshot;
        if let Some(image) = &self.image {
            config.drives.push(Drive {
                file: Some(image.clone()),
                interface: DriveInterface::Virtio,
                ..Drive::default()
            });
        }
        config.drives.extend(parse_all(&self.drive, Drive::parse)?);
        config.netdevs = parse_all(&self.netdev, Netdev::parse)?;
        config.nics = parse_all(&self.nic, Nic::parse)?;
        config.chardevs = parse_all(&self.chardev, Chardev::parse)?;
        config.devices = self.device.clone();
        Ok(())
    }

    fn consoles(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        let shown = match self.display.as_deref() {
            None => true,
            Some("none") => false,
            Some(other) => anyhow::bail!(
                "-display {other}: there are no graphical displays (yet); use -nographic for the terminal, or -display none"
            ),
        };
        if let Some(text) = &self.debugcon {
            let id = match CharBackend::parse_legacy("-debugcon", text)? {
                CharBackend::Chardev { id } => id,
                backend => {
                    let id = "debugcon".to_owned();
                    config.chardevs.push(Chardev { id: id.clone(), mux: false, backend });
                    id
                }
            };
            config.devices.push(format!("isa-debugcon,chardev={id}"));
        }
        config.serials = parse_all(&self.serial, |t| CharBackend::parse_legacy("-serial", t))?;
        let monitor = self.monitor.as_deref().map(|t| CharBackend::parse_legacy("-monitor", t)).transpose()?;
        let stdio_taken = config.chardevs.iter().any(|c| matches!(c.backend, CharBackend::Stdio { .. }))
            || config.serials.iter().chain(&monitor).any(|b| matches!(b, CharBackend::Stdio { .. }));
        if config.serials.is_empty() && !self.nodefaults {
            // QEMU shows the serial port in a window unless told otherwise; ours is the terminal.
            let wanted = self.nographic || shown;
            config.serials.push(match (wanted, stdio_taken, &monitor) {
                (true, false, None) => CharBackend::Stdio { monitor: true, signal: false },
                (true, false, Some(_)) => CharBackend::Stdio { monitor: false, signal: false },
                _ => CharBackend::Null,
            });
        }
        config.monitor = monitor.unwrap_or_default();
        Ok(())
    }
}

/// `-bios NAME` is looked for as it is, then in the directories of `-L`.
fn firmware_path(name: &str, dirs: &[PathBuf]) -> PathBuf {
    let plain = PathBuf::from(name);
    if plain.exists() {
        return plain;
    }
    dirs.iter().map(|d| d.join(name)).find(|p| p.exists()).unwrap_or(plain)
}

fn parse_all<T>(texts: &[String], parse: impl Fn(&str) -> Result<T, ConfigError>) -> Result<Vec<T>, ConfigError> {
    texts.iter().map(|t| parse(t)).collect()
}

/// Parses the words after `mimus system <guest>`.
pub fn parse(words: Vec<std::ffi::OsString>) -> anyhow::Result<SystemArgs> {
    let words = crate::argv::rewrite(&SystemArgs::command(), words)?;
    SystemArgs::try_parse_from(words).map_err(|e| {
        let text = e.to_string();
        let line = text.lines().next().unwrap_or("the command line cannot be read");
        anyhow::anyhow!("{}", line.trim_start_matches("error: "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(line: &str) -> Result<MachineConfig, String> {
        let words = line.split_whitespace().map(Into::into).collect();
        parse(words).and_then(|a| a.into_config("riscv64")).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn a_full_line() {
        let c = config(
            "-M virt,accel=tcg --cpu=max -m 2G -smp 4 -nographic -kernel K -initrd I -append console=ttyS0 \
             -drive file=d.img,if=virtio,format=raw -device virtio-rng-device -netdev user,id=n0 -no-reboot -S -name x",
        )
        .unwrap();
        assert_eq!((c.memory, c.smp.cpus, c.cpu.as_deref()), (2 << 30, 4, Some("max")));
        assert_eq!(c.serials, [CharBackend::Stdio { monitor: true, signal: false }]);
        assert_eq!(c.accels[0].name, "tcg");
        assert!(c.no_reboot && c.start_paused && c.drives.len() == 1 && c.devices.len() == 1);
    }

    #[test]
    fn consoles_follow_qemu() {
        use CharBackend as B;
        let (mux, plain) = (B::Stdio { monitor: true, signal: false }, B::Stdio { monitor: false, signal: false });
        assert_eq!(config("").unwrap().serials, [mux]);
        assert_eq!(config("-nographic -monitor none").unwrap().serials, [plain]);
        assert_eq!(config("-display none").unwrap().serials, [B::Null]);
        let c = config("-monitor stdio").unwrap();
        assert_eq!((c.serials, c.monitor), (vec![B::Null], B::Stdio { monitor: false, signal: true }));
        let c = config("-debugcon stdio -device isa-debug-exit").unwrap();
        assert_eq!((c.chardevs[0].id.as_str(), c.serials), ("debugcon", vec![B::Null]));
        assert_eq!(c.devices, ["isa-debug-exit", "isa-debugcon,chardev=debugcon"]);
        let c = config("-debugcon chardev:x -chardev null,id=x").unwrap();
        assert_eq!((c.chardevs.len(), c.devices), (1, vec!["isa-debugcon,chardev=x".to_owned()]));
        assert!(config("-serial stdio -monitor stdio").unwrap_err().contains("mon:stdio"));
        assert!(config("-display gtk").unwrap_err().contains("-nographic"));
    }

    #[test]
    fn later_options_win() {
        let c = config("-m 1G -m 2G -kernel a -kernel b").unwrap();
        assert_eq!((c.memory, c.boot.kernel), (2 << 30, Some("b".into())));
    }

    #[test]
    fn memory_from_elsewhere() {
        let c = config("-object memory-backend-memfd,id=m,size=1G -M virt,memory-backend=m -overcommit mem-lock=on")
            .unwrap();
        assert_eq!((c.memory, c.host_memory.backend.unwrap().id), (1 << 30, "m".to_owned()));
        assert!(c.machine.options.is_empty());
        let twice = "-m 2G -object memory-backend-ram,id=m,size=1G -M virt,memory-backend=m";
        assert!(config(twice).unwrap_err().contains("1024 MiB"));
        assert!(config("-M virt,memory-backend=m").unwrap_err().contains("-object memory-backend-ram"));
        assert!(config("-object memory-backend-ram,id=m").unwrap_err().contains("nothing uses it"));
        let c = config("-mem-path /dev/shm -mem-prealloc").unwrap();
        assert!(c.host_memory.prealloc && c.host_memory.backend.is_some());
    }

    #[test]
    fn what_goes_with_a_kernel() {
        assert!(config("-initrd x").unwrap_err().contains("add -kernel"));
    }

    #[test]
    fn debuggers() {
        assert_eq!(config("-s").unwrap().gdb.as_deref(), Some("tcp::1234"));
        assert_eq!(config("-s -gdb unix:/x").unwrap().gdb.as_deref(), Some("unix:/x"));
        assert_eq!(config("").unwrap().gdb, None);
        assert!(config("-gdb stdio").unwrap_err().contains("-serial none -monitor none"));
        let c = config("-gdb stdio -serial none -monitor none").unwrap();
        assert_eq!(c.gdb.as_deref(), Some("stdio"));
    }

    #[test]
    fn help_is_short_and_complete() {
        let text = help("riscv64");
        assert!(text.lines().count() <= 75, "{}", text.lines().count());
        for option in ["-m SIZE", "-kernel FILE", "-no-reboot", "-S ", "-drive"] {
            assert!(text.contains(option), "{option}\n{text}");
        }
    }
}
