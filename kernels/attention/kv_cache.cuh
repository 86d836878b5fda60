// Where the tokens of one sequence lie in a cache of keys and values: in pages, or in a row of its own.
#pragma once
#include "attention/coord.cuh"
#include "attention/divisor.cuh"
#include "params.cuh"
#include "ptx/opaque.cuh"

namespace cuattn {

struct CachedSequence {
    int seqlen_q, seqlen_k;  // queries; keys, new ones included
    int first_new;           // place of the first new key, which may be past the cache
    int token_q;             // packed: row of q where the sequence begins
    int leftpad;             // token j lies at place leftpad + j
    int row;                 // of the page table; without one, the sequence's page

    template <bool kPacked>
    __device__ __forceinline__ static CachedSequence of(const DecodeParams& p, int batch) {
        CachedSequence s = begin<kPacked>(p, batch);
        s.end<kPacked>(p, length(p, batch));
        return s;
    }
    // The same in steps, first without the number of keys: what begins at the first key need not wait for it.
    template <bool kPacked>
    __device__ __forceinline__ static CachedSequence begin(const DecodeParams& p, int batch) {
        CachedSequence s;
        s.token_q = kPacked ? p.cu_seqlens_q[batch] : 0;
        s.seqlen_q = kPacked ? max(0, min(p.cu_seqlens_q[batch + 1], p.total_q) - s.token_q) : p.seqlen_q;
        s.row = p.cache_batch_idx != nullptr ? p.cache_batch_idx[batch] : batch;
        s.leftpad = p.cache_leftpad != nullptr ? max(0, min(p.cache_leftpad[batch], capacity(p))) : 0;
        return s;
    }
    __device__ __forceinline__ static int length(const DecodeParams& p, int batch) {
        // NOTE: opaque, or the other value is fetched into the register that the load is on its way to, and waits for it.
        const int length = opaque(static_cast<int>(p.cache_seqlen));
        return p.cache_seqlens != nullptr ? p.cache_seqlens[batch] : length;
    }
    template <bool kPacked>
    __device__ __forceinline__ void end(const DecodeParams& p, int length) {
        const int added = p.k_new == nullptr ? 0 : kPacked ? seqlen_q : p.seqlen_new;
        first_new = max(0, min(length, capacity(p)));
        seqlen_k = max(leftpad, min(first_new + added, capacity(p))) - leftpad;
    }
    __device__ __forceinline__ static int capacity(const DecodeParams& p) { return p.max_pages * p.page_size; }
    __device__ __forceinline__ Coord at(int batch) const { return {batch, 0, seqlen_q, seqlen_k}; }
    // The position by which a query is rotated: sequences are aligned at their ends.
    __device__ __forceinline__ int position(int i) const { return max(0, i + seqlen_k - seqlen_q); }
};

struct Place {
    int page, slot;  // outside the cache if page, as an unsigned number, is not less than DecodeParams::pages
};

// Where a place of a sequence lies, if it exists. Nobody has checked what the table says.
template <bool kPaged>
__device__ __forceinline__ Place place_of(const DecodeParams& p, const CachedSequence& s, int place, bool exists) {
    if constexpr (!kPaged) return {exists ? s.row : -1, place};
    const int index = Divisor{p.page_multiplier, p.page_shift}.quotient(place), slot = place - index * p.page_size;
    exists = exists && static_cast<unsigned>(s.row) < static_cast<unsigned>(p.table_rows);
    return {exists ? p.page_table[s.row * p.table_row + index] : -1, slot};
}

// A factor of the elements of an 8-bit cache.
__device__ __forceinline__ float cache_scale(const float* scales, long long stride_batch, long long stride_head, int batch,
                                             int head_kv) {
    return scales == nullptr ? 1.0f : scales[batch * stride_batch + head_kv * stride_head];
}

}  // namespace cuattn
