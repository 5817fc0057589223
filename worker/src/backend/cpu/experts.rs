//! Routed experts: rows grouped by expert, two products, and each token's weighted sum in the order of its routing.

use std::ops::Range;

use super::{
    panels::{BLOCK, Mxfp4, Mxfp4Source, PANEL_ROWS, Panels, gates_then_ups, straight},
    product::{Outputs, Product},
    quantized::{QuantizedBlock, quantize},
    rows::{PackedRows, Selection},
    simd::{
        Kernel, LANES, Level, Simd,
        pool::Pool,
        rectangles::{Cut, Rectangle, row_bands, split, starts},
    },
};
use crate::backend::{BackendError, ExpertsData};

/// Which experts each row visits, and with which weights.
pub struct Routing {
    /// Experts a row.
    pub(super) per_row: usize,
    /// `[rows, per_row]`, by descending logit.
    pub(super) experts: Vec<usize>,
    /// `[rows, per_row]`.
    pub(super) weights: Vec<f32>,
}

impl Routing {
    /// Routes by `logits`, `[rows, experts]`.
    pub(super) fn new(logits: &[f32], experts: usize, per_row: usize) -> Self {
        let mut routing = Self { per_row, experts: Vec::new(), weights: Vec::new() };
        for logits in logits.chunks_exact(experts) {
            let best = top(logits, per_row);
            let greatest = best.first().map_or(0.0, |best| best.1);
            let sum: f32 = best.iter().map(|(_, logit)| (logit - greatest).exp()).sum();
            routing.experts.extend(best.iter().map(|best| best.0));
            routing.weights.extend(best.iter().map(|(_, logit)| (logit - greatest).exp() / sum));
        }
        routing
    }

    /// Rows routed.
    pub(super) fn rows(&self) -> usize {
        self.experts.len() / self.per_row
    }
}

/// The greatest logits and where they are, in descending order; of equal ones the first.
fn top(logits: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(count + 1);
    for (expert, &logit) in logits.iter().enumerate() {
        if best.len() < count || best.last().is_some_and(|last| logit > last.1) {
            let at = best.iter().position(|other| logit > other.1).unwrap_or(best.len());
            best.insert(at, (expert, logit));
            best.truncate(count);
        }
    }
    best
}

/// One layer's resident experts.
pub struct Experts {
    /// The held ones.
    held: Range<usize>,
    hidden: usize,
    intermediate: usize,
    /// Each panel: 16 gates, then their 16 ups.
    gate_up: Panels<Mxfp4>,
    /// `[expert, panel, group, lane]`.
    gate_up_bias: Vec<f32>,
    down: Panels<Mxfp4>,
    /// `[expert, hidden]`; zeros on ranks that do not add it.
    down_bias: Vec<f32>,
}

/// The rows of a batch by expert.
struct Visits {
    /// The token of each visit, grouped by expert.
    tokens: Vec<usize>,
    /// Held experts that are visited, and how often.
    matrices: Vec<(usize, usize)>,
    /// The visit of each token's choices, `[rows, per_row]`; `None` for an expert of another rank.
    of_choice: Vec<Option<usize>>,
}

impl Visits {
    fn new(routing: &Routing, held: &Range<usize>) -> Self {
        let mut counts = vec![0; held.len()];
        for expert in routing.experts.iter().filter(|expert| held.contains(expert)) {
            counts[expert - held.start] += 1;
        }
        let mut next = starts(&counts);
        let mut visits = Self {
            tokens: vec![0; counts.iter().sum()],
            matrices: counts.into_iter().enumerate().filter(|(_, count)| *count > 0).collect(),
            of_choice: Vec::with_capacity(routing.experts.len()),
        };
        for (choice, expert) in routing.experts.iter().enumerate() {
            visits.of_choice.push(held.contains(expert).then(|| {
                let slot = &mut next[expert - held.start];
                visits.tokens[*slot] = choice / routing.per_row;
                std::mem::replace(slot, *slot + 1)
            }));
        }
        visits
    }
}

impl Experts {
    /// Makes a layer's experts resident.
    pub(super) fn new(pool: &mut Pool, data: ExpertsData) -> Result<Self, BackendError> {
        let (count, rows) = (data.experts.len(), 2 * data.intermediate);
        let gate_up = Mxfp4Source {
            what: "gate_up_proj of the experts",
            matrices: count,
            rows,
            columns: data.hidden,
            blocks: &data.gate_up_blocks,
            scales: &data.gate_up_scales,
            row_of_lane: gates_then_ups,
        };
        let down = Mxfp4Source {
            what: "down_proj of the experts",
            matrices: count,
            rows: data.hidden,
            columns: data.intermediate,
            blocks: &data.down_blocks,
            scales: &data.down_scales,
            row_of_lane: straight,
        };
        let (gate_up_bias, down_bias) = (data.gate_up_bias.len(), data.down_bias.len());
        if gate_up_bias != count * rows || (down_bias != 0 && down_bias != count * data.hidden) {
            return Err(BackendError::Operation {
                operation: "load experts",
                message: format!(
                    "{gate_up_bias} and {down_bias} biases, expected {} and {} or none",
                    count * rows,
                    count * data.hidden
                ),
            });
        }
        let lane_bias = |at: usize| {
            let (expert, row) = (at / rows, at % rows);
            data.gate_up_bias[expert * rows + gates_then_ups(row / PANEL_ROWS, row % PANEL_ROWS)]
        };
        Ok(Self {
            held: data.experts.clone(),
            hidden: data.hidden,
            intermediate: data.intermediate,
            gate_up: Panels::<Mxfp4>::new(pool, &gate_up)?,
            gate_up_bias: (0..gate_up_bias).map(lane_bias).collect(),
            down: Panels::<Mxfp4>::new(pool, &down)?,
            down_bias: if down_bias == 0 { vec![0.0; count * data.hidden] } else { data.down_bias },
        })
    }

    /// Width of their input and output.
    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    /// Bytes of the experts that a routing visits.
    pub(super) fn bytes_visited(&self, routing: &Routing) -> usize {
        let mut visited = vec![false; self.held.len()];
        for expert in routing.experts.iter().filter(|expert| self.held.contains(expert)) {
            visited[expert - self.held.start] = true;
        }
        let bytes = self.gate_up.bytes() + self.down.bytes();
        visited.iter().filter(|visited| **visited).count() * bytes / self.held.len().max(1)
    }

    /// This rank's part of the weighted sums of `x`, `[rows, hidden]`.
    pub(super) fn apply(
        &self,
        (pool, level): (&mut Pool, Level),
        x: &[f32],
        routing: &Routing,
        limit: f32,
        scratch: &mut Scratch,
    ) -> Vec<f32> {
        let visits = Visits::new(routing, &self.held);
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let (count, tile) = (visits.tokens.len(), level.tile_rows());

        let (order, matrices) = (&visits.tokens, &visits.matrices);
        quantize((pool, level), x, hidden, &mut scratch.quantized);
        let width = hidden / BLOCK;
        let selection = Selection { elements: &scratch.quantized, width, padded_to: 1, order, matrices };
        let rows = PackedRows::new(pool, &selection, tile, std::mem::take(&mut scratch.visits));
        let product = Product {
            panels: &self.gate_up,
            panels_each: 2 * intermediate / PANEL_ROWS,
            bias: &self.gate_up_bias,
            rows: &rows,
            outputs: Outputs::Swiglu { limit },
        };
        scratch.inner.resize(count * intermediate, 0.0);
        product.compute(pool, level, &mut scratch.inner, intermediate);

        let order: Vec<usize> = (0..count).collect();
        quantize((pool, level), &scratch.inner, intermediate, &mut scratch.quantized);
        let width = intermediate / BLOCK;
        let selection = Selection { elements: &scratch.quantized, width, padded_to: 1, order: &order, matrices };
        let rows = PackedRows::new(pool, &selection, tile, rows.into_elements());
        let product = Product {
            panels: &self.down,
            panels_each: hidden / PANEL_ROWS,
            bias: &self.down_bias,
            rows: &rows,
            outputs: Outputs::Sums,
        };
        scratch.outer.resize(count * hidden, 0.0);
        product.compute(pool, level, &mut scratch.outer, hidden);
        scratch.visits = rows.into_elements();

        let mut sums = vec![0.0; routing.rows() * hidden];
        let heights = row_bands(routing.rows(), hidden * routing.per_row);
        let first_rows = starts(&heights);
        split(pool, &mut sums, &Cut { width: hidden, heights: &heights, columns: hidden }, |band, _, out| {
            let (experts, visits, outer) = (self, &visits, &scratch.outer);
            level.run(Combine { experts, routing, visits, outer, first_row: first_rows[band], out });
        });
        sums
    }
}

/// Memory that is used again from call to call.
#[derive(Default)]
pub(super) struct Scratch {
    /// For rows packed for dense products.
    pub(super) packed: Vec<f32>,
    /// `[tokens or visits, blocks]`.
    quantized: Vec<QuantizedBlock>,
    /// The same, packed by expert.
    visits: Vec<QuantizedBlock>,
    /// `[visits, intermediate]`.
    inner: Vec<f32>,
    /// `[visits, hidden]`.
    outer: Vec<f32>,
}

/// Adds each token's experts in the order of its routing.
struct Combine<'a> {
    experts: &'a Experts,
    routing: &'a Routing,
    visits: &'a Visits,
    /// `[visits, hidden]`.
    outer: &'a [f32],
    first_row: usize,
    out: Rectangle<'a, f32>,
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (hidden, per_row) = (self.experts.hidden, self.routing.per_row);
        for row in 0..self.out.rows() {
            for choice in (self.first_row + row) * per_row..(self.first_row + row + 1) * per_row {
                let Some(visit) = self.visits.of_choice[choice] else { continue };
                let weight = s.splat(self.routing.weights[choice]);
                let (values, _) = self.outer[visit * hidden..(visit + 1) * hidden].as_chunks::<LANES>();
                let (sums, _) = self.out.row(row).as_chunks_mut::<LANES>();
                for (at, sum) in sums.iter_mut().enumerate() {
                    s.store(s.fma(weight, s.load(&values[at]), s.load(sum)), sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_go_to_the_lower_expert_and_weights_descend() {
        let routing = Routing::new(&[1.0, 3.0, 3.0, 2.0, 3.0, -1.0], 6, 4);
        assert_eq!(routing.experts, [1, 2, 4, 3]);
        let sum = 3.0 + (-1.0f32).exp();
        assert_eq!(routing.weights, [1.0 / sum, 1.0 / sum, 1.0 / sum, (-1.0f32).exp() / sum]);
    }

    #[test]
    fn visits_are_grouped_by_expert_and_skip_those_of_other_ranks() {
        let routing = Routing { per_row: 2, experts: vec![5, 2, 3, 5, 7, 3], weights: vec![0.5; 6] };
        let visits = Visits::new(&routing, &(3..6));
        assert_eq!(visits.tokens, [1, 2, 0, 1]);
        assert_eq!(visits.matrices, [(0, 2), (2, 2)]);
        assert_eq!(visits.of_choice, [Some(2), None, Some(0), Some(3), None, Some(1)]);
    }
}
