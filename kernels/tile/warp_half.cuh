// Warp products of two tiles in shared memory, either of them transposed: 16-bit elements, mma m16n8k16 fed by ldmatrix.
//
// A policy (one of warp_*.cuh) names its tiles, the grid of warps over a product, the sums of a warp, and
//   multiply<kTransA, kTransB, kDepth>(sums, a, row, b, col)   sums += A B for the warp's rows and columns from row and col
//   store(sums, tile, row, col)                                the sums as elements of a tile
//   measure<Grid>(sums, tile)                                  where kParts, the elements of a tile for one of an input, are 2:
//                                                              before a barrier and `store`
//   round<kThreads>(tile)                                      where kRounds: what an input becomes before it is multiplied
// A is a tile [row][depth], or with kTransA one [depth][row]; B one [col][depth], or with kTransB one [depth][col].
#pragma once
#include "tile/mma_half.cuh"
#include "tile/reg_tile.cuh"
#include "tile/warp_grid.cuh"

namespace cuattn {

template <class Element_>
struct WarpHalf {
    using Element = Element_;
    using Accum = float;
    static constexpr int kParts = 1;
    static constexpr bool kRounds = false;
    using Mma = MmaHalf<Element>;
    using Fragment = typename Mma::Fragment;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, 16, 16>;
    template <int kRows, int kCols>
    using Tile = SwizzledTile<Element, kRows, kCols>;
    template <int kRows, int kCols>
    using ScoreTile = SwizzledTile<Element, kRows, kCols>;
    template <int kRows, int kCols>
    using GradientTile = ScoreTile<kRows, kCols>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = RegTile<float, kRows / 16, kCols / 8>;

    // Within a run of kSpan columns that starts at a multiple of kSpan, a step sideways is an exclusive or.
    static constexpr bool steps_by_xor(int span) { return span == 16 || span == 32 || span % 64 == 0; }

    template <bool kTransA, bool kTransB, int kDepth, int kM, int kN, class ATile, class BTile>
    __device__ __forceinline__ static void multiply(RegTile<float, kM, kN>& sums, const ATile& a, int row, const BTile& b,
                                                    int col) {
        static_assert(kDepth % 16 == 0 && kN % 2 == 0);
        const int lane = threadIdx.x % 32;
        constexpr bool kXorA = !kTransA || steps_by_xor(16 * kM), kXorB = !kTransB || steps_by_xor(8 * kN);
        // Of the first fragment. A transposed tile is read with depth as its rows.
        const unsigned a0 = kTransA ? ATile::moved(a.address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), 0, kXorA ? row : 0)
                                    : ATile::moved(a.address(lane % 16, lane / 16 * 8), row, 0);
        const unsigned b0 = kTransB ? BTile::moved(b.address(lane % 16, lane / 16 * 8), 0, kXorB ? col : 0)
                                    : BTile::moved(b.address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), col, 0);
#pragma unroll(kDepth <= 128 ? kDepth / 16 : 4)
        for (int k = 0; k < kDepth; k += 16) {
            Fragment fa[kM];
#pragma unroll
            for (int m = 0; m < kM; m++) {
                if constexpr (kTransA) {
                    ldmatrix_x4_trans(fa[m].r, ATile::moved(a0, k, 16 * m + (kXorA ? 0 : row)));
                } else {
                    ldmatrix_x4(fa[m].r, ATile::moved(a0, 16 * m, k));
                }
            }
#pragma unroll
            for (int u = 0; u < kN; u += 2) {
                Fragment fb;
                if constexpr (kTransB) {
                    ldmatrix_x4_trans(fb.r, BTile::moved(b0, k, 8 * u + (kXorB ? 0 : col)));
                } else {
                    ldmatrix_x4(fb.r, BTile::moved(b0, 8 * u, k));
                }
#pragma unroll
                for (int m = 0; m < kM; m++) {
                    mma_m16n8k16(sums.data[m][u], fa[m].r, fb.r[0], fb.r[1], Element());
                    mma_m16n8k16(sums.data[m][u + 1], fa[m].r, fb.r[2], fb.r[3], Element());
                }
            }
        }
    }

    template <int kM, int kN, class Tile>
    __device__ __forceinline__ static void store(const RegTile<float, kM, kN>& sums, const Tile& tile, int row, int col) {
        const int lane = threadIdx.x % 32;
        constexpr bool kXor = steps_by_xor(8 * kN);
        const int offset = Tile::offset(row + lane / 4, 2 * (lane % 4) + (kXor ? col : 0));
        char* data = reinterpret_cast<char*>(tile.data);
#pragma unroll
        for (int m = 0; m < kM; m++) {
#pragma unroll
            for (int u = 0; u < kN; u++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int cols = 8 * u + (kXor ? 0 : col);
                    const int at = (offset ^ (cols % Tile::kPanel * 2)) + Tile::shift(16 * m + 8 * half, cols);
                    *reinterpret_cast<unsigned*>(data + at) =
                        pack_pair<Element>(sums.data[m][u][2 * half], sums.data[m][u][2 * half + 1]);
                }
            }
        }
    }
};

}  // namespace cuattn
