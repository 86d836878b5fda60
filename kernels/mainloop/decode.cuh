// Attention of few queries over a cache of keys and values, contiguous or in pages.
//
//   S = scale * Q K^T, modified and masked     P = exp(S - lse)     O = P V
//
// The queries of all heads of a group share keys, so they are the rows of one tile: row r is query r / group of head r % group.
// A CTA walks the items of its range (mainloop/decode_schedule.cuh); kWarpsM x kWarpsN warps divide the rows of a tile, 16
// each, and the keys of a block. Every warp has a softmax of its own over its keys, and those of a row are merged at the end.
//
// Shared memory   sQ (kRows x D) | kStages x { sK (kBlockN x D), sV (kBlockN x Dv) }; at the end of an item the warps' outputs
//                 lie over the stages
// Pipeline        cp.async, kStages - 1 blocks ahead; the pages of a block are looked up one block earlier still
// Loop            wait block; load block + kStages - 1; S = Q K^T; modify, mask; online softmax; O = O * shrink + P V
#pragma once
#include "attention/packed_rows.cuh"
#include "attention/softmax.cuh"
#include "mainloop/decode_schedule.cuh"
#include "tile/copy.cuh"
#include "tile/gemm.cuh"
#include "tile/reg_tile.cuh"

namespace cuattn {

template <class Config>
struct Decode {
    using Mma = typename Config::Mma;
    using Element = typename Config::Element;
    using Cache = typename Config::Cache;
    using Real = typename Mma::Accum;
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    using Schedule = DecodeSchedule<Config>;
    static constexpr int kBlockN = Config::kBlockN, kThreads = Config::kThreads, kStages = Config::kStages;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV;
    static constexpr int kWarpsM = Config::kWarpsM, kWarpsN = Config::kWarpsN, kRows = 16 * kWarpsM;
    static constexpr int kKeys = kBlockN / kWarpsN, kN = kKeys / 8, kNv = kHeadDimV / 8;
    static_assert(kThreads == 32 * kWarpsM * kWarpsN && kKeys % Mma::kDepth == 0 && kStages >= 2);

    using QTile = typename Mma::template QTile<kRows, kHeadDim>;
    using KTile = typename Mma::template KTile<kBlockN, kHeadDim>;
    using VTile = typename Mma::template VTile<kBlockN, kHeadDimV>;
    // A thread copies the same rows of K and V.
    static constexpr int kLanes = lesser(copy_lanes(KTile::kCopyCols / vec_of<Cache>(Config::kVecK)),
                                         copy_lanes(VTile::kCopyCols / vec_of<Cache>(Config::kVecV)));
    using QRows = TileRows<kThreads, Config::kVecQ, kLanes, false, QTile>;
    using KRows = TileRows<kThreads, Config::kVecK, kLanes, Config::kWholeRows, KTile>;
    using VRows = TileRows<kThreads, Config::kVecV, kLanes, Config::kWholeRows, VTile>;
    static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
    static constexpr int kPitch = kHeadDimV + 4;  // of the staged outputs
    static_assert(QTile::kBytes + kStages * kStageBytes <= Config::kSmemBytes, "the plan's shared memory is too small");
    static_assert(QTile::kBytes + kWarpsN * kRows * kPitch * sizeof(Real) <= Config::kSmemBytes, "no room for the outputs");

    struct Shared {
        unsigned schedule[kThreads / 32 + 2];
        Real max_log2[kWarpsN][kRows], sum[kWarpsN][kRows];  // of each warp's keys
        Real factor[kRows], lse[kRows];                      // of whole rows
        bool last;
    };

    const DecodeParams& p;
    const Mask& mask;
    const ScoreMod& score_mod;
    char* smem;
    Shared& shared;
    int pages[KRows::kSteps], slots[KRows::kSteps];  // of this thread's rows in the block that is loaded next
    RegTile<Real, 1, kNv> o;
    RowState<Real> rows[1][2];

    __device__ __forceinline__ QTile sQ() const { return {reinterpret_cast<typename QTile::Element*>(smem)}; }
    __device__ __forceinline__ KTile sK(int stage) const {
        return {reinterpret_cast<Cache*>(smem + QTile::kBytes + stage * kStageBytes)};
    }
    __device__ __forceinline__ VTile sV(int stage) const {
        return {reinterpret_cast<Cache*>(smem + QTile::kBytes + stage * kStageBytes + KTile::kBytes)};
    }
    __device__ __forceinline__ Real* staged(int warp_n, int row) const {
        return reinterpret_cast<Real*>(smem + QTile::kBytes) + (warp_n * kRows + row) * kPitch;
    }
    __device__ __forceinline__ static int warp_m() { return static_cast<int>(threadIdx.x / 32) % kWarpsM; }
    __device__ __forceinline__ static int warp_n() { return static_cast<int>(threadIdx.x / 32) / kWarpsM; }
    __device__ __forceinline__ PackedRows packed(const DecodeItem& item) const {
        return {{p.group_multiplier, p.group_shift}, p.group, item.m_block * kRows, item.head_kv};
    }
    __device__ __forceinline__ int rows_of(const DecodeItem& item) const {
        return min(kRows, item.seq.seqlen_q * p.group - item.m_block * kRows);
    }

    // Loads -------------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void load_q(const DecodeItem& item) const {
        const PackedRows rows = packed(item);
        const int count = rows_of(item);
        const Element* q = static_cast<const Element*>(p.q) + item.seq.token_q * p.q_row;
        if constexpr (!Config::kPacked) q += item.batch * p.q_batch;
        const unsigned start = QRows::start(sQ());
#pragma unroll 1
        for (int step = 0; step < QRows::kSteps; step++) {
            const int row = QRows::row(step), i = rows.query(row);
            const bool exists = row < count;
            const Element* from = exists ? q + i * p.q_row + rows.head(row, i) * p.q_head + QRows::col() : q;
            QRows::load(sQ(), start, step, from, exists, p.head_dim);
        }
    }

    // q in shared memory, rotated by the positions of its queries.
    __device__ __forceinline__ void rotate_q(const DecodeItem& item) const {
        using Rotary = typename Config::Rotary;
        const PackedRows rows = packed(item);
        const int half = p.rotary_dim / 2, count = rows_of(item) * half;
        for (int x = threadIdx.x; x < count; x += kThreads) {
            const int row = x / half, d = x % half;
            const int position = min(item.seq.position(rows.query(row)), p.rotary_len - 1);
            const Real cosine = static_cast<Real>(static_cast<const Rotary*>(p.rotary_cos)[position * p.rotary_row + d]);
            const Real sine = static_cast<Real>(static_cast<const Rotary*>(p.rotary_sin)[position * p.rotary_row + d]);
            auto* first = sQ().at(row, Config::kInterleaved ? 2 * d : d);
            auto* second = sQ().at(row, Config::kInterleaved ? 2 * d + 1 : d + half);
            const Real a = static_cast<Real>(*first), b = static_cast<Real>(*second);
            *first = static_cast<Element>(a * cosine - b * sine);
            *second = static_cast<Element>(a * sine + b * cosine);
        }
    }

    __device__ __forceinline__ void find_pages(const DecodeItem& item, int n) {
#pragma unroll
        for (int step = 0; step < KRows::kSteps; step++) {
            const int j = n * kBlockN + KRows::row(step), place = item.seq.leftpad + j;
            const Place at = place_of<Config::kPaged>(p, item.seq, place, j < item.seq.seqlen_k);
            pages[step] = at.page, slots[step] = at.slot;
        }
    }
    __device__ __forceinline__ void load_block(const DecodeItem& item, int n, int stage) const {
        const Cache* k = static_cast<const Cache*>(p.k) + item.head_kv * p.k_head + KRows::col();
        const Cache* v = static_cast<const Cache*>(p.v) + item.head_kv * p.v_head + VRows::col();
        const unsigned to_k = KRows::start(sK(stage)), to_v = VRows::start(sV(stage));
#pragma unroll
        for (int step = 0; step < KRows::kSteps; step++) {
            const bool exists = static_cast<unsigned>(pages[step]) < static_cast<unsigned>(p.pages);
            const int page = exists ? pages[step] : 0, slot = exists ? slots[step] : 0;
            const long long at_k = page * p.k_page + slot * p.k_row;
            const long long at_v = Config::kAlike ? at_k : page * p.v_page + slot * p.v_row;
            KRows::load(sK(stage), to_k, step, k + at_k, exists, p.head_dim);
            VRows::load(sV(stage), to_v, step, v + at_v, exists, p.head_dim_v);
        }
    }

    // Keys --------------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void visit_block(const DecodeItem& item, const PackedRows& rows_, Range queries, Real scale,
                                                int n, int stage) {
        const int first = warp_n() * kKeys, col0 = n * kBlockN + first;
        const KTile k{sK(stage).at(first, 0)};
        const VTile v{sV(stage).at(first, 0)};
        RegTile<Real, 1, kN> s;
        gemm_qk<Mma, kHeadDim>(s.data, sQ(), k, 16 * warp_m());
        const Coord at = item.seq.at(item.batch);
        PackedRows rows_here = rows_;
        rows_here.row0 += 16 * warp_m();
        if ((n + 1) * kBlockN <= at.seqlen_k && mask.covers(at, queries, {n * kBlockN, (n + 1) * kBlockN})) {
            modify_packed_scores<false>(s, at, rows_here, col0, scale, mask, score_mod);
        } else {
            modify_packed_scores<true>(s, at, rows_here, col0, scale, mask, score_mod);
        }
        online_softmax(s, o, rows, static_cast<Real>(kLog2e), static_cast<Real>(Mma::kProbabilityExponent));
        gemm_pv<Mma>(o.data, s.data, v);
    }

    __device__ __forceinline__ void visit_keys(const DecodeItem& item, Range blocks) {
#pragma unroll
        for (int x = 0; x < o.kSize; x++) o[x] = 0;
        rows[0][0] = rows[0][1] = RowState<Real>{};
        load_q(item);
#pragma unroll
        for (int s = 0; s < kStages - 1; s++) {
            if (blocks.start + s < blocks.stop) {
                find_pages(item, blocks.start + s);
                load_block(item, blocks.start + s, s);
            }
            cp_async_commit_group();
        }
        find_pages(item, blocks.start + kStages - 1);
        const Range queries = Schedule::queries(p, item.seq, item.m_block);
        const PackedRows rows_ = packed(item);
        const Real scale =
            static_cast<Real>(p.scale) * cache_scale(p.k_scale, p.k_scale_batch, p.k_scale_head, item.batch, item.head_kv);
        int stage = 0;
        for (int n = blocks.start; n < blocks.stop; n++) {
            cp_async_wait_group<kStages - 2>();
            __syncthreads();  // the block is there; nobody reads the stage loaded next
            if constexpr (Config::kRotary) {
                if (n == blocks.start) {
                    rotate_q(item);
                    __syncthreads();
                }
            }
            const int ahead = n + kStages - 1;
            if (ahead < blocks.stop) load_block(item, ahead, stage == 0 ? kStages - 1 : stage - 1);
            cp_async_commit_group();
            if (ahead + 1 < blocks.stop) find_pages(item, ahead + 1);
            visit_block(item, rows_, queries, scale, n, stage);
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        cp_async_wait_group<0>();
        __syncthreads();  // nobody reads the stages
    }

    // Results -----------------------------------------------------------------------------------------------------------

    __device__ __forceinline__ Real sink_of(int head) const {
        if constexpr (!Config::kSinks) return negative_infinity<Real>();
        return static_cast<Real>(static_cast<const typename Config::Sink*>(p.sinks)[head]) * static_cast<Real>(kLog2e);
    }
    __device__ __forceinline__ void store_lse(const DecodeItem& item, const PackedRows& packed_rows, int row,
                                              Real lse_log2) const {
        if (p.lse == nullptr) return;
        const int i = packed_rows.query(row);
        static_cast<Real*>(p.lse)[(Config::kPacked ? 0 : item.batch * p.lse_batch) + packed_rows.head(row, i) * p.lse_head +
                                  item.seq.token_q + i] = lse_log2 * static_cast<Real>(kLn2);
    }
    __device__ __forceinline__ Element* out_row(const DecodeItem& item, const PackedRows& packed_rows, int row) const {
        const int i = packed_rows.query(row);
        return static_cast<Element*>(p.out) + (Config::kPacked ? 0 : item.batch * p.out_batch) +
               (item.seq.token_q + i) * p.out_row + packed_rows.head(row, i) * p.out_head;
    }

    // The warps' outputs and statistics to shared memory, each relative to the maximum of the whole row; then the factor and
    // lse of every row.
    __device__ __forceinline__ void merge_warps(const DecodeItem& item, bool whole) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            RowState<Real>& row = rows[0][half];
            row.sum = o.sum_row(row.sum);
            const int r = 16 * warp_m() + 8 * half + lane / 4;
            if (lane % 4 == 0) {
                shared.max_log2[warp_n()][r] =
                    row.max == negative_infinity<Real>()
                        ? row.max
                        : row.max * static_cast<Real>(kLog2e) - static_cast<Real>(Mma::kProbabilityExponent);
                shared.sum[warp_n()][r] = row.sum;
            }
        }
        __syncthreads();
        const Real v_scale = cache_scale(p.v_scale, p.v_scale_batch, p.v_scale_head, item.batch, item.head_kv);
        const PackedRows packed_rows = packed(item);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = 16 * warp_m() + 8 * half + lane / 4;
            Real top = negative_infinity<Real>(), sum = 0;
#pragma unroll
            for (int w = 0; w < kWarpsN; w++) top = maximum(top, shared.max_log2[w][r]);
#pragma unroll
            for (int w = 0; w < kWarpsN; w++) sum += shared.sum[w][r] * share(shared.max_log2[w][r], shared.sum[w][r], top);
            const Real weight = share(shared.max_log2[warp_n()][r], shared.sum[warp_n()][r], top);
#pragma unroll
            for (int e = 0; e < 2 * kNv; e++) {
                staged(warp_n(), r)[Mma::column(e / 2, e % 2)] = o.data[0][e / 2][2 * half + e % 2] * weight;
            }
            if (warp_n() == 0 && lane % 4 == 0) {
                const int head = packed_rows.head(r, packed_rows.query(r));
                const bool exists = r < rows_of(item);
                const RowResult<Real> result =
                    finish_row(top, sum, whole && exists ? sink_of(head) : negative_infinity<Real>());
                shared.factor[r] = result.factor * v_scale;
                shared.lse[r] = result.lse_log2;
            }
        }
        __syncthreads();
    }
    // What one part of a row counts beside another with maximum `top`; 0 for one that has seen no key.
    __device__ __forceinline__ static Real share(Real max_log2, Real sum, Real top) {
        return max_log2 == negative_infinity<Real>() && sum == Real(0) ? Real(0) : exp2_fast(max_log2 - top);
    }

    // Calls use(row, column, four neighbouring elements of the row's output).
    template <class Use>
    __device__ __forceinline__ void for_output(int count, const Use& use) const {
        constexpr int kQuads = kHeadDimV / 4;
        for (int x = threadIdx.x; x < count * kQuads; x += kThreads) {
            const int row = x / kQuads, col = x % kQuads * 4;
            if (col < p.head_dim_v) use(row, col);
        }
    }
    __device__ __forceinline__ void merged(int row, int col, Real (&x)[4]) const {
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = 0;
#pragma unroll
        for (int w = 0; w < kWarpsN; w++) {
#pragma unroll
            for (int e = 0; e < 4; e++) x[e] += staged(w, row)[col + e];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] *= shared.factor[row];
    }
    __device__ __forceinline__ void store_quad(Element* to, int col, const Real (&x)[4]) const {
        if (Config::kVecOut >= 8 && sizeof(Element) == 2 && col + 4 <= p.head_dim_v) {
            Element quad[4];
#pragma unroll
            for (int e = 0; e < 4; e++) quad[e] = static_cast<Element>(x[e]);
            *reinterpret_cast<uint2*>(to + col) = *reinterpret_cast<const uint2*>(quad);
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (col + e < p.head_dim_v) to[col + e] = static_cast<Element>(x[e]);
        }
    }

    __device__ __forceinline__ void store_final(const DecodeItem& item) const {
        const PackedRows packed_rows = packed(item);
        const int count = rows_of(item);
        for_output(count, [&](int row, int col) {
            Real x[4];
            merged(row, col, x);
            store_quad(out_row(item, packed_rows, row), col, x);
        });
        for (int row = threadIdx.x; row < count; row += kThreads) store_lse(item, packed_rows, row, shared.lse[row]);
    }
    // Four elements that another CTA has written.
    __device__ __forceinline__ static void load_quad(float (&x)[4], const float* from) {
        const float4 quad = __ldcg(reinterpret_cast<const float4*>(from));
        x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
    }
    __device__ __forceinline__ static void load_quad(double (&x)[4], const double* from) {
        const double2 low = __ldcg(reinterpret_cast<const double2*>(from)),
                      high = __ldcg(reinterpret_cast<const double2*>(from) + 1);
        x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
    }
    // NOTE: the slots of partial results have whole quads of columns.
    __device__ __forceinline__ Real* partial(int slot, int row) const {
        return static_cast<Real*>(p.partial_out) + (static_cast<long long>(slot) * kRows + row) * kHeadDimV;
    }
    __device__ __forceinline__ Real* partial_lse(int slot) const {
        return static_cast<Real*>(p.partial_lse) + static_cast<long long>(slot) * kRows;
    }
    __device__ __forceinline__ void store_partial(const DecodeItem& item, int slot) const {
        const int count = rows_of(item);
        for_output(count, [&](int row, int col) {
            Real x[4];
            merged(row, col, x);
#pragma unroll
            for (int e = 0; e < 4; e++) partial(slot, row)[col + e] = x[e];
        });
        for (int row = threadIdx.x; row < count; row += kThreads) partial_lse(slot)[row] = shared.lse[row];
    }

    // out = sum over parts of 2^(lse_n - lse) out_n, by the last CTA of an item. The parts' lse, then their weights, lie over
    // the stages.
    __device__ __forceinline__ void combine(const Schedule& schedule, const DecodeItem& item, int parts) {
        const PackedRows packed_rows = packed(item);
        const int count = rows_of(item), lane = threadIdx.x % 32;
        Real* weights = staged(0, 0);  // (parts, kRows)
        const int first = schedule.slot(item, 0), second = schedule.slot(item, 1), step = schedule.slot_step();
        auto slot = [&](int n) { return n == 0 ? first : second + (n - 1) * step; };
        for (int x = threadIdx.x; x < parts * kRows; x += kThreads) {
            const int n = x / kRows, row = x % kRows;
            if (row < count) weights[x] = __ldcg(partial_lse(slot(n)) + row);
        }
        __syncthreads();
        for (int row = threadIdx.x / 32; row < count; row += kThreads / 32) {
            Real top = negative_infinity<Real>(), sum = 0;
            for (int n = lane; n < parts; n += 32) top = maximum(top, weights[n * kRows + row]);
#pragma unroll
            for (int s = 16; s > 0; s /= 2) top = maximum(top, __shfl_xor_sync(0xffffffffu, top, s));
            for (int n = lane; n < parts; n += 32) {
                const Real lse = weights[n * kRows + row];
                if (lse != negative_infinity<Real>()) sum += exp2_fast(lse - top);
            }
#pragma unroll
            for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, s);
            const RowResult<Real> result = finish_row(top, sum, sink_of(packed_rows.head(row, packed_rows.query(row))));
            for (int n = lane; n < parts; n += 32) {
                const Real lse = weights[n * kRows + row];
                weights[n * kRows + row] = lse == negative_infinity<Real>() ? Real(0) : exp2_fast(lse - top) * result.factor;
            }
            if (lane == 0) store_lse(item, packed_rows, row, result.lse_log2);
        }
        __syncthreads();
        for_output(count, [&](int row, int col) {
            Real x[4] = {};
            const Real* from = partial(0, row) + col;
#pragma unroll 8
            for (int n = 0; n < parts; n++) {
                Real y[4];
                load_quad(y, from + static_cast<long long>(slot(n)) * (kRows * kHeadDimV));
                const Real weight = weights[n * kRows + row];
#pragma unroll
                for (int e = 0; e < 4; e++) x[e] += weight * y[e];
            }
            store_quad(out_row(item, packed_rows, row), col, x);
        });
        __syncthreads();  // before the next item is loaded
    }

    __device__ __forceinline__ void process(const Schedule& schedule, const DecodeItem& item, Range blocks, unsigned unit,
                                            int parts) {
        visit_keys(item, blocks);
        merge_warps(item, parts == 1);
        if (parts == 1) {
            store_final(item);
            __syncthreads();  // before the next item overwrites what is read here
            return;
        }
        store_partial(item, schedule.slot(item, schedule.part(item, unit)));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            shared.last = Schedule::arrive(p.tickets + schedule.ticket(item), p.call, parts);
            __threadfence();
        }
        __syncthreads();
        if (shared.last) combine(schedule, item, parts);
    }

    // Tokens past the last packed sequence: out 0, lse -inf.
    __device__ __forceinline__ void store_tail() const {
        const int start = p.cu_seqlens_q[p.batch], threads = kThreads * static_cast<int>(gridDim.x);
        const int thread = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
        for (int token = start; token < p.total_q; token++) {
            for (int x = thread; x < p.num_heads * p.head_dim_v; x += threads) {
                const int head = x / p.head_dim_v;
                static_cast<Element*>(p.out)[token * p.out_row + head * p.out_head + x % p.head_dim_v] = Element(0.0f);
            }
            for (int head = thread; p.lse != nullptr && head < p.num_heads; head += threads) {
                static_cast<Real*>(p.lse)[head * p.lse_head + token] = negative_infinity<Real>();
            }
        }
    }

    __device__ __forceinline__ void run() {
        Schedule schedule{p, mask};
        schedule.open(shared.schedule);
        if constexpr (Config::kPacked) store_tail();
        if (schedule.start >= schedule.stop) return;
        DecodeItem item = schedule.first_item();
        for (unsigned unit = schedule.start; unit < schedule.stop;) {
            const unsigned end = min(schedule.stop, item.first + item.units);
            const int parts = schedule.parts(item);
            while (unit < end) {
                // Even division takes all of the CTA's blocks at once, otherwise each part has a softmax of its own.
                const unsigned next = p.max_parts > 0 ? unit + 1 : end;
                const int from = static_cast<int>(unit - item.first) * item.chunk,
                          to = static_cast<int>(next - item.first) * item.chunk;
                process(schedule, item, {item.blocks.start + from, min(item.blocks.start + to, item.blocks.stop)}, unit, parts);
                unit = next;
            }
            if (unit < schedule.stop) schedule.advance(item);
        }
    }
};

}  // namespace cuattn
