// What becomes of a query tile that is done: the final or partial output, lse, and zeros for padding.
#pragma once
#include "attention/softmax.cuh"
#include "mainloop/work.cuh"
#include "tile/copy.cuh"

namespace cuattn {

// lse of row i (base 2 in, natural out), when it is wanted.
template <class Real>
__device__ __forceinline__ void store_lse(const ForwardParams& p, const Work& w, int i, Real lse_log2) {
    if (p.lse == nullptr || w.dv_start != 0) return;
    static_cast<Real*>(p.lse)[w.seq.lse + w.at.head * p.lse_head + i] = lse_log2 * static_cast<Real>(kLn2);
}

// What turns a score into the exponent of 2: log2(e), with the scale where it is folded in.
template <class Config, class Real>
__device__ __forceinline__ Real exponent_factor(const ForwardParams& p) {
    return static_cast<Real>(Config::kFoldScale ? p.scale * kLog2e : kLog2e);
}

// The sink of a head to base 2; -inf without sinks.
template <class Config, class Real>
__device__ __forceinline__ Real sink_log2(const ForwardParams& p, int head) {
    if constexpr (!Config::kSinks) return negative_infinity<Real>();
    return static_cast<Real>(static_cast<const typename Config::Sink*>(p.sinks)[head]) * static_cast<Real>(kLog2e);
}

__device__ __forceinline__ long long partial_row(const ForwardParams& p, const Work& w, int i) {
    return w.split * p.partial_rows + w.seq.row + w.at.head * w.seq.head_rows + i;
}

// A row of a head that is done, `sum` over all of its keys: its lse (or that of this split) and the factor of its output.
template <class Config, class Real>
__device__ __forceinline__ RowResult<Real> finish_output_row(const ForwardParams& p, int head, Real max_log2, Real sum) {
    // The sink takes part once, in combine.cu where keys are split.
    const Real sink = Config::kSplit ? negative_infinity<Real>() : sink_log2<Config, Real>(p, head);
    RowResult<Real> result = finish_row(max_log2, sum, sink);
    if (Config::kDropout) result.factor *= static_cast<Real>(p.dropout_scale);
    return result;
}

// The same, for row i of the work: stores its lse and returns the factor.
template <class Config, class Real>
__device__ __forceinline__ Real finish_output_row(const ForwardParams& p, const Work& w, int i, Real max_log2, Real sum,
                                                  bool stores) {
    const RowResult<Real> result = finish_output_row<Config>(p, w.at.head, max_log2, sum);
    if (stores && i < w.at.seqlen_q) {
        if constexpr (!Config::kSplit) {
            store_lse(p, w, i, result.lse_log2);
        } else if (w.dv_start == 0) {
            static_cast<Real*>(p.partial_lse)[partial_row(p, w, i)] = result.lse_log2;
        }
    }
    return result.factor;
}

// Padding rows of a tile: out 0, lse -inf. The tail of a packed call has more rows than tiles, so each CTA strides over it.
template <class Element, class Real, int kBlockM, int kThreads>
__device__ __forceinline__ void store_padding(const ForwardParams& p, const Work& w, int cols) {
    for (int block = w.m_block; block * kBlockM < w.seq.rows_q; block += p.m_blocks) {
        const int start = max(block * kBlockM, w.seq.seqlen_q), stop = min((block + 1) * kBlockM, w.seq.rows_q);
        Element* out = static_cast<Element*>(p.out) + w.seq.out + w.at.head * p.out_head + w.dv_start;
        for (int index = threadIdx.x; index < (stop - start) * cols; index += kThreads) {
            out[(start + index / cols) * p.out_row + index % cols] = Element(0.0f);
        }
        for (int i = start + static_cast<int>(threadIdx.x); i < stop; i += kThreads) {
            store_lse(p, w, i, negative_infinity<Real>());
        }
    }
}

}  // namespace cuattn
