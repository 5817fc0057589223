// Attention of sequences that have one row each: reads each key and each value once, straight into the operands of
// mma.sync, and nothing else of size. 4 * HEAD_DIM bytes a token and kv head; the products are a tenth of what an A100
// could do in the time that these take.
//
// A warp takes 32 tokens at a time. The order of tokens in the products is free as long as both agree, and so is the
// order of a head's dimensions in the first; both are chosen so that a lane loads sixteen bytes in a row, and so that
// the weights stay in the registers where the first product left them. With g = lane / 4 and t = lane % 4:
//   dims    k = 2t + {0, 1, 8, 9} of step s of dims 32c.. is dim 32c + 8t + 4s + {0, 1, 2, 3};
//   tokens  column n of tile j is token 8 * (n / 2) + 2j + n % 2, so that lane t's columns of four tiles are tokens
//           8t .. 8t + 7, in order.
#include <attention.cuh>

constexpr u32 WARPS = 4;
constexpr u32 STEP_TOKENS = 32;
constexpr u32 TILES = 4;                   // of eight tokens each
constexpr u32 QUARTERS = HEAD_DIM / 32;    // loads of a key by four lanes
constexpr u32 DIM_TILES = HEAD_DIM / 8;
constexpr u32 HALVES = GROUP > 8 ? 2 : 1;  // of the matrix of 16 heads that hold any
constexpr u32 HEAD_STRIDE = HEAD_DIM + 8;  // floats between heads in shared memory: other heads in other banks

// Shared memory: (HEAD_DIM + 10) * GROUP * 16 bytes. Grid: (splits, kv_heads, sequences). A split has work for all its
// warps from 128 tokens on. A row's bits depend on how many splits there are, and on nothing else of the batch.
struct AttendDecodeArguments {
    const bf16* q;           // [rows, kv_heads * GROUP, HEAD_DIM], rotated
    const u32* rows;         // [sequences], the row of each; null if they are in order
    const u32* lengths;      // [sequences], tokens in the cache, the row's own included; 0 for a sequence that is none
    KvCache cache;
    float* statistics;       // [sequences, kv_heads * GROUP, splits, 2]: the largest logit in base 2, and the sum
    float* partial;          // [sequences, kv_heads * GROUP, splits, HEAD_DIM], weighted relative to the former
    const float* sinks;      // [kv_heads * GROUP], read where there is `out`
    bf16* out;               // [rows, kv_heads * GROUP * HEAD_DIM] for a grid of one split, in place of the partials
};

struct State {
    Words4 q[HALVES][QUARTERS];
    float o[DIM_TILES][4];
    Softmax softmax[HALVES];
};

DEVICE void load_queries(State& state, const bf16* group) {
    for (u32 half = 0; half < HALVES; ++half) {
        const u32 head = lane_id() / 4 + 8 * half;
        for (u32 c = 0; c < QUARTERS; ++c) {
            const bf16* from = group + head * HEAD_DIM + 32 * c + lane_id() % 4 * 8;
            state.q[half][c] = head < GROUP ? *reinterpret_cast<const Words4*>(from) : Words4{0, 0, 0, 0};
        }
    }
}

DEVICE void multiply_keys(const State& state, const Words4 (&k)[TILES][QUARTERS], float (&s)[TILES][4]) {
    for (u32 tile = 0; tile < TILES; ++tile) {
        for (u32 i = 0; i < 4; ++i) s[tile][i] = 0.0f;
        for (u32 c = 0; c < QUARTERS; ++c) {
            const Words4 low = state.q[0][c];
            const Words4 high = HALVES == 2 ? state.q[HALVES - 1][c] : Words4{0, 0, 0, 0};
            mma_bf16(s[tile], {low.x, high.x, low.y, high.y}, {k[tile][c].x, k[tile][c].y});
            mma_bf16(s[tile], {low.z, high.z, low.w, high.w}, {k[tile][c].z, k[tile][c].w});
        }
    }
}

DEVICE void multiply_values(State& state, const Words4 (&v)[DIM_TILES], const float (&p)[TILES][4]) {
    u32 low[TILES], high[TILES];
    for (u32 tile = 0; tile < TILES; ++tile) {
        low[tile] = pack_bf16(p[tile][0], p[tile][1]);
        high[tile] = HALVES == 2 ? pack_bf16(p[tile][2], p[tile][3]) : 0;
    }
    for (u32 tile = 0; tile < DIM_TILES; ++tile) {
        mma_bf16(state.o[tile], {low[0], high[0], low[1], high[1]}, {v[tile].x, v[tile].y});
        mma_bf16(state.o[tile], {low[2], high[2], low[3], high[3]}, {v[tile].z, v[tile].w});
    }
}

DEVICE void load_keys(Words4 (&k)[TILES][QUARTERS], const KvCache& cache, const Place& place) {
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    const Place of_key = {__shfl_sync(0xffffffffu, place.row, g / 2), __shfl_sync(0xffffffffu, place.offset, g / 2)};
    for (u32 tile = 0; tile < TILES; ++tile)
        for (u32 c = 0; c < QUARTERS; ++c)
            k[tile][c] = exists(of_key) ? load_streaming(key(cache, of_key, 2 * tile + g % 2) + 32 * c + 8 * t)
                                        : Words4{0, 0, 0, 0};
}

DEVICE void load_values(Words4 (&v)[DIM_TILES], const KvCache& cache, const Place& place) {
    for (u32 tile = 0; tile < DIM_TILES; ++tile)
        v[tile] = exists(place) ? load_streaming(value(cache, place, 8 * tile + lane_id() / 4)) : Words4{0, 0, 0, 0};
}

// Takes away what is not visible of the step whose eight tokens from `token` are this lane's.
DEVICE void mask(float (&s)[TILES][4], u32 token, const Span& visible) {
    for (u32 tile = 0; tile < TILES; ++tile)
        for (u32 i = 0; i < 4; ++i) {
            const u32 here = token + 2 * tile + i % 2;
            if (here < visible.begin || here >= visible.end) s[tile][i] = minus_infinity();
        }
}

// Takes in tokens `first` to `first + 31`, whose places this lane knows of the eight from `first + 8t`.
DEVICE void take_step(State& state, const KvCache& cache, const Place& place, u32 first, const Span& visible) {
    const u32 token = first + lane_id() % 4 * 8;
    const bool seen_whole = first >= visible.begin && first + STEP_TOKENS <= visible.end;
    Words4 k[TILES][QUARTERS], v[DIM_TILES];
    load_keys(k, cache, place);
    if (HEAD_DIM <= 64) load_values(v, cache, place);
    float s[TILES][4];
    multiply_keys(state, k, s);
    if (!seen_whole) mask(s, token, visible);
    for (u32 half = 0; half < HALVES; ++half) {
        const float factor = absorb(state.softmax[half], s, half);
        for (u32 tile = 0; tile < DIM_TILES; ++tile)
            for (u32 i = 2 * half; i < 2 * half + 2; ++i) state.o[tile][i] *= factor;
    }
    if (HEAD_DIM > 64) {
        // The values of wide heads find no registers beside the keys. Always true, but not before the logits are there.
        if (!__any_sync(0xffffffffu, state.softmax[0].most != minus_infinity())) return;
        load_values(v, cache, place);
    }
    if (!seen_whole)
        for (u32 tile = 0; tile < DIM_TILES; ++tile) v[tile] = keep_visible(v[tile], token, visible);
    multiply_values(state, v, s);
}

// What the warps of a block bring together.
struct Merge {
    float* most;    // [WARPS, GROUP]
    float* sum;     // [WARPS, GROUP]
    float* values;  // [WARPS, GROUP, HEAD_STRIDE]
};

DEVICE void put_down(const State& state, const Merge& merge) {
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    for (u32 half = 0; half < HALVES; ++half) {
        float sum = state.softmax[half].sum;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const u32 head = g + 8 * half, place = warp_id() * GROUP + head;
        if (head < GROUP) {
            if (t == 0) {
                merge.most[place] = state.softmax[half].most;
                merge.sum[place] = sum;
            }
            for (u32 tile = 0; tile < DIM_TILES; ++tile)
                for (u32 i = 0; i < 2; ++i)
                    merge.values[place * HEAD_STRIDE + 8 * tile + 2 * t + i] = state.o[tile][2 * half + i];
        }
    }
}

// The block's result for one value of one head, to the partials or, where there are none, to the end.
DEVICE void merge_value(const AttendDecodeArguments& args, const Merge& merge, u32 head, u32 dim) {
    float most = minus_infinity(), sum = 0.0f, value = 0.0f;
    for (u32 warp = 0; warp < WARPS; ++warp) most = fmaxf(most, merge.most[warp * GROUP + head]);
    const float reference = reference_of(most);
    for (u32 warp = 0; warp < WARPS; ++warp) {
        const float factor = exp2_approximate(merge.most[warp * GROUP + head] - reference);
        sum += factor * merge.sum[warp * GROUP + head];
        value += factor * merge.values[(warp * GROUP + head) * HEAD_STRIDE + dim];
    }
    const u32 sequence = blockIdx.z, heads = args.cache.kv_heads * GROUP;
    head += blockIdx.y * GROUP;
    if (args.out != nullptr) {
        const u64 row = args.rows != nullptr ? args.rows[sequence] : sequence;
        args.out[(row * heads + head) * HEAD_DIM + dim] = to_bf16(value * finish(most, sum, args.sinks[head]));
        return;
    }
    const u64 place = (u64(sequence) * heads + head) * gridDim.x + blockIdx.x;
    args.partial[place * HEAD_DIM + dim] = value;
    if (dim == 0) {
        args.statistics[2 * place] = most;
        args.statistics[2 * place + 1] = sum;
    }
}

// Where this lane's eight tokens of the step from `first` are: those from first + 8t.
DEVICE Place find_eight(const KvCache& cache, u32 first, const Span& visible) {
    const u32* table = cache.tables + u64(blockIdx.z) * cache.table_stride;
    return find(cache, table, blockIdx.y, first + lane_id() % 4 * 8, visible);
}

KERNEL(attend_decode, AttendDecodeArguments, 128, HEAD_DIM > 64 ? 2 : 3) {
    const u32 sequence = blockIdx.z, kv_head = blockIdx.y;
    const u64 row = args.rows != nullptr ? args.rows[sequence] : sequence;
    const u32 length = args.lengths[sequence];
    const Span visible = {length == 0 ? 0 : first_visible(length - 1, args.cache.window), length};
    // Steps of a fixed grid of tokens, so that all but the first and the last are seen whole.
    const u32 first_step = visible.begin / STEP_TOKENS, steps = ceil_div(visible.end, STEP_TOKENS) - first_step;
    const u32 share = ceil_div(steps, gridDim.x);
    const u32 begin = first_step + minimum(steps, blockIdx.x * share);
    const u32 end = first_step + minimum(steps, (blockIdx.x + 1) * share);

    State state = {};
    for (u32 half = 0; half < HALVES; ++half) state.softmax[half] = {minus_infinity(), 0.0f};
    load_queries(state, args.q + (row * args.cache.kv_heads + kv_head) * GROUP * HEAD_DIM);

    // A step's place is looked up one step ahead; the table is on the way to every load.
    u32 step = begin + warp_id();
    Place place = find_eight(args.cache, step * STEP_TOKENS, visible);
    while (step < end) {
        const u32 next = step + WARPS;
        const Place later = find_eight(args.cache, next * STEP_TOKENS, visible);
        take_step(state, args.cache, place, step * STEP_TOKENS, visible);
        step = next;
        place = later;
    }

    float* shared = reinterpret_cast<float*>(shared_memory());
    const Merge merge = {shared, shared + WARPS * GROUP, shared + 2 * WARPS * GROUP};
    put_down(state, merge);
    __syncthreads();
    for (u32 i = threadIdx.x; i < GROUP * HEAD_DIM; i += 32 * WARPS)
        merge_value(args, merge, i / HEAD_DIM, i % HEAD_DIM);
}

// Brings the splits together. Grid: (kv_heads * GROUP * HEAD_DIM / 256 rounded up, sequences); a thread has two values.
struct AttendCombineArguments {
    const float* statistics;  // of `attend_decode`
    const float* partial;
    const u32* rows;          // as there
    const float* sinks;       // [heads]
    bf16* out;                // [rows, heads * HEAD_DIM]; zeros for a sequence that is none
    u32 heads;
    u32 splits;
};
KERNEL(attend_combine, AttendCombineArguments, 128, 1) {
    const u32 sequence = blockIdx.y, dim = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    if (dim >= args.heads * HEAD_DIM) return;
    const u32 head = dim / HEAD_DIM;
    const u64 first = (u64(sequence) * args.heads + head) * args.splits;
    float most = minus_infinity(), sum = 0.0f, low = 0.0f, high = 0.0f;
    for (u32 split = 0; split < args.splits; ++split) most = fmaxf(most, args.statistics[2 * (first + split)]);
    const float reference = reference_of(most);
    for (u32 split = 0; split < args.splits; ++split) {
        const float factor = exp2_approximate(args.statistics[2 * (first + split)] - reference);
        const float* values = args.partial + (first + split) * HEAD_DIM + dim % HEAD_DIM;
        sum += factor * args.statistics[2 * (first + split) + 1];
        low += factor * values[0];
        high += factor * values[1];
    }
    const float factor = finish(most, sum, args.sinks[head]);
    const u64 row = args.rows != nullptr ? args.rows[sequence] : sequence;
    *reinterpret_cast<u32*>(args.out + row * args.heads * HEAD_DIM + dim) = pack_bf16(low * factor, high * factor);
}
