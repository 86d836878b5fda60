// What the parameters of score modifications receive of the gradient of the scores: a bias, reduced to its own shape, and the
// parameter vectors of user code.
//
// kBiasKind, by the axes along which the bias broadcasts:
//   kBiasColumns  over queries: each thread sums its columns over all query tiles of a head, then the CTA adds its threads up.
//                 bias_sum is (q_splits, B, H, Sk), each element written once.
//   kBiasRows     over keys but not over queries: each tile's row sums are added to bias_sum (dq_splits, B, H, Sq).
//   kBiasCells    over neither, but over batches or heads: elements are added to bias_sum, of the shape of the bias.
//   kBiasStore    over nothing: elements are stored into dbias itself.
//   kBiasCopies   over neither, but over a few batches or heads, in backward_sm90: elements are stored into bias_sum
//                 (B, H, Sq, Sk), in the dtype of q.
// backward_bias.cu brings bias_sum to the shape and dtype of the bias.
#pragma once
#include "attention/coord.cuh"
#include "params.cuh"
#include "ptx/red.cuh"
#include "ptx/special_registers.cuh"

namespace cuattn {

enum BiasKind { kBiasNone, kBiasColumns, kBiasRows, kBiasCells, kBiasStore, kBiasCopies };

// Tile: the layout of a warp's scores.
template <class Config, class Tile>
struct ModSums {
    using Real = typename Config::Real;
    static constexpr int kKind = Config::kBiasKind;
    static constexpr bool kEach = kKind >= kBiasCells;  // every element goes to memory

    Real columns[kKind == kBiasColumns ? Tile::kThreadCols : 1];
    Real rows[kKind == kBiasRows ? Tile::kThreadRows : 1];
    Real cells[kEach ? Tile::kSize : 1];
    Real uniform[Config::kUniform > 0 ? Config::kUniform : 1];  // of parameters whose index is the same for a whole head
    int x;                                                      // the element of the tile that is being visited

    __device__ __forceinline__ void clear_head() {
#pragma unroll
        for (Real& sum : uniform) sum = 0;
    }
    __device__ __forceinline__ void clear_tile() {
#pragma unroll
        for (Real& column : columns) column = 0;
#pragma unroll
        for (Real& row : rows) row = 0;
    }
    // Called by score_mod.pull for element x.
    __device__ __forceinline__ void bias(Real ds, int, int) {
        if constexpr (kKind == kBiasColumns) columns[Tile::thread_col(x)] += ds;
        if constexpr (kKind == kBiasRows) rows[Tile::thread_row(x)] += ds;
        if constexpr (kEach) cells[x] = ds;
    }
    // In double precision: many scores may share an element.
    __device__ __forceinline__ void scatter(double* gradient, long long index, Real value) {
        if (value != Real(0)) red_add(gradient + index, static_cast<double>(value));
    }
    // Adds up one of `uniform` over the warp and hands it over.
    __device__ __forceinline__ void hand_over(int n, double* gradient, long long index) {
        double sum = uniform[n];
#pragma unroll
        for (int lane = 1; lane < 32; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        if (lane_index() == 0 && sum != 0) red_add(gradient + index, sum);
    }

    // kEach: the elements of a tile whose first row and column are row0 and col0.
    __device__ __forceinline__ void write_cells(const BackwardParams& g, const Coord& at, int row0, int col0) const {
        if constexpr (kEach) {
            using Target = typename Config::BiasTarget;
            Target* target = static_cast<Target*>(kKind == kBiasStore ? g.dbias : g.bias_sum);
            target += at.batch * (kKind == kBiasStore ? g.bias_batch : g.sum_batch) +
                      at.head * (kKind == kBiasStore ? g.bias_head : g.sum_head);
            const long long pitch = kKind == kBiasStore ? g.bias_q : g.sum_q;
            constexpr bool kPairs = Config::kBiasPairs && Tile::kPairs;
#pragma unroll
            for (int e = 0; e < Tile::kSize; e += kPairs ? 2 : 1) {
                const int i = row0 + Tile::row(e), j = col0 + Tile::col(e);
                if (i >= at.seqlen_q || j >= at.seqlen_k) continue;
                Target* to = target + i * pitch + j;
                if constexpr (kKind == kBiasStore && kPairs) {
                    struct alignas(2 * sizeof(Target)) Pair {
                        Target x, y;
                    };
                    if (j + 1 < at.seqlen_k) {
                        *reinterpret_cast<Pair*>(to) = {static_cast<Target>(cells[e]), static_cast<Target>(cells[e + 1])};
                        continue;
                    }
                    *to = static_cast<Target>(cells[e]);
                } else if constexpr (kKind == kBiasStore) {
                    *to = static_cast<Target>(cells[e]);
                } else if constexpr (kPairs) {  // the row is padded, so its last pair is whole
                    red_add_v2(to, cells[e], j + 1 < at.seqlen_k ? cells[e + 1] : Real(0));
                } else {
                    red_add(to, cells[e]);
                }
            }
        }
    }
};

}  // namespace cuattn
