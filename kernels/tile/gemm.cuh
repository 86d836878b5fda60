// The two products of attention for one warp, from tiles in shared memory; `Mma` is MmaHalf, MmaWide or MmaSplit.
#pragma once

namespace cuattn {

// s[m][u] = q[m] . k[8 u ...], over kHeadDim; load(m, column) yields a fragment of q.
template <class Mma, int kHeadDim, int kM, int kN, class Load, class KTile>
__device__ __forceinline__ void gemm_qk_of(typename Mma::Accum (&s)[kM][kN][4], const Load& load, const KTile& sK) {
    static_assert(kHeadDim % Mma::kGroupK == 0 && kN % Mma::kTilesK == 0, "tiles must be whole fragments");
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
        for (int u = 0; u < kN; u++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][u][e] = 0;
        }
    }
    // Enough steps to hide the loads; all of a large head_dim would fill the registers with loads.
#pragma unroll(kHeadDim / Mma::kGroupK <= 16 ? kHeadDim / Mma::kGroupK : 4)
    for (int k = 0; k < kHeadDim; k += Mma::kGroupK) {
        typename Mma::Q q[kM];
#pragma unroll
        for (int m = 0; m < kM; m++) q[m] = load(m, k);
#pragma unroll
        for (int u = 0; u < kN; u += Mma::kTilesK) {
            const typename Mma::K b = Mma::load_k(sK, 8 * u, k);
#pragma unroll
            for (int part = 0; part < Mma::kProducts; part++) {
#pragma unroll
                for (int x = 0; x < kM * Mma::kTilesK; x++) {
                    const int m = x / Mma::kTilesK, i = x % Mma::kTilesK;
                    Mma::multiply_qk(s[m][u + i], q[m], b, i, part);
                }
            }
        }
    }
}

// The same with q in shared memory, from a row on.
template <class Mma, int kHeadDim, int kM, int kN, class QTile, class KTile>
__device__ __forceinline__ void gemm_qk(typename Mma::Accum (&s)[kM][kN][4], const QTile& sQ, const KTile& sK, int row) {
    gemm_qk_of<Mma, kHeadDim>(s, [&](int m, int k) { return Mma::load_q(sQ, row + 16 * m, k); }, sK);
}

// o[m][u] += p[m] . v, over the 8 kN keys of the tile, summed apart from o: the tensor core truncates into a small sum, and o
// takes an addition that rounds.
template <class Mma, int kM, int kN, int kNv, class VTile>
__device__ __forceinline__ void gemm_pv_promoted(typename Mma::Accum (&o)[kM][kNv][4],
                                                 const typename Mma::Accum (&p)[kM][kN][4], const VTile& sV) {
    constexpr int kSteps = 8 * kN / Mma::kDepth;
    typename Mma::P a[kSteps][kM];
#pragma unroll
    for (int x = 0; x < kSteps * kM; x++) a[x / kM][x % kM] = Mma::to_p(p[x % kM], x / kM);
    static_assert(Mma::kTilesV == 1);
    constexpr int kTiles = 1;  // at a time: two would hide more of each other's latency, but spill at 32 rows of 128 columns
#pragma unroll
    for (int u = 0; u < kNv; u += kTiles) {
        typename Mma::Accum sum[kM * kTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            typename Mma::V b[kTiles];
#pragma unroll
            for (int i = 0; i < kTiles; i++) b[i] = Mma::load_v(sV, step * Mma::kDepth, 8 * (u + i));
#pragma unroll
            for (int x = 0; x < Mma::kProducts * kM * kTiles; x++) {
                const int part = x / (kM * kTiles), i = x / kM % kTiles, m = x % kM;
                Mma::multiply_pv(sum[m * kTiles + i], a[step][m], b[i], 0, part);
            }
        }
#pragma unroll
        for (int x = 0; x < kM * kTiles * 4; x++) o[x / 4 / kTiles][u + x / 4 % kTiles][x % 4] += sum[x / 4][x % 4];
    }
}

// o[m][u] += p[m] . v, over the 8 kN keys of the tile.
template <class Mma, int kM, int kN, int kNv, class VTile>
__device__ __forceinline__ void gemm_pv(typename Mma::Accum (&o)[kM][kNv][4], const typename Mma::Accum (&p)[kM][kN][4],
                                        const VTile& sV) {
    static_assert(8 * kN % Mma::kDepth == 0 && kNv % Mma::kTilesV == 0, "tiles must be whole fragments");
    if constexpr (Mma::kPromote) {
        gemm_pv_promoted<Mma>(o, p, sV);
    } else {
#pragma unroll
        for (int step = 0; step < 8 * kN / Mma::kDepth; step++) {
            typename Mma::P a[kM];
#pragma unroll
            for (int m = 0; m < kM; m++) a[m] = Mma::to_p(p[m], step);
#pragma unroll
            for (int u = 0; u < kNv; u += Mma::kTilesV) {
                const typename Mma::V b = Mma::load_v(sV, step * Mma::kDepth, 8 * u);
#pragma unroll
                for (int m = 0; m < kM; m++) {
#pragma unroll
                    for (int i = 0; i < Mma::kTilesV; i++) Mma::multiply_pv(o[m][u + i], a[m], b, i, 0);
                }
            }
        }
    }
}

}  // namespace cuattn
