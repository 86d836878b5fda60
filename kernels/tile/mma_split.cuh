// Warp products of float32 values held as two fp16 numbers each (mainloop/split_input.cuh): x = high + low, 11 significant bits
// apiece. Three mma m16n8k16 take the place of one; the product of two low parts, 2^-22 of the whole, is left out.
// See mma_half.cuh for the interface. A tile row is [high | low], so a tile of kCols columns is 2 kCols elements wide.
//
// NOTE: a tensor core truncates each sum where an addition would round, always towards zero, so a long chain of products into
// one accumulator drifts: by 2^-15 over 4096 keys, a hundred times the error of fp32. kPromote makes gemm_pv sum a tile's
// products apart and add them to the output by an ordinary addition.
#pragma once
#include "tile/mma_half.cuh"

namespace cuattn {

struct MmaSplit {
    using Half = MmaHalf<__half>;
    using Element = __half;
    using Accum = float;
    using Lanes = MmaLanes;
    static constexpr int kGroupK = 16, kTilesK = 1, kDepth = 16, kTilesV = 1;
    static constexpr int kParts = 2, kProducts = 3;
    static constexpr bool kPromote = true;
    // Probabilities, below 2^8 (attention/softmax.cuh), are computed times 2^7: the low parts of all that matter are then
    // normal.
    static constexpr float kProbabilityExponent = 7.0f;
    struct Rows {
        Half::Fragment high, low;
    };
    using Q = Rows;
    using P = Rows;
    using K = Half::Fragment;  // two registers of high, two of low: of one tile, in one ldmatrix
    using V = Half::Fragment;
    // Padded: with three products for each fragment, registers are scarcer than L2 (a swizzle spills).
    template <int kRows, int kCols>
    using QTile = SmemTile<Element, kRows, kParts * kCols, odd_padding(kParts* kCols / 8)>;
    template <int kRows, int kCols>
    using KTile = QTile<kRows, kCols>;
    template <int kRows, int kCols>
    using VTile = QTile<kRows, kCols>;

    // Of the element (row + lane_row, col + lane_col) in the high part for lanes 0 to 15, in the low part for the others.
    template <class Tile>
    __device__ __forceinline__ static unsigned address(const Tile& tile, int lane_row, int lane_col, int row, int col) {
        const int part = static_cast<int>(threadIdx.x % 32 / 16) * (Tile::kCols / kParts);
        return Tile::moved(tile.address(lane_row, lane_col + part), row, col);
    }
    template <class Tile>
    __device__ __forceinline__ static Q load_q(const Tile& tile, int row, int k) {
        return {Half::load_q(tile, row, k), Half::load_q(tile, row, k + Tile::kCols / kParts)};
    }
    template <class Tile>
    __device__ __forceinline__ static K load_k(const Tile& tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        K b;
        ldmatrix_x4(b.r, address(tile, lane % 8, lane / 8 % 2 * 8, row, k));
        return b;
    }
    template <class Tile>
    __device__ __forceinline__ static V load_v(const Tile& tile, int k, int col) {
        const int lane = threadIdx.x % 32;
        V b;
        ldmatrix_x4_trans(b.r, address(tile, lane % 16, col % 16, k, col - col % 16));
        return b;
    }
    template <int kTiles>
    __device__ __forceinline__ static P to_p(const Accum (&p)[kTiles][4], int step) {
        P split;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const Accum x = p[2 * step + r / 2][2 * (r % 2)], y = p[2 * step + r / 2][2 * (r % 2) + 1];
            split.high.r[r] = pack_pair<__half>(x, y);
            const float2 high = unpack_pair<__half>(split.high.r[r]);
            split.low.r[r] = pack_pair<__half>(x - high.x, y - high.y);
        }
        return split;
    }
    // Product `part` of three, the small ones first. `gemm` keeps products into one accumulator apart.
    __device__ __forceinline__ static void multiply_qk(Accum (&s)[4], const Q& q, const K& k, int, int part) {
        Half::multiply_qk(s, part == 0 ? q.low : q.high, k, part == 1);
    }
    __device__ __forceinline__ static void multiply_pv(Accum (&o)[4], const P& p, const V& v, int, int part) {
        Half::multiply_pv(o, part == 0 ? p.low : p.high, v, part == 1);
    }
    __device__ __forceinline__ static int column(int u, int e) { return Half::column(u, e); }
};

}  // namespace cuattn
