// Products with dense bf16 matrices for few rows (decoding): every weight is read once, straight from memory to the
// registers in which `mma` wants it.
//
// The matrix's rows are the M of the product and the activations' rows its N, 8 to a tile. A lane's 16-byte load holds 8
// neighbours along the contracted axis, which fill two fragments: the sum runs over them in another order than they lie in
// memory, and the activations are read in the same order.
#include <products.cuh>

struct GemvArguments {
    const bf16* weight;  // [outputs, inputs]
    const float* bias;   // [outputs], or null
    const bf16* x;       // [rows, inputs]
    void* y;             // [rows, outputs], f32 or bf16
    u32 outputs;
    u32 inputs;          // a multiple of 32
    u32 rows;
    u32 splits;          // warps that share a stripe of 16 outputs; divides the warps of a block
    u32 stride;          // values from a row of y to the next
};

// Sums of 16 outputs from `first` on over inputs [begin, end), multiples of 32, for 8 * tiles rows of x.
template <int tiles>
DEVICE Sums<tiles> stripe_sums(const GemvArguments& args, u32 first, u32 first_row, u32 begin, u32 end) {
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    // Rows beyond the last read the last one; their results are not written.
    const bf16* low = args.weight + u64(minimum(first + g, args.outputs - 1)) * args.inputs + 8 * t;
    const bf16* high = args.weight + u64(minimum(first + g + 8, args.outputs - 1)) * args.inputs + 8 * t;
    const bf16* x[tiles];
    for (int tile = 0; tile < tiles; ++tile)
        x[tile] = args.x + u64(minimum(first_row + tile * 8 + g, args.rows - 1)) * args.inputs + 8 * t;
    Sums<tiles> sums = {};
    // Loads of this many steps are under way before the first is used: 2 KB a warp.
    constexpr int DEPTH = 2;
    for (u32 k = begin; k < end; k += 32 * DEPTH) {
        Words4 a[DEPTH][2];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const u32 at = minimum(k + 32 * i, end - 32);
            a[i][0] = load_streaming(low + at);
            a[i][1] = load_streaming(high + at);
        }
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            if (k + 32 * i >= end) break;
            const u32 first_half[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
            const u32 second_half[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile) {
                const Words4 b = *reinterpret_cast<const Words4*>(x[tile] + k + 32 * i);
                const u32 b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
                mma_bf16(sums.of[tile], first_half, b_first);
                mma_bf16(sums.of[tile], second_half, b_second);
            }
        }
    }
    return sums;
}

// Blocks (x) take stripes of 16 outputs, blocks (y) take 8 * tiles rows. Shared memory: 512 * tiles bytes a warp.
template <int tiles, typename Out> DEVICE void gemv(const GemvArguments& args) {
    const u32 warps = blockDim.x / 32, splits = args.splits;
    const u32 stripe = blockIdx.x * (warps / splits) + warp_id() / splits, part = warp_id() % splits;
    const u32 first = stripe * 16, first_row = blockIdx.y * 8 * tiles;
    const bool present = first < args.outputs;
    const u32 steps = args.inputs / 32, begin = steps * part / splits, end = steps * (part + 1) / splits;
    Sums<tiles> sums = {};
    if (present && begin < end) sums = stripe_sums<tiles>(args, first, first_row, 32 * begin, 32 * end);
    const bool whole = gather_parts<tiles>(sums, part, splits);
    if (!whole || !present) return;
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    for (int tile = 0; tile < tiles; ++tile)
        for (int i = 0; i < 4; ++i) {
            const u32 output = first + g + (i / 2) * 8, row = first_row + tile * 8 + 2 * t + i % 2;
            if (output >= args.outputs || row >= args.rows) continue;
            const float bias = args.bias == nullptr ? 0.0f : args.bias[output];
            write(static_cast<Out*>(args.y), u64(row) * args.stride + output, sums.of[tile][i] + bias);
        }
}

KERNEL(gemv_8_f32, GemvArguments, 256, 4) { gemv<1, float>(args); }
KERNEL(gemv_16_f32, GemvArguments, 256, 3) { gemv<2, float>(args); }
KERNEL(gemv_32_f32, GemvArguments, 256, 2) { gemv<4, float>(args); }
KERNEL(gemv_8_bf16, GemvArguments, 256, 4) { gemv<1, bf16>(args); }
KERNEL(gemv_16_bf16, GemvArguments, 256, 3) { gemv<2, bf16>(args); }
KERNEL(gemv_32_bf16, GemvArguments, 256, 2) { gemv<4, bf16>(args); }
