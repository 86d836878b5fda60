// Copies between global memory and tiles in shared memory.
#pragma once
#include "ptx/cp_async.cuh"
#include "ptx/opaque.cuh"
#include "tile/smem_tile.cuh"

namespace cuattn {

// Loads rows [0, rows) x columns [0, cols) of a row-major array into a tile and writes zero everywhere else in it.
// kVecBytes is what the array's alignment allows: 16, 8 or 4 (cp.async), or 2 (plain loads). The caller commits and waits.
template <int kThreads, int kVecBytes, class Tile>
__device__ __forceinline__ void load_tile(const Tile& tile, const typename Tile::Element* source, long long pitch, int rows,
                                          int cols) {
    using Element = typename Tile::Element;
    constexpr int kVec = kVecBytes / static_cast<int>(sizeof(Element)) > 0 ? kVecBytes / static_cast<int>(sizeof(Element)) : 1;
    constexpr int kVecsPerRow = Tile::kCols / kVec, kVecs = Tile::kRows * kVecsPerRow;
    constexpr bool kEven = kThreads % kVecsPerRow == 0;  // a thread then stays in its column
    // NOTE: opaque, or the steps' addresses are hoisted out of the main loop into registers that it needs.
    const int thread = opaque(static_cast<int>(threadIdx.x));
    pitch = opaque(pitch);
    constexpr bool kWhole = kEven && kVecs % kThreads == 0 && kVecBytes >= 4;
    const int row0 = thread / kVecsPerRow, col0 = thread % kVecsPerRow * kVec;
    const unsigned smem0 = smem_address(tile.at(row0, col0));
    const Element* source0 = source + row0 * pitch + col0;
    if (kWhole && rows >= Tile::kRows && cols >= Tile::kCols) {  // most tiles: nothing to check
#pragma unroll
        for (int start = 0; start < kVecs; start += kThreads) {
            const int row = start / kVecsPerRow;
            cp_async<kVecBytes>(smem0 + row * Tile::kPitch * static_cast<int>(sizeof(Element)), source0 + row * pitch);
        }
        return;
    }
#pragma unroll(kEven && kVecBytes >= 4 ? kVecs / kThreads + 1 : 4)
    for (int start = 0; start < kVecs; start += kThreads) {
        const int index = start + thread;
        const int row = kEven ? row0 + start / kVecsPerRow : index / kVecsPerRow;
        const int col = kEven ? col0 : index % kVecsPerRow * kVec;
        if (kVecs % kThreads != 0 && index >= kVecs) break;
        const Element* from = kEven ? source0 + (start / kVecsPerRow) * pitch : source + row * pitch + col;
        if constexpr (kVecBytes >= 4) {
            const unsigned to = kEven ? smem0 + (start / kVecsPerRow) * Tile::kPitch * static_cast<int>(sizeof(Element))
                                      : smem_address(tile.at(row, col));
            const int valid = row < rows ? max(0, min(kVecBytes, (cols - col) * static_cast<int>(sizeof(Element)))) : 0;
            cp_async<kVecBytes>(to, valid > 0 ? from : source, valid);
        } else {
            *tile.at(row, col) = row < rows && col < cols ? *from : Element(0.0f);
        }
    }
}

// Stores rows [0, rows) x columns [0, cols) of a tile.
template <int kThreads, int kVecBytes, class Tile>
__device__ __forceinline__ void store_tile(const Tile& tile, typename Tile::Element* target, long long pitch, int rows, int cols) {
    using Element = typename Tile::Element;
    constexpr int kVec = kVecBytes / static_cast<int>(sizeof(Element));
    constexpr int kVecsPerRow = Tile::kCols / kVec, kVecs = Tile::kRows * kVecsPerRow;
    for (int index = threadIdx.x; index < kVecs; index += kThreads) {
        const int row = index / kVecsPerRow, col = index % kVecsPerRow * kVec;
        if (row >= rows || col >= cols) continue;
        if (kVecBytes == 16 && col + kVec <= cols) {
            *reinterpret_cast<uint4*>(target + row * pitch + col) = *reinterpret_cast<const uint4*>(tile.at(row, col));
        } else {
#pragma unroll
            for (int e = 0; e < kVec; e++) {
                if (col + e < cols) target[row * pitch + col + e] = *tile.at(row, col + e);
            }
        }
    }
}

}  // namespace cuattn
