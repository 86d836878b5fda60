// float32 numbers held as two fp16 numbers each, x = 2^e (high + low), 11 significant bits apiece, with one exponent e for many
// of them: such that the largest finite magnitude among them becomes 2^14 to 2^15. A number down to 2^-18 of that magnitude
// keeps its 22 bits, a smaller one an absolute error of 2^-40 of it. None overflows: an infinity or NaN is all high.
//
// PairTile is a tile of them in shared memory: a SwizzledTile in which each run of 32 columns stands as [high | low], 128 bytes
// that the swizzle keeps together, so that low lies 64 bytes beside high. After the rows come kTops words, bits of magnitudes
// whose largest decides e: written by copies, or by the warps that computed the tile.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/special_registers.cuh"
#include "tile/smem_tile.cuh"

namespace cuattn {

constexpr int kTops = 32;  // one word per lane
constexpr unsigned kInfinityBits = 0x7f800000u;

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 <= e <= 127

// |x| as an integer, ordered as the magnitudes are; 0 for infinities and NaN.
__device__ __forceinline__ unsigned finite_bits(float x) {
    const unsigned bits = __float_as_uint(x) & 0x7fffffffu;
    return bits < kInfinityBits ? bits : 0u;
}

// e of the largest of a warp's words, from -126 to 113: powers of two with it and its negative are normal numbers.
__device__ __forceinline__ int pair_exponent(unsigned top) {
    return max(static_cast<int>(__reduce_max_sync(0xffffffffu, top) >> 23) - 127 - 14, -126);
}

// What high leaves over of x. An infinity or NaN is all high.
__device__ __forceinline__ float left_over(float x, float high) {
    return fabsf(x) < __uint_as_float(kInfinityBits) ? x - high : 0.0f;
}

// Two neighbours, scaled, as two words.
struct Pairs {
    unsigned high, low;

    __device__ __forceinline__ static Pairs of(float x, float y) {
        const unsigned high = pack_pair<__half>(x, y);
        const float2 back = unpack_pair<__half>(high);
        return {high, pack_pair<__half>(left_over(x, back.x), left_over(y, back.y))};
    }
};

template <int kRows_, int kCols_>
struct PairTile : SwizzledTile<__half, kRows_, (kCols_ + 31) / 32 * 64> {
    using Storage = SwizzledTile<__half, kRows_, (kCols_ + 31) / 32 * 64>;  // what copies see
    static constexpr int kBytes = Storage::kBytes + 4 * kTops;

    // Of the high part; steps as in SwizzledTile.
    __device__ __forceinline__ static int pair_offset(int row, int col) {
        return Storage::offset(row, col / 32 * 64 + col % 32);
    }
    __device__ __forceinline__ unsigned high(int row, int col) const {
        return smem_address(this->data) + pair_offset(row, col);
    }
    __device__ __forceinline__ static unsigned moved(unsigned address, int rows, int cols) {
        return Storage::moved(address, rows, cols / 32 * 64 + cols % 32);
    }
    static constexpr int pair_shift(int rows, int cols) { return Storage::shift(rows, cols / 32 * 64); }
    __device__ __forceinline__ static unsigned low(unsigned high) { return high ^ 64u; }

    __device__ __forceinline__ unsigned* tops() const {
        return reinterpret_cast<unsigned*>(reinterpret_cast<char*>(this->data) + Storage::kBytes);
    }
    // Called by whole warps.
    __device__ __forceinline__ int exponent() const { return pair_exponent(tops()[lane_index()]); }
};

}  // namespace cuattn
