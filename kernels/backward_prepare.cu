// What the backward needs of each query row besides its scores: lse to base 2, and delta = rowsum(dout o out) - dlse, the part
// of the softmax's Jacobian that a row shares. A row that saw nothing gets lse +inf, which makes its probabilities 0.
// kPrepareLanes lanes take a row, 16 bytes each at a time. All threads together clear what later kernels add to.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"
#include "mainloop/row_products.cuh"
#include "ptx/griddepcontrol.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_prepare(const BackwardArguments<Config>& arguments) {
    using Kernel = RowProducts<Config>;
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    using Sum = typename Kernel::Sum;
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    if constexpr (Config::kChained) admit_grid_behind();
    constexpr int kRowsAtOnce = Config::kThreads / Kernel::kLanes;
    const long long row = static_cast<long long>(blockIdx.x) * kRowsAtOnce + threadIdx.x / Kernel::kLanes;
    const int lane = threadIdx.x % Kernel::kLanes;
    const unsigned rows_per_head = Config::kPacked ? p.total_q : p.seqlen_q, heads = p.num_heads;
    int i, head, batch;
    const auto locate = [&](auto index) {
        i = static_cast<int>(index % rows_per_head);
        head = static_cast<int>(index / rows_per_head % heads);
        batch = static_cast<int>(index / rows_per_head / heads);
    };
    // Divisions of 64 bits take longer than the loads.
    if (p.partial_rows <= 0xffffffffll) {
        locate(static_cast<unsigned>(row));
    } else {
        locate(static_cast<unsigned long long>(row));
    }
    bool exists = row < p.partial_rows;
    if constexpr (Config::kPacked) {
        exists = exists && token_exists(p.cu_seqlens_q, Config::kLens ? p.q_lens : nullptr, p.batch, i);
    } else if (Config::kLens && exists && p.q_lens != nullptr) {
        exists = i < p.q_lens[batch];
    }
    const long long at_row = i;
    const Element* dout = static_cast<const Element*>(g.dout) + batch * g.dout_batch + head * g.dout_head + at_row * g.dout_row;
    const Element* out = static_cast<const Element*>(p.out) + batch * p.out_batch + head * p.out_head + at_row * p.out_row;
    // Read before the products, which wait for memory too.
    Real lse = negative_infinity<Real>(), dlse = 0;
    if (exists && lane == 0) {
        lse = static_cast<const Real*>(g.lse)[batch * g.lse_batch + head * g.lse_head + at_row * g.lse_row];
        if (g.dlse != nullptr) {
            dlse = static_cast<const Real*>(g.dlse)[batch * g.dlse_batch + head * g.dlse_head + at_row * g.dlse_row];
        }
    }
    const Sum delta = Kernel::products(dout, out, lane, exists ? p.head_dim_v : 0) - dlse;
    uint4* const cleared = static_cast<uint4*>(g.turns != nullptr ? static_cast<void*>(g.turns) : g.dq_sum);
    for (long long n = static_cast<long long>(blockIdx.x) * Config::kThreads + threadIdx.x; n < g.zeroed;
         n += static_cast<long long>(gridDim.x) * Config::kThreads) {
        cleared[n] = make_uint4(0, 0, 0, 0);
    }
    if (lane != 0 || row >= p.partial_rows) return;
    static_cast<RowStats<Config>*>(g.row_stats)[row] = Kernel::stats(lse, delta);
}

}  // namespace cuattn
