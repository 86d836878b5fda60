// Consumers of backward_sm90.cuh where dk and dv of a key tile take the registers of two warpgroups and nothing but a mask is
// between products and exponentials: a warpgroup each for what leads to dv and to dk.
//
// Products    warpgroup 0: S^T = K Q^T, 64 keys x kBlockM; P^T; dv += P^T dO
//             warpgroup 1: dP^T = V dO^T, likewise;        dS^T; dk += dS^T Q
//             so each operand of S and dP is read from shared memory once, and P^T and dS^T are operands in the registers that
//             hold them. Of dq each multiplies half the columns, from dS in shared memory
// Between     P goes to warpgroup 1 in fp16, each thread's to the thread that holds the same elements of dP; -0 where nothing
//             is visible. Warpgroup 0 takes its part of dq a tile late, when dS has long been there, so that it is at
//             exponentials while the other multiplies
// Barriers    of a stage each:
//             p_full     one lane of each warp of warpgroup 0   4   warpgroup 1
//             p_empty    one lane of each warp of warpgroup 1   4   warpgroup 0
//             ds_full    likewise                               4   both
//             ds_empty   one lane of each consumer warp         8   warpgroup 1
#pragma once
#include "attention/scores.cuh"
#include "mainloop/stats_tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/panel_tile.cuh"
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <class Config, class Kernel>
struct BackwardApart {
    using Element = typename Config::Element;
    using QTile = typename Kernel::QTile;
    using DoTile = typename Kernel::DoTile;
    using KTile = typename Kernel::KTile;
    using VTile = typename Kernel::VTile;
    using DsTile = typename Kernel::DsTile;
    using Scores = typename Kernel::Scores;
    using DqSums = typename Kernel::DqSums;
    using Slab = typename Kernel::Slab;
    using Stats = typename Kernel::Stats;
    using Slot = typename Kernel::Slot;
    using Work = typename Kernel::Work;
    static constexpr int kBlockM = Config::kBlockM, kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV;
    static_assert(Config::kBlockN == 64 && DqSums::kOdd == 0 && Config::kFoldScale);
    static_assert(Scores::kSize * 128 * 2 <= DsTile::kBytes, "P has the place of a tile of dS");

    // Times this, probabilities are passed on without losing bits down to 2^-28.
    static constexpr float kPassed = 1 << 14;

    const Kernel& kernel;
    Coord at;  // head: 0, for a band shows the same to all
    int n;     // key tile
    float factor;
    Slot slot;
    int m, full, slab;  // of the visit at hand, its slab counted from the first of the sequence

    __device__ __forceinline__ static bool leads() { return threadIdx.x % 32 == 0; }

    // Takes over what the guide says of the tile at hand.
    __device__ __forceinline__ void read_visit() {
        mbarrier_wait(kernel.visit_full(slot.stage), slot.parity);
        const auto& visit = kernel.visit(slot.stage);
        m = uniform(visit.m), full = uniform(visit.full);
        slab = uniform(visit.head) * static_cast<int>(kernel.grads().q_slabs) + m;
    }
    // Row statistics of the tile at hand, of a thread's rows. kind: 0 of lse, 1 of delta.
    template <int kKind>
    __device__ __forceinline__ void read_stats(float (&rows)[Scores::kThreadRows]) const {
        const unsigned own = kernel.base + Kernel::kOffsetStats + slot.stage * Kernel::StatsRows::kBytes + kKind * kBlockM * 4 +
                             threadIdx.x % 4 * 16;
#pragma unroll
        for (int r = 0; r < Scores::kThreadRows; r += 4) {
            const float4 four = ld_shared_v4(own + 16 * r);
            rows[r] = four.x, rows[r + 1] = four.y, rows[r + 2] = four.z, rows[r + 3] = four.w;
        }
    }
    __device__ __forceinline__ char* shared_p() const {
        return kernel.smem + Kernel::kOffsetP + slot.stage * DsTile::kBytes + threadIdx.x % 128 * 16;
    }

    // S and P of the tile at hand, for the other warpgroup and as an operand.
    __device__ __forceinline__ void find_probabilities(unsigned (&operand)[Scores::kSize / 2]) {
        const unsigned start = opaque(kernel.base), q = start + Kernel::kOffsetQ + slot.stage * QTile::kBytes;
        Scores s;
        mbarrier_wait(kernel.q_full(slot.stage), slot.parity);
        wgmma_pin(s.data);
        wgmma_fence();
        wgmma_qk<Element, kHeadDim, KTile, QTile>(s, KTile::k_major(start), QTile::k_major(q));
        float lse[Scores::kThreadRows];
        read_stats<0>(lse);
        wgmma_wait_group<0>();
        wgmma_pin(s.data);
        if (leads()) mbarrier_arrive(kernel.q_empty(slot.stage));
        typename Kernel::Sums sums;
        const auto stats = [&](int r) { return Stats{lse[r], 0.0f}; };
        const auto& variant = kernel.arguments.variant;
        if (full) {
            score_probabilities<Config, false>(s, at, m * kBlockM, n * 64, 1.0f, factor, variant.mask, variant.score_mod, stats,
                                               sums);
        } else {
            score_probabilities<Config, true>(s, at, m * kBlockM, n * 64, 1.0f, factor, variant.mask, variant.score_mod, stats,
                                              sums);
        }
        mbarrier_wait(kernel.p_empty(slot.stage), slot.parity ^ 1);
        char* const to = shared_p();
#pragma unroll
        for (int x = 0; x < Scores::kSize; x += 8) {
            unsigned four[4];
#pragma unroll
            for (int i = 0; i < 4; i++) four[i] = pack_pair<__half>(s[x + 2 * i] * kPassed, s[x + 2 * i + 1] * kPassed);
            *reinterpret_cast<uint4*>(to + x / 8 * 2048) = make_uint4(four[0], four[1], four[2], four[3]);
        }
        __syncwarp();
        if (leads()) mbarrier_arrive(kernel.p_full(slot.stage));
        pack_operand<Element>(operand, s);
    }

    // Starts a warpgroup's part of dq, DqSums::kParts groups.
    template <int kGroup>
    __device__ __forceinline__ void start_dq(DqSums& dq, int stage) const {
        const unsigned start = opaque(kernel.base), ds = start + Kernel::kOffsetDs + stage * DsTile::kBytes;
        if constexpr (DqSums::kByRows) {
            wgmma_ab<Element, DsTile, KTile>(dq.whole[0], DsTile::k_major(ds),
                                             KTile::mn_major(start + DqSums::panel(kGroup) * KTile::kPanelBytes), false);
            wgmma_commit_group();
        } else {
#pragma unroll
            for (int x = 0; x < DqSums::kWhole; x++) {
                wgmma_at<Element, KTile, DsTile>(dq.whole[x],
                                                 KTile::descriptor(start + DqSums::panel(kGroup, x) * KTile::kPanelBytes, 16),
                                                 DsTile::k_major(ds));
            }
        }
    }
    __device__ __forceinline__ static void pin(DqSums& dq) {
#pragma unroll
        for (int x = 0; x < DqSums::kWhole; x++) wgmma_pin(dq.whole[x].data);
    }
    // Waits for it, behind which kAfter groups more have been started, and adds it to slab `own`. `late`: the tile's place.
    template <int kAfter>
    __device__ __forceinline__ void add_dq(DqSums& dq, int own, const Slot& late) const {
        float* const to =
            Slab::at(kernel.params(), kernel.grads(), Sequence{}, at, 0, 0) + static_cast<long long>(own) * Slab::kElements;
        if constexpr (Kernel::kDoormen) mbarrier_wait(kernel.turn(late.stage), late.parity);
#pragma unroll
        for (int x = 0; x < DqSums::kWhole; x++) {
            if (x == 0) {
                wgmma_wait_group<DqSums::kParts - 1 + kAfter>();
            } else {
                wgmma_wait_group<kAfter>();
            }
            wgmma_pin(dq.whole[x].data);
            if (x == DqSums::kWhole - 1 && leads()) mbarrier_arrive(kernel.ds_empty(late.stage));
            Slab::add(to, dq.whole[x], x * DqSums::Whole::kSize);
        }
        if constexpr (Kernel::kDoormen) {
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.handed(late.stage));
        }
    }

    template <int kCols>
    __device__ __forceinline__ static void clear(WgmmaTile<kCols>& sums) {
#pragma unroll
        for (int x = 0; x < WgmmaTile<kCols>::kSize; x++) sums[x] = 0;
    }

    // Warpgroup 0.
    __device__ __forceinline__ void find_dv() {
        WgmmaTile<kHeadDimV> dv;
        clear(dv);
        read_visit();
        if (m >= 0) {
            unsigned operand[Scores::kSize / 2];
            mbarrier_wait(kernel.k_full(0), 0);
            find_probabilities(operand);
            mbarrier_wait(kernel.do_full(slot.stage), slot.parity);
            wgmma_pin(operand);
            wgmma_pin(dv.data);
            wgmma_fence();
            wgmma_pv<Element, DoTile>(dv, operand,
                                      DoTile::mn_major(opaque(kernel.base) + Kernel::kOffsetDo + slot.stage * DoTile::kBytes));
            wgmma_wait_group<0>();
            wgmma_pin(dv.data);
            wgmma_pin(operand);
            if (leads()) mbarrier_arrive(kernel.do_empty(slot.stage));
            Slot late = slot;
            int late_slab = slab;
            slot.advance();
            read_visit();
            DqSums dq;
            while (m >= 0) {
                find_probabilities(operand);
                mbarrier_wait(kernel.ds_full(late.stage), late.parity);
                mbarrier_wait(kernel.do_full(slot.stage), slot.parity);
                wgmma_pin(operand);
                wgmma_pin(dv.data);
                pin(dq);
                wgmma_fence();
                start_dq<0>(dq, late.stage);
                wgmma_pv<Element, DoTile>(
                    dv, operand, DoTile::mn_major(opaque(kernel.base) + Kernel::kOffsetDo + slot.stage * DoTile::kBytes));
                add_dq<1>(dq, late_slab, late);
                wgmma_wait_group<0>();
                wgmma_pin(dv.data);
                wgmma_pin(operand);
                if (leads()) mbarrier_arrive(kernel.do_empty(slot.stage));
                late = slot, late_slab = slab;
                slot.advance();
                read_visit();
            }
            mbarrier_wait(kernel.ds_full(late.stage), late.parity);
            pin(dq);
            wgmma_fence();
            start_dq<0>(dq, late.stage);
            add_dq<0>(dq, late_slab, late);
        }
        kernel.template store_apart<false>(dv, n);
    }

    // Warpgroup 1.
    __device__ __forceinline__ void find_dk() {
        WgmmaTile<kHeadDim> dk;
        clear(dk);
        read_visit();
        if (m >= 0) {
            mbarrier_wait(kernel.k_full(0), 0);
            mbarrier_wait(kernel.v_full(0), 0);
        }
        while (m >= 0) {
            const unsigned start = opaque(kernel.base);
            const unsigned dout = start + Kernel::kOffsetDo + slot.stage * DoTile::kBytes;
            const unsigned q = start + Kernel::kOffsetQ + slot.stage * QTile::kBytes;
            Scores dp;
            mbarrier_wait(kernel.do_full(slot.stage), slot.parity);
            wgmma_pin(dp.data);
            wgmma_fence();
            wgmma_qk<Element, kHeadDimV, VTile, DoTile>(dp, VTile::k_major(start + Kernel::kOffsetV), DoTile::k_major(dout));
            float delta[Scores::kThreadRows];
            read_stats<1>(delta);
            wgmma_wait_group<0>();
            wgmma_pin(dp.data);
            if (leads()) mbarrier_arrive(kernel.do_empty(slot.stage));
            Scores p;
            mbarrier_wait(kernel.p_full(slot.stage), slot.parity);
            const char* const from = shared_p();
#pragma unroll
            for (int x = 0; x < Scores::kSize; x += 8) {
                const uint4 eight = *reinterpret_cast<const uint4*>(from + x / 8 * 2048);
                const unsigned four[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 two = unpack_pair<__half>(four[i]);
                    p[x + 2 * i] = two.x / kPassed, p[x + 2 * i + 1] = two.y / kPassed;
                }
            }
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.p_empty(slot.stage));
            typename Kernel::Sums sums;
            const auto stats = [&](int r) { return Stats{0.0f, delta[r]}; };
            const auto& variant = kernel.arguments.variant;
            if (full) {
                probability_gradients<Config, false>(dp, p, at, m * kBlockM, n * 64, variant.mask, variant.score_mod, stats,
                                                     sums);
            } else {
                probability_gradients<Config, true>(dp, p, at, m * kBlockM, n * 64, variant.mask, variant.score_mod, stats,
                                                    sums);
            }
            unsigned operand[Scores::kSize / 2];
            pack_operand<Element>(operand, dp);
            mbarrier_wait(kernel.ds_empty(slot.stage), slot.parity ^ 1);
            store_panel(start + Kernel::kOffsetDs + slot.stage * DsTile::kBytes, operand);
            fence_proxy_async();
            __syncwarp();
            if (leads()) mbarrier_arrive(kernel.ds_full(slot.stage));
            mbarrier_wait(kernel.q_full(slot.stage), slot.parity);
            mbarrier_wait(kernel.ds_full(slot.stage), slot.parity);
            DqSums dq;
            wgmma_pin(operand);
            wgmma_pin(dk.data);
            pin(dq);
            wgmma_fence();
            start_dq<1>(dq, slot.stage);
            wgmma_pv<Element, QTile>(dk, operand, QTile::mn_major(q));
            add_dq<1>(dq, slab, slot);
            wgmma_wait_group<0>();
            wgmma_pin(dk.data);
            wgmma_pin(operand);
            if (leads()) mbarrier_arrive(kernel.q_empty(slot.stage));
            slot.advance();
            read_visit();
        }
        kernel.template store_apart<true>(dk, n);
    }

    __device__ __forceinline__ void run(int wg) {
        if (wg == 0) {
            find_dv();
        } else {
            find_dk();
        }
    }
};

}  // namespace cuattn
