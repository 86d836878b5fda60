// Entry of mainloop/decode.cuh: a fixed number of CTAs, which divide the work among themselves by the lengths that they find.
#include "mainloop/decode.cuh"
#include "ptx/griddepcontrol.cuh"
#include "tile/mma_byte.cuh"
#include "tile/mma_half.cuh"
#include "tile/mma_simt.cuh"
#include "tile/mma_wide.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void decode(const DecodeArguments<Config>& arguments, const TensorMap* maps = nullptr) {
    using Kernel = Decode<Config>;
    extern __shared__ __align__(128) char smem[];
    __shared__ typename Kernel::Shared shared;
    const unsigned slack = Kernel::kBoxed ? -smem_address(smem) % Kernel::kAlignment : 0;
    Kernel kernel{arguments.base, arguments.mask, arguments.score_mod, maps, smem + slack, shared};
    if constexpr (Kernel::kBoxed) {
        admit_grid_behind();
        kernel.begin();
        wait_for_grids_ahead();
    }
    kernel.run();
}

template <class Config>
__device__ __forceinline__ void decode(const BoxedArguments<Config>& arguments) {
    decode<Config>(arguments.variant, &arguments.k);
}

}  // namespace cuattn
