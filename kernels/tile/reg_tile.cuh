// A warp's accumulators of 16 kM x 8 kN elements, and where each element lies within them.
#pragma once

namespace cuattn {

template <class Accum, int kM, int kN>
struct RegTile {
    static constexpr int kSize = 4 * kM * kN;
    static constexpr bool kPairs = true;  // elements 2 n and 2 n + 1 are neighbours in a row, the first in an even column
    Accum data[kM][kN][4];

    __device__ __forceinline__ Accum& operator[](int x) { return data[x / (4 * kN)][x / 4 % kN][x % 4]; }
    __device__ __forceinline__ static int row(int x) {
        return static_cast<int>(threadIdx.x % 32 / 4) + 16 * (x / (4 * kN)) + x % 4 / 2 * 8;
    }
    __device__ __forceinline__ static int col(int x) { return 2 * static_cast<int>(threadIdx.x % 4) + x / 4 % kN * 8 + x % 2; }

    // A thread's rows and columns, counted from 0, and sums over the lanes that share a row or a column.
    static constexpr int kThreadRows = 2 * kM, kThreadCols = 2 * kN;
    __device__ __forceinline__ static constexpr int thread_row(int x) { return x / (4 * kN) * 2 + x % 4 / 2; }
    __device__ __forceinline__ static constexpr int thread_col(int x) { return x / 4 % kN * 2 + x % 2; }
    __device__ __forceinline__ static int row_at(int r) { return row(r / 2 * 4 * kN + r % 2 * 2); }
    __device__ __forceinline__ static int col_at(int c) { return col(c / 2 * 4 + c % 2); }
    __device__ __forceinline__ static Accum sum_row(Accum x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    }
    __device__ __forceinline__ static Accum sum_col(Accum x) {
        x += __shfl_xor_sync(0xffffffffu, x, 4);
        x += __shfl_xor_sync(0xffffffffu, x, 8);
        return x + __shfl_xor_sync(0xffffffffu, x, 16);
    }
    __device__ __forceinline__ static bool leads_row() { return threadIdx.x % 4 == 0; }
    __device__ __forceinline__ static bool leads_col() { return threadIdx.x % 32 < 4; }
};

}  // namespace cuattn
