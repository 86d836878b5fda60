// Loads from shared memory in one piece (PTX ISA 9.7.9.8 ld): of a float4 of which single elements are used, the compiler would
// load these one by one.
#pragma once

namespace cuattn {

__device__ __forceinline__ float4 ld_shared_v4(unsigned smem) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(smem));
    return x;
}

}  // namespace cuattn
