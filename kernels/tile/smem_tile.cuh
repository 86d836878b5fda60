// Tiles in shared memory. Three layouts, each free of bank conflicts for those who read it eight lanes (128 bytes) at a time.
//
// SwizzledTile, for 8- and 16-bit elements and ldmatrix: panels of 128 bytes a row, in which unit u (16 bytes) of row r lies at
// place u ^ (r % 8). A copy of 128 bytes thus stays inside one 128-byte line of shared memory: cp.async into padded
// rows fetches half as many sectors again from L2.
//
// SmemTile, for 32- and 64-bit elements: each row followed by kPadUnits units of 16 bytes. Which padding, depends on who reads:
//   lanes (g, t) of an MMA fragment reading unit t of row g, two rows at a time     pitch % 8 == 4
//   lanes (g, t) reading unit g of rows 2t, two units at a time                     pitch is odd
//   eight rows at one column                                                        pitch is odd
#pragma once
#include "ptx/address.cuh"

namespace cuattn {

template <class Element_, int kRows_, int kCols_, int kPadUnits>
struct SmemTile {
    using Element = Element_;
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kUnit = 16 / sizeof(Element);  // elements per 16 bytes
    static constexpr int kPitch = kCols + kPadUnits * kUnit;
    static constexpr int kBytes = kRows * kPitch * static_cast<int>(sizeof(Element));
    static constexpr int kCopyCols = kCols;  // columns that a copy divides among its lanes
    static_assert(kCols % kUnit == 0, "a row must be whole 16-byte units");

    Element* data;

    __device__ __forceinline__ Element* at(int row, int col) const { return data + row * kPitch + col; }
    // Bytes between two elements, for steps that `is_uniform`.
    static constexpr int shift(int rows, int cols) { return (rows * kPitch + cols) * static_cast<int>(sizeof(Element)); }
    static constexpr bool is_uniform(int, int) { return true; }
    __device__ __forceinline__ unsigned address(int row, int col) const { return smem_address(at(row, col)); }
    __device__ __forceinline__ static unsigned moved(unsigned address, int rows, int cols) {
        return address + shift(rows, cols);
    }
};

template <class Element_, int kRows_, int kCols_>
struct SwizzledTile {
    using Element = Element_;
    static constexpr int kSize = static_cast<int>(sizeof(Element));
    static_assert((kSize == 1 || kSize == 2) && kRows_ % 8 == 0);
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kPanel = 128 / kSize, kUnit = 16 / kSize, kPanelBytes = kRows * 128;
    static constexpr int kCopyCols = (kCols + kPanel - 1) / kPanel * kPanel;
    static constexpr int kBytes = kCopyCols / kPanel * kPanelBytes;

    Element* data;

    __device__ __forceinline__ static int offset(int row, int col) {
        return col / kPanel * kPanelBytes + row * 128 + (col / kUnit % 8 ^ row % 8) * 16 + col % kUnit * kSize;
    }
    __device__ __forceinline__ Element* at(int row, int col) const { return data + offset(row, col) / kSize; }
    __device__ __forceinline__ unsigned address(int row, int col) const { return smem_address(data) + offset(row, col); }
    static constexpr int shift(int rows, int cols) { return rows * 128 + cols / kPanel * kPanelBytes; }
    static constexpr bool is_uniform(int rows, int cols) { return rows % 8 == 0 && cols % kPanel == 0; }
    // The address `rows` (a multiple of 8) down and `cols` (a multiple of two units) to the right of one in the first two units
    // of a panel: one exclusive or, the rest an immediate.
    __device__ __forceinline__ static unsigned moved(unsigned address, int rows, int cols) {
        return (address ^ (cols % kPanel * kSize)) + shift(rows, cols);
    }
};

// For 32-bit elements read by ldmatrix (eight rows at one unit) or as units g, g + 1 of rows t = 0 ... 3: panels of 32 columns,
// 128 bytes a row, in which unit u of row r lies at place u ^ (2 (r % 4) + r / 4 % 2). kParts: of how many narrower numbers
// an element is multiplied as the sum.
template <int kRows_, int kCols_, int kParts_ = 1>
struct SwizzledWideTile {
    using Element = float;
    static constexpr int kParts = kParts_;
    static_assert(kRows_ % 8 == 0);
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kPanel = 32, kPanelBytes = kRows * 128;
    static constexpr int kCopyCols = (kCols + kPanel - 1) / kPanel * kPanel, kBytes = kCopyCols / kPanel * kPanelBytes;

    float* data;

    __device__ __forceinline__ static int offset(int row, int col) {
        const int place = (col / 4 % 8) ^ (row % 4 * 2 + row / 4 % 2);
        return col / kPanel * kPanelBytes + row * 128 + place * 16 + col % 4 * 4;
    }
    __device__ __forceinline__ float* at(int row, int col) const { return data + offset(row, col) / 4; }
    __device__ __forceinline__ unsigned address(int row, int col) const { return smem_address(data) + offset(row, col); }
    static constexpr int shift(int rows, int cols) { return rows * 128 + cols / kPanel * kPanelBytes; }
    static constexpr bool is_uniform(int rows, int cols) { return rows % 8 == 0 && cols % kPanel == 0; }
};

// Padding units that make the pitch odd, or 4 modulo 8.
constexpr int odd_padding(int units) { return units % 2 == 0 ? 1 : 0; }
constexpr int half_padding(int units) { return (12 - units % 8) % 8; }

}  // namespace cuattn
