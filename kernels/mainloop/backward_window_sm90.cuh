// Backward on Hopper under a window that shows a tile of 64 queries no more than three tiles of 64 keys: all gradients in one
// pass, with no sums in memory. 16-bit elements, head dimensions to 64, sm_90a, scores that nothing modifies.
//
// Tiles       key tile n begins at key 64 n + shift, where shift brings the last key that query tile m sees to the end of key
//             tile m: query tile m then sees key tiles m - 2, m - 1 and m, whatever the lengths
// Run         a CTA takes query tiles [first, stop), writes their dq, and dk and dv of key tiles [first, stop). These are seen
//             by two query tiles more, which it visits after its own. The first CTA also has key tiles -2 and -1
// Products    transposed as in backward_sm90.cuh, of one query tile and head:
//                 S^T = K Q^T    dP^T = V dO^T    64 keys x 64 queries, each of three warpgroups its own key tile
//                 dV += P^T dO   dK += dS^T Q     A in registers; a warpgroup keeps its key tile for three query tiles
//                 dQ = dS K                       over all three key tiles, by the warpgroup of key tile m - 1; dS from
//                                                 shared memory, where all three write it
// Roles       consumers: warpgroups 0 to 2, key tiles n with n % 3 = warpgroup
//             loader: one thread of warp 12 issues all tile loads
//             guides: warps 13 and 14 find the row statistics, delta = rowsum(dO o O) - dlse from the tiles, of half the rows
//             each; so nothing runs before this kernel
// Memory      kKeySlots x sK | kKeySlots x sV | kStages x sQ | kStages x sdO | kStages x sO | 2 x 3 x sdS |
//             kStages x row statistics | Targets | barriers
// Barriers    name                       arrives                                           count   waits
//             full (k, v, q)             the loader, and the bytes                         1       consumers
//             do_full (with O)           likewise                                          2       consumers, the guides
//             stats_full                 the guides                                        64      consumers
//             empty                      one lane of each consumer warp                    12      the loader
//             ds_full                    likewise                                          12      who multiplies dq
//             ds_empty                   one lane of each warp that multiplied dq          4       consumers
//             kv_empty                   one lane of each warp that used the tile last,
//                                        for its scores and for dq                         8       the loader
#pragma once
#include "attention/mod_sums.cuh"
#include "attention/row_stats.cuh"
#include "attention/scores.cuh"
#include "attention/seqlen.cuh"
#include "mainloop/backward_maps.cuh"
#include "mainloop/ring.cuh"
#include "mainloop/stats_tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/special_registers.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/panel_tile.cuh"
#include "tile/warpgroup_half.cuh"
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <class Config>
struct BackwardWindowSm90 {
    using Element = typename Config::Element;
    using Mask = typename Config::Mask;
    static constexpr int kRows = 64, kHeld = 3, kKeySlots = 4, kStages = Config::kStages;
    static_assert(Config::kBlockM == kRows && Config::kBlockN == kRows && Config::kThreads == 128 * (kHeld + 1));
    static_assert(Config::kHeadDim == 64 && Config::kHeadDimV == 64 && Config::kFoldScale && !Config::kDropout);
    static constexpr int kConsumerThreads = 128 * kHeld, kConsumerRegisters = 160, kProducerRegisters = 32;

    using Tile = PanelTile<kRows, 64>;
    using Scores = WgmmaTransposedTile<kRows>;
    using Stats = RowStats<Config>;
    using StatsRows = StatsTile<kRows>;
    using Sums = ModSums<Config, Scores>;
    using Slot = RingSlot<kStages>;
    using DsSlot = RingSlot<2>;

    // Where gradients go and statistics come from: of the first head of the group, and of the first rows of the sequence. And
    // what the guides have no registers for.
    struct alignas(16) Targets {
        Element *dq, *dk, *dv;
        const float *lse, *dlse;
        Stats* row_stats;
        long long head_rows;  // between two heads of row_stats
        unsigned rows;        // queries of the sequence
        unsigned stop, last;  // as in Work, in rows
    };
    static constexpr int kOffsetV = kKeySlots * Tile::kBytes, kOffsetQ = kOffsetV + kKeySlots * Tile::kBytes;
    static constexpr int kOffsetDo = kOffsetQ + kStages * Tile::kBytes, kOffsetOut = kOffsetDo + kStages * Tile::kBytes;
    static constexpr int kOffsetDs = kOffsetOut + kStages * Tile::kBytes;
    static constexpr int kOffsetStats = kOffsetDs + 2 * kHeld * Tile::kBytes;
    static constexpr int kOffsetTargets = kOffsetStats + kStages * StatsRows::kBytes;
    static constexpr int kOffsetBarriers = kOffsetTargets + static_cast<int>(sizeof(Targets));
    static constexpr int kBarriers = 3 * kKeySlots + 4 * kStages + 4;
    static_assert(kOffsetBarriers + 8 * kBarriers + Tile::kAlignment <= Config::kSmemBytes,
                  "the plan's shared memory is too small");

    // As in backward_sm90.cuh.
    static constexpr bool kForeignRows = Config::kPacked || Config::kLens;
    static constexpr int kClearBarrier = 1;

    const BackwardTmaArguments<Config>& arguments;
    char* smem;  // aligned
    unsigned base;

    __device__ __forceinline__ const ForwardParams& params() const { return arguments.variant.base; }
    __device__ __forceinline__ const BackwardParams& grads() const { return arguments.variant.grad; }
    __device__ __forceinline__ const Mask& mask() const { return arguments.variant.mask; }
    __device__ __forceinline__ unsigned barrier(int number) const { return base + kOffsetBarriers + 8 * number; }
    __device__ __forceinline__ unsigned k_full(int slot) const { return barrier(slot); }
    __device__ __forceinline__ unsigned v_full(int slot) const { return barrier(kKeySlots + slot); }
    __device__ __forceinline__ unsigned kv_empty(int slot) const { return barrier(2 * kKeySlots + slot); }
    __device__ __forceinline__ unsigned q_full(int stage) const { return barrier(3 * kKeySlots + stage); }
    __device__ __forceinline__ unsigned do_full(int stage) const { return barrier(3 * kKeySlots + kStages + stage); }
    __device__ __forceinline__ unsigned stats_full(int stage) const { return barrier(3 * kKeySlots + 2 * kStages + stage); }
    __device__ __forceinline__ unsigned empty(int stage) const { return barrier(3 * kKeySlots + 3 * kStages + stage); }
    __device__ __forceinline__ unsigned ds_full(int buffer) const { return barrier(3 * kKeySlots + 4 * kStages + buffer); }
    __device__ __forceinline__ unsigned ds_empty(int buffer) const { return barrier(3 * kKeySlots + 4 * kStages + 2 + buffer); }
    __device__ __forceinline__ float* stats(int stage) const {
        return reinterpret_cast<float*>(smem + kOffsetStats + stage * StatsRows::kBytes);
    }
    __device__ __forceinline__ Targets& targets() const { return *reinterpret_cast<Targets*>(smem + kOffsetTargets); }

    // ---------------------------------------------------------------------------------------------------------- schedule

    struct Work {
        Coord at;  // head: the first of the group
        Sequence seq;
        int head_kv, run, tiles;  // tiles: of queries
        int first, stop, last;    // query tiles: [first, stop) its own, [first, last) visited
        int shift;                // first key of key tile 0

        __device__ __forceinline__ static Work of(const ForwardParams& p, const BackwardParams& g, const Mask& mask) {
            const int index = static_cast<int>(cta_index()), pairs = g.heads_kv * g.batches, pair = index % pairs;
            Work w;
            w.run = index / pairs;
            w.head_kv = pair % g.heads_kv, w.at.batch = pair / g.heads_kv;
            w.at.head = w.head_kv * p.group;
            w.seq = Sequence::of<Config::kPacked, Config::kLens>(p, w.at.batch);
            w.at.seqlen_q = w.seq.seqlen_q, w.at.seqlen_k = w.seq.seqlen_k;
            w.tiles = (w.at.seqlen_q + kRows - 1) / kRows;
            w.first = min(w.run * g.run, w.tiles), w.stop = min(w.first + g.run, w.tiles);
            w.last = w.stop > w.first ? min(w.stop + kHeld - 1, w.tiles) : w.first;
            w.shift = mask.hi(w.at);
            return w;
        }
        // A key tile's slot, the parity of the phase in which it is filled, and whether its gradients are complete here.
        __device__ __forceinline__ int slot(int n) const { return (n - first + kHeld - 1) % kKeySlots; }
        __device__ __forceinline__ unsigned parity(int n) const { return (n - first + kHeld - 1) / kKeySlots & 1; }
        __device__ __forceinline__ bool owns(int n) const { return (n >= first || first == 0) && n < stop; }
    };
    __device__ __forceinline__ Work work() const { return Work::of(params(), grads(), mask()); }

    // ---------------------------------------------------------------------------------------------------------- producers

    __device__ __forceinline__ void load_keys(const Work& w, int n) const {
        const int slot = w.slot(n), row = w.seq.token_k + n * kRows + w.shift, batch = Config::kPacked ? 0 : w.at.batch;
        mbarrier_wait(kv_empty(slot), w.parity(n) ^ 1);
        Tile::load(base + slot * Tile::kBytes, arguments.maps[kBackwardMapK], k_full(slot), 0, row, w.head_kv, batch);
        Tile::load(base + kOffsetV + slot * Tile::kBytes, arguments.maps[kBackwardMapV], v_full(slot), 0, row, w.head_kv,
                   batch);
    }
    __device__ __forceinline__ void load_tiles() const {
        const Work w = work();
        const int batch = Config::kPacked ? 0 : w.at.batch;
        Slot slot;
        for (int n = w.first - kHeld + 1; n < w.first; n++) load_keys(w, n);
        for (int m = w.first; m < w.last; m++) {
            for (int head = 0; head < params().group; head++) {
                const int row = w.seq.token_q + m * kRows;
                mbarrier_wait(empty(slot.stage), slot.parity ^ 1);
                Tile::load(base + kOffsetQ + slot.stage * Tile::kBytes, arguments.maps[kBackwardMapQ], q_full(slot.stage), 0,
                           row, w.at.head + head, batch);
                Tile::load(base + kOffsetDo + slot.stage * Tile::kBytes, arguments.maps[kBackwardMapDout], do_full(slot.stage),
                           0, row, w.at.head + head, batch);
                Tile::load(base + kOffsetOut + slot.stage * Tile::kBytes, arguments.maps[arguments.kMapOut],
                           do_full(slot.stage), 0, row, w.at.head + head, batch);
                slot.advance();
                if (head == 0 && m < w.stop) load_keys(w, m);
            }
        }
    }
    // Sum of the products of a row of two tiles, from the first 16 bytes of the row. Lanes of rows that follow one another read
    // different banks.
    __device__ __forceinline__ static float row_product(unsigned own, unsigned other) {
        float sums[2] = {0, 0};  // or each product would wait for the last
#pragma unroll
        for (int unit = 0; unit < 8; unit++) {
            const float4 x = ld_shared_v4(own ^ 16 * unit), y = ld_shared_v4(other ^ 16 * unit);
            const float pairs[4] = {x.x, x.y, x.z, x.w}, others[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float2 a = unpack_pair<Element>(__float_as_uint(pairs[n]));
                const float2 b = unpack_pair<Element>(__float_as_uint(others[n]));
                sums[0] = fmaf(a.x, b.x, sums[0]), sums[1] = fmaf(a.y, b.y, sums[1]);
            }
        }
        return sums[0] + sums[1];
    }
    // number: of two. What it overwrites was read before the loader had room for dO.
    __device__ __forceinline__ void guide(int number) const {
        const BackwardParams& g = grads();
        const Targets& own = targets();
        Slot slot;
        // NOTE: unsigned, which takes half the registers where products have 64 bits.
        for (unsigned row = work().first * kRows + lane_index() + 32 * number; row < own.last; row += kRows) {
            for (unsigned head = 0; head < static_cast<unsigned>(params().group); head++) {
                float lse = negative_infinity<float>();
                const bool exists = row < own.rows;
                if (exists) lse = own.lse[head * g.lse_head + row * g.lse_row];
                mbarrier_wait(do_full(slot.stage), slot.parity);
                // NOTE: opaque, or the addresses of its units, and what else follows from a lane's row, are kept in registers.
                const unsigned place = opaque(row) % kRows;
                const unsigned first = opaque(base + kOffsetDo + slot.stage * Tile::kBytes + place * 128 + place % 8 * 16);
                float delta = row_product(first, first + kOffsetOut - kOffsetDo);
                in_order();  // or dlse waits in registers
                if (exists && g.dlse != nullptr) delta -= own.dlse[head * g.dlse_head + row * g.dlse_row];
                const Stats found = lse == negative_infinity<float>() ? Stats::nothing() : Stats::of(lse, delta);
                float* const to = stats(slot.stage) + StatsRows::place(place);
                to[0] = found.lse, to[kRows] = found.delta;
                mbarrier_arrive(stats_full(slot.stage));
                if constexpr (Config::kSinks) {  // whose kernel reads them
                    if (exists && row < own.stop) own.row_stats[head * own.head_rows + row] = found;
                }
                slot.advance();
            }
        }
    }

    // --------------------------------------------------------------------------------------------------------- consumers

    // The window, asked of keys that may lie before the first one.
    struct Inside {
        static constexpr bool kBand = true, kHasStart = true;
        const Mask& mask;

        __device__ __forceinline__ Range column(const Coord& at, int j) const {
            return j < 0 ? Range{kLastRow, kLastRow} : mask.column(at, j);
        }
    };

    // Zeros in rows of a tile outside [start, stop), by the threads of a warpgroup.
    __device__ __forceinline__ void clear_outside(int offset, int start, int stop) const {
        const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll 1
        for (int unit = static_cast<int>(threadIdx.x % 128); unit < 8 * kRows; unit += 128) {
            if (unit / 8 < start || unit / 8 >= stop) *reinterpret_cast<uint4*>(smem + offset + unit * 16) = zero;
        }
    }

    struct Consumer {
        const BackwardWindowSm90& kernel;
        const Work& w;
        int wg, m, n;
        float factor;
        Slot slot;
        DsSlot ds_slot;
        WgmmaTile<64> dk, dv;

        __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }
        __device__ __forceinline__ int first_key() const { return n * kRows + w.shift; }

        __device__ __forceinline__ void start_keys() {
            const int slot = w.slot(n);
            mbarrier_wait(kernel.k_full(slot), w.parity(n));
            mbarrier_wait(kernel.v_full(slot), w.parity(n));
#pragma unroll
            for (int x = 0; x < 32; x++) dk[x] = 0, dv[x] = 0;
            if constexpr (kForeignRows) {
                const int start = -first_key(), stop = w.at.seqlen_k - first_key();
                if (start <= 0 && stop >= kRows) return;
                kernel.clear_outside(slot * Tile::kBytes, start, stop);
                kernel.clear_outside(kOffsetV + slot * Tile::kBytes, start, stop);
                fence_proxy_async();
                bar_sync(kClearBarrier + wg, 128);
            }
        }
        __device__ __forceinline__ void clear_queries() const {
            if constexpr (kForeignRows) {
                const int rows = w.at.seqlen_q - m * kRows;
                if (rows >= kRows) return;
                mbarrier_wait(kernel.do_full(slot.stage), slot.parity);
                kernel.clear_outside(kOffsetQ + slot.stage * Tile::kBytes, 0, rows);
                kernel.clear_outside(kOffsetDo + slot.stage * Tile::kBytes, 0, rows);
                fence_proxy_async();
                bar_sync(kClearBarrier + wg, 128);
            }
        }
        // Whether all queries of the tile see all keys.
        __device__ __forceinline__ bool full() const {
            const Range rows{m * kRows, min((m + 1) * kRows, w.at.seqlen_q)}, keys{first_key(), first_key() + kRows};
            return keys.start >= 0 && keys.stop <= w.at.seqlen_k && kernel.mask().covers(w.at, rows, keys);
        }
        template <bool kChecked>
        __device__ __forceinline__ void find_probabilities(Scores& s) const {
            const auto reader = StatsRows::read(kernel.stats(slot.stage));
            const auto stats = [&](int r) { return Stats{reader.lse(r), 0.0f}; };
            Sums sums;
            score_probabilities<Config, kChecked>(s, w.at, m * kRows, first_key(), 1.0f, factor, Inside{kernel.mask()},
                                                  kernel.arguments.variant.score_mod, stats, sums);
        }
        template <bool kChecked>
        __device__ __forceinline__ void find_gradients(Scores& dp, Scores& p) const {
            const auto reader = StatsRows::read(kernel.stats(slot.stage));
            const auto stats = [&](int r) { return Stats{0.0f, reader.delta(r)}; };
            Sums sums;
            probability_gradients<Config, kChecked>(dp, p, w.at, m * kRows, first_key(), Inside{kernel.mask()},
                                                    kernel.arguments.variant.score_mod, stats, sums);
        }

        // One query tile of one head against this warpgroup's key tile.
        __device__ __forceinline__ void step(int head) {
            // NOTE: opaque, or descriptors are hoisted out of the loop into registers that it needs.
            const unsigned start = opaque(kernel.base);
            const int stage = slot.stage;
            const unsigned q = start + kOffsetQ + stage * Tile::kBytes, dout = start + kOffsetDo + stage * Tile::kBytes;
            const unsigned k = start + w.slot(n) * Tile::kBytes, v = k + kOffsetV;
            Scores s, dp;
            unsigned p_operand[Scores::kSize / 2], ds_operand[Scores::kSize / 2];
            clear_queries();
            wgmma_pin(s.data);
            wgmma_fence();
            wgmma_qk<Element, 64, Tile, Tile>(s, Tile::k_major(k), Tile::k_major(q));
            mbarrier_wait(kernel.do_full(stage), slot.parity);
            wgmma_pin(dp.data);
            wgmma_fence();
            wgmma_qk<Element, 64, Tile, Tile>(dp, Tile::k_major(v), Tile::k_major(dout));
            mbarrier_wait(kernel.stats_full(stage), slot.parity);
            const bool all = full();
            wgmma_wait_group<1>();
            wgmma_pin(s.data);
            if (all) {
                find_probabilities<false>(s);
            } else {
                find_probabilities<true>(s);
            }
            pack_operand<Element>(p_operand, s);
            wgmma_pin(p_operand);
            wgmma_pin(dv.data);
            wgmma_fence();
            wgmma_pv<Element, Tile>(dv, p_operand, Tile::mn_major(dout));
            wgmma_wait_group<1>();
            wgmma_pin(dp.data);
            if (all) {
                find_gradients<false>(dp, s);
            } else {
                find_gradients<true>(dp, s);
            }
            pack_operand<Element>(ds_operand, dp);
            const bool whole = m < w.stop;
            const unsigned ds = start + kOffsetDs + ds_slot.stage * kHeld * Tile::kBytes;
            if (whole) {
                mbarrier_wait(kernel.ds_empty(ds_slot.stage), ds_slot.parity ^ 1);
                store_panel(ds + wg * Tile::kBytes, ds_operand);
                fence_proxy_async();
                __syncwarp();
                if (leads()) mbarrier_arrive(kernel.ds_full(ds_slot.stage));
            }
            wgmma_pin(ds_operand);
            wgmma_pin(dk.data);
            wgmma_fence();
            wgmma_pv<Element, Tile>(dk, ds_operand, Tile::mn_major(q));
            wgmma_wait_group<0>();
            wgmma_pin(dv.data);
            wgmma_pin(dk.data);
            wgmma_pin(p_operand);
            wgmma_pin(ds_operand);
            if (leads()) mbarrier_arrive(kernel.empty(stage));
            if (whole && n == m - 1) multiply_dq(start, ds, head);
        }

        __device__ __forceinline__ void multiply_dq(unsigned start, unsigned ds, int head) const {
            WgmmaTile<64> dq;
            mbarrier_wait(kernel.ds_full(ds_slot.stage), ds_slot.parity);
            wgmma_pin(dq.data);
            wgmma_fence();
#pragma unroll
            for (int x = 0; x < kHeld; x++) {
                const unsigned from = ds + (wg + x + kHeld - 1) % kHeld * Tile::kBytes;  // of key tile m - 2 + x
                const unsigned k = start + w.slot(m - kHeld + 1 + x) * Tile::kBytes;
                wgmma_ab<Element, Tile, Tile>(dq, Tile::k_major(from), Tile::mn_major(k), x > 0);
            }
            wgmma_commit_group();
            wgmma_wait_group<0>();
            wgmma_pin(dq.data);
            if (leads()) {
                mbarrier_arrive(kernel.ds_empty(ds_slot.stage));
                if (head + 1 == kernel.params().group) mbarrier_arrive(kernel.kv_empty(w.slot(m - kHeld + 1)));
            }
            const BackwardParams& g = kernel.grads();
            Element* const to = kernel.targets().dq + head * g.dq_head;
            const float scale = static_cast<float>(kernel.params().scale);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = m * kRows + dq.row(2 * half);
                store_row<Element, Config::kVecDq>(dq, half, scale, to + i * g.dq_row, kernel.params().head_dim,
                                                   i < w.at.seqlen_q);
            }
        }
        __device__ __forceinline__ void store() const {
            const ForwardParams& p = kernel.params();
            const BackwardParams& g = kernel.grads();
            const float scale = static_cast<float>(p.scale);
            const Targets to = kernel.targets();
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int j = first_key() + dk.row(2 * half);
                const bool inside = j >= 0 && j < w.at.seqlen_k;
                store_row<Element, Config::kVecDk>(dk, half, scale, to.dk + j * g.dk_row, p.head_dim, inside);
                store_row<Element, Config::kVecDv>(dv, half, 1.0f, to.dv + j * g.dv_row, p.head_dim_v, inside);
            }
        }

        __device__ __forceinline__ void visit_queries() {
            n = w.first - (w.first + kHeld - wg) % kHeld;  // the last of its key tiles up to the first query tile
            for (m = w.first; m < w.last; m++) {
                if (m == n + kHeld) n += kHeld;
                // After its own query tiles the CTA has no more key tiles: those who would take them only keep count.
                const bool busy = n < w.stop;
                if (busy && (m == w.first || m == n)) start_keys();
                for (int head = 0; head < kernel.params().group; head++) {
                    mbarrier_wait(kernel.q_full(slot.stage), slot.parity);
                    if (busy) {
                        step(head);
                    } else if (leads()) {
                        mbarrier_arrive(kernel.empty(slot.stage));
                    }
                    slot.advance();
                    ds_slot.advance();
                }
                if (busy && (m == n + kHeld - 1 || m + 1 == w.last)) {
                    if (leads()) mbarrier_arrive(kernel.kv_empty(w.slot(n)));
                    if (w.owns(n)) store();
                }
            }
        }
    };

    // Zeros for rows [start, stop) of a gradient of `cols` columns, those of every CTA of the sequence and head its share.
    __device__ __forceinline__ static void clear_rows(Element* to, long long pitch, int cols, int start, int stop, int share,
                                                      int shares) {
        for (int x = share * kConsumerThreads + static_cast<int>(threadIdx.x); x < (stop - start) * cols;
             x += shares * kConsumerThreads) {
            to[(start + x / cols) * pitch + x % cols] = Element(0.0f);
        }
    }
    // Keys that no query tile sees, and rows that belong to no sequence.
    __device__ __forceinline__ void clear_unseen(const Work& w) const {
        const ForwardParams& p = params();
        const BackwardParams& g = grads();
        const Targets to = targets();
        const int shares = (p.m_blocks + g.run - 1) / g.run;
        const int before = w.tiles > 0 ? max(0, min((1 - kHeld) * kRows + w.shift, w.at.seqlen_k)) : 0;
        const int after = w.tiles > 0 ? max(0, min(w.tiles * kRows + w.shift, w.at.seqlen_k)) : 0;
        const int ends[2][2] = {{0, before}, {after, w.seq.rows_k}};
#pragma unroll
        for (int x = 0; x < 2; x++) {
            clear_rows(to.dk, g.dk_row, p.head_dim, ends[x][0], ends[x][1], w.run, shares);
            clear_rows(to.dv, g.dv_row, p.head_dim_v, ends[x][0], ends[x][1], w.run, shares);
        }
        if constexpr (kForeignRows) {
            for (int head = 0; head < p.group; head++) {
                clear_rows(to.dq + head * g.dq_head, g.dq_row, p.head_dim, w.at.seqlen_q, w.seq.rows_q, w.run, shares);
                if constexpr (Config::kSinks) {
                    for (int i = w.at.seqlen_q + w.run * kConsumerThreads + static_cast<int>(threadIdx.x); i < w.seq.rows_q;
                         i += shares * kConsumerThreads) {
                        to.row_stats[head * to.head_rows + i] = Stats::nothing();
                    }
                }
            }
        }
    }

    // -------------------------------------------------------------------------------------------------------------- roles

    __device__ __forceinline__ void run() const {
        const int warp = uniform(static_cast<int>(threadIdx.x / 32)), wg = warp / 4;
        const Work w = work();
        if (threadIdx.x == 0) {
            for (int slot = 0; slot < kKeySlots; slot++) {
                mbarrier_init(k_full(slot), 1);
                mbarrier_init(v_full(slot), 1);
                mbarrier_init(kv_empty(slot), 8);
            }
            for (int stage = 0; stage < kStages; stage++) {
                mbarrier_init(q_full(stage), 1);
                mbarrier_init(do_full(stage), 2);
                mbarrier_init(stats_full(stage), 64);
                mbarrier_init(empty(stage), 4 * kHeld);
            }
            for (int buffer = 0; buffer < 2; buffer++) {
                mbarrier_init(ds_full(buffer), 4 * kHeld);
                mbarrier_init(ds_empty(buffer), 4);
            }
            fence_mbarrier_init();
            const BackwardParams& g = grads();
            targets().dq =
                static_cast<Element*>(g.dq) + w.at.batch * g.dq_batch + w.at.head * g.dq_head + w.seq.token_q * g.dq_row;
            targets().dk =
                static_cast<Element*>(g.dk) + w.at.batch * g.dk_batch + w.head_kv * g.dk_head + w.seq.token_k * g.dk_row;
            targets().dv =
                static_cast<Element*>(g.dv) + w.at.batch * g.dv_batch + w.head_kv * g.dv_head + w.seq.token_k * g.dv_row;
            const int batch = Config::kPacked ? 0 : w.at.batch;
            targets().lse =
                static_cast<const float*>(g.lse) + batch * g.lse_batch + w.at.head * g.lse_head + w.seq.token_q * g.lse_row;
            targets().dlse =
                static_cast<const float*>(g.dlse) + batch * g.dlse_batch + w.at.head * g.dlse_head + w.seq.token_q * g.dlse_row;
            targets().row_stats = static_cast<Stats*>(g.row_stats) + w.seq.row + w.at.head * w.seq.head_rows;
            targets().head_rows = w.seq.head_rows, targets().rows = w.at.seqlen_q;
            targets().stop = w.stop * kRows, targets().last = w.last * kRows;
        }
        __syncthreads();
        if (wg == kHeld) {
            setmaxnreg_dec<kProducerRegisters>();
            if (warp == 4 * kHeld && elect_sync()) load_tiles();
            if (warp == 4 * kHeld + 1 || warp == 4 * kHeld + 2) guide(warp - 4 * kHeld - 1);
        } else {
            setmaxnreg_inc<kConsumerRegisters>();
            Consumer consumer{*this, w, wg};
            consumer.factor = static_cast<float>(params().scale * kLog2e);
            consumer.visit_queries();
            clear_unseen(w);
        }
    }
};

}  // namespace cuattn
