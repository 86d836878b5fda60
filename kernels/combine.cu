// Merges the partial results of a split over keys: out = sum_s 2^(lse_s - lse) out_s, lse = log2 sum_s 2^lse_s (with the sink).
// One warp per query row; also writes the padding rows.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "attention/softmax.cuh"
#include "mainloop/epilogue.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void combine(const ForwardArguments<Config>& arguments) {
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    const ForwardParams& p = arguments.base;
    const int lane = threadIdx.x % 32;
    // Rows in the order of partial results; packed: all heads of all tokens, without regard to sequences.
    const long long row = static_cast<long long>(blockIdx.x) * (Config::kThreads / 32) + threadIdx.x / 32;
    if (row >= p.partial_rows) return;
    const int rows_per_head = Config::kPacked ? p.total_q : p.seqlen_q;
    const int i = static_cast<int>(row % rows_per_head);
    const int head = static_cast<int>(row / rows_per_head % p.num_heads);
    const int batch = static_cast<int>(row / rows_per_head / p.num_heads);
    Element* out = static_cast<Element*>(p.out) + batch * p.out_batch + head * p.out_head + i * p.out_row;
    Real* lse = static_cast<Real*>(p.lse);
    bool exists;
    if constexpr (Config::kPacked) {  // a token exists when it lies inside its sequence
        exists = token_exists(p.cu_seqlens_q, p.q_lens, p.batch, i);
    } else {
        exists = p.q_lens == nullptr || i < p.q_lens[batch];
    }
    Real top = negative_infinity<Real>(), sum = 0;
    const Real* partial_lse = static_cast<const Real*>(p.partial_lse) + row;
    if (exists) {
        for (int s = 0; s < p.num_splits; s++) top = maximum(top, partial_lse[s * p.partial_rows]);
        for (int s = 0; s < p.num_splits; s++) {
            const Real x = partial_lse[s * p.partial_rows];
            if (x != negative_infinity<Real>()) sum += exp2_fast(x - top);
        }
    }
    const Real sink = exists ? sink_log2<Config, Real>(p, head) : negative_infinity<Real>();
    const RowResult<Real> result = finish_row(top, sum, sink);
    for (int col = lane; col < p.head_dim_v; col += 32) {
        Real total = 0;
        for (int s = 0; exists && s < p.num_splits; s++) {
            const Real x = partial_lse[s * p.partial_rows];
            if (x == negative_infinity<Real>()) continue;
            const Real* partial = static_cast<const Real*>(p.partial_out) + (s * p.partial_rows + row) * p.head_dim_v;
            total += exp2_fast(x - top) * partial[col];
        }
        out[col] = static_cast<Element>(exists ? total * result.factor : Real(0));
    }
    if (lse != nullptr && lane == 0) {
        lse[batch * p.lse_batch + head * p.lse_head + i] = result.lse_log2 * static_cast<Real>(kLn2);
    }
}

}  // namespace cuattn
