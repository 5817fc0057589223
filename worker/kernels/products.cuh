// What products of matrices share: sums of a stripe of 16 outputs, their parts by warp, results in f32 or bf16.
#pragma once
#include <prelude.cuh>

// A stripe's sums, `[tile][value]`, in the layout of the mma's result.
template <int tiles> struct Sums { float of[tiles][4]; };

// Adds the parts of a stripe. True for the warp that has the whole. All warps of the block must come.
template <int tiles> DEVICE bool gather_parts(Sums<tiles>& sums, u32 part, u32 splits) {
    float* scratch = reinterpret_cast<float*>(shared_memory());  // [warps][tiles][4][32]
    if (splits == 1) return true;
    __syncthreads();
    for (int tile = 0; tile < tiles; ++tile)
        for (int i = 0; i < 4; ++i) scratch[((warp_id() * tiles + tile) * 4 + i) * 32 + lane_id()] = sums.of[tile][i];
    __syncthreads();
    if (part != 0) return false;
    for (u32 other = 1; other < splits; ++other)
        for (int tile = 0; tile < tiles; ++tile)
            for (int i = 0; i < 4; ++i)
                sums.of[tile][i] += scratch[(((warp_id() + other) * tiles + tile) * 4 + i) * 32 + lane_id()];
    return true;
}

DEVICE void write(float* y, u64 at, float value) { y[at] = value; }
DEVICE void write(bf16* y, u64 at, float value) { y[at] = to_bf16(value); }
