// Warp products of 16-bit elements with fp32 accumulation: mma m16n8k16 fed by ldmatrix.
//
// A policy (this one and MmaWide) names the fragments of one warp's two products and how they come from shared memory.
// g = lane / 4, t = lane % 4 (Lanes); an accumulator tile is 16 x 8 and its column for S is always 8 u + 2 t + e.
//   S = Q K^T   load_q: 16 rows x kGroupK of q;  load_k: kTilesK * 8 keys x kGroupK;  multiply_qk
//   O = P V     to_p: accumulated probabilities of kDepth keys as an operand;  load_v: kDepth keys x kTilesV * 8 columns;
//               multiply_pv;  column: which column of O element e of accumulator tile u is, in this lane
// kProducts instructions make one product, and kParts elements of a tile one of q, k or v (MmaSplit: 3 and 2). kPromote: sums
// over a tile of keys are kept apart from the output. Probabilities are computed times 2^kProbabilityExponent.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/reg_tile.cuh"
#include "tile/smem_tile.cuh"

namespace cuattn {

template <class Element_>
struct MmaHalf {
    using Element = Element_;
    using Accum = float;
    using Lanes = MmaLanes;
    static constexpr int kGroupK = 16, kTilesK = 2, kDepth = 16, kTilesV = 2;
    static constexpr int kParts = 1, kProducts = 1;
    static constexpr bool kPromote = false;
    static constexpr float kProbabilityExponent = 0.0f;
    struct Fragment {
        unsigned r[4];
    };
    using Q = Fragment;
    using K = Fragment;
    using P = Fragment;
    using V = Fragment;
    template <int kRows, int kCols>
    using QTile = SwizzledTile<Element, kRows, kCols>;
    template <int kRows, int kCols>
    using KTile = QTile<kRows, kCols>;
    template <int kRows, int kCols>
    using VTile = QTile<kRows, kCols>;

    template <class Tile>
    __device__ __forceinline__ static Q load_q(const Tile& tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        Q a;
        ldmatrix_x4(a.r, Tile::moved(tile.address(lane % 16, lane / 16 * 8), row, k));
        return a;
    }
    template <class Tile>
    __device__ __forceinline__ static K load_k(const Tile& tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        K b;
        ldmatrix_x4(b.r, Tile::moved(tile.address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8), row, k));
        return b;
    }
    template <class Tile>
    __device__ __forceinline__ static V load_v(const Tile& tile, int k, int col) {
        const int lane = threadIdx.x % 32;
        V b;
        ldmatrix_x4_trans(b.r, Tile::moved(tile.address(lane % 16, lane / 16 * 8), k, col));
        return b;
    }
    // Keys kDepth * step ...; `p` are the accumulator tiles of one row block.
    template <int kTiles>
    __device__ __forceinline__ static P to_p(const Accum (&p)[kTiles][4], int step) {
        const Accum(&x)[4] = p[2 * step];
        const Accum(&y)[4] = p[2 * step + 1];
        return {{pack_pair<Element>(x[0], x[1]), pack_pair<Element>(x[2], x[3]), pack_pair<Element>(y[0], y[1]),
                 pack_pair<Element>(y[2], y[3])}};
    }
    __device__ __forceinline__ static void multiply_qk(Accum (&s)[4], const Q& q, const K& k, int tile, int = 0) {
        mma_m16n8k16(s, q.r, k.r[2 * tile], k.r[2 * tile + 1], Element());
    }
    __device__ __forceinline__ static void multiply_pv(Accum (&o)[4], const P& p, const V& v, int tile, int = 0) {
        mma_m16n8k16(o, p.r, v.r[2 * tile], v.r[2 * tile + 1], Element());
    }
    __device__ __forceinline__ static int column(int u, int e) { return 8 * u + 2 * (threadIdx.x % 4) + e; }
};

}  // namespace cuattn
