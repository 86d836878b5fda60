// cp.async: copies from global to shared memory that bypass registers (PTX ISA 9.7.9.25.3, sm_80).
#pragma once
#include "ptx/address.cuh"

namespace cuattn {

// Copies kBytes to shared memory; the bytes past `valid` (0..kBytes) are written as zero and not read.
template <int kBytes>
__device__ __forceinline__ void cp_async(unsigned smem, const void* gmem, int valid) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem), "l"(gmem), "n"(kBytes), "r"(valid)
                     : "memory");
    }
}

template <int kBytes>
__device__ __forceinline__ void cp_async(unsigned smem, const void* gmem) {
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(smem), "l"(gmem) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem), "l"(gmem), "n"(kBytes) : "memory");
    }
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's most recent groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace cuattn
