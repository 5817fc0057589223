// Attention of sequences that have many rows. A block takes up to 128 / GROUP consecutive rows of one sequence, with
// all heads of a group: position i with head h is row i * GROUP + h of its matrix of 128. Its warps share tiles of 64
// keys and values, which come in by asynchronous copies while the tile before is worked on.
//
// Tiles begin at multiples of 64 tokens, and one that a row does not see changes nothing of it: so a row's result is
// the same to the last bit wherever its chunk of the prompt begins and whatever else is in the batch.
#include <attention.cuh>

// Matrices of 16 rows of a warp. Two halve the reads of shared memory, which else takes as long as the products; wide
// heads leave no registers for that.
constexpr u32 MATRICES = HEAD_DIM > 64 ? 1 : 2;
constexpr u32 WARPS = 8 / MATRICES;  // 4 for heads of up to 64, else 8
constexpr u32 TILE_TOKENS = 64;
constexpr u32 TILES = TILE_TOKENS / 8;
constexpr u32 EIGHTHS = HEAD_DIM / 8;
// bf16 values between rows in shared memory: 16 bytes more than a row, so that eight rows beside each other, which is
// what a matrix is, touch every bank once.
constexpr u32 KEY_STRIDE = HEAD_DIM + 8;
constexpr u32 VALUE_STRIDE = TILE_TOKENS + 8;
constexpr u32 KEYS = TILE_TOKENS * KEY_STRIDE;
constexpr u32 STAGE = KEYS + HEAD_DIM * VALUE_STRIDE;

// Consecutive rows of one sequence.
struct Rows {
    u32 sequence;
    u32 first;     // row of the batch
    u32 count;     // 1 to 128 / GROUP
    u32 position;  // of the first
};

// Shared memory: 4 * (64 * (HEAD_DIM + 8) + HEAD_DIM * 72) bytes. Grid: (tiles, kv_heads), best with those that see
// most first.
struct AttendPrefillArguments {
    const bf16* q;        // [rows, kv_heads * GROUP, HEAD_DIM], rotated
    const Rows* tiles;
    KvCache cache;        // which has the rows' own tokens already
    const float* sinks;   // [kv_heads * GROUP]
    bf16* out;            // [rows, kv_heads * GROUP * HEAD_DIM]
};

// What a warp knows of 16 rows of the block's matrix; a lane has two of them, lane / 4 and that + 8.
struct State {
    u32 q[HEAD_DIM / 16][4];
    float o[EIGHTHS][4];
    Softmax softmax[2];
};

// First row of the warp's matrix `m` in the block's.
DEVICE u32 top_of(u32 m) { return 16 * (MATRICES * warp_id() + m); }

// Row `i` of the block's matrix as an index into its positions. Rows that are none repeat the last one.
DEVICE u32 index_of(u32 i, const Rows& rows) { return minimum(i / GROUP, rows.count - 1); }

// Starts of the values of row `i` of the block's matrix in q and out.
DEVICE u64 row_start(u32 i, const Rows& rows, u32 kv_heads) {
    const u64 row = rows.first + index_of(i, rows);
    return ((row * kv_heads + blockIdx.y) * GROUP + i % GROUP) * HEAD_DIM;
}

DEVICE void begin(State& state, const AttendPrefillArguments& args, const Rows& rows, u32 top) {
    for (u32 half = 0; half < 2; ++half) {
        state.softmax[half] = {minus_infinity(), 0.0f};
        const u32 row = top + lane_id() / 4 + 8 * half;
        const bf16* q = args.q + row_start(row, rows, args.cache.kv_heads) + lane_id() % 4 * 2;
        for (u32 step = 0; step < HEAD_DIM / 16; ++step) {
            state.q[step][half] = *reinterpret_cast<const u32*>(q + 16 * step);
            state.q[step][2 + half] = *reinterpret_cast<const u32*>(q + 16 * step + 8);
        }
    }
    for (u32 tile = 0; tile < EIGHTHS; ++tile)
        for (u32 i = 0; i < 4; ++i) state.o[tile][i] = 0.0f;
}

// Tokens that any of the rows sees.
DEVICE Span visible_to(const Rows& rows, u32 window) {
    return {first_visible(rows.position, window), rows.position + rows.count};
}

// Where this lane's eight tokens of the tile from `first` are: those from first + lane % 8 * 8.
DEVICE Place find_eight(const AttendPrefillArguments& args, const Rows& rows, u32 first) {
    const u32* table = args.cache.tables + u64(rows.sequence) * args.cache.table_stride;
    return find(args.cache, table, blockIdx.y, first + lane_id() % 8 * 8, visible_to(rows, args.cache.window));
}

// Two stages take turns: the one of the tile of tokens from `first`.
DEVICE bf16* stage_of(u32 first) {
    return reinterpret_cast<bf16*>(shared_memory()) + first / TILE_TOKENS % 2 * STAGE;
}

// Begins to copy the tile of tokens from `first`; `place` is what `find_eight` said of it.
DEVICE void copy_tile(const AttendPrefillArguments& args, const Rows& rows, const Place& place, u32 first) {
    const Span visible = visible_to(rows, args.cache.window);
    bf16* stage = stage_of(first);
    for (u32 i = threadIdx.x; i < TILE_TOKENS * EIGHTHS; i += 32 * WARPS) {
        const u32 token = i / EIGHTHS, part = i % EIGHTHS * 8;
        const Place of_token = {__shfl_sync(0xffffffffu, place.row, token / 8),
                                __shfl_sync(0xffffffffu, place.offset, token / 8)};
        const bool valid = first + token >= visible.begin && first + token < visible.end;
        copy_async(stage + token * KEY_STRIDE + part, key(args.cache, of_token, token % 8) + part, valid);
    }
    for (u32 i = threadIdx.x; i < HEAD_DIM * 8; i += 32 * WARPS)
        copy_async(stage + KEYS + i / 8 * VALUE_STRIDE + i % 8 * 8, value(args.cache, place, i / 8), exists(place));
    copy_async_commit();
}

// Clears the values, among those that this thread has copied, of tokens that no row of the block sees.
DEVICE void clear_invisible(const Span& visible, u32 first) {
    const u32 token = first + lane_id() % 8 * 8;
    if (token >= visible.begin && token + 8 <= visible.end) return;
    for (u32 i = threadIdx.x; i < HEAD_DIM * 8; i += 32 * WARPS) {
        bf16* eight = stage_of(first) + KEYS + i / 8 * VALUE_STRIDE + i % 8 * 8;
        Words4* values = reinterpret_cast<Words4*>(eight);
        *values = keep_visible(*values, token, visible);
    }
}

// Both products go through all accumulators before they come back to one: a result of mma takes a while.
DEVICE void multiply_keys(const State (&states)[MATRICES], const bf16* keys, float (&s)[MATRICES][TILES][4]) {
    const bf16* lane = keys + lane_id() % 8 * KEY_STRIDE + lane_id() / 8 * 8;
    for (u32 m = 0; m < MATRICES; ++m)
        for (u32 tile = 0; tile < TILES; ++tile)
            for (u32 i = 0; i < 4; ++i) s[m][tile][i] = 0.0f;
    for (u32 step = 0; step < HEAD_DIM / 16; step += 2)
        for (u32 tile = 0; tile < TILES; ++tile) {
            u32 k[4];
            load_matrices(k, lane + 8 * tile * KEY_STRIDE + 16 * step);
            for (u32 m = 0; m < MATRICES; ++m) mma_bf16(s[m][tile], states[m].q[step], {k[0], k[1]});
            for (u32 m = 0; m < MATRICES; ++m) mma_bf16(s[m][tile], states[m].q[step + 1], {k[2], k[3]});
        }
}

DEVICE void multiply_values(State (&states)[MATRICES], const bf16* values, const float (&p)[MATRICES][TILES][4]) {
    const bf16* lane = values + lane_id() % 8 * VALUE_STRIDE + lane_id() / 8 * 8;
    for (u32 step = 0; step < TILES / 2; step += 2) {
        u32 weights[MATRICES][2][4];
        for (u32 m = 0; m < MATRICES; ++m)
            for (u32 i = 0; i < 8; ++i) {
                const float(&four)[4] = p[m][2 * step + i / 2];
                weights[m][i / 4][i % 4] = pack_bf16(four[i % 2 * 2], four[i % 2 * 2 + 1]);
            }
        for (u32 tile = 0; tile < EIGHTHS; ++tile) {
            u32 v[4];
            load_matrices(v, lane + 8 * tile * VALUE_STRIDE + 16 * step);
            for (u32 m = 0; m < MATRICES; ++m) mma_bf16(states[m].o[tile], weights[m][0], {v[0], v[1]});
            for (u32 m = 0; m < MATRICES; ++m) mma_bf16(states[m].o[tile], weights[m][1], {v[2], v[3]});
        }
    }
}

// Takes away what a row does not see.
DEVICE void mask(float (&s)[TILES][4], u32 first, u32 window, const Rows& rows, u32 top) {
    for (u32 half = 0; half < 2; ++half) {
        const u32 position = rows.position + index_of(top + lane_id() / 4 + 8 * half, rows);
        const u32 begin = first_visible(position, window);
        for (u32 tile = 0; tile < TILES; ++tile)
            for (u32 i = 0; i < 2; ++i) {
                const u32 token = first + 8 * tile + lane_id() % 4 * 2 + i;
                if (token > position || token < begin) s[tile][2 * half + i] = minus_infinity();
            }
    }
}

// Takes in the tile of tokens from `first`.
DEVICE void take_tile(State (&states)[MATRICES], const bf16* stage, u32 first, u32 window, const Rows& rows) {
    const u32 top = top_of(0), end = first + TILE_TOKENS;
    const u32 lowest = rows.position + index_of(top, rows);
    const u32 highest = rows.position + index_of(top + 16 * MATRICES - 1, rows);
    if (top / GROUP >= rows.count || first > highest || end <= first_visible(lowest, window)) return;
    float s[MATRICES][TILES][4];
    multiply_keys(states, stage, s);
    const bool seen_whole = end <= lowest + 1 && first >= first_visible(highest, window);
    for (u32 m = 0; m < MATRICES; ++m) {
        if (!seen_whole) mask(s[m], first, window, rows, top_of(m));
        for (u32 half = 0; half < 2; ++half) {
            const float factor = absorb(states[m].softmax[half], s[m], half);
            for (u32 tile = 0; tile < EIGHTHS; ++tile)
                for (u32 i = 2 * half; i < 2 * half + 2; ++i) states[m].o[tile][i] *= factor;
        }
    }
    multiply_values(states, stage + KEYS, s);
}

DEVICE void write_out(const State& state, const AttendPrefillArguments& args, const Rows& rows, u32 top) {
    for (u32 half = 0; half < 2; ++half) {
        float sum = state.softmax[half].sum;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const u32 row = top + lane_id() / 4 + 8 * half;
        if (row >= rows.count * GROUP) continue;
        const float factor = finish(state.softmax[half].most, sum, args.sinks[blockIdx.y * GROUP + row % GROUP]);
        bf16* out = args.out + row_start(row, rows, args.cache.kv_heads) + lane_id() % 4 * 2;
        for (u32 tile = 0; tile < EIGHTHS; ++tile)
            *reinterpret_cast<u32*>(out + 8 * tile) =
                pack_bf16(state.o[tile][2 * half] * factor, state.o[tile][2 * half + 1] * factor);
    }
}

// What follows from the block's rows is computed again where it is needed: registers are short here.
KERNEL(attend_prefill, AttendPrefillArguments, 32 * WARPS, HEAD_DIM > 64 ? 1 : 2) {
    const Rows& rows = args.tiles[blockIdx.x];
    const u32 window = args.cache.window;
    State states[MATRICES];
    for (u32 m = 0; m < MATRICES; ++m) begin(states[m], args, rows, top_of(m));

    // A tile's place is looked up a tile before its copy begins.
    u32 first = visible_to(rows, window).begin / TILE_TOKENS * TILE_TOKENS;
    copy_tile(args, rows, find_eight(args, rows, first), first);
    Place place = find_eight(args, rows, first + TILE_TOKENS);
    for (; first < visible_to(rows, window).end; first += TILE_TOKENS) {
        copy_async_wait<0>();
        clear_invisible(visible_to(rows, window), first);
        // All copies of this tile have landed, and nobody still reads the other stage.
        __syncthreads();
        const u32 next = first + TILE_TOKENS;
        if (next < visible_to(rows, window).end) {
            copy_tile(args, rows, place, next);
            place = find_eight(args, rows, next + TILE_TOKENS);
        }
        take_tile(states, stage_of(first), first, window, rows);
    }
    for (u32 m = 0; m < MATRICES; ++m) write_out(states[m], args, rows, top_of(m));
}
