// What works on rows of activations one by one: embedding, norms, sums, selections.
#include <prelude.cuh>

// x[row] = table[tokens[row]], widened. One block a row.
struct EmbedArguments {
    const bf16* table;   // [vocab, hidden]
    const u32* tokens;   // [rows]
    float* x;            // [rows, hidden]
    u32 hidden;
};
KERNEL(embed, EmbedArguments, 256, 1) {
    const u64 row = blockIdx.x;
    const bf16* from = args.table + u64(args.tokens[row]) * args.hidden;
    for (u32 i = threadIdx.x; i < args.hidden; i += blockDim.x) args.x[row * args.hidden + i] = from_bf16(from[i]);
}

// y[row] = x[row] / sqrt(mean(x²) + eps) * weight, after x[row] += addend[row] where there is an addend. One block a row.
struct RmsNormArguments {
    float* x;             // [rows, hidden]
    const float* addend;  // [rows, hidden], or null
    const float* weight;  // [hidden]
    bf16* y;              // [rows, hidden]
    u32 hidden;
    float eps;
};
KERNEL(rms_norm, RmsNormArguments, 256, 1) {
    float* scratch = reinterpret_cast<float*>(shared_memory());  // one a warp
    float* x = args.x + u64(blockIdx.x) * args.hidden;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < args.hidden; i += blockDim.x) {
        float value = x[i];
        if (args.addend != nullptr) {
            value += args.addend[u64(blockIdx.x) * args.hidden + i];
            x[i] = value;
        }
        squares += value * value;
    }
    const float factor = rsqrtf(block_sum(squares, scratch) / float(args.hidden) + args.eps);
    bf16* y = args.y + u64(blockIdx.x) * args.hidden;
    for (u32 i = threadIdx.x; i < args.hidden; i += blockDim.x) y[i] = to_bf16(x[i] * factor * args.weight[i]);
}

// x += y, element by element.
struct AddArguments {
    float* x;
    const float* y;
    u64 count;
};
KERNEL(add, AddArguments, 256, 1) {
    const u64 stride = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += stride) args.x[i] += args.y[i];
}

// y[i] = x[rows[i]]. One block a row of y.
struct SelectRowsArguments {
    const float* x;    // [.., width]
    const u32* rows;   // [selected]
    float* y;          // [selected, width]
    u32 width;
};
KERNEL(select_rows, SelectRowsArguments, 256, 1) {
    const float* from = args.x + u64(args.rows[blockIdx.x]) * args.width;
    float* to = args.y + u64(blockIdx.x) * args.width;
    for (u32 i = threadIdx.x; i < args.width; i += blockDim.x) to[i] = from[i];
}

// y[row] = x[row] rounded to bf16, into rows that may lie farther apart. One block a row.
struct NarrowArguments {
    const float* x;  // [rows, width]
    bf16* y;         // [rows, stride], the first `width` of each
    u32 width;
    u32 stride;
};
KERNEL(narrow, NarrowArguments, 256, 1) {
    const float* from = args.x + u64(blockIdx.x) * args.width;
    bf16* to = args.y + u64(blockIdx.x) * args.stride;
    for (u32 i = threadIdx.x; i < args.width; i += blockDim.x) to[i] = to_bf16(from[i]);
}

// y[row] = x[row] as f32, from rows that may lie farther apart. One block a row.
struct WidenArguments {
    const bf16* x;  // [rows, stride], the first `width` of each
    float* y;       // [rows, width]
    u32 width;
    u32 stride;
};
KERNEL(widen, WidenArguments, 256, 1) {
    const bf16* from = args.x + u64(blockIdx.x) * args.stride;
    float* to = args.y + u64(blockIdx.x) * args.width;
    for (u32 i = threadIdx.x; i < args.width; i += blockDim.x) to[i] = from_bf16(from[i]);
}
