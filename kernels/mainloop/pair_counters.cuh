// Counters of a KV head and batch by which kernels in a chain wait for no more of each other than they need. Whoever prepares
// rows clears them.
#pragma once
#include "attention/seqlen.cuh"
#include "ptx/red.cuh"

namespace cuattn {

struct PairCounters {
    unsigned* counters;
    int pairs;

    __device__ __forceinline__ static PairCounters of(const ForwardParams& p, const BackwardParams& g) {
        return {g.turns, p.batch * (p.num_heads / p.group)};
    }
    // How many consumer warps have nothing more to add to dq.
    __device__ __forceinline__ unsigned* added(int pair) const { return counters + pair; }
    // How many units have their row statistics, and sums of dq cleared.
    __device__ __forceinline__ unsigned* ready(int pair) const { return counters + pairs + pair; }
};

}  // namespace cuattn
