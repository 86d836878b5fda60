// What the backward keeps of a query row: lse to base 2 and delta (backward_prepare.cu).
//
// Of 32- and 64-bit inputs lse comes in two parts, lse + low: where scores are large, the rounding of their logarithm is what
// the probabilities are wrong by.
#pragma once
#include "ptx/math.cuh"

namespace cuattn {

// The lse of a row whose scores are 0 and whose P is to be infinite, or NaN: of exp2_cubic, too.
constexpr float kInfiniteExponent = -128.25f;

template <class Real, bool kPrecise>
struct RowStatsOf;

template <class Real>
struct alignas(2 * sizeof(Real)) RowStatsOf<Real, false> {
    Real lse, delta;

    __device__ __forceinline__ static RowStatsOf of(Real natural_lse, double delta) {
        return {natural_lse * static_cast<Real>(kLog2e), static_cast<Real>(delta)};
    }
    // A row that gets nothing: its probabilities are 0.
    __device__ __forceinline__ static RowStatsOf nothing() { return {-negative_infinity<Real>(), Real(0)}; }
    __device__ __forceinline__ Real probability(Real score, Real factor) const { return exp2_fast(score * factor - lse); }
    // Whether a score of -inf, and a dp of 0, make P and dS 0.
    __device__ __forceinline__ bool hides() const { return lse == lse && magnitude(delta) < -negative_infinity<Real>(); }
};

template <class Real>
struct alignas(16) RowStatsOf<Real, true> {
    Real lse, delta, low, unused;

    __device__ __forceinline__ static RowStatsOf of(Real natural_lse, double delta) {
        const double exact = static_cast<double>(natural_lse) * kLog2e;
        const Real lse = static_cast<Real>(exact);
        double low = exact - static_cast<double>(lse);  // fp32; of fp64, what the product itself rounded away
        if (sizeof(Real) == 8) low = fma(static_cast<double>(natural_lse), kLog2e, -exact) + natural_lse * kLog2eLow;
        return {lse, static_cast<Real>(delta), static_cast<Real>(low == low ? low : 0.0), Real(0)};
    }
    __device__ __forceinline__ static RowStatsOf nothing() { return {-negative_infinity<Real>(), Real(0), Real(0), Real(0)}; }
    __device__ __forceinline__ Real probability(Real score, Real factor) const { return exp2_fast(score * factor - lse - low); }
};

template <class Config>
using RowStats = RowStatsOf<typename Config::Real, sizeof(typename Config::Element) >= 4>;

}  // namespace cuattn
