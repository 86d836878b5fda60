// Entry of mainloop/backward_sm90.cuh: one CTA per key tile, part of the queries, KV head and batch.
#include "mainloop/backward_sm90.cuh"
#include "ptx/address.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_sm90(const BackwardTmaArguments<Config>& arguments) {
    using Kernel = BackwardSm90<Config>;
    // The tiles fill shared memory to the last kilobyte, so they begin where it begins.
    extern __shared__ __align__(Kernel::QTile::kAlignment) char smem[];
    const unsigned base = smem_address(smem);
    if (base % Kernel::QTile::kAlignment != 0) __trap();
    Kernel{arguments, smem, base}.run();
}

}  // namespace cuattn
