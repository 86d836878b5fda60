// What backward_prepare.cu does, for backward_sm90.cu when it runs already: a few CTAs, each with a multiprocessor of its own,
// prepare one pair of a KV head and a batch after the other, and count in PairCounters::ready. What a CTA behind needs is there
// soon, or was long ago; all others of its kind have the other multiprocessors from the start.
//
// A unit is kUnitRows rows of a pair, whose heads lie one after the other, and as large a part of its sums of dq. Each warp
// takes units of its own.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "mainloop/pair_counters.cuh"
#include "mainloop/row_products.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/special_registers.cuh"
#include "ptx/warpgroup.cuh"

namespace cuattn {

template <class Config>
struct PrepareUnit {
    using Element = typename Config::Element;
    using Rows = RowProducts<Config>;
    using Stats = RowStats<Config>;
    static constexpr int kUnitRows = 32, kRowsAtOnce = 32 / Rows::kLanes, kSteps = kUnitRows / kRowsAtOnce;
    static constexpr int kSpan = Rows::kLanes * Rows::kVec, kPieces = (Config::kHeadDimV + kSpan - 1) / kSpan;
    static constexpr int kStepsAtOnce = kPieces > 1 ? 4 : 8;
    static_assert(Rows::kVectors && kSteps % kStepsAtOnce == 0);

    const ForwardParams& p;
    const BackwardParams& g;
    int pair, first;  // row

    __device__ __forceinline__ static int lane() { return lane_index() % Rows::kLanes; }

    struct Loaded {
        uint4 dout[kStepsAtOnce][kPieces], out[kStepsAtOnce][kPieces];
        float lse[kStepsAtOnce], dlse[kStepsAtOnce];
    };
    __device__ __forceinline__ int row(int step) const { return first + step * kRowsAtOnce + lane_index() / Rows::kLanes; }
    __device__ __forceinline__ void load(Loaded& loaded, int start) const {
        const int batch = pair / g.heads_kv, first_head = pair % g.heads_kv * p.group;
#pragma unroll
        for (int step = 0; step < kStepsAtOnce; step++) {
            const int head = first_head + row(start + step) / p.seqlen_q;
            const long long i = row(start + step) % p.seqlen_q;
            const bool exists = row(start + step) < p.group * p.seqlen_q;
            const Element* dout =
                static_cast<const Element*>(g.dout) + batch * g.dout_batch + head * g.dout_head + i * g.dout_row;
            const Element* out = static_cast<const Element*>(p.out) + batch * p.out_batch + head * p.out_head + i * p.out_row;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) {
                const int col = piece * kSpan + lane() * Rows::kVec;
                const bool inside = exists && col < p.head_dim_v;
                const uint4 nothing = make_uint4(0, 0, 0, 0);
                loaded.dout[step][piece] = inside ? *reinterpret_cast<const uint4*>(dout + col) : nothing;
                loaded.out[step][piece] = inside ? *reinterpret_cast<const uint4*>(out + col) : nothing;
            }
            loaded.lse[step] = negative_infinity<float>(), loaded.dlse[step] = 0;
            if (exists && lane() == 0) {
                loaded.lse[step] = static_cast<const float*>(g.lse)[batch * g.lse_batch + head * g.lse_head + i * g.lse_row];
                if (g.dlse != nullptr) {
                    loaded.dlse[step] =
                        static_cast<const float*>(g.dlse)[batch * g.dlse_batch + head * g.dlse_head + i * g.dlse_row];
                }
            }
        }
    }
    __device__ __forceinline__ void store(const Loaded& loaded, int start) const {
        Stats* const to = static_cast<Stats*>(g.row_stats) + static_cast<long long>(pair) * p.group * p.seqlen_q;
#pragma unroll
        for (int step = 0; step < kStepsAtOnce; step++) {
            typename Rows::Sum sum = 0;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) Rows::add(sum, loaded.dout[step][piece], loaded.out[step][piece]);
            const float delta = Rows::over_lanes(sum) - loaded.dlse[step];
            if (lane() == 0 && row(start + step) < p.group * p.seqlen_q) to[row(start + step)] = Rows::stats(loaded.lse[step], delta);
        }
    }
    __device__ __forceinline__ void clear(int words) const {
        const int share = (words + g.prepared_units - 1) / g.prepared_units, start = first / kUnitRows * share;
        uint4* const to = static_cast<uint4*>(g.dq_sum) + static_cast<long long>(pair) * words;
#pragma unroll 4
        for (int word = start + lane_index(); word < min(start + share, words); word += 32) to[word] = make_uint4(0, 0, 0, 0);
    }
};

template <class Config>
__device__ __forceinline__ void backward_prepare_sm90(const BackwardArguments<Config>& arguments) {
    using Unit = PrepareUnit<Config>;
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    const PairCounters counters = PairCounters::of(p, g);
    // The grid behind may be in place as soon as all CTAs have come past here.
    for (int n = blockIdx.x * Config::kThreads + threadIdx.x; n < 2 * counters.pairs; n += gridDim.x * Config::kThreads) {
        counters.counters[n] = 0;
    }
    __threadfence();
    __syncthreads();
    admit_grid_behind();
    const int words = static_cast<int>(g.dq_split / 4 / counters.pairs), units = counters.pairs * g.prepared_units;
    constexpr int kWarps = Config::kThreads / 32;
    for (int n = blockIdx.x + gridDim.x * (threadIdx.x / 32); n < units; n += gridDim.x * kWarps) {
        const Unit unit{p, g, n / g.prepared_units, n % g.prepared_units * Unit::kUnitRows};
        typename Unit::Loaded loaded;
        unit.load(loaded, 0);
        unit.clear(words);
        unit.store(loaded, 0);
        for (int start = Unit::kStepsAtOnce; start < Unit::kSteps; start += Unit::kStepsAtOnce) {
            unit.load(loaded, start);
            unit.store(loaded, start);
        }
        fence_proxy_async_global();  // which adds to the sums
        __syncwarp();
        if (lane_index() == 0) count_release(counters.ready(unit.pair));
    }
}

}  // namespace cuattn
