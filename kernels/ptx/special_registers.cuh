// Special registers (PTX ISA 10).
#pragma once

namespace cuattn {

// blockIdx.x, read anew at each call: volatile keeps the compiler from holding what is derived from it in registers across a
// main loop that has none to spare.
__device__ __forceinline__ unsigned cta_index() {
    unsigned x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace cuattn
