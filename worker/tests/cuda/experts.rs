//! Routing, the experts' layout and their products.

use phalanx_worker::backend::cuda::{
    driver::{Address, Arguments, Shape},
    kernels::{EXPERTS, EXPERTS_GEMM, ROUTE},
};

use crate::bench::{Bench, assert_close, noise, to_bf16};

/// As in `dense`.
const F32_SUM: f64 = 1e-5;
const BF16: f64 = 1.0 / 256.0;
const FP4: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

#[test]
fn rows_visit_their_best_experts_and_ties_go_to_the_lower() {
    Bench::in_both_orders(&ROUTE, &[], |bench| {
        for (rows, experts, visits) in [(5, 128, 4), (3, 32, 4), (9, 6, 2), (1, 5, 3), (2, 1, 1), (2, 700, 8)] {
            let mut logits = noise(rows * experts, 7);
            // Equal logits, and a row in which all are equal.
            logits[..experts].fill(0.25);
            if experts > 2 {
                logits[(rows - 1) * experts + 2] = logits[(rows - 1) * experts];
            }
            let (chosen, weights) = (bench.poisoned(rows * visits), bench.poisoned(rows * visits));
            let arguments = Arguments::new().pointer(bench.floats(&logits)).pointer(chosen).pointer(weights);
            let arguments = arguments.size(rows).size(experts).size(visits);
            let shape = Shape { grid: [rows.div_ceil(4) as u32, 1, 1], threads: 128, shared_bytes: 0 };
            bench.launch("route", shape, &arguments);
            let (chosen, weights) =
                (bench.read_words(chosen, rows * visits), bench.read_floats(weights, rows * visits));
            for (row, logits) in logits.chunks(experts).enumerate() {
                let mut order: Vec<u32> = (0..experts as u32).collect();
                order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
                assert_eq!(chosen[row * visits..][..visits], order[..visits], "row {row} of {rows} x {experts}");
                let best: Vec<f64> = order[..visits].iter().map(|&e| f64::from(logits[e as usize])).collect();
                let sum: f64 = best.iter().map(|logit| (logit - best[0]).exp()).sum();
                let expected: Vec<f64> = best.iter().map(|logit| (logit - best[0]).exp() / sum).collect();
                assert_close("weights", &weights[row * visits..][..visits], &expected, visits, 1e-6);
            }
        }
    });
}

/// What `group_pairs` finds, on the device.
#[derive(Clone, Copy)]
struct Lists {
    starts: Address,
    sorted: Address,
    active: Address,
    tiles: Address,
}

/// Where each held expert's pairs begin, the pairs, and the visited experts, as `group_pairs` finds them.
fn group(bench: &Bench, chosen: &[u32], first: usize, held: usize, tile: usize) -> Lists {
    let (starts, sorted) = (bench.poisoned(held + 1), bench.poisoned(chosen.len()));
    let (active, tiles) = (bench.poisoned(held + 1), bench.poisoned(3 * (held + chosen.len() / tile) + 1));
    let arguments = Arguments::new().pointer(bench.words(chosen)).pointer(starts).pointer(sorted).pointer(active);
    let arguments = arguments.pointer(tiles).size(chosen.len()).size(first).size(held).size(tile);
    let shape = Shape { grid: [1; 3], threads: 64, shared_bytes: 4 * (held as u32 + 1) };
    bench.launch("group_pairs", shape, &arguments);
    Lists { starts, sorted, active, tiles }
}

#[test]
fn pairs_are_grouped_by_the_experts_that_a_rank_holds() {
    Bench::in_both_orders(&ROUTE, &[], |bench| {
        let chosen: Vec<u32> = (0..150_u32).map(|i| i.wrapping_mul(2_654_435_761) >> 13).map(|i| i % 12).collect();
        for (first, held) in [(0, 12), (4, 5), (11, 1), (0, 14)] {
            let lists = group(bench, &chosen, first, held, 8);
            let starts = bench.read_words(lists.starts, held + 1);
            let sorted = bench.read_words(lists.sorted, starts[held] as usize);
            let (mut visited, mut tiles) = (Vec::new(), Vec::new());
            for expert in 0..held {
                let expected = (0..150).filter(|&pair| chosen[pair as usize] as usize == first + expert);
                let expected: Vec<u32> = expected.collect();
                assert_eq!(sorted[starts[expert] as usize..starts[expert + 1] as usize], expected, "expert {expert}");
                visited.extend((!expected.is_empty()).then_some(expert as u32));
                for (index, tile) in expected.chunks(8).enumerate() {
                    tiles.extend([expert as u32, starts[expert] + 8 * index as u32, tile.len() as u32]);
                }
            }
            let count = bench.read_words(lists.active, 1)[0] as usize;
            assert_eq!(bench.read_words(lists.active, count + 1)[1..], visited);
            let count = bench.read_words(lists.tiles, 1)[0] as usize;
            assert_eq!(bench.read_words(lists.tiles, 3 * count + 1)[1..], tiles);
        }
    });
}

/// A matrix of every expert as a checkpoint has it.
struct Matrix {
    experts: usize,
    rows: usize,
    inputs: usize,
    blocks: Vec<u8>,
    scales: Vec<u8>,
    bias: Vec<f32>,
}

impl Matrix {
    fn new(experts: usize, rows: usize, inputs: usize, seed: u64) -> Self {
        let count = experts * rows * inputs / 32;
        let random = |count: usize, seed: u64| -> Vec<u8> {
            noise(count, seed).iter().map(|value| value.to_bits() as u8 ^ (value.to_bits() >> 8) as u8).collect()
        };
        let mut scales: Vec<u8> = random(count, seed).iter().map(|byte| 118 + byte % 8).collect();
        // The smallest and the largest that there may be.
        scales[count / 2] = 0;
        scales[count / 3] = 128;
        Self {
            experts,
            rows,
            inputs,
            blocks: random(16 * count, seed + 1),
            scales,
            bias: noise(experts * rows, seed + 2),
        }
    }

    fn value(&self, expert: usize, row: usize, column: usize) -> f64 {
        let block = ((expert * self.rows + row) * self.inputs + column) / 32;
        let byte = self.blocks[16 * block + column % 32 / 2];
        let nibble = usize::from(if column.is_multiple_of(2) { byte & 15 } else { byte >> 4 });
        let magnitude = FP4[nibble & 7] * 2_f64.powi(i32::from(self.scales[block]) - 127);
        if nibble & 8 == 0 { magnitude } else { -magnitude }
    }

    fn product(&self, expert: usize, row: usize, x: &[f64]) -> f64 {
        let sum: f64 = x.iter().enumerate().map(|(column, x)| self.value(expert, row, column) * x).sum();
        sum + f64::from(self.bias[expert * self.rows + row])
    }

    /// In the device's layout: weights, exponents.
    fn packed(&self, bench: &Bench, interleaved: bool) -> (Address, Address) {
        let (stripes, blocks) = (self.experts * self.rows / 16, self.inputs / 32);
        let weights = bench.poisoned(stripes * blocks * 64);
        let exponents = bench.poisoned(stripes * blocks.div_ceil(16) * 64);
        let largest = bench.words(&[0]);
        let arguments = Arguments::new()
            .pointer(bench.bytes(&self.blocks))
            .pointer(bench.bytes(&self.scales))
            .pointer(weights)
            .pointer(exponents)
            .pointer(largest)
            .size(self.experts)
            .size(self.rows)
            .size(blocks)
            .u32(interleaved.into());
        let grid = [stripes as u32, (blocks.next_multiple_of(16) * 16).div_ceil(256) as u32, 1];
        bench.launch("repack", Shape { grid, threads: 256, shared_bytes: 0 }, &arguments);
        assert_eq!(bench.read_words(largest, 1), [0]);
        (weights, exponents)
    }
}

/// Launches one side of the experts with `tiles` tiles of 8 pairs.
#[allow(clippy::too_many_arguments, reason = "what a launch needs")]
fn launch(
    bench: &Bench,
    name: &'static str,
    (tiles, splits): (usize, usize),
    matrix: &Matrix,
    x: Address,
    y: Address,
    lists: Lists,
    visits: usize,
) {
    let (weights, exponents) = matrix.packed(bench, name.starts_with("gate"));
    let warps = splits * (4 / splits).max(1);
    let arguments = Arguments::new()
        .pointer(weights)
        .pointer(exponents)
        .pointer(bench.floats(&matrix.bias))
        .pointer(x)
        .pointer(y)
        .pointer(lists.starts)
        .pointer(lists.sorted)
        .pointer(lists.active)
        .size(matrix.rows)
        .size(matrix.inputs)
        .size(visits)
        .size(splits)
        .f32(7.0);
    if name.ends_with("gemm") {
        // Three experts, of which one may have two tiles.
        let shape = Shape {
            grid: [matrix.rows.div_ceil(128) as u32, matrix.experts as u32 + 1, 1],
            threads: 256,
            shared_bytes: 2 * 128 * 320 + 512,
        };
        let arguments = arguments.align(8).pointer(lists.tiles);
        return Bench::in_this_order(bench, &EXPERTS_GEMM, |gemm| gemm.launch(name, shape, &arguments));
    }
    let grid = [(matrix.rows / 16).div_ceil(warps / splits) as u32, matrix.experts as u32, 1];
    bench.launch(
        name,
        Shape { grid, threads: 32 * warps as u32, shared_bytes: (512 * tiles * warps) as u32 },
        &arguments,
    );
}

/// Both sides for `tokens` tokens whose visits are given, at the names' tiles.
fn both_sides(bench: &Bench, routes: &Bench, tokens: usize, hidden: usize, intermediate: usize, tiles: usize) {
    let (experts, visits) = (3, 2);
    let chosen: Vec<u32> = (0..tokens).flat_map(|token| [[0, 2], [2, 1], [2, 0]][token % 3]).collect();
    let [gate_name, down_name] = match tiles {
        1 => ["gate_up_8", "down_8"],
        2 => ["gate_up_16", "down_16"],
        4 => ["gate_up_32", "down_32"],
        _ => ["gate_up_gemm", "down_gemm"],
    };
    let (gate_up, down) =
        (Matrix::new(experts, 2 * intermediate, hidden, 11), Matrix::new(experts, hidden, intermediate, 21));
    let what = format!("{tokens} tokens, hidden {hidden}, intermediate {intermediate}, {tiles} tiles");
    let pairs = tokens * visits;
    let x = to_bf16(&noise(tokens * hidden, 31).iter().map(|value| value / 8.0).collect::<Vec<_>>());
    // Lists come from the other device's memory, which is the same memory.
    let lists = group(routes, &chosen, 0, experts, 128);
    let sorted = routes.read_words(lists.sorted, pairs);

    let gated = bench.poisoned(pairs * intermediate / 2);
    let splits = (hidden / 32).div_ceil(16).min(6);
    launch(bench, gate_name, (tiles, splits), &gate_up, bench.halves(&x), gated, lists, visits);
    let mut expected = Vec::new();
    for &pair in &sorted {
        let (token, expert) = (pair as usize / visits, chosen[pair as usize] as usize);
        let x: Vec<f64> = x[token * hidden..][..hidden].iter().map(|value| value.to_f64()).collect();
        for unit in 0..intermediate {
            let gate = gate_up.product(expert, 2 * unit, &x).min(7.0);
            let up = gate_up.product(expert, 2 * unit + 1, &x).clamp(-7.0, 7.0);
            expected.push(gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0));
        }
    }
    let found = bench.read_halves(gated, pairs * intermediate);
    assert_close(&format!("gate_up of {what}"), &found, &expected, intermediate, BF16);

    let y = bench.poisoned(pairs * hidden);
    let splits = (intermediate / 32).div_ceil(16).min(6);
    launch(bench, down_name, (tiles, splits), &down, gated, y, lists, visits);
    let mut expected = vec![0.0; pairs * hidden];
    for (place, &pair) in sorted.iter().enumerate() {
        let x: Vec<f64> = found[place * intermediate..][..intermediate].iter().map(|&value| f64::from(value)).collect();
        for row in 0..hidden {
            expected[pair as usize * hidden + row] = down.product(chosen[pair as usize] as usize, row, &x);
        }
    }
    assert_close(&format!("down of {what}"), &bench.read_floats(y, pairs * hidden), &expected, hidden, F32_SUM);
}

fn on_both(test: impl Fn(&Bench, &Bench)) {
    Bench::in_both_orders(&EXPERTS, &[], |bench| Bench::in_both_orders(&ROUTE, &[], |routes| test(bench, routes)));
}

#[test]
fn experts_of_every_shard_multiply_few_rows() {
    on_both(|bench, routes| {
        // gate_up contracts 2880 values whatever the world size; its outputs are a slice here.
        both_sides(bench, routes, 2, 2880, 32, 1);
        // down contracts a rank's part of 2880: world sizes 1, 2, 4 (23 or 22 blocks) and 8 (12 or 11).
        for intermediate in [1440, 736, 704, 384, 352] {
            both_sides(bench, routes, 1, 64, intermediate, 1);
        }
        both_sides(bench, routes, 1, 32, 2880, 1);
        both_sides(bench, routes, 3, 160, 96, 1);
    });
}

#[test]
fn experts_take_any_number_of_rows() {
    on_both(|bench, routes| {
        // More pairs of an expert than a tile has.
        both_sides(bench, routes, 150, 64, 32, 16);
        for (tokens, tiles) in [(12, 1), (13, 2), (30, 4), (49, 4)] {
            both_sides(bench, routes, tokens, 96, 64, tiles);
        }
    });
}

#[test]
fn experts_of_every_shard_multiply_many_rows() {
    on_both(|bench, routes| {
        both_sides(bench, routes, 5, 2880, 32, 16);
        for (tokens, intermediate) in [(3, 1440), (9, 736), (66, 352), (20, 96)] {
            both_sides(bench, routes, tokens, 160, intermediate, 16);
        }
    });
}

#[test]
fn a_scale_beyond_what_bf16_can_hold_is_told() {
    Bench::in_both_orders(&EXPERTS, &[], |bench| {
        let mut matrix = Matrix::new(1, 16, 64, 3);
        matrix.scales[5] = 131;
        let largest = bench.words(&[0]);
        let arguments = Arguments::new()
            .pointer(bench.bytes(&matrix.blocks))
            .pointer(bench.bytes(&matrix.scales))
            .pointer(bench.poisoned(16 * 2 * 4))
            .pointer(bench.poisoned(64))
            .pointer(largest)
            .size(1)
            .size(16)
            .size(2)
            .u32(0);
        bench.launch("repack", Shape { grid: [1; 3], threads: 256, shared_bytes: 0 }, &arguments);
        assert_eq!(bench.read_words(largest, 1), [131]);
    });
}

#[test]
fn what_experts_say_is_summed_by_weight_and_those_of_other_ranks_add_nothing() {
    Bench::in_both_orders(&EXPERTS, &[], |bench| {
        let (hidden, chosen, weights) = (300, [1_u32, 5, 4, 2], [0.25_f32, 0.75, 0.5, 0.5]);
        let mut y = noise(4 * hidden, 9);
        // What other ranks hold was never written.
        y[hidden..2 * hidden].fill(f32::NAN);
        let sum = bench.poisoned(2 * hidden);
        let arguments = Arguments::new()
            .pointer(bench.floats(&y))
            .pointer(bench.words(&chosen))
            .pointer(bench.floats(&weights))
            .pointer(sum)
            .size(hidden)
            .size(2)
            .size(1)
            .size(4);
        bench.launch("combine", Shape { grid: [2, 2, 1], threads: 256, shared_bytes: 0 }, &arguments);
        let first = (0..hidden).map(|i| 0.25 * y[i]);
        let second = (0..hidden).map(|i| 0.5 * y[2 * hidden + i] + 0.5 * y[3 * hidden + i]);
        assert_eq!(bench.read_floats(sum, 2 * hidden), first.chain(second).collect::<Vec<_>>());
    });
}
