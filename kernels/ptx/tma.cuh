// cp.async.bulk: tiles and arrays between global and shared memory by the copy engine (PTX ISA 9.7.9.25 and 27, sm_90).
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

// Adds `bytes` (a multiple of 16) of floats in shared memory to those at `to`, as a group of its own.
__device__ __forceinline__ void cp_reduce_async_bulk_add(float* to, unsigned smem, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(smem), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// The way back: the box at `smem` to coordinates (x, y, z, w), or added to what is there; what lies outside the array is
// dropped. The caller commits.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_store(const TensorMap& map, unsigned smem, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(z), "r"(w), "r"(smem)
                 : "memory");
}
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_4d_add(const TensorMap& map, unsigned smem, int x, int y, int z,
                                                                   int w) {
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(x), "r"(y), "r"(z), "r"(w), "r"(smem)
                 : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's groups are done.
__device__ __forceinline__ void cp_async_bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Waits until all but the last kPending have read shared memory.
template <int kPending = 0>
__device__ __forceinline__ void cp_async_bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace cuattn
