// dsink = - sum over batches and queries of exp(sink - lse) * delta: the sink's share of each row's probability, whose value is
// 0. One CTA per head, in a fixed order, summed in double precision.
#include "attention/mask.cuh"
#include "attention/row_stats.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"
#include "ptx/math.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_sinks(const BackwardArguments<Config>& arguments) {
    using Real = typename Config::Real;
    using Sink = typename Config::Sink;
    using Stats = RowStats<Config>;
    __shared__ double sums[Config::kThreads / 32];
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    const int head = static_cast<int>(blockIdx.x), rows = Config::kPacked ? p.total_q : p.seqlen_q;
    const Real sink = static_cast<Real>(static_cast<const Sink*>(p.sinks)[head]), factor = static_cast<Real>(kLog2e);
    double sum = 0;
    for (int batch = 0; batch < (Config::kPacked ? 1 : p.batch); batch++) {
        const Stats* stats =
            static_cast<const Stats*>(g.row_stats) + (static_cast<long long>(batch) * p.num_heads + head) * rows;
        for (int i = threadIdx.x; i < rows; i += Config::kThreads) {  // padding rows have lse +inf
            const Stats row = stats[i];
            if (row.lse != -negative_infinity<Real>()) sum -= static_cast<double>(row.probability(sink, factor) * row.delta);
        }
    }
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = 0;
    for (double part : sums) sum += part;
    static_cast<Sink*>(g.dsinks)[head] = static_cast<Sink>(static_cast<Real>(sum));
}

}  // namespace cuattn
