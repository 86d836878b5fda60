// Copies between global memory and tiles in shared memory.
#pragma once
#include "ptx/cp_async.cuh"
#include "ptx/opaque.cuh"
#include "tile/smem_tile.cuh"

namespace cuattn {

// Lanes side by side that copy one row's neighbouring vectors: 128 bytes where the row allows.
constexpr int copy_lanes(int vecs_per_row) {
    return vecs_per_row % 8 == 0 ? 8 : vecs_per_row % 4 == 0 ? 4 : vecs_per_row % 2 == 0 ? 2 : 1;
}

// Elements that an access of so many bytes takes.
template <class Element>
constexpr int vec_of(int bytes) {
    return bytes > static_cast<int>(sizeof(Element)) ? bytes / static_cast<int>(sizeof(Element)) : 1;
}
constexpr int lesser(int a, int b) { return a < b ? a : b; }

// Loads rows [0, rows) x columns [0, cols) of a row-major array into a tile and writes zero everywhere else in it.
// kVecBytes is what the array's alignment allows: 16, 8 or 4 (cp.async), or 2 (plain loads). The caller commits and waits.
template <int kThreads, int kVecBytes, class Tile>
__device__ __forceinline__ void load_tile(const Tile& tile, const typename Tile::Element* source, long long pitch, int rows,
                                          int cols) {
    using Element = typename Tile::Element;
    constexpr int kSize = static_cast<int>(sizeof(Element)), kCopyBytes = kVecBytes < 4 ? 4 : kVecBytes;
    constexpr int kVec = kVecBytes > kSize ? kVecBytes / kSize : 1;
    constexpr int kLanes = copy_lanes(Tile::kCopyCols / kVec), kSpan = kLanes * kVec, kPanels = Tile::kCopyCols / kSpan;
    constexpr int kRowStep = kThreads / kLanes, kSteps = (Tile::kRows + kRowStep - 1) / kRowStep;
    constexpr bool kUniform = Tile::is_uniform(kRowStep, kSpan);
    static_assert(kThreads % kLanes == 0);
    // NOTE: opaque, or the steps' addresses are hoisted out of the main loop into registers that it needs.
    const int thread = opaque(static_cast<int>(threadIdx.x));
    pitch = opaque(pitch);
    const int row0 = thread / kLanes, col0 = thread % kLanes * kVec;
    const unsigned smem0 = smem_address(tile.at(row0, col0));
    const Element* source0 = source + row0 * pitch + col0;
    if (kVecBytes >= 4 && kUniform && Tile::kRows % kRowStep == 0 && rows >= Tile::kRows && cols >= Tile::kCols) {
#pragma unroll
        for (int step = 0; step < kSteps; step++, source0 += kRowStep * pitch) {  // most tiles: nothing to check
#pragma unroll
            for (int panel = 0; panel < kPanels; panel++) {
                if (Tile::kCols % kSpan != 0 && col0 + panel * kSpan >= Tile::kCols) break;
                cp_async<kCopyBytes>(smem0 + Tile::shift(step * kRowStep, panel * kSpan), source0 + panel * kSpan);
            }
        }
        return;
    }
#pragma unroll(kVecBytes >= 4 && kSteps <= 8 ? kSteps : 1)
    for (int step = 0; step < kSteps; step++) {
        const int row = row0 + step * kRowStep;
        if (Tile::kRows % kRowStep != 0 && row >= Tile::kRows) break;
        const Element* from = source0 + step * kRowStep * pitch;
#pragma unroll(kPanels <= 4 ? kPanels : 4)
        for (int panel = 0; panel < kPanels; panel++) {
            const int col = col0 + panel * kSpan;
            if (Tile::kCols % kSpan != 0 && col >= Tile::kCols) break;
            if constexpr (kVecBytes >= 4) {
                const int valid = row < rows ? max(0, min(kVecBytes, (cols - col) * kSize)) : 0;
                const unsigned to =
                    kUniform ? smem0 + Tile::shift(step * kRowStep, panel * kSpan) : smem_address(tile.at(row, col));
                cp_async<kVecBytes>(to, valid > 0 ? from + panel * kSpan : source, valid);
            } else {
                *tile.at(row, col) = row < rows && col < cols ? from[panel * kSpan] : Element(0.0f);
            }
        }
    }
}

// Loads of a tile whose rows lie anywhere: kLanes threads side by side copy one row, those of a thread are kStep apart. kWhole:
// rows have as many elements as the tile has columns.
template <int kThreads, int kVecBytes, int kLanes, bool kWhole, class Tile>
struct TileRows {
    using Element = typename Tile::Element;
    static constexpr int kSize = static_cast<int>(sizeof(Element)), kVec = vec_of<Element>(kVecBytes);
    static constexpr int kSpan = kLanes * kVec, kPanels = (Tile::kCopyCols + kSpan - 1) / kSpan;
    static constexpr int kStep = kThreads / kLanes, kSteps = (Tile::kRows + kStep - 1) / kStep;
    static constexpr bool kUniform = Tile::is_uniform(kStep, kSpan);
    static_assert(kThreads % kLanes == 0);

    __device__ __forceinline__ static int row(int step) { return static_cast<int>(threadIdx.x) / kLanes + step * kStep; }
    // The thread's first element in each of its rows.
    __device__ __forceinline__ static int col() { return static_cast<int>(threadIdx.x) % kLanes * kVec; }
    // Where the first of them goes.
    __device__ __forceinline__ static unsigned start(const Tile& tile) { return smem_address(tile.at(row(0), col())); }

    // This thread's share of its row number `step`, from `source`, which begins at col(), or as zero where it does not exist
    // (`source` may then be any address). Columns from `cols` on become zero. The caller commits and waits.
    __device__ __forceinline__ static void load(const Tile& tile, unsigned start, int step, const Element* source, bool exists,
                                                int cols) {
        if (Tile::kRows % kStep != 0 && row(step) >= Tile::kRows) return;
#pragma unroll(kPanels <= 8 ? kPanels : 8)
        for (int panel = 0; panel < kPanels; panel++) {
            const int at = col() + panel * kSpan;
            if (Tile::kCols % kSpan != 0 && at >= Tile::kCols) break;
            if constexpr (kVecBytes >= 4) {
                const int valid = !exists ? 0 : kWhole ? kVecBytes : max(0, min(kVecBytes, (cols - at) * kSize));
                const unsigned to =
                    kUniform ? start + Tile::shift(step * kStep, panel * kSpan) : smem_address(tile.at(row(step), at));
                cp_async<kVecBytes>(to, kWhole || valid > 0 ? source + panel * kSpan : source, valid);
            } else {
                *tile.at(row(step), at) = exists && at < cols ? source[panel * kSpan] : Element(0.0f);
            }
        }
    }
};

// Stores rows [0, rows) x columns [0, cols) of a tile.
template <int kThreads, int kVecBytes, class Tile>
__device__ __forceinline__ void store_tile(const Tile& tile, typename Tile::Element* target, long long pitch, int rows,
                                           int cols) {
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
