// mbarrier: barriers in shared memory that count arrivals and bytes (PTX ISA 9.7.13.15, sm_90).
#pragma once

namespace cuattn {

__device__ __forceinline__ void mbarrier_init(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine; a __syncthreads makes them so to the other threads.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of the given parity. A fresh barrier is in phase 0: waiting for parity 1 passes at once.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
    // The loop is part of the assembly: the compiler takes one of its own for a place where lanes part, and keeps what follows
    // out of uniform registers.
    asm volatile(
        "{\n.reg .pred p;\n"
        "wait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra wait;\n"
        "done:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether the phase of the given parity has ended, without waiting for long, and the wait that is left if it had not.
__device__ __forceinline__ unsigned mbarrier_try(unsigned barrier, unsigned parity) {
    unsigned ended;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
    return ended;
}
__device__ __forceinline__ void mbarrier_wait_unless(unsigned ended, unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.u32 p, %2, 0;\n"
        "@p bra done;\n"
        "wait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra wait;\n"
        "done:\n}" ::"r"(barrier),
        "r"(parity), "r"(ended)
        : "memory");
}

}  // namespace cuattn
