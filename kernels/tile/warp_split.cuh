// Warp products of float32 tiles held as pairs of fp16 numbers (pair_tile.cuh), either tile transposed: three mma m16n8k16 for
// each product; that of two low parts, 2^-22 of the whole, is left out. See warp_half.cuh for the interface.
//
// NOTE: a tensor core truncates each sum where an addition would round, always towards zero, and a long chain of products into
// one accumulator drifts. A product is therefore summed apart from what it is added to, its small parts apart from the large
// one, and along head dimensions, which scores put into an exponent, in runs of kRun.
#pragma once
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/pair_tile.cuh"
#include "tile/reg_tile.cuh"
#include "tile/warp_grid.cuh"

namespace cuattn {

struct WarpSplit {
    using Element = __half;
    using Accum = float;
    static constexpr int kParts = 2, kRun = 32;
    static constexpr bool kRounds = false;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, 16, 16>;
    template <int kRows, int kCols>
    using Tile = PairTile<kRows, kCols>;
    template <int kRows, int kCols>
    using ScoreTile = Tile<kRows, kCols>;
    template <int kRows, int kCols>
    using GradientTile = ScoreTile<kRows, kCols>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = RegTile<float, kRows / 16, kCols / 8>;

    struct Fragment {
        unsigned high[4], low[4];
    };
    template <bool kTrans>
    __device__ __forceinline__ static void load(Fragment& f, unsigned high, unsigned low) {
        if constexpr (kTrans) {
            ldmatrix_x4_trans(f.high, high);
            ldmatrix_x4_trans(f.low, low);
        } else {
            ldmatrix_x4(f.high, high);
            ldmatrix_x4(f.low, low);
        }
    }

    // Within a run of kSpan columns that starts at a multiple of kSpan, a step sideways is an exclusive or.
    static constexpr bool steps_by_xor(int span) { return span == 16 || span % 32 == 0; }

    // Depths k0 to k0 + kDepth - 1, column blocks u0 to u0 + kWide - 1 of kN.
    template <bool kTransA, bool kTransB, int kDepth, int kN, int kM, int kWide, class ATile, class BTile>
    __device__ __forceinline__ static void accumulate(float (&large)[kM][kWide][4], float (&small)[kM][kWide][4],
                                                      const ATile& a, int row, const BTile& b, int col, int u0, int k0) {
        const int lane = threadIdx.x % 32;
        constexpr bool kXorA = !kTransA || steps_by_xor(16 * kM), kXorB = !kTransB || steps_by_xor(8 * kN);
        // Of the first fragment. A transposed tile is read with depth as its rows.
        const unsigned a0 = kTransA ? ATile::moved(a.high(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), 0, kXorA ? row : 0)
                                    : ATile::moved(a.high(lane % 16, lane / 16 * 8), row, 0);
        const unsigned b0 = kTransB ? BTile::moved(b.high(lane % 16, lane / 16 * 8), 0, kXorB ? col : 0)
                                    : BTile::moved(b.high(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), col, 0);
        const unsigned a1 = ATile::low(a0), b1 = BTile::low(b0);
#pragma unroll 2
        for (int k = k0; k < k0 + kDepth; k += 16) {
            Fragment fa[kM];
#pragma unroll
            for (int m = 0; m < kM; m++) {
                const int rows = kTransA ? k : 16 * m, cols = kTransA ? 16 * m + (kXorA ? 0 : row) : k;
                load<kTransA>(fa[m], ATile::moved(a0, rows, cols), ATile::moved(a1, rows, cols));
            }
#pragma unroll
            for (int u = 0; u < kWide; u += 2) {
                const int rows = kTransB ? k : 8 * (u0 + u), cols = kTransB ? 8 * (u0 + u) + (kXorB ? 0 : col) : k;
                Fragment fb;
                load<kTransB>(fb, BTile::moved(b0, rows, cols), BTile::moved(b1, rows, cols));
#pragma unroll
                for (int part = 0; part < 3; part++) {
#pragma unroll
                    for (int x = 0; x < 2 * kM; x++) {
                        const int m = x / 2, i = x % 2;
                        const auto& left = part == 0 ? fa[m].low : fa[m].high;
                        const auto& right = part == 1 ? fb.low : fb.high;
                        mma_m16n8k16(part == 2 ? large[m][u + i] : small[m][u + i], left, right[2 * i], right[2 * i + 1],
                                     __half());
                    }
                }
            }
        }
    }

    template <bool kTransA, bool kTransB, int kDepth, int kM, int kN, class ATile, class BTile>
    __device__ __forceinline__ static void multiply(RegTile<float, kM, kN>& sums, const ATile& a, int row, const BTile& b,
                                                    int col) {
        static_assert(kDepth % 16 == 0 && kN % 2 == 0);
        constexpr bool kRuns = !kTransA && !kTransB && kDepth > kRun;
        // Registers hold the sums of so many column blocks.
        constexpr int kWide = kM * kN > 8 && kN % 4 == 0 ? kN / 2 : kN;
        // One power of two may be out of range where the result is not.
        const int e = a.exponent() + b.exponent();
        const float unit = power_of_two(e / 2), rest = power_of_two(e - e / 2);
#pragma unroll
        for (int u = 0; u < kN; u += kWide) {
            float large[kM][kWide][4] = {}, small[kM][kWide][4] = {};
            if constexpr (kRuns) {
                static_assert(kDepth % kRun == 0);
#pragma unroll 1
                for (int k = 0; k < kDepth; k += kRun) {
                    float run[kM][kWide][4] = {};
                    accumulate<kTransA, kTransB, kRun, kN>(run, small, a, row, b, col, u, k);
#pragma unroll
                    for (int x = 0; x < 4 * kM * kWide; x++) {
                        const int m = x / (4 * kWide), i = x / 4 % kWide;
                        large[m][i][x % 4] += run[m][i][x % 4];
                    }
                }
            } else {
                accumulate<kTransA, kTransB, kDepth, kN>(large, small, a, row, b, col, u, 0);
            }
#pragma unroll
            for (int x = 0; x < 4 * kM * kWide; x++) {
                const int m = x / (4 * kWide), i = x / 4 % kWide;
                const float top = large[m][i][x % 4];
                // What multiplies an infinity has a low part of any sign.
                const float sum = fabsf(top) < __uint_as_float(kInfinityBits) ? top + small[m][i][x % 4] : top;
                sums.data[m][u + i][x % 4] += sum * unit * rest;
            }
        }
    }

    // What the sums contribute to the exponent of a tile: before a barrier among the warps of Grid, which come to `store`.
    template <class Grid, class Accumulators, class Tile>
    __device__ __forceinline__ static void measure(Accumulators& sums, const Tile& tile) {
        constexpr int kWords = kTops / (Grid::kDown * Grid::kAcross);
        static_assert(kWords * Grid::kDown * Grid::kAcross == kTops);
        unsigned top = 0;
#pragma unroll
        for (int x = 0; x < Accumulators::kSize; x++) top = max(top, finite_bits(sums[x]));
        top = __reduce_max_sync(0xffffffffu, top);
        if (lane_index() < kWords) tile.tops()[threadIdx.x / 32 * kWords + lane_index()] = top;
    }

    template <int kM, int kN, class Tile>
    __device__ __forceinline__ static void store(const RegTile<float, kM, kN>& sums, const Tile& tile, int row, int col) {
        const int lane = threadIdx.x % 32;
        constexpr bool kXor = steps_by_xor(8 * kN);
        const float unit = power_of_two(-tile.exponent());
        const int offset = Tile::pair_offset(row + lane / 4, 2 * (lane % 4) + (kXor ? col : 0));
        char* data = reinterpret_cast<char*>(tile.data);
#pragma unroll
        for (int m = 0; m < kM; m++) {
#pragma unroll
            for (int u = 0; u < kN; u++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int cols = 8 * u + (kXor ? 0 : col);
                    const int at = (offset ^ (cols % 32 * 2)) + Tile::pair_shift(16 * m + 8 * half, cols);
                    const Pairs pairs = Pairs::of(sums.data[m][u][2 * half] * unit, sums.data[m][u][2 * half + 1] * unit);
                    *reinterpret_cast<unsigned*>(data + at) = pairs.high;
                    *reinterpret_cast<unsigned*>(data + (at ^ 64)) = pairs.low;
                }
            }
        }
    }
};

}  // namespace cuattn
