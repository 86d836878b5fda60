// Writes q, k and v (of the backward, dout too) as pairs of fp16 numbers (mainloop/split_input.cuh), after magnitude.cu. Each
// element is read and written once; a CTA takes one part of the rows of a batch and head.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "mainloop/split_input.cuh"

namespace cuattn {

template <class Config>
struct WritePairs {
    const ForwardParams& p;

    template <int kVecBytes>
    __device__ __forceinline__ void operator()(const SplitArray& array, int slot, int part) const {
        const float unit = power_of_two(-split_exponent(p, array.first_slot + slot));
        const long long first = static_cast<long long>(slot) * array.rows;
        array.each<Config, kVecBytes>(p, slot, part, [&](long long row, int col, float4 x) {
            const Pairs two = Pairs::of(x.x * unit, x.y * unit), next = Pairs::of(x.z * unit, x.w * unit);
            const long long target_row = first + row + col / array.chunk * array.chunk_rows;
            const int in_chunk = col % array.chunk, run = Config::kPairRuns ? 32 : array.chunk;
            __half* target = array.pairs + target_row * 2 * array.chunk + in_chunk / run * 2 * run + in_chunk % run;
            *reinterpret_cast<uint2*>(target) = make_uint2(two.high, next.high);
            *reinterpret_cast<uint2*>(target + run) = make_uint2(two.low, next.low);
        });
    }
};

template <class Config>
__device__ __forceinline__ void split(const ForwardArguments<Config>& arguments) {
    for_split_work<Config>(arguments.base, WritePairs<Config>{arguments.base});
}
template <class Config>
__device__ __forceinline__ void split(const BackwardArguments<Config>& arguments) {
    for_split_work<Config>(arguments.base, arguments.grad, WritePairs<Config>{arguments.base});
}

}  // namespace cuattn
