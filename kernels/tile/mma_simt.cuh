// Warp products of fp32 tiles in FFMA, in the accumulators of MmaHalf; see mma_half.cuh for the interface.
//
// Lane (g, t) has rows g and g + 8 and keys 8 u + 2 t + e of S as there, and four neighbouring columns, 16 c + 4 t ..., of each
// 16 of O. Operands arrive 16 bytes at a time, four depths of a key or four columns of v, and are the same for all g: which
// lane is (g, t) is chosen for the rate of these loads (reg_tile.cuh). The probabilities of a row are spread over its four
// lanes, which hand them around.
#pragma once
#include "tile/reg_tile.cuh"
#include "tile/smem_tile.cuh"

namespace cuattn {

// kHalves: 1 where rows from 8 on do not exist.
template <int kHalves>
struct MmaSimt {
    using Element = float;
    using Accum = float;
    using Lanes = PairedLanes;
    static constexpr int kGroupK = 4, kTilesK = 1, kDepth = 8, kTilesV = 2;
    static constexpr int kParts = 1, kProducts = 1;
    static constexpr bool kPromote = false;
    static constexpr float kProbabilityExponent = 0.0f;
    struct alignas(16) Four {
        float x[4];
    };
    struct Q {
        Four rows[kHalves];  // g, g + 8
    };
    struct K {
        Four keys[2];  // 2 t, 2 t + 1
    };
    struct P {
        float x[kHalves][kDepth];  // rows g, g + 8
    };
    struct V {
        Four keys[kDepth];
    };
    // Eight lanes read two rows of q at one column, or four rows of k that are two apart: both want odd pitches.
    template <int kRows, int kCols>
    using QTile = SmemTile<float, kRows, kCols, odd_padding(kCols / 4)>;
    template <int kRows, int kCols>
    using KTile = QTile<kRows, kCols>;
    template <int kRows, int kCols>
    using VTile = QTile<kRows, kCols>;

    __device__ __forceinline__ static int g() { return Lanes::g(); }
    __device__ __forceinline__ static int t() { return static_cast<int>(threadIdx.x / Lanes::kCol % 4); }
    __device__ __forceinline__ static Four four(const float* from) { return *reinterpret_cast<const Four*>(from); }

    template <class Tile>
    __device__ __forceinline__ static Q load_q(const Tile& tile, int row, int k) {
        const float* from = tile.at(g(), 0) + row * Tile::kPitch + k;
        Q q;
#pragma unroll
        for (int half = 0; half < kHalves; half++) q.rows[half] = four(from + 8 * half * Tile::kPitch);
        return q;
    }
    template <class Tile>
    __device__ __forceinline__ static K load_k(const Tile& tile, int row, int k) {
        const float* from = tile.at(2 * t(), 0) + row * Tile::kPitch + k;
        return {{four(from), four(from + Tile::kPitch)}};
    }
    template <class Tile>
    __device__ __forceinline__ static V load_v(const Tile& tile, int k, int col) {
        const float* from = tile.at(0, 4 * t()) + k * Tile::kPitch + col;
        V v;
#pragma unroll
        for (int j = 0; j < kDepth; j++) v.keys[j] = four(from + j * Tile::kPitch);
        return v;
    }
    template <int kTiles>
    __device__ __forceinline__ static P to_p(const Accum (&p)[kTiles][4], int step) {
        const int first = static_cast<int>(threadIdx.x) & ~(3 * Lanes::kCol);  // lane of the row
        P rows;
#pragma unroll
        for (int x = 0; x < kHalves * kDepth; x++) {
            const int half = x / kDepth, j = x % kDepth;
            rows.x[half][j] = __shfl_sync(0xffffffffu, p[step][2 * half + j % 2], first + j / 2 * Lanes::kCol);
        }
        return rows;
    }
    __device__ __forceinline__ static void multiply_qk(Accum (&s)[4], const Q& q, const K& k, int, int) {
#pragma unroll
        for (int x = 0; x < 8 * kHalves; x++) {
            const int d = x / (2 * kHalves), e = x % (2 * kHalves);
            s[e] += q.rows[e / 2].x[d] * k.keys[e % 2].x[d];
        }
    }
    __device__ __forceinline__ static void multiply_pv(Accum (&o)[4], const P& p, const V& v, int tile, int) {
#pragma unroll
        for (int x = 0; x < 2 * kHalves * kDepth; x++) {
            const int j = x / (2 * kHalves), e = x % (2 * kHalves);
            o[e] += p.x[e / 2][j] * v.keys[j].x[2 * tile + e % 2];
        }
    }
    __device__ __forceinline__ static int column(int u, int e) { return u / 2 * 16 + 4 * t() + u % 2 * 2 + e; }
};

}  // namespace cuattn
