// Ordered accesses to global memory (PTX ISA 9.7.9.8 ld, 9.7.9.12 st; sm_70).
#pragma once

namespace cuattn {

// What is stored here is seen after everything that this thread stored before.
__device__ __forceinline__ void st_release(unsigned long long* address, unsigned long long x) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(x) : "memory");
}

// What this thread loads afterwards is no older than what it loads here.
__device__ __forceinline__ unsigned long long ld_acquire(const unsigned long long* address) {
    unsigned long long x;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(address) : "memory");
    return x;
}

}  // namespace cuattn
