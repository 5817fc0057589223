// The experts' products for few rows an expert (decoding): every weight is read once and unpacked in registers.
#include <experts.cuh>
#include <products.cuh>

struct RepackArguments {
    const u8* blocks;   // [experts, rows, blocks, 16] as in the checkpoint, low nibble first
    const u8* scales;   // [experts, rows, blocks]
    Words4* weights;    // [experts, stripes, ...], see mxfp4.cuh
    u8* exponents;      // [experts, stripes, ...]
    u32* largest;       // the largest scale that was seen
    u32 experts;
    u32 rows;           // a multiple of 16
    u32 blocks_of_row;
    u32 interleaved;    // 1: even rows gate, odd rows up; a stripe takes 8 gates, then their 8 ups
};

// Which row of the checkpoint is row `row` of stripe `stripe`.
DEVICE u32 source_row(u32 stripe, u32 row, u32 interleaved) {
    return interleaved ? 16 * stripe + 2 * (row % 8) + row / 8 : 16 * stripe + row;
}

// Exponent of bf16 for scale 2^(s - 127) times 2^126. Scales beyond 2 do not fit; the caller refuses them by `largest`.
DEVICE u8 exponent_of(u32 scale) { return u8(minimum(scale + 126, 254u)); }

// One block of a row a thread. Blocks (x) run over experts and stripes, blocks (y) over a stripe's
// blocks and rows.
KERNEL(repack, RepackArguments, 256, 1) {
    const u32 index = blockIdx.y * blockDim.x + threadIdx.x;
    const u32 row = index % 16, block = index / 16, stripes = args.rows / 16;
    const u32 expert = blockIdx.x / stripes, stripe = blockIdx.x % stripes;
    // Scales of up to 16 blocks are kept for each stripe even where blocks are missing.
    if (block >= ceil_div(args.blocks_of_row, 16) * 16) return;
    const u64 stripe_index = u64(expert) * stripes + stripe;
    const u32 group = block / 4, t = block % 4, lane = row % 8 * 4 + t;
    u8* exponent = args.exponents + stripe_index * stripe_scales(args.blocks_of_row) +
                   ((group / 4 * 32 + lane) * 4 + group % 4) * 2 + row / 8;
    if (block >= args.blocks_of_row) {
        *exponent = 0;
        return;
    }
    const u64 from = (u64(expert) * args.rows + source_row(stripe, row, args.interleaved)) * args.blocks_of_row + block;
    const u32 scale = args.scales[from];
    if (scale > 128) atomicMax(args.largest, scale);
    *exponent = exponent_of(scale);
    const Words4 words = *reinterpret_cast<const Words4*>(args.blocks + 16 * from);
    // A group's blocks lie one after the other, 16 rows each; the last group may have fewer.
    args.weights[stripe_index * stripe_words(args.blocks_of_row) + group * 64 + t * 16 + row] =
        Words4{pack(words.x), pack(words.y), pack(words.z), pack(words.w)};
}

// What a block works on: one stripe of one expert and up to 8 * tiles of its pairs.
struct Work {
    u32 expert;
    u32 stripe;
    u32 part;    // of the contracted axis
    u32 first;   // place of the first pair in `sorted`
    u32 pairs;   // how many pairs there are from there on, maybe none
};

// Sums of a stripe for 8 * tiles pairs from place `first` on, this warp's part of the contracted axis. `divisor` turns a
// pair into a row of x; 0 means that x is ordered by place.
template <int tiles>
DEVICE Sums<tiles> stripe_sums(const ExpertsArguments& args, const Work& work, u32 divisor) {
    const u32 g = lane_id() / 4, t = lane_id() % 4, blocks = args.inputs / 32, stripes = args.rows / 16;
    const u64 stripe = u64(work.expert) * stripes + work.stripe;
    const Words4* weights = args.weights + stripe * stripe_words(blocks);
    const u8* exponents = args.exponents + stripe * stripe_scales(blocks);
    const bf16* rows[tiles];
    for (int tile = 0; tile < tiles; ++tile) {
        const u32 place = work.first + tile * 8 + g;
        rows[tile] = nullptr;
        if (tile * 8 + g < work.pairs)
            rows[tile] = args.x + u64(divisor == 0 ? place : args.sorted[place] / divisor) * args.inputs;
    }
    Sums<tiles> sums = {};
    const u32 quads = ceil_div(blocks, 16);
    for (u32 quad = quads * work.part / args.splits; quad < quads * (work.part + 1) / args.splits; ++quad) {
        const Words2 scales = *reinterpret_cast<const Words2*>(exponents + (quad * 32 + lane_id()) * 8);
        Group groups[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) groups[i] = load_group(weights, blocks, 4 * quad + i);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 block = 16 * quad + 4 * i + t;
            if (16 * quad + 4 * i >= blocks) break;
            const Words4* x[tiles];
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile)
                x[tile] = rows[tile] == nullptr || block >= blocks
                              ? nullptr : reinterpret_cast<const Words4*>(rows[tile] + 32 * block);
            const u32 pair = i < 2 ? scales.x : scales.y;
            multiply_group<tiles>(sums.of, groups[i], i % 2 == 0 ? pair : pair >> 16, x);
        }
    }
    return sums;
}

template <int tiles, bool gated>
DEVICE void write_stripe(const ExpertsArguments& args, const Work& work, const Sums<tiles>& sums) {
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 pair = tile * 8 + lane_id() % 4 * 2 + i;
            if (pair >= work.pairs) continue;
            const float(&of)[4] = sums.of[tile];
            if (gated) write_gated(args, work.expert, work.stripe, work.first + pair, of[i], of[2 + i]);
            else write_down(args, work.expert, work.stripe, work.first + pair, of[i], of[2 + i]);
        }
}

// Blocks (x) take stripes, blocks (y) visited experts. Shared memory: 512 * tiles bytes a warp.
template <int tiles, bool gated> DEVICE void experts(const ExpertsArguments& args) {
    const u32 warps = blockDim.x / 32;
    if (blockIdx.y >= args.active[0]) return;
    Work work;
    work.expert = args.active[1 + blockIdx.y];
    work.stripe = blockIdx.x * (warps / args.splits) + warp_id() / args.splits;
    work.part = warp_id() % args.splits;
    const bool present = 16 * work.stripe < args.rows;
    const u32 end = args.starts[work.expert + 1];
    for (work.first = args.starts[work.expert]; work.first < end; work.first += 8 * tiles) {
        work.pairs = minimum(end - work.first, u32(8 * tiles));
        Sums<tiles> sums = {};
        if (present) sums = stripe_sums<tiles>(args, work, gated ? args.visits : 0);
        const bool whole = gather_parts<tiles>(sums, work.part, args.splits);
        if (!whole || !present) continue;
        write_stripe<tiles, gated>(args, work, sums);
    }
}

KERNEL(gate_up_8, ExpertsArguments, 256, 2) { experts<1, true>(args); }
KERNEL(gate_up_16, ExpertsArguments, 256, 2) { experts<2, true>(args); }
KERNEL(gate_up_32, ExpertsArguments, 256, 1) { experts<4, true>(args); }
KERNEL(down_8, ExpertsArguments, 256, 2) { experts<1, false>(args); }
KERNEL(down_16, ExpertsArguments, 256, 2) { experts<2, false>(args); }
KERNEL(down_32, ExpertsArguments, 256, 1) { experts<4, false>(args); }

struct CombineArguments {
    const float* y;        // [tokens * visits, hidden] by pair
    const u32* chosen;     // [tokens, visits]
    const float* weights;  // [tokens, visits]
    float* sum;            // [tokens, hidden]
    u32 hidden;
    u32 visits;
    u32 first;             // first expert that this rank holds
    u32 held;
};

// The weighted sum over a token's experts, in the order of its visits; those of other ranks add nothing. Blocks (y) are
// tokens.
KERNEL(combine, CombineArguments, 256, 1) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (column >= args.hidden) return;
    float sum = 0.0f;
    for (u32 visit = 0; visit < args.visits; ++visit) {
        const u32 pair = token * args.visits + visit;
        if (args.chosen[pair] - args.first < args.held) sum += args.weights[pair] * args.y[u64(pair) * args.hidden + column];
    }
    args.sum[u64(token) * args.hidden + column] = sum;
}
