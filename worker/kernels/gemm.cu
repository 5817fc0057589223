// Products with dense bf16 matrices for many rows (prefill): tiles of 128 outputs and 128 rows, whose operands come
// through shared memory in three stages.
//
// A stage holds 64 values along the contracted axis: a row of it is 128 bytes, eight chunks of 16. Chunk c of row r lies
// at c ^ (r % 8), so that the eight rows that ldmatrix reads at a time touch every bank once.
#include <products.cuh>

struct GemmArguments {
    const bf16* weight;  // [outputs, inputs]
    const float* bias;   // [outputs], or null
    const bf16* x;       // [rows, inputs]
    void* y;             // [rows, outputs], f32 or bf16
    u32 outputs;
    u32 inputs;          // a multiple of 32
    u32 rows;
    u32 stride;          // values from a row of y to the next
};

constexpr u32 TILE = 128;        // outputs, and rows
constexpr u32 DEPTH = 64;        // values along the contracted axis in a stage
constexpr u32 CHUNKS = DEPTH / 8;
constexpr u32 STAGES = 3;
constexpr u32 OPERAND = TILE * DEPTH;
// A warp has 64 outputs and 32 rows: two warps along the outputs, four along the rows.
constexpr u32 M_TILES = 4, N_TILES = 4;

// Where chunk `chunk` of row `row` of an operand lies.
DEVICE u32 place(u32 row, u32 chunk) { return row * DEPTH + ((chunk ^ (row % 8)) * 8); }

// Begins to load 128 rows of `matrix` from row `first` and column `column` on; zeros beyond its end.
DEVICE void load_operand(bf16* to, const bf16* matrix, u32 first, u32 rows, u32 column, u32 columns) {
    for (u32 i = threadIdx.x; i < TILE * CHUNKS; i += blockDim.x) {
        const u32 row = i / CHUNKS, chunk = i % CHUNKS, at = column + 8 * chunk;
        const bool valid = first + row < rows && at < columns;
        const u64 from = valid ? u64(first + row) * columns + at : 0;
        copy_async(to + place(row, chunk), matrix + from, valid);
    }
}

// One operand's part of the stage of a step.
DEVICE bf16* stage_of(bf16* operand, u32 step) { return operand + step % STAGES * OPERAND; }

DEVICE void load_stage(const GemmArguments& args, bf16* weight, bf16* x, u32 step) {
    if (step * DEPTH < args.inputs) {
        load_operand(stage_of(weight, step), args.weight, blockIdx.x * TILE, args.outputs, step * DEPTH, args.inputs);
        load_operand(stage_of(x, step), args.x, blockIdx.y * TILE, args.rows, step * DEPTH, args.inputs);
    }
    // An empty group too, so that the number of groups tells the steps.
    copy_async_commit();
}

// Sums over one stage.
DEVICE void multiply_stage(float (&sums)[M_TILES][N_TILES][4], const bf16* weight, const bf16* x) {
    const u32 lane = lane_id(), output = warp_id() % 2 * 64, row = warp_id() / 2 * 32;
#pragma unroll
    for (u32 k = 0; k < DEPTH / 16; ++k) {
        u32 a[M_TILES][4], b[N_TILES][2];
#pragma unroll
        for (u32 m = 0; m < M_TILES; ++m)
            load_matrices(a[m], weight + place(output + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (u32 n = 0; n < N_TILES; n += 2) {
            u32 two[4];
            load_matrices(two, x + place(row + 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            b[n][0] = two[0];
            b[n][1] = two[1];
            b[n + 1][0] = two[2];
            b[n + 1][1] = two[3];
        }
#pragma unroll
        for (u32 m = 0; m < M_TILES; ++m)
#pragma unroll
            for (u32 n = 0; n < N_TILES; ++n) mma_bf16(sums[m][n], a[m], b[n]);
    }
}

// Blocks (x) take 128 outputs, blocks (y) 128 rows. Shared memory: 96 KiB.
template <typename Out> DEVICE void gemm(const GemmArguments& args) {
    bf16* weight = reinterpret_cast<bf16*>(shared_memory());
    bf16* x = weight + STAGES * OPERAND;
    const u32 steps = ceil_div(args.inputs, DEPTH);
    float sums[M_TILES][N_TILES][4] = {};
    for (u32 step = 0; step < STAGES - 1; ++step) load_stage(args, weight, x, step);
    for (u32 step = 0; step < steps; ++step) {
        copy_async_wait<STAGES - 2>();
        // Everybody's copies are there, and everybody is done with the stage that is loaded next.
        __syncthreads();
        load_stage(args, weight, x, step + STAGES - 1);
        multiply_stage(sums, stage_of(weight, step), stage_of(x, step));
    }
    copy_async_wait<0>();
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    const u32 first_output = blockIdx.x * TILE + warp_id() % 2 * 64, first_row = blockIdx.y * TILE + warp_id() / 2 * 32;
#pragma unroll
    for (u32 m = 0; m < M_TILES; ++m)
#pragma unroll
        for (u32 n = 0; n < N_TILES; ++n)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 output = first_output + 16 * m + g + i / 2 * 8, row = first_row + 8 * n + 2 * t + i % 2;
                if (output >= args.outputs || row >= args.rows) continue;
                const float bias = args.bias == nullptr ? 0.0f : args.bias[output];
                write(static_cast<Out*>(args.y), u64(row) * args.stride + output, sums[m][n][i] + bias);
            }
}

KERNEL(gemm_f32, GemmArguments, 256, 1) { gemm<float>(args); }
KERNEL(gemm_bf16, GemmArguments, 256, 1) { gemm<bf16>(args); }
