// Warp products of 32- and 64-bit elements (tf32, fp64), fed by 16-byte loads. See mma_half.cuh for the interface.
//
// ldmatrix transposes 16-bit elements only. Two freedoms make plain 16-byte loads fit the fragments instead. A product does not
// care in which order its depth runs: lane t takes kUnit consecutive depth elements of q and of k alike, and keys 2t, 2t + 1 of
// an accumulated probability tile are depths t, t + 4 of the next product. And the columns of O may be dealt to accumulator
// tiles in any order: lane g takes kUnit consecutive columns of v, one for each of kUnit tiles (`column`).
#pragma once
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"
#include "tile/reg_tile.cuh"
#include "tile/smem_tile.cuh"

namespace cuattn {

// Products of one m16n8k8 step: `Operand` is what an element becomes before it is multiplied.
struct ProductTf32 {
    using Element = float;
    using Operand = float;
    __device__ __forceinline__ static Operand operand(float x) { return nearest_tf32(x); }
    __device__ __forceinline__ static void multiply(float (&d)[4], const Operand (&a)[4], Operand b0, Operand b1) {
        mma_m16n8k8_tf32(d, a, b0, b1);
    }
};

// One instruction on sm_90; four m8n8k4 elsewhere.
template <bool kLargeShape>
struct ProductFp64 {
    using Element = double;
    using Operand = double;
    __device__ __forceinline__ static Operand operand(double x) { return x; }
    __device__ __forceinline__ static void multiply(double (&d)[4], const Operand (&a)[4], Operand b0, Operand b1) {
        if constexpr (kLargeShape) {
            mma_m16n8k8_f64(d, a, b0, b1);
        } else {
            mma_m8n8k4_f64(d[0], d[1], a[0], b0);
            mma_m8n8k4_f64(d[2], d[3], a[1], b0);
            mma_m8n8k4_f64(d[0], d[1], a[2], b1);
            mma_m8n8k4_f64(d[2], d[3], a[3], b1);
        }
    }
};

template <class Product>
struct MmaWide {
    using Element = typename Product::Element;
    using Accum = Element;
    using Lanes = MmaLanes;
    using Operand = typename Product::Operand;
    static constexpr int kUnit = 16 / sizeof(Element);  // elements per load: 4 or 2
    static constexpr int kGroupK = 4 * kUnit, kTilesK = 1, kDepth = 8, kTilesV = kUnit;
    static constexpr int kParts = 1, kProducts = 1;
    static constexpr bool kPromote = false;
    static constexpr float kProbabilityExponent = 0.0f;
    struct alignas(16) Unit {
        Element x[kUnit];
    };
    struct Q {
        Operand x[2][kUnit];  // rows g, g + 8
    };
    struct K {
        Operand x[kUnit];  // key g
    };
    struct P {
        Operand x[4];
    };
    struct V {
        Operand x[2][kUnit];  // keys 2t, 2t + 1
    };
    template <int kRows, int kCols>
    using QTile = SmemTile<Element, kRows, kCols, half_padding(kCols / kUnit)>;
    template <int kRows, int kCols>
    using KTile = QTile<kRows, kCols>;
    template <int kRows, int kCols>
    using VTile = SmemTile<Element, kRows, kCols, odd_padding(kCols / kUnit)>;

    __device__ __forceinline__ static int g() { return threadIdx.x % 32 / 4; }
    __device__ __forceinline__ static int t() { return threadIdx.x % 4; }
    __device__ __forceinline__ static void load_unit(Operand (&to)[kUnit], const Element* from) {
        const Unit unit = *reinterpret_cast<const Unit*>(from);
#pragma unroll
        for (int e = 0; e < kUnit; e++) to[e] = Product::operand(unit.x[e]);
    }

    template <class Tile>
    __device__ __forceinline__ static Q load_q(const Tile& tile, int row, int k) {
        Q q;
        load_unit(q.x[0], tile.at(g(), t() * kUnit) + row * Tile::kPitch + k);
        load_unit(q.x[1], tile.at(g(), t() * kUnit) + (row + 8) * Tile::kPitch + k);
        return q;
    }
    template <class Tile>
    __device__ __forceinline__ static K load_k(const Tile& tile, int row, int k) {
        K b;
        load_unit(b.x, tile.at(g(), t() * kUnit) + row * Tile::kPitch + k);
        return b;
    }
    template <class Tile>
    __device__ __forceinline__ static V load_v(const Tile& tile, int k, int col) {
        V v;
        load_unit(v.x[0], tile.at(2 * t(), g() * kUnit) + k * Tile::kPitch + col);
        load_unit(v.x[1], tile.at(2 * t() + 1, g() * kUnit) + k * Tile::kPitch + col);
        return v;
    }
    template <int kTiles>
    __device__ __forceinline__ static P to_p(const Accum (&p)[kTiles][4], int step) {
        const Accum(&x)[4] = p[step];
        return {{Product::operand(x[0]), Product::operand(x[2]), Product::operand(x[1]), Product::operand(x[3])}};
    }
    __device__ __forceinline__ static void multiply_qk(Accum (&s)[4], const Q& q, const K& k, int, int) {
#pragma unroll
        for (int e = 0; e < kUnit; e += 2) {
            const Operand a[4] = {q.x[0][e], q.x[1][e], q.x[0][e + 1], q.x[1][e + 1]};
            Product::multiply(s, a, k.x[e], k.x[e + 1]);
        }
    }
    __device__ __forceinline__ static void multiply_pv(Accum (&o)[4], const P& p, const V& v, int tile, int) {
        Product::multiply(o, p.x, v.x[0][tile], v.x[1][tile]);
    }
    // Tile u holds column g' * kUnit + u % kUnit of its group of kUnit tiles, g' = 2t + e being the column within the tile.
    __device__ __forceinline__ static int column(int u, int e) {
        return u / kUnit * 8 * kUnit + (2 * t() + e) * kUnit + u % kUnit;
    }
};

}  // namespace cuattn
