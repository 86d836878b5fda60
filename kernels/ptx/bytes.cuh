// Four numbers of 8 bits to two pairs of fp16, exactly. Integers become the lower bits of a number whose upper bits are a power
// of two. e4m3 has a conversion from sm_89 on (two numbers an instruction); before, its bits are shifted into place and the
// difference of the exponents' biases is made good by a multiplication.
#pragma once
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

__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b) {
    const __half2 r = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&r);
}
__device__ __forceinline__ unsigned subtract_pairs(unsigned a, unsigned b) {
    const __half2 r = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&r);
}

// e4m3 in the upper bytes of both halves of a word: sign, exponent and mantissa moved to where they belong.
__device__ __forceinline__ unsigned place_e4m3(unsigned w) { return (w & 0x80008000u) | ((w & 0x7f007f00u) >> 1); }

// kConverts: the GPU has an instruction for it.
template <bool kConverts>
__device__ __forceinline__ void widen(unsigned x, unsigned (&pairs)[2], E4M3) {
    if constexpr (kConverts) {  // PTX ISA 9.7.9.21, cvt; sm_89
        asm("{\n\t.reg .b16 low, high;\n\t"
            "mov.b32 {low, high}, %2;\n\t"
            "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
            "cvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
            : "=r"(pairs[0]), "=r"(pairs[1])
            : "r"(x));
        return;
    }
    const unsigned words[2] = {__byte_perm(x, 0, 0x1404), __byte_perm(x, 0, 0x3424)};
#pragma unroll
    for (int n = 0; n < 2; n++) pairs[n] = multiply_pairs(place_e4m3(words[n]), 0x5c005c00u);  // 2^8
    if (((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) {  // a NaN, which the shift takes for 480
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if ((words[n] & 0x7f00u) == 0x7f00u) pairs[n] = (pairs[n] & 0xffff0000u) | 0x7e00u;
            if ((words[n] & 0x7f000000u) == 0x7f000000u) pairs[n] = (pairs[n] & 0xffffu) | 0x7e000000u;
        }
    }
}

template <bool>
__device__ __forceinline__ void widen(unsigned x, unsigned (&pairs)[2], Int8) {
    x ^= 0x80808080u;  // 1024 + (x + 128), less 1152
    pairs[0] = subtract_pairs(__byte_perm(x, 0x64646464u, 0x4140), 0x64806480u);
    pairs[1] = subtract_pairs(__byte_perm(x, 0x64646464u, 0x4342), 0x64806480u);
}

}  // namespace cuattn
