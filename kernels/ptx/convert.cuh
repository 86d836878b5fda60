// Conversions that compile to one instruction (PTX ISA 9.7.9.21, cvt).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cuattn {

// Two floats to two 16-bit elements, the first in the low half.
template <class Element>
__device__ __forceinline__ unsigned pack_pair(float low, float high);
template <>
__device__ __forceinline__ unsigned pack_pair<__half>(float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <>
__device__ __forceinline__ unsigned pack_pair<__nv_bfloat16>(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Whether every float is near an element: float16 ends at 65504.
template <class Element>
constexpr bool kHoldsFloats = true;
template <>
constexpr bool kHoldsFloats<__half> = false;

// And back.
template <class Element>
__device__ __forceinline__ float2 unpack_pair(unsigned pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(unsigned pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(unsigned pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Both elements of a pair, times x.
template <class Element>
__device__ __forceinline__ unsigned scaled_pair(unsigned pair, float x) {
    const float2 both = unpack_pair<Element>(pair);
    return pack_pair<Element>(both.x * x, both.y * x);
}

// tf32 keeps the upper 19 bits of a float and the tensor core drops the others. cvt.rna.tf32 takes four instructions; adding
// half a unit in the last place that is kept takes two. To the nearest number that tf32 holds, whose lower bits the caller
// drops or the tensor core does: half a unit in the last place at most, for two instructions. NaN stays NaN.
__device__ __forceinline__ float nearest_tf32(float x) { return x == x ? __uint_as_float(__float_as_uint(x) + 0x1000u) : x; }

// What the tensor core drops of x itself; 0 of an infinity.
__device__ __forceinline__ float beyond_tf32(float x) {
    const float rest = x - __uint_as_float(__float_as_uint(x) & 0xffffe000u);
    return fabsf(x) < __uint_as_float(0x7f800000u) ? rest : 0.0f;
}

}  // namespace cuattn
