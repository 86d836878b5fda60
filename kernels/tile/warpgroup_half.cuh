// Who holds dq where two warpgroups multiply dq^T = K^T dS^T: half its panels of 64 columns each, and of an odd last panel half
// the rows.
#pragma once
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <int kRows, int kCols>
struct WarpgroupHalfSums {
    static_assert(kCols % 64 == 0 && kCols <= 256);
    static constexpr int kWhole = kCols / 128, kOdd = kCols / 64 % 2, kParts = kWhole + kOdd;
    using Whole = WgmmaTransposedTile<kRows>;
    using Half = WgmmaTransposedTile<kRows / 2>;
    static constexpr int kSize = kWhole * Whole::kSize + kOdd * Half::kSize, kHalf = kWhole * Whole::kSize;
    Whole whole[kWhole > 0 ? kWhole : 1];
    Half half;

    // Of a panel, and of the first row of the last one, which this warpgroup multiplies.
    __device__ __forceinline__ static int panel(int warpgroup, int n) { return warpgroup * kWhole + n; }
    static constexpr int kHalfPanel = 2 * kWhole;
    __device__ __forceinline__ static int half_row(int warpgroup) { return warpgroup * (kRows / 2); }

    __device__ __forceinline__ static int warpgroup() { return static_cast<int>(threadIdx.x / 128); }
    __device__ __forceinline__ float& operator[](int x) {
        return x < kHalf ? whole[x / Whole::kSize][x % Whole::kSize] : half[x - kHalf];
    }
    __device__ __forceinline__ static int row(int x) {
        return x < kHalf ? Whole::row(x % Whole::kSize) : half_row(warpgroup()) + Half::row(x - kHalf);
    }
    __device__ __forceinline__ static int col(int x) {
        return x < kHalf ? 64 * panel(warpgroup(), x / Whole::kSize) + Whole::col(x % Whole::kSize)
                         : 64 * kHalfPanel + Half::col(x - kHalf);
    }
};

template <class Element_>
struct WarpgroupHalf {
    using Element = Element_;
    using Accum = float;

    // The sums know themselves where they lie.
    template <bool kTransA, bool kTransB, int kTileRows, int kTileCols, int kWarps>
    struct Grid {
        static_assert(kWarps == 8);
        static constexpr int kRows = kTileRows, kCols = kTileCols;
        __device__ __forceinline__ static bool active() { return true; }
        __device__ __forceinline__ static int row() { return 0; }
        __device__ __forceinline__ static int col() { return 0; }
    };
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = WarpgroupHalfSums<kRows, kCols>;
};

}  // namespace cuattn
