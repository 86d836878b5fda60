// dbias from bias_sum (attention/mod_sums.cuh): adds up, in a fixed order, whatever is broadcast along. kWide: a CTA per
// element of dbias instead of a thread.
#include "attention/mask.cuh"
#include "attention/mod_sums.cuh"
#include "attention/score_mod.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_bias(const BackwardArguments<Config>& arguments) {
    using Real = typename Config::Real;
    using Target = typename Config::BiasElement;
    constexpr int kKind = Config::kBiasKind;
    __shared__ Real sums[Config::kThreads / 32];
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    const long long each = blockIdx.x * static_cast<long long>(Config::kWide ? 1 : Config::kThreads);
    long long index = each + (Config::kWide ? 0 : threadIdx.x);
    const int col = static_cast<int>(index % g.bias_cols);
    index /= g.bias_cols;
    const int row = static_cast<int>(index % g.bias_rows);
    index /= g.bias_rows;
    const int head = static_cast<int>(index % g.bias_heads), batch = static_cast<int>(index / g.bias_heads);
    if (batch >= g.bias_batches) return;
    // Extents of bias_sum and of what is added up for one element.
    const int splits = kKind == kBiasColumns ? g.q_splits : kKind == kBiasRows ? g.dq_splits : 1;
    const int batches = kKind != kBiasCells && g.bias_batches == 1 ? p.batch : 1;
    const int heads = kKind != kBiasCells && g.bias_heads == 1 ? p.num_heads : 1;
    const int cols = kKind == kBiasColumns && g.bias_cols == 1 ? p.seqlen_k : 1;
    const Real* from =
        static_cast<const Real*>(g.bias_sum) + batch * g.sum_batch + head * g.sum_head + row * g.sum_q + col * g.sum_k;
    Real sum = 0;
    for (int split = 0; split < splits; split++) {
        for (int b = 0; b < batches; b++) {
            for (int h = 0; h < heads; h++) {
                const Real* part = from + split * g.sum_split + b * g.sum_batch + h * g.sum_head;
                for (int j = Config::kWide ? threadIdx.x : 0; j < cols; j += Config::kWide ? Config::kThreads : 1) {
                    sum += part[j * g.sum_k];
                }
            }
        }
    }
    if constexpr (Config::kWide) {
#pragma unroll
        for (int lane = 1; lane < 32; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x != 0) return;
        sum = 0;
        for (Real part : sums) sum += part;
    }
    static_cast<Target*>(g.dbias)[batch * g.bias_batch + head * g.bias_head + row * g.bias_q + col * g.bias_k] =
        static_cast<Target>(sum);
}

}  // namespace cuattn
