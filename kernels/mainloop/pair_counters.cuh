// Counters of a KV head and batch by which kernels in a chain wait for no more of each other than they need. Whoever prepares
// rows clears them.
#pragma once
#include "attention/seqlen.cuh"
#include "ptx/red.cuh"
#include "ptx/special_registers.cuh"

namespace cuattn {

struct PairCounters {
    // CTAs that prepare rows, one for each lane of a warp: PREPARING_SMS of cuattn/backward.py. Each counts in a word of its
    // own, which it alone has cleared before: one that starts late takes no count of others back.
    static constexpr int kPreparing = 32;
    // A head's rows are prepared in units of so many. Packed: those of a sequence are numbered from here on.
    static constexpr int kUnitRows = 32;
    __device__ __forceinline__ static int first_unit(int token, int sequence) { return token / kUnitRows + sequence; }
    unsigned* counters;
    int pairs;

    __device__ __forceinline__ static PairCounters of(const ForwardParams& p, const BackwardParams& g) {
        return {g.turns, p.batch * (p.num_heads / p.group)};
    }
    // Of a head, all of which count, though packed the last one may hold no row.
    template <bool kPacked>
    __device__ __forceinline__ static int units(const ForwardParams& p, const BackwardParams& g, int batch) {
        if constexpr (!kPacked) return g.prepared_units;
        return first_unit(p.cu_seqlens_q[batch + 1], batch + 1) - first_unit(p.cu_seqlens_q[batch], batch);
    }
    // How many units have their row statistics, and sums of dq cleared, of those that a CTA prepares.
    __device__ __forceinline__ unsigned* ready(int pair, int cta) const { return counters + kPreparing * pair + cta; }
    // By all lanes of a warp: until so many units have, whoever prepared them.
    __device__ __forceinline__ void await_ready(int pair, int units) const {
        while (__reduce_add_sync(0xffffffffu, static_cast<int>(count_acquire(ready(pair, lane_index())))) < units) {
            __nanosleep(200);
        }
        __syncwarp();  // orders what any lane has seen before what follows in all of them
    }
    // How many doormen, of which a CTA that has keys has two, have nothing more to add to dq.
    static constexpr int kDoormen = 2;
    __device__ __forceinline__ unsigned* added(int pair) const { return counters + kPreparing * pairs + pair; }
};

}  // namespace cuattn
