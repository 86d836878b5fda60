// What surrounds backward_sm90: row statistics and cleared sums of dq before it, dq of the caller's dtype after it. Each takes
// as long as memory needs, which the products leave idle.
//
// A CTA that takes key tiles of a pair (KV head, batch), one of `shares`, clears its share of the sums of pair + ahead, by
// warps that have nothing to do yet, and, if backward_prepare.cu did not, has its consumers find the statistics of the same
// queries while their own first tiles are on the way. Both warps then count in ready[pair + ahead]; ready[pair] is waited for
// before statistics are read and dq is added. backward_prepare.cu does the first `ahead` pairs and clears the counters. Plans
// see to it that all CTAs waited for have a lower index, so none waits for one that has not started.
//
// Each consumer warp counts in added[pair], or has somebody count, when its additions are done. backward_convert.cu waits for
// them alone: while the last CTAs of this kernel run, it has the other multiprocessors.
#pragma once
#include "attention/coord.cuh"
#include "mainloop/row_products.cuh"
#include "mainloop/slab.cuh"
#include "ptx/red.cuh"
#include "ptx/special_registers.cuh"

namespace cuattn {

struct AroundCounters {
    const BackwardParams& g;
    static constexpr int kClearers = 2;  // warps of a CTA that clear

    __device__ __forceinline__ int pairs() const { return g.batches * g.heads_kv; }
    __device__ __forceinline__ int shares() const { return (g.n_blocks + g.run - 1) / g.run; }
    __device__ __forceinline__ unsigned* ready(int pair) const { return g.turns + pair; }
    __device__ __forceinline__ unsigned* added(int pair) const { return g.turns + pairs() + pair; }
    __device__ __forceinline__ void await_ready(int pair) const { count_wait(ready(pair), shares() * kClearers); }
    __device__ __forceinline__ void await_added(int pair, int warps) const { count_wait(added(pair), shares() * warps); }
};

// kConsumerThreads: the first of a CTA.
template <class Config, int kConsumerThreads>
struct BackwardAround {
    using Element = typename Config::Element;
    using Rows = RowProducts<Config>;
    using Slab = QuerySlab<Config>;
    using Stats = RowStats<Config>;
    static constexpr int kRowsAtOnce = kConsumerThreads / Rows::kLanes, kSteps = Config::kBlockM / kRowsAtOnce;
    static constexpr int kSpan = Rows::kLanes * Rows::kVec, kPieces = (Config::kHeadDimV + kSpan - 1) / kSpan;
    static constexpr int kTilesAtOnce = kSteps * kPieces <= 4 ? 2 : 1;
    static_assert(!Config::kAround || (Rows::kVectors && Config::kBlockM % kRowsAtOnce == 0));

    const ForwardParams& p;
    const BackwardParams& g;
    int pair, place;

    __device__ __forceinline__ AroundCounters counters() const { return {g}; }
    __device__ __forceinline__ int next() const { return pair + g.ahead; }
    __device__ __forceinline__ bool clears() const { return next() < counters().pairs(); }
    __device__ __forceinline__ bool prepares() const { return clears() && g.prepared < p.partial_rows; }
    // Of a pair, query tiles of all heads of its group.
    __device__ __forceinline__ int tiles() const { return p.m_blocks * p.group; }

    // Of the next pair's query tile.
    struct Where {
        int batch, head, m;
        long long number;  // of the head, all batches counted
    };
    __device__ __forceinline__ Where where(int tile) const {
        const int of_group = tile / p.m_blocks;
        return {next() / g.heads_kv, next() % g.heads_kv * p.group + of_group, tile % p.m_blocks,
                static_cast<long long>(next()) * p.group + of_group};
    }

    // By one warp of AroundCounters::kClearers.
    __device__ __forceinline__ void clear(int warp) const {
        constexpr int kWords = Slab::kElements / 4;
        for (int t = place; t < tiles(); t += counters().shares()) {
            const Where at = where(t);
            uint4* to = static_cast<uint4*>(g.dq_sum) + (at.number * g.q_slabs + at.m) * kWords;
#pragma unroll 8
            for (int x = 32 * warp + lane_index(); x < kWords; x += 32 * AroundCounters::kClearers) {
                to[x] = make_uint4(0, 0, 0, 0);
            }
        }
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
    __device__ __forceinline__ void store(const Loaded& loaded, const Where& at, bool exists) const {
        Stats* const to = static_cast<Stats*>(g.row_stats) + at.number * p.seqlen_q;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            typename Rows::Sum sum = 0;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) Rows::add(sum, loaded.dout[step][piece], loaded.out[step][piece]);
            const float delta = Rows::over_lanes(sum) - loaded.dlse[step];
            const long long i = at.m * Config::kBlockM + row(step);
            if (exists && lane() == 0 && i < p.seqlen_q) to[i] = Rows::stats(loaded.lse[step], delta);
        }
    }

    // By all consumers.
    __device__ __forceinline__ void prepare() const {
        const int shares = counters().shares();
        for (int t = place; t < tiles(); t += kTilesAtOnce * shares) {
            Loaded loaded[kTilesAtOnce];
            Where at[kTilesAtOnce];
#pragma unroll
            for (int x = 0; x < kTilesAtOnce; x++) {
                at[x] = where(min(t + x * shares, tiles() - 1));
                load(loaded[x], at[x]);
            }
#pragma unroll
            for (int x = 0; x < kTilesAtOnce; x++) store(loaded[x], at[x], t + x * shares < tiles());
        }
    }
};

}  // namespace cuattn
