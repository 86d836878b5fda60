// Dropout as a pure function of (seed, batch, head, i, j): the counter-based generator Philox4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011). cuattn/dropout.py is its replay. One counter serves the eight keys whose
// scores one thread of an MMA fragment holds, so the compiler merges the eight evaluations.
#pragma once
#include "attention/coord.cuh"

namespace cuattn {

struct Philox {
    __device__ __forceinline__ static uint4 generate(unsigned long long seed, uint4 counter) {
        unsigned key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
        for (int round = 0; round < 10; round++) {
            const unsigned hi0 = __umulhi(0xD2511F53u, counter.x), lo0 = 0xD2511F53u * counter.x;
            const unsigned hi1 = __umulhi(0xCD9E8D57u, counter.z), lo1 = 0xCD9E8D57u * counter.z;
            counter = make_uint4(hi1 ^ counter.y ^ key0, lo1, hi0 ^ counter.w ^ key1, lo0);
            key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
        }
        return counter;
    }
};

// Number `slot` of the eight that query i shares with the keys of a group; `threshold` is p * 2^16.
__device__ __forceinline__ bool dropout_keep(unsigned long long seed, int threshold, const Coord& at, int i, unsigned group,
                                             int slot) {
    const uint4 r = Philox::generate(seed, make_uint4(group, i, at.head, at.batch));
    const unsigned word = slot < 4 ? (slot < 2 ? r.x : r.y) : (slot < 6 ? r.z : r.w);
    return static_cast<int>((word >> (16 * (slot & 1))) & 0xffff) >= threshold;
}
// Whether dropout keeps the probability of query i and key j.
__device__ __forceinline__ bool dropout_keep(unsigned long long seed, int threshold, const Coord& at, int i, int j) {
    const unsigned group = (static_cast<unsigned>(j) >> 5) * 4 + ((j & 7) >> 1);
    return dropout_keep(seed, threshold, at, i, group, ((j >> 3) & 3) * 2 + (j & 1));
}
// The same where j.start is an even key of the first eight of 32 and j.step stays in step with it: which keys share a counter
// is then known when the kernel is compiled.
__device__ __forceinline__ bool dropout_keep(unsigned long long seed, int threshold, const Coord& at, int i,
                                             const TileColumn& j) {
    const unsigned group = (static_cast<unsigned>(j.start) >> 5) * 4 + ((j.start & 7) >> 1) + j.step / 32 * 4;
    return dropout_keep(seed, threshold, at, i, group, j.step / 8 % 4 * 2 + j.step % 2);
}

}  // namespace cuattn
