// dq = scale * dq_sum, from slabs (mainloop/slab.cuh) to the caller's layout and dtype, and zeros for padding. One CTA per
// query tile, head and batch, with the threads that added to dq_sum. The sums of several splits are added in order.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "mainloop/pair_counters.cuh"
#include "mainloop/slab.cuh"
#include "ptx/griddepcontrol.cuh"
#include "tile/copy.cuh"
#include "tile/warp_half.cuh"
#include "tile/warp_simt.cuh"
#include "tile/warp_split.cuh"
#include "tile/warp_tf32.cuh"
#include "tile/warp_wide.cuh"
#include "tile/warpgroup_half.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void backward_convert(const BackwardArguments<Config>& arguments) {
    using Slab = QuerySlab<Config>;
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    using Tile = SmemTile<Element, Slab::kBlockM, Slab::kHeadDim, 1>;
    extern __shared__ __align__(128) char smem[];
    static_assert(Tile::kBytes <= Config::kSmemBytes, "the plan's shared memory is too small");
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    if constexpr (Config::kChained && !Config::kCountPairs) wait_for_grids_ahead();
    // With kCountPairs this kernel has the multiprocessors that the last CTAs ahead leave it, for the sums that are there: the
    // first ones. Else the last sums are still in L2.
    unsigned index = Config::kCountPairs ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int m = static_cast<int>(index % p.m_blocks);
    index /= p.m_blocks;
    Coord at{0, 0, 0, 0};
    at.head = static_cast<int>(index % p.num_heads);
    at.batch = static_cast<int>(index / p.num_heads);
    const Sequence seq = Sequence::of<Config::kPacked, Config::kLens>(p, at.batch);
    Element* dq = static_cast<Element*>(g.dq) + at.batch * g.dq_batch + at.head * g.dq_head + seq.token_q * g.dq_row;
    const int start = m * Slab::kBlockM, key_tiles = (seq.seqlen_k + Slab::kBlockN - 1) / Slab::kBlockN;
    // Nobody adds to the sums of a pair without keys, nor need they be clear yet.
    const int rows = Config::kCountPairs && key_tiles == 0 ? 0 : seq.seqlen_q;
    if (start < rows) {
        if constexpr (Config::kCountPairs) {
            const int pair = at.batch * (p.num_heads / p.group) + at.head / p.group;
            if (threadIdx.x == 0) count_wait(PairCounters::of(p, g).added(pair), key_tiles * PairCounters::kDoormen);
            __syncthreads();
        }
        const Tile tile{reinterpret_cast<Element*>(smem)};
        const Real scale = static_cast<Real>(p.scale);
        if (Slab::Grid::active()) {
            const Real* from = Slab::at(p, g, seq, at, m, 0);
            typename Slab::Sums sum;
            Slab::template take<false>(sum, from);
            for (int split = 1; !Config::kWarpSlabs && split < g.dq_splits; split++) {
                from += g.dq_split;
                Slab::take(sum, from);
            }
#pragma unroll
            for (int x = 0; x < Slab::Sums::kSize; x++) {
                *tile.at(Slab::Grid::row() + Slab::Sums::row(x), Slab::Grid::col() + Slab::Sums::col(x)) =
                    static_cast<Element>(sum[x] * scale);
            }
        }
        __syncthreads();
        store_tile<Config::kThreads, Config::kVecDq>(tile, dq + start * g.dq_row, g.dq_row, rows - start, p.head_dim);
    }
    for (int block = m; block * Slab::kBlockM < seq.rows_q; block += p.m_blocks) {
        const int from = max(block * Slab::kBlockM, rows), stop = min((block + 1) * Slab::kBlockM, seq.rows_q);
        for (int x = threadIdx.x; x < (stop - from) * p.head_dim; x += Config::kThreads) {
            dq[(from + x / p.head_dim) * g.dq_row + x % p.head_dim] = Element(0.0f);
        }
    }
    // One CTA keeps the next kernel from beginning before the one ahead is done.
    if (Config::kCountPairs && blockIdx.x == gridDim.x - 1) wait_for_grids_ahead();
}

}  // namespace cuattn
