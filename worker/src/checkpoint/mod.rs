//! Reads this rank's slices of a checkpoint's tensors.
//!
//! Only the byte ranges that [`RankLayout`] names are read, with positioned reads from a few threads. Where each
//! tensor lies comes from the headers ([`Checkpoint`]); what to do with the values is the model's business.

mod files;
mod finite;
mod spans;

use std::{collections::BTreeMap, path::PathBuf};

use phalanx_proto::{
    checkpoint::{Checkpoint, CheckpointError, Dtype, TensorEntry},
    layout::{RankLayout, TensorSlice},
};
use thiserror::Error;

use self::files::Files;
use crate::backend::{DenseData, DenseMatrix};

/// Why a tensor could not be read. Every message names the file and the tensor.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The headers promise what is not there.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file cannot be opened.
    #[error("{path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Bytes cannot be read, or the file ended before them.
    #[error("{path}: tensor {name}: reading {len} bytes at {offset}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// First byte within the file.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A weight is infinite or not a number.
    #[error("{path}: tensor {name}: the value at byte {offset} is infinite or not a number")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The value's first byte within the file.
        offset: u64,
    },
    /// There is no memory for the tensor.
    #[error("tensor {name}: no memory for {bytes} bytes")]
    OutOfMemory {
        /// The tensor.
        name: String,
        /// Bytes asked for.
        bytes: usize,
    },
    /// The layout has no such tensor; a bug.
    #[error("tensor {name} is not part of the layout")]
    Unknown {
        /// The tensor.
        name: String,
    },
}

/// How far loading has come, in bytes of the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedBytes {
    /// Read and made resident.
    pub loaded: u64,
    /// All that this rank will read.
    pub total: u64,
}

/// Bytes of the checkpoint that make up a rank's shard.
pub fn shard_bytes(checkpoint: &Checkpoint, layout: &RankLayout) -> u64 {
    layout.tensors(&checkpoint.geometry).iter().map(|slice| checkpoint.slice_bytes(slice)).sum()
}

/// One rank's view of a checkpoint: its slices by tensor name.
pub struct ShardReader<'a> {
    checkpoint: &'a Checkpoint,
    slices: BTreeMap<String, TensorSlice>,
    files: Files<'a>,
    progress: &'a dyn Fn(LoadedBytes),
    loaded: LoadedBytes,
}

impl<'a> ShardReader<'a> {
    /// Opens a checkpoint's files for reading the slices that `layout` names. `progress` is told after each tensor.
    ///
    /// # Errors
    /// When a file cannot be opened or is shorter than its header says.
    pub fn open(
        checkpoint: &'a Checkpoint,
        layout: &RankLayout,
        progress: &'a dyn Fn(LoadedBytes),
    ) -> Result<Self, ReadError> {
        let slices = layout.tensors(&checkpoint.geometry).into_iter();
        Ok(Self {
            checkpoint,
            slices: slices.map(|slice| (slice.name.clone(), slice)).collect(),
            files: Files::open(checkpoint)?,
            progress,
            loaded: LoadedBytes { loaded: 0, total: shard_bytes(checkpoint, layout) },
        })
    }

    /// This rank's part of a matrix, in the checkpoint's precision (f16 becomes f32).
    ///
    /// # Errors
    /// When the tensor cannot be read.
    pub fn matrix(&mut self, name: &str) -> Result<DenseMatrix, ReadError> {
        let (slice, entry) = self.find(name)?;
        let shape = slice.held_shape();
        let data = match entry.dtype {
            Dtype::BF16 => DenseData::Bf16(self.files.read_bf16(slice, entry)?),
            _ => DenseData::F32(self.files.read_as_f32(slice, entry)?),
        };
        self.report(name);
        let columns = shape.last().copied().unwrap_or(1);
        Ok(DenseMatrix { rows: shape[..shape.len().saturating_sub(1)].iter().product(), columns, data })
    }

    /// This rank's part of a dense tensor as f32, row-major.
    ///
    /// # Errors
    /// When the tensor cannot be read.
    pub fn values(&mut self, name: &str) -> Result<Vec<f32>, ReadError> {
        let (slice, entry) = self.find(name)?;
        let values = self.files.read_as_f32(slice, entry)?;
        self.report(name);
        Ok(values)
    }

    /// This rank's part of a tensor of bytes, row-major.
    ///
    /// # Errors
    /// When the tensor cannot be read.
    pub fn bytes(&mut self, name: &str) -> Result<Vec<u8>, ReadError> {
        let (slice, entry) = self.find(name)?;
        let bytes = self.files.read_bytes(slice, entry)?;
        self.report(name);
        Ok(bytes)
    }

    fn find(&self, name: &str) -> Result<(&TensorSlice, &TensorEntry), ReadError> {
        let found = self.slices.get(name).zip(self.checkpoint.tensors.get(name));
        found.ok_or_else(|| ReadError::Unknown { name: name.to_owned() })
    }

    fn report(&mut self, name: &str) {
        self.loaded.loaded += self.slices.get(name).map_or(0, |slice| self.checkpoint.slice_bytes(slice));
        (self.progress)(self.loaded);
    }
}
