// red: additions to global memory that return nothing (PTX ISA 9.7.13.8; the vector form needs sm_90), and counters by which
// CTAs take turns.
#pragma once

namespace cuattn {

__device__ __forceinline__ void red_add(float* to, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}

__device__ __forceinline__ void red_add(double* to, double x) {
    asm volatile("red.global.add.f64 [%0], %1;" ::"l"(to), "d"(x) : "memory");
}

__device__ __forceinline__ void red_add_v2(float* to, float x, float y) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void red_add_v4(float* to, float x, float y, float z, float w) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// Adds to a counter once everything before it is visible to whoever reads the sum.
__device__ __forceinline__ void count_release(unsigned* counter, unsigned more = 1) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(more) : "memory");
}
__device__ __forceinline__ unsigned count_acquire(const unsigned* counter) {
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}
// Waits for a sum of at least `least`, without haste.
__device__ __forceinline__ void count_wait(const unsigned* counter, unsigned least) {
    while (count_acquire(counter) < least) __nanosleep(200);
}

// The same, and what was there before: what other threads wrote before they counted is visible afterwards.
__device__ __forceinline__ unsigned long long count_and_order(unsigned long long* counter) {
    unsigned long long before;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
    return before;
}

}  // namespace cuattn
