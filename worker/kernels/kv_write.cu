// Rotary embedding, and keys and values on their way into the cache.
#include <attention.cuh>

constexpr u32 HALF = HEAD_DIM / 2;

// Cosine and sine by position and pair. The angle is rounded to f32, as the model was trained; they are taken of that
// number in f64, so that every backend turns by the same bits.
struct RotaryTableArguments {
    const float* inverse_frequencies;  // [HEAD_DIM / 2]
    float* table;                      // [positions, HEAD_DIM / 2, 2], cosine then sine
    double scale;                      // on both
    u32 positions;
};
KERNEL(rotary_table, RotaryTableArguments, 256, 1) {
    const u32 count = args.positions * HALF;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const float angle = float(i / HALF) * args.inverse_frequencies[i % HALF];
        double cosine, sine;
        cos_sin(double(angle), cosine, sine);
        args.table[2 * u64(i)] = float(cosine * args.scale);
        args.table[2 * u64(i) + 1] = float(sine * args.scale);
    }
}

// Rows that a block stores. Values are transposed on their way: eight rows of one sequence are sixteen bytes there.
constexpr u32 STORED_ROWS = 8;

struct RotateAndStoreArguments {
    const bf16* qkv;       // [rows, (GROUP + 2) * kv_heads * HEAD_DIM]: all queries, all keys, all values
    const float* table;    // of `rotary_table`
    const u32* positions;  // [rows]
    const u32* slots;      // [rows], block * block_size + place in the block; NOWHERE skips the row
    bf16* q;               // [rows, kv_heads * GROUP * HEAD_DIM]
    bf16* keys;            // the layer's part of the cache, as in attention.cuh
    bf16* values;
    u32 rows;
    u32 kv_heads;
    u32 block_size;
};

// Turns one head: the first half of it pairs with the second. `pair` and the next one.
DEVICE void rotate(const bf16* from, bf16* to, const float* turns, u32 pair) {
    const u32 first = *reinterpret_cast<const u32*>(from + pair);
    const u32 second = *reinterpret_cast<const u32*>(from + HALF + pair);
    const float cos0 = turns[2 * pair], sin0 = turns[2 * pair + 1];
    const float cos1 = turns[2 * pair + 2], sin1 = turns[2 * pair + 3];
    const float a0 = low_bf16(first), a1 = high_bf16(first), b0 = low_bf16(second), b1 = high_bf16(second);
    *reinterpret_cast<u32*>(to + pair) = pack_bf16(a0 * cos0 - b0 * sin0, a1 * cos1 - b1 * sin1);
    *reinterpret_cast<u32*>(to + HALF + pair) = pack_bf16(b0 * cos0 + a0 * sin0, b1 * cos1 + a1 * sin1);
}

// A group's queries and its key of one row, two pairs a call.
DEVICE void rotate_item(const RotateAndStoreArguments& args, u32 row, u32 head, u32 pair) {
    const u32 slot = args.slots[row];
    if (slot == NOWHERE) return;
    const u32 kv_head = blockIdx.y;
    const float* turns = args.table + u64(args.positions[row]) * HEAD_DIM;
    const bf16* from = args.qkv + u64(row) * (GROUP + 2) * args.kv_heads * HEAD_DIM;
    if (head < GROUP) {
        const u32 query = kv_head * GROUP + head;
        bf16* to = args.q + (u64(row) * args.kv_heads * GROUP + query) * HEAD_DIM;
        rotate(from + query * HEAD_DIM, to, turns, pair);
    } else {
        const u32 block = slot / args.block_size, offset = slot - block * args.block_size;
        bf16* to = args.keys + ((u64(block) * args.kv_heads + kv_head) * args.block_size + offset) * HEAD_DIM;
        rotate(from + (GROUP * args.kv_heads + kv_head) * HEAD_DIM, to, turns, pair);
    }
}

// Two values of one row.
DEVICE void store_item(const RotateAndStoreArguments& args, u32 row, u32 dim) {
    const u32 slot = args.slots[row];
    if (slot == NOWHERE) return;
    const u32 kv_head = blockIdx.y, block = slot / args.block_size, offset = slot - block * args.block_size;
    const u64 column = ((GROUP + 1) * args.kv_heads + kv_head) * HEAD_DIM + dim;
    const u32 pair =
        *reinterpret_cast<const u32*>(args.qkv + u64(row) * (GROUP + 2) * args.kv_heads * HEAD_DIM + column);
    bf16* to = args.values + ((u64(block) * args.kv_heads + kv_head) * HEAD_DIM + dim) * args.block_size + offset;
    to[0] = bf16(pair);
    to[args.block_size] = bf16(pair >> 16);
}

// Grid: (rows / STORED_ROWS rounded up, kv_heads).
KERNEL(rotate_and_store, RotateAndStoreArguments, 256, 1) {
    const u32 first = blockIdx.x * STORED_ROWS;
    const u32 rows = minimum(STORED_ROWS, args.rows - first);
    constexpr u32 ROTATIONS = (GROUP + 1) * HALF / 2;
    for (u32 i = threadIdx.x; i < rows * ROTATIONS; i += blockDim.x) {
        const u32 item = i % ROTATIONS;
        rotate_item(args, first + i / ROTATIONS, item / (HALF / 2), item % (HALF / 2) * 2);
    }
    // Rows fastest: threads beside each other write beside each other.
    for (u32 i = threadIdx.x; i < STORED_ROWS * HALF; i += blockDim.x)
        if (i % STORED_ROWS < rows) store_item(args, first + i % STORED_ROWS, i / STORED_ROWS * 2);
}
