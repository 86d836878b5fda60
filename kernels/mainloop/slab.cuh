// The sum over key tiles of one query tile's dq, in memory: kBlockM x kHeadDim elements in the order in which the threads of a
// CTA hold them, so that a warp's addition covers whole lines. backward.cu adds to it, backward_convert.cu reads it, both with
// the same tiles and threads.
#pragma once
#include "attention/coord.cuh"
#include "attention/seqlen.cuh"
#include "ptx/red.cuh"

namespace cuattn {

template <class Config>
struct QuerySlab {
    using Gemm = typename Config::Gemm;
    using Real = typename Gemm::Accum;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kThreads = Config::kSlabThreads;
    static constexpr int kHeadDim = Config::kHeadDim, kElements = kBlockM * kHeadDim;
    using Grid = typename Gemm::template Grid<false, true, kBlockM, kHeadDim, kThreads / 32>;
    using Sums = typename Gemm::template Sums<false, true, Grid::kRows, Grid::kCols>;
    // Elements that one instruction adds: four neighbours on sm_90 and up.
    static constexpr int kVec = Config::kVectorRed && sizeof(Real) == 4 ? 4 : 1;
    static constexpr int kActive = kElements / Sums::kSize;  // threads that hold elements: the first ones
    static_assert(Sums::kSize % 4 == 0 && Sums::kSize * kActive == kElements && kActive <= kThreads);

    // Where warps are contiguous, they can add their elements by one bulk operation each.
    static constexpr int kWarpElements = 32 * Sums::kSize;
    // Of this thread's element x: where its first one lies, and how far from there.
    __device__ __forceinline__ static int start() {
        const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
        return Config::kWarpSlabs ? warp * kWarpElements + lane * kVec : static_cast<int>(threadIdx.x) * kVec;
    }
    __device__ __forceinline__ static constexpr int place(int x) {
        return x / kVec * (Config::kWarpSlabs ? 32 : kActive) * kVec + x % kVec;
    }
    // Slabs before that of query tile m.
    __device__ __forceinline__ static long long number(const ForwardParams& p, const BackwardParams& g, const Sequence& seq,
                                                       const Coord& at, int m) {
        return Config::kPacked ? at.head * g.q_slabs + seq.token_q / kBlockM + at.batch + m
                               : (static_cast<long long>(at.batch) * p.num_heads + at.head) * g.q_slabs + m;
    }
    // `split`: of dq_sum.
    __device__ __forceinline__ static Real* at(const ForwardParams& p, const BackwardParams& g, const Sequence& seq,
                                               const Coord& at, int m, int split) {
        return static_cast<Real*>(g.dq_sum) + split * g.dq_split + number(p, g, seq, at, m) * kElements;
    }

    // Adds `part`, of this thread's elements those from `first` on.
    template <class Part>
    __device__ __forceinline__ static void add(Real* to, Part& part, int first = 0) {
        to += start();
#pragma unroll
        for (int x = 0; x < Part::kSize; x += kVec) {
            if constexpr (kVec == 4) {
                red_add_v4(to + place(first + x), part[x], part[x + 1], part[x + 2], part[x + 3]);
            } else {
                red_add(to + place(first + x), part[x]);
            }
        }
    }

    // Adds a slab to `sums`, or puts it there.
    template <bool kAdds = true>
    __device__ __forceinline__ static void take(Sums& sums, const Real* from) {
        from += start();
        struct alignas(kVec * sizeof(Real)) Vector {
            Real data[kVec];
        };
#pragma unroll
        for (int x = 0; x < Sums::kSize; x += kVec) {
            const Vector vector = *reinterpret_cast<const Vector*>(from + place(x));
#pragma unroll
            for (int e = 0; e < kVec; e++) sums[x + e] = kAdds ? sums[x + e] + vector.data[e] : vector.data[e];
        }
    }

    // Adds dS K.
    template <class STile, class KTile>
    __device__ __forceinline__ static void add(const ForwardParams& p, const BackwardParams& g, const Sequence& seq,
                                               const Coord& coord, int m, int split, const STile& sdS, const KTile& sK) {
        if (!Grid::active()) return;
        Sums dq;
#pragma unroll
        for (int x = 0; x < Sums::kSize; x++) dq[x] = 0;
        Gemm::template multiply<false, true, kBlockN>(dq, sdS, Grid::row(), sK, Grid::col());
        add(at(p, g, seq, coord, m, split), dq);
    }
};

}  // namespace cuattn
