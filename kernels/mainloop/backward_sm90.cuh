// Backward on Hopper: dk and dv of a key tile, and its share of dq, by TMA loads, wgmma products and warpgroups with roles.
// 16-bit elements, head dimensions to 256, sm_90a. Formulas, slabs of dq and query splits: see backward.cuh.
//
// Products    scores are transposed, so P^T and dS^T are operands in the registers that hold them:
//                 S^T = K Q^T    dP^T = V dO^T    64 keys a warpgroup x kBlockM
//                 dV += P^T dO   dK += dS^T Q     64 keys x D, A in registers
//                 dQ = dS K, or transposed        dS from shared memory, where both warpgroups write it; see WarpgroupHalf
// (kWide)     beyond 128 columns dk and dv of 64 keys take the registers of both warpgroups. A warpgroup then holds the scores
//             of half the queries, and half the columns of dk, dv and dq; P goes through shared memory as dS does
// (kApart)    of these, with nothing but a mask: mainloop/backward_apart_sm90.cuh
// Roles       consumers: warpgroups 0 and 1, 64 keys each (kWide: the same 64 keys)
//             loader: one thread of warp 8 issues all tile loads
//             guide: warp 9 says which query tile a stage holds (Visit) and brings its row statistics, which TMA cannot: their
//             rows are neither padded nor aligned
//             doormen: warps 10 and 11, deterministic or with kCourier: have dq added, a stage each and in order, or at once,
//             of a warpgroup each (kDoors)
// Registers   the producer warpgroup hands all but kProducerRegisters over
// Memory      sK (kBlockN x D) | sV (kBlockN x Dv) | kStages x sQ (kBlockM x D) | kStages x sdO (kBlockM x Dv) |
//             2 x sdS (kBlockM x kBlockN; 3 with kAlternate) | 2 x sP (likewise, kWide) |
//             sdQ (kBlockM x D floats, with kBulkDq or kStoreTma) |
//             kStages x bias tile | 2 x its gradient | bias of the keys | its gradient |
//             kStages x row statistics | kStages x Visit | barriers
// Bias        a bias that varies along the queries comes in tiles with them and is read as P^T lies in registers; its gradient
//             goes the other way: rows again in shared memory, from where the copy engine stores it or adds it to bias_sum. Of
//             one that does not vary a warp keeps the elements of its 16 keys in shared memory, each thread the sums of its two
//             columns
// Barriers    name             arrives                         count   waits
//             full (k, v, q, do)  the loader, and the bytes    1       consumers
//             visit_full       the guide                       32      consumers
//             turn             a doorman                       1       consumers
//             handed           one lane of each consumer warp  8       a doorman (kDoors: 4, of its warpgroup)
//             q_empty          likewise                        8       the loader, the guide
//             do_empty         likewise                        8       the loader
//             ds_full          likewise (kAlternate)           8       the warpgroup that multiplies dq
//             ds_empty         one lane of each of its warps   4       consumers
// Loop        wait; issue S, dP; P and dS; dS to shared memory; issue dV; barrier of the consumers; issue dQ, dK; wait dQ;
//             add it to memory; wait dK
// (kEarly)    where P needs no dP: issue S, dP; wait S; P; issue dV; wait dP; dS, which thus runs under dV; ...; row statistics
//             of the next tile are read before dq is added: behind the additions they would wait in the same queue
// (kAlternate) no barrier of the consumers: each of the two warpgroups multiplies dq of every other tile, all 64 x 128 of it,
//             when it is done with the tile after, by when the other has long brought its part of dS. So they drift apart, and
//             one multiplies while the other finds P and dS. dS has three buffers; turn of a warpgroup says that dq of the
//             tile before, the other's, has been read from shared memory
// Order       deterministic: a key tile adds to dq of a query tile after all key tiles behind it have. CTAs start in that
//             order, so none waits for one that has not started. With kBulkDq the consumers hand dq over in shared memory, and
//             a doorman adds it when its turn comes while they go on; turn then says that there is room for the next tile.
//             Without, turn lets them add themselves, and handed says that they have
// Chain       this kernel may be in place before rows are prepared, and loads tiles. The guide and who adds dq wait, either for
//             all that was launched before or, with prepared_units, for their own pair of a KV head and a batch
//             (backward_prepare_sm90.cu). With kCountPairs the doormen count in PairCounters::added when their additions are
//             done, and backward_convert.cu is at work before this kernel is done
#pragma once
#include "attention/mod_sums.cuh"
#include "attention/row_stats.cuh"
#include "attention/scores.cuh"
#include "attention/seqlen.cuh"
#include "mainloop/backward_apart_sm90.cuh"
#include "mainloop/backward_maps.cuh"
#include "mainloop/pair_counters.cuh"
#include "mainloop/query_tiles.cuh"
#include "mainloop/ring.cuh"
#include "mainloop/slab.cuh"
#include "mainloop/stats_tile.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/special_registers.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/panel_tile.cuh"
#include "tile/warpgroup_half.cuh"
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <class Config>
struct BackwardSm90 {
    using Element = typename Config::Element;
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kStages = Config::kStages;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV;
    static constexpr int kConsumers = Config::kThreads / 128 - 1, kConsumerThreads = 128 * kConsumers;
    static constexpr bool kWide = kBlockN == 64 && kConsumers == 2, kRuns = Config::kRuns;
    static_assert((kConsumers == 1 || kConsumers == 2) && kBlockM % 16 == 0);
    static_assert(kWide ? kHeadDim % 128 == 0 && kHeadDimV % 128 == 0 : kBlockN == 64 * kConsumers);
    // See mainloop/backward_apart_sm90.cuh.
    static constexpr bool kApart = kWide && Config::kSeeded;
    // Of a warpgroup: rows of its scores, columns of dk and dv.
    static constexpr int kScoreRows = kWide && !kApart ? kBlockM / 2 : kBlockM;
    static constexpr int kKeyCols = kWide ? kHeadDim / 2 : kHeadDim, kValueCols = kWide ? kHeadDimV / 2 : kHeadDimV;
    // Two buffers of dS let one barrier a tile do.
    static_assert(kStages == 2);
    // Scores, dk and dv leave so few registers that dq has none before the operand of dv has been read.
    static constexpr bool kFewLeft = kScoreRows + (kKeyCols + kValueCols) / 2 > 200;
    // Per thread, of a CTA's share of 65536. Small sums leave more to the guide, who asks the mask.
    static constexpr bool kSmallSums = kScoreRows + (kKeyCols + kValueCols) / 2 <= 160 && !kWide;
    static constexpr int kLaunchRegisters = 65536 / Config::kMinBlocks / Config::kThreads / 8 * 8;
    static constexpr int kProducerRegisters = kConsumers == 1                                     ? (kHeadDim > 64 ? 48 : 56)
                                              : kSmallSums                                        ? 72
                                              : Mask::kTiled && (kWide || Config::kDeterministic) ? 56
                                              : kFewLeft || kApart                                ? 24
                                                                                                  : 40;
    static constexpr int kConsumerRegisters = ((kConsumers + 1) * kLaunchRegisters - kProducerRegisters) / kConsumers;

    using QTile = PanelTile<kBlockM, kHeadDim>;
    using DoTile = PanelTile<kBlockM, kHeadDimV>;
    using KTile = PanelTile<kBlockN, kHeadDim>;
    using VTile = PanelTile<kBlockN, kHeadDimV>;
    using DsTile = PanelTile<kBlockM, kBlockN>;
    using Scores = WgmmaTransposedTile<kScoreRows>;
    using Slab = QuerySlab<Config>;
    using DqSums = typename Slab::Sums;
    static_assert(DqSums::kParts <= 2);
    using Stats = RowStats<Config>;
    using StatsRows = StatsTile<kBlockM>;
    using StatsReader = typename StatsRows::Reader;
    using Sums = ModSums<Config, Scores>;
    using Slot = RingSlot<kStages>;
    using Tiles = QueryTiles<Mask, kBlockM, kBlockN, Config::kDeterministic>;
    static_assert(Sums::kKind != kBiasRows && !(kWide && Sums::kKind == kBiasColumns));
    static constexpr bool kBiasTiles = BackwardTmaArguments<Config>::kBiasTiles, kBiasRow = Config::kBiasRow;
    // What a bias tile receives may be dS itself; else it is staged beside it.
    static constexpr bool kSendSums = kBiasTiles && Sums::kEach, kStageSums = kSendSums && !Config::kSendDs;
    static constexpr bool kAddSums = kStageSums && Sums::kKind == kBiasCells;
    // Every element of its gradient has one writer: who visits its tile, or the one who clears those that nobody does.
    static constexpr bool kClears = kSendSums && !kAddSums && !(Config::kPacked || Config::kLens);
    static_assert(!(kWide && kBiasTiles));
    using BiasTile = PanelTile<kBlockM, kBlockN>;
    static constexpr int kSumsBytes = kStageSums ? (kAddSums ? 2 : 1) * BiasTile::kBytes : 0;

    // A query tile of the loop; m is negative after the last one of a key tile.
    struct alignas(16) Visit {
        int head, m, full;
        int n;  // kRuns: the key tile; kForeignRows: the row of its first key, for kStoreTma
        long long slab;
        int head_kv;
        int number;  // kAlternate: tiles before it
    };
    // Where only the mask is between products and exponentials: P and dS in one pass, whose exponentials hide the rest of it.
    static constexpr bool kAlternate = Config::kAlternate;
    static constexpr bool kPlain = Config::kSeeded && !kWide && !kAlternate;
    // There a row whose statistics are not finite would hide nothing: -inf - NaN is NaN, and so is 0 * (0 - NaN). The guide
    // replaces such rows.
    static constexpr bool kGuards = kPlain && !kSeesAll<Mask>;
    static constexpr bool kEarly = Config::kEarly && !kPlain;
    static_assert(!kApart || (kEarly && !(Config::kStageBias || Config::kBulkDq || Config::kPacked || Config::kLens)));
    // Of 128 rows they take registers that the products need, of 64 beside 128 columns those that a bias needs.
    static constexpr bool kStatsAhead = kEarly && !kFewLeft && kScoreRows <= (Config::kStageBias && kKeyCols > 64 ? 32 : 64);
    // Or while S is multiplied, where registers are too short for that.
    static constexpr bool kStatsUnder = kEarly && kFewLeft;
    // The doormen add dq, in order or not; else each consumer warp adds its own part.
    static constexpr bool kCourier =
        Config::kBulkDq && (Config::kDeterministic || ((Config::kSeeded || kStatsUnder || kAlternate) && !kRuns));
    static constexpr bool kDoormen = kCourier || Config::kDeterministic;
    // Delta is read before dv is issued, or it would come late, behind what the tensor cores read from shared memory.
    static constexpr bool kDeltaAhead = kAlternate;
    // Without an order each of the two adds what one warpgroup left, as soon as it is there.
    static constexpr bool kDoors = kCourier && !Config::kDeterministic;
    // With two buffers of dq a warpgroup leaves that of a tile while the one before is being added.
    static constexpr int kDqBuffers = Config::kDqBuffers;
    static_assert(kDqBuffers == 1 || kDoors);
    static constexpr int kDsBuffers = kAlternate ? 3 : 2;
    using DsSlot = RingSlot<kDsBuffers>;
    static_assert(!kAlternate || (kDoors && kDqBuffers == 1 && kEarly && kConsumers == 2 && kBlockM == 64 && kHeadDim == 128));
    static_assert(!kAlternate || kHeadDimV == kHeadDim);
    // The guide keeps what it can in shared memory: it, too, is short of registers.
    static constexpr bool kKeepRow = (kFewLeft && kCourier) || kApart, kLean = kFewLeft || kApart;
    static constexpr int kDqWarpBytes = Config::kBulkDq || Config::kStoreTma ? Slab::kWarpElements * 4 : 0;
    static constexpr int kDqBytes = kConsumerThreads / 32 * kDqWarpBytes, kKeyStages = kRuns ? 2 : 1;
    using KeySlot = RingSlot<kKeyStages>;
    static constexpr int kOffsetV = kKeyStages * KTile::kBytes, kOffsetQ = kOffsetV + kKeyStages * VTile::kBytes;
    static constexpr int kOffsetDo = kOffsetQ + kStages * QTile::kBytes, kOffsetDs = kOffsetDo + kStages * DoTile::kBytes;
    static constexpr int kOffsetP = kOffsetDs + kDsBuffers * DsTile::kBytes;
    static constexpr int kOffsetDq = kOffsetP + (kWide ? 2 * DsTile::kBytes : 0);
    static constexpr int kOffsetBias = kOffsetDq + kDqBuffers * kDqBytes;
    static constexpr int kOffsetSums = kOffsetBias + (kBiasTiles ? kStages * BiasTile::kBytes : 0);
    // Of each warp's 16 keys the bias; of each thread's two keys the sums.
    static constexpr int kOffsetRow = kOffsetSums + 2 * kSumsBytes;
    static constexpr int kOffsetColumns = kOffsetRow + (kBiasRow ? kConsumerThreads / 32 * 16 * 4 : 0);
    static constexpr int kOffsetStats = kOffsetColumns + (Sums::kKind == kBiasColumns ? kConsumerThreads * 8 : 0);
    static_assert(Scores::kThreadCols == 2);
    static_assert(kOffsetBias % QTile::kAlignment == 0);
    static constexpr int kOffsetVisits = kOffsetStats + kStages * StatsRows::kBytes;
    static constexpr int kOffsetBarriers = kOffsetVisits + kStages * static_cast<int>(sizeof(Visit));
    static constexpr int kBarriers = 6 + 7 * kStages + (kAlternate ? 6 : kApart ? 8 : 0);
    static constexpr int kOffsetSequence = kOffsetBarriers + 8 * kBarriers;
    static_assert(kOffsetSequence + 8 <= Config::kSmemBytes, "the plan's shared memory is too small");

    // Rows past a sequence's end may hold anything: other sequences, or padding that is NaN. Those past an array's are zero.
    static constexpr bool kForeignRows = Config::kPacked || Config::kLens;
    static constexpr bool kCountPairs = Config::kCountPairs;
    static_assert(!kCountPairs || (kDoors && !Config::kQuerySplit));
    // Named barriers; 0 is __syncthreads.
    static constexpr int kDsBarrier = 1, kPBarrier = 2, kClearBarrier = 3;

    const BackwardTmaArguments<Config>& arguments;
    char* smem;
    unsigned base;

    __device__ __forceinline__ const ForwardParams& params() const { return arguments.variant.base; }
    __device__ __forceinline__ const BackwardParams& grads() const { return arguments.variant.grad; }
    __device__ __forceinline__ unsigned barrier(int number) const { return base + kOffsetBarriers + 8 * number; }
    __device__ __forceinline__ unsigned k_full(int stage) const { return barrier(0 + stage); }
    __device__ __forceinline__ unsigned v_full(int stage) const { return barrier(2 + stage); }
    __device__ __forceinline__ unsigned k_empty(int stage) const { return barrier(4 + stage); }
    __device__ __forceinline__ unsigned q_full(int stage) const { return barrier(6 + stage); }
    __device__ __forceinline__ unsigned q_empty(int stage) const { return barrier(6 + kStages + stage); }
    __device__ __forceinline__ unsigned do_full(int stage) const { return barrier(6 + 2 * kStages + stage); }
    __device__ __forceinline__ unsigned do_empty(int stage) const { return barrier(6 + 3 * kStages + stage); }
    __device__ __forceinline__ unsigned visit_full(int stage) const { return barrier(6 + 4 * kStages + stage); }
    __device__ __forceinline__ unsigned turn(int stage) const { return barrier(6 + 5 * kStages + stage); }
    __device__ __forceinline__ unsigned handed(int stage) const { return barrier(6 + 6 * kStages + stage); }
    __device__ __forceinline__ unsigned ds_full(int buffer) const { return barrier(6 + 7 * kStages + buffer); }
    __device__ __forceinline__ unsigned ds_empty(int buffer) const { return barrier(6 + 7 * kStages + kDsBuffers + buffer); }
    __device__ __forceinline__ unsigned p_full(int stage) const { return barrier(6 + 7 * kStages + 2 * kDsBuffers + stage); }
    __device__ __forceinline__ unsigned p_empty(int stage) const { return barrier(8 + 7 * kStages + 2 * kDsBuffers + stage); }
    __device__ __forceinline__ float* stats(int stage) const {
        return reinterpret_cast<float*>(smem + kOffsetStats + stage * StatsRows::kBytes);
    }
    __device__ __forceinline__ StatsReader read_stats(int stage) const {
        return StatsRows::read(stats(stage), kWide ? static_cast<int>(threadIdx.x / 128) * kScoreRows : 0);
    }
    __device__ __forceinline__ Visit& visit(int stage) const { return reinterpret_cast<Visit*>(smem + kOffsetVisits)[stage]; }

    // ---------------------------------------------------------------------------------------------------------- schedule

    // Packed: the key tiles of all sequences are numbered one after the other, those of a sequence from here on, or CTAs for
    // the longest sequence would find nothing to do in most.
    static constexpr bool kAllTokens = Config::kPacked && !kRuns;
    __device__ __forceinline__ static int first_tile(int token, int sequence) { return token / kBlockN + sequence; }
    // (kByPair) pairs follow one another, those of a sequence before those of the next.
    static constexpr bool kByPair = kAllTokens && Config::kOneByOne;
    // Of a key tile so numbered the sequence, found by all lanes of a warp.
    __device__ __forceinline__ static int sequence_at(const ForwardParams& p, int tile) {
        int found = 0;
        for (int start = 0; start <= p.batch; start += 32) {
            const int other = start + lane_index();
            found += __popc(
                __ballot_sync(0xffffffffu, other <= p.batch && first_tile(p.cu_seqlens_k[min(other, p.batch)], other) <= tile));
        }
        return found - 1;
    }

    struct Share {
        int pair, n;
        bool descending;  // from the last query tile to the first
    };
    struct Work {
        Coord at;  // head: the first of the group
        Sequence seq;
        int head_kv, n, stop, q_split;  // key tiles [n, stop)
        bool descending;

        // Pairs of KV heads (and parts of their queries) and sequences form sections whose queries and sums of dq fit into L2
        // together. Within a section, key tiles that run side by side belong to different pairs, and the first ones, which
        // under a causal mask are the longest, go first. The last section may have a size of its own, for what runs last should
        // end at the same time; before it, the first one takes what does not fill one.
        // Deterministic: the last ones go first. Under a causal mask each then comes to a query tile as much later than the one
        // before it, whose turn it is first, as a tile takes: none waits for long. But in the last section, whose longest tiles
        // would end one by one, the first ones go first; there all walk from the last query tile, which under a causal mask
        // they share, to the first.
        // `sequence`: with kByPair, the one that the CTA belongs to.
        __device__ __forceinline__ static Share share_of(const ForwardParams& p, const BackwardParams& g, int sequence) {
            if constexpr (kByPair) {
                const int start = first_tile(p.cu_seqlens_k[sequence], sequence);
                const int all = first_tile(p.cu_seqlens_k[p.batch], p.batch);
                const int stop = sequence == p.batch ? g.n_blocks : first_tile(p.cu_seqlens_k[sequence + 1], sequence + 1);
                const int pairs = g.q_splits * g.heads_kv, count = stop - start, after = (all - stop) * pairs;
                int rest = static_cast<int>(cta_index()) - start * pairs;
                // The last pairs, but for one of which fewer than so many CTAs are left, take turns.
                const int turns = after < g.last_section ? min((g.last_section - after) / count + 1, pairs) : 0;
                const int one_by_one = (pairs - turns) * count;
                if (rest < one_by_one) return {rest / count, start + rest % count, false};
                rest -= one_by_one;
                return {pairs - turns + rest % turns, start + rest / turns, false};
            }
            const int run = kRuns ? g.run : 1;
            const int index = static_cast<int>(cta_index()), shares = (g.n_blocks + run - 1) / run;
            const int pairs = g.q_splits * g.heads_kv * (kAllTokens ? 1 : g.batches);
            const int before = pairs - g.last_section;
            const int missing = (p.section - before % p.section) % p.section;
            const int end = ((index + missing * shares) / (p.section * shares) + 1) * p.section - missing;
            const bool last = end > before;
            const int first = last ? before : max(0, end - p.section), size = last ? g.last_section : end - first;
            const int rest = index - first * shares, place = rest / size;
            // Parts of the queries add to the same tiles, so all of them must go the same way.
            const bool descending = Config::kDeterministic && (first + size == pairs || g.q_splits > 1);
            return {first + rest % size, (Config::kDeterministic && !descending ? shares - 1 - place : place) * run,
                    descending};
        }
        // `sequence`: with kAllTokens, the one that the key tile belongs to.
        __device__ __forceinline__ static Work of(const ForwardParams& p, const BackwardParams& g, int sequence) {
            auto [pair, n, descending] = share_of(p, g, sequence);
            Work w;
            w.descending = descending;
            w.n = n, w.stop = n + (kRuns ? g.run : 1);
            w.q_split = pair % g.q_splits;
            pair /= g.q_splits;
            if constexpr (kAllTokens) {
                w.head_kv = pair, w.at.batch = sequence;
            } else if constexpr (Config::kBiasKind == kBiasCells || Config::kBiasKind == kBiasCopies) {
                // Those who share elements of a bias run side by side.
                w.at.batch = g.first_batch + pair % g.batches;
                w.head_kv = g.first_head_kv + pair / g.batches;
            } else {
                w.head_kv = g.first_head_kv + pair % g.heads_kv;
                w.at.batch = g.first_batch + pair / g.heads_kv;
            }
            w.at.head = w.head_kv * p.group;
            w.seq = Sequence::of<Config::kPacked, Config::kLens>(p, w.at.batch);
            w.at.seqlen_q = w.seq.seqlen_q, w.at.seqlen_k = w.seq.seqlen_k;
            if constexpr (kAllTokens) w.n -= first_tile(w.seq.token_k, sequence), w.stop = w.n + 1;
            return w;
        }
        // Of [n, stop) those that hold keys.
        __device__ __forceinline__ int last() const {
            return kRuns ? min(stop, (at.seqlen_k + kBlockN - 1) / kBlockN) : n + (n * kBlockN < at.seqlen_k);
        }
    };

    __device__ __forceinline__ int& sequence() const { return *reinterpret_cast<int*>(smem + kOffsetSequence); }
    __device__ __forceinline__ Work work() const { return Work::of(params(), grads(), kAllTokens ? sequence() : 0); }

    // Calls visitor(tiles, place) for each query tile that this CTA visits; tiles.n is the key tile.
    template <class Visitor>
    __device__ __forceinline__ void for_places(const Work& w, const Visitor& visitor) const {
        int n = w.n;
        do {
            const Tiles tiles = tiles_of(w, n);
            for (Place place = tiles.after({0, tiles.first}, w.q_split); !tiles.is_end(place);
                 place = tiles.after(place, tiles.step)) {
                visitor(tiles, tiles.at(place));
            }
        } while (kRuns && ++n < w.last());
    }
    __device__ __forceinline__ Tiles tiles_of(const Work& w, int n) const {
        return Tiles::of(params(), grads(), arguments.variant.mask, w.at, n, w.descending);
    }

    // ---------------------------------------------------------------------------------------------------------- producers

    __device__ __forceinline__ void load_tiles() const {
        Slot slot;
        KeySlot keys;
        const Work w = work();
        // Packed sequences share one axis of tokens.
        const int batch = Config::kPacked ? 0 : w.at.batch;
        int loaded = -1;
        for_places(w, [&](const Tiles& tiles, Place here) {
            const int row = w.seq.token_q + here.m * kBlockM, head = w.at.head + here.head;
            const int row_k = w.seq.token_k + tiles.n * kBlockN;
            const bool first = kRuns ? tiles.n != loaded : loaded < 0;
            if (first) {
                if (kRuns) mbarrier_wait(k_empty(keys.stage), keys.parity ^ 1);
                KTile::load(base + keys.stage * KTile::kBytes, arguments.maps[kBackwardMapK], k_full(keys.stage), 0, row_k,
                            w.head_kv, batch);
            }
            mbarrier_wait(q_empty(slot.stage), slot.parity ^ 1);
            QTile::load(base + kOffsetQ + slot.stage * QTile::kBytes, arguments.maps[kBackwardMapQ], q_full(slot.stage), 0, row,
                        head, batch);
            if constexpr (kBiasTiles) {
                const auto& bias = BiasIn<ScoreMod>::get(arguments.variant.score_mod);
                BiasTile::load(base + kOffsetBias + slot.stage * BiasTile::kBytes, arguments.maps[arguments.kMapBias],
                               q_full(slot.stage), tiles.n * kBlockN, here.m * kBlockM, bias.stride_head != 0 ? head : 0,
                               bias.stride_batch != 0 ? w.at.batch : 0);
            }
            if (first) {
                VTile::load(base + kOffsetV + keys.stage * VTile::kBytes, arguments.maps[kBackwardMapV], v_full(keys.stage), 0,
                            row_k, w.head_kv, batch);
                loaded = tiles.n;
                keys.advance();
            }
            mbarrier_wait(do_empty(slot.stage), slot.parity ^ 1);
            DoTile::load(base + kOffsetDo + slot.stage * DoTile::kBytes, arguments.maps[kBackwardMapDout], do_full(slot.stage),
                         0, row, head, batch);
            slot.advance();
        });
    }

    // Turns a score, or its product where the scale is folded, into the exponent of 2.
    __device__ __forceinline__ float score_factor() const {
        return static_cast<float>(Config::kFoldScale ? params().scale * kLog2e : kLog2e);
    }
    __device__ __forceinline__ void guide() const {
        const ForwardParams& p = params();
        const BackwardParams& g = grads();
        const int lane = lane_index();
        Slot slot;
        int number = 0;
        const Work w = work();
        const int first_key = Config::kStoreTma && kForeignRows ? w.seq.token_k + w.n * kBlockN : 0;
        auto publish = [&](int head, int m, bool full, int n) {
            if (lane == 0) {
                Visit& next = visit(slot.stage);
                next.head = head, next.m = m, next.full = full, next.n = n;
                if constexpr (Config::kStoreTma) next.head_kv = w.head_kv;
                if constexpr (kAlternate) next.number = number++;
            }
            mbarrier_arrive(visit_full(slot.stage));
            slot.advance();
        };
        constexpr int kLaneRows = (kBlockM + 31) / 32;  // of a tile
        const long long first_row = w.seq.row + w.at.head * w.seq.head_rows;
        if (kKeepRow) {
            if (lane == 0) visit(0).slab = first_row;
            __syncwarp();
        }
        const long long slabs = Slab::number(p, g, w.seq, w.at, 0);
        for_places(w, [&](const Tiles& tiles, Place here) {
            const int row = here.m * kBlockM + lane;
            if (kLean) mbarrier_wait(q_empty(slot.stage), slot.parity ^ 1);  // nor has the guide registers to read ahead
            const Stats* const from = static_cast<const Stats*>(g.row_stats) + (kKeepRow ? visit(0).slab : first_row);
            Stats own[kLaneRows];
#pragma unroll
            for (int x = 0; x < kLaneRows; x++) {
                own[x] = row + 32 * x < w.at.seqlen_q ? from[here.head * w.seq.head_rows + row + 32 * x] : Stats::nothing();
            }
            if (!kLean) mbarrier_wait(q_empty(slot.stage), slot.parity ^ 1);
            // NOTE: opaque, or what follows from these is kept in registers from one tile to the next.
            float* to = stats(slot.stage) + StatsRows::place(opaque(static_cast<unsigned>(lane)));
            unsigned broken = 0;
#pragma unroll
            for (int x = 0; x < kLaneRows; x++) {
                if (32 * x + 32 > kBlockM && lane >= kBlockM % 32) continue;
                to[32 * x] = own[x].lse, to[32 * x + kBlockM] = own[x].delta;
                if (!own[x].hides()) broken |= 1u << x;
            }
            Coord at = w.at;
            at.head += here.head, at.seqlen_q = opaque(at.seqlen_q), at.seqlen_k = opaque(at.seqlen_k);
            Tiles own_tiles = tiles;
            own_tiles.n = opaque(tiles.n);
            const bool full = own_tiles.full(arguments.variant.mask, at, here);
            if constexpr (kGuards) {
                if (!full && __any_sync(0xffffffffu, broken != 0)) replace(slot, broken);
            }
            if (!kKeepRow && lane == 0) visit(slot.stage).slab = slabs + static_cast<long long>(here.head) * g.q_slabs + here.m;
            publish(at.head, here.m, full, kRuns ? tiles.n : first_key);
        });
        mbarrier_wait(q_empty(slot.stage), slot.parity ^ 1);
        publish(0, -1, false, first_key);
    }

    // In a tile that hides something, rows of this lane whose statistics are not finite, bit x for row 32 x. Zeros in Q and dO,
    // and statistics that make P infinite and dS NaN of what is visible (0 of what is not), make dq, dk and dv NaN for what is
    // visible, and nothing else.
    __device__ __forceinline__ void replace(const Slot& slot, unsigned broken) const {
        mbarrier_wait(q_full(slot.stage), slot.parity);
        mbarrier_wait(do_full(slot.stage), slot.parity);
#pragma unroll 1
        for (int row = opaque(lane_index()); broken != 0; row += 32, broken >>= 1) {
            if (broken % 2 == 0) continue;
            QTile::clear_row(smem + kOffsetQ + slot.stage * QTile::kBytes, row);
            DoTile::clear_row(smem + kOffsetDo + slot.stage * DoTile::kBytes, row);
            float* const to = stats(slot.stage) + StatsRows::place(static_cast<unsigned>(row));
            to[0] = kInfiniteExponent, to[kBlockM] = 0.0f;
        }
        fence_proxy_async();
    }

    // Key tiles that add to a query tile before this one: their number, found by all lanes of a warp.
    __device__ __forceinline__ int tiles_before(const Work& w, Place here) const {
        if constexpr (Mask::kBand) {  // which a query tile sees from one to another
            const Range rows{here.m * kBlockM, min((here.m + 1) * kBlockM, w.at.seqlen_q)};
            const Range keys = arguments.variant.mask.kv_range(w.at, rows);
            return w.descending ? w.n - keys.start / kBlockN : (keys.stop + kBlockN - 1) / kBlockN - 1 - w.n;
        }
        const int first = w.descending ? 0 : w.n + 1, stop = w.descending ? w.n : (w.at.seqlen_k + kBlockN - 1) / kBlockN;
        int count = 0;
        for (int start = first; start < stop; start += 32) {
            const int other = start + lane_index();
            count += __popc(__ballot_sync(0xffffffffu, other < stop && tiles_of(w, other).visits(here)));
        }
        return count;
    }
    // Where dq of a stage's tile is handed over.
    __device__ __forceinline__ static constexpr int offset_dq(int stage) {
        return kOffsetDq + (kDqBuffers > 1 ? stage * kDqBytes : 0);
    }
    // A doorman of a warpgroup's dq, which is one part of each slab, or with kAlternate every other slab.
    __device__ __forceinline__ void add_part(int group) const {
        constexpr int kBytes = (kAlternate ? kConsumers : 1) * 4 * kDqWarpBytes;
        const int part = kAlternate ? 0 : group;
        const Work w = work();
        const bool leads = lane_index() == 0;
        Slot slot;
        fence_proxy_async_global();
        if (leads && part == group) mbarrier_arrive(turn(group));
        for_places(w, [&](const Tiles&, Place here) {
            if (!kAlternate || slot.stage == group) {
                Coord at = w.at;
                at.head += here.head;
                const long long slab = Slab::number(params(), grads(), w.seq, at, here.m);
                mbarrier_wait(handed(group), kAlternate ? slot.parity : static_cast<unsigned>(slot.stage));
                if (leads) {
                    fence_proxy_async();
                    cp_reduce_async_bulk_add(static_cast<float*>(grads().dq_sum) + slab * Slab::kElements + part * (kBytes / 4),
                                             base + offset_dq(slot.stage) + part * kBytes, kBytes);
                    cp_async_bulk_wait_read<kDqBuffers - 1>();
                    mbarrier_arrive(turn(kAlternate ? group ^ 1 : group));
                }
                __syncwarp();
            }
            slot.advance();
        });
        if (!leads) return;
        if constexpr (kCountPairs) {
            cp_async_bulk_wait();
            count_release(PairCounters::of(params(), grads()).added(pair(w)));
        } else {
            cp_async_bulk_wait_read();  // shared memory is this CTA's no longer than that
        }
    }
    __device__ __forceinline__ int pair(const Work& w) const {
        return w.at.batch * (params().num_heads / params().group) + w.head_kv;
    }
    // Whether rows are prepared while this kernel runs already.
    __device__ __forceinline__ bool prepared_beside() const { return Config::kPreparesAhead && grads().prepared_units > 0; }
    // Until row statistics of this CTA's queries may be read and sums of dq added to.
    __device__ __forceinline__ void await_prepared(const Work& w) const {
        const ForwardParams& p = params();
        const bool beside = prepared_beside();
        if (beside && w.n < w.last()) {
            const int units = p.group * PairCounters::units<Config::kPacked>(p, grads(), w.at.batch);
            PairCounters::of(p, grads()).await_ready(pair(w), units);
        }
        // Then the last one does both, or the grid behind might begin before all grids ahead of this one are done.
        if (!beside || blockIdx.x == gridDim.x - 1) wait_for_grids_ahead();
    }
    // Two warps, or what follows an addition, until it is known to be done and has been told, would hold up the next.
    __device__ __forceinline__ void keep_order(int stage) const {
        const Work w = work();
        const bool leads = lane_index() == 0;
        Slot slot;
        const long long first = Slab::number(params(), grads(), w.seq, w.at, 0);
        if constexpr (Config::kBulkDq) fence_proxy_async_global();
        if (Config::kBulkDq && stage == 0 && leads) mbarrier_arrive(turn(0));
        for_places(w, [&](const Tiles&, Place here) {
            if (slot.stage == stage) {
                const long long slab = first + here.head * grads().q_slabs + here.m;
                unsigned* const counter = grads().turns + slab;
                const unsigned before = tiles_before(w, here);
                while (count_acquire(counter) < before) {
                }
                __syncwarp();
                if (!Config::kBulkDq && leads) mbarrier_arrive(turn(stage));
                mbarrier_wait(handed(stage), slot.parity);
                if (leads) {
                    if constexpr (Config::kBulkDq) {
                        fence_proxy_async();
                        cp_reduce_async_bulk_add(static_cast<float*>(grads().dq_sum) + slab * Slab::kElements, base + kOffsetDq,
                                                 4 * kConsumers * kDqWarpBytes);
                        cp_async_bulk_wait_read();
                        mbarrier_arrive(turn(stage ^ 1));
                        cp_async_bulk_wait();
                    }
                    count_release(counter);
                }
                __syncwarp();
            }
            slot.advance();
        });
    }

    // What the bias receives where no query tile is visited.
    __device__ __forceinline__ void clear_unvisited(const Work& w) const {
        if constexpr (kClears) {
            if (w.q_split > 0) return;
            const BackwardParams& g = grads();
            constexpr bool kStore = Sums::kKind == kBiasStore;
            const long long stride_q = kStore ? g.bias_q : g.sum_q, stride_head = kStore ? g.bias_head : g.sum_head;
            Element* const to = static_cast<Element*>(kStore ? g.dbias : g.bias_sum) +
                                w.at.batch * (kStore ? g.bias_batch : g.sum_batch) + w.at.head * stride_head;
            int n = w.n;
            do {
                const Tiles tiles = tiles_of(w, n);
                const int col = n * kBlockN + lane_index() % (kBlockN / 8) * 8;
                for (int head = 0; head < params().group; head++) {
                    for (int m = 0; m * kBlockM < w.at.seqlen_q; m++) {
                        if (tiles.visits({head, m})) continue;
                        const int stop = min((m + 1) * kBlockM, w.at.seqlen_q);
                        for (int i = m * kBlockM + lane_index() / (kBlockN / 8); i < stop && col < w.at.seqlen_k;
                             i += 256 / kBlockN) {
                            *reinterpret_cast<uint4*>(to + head * stride_head + i * stride_q + col) = make_uint4(0, 0, 0, 0);
                        }
                    }
                }
            } while (kRuns && ++n < w.last());
        }
    }

    // --------------------------------------------------------------------------------------------------------- consumers

    struct Consumer {
        const BackwardSm90& kernel;
        int wg;
        Slot slot;
        Coord at;
        KeySlot keys;
        DsSlot late;                     // kAlternate: of the tile at hand
        int n, m, full, next_n, number;  // of the visit at hand, and its key tile
        float factor;                    // turns a score into the exponent of 2
        float lse[kStatsAhead || kStatsUnder ? Scores::kThreadRows : 1];
        typename StatsReader::Four delta[kDeltaAhead ? Scores::kThreadRows / 4 : 1];
        WgmmaTile<kKeyCols> dk;
        WgmmaTile<kValueCols> dv;
        Sums sums;
        // Of the tile at hand as an operand, or of this thread's keys.
        unsigned bias_tile[kBiasTiles ? Scores::kSize / 2 : 1];
        float2 bias_row;

        __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
        __device__ __forceinline__ const ForwardParams& params() const { return kernel.params(); }
        __device__ __forceinline__ const BackwardParams& grads() const { return kernel.grads(); }
        __device__ __forceinline__ const Mask& mask() const { return kernel.arguments.variant.mask; }
        __device__ __forceinline__ int first_key() const { return n * kBlockN + (kWide ? 0 : 64 * wg); }
        __device__ __forceinline__ int first_query() const { return m * kBlockM + (kWide ? kScoreRows * wg : 0); }

        // Takes over what the guide says of a stage.
        __device__ __forceinline__ int read_visit(const Slot& next) {
            mbarrier_wait(kernel.visit_full(next.stage), next.parity);
            const Visit& visit = kernel.visit(next.stage);
            m = uniform(visit.m), full = uniform(visit.full);
            if constexpr (kRuns) next_n = uniform(visit.n);
            if constexpr (kAlternate) number = uniform(visit.number);
            if constexpr (kStatsAhead) read_lse(next.stage);
            return uniform(visit.head);
        }
        __device__ __forceinline__ void read_lse(int stage) {
            const StatsReader stats = kernel.read_stats(stage);
            if constexpr (kAlternate) {
#pragma unroll
                for (int r = 0; r < Scores::kThreadRows; r += 4) {
                    const auto four = stats.lse_of(r);
                    lse[r] = four.row[0], lse[r + 1] = four.row[1], lse[r + 2] = four.row[2], lse[r + 3] = four.row[3];
                }
            } else {
#pragma unroll
                for (int r = 0; r < Scores::kThreadRows; r++) lse[r] = stats.lse(r);
            }
        }
        __device__ __forceinline__ void clear_sums() {
#pragma unroll
            for (int x = 0; x < kKeyCols / 2; x++) dk[x] = 0;
#pragma unroll
            for (int x = 0; x < kValueCols / 2; x++) dv[x] = 0;
            clear_head();
        }
        __device__ __forceinline__ void clear_head() {
            sums.clear_head();
            if constexpr (Sums::kKind == kBiasColumns) key_sums() = make_float2(0, 0);
        }
        // Sums of this thread's two columns over the tiles of a head.
        __device__ __forceinline__ float2& key_sums() const {
            return reinterpret_cast<float2*>(kernel.smem + kOffsetColumns)[threadIdx.x];
        }
        // The bias of its first key; that of the second is 8 keys further.
        __device__ __forceinline__ float* key_bias() const {
            return reinterpret_cast<float*>(kernel.smem + kOffsetRow) + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        }
        // What a head's parameters receive from this key tile.
        __device__ __forceinline__ void finish_head() {
            kernel.arguments.variant.score_mod.flush(sums, at);
            if constexpr (Sums::kKind == kBiasColumns) {
                const BackwardParams& g = grads();
                const Work w = kernel.work();
#pragma unroll
                for (int c = 0; c < Scores::kThreadCols; c++) {
                    const float2 own = key_sums();
                    const float sum = Scores::sum_col(c == 0 ? own.x : own.y);
                    const int j = first_key() + Scores::col_at(c);
                    if (!Scores::leads_col() || j >= at.seqlen_k) continue;
                    static_cast<float*>(
                        g.bias_sum)[w.q_split * g.sum_split + at.batch * g.sum_batch + at.head * g.sum_head + j * g.sum_k] =
                        sum;
                }
            }
            clear_head();
        }

        // Zeros in place of what lies past the end of a sequence: P and dS are 0 there, but 0 * NaN is not. All consumers write
        // the same zeros, so they need not agree on who does.
        __device__ __forceinline__ void clear_keys() const {
            if constexpr (kForeignRows) {
                if ((n + 1) * kBlockN <= at.seqlen_k) return;
                KTile::template clear_rows<128>(kernel.smem + keys.stage * KTile::kBytes, at.seqlen_k - n * kBlockN,
                                                static_cast<int>(threadIdx.x % 128));
                fence_proxy_async();
                bar_sync(kClearBarrier + wg, 128);
            }
        }
        __device__ __forceinline__ void clear_queries() const {
            if constexpr (kForeignRows) {
                const int rows = at.seqlen_q - m * kBlockM, thread = static_cast<int>(threadIdx.x % 128);
                if (rows >= kBlockM) return;
                mbarrier_wait(kernel.do_full(slot.stage), slot.parity);
                QTile::template clear_rows<128>(kernel.smem + kOffsetQ + slot.stage * QTile::kBytes, rows, thread);
                DoTile::template clear_rows<128>(kernel.smem + kOffsetDo + slot.stage * DoTile::kBytes, rows, thread);
                fence_proxy_async();
                bar_sync(kClearBarrier + wg, 128);
            }
        }

        // What a StagedBias reads: the element that corresponds to the score being visited.
        struct BiasReader {
            const Consumer& consumer;

            __device__ __forceinline__ float operator()(int, int) const {
                const int x = consumer.sums.x;
                if constexpr (kBiasRow) {
                    return Scores::thread_col(x) == 0 ? consumer.bias_row.x : consumer.bias_row.y;
                } else {
                    const float2 pair = unpack_pair<typename Config::BiasElement>(consumer.bias_tile[x / 2]);
                    return x % 2 == 0 ? pair.x : pair.y;
                }
            }
        };
        __device__ __forceinline__ decltype(auto) staged_mod() const {
            if constexpr (Config::kStageBias) {
                return BiasIn<ScoreMod>::stage(kernel.arguments.variant.score_mod, BiasReader{*this}, 0, 0);
            } else {
                return (kernel.arguments.variant.score_mod);  // a reference
            }
        }
        // At the start of a head.
        __device__ __forceinline__ void keep_bias_row() const {
            if constexpr (kBiasRow) {
                const auto& bias = BiasIn<ScoreMod>::get(kernel.arguments.variant.score_mod);
                const auto* row = bias.array + at.batch * bias.stride_batch + at.head * bias.stride_head;
                const int j = first_key() + Scores::col_at(0), last = at.seqlen_k - 1;
                float* const own = key_bias();
                __syncwarp();  // four lanes write the same
                own[0] = static_cast<float>(row[min(j, last) * bias.stride_k]);
                own[8] = static_cast<float>(row[min(j + 8, last) * bias.stride_k]);
            }
        }
        __device__ __forceinline__ void read_bias(unsigned start) {
            if constexpr (kBiasRow) bias_row = make_float2(key_bias()[0], key_bias()[8]);
            if constexpr (kBiasTiles) {
                load_panel(bias_tile, start + kOffsetBias + slot.stage * BiasTile::kBytes + wg * BiasTile::kPanelBytes);
                // Rows that belong to other sequences, or to none, may hold anything.
                if (kForeignRows && (m + 1) * kBlockM > at.seqlen_q) {
#pragma unroll
                    for (int x = 0; x < Scores::kSize; x += 2) {
                        const int i = m * kBlockM + Scores::row(x);
                        bias_tile[x / 2] &= (i < at.seqlen_q ? 0xffffu : 0u) | (i + 1 < at.seqlen_q ? 0xffff0000u : 0u);
                    }
                }
            }
        }
        // The gradient of a bias tile, to shared memory. What lies outside the sequences adds nothing.
        __device__ __forceinline__ void stage_sums() {
            if constexpr (kStageSums) {
                if (!full || (m + 1) * kBlockM > at.seqlen_q) {
#pragma unroll
                    for (int x = 0; x < Scores::kSize; x++) {
                        const bool inside =
                            m * kBlockM + Scores::row(x) < at.seqlen_q && first_key() + Scores::col(x) < at.seqlen_k;
                        if (!inside) sums.cells[x] = 0;
                    }
                }
                const int to = kOffsetSums + slot.stage * kSumsBytes + wg * (kSumsBytes / kConsumers);
                if constexpr (kAddSums) {
                    store_float_panels(kernel.smem + to, sums.cells);
                } else {
                    unsigned packed[Scores::kSize / 2];
#pragma unroll
                    for (int x = 0; x < Scores::kSize; x += 2) {
                        packed[x / 2] = pack_pair<typename Config::BiasTarget>(sums.cells[x], sums.cells[x + 1]);
                    }
                    store_panel(kernel.base + to, packed);
                }
            }
        }
        // And from there to where it belongs, by one thread of a warpgroup. Two buffers let the barrier of dS do for both:
        // before it the thread waits until the copy engine has read the tile before this one.
        __device__ __forceinline__ static bool sends_sums() { return kSendSums && threadIdx.x % 128 == 0; }
        __device__ __forceinline__ void send_sums(unsigned start, unsigned ds) const {
            if constexpr (kSendSums) {
                if (!sends_sums()) return;
                const TensorMap& map = kernel.arguments.maps[kernel.arguments.kMapDbias];
                const unsigned from = kStageSums
                                          ? start + kOffsetSums + slot.stage * kSumsBytes + wg * (kSumsBytes / kConsumers)
                                          : ds + wg * DsTile::kPanelBytes;
                const bool shared = Sums::kKind == kBiasCells;
                const int head = shared && grads().bias_heads == 1 ? 0 : at.head;
                const int batch = shared && grads().bias_batches == 1 ? 0 : at.batch;
                if constexpr (kAddSums) {
#pragma unroll
                    for (int panel = 0; panel < 2; panel++) {
                        cp_reduce_async_bulk_tensor_4d_add(map, from + panel * BiasTile::kPanelBytes, first_key() + 32 * panel,
                                                           m * kBlockM, head, batch);
                    }
                } else {
                    cp_async_bulk_tensor_4d_store(map, from, first_key(), m * kBlockM, head, batch);
                }
                cp_async_bulk_commit();
            }
        }

        // P and the gradients of the scores, in place of the products.
        __device__ __forceinline__ void differentiate(Scores& s, Scores& dp) {
            const ForwardParams& p = params();
            const StatsReader stats = kernel.read_stats(slot.stage);
            const float scale = static_cast<float>(p.scale), dropout_scale = static_cast<float>(p.dropout_scale);
            const auto& score_mod = staged_mod();
            sums.clear_tile();
            if (full) {
                score_gradients<Config, false>(s, dp, at, first_query(), first_key(), scale, factor, mask(), score_mod, stats,
                                               sums, p.seed, p.dropout_threshold, dropout_scale);
            } else {
                score_gradients<Config, true>(s, dp, at, first_query(), first_key(), scale, factor, mask(), score_mod, stats,
                                              sums, p.seed, p.dropout_threshold, dropout_scale);
            }
            gather_sums();
        }
        // The same where only the mask is between products and exponentials, in two parts: before dP is there, with kSoon of
        // the exponentials, and after. Of eight of the others kSpared do without the MUFU: at 64 columns, where more slowed
        // down what takes several key tiles.
        static constexpr int kSoon = Scores::kSize / 2;
        static constexpr int kSpared = kKeyCols <= 64 && !kRuns && !Config::kDeterministic ? 2 : 0;
        __device__ __forceinline__ void begin_plain(Scores& s) const {
            if (!full) hide(s, negative_infinity<float>(), at, first_query(), first_key(), mask());
            plain_exponents(s, factor, kernel.read_stats(slot.stage));
            plain_probabilities<0, kSoon, 0>(s);
        }
        __device__ __forceinline__ void finish_plain(Scores& s, Scores& dp) const {
            if (!full) hide(dp, 0, at, first_query(), first_key(), mask());  // which may be anything, not finite even
            plain_probabilities<kSoon, Scores::kSize, kSpared>(s);
            plain_gradients(s, dp, kernel.read_stats(slot.stage));
        }
        // What the bias receives from this tile.
        __device__ __forceinline__ void gather_sums() {
            if constexpr (kStageSums) {
                stage_sums();
            } else if constexpr (!kSendSums) {
                sums.write_cells(grads(), at, first_query(), first_key());
            }
            if constexpr (Sums::kKind == kBiasColumns) {
                float2& own = key_sums();
                own = make_float2(own.x + sums.columns[0], own.y + sums.columns[1]);
            }
        }
        __device__ __forceinline__ void find_probabilities(Scores& s) {
            const float scale = static_cast<float>(params().scale);
            const auto& score_mod = staged_mod();
            const StatsReader reader = kernel.read_stats(slot.stage);
            constexpr bool kKept = kStatsAhead || kStatsUnder;
            const auto stats = [&](int r) { return Stats{kKept ? lse[kKept ? r : 0] : reader.lse(r), 0.0f}; };
            if (full) {
                score_probabilities<Config, false>(s, at, first_query(), first_key(), scale, factor, mask(), score_mod, stats,
                                                   sums);
            } else {
                // NOTE: opaque, or what a mask makes of it is kept from one tile to the next.
                score_probabilities<Config, true>(s, at, first_query(),
                                                  kAlternate && kForeignRows ? opaque(first_key()) : first_key(), scale, factor,
                                                  mask(), score_mod, stats, sums);
            }
        }
        __device__ __forceinline__ void find_gradients(Scores& dp, Scores& p) {
            const auto& score_mod = staged_mod();
            sums.clear_tile();
            const StatsReader reader = kernel.read_stats(slot.stage);
            const auto stats = [&](int r) { return Stats{0.0f, kDeltaAhead ? delta[r / 4].row[r % 4] : reader.delta(r)}; };
            if (full) {
                probability_gradients<Config, false>(dp, p, at, first_query(), first_key(), mask(), score_mod, stats, sums);
            } else {
                probability_gradients<Config, true>(dp, p, at, first_query(), first_key(), mask(), score_mod, stats, sums);
            }
            gather_sums();
        }

        // Until the doormen have taken the tile before from shared memory, or let this one be added. Each tile is a phase of a
        // warpgroup's own doorman, every other one of those that take tiles in turn.
        __device__ __forceinline__ void await_turn() const {
            mbarrier_wait(kernel.turn(kDoors ? wg : slot.stage), kDoors ? static_cast<unsigned>(slot.stage) : slot.parity);
        }
        __device__ __forceinline__ void hand_over() const {
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.handed(kDoors ? wg : slot.stage));
        }
        // Where dq of the tile at hand lies.
        __device__ __forceinline__ float* dq_target() const {
            return static_cast<float*>(grads().dq_sum) + kernel.visit(slot.stage).slab * Slab::kElements;
        }
        // Adds a part of dq, of this thread's elements those from `first` on.
        template <class Part>
        __device__ __forceinline__ void add_dq(float* to, Part& part, int first, unsigned start) const {
            if constexpr (Config::kBulkDq) {
                const int warp = uniform(static_cast<int>(threadIdx.x / 32));
                if constexpr (!kCourier) {
                    if (first == 0 && sends_sums()) {
                        cp_async_bulk_wait_read<1>();  // but what the bias has just received
                    } else if (first == 0 && leads()) {
                        cp_async_bulk_wait_read();
                    }
                    __syncwarp();
                }
                const int own = offset_dq(slot.stage) + warp * kDqWarpBytes + 128 * first;
                float4* staged = reinterpret_cast<float4*>(kernel.smem + own) + lane_index();
#pragma unroll
                for (int x = 0; x < Part::kSize; x += 4) {
                    staged[x / 4 * 32] = make_float4(part.data[x], part.data[x + 1], part.data[x + 2], part.data[x + 3]);
                }
                if constexpr (kCourier) return;  // its fence is enough: it follows these, and comes before the copy
                fence_proxy_async();
                __syncwarp();
                if (leads()) {
                    cp_reduce_async_bulk_add(to + warp * Slab::kWarpElements + 32 * first, start + own, 128 * Part::kSize);
                }
            } else {
                Slab::add(to, part, first);
            }
        }

        // kAlternate: dq of the tile before, left to this warpgroup's doorman.
        __device__ __forceinline__ void multiply_dq() const {
            const int buffer = late.stage == 0 ? kDsBuffers - 1 : late.stage - 1;
            const unsigned parity = late.stage == 0 ? late.parity ^ 1 : late.parity, start = opaque(kernel.base);
            mbarrier_wait(kernel.ds_full(buffer), parity);
            WgmmaTile<kHeadDim> dq;
            wgmma_pin(dq.data);
            wgmma_fence();
            wgmma_ab<Element, DsTile, KTile>(dq, DsTile::k_major(start + kOffsetDs + buffer * DsTile::kBytes),
                                             KTile::mn_major(start), false);
            wgmma_commit_group();
            wgmma_wait_group<0>();
            wgmma_pin(dq.data);
            if (leads()) mbarrier_arrive(kernel.ds_empty(buffer));
            // NOTE: of its own, which no later phase can pass: of one for both, this tile's has the parity of the last but one.
            mbarrier_wait(kernel.turn(wg), slot.stage == 0 ? slot.parity ^ 1 : slot.parity);
            // As if each warpgroup held half the columns, in the order of the slab.
            const int warp = static_cast<int>(threadIdx.x % 128 / 32);
            float4* staged = reinterpret_cast<float4*>(kernel.smem + kOffsetDq + warp * kDqWarpBytes) + lane_index();
            constexpr int kHalf = kHeadDim / 4;
#pragma unroll
            for (int x = 0; x < 2 * kHalf; x += 4) {
                staged[x / kHalf * (4 * kDqWarpBytes / 16) + x % kHalf / 4 * 32] =
                    make_float4(dq.data[x], dq.data[x + 1], dq.data[x + 2], dq.data[x + 3]);
            }
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.handed(wg));
        }
        // One query tile; reads the visit that follows and returns its head.
        __device__ __forceinline__ int step() {
            // NOTE: opaque, or descriptors are hoisted out of the loop into registers that it needs.
            const unsigned start = opaque(kernel.base);
            const int group = opaque(wg), stage = slot.stage;
            const unsigned q = start + kOffsetQ + stage * QTile::kBytes, dout = start + kOffsetDo + stage * DoTile::kBytes;
            const unsigned ds = start + kOffsetDs + (kAlternate ? late.stage : stage) * DsTile::kBytes;
            DqSums dq;
            Scores s, dp;
            unsigned p_operand[Scores::kSize / 2], ds_operand[Scores::kSize / 2];
            mbarrier_wait(kernel.q_full(stage), slot.parity);
            clear_queries();
            wgmma_pin(s.data);
            wgmma_fence();
            const int own_keys = kWide ? 0 : group * 64 * 128, queries = kWide ? group * kScoreRows * 128 : 0;
            const unsigned k = start + keys.stage * KTile::kBytes, v = start + kOffsetV + keys.stage * VTile::kBytes;
            wgmma_qk<Element, kHeadDim, KTile, QTile>(s, KTile::k_major(k + own_keys), QTile::k_major(q + queries));
            mbarrier_wait(kernel.do_full(stage), slot.parity);
            wgmma_pin(dp.data);
            wgmma_fence();
            wgmma_qk<Element, kHeadDimV, VTile, DoTile>(dp, VTile::k_major(v + own_keys), DoTile::k_major(dout + queries));
            if constexpr (kStatsUnder) read_lse(stage);
            read_bias(start);
            if constexpr (kEarly) {
                wgmma_wait_group<1>();
                wgmma_pin(s.data);
                find_probabilities(s);
            } else if constexpr (kPlain) {
                wgmma_wait_group<1>();
                wgmma_pin(s.data);
                begin_plain(s);
                wgmma_pin(s.data);
                wgmma_wait_group<0>();
                wgmma_pin(dp.data);
                finish_plain(s, dp);
                pack_operand<Element>(ds_operand, dp);
            } else {
                wgmma_wait_group<0>();
                wgmma_pin(s.data);
                wgmma_pin(dp.data);
                differentiate(s, dp);
                pack_operand<Element>(ds_operand, dp);
            }
            pack_operand<Element>(p_operand, s);
            if constexpr (kDeltaAhead) {
                const StatsReader stats = kernel.read_stats(stage);
#pragma unroll
                for (int x = 0; x < Scores::kThreadRows / 4; x++) delta[x] = stats.delta_of(4 * x);
            }
            if constexpr (!kEarly && !kWide) store_panel(ds + group * DsTile::kPanelBytes, ds_operand);
            const unsigned p = start + kOffsetP + stage * DsTile::kBytes;
            if constexpr (kWide) {
                store_panel(p + queries, p_operand);
                if constexpr (!kEarly) store_panel(ds + queries, ds_operand);
                fence_proxy_async();
                bar_sync(kPBarrier, kConsumerThreads);
                wgmma_pin(dv.data);
                wgmma_fence();
                wgmma_atb<Element, DsTile, DoTile>(dv, DsTile::descriptor(p, 16),
                                                   DoTile::mn_major(dout + group * (kValueCols / 64) * DoTile::kPanelBytes));
            } else {
                wgmma_pin(p_operand);
                wgmma_pin(dv.data);
                wgmma_fence();
                wgmma_pv<Element, DoTile>(dv, p_operand, DoTile::mn_major(dout));
            }
            if constexpr (kEarly) {
                wgmma_wait_group<1>();
                wgmma_pin(dp.data);
                find_gradients(dp, s);
                pack_operand<Element>(ds_operand, dp);
            }
            if constexpr (kAlternate) {
                mbarrier_wait(kernel.ds_empty(late.stage), late.parity ^ 1);
                store_panel(ds + group * DsTile::kPanelBytes, ds_operand);
                fence_proxy_async();
                __syncwarp();
                if (leads()) mbarrier_arrive(kernel.ds_full(late.stage));
                wgmma_pin(dk.data);
                wgmma_pin(ds_operand);
                wgmma_fence();
                wgmma_pv<Element, QTile>(dk, ds_operand, QTile::mn_major(q));
                wgmma_wait_group<1>();
                wgmma_pin(dv.data);
                wgmma_pin(p_operand);
                if (leads()) mbarrier_arrive(kernel.do_empty(stage));
                Slot next = slot;
                next.advance();
                const int head = read_visit(next);
                wgmma_wait_group<0>();
                wgmma_pin(dk.data);
                wgmma_pin(ds_operand);
                if (leads()) mbarrier_arrive(kernel.q_empty(stage));
                if (number > 1 && stage != group) multiply_dq();  // there is a tile before
                slot = next, late.advance();
                return head;
            }
            if constexpr (!kWide || kEarly) {
                if constexpr (kEarly) store_panel(ds + (kWide ? queries : group * DsTile::kPanelBytes), ds_operand);
                fence_proxy_async();
                if (sends_sums()) cp_async_bulk_wait_read<Config::kBulkDq && !kCourier ? 1 : 0>();
                bar_sync(kDsBarrier, kConsumerThreads);
                send_sums(start, ds);
            }
            if constexpr (kFewLeft) {
                wgmma_wait_group<0>();
                wgmma_pin(dv.data);
                wgmma_pin(p_operand);
            }
#pragma unroll
            for (int x = 0; x < DqSums::kWhole; x++) wgmma_pin(dq.whole[x].data);
            if constexpr (DqSums::kOdd) wgmma_pin(dq.half.data);
            wgmma_pin(dk.data);
            if constexpr (!kWide) wgmma_pin(ds_operand);
            wgmma_fence();
            if constexpr (DqSums::kByRows) {
                wgmma_ab<Element, DsTile, KTile>(dq.whole[0], DsTile::k_major(ds + DqSums::first_row(group) * 128),
                                                 KTile::mn_major(k + DqSums::panel(group) * KTile::kPanelBytes), false);
                wgmma_commit_group();
            } else {
#pragma unroll
                for (int x = 0; x < DqSums::kWhole; x++) {
                    wgmma_at<Element, KTile, DsTile>(dq.whole[x],
                                                     KTile::descriptor(k + DqSums::panel(group, x) * KTile::kPanelBytes, 16),
                                                     DsTile::k_major(ds));
                }
            }
            if constexpr (DqSums::kOdd) {
                wgmma_at<Element, KTile, DsTile>(dq.half, KTile::descriptor(k + DqSums::kHalfPanel * KTile::kPanelBytes, 16),
                                                 DsTile::k_major(ds + DqSums::half_row(group) * 128));
            }
            if constexpr (kWide) {
                wgmma_atb<Element, DsTile, QTile>(dk, DsTile::descriptor(ds, 16),
                                                  QTile::mn_major(q + group * (kKeyCols / 64) * QTile::kPanelBytes));
            } else {
                wgmma_pv<Element, QTile>(dk, ds_operand, QTile::mn_major(q));
            }
            wgmma_wait_group<DqSums::kParts>();
            if constexpr (DqSums::kWhole > 0) {
                wgmma_pin(dq.whole[0].data);
            } else {
                wgmma_pin(dq.half.data);
            }
            wgmma_pin(dv.data);
            if constexpr (!kWide) wgmma_pin(p_operand);
            if (leads()) mbarrier_arrive(kernel.do_empty(stage));
            Slot next = slot;
            next.advance();
            const int head = read_visit(next);
            if constexpr (kDoormen) await_turn();
            float* const to = kCourier ? nullptr : dq_target();
#pragma unroll
            for (int x = 0; x < DqSums::kWhole; x++) {
                if (x > 0) {
                    wgmma_wait_group<1>();
                    wgmma_pin(dq.whole[x].data);
                }
                add_dq(to, dq.whole[x], x * DqSums::Whole::kSize, start);
            }
            if constexpr (DqSums::kOdd) {
                if constexpr (DqSums::kWhole > 0) {
                    wgmma_wait_group<1>();
                    wgmma_pin(dq.half.data);
                }
                add_dq(to, dq.half, DqSums::kHalf, start);
            }
            if constexpr (kDoormen) hand_over();
            wgmma_wait_group<0>();
            wgmma_pin(dk.data);
            if constexpr (!kWide) wgmma_pin(ds_operand);
            if (leads()) mbarrier_arrive(kernel.q_empty(stage));
            slot = next;
            return head;
        }

        __device__ __forceinline__ bool visits() const { return m >= 0 && (!kRuns || next_n == n); }
        // The query tiles of the key tiles [n, stop), and dk and dv of these.
        __device__ __forceinline__ void visit_queries(int stop) {
            int head = read_visit(slot);
            // What was waited for has cleared the sums.
            if constexpr ((Config::kBulkDq && !kCourier) || kAddSums) fence_proxy_async_global();
            do {
                clear_sums();
                if (visits()) {
                    at.head = head;
                    mbarrier_wait(kernel.k_full(keys.stage), keys.parity);
                    mbarrier_wait(kernel.v_full(keys.stage), keys.parity);
                    clear_keys();
                    keep_bias_row();
                    while (visits()) {
                        head = step();
                        if (head != at.head && visits()) {
                            finish_head();
                            at.head = head;
                            keep_bias_row();
                        }
                    }
                    if constexpr (kAlternate) {
                        if (slot.stage != wg) multiply_dq();  // of the last tile
                    }
                    finish_head();
                    if (kRuns && leads()) mbarrier_arrive(kernel.k_empty(keys.stage));
                    keys.advance();
                }
                store();
            } while (kRuns && ++n < stop);
        }

        // In the dtype of the scores, for backward_combine.cu.
        template <int kCols>
        __device__ __forceinline__ void store_partial(const WgmmaTile<kCols>& gradient, float scale, float* target, int rows,
                                                      int cols) const {
            const int first = kWide ? kCols * wg : 0;
#pragma unroll
            for (int x = 0; x < kCols / 2; x++) {
                const int j = gradient.row(x), col = first + gradient.col(x);
                if (j < rows && col < cols) target[static_cast<long long>(j) * cols + col] = gradient.data[x] * scale;
            }
        }
        // Of a warp's 16 keys, through the shared memory that its dq is added from, or with kAlternate, where dq of the last
        // tile may be on its way still, that of its values, which nobody else reads.
        template <int kCols>
        __device__ __forceinline__ void send(const WgmmaTile<kCols>& gradient, float scale, const TensorMap& map,
                                             int staged) const {
            const int warp = uniform(static_cast<int>(threadIdx.x / 32));
            const unsigned own =
                kernel.base + staged + (kAlternate ? kOffsetV + warp * 16 * 128 : offset_dq(slot.stage) + warp * kDqWarpBytes);
            constexpr int kPanelStep = kAlternate ? VTile::kPanelBytes : 16 * 128;
#pragma unroll
            for (int panel = 0; panel < kCols / 64; panel++) {
                unsigned operand[16];
#pragma unroll
                for (int x = 0; x < 32; x += 2) {
                    const int e = 32 * panel + x;
                    operand[x / 2] = pack_pair<Element>(gradient.data[e] * scale, gradient.data[e + 1] * scale);
                }
                store_operand_rows(own + panel * kPanelStep, operand);
            }
            fence_proxy_async();
            __syncwarp();
            if (!leads()) return;
            const int head_kv = kernel.visit(slot.stage).head_kv;
            const int row = 16 * warp + (kForeignRows ? kernel.visit(slot.stage).n : n * kBlockN);
#pragma unroll
            for (int panel = 0; panel < kCols / 64; panel++) {
                cp_async_bulk_tensor_4d_store(map, own + panel * kPanelStep, 64 * panel, row, head_kv,
                                              Config::kPacked ? 0 : at.batch);
            }
            cp_async_bulk_commit();
        }
        // Until dq, or what was sent before, has been read from there.
        __device__ __forceinline__ void await_staging() const {
            if (leads()) cp_async_bulk_wait_read();
            __syncwarp();
        }
        __device__ __forceinline__ void store() const {
            if constexpr (Config::kStoreTma) {
                constexpr int kBytes = 16 * 2 * kKeyCols;
                static_assert(!kWide && 16 * 2 * kKeyCols <= kDqWarpBytes && 16 * 2 * kValueCols <= kDqWarpBytes);
                constexpr bool kBoth = kBytes + 16 * 2 * kValueCols <= kDqWarpBytes;
                const float scale_v = static_cast<float>(Config::kDropout ? params().dropout_scale : 1.0);
                if constexpr (kAlternate) {
                    bar_sync(kClearBarrier + wg, 128);
                } else if constexpr (kCourier) {
                    await_turn();
                }
                // Of a warp's keys the copy engine would store those past the end too.
                if (kForeignRows && n * kBlockN + static_cast<int>(threadIdx.x / 32 + 1) * 16 > at.seqlen_k) {
                    store_rows();
                    return;
                }
                await_staging();
                send(dk, static_cast<float>(params().scale), kernel.arguments.maps[kBackwardMapDk], 0);
                if constexpr (!kBoth) await_staging();
                send(dv, scale_v, kernel.arguments.maps[kBackwardMapDv], kBoth ? kBytes : 0);
            } else {
                store_rows();
            }
        }
        __device__ __forceinline__ void store_rows() const {
            const ForwardParams& p = params();
            const BackwardParams& g = grads();
            const Work w = kernel.work();
            const int start = first_key(), rows = w.at.seqlen_k - start;
            const float scale = static_cast<float>(p.scale);
            const float scale_v = static_cast<float>(Config::kDropout ? p.dropout_scale : 1.0);
            if constexpr (Config::kQuerySplit) {
                const long long head_rows = Config::kPacked ? p.total_k : p.seqlen_k, heads_kv = p.num_heads / p.group;
                const long long row = w.q_split * g.rows_kv +
                                      ((Config::kPacked ? 0 : w.at.batch) * heads_kv + w.head_kv) * head_rows + w.seq.token_k +
                                      start;
                store_partial(dk, scale, static_cast<float*>(g.partial_dk) + row * p.head_dim, rows, p.head_dim);
                store_partial(dv, scale_v, static_cast<float*>(g.partial_dv) + row * p.head_dim_v, rows, p.head_dim_v);
            } else {
                const long long row = w.seq.token_k + start;
                const int first = kWide ? kKeyCols * wg : 0, first_v = kWide ? kValueCols * wg : 0;
                Element* dk_to = static_cast<Element*>(g.dk) + w.at.batch * g.dk_batch + w.head_kv * g.dk_head + row * g.dk_row;
                Element* dv_to = static_cast<Element*>(g.dv) + w.at.batch * g.dv_batch + w.head_kv * g.dv_head + row * g.dv_row;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int j = dk.row(2 * half);
                    store_row<Element, Config::kVecDk>(dk, half, scale, dk_to + j * g.dk_row + first, p.head_dim - first,
                                                       j < rows);
                    store_row<Element, Config::kVecDv>(dv, half, scale_v, dv_to + j * g.dv_row + first_v,
                                                       p.head_dim_v - first_v, j < rows);
                }
            }
        }
    };

    // kApart: what a warpgroup holds of dk (kKeys) or dv.
    template <bool kKeys, int kCols>
    __device__ __forceinline__ void store_apart(const WgmmaTile<kCols>& gradient, int n) const {
        const ForwardParams& p = params();
        const BackwardParams& g = grads();
        const Work w = work();
        const int rows = w.at.seqlen_k - n * kBlockN, cols = kKeys ? p.head_dim : p.head_dim_v;
        const float scale = kKeys ? static_cast<float>(p.scale) : 1.0f;
        if constexpr (Config::kQuerySplit) {
            const long long heads_kv = p.num_heads / p.group;
            const long long row = w.q_split * g.rows_kv + (w.at.batch * heads_kv + w.head_kv) * p.seqlen_k + n * kBlockN;
            float* const to = static_cast<float*>(kKeys ? g.partial_dk : g.partial_dv) + row * cols;
#pragma unroll
            for (int x = 0; x < kCols / 2; x++) {
                const int j = gradient.row(x), col = gradient.col(x);
                if (j < rows && col < cols) to[static_cast<long long>(j) * cols + col] = gradient.data[x] * scale;
            }
        } else {
            const long long pitch = kKeys ? g.dk_row : g.dv_row;
            Element* const to = static_cast<Element*>(kKeys ? g.dk : g.dv) + w.at.batch * (kKeys ? g.dk_batch : g.dv_batch) +
                                w.head_kv * (kKeys ? g.dk_head : g.dv_head) + n * kBlockN * pitch;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int j = gradient.row(2 * half);
                store_row<Element, kKeys ? Config::kVecDk : Config::kVecDv>(gradient, half, scale, to + j * pitch, cols,
                                                                            j < rows);
            }
        }
    }

    // Rows of dk and dv that belong to no key. A packed call's tail has more of them than key tiles.
    __device__ __forceinline__ void store_padding(const Work& w, int n) const {
        const ForwardParams& p = params();
        const BackwardParams& g = grads();
        for (int block = n; block * kBlockN < w.seq.rows_k; block += g.n_blocks) {
            const int start = max(block * kBlockN, w.at.seqlen_k), stop = min((block + 1) * kBlockN, w.seq.rows_k);
            const long long row = w.seq.token_k + start;
            Element* dk_to = static_cast<Element*>(g.dk) + w.at.batch * g.dk_batch + w.head_kv * g.dk_head + row * g.dk_row;
            Element* dv_to = static_cast<Element*>(g.dv) + w.at.batch * g.dv_batch + w.head_kv * g.dv_head + row * g.dv_row;
            for (int x = threadIdx.x; x < (stop - start) * p.head_dim; x += kConsumerThreads) {
                dk_to[x / p.head_dim * g.dk_row + x % p.head_dim] = Element(0.0f);
            }
            for (int x = threadIdx.x; x < (stop - start) * p.head_dim_v; x += kConsumerThreads) {
                dv_to[x / p.head_dim_v * g.dv_row + x % p.head_dim_v] = Element(0.0f);
            }
        }
    }

    __device__ __forceinline__ void consume(int wg) const {
        if constexpr (kApart) {
            Work w = work();
            w.at.head = 0;
            if (w.n < w.last()) BackwardApart<Config, BackwardSm90>{*this, w.at, w.n, score_factor()}.run(wg);
            return;
        }
        Consumer consumer{*this, wg};
        consumer.factor = score_factor();
        const Work w = work();
        if (w.n < w.last()) {
            consumer.at = w.at, consumer.n = w.n;
            consumer.visit_queries(w.last());
        }
        if constexpr ((Config::kBulkDq && !kCourier) || kSendSums || Config::kStoreTma) {
            if (Consumer::leads()) cp_async_bulk_wait();
        }
        if constexpr (kForeignRows && !Config::kQuerySplit) {
            // NOTE: worked out again, or it would live in registers that the loop needs.
            const Work again = work();
            for (int n = again.n; n < again.stop && n < grads().n_blocks; n++) store_padding(again, n);
        }
    }

    // -------------------------------------------------------------------------------------------------------------- roles

    __device__ __forceinline__ void run() const {
        const int warp = uniform(static_cast<int>(threadIdx.x / 32)), wg = warp / 4;
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kKeyStages; stage++) {
                mbarrier_init(k_full(stage), 1);
                mbarrier_init(v_full(stage), 1);
                mbarrier_init(k_empty(stage), 4 * kConsumers);
            }
            for (int stage = 0; stage < kStages; stage++) {
                mbarrier_init(q_full(stage), kBiasTiles ? 2 : 1);
                mbarrier_init(do_full(stage), 1);
                mbarrier_init(visit_full(stage), 32);
                mbarrier_init(turn(stage), 1);
                mbarrier_init(handed(stage), kDoors ? 4 : 4 * kConsumers);
                mbarrier_init(q_empty(stage), 4 * kConsumers);
                mbarrier_init(do_empty(stage), 4 * kConsumers);
            }
            for (int buffer = 0; (kAlternate || kApart) && buffer < kDsBuffers; buffer++) {
                mbarrier_init(ds_full(buffer), kApart ? 4 : 4 * kConsumers);
                mbarrier_init(ds_empty(buffer), kApart ? 4 * kConsumers : 4);
            }
            for (int stage = 0; kApart && stage < kStages; stage++) {
                mbarrier_init(p_full(stage), 4), mbarrier_init(p_empty(stage), 4);
            }
            fence_mbarrier_init();
        }
        if constexpr (kAllTokens) {
            if (warp == 0) {
                const int pairs = grads().q_splits * grads().heads_kv, index = static_cast<int>(cta_index());
                const int found = sequence_at(params(), kByPair ? index / pairs : Work::share_of(params(), grads(), 0).n);
                if (lane_index() == 0) sequence() = found;
            }
        }
        __syncthreads();
        if (wg == kConsumers) {
            setmaxnreg_dec<kProducerRegisters>();
            const Work w = work();
            if (warp != 4 * kConsumers) await_prepared(w);
            if (w.n >= w.last()) return;
            if (warp == 4 * kConsumers) {
                if (elect_sync()) load_tiles();
            } else if (warp == 4 * kConsumers + 1) {
                guide();
            } else {
                if constexpr (kDoors) {
                    add_part(warp % 2);
                } else if constexpr (Config::kDeterministic) {
                    keep_order(warp % 2);
                }
                if (kClears && warp == 4 * kConsumers + 3) clear_unvisited(w);
            }
        } else {
            setmaxnreg_inc<kConsumerRegisters>();
            if (!prepared_beside()) wait_for_grids_ahead();
            admit_grid_behind();  // whose counters have been cleared
            consume(wg);
        }
    }
};

}  // namespace cuattn
