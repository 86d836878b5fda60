// Who holds dq where one or two warpgroups multiply dq^T = K^T dS^T: of two each half the columns of dq, or of 64 columns half
// the rows.
#pragma once
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <class Element_>
struct WarpgroupHalf {
    using Element = Element_;
    using Accum = float;

    template <bool kTransA, bool kTransB, int kTileRows, int kTileCols, int kWarps>
    struct Grid {
        static_assert((kWarps == 4 || kWarps == 8) && (kTileCols == 64 || kTileCols == 128 || kTileCols == 256));
        static constexpr int kAcross = kTileCols == 64 ? 1 : kWarps / 4, kDown = kWarps / 4 / kAcross;
        static constexpr int kRows = kTileRows / kDown, kCols = kTileCols / kAcross;
        __device__ __forceinline__ static bool active() { return true; }
        __device__ __forceinline__ static int warpgroup() { return static_cast<int>(threadIdx.x / 128); }
        __device__ __forceinline__ static int row() { return kDown == 2 ? warpgroup() * kRows : 0; }
        __device__ __forceinline__ static int col() { return kAcross == 2 ? warpgroup() * kCols : 0; }
    };
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = WgmmaTransposedPanels<kRows, kCols / 64>;
};

}  // namespace cuattn
