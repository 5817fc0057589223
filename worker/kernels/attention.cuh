// What the kernels of attention share: the paged cache, the online softmax, products with the weights.
//
// Definitions: HEAD_DIM is the width of a head (a multiple of 32), GROUP how many query heads share a head of keys and
// values (1 to 16). A group's heads are rows of one matrix, so that a key read once serves all of them.
//
// Keys lie as [blocks, kv_heads, block_size, HEAD_DIM], values transposed as [blocks, kv_heads, HEAD_DIM, block_size]:
// a lane's part of the operand B of `mma_bf16` is then contiguous in both products. `block_size` is a multiple of 8, so
// eight tokens from a multiple of 8 are always in one block; they are the unit in which tokens are looked up.
#pragma once
#include <prelude.cuh>

static_assert(HEAD_DIM % 32 == 0, "a lane loads eight values of a head, four lanes make a row");
static_assert(GROUP >= 1 && GROUP <= 16, "a group's heads are rows of one matrix of 16");

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

constexpr float LOG2_E = 1.44269504f;

// 1 / sqrt(HEAD_DIM), and a change of base: the softmax works in powers of two.
DEVICE float logit_scale() { return LOG2_E / sqrtf(float(HEAD_DIM)); }

// One layer's keys and values, and where those of each sequence of the batch are.
struct KvCache {
    const bf16* keys;
    const bf16* values;
    const u32* tables;  // [sequences, table_stride], block ids; those of blocks that nobody sees are never read
    u32 table_stride;
    u32 kv_heads;
    u32 block_size;
    u32 window;         // positions that a query sees, its own included; 0 for all
};

// Tokens [begin, end) of a sequence.
struct Span { u32 begin, end; };

// First token that the query at `position` sees.
DEVICE u32 first_visible(u32 position, u32 window) {
    return window != 0 && position + 1 > window ? position + 1 - window : 0;
}

// Eight tokens' place: the row of their block's first key in [blocks * kv_heads * block_size], and how far into the
// block they are.
struct Place { u32 row, offset; };

constexpr u32 NOWHERE = 0xffffffffu;

DEVICE bool exists(const Place& place) { return place.row != NOWHERE; }

// Where tokens `token` to `token + 7` are; nowhere when none of them is visible.
DEVICE Place find(const KvCache& cache, const u32* table, u32 kv_head, u32 token, const Span& visible) {
    if (token + 8 <= visible.begin || token >= visible.end) return {NOWHERE, 0};
    const u32 index = token / cache.block_size;
    return {(table[index] * cache.kv_heads + kv_head) * cache.block_size, token - index * cache.block_size};
}

// The key of token `i` of the eight at `place`.
DEVICE const bf16* key(const KvCache& cache, const Place& place, u32 i) {
    return cache.keys + u64(place.row + place.offset + i) * HEAD_DIM;
}

// Value `dim` of the eight tokens at `place`, sixteen bytes.
DEVICE const bf16* value(const KvCache& cache, const Place& place, u32 dim) {
    return cache.values + (u64(place.row) * HEAD_DIM + dim * cache.block_size + place.offset);
}

// All bits of two of eight tokens' values, of those of the two that are visible.
DEVICE u32 visible_pair(u32 token, const Span& visible) {
    const bool first = token >= visible.begin && token < visible.end;
    const bool second = token + 1 >= visible.begin && token + 1 < visible.end;
    return (first ? 0xffffu : 0u) | (second ? 0xffff0000u : 0u);
}

// Eight tokens' values with zeros for those that are not visible. What lies there may never have been written, and a
// weight of zero does not hide a NaN.
DEVICE Words4 keep_visible(const Words4& v, u32 token, const Span& visible) {
    return {v.x & visible_pair(token, visible), v.y & visible_pair(token + 2, visible),
            v.z & visible_pair(token + 4, visible), v.w & visible_pair(token + 6, visible)};
}

// A row's softmax so far: the largest logit, and the sum of 2^(logit - most) over the tokens of this lane alone.
struct Softmax { float most, sum; };

// What 2^x is taken relative to: a row that has seen nothing yet has no largest logit.
DEVICE float reference_of(float most) { return most == minus_infinity() ? 0.0f : most; }

// Turns the raw products of row `half` (0: lane / 4, 1: that + 8) of tiles of mma's result into weights relative to the
// largest logit so far. Answers with the factor for what was summed before.
template <u32 TILES> DEVICE float absorb(Softmax& softmax, float (&s)[TILES][4], u32 half) {
    float largest = minus_infinity();
    for (u32 tile = 0; tile < TILES; ++tile) largest = fmaxf(largest, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float scale = logit_scale();
    const float most = fmaxf(softmax.most, largest * scale);
    const float reference = reference_of(most);
    const float factor = exp2_approximate(softmax.most - reference);
    float sum = 0.0f;
    for (u32 tile = 0; tile < TILES; ++tile) {
        for (u32 i = 2 * half; i < 2 * half + 2; ++i) {
            s[tile][i] = exp2_approximate(s[tile][i] * scale - reference);
            sum += s[tile][i];
        }
    }
    softmax = {most, softmax.sum * factor + sum};
    return factor;
}

// A row's last word: the sink takes part in the sum and carries no value. Answers with the factor for values that were
// weighted relative to `most`; `sum` is over all tokens.
DEVICE float finish(float most, float sum, float sink) {
    const float sink_logit = sink * LOG2_E;
    const float reference = fmaxf(most, sink_logit);
    const float kept = exp2_approximate(most - reference);
    return kept / (sum * kept + exp2_approximate(sink_logit - reference));
}
