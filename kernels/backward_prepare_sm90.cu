// What backward_prepare.cu does, for backward_sm90.cu when it runs already: a few CTAs, each with a multiprocessor of its own,
// prepare one pair of a KV head and a batch after the other, and count in PairCounters::ready. What a CTA behind needs is there
// soon, or was long ago; all others of its kind have the other multiprocessors from the start.
//
// A unit is PairCounters::kUnitRows rows of a head, and as large a part of its sums of dq. Each warp takes units of its own:
// those of the first head, of the next ones, and so on for the next batch.
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
    static constexpr int kUnitRows = PairCounters::kUnitRows, kRowsAtOnce = 32 / Rows::kLanes;
    // A warp reads kSteps times kRowsAtOnce rows while it works on as many before.
    static constexpr int kSpan = Rows::kLanes * Rows::kVec, kPieces = (Config::kHeadDimV + kSpan - 1) / kSpan;
    static constexpr int kSteps = kPieces > 1 ? 2 : 4, kBatchRows = kSteps * kRowsAtOnce, kBatches = kUnitRows / kBatchRows;
    static_assert(Rows::kVectors && kUnitRows % kBatchRows == 0 && kSteps <= Rows::kLanes);

    const ForwardParams& p;
    const BackwardParams& g;

    // Rows of a head and a batch or packed sequence.
    struct Part {
        int unit;         // of all
        int batch, head;  // of all units before this batch there are `before`
        int before, units;
        int token, rows;  // of the batch; its first one is row `token` of the array
        int share;        // words of 16 bytes that a part clears
        int start;        // of the unit
        int first;        // of the part, from there
    };
    static constexpr int kSlabWords = Config::kBlockM * Config::kHeadDim / 4;
    __device__ __forceinline__ static int words(const Part& part) {
        return (part.rows + Config::kBlockM - 1) / Config::kBlockM * kSlabWords;
    }
    __device__ __forceinline__ int all_units() const {
        return p.num_heads *
               (Config::kPacked ? PairCounters::first_unit(p.cu_seqlens_q[p.batch], p.batch) : p.batch * g.prepared_units);
    }
    // The first part of a unit; `last`: one of a unit before it, whose batch is known.
    __device__ __forceinline__ Part part_of(int unit, const Part& last) const {
        Part part = last;
        part.unit = unit, part.first = 0;
        while (unit >= part.before + p.num_heads * part.units) {
            part.before += p.num_heads * part.units;
            part.batch++;
            enter(part);
        }
        const int rest = unit - part.before;
        part.head = rest / part.units, part.start = (rest - part.head * part.units) * kUnitRows;
        return part;
    }
    __device__ __forceinline__ void enter(Part& part) const {
        part.units = PairCounters::units<Config::kPacked>(p, g, part.batch);
        part.token = Config::kPacked ? p.cu_seqlens_q[part.batch] : 0;
        part.rows = Config::kPacked ? p.cu_seqlens_q[part.batch + 1] - part.token : p.seqlen_q;
        part.share = (words(part) + part.units * kBatches - 1) / (part.units * kBatches);
    }
    __device__ __forceinline__ int pair(const Part& part) const {
        return part.batch * (p.num_heads / p.group) + part.head / p.group;
    }
    __device__ __forceinline__ static int lane() { return lane_index() % Rows::kLanes; }
    __device__ __forceinline__ static int row(int step) { return step * kRowsAtOnce + lane_index() / Rows::kLanes; }

    // Of the rows of all steps; each lane has the statistics of one.
    struct Loaded {
        uint4 dout[kSteps][kPieces], out[kSteps][kPieces];
        float lse, dlse;
    };
    __device__ __forceinline__ static int own_step() { return lane() % kSteps; }
    template <class T>
    __device__ __forceinline__ static const T* row_at(const T* rows, unsigned i, long long stride) {
        return rows + static_cast<unsigned long long>(i) * static_cast<unsigned>(stride);
    }
    // What does not exist is read where something does.
    __device__ __forceinline__ void load(Loaded& loaded, const Part& part) const {
        if (Config::kPacked && part.start >= part.rows) return;
        const long long batch = Config::kPacked ? 0 : part.batch, head = part.head, token = part.token;
        const Element* const dout =
            static_cast<const Element*>(g.dout) + batch * g.dout_batch + head * g.dout_head + token * g.dout_row;
        const Element* const out =
            static_cast<const Element*>(p.out) + batch * p.out_batch + head * p.out_head + token * p.out_row;
        const int first = part.start + part.first;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const int i = min(first + row(step), part.rows - 1);
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) {
                const int col = min(piece * kSpan + lane() * Rows::kVec, p.head_dim_v - Rows::kVec);
                loaded.dout[step][piece] = *reinterpret_cast<const uint4*>(row_at(dout + col, i, g.dout_row));
                loaded.out[step][piece] = *reinterpret_cast<const uint4*>(row_at(out + col, i, p.out_row));
            }
        }
        const long long i = token + min(first + row(own_step()), part.rows - 1);
        const float* const lse = static_cast<const float*>(g.lse) + batch * g.lse_batch + head * g.lse_head;
        loaded.lse = lse[i * g.lse_row], loaded.dlse = 0.0f;
        if (g.dlse != nullptr) {
            loaded.dlse = static_cast<const float*>(g.dlse)[batch * g.dlse_batch + head * g.dlse_head + i * g.dlse_row];
        }
    }
    // Sums over the lanes of a row: of each step's row in the lanes that have its statistics.
    __device__ __forceinline__ static typename Rows::Sum over_lanes(typename Rows::Sum (&sums)[kSteps]) {
        int width = 1;
#pragma unroll
        for (int left = kSteps / 2; left > 0; left /= 2, width *= 2) {
            const bool odd = lane_index() / width % 2;
#pragma unroll
            for (int x = 0; x < left; x++) {
                const auto other = __shfl_xor_sync(0xffffffffu, odd ? sums[2 * x] : sums[2 * x + 1], width);
                sums[x] = (odd ? sums[2 * x + 1] : sums[2 * x]) + other;
            }
        }
#pragma unroll
        for (; width < Rows::kLanes; width *= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], width);
        return sums[0];
    }
    __device__ __forceinline__ void store(const Loaded& loaded, const Part& part) const {
        typename Rows::Sum sums[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            sums[step] = 0;
#pragma unroll
            for (int piece = 0; piece < kPieces; piece++) {
                typename Rows::Sum share = 0;
                Rows::add(share, loaded.dout[step][piece], loaded.out[step][piece]);
                sums[step] += piece * kSpan + lane() * Rows::kVec < p.head_dim_v ? share : 0;
            }
        }
        const Stats stats = Rows::stats(loaded.lse, over_lanes(sums) - loaded.dlse);
        const long long rows = Config::kPacked ? p.total_q : p.seqlen_q, batch = Config::kPacked ? 0 : part.batch;
        const int i = part.start + part.first + row(own_step());
        if (lane() >= kSteps || i >= part.rows) return;
        static_cast<Stats*>(g.row_stats)[(batch * p.num_heads + part.head) * rows + part.token + i] = stats;
    }
    // As large a part of the sums of dq.
    __device__ __forceinline__ void clear(const Part& part) const {
        const int start = (part.start + part.first) / kBatchRows * part.share, stop = min(start + part.share, words(part));
        const long long batch = Config::kPacked ? 0 : part.batch;
        const long long before =
            (batch * p.num_heads + part.head) * g.q_slabs + (Config::kPacked ? part.token / Config::kBlockM + part.batch : 0);
        uint4* const to = static_cast<uint4*>(g.dq_sum) + before * kSlabWords;
#pragma unroll 4
        for (int word = start + lane_index(); word < stop; word += 32) to[word] = make_uint4(0, 0, 0, 0);
    }
};

template <class Config>
__device__ __forceinline__ void backward_prepare_sm90(const BackwardArguments<Config>& arguments) {
    using Prepare = PrepareSm90<Config>;
    using Part = typename Prepare::Part;
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
    const int units = prepare.all_units(), stride = gridDim.x * (Config::kThreads / 32);
    const int first = uniform(static_cast<int>(blockIdx.x + gridDim.x * (threadIdx.x / 32)));
    if (first >= units) return;
    Part at{};
    prepare.enter(at);
    at = prepare.part_of(first, at);
    typename Prepare::Loaded even, odd;
    prepare.load(even, at);
    const auto step = [&](const typename Prepare::Loaded& now, typename Prepare::Loaded& then) {
        const bool last = at.first + Prepare::kBatchRows == Prepare::kUnitRows, ends = last && at.unit + stride >= units;
        Part next = at;
        next.first += Prepare::kBatchRows;
        if (last && !ends) next = prepare.part_of(at.unit + stride, at);
        if (!ends) prepare.load(then, next);
        prepare.clear(at);
        prepare.store(now, at);
        if (last) {
            fence_proxy_async_global();  // the copy engine adds to the sums
            __syncwarp();
            if (lane_index() == 0) count_release(counters.ready(prepare.pair(at), blockIdx.x));
        }
        at = next;
        return !ends;
    };
    while (step(even, odd) && step(odd, even)) {
    }
}

}  // namespace cuattn
