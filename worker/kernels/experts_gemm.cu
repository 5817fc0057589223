// The experts' products for many rows an expert (prefill): tiles of 128 outputs of an expert and 128 of its pairs.
//
// Weights go from memory to registers, a group of four blocks ahead of their use, and are unpacked there; a warp has two
// stripes (32 outputs) and 64 pairs, so that a weight is unpacked by two warps and used for eight tiles by each.
// Activations come through shared memory in two stages of one group (128 values). The fragments' order along the
// contracted axis is that of mxfp4.cuh: lane 4g + t takes block t of its pair, 16 bytes (word w) at a time. Chunk 4t + w
// of a pair lies at 4w + t, and a pair's 16 chunks are followed by four that are empty: so eight lanes that read at the
// same time touch every bank once.
#include <experts.cuh>

struct ExpertsGemmArguments {
    ExpertsArguments experts;
    const u32* tiles;  // how many, then expert, first place and pairs of each
};

constexpr u32 TILE = 128;
constexpr u32 PAIR_CHUNKS = 20;                     // of 16 bytes, 16 of them used
constexpr u32 STAGE = TILE * PAIR_CHUNKS * 8;       // bf16 values
constexpr u32 STRIPES = 2, N_TILES = 8;             // of a warp
constexpr u32 NO_PAIR = 0xffffffffu;

// One tile of one expert.
struct Work {
    u32 expert;
    u32 first;  // place in `sorted`
    u32 pairs;  // at most TILE
};

// Begins to load group `group` of every pair's activations. `sources` has each pair's row of x.
template <bool gated>
DEVICE void load_activations(const ExpertsArguments& args, bf16* to, const u32* sources, u32 group) {
    const u32 blocks = args.inputs / 32;
    if (4 * group < blocks) {
        for (u32 i = threadIdx.x; i < TILE * 16; i += blockDim.x) {
            const u32 pair = i / 16, chunk = i % 16, t = chunk / 4, w = chunk % 4, source = sources[pair];
            const bool valid = source != NO_PAIR && 4 * group + t < blocks;
            const u64 from = valid ? u64(source) * args.inputs + 128 * group + 8 * chunk : 0;
            copy_async(to + (pair * PAIR_CHUNKS + 4 * w + t) * 8, args.x + from, valid);
        }
    }
    copy_async_commit();
}

// What a warp knows of its stripes.
struct Stripes {
    const Words4* weights[STRIPES];
    const u8* exponents[STRIPES];
    bool present[STRIPES];
};

DEVICE Stripes stripes_of(const ExpertsArguments& args, u32 expert, u32 first) {
    const u32 blocks = args.inputs / 32, count = args.rows / 16;
    Stripes stripes;
#pragma unroll
    for (u32 i = 0; i < STRIPES; ++i) {
        stripes.present[i] = first + i < count;
        const u64 stripe = u64(expert) * count + minimum(first + i, count - 1);
        stripes.weights[i] = args.weights + stripe * stripe_words(blocks);
        stripes.exponents[i] = args.exponents + stripe * stripe_scales(blocks);
    }
    return stripes;
}

// The exponents of a group: those of the rows g and g + 8 in the lower two bytes.
DEVICE u32 exponents_of(const u8* exponents, u32 group) {
    return *reinterpret_cast<const u16*>(exponents + ((group / 4 * 32 + lane_id()) * 4 + group % 4) * 2);
}

// Sums over one group: `x` has the stage's activations of this warp's pairs.
DEVICE void multiply_stage(float (&sums)[STRIPES][N_TILES][4], const Group (&groups)[STRIPES],
                           const u32 (&exponents)[STRIPES], const bf16* x) {
    const u32 g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (u32 word = 0; word < 4; ++word) {
        u32 first[STRIPES][4], second[STRIPES][4];
#pragma unroll
        for (u32 i = 0; i < STRIPES; ++i) unpack_fragments(groups[i], exponents[i], word, first[i], second[i]);
#pragma unroll
        for (u32 n = 0; n < N_TILES; ++n) {
            const Words4 b = *reinterpret_cast<const Words4*>(x + ((8 * n + g) * PAIR_CHUNKS + 4 * word + t) * 8);
            const u32 b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
#pragma unroll
            for (u32 i = 0; i < STRIPES; ++i) {
                mma_bf16(sums[i][n], first[i], b_first);
                mma_bf16(sums[i][n], second[i], b_second);
            }
        }
    }
}

template <bool gated>
DEVICE void write_stripe(const ExpertsArguments& args, const Work& work, u32 stripe, u32 first_pair,
                         const float (&sums)[N_TILES][4]) {
    const u32 t = lane_id() % 4;
#pragma unroll
    for (u32 n = 0; n < N_TILES; ++n)
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 pair = first_pair + 8 * n + 2 * t + i;
            if (pair >= work.pairs) continue;
            if (gated) write_gated(args, work.expert, stripe, work.first + pair, sums[n][i], sums[n][2 + i]);
            else write_down(args, work.expert, stripe, work.first + pair, sums[n][i], sums[n][2 + i]);
        }
}

// Blocks (x) take 128 outputs, blocks (y) tiles. Shared memory: two stages and a word a pair, 80.5 KiB.
template <bool gated> DEVICE void experts_gemm(const ExpertsGemmArguments& all) {
    const ExpertsArguments& args = all.experts;
    if (blockIdx.y >= all.tiles[0]) return;
    const u32* tile = all.tiles + 1 + 3 * blockIdx.y;
    const Work work = {tile[0], tile[1], tile[2]};
    bf16* stages = reinterpret_cast<bf16*>(shared_memory());
    u32* sources = reinterpret_cast<u32*>(stages + 2 * STAGE);
    for (u32 pair = threadIdx.x; pair < TILE; pair += blockDim.x) {
        const u32 at = work.first + minimum(pair, work.pairs - 1);
        sources[pair] = pair >= work.pairs ? NO_PAIR : gated ? args.sorted[at] / args.visits : at;
    }
    __syncthreads();

    const u32 first_stripe = blockIdx.x * (TILE / 16) + warp_id() / 2 * STRIPES, first_pair = warp_id() % 2 * 64;
    const Stripes stripes = stripes_of(args, work.expert, first_stripe);
    const u32 blocks = args.inputs / 32, steps = ceil_div(blocks, 4);
    float sums[STRIPES][N_TILES][4] = {};
    Group next[STRIPES];
    u32 next_exponents[STRIPES];
#pragma unroll
    for (u32 i = 0; i < STRIPES; ++i) {
        next[i] = load_group(stripes.weights[i], blocks, 0);
        next_exponents[i] = exponents_of(stripes.exponents[i], 0);
    }
    load_activations<gated>(args, stages, sources, 0);
    for (u32 step = 0; step < steps; ++step) {
        Group groups[STRIPES];
        u32 exponents[STRIPES];
#pragma unroll
        for (u32 i = 0; i < STRIPES; ++i) {
            groups[i] = next[i];
            exponents[i] = next_exponents[i];
            if (step + 1 < steps) {
                next[i] = load_group(stripes.weights[i], blocks, step + 1);
                next_exponents[i] = exponents_of(stripes.exponents[i], step + 1);
            }
        }
        // Everybody's copies are there, and everybody is done with the stage that is loaded next.
        copy_async_wait<0>();
        __syncthreads();
        load_activations<gated>(args, stages + (step + 1) % 2 * STAGE, sources, step + 1);
        multiply_stage(sums, groups, exponents, stages + step % 2 * STAGE + first_pair * PAIR_CHUNKS * 8);
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 i = 0; i < STRIPES; ++i)
        if (stripes.present[i]) write_stripe<gated>(args, work, first_stripe + i, first_pair, sums[i]);
}

KERNEL(gate_up_gemm, ExpertsGemmArguments, 256, 1) { experts_gemm<true>(args); }
KERNEL(down_gemm, ExpertsGemmArguments, 256, 1) { experts_gemm<false>(args); }
