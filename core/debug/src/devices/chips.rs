//! What is known of chips: one row each, fields from the highest bit down.

use super::{Chip, Field as F, Register as R};

/// All chips whose registers have names here.
pub const CHIPS: &[Chip] = &[
    Chip {
        schema: "ns16550a",
        about: "UART (National PC16550D data sheet)",
        registers: &[
            R("IER", "ier", &[F("EDSSI", 3, 1), F("ELSI", 2, 1), F("ETBEI", 1, 1), F("ERBFI", 0, 1)]),
            R("FCR", "fcr", &[F("RCVR_TRIGGER", 6, 2), F("DMA_MODE_SELECT", 3, 1), F("FIFO_ENABLE", 0, 1)]),
            R(
                "LCR",
                "lcr",
                &[
                    F("DLAB", 7, 1),
                    F("SET_BREAK", 6, 1),
                    F("STICK_PARITY", 5, 1),
                    F("EPS", 4, 1),
                    F("PEN", 3, 1),
                    F("STB", 2, 1),
                    F("WLS", 0, 2),
                ],
            ),
            R("MCR", "mcr", &[F("LOOP", 4, 1), F("OUT2", 3, 1), F("OUT1", 2, 1), F("RTS", 1, 1), F("DTR", 0, 1)]),
            R(
                "MSR",
                "msr",
                &[
                    F("DCD", 7, 1),
                    F("RI", 6, 1),
                    F("DSR", 5, 1),
                    F("CTS", 4, 1),
                    F("DDCD", 3, 1),
                    F("TERI", 2, 1),
                    F("DDSR", 1, 1),
                    F("DCTS", 0, 1),
                ],
            ),
            R("SCR", "scr", &[]),
            R("DLM:DLL", "divisor", &[]),
        ],
    },
    Chip {
        schema: "mc146818",
        about: "real-time clock (Motorola MC146818A data sheet)",
        registers: &[
            R("REGISTER_A", "cmos/10", &[F("UIP", 7, 1), F("DV", 4, 3), F("RS", 0, 4)]),
            R(
                "REGISTER_B",
                "cmos/11",
                &[
                    F("SET", 7, 1),
                    F("PIE", 6, 1),
                    F("AIE", 5, 1),
                    F("UIE", 4, 1),
                    F("SQWE", 3, 1),
                    F("DM", 2, 1),
                    F("24/12", 1, 1),
                    F("DSE", 0, 1),
                ],
            ),
            R("REGISTER_C", "cmos/12", &[F("IRQF", 7, 1), F("PF", 6, 1), F("AF", 5, 1), F("UF", 4, 1)]),
            R("REGISTER_D", "cmos/13", &[F("VRT", 7, 1)]),
        ],
    },
    Chip {
        schema: "hpet",
        about: "HPET (IA-PC HPET specification 1.0a)",
        registers: &[
            R("GEN_CONF", "config", &[F("LEG_RT_CNF", 1, 1), F("ENABLE_CNF", 0, 1)]),
            R("GINTR_STA", "status", &[F("T2_INT_STS", 2, 1), F("T1_INT_STS", 1, 1), F("T0_INT_STS", 0, 1)]),
            R("MAIN_CNT", "counter", &[]),
            R(
                "Tn_CONFIG",
                "timers/*/config",
                &[
                    F("FSB_EN_CNF", 14, 1),
                    F("INT_ROUTE_CNF", 9, 5),
                    F("T0_32MODE_CNF", 8, 1),
                    F("VAL_SET_CNF", 6, 1),
                    F("TYPE_CNF", 3, 1),
                    F("T0_INT_ENB_CNF", 2, 1),
                    F("INT_TYPE_CNF", 1, 1),
                ],
            ),
            R("Tn_COMPARATOR", "timers/*/comparator", &[]),
            R("Tn_FSB_ROUTE", "timers/*/fsb", &[]),
        ],
    },
    Chip {
        schema: "acpi-pm",
        about: "power management (ACPI 6.5, 4.8.3)",
        registers: &[
            R(
                "PM1_STS",
                "status",
                &[
                    F("WAK_STS", 15, 1),
                    F("RTC_STS", 10, 1),
                    F("SLPBTN_STS", 9, 1),
                    F("PWRBTN_STS", 8, 1),
                    F("GBL_STS", 5, 1),
                    F("BM_STS", 4, 1),
                    F("TMR_STS", 0, 1),
                ],
            ),
            R(
                "PM1_EN",
                "enable",
                &[F("RTC_EN", 10, 1), F("SLPBTN_EN", 9, 1), F("PWRBTN_EN", 8, 1), F("GBL_EN", 5, 1), F("TMR_EN", 0, 1)],
            ),
            R(
                "PM1_CNT",
                "control",
                &[F("SLP_EN", 13, 1), F("SLP_TYP", 10, 3), F("GBL_RLS", 2, 1), F("BM_RLD", 1, 1), F("SCI_EN", 0, 1)],
            ),
            R("SMI_EN", "smi_enable", &[F("APMC_EN", 5, 1), F("GBL_SMI_EN", 0, 1)]),
            R("SMI_STS", "smi_status", &[F("APM_STS", 5, 1)]),
            R("APM_CNT", "apm_control", &[]),
            R("APM_STS", "apm_status", &[]),
        ],
    },
    Chip {
        schema: "i8042",
        about: "keyboard controller (IBM PS/2 technical reference)",
        registers: &[
            R(
                "COMMAND_BYTE",
                "ccb",
                &[
                    F("TRANSLATE", 6, 1),
                    F("DISABLE_AUX", 5, 1),
                    F("DISABLE_KEYBOARD", 4, 1),
                    F("SYSTEM_FLAG", 2, 1),
                    F("ENABLE_AUX_INTERRUPT", 1, 1),
                    F("ENABLE_KEYBOARD_INTERRUPT", 0, 1),
                ],
            ),
            R(
                "OUTPUT_PORT",
                "output_port",
                &[F("OBF_AUX", 5, 1), F("OBF_KEYBOARD", 4, 1), F("A20", 1, 1), F("RESET#", 0, 1)],
            ),
        ],
    },
    Chip {
        schema: "goldfish-rtc",
        about: "real-time clock (goldfish virtual hardware)",
        registers: &[
            R("ALARM", "alarm", &[]),
            R("ALARM_STATUS", "alarm_running", &[]),
            R("IRQ_ENABLED", "irq_enabled", &[]),
            R("IRQ_PENDING", "irq_pending", &[]),
        ],
    },
    Chip { schema: "virtio-mmio", about: "virtio device (virtio 1.2, 4.2)", registers: VIRTIO },
    Chip { schema: "virtio-pci", about: "virtio device (virtio 1.2, 4.1)", registers: VIRTIO },
    Chip {
        schema: "i8254",
        about: "interval timer (Intel 8254 data sheet)",
        registers: &[
            R("Cn_COUNT", "channels/*/count", &[]),
            R("Cn_MODE", "channels/*/mode", &[]),
            R("Cn_BCD", "channels/*/bcd", &[]),
            R("Cn_RW", "channels/*/access", &[]),
            R("Cn_GATE", "channels/*/gate", &[]),
        ],
    },
    Chip {
        schema: "pci-config-ports",
        about: "configuration mechanism #1 (PCI 3.0, 3.2.2.3.2)",
        registers: &[R(
            "CONFIG_ADDRESS",
            "address",
            &[F("Enable", 31, 1), F("Bus", 16, 8), F("Device", 11, 5), F("Function", 8, 3), F("Register", 2, 6)],
        )],
    },
    // Interrupt controllers have a view of their own.
    Chip { schema: "i8259", about: "interrupt controllers (Intel 8259A); see: info irqchip", registers: &[] },
    Chip { schema: "ioapic", about: "I/O APIC (Intel 82093AA); see: info irqchip", registers: &[] },
    Chip { schema: "lapic", about: "local APICs (SDM volume 3 chapter 11); see: info irqchip", registers: &[] },
    Chip { schema: "riscv-plic", about: "interrupt controller (RISC-V PLIC); see: info irqchip", registers: &[] },
    Chip {
        schema: "riscv-aclint",
        about: "software interrupts and timers (RISC-V ACLINT); see: info irqchip",
        registers: &[],
    },
];

/// Registers of a virtio device behind any transport.
const VIRTIO: &[R] = &[
    R("InterruptStatus", "interrupt_status", &[F("CONFIG_CHANGE", 1, 1), F("USED_BUFFER", 0, 1)]),
    R(
        "Status",
        "virtio/status",
        &[
            F("FAILED", 7, 1),
            F("DEVICE_NEEDS_RESET", 6, 1),
            F("FEATURES_OK", 3, 1),
            F("DRIVER_OK", 2, 1),
            F("DRIVER", 1, 1),
            F("ACKNOWLEDGE", 0, 1),
        ],
    ),
    R(
        "DriverFeatures",
        "virtio/driver_features",
        &[F("VERSION_1", 32, 1), F("EVENT_IDX", 29, 1), F("INDIRECT_DESC", 28, 1)],
    ),
    R("QueueSel", "virtio/queue_select", &[]),
    R("QueueSizen", "virtio/queues/*/size", &[]),
    R("QueueReadyn", "virtio/queues/*/ready", &[]),
    R("QueueDescn", "virtio/queues/*/desc", &[]),
    R("QueueDrivern", "virtio/queues/*/avail", &[]),
    R("QueueDevicen", "virtio/queues/*/used", &[]),
];
