// Entry of mainloop/forward_simt.cuh: one CTA per query tile, head, batch, column chunk of out and split of the keys.
#include "mainloop/forward_simt.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void forward_simt(const ForwardArguments<Config>& arguments) {
    extern __shared__ __align__(16) char smem[];
    ForwardSimt<Config>{arguments.base, arguments.mask, arguments.score_mod, smem}.run();
}

}  // namespace cuattn
