// wgmma: the asynchronous matrix product of a warpgroup, D (64 x N) = or += A (64 x 16) B (16 x N) with 16-bit elements (PTX
// ISA 9.7.15, sm_90a).
//
// Warp w of the warpgroup holds rows 16 w ... 16 w + 15 of D; with g = lane / 4 and t = lane % 4 its register 4 u + e is row
// g + e / 2 * 8, column 8 u + 2 t + e % 2. A in registers is laid out as in mma m16n8k16, B comes from shared memory.
//
// NOTE: between wgmma_fence and the wait_group that covers them, the registers of D and A belong to the tensor core. The
// compiler does not know: wgmma_pin on each of them, before the fence and after the wait, keeps its own accesses outside.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cuattn {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the most recent groups are still in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kSize>
__device__ __forceinline__ void wgmma_pin(float (&r)[kSize]) {
#pragma unroll
    for (int x = 0; x < kSize; x++) asm volatile("" : "+f"(r[x])::"memory");
}
template <int kSize>
__device__ __forceinline__ void wgmma_pin(unsigned (&r)[kSize]) {
#pragma unroll
    for (int x = 0; x < kSize; x++) asm volatile("" : "+r"(r[x])::"memory");
}

// ss: A and B in shared memory, K-major (rows of A and columns of B contiguous along k; kTransA: A is MN-major, its columns
//     contiguous along m; kTransB: B is MN-major, its rows contiguous along n).
// rs: A in registers, B MN-major (rows of B contiguous along n).
// `accumulate` 0 starts from zero.
template <int kN, class Element>
struct Wgmma;

// clang-format off
#define CUATTN_REGS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUATTN_REGS_12 CUATTN_REGS_8 ", %8, %9, %10, %11"
#define CUATTN_REGS_16 CUATTN_REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CUATTN_REGS_24 CUATTN_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CUATTN_REGS_32 CUATTN_REGS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CUATTN_REGS_40 CUATTN_REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CUATTN_REGS_48 CUATTN_REGS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CUATTN_REGS_56 CUATTN_REGS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define CUATTN_REGS_64 CUATTN_REGS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CUATTN_REGS_72 CUATTN_REGS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define CUATTN_REGS_80 CUATTN_REGS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define CUATTN_REGS_88 CUATTN_REGS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define CUATTN_REGS_96 CUATTN_REGS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CUATTN_REGS_104 CUATTN_REGS_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define CUATTN_REGS_112 CUATTN_REGS_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define CUATTN_REGS_120 CUATTN_REGS_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define CUATTN_REGS_128 CUATTN_REGS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define CUATTN_EIGHT(x) "+f"(d[x]), "+f"(d[x + 1]), "+f"(d[x + 2]), "+f"(d[x + 3]), "+f"(d[x + 4]), "+f"(d[x + 5]), "+f"(d[x + 6]), "+f"(d[x + 7])
#define CUATTN_OUTS_8 CUATTN_EIGHT(0)
#define CUATTN_OUTS_12 CUATTN_OUTS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define CUATTN_OUTS_16 CUATTN_OUTS_8, CUATTN_EIGHT(8)
#define CUATTN_OUTS_24 CUATTN_OUTS_16, CUATTN_EIGHT(16)
#define CUATTN_OUTS_32 CUATTN_OUTS_24, CUATTN_EIGHT(24)
#define CUATTN_OUTS_40 CUATTN_OUTS_32, CUATTN_EIGHT(32)
#define CUATTN_OUTS_48 CUATTN_OUTS_40, CUATTN_EIGHT(40)
#define CUATTN_OUTS_56 CUATTN_OUTS_48, CUATTN_EIGHT(48)
#define CUATTN_OUTS_64 CUATTN_OUTS_56, CUATTN_EIGHT(56)
#define CUATTN_OUTS_72 CUATTN_OUTS_64, CUATTN_EIGHT(64)
#define CUATTN_OUTS_80 CUATTN_OUTS_72, CUATTN_EIGHT(72)
#define CUATTN_OUTS_88 CUATTN_OUTS_80, CUATTN_EIGHT(80)
#define CUATTN_OUTS_96 CUATTN_OUTS_88, CUATTN_EIGHT(88)
#define CUATTN_OUTS_104 CUATTN_OUTS_96, CUATTN_EIGHT(96)
#define CUATTN_OUTS_112 CUATTN_OUTS_104, CUATTN_EIGHT(104)
#define CUATTN_OUTS_120 CUATTN_OUTS_112, CUATTN_EIGHT(112)
#define CUATTN_OUTS_128 CUATTN_OUTS_120, CUATTN_EIGHT(120)
// N, registers of D, and the numbers of the operands after them.
#define CUATTN_WGMMA_OF(N, R, ELEMENT, TYPE, x0, x1, x2, x3, x4, x5)                                                           \
    template <>                                                                                                                \
    struct Wgmma<N, ELEMENT> {                                                                                                 \
        template <int kTransA = 0, int kTransB = 0>                                                                            \
        __device__ __forceinline__ static void ss(float (&d)[R], unsigned long long a, unsigned long long b, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #x2 ", 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                                       \
                         " {" CUATTN_REGS_##R "}, %" #x0 ", %" #x1 ", p, 1, 1, %" #x3 ", %" #x4 ";\n}"                        \
                         : CUATTN_OUTS_##R : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));                     \
        }                                                                                                                      \
        __device__ __forceinline__ static void rs(float (&d)[R], const unsigned* a, unsigned long long b, int accumulate) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #x5 ", 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                                       \
                         " {" CUATTN_REGS_##R "}, {%" #x0 ", %" #x1 ", %" #x2 ", %" #x3 "}, %" #x4 ", p, 1, 1, 1;\n}"          \
                         : CUATTN_OUTS_##R : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));             \
        }                                                                                                                      \
    };
#define CUATTN_WGMMA(N, R, x0, x1, x2, x3, x4, x5)                         \
    CUATTN_WGMMA_OF(N, R, __half, "f16", x0, x1, x2, x3, x4, x5)           \
    CUATTN_WGMMA_OF(N, R, __nv_bfloat16, "bf16", x0, x1, x2, x3, x4, x5)
CUATTN_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
CUATTN_WGMMA(24, 12, 12, 13, 14, 15, 16, 17)
CUATTN_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
CUATTN_WGMMA(48, 24, 24, 25, 26, 27, 28, 29)
CUATTN_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
CUATTN_WGMMA(80, 40, 40, 41, 42, 43, 44, 45)
CUATTN_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
CUATTN_WGMMA(112, 56, 56, 57, 58, 59, 60, 61)
CUATTN_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
CUATTN_WGMMA(144, 72, 72, 73, 74, 75, 76, 77)
CUATTN_WGMMA(160, 80, 80, 81, 82, 83, 84, 85)
CUATTN_WGMMA(176, 88, 88, 89, 90, 91, 92, 93)
CUATTN_WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
CUATTN_WGMMA(208, 104, 104, 105, 106, 107, 108, 109)
CUATTN_WGMMA(224, 112, 112, 113, 114, 115, 116, 117)
CUATTN_WGMMA(240, 120, 120, 121, 122, 123, 124, 125)
CUATTN_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#undef CUATTN_WGMMA
#undef CUATTN_WGMMA_OF
// clang-format on

}  // namespace cuattn
