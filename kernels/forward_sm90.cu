// Entry of mainloop/forward_sm90.cuh: one CTA per query tile, head and batch, or one per SM that works through them.
#include "mainloop/forward_sm90.cuh"
#include "ptx/address.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void forward_sm90(const TmaArguments<Config>& arguments) {
    using Kernel = ForwardSm90<Config>;
    extern __shared__ char smem[];
    const unsigned start = smem_address(smem), mask = Kernel::QTile::kAlignment - 1;
    const unsigned base = (start + mask) & ~mask;
    Kernel{arguments, smem + (base - start), base}.run();
}

}  // namespace cuattn
