// Special functions as single instructions, and their double-precision counterparts.
#pragma once

namespace cuattn {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.693147180559945309417;
constexpr double kLog2eLow = 2.0355273740931033e-17;  // log2(e) - kLog2e

// 2^x. float: ex2.approx.ftz (one MUFU, 2 ulp; PTX ISA 9.7.3.21). Without .ftz the compiler adds three instructions.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x for x <= 0 (and NaN), below 1 ulp: x = n + f with |f| <= 1/2, a Taylor polynomial of e^(f ln 2) whose truncation error is
// under 2^-54, and n added to the exponent. Results under 2^-1022 are flushed to 0, which the softmax cannot notice.
__device__ __forceinline__ double exp2_fast(double x) {
    constexpr double kShift = 6755399441055744.0;      // 1.5 * 2^52: adding it rounds to an integer
    const double clamped = x < -1022.0 ? -1022.0 : x;  // NaN compares false and stays
    const double shifted = clamped + kShift;
    const int n = __double2loint(shifted);
    const double f = (clamped - (shifted - kShift)) * kLn2;
    double p = 1.6059043836821613e-10;  // 1 / 13!
    p = fma(p, f, 2.08767569878681e-09);
    p = fma(p, f, 2.505210838544172e-08);
    p = fma(p, f, 2.755731922398589e-07);
    p = fma(p, f, 2.7557319223985893e-06);
    p = fma(p, f, 2.48015873015873e-05);
    p = fma(p, f, 1.984126984126984e-04);
    p = fma(p, f, 1.3888888888888889e-03);
    p = fma(p, f, 8.333333333333333e-03);
    p = fma(p, f, 4.1666666666666664e-02);
    p = fma(p, f, 1.6666666666666666e-01);
    p = fma(p, f, 0.5);
    p = fma(p, f, 1.0);
    p = fma(p, f, 1.0);
    const double y = __hiloint2double(__double2hiint(p) + (n << 20), __double2loint(p));
    return x < -1022.0 ? 0.0 : y;
}

// 2^x for what is rounded to 16 bits, without the MUFU: x = n + f with |f| <= 1/2, a cubic that differs from 2^f by 8e-5 of it
// at most (least in the largest difference), and n added to the exponent. Below 2^-126 it is 0; of NaN it may be
// the largest float.
__device__ __forceinline__ float exp2_cubic(float x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float shifted = x + kShift, f = x - (shifted - kShift);
    float y = fmaf(5.517167931e-2f, f, 2.426111685e-1f);
    y = fmaf(y, f, 6.932609878e-1f);
    y = fmaf(y, f, 9.999280708e-1f);
    y = __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
    return x < -126.0f ? 0.0f : y;
}

// tanh x (one MUFU, relative error 2^-11; PTX ISA 9.7.3.22).
__device__ __forceinline__ float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x (one MUFU, 1 ulp; PTX ISA 9.7.3.14).
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ double reciprocal_fast(double x) { return 1.0 / x; }

__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }
__device__ __forceinline__ double log2_fast(double x) { return log2(x); }

template <class Real>
__device__ __forceinline__ Real negative_infinity() {
    return Real(__int_as_float(0xff800000));
}

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// The number of [low, high] nearest to x, or NaN for NaN (PTX ISA 9.7.3.11 max, sm_80).
__device__ __forceinline__ float clamp(float x, float low, float high) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
    return x;
}

// max(a, b); a NaN in either is dropped, as softmax statistics need.
__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double maximum(double a, double b) { return fmax(a, b); }

}  // namespace cuattn
