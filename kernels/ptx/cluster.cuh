// Thread block clusters: their barrier, and each other's shared memory (PTX ISA 9.7.13.4 barrier.cluster, 9.7.9.23 mapa;
// sm_90).
#pragma once

namespace cuattn {

// What the threads of a cluster stored to shared memory before they arrive is seen by all of them after they waited.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Address of what CTA `rank` of the cluster has where this one has `address`.
__device__ __forceinline__ unsigned cluster_address(unsigned address, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ float ld_cluster(unsigned address, float) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ double ld_cluster(unsigned address, double) {
    double x;
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void ld_cluster_v4(float (&x)[4], unsigned address) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ld_cluster_v4(double (&x)[4], unsigned address) {
    asm volatile("ld.shared::cluster.v2.f64 {%0, %1}, [%2];" : "=d"(x[0]), "=d"(x[1]) : "r"(address) : "memory");
    asm volatile("ld.shared::cluster.v2.f64 {%0, %1}, [%2];" : "=d"(x[2]), "=d"(x[3]) : "r"(address + 16) : "memory");
}

}  // namespace cuattn
