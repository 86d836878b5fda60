// Which tiles of a mask that reads memory are empty, partial or full: two bits per tile, written by tile_map.cu before the
// attention kernel runs. Layout, in 32-bit words: [batch][head][m_block][visible, full][map_words], batch and head strides 0
// where the mask broadcasts; bit n % 32 of word n / 32 is key tile n.
#pragma once
#include "attention/coord.cuh"
#include "params.cuh"

namespace cuattn {

struct TileMap {
    const unsigned* words;  // of this sequence, head and query tile
    int count;

    __device__ __forceinline__ static long long offset(const ForwardParams& p, const Coord& at, int m_block) {
        return at.batch * p.map_batch + at.head * p.map_head + static_cast<long long>(m_block) * 2 * p.map_words;
    }
    __device__ __forceinline__ static TileMap of(const ForwardParams& p, const Coord& at, int m_block) {
        return {p.tile_map + offset(p, at, m_block), p.map_words};
    }
    // The first key tile >= n that is not empty, or `stop`.
    __device__ __forceinline__ int next(int n, int stop) const {
        while (n < stop) {
            const unsigned rest = words[n / 32] >> (n % 32);
            if (rest != 0) return min(n + __ffs(rest) - 1, stop);
            n = (n / 32 + 1) * 32;
        }
        return stop;
    }
    __device__ __forceinline__ bool full(int n) const { return (words[count + n / 32] >> (n % 32)) & 1; }
};

}  // namespace cuattn
