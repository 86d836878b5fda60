// What the host hands to a kernel, by value. Every member takes 8 bytes, so cuattn/launch.py lays a struct out by counting.
// Strides and offsets are in elements. B batch, Sq/Sk sequence lengths, H/Hkv heads, D/Dv head dimensions.
#pragma once

namespace cuattn {

struct ForwardParams {
    // Rewritten on every call.
    const void* q;             // (B, Sq, H, D)    packed: (Tq, H, D)
    const void* k;             // (B, Sk, Hkv, D)  packed: (Tk, Hkv, D)
    const void* v;             // (B, Sk, Hkv, Dv) packed: (Tk, Hkv, Dv)
    void* out;                 // (B, Sq, H, Dv)   packed: (Tq, H, Dv)
    void* lse;                 // (B, H, Sq)       packed: (H, Tq); natural logarithm; null when not wanted
    const void* sinks;         // (H) of Config::Sink, or null
    const int* q_lens;         // (B) or null
    const int* kv_lens;        // (B) or null
    const int* cu_seqlens_q;   // (B + 1), packed only
    const int* cu_seqlens_k;   // (B + 1), packed only
    void* partial_out;         // (splits, B, H, Sq, Dv) in the dtype of the scores; packed: (splits, 1, H, Tq, Dv)
    void* partial_lse;         // (splits, B, H, Sq), logarithm to base 2; packed: (splits, 1, H, Tq)
    const unsigned* tile_map;  // see attention/tile_map.cuh; null without a mask that needs one
    void* split_q;             // q, k, v as pairs of fp16 numbers, see mainloop/split_input.cuh; null without
    void* split_k;
    void* split_v;
    unsigned* magnitudes;     // of what is split
    void* tile_counter;       // see mainloop/schedule_sm90.cuh
    unsigned long long call;  // a number that no other call of this process has, and random memory hardly ever
    unsigned long long seed;  // of the dropout
    // Fixed by the plan.
    long long q_batch, q_row, q_head;
    long long k_batch, k_row, k_head;
    long long v_batch, v_row, v_head;
    long long out_batch, out_row, out_head;
    long long lse_batch, lse_head;  // of lse; rows are contiguous
    long long partial_rows;         // rows of a split's partial results: B * H * Sq, packed: H * Tq
    long long map_batch, map_head;  // words of the tile map between batches, heads
    alignas(8) int batch;
    alignas(8) int seqlen_q;  // packed: the longest
    alignas(8) int seqlen_k;
    alignas(8) int num_heads;
    alignas(8) int group;  // query heads per KV head
    alignas(8) int head_dim;
    alignas(8) int head_dim_v;
    alignas(8) int total_q;            // packed: rows of q
    alignas(8) int total_k;            // packed: rows of k and v
    alignas(8) int m_blocks;           // query tiles of the longest sequence
    alignas(8) int num_splits;         // parts into which the keys are divided
    alignas(8) int dv_chunks;          // column chunks of out, one CTA each
    alignas(8) int map_words;          // words of the tile map per query tile
    alignas(8) int section;            // see mainloop/schedule_sm90.cuh
    alignas(8) int dropout_threshold;  // of 2^16
    double scale;                      // of the scores
    double dropout_scale;              // 1 / (1 - p)
};

template <class Config>
struct ForwardArguments {
    ForwardParams base;
    typename Config::Mask mask;
    typename Config::ScoreMod score_mod;
};

// What the backward needs besides. A slab is one query tile's share of dq_sum: kBlockM x kHeadDim elements in the order of the
// accumulators of the CTA that adds to it.
struct BackwardParams {
    const void* dout;  // (B, Sq, H, Dv)  packed: (Tq, H, Dv)
    const void* lse;   // as the forward returned it, natural logarithm
    const void* dlse;  // like lse, or null
    void* dq;          // (B, Sq, H, D)   packed: (Tq, H, D)
    void* dk;          // (B, Sk, Hkv, D) packed: (Tk, Hkv, D)
    void* dv;          // (B, Sk, Hkv, Dv)
    void* dsinks;      // (H) of Config::Sink, or null
    void* dbias;       // of the shape and dtype of the bias, or null
    void* row_stats;   // (B, H, Sq) pairs (lse to base 2, delta) in the dtype of the scores; packed: (H, Tq)
    void* dq_sum;      // (dq_splits, B, H, m_blocks) slabs; packed: (dq_splits, H, q_slabs)
    unsigned* turns;   // backward_sm90, deterministic: of each slab, how many key tiles have added to it; else see
                       // mainloop/pair_counters.cuh
    void* partial_dk;  // (q_splits, B, Hkv, Sk, D), packed: (q_splits, Hkv, Tk, D); null where q_splits is 1
    void* partial_dv;  // likewise with Dv
    void* bias_sum;    // see attention/mod_sums.cuh
    void* split_dout;  // dout as pairs of fp16 numbers, see mainloop/split_input.cuh; null without
    long long dout_batch, dout_row, dout_head;
    long long lse_batch, lse_head, lse_row;
    long long dlse_batch, dlse_head, dlse_row;
    long long dq_batch, dq_row, dq_head;
    long long dk_batch, dk_row, dk_head;
    long long dv_batch, dv_row, dv_head;
    long long rows_kv;                                       // rows of a split's partial dk: B * Hkv * Sk, packed: Hkv * Tk
    long long q_slabs;                                       // slabs of a head; packed: floor(Tq / kBlockM) + B + 1
    long long dq_split;                                      // elements between the sums of two splits
    long long zeroed;                                        // 16-byte words from turns or dq_sum on that kernels add to
    long long bias_batch, bias_head, bias_q, bias_k;         // strides of dbias
    long long sum_split, sum_batch, sum_head, sum_q, sum_k;  // strides of bias_sum
    alignas(8) int n_blocks;        // key tiles of the longest sequence; backward_sm90, packed without runs: of all sequences
    alignas(8) int q_splits;        // parts into which the queries (of all heads of a group) of a key tile are divided
    alignas(8) int dq_splits;       // CTAs that share the key tiles of a head in turn: each has its own dq_sum
    alignas(8) int run;             // backward_sm90: key tiles that a CTA takes one after the other
    alignas(8) int last_section;    // backward_sm90: pairs in the last section, 0 for as many as in the others; see share_of
    alignas(8) int prepared_units;  // of a head, 0 if all rows are prepared before: backward_prepare_sm90.cu
    alignas(8) int first_batch;     // of this launch, and heads and batches that it covers
    alignas(8) int first_head_kv;
    alignas(8) int batches;
    alignas(8) int heads_kv;
    alignas(8) int bias_batches;  // lengths of the axes of dbias
    alignas(8) int bias_heads;
    alignas(8) int bias_rows;
    alignas(8) int bias_cols;
};

template <class Config>
struct BackwardArguments {
    ForwardParams base;
    BackwardParams grad;
    typename Config::Mask mask;
    typename Config::ScoreMod score_mod;
};

// Attention over a cache of keys and values. A page is page_size tokens of all heads; a cache without a page table is one in
// which each sequence has a single page. S tokens of new keys, R rotary positions.
struct DecodeParams {
    // Rewritten on every call.
    const void* q;               // (B, Sq, H, D)                packed: (Tq, H, D)
    void* k;                     // (pages, page_size, Hkv, D)   of Config::Cache
    void* v;                     // (pages, page_size, Hkv, Dv)
    void* out;                   // (B, Sq, H, Dv)               packed: (Tq, H, Dv)
    void* lse;                   // (B, H, Sq)                   packed: (H, Tq); natural logarithm; null when not wanted
    const void* sinks;           // (H) of Config::Sink, or null
    const int* cache_seqlens;    // (B) tokens before the new ones, padding on the left included; null: `cache_seqlen` for all
    const int* page_table;       // (B, max_pages), or null
    const int* cache_batch_idx;  // (B) or null: which page of a cache without a table; which row of a table
    const int* cache_leftpad;    // (B) or null: tokens to skip at the start of a sequence
    const int* cu_seqlens_q;     // (B + 1), packed only
    const void* k_new;           // (B, S, Hkv, D)               packed: (Tq, Hkv, D), token for token with q
    const void* v_new;           // (B, S, Hkv, Dv)
    const void* rotary_cos;      // (R, rotary_dim / 2) of Config::Rotary
    const void* rotary_sin;
    const float* k_scale;  // (B, Hkv), strides below: what the elements of an 8-bit cache are multiplied with
    const float* v_scale;
    void* partial_out;            // (slots, kRows, Dv)           see mainloop/decode_schedule.cuh
    void* partial_lse;            // (slots, kRows), to base 2
    unsigned long long* tickets;  // of items that are split
    unsigned long long call;      // as in ForwardParams
    long long cache_seqlen;
    // Fixed by the plan.
    long long q_batch, q_row, q_head;
    long long k_page, k_row, k_head;
    long long v_page, v_row, v_head;
    long long out_batch, out_row, out_head;
    long long lse_batch, lse_head;
    long long k_new_batch, k_new_row, k_new_head;
    long long v_new_batch, v_new_row, v_new_head;
    long long rotary_row;
    long long table_row;
    long long k_scale_batch, k_scale_head;
    long long v_scale_batch, v_scale_head;
    double scale;  // of the scores
    alignas(8) int batch;
    alignas(8) int seqlen_q;    // packed: the longest
    alignas(8) int total_q;     // packed: rows of q
    alignas(8) int seqlen_new;  // S; packed: 0
    alignas(8) int num_heads;
    alignas(8) int num_heads_kv;
    alignas(8) int group;
    alignas(8) unsigned group_multiplier;  // see attention/divisor.cuh
    alignas(8) int group_shift;
    alignas(8) int head_dim;
    alignas(8) int head_dim_v;
    alignas(8) int pages;
    alignas(8) int page_size;
    alignas(8) unsigned page_multiplier;
    alignas(8) int page_shift;
    alignas(8) int table_rows;
    alignas(8) int max_pages;  // of a sequence
    alignas(8) int rotary_dim;
    alignas(8) int rotary_len;      // R
    alignas(8) int m_blocks;        // row tiles of the longest sequence
    alignas(8) int head_lanes;      // KV heads that CTAs of one team share
    alignas(8) int head_sets;       // of so many
    alignas(8) int min_units_log2;  // of work for a CTA
    alignas(8) int max_parts;  // 0: work is divided evenly; otherwise each item into at most so many parts, by its own length
    alignas(8) int min_part;   // key tiles in a part
};

template <class Config>
struct DecodeArguments {
    DecodeParams base;
    typename Config::Mask mask;
    typename Config::ScoreMod score_mod;
};

}  // namespace cuattn
