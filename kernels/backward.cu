// Entry of mainloop/backward.cuh: one CTA per key tile (deterministic: per share of the key tiles), part of the queries, KV
// head and batch.
#include "mainloop/backward.cuh"
#include "tile/warp_half.cuh"
#include "tile/warp_simt.cuh"
#include "tile/warp_split.cuh"
#include "tile/warp_tf32.cuh"
#include "tile/warp_wide.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward(const BackwardArguments<Config>& arguments) {
    extern __shared__ __align__(128) char smem[];
    Backward<Config> kernel{arguments.base, arguments.grad, arguments.mask, arguments.score_mod, smem};
    kernel.run();
}

}  // namespace cuattn
