// Who holds dq where two warpgroups multiply dq^T = K^T dS^T: 64 columns of dq a warpgroup, and where those are all, half the
// rows.
#pragma once
#include "tile/wgmma_tile.cuh"

namespace cuattn {

template <class Element_>
struct WarpgroupHalf {
    using Element = Element_;
    using Accum = float;

    template <bool kTransA, bool kTransB, int kTileRows, int kTileCols, int kWarps>
    struct Grid {
        static_assert(kWarps == 8 && (kTileCols == 64 || kTileCols == 128));
        static constexpr int kAcross = kTileCols / 64, kDown = 2 / kAcross;
        static constexpr int kRows = kTileRows / kDown, kCols = 64;
        __device__ __forceinline__ static bool active() { return true; }
        __device__ __forceinline__ static int warpgroup() { return static_cast<int>(threadIdx.x / 128); }
        __device__ __forceinline__ static int row() { return kAcross == 1 ? warpgroup() * kRows : 0; }
        __device__ __forceinline__ static int col() { return kAcross == 2 ? warpgroup() * 64 : 0; }
    };
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = WgmmaTransposedTile<kRows>;
};

}  // namespace cuattn
