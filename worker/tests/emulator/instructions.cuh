// The host's twin of kernels/instructions.cuh: a block's threads are fibers of one thread of the system, and the lanes
// of a warp meet at every instruction that they execute together.
//
// Found here that hardware never tells: lanes that do not meet, accesses beyond a buffer (guard pages), values read from
// shared or global memory before they were written (poison: all bits set, which is NaN in f32 and bf16), asynchronous
// copies that nobody waited for (they land only at the wait).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define DEVICE static inline
#define __align__(n) alignas(n)
#define __restrict__ __restrict

namespace emulator {

struct Index { u32 x, y, z; };

// One lane's operands at the instruction where its warp meets.
struct Call {
    const char* name;
    const void* in0;
    const void* in1;
    void* out;
    u32 number;
};

struct Thread {
    Index threadIdx;
    Index blockIdx;
    Index blockDim;
    Index gridDim;
    u8* shared;
    u32 shared_bytes;
};

typedef void (*WarpOperation)(Call* const lanes[32]);

// Of the thread that runs now.
Thread& current();
// Waits for the whole warp; the last lane to come does the work for all.
void meet(const char* name, WarpOperation operation, const void* in0, const void* in1, void* out, u32 number);
// Waits for the whole block.
void barrier();
// Asynchronous copies of this thread.
void copy_later(void* shared, const void* global, bool valid);
void close_group();
void land_groups(u32 pending);
void yield();
u64 clock_nanoseconds();
[[noreturn]] void fail(const char* what);

struct Entry {
    void (*body)(const void*);
    u32 argument_bytes;
    u32 threads;
};

template <typename A, void (*body)(const A)> void call(const void* args) {
    A copy;
    std::memcpy(&copy, args, sizeof(A));
    body(copy);
}

}  // namespace emulator

#define threadIdx (emulator::current().threadIdx)
#define blockIdx (emulator::current().blockIdx)
#define blockDim (emulator::current().blockDim)
#define gridDim (emulator::current().gridDim)

#define KERNEL(name, Arguments, threads_, blocks_)                                                             \
    static void name##_body(const Arguments args);                                                             \
    extern "C" {                                                                                               \
    extern const emulator::Entry name;                                                                         \
    const emulator::Entry name = {&emulator::call<Arguments, name##_body>, sizeof(Arguments), threads_};       \
    }                                                                                                          \
    static void name##_body(const Arguments args)

DEVICE u8* shared_memory() { return emulator::current().shared; }

DEVICE float __uint_as_float(u32 bits) { float value; std::memcpy(&value, &bits, 4); return value; }
DEVICE u32 __float_as_uint(float value) { u32 bits; std::memcpy(&bits, &value, 4); return bits; }
DEVICE double __longlong_as_double(i64 bits) { double value; std::memcpy(&value, &bits, 8); return value; }
DEVICE i64 __double_as_longlong(double value) { i64 bits; std::memcpy(&bits, &value, 8); return bits; }
DEVICE int __popc(u32 bits) { return __builtin_popcount(bits); }
DEVICE int __ffs(u32 bits) { return __builtin_ffs(int(bits)); }
DEVICE int __clzll(i64 bits) { return bits == 0 ? 64 : __builtin_clzll(u64(bits)); }
DEVICE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
DEVICE float __int_as_float(int bits) { return __uint_as_float(u32(bits)); }

DEVICE u32 emulated_round_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if (value != value) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
DEVICE u32 convert_bf16x2(float low, float high) {
    return emulated_round_bf16(low) | (emulated_round_bf16(high) << 16);
}
DEVICE u32 multiply_bf16x2(u32 a, u32 b) {
    float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
    float high = __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
    return convert_bf16x2(low, high);
}
DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
DEVICE float exp2_approximate(float x) { float y = exp2f(x); return y < 1.17549435e-38f ? 0.0f : y; }
DEVICE float reciprocal_approximate(float x) { return 1.0f / x; }

DEVICE void __syncthreads() { emulator::barrier(); }

namespace emulator {
inline void shuffle_xor(Call* const lanes[32]) {
    for (u32 i = 0; i < 32; ++i) std::memcpy(lanes[i]->out, lanes[i ^ lanes[i]->number]->in0, 4);
}
inline void shuffle_from(Call* const lanes[32]) {
    for (u32 i = 0; i < 32; ++i) std::memcpy(lanes[i]->out, lanes[lanes[i]->number & 31]->in0, 4);
}
inline void shuffle_up(Call* const lanes[32]) {
    for (u32 i = 0; i < 32; ++i) {
        const u32 by = lanes[i]->number;
        std::memcpy(lanes[i]->out, lanes[i >= by ? i - by : i]->in0, 4);
    }
}
inline void shuffle_down(Call* const lanes[32]) {
    for (u32 i = 0; i < 32; ++i) {
        const u32 from = i + lanes[i]->number;
        std::memcpy(lanes[i]->out, lanes[from < 32 ? from : i]->in0, 4);
    }
}
inline void ballot(Call* const lanes[32]) {
    u32 votes = 0;
    for (u32 i = 0; i < 32; ++i) votes |= (lanes[i]->number ? 1u : 0u) << i;
    for (u32 i = 0; i < 32; ++i) std::memcpy(lanes[i]->out, &votes, 4);
}
inline void nothing(Call* const*) {}

// Eight values side by side; the compiler makes vector instructions of them.
typedef float Row8 __attribute__((vector_size(32)));
typedef u32 Pairs8 __attribute__((vector_size(32)));

// Pairs of bf16 to f32: the lower halves, the upper halves.
inline Row8 lower_halves(Pairs8 pairs) { return (Row8)(pairs << 16); }
inline Row8 upper_halves(Pairs8 pairs) { return (Row8)(pairs & 0xffff0000u); }

inline void matrix_multiply(Call* const lanes[32]) {
    // Pairs along the contracted axis: a[row][pair], b[pair][column].
    alignas(32) u32 a[16][8], b[8][8];
    alignas(32) float d[16][8];
    for (u32 lane = 0; lane < 32; ++lane) {
        const u32 g = lane / 4, t = lane % 4;
        const u32* fa = static_cast<const u32*>(lanes[lane]->in0);
        const u32* fb = static_cast<const u32*>(lanes[lane]->in1);
        const float* fd = static_cast<const float*>(lanes[lane]->out);
        a[g][t] = fa[0];
        a[g + 8][t] = fa[1];
        a[g][t + 4] = fa[2];
        a[g + 8][t + 4] = fa[3];
        b[t][g] = fb[0];
        b[t + 4][g] = fb[1];
        std::memcpy(&d[g][2 * t], fd, 8);
        std::memcpy(&d[g + 8][2 * t], fd + 2, 8);
    }
    Row8 low[8], high[8];
    for (u32 pair = 0; pair < 8; ++pair) {
        Pairs8 row;
        std::memcpy(&row, b[pair], 32);
        low[pair] = lower_halves(row);
        high[pair] = upper_halves(row);
    }
    for (u32 row = 0; row < 16; ++row) {
        Row8 sum;
        std::memcpy(&sum, d[row], 32);
        for (u32 pair = 0; pair < 8; ++pair) {
            sum += __uint_as_float(a[row][pair] << 16) * low[pair];
            sum += __uint_as_float(a[row][pair] & 0xffff0000u) * high[pair];
        }
        std::memcpy(d[row], &sum, 32);
    }
    for (u32 lane = 0; lane < 32; ++lane) {
        const u32 g = lane / 4, t = lane % 4;
        float* fd = static_cast<float*>(lanes[lane]->out);
        std::memcpy(fd, &d[g][2 * t], 8);
        std::memcpy(fd + 2, &d[g + 8][2 * t], 8);
    }
}

inline void read_matrices(Call* const lanes[32], bool transposed) {
    for (u32 i = 0; i < 4; ++i) {
        u16 rows[8][8];
        for (u32 r = 0; r < 8; ++r) {
            const void* row = lanes[8 * i + r]->in0;
            if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row that is not aligned to 16 bytes");
            std::memcpy(rows[r], row, 16);
        }
        for (u32 lane = 0; lane < 32; ++lane) {
            const u32 g = lane / 4, t = lane % 4;
            const u16 first = transposed ? rows[2 * t][g] : rows[g][2 * t];
            const u16 second = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
            static_cast<u32*>(lanes[lane]->out)[i] = u32(first) | (u32(second) << 16);
        }
    }
}
inline void read_straight(Call* const lanes[32]) { read_matrices(lanes, false); }
inline void read_transposed(Call* const lanes[32]) { read_matrices(lanes, true); }
}  // namespace emulator

template <typename T> static inline T __shfl_xor_sync(u32, T value, u32 mask) {
    static_assert(sizeof(T) == 4);
    T result;
    emulator::meet("shfl.xor", emulator::shuffle_xor, &value, nullptr, &result, mask);
    return result;
}
template <typename T> static inline T __shfl_sync(u32, T value, u32 lane) {
    static_assert(sizeof(T) == 4);
    T result;
    emulator::meet("shfl", emulator::shuffle_from, &value, nullptr, &result, lane);
    return result;
}
template <typename T> static inline T __shfl_up_sync(u32, T value, u32 by) {
    static_assert(sizeof(T) == 4);
    T result;
    emulator::meet("shfl.up", emulator::shuffle_up, &value, nullptr, &result, by);
    return result;
}
template <typename T> static inline T __shfl_down_sync(u32, T value, u32 by) {
    static_assert(sizeof(T) == 4);
    T result;
    emulator::meet("shfl.down", emulator::shuffle_down, &value, nullptr, &result, by);
    return result;
}
DEVICE u32 __ballot_sync(u32, bool vote) {
    u32 votes;
    emulator::meet("vote", emulator::ballot, nullptr, nullptr, &votes, vote);
    return votes;
}
DEVICE bool __any_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
DEVICE bool __all_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
DEVICE void __syncwarp() { emulator::meet("syncwarp", emulator::nothing, nullptr, nullptr, nullptr, 0); }

DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::meet("mma", emulator::matrix_multiply, a, b, d, 0);
}
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    emulator::meet("ldmatrix", emulator::read_straight, row, nullptr, r, 0);
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    emulator::meet("ldmatrix.trans", emulator::read_transposed, row, nullptr, r, 0);
}

DEVICE void copy_async(void* shared, const void* global, bool valid = true) { emulator::copy_later(shared, global, valid); }
DEVICE void copy_async_commit() { emulator::close_group(); }
template <int pending> static inline void copy_async_wait() { emulator::land_groups(pending); }

DEVICE Words4 load_streaming(const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("a load of 16 bytes that is not aligned to 16");
    Words4 v;
    std::memcpy(&v, global, 16);
    return v;
}

DEVICE u32 atomicAdd(u32* address, u32 value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
DEVICE float atomicAdd(float* address, float value) {
    u32* bits = reinterpret_cast<u32*>(address);
    u32 seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(bits, &seen, __float_as_uint(__uint_as_float(seen) + value), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return __uint_as_float(seen);
}
DEVICE u64 atomicMax(u64* address, u64 value) {
    u64 seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return seen;
}
DEVICE u32 atomicMax(u32* address, u32 value) {
    u32 seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return seen;
}
DEVICE u32 atomicOr(u32* address, u32 value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
DEVICE void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

DEVICE u32 load_acquire(const u32* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
DEVICE void store_release(u32* address, u32 value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }
DEVICE u64 nanoseconds() { return emulator::clock_nanoseconds(); }
DEVICE void wait_a_little() { emulator::yield(); }

DEVICE void cos_sin(double angle, double& cosine, double& sine) {
    cosine = std::cos(angle);
    sine = std::sin(angle);
}
