//! Dense products and norms of the CPU backend against f64, and their invariance.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking, as tests do")]

mod cpu_common;

use cpu_common::{EPS, Noise, arithmetic, bits, entry, every_way, same_bits_expected};
use phalanx_proto::ids::TokenId;
use phalanx_worker::backend::{Backend, BackendError, DenseData, DenseMatrix, cpu::CpuBackend};

fn product(backend: &mut CpuBackend, weight: &DenseMatrix, bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let linear = backend.load_linear(weight.clone(), bias.map(<[f32]>::to_vec)).unwrap();
    let x = backend.from_host(x.to_vec(), weight.columns).unwrap();
    let y = backend.linear(&x, &linear).unwrap();
    backend.to_host(&y).unwrap()
}

/// Every output within the bound for sums of this shape: a product passes through at most 16 roundings of its chain (17
/// where products are rounded too), one as the chains are added, one for each later block and one for the bias.
fn check(way: &str, weight: &DenseMatrix, bias: Option<&[f32]>, x: &[f32], y: &[f32]) {
    let roundings = (20 + weight.columns.div_ceil(32)) as f64;
    for (row, y) in y.chunks(weight.rows).enumerate() {
        let x = &x[row * weight.columns..][..weight.columns];
        for (out, &found) in y.iter().enumerate() {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[out]));
            let terms = x.iter().enumerate().map(|(i, x)| entry(weight, out, i) * f64::from(*x));
            let (sum, size) = terms.fold((bias, bias.abs()), |(sum, size), term| (sum + term, size + term.abs()));
            let error = (f64::from(found) - sum).abs();
            assert!(error <= roundings * EPS * size, "{way}: row {row}, output {out}: {found} is off by {error:e}");
        }
    }
}

#[test]
fn products_are_within_the_rounding_bound_for_odd_shapes_on_every_instruction_set() {
    let mut noise = Noise::new(1);
    for (rows, columns, tokens) in
        [(1, 32, 1), (31, 96, 3), (64, 160, 5), (1003, 192, 7), (33, 50, 13), (96, 1, 2), (200, 480, 101)]
    {
        let bias = noise.values(rows, 1.0);
        let x = noise.values(tokens * columns, 3.0);
        for weight in [noise.bf16_matrix(rows, columns), noise.f32_matrix(rows, columns)] {
            for (way, mut backend) in every_way(&arithmetic(4, 2, 64, 128)) {
                check(&way, &weight, Some(&bias), &x, &product(&mut backend, &weight, Some(&bias), &x));
                check(&way, &weight, None, &x, &product(&mut backend, &weight, None, &x));
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch_with_any_threads_and_instructions() {
    let mut noise = Noise::new(2);
    let tokens = 200;
    for weight in [noise.bf16_matrix(77, 352), noise.f32_matrix(77, 352)] {
        let x = noise.values(tokens * 352, 1.0);
        let mut expected: Option<Vec<u32>> = None;
        for (way, mut backend) in every_way(&arithmetic(4, 2, 64, 128)) {
            let whole = product(&mut backend, &weight, None, &x);
            for batch in [1, 2, 3, 5, 6, 7, 11, 12, 13, 64, 97, 199] {
                for first in [0, 1, tokens - batch] {
                    let part = product(&mut backend, &weight, None, &x[first * 352..(first + batch) * 352]);
                    assert_eq!(
                        bits(&part),
                        bits(&whole[first * 77..(first + batch) * 77]),
                        "{way}, {batch} from {first}"
                    );
                }
            }
            if same_bits_expected(&way) {
                assert_eq!(expected.get_or_insert(bits(&whole)), &bits(&whole), "{way}");
            }
        }
    }
}

#[test]
fn norms_are_within_the_rounding_bound_whatever_the_width() {
    let mut noise = Noise::new(3);
    for width in [1, 15, 64, 192, 2880] {
        let rows = 40;
        let (x, weight) = (noise.values(rows * width, 4.0), noise.values(width, 2.0));
        for (way, mut backend) in every_way(&arithmetic(4, 2, 64, 128)) {
            let resident = backend.load_vector(weight.clone()).unwrap();
            let input = backend.from_host(x.clone(), width).unwrap();
            let normed = backend.rms_norm(&input, &resident).unwrap();
            let y = backend.to_host(&normed).unwrap();
            for row in 0..rows {
                let x = &x[row * width..][..width];
                let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
                let scale = 1.0 / (squares / width as f64 + f64::from(1e-5f32)).sqrt();
                for (at, found) in y[row * width..][..width].iter().enumerate() {
                    let exact = f64::from(x[at]) * scale * f64::from(weight[at]);
                    // All squares are positive, so the sum's relative error is its roundings, which the root halves:
                    // a lane's, the four of halving and two more; then division, root, reciprocal and two products.
                    let roundings = (width.div_ceil(16) + 7) as f64 / 2.0 + 6.0;
                    assert!(
                        (f64::from(*found) - exact).abs() <= roundings * EPS * exact.abs(),
                        "{way}, {width}: {found}"
                    );
                }
            }
        }
    }
}

#[test]
fn embeddings_and_rows_are_copied_exactly_and_sums_are_sums() {
    let mut noise = Noise::new(4);
    let mut backend = CpuBackend::new(arithmetic(4, 2, 64, 128), 2).unwrap();
    for table in [noise.bf16_matrix(11, 48), noise.f32_matrix(11, 48)] {
        let exact = |row: usize| (0..48).map(|i| entry(&table, row, i) as f32).collect::<Vec<_>>();
        let resident = backend.load_embedding(table.clone()).unwrap();
        let mut x = backend.embed(&resident, &[TokenId(3), TokenId(10), TokenId(3)]).unwrap();
        assert_eq!(backend.to_host(&x).unwrap(), [exact(3), exact(10), exact(3)].concat());
        let rows = backend.select_rows(&x, &[1, 0]).unwrap();
        assert_eq!(backend.to_host(&rows).unwrap(), [exact(10), exact(3)].concat());
        let y = backend.from_host(vec![0.5; 3 * 48], 48).unwrap();
        backend.add(&mut x, &y).unwrap();
        let sums: Vec<f32> = [exact(3), exact(10), exact(3)].concat().iter().map(|x| x + 0.5).collect();
        assert_eq!(backend.to_host(&x).unwrap(), sums);
        assert!(matches!(
            backend.embed(&resident, &[TokenId(11)]),
            Err(BackendError::Operation { operation: "embed", .. })
        ));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_sizes() {
    let mut backend = CpuBackend::new(arithmetic(4, 2, 64, 128), 1).unwrap();
    let matrix = DenseMatrix { rows: 3, columns: 4, data: DenseData::F32(vec![0.0; 11]) };
    let error = backend.load_linear(matrix, None).err().unwrap().to_string();
    assert!(error.contains("11 values, expected 12"), "{error}");
    let linear = backend.load_linear(Noise::new(5).f32_matrix(3, 4), None).unwrap();
    let x = backend.from_host(vec![0.0; 10], 5).unwrap();
    let error = backend.linear(&x, &linear).unwrap_err().to_string();
    assert!(error.contains("rows of 5 values, expected 4"), "{error}");
    assert!(backend.from_host(vec![0.0; 10], 3).is_err());
}

#[test]
fn bytes_of_weights_are_counted_once_a_call() {
    let mut backend = CpuBackend::new(arithmetic(4, 2, 64, 128), 1).unwrap();
    let linear = backend.load_linear(Noise::new(6).bf16_matrix(64, 128), None).unwrap();
    let x = backend.from_host(vec![1.0; 9 * 128], 128).unwrap();
    backend.linear(&x, &linear).unwrap();
    assert_eq!(backend.weight_bytes_read(), 64 * 128 * 2 + 64 * 4);
}
