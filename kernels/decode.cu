// Entry of mainloop/decode.cuh: a fixed number of CTAs, which divide the work among themselves by the lengths that they find.
#include "mainloop/decode.cuh"
#include "tile/mma_byte.cuh"
#include "tile/mma_half.cuh"
#include "tile/mma_simt.cuh"
#include "tile/mma_wide.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void decode(const DecodeArguments<Config>& arguments) {
    using Kernel = Decode<Config>;
    extern __shared__ __align__(128) char smem[];
    __shared__ typename Kernel::Shared shared;
    Kernel{arguments.base, arguments.mask, arguments.score_mod, smem, shared}.run();
}

}  // namespace cuattn
