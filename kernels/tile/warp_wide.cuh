// Warp products of fp64 tiles, either of them transposed: mma m16n8k8 fed by loads of single elements. See warp_half.cuh for
// the interface.
//
// A lane (g, t) reads elements (g, t) and (g, t + 4) of a fragment, or (t, g) and (t + 4, g) of a transposed one. Rows of a
// tile are 4 elements longer than a multiple of 16, so that the 16 lanes of a transaction hit different banks either way.
#pragma once
#include "tile/mma_wide.cuh"
#include "tile/reg_tile.cuh"
#include "tile/warp_grid.cuh"

namespace cuattn {

template <class Product>
struct WarpWide {
    using Element = typename Product::Element;
    using Accum = Element;
    static constexpr int kParts = 1;
    static constexpr bool kRounds = false;
    using Operand = typename Product::Operand;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, 16, 8>;
    static constexpr int kPadUnits = 4 * sizeof(Element) / 16;
    template <int kRows, int kCols>
    using Tile = SmemTile<Element, kRows, kCols, kPadUnits>;
    template <int kRows, int kCols>
    using ScoreTile = Tile<kRows, kCols>;
    template <int kRows, int kCols>
    using GradientTile = ScoreTile<kRows, kCols>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = RegTile<Accum, kRows / 16, kCols / 8>;

    template <bool kTransA, bool kTransB, int kDepth, int kM, int kN, class ATile, class BTile>
    __device__ __forceinline__ static void multiply(RegTile<Accum, kM, kN>& sums, const ATile& a, int row, const BTile& b,
                                                    int col) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const Element* a0 = kTransA ? a.at(t, row + g) : a.at(row + g, t);
        const Element* b0 = kTransB ? b.at(t, col + g) : b.at(col + g, t);
        constexpr int kRowA = kTransA ? 1 : ATile::kPitch, kDepthA = kTransA ? ATile::kPitch : 1;
        constexpr int kColB = kTransB ? 1 : BTile::kPitch, kDepthB = kTransB ? BTile::kPitch : 1;
#pragma unroll(kDepth <= 32 ? kDepth / 8 : 4)
        for (int k = 0; k < kDepth; k += 8) {
            Operand fa[kM][4];
#pragma unroll
            for (int x = 0; x < 4 * kM; x++) {
                fa[x / 4][x % 4] = Product::operand(a0[(16 * (x / 4) + x % 2 * 8) * kRowA + (k + x % 4 / 2 * 4) * kDepthA]);
            }
#pragma unroll
            for (int u = 0; u < kN; u++) {
                const Operand b_low = Product::operand(b0[8 * u * kColB + k * kDepthB]);
                const Operand b_high = Product::operand(b0[8 * u * kColB + (k + 4) * kDepthB]);
#pragma unroll
                for (int m = 0; m < kM; m++) Product::multiply(sums.data[m][u], fa[m], b_low, b_high);
            }
        }
    }

    template <int kM, int kN, class Tile>
    __device__ __forceinline__ static void store(const RegTile<Accum, kM, kN>& sums, const Tile& tile, int row, int col) {
        struct alignas(2 * sizeof(Element)) Pair {
            Element x, y;
        };
        Element* first = tile.at(row + threadIdx.x % 32 / 4, col + 2 * (threadIdx.x % 4));
#pragma unroll
        for (int x = 0; x < 2 * kM * kN; x++) {
            const int m = x / (2 * kN), u = x / 2 % kN, half = x % 2;
            *reinterpret_cast<Pair*>(first + (16 * m + 8 * half) * Tile::kPitch + 8 * u) = {sums.data[m][u][2 * half],
                                                                                            sums.data[m][u][2 * half + 1]};
        }
    }
};

}  // namespace cuattn
