// Forward on tensor cores through mma.sync and cp.async: 16-bit, tf32 and fp64 elements, and float32 as pairs of fp16, sm_80
// and up.
//
//   S = scale * Q K^T, modified and masked     P = exp(S - lse)     O = P V        (FlashAttention-2, algorithm 1)
//
// A CTA takes kBlockM queries of one head; each warp kM * 16 of them, with all of the tile's keys, so that a row's softmax
// stays inside four lanes. Probabilities go from accumulators to operands without leaving the registers.
//
// Shared memory   sQ (kBlockM x D) | kStages x { sK (kBlockN x D), sV (kBlockN x Dv) }; O is staged over all of it at the end
// Pipeline        kStages = 1: V of this tile loads under Q K^T, K of the next under softmax and P V
//                 kStages = 2: K and V of the next tile load under the whole of this one
// Loop            wait K; S = Q K^T; modify, mask; online softmax; wait V; O = O * shrink + P V
#pragma once
#include "attention/scores.cuh"
#include "attention/softmax.cuh"
#include "mainloop/epilogue.cuh"
#include "mainloop/split_input.cuh"
#include "mainloop/work.cuh"
#include "tile/copy.cuh"
#include "tile/gemm.cuh"
#include "tile/reg_tile.cuh"

namespace cuattn {

template <class Config>
struct ForwardSm80 {
    using Mma = typename Config::Mma;
    using Element = typename Mma::Element;    // of what is multiplied
    using Output = typename Config::Element;  // of out: float where inputs are pairs of __half
    using Real = typename Mma::Accum;
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kThreads = Config::kThreads;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV, kStages = Config::kStages;
    static constexpr int kWarpRows = kBlockM / (kThreads / 32);
    static constexpr int kM = kWarpRows / 16, kN = kBlockN / 8, kNv = kHeadDimV / 8;
    static_assert(kWarpRows % 16 == 0 && (kStages == 1 || kStages == 2));

    using QTile = typename Mma::template QTile<kBlockM, kHeadDim>;
    using KTile = typename Mma::template KTile<kBlockN, kHeadDim>;
    using VTile = typename Mma::template VTile<kBlockN, kHeadDimV>;
    using OTile = SmemTile<Output, kBlockM, kHeadDimV, 1>;
    static constexpr bool kSplitInput = Mma::kParts > 1;  // see mainloop/split_input.cuh
    static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
    static_assert(QTile::kBytes + kStages * kStageBytes <= Config::kSmemBytes && OTile::kBytes <= Config::kSmemBytes,
                  "the plan's shared memory is too small");

    const ForwardParams& p;
    const Mask& mask;
    const ScoreMod& score_mod;
    char* smem;
    RegTile<Real, kM, kNv> o;
    RowState<Real> rows[kM][2];
    Real split_scale;  // kSplitInput: of the scores, with the exponents of q and k (and log2(e) where the scale is folded)

    __device__ __forceinline__ QTile sQ() const { return {reinterpret_cast<Element*>(smem)}; }
    __device__ __forceinline__ KTile sK(int stage) const {
        return {reinterpret_cast<Element*>(smem + QTile::kBytes + stage * kStageBytes)};
    }
    __device__ __forceinline__ VTile sV(int stage) const {
        return {reinterpret_cast<Element*>(smem + QTile::kBytes + stage * kStageBytes + KTile::kBytes)};
    }
    __device__ __forceinline__ static int warp_row() { return static_cast<int>(threadIdx.x / 32) * kWarpRows; }
    // What turns a score into the exponent of 2.
    __device__ __forceinline__ Real factor() const {
        if constexpr (kSplitInput && Config::kFoldScale) return split_scale;
        return exponent_factor<Config, Real>(p);
    }
    // What turns a product of q and k into a score, where that is not left to factor().
    __device__ __forceinline__ Real scale() const {
        if constexpr (kSplitInput) return split_scale;
        return static_cast<Real>(p.scale);
    }
    __device__ __forceinline__ void set_split_scale(const Work& w) {
        const auto slots = SplitSlots<Config>::of(p);
        const double exponents = static_cast<double>(power_of_two(split_exponent(p, slots.q(w.at.batch, w.at.head)))) *
                                 power_of_two(split_exponent(p, slots.k(w.at.batch, w.head_kv)));
        const float x = static_cast<float>(p.scale * (Config::kFoldScale ? kLog2e : 1.0) * exponents);
        // A folded scale of 0 would turn the first maximum, -inf, into NaN; an infinite one scores of 0.
        split_scale = fminf(fmaxf(x, Config::kFoldScale ? 1.17549435e-38f : -3.40282347e38f), 3.40282347e38f);
    }
    __device__ __forceinline__ int cols_v(const Work& w) const { return min(kHeadDimV, p.head_dim_v - w.dv_start); }
    __device__ __forceinline__ Work work() const { return Work::of<Config>(p); }

    // Where inputs are pairs, strides count rows (32 bits hold them) and a row has a length that is known here.
    static constexpr int kPitch = kSplitInput ? QTile::kCols : 0, kPitchV = kSplitInput ? VTile::kCols : 0;
    __device__ __forceinline__ int pair_row(const Work& w) const { return static_cast<int>(w.seq.k + w.head_kv * p.k_head); }

    __device__ __forceinline__ void load_q(const Work& w) const {
        const int start = w.m_block * kBlockM;
        const long long offset = w.seq.q + w.at.head * p.q_head + start * p.q_row;
        const Element* q = static_cast<const Element*>(p.q) + offset * (kSplitInput ? kPitch : 1);
        load_tile<kThreads, Config::kVecQ>(sQ(), q, kSplitInput ? kPitch : p.q_row, w.at.seqlen_q - start,
                                           kSplitInput ? kPitch : p.head_dim);
    }
    __device__ __forceinline__ void load_k(const Work& w, int n, int stage) const {
        const Element* k = static_cast<const Element*>(p.k);
        if constexpr (kSplitInput) {
            k += static_cast<long long>(pair_row(w) + n * kBlockN) * kPitch;
        } else {
            k += w.seq.k + w.head_kv * p.k_head + n * kBlockN * p.k_row;
        }
        const int cols = kSplitInput ? kPitch : p.head_dim;
        load_tile<kThreads, Config::kVecK>(sK(stage), k, kSplitInput ? kPitch : p.k_row, w.at.seqlen_k - n * kBlockN, cols);
    }
    __device__ __forceinline__ void load_v(const Work& w, int n, int stage) const {
        const Element* v = static_cast<const Element*>(p.v);
        if constexpr (kSplitInput) {
            const int chunk = Config::kOneChunk ? 0 : w.dv_start / kHeadDimV * static_cast<int>(pair_rows_kv<Config>(p));
            v += static_cast<long long>(chunk + pair_row(w) + n * kBlockN) * kPitchV;
        } else {
            v += w.seq.v + w.head_kv * p.v_head + n * kBlockN * p.v_row + w.dv_start;
        }
        const int cols = kSplitInput ? kPitchV : cols_v(w);
        load_tile<kThreads, Config::kVecV>(sV(stage), v, kSplitInput ? kPitchV : p.v_row, w.at.seqlen_k - n * kBlockN, cols);
    }

    __device__ __forceinline__ void score_and_softmax(RegTile<Real, kM, kN>& s, const Work& w,
                                                      const KeyTiles<Mask, kBlockM, kBlockN>& tiles, int n) {
        const int row0 = w.m_block * kBlockM + warp_row(), col0 = n * kBlockN;
        if (tiles.full(mask, w.at, n)) {
            modify_scores<Config::kFoldScale, false>(s, w.at, row0, col0, scale(), mask, score_mod);
        } else {
            modify_scores<Config::kFoldScale, true>(s, w.at, row0, col0, scale(), mask, score_mod);
        }
        online_softmax(s, o, rows, factor(), static_cast<Real>(Mma::kProbabilityExponent));
        if constexpr (Config::kDropout) drop_probabilities(s, w.at, row0, col0, p.seed, p.dropout_threshold);
    }

    __device__ __forceinline__ void visit_keys(const Work& w) {
        const auto tiles = KeyTiles<Mask, kBlockM, kBlockN>::of(p, mask, w);
        int n = tiles.next(tiles.blocks.start);
#pragma unroll
        for (int x = 0; x < o.kSize; x++) o[x] = 0;
        if (n >= tiles.blocks.stop) return;
        load_q(w);
        load_k(w, n, 0);
        if constexpr (kStages == 2) load_v(w, n, 0);
        cp_async_commit_group();
        for (int stage = 0; n < tiles.blocks.stop; stage ^= kStages - 1) {
            const int following = tiles.next(n + 1);
            cp_async_wait_group<0>();
            __syncthreads();  // this tile's K (kStages 2: and V) is there; nobody reads the buffers loaded next
            if constexpr (kStages == 1) {
                load_v(w, n, 0);
            } else if (following < tiles.blocks.stop) {
                load_k(w, following, stage ^ 1);
                load_v(w, following, stage ^ 1);
            }
            cp_async_commit_group();
            RegTile<Real, kM, kN> s;
            gemm_qk<Mma, kHeadDim>(s.data, sQ(), sK(stage), warp_row());
            if constexpr (kStages == 1) {
                cp_async_wait_group<0>();
                __syncthreads();  // V is there; nobody reads K
                if (following < tiles.blocks.stop) load_k(w, following, 0);
                cp_async_commit_group();
            }
            score_and_softmax(s, w, tiles, n);
            gemm_pv<Mma>(o.data, s.data, sV(stage));
            n = following;
        }
        cp_async_wait_group<0>();
    }

    __device__ __forceinline__ void finish(const Work& w) {
        const int row0 = w.m_block * kBlockM + warp_row(), lane = threadIdx.x % 32;
        Real unit_v = 1;
        if constexpr (kSplitInput) {
            unit_v = power_of_two(split_exponent(p, SplitSlots<Config>::of(p).v(w.at.batch, w.head_kv)));
        }
#pragma unroll
        for (int m = 0; m < kM; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                RowState<Real>& row = rows[m][half];
                row.sum += __shfl_xor_sync(0xffffffffu, row.sum, 1);
                row.sum += __shfl_xor_sync(0xffffffffu, row.sum, 2);
                const Real top = row.max == negative_infinity<Real>()
                                     ? row.max
                                     : row.max * factor() - static_cast<Real>(Mma::kProbabilityExponent);
                const int i = row0 + 16 * m + 8 * half + lane / 4;
                const Real scale = finish_output_row<Config>(p, w, i, top, row.sum, lane % 4 == 0);
#pragma unroll
                for (int e = 0; e < 2 * kNv; e++) {
                    Real& x = o.data[m][e / 2][2 * half + e % 2];
                    x *= scale;
                    if constexpr (kSplitInput) x *= unit_v;  // not by the product of both, which may be subnormal
                }
            }
        }
    }

    __device__ __forceinline__ void store_partial(const Work& w) {
        const int row0 = w.m_block * kBlockM + warp_row();
#pragma unroll
        for (int x = 0; x < o.kSize; x++) {
            const int i = row0 + o.row(x), col = Mma::column(x / 4 % kNv, x % 2);
            if (i < w.at.seqlen_q && col < cols_v(w)) {
                static_cast<Real*>(p.partial_out)[partial_row(p, w, i) * p.head_dim_v + w.dv_start + col] = o[x];
            }
        }
    }

    __device__ __forceinline__ void store_out(const Work& w) {
        const OTile sO{reinterpret_cast<Output*>(smem)};
        __syncthreads();  // nobody reads K or V
#pragma unroll
        for (int x = 0; x < o.kSize; x++) {
            *sO.at(warp_row() + o.row(x), Mma::column(x / 4 % kNv, x % 2)) = static_cast<Output>(o[x]);
        }
        __syncthreads();
        const int start = w.m_block * kBlockM;
        Output* out = static_cast<Output*>(p.out) + w.seq.out + w.at.head * p.out_head + start * p.out_row + w.dv_start;
        store_tile<kThreads, Config::kVecOut>(sO, out, p.out_row, w.at.seqlen_q - start, cols_v(w));
    }

    __device__ __forceinline__ void run() {
        if constexpr (kSplitInput) set_split_scale(work());
        visit_keys(work());
        const Work w = work();
        if (w.m_block * kBlockM < w.at.seqlen_q) {
            finish(w);
            if constexpr (Config::kSplit) {
                store_partial(w);
            } else {
                store_out(w);
            }
        }
        if constexpr (!Config::kSplit) store_padding<Output, Real, kBlockM, kThreads>(p, w, cols_v(w));
    }
};

}  // namespace cuattn
