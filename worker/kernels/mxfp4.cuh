// MXFP4 weights as this backend keeps them, and how they become fragments of bf16 in registers.
//
// The release keeps 32 values along the contracted axis as 16 bytes with one power of two as their scale. Here the rows of
// an expert's matrix are cut into stripes of 16, a stripe's blocks into groups of four:
//
//   weights  [stripe][group][block of the group][row][16 bytes]: a lane's load is one block of one row, and with
//            g = lane / 4 and t = lane % 4 a warp's two loads are block t of the rows g and g + 8. The last group of a
//            stripe has only the blocks that there are.
//   scales   [stripe][groups / 4][lane][group % 4][row g, row g + 8]: one byte each, the exponent of bf16 with the factor
//            2^126 that the unpacked values lack. Blocks that do not exist have scale 0.
//
// Within a block, word w of four holds the values 8w ... 8w + 7: 2p + h lies in half h of the word (16 bits), where pair p
// has its sign and its three other bits (two of exponent, one of mantissa) at
//   p = 0: 15, 8-6    p = 1: 12, 5-3    p = 2: 9, 2-0    p = 3: 14, and 13, 11, 10
// so that one shift and one mask bring a pair to where bf16 has sign (15), the exponent's last two bits (8, 7) and the
// mantissa's first (6). Read so, a value is exactly 2^-126 times what it stands for, FP4's subnormal 0.5 included.
#pragma once
#include <prelude.cuh>

// Four pairs of bf16, 2^126 times too small, from one word.
DEVICE void unpack(u32 word, u32 (&pairs)[4]) {
    constexpr u32 PLACE = 0x81c081c0u;
    pairs[0] = word & PLACE;
    pairs[1] = (word << 3) & PLACE;
    pairs[2] = (word << 6) & PLACE;
    pairs[3] = and_or(word << 1, 0x80008000u, and_or(word >> 5, 0x01000100u, (word >> 4) & 0x00c000c0u));
}

// The inverse, for eight values of four bits each as the release has them: value i in bits 4i ... 4i + 3.
DEVICE u32 pack(u32 nibbles) {
    u32 word = 0;
    for (u32 i = 0; i < 8; ++i) {
        const u32 value = nibbles >> (4 * i), sign = (value >> 3) & 1, rest = value & 7;
        const u32 pair = i / 2;
        const u32 bits = pair < 3 ? (sign << (15 - 3 * pair)) | (rest << (6 - 3 * pair))
                                  : (sign << 14) | ((rest >> 2) << 13) | ((rest & 3) << 10);
        word |= bits << (16 * (i % 2));
    }
    return word;
}

// A scale for both halves of a pair.
DEVICE u32 scale_pair(u32 exponent) { return exponent * 0x00800080u; }

// Words of 16 bytes of weights that a stripe has.
DEVICE u64 stripe_words(u32 blocks) { return u64(blocks) * 16; }
// Bytes of scales that a stripe has.
DEVICE u64 stripe_scales(u32 blocks) { return u64(ceil_div(blocks, 16)) * 256; }

// One group's weights of a lane.
struct Group {
    Words4 low;   // row g
    Words4 high;  // row g + 8
};

// Loads group `group` of a stripe whose weights begin at `weights`. Blocks that are not there are zeros.
DEVICE Group load_group(const Words4* weights, u32 blocks, u32 group) {
    const u32 g = lane_id() / 4, t = lane_id() % 4;
    Group loaded = {};
    if (4 * group + t < blocks) {
        const Words4* at = weights + u64(group) * 64 + t * 16 + g;
        loaded.low = load_streaming(at);
        loaded.high = load_streaming(at + 8);
    }
    return loaded;
}

// Word `word` of a group as the operands A of two products: of the values 8w ... 8w + 3 and 8w + 4 ... 8w + 7 of each
// lane's block. `exponents` has those of the rows g and g + 8 in its lower two bytes.
DEVICE void unpack_fragments(const Group& group, u32 exponents, u32 word, u32 (&first)[4], u32 (&second)[4]) {
    const u32 low_scale = scale_pair(exponents & 0xff), high_scale = scale_pair((exponents >> 8) & 0xff);
    const u32 low_words[4] = {group.low.x, group.low.y, group.low.z, group.low.w};
    const u32 high_words[4] = {group.high.x, group.high.y, group.high.z, group.high.w};
    u32 low[4], high[4];
    unpack(low_words[word], low);
    unpack(high_words[word], high);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        first[2 * i] = multiply_bf16x2(low[i], low_scale);
        first[2 * i + 1] = multiply_bf16x2(high[i], high_scale);
        second[2 * i] = multiply_bf16x2(low[2 + i], low_scale);
        second[2 * i + 1] = multiply_bf16x2(high[2 + i], high_scale);
    }
}

// d += the group's weights times 32 activations of each of 8 rows: `x` points at the lane's own block of its own row, or
// is null for zeros.
template <int tiles>
DEVICE void multiply_group(float (&d)[tiles][4], const Group& group, u32 exponents, const Words4* const (&x)[tiles]) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        u32 first[4], second[4];
        unpack_fragments(group, exponents, word, first, second);
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
            Words4 b = {};
            if (x[tile] != nullptr) b = x[tile][word];
            const u32 b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
            mma_bf16(d[tile], first, b_first);
            mma_bf16(d[tile], second, b_second);
        }
    }
}
