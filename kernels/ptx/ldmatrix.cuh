// ldmatrix: four 8x8 matrices of 16-bit elements from shared memory into MMA fragments (PTX ISA 9.7.14.5.15, sm_75).
#pragma once

namespace cuattn {

// Lanes 8m .. 8m+7 hold the shared addresses of the eight rows (16 bytes each, 16-byte aligned) of matrix m.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem));
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem));
}

}  // namespace cuattn
