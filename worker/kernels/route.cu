// Which experts each row visits, and each expert's rows.
#include <prelude.cuh>

struct RouteArguments {
    const float* logits;  // [rows, experts]
    u32* chosen;          // [rows, visits]: experts, most probable first
    float* weights;       // [rows, visits]
    u32 rows;
    u32 experts;          // at most 1024
    u32 visits;           // at most 32
};

// A logit that may be chosen and its expert. Ties go to the lower expert.
struct Best { float logit; u32 expert; };

DEVICE bool before(const Best& a, const Best& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

// The best expert of a row that is not in `taken`, the same in all lanes. What is not a number comes last.
DEVICE Best best_expert(const float* logits, u32 experts, u32 taken) {
    Best best = {-__uint_as_float(0x7f800000u), experts};
    for (u32 i = 0, expert = lane_id(); expert < experts; ++i, expert += 32) {
        const float logit = logits[expert];
        const Best here = {logit == logit ? logit : -__uint_as_float(0x7f800000u), expert};
        if ((taken >> i & 1) == 0 && before(here, best)) best = here;
    }
    for (u32 bit = 16; bit > 0; bit >>= 1) {
        const Best other = {__shfl_xor_sync(0xffffffffu, best.logit, bit), __shfl_xor_sync(0xffffffffu, best.expert, bit)};
        if (before(other, best)) best = other;
    }
    return best;
}

// The `visits` best experts of each row, weighted by the softmax over their logits. One warp a row.
KERNEL(route, RouteArguments, 128, 1) {
    const u32 row = blockIdx.x * (blockDim.x / 32) + warp_id();
    if (row >= args.rows) return;
    const float* logits = args.logits + u64(row) * args.experts;
    // Bit i: expert 32 i + lane is taken.
    u32 taken = 0;
    // Lane i keeps choice i.
    Best mine = {0.0f, 0};
    for (u32 visit = 0; visit < args.visits; ++visit) {
        const Best best = best_expert(logits, args.experts, taken);
        if (best.expert % 32 == lane_id()) taken |= 1u << (best.expert / 32);
        if (visit == lane_id()) mine = best;
    }
    const float largest = __shfl_sync(0xffffffffu, mine.logit, 0);
    const float weight = lane_id() < args.visits ? expf(mine.logit - largest) : 0.0f;
    const float sum = warp_sum(weight);
    if (lane_id() >= args.visits) return;
    args.chosen[row * args.visits + lane_id()] = mine.expert;
    args.weights[row * args.visits + lane_id()] = weight / sum;
}

struct GroupArguments {
    const u32* chosen;  // [pairs]: pair = row * visits + visit
    u32* starts;        // [held + 1]: where each held expert's pairs begin in `sorted`
    u32* sorted;        // [pairs]: pairs by expert, ascending within one
    u32* active;        // [held + 1]: how many held experts are visited, then which
    u32* tiles;         // [1 + 3 * (held + pairs / tile)]: how many tiles, then expert, first place and pairs of each
    u32 pairs;
    u32 first;          // first expert that this rank holds
    u32 held;           // how many; at most 1024
    u32 tile;           // pairs of a tile at most
};

// Where `expert`'s pairs are among the 32 from `from` on, one bit a pair.
DEVICE u32 visitors(const GroupArguments& args, u32 expert, u32 from) {
    const u32 pair = from + lane_id();
    return __ballot_sync(0xffffffffu, pair < args.pairs && args.chosen[pair] == args.first + expert);
}

// Lists each held expert's pairs. One block; shared memory: held + 1 words.
KERNEL(group_pairs, GroupArguments, 1024, 1) {
    u32* counts = reinterpret_cast<u32*>(shared_memory());
    const u32 warps = blockDim.x / 32;
    for (u32 expert = warp_id(); expert < args.held; expert += warps) {
        u32 count = 0;
        for (u32 from = 0; from < args.pairs; from += 32) count += __popc(visitors(args, expert, from));
        if (lane_id() == 0) counts[expert] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 start = 0, active = 0, tiles = 0;
        for (u32 expert = 0; expert < args.held; ++expert) {
            const u32 count = counts[expert];
            counts[expert] = start;
            args.starts[expert] = start;
            if (count > 0) args.active[++active] = expert;
            for (u32 first = 0; first < count; first += args.tile, ++tiles) {
                u32* tile = args.tiles + 1 + 3 * tiles;
                tile[0] = expert;
                tile[1] = start + first;
                tile[2] = minimum(count - first, args.tile);
            }
            start += count;
        }
        args.starts[args.held] = start;
        args.active[0] = active;
        args.tiles[0] = tiles;
    }
    __syncthreads();
    for (u32 expert = warp_id(); expert < args.held; expert += warps) {
        u32 start = counts[expert];
        for (u32 from = 0; from < args.pairs; from += 32) {
            const u32 found = visitors(args, expert, from);
            if (found >> lane_id() & 1) args.sorted[start + __popc(found & ((1u << lane_id()) - 1))] = from + lane_id();
            start += __popc(found);
        }
    }
}
