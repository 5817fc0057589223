//! Dense matrices: projections, router, unembedding; and the embedding table.

use half::bf16;
use phalanx_proto::ids::TokenId;

use super::{
    panels::{BLOCK, Dense, PANEL_ROWS, Panels},
    product::{Outputs, Product},
    rows::{PackedRows, Selection},
    simd::{Level, pool::Pool},
};
use crate::backend::{BackendError, DenseData, DenseMatrix};

/// A resident matrix `[out, in]` with its bias.
pub struct Linear {
    panels: Panels<Dense>,
    /// Rows of the matrix.
    outputs: usize,
    /// Padded to whole panels; zeros where there is none.
    bias: Vec<f32>,
}

impl Linear {
    /// Makes a matrix resident.
    pub(super) fn new(pool: &mut Pool, weight: &DenseMatrix, bias: Option<Vec<f32>>) -> Result<Self, BackendError> {
        let mut bias = bias.unwrap_or_else(|| vec![0.0; weight.rows]);
        if bias.len() != weight.rows {
            return Err(BackendError::Operation {
                operation: "load_linear",
                message: format!("a bias of {} for {} rows", bias.len(), weight.rows),
            });
        }
        bias.resize(weight.rows.next_multiple_of(PANEL_ROWS), 0.0);
        Ok(Self { panels: Panels::<Dense>::new(pool, weight)?, outputs: weight.rows, bias })
    }

    /// Columns of the matrix.
    pub(super) fn inputs(&self) -> usize {
        self.panels.columns
    }

    /// Rows of the matrix.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.panels.bytes() + size_of_val::<[f32]>(&self.bias)
    }

    /// `x Wᵀ + b` for `[rows, in]`; `packed` is memory to use again.
    pub(super) fn apply(&self, (pool, level): (&mut Pool, Level), x: &[f32], packed: &mut Vec<f32>) -> Vec<f32> {
        let width = self.panels.columns;
        let order: Vec<usize> = (0..x.len() / width.max(1)).collect();
        let matrices = [(0, order.len())];
        let selection = Selection { elements: x, width, padded_to: BLOCK, order: &order, matrices: &matrices };
        let rows = PackedRows::new(pool, &selection, level.tile_rows(), std::mem::take(packed));
        let mut out = vec![0.0; order.len() * self.outputs];
        let product =
            Product { panels: &self.panels, panels_each: 0, bias: &self.bias, rows: &rows, outputs: Outputs::Sums };
        product.compute(pool, level, &mut out, self.outputs);
        *packed = rows.into_elements();
        out
    }
}

/// A resident embedding table `[vocab, hidden]`, as in the checkpoint.
pub struct Embedding(DenseMatrix);

impl Embedding {
    /// Keeps a table.
    pub(super) fn new(table: DenseMatrix) -> Result<Self, BackendError> {
        let values = match &table.data {
            DenseData::Bf16(values) => values.len(),
            DenseData::F32(values) => values.len(),
        };
        if values != table.rows * table.columns {
            return Err(BackendError::Operation {
                operation: "load_embedding",
                message: format!("{values} values for {} rows of {}", table.rows, table.columns),
            });
        }
        Ok(Self(table))
    }

    /// Width of a row.
    pub(super) fn columns(&self) -> usize {
        self.0.columns
    }

    /// The rows of some tokens.
    pub(super) fn rows(&self, tokens: &[TokenId]) -> Result<Vec<f32>, BackendError> {
        let columns = self.0.columns;
        let mut rows = Vec::with_capacity(tokens.len() * columns);
        for token in tokens {
            if token.index() >= self.0.rows {
                return Err(BackendError::Operation {
                    operation: "embed",
                    message: format!("token {token} of a table of {} rows", self.0.rows),
                });
            }
            let range = token.index() * columns..(token.index() + 1) * columns;
            match &self.0.data {
                DenseData::Bf16(values) => rows.extend(values[range].iter().copied().map(bf16::to_f32)),
                DenseData::F32(values) => rows.extend_from_slice(&values[range]),
            }
        }
        Ok(rows)
    }
}
