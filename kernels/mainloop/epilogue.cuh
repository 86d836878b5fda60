// What becomes of a query tile that is done: the final or partial output, lse, and zeros for padding.
#pragma once
#include "attention/softmax.cuh"
#include "mainloop/work.cuh"
#include "tile/copy.cuh"

namespace cuattn {

constexpr double kLn2 = 0.693147180559945309417;

// lse of row i (base 2 in, natural out), when it is wanted.
template <class Real>
__device__ __forceinline__ void store_lse(const ForwardParams& p, const Work& w, int i, Real lse_log2) {
    if (p.lse == nullptr || w.dv_start != 0) return;
    static_cast<Real*>(p.lse)[w.seq.lse + w.at.head * p.lse_head + i] = lse_log2 * static_cast<Real>(kLn2);
}

__device__ __forceinline__ long long partial_row(const ForwardParams& p, const Work& w, int i) {
    return w.split * p.partial_rows + w.seq.row + w.at.head * w.seq.head_rows + i;
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
