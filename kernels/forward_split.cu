// Entry of mainloop/forward_sm80.cuh for float32 inputs that split.cu has written as pairs of fp16 numbers.
#include "mainloop/forward_sm80.cuh"
#include "tile/mma_split.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void forward_split(const ForwardArguments<Config>& arguments) {
    extern __shared__ __align__(128) char smem[];
    ForwardSm80<Config>{arguments.base, arguments.mask, arguments.score_mod, smem}.run();
}

}  // namespace cuattn
