// Forward on Hopper: TMA loads, wgmma products, warpgroups with roles. 16-bit elements, sm_90a.
//
//   S = scale * Q K^T, modified and masked     P = exp(S - lse)     O = P V        (FlashAttention-3, algorithm 2)
//
// Roles       consumers: kConsumers warpgroups, 64 query rows each; S, P and O stay in their registers
//             producer: the last warpgroup, of which one thread issues all loads
// Registers   a CTA's share is 65536 / kMinBlocks; the producer hands all but kProducerRegisters over
// Memory      sQ (kBlockM x D) | kStages x sK (kBlockN x D) | kStages x sV (kBlockN x Dv) | kBiasStages x bias tile
//             (kBlockM x kBlockN) | barriers; D, Dv and the columns of a bias tile padded to 64
// Barriers    name            arrives                         count            waits
//             full (q, k, v)  the producer, and the bytes     1                consumers
//             empty (q, k, v) one lane of each consumer warp  4 * kConsumers   the producer
//             tile_full       the producer                    1                consumers: the number of the next tile is there
//             tile_empty      one lane of each consumer warp  4 * kConsumers   the producer
// Loop        S of this tile and O of the last one are issued together, and the softmax of this tile runs under both that O
// (overlap)   and the other warpgroups' products:
//                 wait K; issue S = Q K^T; issue O += P V; wait S; release K; modify, mask, maxima; wait O; release V;
//                 P = exp(S - max), O *= shrink; wait V
//             Without kOverlap, O of a tile follows its softmax, which needs fewer registers.
#pragma once
#include "attention/scores.cuh"
#include "attention/softmax.cuh"
#include "mainloop/epilogue.cuh"
#include "mainloop/ring.cuh"
#include "mainloop/schedule_sm90.cuh"
#include "ptx/mbarrier.cuh"
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
    // The producer's addresses of packed sequences need more, at the expense of two consumers; three have none to spare.
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : Config::kPacked && Config::kMinBlocks == 1 ? 40 : 24;
    static constexpr int kConsumerRegisters = (kLaunchRegisters * kWarpgroups - kProducerRegisters) / kConsumers / 8 * 8;
    static_assert(kConsumers >= 2);  // one alone would have more than an instruction can name

    using QTile = PanelTile<kBlockM, kHeadDim>;
    using KTile = PanelTile<kBlockN, kHeadDim>;
    using VTile = PanelTile<kBlockN, kHeadDimV>;
    using Tiles = KeyTiles<Mask, kBlockM, kBlockN>;
    using Schedule = TileSchedule<Config>;
    using Slot = RingSlot<kStages>;
    // A bias that TMA can load comes in tiles like K; kBiasStages 0: there is none, or it is read from global memory.
    static constexpr int kBiasStages = Config::kBiasStages;
    using BiasTile = PanelTile<kBlockM, kBlockN>;
    using BiasSlot = RingSlot<kBiasStages>;
    static constexpr int kOffsetK = QTile::kBytes, kOffsetV = kOffsetK + kStages * KTile::kBytes;
    static constexpr int kOffsetBias = kOffsetV + kStages * VTile::kBytes;
    static constexpr int kOffsetBarriers = kOffsetBias + kBiasStages * BiasTile::kBytes;
    static constexpr int kBarriers = 4 + 4 * kStages + 2 * kBiasStages;
    static constexpr int kOffsetTile = kOffsetBarriers + 8 * kBarriers;  // the number of the tile after this one
    // The dynamic shared memory of a CTA is aligned by hand.
    static_assert(kOffsetTile + 8 + QTile::kAlignment <= Config::kSmemBytes, "the plan's shared memory is too small");

    // Rows past a sequence's end may hold anything: other sequences, or padding that is NaN. Those past an array's are zero.
    static constexpr bool kForeignRows = Config::kPacked || Config::kLens;
    // Named barriers; 0 is __syncthreads.
    static constexpr int kTurnBarrier = 1, kClearBarrier = kTurnBarrier + kConsumers;

    const TmaArguments<Config>& arguments;
    char* smem;  // aligned
    unsigned base;

    __device__ __forceinline__ const ForwardParams& params() const { return arguments.variant.base; }
    __device__ __forceinline__ unsigned barrier(int number) const { return base + kOffsetBarriers + 8 * number; }
    __device__ __forceinline__ unsigned q_full() const { return barrier(0); }
    __device__ __forceinline__ unsigned q_empty() const { return barrier(1); }
    __device__ __forceinline__ unsigned tile_full() const { return barrier(2); }
    __device__ __forceinline__ unsigned tile_empty() const { return barrier(3); }
    __device__ __forceinline__ unsigned k_full(int stage) const { return barrier(4 + stage); }
    __device__ __forceinline__ unsigned k_empty(int stage) const { return barrier(4 + kStages + stage); }
    __device__ __forceinline__ unsigned v_full(int stage) const { return barrier(4 + 2 * kStages + stage); }
    __device__ __forceinline__ unsigned v_empty(int stage) const { return barrier(4 + 3 * kStages + stage); }
    __device__ __forceinline__ unsigned bias_full(int stage) const { return barrier(4 + 4 * kStages + stage); }
    __device__ __forceinline__ unsigned bias_empty(int stage) const { return barrier(4 + 4 * kStages + kBiasStages + stage); }
    __device__ __forceinline__ volatile int& next_tile() const { return *reinterpret_cast<int*>(smem + kOffsetTile); }

    // ---------------------------------------------------------------------------------------------------------- producer

    __device__ __forceinline__ void produce() const {
        const ForwardParams& p = params();
        const Schedule schedule = Schedule::of(p);
        Slot k, v;
        BiasSlot bias;
        unsigned q_parity = 0, tile_parity = 0;
        if constexpr (Config::kPersistent) schedule.open(p);
        for (int tile = static_cast<int>(blockIdx.x); tile < schedule.count;) {
            const Work w = schedule.work(p, tile);
            load(w, k, v, bias, q_parity);
            if constexpr (!Config::kPersistent) break;
            // NOTE: not before, or the CTA with the longest tile holds back the longest of those left.
            tile = schedule.draw(p);
            mbarrier_wait(tile_empty(), tile_parity ^ 1);
            next_tile() = tile;
            mbarrier_arrive(tile_full());
            tile_parity ^= 1;
        }
    }
    // Loads what a query tile needs.
    __device__ __forceinline__ void load(const Work& w, Slot& k, Slot& v, BiasSlot& bias, unsigned& q_parity) const {
        const ForwardParams& p = params();
        const Tiles tiles = Tiles::of(p, arguments.variant.mask, w);
        int n = tiles.next(tiles.blocks.start);
        if (n >= tiles.blocks.stop) return;
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
        load_k(n);
        mbarrier_wait(q_empty(), q_parity ^ 1);
        QTile::load(base, arguments.maps[kMapQ], q_full(), 0, row_q, w.at.head, batch);
        q_parity ^= 1;
        load_bias(n);
        for (int following = tiles.next(n + 1); following < tiles.blocks.stop; following = tiles.next(n + 1)) {
            load_k(following);
            load_bias(following);
            load_v(n);
            n = following;
        }
        load_v(n);
    }

    // --------------------------------------------------------------------------------------------------------- consumers

    struct Consumer {
        const ForwardSm90& kernel;
        int wg;
        Slot k, v;
        BiasSlot bias;
        unsigned q_parity = 0;
        float factor;  // turns a score into the exponent of 2
        unsigned long long desc_q, desc_k, desc_v;
        WgmmaTile<kHeadDimV> o;
        RowState<float> rows[2];  // max: of the row; sum: over this thread's keys

        __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
        __device__ __forceinline__ const ForwardParams& params() const { return kernel.params(); }
        __device__ __forceinline__ int first_row(const Work& w) const { return w.m_block * kBlockM + 64 * wg; }

        __device__ __forceinline__ void release_k() {
            if (leads()) mbarrier_arrive(kernel.k_empty(k.stage));
            k.advance();
        }
        __device__ __forceinline__ void release_v() {
            if (leads()) mbarrier_arrive(kernel.v_empty(v.stage));
            v.advance();
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
                    VTile::template clear_rows<128>(kernel.smem + kOffsetV + slot.stage * VTile::kBytes,
                                                    w.at.seqlen_k - n * kBlockN, static_cast<int>(threadIdx.x % 128));
                    fence_proxy_async();
                    bar_sync(kClearBarrier + wg, 128);
                }
            }
        }
        __device__ __forceinline__ void issue_s(WgmmaTile<kBlockN>& s) const {
            wgmma_qk<Element, kHeadDim, QTile, KTile>(s, desc_q, desc_k + k.stage * KTile::kTileStep);
        }
        __device__ __forceinline__ void issue_o(const unsigned (&probabilities)[kBlockN / 4]) {
            wgmma_pv<Element, VTile>(o, probabilities, desc_v + v.stage * VTile::kTileStep);
        }

        __device__ __forceinline__ void modify(WgmmaTile<kBlockN>& s, const Work& w, const Tiles& tiles, int n) {
            const auto& score_mod = kernel.arguments.variant.score_mod;
            if constexpr (kBiasStages > 0) {
                using Reader = PanelReader<typename BiasIn<ScoreMod>::Item, BiasTile>;
                const Reader reader{kernel.smem + kOffsetBias + bias.stage * BiasTile::kBytes + 64 * wg * 128};
                mbarrier_wait(kernel.bias_full(bias.stage), bias.parity);
                modify_with(s, w, tiles, n, BiasIn<ScoreMod>::stage(score_mod, reader, first_row(w), n * kBlockN));
                __syncwarp();
                if (leads()) mbarrier_arrive(kernel.bias_empty(bias.stage));
                bias.advance();
            } else {
                modify_with(s, w, tiles, n, score_mod);
            }
        }
        template <class Mod>
        __device__ __forceinline__ void modify_with(WgmmaTile<kBlockN>& s, const Work& w, const Tiles& tiles, int n,
                                                    const Mod& score_mod) const {
            const Mask& mask = kernel.arguments.variant.mask;
            const float scale = static_cast<float>(params().scale);
            if (tiles.full(mask, w.at, n)) {
                modify_scores<Config::kFoldScale, false>(s, w.at, first_row(w), n * kBlockN, scale, mask, score_mod);
            } else {
                modify_scores<Config::kFoldScale, true>(s, w.at, first_row(w), n * kBlockN, scale, mask, score_mod);
            }
        }
        // Takes the maximum of a tile into a row; returns what O and the sums before it are to be multiplied with.
        __device__ __forceinline__ float take_maximum(WgmmaTile<kBlockN>& s, int half) {
            float top[2] = {s[2 * half], s[2 * half + 1]};  // two chains, or each maximum waits for the last
#pragma unroll
            for (int u = 1; u < kBlockN / 8; u++) {
                top[0] = maximum(top[0], s[4 * u + 2 * half]);
                top[1] = maximum(top[1], s[4 * u + 2 * half + 1]);
            }
            float both = maximum(top[0], top[1]);
            both = maximum(both, __shfl_xor_sync(0xffffffffu, both, 1));
            both = maximum(both, __shfl_xor_sync(0xffffffffu, both, 2));
            return rows[half].advance(both, factor);
        }
        __device__ __forceinline__ void take_maxima(WgmmaTile<kBlockN>& s, float (&shrink)[2]) {
            shrink[0] = take_maximum(s, 0), shrink[1] = take_maximum(s, 1);
        }
        // Scores to probabilities as operands; the sums; and, 16 columns at a time in between, O times `shrink`: the
        // multiplications fit into the issue slots that the exponentials leave.
        template <bool kShrink>
        __device__ __forceinline__ void exponentiate(WgmmaTile<kBlockN>& s, unsigned (&probabilities)[kBlockN / 4],
                                                     const float (&shrink)[2], const Work& w, int n) {
            const float offset[2] = {rows[0].offset(factor), rows[1].offset(factor)};
            float sum[4] = {rows[0].sum, 0.0f, rows[1].sum, 0.0f};
            constexpr int kSteps = kBlockN / 8, kSizeO = kHeadDimV / 2, kEach = (kSizeO + kSteps - 1) / kSteps;
#pragma unroll
            for (int u = 0; u < kSteps; u++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[4 * u + e] = exp2_fast(s[4 * u + e] * factor - offset[e / 2]);
                    sum[e] += s[4 * u + e];
                }
                if constexpr (!Config::kDropout) pack(s, probabilities, u);
                if constexpr (kShrink) {
#pragma unroll
                    for (int x = u * kEach; x < (u + 1) * kEach && x < kSizeO; x++) o[x] *= shrink[x % 4 / 2];
                }
            }
            rows[0].sum = sum[0] + sum[1];
            rows[1].sum = sum[2] + sum[3];
            if constexpr (Config::kDropout) {
                drop_probabilities(s, w.at, first_row(w), n * kBlockN, params().seed, params().dropout_threshold);
#pragma unroll
                for (int u = 0; u < kSteps; u++) pack(s, probabilities, u);
            }
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

        __device__ __forceinline__ void visit_overlapped(const Work& w, const Tiles& tiles, int n) {
            WgmmaTile<kBlockN> s;
            unsigned probabilities[kBlockN / 4];
            float shrink[2];
            wait_k();
            wgmma_pin(s.data);
            wgmma_fence();
            issue_s(s);
            wgmma_wait_group<0>();
            wgmma_pin(s.data);
            release_k();
            modify(s, w, tiles, n);
            take_maxima(s, shrink);
            exponentiate<false>(s, probabilities, shrink, w, n);
            wait_v(v, w, n, false);
            for (int following = tiles.next(n + 1); following < tiles.blocks.stop; following = tiles.next(n + 1)) {
                n = following;
                wait_k();
                take_turn();
                wgmma_pin(s.data);
                wgmma_pin(o.data);
                wgmma_pin(probabilities);
                wgmma_fence();
                issue_s(s);
                issue_o(probabilities);
                pass_turn();
                wgmma_wait_group<1>();
                wgmma_pin(s.data);
                release_k();
                modify(s, w, tiles, n);
                // By the end of the maxima O is all but done, and if it is waited for there, the compiler hides the conversions
                // and the scaling of O among the exponentials. NOTE: it would move that wait up, over the maxima, were it not
                // for a dependency: on the first row's maximum, so that the second one's hide its latency. V must have come
                // before its products are issued, not between two of them, which would serialise them.
                shrink[0] = take_maximum(s, 0);
                if constexpr (Config::kLateWait) wait_v(next_v(), w, n, shrink[0] < 0.0f);
                shrink[1] = take_maximum(s, 1);
                wgmma_wait_group<0>();
                wgmma_pin(o.data);
                wgmma_pin(probabilities);
                release_v();
                exponentiate<true>(s, probabilities, shrink, w, n);
                if constexpr (!Config::kLateWait) wait_v(v, w, n, false);
            }
            if (leads()) mbarrier_arrive(kernel.q_empty());
            wgmma_pin(o.data);
            wgmma_pin(probabilities);
            wgmma_fence();
            issue_o(probabilities);
            wgmma_wait_group<0>();
            wgmma_pin(o.data);
            release_v();
        }

        __device__ __forceinline__ void visit_serially(const Work& w, const Tiles& tiles, int n) {
            for (; n < tiles.blocks.stop; n = tiles.next(n + 1)) {
                WgmmaTile<kBlockN> s;
                unsigned probabilities[kBlockN / 4];
                float shrink[2];
                wait_k();
                take_turn();
                wgmma_pin(s.data);
                wgmma_fence();
                issue_s(s);
                pass_turn();
                wgmma_wait_group<0>();
                wgmma_pin(s.data);
                release_k();
                modify(s, w, tiles, n);
                take_maxima(s, shrink);
                exponentiate<true>(s, probabilities, shrink, w, n);
                wait_v(v, w, n, false);
                wgmma_pin(o.data);
                wgmma_pin(probabilities);
                wgmma_fence();
                issue_o(probabilities);
                wgmma_wait_group<0>();
                wgmma_pin(o.data);
                release_v();
            }
            if (leads()) mbarrier_arrive(kernel.q_empty());
        }

        __device__ __forceinline__ void visit_keys(const Work& w) {
#pragma unroll
            for (int x = 0; x < kHeadDimV / 2; x++) o[x] = 0;
            rows[0] = rows[1] = RowState<float>();
            Tiles tiles = Tiles::of(params(), kernel.arguments.variant.mask, w);
            const int n = tiles.next(tiles.blocks.start);
            if (n >= tiles.blocks.stop) return;
            // From here on only this warpgroup's rows matter, of which some always exist as far as covers() is asked.
            tiles.rows = {first_row(w), max(min(first_row(w) + 64, w.at.seqlen_q), first_row(w) + 1)};
            mbarrier_wait(kernel.q_full(), q_parity);
            q_parity ^= 1;
            if constexpr (Config::kOverlap) {
                visit_overlapped(w, tiles, n);
            } else {
                visit_serially(w, tiles, n);
            }
        }

        __device__ __forceinline__ void store(const Work& w) {
            const ForwardParams& p = params();
            Element* out = static_cast<Element*>(p.out) + w.seq.out + w.at.head * p.out_head;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                RowState<float>& row = rows[half];
                row.sum += __shfl_xor_sync(0xffffffffu, row.sum, 1);
                row.sum += __shfl_xor_sync(0xffffffffu, row.sum, 2);
                const float top = row.max == negative_infinity<float>() ? row.max : row.max * factor;
                const int i = first_row(w) + o.row(2 * half);
                const float scale = finish_output_row<Config>(p, w, i, top, row.sum, threadIdx.x % 4 == 0);
                store_row<Element, Config::kVecOut>(o, half, scale, out + i * p.out_row, p.head_dim_v, i < w.at.seqlen_q);
            }
        }
    };

    __device__ __forceinline__ void consume(int wg) const {
        const ForwardParams& p = params();
        const Schedule schedule = Schedule::of(p);
        Consumer consumer{*this, wg};
        consumer.factor = exponent_factor<Config, float>(p);
        consumer.desc_q = QTile::k_major(base + wg * 64 * 128);
        consumer.desc_k = KTile::k_major(base + kOffsetK);
        consumer.desc_v = VTile::mn_major(base + kOffsetV);
        if (Config::kPingPong && wg == kConsumers - 1) bar_arrive(kTurnBarrier, 256);  // the first turn is free
        unsigned tile_parity = 0;
        for (int tile = static_cast<int>(blockIdx.x); tile < schedule.count;) {
            // Before O takes its registers.
            if constexpr (kForeignRows) {
                store_padding<Element, float, kBlockM, 128 * kConsumers>(p, schedule.work(p, tile), p.head_dim_v);
            }
            consumer.visit_keys(schedule.work(p, tile));
            // Worked out again rather than kept in registers that the loop over the keys needs.
            const Work w = schedule.work(p, opaque(tile));
            if constexpr (Config::kPersistent) {
                mbarrier_wait(tile_full(), tile_parity);
                tile = uniform(next_tile());
                __syncwarp();
                if (consumer.leads()) mbarrier_arrive(tile_empty());
                tile_parity ^= 1;
            }
            if (w.m_block * kBlockM < w.at.seqlen_q) consumer.store(w);
            if constexpr (!Config::kPersistent) break;
        }
    }

    // -------------------------------------------------------------------------------------------------------------- roles

    __device__ __forceinline__ void run() const {
        const int warp = uniform(static_cast<int>(threadIdx.x / 32)), wg = warp / 4;
        if (threadIdx.x == 0) {
            mbarrier_init(q_full(), 1);
            mbarrier_init(q_empty(), 4 * kConsumers);
            mbarrier_init(tile_full(), 1);
            mbarrier_init(tile_empty(), 4 * kConsumers);
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
