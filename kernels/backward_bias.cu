// dbias from bias_sum (attention/mod_sums.cuh): adds up, in a fixed order, whatever is broadcast along. A thread has an element
// of dbias, kWide: a CTA has, or eight neighbours in a row where bias_sum has one for each (its rows are padded to eight).
#include "attention/mask.cuh"
#include "attention/mod_sums.cuh"
#include "attention/score_mod.cuh"

namespace cuattn {

template <class Type>
struct alignas(16) Eight {
    Type data[8];
};

template <class Config>
__device__ __forceinline__ void convert_cells(const BackwardArguments<Config>& arguments) {
    using Part = typename Config::BiasTarget;
    using Target = typename Config::BiasElement;
    using Real = typename Config::Real;
    constexpr bool kCopies = Config::kBiasKind == kBiasCopies;
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    long long index = blockIdx.x * static_cast<long long>(Config::kThreads) + threadIdx.x;
    const int units = (g.bias_cols + 7) / 8, col = static_cast<int>(index % units) * 8;
    index /= units;
    const int row = static_cast<int>(index % g.bias_rows);
    index /= g.bias_rows;
    const int head = static_cast<int>(index % g.bias_heads), batch = static_cast<int>(index / g.bias_heads);
    if (batch >= g.bias_batches) return;
    const int batches = kCopies && g.bias_batches == 1 ? p.batch : 1, heads = kCopies && g.bias_heads == 1 ? p.num_heads : 1;
    const Part* from =
        static_cast<const Part*>(g.bias_sum) + batch * g.sum_batch + head * g.sum_head + row * g.sum_q + col * g.sum_k;
    Real sums[8] = {};
#pragma unroll 4
    for (int copy = 0; copy < batches * heads; copy++) {
        const auto part = *reinterpret_cast<const Eight<Part>*>(from + copy / heads * g.sum_batch + copy % heads * g.sum_head);
#pragma unroll
        for (int e = 0; e < 8; e++) sums[e] += static_cast<Real>(part.data[e]);
    }
    Eight<Target> result;
#pragma unroll
    for (int e = 0; e < 8; e++) result.data[e] = static_cast<Target>(sums[e]);
    Target* to = static_cast<Target*>(g.dbias) + batch * g.bias_batch + head * g.bias_head + row * g.bias_q + col * g.bias_k;
    if (g.bias_cols % 8 == 0) {
        *reinterpret_cast<Eight<Target>*>(to) = result;
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (col + e < g.bias_cols) to[e] = result.data[e];
        }
    }
}

template <class Config>
__device__ __forceinline__ void sum_parts(const BackwardArguments<Config>& arguments) {
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
    const int batches = g.bias_batches == 1 ? p.batch : 1, heads = g.bias_heads == 1 ? p.num_heads : 1;
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

template <class Config>
__device__ __forceinline__ void backward_bias(const BackwardArguments<Config>& arguments) {
    if constexpr (Config::kBiasKind >= kBiasCells) {
        convert_cells<Config>(arguments);
    } else {
        sum_parts<Config>(arguments);
    }
}

}  // namespace cuattn
