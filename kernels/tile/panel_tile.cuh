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
        return static_cast<unsigned long long>(1 << 30 | 1024 / 16) << 32 |
               (smem / 16 + static_cast<unsigned>(leading / 16 << 16));
    }
    __device__ __forceinline__ static constexpr unsigned long long k_major(unsigned smem) { return descriptor(smem, 16); }
    __device__ __forceinline__ static constexpr unsigned long long mn_major(unsigned smem) {
        return descriptor(smem, kPanelBytes);
    }

    // A descriptor that begins so many units of 16 bytes further. NOTE: a 32-bit addition, as the upper half, which holds no
    // address, stays the same; the compiler would carry into it, a step more before a product can be issued.
    __device__ __forceinline__ static constexpr unsigned long long advance(unsigned long long from, int by) {
        return (from & 0xffffffff00000000ull) | (static_cast<unsigned>(from) + static_cast<unsigned>(by));
    }
    // What to advance a descriptor by for operand step k of 16 columns (K-major) or 16 rows (MN-major), or for another tile.
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

    // Stores a warp's rows 16 warp ... 16 warp + 15, by that warp: row r to target + r * pitch, as far as `rows` and `cols`
    // go; zeros where the tile is not `filled`. kVecBytes is what the alignment of rows allows. `when_read` is called when
    // the tile has been read.
    template <class Element, int kVecBytes, class WhenRead>
    __device__ __forceinline__ static void store_rows(const char* tile, bool filled, int warp, Element* target, long long pitch,
                                                      int rows, int cols, WhenRead when_read) {
        const int lane = static_cast<int>(threadIdx.x % 32), row = 16 * warp + lane / 8;
        Element* to = target + row * pitch + lane % 8 * 8;
        if (kVecBytes == 16 && cols == 64 * kPanels && filled) {  // no branch: all loads and stores may overlap
            uint4 eight[4][kPanels];
#pragma unroll
            for (int r = 0; r < 4; r++) {
#pragma unroll
                for (int panel = 0; panel < kPanels; panel++) {
                    eight[r][panel] = *reinterpret_cast<const uint4*>(tile + offset(row + 4 * r, 8 * panel + lane % 8));
                }
            }
            when_read();
#pragma unroll
            for (int r = 0; r < 4; r++, to += 4 * pitch) {
#pragma unroll
                for (int panel = 0; panel < kPanels; panel++) {
                    if (row + 4 * r < rows) *reinterpret_cast<uint4*>(to + 64 * panel) = eight[r][panel];
                }
            }
            return;
        }
#pragma unroll 1
        for (int r = 0; r < 16 && row + r < rows; r += 4, to += 4 * pitch) {
#pragma unroll 1
            for (int panel = 0; panel < kPanels; panel++) {
                uint4 eight = make_uint4(0, 0, 0, 0);
                if (filled) eight = *reinterpret_cast<const uint4*>(tile + offset(row + r, 8 * panel + lane % 8));
                const Element* elements = reinterpret_cast<const Element*>(&eight);
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    if (64 * panel + lane % 8 * 8 + e < cols) to[64 * panel + e] = elements[e];
                }
            }
        }
        when_read();
    }

    // Writes zero to a row.
    __device__ __forceinline__ static void clear_row(char* tile, int row) {
#pragma unroll 1
        for (int unit = 0; unit < 8 * kPanels; unit++) {
            *reinterpret_cast<uint4*>(tile + unit / 8 * kPanelBytes + row * 128 + unit % 8 * 16) = make_uint4(0, 0, 0, 0);
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
    // The same without a loop whose count differs from thread to thread: behind one, lanes part for the compiler, which puts
    // the descriptors of products into ordinary registers.
    template <int kThreads>
    __device__ __forceinline__ static void clear_rows_together(char* tile, int start, int thread) {
        static_assert(kRows * 8 % kThreads == 0);
#pragma unroll
        for (int first = 0; first < kRows * 8; first += kThreads) {
            const int index = first + thread;
#pragma unroll
            for (int panel = 0; panel < kPanels; panel++) {
                if (index < start * 8) continue;
                *reinterpret_cast<uint4*>(tile + panel * kPanelBytes + index * 16) = make_uint4(0, 0, 0, 0);
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
