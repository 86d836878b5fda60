// cp.async.bulk.tensor: tiles between global and shared memory by the copy engine (PTX ISA 9.7.9.27, sm_90).
#pragma once

namespace cuattn {

// What cuTensorMapEncodeTiled writes. NOTE: a copy needs it in parameter or global memory, 64-byte aligned.
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box at coordinates (x, y, z, w), fastest first, and completes its bytes on an mbarrier. What lies outside the
// array arrives as zero and counts.
__device__ __forceinline__ void cp_async_bulk_tensor_4d(unsigned smem, const TensorMap& map, unsigned barrier, int x, int y,
                                                        int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
            smem),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
        : "memory");
}

}  // namespace cuattn
