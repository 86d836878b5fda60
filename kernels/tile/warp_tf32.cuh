// Warp products of fp32 tiles on tensor cores, either tile transposed: mma m16n8k8 of what tf32 keeps of the elements. See
// warp_half.cuh for the interface.
//
// Inputs are rounded. P and dS, which are always on the left, are not: each is multiplied as the sum of two tf32 numbers, for
// one mma more. They are as large as the product's largest terms, and a rounding in the same place as that of an input adds to it.
//
// ldmatrix moves 16-byte rows, so it serves 32-bit elements too where nothing is transposed. Where something is, rows and
// columns of the sums are dealt to accumulator tiles so that a lane's elements are neighbours (`DealtTile`): one 16-byte load
// each.
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

struct WarpTf32 {
    using Element = float;
    using Accum = float;
    static constexpr int kParts = 1;
    template <int kRows, int kCols>
    using Tile = SwizzledWideTile<kRows, kCols>;
    template <int kRows, int kCols>
    using ScoreTile = SwizzledWideTile<kRows, kCols, 2>;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, 16, 16>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = DealtTile<kTransA, kTransB, kRows / 16, kCols / 8>;

    // Four operands: a[r] of an A tile, or b[2 i], b[2 i + 1] of two B tiles.
    template <int kParts>
    struct Fragment {
        float x[kParts][4];
        __device__ __forceinline__ void set(int r, float element) {
            if constexpr (kParts == 1) {
                x[0][r] = nearest_tf32(element);
            } else {
                x[0][r] = beyond_tf32(element), x[1][r] = element;
            }
        }
        __device__ __forceinline__ void set_all(const unsigned (&r)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) set(i, __uint_as_float(r[i]));
        }
    };
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
    __device__ __forceinline__ static void load_a(Fragment<ATile::kParts> (&f)[kM], const ATile& a, int row, int k) {
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
                f[m].set_all(r);
            }
        }
    }

    // Fragments of column blocks u to u + kBlocks - 1, two to a Fragment.
    template <bool kTrans, int kBlocks, class BTile>
    __device__ __forceinline__ static void load_b(Fragment<1> (&f)[kBlocks / 2], const BTile& b, int k, int col) {
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
                f[i / 2].set_all(r);
            }
        }
    }

    template <bool kTransA, bool kTransB, int kDepth, bool kDealRows, bool kDealCols, int kM, int kN, class ATile, class BTile>
    __device__ __forceinline__ static void multiply(DealtTile<kDealRows, kDealCols, kM, kN>& sums, const ATile& a, int row,
                                                    const BTile& b, int col) {
        constexpr int kBlocks = kN % 4 == 0 ? 4 : 2;
        static_assert(kN % 2 == 0 && BTile::kParts == 1);
#pragma unroll 4
        for (int k = 0; k < kDepth; k += 8) {
            Fragment<ATile::kParts> fa[kM];
            load_a<kTransA>(fa, a, row, k);
#pragma unroll
            for (int u = 0; u < kN; u += kBlocks) {
                Fragment<1> fb[kBlocks / 2];
                load_b<kTransB, kBlocks>(fb, b, k, col + 8 * u);
#pragma unroll
                for (int x = 0; x < ATile::kParts * kBlocks * kM; x++) {
                    const int part = x / (kBlocks * kM), i = x / kM % kBlocks, m = x % kM, r = i % 2 * 2;
                    mma_m16n8k8_tf32(sums.data[m][u + i], fa[m].x[part], fb[i / 2].x[0][r], fb[i / 2].x[0][r + 1]);
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
