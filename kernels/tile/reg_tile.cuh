// A warp's accumulators of 16 kM x 8 kN elements, and where each element lies within them.
#pragma once

namespace cuattn {

// The lanes of a warp as 8 rows x 4 columns, (g, t). In order, as tensor cores have them:
struct MmaLanes {
    static constexpr int kRow[3] = {4, 8, 16}, kCol = 1;  // bits of a lane's number that are g, and the first of two that are t
    __device__ __forceinline__ static int g() { return static_cast<int>(threadIdx.x % 32 / 4); }
};

// Bit 0 is one of g and bit 1 one of t. A load of 16 bytes whose address depends on g alone, or on t alone, is then the same
// for lanes x and x ^ 1, or x and x ^ 2, and answered at twice the rate of others.
struct PairedLanes {
    static constexpr int kRow[3] = {1, 8, 16}, kCol = 2;
    __device__ __forceinline__ static int g() { return static_cast<int>((threadIdx.x & 1) | (threadIdx.x % 32 / 8 * 2)); }
};

template <class Accum, int kM, int kN, class Lanes = MmaLanes>
struct RegTile {
    static constexpr int kSize = 4 * kM * kN;
    static constexpr bool kPairs = true;  // elements 2 n and 2 n + 1 are neighbours in a row, the first in an even column
    Accum data[kM][kN][4];

    __device__ __forceinline__ Accum& operator[](int x) { return data[x / (4 * kN)][x / 4 % kN][x % 4]; }
    __device__ __forceinline__ static int g() { return Lanes::g(); }
    __device__ __forceinline__ static int t() { return static_cast<int>(threadIdx.x / Lanes::kCol % 4); }
    __device__ __forceinline__ static int row(int x) { return g() + 16 * (x / (4 * kN)) + x % 4 / 2 * 8; }
    __device__ __forceinline__ static int col(int x) { return 2 * t() + x / 4 % kN * 8 + x % 2; }

    // A thread's rows and columns, counted from 0, and sums over the lanes that share a row or a column.
    static constexpr int kThreadRows = 2 * kM, kThreadCols = 2 * kN;
    __device__ __forceinline__ static constexpr int thread_row(int x) { return x / (4 * kN) * 2 + x % 4 / 2; }
    __device__ __forceinline__ static constexpr int thread_col(int x) { return x / 4 % kN * 2 + x % 2; }
    __device__ __forceinline__ static int row_at(int r) { return row(r / 2 * 4 * kN + r % 2 * 2); }
    __device__ __forceinline__ static int col_at(int c) { return col(c / 2 * 4 + c % 2); }
    // What the lane has that is n = 1 or 2 columns away.
    __device__ __forceinline__ static Accum across(Accum x, int n) { return __shfl_xor_sync(0xffffffffu, x, n * Lanes::kCol); }
    __device__ __forceinline__ static Accum sum_row(Accum x) {
        x += across(x, 1);
        return x + across(x, 2);
    }
    __device__ __forceinline__ static Accum sum_col(Accum x) {
#pragma unroll
        for (int n = 0; n < 3; n++) x += __shfl_xor_sync(0xffffffffu, x, Lanes::kRow[n]);
        return x;
    }
    __device__ __forceinline__ static bool leads_row() { return t() == 0; }
    __device__ __forceinline__ static bool leads_col() { return g() == 0; }
};

}  // namespace cuattn
