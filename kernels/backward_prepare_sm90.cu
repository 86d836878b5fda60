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
struct PrepareSm90 {
    using Element = typename Config::Element;
    using Rows = RowProducts<Config>;
    using Stats = RowStats<Config>;
    static constexpr int kUnitRows = 32, kRowsAtOnce = 32 / Rows::kLanes;
    // A warp reads kSteps times kRowsAtOnce rows while it works on as many before.
    static constexpr int kSpan = Rows::kLanes * Rows::kVec, kPieces = (Config::kHeadDimV + kSpan - 1) / kSpan;
    static constexpr int kSteps = kPieces > 1 ? 2 : 4, kBatchRows = kSteps * kRowsAtOnce, kBatches = kUnitRows / kBatchRows;
    static_assert(Rows::kVectors && kUnitRows % kBatchRows == 0);

    const ForwardParams& p;
    const BackwardParams& g;

    struct Batch {
        int unit, first;  // of all pairs, and the first row in it
    };
    struct Loaded {
        uint4 dout[kSteps][kPieces], out[kSteps][kPieces];
        float lse[kSteps], dlse[kSteps];
    };
    __device__ __forceinline__ int pair(const Batch& at) const { return at.unit / g.prepared_units; }
    // Of the pair.
    __device__ __forceinline__ int first_row(const Batch& at) const {
        return at.unit % g.prepared_units * kUnitRows + at.first;
    }
    __device__ __forceinline__ static int lane() { return lane_index() % Rows::kLanes; }
    __device__ __forceinline__ static int row(int step) { return step * kRowsAtOnce + lane_index() / Rows::kLanes; }

    // What does not exist is read where something does.
    __device__ __forceinline__ void load(Loaded& loaded, const Batch& at) const {
        const int batch = pair(at) / g.heads_kv, first_head = pair(at) % g.heads_kv * p.group, first = first_row(at);
        const Element* const dout = static_cast<const Element*>(g.dout) + batch * g.dout_batch;
        const Element* const out = static_cast<const Element*>(p.out) + batch * p.out_batch;
        const float* const lse = static_cast<const float*>(g.lse) + batch * g.lse_batch;
        const float* const dlse = static_cast<const float*>(g.dlse) + batch * g.dlse_batch;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const int own = min(first + row(step), p.group * p.seqlen_q - 1), head = first_head + own / p.seqlen_q;
            const long long i = own % p.seqlen_q;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) {
                const int col = min(piece * kSpan + lane() * Rows::kVec, p.head_dim_v - Rows::kVec);
                loaded.dout[step][piece] = *reinterpret_cast<const uint4*>(dout + head * g.dout_head + i * g.dout_row + col);
                loaded.out[step][piece] = *reinterpret_cast<const uint4*>(out + head * p.out_head + i * p.out_row + col);
            }
            loaded.lse[step] = lse[head * g.lse_head + i * g.lse_row];
            loaded.dlse[step] = g.dlse != nullptr ? dlse[head * g.dlse_head + i * g.dlse_row] : 0.0f;
        }
    }
    __device__ __forceinline__ void store(const Loaded& loaded, const Batch& at) const {
        const int rows = p.group * p.seqlen_q, first = first_row(at);
        Stats* const to = static_cast<Stats*>(g.row_stats) + static_cast<long long>(pair(at)) * rows;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            typename Rows::Sum sum = 0;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) {
                typename Rows::Sum part = 0;
                Rows::add(part, loaded.dout[step][piece], loaded.out[step][piece]);
                sum += piece * kSpan + lane() * Rows::kVec < p.head_dim_v ? part : 0;
            }
            const float delta = Rows::over_lanes(sum) - loaded.dlse[step];
            if (lane() == 0 && first + row(step) < rows) to[first + row(step)] = Rows::stats(loaded.lse[step], delta);
        }
    }
    // As large a part of the pair's sums of dq, which are so many words of 16 bytes.
    __device__ __forceinline__ void clear(const Batch& at, int words) const {
        const int parts = g.prepared_units * kBatches, share = (words + parts - 1) / parts;
        const int start = first_row(at) / kBatchRows * share, stop = min(start + share, words);
        uint4* const to = static_cast<uint4*>(g.dq_sum) + static_cast<long long>(pair(at)) * words;
#pragma unroll 4
        for (int word = start + lane_index(); word < stop; word += 32) to[word] = make_uint4(0, 0, 0, 0);
    }
};

template <class Config>
__device__ __forceinline__ void backward_prepare_sm90(const BackwardArguments<Config>& arguments) {
    using Prepare = PrepareSm90<Config>;
    using Batch = typename Prepare::Batch;
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    const Prepare prepare{p, g};
    const PairCounters counters = PairCounters::of(p, g);
    // The grid behind may be in place as soon as all CTAs have come past here.
    for (int n = threadIdx.x; n < counters.pairs; n += Config::kThreads) {
        *counters.ready(n, blockIdx.x) = 0;
        if (blockIdx.x == 0) *counters.added(n) = 0;
    }
    __threadfence();
    __syncthreads();
    admit_grid_behind();
    const int words = static_cast<int>(g.dq_split / 4 / counters.pairs), units = counters.pairs * g.prepared_units;
    const int stride = gridDim.x * (Config::kThreads / 32);
    Batch at{static_cast<int>(blockIdx.x + gridDim.x * (threadIdx.x / 32)), 0};
    if (at.unit >= units) return;
    typename Prepare::Loaded even, odd;
    prepare.load(even, at);
    const auto step = [&](const typename Prepare::Loaded& now, typename Prepare::Loaded& then) {
        Batch next{at.unit, at.first + Prepare::kBatchRows};
        const bool last = next.first == Prepare::kUnitRows;
        if (last) next = {at.unit + stride, 0};
        if (next.unit < units) prepare.load(then, next);
        prepare.clear(at, words);
        prepare.store(now, at);
        if (last) {
            fence_proxy_async_global();  // the copy engine adds to the sums
            __syncwarp();
            if (lane_index() == 0) count_release(counters.ready(prepare.pair(at), blockIdx.x));
        }
        at = next;
        return at.unit < units;
    };
    while (step(even, odd) && step(odd, even)) {
    }
}

}  // namespace cuattn
