// A tile in shared memory: kRows rows of kCols elements, each row followed by kPadUnits units of 16 bytes.
//
// The padding replaces a swizzle: a constant pitch lets every access of an unrolled loop be one register plus an immediate.
// Which padding is free of bank conflicts depends on who reads, eight lanes (128 bytes) at a time:
//   ldmatrix, or eight rows at one column     the pitch in units is odd
//   lanes (g, t) of an MMA fragment reading unit t of row g, two rows at a time     pitch % 8 == 4
//   lanes (g, t) reading unit g of rows 2t, two units at a time                     pitch is odd
#pragma once

namespace cuattn {

template <class Element_, int kRows_, int kCols_, int kPadUnits>
struct SmemTile {
    using Element = Element_;
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kUnit = 16 / sizeof(Element);  // elements per 16 bytes
    static constexpr int kPitch = kCols + kPadUnits * kUnit;
    static constexpr int kBytes = kRows * kPitch * static_cast<int>(sizeof(Element));
    static_assert(kCols % kUnit == 0, "a row must be whole 16-byte units");

    Element* data;

    __device__ __forceinline__ Element* at(int row, int col) const { return data + row * kPitch + col; }
};

// Padding units that make the pitch odd, or 4 modulo 8.
constexpr int odd_padding(int units) { return units % 2 == 0 ? 1 : 0; }
constexpr int half_padding(int units) { return (12 - units % 8) % 8; }

}  // namespace cuattn
