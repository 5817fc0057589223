// Sums and exchanges between the devices of one host: every rank pushes into its peers' memory and waits on its own.
//
// A channel is one region a rank, mapped by all its peers and zero at first:
//   slots [2][WORLD][rows][row_bytes]   what each rank pushed, by the parity of the call
//   flags [2][WORLD][rows]              the number of the call that wrote the slot
// and words of its own: calls [rows], failed. Block b of a launch uses row b of everything and nothing else, so the rows
// are as many independent exchanges, and a launch may have any number of blocks up to `rows` as long as all ranks launch
// the same.
//
// One call: write the slot [parity][own rank] of every rank, release the flag of that slot with the call's number, wait
// until the own flags of all ranks have that number, read the own slots. The number is read from `calls` and advanced
// there, so a launch that was recorded can be replayed; it wraps, and a flag is reached when flag - wanted, as a signed
// number, is not negative.
//
// Why two parities are enough: a rank ends call n only when it has seen flag n of every rank, so everyone has begun n,
// and whoever has begun n has ended n-1. Hence while a rank still reads the slots of n, its peers are in n or n+1, and
// n+1 writes the other parity; n+2 cannot begin anywhere before this rank has raised its flag n+1, which it does only
// when it has ended n. With one buffer a peer in n+1 would overwrite what is being read. This rests on launches that
// follow each other: one that may begin before the last has ended must wait for its end before it pushes.
//
// Nobody waits for ever: a wait ends when the abort word (the host's) is set, when `limit_ns` have passed, or when
// another block failed. Then `failed` and the host's error word say so, and every later launch returns at once without
// touching a peer, until the group forms anew over fresh regions. Waiting blocks must all run at the same time, so a
// launch has at most one block a multiprocessor.
//
// -DWORLD=ranks -DHIDDEN=width of a row (a multiple of 8)
#include <prelude.cuh>

constexpr u32 THREADS = 384;

struct Channel {
    // Every rank's region as this device sees it, beginning with the next rank, so that not all push to the same one at
    // once; the last is this rank's own. Indexed by constants alone: else the whole structure goes to local memory.
    u8* regions[WORLD];
    u32* calls;          // [rows], this rank's
    u32* failed;         // this rank's, not zero after a failed call
    const u32* abort;    // host memory, not zero when the group is to end
    u32* error;          // host memory, see FAILED_*
    u64 limit_ns;        // longest wait for a peer
    u32 rank;
    u32 rows;
    u32 row_bytes;       // a multiple of 16
};

// In the lowest byte of the error word; the next byte is the lowest rank that did not come.
constexpr u32 FAILED_ABORTED = 1, FAILED_LATE = 2;

// What became of a wait. Silent: another block has said why.
enum Outcome { ARRIVED, ABORTED, LATE, SILENT };

// A peer's flag takes a microsecond or so; the words that end a wait are looked at only now and then, since reading the
// host's costs as much.
constexpr u32 TRIES = 64;

// The places in a region for what rank `from` pushed in this block's row.
DEVICE Words4* slot(const Channel& channel, u8* region, u32 parity, u32 from) {
    const u64 index = u64(parity * WORLD + from) * channel.rows + blockIdx.x;
    return reinterpret_cast<Words4*>(region + index * channel.row_bytes);
}
DEVICE u32* flag(const Channel& channel, u8* region, u32 parity, u32 from) {
    u8* flags = region + u64(2 * WORLD) * channel.rows * channel.row_bytes;
    return reinterpret_cast<u32*>(flags) + (parity * WORLD + from) * channel.rows + blockIdx.x;
}
DEVICE u8* own_region(const Channel& channel) { return channel.regions[WORLD - 1]; }

DEVICE Outcome wait_for(const u32* flag, u32 wanted, const Channel& channel) {
    u64 start = 0;
    for (u32 tries = 1;; ++tries) {
        if (i32(load_acquire(flag) - wanted) >= 0) return ARRIVED;
        if (tries % TRIES != 0) continue;
        if (load_acquire(channel.failed) != 0) return SILENT;
        if (load_acquire(channel.abort) != 0) return ABORTED;
        const u64 now = nanoseconds();
        if (start == 0) start = now;
        if (now - start > channel.limit_ns) return LATE;
        wait_a_little();
    }
}

// The block's shared memory: two words for what all threads must agree on, then one float a warp.
constexpr u32 SCRATCH_OFFSET = 16;
DEVICE u32* agreed() { return reinterpret_cast<u32*>(shared_memory()); }

// Whether the channel may still be used. All threads of the block come here, and get the same answer.
DEVICE bool open(const Channel& channel) {
    if (threadIdx.x == 0) agreed()[0] = load_acquire(channel.failed);
    __syncthreads();
    return agreed()[0] == 0;
}

// Tells all ranks that this block's row of call `wanted` has been pushed and waits for theirs; false when the call
// failed. All threads of the block come here, and get the same answer.
DEVICE bool exchange(const Channel& channel, u32 wanted) {
    const u32 parity = wanted & 1, lane = lane_id();
    __syncthreads();  // what the other threads pushed comes before the flags that this thread releases
    if (warp_id() == 0) {
        u8* region = channel.regions[0];
#pragma unroll
        for (u32 i = 1; i < WORLD; ++i)
            if (lane == i) region = channel.regions[i];
        if (lane < WORLD) store_release(flag(channel, region, parity, channel.rank), wanted);
        __syncwarp();  // all flags are out before anybody waits
        Outcome outcome = ARRIVED;
        if (lane < WORLD) outcome = wait_for(flag(channel, own_region(channel), parity, lane), wanted, channel);
        const u32 aborted = __ballot_sync(0xffffffffu, outcome == ABORTED);
        const u32 late = __ballot_sync(0xffffffffu, outcome == LATE);
        const u32 failed = __ballot_sync(0xffffffffu, outcome != ARRIVED);
        if (lane == 0) {
            agreed()[1] = failed;
            if (failed == 0) channel.calls[blockIdx.x] = wanted;
            else store_release(channel.failed, 1);
            if (aborted != 0) store_release(channel.error, FAILED_ABORTED);
            else if (late != 0) store_release(channel.error, FAILED_LATE | (u32(__ffs(late)) - 1) << 8);
        }
    }
    __syncthreads();
    return agreed()[1] == 0;
}

// Sends 16 bytes to the same place of this rank's slot at every rank.
DEVICE void push(const Channel& channel, u32 parity, u32 word, Words4 message) {
#pragma unroll
    for (u32 i = 0; i < WORLD; ++i) slot(channel, channel.regions[i], parity, channel.rank)[word] = message;
}

// What rank `from` sent to this one. No load that may come from a cache for constants: the memory changes between calls.
DEVICE Words4 received(const Channel& channel, u32 parity, u32 from, u32 word) {
    return slot(channel, own_region(channel), parity, from)[word];
}

// result[row] = sum over ranks of partial[row], or, with NORM,
// x[row] += that sum, y[row] = x[row] / sqrt(mean(x²) + eps) * weight. One block of THREADS threads a row, 64 bytes of
// shared memory. The sum is taken in the order of ranks, so all ranks have the same bits, also where HALVES says that
// partial sums travel as bf16: then a rank's own is rounded too.
struct AllReduceArguments {
    Channel channel;
    const float* partial;  // [rows, HIDDEN]
    float* x;              // [rows, HIDDEN]; the result without NORM, which may be `partial`
    const float* weight;   // [HIDDEN], unused without NORM
    bf16* y;               // [rows, HIDDEN], unused without NORM
    float eps;
};

template <u32 N> DEVICE void load_floats(float (&values)[N], const float* from) {
#pragma unroll
    for (u32 i = 0; i < N; i += 4) {
        const Words4 words = *reinterpret_cast<const Words4*>(from + i);
        values[i] = __uint_as_float(words.x), values[i + 1] = __uint_as_float(words.y);
        values[i + 2] = __uint_as_float(words.z), values[i + 3] = __uint_as_float(words.w);
    }
}

template <u32 N> DEVICE void store_floats(float* to, const float (&values)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i += 4)
        *reinterpret_cast<Words4*>(to + i) = {__float_as_uint(values[i]), __float_as_uint(values[i + 1]),
                                              __float_as_uint(values[i + 2]), __float_as_uint(values[i + 3])};
}

// Four f32 or eight bf16 as they travel, and back.
DEVICE Words4 encode(const float (&v)[4]) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
}
DEVICE Words4 encode(const float (&v)[8]) {
    return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}
DEVICE void add_message(float (&sum)[4], Words4 m) {
    sum[0] += __uint_as_float(m.x), sum[1] += __uint_as_float(m.y);
    sum[2] += __uint_as_float(m.z), sum[3] += __uint_as_float(m.w);
}
DEVICE void add_message(float (&sum)[8], Words4 m) {
    sum[0] += low_bf16(m.x), sum[1] += high_bf16(m.x), sum[2] += low_bf16(m.y), sum[3] += high_bf16(m.y);
    sum[4] += low_bf16(m.z), sum[5] += high_bf16(m.z), sum[6] += low_bf16(m.w), sum[7] += high_bf16(m.w);
}
DEVICE void store_halves(bf16* to, const float (&v)[4]) {
    *reinterpret_cast<Words2*>(to) = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
}
DEVICE void store_halves(bf16* to, const float (&v)[8]) { *reinterpret_cast<Words4*>(to) = encode(v); }

template <bool HALVES, bool NORM> DEVICE void all_reduce(const AllReduceArguments& args) {
    static_assert(WORLD >= 1 && WORLD <= 8 && HIDDEN % 8 == 0, "see the head of this file");
    constexpr u32 PER = HALVES ? 8 : 4;  // values in 16 bytes of a message
    constexpr u32 WORDS = HIDDEN / PER, TURNS = (WORDS + THREADS - 1) / THREADS;
    const Channel& channel = args.channel;
    const u64 row = u64(blockIdx.x) * HIDDEN;
    const u32 wanted = channel.calls[blockIdx.x] + 1;
    // Everything that depends on no peer is loaded before the waits: at one row a call is nothing but latencies.
    Words4 message[TURNS];
    float values[TURNS][PER];
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 word = turn * THREADS + threadIdx.x;
        if (word >= WORDS) continue;
        load_floats(values[turn], args.partial + row + word * PER);
        message[turn] = encode(values[turn]);
    }
    if (!open(channel)) return;
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 word = turn * THREADS + threadIdx.x;
        if (word >= WORDS) continue;
        push(channel, wanted & 1, word, message[turn]);
        if (NORM) load_floats(values[turn], args.x + row + word * PER);
    }
    if (!exchange(channel, wanted)) return;
    float squares = 0.0f;
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 word = turn * THREADS + threadIdx.x;
        if (word >= WORDS) continue;
        Words4 messages[WORLD];
#pragma unroll
        for (u32 from = 0; from < WORLD; ++from) messages[from] = received(channel, wanted & 1, from, word);
        float sum[PER] = {};
#pragma unroll
        for (u32 from = 0; from < WORLD; ++from) add_message(sum, messages[from]);
#pragma unroll
        for (u32 i = 0; i < PER; ++i) {
            values[turn][i] = NORM ? values[turn][i] + sum[i] : sum[i];
            squares += values[turn][i] * values[turn][i];
        }
        store_floats(args.x + row + word * PER, values[turn]);
    }
    if (!NORM) return;
    float* scratch = reinterpret_cast<float*>(shared_memory() + SCRATCH_OFFSET);
    const float factor = rsqrtf(block_sum(squares, scratch) / float(HIDDEN) + args.eps);
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
        const u32 word = turn * THREADS + threadIdx.x;
        if (word >= WORDS) continue;
        float weight[PER];
        load_floats(weight, args.weight + word * PER);
#pragma unroll
        for (u32 i = 0; i < PER; ++i) weight[i] = values[turn][i] * factor * weight[i];
        store_halves(args.y + row + word * PER, weight);
    }
}

KERNEL(all_reduce_f32, AllReduceArguments, THREADS, 1) { all_reduce<false, false>(args); }
KERNEL(all_reduce_bf16, AllReduceArguments, THREADS, 1) { all_reduce<true, false>(args); }
KERNEL(all_reduce_norm_f32, AllReduceArguments, THREADS, 1) { all_reduce<false, true>(args); }
KERNEL(all_reduce_norm_bf16, AllReduceArguments, THREADS, 1) { all_reduce<true, true>(args); }

// result[rank] = mine of that rank, for `bytes` a rank, a multiple of 16 and at most rows * row_bytes. Block b moves the
// row_bytes from b * row_bytes on, the last one what is left: ceil(bytes / row_bytes) blocks of THREADS threads, 64
// bytes of shared memory. `mine` and `result` are aligned to 16.
struct AllGatherArguments {
    Channel channel;
    const u8* mine;  // [bytes]
    u8* result;      // [WORLD][bytes]
    u32 bytes;
};
KERNEL(all_gather_small, AllGatherArguments, THREADS, 1) {
    const Channel& channel = args.channel;
    const u32 wanted = channel.calls[blockIdx.x] + 1, start = blockIdx.x * channel.row_bytes;
    const u32 words = minimum(channel.row_bytes, args.bytes - start) / 16;
    if (!open(channel)) return;
    const Words4* mine = reinterpret_cast<const Words4*>(args.mine + start);
    for (u32 word = threadIdx.x; word < words; word += THREADS) push(channel, wanted & 1, word, mine[word]);
    if (!exchange(channel, wanted)) return;
#pragma unroll
    for (u32 from = 0; from < WORLD; ++from) {
        Words4* to = reinterpret_cast<Words4*>(args.result + u64(from) * args.bytes + start);
        for (u32 word = threadIdx.x; word < words; word += THREADS) to[word] = received(channel, wanted & 1, from, word);
    }
}
