// Entry of mainloop/backward_sm90.cuh: one CTA per key tile, part of the queries, KV head and batch.
#include "mainloop/backward_sm90.cuh"
#include "ptx/address.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_sm90(const BackwardTmaArguments<Config>& arguments) {
    using Kernel = BackwardSm90<Config>;
    // Tiles may fill shared memory to the last kilobyte, so it begins where they can. NOTE: what follows finds that out again,
    // or the compiler, knowing more of alignment, reads row statistics in fours, for which registers are short.
    extern __shared__ __align__(Kernel::QTile::kAlignment) char smem[];
    const unsigned start = smem_address(smem), mask = Kernel::QTile::kAlignment - 1;
    const unsigned base = (start + mask) & ~mask;
    Kernel{arguments, smem + (base - start), base}.run();
}

}  // namespace cuattn
