// How the warps of a CTA share a tile.
#pragma once
#include "ptx/warpgroup.cuh"

namespace cuattn {

// kWarps warps in a grid over kTileRows x kTileCols, each with whole units of kUnitRows x kUnitCols. Of the grids with the most
// warps, the one whose warps read the fewest operands: the one with the least kRows + kCols. A tile may be too small for all.
template <int kTileRows, int kTileCols, int kWarps, int kUnitRows, int kUnitCols>
struct WarpGrid {
    static constexpr int choose(bool across) {
        int best_down = 0, best_across = 0, least = 0;
        for (int d = 1; d <= kWarps; d++) {
            for (int a = 1; a * d <= kWarps; a++) {
                if (kTileRows % (d * kUnitRows) != 0 || kTileCols % (a * kUnitCols) != 0) continue;
                const int operands = kTileRows / d + kTileCols / a, most = best_down * best_across;
                if (a * d > most || (a * d == most && operands < least)) best_down = d, best_across = a, least = operands;
            }
        }
        return across ? best_across : best_down;
    }
    static constexpr int kDown = choose(false), kAcross = choose(true);
    static_assert(kDown > 0, "no grid of warps fits the tile");
    static constexpr bool kAll = kDown * kAcross == kWarps;
    static constexpr int kRows = kTileRows / kDown, kCols = kTileCols / kAcross;

    // Whether this warp has a place in the grid.
    __device__ __forceinline__ static bool active() { return kAll || threadIdx.x / 32 < kDown * kAcross; }
    // A barrier among the warps that have one.
    __device__ __forceinline__ static void sync() {
        if constexpr (kAll) {
            __syncthreads();
        } else {
            bar_sync(1, 32 * kDown * kAcross);
        }
    }
    __device__ __forceinline__ static int warp_down() { return static_cast<int>(threadIdx.x / 32) / kAcross; }
    __device__ __forceinline__ static int warp_across() { return static_cast<int>(threadIdx.x / 32) % kAcross; }
    __device__ __forceinline__ static int row() { return warp_down() * kRows; }
    __device__ __forceinline__ static int col() { return warp_across() * kCols; }
};

}  // namespace cuattn
