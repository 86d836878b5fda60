// A warp's accumulators of 16 kM x 8 kN elements, and where each element lies within them.
#pragma once

namespace cuattn {

template <class Accum, int kM, int kN>
struct RegTile {
    static constexpr int kSize = 4 * kM * kN;
    Accum data[kM][kN][4];

    __device__ __forceinline__ Accum& operator[](int x) { return data[x / (4 * kN)][x / 4 % kN][x % 4]; }
    __device__ __forceinline__ static int row(int x) {
        return static_cast<int>(threadIdx.x % 32 / 4) + 16 * (x / (4 * kN)) + x % 4 / 2 * 8;
    }
    __device__ __forceinline__ static int col(int x) { return 2 * static_cast<int>(threadIdx.x % 4) + x / 4 % kN * 8 + x % 2; }
};

}  // namespace cuattn
