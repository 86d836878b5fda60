// Entry of mainloop/backward_window_sm90.cuh: one CTA per run of query tiles, KV head and batch.
#include "mainloop/backward_window_sm90.cuh"
#include "ptx/address.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_window_sm90(const BackwardTmaArguments<Config>& arguments) {
    using Kernel = BackwardWindowSm90<Config>;
    extern __shared__ char smem[];
    const unsigned start = smem_address(smem), mask = Kernel::Tile::kAlignment - 1;
    const unsigned base = (start + mask) & ~mask;
    Kernel{arguments, smem + (base - start), base}.run();
}

}  // namespace cuattn
