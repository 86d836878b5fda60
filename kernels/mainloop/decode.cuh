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
// Pipeline        cp.async, kStages - 1 blocks ahead; one lane looks each page of a block up, one block earlier still
// Loop            wait block; load block + kStages - 1; S = Q K^T; modify, mask; online softmax; O = O * shrink + P V
//
// One sequence (kBoxed, sm_90): its keys are dealt out to the warps of all CTAs of a KV head. A warp has its own part of every
// stage, which it fills by TMA, and a barrier for it; warps meet at the end alone. See run_alone().
#pragma once
#include "attention/packed_rows.cuh"
#include "attention/softmax.cuh"
#include "mainloop/decode_schedule.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/copy.cuh"
#include "tile/gemm.cuh"
#include "tile/reg_tile.cuh"

namespace cuattn {

// Of a plan that loads keys and values by the copy engine.
template <class Config>
struct BoxedArguments {
    TensorMap k, v;  // of the caches over (column, slot, head, page), in boxes of a panel and kBoxRows slots
    DecodeArguments<Config> variant;
};

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
    // q as it comes from memory. kNarrows: the products take it as fp16 (MmaByte).
    static constexpr bool kNarrows = Config::kNarrows;
    using QLoaded = typename Either<kNarrows, SwizzledTile<Element, kRows, kHeadDim>, QTile>::Type;
    // Boxed: the copy engine loads kBoxRows slots of a page at once. A warp then loads what it alone reads, into tiles of its
    // own, and goes through its keys at its own pace. Otherwise all warps load all rows of a block.
    static constexpr int kBoxRows = Config::kBoxRows;
    static constexpr bool kBoxed = kBoxRows > 0;
    static constexpr int kAlignment = 1024;  // of the tiles of boxes
    static constexpr int kTileRows = kBoxed ? kKeys : kBlockN, kTiles = kBlockN / kTileRows;
    static_assert(!kBoxed || (kWarpsM == 1 && kKeys % kBoxRows == 0));
    using KTile = typename Mma::template KTile<kTileRows, kHeadDim>;
    using VTile = typename Mma::template VTile<kTileRows, kHeadDimV>;
    // A thread copies the same rows of K and V.
    static constexpr int kLanes = lesser(copy_lanes(KTile::kCopyCols / vec_of<Cache>(Config::kVecK)),
                                         copy_lanes(VTile::kCopyCols / vec_of<Cache>(Config::kVecV)));
    using QRows = TileRows<kThreads, Config::kVecQ, kLanes, false, QLoaded>;
    using KRows = TileRows<kThreads, Config::kVecK, kLanes, Config::kWholeRows, KTile>;
    using VRows = TileRows<kThreads, Config::kVecV, kLanes, Config::kWholeRows, VTile>;
    static constexpr int kTileBytes = KTile::kBytes + VTile::kBytes, kStageBytes = kTiles * kTileBytes;
    static constexpr int kPitch = kHeadDimV + 8;  // of the staged outputs: pairs of four rows lie in different banks
    static_assert(QTile::kBytes + kStages * kStageBytes <= Config::kSmemBytes, "the plan's shared memory is too small");
    static_assert(QTile::kBytes + kWarpsN * kRows * kPitch * sizeof(Real) <= Config::kSmemBytes, "no room for the outputs");
    // A warp loads kWarpRows rows of a block: kRowsAtOnce in each of KRows::kSteps steps. Its lanes look up a row each.
    static constexpr int kRowsAtOnce = 32 / kLanes, kWarpRows = KRows::kSteps * kRowsAtOnce, kLookUps = (kWarpRows + 31) / 32;

    // Where a lane's rows of a block lie, as the page table says.
    struct Places {
        Place at[kLookUps];
    };
    struct Shared {
        unsigned schedule[Schedule::kWords];
        Real max_log2[kWarpsN][kRows], sum[kWarpsN][kRows];  // of each warp's keys
        Real q_scale[kNarrows ? kRows : 1];
        alignas(8) unsigned long long full[kBoxed ? kStages : 1][kWarpsN];  // barriers: a warp's tiles of a stage are there
    };

    const DecodeParams& p;
    const Mask& mask;
    const ScoreMod& score_mod;
    const TensorMap* maps;  // of k and of v, if boxed
    char* smem;
    Shared& shared;
    unsigned phases = 0;  // of the warp's barriers, a bit each
    // Fragments of q stay in registers where these and the accumulators take at most half of them.
    static constexpr int kHeld = kHeadDim / Mma::kGroupK, kAccumulators = 4 * (kN + kNv) * static_cast<int>(sizeof(Real)) / 4;
    static constexpr bool kHoldsQ = kAccumulators + kHeld * static_cast<int>(sizeof(typename Mma::Q)) / 4 <= 128;
    typename Mma::Q q[kHoldsQ ? kHeld : 1];
    RegTile<Real, 1, kNv, typename Mma::Lanes> o;
    RowState<Real> rows[1][2];

    __device__ __forceinline__ QTile sQ() const { return {reinterpret_cast<typename QTile::Element*>(smem)}; }
    __device__ __forceinline__ QLoaded loaded_q() const { return {reinterpret_cast<typename QLoaded::Element*>(smem)}; }
    __device__ __forceinline__ KTile sK(int stage) const {
        return {reinterpret_cast<Cache*>(smem + QTile::kBytes + stage * kStageBytes + (kBoxed ? warp_n() * kTileBytes : 0))};
    }
    __device__ __forceinline__ VTile sV(int stage) const {
        return {reinterpret_cast<Cache*>(reinterpret_cast<char*>(sK(stage).data) + KTile::kBytes)};
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
        const unsigned start = QRows::start(loaded_q());
#pragma unroll 1
        for (int step = 0; step < QRows::kSteps; step++) {
            const int row = QRows::row(step), i = rows.query(row);
            const bool exists = row < count;
            const Element* from = exists ? q + i * p.q_row + rows.head(row, i) * p.q_head + QRows::col() : q;
            QRows::load(loaded_q(), start, step, from, exists, p.head_dim);
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
            auto* first = loaded_q().at(row, Config::kInterleaved ? 2 * d : d);
            auto* second = loaded_q().at(row, Config::kInterleaved ? 2 * d + 1 : d + half);
            const Real a = static_cast<Real>(*first), b = static_cast<Real>(*second);
            *first = static_cast<Element>(a * cosine - b * sine);
            *second = static_cast<Element>(a * sine + b * cosine);
        }
    }

    // q from what was loaded to what the products take. `scale`: of the scores, then of each of the thread's rows.
    __device__ __forceinline__ void prepare_q(const DecodeItem& item, Real (&scale)[2]) {
        if constexpr (Config::kRotary) {
            rotate_q(item);
            __syncthreads();
        }
        if constexpr (kNarrows) {
            constexpr int kRowLanes = kThreads / kRows;
            const int row = threadIdx.x / kRowLanes, lane = threadIdx.x % kRowLanes;
            const Real factor = Mma::template narrow_row<kRowLanes>(loaded_q(), row, lane);
            if (lane == 0) shared.q_scale[row] = factor;
            __syncthreads();
#pragma unroll
            for (int half = 0; half < 2; half++) {
                scale[half] *= shared.q_scale[16 * warp_m() + 8 * half + static_cast<int>(threadIdx.x % 32) / 4];
            }
        }
        if constexpr (kHoldsQ) {
#pragma unroll
            for (int k = 0; k < kHeadDim; k += Mma::kGroupK) q[k / Mma::kGroupK] = Mma::load_q(sQ(), 16 * warp_m(), k);
        }
    }

    __device__ __forceinline__ Places find(const DecodeItem& item, int n) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Places places;
#pragma unroll
        for (int x = 0; x < kLookUps; x++) {
            const int step = x * kLanes + lane / kRowsAtOnce,
                      row = warp * kRowsAtOnce + lane % kRowsAtOnce + step * KRows::kStep;
            const int j = n * kBlockN + row;
            const bool exists = step < KRows::kSteps && j < item.seq.seqlen_k;
            places.at[x] = place_of<Config::kPaged>(p, item.seq, item.seq.leftpad + j, exists);
        }
        return places;
    }
    // Calls use(step, offset, whether it exists) for the lane's rows that are among those of look-up x.
    template <class Use>
    __device__ __forceinline__ static void for_rows(int x, long long own, unsigned exist, const Use& use) {
#pragma unroll
        for (int y = 0; y < kLanes && x * kLanes + y < KRows::kSteps; y++) {
            const int from = y * kRowsAtOnce + static_cast<int>(threadIdx.x) % 32 / kLanes;
            use(x * kLanes + y, __shfl_sync(0xffffffffu, own, from), static_cast<bool>(exist >> from & 1));
        }
    }
    // Keys first, then values: rows of both that are asked for at once lie equally far in two arrays, which memory serves less
    // well. NOTE: what find() returns is on its way until it is looked at here.
    __device__ __forceinline__ void load_block(const DecodeItem& item, const Places& places, int stage) const {
        const Cache* k = static_cast<const Cache*>(p.k) + item.head_kv * p.k_head + KRows::col();
        const Cache* v = static_cast<const Cache*>(p.v) + item.head_kv * p.v_head + VRows::col();
        const unsigned to_k = KRows::start(sK(stage)), to_v = VRows::start(sV(stage));
#pragma unroll
        for (int x = 0; x < kLookUps; x++) {
            const Place place = places.at[x];
            const bool inside = static_cast<unsigned>(place.page) < static_cast<unsigned>(p.pages);
            const unsigned exist = __ballot_sync(0xffffffffu, inside);
            const long long page = inside ? place.page : 0, slot = inside ? place.slot : 0;
            const long long own_k = page * p.k_page + slot * p.k_row;
            const long long own_v = Config::kAlike ? own_k : page * p.v_page + slot * p.v_row;
            for_rows(x, own_k, exist, [&](int step, long long at, bool exists) {
                KRows::load(sK(stage), to_k, step, k + at, exists, p.head_dim);
            });
            for_rows(x, own_v, exist, [&](int step, long long at, bool exists) {
                VRows::load(sV(stage), to_v, step, v + at, exists, p.head_dim_v);
            });
        }
    }

    __device__ __forceinline__ unsigned full(int stage) const { return smem_address(&shared.full[stage][warp_n()]); }
    // A warp's keys are kBoxes boxes: kRowBoxes to a panel, those of K first. Lane l knows of box l and loads it.
    static constexpr int kRowBoxes = kBoxed ? kKeys / kBoxRows : 1, kBoxes = kTileBytes / 128 / (kKeys / kRowBoxes);
    static_assert(!kBoxed || kBoxes <= 32);
    // Where a lane's box of the keys from j on lies, if these are before `stop`.
    __device__ __forceinline__ Place find_box(const DecodeItem& item, int j, int stop) const {
        const int lane = static_cast<int>(threadIdx.x % 32);
        j += lane % kRowBoxes * kBoxRows;
        const Place place = place_of<Config::kPaged>(p, item.seq, item.seq.leftpad + j, lane < kBoxes && j < stop);
        return {static_cast<unsigned>(place.page) < static_cast<unsigned>(p.pages) ? place.page : -1, place.slot};
    }
    // What the maps place outside the cache arrives as zeros. NOTE: bytes may arrive before they are announced, since the phase
    // does not end before the announcement.
    __device__ __forceinline__ void load_boxes(const DecodeItem& item, const Place& box, int stage) const {
        constexpr int kPanelsK = KTile::kCopyCols / KTile::kPanel;
        const int lane = static_cast<int>(threadIdx.x % 32), panel = lane / kRowBoxes;
        const bool of_v = panel >= kPanelsK;
        if (lane == 0) mbarrier_arrive_expect_tx(full(stage), kTileBytes);
        if (lane < kBoxes) {
            cp_async_bulk_tensor_4d(
                smem_address(sK(stage).data) + panel * KTile::kPanelBytes + lane % kRowBoxes * (kBoxRows * 128), maps[of_v],
                full(stage), (of_v ? panel - kPanelsK : panel) * KTile::kPanel, box.slot, item.head_kv, box.page);
        }
        __syncwarp();
    }
    // Rows past the sequence may hold anything: P is 0 there, but 0 * NaN is not.
    __device__ __forceinline__ void clear_rows(const VTile& tile, int start) const {
#pragma unroll
        for (int col = 0; col < VTile::kCopyCols; col += VTile::kPanel) {
            char* panel = reinterpret_cast<char*>(tile.data) + VTile::shift(0, col);
            for (int x = start * 8 + static_cast<int>(threadIdx.x % 32); x < kKeys * 8; x += 32) {
                *reinterpret_cast<uint4*>(panel + x * 16) = make_uint4(0, 0, 0, 0);
            }
        }
        fence_proxy_async();
        __syncwarp();
    }
    // Before the work ahead is done: no array is touched.
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x % 32 == 0) {
            for (int stage = 0; stage < kStages; stage++) mbarrier_init(full(stage), 1);
            fence_mbarrier_init();
            prefetch_tensormap(maps[0]);
            prefetch_tensormap(maps[1]);
        }
        __syncwarp();
    }

    // Keys --------------------------------------------------------------------------------------------------------------

    // The warp's keys from col0 on.
    __device__ __forceinline__ void visit_block(const DecodeItem& item, const PackedRows& rows_, Range queries,
                                                const Real (&scale)[2], int col0, int stage) {
        const int first = kBoxed ? 0 : warp_n() * kKeys;
        const KTile k{sK(stage).at(first, 0)};
        const VTile v{sV(stage).at(first, 0)};
        RegTile<Real, 1, kN, typename Mma::Lanes> s;
        if constexpr (kHoldsQ) {
            gemm_qk_of<Mma, kHeadDim>(s.data, [&](int, int column) { return q[column / Mma::kGroupK]; }, k);
        } else {
            gemm_qk<Mma, kHeadDim>(s.data, sQ(), k, 16 * warp_m());
        }
        const Coord at = item.seq.at(item.batch);
        PackedRows rows_here = rows_;
        rows_here.row0 += 16 * warp_m();
        if (col0 + kKeys <= at.seqlen_k && mask.covers(at, queries, {col0, col0 + kKeys})) {
            modify_packed_scores<false>(s, at, rows_here, col0, scale, mask, score_mod);
        } else {
            modify_packed_scores<true>(s, at, rows_here, col0, scale, mask, score_mod);
        }
        online_softmax(s, o, rows, static_cast<Real>(kLog2e), static_cast<Real>(Mma::kProbabilityExponent));
        gemm_pv<Mma>(o.data, s.data, v);
    }

    __device__ __forceinline__ void clear_outputs() {
#pragma unroll
        for (int x = 0; x < o.kSize; x++) o[x] = 0;
        rows[0][0] = rows[0][1] = RowState<Real>{};
    }
    __device__ __forceinline__ void begin_scale(const DecodeItem& item, Real (&scale)[2]) const {
        scale[0] = scale[1] =
            static_cast<Real>(p.scale) * cache_scale(p.k_scale, p.k_scale_batch, p.k_scale_head, item.batch, item.head_kv);
    }
    // The warp's keys from `start` on, kKeys in every `step`. `box` is where its box of the first lies; q is on its way.
    __device__ __forceinline__ void visit_boxes(const DecodeItem& item, Place box, int start, int step, int stop) {
        if (start < stop) load_boxes(item, box, 0);
        clear_outputs();
        if (start + step < stop) {
            box = find_box(item, start + step, stop);
#pragma unroll
            for (int s = 1; s < kStages - 1; s++) {
                const Place next = find_box(item, start + (s + 1) * step, stop);
                if (start + s * step < stop) load_boxes(item, box, s);
                box = next;
            }
        }
        const Range queries = Schedule::queries(p, item.seq, item.m_block);
        const PackedRows rows_ = packed(item);
        Real scale[2];
        begin_scale(item, scale);
        cp_async_wait_group<0>();
        __syncthreads();  // q is there
        prepare_q(item, scale);
        int stage = 0;
#pragma unroll 1
        for (int j = start; j < stop; j += step) {
            const int ahead = j + (kStages - 1) * step;
            if (ahead < stop) load_boxes(item, box, stage == 0 ? kStages - 1 : stage - 1);
            box = find_box(item, ahead + step, stop);
            mbarrier_wait(full(stage), phases >> stage & 1);
            phases ^= 1u << stage;
            if (j + kKeys > item.seq.seqlen_k) clear_rows(sV(stage), item.seq.seqlen_k - j);
            visit_block(item, rows_, queries, scale, j, stage);
            __syncwarp();  // nobody reads the stage
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        __syncthreads();  // nobody reads the stages
    }
    // `meanwhile` is called while the first keys are on their way.
    template <class Meanwhile>
    __device__ __forceinline__ void visit_blocks(const DecodeItem& item, Range blocks, const Meanwhile& meanwhile) {
        Places places = find(item, blocks.start);
        load_q(item);
        clear_outputs();
#pragma unroll 1
        for (int s = 0; s < kStages - 1; s++) {
            const Places next = find(item, blocks.start + s + 1);  // on its way while the pages before are waited for
            if (blocks.start + s < blocks.stop) load_block(item, places, s);
            cp_async_commit_group();
            places = next;
        }
        meanwhile();
        const Range queries = Schedule::queries(p, item.seq, item.m_block);
        const PackedRows rows_ = packed(item);
        Real scale[2];
        begin_scale(item, scale);
        cp_async_wait_group<kStages - 2>();
        __syncthreads();  // q and the first block are there
        prepare_q(item, scale);
        int stage = 0;
#pragma unroll 1
        for (int n = blocks.start; n < blocks.stop; n++) {
            if (n > blocks.start) {
                cp_async_wait_group<kStages - 2>();
                __syncthreads();  // the block is there; nobody reads the stage loaded next
            }
            const int ahead = n + kStages - 1;
            if (ahead < blocks.stop) load_block(item, places, stage == 0 ? kStages - 1 : stage - 1);
            cp_async_commit_group();
            if (ahead + 1 < blocks.stop) places = find(item, ahead + 1);
            visit_block(item, rows_, queries, scale, n * kBlockN + warp_n() * kKeys, stage);
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

    // The warps' outputs to shared memory, as they are, and what each is relative to.
    __device__ __forceinline__ void stage_outputs(const DecodeItem& item) {
        const int own = o.g(), count = rows_of(item);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            RowState<Real>& row = rows[0][half];
            const int r = 16 * warp_m() + 8 * half + own;
            if (r - own >= count) break;  // the rows of a warp exist from the first on
            row.sum = o.sum_row(row.sum);
            if (o.leads_row()) {
                shared.max_log2[warp_n()][r] =
                    row.max == negative_infinity<Real>()
                        ? row.max
                        : row.max * static_cast<Real>(kLog2e) - static_cast<Real>(Mma::kProbabilityExponent);
                shared.sum[warp_n()][r] = row.sum;
            }
#pragma unroll
            for (int u = 0; u < kNv; u++) {
                const Real first = o.data[0][u][2 * half], second = o.data[0][u][2 * half + 1];
                Real* to = staged(warp_n(), r) + Mma::column(u, 0);
                if constexpr (sizeof(Cache) == 2) {  // MmaHalf: both are neighbours
                    *reinterpret_cast<float2*>(to) = make_float2(first, second);
                } else {
                    *to = first;
                    staged(warp_n(), r)[Mma::column(u, 1)] = second;
                }
            }
        }
        __syncthreads();
    }
    // What one part of a row counts beside another with maximum `top`; 0 for one that has seen no key.
    __device__ __forceinline__ static Real share(Real max_log2, Real sum, Real top) {
        return max_log2 == negative_infinity<Real>() && sum == Real(0) ? Real(0) : exp2_fast(max_log2 - top);
    }

    // Four neighbouring elements.
    struct Quad {
        Real x[4];
    };
    __device__ __forceinline__ static Quad read(const float* from) {
        const float4 quad = *reinterpret_cast<const float4*>(from);
        return {{quad.x, quad.y, quad.z, quad.w}};
    }
    __device__ __forceinline__ static Quad read(const double* from) {
        const double2 low = reinterpret_cast<const double2*>(from)[0], high = reinterpret_cast<const double2*>(from)[1];
        return {{low.x, low.y, high.x, high.y}};
    }
    // That another CTA has written.
    __device__ __forceinline__ static Quad read_shared(const float* from) {
        const float4 quad = __ldcg(reinterpret_cast<const float4*>(from));
        return {{quad.x, quad.y, quad.z, quad.w}};
    }
    __device__ __forceinline__ static Quad read_shared(const double* from) {
        const double2 low = __ldcg(reinterpret_cast<const double2*>(from)),
                      high = __ldcg(reinterpret_cast<const double2*>(from) + 1);
        return {{low.x, low.y, high.x, high.y}};
    }
    __device__ __forceinline__ static void write(float* to, const Quad& quad) {
        *reinterpret_cast<float4*>(to) = make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]);
    }
    __device__ __forceinline__ static void write(double* to, const Quad& quad) {
        reinterpret_cast<double2*>(to)[0] = make_double2(quad.x[0], quad.x[1]);
        reinterpret_cast<double2*>(to)[1] = make_double2(quad.x[2], quad.x[3]);
    }
    __device__ __forceinline__ void write_out(Element* to, int col, const Quad& quad) const {
        if (Config::kVecOut >= 8 && sizeof(Element) == 2 && col + 4 <= p.head_dim_v) {
            Element four[4];
#pragma unroll
            for (int e = 0; e < 4; e++) four[e] = static_cast<Element>(quad.x[e]);
            *reinterpret_cast<uint2*>(to + col) = *reinterpret_cast<const uint2*>(four);
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (col + e < p.head_dim_v) to[col + e] = static_cast<Element>(quad.x[e]);
        }
    }

    // Calls use(row, column of a quad).
    static constexpr int kQuads = kHeadDimV / 4;  // of a row
    template <class Use>
    __device__ __forceinline__ void for_output(int count, const Use& use) const {
#pragma unroll 1
        for (int x = threadIdx.x; x < count * kQuads; x += kThreads) {
            const int row = x / kQuads, col = x % kQuads * 4;
            if (col < p.head_dim_v) use(row, col);
        }
    }
    // Of a row, over all warps.
    struct Merged {
        Quad x;
        Real lse_log2;
    };
    __device__ __forceinline__ Merged merged(int row, int col, Real sink, Real v_scale) const {
        Real top = negative_infinity<Real>(), sum = 0;
#pragma unroll
        for (int w = 0; w < kWarpsN; w++) top = maximum(top, shared.max_log2[w][row]);
        Quad x = {};
#pragma unroll
        for (int w = 0; w < kWarpsN; w++) {
            const Real weight = share(shared.max_log2[w][row], shared.sum[w][row], top);
            const Quad quad = read(staged(w, row) + col);
            sum += shared.sum[w][row] * weight;
#pragma unroll
            for (int e = 0; e < 4; e++) x.x[e] += quad.x[e] * weight;
        }
        const RowResult<Real> result = finish_row(top, sum, sink);
#pragma unroll
        for (int e = 0; e < 4; e++) x.x[e] *= result.factor * v_scale;
        return {x, result.lse_log2};
    }
    __device__ __forceinline__ Real scale_of_values(const DecodeItem& item) const {
        return cache_scale(p.v_scale, p.v_scale_batch, p.v_scale_head, item.batch, item.head_kv);
    }
    __device__ __forceinline__ void store_final(const DecodeItem& item) const {
        const PackedRows packed_rows = packed(item);
        const Real v_scale = scale_of_values(item);
        for_output(rows_of(item), [&](int row, int col) {
            const Merged y = merged(row, col, sink_of(packed_rows.head(row, packed_rows.query(row))), v_scale);
            write_out(out_row(item, packed_rows, row), col, y.x);
            if (col == 0) store_lse(item, packed_rows, row, y.lse_log2);
        });
    }
    // NOTE: the slots of partial results have whole quads of columns.
    __device__ __forceinline__ Real* partial(int slot) const {
        return static_cast<Real*>(p.partial_out) + static_cast<long long>(slot) * (kRows * kHeadDimV);
    }
    __device__ __forceinline__ Real* partial_lse(int slot) const {
        return static_cast<Real*>(p.partial_lse) + static_cast<long long>(slot) * kRows;
    }
    __device__ __forceinline__ void store_partial(const DecodeItem& item, int slot) const {
        Real* to = partial(slot);
        const Real v_scale = scale_of_values(item);
        for_output(rows_of(item), [&](int row, int col) {
            const Merged y = merged(row, col, negative_infinity<Real>(), v_scale);
            write(to + row * kHeadDimV + col, y.x);
            if (col == 0) partial_lse(slot)[row] = y.lse_log2;
        });
    }

    // A quad of out = sum over parts of 2^(lse_n - lse) out_n, part by part, so that nobody need know their number beforehand.
    struct Combined {
        Real top = negative_infinity<Real>(), sum = 0;
        Quad x = {};

        template <int kParts>
        __device__ __forceinline__ void add(const Real (&lse)[kParts], const Quad (&parts)[kParts]) {
            Real above = top;
#pragma unroll
            for (int n = 0; n < kParts; n++) above = maximum(above, lse[n]);
            const Real shrink = top == negative_infinity<Real>() ? Real(0) : exp2_fast(top - above);
            sum *= shrink;
#pragma unroll
            for (int e = 0; e < 4; e++) x.x[e] *= shrink;
#pragma unroll
            for (int n = 0; n < kParts; n++) {
                if (lse[n] == negative_infinity<Real>()) continue;
                const Real weight = exp2_fast(lse[n] - above);
                sum += weight;
#pragma unroll
                for (int e = 0; e < 4; e++) x.x[e] += weight * parts[n].x[e];
            }
            top = above;
        }
    };
    __device__ __forceinline__ void store_combined(const DecodeItem& item, const PackedRows& packed_rows, int row, int col,
                                                   Combined& y) const {
        const RowResult<Real> result = finish_row(y.top, y.sum, sink_of(packed_rows.head(row, packed_rows.query(row))));
#pragma unroll
        for (int e = 0; e < 4; e++) y.x.x[e] *= result.factor;
        write_out(out_row(item, packed_rows, row), col, y.x);
        if (col == 0) store_lse(item, packed_rows, row, result.lse_log2);
    }

    // out from the parts of an item; slot(n) is where part n lies. What a batch of parts of some quads needs from memory is on
    // its way at once.
    template <class Slot>
    __device__ __forceinline__ void combine(const DecodeItem& item, int parts, const Slot& slot) const {
        constexpr int kParts = 8, kAtOnce = 2;
        const PackedRows packed_rows = packed(item);
        const int quads = rows_of(item) * kQuads;
#pragma unroll 1
        for (int x = threadIdx.x; x < quads; x += kAtOnce * kThreads) {
            Combined y[kAtOnce];
#pragma unroll 1
            for (int n0 = 0; n0 < parts; n0 += kParts) {
                Real lse[kAtOnce][kParts];
                Quad part[kAtOnce][kParts];
#pragma unroll
                for (int n = 0; n < kParts; n++) {
                    const int place = slot(min(n0 + n, parts - 1));
                    const Real *from = partial(place), *from_lse = partial_lse(place);
#pragma unroll
                    for (int i = 0; i < kAtOnce; i++) {
                        const int quad = min(x + i * kThreads, quads - 1);
                        lse[i][n] = __ldcg(from_lse + quad / kQuads);
                        part[i][n] = read_shared(from + quad * 4);
                    }
                }
#pragma unroll
                for (int i = 0; i < kAtOnce; i++) {
#pragma unroll
                    for (int n = 0; n < kParts; n++) lse[i][n] = n0 + n < parts ? lse[i][n] : negative_infinity<Real>();
                    y[i].add(lse[i], part[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const int quad = x + i * kThreads, row = quad / kQuads, col = quad % kQuads * 4;
                if (quad < quads && col < p.head_dim_v) store_combined(item, packed_rows, row, col, y[i]);
            }
        }
    }

    // Whether this CTA is the last of `parts`, whose partial results it may then read.
    __device__ __forceinline__ static bool arrives_last(unsigned long long* ticket, int parts) {
        __syncthreads();
        bool last = false;
        if (threadIdx.x == 0) last = Schedule::arrive(ticket, parts);
        return __syncthreads_or(last);
    }

    __device__ __forceinline__ void process(const Schedule& schedule, DecodeItem& item, Range blocks, unsigned unit) {
        visit_blocks(item, blocks, [&] {
            schedule.share(item);
            if (item.parts > 1 && threadIdx.x == 0) Schedule::claim(schedule.ticket(item), p.call);
        });
        stage_outputs(item);
        if (item.parts == 1) {
            store_final(item);
        } else {
            store_partial(item, schedule.slot(item, schedule.part(item, unit)));
            if (arrives_last(schedule.ticket(item), item.parts)) {
                combine(item, item.parts, [&](int n) { return schedule.slot(item, n); });
            }
        }
        __syncthreads();  // before the next item overwrites what is read here
    }

    // Tokens past the last packed sequence: out 0, lse -inf.
    __device__ __forceinline__ void store_tail() const {
        const int start = p.cu_seqlens_q[p.batch], threads = kThreads * static_cast<int>(gridDim.x * gridDim.y);
        const int thread = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
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

    // One sequence: its keys are dealt out, kKeys at a time, to the warps of all CTAs of a KV head.
    __device__ __forceinline__ void run_alone() {
        const int part = static_cast<int>(blockIdx.y), most = static_cast<int>(gridDim.y);
        const int offset = (part * kWarpsN + warp_n()) * kKeys;  // of the warp's first keys
        DecodeItem item;
        item.batch = 0, item.m_block = 0, item.head_kv = static_cast<int>(blockIdx.x);
        // Nothing waits for anything else here. Keys mostly begin with the first: then their page has been looked up by the
        // time that the length is known.
        item.seq = CachedSequence::begin<false>(p, 0);
        Place box = find_box(item, offset, CachedSequence::capacity(p) - item.seq.leftpad);
        const int length = CachedSequence::length(p, 0);
        in_order();
        unsigned long long* ticket = p.tickets + item.head_kv;
        unsigned long long seen = 0;
        if (threadIdx.x == 0) seen = Schedule::begin_claim(ticket, p.call);
        load_q(item);
        cp_async_commit_group();
        item.seq.end<false>(p, length);
        const Range blocks = Schedule::key_blocks(p, mask, item.seq, 0, 0);
        const int start = blocks.start * kBlockN, stop = min(blocks.stop * kBlockN, item.seq.seqlen_k);
        const int parts = max(1, min(most, blocks.stop - blocks.start));
        if (part >= parts) {
            cp_async_wait_group<0>();
            return;
        }
        if (start > 0) box = find_box(item, start + offset, stop);
        visit_boxes(item, box, start + offset, parts * kBlockN, stop);
        stage_outputs(item);
        if (parts == 1) {
            store_final(item);
            return;
        }
        store_partial(item, item.head_kv * most + part);
        if (threadIdx.x == 0) Schedule::claim(ticket, p.call, seen);
        if (arrives_last(ticket, parts)) combine_alone(item, parts, item.head_kv * most);
    }
    // As combine, where slots are neighbours. NOTE: slots are read up to a multiple of kParts.
    __device__ __forceinline__ void combine_alone(const DecodeItem& item, int parts, int slot) const {
        constexpr int kParts = Config::kCombined;
        const PackedRows packed_rows = packed(item);
        for_output(rows_of(item), [&](int row, int col) {
            const Real *from = partial(slot) + row * kHeadDimV + col, *from_lse = partial_lse(slot) + row;
            Combined y;
#pragma unroll 1
            for (int left = parts; left > 0; left -= kParts) {
                Real lse[kParts];
                Quad part[kParts];
#pragma unroll
                for (int n = 0; n < kParts; n++) {
                    lse[n] = __ldcg(from_lse + n * kRows);
                    part[n] = read_shared(from + n * (kRows * kHeadDimV));
                }
#pragma unroll
                for (int n = 0; n < kParts; n++) lse[n] = n < left ? lse[n] : negative_infinity<Real>();
                y.add(lse, part);
                from += kParts * kRows * kHeadDimV, from_lse += kParts * kRows;
            }
            store_combined(item, packed_rows, row, col, y);
        });
    }

    __device__ __forceinline__ void run() {
        if constexpr (kBoxed) {
            run_alone();
            return;
        }
        Schedule schedule{p, mask};
        schedule.open(shared.schedule);
        if constexpr (Config::kPacked) store_tail();
        if (schedule.start >= schedule.stop) return;
        DecodeItem item = schedule.first_item();
#pragma unroll 1
        for (unsigned unit = schedule.start; unit < schedule.stop;) {
            const unsigned end = min(schedule.stop, item.first + item.units);
#pragma unroll 1
            while (unit < end) {
                // Even division takes all of the CTA's blocks at once, otherwise each part has a softmax of its own.
                const unsigned next = Schedule::kParted ? unit + 1 : end;
                const int from = static_cast<int>(unit - item.first) * item.chunk,
                          to = static_cast<int>(next - item.first) * item.chunk;
                process(schedule, item, {item.blocks.start + from, min(item.blocks.start + to, item.blocks.stop)}, unit);
                unit = next;
            }
            if (unit < schedule.stop) schedule.advance(item);
        }
    }
};

}  // namespace cuattn
