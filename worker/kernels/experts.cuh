// What the experts' products for few rows and for many share.
#pragma once
#include <mxfp4.cuh>

struct ExpertsArguments {
    const Words4* weights;  // [held, stripes, ...]
    const u8* exponents;    // [held, stripes, ...]
    const float* bias;      // [held, rows] in the checkpoint's order, or null
    const bf16* x;          // gate_up: [tokens, inputs]; down: [pairs, inputs] by sorted place
    void* y;                // gate_up: bf16 [pairs, rows / 2] by sorted place; down: f32 [pairs, rows] by pair
    const u32* starts;      // [held + 1]
    const u32* sorted;      // [pairs]
    const u32* active;      // [held + 1]
    u32 rows;               // a multiple of 16
    u32 inputs;             // a multiple of 32
    u32 visits;             // pairs of a token
    u32 splits;             // warps that share a stripe
    float limit;            // of gate and up; gate_up alone
};

// Clamped SwiGLU: gate * sigmoid(1.702 gate) * (up + 1), the gate clamped above, up on both sides.
DEVICE float swiglu(float gate, float up, float limit) {
    gate = minimum(gate, limit);
    up = maximum(minimum(up, limit), -limit);
    return gate / (1.0f + expf(-1.702f * gate)) * (up + 1.0f);
}

// Writes unit g of a stripe of gate_up for the pair at `place`, from the sums of its gate and its up.
DEVICE void write_gated(const ExpertsArguments& args, u32 expert, u32 stripe, u32 place, float gate, float up) {
    const u32 unit = 8 * stripe + lane_id() / 4;
    const float* bias = args.bias + u64(expert) * args.rows + 2 * unit;
    const float value = swiglu(gate + bias[0], up + bias[1], args.limit);
    static_cast<bf16*>(args.y)[u64(place) * (args.rows / 2) + unit] = to_bf16(value);
}

// Writes rows g and g + 8 of a stripe of down for the pair at `place`.
DEVICE void write_down(const ExpertsArguments& args, u32 expert, u32 stripe, u32 place, float low, float high) {
    const u32 row = 16 * stripe + lane_id() / 4;
    const float* bias = args.bias == nullptr ? nullptr : args.bias + u64(expert) * args.rows + row;
    float* y = static_cast<float*>(args.y) + u64(args.sorted[place]) * args.rows + row;
    y[0] = low + (bias == nullptr ? 0.0f : bias[0]);
    y[8] = high + (bias == nullptr ? 0.0f : bias[8]);
}
