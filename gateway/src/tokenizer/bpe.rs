//! The merges of byte-pair encoding: one word's bytes to the ids of its tokens.
//!
//! The rule is that of every BPE tokenizer: of all neighbours that form a known pair, the pair of the lowest rank is
//! merged first, the leftmost of equal ones before the others, until no pair is known.

use std::{cmp::Reverse, collections::BinaryHeap};

use rustc_hash::FxHashMap;

/// Words up to this many bytes are merged by scanning for the best pair; longer ones with a heap. The scan is quadratic
/// but touches two small arrays only; it is the faster one up to about this length.
const SCANNED_WORD_BYTES: usize = 96;

/// Stands where no merge is possible; it sorts after every real one.
const NO_MERGE: u64 = u64::MAX;

/// A symbol that has been merged into the one before it, or the end of the list.
const GONE: u32 = u32::MAX;

/// The vocabulary and merges of a byte-level BPE model.
#[derive(Debug)]
pub(super) struct Bpe {
    /// Every token's bytes.
    pub(super) words: FxHashMap<Box<[u8]>, u32>,
    /// (left id, right id) → rank in the upper half, id of the merged token in the lower half.
    pub(super) merges: FxHashMap<(u32, u32), u64>,
    /// The token of each single byte.
    pub(super) byte_ids: Box<[u32; 256]>,
    /// A word that is a token as a whole is that token, whatever its merges say (`ignore_merges`).
    pub(super) whole_words_first: bool,
}

/// Memory that one encoding reuses from word to word.
#[derive(Default)]
pub(super) struct Scratch {
    ids: Vec<u32>,
    pairs: Vec<u64>,
}

impl Bpe {
    /// Appends the tokens of one word.
    pub(super) fn encode(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        if self.whole_words_first
            && let Some(&id) = self.words.get(word)
        {
            out.push(id);
            return;
        }
        scratch.ids.clear();
        scratch.ids.extend(word.iter().map(|&byte| self.byte_ids[byte as usize]));
        if word.len() <= SCANNED_WORD_BYTES {
            self.merge_by_scanning(scratch);
            out.extend_from_slice(&scratch.ids);
        } else {
            self.merge_with_heap(&mut scratch.ids, &mut scratch.pairs);
            out.extend(scratch.ids.iter().copied().filter(|&id| id != GONE));
        }
    }

    fn merge_of(&self, left: u32, right: u32) -> u64 {
        self.merges.get(&(left, right)).copied().unwrap_or(NO_MERGE)
    }

    fn merge_by_scanning(&self, scratch: &mut Scratch) {
        let Scratch { ids, pairs } = scratch;
        pairs.clear();
        pairs.extend(ids.windows(2).map(|pair| self.merge_of(pair[0], pair[1])));
        while let Some((at, merge)) = leftmost_lowest(pairs) {
            ids[at] = merged_id(merge);
            ids.remove(at + 1);
            pairs.remove(at);
            if at < pairs.len() {
                pairs[at] = self.merge_of(ids[at], ids[at + 1]);
            }
            if at > 0 {
                pairs[at - 1] = self.merge_of(ids[at - 1], ids[at]);
            }
        }
    }

    /// Merges in O(n log n). Merged-away symbols are left as [`GONE`].
    fn merge_with_heap(&self, ids: &mut [u32], pairs: &mut Vec<u64>) {
        let mut links = Links::new(ids.len());
        pairs.clear();
        pairs.extend(ids.windows(2).map(|pair| self.merge_of(pair[0], pair[1])));
        pairs.push(NO_MERGE);
        let known = pairs.iter().enumerate().filter(|&(_, &merge)| merge != NO_MERGE);
        let mut heap: BinaryHeap<_> = known.map(|(at, &merge)| candidate(merge, at)).collect();
        while let Some(Reverse(best)) = heap.pop() {
            let at = best as u32 as usize;
            let merge = pairs[at];
            // The pair that this candidate was made for may have been merged away since.
            let Some(right) = links.after(at).filter(|_| candidate(merge, at) == Reverse(best)) else { continue };
            ids[at] = merged_id(merge);
            ids[right] = GONE;
            pairs[right] = NO_MERGE;
            links.remove(right);
            let neighbours = [links.before(at).map(|left| (left, at)), links.after(at).map(|next| (at, next))];
            pairs[at] = NO_MERGE;
            for (left, right) in neighbours.into_iter().flatten() {
                pairs[left] = self.merge_of(ids[left], ids[right]);
                if pairs[left] != NO_MERGE {
                    heap.push(candidate(pairs[left], left));
                }
            }
        }
    }
}

/// A merge at a place, in the order in which merges happen: rank, then place.
fn candidate(merge: u64, at: usize) -> Reverse<u64> {
    Reverse(u64::from(rank(merge)) << 32 | at as u64)
}

fn rank(merge: u64) -> u32 {
    (merge >> 32) as u32
}

fn merged_id(merge: u64) -> u32 {
    merge as u32
}

fn leftmost_lowest(pairs: &[u64]) -> Option<(usize, u64)> {
    let mut best = (0, NO_MERGE);
    for (at, &merge) in pairs.iter().enumerate() {
        if merge < best.1 {
            best = (at, merge);
        }
    }
    (best.1 != NO_MERGE).then_some(best)
}

/// Which symbols are neighbours while symbols between them go away.
struct Links {
    previous: Vec<u32>,
    next: Vec<u32>,
}

impl Links {
    fn new(len: usize) -> Self {
        let last = len as u32 - 1;
        Self {
            previous: (0..len as u32).map(|at| at.checked_sub(1).unwrap_or(GONE)).collect(),
            next: (0..len as u32).map(|at| if at == last { GONE } else { at + 1 }).collect(),
        }
    }

    fn before(&self, at: usize) -> Option<usize> {
        (self.previous[at] != GONE).then_some(self.previous[at] as usize)
    }

    fn after(&self, at: usize) -> Option<usize> {
        (self.next[at] != GONE).then_some(self.next[at] as usize)
    }

    fn remove(&mut self, at: usize) {
        let (previous, next) = (self.previous[at], self.next[at]);
        if let Some(before) = self.before(at) {
            self.next[before] = next;
        }
        if let Some(after) = self.after(at) {
            self.previous[after] = previous;
        }
    }
}
