// Entry of mainloop/forward_sm80.cuh: one CTA per query tile, head, batch, column chunk of out and split of the keys.
#include "mainloop/forward_sm80.cuh"
#include "tile/mma_half.cuh"
#include "tile/mma_wide.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void forward_sm80(const ForwardArguments<Config>& arguments) {
    extern __shared__ __align__(128) char smem[];
    ForwardSm80<Config>{arguments.base, arguments.mask, arguments.score_mod, smem}.run();
}

}  // namespace cuattn
