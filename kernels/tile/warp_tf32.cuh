// Warp products of fp32 tiles on tensor cores, either tile transposed: mma m16n8k8 with tf32 operands. kParts = 1 multiplies
// what tf32 keeps of the elements; kParts = 2 splits x = high + low, 11 bits each, and takes three products, which leaves out
// 2^-22 of the whole. See warp_half.cuh for the interface.
//
// ldmatrix moves 16-byte rows, so it serves 32-bit elements too where nothing is transposed. Where something is, rows and
// columns of the sums are dealt to accumulator tiles so that a lane's elements are neighbours (`DealtTile`): one 16-byte load
// each.
//
// NOTE: a tensor core truncates each sum where an addition would round, always towards zero, and a long chain of products into
// one accumulator drifts. kParts = 2 therefore sums kRun depths at a time, small products apart, and adds the runs up.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/reg_tile.cuh"
#include "tile/smem_tile.cuh"
#include "tile/warp_grid.cuh"

namespace cuattn {

// Accumulators of 16 kM x 8 kN elements. With kDealRows, lane group g holds the rows 4g to 4g + 3 of each 32 (2g and 2g + 1 of
// 16); with kDealCols, an accumulator tile holds every fourth (second) column of a run of 32 (16).
template <bool kDealRows, bool kDealCols, int kM, int kN>
struct DealtTile : RegTile<float, kM, kN> {
    static constexpr int kRunM = kM % 2 == 0 ? 2 : 1, kRunN = kN % 4 == 0 ? 4 : kN % 2 == 0 ? 2 : 1;

    __device__ __forceinline__ static int row(int x) {
        const int g = threadIdx.x % 32 / 4, m = x / (4 * kN), half = x % 4 / 2;
        return kDealRows ? m / kRunM * 16 * kRunM + 2 * kRunM * g + m % kRunM * 2 + half : RegTile<float, kM, kN>::row(x);
    }
    __device__ __forceinline__ static int col(int x) {
        const int t = threadIdx.x % 4, u = x / 4 % kN;
        return kDealCols ? u / kRunN * 8 * kRunN + (2 * t + x % 2) * kRunN + u % kRunN : RegTile<float, kM, kN>::col(x);
    }
};

template <int kParts>
struct WarpTf32 {
    using Element = float;
    using Accum = float;
    static constexpr int kRun = 32;
    template <int kRows, int kCols>
    using Tile = SwizzledWideTile<kRows, kCols>;
    template <int kRows, int kCols>
    using ScoreTile = Tile<kRows, kCols>;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, 16, 16>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = DealtTile<kTransA, kTransB, kRows / 16, kCols / 8>;

    struct Operand {
        float high, low;
    };
    __device__ __forceinline__ static Operand operand(float x) {
        if constexpr (kParts == 1) return {nearest_tf32(x), 0.0f};
        const float high = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
        return {high, x - high};
    }
    // Four fragments of operands: a[r] of an A tile, or b[2 i], b[2 i + 1] of two B tiles.
    struct Fragment {
        float high[4], low[4];
        __device__ __forceinline__ void set(int r, float x) {
            const Operand o = operand(x);
            high[r] = o.high, low[r] = o.low;
        }
    };
    __device__ __forceinline__ static Fragment split(const unsigned (&r)[4]) {
        Fragment f;
#pragma unroll
        for (int i = 0; i < 4; i++) f.set(i, __uint_as_float(r[i]));
        return f;
    }
    template <int kVec>
    __device__ __forceinline__ static void load_row(float (&to)[kVec], const float* from) {
        if constexpr (kVec == 4) {
            const float4 x = *reinterpret_cast<const float4*>(from);
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        } else {
            const float2 x = *reinterpret_cast<const float2*>(from);
            to[0] = x.x, to[1] = x.y;
        }
    }

    // Fragments of all kM row blocks at depth k.
    template <bool kTrans, int kM, class ATile>
    __device__ __forceinline__ static void load_a(Fragment (&f)[kM], const ATile& a, int row, int k) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        if constexpr (kTrans) {
            constexpr int kRunM = kM % 2 == 0 ? 2 : 1;
#pragma unroll
            for (int m = 0; m < kM; m += kRunM) {
                float first[2 * kRunM], second[2 * kRunM];
                load_row(first, a.at(k + t, row + 16 * m + 2 * kRunM * g));
                load_row(second, a.at(k + t + 4, row + 16 * m + 2 * kRunM * g));
#pragma unroll
                for (int i = 0; i < kRunM; i++) {
                    f[m + i].set(0, first[2 * i]), f[m + i].set(1, first[2 * i + 1]);
                    f[m + i].set(2, second[2 * i]), f[m + i].set(3, second[2 * i + 1]);
                }
            }
        } else {
#pragma unroll
            for (int m = 0; m < kM; m++) {
                unsigned r[4];
                ldmatrix_x4(r, a.address(row + 16 * m + lane % 16, k + lane / 16 * 4));
                f[m] = split(r);
            }
        }
    }

    // Fragments of column blocks u to u + kBlocks - 1, two to a Fragment.
    template <bool kTrans, int kBlocks, class BTile>
    __device__ __forceinline__ static void load_b(Fragment (&f)[kBlocks / 2], const BTile& b, int k, int col) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        if constexpr (kTrans) {
            float first[kBlocks], second[kBlocks];
            load_row(first, b.at(k + t, col + kBlocks * g));
            load_row(second, b.at(k + t + 4, col + kBlocks * g));
#pragma unroll
            for (int i = 0; i < kBlocks; i++) f[i / 2].set(i % 2 * 2, first[i]), f[i / 2].set(i % 2 * 2 + 1, second[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kBlocks; i += 2) {
                unsigned r[4];
                ldmatrix_x4(r, b.address(col + 8 * i + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 4));
                f[i / 2] = split(r);
            }
        }
    }

    // Column blocks u0 to u0 + kN - 1 over kDepth depths from k0.
    template <bool kTransA, bool kTransB, int kDepth, int kM, int kN, class ATile, class BTile>
    __device__ __forceinline__ static void accumulate(float (&large)[kM][kN][4], float (&small)[kM][kN][4], const ATile& a,
                                                      int row, const BTile& b, int col, int k0) {
        constexpr int kBlocks = kN % 4 == 0 ? 4 : 2;
        static_assert(kN % 2 == 0);
#pragma unroll(kParts == 2 ? 1 : 4)
        for (int k = k0; k < k0 + kDepth; k += 8) {
            Fragment fa[kM];
            load_a<kTransA>(fa, a, row, k);
#pragma unroll
            for (int u = 0; u < kN; u += kBlocks) {
                Fragment fb[kBlocks / 2];
                load_b<kTransB, kBlocks>(fb, b, k, col + 8 * u);
#pragma unroll
                for (int part = kParts == 2 ? 0 : 2; part < 3; part++) {
#pragma unroll
                    for (int x = 0; x < kBlocks * kM; x++) {
                        const int i = x / kM, m = x % kM, r = i % 2 * 2;
                        const auto& left = part == 0 ? fa[m].low : fa[m].high;
                        const auto& right = part == 1 ? fb[i / 2].low : fb[i / 2].high;
                        mma_m16n8k8_tf32(part == 2 ? large[m][u + i] : small[m][u + i], left, right[r], right[r + 1]);
                    }
                }
            }
        }
    }

    template <bool kTransA, bool kTransB, int kDepth, bool kDealRows, bool kDealCols, int kM, int kN, class ATile, class BTile>
    __device__ __forceinline__ static void multiply(DealtTile<kDealRows, kDealCols, kM, kN>& sums, const ATile& a, int row,
                                                    const BTile& b, int col) {
        constexpr int kOnce = kDepth % kRun == 0 ? kRun : kDepth;
        if constexpr (kParts == 1) {
#pragma unroll 1
            for (int k = 0; k < kDepth; k += kOnce) {
                accumulate<kTransA, kTransB, kOnce>(sums.data, sums.data, a, row, b, col, k);
            }
        } else {
            // Fresh sums beside the old ones: so many column blocks at a time that registers hold them.
            constexpr int kWide = kM * kN > 8 && kN % 8 == 0 ? kN / 2 : kN;
#pragma unroll
            for (int u = 0; u < kN; u += kWide) {
#pragma unroll 1
                for (int k = 0; k < kDepth; k += kOnce) {
                    float large[kM][kWide][4] = {}, small[kM][kWide][4] = {};
                    accumulate<kTransA, kTransB, kOnce>(large, small, a, row, b, col + 8 * u, k);
#pragma unroll
                    for (int x = 0; x < 4 * kM * kWide; x++) {
                        const int m = x / (4 * kWide), i = x / 4 % kWide;
                        sums.data[m][u + i][x % 4] += large[m][i][x % 4] + small[m][i][x % 4];
                    }
                }
            }
        }
    }

    template <class Accumulators, class Tile>
    __device__ __forceinline__ static void store(Accumulators& sums, const Tile& tile, int row, int col) {
#pragma unroll
        for (int x = 0; x < Accumulators::kSize; x += 2) {
            *reinterpret_cast<float2*>(tile.at(row + Accumulators::row(x), col + Accumulators::col(x))) =
                make_float2(sums[x], sums[x + 1]);
        }
    }
};

}  // namespace cuattn
