// dk and dv where several CTAs shared the queries of a key tile: adds their partial results in order. One warp per key row and
// KV head; also writes the padding rows.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"

namespace cuattn {

template <class Element, class Real>
__device__ __forceinline__ void add_partials(Element* to, const Real* from, long long stride, int splits, int cols,
                                             bool exists) {
    for (int col = threadIdx.x % 32; col < cols; col += 32) {
        Real sum = 0;
        for (int split = 0; exists && split < splits; split++) sum += from[split * stride + col];
        to[col] = static_cast<Element>(sum);
    }
}

template <class Config>
__device__ __forceinline__ void backward_combine(const BackwardArguments<Config>& arguments) {
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    const long long row = static_cast<long long>(blockIdx.x) * (Config::kThreads / 32) + threadIdx.x / 32;
    if (row >= g.rows_kv) return;
    const int rows_per_head = Config::kPacked ? p.total_k : p.seqlen_k, heads_kv = p.num_heads / p.group;
    const long long j = row % rows_per_head;
    const int head = static_cast<int>(row / rows_per_head % heads_kv), batch = static_cast<int>(row / rows_per_head / heads_kv);
    bool exists;
    if constexpr (Config::kPacked) {
        exists = token_exists(p.cu_seqlens_k, p.kv_lens, p.batch, static_cast<int>(j));
    } else {
        exists = p.kv_lens == nullptr || j < p.kv_lens[batch];
    }
    add_partials(static_cast<Element*>(g.dk) + batch * g.dk_batch + head * g.dk_head + j * g.dk_row,
                 static_cast<const Real*>(g.partial_dk) + row * p.head_dim, g.rows_kv * p.head_dim, g.q_splits, p.head_dim,
                 exists);
    add_partials(static_cast<Element*>(g.dv) + batch * g.dv_batch + head * g.dv_head + j * g.dv_row,
                 static_cast<const Real*>(g.partial_dv) + row * p.head_dim_v, g.rows_kv * p.head_dim_v, g.q_splits,
                 p.head_dim_v, exists);
}

}  // namespace cuattn
