// What every kernel uses: types, bf16, reductions. No system header is included, since NVRTC has none at hand.
//
// The same sources run on the host in tests: "instructions.cuh" is found in kernels/ for a device, where it wraps PTX,
// and in tests/emulator/ for the host, where it does the same by the PTX manual's fragment layouts.
//
// A kernel is written `KERNEL(name, Arguments, threads, blocks) { ... }`: `args` holds its one parameter, a struct of
// plain values in the order in which the launch wrote them; `threads` is the block's size (or its maximum) and `blocks`
// how many of them a multiprocessor must be able to hold, which caps the registers. All shared memory is dynamic.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// Sixteen bytes, the widest load.
struct alignas(16) Words4 { u32 x, y, z, w; };
struct alignas(8) Words2 { u32 x, y; };

#include <instructions.cuh>

// A bf16 value as it lies in memory.
typedef u16 bf16;

DEVICE float from_bf16(bf16 bits) { return __uint_as_float(u32(bits) << 16); }
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
// Rounds to nearest even, `low` into the lower half.
DEVICE u32 pack_bf16(float low, float high) { return convert_bf16x2(low, high); }
DEVICE bf16 to_bf16(float value) { return bf16(convert_bf16x2(value, 0.0f)); }

DEVICE u32 lane_id() { return threadIdx.x & 31; }
DEVICE u32 warp_id() { return threadIdx.x >> 5; }

template <typename T> DEVICE T minimum(T a, T b) { return b < a ? b : a; }
template <typename T> DEVICE T maximum(T a, T b) { return a < b ? b : a; }
DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

// Sum over the lanes that differ in the bits of `mask`; 31 is the whole warp. Every lane gets the same bits.
DEVICE float warp_sum(float value, u32 mask = 31) {
    for (u32 bit = 16; bit > 0; bit >>= 1)
        if (mask & bit) value += __shfl_xor_sync(0xffffffffu, value, bit);
    return value;
}

DEVICE float warp_max(float value, u32 mask = 31) {
    for (u32 bit = 16; bit > 0; bit >>= 1)
        if (mask & bit) value = maximum(value, __shfl_xor_sync(0xffffffffu, value, bit));
    return value;
}

// Sum over the block in a fixed order; every thread gets the same bits. `scratch` holds one float a warp and may be
// used again after the next __syncthreads().
DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (lane_id() == 0) scratch[warp_id()] = value;
    __syncthreads();
    const u32 warps = blockDim.x / 32;
    float sum = 0.0f;
    for (u32 warp = 0; warp < warps; ++warp) sum += scratch[warp];
    return sum;
}
