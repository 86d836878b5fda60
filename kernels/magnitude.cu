// The largest finite magnitudes in q, k and v (of the backward, dout too), which decide the exponents of their fp16 pairs
// (mainloop/split_input.cuh). One CTA per array, batch, head and part of the rows writes one word: every word is written, in no
// particular order, and no result depends on one.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "mainloop/split_input.cuh"

namespace cuattn {

template <class Config>
struct FindMagnitude {
    const ForwardParams& p;

    template <int kVecBytes>
    __device__ __forceinline__ void operator()(const SplitArray& array, int slot, int part) const {
        __shared__ unsigned tops[Config::kThreads / 32];
        unsigned top = 0;
        array.each<Config, kVecBytes>(p, slot, part, [&](long long, int, float4 x) {
            top = max(max(top, finite_bits(x.x)), max(max(finite_bits(x.y), finite_bits(x.z)), finite_bits(x.w)));
        });
        top = __reduce_max_sync(0xffffffffu, top);
        if (lane_index() == 0) tops[threadIdx.x / 32] = top;
        __syncthreads();
        if (threadIdx.x != 0) return;
        for (unsigned other : tops) top = max(top, other);
        p.magnitudes[static_cast<long long>(array.first_slot + slot) * kTops + part] = top;
    }
};

template <class Config>
__device__ __forceinline__ void magnitude(const ForwardArguments<Config>& arguments) {
    for_split_work<Config>(arguments.base, FindMagnitude<Config>{arguments.base});
}
template <class Config>
__device__ __forceinline__ void magnitude(const BackwardArguments<Config>& arguments) {
    for_split_work<Config>(arguments.base, arguments.grad, FindMagnitude<Config>{arguments.base});
}

}  // namespace cuattn
