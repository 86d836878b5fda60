// Backward of attention: dk and dv of a key tile, and its share of dq. One algorithm for every element type; how warps multiply
// tiles is the policy Config::Gemm, one of tile/warp_*.cuh. sm_80 and up.
//
//   P = exp(S - lse)   dP = dO V^T   dS = P o (dP - delta)   dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K
//   (FlashAttention-2, algorithm 2; delta = rowsum(dO o O) - dlse, from backward_prepare.cu)
//
// A CTA takes kBlockN keys of one KV head and loops over the query tiles of all query heads that share it, so dk and dv stay in
// registers. Its dq tiles are added to dq_sum in memory, in the order of its own accumulators ("slabs"), which makes every
// transaction whole; backward_convert.cu brings them into place.
//
// Deterministic: dq_splits CTAs of a head take key tiles in turn, each adding to a dq_sum of its own, so that the order of
// every sum is fixed. Little parallelism: q_splits CTAs share a key tile's queries, and backward_combine.cu adds their dk and
// dv.
//
// Shared memory   sK (kBlockN x D) | sV (kBlockN x Dv) | kStages x { sQ (kBlockM x D), sdO (kBlockM x Dv), stats } | sP | sdS |
//                 sSums (where a bias is differentiated); dk and dv are staged over the front at the end
// Loop            wait Q, dO; load the next ones; (of tf32: round Q and dO; barrier;) S = Q K^T, dP = dO V^T; (of pairs: the
//                 largest magnitudes of P and dS; barrier;) P and dS to shared memory; barrier; dQ = dS K, added to dq_sum;
//                 dV += P^T dO; dK += dS^T Q
#pragma once
#include "attention/mod_sums.cuh"
#include "attention/row_stats.cuh"
#include "attention/scores.cuh"
#include "attention/seqlen.cuh"
#include "mainloop/query_tiles.cuh"
#include "mainloop/slab.cuh"
#include "mainloop/split_input.cuh"
#include "ptx/special_registers.cuh"
#include "tile/copy.cuh"

namespace cuattn {

template <class Config>
struct Backward {
    using Gemm = typename Config::Gemm;
    using Element = typename Gemm::Element;   // of what is multiplied
    using Output = typename Config::Element;  // of dk and dv: float where inputs are pairs of __half
    using Real = typename Gemm::Accum;
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kThreads = Config::kThreads;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV, kStages = Config::kStages;
    static constexpr int kWarps = kThreads / 32;

    using ScoreGrid = typename Gemm::template Grid<false, false, kBlockM, kBlockN, kWarps>;
    using KeyGrid = typename Gemm::template Grid<true, true, kBlockN, kHeadDim, kWarps>;
    using ValueGrid = typename Gemm::template Grid<true, true, kBlockN, kHeadDimV, kWarps>;
    using Scores = typename Gemm::template Sums<false, false, ScoreGrid::kRows, ScoreGrid::kCols>;
    using KeySums = typename Gemm::template Sums<true, true, KeyGrid::kRows, KeyGrid::kCols>;
    using ValueSums = typename Gemm::template Sums<true, true, ValueGrid::kRows, ValueGrid::kCols>;
    using Slab = QuerySlab<Config>;

    using QTile = typename Gemm::template Tile<kBlockM, kHeadDim>;
    using DoTile = typename Gemm::template Tile<kBlockM, kHeadDimV>;
    using KTile = typename Gemm::template Tile<kBlockN, kHeadDim>;
    using VTile = typename Gemm::template Tile<kBlockN, kHeadDimV>;
    using PTile = typename Gemm::template ScoreTile<kBlockM, kBlockN>;
    using DsTile = typename Gemm::template GradientTile<kBlockM, kBlockN>;
    static_assert(DsTile::kBytes == PTile::kBytes);
    static constexpr bool kSplitInput = Gemm::kParts > 1;  // see mainloop/split_input.cuh
    using Sums = ModSums<Config, Scores>;
    using Stats = RowStats<Config>;
    static constexpr int kStatsCopy = sizeof(Stats) < 16 ? sizeof(Stats) : 16, kStatsParts = sizeof(Stats) / kStatsCopy;
    static constexpr int kStatsBytes = (kBlockM * static_cast<int>(sizeof(Stats)) + 127) / 128 * 128;
    // kStageBias: tiles of a bias come with the queries; kBiasRow: it is the same for all of them.
    using BiasElement = typename Config::BiasElement;
    using BiasTile = SmemTile<BiasElement, Config::kBiasRow ? 1 : kBlockM, kBlockN, 1>;
    // Whole lines, as swizzled tiles follow.
    static constexpr int kBiasBytes = Config::kStageBias ? (BiasTile::kBytes + 127) / 128 * 128 : 0;
    static constexpr int kStageBytes = QTile::kBytes + DoTile::kBytes + kStatsBytes + kBiasBytes;
    static constexpr int kSums = Sums::kKind == kBiasColumns ? ScoreGrid::kDown * kBlockN + kThreads * Scores::kThreadCols
                                 : Sums::kKind == kBiasRows  ? ScoreGrid::kAcross * kBlockM
                                                             : 0;
    static constexpr int kSumsBytes = kSums * static_cast<int>(sizeof(Real));
    static constexpr int kOffsetV = KTile::kBytes, kOffsetStages = kOffsetV + VTile::kBytes;
    static constexpr int kOffsetP = kOffsetStages + kStages * kStageBytes, kOffsetDs = kOffsetP + PTile::kBytes;
    static constexpr int kOffsetSums = kOffsetDs + PTile::kBytes;
    template <int kCols>
    using OutTile = SmemTile<Output, kBlockN, kCols, 1>;
    static_assert(kOffsetSums + kSumsBytes <= Config::kSmemBytes && OutTile<kHeadDim>::kBytes <= Config::kSmemBytes &&
                      OutTile<kHeadDimV>::kBytes <= Config::kSmemBytes,
                  "the plan's shared memory is too small");
    static_assert((kStages == 1 || kStages == 2) && kOffsetV % 128 == 0 && kOffsetStages % 128 == 0 && kStageBytes % 128 == 0 &&
                  kOffsetDs % 128 == 0);

    const ForwardParams& p;
    const BackwardParams& g;
    const Mask& mask;
    const ScoreMod& score_mod;
    char* smem;
    KeySums dk;
    ValueSums dv;
    Sums sums;

    struct Work {
        Coord at;  // head: the first of the group
        Sequence seq;
        int head_kv, share, q_split;

        __device__ __forceinline__ static Work of(const ForwardParams& p, const BackwardParams& g) {
            unsigned index = cta_index();
            Work w;
            if constexpr (Config::kBiasKind == kBiasCells) {  // those who add to the same elements run side by side
                w.at.batch = g.first_batch + static_cast<int>(index % g.batches);
                index /= g.batches;
            }
            const unsigned shares = Config::kDeterministic ? g.dq_splits : g.n_blocks;
            w.share = static_cast<int>(index % shares);
            index /= shares;
            w.q_split = static_cast<int>(index % g.q_splits);
            index /= g.q_splits;
            w.head_kv = g.first_head_kv + static_cast<int>(index % g.heads_kv);
            if constexpr (Config::kBiasKind != kBiasCells) {
                w.at.batch = g.first_batch + static_cast<int>(index / g.heads_kv);
            }
            w.at.head = w.head_kv * p.group;
            w.seq = Sequence::of<Config::kPacked, Config::kLens>(p, w.at.batch);
            w.at.seqlen_q = w.seq.seqlen_q, w.at.seqlen_k = w.seq.seqlen_k;
            return w;
        }
    };

    __device__ __forceinline__ KTile sK() const { return {reinterpret_cast<Element*>(smem)}; }
    __device__ __forceinline__ VTile sV() const { return {reinterpret_cast<Element*>(smem + kOffsetV)}; }
    __device__ __forceinline__ char* stage_start(int stage) const { return smem + kOffsetStages + stage * kStageBytes; }
    __device__ __forceinline__ QTile sQ(int stage) const { return {reinterpret_cast<Element*>(stage_start(stage))}; }
    __device__ __forceinline__ DoTile sdO(int stage) const {
        return {reinterpret_cast<Element*>(stage_start(stage) + QTile::kBytes)};
    }
    __device__ __forceinline__ Stats* sStats(int stage) const {
        return reinterpret_cast<Stats*>(stage_start(stage) + QTile::kBytes + DoTile::kBytes);
    }
    __device__ __forceinline__ BiasTile sBias(int stage) const {
        return {reinterpret_cast<BiasElement*>(stage_start(stage) + QTile::kBytes + DoTile::kBytes + kStatsBytes)};
    }
    __device__ __forceinline__ PTile sP() const { return {reinterpret_cast<Element*>(smem + kOffsetP)}; }
    __device__ __forceinline__ DsTile sdS() const { return {reinterpret_cast<Element*>(smem + kOffsetDs)}; }
    __device__ __forceinline__ Real* sSums() const { return reinterpret_cast<Real*>(smem + kOffsetSums); }
    // kBiasColumns: this thread's sum of its column c over the tiles of a head, where no register is needed to keep it.
    __device__ __forceinline__ Real& own_column(int c) const {
        return sSums()[ScoreGrid::kDown * kBlockN + c * kThreads + static_cast<int>(threadIdx.x)];
    }
    __device__ __forceinline__ void clear_head() {
        sums.clear_head();
        if constexpr (Sums::kKind == kBiasColumns) {
#pragma unroll
            for (int c = 0; c < Scores::kThreadCols; c++) own_column(c) = 0;
        }
    }

    // An operand from global memory. Where inputs are pairs, a row is as long as the tile's, and the words that decide the
    // exponent of its slot come along.
    template <int kVecBytes, class Tile>
    __device__ __forceinline__ void load_operand(const Tile& tile, const Element* source, long long pitch, int rows, int cols,
                                                 int slot) const {
        load_tile<kThreads, kVecBytes>(tile, source, pitch, rows, kSplitInput ? Tile::kCols : cols);
        if constexpr (kSplitInput) {
            constexpr int kCopies = kTops / 4;
            if (threadIdx.x < kCopies)
                cp_async<16>(smem_address(tile.tops() + 4 * threadIdx.x), magnitudes_of(p, slot) + 4 * threadIdx.x);
        }
    }

    __device__ __forceinline__ void load_keys(const Work& w, int n) const {
        const int start = n * kBlockN, rows = w.at.seqlen_k - start;
        const Element* k = static_cast<const Element*>(p.k) + w.seq.k + w.head_kv * p.k_head + start * p.k_row;
        const Element* v = static_cast<const Element*>(p.v) + w.seq.v + w.head_kv * p.v_head + start * p.v_row;
        const auto slots = SplitSlots<Config>::of(p);
        load_operand<Config::kVecK>(sK(), k, p.k_row, rows, p.head_dim, slots.k(w.at.batch, w.head_kv));
        load_operand<Config::kVecV>(sV(), v, p.v_row, rows, p.head_dim_v, slots.v(w.at.batch, w.head_kv));
    }

    __device__ __forceinline__ void load_queries(const Work& w, int n, int head, int m, int stage) const {
        const int start = m * kBlockM, rows = w.at.seqlen_q - start;
        const long long row = w.seq.token_q + start;
        const Element* q = static_cast<const Element*>(p.q) + w.at.batch * p.q_batch + head * p.q_head + row * p.q_row;
        const Element* dout =
            static_cast<const Element*>(g.dout) + w.at.batch * g.dout_batch + head * g.dout_head + row * g.dout_row;
        const auto slots = SplitSlots<Config>::of(p);
        load_operand<Config::kVecQ>(sQ(stage), q, p.q_row, rows, p.head_dim, slots.q(w.at.batch, head));
        load_operand<Config::kVecDout>(sdO(stage), dout, g.dout_row, rows, p.head_dim_v, slots.dout(w.at.batch, head));
        if constexpr (Config::kStageBias) {
            const auto& bias = BiasIn<ScoreMod>::get(score_mod);
            const BiasElement* from = bias.array + w.at.batch * bias.stride_batch + head * bias.stride_head +
                                      start * bias.stride_q + opaque(n) * kBlockN;
            load_tile<kThreads, Config::kVecBias>(sBias(stage), from, bias.stride_q, Config::kBiasRow ? 1 : rows,
                                                  w.at.seqlen_k - n * kBlockN);
        }
        const Stats* stats = static_cast<const Stats*>(g.row_stats) + w.seq.row + head * w.seq.head_rows + start;
        for (int i = threadIdx.x; i < kBlockM; i += kThreads) {
            if (i < rows) {
#pragma unroll
                for (int part = 0; part < kStatsParts; part++) {
                    cp_async<kStatsCopy>(smem_address(sStats(stage) + i) + part * kStatsCopy,
                                         reinterpret_cast<const char*>(stats + i) + part * kStatsCopy);
                }
            } else {
                sStats(stage)[i] = Stats::nothing();
            }
        }
    }

    // A staged tile of the bias, read by neighbouring elements at once.
    struct BiasSource {
        const BiasElement* data;

        __device__ __forceinline__ BiasElement operator()(int row, int col) const {
            struct alignas(2 * sizeof(BiasElement)) Pair {
                BiasElement even, odd;
            };
            const BiasElement* start = data + (Config::kBiasRow ? 0 : row * BiasTile::kPitch);
            const Pair pair = *reinterpret_cast<const Pair*>(start + (col & ~1));
            return col & 1 ? pair.odd : pair.even;
        }
    };

    __device__ __forceinline__ void scores(const Coord& at, const QueryTiles<Mask, kBlockM, kBlockN>& tiles, Place place,
                                           int stage) {
        if constexpr (Config::kStageBias) {
            const BiasSource source{sBias(stage).data};
            scores_with(at, tiles, place, stage,
                        BiasIn<ScoreMod>::stage(score_mod, source, place.m * kBlockM, tiles.n * kBlockN));
        } else {
            scores_with(at, tiles, place, stage, score_mod);
        }
    }

    // The elementwise part of one tile; P and dS go to shared memory.
    template <class Mod>
    __device__ __forceinline__ void scores_with(const Coord& at, const QueryTiles<Mask, kBlockM, kBlockN>& tiles, Place place,
                                                int stage, const Mod& mod) {
        Scores s, dp;
#pragma unroll
        for (int x = 0; x < Scores::kSize; x++) s[x] = 0, dp[x] = 0;
        Gemm::template multiply<false, false, kHeadDim>(s, sQ(stage), ScoreGrid::row(), sK(), ScoreGrid::col());
        Gemm::template multiply<false, false, kHeadDimV>(dp, sdO(stage), ScoreGrid::row(), sV(), ScoreGrid::col());
        const int row0 = place.m * kBlockM + ScoreGrid::row(), col0 = tiles.n * kBlockN + ScoreGrid::col();
        const Stats* own = sStats(stage) + ScoreGrid::row();
        const auto stats = [&](int r) { return own[Scores::row_at(r)]; };
        const Real scale = static_cast<Real>(p.scale),
                   factor = static_cast<Real>(Config::kFoldScale ? p.scale * kLog2e : kLog2e);
        const Real dropout_scale = static_cast<Real>(p.dropout_scale);
        sums.clear_tile();
        if (tiles.full(mask, at, place)) {
            score_gradients<Config, false>(s, dp, at, row0, col0, scale, factor, mask, mod, stats, sums, p.seed,
                                           p.dropout_threshold, dropout_scale);
        } else {
            score_gradients<Config, true>(s, dp, at, row0, col0, scale, factor, mask, mod, stats, sums, p.seed,
                                          p.dropout_threshold, dropout_scale);
        }
        if constexpr (kSplitInput) {
            Gemm::template measure<ScoreGrid>(s, sP());
            Gemm::template measure<ScoreGrid>(dp, sdS());
            ScoreGrid::sync();  // the exponents depend on all warps
        }
        Gemm::store(s, sP(), ScoreGrid::row(), ScoreGrid::col());
        Gemm::store(dp, sdS(), ScoreGrid::row(), ScoreGrid::col());
        sums.write_cells(g, at, row0, col0);
        if constexpr (Sums::kKind == kBiasColumns) {
#pragma unroll
            for (int c = 0; c < Scores::kThreadCols; c++) own_column(c) += sums.columns[c];
        }
        if constexpr (Sums::kKind == kBiasRows) {
#pragma unroll
            for (int r = 0; r < Scores::kThreadRows; r++) {
                const Real sum = Scores::sum_row(sums.rows[r]);
                if (Scores::leads_row())
                    sSums()[ScoreGrid::warp_across() * kBlockM + ScoreGrid::row() + Scores::row_at(r)] = sum;
            }
        }
    }

    // kBiasRows: what the warps found for the rows of this tile. After a barrier.
    __device__ __forceinline__ void add_row_sums(const Coord& at, int share, int m) const {
        if constexpr (Sums::kKind == kBiasRows) {
            for (int i = threadIdx.x; i < kBlockM; i += kThreads) {
                if (m * kBlockM + i >= at.seqlen_q) break;
                Real sum = 0;
#pragma unroll
                for (int warp = 0; warp < ScoreGrid::kAcross; warp++) sum += sSums()[warp * kBlockM + i];
                red_add(static_cast<Real*>(g.bias_sum) + (Config::kDeterministic ? share : 0) * g.sum_split +
                            at.batch * g.sum_batch + at.head * g.sum_head + (m * kBlockM + i) * g.sum_q,
                        sum);
            }
        }
    }

    // What a head's parameters receive from this key tile.
    __device__ __forceinline__ void finish_head(const Work& w, const Coord& at, int n) {
        if (ScoreGrid::active()) score_mod.flush(sums, at);
        if constexpr (Sums::kKind == kBiasColumns) {
#pragma unroll
            for (int c = 0; c < Scores::kThreadCols; c++) {
                const Real sum = Scores::sum_col(own_column(c));
                if (Scores::leads_col() && ScoreGrid::active())
                    sSums()[ScoreGrid::warp_down() * kBlockN + ScoreGrid::col() + Scores::col_at(c)] = sum;
            }
            __syncthreads();
            for (int j = threadIdx.x; j < kBlockN && n * kBlockN + j < at.seqlen_k; j += kThreads) {
                Real sum = 0;
#pragma unroll
                for (int warp = 0; warp < ScoreGrid::kDown; warp++) sum += sSums()[warp * kBlockN + j];
                static_cast<Real*>(g.bias_sum)[w.q_split * g.sum_split + at.batch * g.sum_batch + at.head * g.sum_head +
                                               (n * kBlockN + j) * g.sum_k] = sum;
            }
            __syncthreads();
        }
        clear_head();
    }

    __device__ __forceinline__ void visit_queries(const Work& w, int n) {
        const auto tiles = QueryTiles<Mask, kBlockM, kBlockN>::of(p, g, mask, w.at, n);
        Place place = tiles.after({0, tiles.first}, w.q_split);
        if (tiles.is_end(place)) return;
        load_keys(w, n);
        load_queries(w, n, w.at.head + place.head, place.m, 0);
        cp_async_commit_group();
        Coord at = w.at;
        at.head += place.head;
        if constexpr (Gemm::kRounds) {
            cp_async_wait_group<0>();
            __syncthreads();
            Gemm::template round<kThreads>(sK());
            Gemm::template round<kThreads>(sV());
        }
        for (int stage = 0; !tiles.is_end(place); stage ^= kStages - 1) {
            const Place following = tiles.after(place, tiles.step);
            const int head = w.at.head + place.head;
            if (head != at.head) {
                finish_head(w, at, n);
                at.head = head;
            }
            cp_async_wait_group<0>();
            __syncthreads();  // Q and dO are there; nobody reads P, dS or the other stage
            if (kStages == 2 && !tiles.is_end(following)) {
                load_queries(w, n, w.at.head + following.head, following.m, stage ^ 1);
                cp_async_commit_group();
            }
            if constexpr (Gemm::kRounds) {
                Gemm::template round<kThreads>(sQ(stage));
                Gemm::template round<kThreads>(sdO(stage));
                __syncthreads();
            }
            if (ScoreGrid::active()) scores(at, tiles, place, stage);
            __syncthreads();  // P and dS are there
            add_row_sums(at, w.share, place.m);
            // dq first: its additions to memory then run under the other products.
            Slab::add(p, g, w.seq, at, place.m, Config::kDeterministic ? w.share : 0, sdS(), sK());
            if (ValueGrid::active()) {
                Gemm::template multiply<true, true, kBlockM>(dv, sP(), ValueGrid::row(), sdO(stage), ValueGrid::col());
            }
            if (KeyGrid::active()) {
                Gemm::template multiply<true, true, kBlockM>(dk, sdS(), KeyGrid::row(), sQ(stage), KeyGrid::col());
            }
            if (kStages == 1 && !tiles.is_end(following)) {
                __syncthreads();  // nobody reads Q or dO
                load_queries(w, n, w.at.head + following.head, following.m, 0);
                cp_async_commit_group();
            }
            // Where registers are short, found again rather than held through the products.
            place = Sums::kKind == kBiasColumns ? tiles.after(place, opaque(tiles.step)) : following;
        }
        finish_head(w, at, n);
    }

    // The rows of one gradient, scaled, through shared memory into place.
    template <int kCols, int kVecBytes, class Grid, class Gradient>
    __device__ __forceinline__ void store_gradient(Gradient& gradient, Real scale, Output* target, long long pitch, int rows,
                                                   int cols) const {
        const OutTile<kCols> staged{reinterpret_cast<Output*>(smem)};
        __syncthreads();  // nobody reads what lies there
#pragma unroll
        for (int x = 0; x < Gradient::kSize; x++) {
            if (!Grid::active()) break;
            *staged.at(Grid::row() + Gradient::row(x), Grid::col() + Gradient::col(x)) =
                static_cast<Output>(gradient[x] * scale);
        }
        __syncthreads();
        store_tile<kThreads, kVecBytes>(staged, target, pitch, rows, cols);
    }

    // In the dtype of the scores, for backward_combine.cu.
    template <class Grid, class Gradient>
    __device__ __forceinline__ static void store_partial(const Gradient& gradient, Real scale, Real* target, int rows,
                                                         int cols) {
        if (!Grid::active()) return;
        Gradient copy = gradient;
#pragma unroll
        for (int x = 0; x < Gradient::kSize; x++) {
            const int j = Grid::row() + Gradient::row(x), col = Grid::col() + Gradient::col(x);
            if (j < rows && col < cols) target[static_cast<long long>(j) * cols + col] = copy[x] * scale;
        }
    }

    __device__ __forceinline__ void store(const Work& w, int n) {
        const int start = n * kBlockN, rows = w.at.seqlen_k - start;
        const Real scale = static_cast<Real>(p.scale), scale_v = static_cast<Real>(Config::kDropout ? p.dropout_scale : 1.0);
        if constexpr (Config::kQuerySplit) {
            const long long head_rows = Config::kPacked ? p.total_k : p.seqlen_k, heads_kv = p.num_heads / p.group;
            const long long row = w.q_split * g.rows_kv +
                                  ((Config::kPacked ? 0 : w.at.batch) * heads_kv + w.head_kv) * head_rows + w.seq.token_k +
                                  start;
            store_partial<KeyGrid>(dk, scale, static_cast<Real*>(g.partial_dk) + row * p.head_dim, rows, p.head_dim);
            store_partial<ValueGrid>(dv, scale_v, static_cast<Real*>(g.partial_dv) + row * p.head_dim_v, rows, p.head_dim_v);
        } else {
            const long long row = w.seq.token_k + start;
            Output* dk_to = static_cast<Output*>(g.dk) + w.at.batch * g.dk_batch + w.head_kv * g.dk_head + row * g.dk_row;
            Output* dv_to = static_cast<Output*>(g.dv) + w.at.batch * g.dv_batch + w.head_kv * g.dv_head + row * g.dv_row;
            store_gradient<kHeadDim, Config::kVecDk, KeyGrid>(dk, scale, dk_to, g.dk_row, rows, p.head_dim);
            store_gradient<kHeadDimV, Config::kVecDv, ValueGrid>(dv, scale_v, dv_to, g.dv_row, rows, p.head_dim_v);
        }
    }

    // Rows of dk and dv that belong to no key. A packed call's tail has more of them than key tiles.
    __device__ __forceinline__ void store_padding(const Work& w) const {
        const int shares = Config::kDeterministic ? g.dq_splits : g.n_blocks;
        for (int block = w.share; block * kBlockN < w.seq.rows_k; block += shares) {
            const int start = max(block * kBlockN, w.at.seqlen_k), stop = min((block + 1) * kBlockN, w.seq.rows_k);
            const long long row = w.seq.token_k + start;
            Output* dk_to = static_cast<Output*>(g.dk) + w.at.batch * g.dk_batch + w.head_kv * g.dk_head + row * g.dk_row;
            Output* dv_to = static_cast<Output*>(g.dv) + w.at.batch * g.dv_batch + w.head_kv * g.dv_head + row * g.dv_row;
            for (int x = threadIdx.x; x < (stop - start) * p.head_dim; x += kThreads) {
                dk_to[x / p.head_dim * g.dk_row + x % p.head_dim] = Output(0.0f);
            }
            for (int x = threadIdx.x; x < (stop - start) * p.head_dim_v; x += kThreads) {
                dv_to[x / p.head_dim_v * g.dv_row + x % p.head_dim_v] = Output(0.0f);
            }
        }
    }

    __device__ __forceinline__ void key_tile(int n) {
#pragma unroll
        for (int x = 0; x < KeySums::kSize; x++) dk[x] = 0;
#pragma unroll
        for (int x = 0; x < ValueSums::kSize; x++) dv[x] = 0;
        clear_head();
        visit_queries(Work::of(p, g), n);
        store(Work::of(p, g), n);
    }

    __device__ __forceinline__ void run() {
        const Work w = Work::of(p, g);
        if constexpr (Config::kDeterministic) {
            for (int turn = 0, n; turn * g.dq_splits < g.n_blocks; turn++) {  // back and forth, which balances causal masks
                n = turn * g.dq_splits + (turn % 2 == 0 ? w.share : g.dq_splits - 1 - w.share);
                if (n * kBlockN >= Work::of(p, g).at.seqlen_k) continue;
                if (turn > 0) __syncthreads();  // the last tile has left shared memory
                key_tile(n);
            }
        } else if (w.share * kBlockN < w.at.seqlen_k) {
            key_tile(w.share);
        }
        if constexpr (!Config::kQuerySplit) store_padding(Work::of(p, g));
    }
};

}  // namespace cuattn
