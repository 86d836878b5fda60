// What the backward needs of each query row besides its scores: lse to base 2, and delta = rowsum(dout o out) - dlse, the part
// of the softmax's Jacobian that a row shares. A row that saw nothing gets lse +inf, which makes its probabilities 0.
// kPrepareLanes lanes take kPrepareRows rows, 16 bytes each of a row at a time.
#include "attention/mask.cuh"
#include "attention/row_stats.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

namespace cuattn {

template <class Element>
struct AccurateSumOf {
    using Type = float;
};
template <>
struct AccurateSumOf<float> {
    using Type = double;
};
template <>
struct AccurateSumOf<double> {
    using Type = double;
};
template <class Element>
using AccurateSum = typename AccurateSumOf<Element>::Type;

template <class Config>
struct Prepare {
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    static constexpr int kSize = static_cast<int>(sizeof(Element));
    // Of fp32 products delta is the difference of larger sums: it is worth exact ones.
    using Sum = AccurateSum<Element>;
    static constexpr bool kVectors = Config::kVecOut == 16 && Config::kVecDout == 16;
    static constexpr int kVec = kVectors ? 16 / kSize : 1;
    static constexpr int kLanes = Config::kPrepareLanes, kRows = Config::kPrepareRows;

    // dout as the product dout v sees it, so that rounding cancels between the two.
    __device__ __forceinline__ static Sum operand(Element x) {
        if constexpr (Config::kTf32) {
            return static_cast<Sum>(__uint_as_float(__float_as_uint(nearest_tf32(x)) & 0xffffe000u));
        } else {
            return static_cast<Sum>(x);
        }
    }

    // Sums over this lane's columns of its rows; all loads of a step are in flight together. A null row has the sum 0.
    __device__ __forceinline__ static void products(Sum (&sums)[kRows], const Element* const (&dout)[kRows],
                                                    const Element* const (&out)[kRows], int lane, int cols) {
        for (int col = lane * kVec; col < cols; col += kLanes * kVec) {
            if (kVectors && col + kVec <= cols) {
                uint4 a[kRows] = {}, b[kRows] = {};
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    if (dout[r] == nullptr) continue;
                    a[r] = *reinterpret_cast<const uint4*>(dout[r] + col), b[r] = *reinterpret_cast<const uint4*>(out[r] + col);
                }
#pragma unroll
                for (int r = 0; r < kRows; r++) {
#pragma unroll
                    for (int e = 0; e < kVec; e++) {
                        sums[r] += operand(reinterpret_cast<const Element*>(&a[r])[e]) *
                                   static_cast<Sum>(reinterpret_cast<const Element*>(&b[r])[e]);
                    }
                }
            } else {
#pragma unroll
                for (int r = 0; r < kRows; r++) {
#pragma unroll
                    for (int e = 0; e < kVec; e++) {
                        if (dout[r] != nullptr && col + e < cols) {
                            sums[r] += operand(dout[r][col + e]) * static_cast<Sum>(out[r][col + e]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) {
#pragma unroll
            for (int other = 1; other < kLanes; other *= 2) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], other);
        }
    }
};

template <class Config>
__device__ __forceinline__ void backward_prepare(const BackwardArguments<Config>& arguments) {
    using Kernel = Prepare<Config>;
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    using Sum = typename Kernel::Sum;
    const ForwardParams& p = arguments.base;
    const BackwardParams& g = arguments.grad;
    constexpr int kRowsAtOnce = Config::kThreads / Kernel::kLanes, kRows = Kernel::kRows;
    const int lane = threadIdx.x % Kernel::kLanes;
    const int rows_per_head = Config::kPacked ? p.total_q : p.seqlen_q, heads = p.num_heads;
    // In the order in which out lies in memory.
    const bool heads_first = p.out_head < p.out_row;
    const unsigned inner = heads_first ? heads : rows_per_head, outer = heads_first ? rows_per_head : heads;
    const Element* dout[kRows];
    const Element* out[kRows];
    // Read before the products, which wait for memory too.
    Real lse[kRows], dlse[kRows];
    const long long first = static_cast<long long>(blockIdx.x) * kRows * kRowsAtOnce + threadIdx.x / Kernel::kLanes;
    int fast, slow, batch;
    const auto locate = [&](auto index) {
        fast = static_cast<int>(index % inner);
        slow = static_cast<int>(index / inner % outer);
        batch = static_cast<int>(index / inner / outer);
    };
    // Divisions of 64 bits take longer than the loads.
    if (p.partial_rows <= 0xffffffffll) {
        locate(static_cast<unsigned>(first));
    } else {
        locate(static_cast<unsigned long long>(first));
    }
    RowStats<Config>* to[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        const int i = heads_first ? slow : fast, head = heads_first ? fast : slow;
        bool exists = first + r * kRowsAtOnce < p.partial_rows;
        to[r] = nullptr;
        if (exists && lane == 0) {
            to[r] = static_cast<RowStats<Config>*>(g.row_stats) +
                    (static_cast<long long>(batch) * heads + head) * rows_per_head + i;
        }
        if constexpr (Config::kPacked) {
            exists = exists && token_exists(p.cu_seqlens_q, Config::kLens ? p.q_lens : nullptr, p.batch, i);
        } else if (Config::kLens && exists && p.q_lens != nullptr) {
            exists = i < p.q_lens[batch];
        }
        const long long at_row = i;
        dout[r] = out[r] = nullptr, lse[r] = negative_infinity<Real>(), dlse[r] = 0;
        if (exists) {
            dout[r] = static_cast<const Element*>(g.dout) + batch * g.dout_batch + head * g.dout_head + at_row * g.dout_row;
            out[r] = static_cast<const Element*>(p.out) + batch * p.out_batch + head * p.out_head + at_row * p.out_row;
        }
        if (exists && lane == 0) {
            lse[r] = static_cast<const Real*>(g.lse)[batch * g.lse_batch + head * g.lse_head + at_row * g.lse_row];
            if (g.dlse != nullptr) {
                dlse[r] = static_cast<const Real*>(g.dlse)[batch * g.dlse_batch + head * g.dlse_head + at_row * g.dlse_row];
            }
        }
        fast += kRowsAtOnce;
        while (fast >= static_cast<int>(inner)) {
            fast -= static_cast<int>(inner);
            if (++slow == static_cast<int>(outer)) slow = 0, batch++;
        }
    }
    Sum sums[kRows] = {};
    Kernel::products(sums, dout, out, lane, p.head_dim_v);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        if (to[r] == nullptr) continue;
        RowStats<Config> stats = RowStats<Config>::nothing();
        if (lse[r] != negative_infinity<Real>()) stats = RowStats<Config>::of(lse[r], sums[r] - dlse[r]);
        *to[r] = stats;
    }
}

}  // namespace cuattn
