// Four numbers of 8 bits to two pairs of 16-bit elements, exactly. Neither format has a conversion to bf16, nor e4m3 any before
// sm_89: its bits are shifted into place and the difference of the exponents' biases is made good by a multiplication.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cuattn {

// Elements of a cache: 4 bits of exponent, 3 of mantissa, no infinity, NaN 0x7f and 0xff; and integers.
struct E4M3 {
    unsigned char bits;
    E4M3() = default;
    __device__ __forceinline__ explicit E4M3(float) : bits(0) {}  // of a zero, which is all that copies need
};
struct Int8 {
    signed char bits;
    Int8() = default;
    __device__ __forceinline__ explicit Int8(float) : bits(0) {}
};

// Bytes 0, 2, 1, 3 of a word.
__device__ __forceinline__ unsigned swap_middle_bytes(unsigned x) { return __byte_perm(x, 0, 0x3120); }

__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b, __half) {
    const __half2 r = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&r);
}
__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b, __nv_bfloat16) {
    const __nv_bfloat162 r =
        __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned*>(&r);
}
__device__ __forceinline__ unsigned subtract_pairs(unsigned a, unsigned b, __half) {
    const __half2 r = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&r);
}
__device__ __forceinline__ unsigned subtract_pairs(unsigned a, unsigned b, __nv_bfloat16) {
    const __nv_bfloat162 r =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned*>(&r);
}

// e4m3 in the upper bytes of both halves of a word: sign, exponent and mantissa moved to where they belong.
__device__ __forceinline__ unsigned place_e4m3(unsigned w, __half) { return (w & 0x80008000u) | ((w & 0x7f007f00u) >> 1); }
__device__ __forceinline__ unsigned place_e4m3(unsigned w, __nv_bfloat16) {
    return (w & 0x80008000u) | ((w & 0x7f007f00u) >> 4);
}
__device__ __forceinline__ constexpr unsigned e4m3_bias(__half) { return 0x5c005c00u; }         // 2^8
__device__ __forceinline__ constexpr unsigned e4m3_bias(__nv_bfloat16) { return 0x7b807b80u; }  // 2^120
__device__ __forceinline__ constexpr unsigned e4m3_nan(__half) { return 0x7e00u; }
__device__ __forceinline__ constexpr unsigned e4m3_nan(__nv_bfloat16) { return 0x7fc0u; }

template <class Element>
__device__ __forceinline__ void widen(unsigned x, unsigned (&pairs)[2], E4M3) {
    const unsigned words[2] = {__byte_perm(x, 0, 0x1404), __byte_perm(x, 0, 0x3424)};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        pairs[n] = multiply_pairs(place_e4m3(words[n], Element()), e4m3_bias(Element()), Element());
    }
    if (((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) {  // a NaN, which the shift takes for 480
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if ((words[n] & 0x7f00u) == 0x7f00u) pairs[n] = (pairs[n] & 0xffff0000u) | e4m3_nan(Element());
            if ((words[n] & 0x7f000000u) == 0x7f000000u) pairs[n] = (pairs[n] & 0xffffu) | e4m3_nan(Element()) << 16;
        }
    }
}

// The sum of a power of two and of the lower bits, less the sign's share.
__device__ __forceinline__ void widen_integers(unsigned low, unsigned& pair, __half) {  // 1024 + (x + 128), less 1152
    pair = subtract_pairs(low | 0x64006400u, 0x64806480u, __half());
}
__device__ __forceinline__ void widen_integers(unsigned low, unsigned& pair, __nv_bfloat16) {  // 128 + x % 128, less 128 or 256
    pair = subtract_pairs((low & 0x007f007fu) | 0x43004300u, (low & 0x00800080u) | 0x43004300u, __nv_bfloat16());
}
__device__ __forceinline__ constexpr unsigned integer_flip(__half) { return 0x80808080u; }
__device__ __forceinline__ constexpr unsigned integer_flip(__nv_bfloat16) { return 0; }

template <class Element>
__device__ __forceinline__ void widen(unsigned x, unsigned (&pairs)[2], Int8) {
    x ^= integer_flip(Element());
    widen_integers(__byte_perm(x, 0, 0x4140), pairs[0], Element());
    widen_integers(__byte_perm(x, 0, 0x4342), pairs[1], Element());
}

}  // namespace cuattn
