// What surrounds backward_sm90: row statistics and cleared sums of dq before it, dq of the caller's dtype after it. Each takes
// as long as memory needs, which the products leave idle; so all but the first and the last of it is done by the CTAs of the
// kernel itself, whose consumers have nothing to do until their first tiles arrive.
//
// A CTA that takes key tiles of a pair (KV head, batch), one of `shares`, does the same share of two other pairs' query tiles:
//     pair + ahead    finds row statistics and clears dq_sum, then counts in ready[pair + ahead]
//     pair - behind   waits until all have counted in added[pair - behind], and converts dq
// It waits for ready[pair] before it reads statistics or adds dq; each of its consumer warps counts in added[pair], or has
// somebody count, when its additions are done. backward_prepare.cu does the first `ahead` pairs and clears the counters,
// backward_convert.cu does the last `behind`, of which it waits for the additions alone: while the last CTAs of this kernel
// run, it has the other multiprocessors. Plans see to it that all CTAs waited for have a lower index, so none waits for one
// that has not started.
#pragma once
#include "attention/coord.cuh"
#include "mainloop/row_products.cuh"
#include "mainloop/slab.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy.cuh"

namespace cuattn {

struct AroundCounters {
    const BackwardParams& g;

    __device__ __forceinline__ int pairs() const { return g.batches * g.heads_kv; }
    __device__ __forceinline__ int shares() const { return (g.n_blocks + g.run - 1) / g.run; }
    __device__ __forceinline__ unsigned* ready(int pair) const { return g.turns + pair; }
    __device__ __forceinline__ unsigned* added(int pair) const { return g.turns + pairs() + pair; }
    __device__ __forceinline__ void await_ready(int pair) const { count_wait(ready(pair), shares()); }
    __device__ __forceinline__ void await_added(int pair, int warps) const { count_wait(added(pair), shares() * warps); }
};

// kConsumerThreads: the first of a CTA.
template <class Config, int kConsumerThreads>
struct BackwardAround {
    using Element = typename Config::Element;
    using Rows = RowProducts<Config>;
    using Slab = QuerySlab<Config>;
    using Stats = RowStats<Config>;
    using Tile = SwizzledTile<Element, Config::kBlockM, Config::kHeadDim>;
    static constexpr int kRowsAtOnce = kConsumerThreads / Rows::kLanes, kSteps = Config::kBlockM / kRowsAtOnce;
    static constexpr int kSpan = Rows::kLanes * Rows::kVec, kPieces = (Config::kHeadDimV + kSpan - 1) / kSpan;
    static_assert(!Config::kAround || (Rows::kVectors && Config::kBlockM % kRowsAtOnce == 0));

    const ForwardParams& p;
    const BackwardParams& g;
    int pair, place;

    __device__ __forceinline__ AroundCounters counters() const { return {g}; }
    __device__ __forceinline__ bool prepares() const { return pair + g.ahead < counters().pairs(); }
    __device__ __forceinline__ bool converts() const { return pair >= g.behind; }

    // Of another pair's query tile.
    struct Where {
        int batch, head, m;
        long long number;  // of the head, all batches counted
    };
    __device__ __forceinline__ Where where(int other, int tile) const {
        const int of_group = tile / p.m_blocks;
        return {other / g.heads_kv, other % g.heads_kv * p.group + of_group, tile % p.m_blocks,
                static_cast<long long>(other) * p.group + of_group};
    }
    __device__ __forceinline__ typename Slab::Real* slab(const Where& at) const {
        return static_cast<float*>(g.dq_sum) + (at.number * g.q_slabs + at.m) * Slab::kElements;
    }

    // What a thread reads of its rows of dout and out.
    struct Loaded {
        uint4 dout[kSteps][kPieces], out[kSteps][kPieces];
        float lse[kSteps], dlse[kSteps];
    };
    __device__ __forceinline__ static int row(int step) {
        return step * kRowsAtOnce + static_cast<int>(threadIdx.x) / Rows::kLanes;
    }
    __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % Rows::kLanes; }
    __device__ __forceinline__ void load(Loaded& loaded, const Where& at) const {
        const Element* dout = static_cast<const Element*>(g.dout) + at.batch * g.dout_batch + at.head * g.dout_head;
        const Element* out = static_cast<const Element*>(p.out) + at.batch * p.out_batch + at.head * p.out_head;
        const float* lse = static_cast<const float*>(g.lse) + at.batch * g.lse_batch + at.head * g.lse_head;
        const float* dlse = static_cast<const float*>(g.dlse) + at.batch * g.dlse_batch + at.head * g.dlse_head;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const long long i = at.m * Config::kBlockM + row(step);
            const bool exists = i < p.seqlen_q;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) {
                const int col = piece * kSpan + lane() * Rows::kVec;
                const bool inside = exists && col < p.head_dim_v;
                const uint4 nothing = make_uint4(0, 0, 0, 0);
                loaded.dout[step][piece] = inside ? *reinterpret_cast<const uint4*>(dout + i * g.dout_row + col) : nothing;
                loaded.out[step][piece] = inside ? *reinterpret_cast<const uint4*>(out + i * p.out_row + col) : nothing;
            }
            loaded.lse[step] = exists && lane() == 0 ? lse[i * g.lse_row] : negative_infinity<float>();
            loaded.dlse[step] = exists && lane() == 0 && g.dlse != nullptr ? dlse[i * g.dlse_row] : 0.0f;
        }
    }
    __device__ __forceinline__ void clear(const Where& at) const {
        uint4* const to = reinterpret_cast<uint4*>(slab(at)) + threadIdx.x;
#pragma unroll
        for (int x = 0; x < Slab::kElements / 4 / kConsumerThreads; x++) to[x * kConsumerThreads] = make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void store(const Loaded& loaded, const Where& at) const {
        Stats* const to = static_cast<Stats*>(g.row_stats) + at.number * p.seqlen_q;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            typename Rows::Sum sum = 0;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) Rows::add(sum, loaded.dout[step][piece], loaded.out[step][piece]);
            const float delta = Rows::over_lanes(sum) - loaded.dlse[step];
            const long long i = at.m * Config::kBlockM + row(step);
            if (lane() == 0 && i < p.seqlen_q) to[i] = Rows::stats(loaded.lse[step], delta);
        }
    }

    // By all consumers. shared: of Tile::kBytes.
    __device__ __forceinline__ void run(void* shared, int barrier) const {
        const int tiles = p.m_blocks * p.group, shares = counters().shares();
        const Tile tile{static_cast<Element*>(shared)};
        const float scale = static_cast<float>(p.scale);
        for (int t = place; t < tiles; t += shares) {
            Loaded loaded;
            if (prepares()) load(loaded, where(pair + g.ahead, t));
            if (converts()) {
                if (t == place) counters().await_added(pair - g.behind, kConsumerThreads / 32);
                const Where at = where(pair - g.behind, t);
                typename Slab::Sums sums;
#pragma unroll
                for (int x = 0; x < Slab::Sums::kSize; x++) sums[x] = 0;
                Slab::take(sums, slab(at));
                if (t != place) bar_sync(barrier, kConsumerThreads);  // until the tile before has been read
#pragma unroll
                for (int x = 0; x < Slab::Sums::kSize; x++) {
                    *tile.at(Slab::Sums::row(x), Slab::Sums::col(x)) = static_cast<Element>(sums[x] * scale);
                }
                bar_sync(barrier, kConsumerThreads);
                const int start = at.m * Config::kBlockM;
                Element* dq = static_cast<Element*>(g.dq) + at.batch * g.dq_batch + at.head * g.dq_head + start * g.dq_row;
                store_tile<kConsumerThreads, Config::kVecDq>(tile, dq, g.dq_row, p.seqlen_q - start, p.head_dim);
            }
            if (prepares()) {
                const Where at = where(pair + g.ahead, t);
                clear(at);
                store(loaded, at);
            }
        }
    }
};

}  // namespace cuattn
