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

// The nearest tf32 value, ties away from zero.
__device__ __forceinline__ float round_tf32(float x) {
    unsigned r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return __uint_as_float(r);
}

}  // namespace cuattn
