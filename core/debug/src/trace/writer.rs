//! Writing: the thread that encodes and writes, and the buffers between it and the vCPUs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use mimus_core::accel::{TraceSink, TracedCode, VcpuIndex};

use super::encode::Encoder;
use super::file::{Code, Header, Section, TraceError, write_header};
use super::filter::{Filter, Sieve};

/// Buffers that may wait for the thread: then vCPUs wait.
const WAITING: usize = 6;

enum Message {
    Code(Code),
    Words { vcpu: u32, buffer: Vec<u32>, used: usize, now: u64 },
    End,
}

/// What has been written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Words of the vCPUs, before filters.
    pub words: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// A trace that is being written to a file.
pub struct TraceWriter {
    path: PathBuf,
    messages: SyncSender<Message>,
    empty: Mutex<Receiver<Vec<u32>>>,
    thread: Mutex<Option<JoinHandle<Result<Written, TraceError>>>>,
}

impl TraceWriter {
    /// Makes the file and the thread.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path, header: &Header, filter: Filter) -> Result<Arc<TraceWriter>, TraceError> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        write_header(&mut file, header)?;
        let (messages, receiver) = sync_channel(WAITING);
        let (give_back, empty) = channel();
        let state = Writing {
            file,
            filter,
            encoders: HashMap::new(),
            offsets: Vec::new(),
            written: Written::default(),
            kept: Vec::new(),
            count: 0,
        };
        let thread =
            std::thread::Builder::new().name("trace".to_owned()).spawn(move || run(state, &receiver, &give_back))?;
        Ok(Arc::new(TraceWriter {
            path: path.to_owned(),
            messages,
            empty: Mutex::new(empty),
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the file and waits until it is written. No vCPU traces any more.
    ///
    /// # Errors
    /// Writing failed, now or before.
    pub fn finish(&self) -> Result<Written, TraceError> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return Ok(Written::default()) };
        // If the thread has ended, it has an error to tell.
        let _ = self.messages.send(Message::End);
        thread.join().unwrap_or(Err(TraceError::Damaged("its thread panicked")))
    }
}

impl TraceSink for TraceWriter {
    fn define(&self, code: TracedCode<'_>) {
        let _ = self.messages.send(Message::Code(code.into()));
    }

    fn take(&self, vcpu: VcpuIndex, buffer: Vec<u32>, used: usize, now: u64) -> Vec<u32> {
        let len = buffer.len();
        let message = Message::Words { vcpu: vcpu.0, buffer, used, now };
        if self.messages.send(message).is_err() {
            // Writing has failed: `finish` says so.
            return vec![0; len];
        }
        let back = self.empty.lock().unwrap_or_else(PoisonError::into_inner).try_recv();
        back.unwrap_or_else(|_| vec![0; len])
    }
}

/// The thread's state.
struct Writing {
    file: BufWriter<File>,
    filter: Filter,
    encoders: HashMap<u32, (Encoder, Sieve)>,
    /// Page offset of each number's code.
    offsets: Vec<u16>,
    written: Written,
    kept: Vec<u32>,
    /// Words written.
    count: u64,
}

fn run(mut state: Writing, messages: &Receiver<Message>, empty: &Sender<Vec<u32>>) -> Result<Written, TraceError> {
    while let Ok(message) = messages.recv() {
        match message {
            Message::Code(code) => state.code(code)?,
            Message::Words { vcpu, buffer, used, now } => {
                state.words(vcpu, &buffer[..used.min(buffer.len())], now)?;
                let _ = empty.send(buffer);
            }
            Message::End => break,
        }
    }
    state.written.bytes += Section::End { count: state.count }.write(&mut state.file)?;
    state.file.flush()?;
    Ok(state.written)
}

impl Writing {
    fn code(&mut self, code: Code) -> Result<(), TraceError> {
        let at = code.id as usize;
        if !self.filter.code.is_empty() {
            if self.offsets.len() <= at {
                self.offsets.resize(at + 1, 0);
            }
            self.offsets[at] = code.offset;
        }
        self.written.bytes += Section::Code(code).write(&mut self.file)?;
        Ok(())
    }

    fn words(&mut self, vcpu: u32, words: &[u32], now: u64) -> Result<(), TraceError> {
        self.written.words += words.len() as u64;
        if !self.filter.vcpu(vcpu) {
            return Ok(());
        }
        let (encoder, sieve) = self.encoders.entry(vcpu).or_default();
        let words = if self.filter.is_empty() {
            words
        } else {
            self.kept.clear();
            let offsets = &self.offsets;
            let offset = |id: u32| offsets.get(id as usize).copied().unwrap_or(0);
            sieve.apply(&self.filter, offset, words, &mut self.kept);
            &self.kept
        };
        let out = encoder.encode(words);
        self.count += out.count;
        let chunk = Section::Chunk { vcpu, now, count: out.count, words: out.words, args: out.args };
        self.written.bytes += chunk.write(&mut self.file)?;
        Ok(())
    }
}
