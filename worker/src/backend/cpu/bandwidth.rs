//! How fast this machine reads memory: the limit of decoding, measured with the backend's own threads.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use super::simd::{
    Isa, Kernel, LANES, Level, Simd,
    memory::Slab,
    pool::Pool,
    rectangles::{Cut, split},
};
use crate::backend::BackendError;

/// Far more than any cache holds.
const BYTES: usize = 512 << 20;
/// What a thread reads in one go.
const TASK_BYTES: usize = 1 << 20;
/// The best of so many passes counts: noise only ever slows.
const PASSES: usize = 5;

/// Bytes per second that `threads` threads read together from memory.
///
/// # Errors
/// When 512 MiB of memory are not there or threads do not start.
pub fn measure_read_bandwidth(threads: usize) -> Result<f64, BackendError> {
    let mut pool = Pool::new(threads)?;
    let level = Isa::available().into_iter().find_map(Level::new).ok_or_else(|| {
        BackendError::Unsupported("no instruction set to measure the memory bandwidth with".to_owned())
    })?;
    let mut slab: Slab<[u32; LANES]> =
        Slab::zeroed("the memory bandwidth's measurement", BYTES / size_of::<[u32; LANES]>())?;
    let task_lines = TASK_BYTES / size_of::<[u32; LANES]>();
    let tasks = BYTES / TASK_BYTES;
    // Pages that were never written are all the same page of zeros.
    let cut = Cut { width: task_lines, heights: &vec![1; tasks], columns: task_lines };
    split(&mut pool, &mut slab, &cut, |task, _, mut part| part.flat().fill([task as u32; LANES]));
    let sum = AtomicU32::new(0);
    let mut best = Duration::MAX;
    for _ in 0..PASSES {
        let start = Instant::now();
        pool.run(tasks, &|task| {
            let lines = &slab[task * task_lines..(task + 1) * task_lines];
            // Somebody must want the result, or nothing is read.
            sum.fetch_xor(level.run(Fold(lines)), Ordering::Relaxed);
        });
        best = best.min(start.elapsed());
    }
    std::hint::black_box(sum.into_inner());
    Ok(BYTES as f64 / best.as_secs_f64())
}

/// Exclusive or of all words.
struct Fold<'a>(&'a [[u32; LANES]]);

impl Kernel for Fold<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> u32 {
        let mut folds = [s.splat_bits(0); 4];
        let (lines, _) = self.0.as_chunks::<4>();
        for lines in lines {
            for at in 0..4 {
                s.prefetch(&lines[at], 4096);
                folds[at] = s.xor_bits(folds[at], s.bits(&lines[at]));
            }
        }
        let fold = s.xor_bits(s.xor_bits(folds[0], folds[1]), s.xor_bits(folds[2], folds[3]));
        let mut words = [0.0; LANES];
        s.store(s.bits_to_float(fold), &mut words);
        words.iter().fold(0, |fold, word| fold ^ word.to_bits())
    }
}
