// One function an instruction, for devices. tests/emulator/instructions.cuh has the same functions for the host; each is
// tested on a device against the other.
#pragma once

#define DEVICE __device__ __forceinline__
#define KERNEL(name, Arguments, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Arguments args)

extern __shared__ __align__(128) unsigned char phalanx_shared_memory[];
// The block's dynamic shared memory, aligned to 128 bytes.
DEVICE u8* shared_memory() { return phalanx_shared_memory; }

// Two f32 to bf16, to nearest even, the first into the lower half.
DEVICE u32 convert_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Products of two pairs of bf16, to nearest even. A multiplication alone exists from sm_90 on.
DEVICE u32 multiply_bf16x2(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

// (a & b) | c in one instruction.
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// 2^x and 1/x to about 2 units in the last place; results below 2^-126 become zero.
DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d += A B for A [16, 16] and B [16, 8] in bf16, d [16, 8] in f32. With g = lane / 4 and t = lane % 4 a lane holds
// a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][2t+8, 2t+9],
// b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g], d = { d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1] }.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Four 8×8 matrices of bf16 from shared memory: lane 8i + r gives the address of row r of matrix i (16 bytes, aligned);
// lane 4g + t gets the values 2t and 2t+1 of row g of matrix i in r[i].
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// The same with each matrix transposed: lane 4g + t gets the values g of the rows 2t and 2t+1.
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Begins to copy 16 bytes from global to shared memory, both aligned to 16; zeros instead when not `valid`, and then
// `global` is not read.
DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0) : "memory");
}
// Closes the group of this thread's copies since the last one.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `pending` groups of this thread have arrived. Other threads see them after a barrier.
template <int pending> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Sixteen bytes that are read once and need not stay in the first-level cache. Nothing may write them meanwhile.
DEVICE Words4 load_streaming(const void* global) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
    return v;
}

// Loads and stores that other devices and the host see, in the order of acquire and release.
DEVICE u32 load_acquire(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
DEVICE void store_release(u32* address, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
// Nanoseconds since some moment, the same clock for all of a device.
DEVICE u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
// Lets others go first while waiting.
DEVICE void wait_a_little() { __nanosleep(40); }

// Cosine and sine to f64's precision, of any angle.
DEVICE void cos_sin(double angle, double& cosine, double& sine) { sincos(angle, &sine, &cosine); }
