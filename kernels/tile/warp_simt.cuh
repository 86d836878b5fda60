// Warp products of fp32 tiles in FFMA, either tile transposed. See warp_half.cuh for the interface.
//
// Lanes form a grid of 4 (ty) x 8 (tx), each with a block of kRows / 4 x kCols / 8 sums. Operands arrive 16 bytes at a time:
// four depths of one row where the tile is [row][depth], so a lane takes every fourth row; four rows at one depth where it is
// [depth][row], so it takes them four by four. Lanes x and x ^ 1, and x and x ^ 2, agree on the address of one of the operands:
// a load in which they do is answered at twice the rate of others.
#pragma once
#include "tile/smem_tile.cuh"
#include "tile/warp_grid.cuh"

namespace cuattn {

// kRuns: rows (columns) of a lane come in runs of four, or else one by one.
template <bool kRowRuns, bool kColRuns, int kRows, int kCols>
struct LaneTile {
    static constexpr int kThreadRows = kRows / 4, kThreadCols = kCols / 8, kSize = kThreadRows * kThreadCols;
    static constexpr bool kPairs = false;
    float data[kThreadRows][kThreadCols];

    __device__ __forceinline__ float& operator[](int x) { return data[x / kThreadCols][x % kThreadCols]; }
    __device__ __forceinline__ static int ty() { return static_cast<int>((threadIdx.x & 1) | (threadIdx.x / 16 % 2 * 2)); }
    __device__ __forceinline__ static int tx() { return static_cast<int>(threadIdx.x / 2 % 8); }
    static constexpr int thread_row(int x) { return x / kThreadCols; }
    static constexpr int thread_col(int x) { return x % kThreadCols; }
    __device__ __forceinline__ static int row_at(int r) { return kRowRuns ? r / 4 * 16 + 4 * ty() + r % 4 : ty() + 4 * r; }
    __device__ __forceinline__ static int col_at(int c) { return kColRuns ? c / 4 * 32 + 4 * tx() + c % 4 : tx() + 8 * c; }
    __device__ __forceinline__ static int row(int x) { return row_at(thread_row(x)); }
    __device__ __forceinline__ static int col(int x) { return col_at(thread_col(x)); }
    __device__ __forceinline__ static float sum_row(float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 2);
        x += __shfl_xor_sync(0xffffffffu, x, 4);
        return x + __shfl_xor_sync(0xffffffffu, x, 8);
    }
    __device__ __forceinline__ static float sum_col(float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 16);
    }
    __device__ __forceinline__ static bool leads_row() { return tx() == 0; }
    __device__ __forceinline__ static bool leads_col() { return ty() == 0; }
};

struct WarpSimt {
    using Element = float;
    using Accum = float;
    static constexpr int kParts = 1;
    static constexpr bool kRounds = false;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, kTransA ? 16 : 4, kTransB ? 32 : 16>;
    template <int kRows, int kCols>
    using Tile = SmemTile<float, kRows, kCols, 1>;
    template <int kRows, int kCols>
    using ScoreTile = SmemTile<float, kRows, kCols, 2>;
    template <int kRows, int kCols>
    using GradientTile = ScoreTile<kRows, kCols>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = LaneTile<kTransA, kTransB, kRows, kCols>;

    __device__ __forceinline__ static void load_four(float* to, const float* from) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }

    template <bool kTransA, bool kTransB, int kDepth, int kRows, int kCols, class ATile, class BTile>
    __device__ __forceinline__ static void multiply(LaneTile<kTransA, kTransB, kRows, kCols>& sums, const ATile& a, int row,
                                                    const BTile& b, int col) {
        using Sums = LaneTile<kTransA, kTransB, kRows, kCols>;
        constexpr int kM = Sums::kThreadRows, kN = Sums::kThreadCols;
        static_assert((!kTransA || kM % 4 == 0) && (!kTransB || kN % 4 == 0));
        const float* a0 = kTransA ? a.at(0, row + Sums::row_at(0)) : a.at(row + Sums::row_at(0), 0);
        const float* b0 = kTransB ? b.at(0, col + Sums::col_at(0)) : b.at(col + Sums::col_at(0), 0);
#pragma unroll(kM* kN >= 64 ? 2 : 4)
        for (int k = 0; k < kDepth; k += 4) {
            if constexpr (kTransA && kTransB) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float x[kM], y[kN];
#pragma unroll
                    for (int i = 0; i < kM; i += 4) load_four(x + i, a0 + (k + e) * ATile::kPitch + 4 * i);
#pragma unroll
                    for (int j = 0; j < kN; j += 4) load_four(y + j, b0 + (k + e) * BTile::kPitch + 8 * j);
                    outer(sums, x, y);
                }
            } else {
                float x[kM][4];
                static_assert(!kTransA, "[depth][row] beside [col][depth] has no use here");
#pragma unroll
                for (int i = 0; i < kM; i++) load_four(x[i], a0 + 4 * i * ATile::kPitch + k);
                if constexpr (kTransB) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float column[kM], y[kN];
#pragma unroll
                        for (int i = 0; i < kM; i++) column[i] = x[i][e];
#pragma unroll
                        for (int j = 0; j < kN; j += 4) load_four(y + j, b0 + (k + e) * BTile::kPitch + 8 * j);
                        outer(sums, column, y);
                    }
                } else {
                    // Two columns at a time, back and forth over the rows, components of both register banks in turns
                    // (mainloop/forward_simt.cuh).
                    float y[2][4];
#pragma unroll
                    for (int z = 0; z < 4 * kM * kN; z++) {
                        const int j = z / (8 * kM) * 2, second = z / kM % 2;
                        const int i = second ? kM - 1 - z % kM : z % kM, e = (z / (2 * kM) % 4) ^ (i % 2);
                        if (z % (8 * kM) == 0) {
                            load_four(y[0], b0 + 8 * j * BTile::kPitch + k);
                            load_four(y[1], b0 + 8 * (j + 1) * BTile::kPitch + k);
                        }
                        sums.data[i][j + second] += x[i][e] * y[second][e];
                    }
                }
            }
        }
    }

    // One column at a time, back and forth over the rows.
    template <class Sums, int kM, int kN>
    __device__ __forceinline__ static void outer(Sums& sums, const float (&x)[kM], const float (&y)[kN]) {
#pragma unroll
        for (int z = 0; z < kM * kN; z++) {
            const int j = z / kM, i = j % 2 == 0 ? z % kM : kM - 1 - z % kM;
            sums.data[i][j] += x[i] * y[j];
        }
    }

    template <class Sums, class Tile>
    __device__ __forceinline__ static void store(Sums& sums, const Tile& tile, int row, int col) {
#pragma unroll
        for (int x = 0; x < Sums::kSize; x++) *tile.at(row + Sums::row(x), col + Sums::col(x)) = sums[x];
    }
};

}  // namespace cuattn
