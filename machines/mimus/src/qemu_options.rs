//! The options of QEMU 10 that mimus does not have, each with what to do instead.

/// (option, what to do instead)
const MISSING: &[(&str, &str)] = &[
    ("preconfig", "give the whole machine on the command line"),
    ("action", "use -no-reboot and -no-shutdown"),
    ("add-fd", "name files by their path"),
    ("audio", "there is no sound device"),
    ("audiodev", "there is no sound device"),
    ("blockdev", "use -drive file=…,if=none,id=…"),
    ("boot", "say what to boot with -kernel, -bios or -drive"),
    ("cdrom", "use -drive file=…,media=cdrom,readonly=on"),
    ("compat", "deprecated features are not there at all"),
    (
        "daemonize",
        "start it in the background with the shell's & or a service manager",
    ),
    ("debugcon", "use -serial"),
    ("dfilter", "filter the log of -d afterwards"),
    ("dump-vmstate", "there is no migration format yet"),
    ("echr", "the escape character is Ctrl-A"),
    (
        "enable-sync-profile",
        "use a profiler of the host, for example perf",
    ),
    ("fda", "there is no floppy controller"),
    ("fdb", "there is no floppy controller"),
    (
        "fsdev",
        "put the files on a disk image, or fetch them through the network",
    ),
    (
        "full-screen",
        "there is no graphical display; the console is the terminal",
    ),
    ("fw_cfg", "pass data to the guest by -append or a disk"),
    (
        "gdb",
        "there is no debugger stub yet; -d in_asm,int logs what runs",
    ),
    ("global", "set the property with -device NAME,key=value"),
    ("hda", "use -drive file=…,if=virtio"),
    ("hdb", "use -drive file=…,if=virtio"),
    ("hdc", "use -drive file=…,if=virtio"),
    ("hdd", "use -drive file=…,if=virtio"),
    ("icount", "there is no deterministic mode yet"),
    ("incoming", "there is no migration yet"),
    ("iscsi", "attach the disk on the host and use -drive"),
    ("jitdump", "use -d out_asm"),
    (
        "k",
        "there is no graphical display; the terminal has your keyboard layout",
    ),
    ("loadvm", "there are no saved states yet"),
    ("mem-path", "guest RAM is anonymous memory"),
    (
        "mem-prealloc",
        "guest RAM is allocated when the guest touches it",
    ),
    ("mon", "use -monitor stdio or -serial mon:stdio"),
    ("msg", "messages are one line each"),
    ("mtdblock", "use -drive if=pflash"),
    ("net", "use -nic user or -nic none"),
    (
        "no-user-config",
        "there are no configuration files to leave out; drop the option",
    ),
    ("numa", "machines have one memory node"),
    (
        "object",
        "there are no objects to name; drop it or see -help",
    ),
    ("only-migratable", "there is no migration yet"),
    ("option-rom", "there are no option ROMs"),
    (
        "overcommit",
        "guest RAM is allocated when the guest touches it",
    ),
    ("parallel", "there is no parallel port"),
    ("perfmap", "use -d out_asm"),
    ("pflash", "use -drive if=pflash,format=raw,file=…"),
    (
        "plugin",
        "there is no plugin interface yet; see -d help for logs",
    ),
    (
        "qmp",
        "there is no management protocol yet; use -monitor stdio",
    ),
    (
        "qmp-pretty",
        "there is no management protocol yet; use -monitor stdio",
    ),
    ("readconfig", "give the options on the command line"),
    (
        "run-with",
        "use the service manager's settings (user, chroot)",
    ),
    (
        "s",
        "there is no debugger stub yet; -d in_asm,int logs what runs",
    ),
    ("sandbox", "use the service manager's sandbox"),
    ("sd", "use -drive if=virtio"),
    (
        "seed",
        "take the guest's random numbers from -device virtio-rng-device",
    ),
    ("semihosting", "use the serial port"),
    ("semihosting-config", "use the serial port"),
    ("set", "set the property in the option itself"),
    ("shim", "boot the kernel with -kernel alone"),
    ("smbios", "the machine describes itself by its device tree"),
    (
        "spice",
        "there is no remote display; use -serial and ssh through -nic user,hostfwd=…",
    ),
    ("tpmdev", "there is no TPM"),
    ("trace", "use -d"),
    ("usb", "there is no USB; use virtio devices"),
    ("usbdevice", "there is no USB; use virtio devices"),
    ("uuid", "set an identity in the guest"),
    (
        "vga",
        "there is no graphics card; the console is the serial port",
    ),
    (
        "virtfs",
        "put the files on a disk image, or fetch them through the network",
    ),
    (
        "vnc",
        "there is no remote display; use -serial and ssh through -nic user,hostfwd=…",
    ),
    ("watchdog-action", "there is no watchdog"),
    ("win2k-hack", "there is no IDE disk"),
    (
        "acpitable",
        "the machine describes itself by its device tree",
    ),
    ("no-fd-bootchk", "there is no floppy controller"),
    ("xen-attach", "use -accel tcg or -accel kvm"),
    ("xen-domid", "use -accel tcg or -accel kvm"),
    ("xen-domid-restrict", "use -accel tcg or -accel kvm"),
    ("prom-env", "pass arguments with -append"),
    ("g", "there is no graphics card"),
];

/// What to do instead of the option `name`, if it is one of QEMU's that mimus lacks.
pub fn missing(name: &str) -> Option<&'static str> {
    MISSING
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, instead)| *instead)
}

/// The names in the table.
pub fn names() -> impl Iterator<Item = &'static str> {
    MISSING.iter().map(|(n, _)| *n)
}
