// Row statistics of a tile of queries in shared memory: lse of all rows, then delta, in an order in which the four of 16 rows
// that a thread's elements of transposed scores lie in are neighbours.
#pragma once
#include "attention/row_stats.cuh"
#include "ptx/address.cuh"
#include "ptx/shared_memory.cuh"

namespace cuattn {

template <int kRows>
struct StatsTile {
    using Stats = RowStatsOf<float, false>;
    static constexpr int kBytes = 2 * kRows * 4;
    static_assert(kRows % 16 == 0);

    // Where lse of a row lies, kRows before its delta.
    __device__ __forceinline__ static unsigned place(unsigned row) {
        return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
    }
    struct Reader {
        const float4* own;  // of this thread

        __device__ __forceinline__ float at(int r) const {
            const float4 four = own[r / 4 * 4];
            return r % 4 == 0 ? four.x : r % 4 == 1 ? four.y : r % 4 == 2 ? four.z : four.w;
        }
        __device__ __forceinline__ float lse(int r) const { return at(r); }
        __device__ __forceinline__ float delta(int r) const { return at(r + kRows / 4); }
        // Of four rows from r on, a multiple of four, in one load where it is written.
        struct Four {
            float row[4];
        };
        __device__ __forceinline__ Four four(int r) const {
            const float4 x = ld_shared_v4(smem_address(own + r));
            return {{x.x, x.y, x.z, x.w}};
        }
        __device__ __forceinline__ Four lse_of(int r) const { return four(r); }
        __device__ __forceinline__ Four delta_of(int r) const { return four(r + kRows / 4); }
        __device__ __forceinline__ Stats operator()(int r) const { return {lse(r), delta(r)}; }
    };
    // Of rows from `first` on.
    __device__ __forceinline__ static Reader read(const float* tile, int first = 0) {
        return {reinterpret_cast<const float4*>(tile) + first / 4 + threadIdx.x % 4};
    }
};

}  // namespace cuattn
