// A warpgroup's accumulators of 64 x kN elements, and the two products of attention on them.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/wgmma.cuh"
#include "tile/panel_tile.cuh"

namespace cuattn {

template <int kN>
struct WgmmaTile {
    static constexpr int kSize = kN / 2;
    float data[kSize];

    __device__ __forceinline__ float& operator[](int x) { return data[x]; }
    __device__ __forceinline__ static int row(int x) {
        return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) + x % 4 / 2 * 8;
    }
    __device__ __forceinline__ static int col(int x) { return 2 * static_cast<int>(threadIdx.x % 4) + x / 4 * 8 + x % 2; }
};

// Starts s = Q K^T over kDepth columns; `q` and `k` are K-major descriptors of 64 rows of QTile and of a KTile.
template <class Element, int kDepth, class QTile, class KTile>
__device__ __forceinline__ void wgmma_qk(WgmmaTile<KTile::kRows>& s, unsigned long long q, unsigned long long k) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; step++) {
        Wgmma<KTile::kRows, Element>::ss(s.data, q + QTile::k_major_step(step), k + KTile::k_major_step(step), step > 0);
    }
    wgmma_commit_group();
}

// Starts o += P V; `p` holds the probabilities of a tile's keys as operands, `v` is the MN-major descriptor of a VTile.
template <class Element, class VTile>
__device__ __forceinline__ void wgmma_pv(WgmmaTile<VTile::kCols>& o, const unsigned (&p)[VTile::kRows / 4],
                                         unsigned long long v) {
#pragma unroll
    for (int step = 0; step < VTile::kRows / 16; step++) {
        Wgmma<VTile::kCols, Element>::rs(o.data, p + 4 * step, v + VTile::mn_major_step(step));
    }
    wgmma_commit_group();
}

// Four lanes hold two columns each of four groups of eight; afterwards lane i holds all eight columns of group i.
__device__ __forceinline__ void transpose_quad(unsigned (&pairs)[4]) {
    const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const bool upper = (lane & bit) != 0;
            const unsigned received = __shfl_xor_sync(0xffffffffu, upper ? pairs[i] : pairs[i | bit], bit);
            if (upper) {
                pairs[i] = received;
            } else {
                pairs[i | bit] = received;
            }
        }
    }
}

// Stores this thread's elements of row 8 half + row(0) times `factor` to `target`, the start of that row; kVecBytes is what
// its alignment allows. All lanes of a warp take part, those with `inside` store.
template <class Element, int kVecBytes, int kN>
__device__ __forceinline__ void store_row(const WgmmaTile<kN>& o, int half, float factor, Element* target, int cols,
                                          bool inside) {
    const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int u = 0; u < kN / 8; u += 4) {  // 32 columns at a time
        unsigned pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int x = 4 * (u + i < kN / 8 ? u + i : 0) + 2 * half;
            pairs[i] = pack_pair<Element>(o.data[x] * factor, o.data[x + 1] * factor);
        }
        transpose_quad(pairs);
        const int col = 8 * (u + lane);
        if (!inside || col >= cols) continue;
        if (kVecBytes == 16 && col + 8 <= cols) {
            *reinterpret_cast<uint4*>(target + col) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else {
            const Element* elements = reinterpret_cast<const Element*>(pairs);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (col + e < cols) target[col + e] = elements[e];
            }
        }
    }
}

}  // namespace cuattn
