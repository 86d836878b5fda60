// Forward on Hopper: TMA loads, wgmma products, warpgroups with roles. 16-bit elements, sm_90a.
//
//   S = scale * Q K^T, modified and masked     P = exp(S - lse)     O = P V        (FlashAttention-3, algorithm 2)
//
// Roles       consumers: kConsumers warpgroups, 64 query rows each; S, P and O stay in their registers
//             producer: the last warpgroup, of which one thread issues all loads
// Registers   a CTA's share is 65536 / kMinBlocks; the producer hands all but kProducerRegisters over
// Memory      kQStages x sQ (kConsumers x 64 x D) | kStages x sK (kBlockN x D) | kStages x sV (kBlockN x Dv) |
//             kBiasStages x bias tile (kBlockM x kBlockN) | query tiles | barriers; D, Dv and the columns of a bias tile padded
//             to 64
// Barriers    name                  arrives                         count            waits
//             full (q of a          the producer, and the bytes     1                consumers
//               warpgroup, k, v)
//             empty (k, v)          one lane of each consumer warp  4 * kConsumers   the producer
//             empty (q)             one lane of each of its warps   4                the producer
//             tile_full             the producer                    1                consumers: the next query tile is known
//             tile_empty            one lane of each consumer warp  4 * kConsumers   the producer
// Loop        S of this tile and O of the last one are issued together, and the softmax of this tile runs under both that O
// (overlap)   and the other warpgroups' products:
//                 wait K; issue S = Q K^T; issue O += P V; wait S; release K; modify, mask, maxima; wait O; release V;
//                 P = exp(S - max), O *= shrink; wait V
//             The first S of a query tile goes with the last O of the one before. A warpgroup passes over tiles of keys that
//             none of its rows sees. With kScalesFirst, O is scaled between the issue of S and its own instead, and waited for
//             after the exponentials. Without kOverlap, O of a tile follows its softmax, which needs fewer registers.
// Maxima      with kKeepsMaxima, a row's maximum is that of the first tile in which it sees a key, unless sums grow too large:
//             after the release of K come the first exponentials, the wait for O and the other exponentials. With kBounded
//             there are none, and O is waited for when three quarters of S have become P, to 64 columns all of it.
// Output      with kStagesOutput, what a query tile gives lies where its Q was until the next one's second products are under
//             way, and is stored then; else it is stored at once.
#pragma once
#include "attention/scores.cuh"
#include "attention/softmax.cuh"
#include "mainloop/epilogue.cuh"
#include "mainloop/ring.cuh"
#include "mainloop/schedule_sm90.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/panel_tile.cuh"
#include "tile/wgmma_tile.cuh"

namespace cuattn {

// Tensor maps of q, k and v over (d, row, head, batch), packed (d, token, head, 1), and of a staged bias over (key, query,
// head, batch), with boxes of 64 columns and the rows of a tile.
enum MapIndex { kMapQ, kMapK, kMapV, kMapBias };
template <class Config>
struct TmaArguments {
    TensorMap maps[Config::kBiasStages > 0 ? 4 : 3];
    ForwardArguments<Config> variant;
};

template <class Config>
struct ForwardSm90 {
    using Element = typename Config::Element;
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kStages = Config::kStages;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV;
    static constexpr int kWarpgroups = Config::kThreads / 128, kConsumers = kWarpgroups - 1;
    static_assert(kBlockM == 64 * kConsumers && kBlockN % 16 == 0);

    // Registers of a thread at launch, and what the roles make of them; a multiple of 8 each.
    static constexpr int kLaunchRegisters = 65536 / Config::kMinBlocks / Config::kThreads / 8 * 8;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;  // three have none to spare
    static constexpr int kConsumerRegisters = (kLaunchRegisters * kWarpgroups - kProducerRegisters) / kConsumers / 8 * 8;
    static_assert(kConsumers >= 2);  // one alone would have more than an instruction can name

    using QTile = PanelTile<64, kHeadDim>;  // a warpgroup's
    using KTile = PanelTile<kBlockN, kHeadDim>;
    using VTile = PanelTile<kBlockN, kHeadDimV>;
    using OutTile = PanelTile<64, kHeadDimV>;  // a warpgroup's
    using Tiles = KeyTiles<Mask, kBlockM, kBlockN, Config::kSplit>;
    using Schedule = TileSchedule<Config>;
    using Slot = RingSlot<kStages>;
    static constexpr int kQStages = Config::kQStages;
    using QSlot = RingSlot<kQStages>;
    // A warpgroup begins its next query tile before the last one's output is done; wider heads leave no registers for that.
    static constexpr bool kCrosses = Config::kOverlap && Config::kPersistent && kHeadDim <= 128 && kHeadDimV <= 128;
    // O is scaled between the issue of S and its own: an iteration late, while S is multiplied.
    static constexpr bool kScalesFirst = Config::kOverlap && Config::kScalesFirst;
    static_assert(!kScalesFirst || (!kCrosses && kStages > 1));
    // Columns whose exponentials are taken before O is waited for, where no maxima are in between, and where a query tile
    // begins. Narrow O is done before the first of them.
    static constexpr int kEarly = Config::kScalesFirst ? kBlockN : kHeadDimV <= 64 ? 0 : kBlockN / 32 * 8;
    static constexpr int kEarlyCross = kBlockN / 16 * 8;
    // Columns of bounded scores, likewise.
    static constexpr int kEarlyBounded = kHeadDimV <= 64 ? kBlockN : kBlockN / 32 * 24;
    static constexpr int kTileStages = 3;  // of query tiles: the one being stored, the current and the next
    using TileSlot = RingSlot<kTileStages>;
    // A bias that TMA can load comes in tiles like K; kBiasStages 0: there is none, or it is read from global memory.
    static constexpr int kBiasStages = Config::kBiasStages;
    using BiasTile = PanelTile<kBlockM, kBlockN>;
    using BiasSlot = RingSlot<kBiasStages>;
    static constexpr int kOffsetK = kQStages * kConsumers * QTile::kBytes, kOffsetV = kOffsetK + kStages * KTile::kBytes;
    static constexpr int kOffsetBias = kOffsetV + kStages * VTile::kBytes;
    static constexpr int kOffsetTile = kOffsetBias + kBiasStages * BiasTile::kBytes;
    static constexpr int kOffsetBarriers = kOffsetTile + kTileStages * static_cast<int>(sizeof(QueryTile));
    static constexpr int kBarriers = 2 * kTileStages + 2 * kQStages * kConsumers + 4 * kStages + 2 * kBiasStages;
    // The dynamic shared memory of a CTA is aligned by hand.
    static_assert(kOffsetBarriers + 8 * kBarriers + QTile::kAlignment <= Config::kSmemBytes,
                  "the plan's shared memory is too small");

    // A row keeps its first maximum while its probabilities of a tile of keys sum to kLargestSum<Element> at most. Where they
    // outgrow it, floats are still there to be divided, if they have registers of their own beside P.
    static constexpr bool kKeepsMaxima = Config::kKeepsMaxima;
    static_assert(!kKeepsMaxima || Config::kPositiveScale);

    // One buffer for V is not free for the next tile before O is done.
    static constexpr bool kLateWait = Config::kLateWait && kStages > 1;

    // Modifications of a whole tile of raw products; exponentials of bounded scores need no maximum.
    static constexpr bool kBounded = Config::kBounded;
    static constexpr bool kWhole = Config::kPositiveScale && WholeTile<ScoreMod>::kExists && kHeadDimV <= 128 && !kBounded;
    using Whole = WholeTile<typename Either<kWhole, ScoreMod, NoScoreMod>::Type>;
    static constexpr bool kLinear = kWhole && Whole::kLinear && kKeepsMaxima;
    // Three consumers have no such registers without overlap, or beside what ALiBi needs where all is visible.
    static constexpr bool kDivides = kConsumers == 2 || (Config::kOverlap && !(kLinear && kSeesAll<Mask>));
    // Scores may grow from key to key by what a user's code does: who has gone back once takes maxima for the rest of a query
    // tile.
    static constexpr bool kAdapts = kKeepsMaxima && !Config::kFoldScale && !kWhole;
    // A query tile begins with the keys that are nearest to it, whose scores are the largest, and goes on behind them.
    static constexpr bool kNearestFirst = Config::kNearestFirst;
    static_assert(!kNearestFirst || !Mask::kTiled);
    // Heads to 64 have three consumers, in whose loop scaled products were faster.
    static constexpr bool kScalesQueries = kBounded && kHeadDim > 64;
    using Bounded = BoundedTile<typename Either<kBounded, ScoreMod, NoScoreMod>::Type, kScalesQueries>;
    static_assert(!kBounded || (Bounded::kExists && !kKeepsMaxima && !kScalesFirst));

    // Rows past a sequence's end may hold anything: other sequences, or padding that is NaN. Those past an array's are zero.
    static constexpr bool kForeignRows = Config::kPacked || Config::kLens;
    // Where what becomes of a product depends on all of its warp, such rows of q become zero, and tiles with such keys take the
    // way that is right for any product: or they would have a say in the last bits of others.
    static constexpr bool kAsksAll = kForeignRows && (kBounded || (kWhole && Whole::kAsksAll));
    // The output of a query tile is staged where its Q lay and stored under the next one's products, and what comes after that
    // is looked up under the last products of that one. Three consumers and foreign rows leave no registers for it.
    static constexpr bool kStagesOutput =
        kCrosses && kQStages == 2 && kConsumers == 2 && !kForeignRows && kHeadDimV % 64 == 0 && kHeadDimV <= kHeadDim;
    static constexpr bool kLooksAhead = kStagesOutput && !kWhole;
    // Named barriers; 0 is __syncthreads.
    static constexpr int kTurnBarrier = 1, kClearBarrier = kTurnBarrier + kConsumers;

    const TmaArguments<Config>& arguments;
    char* smem;  // aligned
    unsigned base;

    // The order of key tiles: the one that is visited first, which is near to all rows and of which each sees some keys, those
    // behind it, and those before it.
    struct Order {
        Range blocks;
        int first;
        // Which tile comes in the place of tile n.
        __device__ __forceinline__ int operator()(int n) const {
            if constexpr (!kNearestFirst) return n;
            const int block = n - blocks.start + first;
            return block < blocks.stop ? block : block - blocks.stop + blocks.start;
        }
    };
    __device__ __forceinline__ Order order(const Tiles& tiles, const Work& w) const {
        if constexpr (!kNearestFirst) return {tiles.blocks, 0};
        const int row0 = w.m_block * kBlockM, middle = row0 + kBlockM / 2 + w.at.seqlen_k - w.at.seqlen_q;
        const int seen = arguments.variant.mask.kv_range(w.at, {row0, row0 + 1}).stop - 1;
        return {tiles.blocks, max(tiles.blocks.start, min(min(middle, seen) / kBlockN, tiles.blocks.stop - 1))};
    }

    __device__ __forceinline__ const ForwardParams& params() const { return arguments.variant.base; }
    // Known to the compiler where nothing is padded: it then drops what stores a part of a row.
    __device__ __forceinline__ static int head_dim_v(const ForwardParams& p) {
        return Config::kWholeRows ? kHeadDimV : p.head_dim_v;
    }
    __device__ __forceinline__ unsigned barrier(int number) const { return base + kOffsetBarriers + 8 * number; }
    __device__ __forceinline__ unsigned tile_full(int stage) const { return barrier(stage); }
    __device__ __forceinline__ unsigned tile_empty(int stage) const { return barrier(kTileStages + stage); }
    __device__ __forceinline__ unsigned q_full(int stage, int wg) const { return of_q(stage * kConsumers + wg); }
    __device__ __forceinline__ unsigned q_empty(int stage, int wg) const { return of_q((kQStages + stage) * kConsumers + wg); }
    __device__ __forceinline__ unsigned of_q(int number) const { return barrier(2 * kTileStages + number); }
    __device__ __forceinline__ unsigned ring(int number) const { return of_q(2 * kQStages * kConsumers + number); }
    __device__ __forceinline__ unsigned k_full(int stage) const { return ring(stage); }
    __device__ __forceinline__ unsigned k_empty(int stage) const { return ring(kStages + stage); }
    __device__ __forceinline__ unsigned v_full(int stage) const { return ring(2 * kStages + stage); }
    __device__ __forceinline__ unsigned v_empty(int stage) const { return ring(3 * kStages + stage); }
    __device__ __forceinline__ unsigned bias_full(int stage) const { return ring(4 * kStages + stage); }
    __device__ __forceinline__ unsigned bias_empty(int stage) const { return ring(4 * kStages + kBiasStages + stage); }
    __device__ __forceinline__ volatile QueryTile& query_tile(int stage) const {
        return reinterpret_cast<QueryTile*>(smem + kOffsetTile)[stage];
    }

    // ---------------------------------------------------------------------------------------------------------- producer

    __device__ __forceinline__ void produce() const {
        const ForwardParams& p = params();
        Schedule schedule = Schedule::of(p);
        Slot k, v;
        QSlot q;
        BiasSlot bias;
        TileSlot slot;
        auto announce = [&](const QueryTile& tile) {
            mbarrier_wait(tile_empty(slot.stage), slot.parity ^ 1);
            volatile QueryTile& target = query_tile(slot.stage);
            target.m_block = tile.m_block, target.head = tile.head, target.batch = tile.batch;
            mbarrier_arrive(tile_full(slot.stage));
            slot.advance();
        };
        if constexpr (Config::kPersistent) schedule.open(p);
        QueryTile tile = schedule.place(p, static_cast<int>(blockIdx.x));
        announce(tile);
        while (tile.m_block >= 0) {
            const Work w = schedule.work(p, tile);
            if constexpr (!Config::kPersistent) {
                load(w, q, k, v, bias, [] {}, [] {});
                break;
            }
            // NOTE: drawn when all but the last load is issued. Earlier, the CTA with the longest tile would hold back the
            // longest of those left; later, the loads of the next tile would wait for the counter. Short rows draw when the
            // first loads are issued, or they would wait for where the tile is, too.
            int drawn = 0;
            auto draw = [&] { drawn = schedule.draw(p); };
            auto look_up = [&] {
                tile = schedule.place(p, schedule.drawn_tile(p, drawn));
                announce(tile);
            };
            if constexpr (Config::kDrawsEarly) {
                draw();
                load(w, q, k, v, bias, look_up, [] {});
            } else {
                load(w, q, k, v, bias, [] {}, draw);
                look_up();
            }
        }
    }
    // Loads what a query tile needs, and calls `when_begun` and `before_last` once each.
    template <class WhenBegun, class BeforeLast>
    __device__ __forceinline__ void load(const Work& w, QSlot& q, Slot& k, Slot& v, BiasSlot& bias, WhenBegun when_begun,
                                         BeforeLast before_last) const {
        const ForwardParams& p = params();
        const Tiles tiles = Tiles::of(p, arguments.variant.mask, w);
        int n = tiles.next(tiles.blocks.start);
        if (n >= tiles.blocks.stop) {
            when_begun(), before_last();
            return;
        }
        // Packed sequences share one axis of tokens.
        const int batch = Config::kPacked ? 0 : w.at.batch;
        const int row_q = (Config::kPacked ? p.cu_seqlens_q[w.at.batch] : 0) + w.m_block * kBlockM;
        const int row_k = Config::kPacked ? p.cu_seqlens_k[w.at.batch] : 0;
        auto load_k = [&](int block) {
            mbarrier_wait(k_empty(k.stage), k.parity ^ 1);
            KTile::load(base + kOffsetK + k.stage * KTile::kBytes, arguments.maps[kMapK], k_full(k.stage), 0,
                        row_k + block * kBlockN, w.head_kv, batch);
            k.advance();
        };
        auto load_v = [&](int block) {
            mbarrier_wait(v_empty(v.stage), v.parity ^ 1);
            VTile::load(base + kOffsetV + v.stage * VTile::kBytes, arguments.maps[kMapV], v_full(v.stage), 0,
                        row_k + block * kBlockN, w.head_kv, batch);
            v.advance();
        };
        auto load_bias = [&](int block) {
            if constexpr (kBiasStages > 0) {
                const auto& mod = BiasIn<ScoreMod>::get(arguments.variant.score_mod);
                mbarrier_wait(bias_empty(bias.stage), bias.parity ^ 1);
                BiasTile::load(base + kOffsetBias + bias.stage * BiasTile::kBytes, arguments.maps[kMapBias],
                               bias_full(bias.stage), block * kBlockN, w.m_block * kBlockM,
                               mod.stride_head != 0 ? w.at.head : 0, mod.stride_batch != 0 ? w.at.batch : 0);
                bias.advance();
            }
        };
        const Order at = order(tiles, w);
        load_k(at(n));
#pragma unroll
        for (int wg = 0; wg < kConsumers; wg++) {
            mbarrier_wait(q_empty(q.stage, wg), q.parity ^ 1);
            QTile::load(base + (q.stage * kConsumers + wg) * QTile::kBytes, arguments.maps[kMapQ], q_full(q.stage, wg), 0,
                        row_q + 64 * wg, w.at.head, batch);
        }
        q.advance();
        load_bias(at(n));
        when_begun();
#pragma unroll 1
        for (int following = tiles.next(n + 1); following < tiles.blocks.stop; following = tiles.next(n + 1)) {
            load_k(at(following));
            load_bias(at(following));
            load_v(at(n));
            n = following;
        }
        before_last();
        load_v(at(n));
    }

    // --------------------------------------------------------------------------------------------------------- consumers

    struct Consumer {
        const ForwardSm90& kernel;
        int wg;
        QSlot q;
        Slot k, v;
        BiasSlot bias;
        TileSlot tile;
        float factor;  // turns a score into the exponent of 2
        unsigned long long desc_q, desc_k, desc_v;
        WgmmaTile<kBlockN> s;
        unsigned probabilities[kBlockN / 4];
        WgmmaTile<kHeadDimV> o;
        RowState<float> rows[2];  // max: of the row; sum: over this thread's keys
        float owed[2];            // what O is still to be multiplied with (kScalesFirst)
        float lse_log2[2];        // of the rows whose output is staged (kStagesOutput)
        bool staged = false;      // the query tile before this one is still to be stored
        unsigned k_ended = 0;     // the next K was there when this was asked under the exponentials
        bool fresh = false;       // O holds that of the query tile before: its first product overwrites it
        bool careful = false;     // this warp has gone back once in this query tile, and takes maxima now (kAdapts)
        Whole whole;
        Bounded bounded;

        __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
        __device__ __forceinline__ const ForwardParams& params() const { return kernel.params(); }
        __device__ __forceinline__ int first_row(const Work& w) const { return w.m_block * kBlockM + 64 * wg; }

        __device__ __forceinline__ void wait_q(const Work& w) const {
            mbarrier_wait(kernel.q_full(q.stage, wg), q.parity);
            char* const tile = kernel.smem + (q.stage * kConsumers + wg) * QTile::kBytes;
            const bool clears = kAsksAll && first_row(w) + 64 > w.at.seqlen_q;
            if (clears) {
                QTile::template clear_rows_together<128>(tile, max(w.at.seqlen_q - first_row(w), 0),
                                                         static_cast<int>(threadIdx.x % 128));
                if constexpr (kScalesQueries) bar_sync(kClearBarrier + wg, 128);
            }
            if constexpr (kScalesQueries) {  // by a power of two, so that products can be compared with 2 by their bits
                const float power = Bounded::power(kernel.arguments.variant.score_mod, static_cast<float>(params().scale));
                uint4* data = reinterpret_cast<uint4*>(tile);
#pragma unroll 1
                for (int i = threadIdx.x % 128; i < QTile::kBytes / 16; i += 128) {
                    uint4 x = data[i];
                    x.x = scaled_pair<Element>(x.x, power), x.y = scaled_pair<Element>(x.y, power);
                    x.z = scaled_pair<Element>(x.z, power), x.w = scaled_pair<Element>(x.w, power);
                    data[i] = x;
                }
            }
            if (kScalesQueries || clears) {
                fence_proxy_async();
                bar_sync(kClearBarrier + wg, 128);
            }
        }
        __device__ __forceinline__ void release_q() {
            if (leads()) mbarrier_arrive(kernel.q_empty(q.stage, wg));
            q.advance();
        }
        __device__ __forceinline__ void release_k() {
            if (leads()) mbarrier_arrive(kernel.k_empty(k.stage));
            k.advance();
        }
        __device__ __forceinline__ void release_v() {
            if (leads()) mbarrier_arrive(kernel.v_empty(v.stage));
            v.advance();
        }
        __device__ __forceinline__ void release_bias() {
            if (leads()) mbarrier_arrive(kernel.bias_empty(bias.stage));
            bias.advance();
        }
        // Passes over tiles of keys that no row of this warpgroup sees. NOTE: only when they are there, or an arrival might
        // count for the use of a buffer before.
        __device__ __forceinline__ void skip_k(int count) {
#pragma unroll 1
            for (; count > 0; count--) {
                wait_k();
                release_k();
                if constexpr (kBiasStages > 0) {
                    mbarrier_wait(kernel.bias_full(bias.stage), bias.parity);
                    release_bias();
                }
            }
        }
        __device__ __forceinline__ void skip_v(int count) {
#pragma unroll 1
            for (; count > 0; count--) {
                mbarrier_wait(kernel.v_full(v.stage), v.parity);
                release_v();
            }
        }
        __device__ __forceinline__ void skip(int count) {
#pragma unroll 1
            for (; count > 0; count--) skip_k(1), skip_v(1);
        }
        __device__ __forceinline__ Slot next_v() const {
            Slot next = v;
            next.advance();
            return next;
        }
        __device__ __forceinline__ void wait_k() const { mbarrier_wait(kernel.k_full(k.stage), k.parity); }
        // `n`: the tile that V belongs to; `never` is false.
        __device__ __forceinline__ void wait_v(const Slot& slot, const Work& w, int n, bool never) const {
            mbarrier_wait(kernel.v_full(slot.stage), slot.parity ^ (never ? 1 : 0));
            if constexpr (kForeignRows) {
                // P is 0 there, but 0 * NaN is not. All consumers write the same zeros, so they need not agree on who does.
                if ((n + 1) * kBlockN > w.at.seqlen_k) {
                    VTile::template clear_rows_together<128>(kernel.smem + kOffsetV + slot.stage * VTile::kBytes,
                                                             w.at.seqlen_k - n * kBlockN, static_cast<int>(threadIdx.x % 128));
                    fence_proxy_async();
                    bar_sync(kClearBarrier + wg, 128);
                }
            }
        }
        __device__ __forceinline__ void issue_s(WgmmaTile<kBlockN>& s) const {
            wgmma_qk<Element, kHeadDim, QTile, KTile>(s, QTile::advance(desc_q, q.stage * (kConsumers * QTile::kTileStep)),
                                                      KTile::advance(desc_k, k.stage * KTile::kTileStep));
        }
        __device__ __forceinline__ void issue_o(const unsigned (&probabilities)[kBlockN / 4]) {
            wgmma_pv<Element, VTile>(o, probabilities, VTile::advance(desc_v, v.stage * VTile::kTileStep), !fresh);
        }

        // Whether the products of a tile may be asked something all together.
        __device__ __forceinline__ static bool asks(const Work& w, int n) {
            return !kAsksAll || (n + 1) * kBlockN <= w.at.seqlen_k;
        }
        __device__ __forceinline__ void modify(WgmmaTile<kBlockN>& s, const Work& w, const Tiles& tiles, int n) {
            const auto& score_mod = kernel.arguments.variant.score_mod;
            if constexpr (kWhole) {
                whole.apply(s, w.at, first_row(w), n * kBlockN, asks(w, n));
                modify_with<true>(s, w, tiles, n, score_mod);
            } else if constexpr (kBiasStages > 0) {
                using Reader = PanelReader<typename BiasIn<ScoreMod>::Item, BiasTile>;
                const Reader reader{kernel.smem + kOffsetBias + bias.stage * BiasTile::kBytes + 64 * wg * 128};
                mbarrier_wait(kernel.bias_full(bias.stage), bias.parity);
                modify_with<Config::kFoldScale>(s, w, tiles, n,
                                                BiasIn<ScoreMod>::stage(score_mod, reader, first_row(w), n * kBlockN));
                __syncwarp();
                release_bias();
            } else {
                modify_with<Config::kFoldScale>(s, w, tiles, n, score_mod);
            }
        }
        template <bool kFoldScale, class Mod>
        __device__ __forceinline__ void modify_with(WgmmaTile<kBlockN>& s, const Work& w, const Tiles& tiles, int n,
                                                    const Mod& score_mod) const {
            const Mask& mask = kernel.arguments.variant.mask;
            const float scale = static_cast<float>(params().scale);
            if (tiles.full(mask, w.at, n)) {
                modify_scores<kFoldScale, false>(s, w.at, first_row(w), n * kBlockN, scale, mask, score_mod);
            } else {
                modify_scores<kFoldScale, true>(s, w.at, first_row(w), n * kBlockN, scale, mask, score_mod);
            }
        }
        // Raw products of bounded scores to probabilities as operands, and the sums.
        template <int kEarly, class WhenFree>
        __device__ __forceinline__ void cap_and_exponentiate(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4],
                                                             const Work& w, const Tiles& tiles, int n, WhenFree when_free) {
            const float shrink[2] = {};
            const bool near = bounded.within_reach(s) && asks(w, n);
            if (near && tiles.full(kernel.arguments.variant.mask, w.at, n)) {
                auto exponent = [&](float x, int, int) { return bounded.exponent(x); };
                exponentiate_with<false, kEarly>(exponent, s, probabilities, shrink, w, n, when_free);
            } else {
                bounded.cap(s, near, kernel.arguments.variant.score_mod, static_cast<float>(params().scale));
                modify_with<true>(s, w, tiles, n, kernel.arguments.variant.score_mod);
                auto exponent = [](float x, int, int) { return x; };
                exponentiate_with<false, kEarly>(exponent, s, probabilities, shrink, w, n, when_free);
            }
        }
        // Takes the maxima of a tile into its rows; `shrink` is what O is to be multiplied with, as the sums have been.
        __device__ __forceinline__ void take_maxima(const WgmmaTile<kBlockN>& s, float (&shrink)[2]) {
            float top[2];
            if constexpr (kKeepsMaxima) {  // rare, and one row after the other takes fewer registers
                top[0] = s.row_maximum(0), top[1] = s.row_maximum(1);
            } else {
                s.row_maxima(top, [&](const float (&top)[2]) {
                    return maximum(rows[0].max, top[0]) < 0.0f || maximum(rows[1].max, top[1]) < 0.0f;
                });
            }
            shrink[0] = rows[0].advance(top[0], factor), shrink[1] = rows[1].advance(top[1], factor);
        }
        // Whether some row of this warp has seen no key yet.
        __device__ __forceinline__ bool unset() const {
            const float none = negative_infinity<float>();
            return __any_sync(0xffffffffu, rows[0].max == none || rows[1].max == none);
        }
        // Gives those rows the maxima of a tile; their sums and outputs are still 0.
        __device__ __forceinline__ void set_maxima(WgmmaTile<kBlockN>& s) {
            const RowState<float> old[2] = {rows[0], rows[1]};
            float shrink[2];
            take_maxima(s, shrink);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (old[half].max != negative_infinity<float>()) rows[half] = old[half];
            }
        }
        // The maxima of a query tile's first keys. Where other keys are nearer to a row, their scores are expected to be
        // larger.
        __device__ __forceinline__ void take_first_maxima(WgmmaTile<kBlockN>& s, const Work& w, int n) {
            float shrink[2];
            take_maxima(s, shrink);
            if constexpr (kNearestFirst && kLinear) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = first_row(w) + s.row_at(half);
                    rows[half].max +=
                        whole.template rise<kBlockN>(w.at, i, n * kBlockN, factor, kHoldsFloats<Element> ? 80.0f : 8.0f);
                }
            }
        }
        // A tile once more, by each warp for itself and with its maxima, before which the sums were `before`: its
        // probabilities, the sums, and what O is to be multiplied with. Keys come from global memory: their buffer has been
        // released. It is rare, so that it takes few instructions, of which the compiler's time depends: eight columns at a
        // time, in loops.
        __device__ __forceinline__ void go_back(unsigned (&probabilities)[kBlockN / 4], float (&shrink)[2], const Work& w,
                                                int n, const float (&before)[2]) {
            using Columns = WgmmaTile<8>;
            const ForwardParams& p = params();
            const auto& variant = kernel.arguments.variant;
            const unsigned q_tile = kernel.base + (q.stage * kConsumers + wg) * QTile::kBytes;
            const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x % 128 / 32);
            const int head_kv = w.at.head / p.group, last = w.at.seqlen_k - 1;
            const Element* keys = static_cast<const Element*>(p.k) + w.seq.k + head_kv * p.k_head;
            float scores[kBlockN / 2], top[2] = {negative_infinity<float>(), negative_infinity<float>()};
            unsigned packed[kBlockN / 4];  // both in memory: loops find their elements
#pragma unroll 1
            for (int u = 0; u < kBlockN / 8; u++) {
                Columns s = {};
                const int col0 = n * kBlockN + 8 * u;
                const Element* row = keys + min(col0 + lane / 4, last) * p.k_row;
#pragma unroll 2
                for (int step = 0; step < kHeadDim / 16; step++) {
                    unsigned a[4];
                    ldmatrix_x4(a, q_tile + QTile::offset(16 * warp + lane % 16, 2 * step + lane / 16));
                    const int col = 16 * step + 2 * (lane % 4);
                    Element b[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int at = col + e / 2 * 8 + e % 2;  // past the last column Q is 0, and memory may be anything
                        b[e] = at < p.head_dim ? row[at] : Element(0.0f);
                    }
                    const unsigned* pairs = reinterpret_cast<const unsigned*>(b);
                    mma_m16n8k16(s.data, a, pairs[0], pairs[1], Element());
                }
                if constexpr (kWhole) whole.apply(s, w.at, first_row(w), col0, asks(w, n));
                modify_scores<kWhole || Config::kFoldScale, true>(s, w.at, first_row(w), col0, static_cast<float>(p.scale),
                                                                  variant.mask, variant.score_mod);
#pragma unroll
                for (int x = 0; x < 4; x++) scores[4 * u + x] = s[x], top[x / 2] = maximum(top[x / 2], s[x]);
            }
            float offset[2], sum[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                rows[half].sum = before[half];
                top[half] = maximum(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
                top[half] = maximum(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
                shrink[half] = rows[half].advance(top[half], factor);
                offset[half] = rows[half].offset(factor), sum[half] = rows[half].sum;
            }
#pragma unroll 1
            for (int u = 0; u < kBlockN / 8; u++) {
                Columns s;
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    s[x] = exp2_fast(scores[4 * u + x] * factor - offset[x / 2]);
                    sum[x / 2] += s[x];
                }
                if constexpr (Config::kDropout) {
                    drop_probabilities(s, w.at, first_row(w), n * kBlockN + 8 * u, p.seed, p.dropout_threshold);
                }
                packed[2 * u] = pack_pair<Element>(s[0], s[1]), packed[2 * u + 1] = pack_pair<Element>(s[2], s[3]);
            }
            rows[0].sum = sum[0], rows[1].sum = sum[1];
#pragma unroll
            for (int x = 0; x < kBlockN / 4; x++) probabilities[x] = packed[x];
        }
        // After a tile without a look at its maxima, before which the sums were `before`: where they have grown too much, they,
        // O, which belongs to the tiles before, and the probabilities are divided by a power of two. Where even floats do not
        // hold these, back to before the tile, and with maxima this time.
        __device__ __forceinline__ void check_sums(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4], const Work& w,
                                                   int n, const float (&before)[2]) {
            const float larger = maximum(rows[0].sum - before[0], rows[1].sum - before[1]);
            // NOTE: NaN fits: it is what a row past its sequence's end may sum to (start_rows), which must not change others.
            if (__all_sync(0xffffffffu, !(larger > kLargestSum<Element>))) return;
            float shrink[2];
            if (kDivides && __all_sync(0xffffffffu, !(larger > kLargestFloat))) {
                shrink[0] = rows[0].outgrow(s.row_maximum(0), factor), shrink[1] = rows[1].outgrow(s.row_maximum(1), factor);
#pragma unroll
                for (int x = 0; x < kBlockN / 2; x++) s[x] *= shrink[x % 4 / 2];
                pack(s, probabilities);
            } else {
                if constexpr (kAdapts) careful = true;
                go_back(probabilities, shrink, w, n, before);
            }
#pragma unroll
            for (int x = 0; x < kHeadDimV / 2; x++) o[x] *= shrink[x % 4 / 2];
        }
        // Scores to probabilities as operands; the sums; and, 16 columns at a time in between, O times `shrink`: the
        // multiplications fit into the issue slots that the exponentials leave. `when_free` is called with the sum so far,
        // which is never negative, before anything is written to `probabilities`, kEarly columns after the start.
        template <bool kShrink, int kEarly = 0, class WhenFree>
        __device__ __forceinline__ void exponentiate(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4],
                                                     const float (&shrink)[2], const Work& w, int n, WhenFree when_free) {
            const float offset[2] = {rows[0].offset(factor), rows[1].offset(factor)};
            exponentiate_with<kShrink, kEarly>([&](float x, int e, int) { return x * factor - offset[e / 2]; }, s,
                                               probabilities, shrink, w, n, when_free);
        }
        // `exponent(x, e, column)`: of a score, of row e / 2, so many columns after the thread's first.
        template <bool kShrink, int kEarly, class Exponent, class WhenFree>
        __device__ __forceinline__ void exponentiate_with(Exponent exponent, WgmmaTile<kBlockN>& s,
                                                          unsigned (&probabilities)[kBlockN / 4], const float (&shrink)[2],
                                                          const Work& w, int n, WhenFree when_free) {
            float sum[4] = {rows[0].sum, 0.0f, rows[1].sum, 0.0f};
            constexpr int kSteps = kBlockN / 8, kSizeO = kHeadDimV / 2, kEach = (kSizeO + kSteps - 1) / kSteps;
            static_assert(!kShrink || kEarly == 0);
            auto take = [&](int u) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[4 * u + e] = exp2_fast(exponent(s[4 * u + e], e, 8 * u + e % 2));
                    sum[e] += s[4 * u + e];
                }
            };
            // NOTE: two loops. A condition on u is one that the compiler resolves when it has made a copy for each u.
#pragma unroll
            for (int u = 0; u < kEarly / 8; u++) take(u);
            when_free((sum[0] + sum[1]) + (sum[2] + sum[3]));
#pragma unroll
            for (int u = 0; u < kEarly / 8 && !Config::kDropout; u++) pack(s, probabilities, u);
#pragma unroll
            for (int u = kEarly / 8; u < kSteps; u++) {
                take(u);
                if constexpr (!Config::kDropout) pack(s, probabilities, u);
                if constexpr (kShrink) {
#pragma unroll
                    for (int x = u * kEach; x < (u + 1) * kEach && x < kSizeO; x++) o[x] *= shrink[x % 4 / 2];
                }
            }
            rows[0].sum = sum[0] + sum[1];
            rows[1].sum = sum[2] + sum[3];
            if constexpr (Config::kDropout) {
                drop(s, w, n);
                pack(s, probabilities);
            }
        }
        // Raw products to probabilities as operands and the sums, where rows keep their maxima.
        template <int kEarly, class WhenFree>
        __device__ __forceinline__ void keep_and_exponentiate(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4],
                                                              const Work& w, const Tiles& tiles, int n, WhenFree when_free) {
            const float before[2] = {rows[0].sum, rows[1].sum}, shrink[2] = {};
            if (kAdapts && careful) {
                modify(s, w, tiles, n);
                float shrink[2];
                take_maxima(s, shrink);
                when_free(0.0f);
                exponentiate<true>(s, probabilities, shrink, w, n, [](float) {});
                return;
            }
            if constexpr (kLinear) {
                const int row0 = first_row(w), col0 = n * kBlockN;
                int side = Whole::template side<64, kBlockN>(w.at, row0, col0);
                if (!tiles.full(kernel.arguments.variant.mask, w.at, n) || unset()) side = 0;
                if (side == 0) {
                    modify(s, w, tiles, n);
                    if (unset()) set_maxima(s);
                }
                const float offset[2] = {rows[0].offset(factor), rows[1].offset(factor)};
                const Line line = whole.template line<WgmmaTile<kBlockN>>(side, w.at, row0, col0, factor, offset);
                auto exponent = [&](float x, int e, int column) {
                    return x * factor + (static_cast<float>(column) * line.step + line.start[e / 2]);
                };
                exponentiate_with<false, kEarly>(exponent, s, probabilities, shrink, w, n, when_free);
            } else {
                modify(s, w, tiles, n);
                if (unset()) set_maxima(s);
                exponentiate<false, kEarly>(s, probabilities, shrink, w, n, when_free);
            }
            check_sums(s, probabilities, w, n, before);
        }
        __device__ __forceinline__ void drop(WgmmaTile<kBlockN>& s, const Work& w, int n) const {
            drop_probabilities<kBlockN % 32 == 0>(s, w.at, first_row(w), n * kBlockN, params().seed,
                                                  params().dropout_threshold);
        }
        __device__ __forceinline__ static void pack(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4]) {
#pragma unroll
            for (int u = 0; u < kBlockN / 8; u++) pack(s, probabilities, u);
        }
        __device__ __forceinline__ static void pack(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4], int u) {
            probabilities[2 * u] = pack_pair<Element>(s[4 * u], s[4 * u + 1]);
            probabilities[2 * u + 1] = pack_pair<Element>(s[4 * u + 2], s[4 * u + 3]);
        }

        // Warpgroups take turns at issuing products, so that one is in its softmax while another keeps the tensor cores busy.
        __device__ __forceinline__ void take_turn() const {
            if constexpr (Config::kPingPong) bar_sync(kTurnBarrier + wg, 256);
        }
        __device__ __forceinline__ void pass_turn() const {
            if constexpr (Config::kPingPong) bar_arrive(kTurnBarrier + (wg + 1 == kConsumers ? 0 : wg + 1), 256);
        }

        // One query tile's keys: those tiles from `n` to before `stop` that this warpgroup's rows see, and how many the other
        // warpgroups visit before and after them.
        struct Visit {
            Work w;
            Tiles tiles;
            Order order;
            int n, stop, before, after;
            __device__ __forceinline__ bool any() const { return n < stop; }
        };
        __device__ __forceinline__ Visit visit(const Work& w) const {
            const Mask& mask = kernel.arguments.variant.mask;
            Tiles tiles = Tiles::of(params(), mask, w);
            const Order order = kernel.order(tiles, w);
            const int start = tiles.next(tiles.blocks.start), stop = tiles.blocks.stop;
            // From here on only this warpgroup's rows matter, of which some always exist as far as covers() is asked.
            tiles.rows = {first_row(w), max(min(first_row(w) + 64, w.at.seqlen_q), first_row(w) + 1)};
            if constexpr (Mask::kTiled || Config::kPingPong) {  // who takes turns takes as many as the others
                return {w, tiles, order, start, stop, 0, 0};
            } else if constexpr (kNearestFirst) {  // what one of them does not see lies anywhere
                const bool exists = tiles.rows.start < w.at.seqlen_q && start < stop;
                return exists ? Visit{w, tiles, order, start, stop, 0, 0}
                              : Visit{w, tiles, order, stop, stop, max(stop - start, 0), 0};
            } else {
                Range own = mask.kv_range(w.at, tiles.rows);
                own = {max(own.start / kBlockN, start), min((own.stop + kBlockN - 1) / kBlockN, stop)};
                if (start >= stop) return {w, tiles, order, start, stop, 0, 0};
                if (own.start >= own.stop || tiles.rows.start >= w.at.seqlen_q)
                    return {w, tiles, order, stop, stop, stop - start, 0};
                return {w, tiles, order, own.start, own.stop, own.start - start, stop - own.stop};
            }
        }
        // Rows past their sequence's end have the largest of maxima: what they hold becomes 0 or NaN, which lets their warp do
        // nothing that it would not do for the others.
        __device__ __forceinline__ void start_rows(const Work& w) {
            rows[0] = rows[1] = RowState<float>(), careful = false;
            if constexpr (kForeignRows && kKeepsMaxima) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // NOTE: opaque, or the row is kept in a register that the loop needs.
                    const int row = opaque(static_cast<int>(threadIdx.x)) % 128;
                    const int i = first_row(w) + row / 32 * 16 + row % 32 / 4 + 8 * half;
                    if (i >= w.at.seqlen_q) rows[half].max = -negative_infinity<float>();
                }
            }
        }
        __device__ __forceinline__ void reset(const Work& w) {
#pragma unroll
            for (int x = 0; x < kHeadDimV / 2; x++) o[x] = 0;
            start_rows(w), fresh = false;
        }

        // Scores and probabilities of a query tile's first keys, with nothing else in flight.
        __device__ __forceinline__ void begin(const Visit& at) {
            float shrink[2];
            const int n = at.order(at.n);
            wait_k();
            wgmma_pin(s.data);
            wgmma_fence();
            issue_s(s);
            wgmma_wait_group<0>();
            wgmma_pin(s.data);
            release_k();
            if constexpr (kBounded) {
                cap_and_exponentiate<0>(s, probabilities, at.w, at.tiles, n, [](float) {});
            } else {
                modify(s, at.w, at.tiles, n);
                take_first_maxima(s, at.w, n);
                if constexpr (kScalesFirst) owed[0] = owed[1] = 1.0f;  // O is 0
                exponentiate<false>(s, probabilities, shrink, at.w, n, [](float) {});
            }
            wait_v(v, at.w, n, false);
            k_ended = 0;
        }
        // O times `owed`, before the next product adds to it.
        __device__ __forceinline__ void scale_output() {
            if constexpr (kScalesFirst) {
#pragma unroll
                for (int x = 0; x < kHeadDimV / 2; x++) o[x] *= owed[x % 4 / 2];
                wgmma_pin(o.data);
                wgmma_fence();
            }
        }
        // Scores and probabilities of `at`, and the output of the keys before. kCross: those belong to the query tile before,
        // whose output is stored or staged then; `skipped` tiles of V lie between the two. `meanwhile` is called while both
        // products are under way.
        template <bool kCross, class Meanwhile>
        __device__ __forceinline__ void step(const Visit& at, int skipped, Meanwhile meanwhile) {
            float shrink[2];
            const int n = at.order(at.n);
            if constexpr (kCross) wait_q(at.w);
            mbarrier_wait_unless(kCross ? 0 : k_ended, kernel.k_full(k.stage), k.parity);
            take_turn();
            wgmma_pin(s.data);
            wgmma_pin(o.data);
            wgmma_pin(probabilities);
            wgmma_fence();
            issue_s(s);
            scale_output();
            issue_o(probabilities);
            pass_turn();
            meanwhile();
            wgmma_wait_group<1>();
            wgmma_pin(s.data);
            // By the end of the maxima, or of some exponentials, O is all but done, and if it is waited for there, the compiler
            // hides the conversions and the scaling or storing of O among the exponentials. NOTE: it would move that wait up
            // were it not for a dependency. V must have come before its products are issued, not between two of them, which
            // would serialise them.
            release_k();
            const RowState<float> done[2] = {rows[0], rows[1]};
            auto take_output = [&] {
                wgmma_wait_group<0>();
                wgmma_pin(o.data);
                wgmma_pin(probabilities);
                release_v();
                k_ended = mbarrier_try(kernel.k_full(k.stage), k.parity);
                if constexpr (kCross) {
                    skip_v(skipped);
                    if constexpr (kStagesOutput) {
                        stage(done, q.stage ^ 1, true);
                    } else {
                        finish(done);
                    }
                }
                fresh = kCross;
            };
            // `sum` is never negative.
            auto wait_and_take_output = [&](float sum) {
                if constexpr (kCross) {  // This V has come; the next may need the buffer that O still reads.
                    mbarrier_wait(kernel.v_full(v.stage), v.parity ^ (sum < 0.0f ? 1 : 0));
                } else if constexpr (kLateWait || kScalesFirst) {
                    wait_v(next_v(), at.w, n, sum < 0.0f);
                }
                take_output();
            };
            if constexpr (kCross) start_rows(at.w);
            if constexpr (!kBounded && (kCross || !kKeepsMaxima)) modify(s, at.w, at.tiles, n);
            if constexpr (kBounded) {
                cap_and_exponentiate<kEarlyBounded>(s, probabilities, at.w, at.tiles, n, wait_and_take_output);
            } else if constexpr (kCross) {
                take_first_maxima(s, at.w, n);
                exponentiate<false, kEarlyCross>(s, probabilities, shrink, at.w, n, wait_and_take_output);
            } else if constexpr (kKeepsMaxima) {
                keep_and_exponentiate<kEarly>(s, probabilities, at.w, at.tiles, n, wait_and_take_output);
            } else if constexpr (kScalesFirst) {
                take_maxima(s, owed);
                exponentiate<false, kEarly>(s, probabilities, shrink, at.w, n, wait_and_take_output);
            } else {
                take_maxima(s, shrink);  // the dependency
                if constexpr (kLateWait) wait_v(next_v(), at.w, n, shrink[0] < 0.0f);
                take_output();
                exponentiate<true>(s, probabilities, shrink, at.w, n, [](float) {});
            }
            if constexpr (kCross || !(kLateWait || kScalesFirst)) wait_v(v, at.w, n, false);
        }
        // The output of the last keys.
        __device__ __forceinline__ void drain() {
            wgmma_pin(o.data);
            wgmma_pin(probabilities);
            wgmma_fence();
            issue_o(probabilities);
            wgmma_wait_group<0>();
            wgmma_pin(o.data);
            release_v();
        }
        __device__ __forceinline__ void visit_serially(Visit& at) {
            for (; at.any(); at.n = at.tiles.next(at.n + 1)) {
                float shrink[2];
                const int n = at.order(at.n);
                wait_k();
                take_turn();
                wgmma_pin(s.data);
                wgmma_fence();
                issue_s(s);
                pass_turn();
                wgmma_wait_group<0>();
                wgmma_pin(s.data);
                release_k();
                if constexpr (kBounded) {
                    cap_and_exponentiate<0>(s, probabilities, at.w, at.tiles, n, [](float) {});
                    wait_v(v, at.w, n, false);
                    drain();
                    continue;
                }
                if constexpr (kKeepsMaxima) {
                    keep_and_exponentiate<0>(s, probabilities, at.w, at.tiles, n, [](float) {});
                } else {
                    modify(s, at.w, at.tiles, n);
                    take_maxima(s, shrink);
                    exponentiate<true>(s, probabilities, shrink, at.w, n, [](float) {});
                }
                wait_v(v, at.w, n, false);
                drain();
            }
        }

        __device__ __forceinline__ QueryTile read_tile(int stage) const {
            const volatile QueryTile& from = kernel.query_tile(stage);
            return {uniform(from.m_block), uniform(from.head), uniform(from.batch), 0};
        }
        // The query tile that comes after the one being worked on.
        __device__ __forceinline__ QueryTile receive_tile(const TileSlot& slot) const {
            mbarrier_wait(kernel.tile_full(slot.stage), slot.parity);
            return read_tile(slot.stage);
        }
        // Stores the output of the oldest query tile. Where it lies is read again rather than kept in registers that the loop
        // over the keys needs.
        __device__ __forceinline__ void finish(const RowState<float> (&state)[2]) {
            store(Schedule::work(params(), read_tile(tile.stage)), state);
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.tile_empty(tile.stage));
            tile.advance();
        }
        // Scales the output of a query tile, whose rows' statistics are `state`, and leaves it where its Q was, if it has been
        // loaded.
        __device__ __forceinline__ void stage(const RowState<float> (&state)[2], int q_stage, bool loaded) {
            const ForwardParams& p = params();
            const int head = Config::kSinks ? read_tile(tile.stage).head : 0;
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const RowResult<float> result = finish_row_of_four(p, head, state[half]);
                scale[half] = result.factor, lse_log2[half] = result.lse_log2;
            }
            staged = true;
            if (!loaded) return;
#pragma unroll
            for (int panel = 0; panel < VTile::kPanels; panel++) {
                unsigned operand[16];
#pragma unroll
                for (int x = 0; x < 16; x++) {
                    const int at = 32 * panel + 2 * x;
                    operand[x] = pack_pair<Element>(o[at] * scale[x % 2], o[at + 1] * scale[x % 2]);
                }
                store_operand(kernel.base + (q_stage * kConsumers + wg) * QTile::kBytes + panel * QTile::kPanelBytes, operand);
            }
        }
        // Stores the output of the oldest query tile from there, and gives the buffer of its Q back; zeros where Q has not been
        // loaded.
        __device__ __forceinline__ void store_staged(int q_stage, bool loaded) {
            const ForwardParams& p = params();
            const Work w = Schedule::work(p, read_tile(tile.stage));
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.tile_empty(tile.stage));
            tile.advance();
            Element* out = static_cast<Element*>(p.out) + w.seq.out + w.at.head * p.out_head;
            OutTile::template store_rows<Element, Config::kVecOut>(
                kernel.smem + (q_stage * kConsumers + wg) * QTile::kBytes, loaded, static_cast<int>(threadIdx.x % 128 / 32),
                out + first_row(w) * p.out_row, p.out_row, w.at.seqlen_q - first_row(w), p.head_dim_v, [&] {
                    if (!loaded) return;
                    fence_proxy_async();
                    __syncwarp();
                    if (leads()) mbarrier_arrive(kernel.q_empty(q_stage, wg));
                });
            if (threadIdx.x % 4 == 0) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = first_row(w) + o.row(2 * half);
                    if (i < w.at.seqlen_q) store_lse(p, w, i, lse_log2[half]);
                }
            }
            staged = false;
        }
        // A row whose sums are spread over four lanes.
        __device__ __forceinline__ RowResult<float> finish_row_of_four(const ForwardParams& p, int head,
                                                                       RowState<float> row) const {
            row.sum += __shfl_xor_sync(0xffffffffu, row.sum, 1);
            row.sum += __shfl_xor_sync(0xffffffffu, row.sum, 2);
            float top = row.max == negative_infinity<float>() ? row.max : row.max * factor;
            if constexpr (kBounded) top = row.sum == 0.0f ? negative_infinity<float>() : bounded.offset;
            return finish_output_row<Config>(p, head, top, row.sum);
        }
        // Stores the output of a query tile, whose rows' statistics are `state`.
        __device__ __forceinline__ void store(const Work& w, const RowState<float> (&state)[2]) {
            const ForwardParams& p = params();
            if (w.m_block * kBlockM >= w.at.seqlen_q) return;
            __syncwarp();
            Element* out = static_cast<Element*>(p.out) + w.seq.out + w.at.head * p.out_head;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const RowResult<float> result = finish_row_of_four(p, w.at.head, state[half]);
                const int i = first_row(w) + o.row(2 * half);
                const bool inside = i < w.at.seqlen_q;
                if (threadIdx.x % 4 == 0 && inside) store_lse(p, w, i, result.lse_log2);
                store_row<Element, Config::kVecOut>(o, half, result.factor, out + i * p.out_row, head_dim_v(p), inside);
            }
        }
    };

    __device__ __forceinline__ void consume(int wg) const {
        const ForwardParams& p = params();
        const Schedule schedule = Schedule::of(p);
        Consumer consumer{*this, wg};
        consumer.factor = exponent_factor<Config, float>(p);
        if constexpr (kWhole) {
            consumer.factor = Whole::factor(arguments.variant.score_mod, static_cast<float>(p.scale));
        }
        consumer.desc_q = QTile::k_major(base + wg * QTile::kBytes);
        consumer.desc_k = KTile::advance(KTile::k_major(base), kOffsetK / 16);
        consumer.desc_v = VTile::advance(VTile::mn_major(base), kOffsetV / 16);
        if (Config::kPingPong && wg == kConsumers - 1) bar_arrive(kTurnBarrier, 256);  // the first turn is free
        using Visit = typename Consumer::Visit;
        auto arrive = [&](const QueryTile& tile) {
            const Work w = schedule.work(p, tile);
            if constexpr (kForeignRows) store_padding<Element, float, kBlockM, 128 * kConsumers>(p, w, p.head_dim_v);
            if constexpr (kBounded) {
                consumer.bounded = Bounded::of(arguments.variant.score_mod, static_cast<float>(p.scale));
            }
            if constexpr (kWhole) {  // the padding past packed sequences counts as one more, which has no slope
                const bool exists = w.at.seqlen_k > 0;
                if (exists) consumer.whole = Whole::of(arguments.variant.score_mod, w.at, static_cast<float>(p.scale));
            }
            return consumer.visit(w);
        };
        QueryTile tile = consumer.receive_tile(consumer.tile);
        while (tile.m_block >= 0) {
            Visit at = arrive(tile), then;
            bool announced = false;  // `tile` and `then` are those of the next query tile
            auto look_ahead = [&] {
                TileSlot next = consumer.tile;
                next.advance();
                tile = consumer.receive_tile(next), announced = true;
                if (tile.m_block >= 0) then = arrive(tile);
            };
            consumer.reset(at.w);
            const bool loaded = at.any() || at.before > 0;
            if (loaded) consumer.wait_q(at.w);
            consumer.skip(at.before);
            bool pending = Config::kOverlap && at.any();
            if (pending) {
                consumer.begin(at);
            } else if (at.any()) {
                consumer.visit_serially(at);
            }
            bool passed = false;  // the keys after this warpgroup's
            for (bool crossed = true; crossed;) {
                crossed = announced = false;
                auto store_staged = [&] {
                    if constexpr (kStagesOutput) {
                        if (consumer.staged) consumer.store_staged(consumer.q.stage ^ 1, true);
                    }
                };
                if (pending) {
                    for (int n = at.tiles.next(at.n + 1); n < at.stop; n = at.tiles.next(n + 1)) {
                        at.n = n;
                        consumer.template step<false>(at, 0, [&] {
                            store_staged();
                            if (kLooksAhead && at.after == 0 && at.tiles.next(n + 1) >= at.stop) look_ahead();
                        });
                    }
                }
                store_staged();
                if (!kStagesOutput && loaded) consumer.release_q();
                if constexpr (kCrosses) {
                    // The producer announces the next tile when it has loaded all of this one, and V of kStages tiles after
                    // this warpgroup's last would find no buffer before O is done.
                    passed = pending && at.after < kStages;
                    if (passed) {
                        consumer.skip_k(at.after);
                        if (!announced) look_ahead();
                        if (tile.m_block >= 0 && then.any() && at.after + then.before < kStages) {
                            consumer.skip_k(then.before);
                            if constexpr (kStagesOutput) consumer.q.advance();
                            consumer.template step<true>(then, at.after + then.before, [] {});
                            at = then, crossed = true;
                        }
                    }
                }
            }
            if (pending) consumer.scale_output(), consumer.drain();
            if (passed) {
                consumer.skip_v(at.after);
            } else {
                consumer.skip(at.after);
            }
            if constexpr (kStagesOutput) {
                consumer.stage(consumer.rows, consumer.q.stage, loaded);
                consumer.store_staged(consumer.q.stage, loaded);
                if (loaded) consumer.q.advance();
            } else {
                consumer.finish(consumer.rows);
            }
            if constexpr (Config::kPersistent) {
                tile = consumer.receive_tile(consumer.tile);
            } else {
                tile.m_block = opaque(-1);  // without a loop the compiler holds addresses throughout and spills
            }
        }
    }

    // -------------------------------------------------------------------------------------------------------------- roles

    __device__ __forceinline__ void run() const {
        const int warp = uniform(static_cast<int>(threadIdx.x / 32)), wg = warp / 4;
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kTileStages; stage++) {
                mbarrier_init(tile_full(stage), 1);
                mbarrier_init(tile_empty(stage), 4 * kConsumers);
            }
            for (int stage = 0; stage < kQStages; stage++) {
                for (int wg = 0; wg < kConsumers; wg++) {
                    mbarrier_init(q_full(stage, wg), 1);
                    mbarrier_init(q_empty(stage, wg), 4);
                }
            }
            for (int stage = 0; stage < kStages; stage++) {
                mbarrier_init(k_full(stage), 1);
                mbarrier_init(v_full(stage), 1);
                mbarrier_init(k_empty(stage), 4 * kConsumers);
                mbarrier_init(v_empty(stage), 4 * kConsumers);
            }
            for (int stage = 0; stage < kBiasStages; stage++) {
                mbarrier_init(bias_full(stage), 1);
                mbarrier_init(bias_empty(stage), 4 * kConsumers);
            }
            fence_mbarrier_init();
        }
        __syncthreads();
        if (wg == kConsumers) {
            setmaxnreg_dec<kProducerRegisters>();
            if (warp == 4 * kConsumers && elect_sync()) produce();
        } else {
            setmaxnreg_inc<kConsumerRegisters>();
            consume(wg);
        }
    }
};

}  // namespace cuattn
