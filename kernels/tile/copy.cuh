// Copies between global memory and tiles in shared memory.
#pragma once
#include "ptx/cp_async.cuh"
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
    const int thread = threadIdx.x;
    // NOTE: opaque, or the multiples of the pitch are hoisted out of the main loop into two registers for each step below.
    asm volatile("" : "+l"(pitch));
    const int row0 = thread / kVecsPerRow, col0 = thread % kVecsPerRow * kVec;
    const unsigned smem0 = smem_address(tile.at(row0, col0));
    const Element* source0 = source + row0 * pitch + col0;
#pragma unroll
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
