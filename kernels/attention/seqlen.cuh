// Lengths and memory offsets of one sequence: dense, padded (q_lens, kv_lens) or packed (cu_seqlens).
#pragma once
#include "attention/coord.cuh"
#include "params.cuh"

namespace cuattn {

struct Sequence {
    int seqlen_q, seqlen_k;  // queries and keys that exist
    int rows_q, rows_k;      // rows in memory; those past the sequence are padding, written as zero
    int token_q, token_k;    // packed: where the sequence begins
    long long q, k, v, out;  // offset of the sequence's first row
    long long lse, row;      // first element of lse (head 0), first row of a partial result (head 0)
    long long head_rows;     // rows between two heads of a partial result

    // kPacked: cu_seqlens are given. kLens: q_lens or kv_lens may be; without them a dense call's lengths cost no register.
    // Packed calls launch one more sequence, number `batch`: the tokens past cu_seqlens_q[batch] and cu_seqlens_k[batch], all
    // padding.
    template <bool kPacked, bool kLens>
    __device__ __forceinline__ static Sequence of(const ForwardParams& p, int batch) {
        Sequence s;
        if constexpr (!kPacked) {
            s.seqlen_q = kLens && p.q_lens ? p.q_lens[batch] : p.seqlen_q;
            s.seqlen_k = kLens && p.kv_lens ? p.kv_lens[batch] : p.seqlen_k;
            s.rows_q = p.seqlen_q, s.rows_k = p.seqlen_k;
            s.token_q = s.token_k = 0;
            s.q = batch * p.q_batch, s.k = batch * p.k_batch, s.v = batch * p.v_batch, s.out = batch * p.out_batch;
            s.lse = batch * p.lse_batch;
            s.row = static_cast<long long>(batch) * p.num_heads * p.seqlen_q;
            s.head_rows = p.seqlen_q;
            return s;
        } else {
            const bool tail = batch == p.batch;
            const int q0 = p.cu_seqlens_q[batch], k0 = p.cu_seqlens_k[batch];
            s.token_q = q0, s.token_k = k0;
            s.rows_q = (tail ? p.total_q : p.cu_seqlens_q[batch + 1]) - q0;
            s.seqlen_q = tail ? 0 : kLens && p.q_lens ? min(p.q_lens[batch], s.rows_q) : s.rows_q;
            s.rows_k = (tail ? p.total_k : p.cu_seqlens_k[batch + 1]) - k0;
            s.seqlen_k = tail ? 0 : kLens && p.kv_lens ? min(p.kv_lens[batch], s.rows_k) : s.rows_k;
            s.q = q0 * p.q_row, s.k = k0 * p.k_row, s.v = k0 * p.v_row, s.out = q0 * p.out_row;
            s.lse = q0, s.row = q0;
            s.head_rows = p.total_q;
            return s;
        }
    }
};

// The last sequence of a packed array that starts at or before token i.
__device__ __forceinline__ int sequence_of(const int* cumulative, int batches, int i) {
    int low = 0, high = batches - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (cumulative[middle] <= i) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Whether token i of a packed array lies inside its sequence; `lens` may be null.
__device__ __forceinline__ bool token_exists(const int* cumulative, const int* lens, int batches, int i) {
    if (i >= cumulative[batches]) return false;
    if (lens == nullptr) return true;
    const int batch = sequence_of(cumulative, batches, i);
    return i - cumulative[batch] < lens[batch];
}

}  // namespace cuattn
