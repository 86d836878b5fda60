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

__device__ __forceinline__ void st_cluster(unsigned address, float x) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void st_cluster(unsigned address, double x) {
    asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(address), "d"(x) : "memory");
}
__device__ __forceinline__ void st_cluster_v4(unsigned address, const float (&x)[4]) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}
__device__ __forceinline__ void st_cluster_v4(unsigned address, const double (&x)[4]) {
    asm volatile("st.shared::cluster.v2.f64 [%0], {%1, %2};" ::"r"(address), "d"(x[0]), "d"(x[1]) : "memory");
    asm volatile("st.shared::cluster.v2.f64 [%0], {%1, %2};" ::"r"(address + 16), "d"(x[2]), "d"(x[3]) : "memory");
}

}  // namespace cuattn
