// stmatrix: four 8x8 matrices of 16-bit elements from MMA fragments to shared memory (PTX ISA 9.7.14.5.16, sm_90).
#pragma once

namespace cuattn {

// Lanes 8m ... 8m + 7 hold the shared addresses of the eight rows (16 bytes each) of matrix m. Without .trans each fragment
// holds the rows of a matrix, with it the columns.
__device__ __forceinline__ void stmatrix_x4(unsigned smem, const unsigned* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(unsigned smem, const unsigned* r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

}  // namespace cuattn
