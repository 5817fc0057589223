//! Reads slices of tensors from open files, in parallel where they are large.

use std::{
    fs::File,
    num::NonZero,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
};

use half::{bf16, f16};
use phalanx_proto::{
    checkpoint::{Checkpoint, Dtype, TensorEntry},
    layout::TensorSlice,
};

use super::{
    ReadError,
    finite::Values,
    spans::{SPAN_BYTES, Span, Spans},
};

/// Most threads that read one tensor. More only pile up in the page cache's copy.
const MAX_READ_THREADS: usize = 4;
/// Tensors smaller than this are read by the calling thread alone, in bytes.
const PARALLEL_BYTES: usize = 4 * SPAN_BYTES;

/// A checkpoint's files, open.
pub(super) struct Files<'a> {
    checkpoint: &'a Checkpoint,
    /// Parallel to [`Checkpoint::files`].
    files: Vec<File>,
    threads: usize,
}

/// What is left to read of one tensor, shared by the threads that read it.
struct Work<'a, T> {
    /// Absent once a thread has failed, so that the others stop as well.
    spans: Option<Spans>,
    /// Elements of the destination that no thread has taken yet.
    rest: &'a mut [T],
}

impl<'a> Files<'a> {
    /// Opens every file that is long enough for its header.
    pub(super) fn open(checkpoint: &'a Checkpoint) -> Result<Self, ReadError> {
        checkpoint.check_complete()?;
        let open = |path: &PathBuf| File::open(path).map_err(|source| ReadError::Open { path: path.clone(), source });
        let files = checkpoint.files.iter().map(|file| open(&file.path)).collect::<Result<_, _>>()?;
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_READ_THREADS);
        Ok(Self { checkpoint, files, threads })
    }

    /// A dense slice as bf16; the tensor must be bf16.
    pub(super) fn read_bf16(&self, slice: &TensorSlice, entry: &TensorEntry) -> Result<Vec<bf16>, ReadError> {
        self.read(slice, entry, |from, to| convert(from, to, bf16::from_le_bytes))
    }

    /// A slice of bytes.
    pub(super) fn read_bytes(&self, slice: &TensorSlice, entry: &TensorEntry) -> Result<Vec<u8>, ReadError> {
        self.read(slice, entry, |from, to: &mut [u8]| to.copy_from_slice(from))
    }

    /// A slice of any type as f32.
    pub(super) fn read_as_f32(&self, slice: &TensorSlice, entry: &TensorEntry) -> Result<Vec<f32>, ReadError> {
        match entry.dtype {
            Dtype::BF16 => {
                self.read(slice, entry, |from, to| convert(from, to, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32()))
            }
            Dtype::F16 => {
                self.read(slice, entry, |from, to| convert(from, to, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()))
            }
            Dtype::F32 => self.read(slice, entry, |from, to| convert(from, to, f32::from_le_bytes)),
            Dtype::U8 => self.read(slice, entry, |from, to| convert(from, to, |b: [u8; 1]| f32::from(b[0]))),
        }
    }

    /// Reads a slice, letting `convert` turn stretches of the file's bytes into equally many elements.
    fn read<T: Clone + Default + Send>(
        &self,
        slice: &TensorSlice,
        entry: &TensorEntry,
        convert: impl Fn(&[u8], &mut [T]) + Sync,
    ) -> Result<Vec<T>, ReadError> {
        let elements = slice.elements();
        let mut values = Vec::new();
        values
            .try_reserve_exact(elements)
            .map_err(|_| ReadError::OutOfMemory { name: slice.name.clone(), bytes: elements * size_of::<T>() })?;
        values.resize(elements, T::default());
        let element = entry.dtype.bytes();
        let work = Mutex::new(Work { spans: Some(Spans::new(slice, element)), rest: &mut values });
        let drain = || self.drain(&slice.name, entry, &work, &convert);
        let threads = if elements * element < PARALLEL_BYTES { 1 } else { self.threads };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(drain)).collect();
            let mine = drain();
            others.into_iter().fold(mine, |result, other| {
                result.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        })?;
        Ok(values)
    }

    /// Reads spans until none is left.
    fn drain<T>(
        &self,
        name: &str,
        entry: &TensorEntry,
        work: &Mutex<Work<'_, T>>,
        convert: &impl Fn(&[u8], &mut [T]),
    ) -> Result<(), ReadError> {
        let element = entry.dtype.bytes();
        let mut buffer = Vec::new();
        loop {
            let (span, target) = {
                let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(span) = work.spans.as_mut().and_then(Iterator::next) else { return Ok(()) };
                let elements = span.kept.iter().map(ExactSizeIterator::len).sum::<usize>() / element;
                let (target, rest) = std::mem::take(&mut work.rest).split_at_mut(elements);
                work.rest = rest;
                (span, target)
            };
            if let Err(error) = self.fetch(name, entry, &span, &mut buffer) {
                work.lock().unwrap_or_else(PoisonError::into_inner).spans = None;
                return Err(error);
            }
            let mut left = target;
            for kept in span.kept {
                let (now, later) = left.split_at_mut(kept.len() / element);
                convert(&buffer[kept], now);
                left = later;
            }
        }
    }

    /// Reads one span and checks what it keeps.
    fn fetch(&self, name: &str, entry: &TensorEntry, span: &Span, buffer: &mut Vec<u8>) -> Result<(), ReadError> {
        buffer.resize(span.len, 0);
        let offset = entry.offset + span.offset;
        let place = || (self.checkpoint.files[entry.file].path.clone(), name.to_owned());
        self.files[entry.file].read_exact_at(buffer, offset).map_err(|source| {
            let (path, name) = place();
            ReadError::Read { path, name, offset, len: span.len, source }
        })?;
        let values = Values::of(entry.dtype, name);
        let bad = |kept: &Range<usize>| Some(kept.start + values.first_not_finite(&buffer[kept.clone()])?);
        match span.kept.iter().find_map(bad) {
            None => Ok(()),
            Some(at) => {
                let (path, name) = place();
                Err(ReadError::NotFinite { path, name, offset: offset + at as u64 })
            }
        }
    }
}

fn convert<const N: usize, T>(from: &[u8], to: &mut [T], element: impl Fn([u8; N]) -> T) {
    for (bytes, value) in from.as_chunks::<N>().0.iter().zip(to) {
        *value = element(*bytes);
    }
}
