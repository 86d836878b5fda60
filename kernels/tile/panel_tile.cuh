// Tiles of 16-bit elements as TMA writes and wgmma reads them: panels of 64 columns, each kRows x 128 bytes, in which 16-byte
// unit u of row r lies at place u ^ (r % 8) (128-byte swizzle). Columns are padded to whole panels.
//
// Matrix descriptor: bits 0-13 address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 62-63 swizzle
// (1: 128 bytes). 8 rows are 1024 bytes, which is the stride offset in both orders of the operand:
//   K-major (Q and K: contiguous along the dimension summed over)   the leading offset is unused
//   MN-major (V: contiguous along the other one)                    the leading offset is the distance of two panels
#pragma once
#include "ptx/convert.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace cuattn {

template <int kRows_, int kCols_>
struct PanelTile {
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kPanels = (kCols + 63) / 64, kPanelBytes = kRows * 128, kBytes = kPanels * kPanelBytes;
    static constexpr int kAlignment = 1024;
    static_assert(kRows % 8 == 0 && kRows <= 256 && kCols % 16 == 0);

    __device__ __forceinline__ static constexpr unsigned long long descriptor(unsigned smem, int leading) {
        return static_cast<unsigned long long>((smem & 0x3ffff) / 16) | static_cast<unsigned long long>(leading / 16) << 16 |
               static_cast<unsigned long long>(1024 / 16) << 32 | 1ull << 62;
    }
    __device__ __forceinline__ static constexpr unsigned long long k_major(unsigned smem) { return descriptor(smem, 16); }
    __device__ __forceinline__ static constexpr unsigned long long mn_major(unsigned smem) {
        return descriptor(smem, kPanelBytes);
    }

    // What to add to a descriptor for operand step k of 16 columns (K-major) or 16 rows (MN-major), or for another tile.
    static constexpr int k_major_step(int k) { return (k / 4 * kPanelBytes + k % 4 * 32) / 16; }
    static constexpr int mn_major_step(int k) { return k * 16 * 128 / 16; }
    static constexpr int kTileStep = kBytes / 16;

    // Bytes from the start of the tile to 16-byte unit `unit` of a row.
    __device__ __forceinline__ static int offset(int row, int unit) {
        return unit / 8 * kPanelBytes + row * 128 + (unit % 8 ^ row % 8) * 16;
    }

    // Starts the copy of a tile from coordinates (col, row, head, batch); its arrival completes a phase of the barrier.
    __device__ __forceinline__ static void load(unsigned smem, const TensorMap& map, unsigned barrier, int col, int row,
                                                int head, int batch) {
        mbarrier_arrive_expect_tx(barrier, kBytes);
#pragma unroll
        for (int panel = 0; panel < kPanels; panel++) {
            cp_async_bulk_tensor_4d(smem + panel * kPanelBytes, map, barrier, col + 64 * panel, row, head, batch);
        }
    }

    // Writes zero to rows [start, kRows), by kThreads threads.
    template <int kThreads>
    __device__ __forceinline__ static void clear_rows(char* tile, int start, int thread) {
        for (int index = thread; index < (kRows - start) * 8; index += kThreads) {
#pragma unroll
            for (int panel = 0; panel < kPanels; panel++) {
                *reinterpret_cast<uint4*>(tile + panel * kPanelBytes + start * 128 + index * 16) = make_uint4(0, 0, 0, 0);
            }
        }
    }
};

// The elements of a tile, read by ordinary loads; two neighbours share one.
template <class Element, class Tile>
struct PanelReader {
    const char* tile;

    __device__ __forceinline__ float operator()(int row, int col) const {
        const int offset = col / 64 * Tile::kPanelBytes + row * 128 + ((col % 64 / 8 * 16) ^ (row % 8 * 16)) + col % 8 / 2 * 4;
        const float2 pair = unpack_pair<Element>(*reinterpret_cast<const unsigned*>(tile + offset));
        return col % 2 == 0 ? pair.x : pair.y;
    }
};

}  // namespace cuattn
