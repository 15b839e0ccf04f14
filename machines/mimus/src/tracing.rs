//! `-trace` and the monitor's `trace`: from words to a trace being written.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{anyhow, bail};
use mimus_core::accel::{AccelVm, TraceKinds, TraceSink, VcpuIndex};
use mimus_core::error::why_not_made;
use mimus_core::vcpu::VcpuThreads;
use mimus_debug::trace::{Filter, Header, TraceError, TraceWriter};
use mimus_machines::config::keyval::nearest;
use mimus_machines::config::{KeyValues, MachineConfig};

const KEYS: [&str; 7] = ["what", "range", "pc", "addr", "space", "vcpu", "mode"];

/// What `-trace FILE,what=…,…` asks for.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    file: PathBuf,
    kinds: TraceKinds,
    filter: Filter,
    /// The filters, as written.
    text: String,
}

fn parse(text: &str) -> anyhow::Result<Wanted> {
    let mut kv = KeyValues::parse("-trace", text, Some("file"))?;
    let file = kv.take("file").ok_or_else(|| anyhow!("-trace {text}: the file is missing: -trace FILE,what=blocks"))?;
    let mut kinds = TraceKinds { exceptions: true, ..TraceKinds::default() };
    let mut filter = Filter::default();
    let mut filters = Vec::new();
    for (key, value) in kv.rest() {
        if key == "what" {
            for word in value.split('+') {
                match word {
                    "blocks" | "insns" | "exceptions" => {}
                    "mem" => kinds.memory = true,
                    "devices" => kinds.devices = true,
                    "all" => (kinds.memory, kinds.devices) = (true, true),
                    _ => bail!("-trace what={word}: there are blocks, insns, mem, exceptions, devices and all"),
                }
            }
            continue;
        }
        match filter.add(&key, &value) {
            Some(result) => result.map_err(|e| anyhow!("-trace {key}={value}: {e}"))?,
            None => {
                let near = nearest(&key, KEYS.into_iter()).map_or(String::new(), |n| format!("; did you mean {n}?"));
                bail!("-trace {key}={value}: there is no such key{near}; there are {}", KEYS.join(", "));
            }
        }
        filters.push(format!("{key}={value}"));
    }
    Ok(Wanted { file: file.into(), kinds, filter, text: filters.join(",") })
}

/// Checks `-trace` before anything is built.
pub fn check(config: &MachineConfig) -> anyhow::Result<()> {
    config.trace.as_deref().map_or(Ok(()), |text| parse(text).map(drop))
}

/// The trace of a machine, if one is being made.
pub struct Tracing {
    guest: String,
    vm: Arc<dyn AccelVm>,
    threads: VcpuThreads,
    writer: Mutex<Option<Arc<TraceWriter>>>,
}

impl Tracing {
    /// None is.
    pub fn new(guest: &str, vm: Arc<dyn AccelVm>, threads: VcpuThreads) -> Tracing {
        Tracing { guest: guest.to_owned(), vm, threads, writer: Mutex::new(None) }
    }

    /// Whether one is being made.
    pub fn is_on(&self) -> bool {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn sync(&self) -> anyhow::Result<()> {
        for vcpu in (0..self.threads.count() as u32).map(VcpuIndex) {
            self.threads.run_on_sync(vcpu, |v| v.sync_trace())?;
        }
        Ok(())
    }

    /// Starts one; `text` is what `-trace` takes. The machine is paused.
    pub fn start(&self, text: &str) -> anyhow::Result<String> {
        let wanted = parse(text)?;
        let tracer = self.vm.tracer();
        let tracer = tracer.ok_or_else(|| anyhow!("-trace: only the translator traces; use -accel tcg"))?;
        let mut place = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = &*place {
            bail!("{} is being written already; end it with: trace stop", writer.path().display());
        }
        let header = Header::new(&self.guest, wanted.kinds, wanted.text);
        let writer = TraceWriter::create(&wanted.file, &header, wanted.filter)
            .map_err(|e| anyhow!("-trace {}: {}", wanted.file.display(), why_not_traced(&wanted.file, &e)))?;
        let sink: Arc<dyn TraceSink> = writer.clone();
        tracer.start_trace(wanted.kinds, sink);
        self.sync()?;
        *place = Some(writer);
        Ok(format!("tracing to {}", wanted.file.display()))
    }

    /// Ends the one there is, and says what was written. The machine is paused.
    pub fn stop(&self) -> anyhow::Result<Option<String>> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(writer), Some(tracer)) = (writer, self.vm.tracer()) else { return Ok(None) };
        tracer.stop_trace();
        self.sync()?;
        let path = writer.path().display();
        let written = writer.finish().map_err(|e| {
            let advice = if let TraceError::Io(e) = &e { on_full_disk(e) } else { "" };
            anyhow!("trace {path}: {e}{advice}")
        })?;
        Ok(Some(format!("trace {path}: {} words in {} bytes", written.words, written.bytes)))
    }
}

fn why_not_traced(file: &Path, e: &TraceError) -> String {
    match e {
        TraceError::Io(e) => why_not_made(file, e),
        e => e.to_string(),
    }
}

/// What to do about an error of writing, where that is known.
pub fn on_full_disk(e: &std::io::Error) -> &'static str {
    match e.kind() {
        std::io::ErrorKind::StorageFull => "; free some space, or name a file on a larger disk",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let w = parse("out.trc,what=blocks+mem,range=0x1000-0x1fff,vcpu=1").unwrap();
        assert!(w.kinds.memory && w.kinds.exceptions && !w.kinds.devices);
        assert_eq!((w.filter.code, w.filter.vcpus), (vec![(0x1000, 0x2000)], vec![1]));
        assert_eq!(w.text, "range=0x1000-0x1fff,vcpu=1");
        for (text, says) in [
            ("what=mem", "file is missing"),
            ("x,what=men", "there are blocks"),
            ("x,rnge=1", "did you mean range?"),
            ("x,range=z", "not a number"),
        ] {
            assert!(parse(text).unwrap_err().to_string().contains(says), "{text}");
        }
    }
}
