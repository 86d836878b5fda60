// Online softmax of one row (Milakov and Gimelshein, 2018; FlashAttention, algorithm 1), to base 2.
// Scores arrive in the unit `s * factor = log2 of the unnormalised probability`; factor is scale * log2(e), or log2(e) where
// the scale has been applied already.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

namespace cuattn {

// A row keeps an old maximum until the new one exceeds it by this much (in log2): probabilities stay below 2^8, which loses
// nothing in a floating-point sum, and most tiles then leave the accumulated output as it is.
constexpr float kRescaleThreshold = 8.0f;

// What a thread's probabilities of one row and one tile of keys may sum to, relative to the maximum of earlier keys: none of
// them then leaves the range of Element. bfloat16 has that of float32, of which O needs its part; float16 ends at 2^16.
template <class Element>
constexpr float kLargestSum = 1099511627776.0f;  // 2^40
template <>
constexpr float kLargestSum<__half> = 32768.0f;
constexpr float kLargestFloat = 1.2676506e30f;  // 2^100: sums of such probabilities are far from a float's limit

template <class Real>
struct RowState {
    Real max = negative_infinity<Real>();  // what exponents are taken relative to, in units of the scores
    Real sum = Real(0);                    // of exp2((s - max) * factor) over this thread's columns

    // Takes a tile's maximum in; returns the factor by which earlier sums and outputs shrink, mostly 1.
    __device__ __forceinline__ Real rescale(Real top, Real factor) {
        // -inf (no key so far) always gives way; a NaN never does.
        if (!((top - max) * factor > Real(kRescaleThreshold))) return Real(1);
        const Real shrink = exp2_fast((max - top) * factor);
        max = top;
        sum *= shrink;
        return shrink;
    }
    // As rescale, but gives way to any larger maximum: for loops whose output is multiplied either way.
    __device__ __forceinline__ Real advance(Real top, Real factor) {
        const Real before = max;
        max = maximum(max, top);
        // Without a key so far, exp2(-inf - 0) = 0.
        const Real shrink = exp2_fast(before * factor - offset(factor));
        sum *= shrink;
        return shrink;
    }
    // After probabilities relative to an old maximum, of which `top` is the row's largest, below 2^127: brings them below 1.
    // Returns the power of two that they, and earlier outputs, are to be multiplied with.
    __device__ __forceinline__ float outgrow(float top, float factor) {
        const int exponent = ::max((__float_as_int(top) >> 23) - 126, 0);
        const float shrink = __int_as_float((127 - exponent) << 23);
        max += static_cast<float>(exponent) / factor;
        sum *= shrink;
        return shrink;
    }
    // (s - max) * factor as one fused multiply-add: s * factor - offset(). A row that has seen no key yields exp2(-inf) = 0.
    __device__ __forceinline__ Real offset(Real factor) const {
        return max == negative_infinity<Real>() ? Real(0) : max * factor;
    }
};

// What a finished row is multiplied with and remembered by.
template <class Real>
struct RowResult {
    Real factor;    // out = accumulated * factor
    Real lse_log2;  // log2 of the sum of exp, -inf for a row without keys
};

// `max_log2`: the row's maximum to base 2; `sum` over the whole row; `sink_log2`: -inf without a sink.
template <class Real>
__device__ __forceinline__ RowResult<Real> finish_row(Real max_log2, Real sum, Real sink_log2) {
    // NOTE: no branch, so that a loop may hide the latency of all this.
    const Real none = negative_infinity<Real>(), top = maximum(max_log2, sink_log2);
    const bool number = !(sum != sum), empty = (top == none) & number;
    const Real shrink = (max_log2 == none) & number ? Real(0) : exp2_fast(max_log2 - top);
    const Real total = sum * shrink + (sink_log2 == none ? Real(0) : exp2_fast(sink_log2 - top));
    return {empty ? Real(0) : shrink * reciprocal_fast(total), empty ? none : top + log2_fast(total)};
}

// Scores of a warp's rows to probabilities times 2^exponent, in place; rescales what has been accumulated in `o` when a maximum
// of the warp grew enough to matter. The four lanes that share a row hold its columns.
template <class Scores, class Output, class Real, int kM>
__device__ __forceinline__ void online_softmax(Scores& s, Output& o, RowState<Real> (&rows)[kM][2], Real factor,
                                               Real exponent) {
    constexpr int kN = Scores::kThreadCols / 2;
    Real shrink[kM][2];
    bool grew = false;
#pragma unroll
    for (int x = 0; x < 2 * kM; x++) {
        const int m = x / 2, half = x % 2;
        Real top = s.data[m][0][2 * half];
#pragma unroll
        for (int u = 0; u < kN; u++) top = maximum(top, maximum(s.data[m][u][2 * half], s.data[m][u][2 * half + 1]));
        top = maximum(top, Scores::across(top, 1));
        top = maximum(top, Scores::across(top, 2));
        shrink[m][half] = rows[m][half].rescale(top, factor);
        grew |= shrink[m][half] != Real(1);
    }
    if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
        for (int x = 0; x < Output::kSize; x++) o[x] *= shrink[x / (Output::kSize / kM)][x % 4 / 2];
    }
#pragma unroll
    for (int x = 0; x < 2 * kM; x++) {
        const int m = x / 2, half = x % 2;
        const Real offset = rows[m][half].offset(factor) - exponent;
        Real sum = 0;
#pragma unroll
        for (int u = 0; u < kN; u++) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                s.data[m][u][e] = exp2_fast(s.data[m][u][e] * factor - offset);
                sum += s.data[m][u][e];
            }
        }
        rows[m][half].sum += sum;
    }
}

}  // namespace cuattn
