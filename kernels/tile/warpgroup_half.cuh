// Who holds dq where one or two warpgroups multiply. Of 128 rows and one panel of 64 columns, or of 64 rows and two panels,
// each of two has 64 rows and columns of dq = dS K, so that neither operand is transposed on its way into the product's rows.
// Else they multiply dq^T = K^T dS^T: each has half the panels of 64 columns, and of an odd last panel half the rows.
#pragma once
#include "tile/wgmma_tile.cuh"

namespace cuattn {

// What a warpgroup holds of kRows rows: kShare columns, in whole panels and, of two warpgroups, maybe half the rows of one
// more.
template <int kRows, int kShare>
struct WarpgroupHalfSums {
    static_assert(kShare % 32 == 0 && kShare <= 128);
    static constexpr bool kByRows = false;
    static constexpr int kWhole = kShare / 64, kOdd = kShare % 64 / 32, kParts = kWhole + kOdd;
    using Whole = WgmmaTransposedTile<kRows>;
    using Half = WgmmaTransposedTile<kOdd ? kRows / 2 : 16>;
    static constexpr int kHalf = kWhole * Whole::kSize, kSize = kHalf + kOdd * Half::kSize;
    // A warpgroup's rows of a panel of dS start at a multiple of 8.
    static_assert(kRows % 8 == 0 && (!kOdd || kRows % 16 == 0));
    Whole whole[kWhole > 0 ? kWhole : 1];
    Half half;

    // Of a warpgroup: its panel n, the panel of which it has half the rows, and the first of these.
    __device__ __forceinline__ static constexpr int panel(int warpgroup, int n) { return warpgroup * kWhole + n; }
    static constexpr int kHalfPanel = 2 * kWhole;
    __device__ __forceinline__ static constexpr int half_row(int warpgroup) { return warpgroup * (kRows / 2); }

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

// What a warpgroup holds of two times 64 rows of kCols columns, below each other (kDown) or side by side: one of the two.
template <bool kDown, int kCols = 64>
struct WarpgroupRowSums {
    static constexpr bool kByRows = true;
    static constexpr int kWhole = 1, kOdd = 0, kParts = 1;
    using Whole = WgmmaTile<kCols>;
    static constexpr int kSize = Whole::kSize;
    Whole whole[1];

    __device__ __forceinline__ static constexpr int first_row(int warpgroup) { return kDown ? 64 * warpgroup : 0; }
    __device__ __forceinline__ static constexpr int panel(int warpgroup) { return kDown ? 0 : warpgroup * (kCols / 64); }
    __device__ __forceinline__ static int warpgroup() { return static_cast<int>(threadIdx.x / 128); }
    __device__ __forceinline__ float& operator[](int x) { return whole[0][x]; }
    __device__ __forceinline__ static int row(int x) { return first_row(warpgroup()) + Whole::row(x); }
    __device__ __forceinline__ static int col(int x) { return 64 * panel(warpgroup()) + Whole::col(x); }
};

template <int kRows, int kShare>
struct WarpgroupSums {
    using Type = WarpgroupHalfSums<kRows, kShare>;
};
template <>
struct WarpgroupSums<128, 32> {
    using Type = WarpgroupRowSums<true>;
};
template <>
struct WarpgroupSums<64, 64> {
    using Type = WarpgroupRowSums<false>;
};
template <>
struct WarpgroupSums<64, 128> {
    using Type = WarpgroupRowSums<false, 128>;
};

template <class Element_>
struct WarpgroupHalf {
    using Element = Element_;
    using Accum = float;

    // The sums know themselves where they lie.
    template <bool kTransA, bool kTransB, int kTileRows, int kTileCols, int kWarps>
    struct Grid {
        static_assert((kWarps == 4 || kWarps == 8) && kTileCols % 64 == 0);
        static constexpr int kRows = kTileRows, kCols = kTileCols / (kWarps / 4);
        __device__ __forceinline__ static bool active() { return true; }
        __device__ __forceinline__ static int row() { return 0; }
        __device__ __forceinline__ static int col() { return 0; }
    };
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = typename WarpgroupSums<kRows, kCols>::Type;
};

}  // namespace cuattn
