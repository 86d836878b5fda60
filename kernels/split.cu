// Writes q, k and v as pairs of fp16 numbers (mainloop/split_input.cuh), after magnitude.cu. Each element is read and written
// once; a CTA takes one part of the rows of a batch and head.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "mainloop/split_input.cuh"
#include "ptx/convert.cuh"

namespace cuattn {

// What high leaves over of x. An infinity or NaN is all high.
__device__ __forceinline__ float left_over(float x, float high) {
    return fabsf(x) < __uint_as_float(kInfinityBits) ? x - high : 0.0f;
}

template <class Config>
struct WritePairs {
    const ForwardParams& p;

    template <int kVecBytes>
    __device__ __forceinline__ void operator()(const SplitArray& array, int slot, int part) const {
        const float unit = power_of_two(-split_exponent(p, array.first_slot + slot));
        const long long first = static_cast<long long>(slot) * array.rows;
        array.each<Config, kVecBytes>(p, slot, part, [&](long long row, int col, float4 x) {
            x.x *= unit, x.y *= unit, x.z *= unit, x.w *= unit;
            const unsigned high0 = pack_pair<__half>(x.x, x.y), high1 = pack_pair<__half>(x.z, x.w);
            const float2 back0 = unpack_pair<__half>(high0), back1 = unpack_pair<__half>(high1);
            const unsigned low0 = pack_pair<__half>(left_over(x.x, back0.x), left_over(x.y, back0.y));
            const unsigned low1 = pack_pair<__half>(left_over(x.z, back1.x), left_over(x.w, back1.y));
            const long long target_row = first + row + col / array.chunk * array.chunk_rows;
            __half* target = array.pairs + target_row * 2 * array.chunk + col % array.chunk;
            *reinterpret_cast<uint2*>(target) = make_uint2(high0, high1);
            *reinterpret_cast<uint2*>(target + array.chunk) = make_uint2(low0, low1);
        });
    }
};

template <class Config>
__device__ __forceinline__ void split(const ForwardArguments<Config>& arguments) {
    for_split_work<Config>(arguments.base, WritePairs<Config>{arguments.base});
}

}  // namespace cuattn
