// delta = rowsum(dout o out): what a row of the backward needs besides its scores. kPrepareLanes lanes take a row, 16 bytes
// each at a time.
#pragma once
#include "attention/row_stats.cuh"
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
struct RowProducts {
    using Element = typename Config::Element;
    using Real = typename Config::Real;
    static constexpr int kSize = static_cast<int>(sizeof(Element));
    // Of fp32 products delta is the difference of larger sums: it is worth exact ones.
    using Sum = AccurateSum<Element>;
    static constexpr bool kVectors = Config::kVecOut == 16 && Config::kVecDout == 16;
    static constexpr int kVec = kVectors ? 16 / kSize : 1;
    static constexpr int kLanes = Config::kPrepareLanes;

    // dout as the product dout v sees it, so that rounding cancels between the two.
    __device__ __forceinline__ static Sum operand(Element x) {
        if constexpr (Config::kTf32) {
            return static_cast<Sum>(__uint_as_float(__float_as_uint(nearest_tf32(x)) & 0xffffe000u));
        } else {
            return static_cast<Sum>(x);
        }
    }

    __device__ __forceinline__ static void add(Sum& sum, uint4 dout, uint4 out) {
#pragma unroll
        for (int e = 0; e < kVec; e++) {
            sum += operand(reinterpret_cast<const Element*>(&dout)[e]) *
                   static_cast<Sum>(reinterpret_cast<const Element*>(&out)[e]);
        }
    }
    // Sum over a row, of which this lane takes some columns.
    __device__ __forceinline__ static Sum products(const Element* dout, const Element* out, int lane, int cols) {
        Sum sum = 0;
        for (int col = lane * kVec; col < cols; col += kLanes * kVec) {
            if (kVectors && col + kVec <= cols) {
                // NOTE: copied first, or the compiler reads the elements one by one.
                const uint4 a = *reinterpret_cast<const uint4*>(dout + col), b = *reinterpret_cast<const uint4*>(out + col);
                add(sum, a, b);
            } else {
#pragma unroll
                for (int e = 0; e < kVec; e++) {
                    if (col + e < cols) sum += operand(dout[col + e]) * static_cast<Sum>(out[col + e]);
                }
            }
        }
        return over_lanes(sum);
    }
    __device__ __forceinline__ static Sum over_lanes(Sum sum) {
#pragma unroll
        for (int other = 1; other < kLanes; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        return sum;
    }
    __device__ __forceinline__ static RowStats<Config> stats(Real lse, Sum delta) {
        return lse != negative_infinity<Real>() ? RowStats<Config>::of(lse, delta) : RowStats<Config>::nothing();
    }
};

}  // namespace cuattn
