// float32 inputs as pairs of fp16 numbers (tile/pair_tile.cuh), for tile/mma_split.cuh and tile/warp_split.cuh: of the forward
// q, k and v, of the backward dout too.
//
// There is one exponent per array, batch and head (packed: per head). magnitude.cu finds the magnitudes that decide it,
// split.cu writes the pairs. Rows past the sequences are neither read nor written.
//
//   pairs        (chunks, B, H, S, [high | low])  packed: (chunks, H, T, [high | low]); a chunk of v is what one CTA takes,
//                the others are one chunk; zero columns fill a chunk up. Config::kPairRuns: [high | low] for each run of 32
//                columns, as PairTile has them. The forward gets strides that count rows.
//   magnitudes   (slots of q, then k, v, dout) x kTops words; a slot is a batch and head, a word the bits of the largest finite
//                |x| of the slot's rows of one part of the rows. One word per lane, so that a warp finds their maximum at once.
#pragma once
#include <cuda_fp16.h>
#include "attention/seqlen.cuh"
#include "params.cuh"
#include "tile/pair_tile.cuh"

namespace cuattn {

__device__ __forceinline__ const unsigned* magnitudes_of(const ForwardParams& p, int slot) {
    return p.magnitudes + static_cast<long long>(slot) * kTops;
}

// The exponent of a slot. Called by whole warps.
__device__ __forceinline__ int split_exponent(const ForwardParams& p, int slot) {
    return pair_exponent(magnitudes_of(p, slot)[lane_index()]);
}

// The slots of the arrays. `batch` is the sequence's index; packed calls share one slot per head.
template <class Config>
struct SplitSlots {
    int batches, heads, heads_kv;

    __device__ __forceinline__ static SplitSlots of(const ForwardParams& p) {
        return {Config::kPacked ? 1 : p.batch, p.num_heads, p.num_heads / p.group};
    }
    __device__ __forceinline__ int q(int batch, int head) const { return (Config::kPacked ? 0 : batch) * heads + head; }
    __device__ __forceinline__ int k(int batch, int head_kv) const {
        return batches * heads + (Config::kPacked ? 0 : batch) * heads_kv + head_kv;
    }
    __device__ __forceinline__ int v(int batch, int head_kv) const { return batches * heads_kv + k(batch, head_kv); }
    __device__ __forceinline__ int dout(int batch, int head) const { return batches * (heads + 2 * heads_kv) + q(batch, head); }
};

// Rows of a chunk of the pairs of v.
template <class Config>
__device__ __forceinline__ long long pair_rows_kv(const ForwardParams& p) {
    return static_cast<long long>(Config::kPacked ? 1 : p.batch) * (p.num_heads / p.group) * p.total_k;
}

// One of the arrays: as the caller gave it, and where its pairs go.
struct SplitArray {
    const float* source;
    long long batch_stride, row_stride, head_stride;
    __half* pairs;
    int heads, rows, cols;  // of the source; packed: rows of all sequences
    int chunk, chunks;      // columns of a chunk, chunks of a row
    long long chunk_rows;   // rows of the pairs of a chunk
    int first_slot;
    const int* lens;        // (B) or null
    const int* cumulative;  // (B + 1), packed only

    template <class Config>
    __device__ __forceinline__ static SplitArray q(const ForwardParams& p) {
        return {static_cast<const float*>(p.q),
                p.q_batch,
                p.q_row,
                p.q_head,
                static_cast<__half*>(p.split_q),
                p.num_heads,
                p.total_q,
                p.head_dim,
                Config::kHeadDim,
                1,
                0,
                0,
                p.q_lens,
                p.cu_seqlens_q};
    }
    template <class Config>
    __device__ __forceinline__ static SplitArray k(const ForwardParams& p) {
        const auto slots = SplitSlots<Config>::of(p);
        return {static_cast<const float*>(p.k),
                p.k_batch,
                p.k_row,
                p.k_head,
                static_cast<__half*>(p.split_k),
                slots.heads_kv,
                p.total_k,
                p.head_dim,
                Config::kHeadDim,
                1,
                0,
                slots.k(0, 0),
                p.kv_lens,
                p.cu_seqlens_k};
    }
    template <class Config>
    __device__ __forceinline__ static SplitArray v(const ForwardParams& p) {
        const auto slots = SplitSlots<Config>::of(p);
        return {static_cast<const float*>(p.v),
                p.v_batch,
                p.v_row,
                p.v_head,
                static_cast<__half*>(p.split_v),
                slots.heads_kv,
                p.total_k,
                p.head_dim_v,
                Config::kHeadDimV,
                p.dv_chunks,
                pair_rows_kv<Config>(p),
                slots.v(0, 0),
                p.kv_lens,
                p.cu_seqlens_k};
    }
    template <class Config>
    __device__ __forceinline__ static SplitArray dout(const ForwardParams& p, const BackwardParams& g) {
        return {static_cast<const float*>(g.dout),
                g.dout_batch,
                g.dout_row,
                g.dout_head,
                static_cast<__half*>(g.split_dout),
                p.num_heads,
                p.total_q,
                p.head_dim_v,
                Config::kHeadDimV,
                1,
                0,
                SplitSlots<Config>::of(p).dout(0, 0),
                p.q_lens,
                p.cu_seqlens_q};
    }

    // Whether row i of a batch (packed: token i) lies inside its sequence.
    template <class Config>
    __device__ __forceinline__ bool exists(const ForwardParams& p, int batch, int i) const {
        if constexpr (!Config::kPacked) {
            return !Config::kLens || lens == nullptr || i < lens[batch];
        } else {
            return token_exists(cumulative, Config::kLens ? lens : nullptr, p.batch, i);
        }
    }

    // Columns col .. col + 3 of a row, zero past its end.
    template <int kVecBytes>
    __device__ __forceinline__ float4 load(const float* row, int col) const {
        if (kVecBytes == 16 && col + 4 <= cols) return __ldg(reinterpret_cast<const float4*>(row + col));
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (col < cols) x.x = __ldg(row + col);
        if (col + 1 < cols) x.y = __ldg(row + col + 1);
        if (col + 2 < cols) x.z = __ldg(row + col + 2);
        if (col + 3 < cols) x.w = __ldg(row + col + 3);
        return x;
    }

    // Calls visit(row, col, four elements) for a CTA's share of a slot: the rows of one of kTops parts that exist.
    template <class Config, int kVecBytes, class Visit>
    __device__ __forceinline__ void each(const ForwardParams& p, int slot, int part, Visit visit) const {
        const int share = static_cast<int>((static_cast<long long>(rows) + kTops - 1) / kTops);
        const long long stop = min(static_cast<long long>(part + 1) * share, static_cast<long long>(rows));
        const int units = chunk * chunks / 4, at_once = Config::kThreads / units;
        const int first = static_cast<int>(threadIdx.x) / units, col = static_cast<int>(threadIdx.x) % units * 4;
        if (first >= at_once) return;
        const int batch = slot / heads;
        const float* start = source + batch * batch_stride + slot % heads * head_stride;
#pragma unroll 4
        for (long long row = static_cast<long long>(part) * share + first; row < stop; row += at_once) {
            if (exists<Config>(p, batch, static_cast<int>(row)))
                visit(row, col, load<kVecBytes>(start + row * row_stride, col));
        }
    }
};

// Calls run(array, vector width, slot within the array, part) for this CTA: blockIdx.x counts parts, slots, arrays.
template <class Config, class Run>
__device__ __forceinline__ void for_split_work(const ForwardParams& p, Run run) {
    const auto slots = SplitSlots<Config>::of(p);
    const int slot = static_cast<int>(blockIdx.x / kTops), part = static_cast<int>(blockIdx.x % kTops);
    if (slot < slots.k(0, 0)) {
        run.template operator()<Config::kVecQ>(SplitArray::q<Config>(p), slot, part);
    } else if (slot < slots.v(0, 0)) {
        run.template operator()<Config::kVecK>(SplitArray::k<Config>(p), slot - slots.k(0, 0), part);
    } else {
        run.template operator()<Config::kVecV>(SplitArray::v<Config>(p), slot - slots.v(0, 0), part);
    }
}
template <class Config, class Run>
__device__ __forceinline__ void for_split_work(const ForwardParams& p, const BackwardParams& g, Run run) {
    const auto array = SplitArray::dout<Config>(p, g);
    const int slot = static_cast<int>(blockIdx.x / kTops) - array.first_slot;
    if (slot >= 0) {
        run.template operator()<Config::kVecDout>(array, slot, static_cast<int>(blockIdx.x % kTops));
    } else {
        for_split_work<Config>(p, run);
    }
}

}  // namespace cuattn
