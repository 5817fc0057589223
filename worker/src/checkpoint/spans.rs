//! Which bytes of a tensor make up a slice of it, and in how many reads they come.

use std::ops::Range;

use phalanx_proto::layout::TensorSlice;

/// Gaps shorter than this are read through, in bytes: the disk and the page cache deliver whole pages, so the bytes
/// between come along anyway, and a system call for each run of 368 bytes (a quarter of a row of MXFP4 blocks of the
/// release) would cost more than the copy.
const PAGE: usize = 4096;

/// Most bytes of one read. A multiple of every element's size, so that cutting a long run never cuts an element.
pub(super) const SPAN_BYTES: usize = 1 << 20;

/// One read of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// First byte, counted from the tensor's first.
    pub(super) offset: u64,
    /// Bytes read.
    pub(super) len: usize,
    /// Parts of the bytes read that belong to the slice, in the slice's row-major order.
    pub(super) kept: Vec<Range<usize>>,
}

/// Contiguous stretches of a slice in row-major order: offset within the tensor and length, in bytes.
struct Runs {
    /// Length of every run.
    run: usize,
    /// Offset of the first run's byte behind what `outer` and `index` say.
    base: usize,
    /// Ranges of the axes outside a run.
    outer: Vec<Range<usize>>,
    /// Bytes from one index of an outer axis to the next.
    strides: Vec<usize>,
    /// The next run's place on the outer axes; absent at the end.
    index: Option<Vec<usize>>,
}

impl Runs {
    fn new(slice: &TensorSlice, element: usize) -> Self {
        let axes = slice.shape.len();
        let cut = |&axis: &usize| slice.ranges[axis] != (0..slice.shape[axis]);
        // Every axis behind the last one that is cut lies within a run.
        let last_cut = (0..axes).rev().find(cut).unwrap_or(0);
        let stride = |axis: usize| element * slice.shape[axis + 1..].iter().product::<usize>();
        let whole = 0..1;
        let innermost = slice.ranges.get(last_cut).unwrap_or(&whole);
        let inner_stride = if axes == 0 { element } else { stride(last_cut) };
        let outer = slice.ranges[..last_cut].to_vec();
        let index = (slice.elements() > 0).then(|| outer.iter().map(|range| range.start).collect());
        Self {
            run: innermost.len() * inner_stride,
            base: innermost.start * inner_stride,
            strides: (0..last_cut).map(stride).collect(),
            outer,
            index,
        }
    }
}

impl Iterator for Runs {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<(usize, usize)> {
        let mut index = self.index.take()?;
        let offset = self.base + index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum::<usize>();
        // Counts up like an odometer, the innermost axis fastest.
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < self.outer[axis].end {
                self.index = Some(index);
                break;
            }
            index[axis] = self.outer[axis].start;
        }
        Some((offset, self.run))
    }
}

/// Cuts a slice into reads: joins runs that lie close together, splits those that are too long.
pub(super) struct Spans {
    runs: Runs,
    /// A run, or the rest of one, that the last span had no room for.
    held_back: Option<(usize, usize)>,
}

impl Spans {
    /// The reads that fetch `slice` of a tensor whose elements have `element` bytes.
    pub(super) fn new(slice: &TensorSlice, element: usize) -> Self {
        Self { runs: Runs::new(slice, element), held_back: None }
    }

    fn next_run(&mut self) -> Option<(usize, usize)> {
        self.held_back.take().or_else(|| self.runs.next())
    }
}

impl Iterator for Spans {
    type Item = Span;

    fn next(&mut self) -> Option<Span> {
        let (start, run) = self.next_run()?;
        let mut len = run.min(SPAN_BYTES);
        let mut kept = Vec::with_capacity(1);
        kept.push(0..len);
        if run > len {
            self.held_back = Some((start + len, run - len));
            return Some(Span { offset: start as u64, len, kept });
        }
        while let Some((next, run)) = self.next_run() {
            let (from, end) = (next - start, next - start + run);
            if from - len > PAGE || end > SPAN_BYTES {
                self.held_back = Some((next, run));
                break;
            }
            kept.push(from..end);
            len = end;
        }
        Some(Span { offset: start as u64, len, kept })
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::layout::TensorKind;
    use proptest::prelude::*;

    use super::*;

    fn slice(shape: Vec<usize>, ranges: Vec<Range<usize>>) -> TensorSlice {
        TensorSlice { name: "t".to_owned(), shape, ranges, kind: TensorKind::Bytes }
    }

    /// Offsets of the slice's bytes, by the definition of row-major order.
    fn expected(slice: &TensorSlice, element: usize) -> Vec<usize> {
        let mut offsets = vec![0];
        for (range, &len) in slice.ranges.iter().zip(&slice.shape) {
            offsets = offsets.iter().flat_map(|&o| range.clone().map(move |i| o * len + i)).collect();
        }
        offsets.iter().flat_map(|&o| (0..element).map(move |b| o * element + b)).collect()
    }

    fn covered(slice: &TensorSlice, element: usize) -> Vec<usize> {
        let spans = Spans::new(slice, element).inspect(|span| {
            assert!(span.len <= SPAN_BYTES && span.kept.last().unwrap().end == span.len);
        });
        spans.flat_map(|span| span.kept.into_iter().flatten().map(move |byte| span.offset as usize + byte)).collect()
    }

    #[test]
    fn whole_tensor_is_read_in_pieces_of_the_largest_size() {
        let len = 2 * SPAN_BYTES + 10;
        let spans: Vec<_> = Spans::new(&slice(vec![len, 1], vec![0..len, 0..1]), 1).collect();
        assert_eq!(spans.iter().map(|span| span.len).collect::<Vec<_>>(), [SPAN_BYTES, SPAN_BYTES, 10]);
    }

    #[test]
    fn columns_far_apart_are_read_one_by_one_and_close_ones_together() {
        let far = slice(vec![8, 10_000], vec![0..8, 0..100]);
        assert_eq!(Spans::new(&far, 1).count(), 8);
        let near = slice(vec![8, 1_000], vec![0..8, 0..100]);
        assert_eq!(Spans::new(&near, 1).count(), 1);
    }

    proptest! {
        #[test]
        fn spans_keep_exactly_the_slice_in_order(
            axes in prop::collection::vec((1_usize..40, 0.0..1.0_f64, 0.0..1.0_f64), 1..5),
            element in prop::sample::select(vec![1_usize, 2, 4]),
        ) {
            let shape: Vec<usize> = axes.iter().map(|axis| axis.0).collect();
            let range = |&(len, a, b): &(usize, f64, f64)| {
                let (a, b) = ((a * len as f64) as usize, (b * (len + 1) as f64) as usize);
                a.min(b)..a.max(b)
            };
            let slice = slice(shape, axes.iter().map(range).collect());
            prop_assert_eq!(covered(&slice, element), expected(&slice, element));
        }
    }
}
