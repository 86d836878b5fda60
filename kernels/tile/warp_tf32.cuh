// Warp products of fp32 tiles on tensor cores, either tile transposed: mma m16n8k8 of what tf32 keeps of the elements. See
// warp_half.cuh for the interface.
//
// Inputs are rounded, once, where they lie, and P where it is stored. dS, a difference that gets a rounding of its own on top
// of those of the inputs, is not: what tf32 drops of it is multiplied too, as bfloat16, which has the range of a float and
// takes half the time.
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
    static constexpr bool kRounds = true;
    template <int kRows, int kCols>
    using Tile = SwizzledWideTile<kRows, kCols>;
    template <int kRows, int kCols>
    using ScoreTile = Tile<kRows, kCols>;
    template <int kRows, int kCols>
    using GradientTile = SwizzledWideTile<kRows, kCols, 2>;
    template <bool kTransA, bool kTransB, int kRows, int kCols, int kWarps>
    using Grid = WarpGrid<kRows, kCols, kWarps, 16, 16>;
    template <bool kTransA, bool kTransB, int kRows, int kCols>
    using Sums = DealtTile<kTransA, kTransB, kRows / 16, kCols / 8>;

    // Makes tf32 numbers of what has arrived: by all threads, between two barriers.
    template <int kThreads, class Tile>
    __device__ __forceinline__ static void round(const Tile& tile) {
        float4* data = reinterpret_cast<float4*>(tile.data);
#pragma unroll 4
        for (int i = threadIdx.x; i < Tile::kBytes / 16; i += kThreads) {
            const float4 x = data[i];
            data[i] = make_float4(nearest_tf32(x.x), nearest_tf32(x.y), nearest_tf32(x.z), nearest_tf32(x.w));
        }
    }

    // Four operands: a[r] of an A tile, or b[2 i], b[2 i + 1] of two B tiles. The tensor core drops what tf32 does not hold.
    struct Fragment {
        float x[4];
        __device__ __forceinline__ void set_all(const unsigned (&r)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = __uint_as_float(r[i]);
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
                    f[m + i].x[0] = first[2 * i], f[m + i].x[1] = first[2 * i + 1];
                    f[m + i].x[2] = second[2 * i], f[m + i].x[3] = second[2 * i + 1];
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
    __device__ __forceinline__ static void load_b(Fragment (&f)[kBlocks / 2], const BTile& b, int k, int col) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        if constexpr (kTrans) {
            float first[kBlocks], second[kBlocks];
            load_row(first, b.at(k + t, col + kBlocks * g));
            load_row(second, b.at(k + t + 4, col + kBlocks * g));
#pragma unroll
            for (int i = 0; i < kBlocks; i++) f[i / 2].x[i % 2 * 2] = first[i], f[i / 2].x[i % 2 * 2 + 1] = second[i];
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
        constexpr int kSteps = ATile::kParts;  // of depth 8, whose lower parts make one of depth 16
        static_assert(kN % 2 == 0 && kDepth % (8 * kSteps) == 0 && BTile::kParts == 1);
#pragma unroll(4 / kSteps)
        for (int k = 0; k < kDepth; k += 8 * kSteps) {
            Fragment fa[kSteps][kM];
            unsigned low[kM][4];
#pragma unroll
            for (int x = 0; x < kSteps; x++) load_a<kTransA>(fa[x], a, row, k + 8 * x);
#pragma unroll
            for (int x = 0; x < (kSteps == 2 ? 4 * kM : 0); x++) {  // a lane's depths of two steps are its four of one
                const float (&from)[4] = fa[x % 4 / 2][x / 4].x;
                low[x / 4][x % 4] = pack_pair<__nv_bfloat16>(beyond_tf32(from[x % 2]), beyond_tf32(from[x % 2 + 2]));
            }
#pragma unroll
            for (int u = 0; u < kN; u += kBlocks) {
                Fragment fb[kSteps][kBlocks / 2];
#pragma unroll
                for (int x = 0; x < kSteps; x++) load_b<kTransB, kBlocks>(fb[x], b, k + 8 * x, col + 8 * u);
#pragma unroll
                for (int x = 0; x < (kSteps == 2 ? kBlocks * kM : 0); x++) {
                    const int i = x / kM, m = x % kM, r = i % 2 * 2;
                    unsigned pairs[2];
#pragma unroll
                    for (int step = 0; step < kSteps; step++) {
                        pairs[step % 2] = pack_pair<__nv_bfloat16>(fb[step][i / 2].x[r], fb[step][i / 2].x[r + 1]);
                    }
                    mma_m16n8k16(sums.data[m][u + i], low[m], pairs[0], pairs[1], __nv_bfloat16());
                }
#pragma unroll
                for (int x = 0; x < kSteps * kBlocks * kM; x++) {
                    const int step = x / (kBlocks * kM), i = x / kM % kBlocks, m = x % kM, r = i % 2 * 2;
                    mma_m16n8k8_tf32(sums.data[m][u + i], fa[step][m].x, fb[step][i / 2].x[r], fb[step][i / 2].x[r + 1]);
                }
            }
        }
    }

    template <class Accumulators, class Tile>
    __device__ __forceinline__ static void store(Accumulators& sums, const Tile& tile, int row, int col) {
        const auto element = [&](int x) { return Tile::kParts == 1 ? nearest_tf32(sums[x]) : sums[x]; };
#pragma unroll
        for (int x = 0; x < Accumulators::kSize; x += 2) {
            *reinterpret_cast<float2*>(tile.at(row + Accumulators::row(x), col + Accumulators::col(x))) =
                make_float2(element(x), element(x + 1));
        }
    }
};

}  // namespace cuattn
