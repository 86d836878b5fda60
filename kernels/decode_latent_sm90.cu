// Entry of mainloop/decode_latent_sm90.cuh: a fixed number of CTAs, which divide the work among themselves as those of
// decode.cu.
#include "mainloop/decode_latent_sm90.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void decode_latent_sm90(const LatentArguments<Config>& arguments) {
    extern __shared__ char smem[];
    const unsigned start = smem_address(smem), slack = -start % 1024;
    DecodeLatentSm90<Config>{arguments, smem + slack, start + slack}.run();
}

}  // namespace cuattn
