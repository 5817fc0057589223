//! Activations on the device.

use std::{cell::RefCell, sync::Arc};

use super::{driver::Address, driver::Driver, memory::Pooled};

/// How a value lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    Bf16,
}

impl Element {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Activations `[rows, width]`, or columns of wider ones.
pub struct Tensor<D: Driver> {
    pub(super) buffer: Arc<Pooled<D>>,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) element: Element,
    /// Values from one row to the next.
    pub(super) stride: usize,
    /// First column.
    pub(super) column: usize,
    /// What has yet to be added. A norm does it on its way; whoever else reads does it first.
    pub(super) addend: RefCell<Option<Arc<Pooled<D>>>>,
}

impl<D: Driver> Tensor<D> {
    /// All of a buffer.
    pub(super) fn whole(buffer: Pooled<D>, rows: usize, width: usize, element: Element) -> Self {
        let buffer = Arc::new(buffer);
        Self { buffer, rows, width, element, stride: width, column: 0, addend: RefCell::default() }
    }

    /// Columns of the same values.
    pub(super) fn columns(&self, column: usize, width: usize) -> Self {
        let (buffer, addend) = (Arc::clone(&self.buffer), RefCell::default());
        let (rows, element, stride) = (self.rows, self.element, self.stride);
        Self { buffer, rows, width, element, stride, column: self.column + column, addend }
    }

    /// Where the first value is.
    pub(super) fn address(&self) -> Address {
        self.buffer.address().offset(self.column * self.element.bytes())
    }

    /// Whether rows follow each other without a gap.
    pub(super) fn is_dense(&self) -> bool {
        self.stride == self.width
    }
}
