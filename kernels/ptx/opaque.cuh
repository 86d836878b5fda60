// Values that the compiler must not reason about.
#pragma once

namespace cuattn {

// The same value, unknown to the optimiser: what is computed from it stays where it is written.
__device__ __forceinline__ long long opaque(long long x) {
    asm volatile("" : "+l"(x));
    return x;
}

__device__ __forceinline__ unsigned opaque(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Loads before this are issued before those after it.
__device__ __forceinline__ void in_order() { asm volatile("" ::: "memory"); }

}  // namespace cuattn
