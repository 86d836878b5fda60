// Attention of few queries over a cache whose values are the first columns of its keys (multi-head latent attention, absorbed
// form; DeepSeek-V2, section 2.1), on Hopper: TMA loads, wgmma products, warpgroups with roles. 16-bit elements, sm_90a.
//
//   S = scale * Q C^T, masked     P = exp(S - lse)     O = P C[:, :Dv]
//
// A CTA has 64 rows, which are (query, head) pairs as in decode.cuh, and divides the work by the same schedule. A block of 64
// tokens is read once and is K as well as V. Two blocks are in flight, one in each stage: warpgroup 0 finds the scores of those
// in stage 0 and warpgroup 1 of those in stage 1; each of both adds P V of all blocks, in their order, to its own half of O's
// columns, which fills half of its registers.
//
// Roles       warpgroups 0 and 1: scores of their own blocks, a half of O; warp 8: issues all loads
// Memory      sQ (64 x D) | 2 x sC (64 x D) | barriers | Shared; P of a block lies over the columns of its sC past Dv, which
//             only S needs; where parts are merged, their weights lie over sQ
// Barriers    full (stage, group) 1 arrival and the bytes; empty (stage, group) 4 warps. Group 0 is the half of the columns
//             whose warpgroup owns the stage, which alone reads it after S; group 1 the other half and what lies past it.
//             kScores0 (1): P and maxima of stage 0 are there; kScores1: of stage 1; kOwn + wg: the warpgroup has its scores,
//             or has cleared rows; kBoth: both consumers
// Loop        warpgroup 0: S0; softmax; publish P0; O += P0 V0; wait for P1; O += P1 V1
//             warpgroup 1: S1; wait for P0; O += P0 V0; softmax of S1; publish P1; O += P1 V1
// Maxima      are handed on from block to block, so that all P are relative to the same when they are added
#pragma once
#include "attention/packed_rows.cuh"
#include "attention/softmax.cuh"
#include "mainloop/decode_schedule.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy.cuh"
#include "tile/panel_tile.cuh"
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <class Config>
struct LatentArguments {
    TensorMap map;  // of the cache over (column, slot, head, page), in boxes of 64 columns and kBoxRows slots
    DecodeArguments<Config> variant;
};

template <class Config>
struct DecodeLatentSm90 {
    using Element = typename Config::Element;
    using Mask = typename Config::Mask;
    using Schedule = DecodeSchedule<Config>;
    static constexpr int kBlockN = Config::kBlockN, kRows = Schedule::kRows, kConsumers = 2;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV, kHalf = kHeadDimV / 2;
    static constexpr int kBoxRows = Config::kBoxRows, kBoxes = kBlockN / kBoxRows;
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
    static_assert(Config::kThreads == 384 && kRows == 64 && kBlockN == 64 && kBlockN % kBoxRows == 0 && kBoxes <= 32);
    static_assert(kHeadDimV % 128 == 0 && kHeadDim % 64 == 0 && kHeadDim >= kHeadDimV + kBlockN, "P lies past the values");

    using QTile = PanelTile<kRows, kHeadDim>;
    using CTile = PanelTile<kBlockN, kHeadDim>;
    using VTile = PanelTile<kBlockN, kHalf>;
    using PTile = PanelTile<kRows, kBlockN>;
    static constexpr int kOffsetC = QTile::kBytes, kOffsetP = kOffsetC + kHeadDimV / 64 * CTile::kPanelBytes;
    static constexpr int kOffsetBarriers = kOffsetC + 2 * CTile::kBytes, kOffsetShared = kOffsetBarriers + 8 * 8;
    enum NamedBarrier { kScores0 = 1, kScores1, kOwn, kBoth = kOwn + kConsumers };  // 0 is __syncthreads

    // What this CTA knows of the schedule once it is open, in shared memory: the loop over the keys has no registers for it.
    struct Share {
        unsigned each, longer;
        unsigned start, stop;
        int batch;
        unsigned first;
    };
    struct Shared {
        unsigned memory[Schedule::kWords];
        Share share;
        float max[kConsumers][kRows];  // that the last P of a warpgroup's blocks is relative to
        float sum[kConsumers][kRows];
        bool last;
    };
    static_assert(kOffsetShared + static_cast<int>(sizeof(Shared)) + CTile::kAlignment <= Config::kSmemBytes,
                  "the plan's shared memory is too small");

    const LatentArguments<Config>& arguments;
    char* smem;  // aligned
    unsigned base;

    __device__ __forceinline__ const DecodeParams& params() const { return arguments.variant.base; }
    __device__ __forceinline__ Shared& shared() const { return *reinterpret_cast<Shared*>(smem + kOffsetShared); }
    __device__ __forceinline__ unsigned full(int stage, int group) const {
        return base + kOffsetBarriers + 8 * (2 * stage + group);
    }
    __device__ __forceinline__ unsigned empty(int stage, int group) const { return full(stage + 2, group); }
    __device__ __forceinline__ PackedRows packed(const DecodeItem& item) const {
        const DecodeParams& p = params();
        return {{p.group_multiplier, p.group_shift}, p.group, item.m_block * kRows, item.head_kv};
    }
    __device__ __forceinline__ int rows_of(const DecodeItem& item) const {
        return min(kRows, item.seq.seqlen_q * params().group - item.m_block * kRows);
    }

    __device__ __forceinline__ Schedule schedule() const {
        const Share& s = shared().share;
        return {params(), arguments.variant.mask, s.each, s.longer, s.start, s.stop, s.batch, s.first};
    }
    // What follows from an item's place again, rather than kept in registers that the loop over the keys needs.
    __device__ __forceinline__ void refresh(DecodeItem& item) const {
        item.batch = opaque(item.batch);
        item.seq = CachedSequence::of<false>(params(), item.batch);
        schedule().enter(item);
    }
    // Calls visit(item, blocks, first unit) for each part of this CTA's range.
    template <class Visit>
    __device__ __forceinline__ void for_parts(Visit visit) const {
        unsigned unit = shared().share.start;
        if (unit >= shared().share.stop) return;
        DecodeItem item = schedule().first_item();
        while (true) {
            const unsigned end = min(shared().share.stop, item.first + item.units);
            const unsigned next = Schedule::kParted ? unit + 1 : end;
            const int from = static_cast<int>(unit - item.first) * item.chunk,
                      to = static_cast<int>(next - item.first) * item.chunk;
            visit(item, Range{item.blocks.start + from, min(item.blocks.start + to, item.blocks.stop)}, unit);
            refresh(item);
            unit = next;
            if (unit >= shared().share.stop) return;
            if (unit >= item.first + item.units) schedule().advance(item);
        }
    }

    // ---------------------------------------------------------------------------------------------------------- producer

    // Where the boxes of a block lie: lane l knows of box l.
    __device__ __forceinline__ Place find(const DecodeItem& item, int n) const {
        const int box = static_cast<int>(threadIdx.x % 32), j = n * kBlockN + box * kBoxRows;
        const bool exists = box < kBoxes && j < item.seq.seqlen_k;
        const Place at = place_of<Config::kPaged>(params(), item.seq, item.seq.leftpad + j, exists);
        return {static_cast<unsigned>(at.page) < static_cast<unsigned>(params().pages) ? at.page : -1, at.slot};
    }
    // Loads panels [start, start + count) of a block, shared among the warps. What the map places outside the cache arrives as
    // zeros. NOTE: bytes may arrive before they are announced, since the phase does not end before the announcement.
    __device__ __forceinline__ void load_panels(const Place& boxes, int head, int stage, int group, int start, int count,
                                                int warp) const {
        const unsigned to = base + kOffsetC + stage * CTile::kBytes;
        const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
        for (int first = 0; first < count * kBoxes; first += 4 * 32) {
            const int x = first + 4 * lane + warp, box = x % kBoxes, panel = start + x / kBoxes;
            const int page = __shfl_sync(0xffffffffu, boxes.page, box);
            const int slot = __shfl_sync(0xffffffffu, boxes.slot, box);
            if (x < count * kBoxes) {
                cp_async_bulk_tensor_4d(to + panel * CTile::kPanelBytes + box * kBoxRows * 128, arguments.map,
                                        full(stage, group), 64 * panel, slot, head, page);
            }
            __syncwarp();
        }
    }
    __device__ __forceinline__ void produce(int warp) const {
        constexpr int kEach = kHalf / 64, kRest = CTile::kPanels - 2 * kEach;  // panels of a half, and past both
        const bool announces = warp == 0 && threadIdx.x % 32 == 0;
        unsigned parity[2] = {1, 1};  // a fresh barrier lets the first wait pass
        if (announces) prefetch_tensormap(arguments.map);
        for_parts([&](const DecodeItem& item, const Range& blocks, unsigned) {
            if (blocks.start >= blocks.stop) return;
            const int head = params().k_head != 0 ? item.head_kv : 0;
            Place boxes = find(item, blocks.start);
#pragma unroll 1
            for (int n = blocks.start; n < blocks.stop; n++) {
                const int stage = (n - blocks.start) % 2;
                const Place now = boxes;
                if (n + 1 < blocks.stop) boxes = find(item, n + 1);  // on its way while the stage is waited for
                const unsigned phase = stage == 0 ? parity[0] : parity[1];
                mbarrier_wait(empty(stage, 0), phase);
                if (announces) mbarrier_arrive_expect_tx(full(stage, 0), kEach * CTile::kPanelBytes);
                load_panels(now, head, stage, 0, stage * kEach, kEach, warp);
                mbarrier_wait(empty(stage, 1), phase);
                if (announces) mbarrier_arrive_expect_tx(full(stage, 1), (kEach + kRest) * CTile::kPanelBytes);
                load_panels(now, head, stage, 1, (1 - stage) * kEach, kEach, warp);
                load_panels(now, head, stage, 1, 2 * kEach, kRest, warp);
                if (stage == 0) {
                    parity[0] ^= 1;
                } else {
                    parity[1] ^= 1;
                }
            }
        });
    }

    // --------------------------------------------------------------------------------------------------------- consumers

    template <int kWg>
    struct Consumer {
        const DecodeLatentSm90& kernel;
        unsigned long long desc_q;  // K-major, of q; those of other operands lie at fixed distances
        float factor;               // turns a score into the exponent of 2
        unsigned parity[2] = {0, 0};
        WgmmaTile<kHalf> o;
        WgmmaTile<kBlockN> s;
        unsigned probabilities[kBlockN / 4];
        RowState<float> rows[2];  // max: of the row; sum: over this thread's keys

        __device__ __forceinline__ const DecodeParams& params() const { return kernel.params(); }
        __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
        __device__ __forceinline__ static int row(int half) { return WgmmaTile<kBlockN>::row(2 * half); }

        __device__ __forceinline__ unsigned long long desc_k() const { return desc_q + (kOffsetC + kWg * CTile::kBytes) / 16; }
        __device__ __forceinline__ unsigned long long desc_p(int stage) const {
            return desc_q + (kOffsetP + stage * CTile::kBytes) / 16;
        }
        __device__ __forceinline__ unsigned long long desc_v(int stage) const {  // MN-major
            constexpr unsigned long long kLeading = VTile::mn_major(0) - VTile::k_major(0);
            return desc_q + kLeading + (kOffsetC + stage * CTile::kBytes + kWg * VTile::kBytes) / 16;
        }

        // S of the block in the own stage, started; the columns of group 0 first.
        __device__ __forceinline__ void issue_s() {
            constexpr int kEach = kHalf / 16, kFirst = kWg * kEach, kOther = (1 - kWg) * kEach;
            mbarrier_wait(kernel.full(kWg, 0), parity[kWg]);
            wgmma_pin(s.data);
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < kEach; x++) step_s(kFirst + x, x > 0);
            mbarrier_wait(kernel.full(kWg, 1), parity[kWg]);
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < kEach; x++) step_s(kOther + x, true);
#pragma unroll
            for (int x = 2 * kEach; x < kHeadDim / 16; x++) step_s(x, true);
            wgmma_commit_group();
        }
        __device__ __forceinline__ void step_s(int step, bool accumulate) {
            Wgmma<kBlockN, Element>::ss(s.data, desc_q + QTile::k_major_step(step), desc_k() + CTile::k_major_step(step),
                                        accumulate);
        }
        // O += P V of a stage, started: with the own P from registers, with the other one from shared memory.
        __device__ __forceinline__ void issue_own() {
            wgmma_pin(o.data);
            wgmma_pin(probabilities);
            wgmma_fence();
            wgmma_pv<Element, VTile>(o, probabilities, desc_v(kWg));
        }
        __device__ __forceinline__ void issue_other() {
            constexpr int kStage = 1 - kWg;
            mbarrier_wait(kernel.full(1 - kWg, 1), parity[1 - kWg]);  // passes: P of the stage is there
            wgmma_pin(o.data);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kBlockN / 16; k++) {
                Wgmma<kHalf, Element>::template ss<0, 1>(o.data, desc_p(kStage) + PTile::k_major_step(k),
                                                         desc_v(kStage) + VTile::mn_major_step(k), 1);
            }
            wgmma_commit_group();
        }
        // The own half of a stage is no longer read by anybody.
        __device__ __forceinline__ void release(int stage) {
            if (lane() == 0) mbarrier_arrive(kernel.empty(stage, stage == kWg ? 0 : 1));
            parity[stage] ^= 1;
        }
        // Rows past the sequence may hold anything: P is 0 there, but 0 * NaN is not.
        __device__ __forceinline__ void clear(const DecodeItem& item, int n, int stage) const {
            if ((n + 1) * kBlockN <= item.seq.seqlen_k) return;
            VTile::template clear_rows<128>(kernel.smem + kOffsetC + stage * CTile::kBytes + kWg * VTile::kBytes,
                                            item.seq.seqlen_k - n * kBlockN, static_cast<int>(threadIdx.x % 128));
            fence_proxy_async();
            bar_sync(kOwn + kWg, 128);
        }

        __device__ __forceinline__ void mask_scores(const DecodeItem& item, const PackedRows& packed_rows, const Range& queries,
                                                    int n) {
            const Mask& mask = kernel.arguments.variant.mask;
            const Coord at = item.seq.at(item.batch);
            const float scale = static_cast<float>(params().scale);
            const auto& score_mod = kernel.arguments.variant.score_mod;
            if ((n + 1) * kBlockN <= at.seqlen_k && mask.covers(at, queries, {n * kBlockN, (n + 1) * kBlockN})) {
                if constexpr (Config::kFoldScale) return;
                modify_packed_scores<false>(s, at, packed_rows, n * kBlockN, scale, mask, score_mod);
            } else {
                modify_packed_scores<true>(s, at, packed_rows, n * kBlockN, Config::kFoldScale ? 1.0f : scale, mask, score_mod);
            }
        }
        // Takes the maxima of the scores in, tells the other warpgroup, and turns them into probabilities, to which P in shared
        // memory is set. Returns what O and the sums before are to be multiplied with.
        __device__ __forceinline__ float2 softmax() {
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                shrink[half] = rows[half].rescale(s.row_maximum(half), factor);
                if (lane() % 4 == 0) kernel.shared().max[kWg][row(half)] = rows[half].max;
            }
            const float offset[2] = {rows[0].offset(factor), rows[1].offset(factor)};
            float sum[4] = {rows[0].sum, 0.0f, rows[1].sum, 0.0f};
#pragma unroll
            for (int u = 0; u < kBlockN / 8; u++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[4 * u + e] = exp2_fast(s[4 * u + e] * factor - offset[e / 2]);
                    sum[e] += s[4 * u + e];
                }
                probabilities[2 * u] = pack_pair<Element>(s[4 * u], s[4 * u + 1]);
                probabilities[2 * u + 1] = pack_pair<Element>(s[4 * u + 2], s[4 * u + 3]);
            }
            rows[0].sum = sum[0] + sum[1];
            rows[1].sum = sum[2] + sum[3];
            return {shrink[0], shrink[1]};
        }
        // P to where the other warpgroup finds it.
        __device__ __forceinline__ void publish() {
            bar_sync(kOwn + kWg, 128);  // no warp of this warpgroup still reads what lies there
            store_operand(kernel.base + kOffsetP + kWg * CTile::kBytes, probabilities);
            fence_proxy_async();
            bar_arrive(kWg == 0 ? kScores0 : kScores1, 256);
        }
        // Waits for P of the other stage; returns what O is to be multiplied with before it is added.
        __device__ __forceinline__ float2 adopt() {
            bar_sync(kWg == 0 ? kScores1 : kScores0, 256);
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float max = kernel.shared().max[1 - kWg][row(half)];
                shrink[half] = max == rows[half].max ? 1.0f : exp2_fast((rows[half].max - max) * factor);
                rows[half].max = max;
                rows[half].sum *= shrink[half];
            }
            return {shrink[0], shrink[1]};
        }
        // O times `shrink`, which is mostly 1. kWait: scores are in flight, and registers must be at rest.
        template <bool kWait>
        __device__ __forceinline__ void rescale(const float2& shrink) {
            if (!__any_sync(0xffffffffu, shrink.x != 1.0f || shrink.y != 1.0f)) return;
            if constexpr (kWait) {
                wgmma_wait_group<0>();
                wgmma_pin(s.data);
            }
#pragma unroll
            for (int x = 0; x < o.kSize; x++) o[x] *= x % 4 < 2 ? shrink.x : shrink.y;
        }

        // Block n, and n + 1 with kPair, in stages 0 and 1.
        template <bool kPair>
        __device__ __forceinline__ void visit(const DecodeItem& item, const PackedRows& packed_rows, const Range& queries,
                                              int n) {
            if constexpr (kWg == 0) {
                issue_s();
                wgmma_wait_group<0>();
                wgmma_pin(s.data);
                mask_scores(item, packed_rows, queries, n);
                const float2 shrink = softmax();
                publish();
                rescale<false>(shrink);
                clear(item, n, 0);
                issue_own();
                wgmma_wait_group<0>();
                wgmma_pin(o.data);
                release(0);
                if constexpr (kPair) {
                    rescale<false>(adopt());
                    clear(item, n + 1, 1);
                    issue_other();
                    wgmma_wait_group<0>();
                    wgmma_pin(o.data);
                    release(1);
                }
            } else {
                if constexpr (kPair) issue_s();
                rescale<kPair>(adopt());
                clear(item, n, 0);
                issue_other();
                if constexpr (kPair) {
                    wgmma_wait_group<1>();
                    wgmma_pin(s.data);
                    mask_scores(item, packed_rows, queries, n + 1);
                    const float2 shrink = softmax();
                    publish();
                    wgmma_wait_group<0>();
                    wgmma_pin(o.data);
                    release(0);
                    rescale<false>(shrink);
                    clear(item, n + 1, 1);
                    issue_own();
                    wgmma_wait_group<0>();
                    wgmma_pin(o.data);
                    release(1);
                } else {
                    wgmma_wait_group<0>();
                    wgmma_pin(o.data);
                    release(0);
                }
            }
        }

        __device__ __forceinline__ void load_q(const DecodeItem& item) const {
            const DecodeParams& p = params();
            const PackedRows packed_rows = kernel.packed(item);
            const int count = kernel.rows_of(item);
            const Element* q = static_cast<const Element*>(p.q) + item.batch * p.q_batch;
            constexpr int kUnits = kHeadDim / 8;
#pragma unroll 2
            for (int x = threadIdx.x; x < kRows * kUnits; x += 128 * kConsumers) {
                const int r = x / kUnits, unit = x % kUnits, i = packed_rows.query(r);
                const bool exists = r < count;
                const Element* from = exists ? q + i * p.q_row + packed_rows.head(r, i) * p.q_head + 8 * unit : q;
                cp_async<16>(kernel.base + QTile::offset(r, unit), from, exists ? 16 : 0);
            }
            cp_async_commit_group();
            cp_async_wait_group<0>();
            fence_proxy_async();
            bar_sync(kBoth, 128 * kConsumers);
        }
        __device__ __forceinline__ void visit_keys(const DecodeItem& item, const Range& blocks) {
#pragma unroll
            for (int x = 0; x < o.kSize; x++) o[x] = 0;
            rows[0] = rows[1] = RowState<float>{};
            if (blocks.start >= blocks.stop) return;
            load_q(item);
            const Range queries = Schedule::queries(params(), item.seq, item.m_block);
            const PackedRows packed_rows = kernel.packed(item);
            int n = blocks.start;
#pragma unroll 1
            for (; n + 1 < blocks.stop; n += 2) visit<true>(item, packed_rows, queries, n);
            if (n < blocks.stop) visit<false>(item, packed_rows, queries, n);
        }

        // Results -------------------------------------------------------------------------------------------------------

        __device__ __forceinline__ void store_lse(const DecodeItem& item, const PackedRows& packed_rows, int r,
                                                  float lse_log2) const {
            const DecodeParams& p = params();
            if (p.lse == nullptr) return;
            const int i = packed_rows.query(r);
            static_cast<float*>(p.lse)[item.batch * p.lse_batch + packed_rows.head(r, i) * p.lse_head + i] =
                lse_log2 * static_cast<float>(kLn2);
        }
        __device__ __forceinline__ Element* out_row(const DecodeItem& item, const PackedRows& packed_rows, int r) const {
            const DecodeParams& p = params();
            const int i = packed_rows.query(r);
            return static_cast<Element*>(p.out) + item.batch * p.out_batch + i * p.out_row +
                   packed_rows.head(r, i) * p.out_head;
        }
        __device__ __forceinline__ float* partial(int slot, int r) const {
            return static_cast<float*>(params().partial_out) + (static_cast<long long>(slot) * kRows + r) * kHeadDimV;
        }
        __device__ __forceinline__ float* partial_lse(int slot) const {
            return static_cast<float*>(params().partial_lse) + static_cast<long long>(slot) * kRows;
        }
        // The rows' statistics over the keys of both warpgroups, whose maxima are the same by now.
        __device__ __forceinline__ void finish(RowResult<float> (&results)[2]) const {
            Shared& shared = kernel.shared();
            float sums[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sums[half] = rows[half].sum;
                sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 1);
                sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 2);
                if (lane() % 4 == 0) shared.sum[kWg][row(half)] = sums[half];
            }
            bar_sync(kBoth, 128 * kConsumers);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float max = rows[half].max == negative_infinity<float>() ? rows[half].max : rows[half].max * factor;
                const float sum = shared.sum[0][row(half)] + shared.sum[1][row(half)];
                results[half] = finish_row(max, sum, negative_infinity<float>());
            }
        }
        __device__ __forceinline__ void process(DecodeItem& item, const Range& blocks, unsigned unit) {
            if (threadIdx.x == 0) {
                const Schedule schedule = kernel.schedule();
                schedule.share(item);
                if (item.parts > 1) Schedule::claim(schedule.ticket(item), params().call);
            }
            visit_keys(item, blocks);
            kernel.refresh(item);
            const Schedule schedule = kernel.schedule();
            schedule.share(item);
            const int parts = item.parts, count = kernel.rows_of(item);
            const PackedRows packed_rows = kernel.packed(item);
            RowResult<float> results[2];
            finish(results);
            const bool leads = kWg == 0 && lane() % 4 == 0;
            if (parts == 1) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int r = row(half);
                    Element* out = out_row(item, packed_rows, r) + kWg * kHalf;
                    store_row<Element, Config::kVecOut>(o, half, results[half].factor, out, kHalf, r < count);
                    if (leads && r < count) store_lse(item, packed_rows, r, results[half].lse_log2);
                }
                bar_sync(kBoth, 128 * kConsumers);  // before the next sums
                return;
            }
            const int slot = schedule.slot(item, schedule.part(item, unit));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row(half);
                if (r >= count) continue;
                float* to = partial(slot, r) + kWg * kHalf + 2 * (lane() % 4);
#pragma unroll
                for (int u = 0; u < kHalf / 8; u++) {
                    const float factor = results[half].factor;
                    __stcg(reinterpret_cast<float2*>(to + 8 * u),
                           make_float2(o[4 * u + 2 * half] * factor, o[4 * u + 2 * half + 1] * factor));
                }
                if (leads) __stcg(partial_lse(slot) + r, results[half].lse_log2);
            }
            __threadfence();
            bar_sync(kBoth, 128 * kConsumers);
            if (threadIdx.x == 0) {
                kernel.shared().last = Schedule::arrive(schedule.ticket(item), parts);
                __threadfence();
            }
            bar_sync(kBoth, 128 * kConsumers);
            if (kernel.shared().last) combine(schedule, item, parts);
        }

        // out = sum over parts of 2^(lse_n - lse) out_n, by the last CTA of an item.
        __device__ __forceinline__ void combine(const Schedule& schedule, const DecodeItem& item, int parts) const {
            const PackedRows packed_rows = kernel.packed(item);
            const int count = kernel.rows_of(item);
            float* weights = reinterpret_cast<float*>(kernel.smem);  // (parts, kRows)
            const int first = schedule.slot(item, 0), second = schedule.slot(item, 1), step = schedule.slot_step();
            auto slot = [&](int n) { return n == 0 ? first : second + (n - 1) * step; };
            if (static_cast<int>(threadIdx.x) < count) {
                const int r = threadIdx.x;
                float top = negative_infinity<float>(), sum = 0;
                for (int n = 0; n < parts; n++) {
                    const float lse = __ldcg(partial_lse(slot(n)) + r);
                    weights[n * kRows + r] = lse;
                    top = maximum(top, lse);
                }
                for (int n = 0; n < parts; n++) {
                    const float lse = weights[n * kRows + r];
                    if (lse != negative_infinity<float>()) sum += exp2_fast(lse - top);
                }
                const RowResult<float> result = finish_row(top, sum, negative_infinity<float>());
                for (int n = 0; n < parts; n++) {
                    const float lse = weights[n * kRows + r];
                    weights[n * kRows + r] = lse == negative_infinity<float>() ? 0.0f : exp2_fast(lse - top) * result.factor;
                }
                store_lse(item, packed_rows, r, result.lse_log2);
            }
            bar_sync(kBoth, 128 * kConsumers);
            constexpr int kQuads = kHeadDimV / 4, kStep = 128 * kConsumers / kQuads, kBatch = 8;
            static_assert(128 * kConsumers % kQuads == 0);
            const int col = static_cast<int>(threadIdx.x) % kQuads * 4;
            for (int r0 = static_cast<int>(threadIdx.x) / kQuads; r0 < count; r0 += kStep * kBatch) {
                float4 x[kBatch] = {};
#pragma unroll 2
                for (int n = 0; n < parts; n++) {
                    const float* from = partial(slot(n), 0) + col;
                    float4 y[kBatch];
#pragma unroll
                    for (int b = 0; b < kBatch; b++) {
                        const int r = min(r0 + b * kStep, count - 1);
                        y[b] = __ldcg(reinterpret_cast<const float4*>(from + r * kHeadDimV));
                    }
#pragma unroll
                    for (int b = 0; b < kBatch; b++) {
                        const float weight = weights[n * kRows + min(r0 + b * kStep, count - 1)];
                        x[b].x += weight * y[b].x, x[b].y += weight * y[b].y;
                        x[b].z += weight * y[b].z, x[b].w += weight * y[b].w;
                    }
                }
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int r = r0 + b * kStep;
                    if (r >= count) continue;
                    Element* to = out_row(item, packed_rows, r) + col;
                    const uint2 pairs = {pack_pair<Element>(x[b].x, x[b].y), pack_pair<Element>(x[b].z, x[b].w)};
                    if constexpr (Config::kVecOut >= 8) {
                        *reinterpret_cast<uint2*>(to) = pairs;
                    } else {
                        const Element* elements = reinterpret_cast<const Element*>(&pairs);
#pragma unroll
                        for (int e = 0; e < 4; e++) to[e] = elements[e];
                    }
                }
            }
            bar_sync(kBoth, 128 * kConsumers);  // before the next q lies over the weights
        }
    };

    template <int kWg>
    __device__ __forceinline__ void consume() const {
        Consumer<kWg> consumer{*this};
        consumer.desc_q = QTile::k_major(base);
        consumer.factor = static_cast<float>(Config::kFoldScale ? params().scale * kLog2e : kLog2e);
        for_parts([&](DecodeItem& item, const Range& blocks, unsigned unit) { consumer.process(item, blocks, unit); });
    }

    // -------------------------------------------------------------------------------------------------------------- roles

    __device__ __forceinline__ void run() const {
        const int warp = uniform(static_cast<int>(threadIdx.x / 32)), wg = warp / 4;
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < 2; stage++) {
                for (int group = 0; group < 2; group++) {
                    mbarrier_init(full(stage, group), 1);
                    mbarrier_init(empty(stage, group), 4);
                }
            }
            fence_mbarrier_init();
        }
        Schedule schedule{params(), arguments.variant.mask};
        schedule.open(shared().memory);
        if (threadIdx.x == 0) {
            shared().share = {schedule.each, schedule.longer, schedule.start, schedule.stop, schedule.batch, schedule.first};
        }
        __syncthreads();
        if (wg == kConsumers) {
            setmaxnreg_dec<kProducerRegisters>();
            produce(warp - 4 * kConsumers);
        } else {
            setmaxnreg_inc<kConsumerRegisters>();
            if (wg == 0) {
                consume<0>();
            } else {
                consume<1>();
            }
        }
    }
};

}  // namespace cuattn
