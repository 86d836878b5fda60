// A warpgroup's accumulators of 64 x kN elements, and the products of attention on them.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/wgmma.cuh"
#include "tile/panel_tile.cuh"

namespace cuattn {

template <int kN>
struct WgmmaTile {
    static constexpr int kSize = kN / 2;
    float data[kSize];

    __device__ __forceinline__ float& operator[](int x) { return data[x]; }
    __device__ __forceinline__ static int row(int x) {
        return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) + x % 4 / 2 * 8;
    }
    __device__ __forceinline__ static int col(int x) { return 2 * static_cast<int>(threadIdx.x % 4) + x / 4 * 8 + x % 2; }

    // As in RegTile.
    static constexpr int kThreadRows = 2;
    __device__ __forceinline__ static constexpr int thread_row(int x) { return x % 4 / 2; }
    __device__ __forceinline__ static int row_at(int r) { return row(2 * r); }

    // The largest element of a thread's row r, whose columns are spread over four lanes.
    __device__ __forceinline__ float row_maximum(int r) const {
        float top[2] = {data[2 * r], data[2 * r + 1]};  // two chains, or each maximum waits for the last
#pragma unroll
        for (int u = 1; u < kN / 8; u++) {
            top[0] = maximum(top[0], data[4 * u + 2 * r]);
            top[1] = maximum(top[1], data[4 * u + 2 * r + 1]);
        }
        float both = maximum(top[0], top[1]);
        both = maximum(both, __shfl_xor_sync(0xffffffffu, both, 1));
        return maximum(both, __shfl_xor_sync(0xffffffffu, both, 2));
    }
    // Both rows' largest elements through signed integers, of which one instruction takes the largest of three. They compare
    // as floats do where the largest is not negative, and the other way round where it is: `matters(top)` says whether a
    // negative one has to be right. Of a row with NaN it may be NaN.
    template <class Matters>
    __device__ __forceinline__ void row_maxima(float (&top)[2], Matters matters) const {
        int bits[2];
        row_extremes<true>(bits);
        top[0] = __int_as_float(bits[0]), top[1] = __int_as_float(bits[1]);
        if (!__any_sync(0xffffffffu, matters(top))) return;
        int least[2];
        row_extremes<false>(least);
#pragma unroll
        for (int r = 0; r < 2; r++) top[r] = __int_as_float(bits[r] < 0 ? least[r] : bits[r]);
    }
    // Of both rows, as integers.
    template <bool kLargest>
    __device__ __forceinline__ void row_extremes(int (&found)[2]) const {
        auto of_two = [](int a, int b) { return kLargest ? max(a, b) : min(a, b); };
#pragma unroll
        for (int u = 0; u < kN / 8; u++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int a = __float_as_int(data[4 * u + 2 * r]), b = __float_as_int(data[4 * u + 2 * r + 1]);
                found[r] = u == 0 ? of_two(a, b) : kLargest ? __vimax3_s32(found[r], a, b) : __vimin3_s32(found[r], a, b);
            }
        }
#pragma unroll
        for (int lane = 1; lane < 4; lane *= 2) {  // both rows' exchanges at once
            const int other[2] = {__shfl_xor_sync(0xffffffffu, found[0], lane), __shfl_xor_sync(0xffffffffu, found[1], lane)};
            found[0] = of_two(found[0], other[0]), found[1] = of_two(found[1], other[1]);
        }
    }
};

// The accumulators of a transposed product, of 64 columns and kN rows of what they stand for.
template <int kN>
struct WgmmaTransposedTile {
    static constexpr int kSize = kN / 2;
    static constexpr bool kPairs = false;  // elements 2 n and 2 n + 1 are neighbours in a column
    float data[kSize];

    __device__ __forceinline__ float& operator[](int x) { return data[x]; }
    __device__ __forceinline__ static int row(int x) { return WgmmaTile<kN>::col(x); }
    __device__ __forceinline__ static int col(int x) { return WgmmaTile<kN>::row(x); }

    // As in RegTile.
    static constexpr int kThreadRows = kN / 4, kThreadCols = 2;
    __device__ __forceinline__ static constexpr int thread_row(int x) { return x / 4 * 2 + x % 2; }
    __device__ __forceinline__ static constexpr int thread_col(int x) { return x % 4 / 2; }
    __device__ __forceinline__ static int row_at(int r) { return row(r / 2 * 4 + r % 2); }
    __device__ __forceinline__ static int col_at(int c) { return col(2 * c); }
    __device__ __forceinline__ static float sum_col(float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    }
    __device__ __forceinline__ static bool leads_col() { return threadIdx.x % 4 == 0; }
};

// Starts s = Q K^T over kDepth columns; `q` and `k` are K-major descriptors of 64 rows of QTile and of rows of a KTile. kAdd:
// to what s holds.
template <class Element, int kDepth, class QTile, class KTile, bool kAdd = false, class Sums>
__device__ __forceinline__ void wgmma_qk(Sums& s, unsigned long long q, unsigned long long k) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; step++) {
        Wgmma<2 * Sums::kSize, Element>::ss(s.data, QTile::advance(q, QTile::k_major_step(step)),
                                            KTile::advance(k, KTile::k_major_step(step)), kAdd || step > 0);
    }
    wgmma_commit_group();
}

// Starts o += P V, or o = P V where it does not accumulate; `p` holds the probabilities of a tile's keys as operands, `v` is
// the MN-major descriptor of a VTile.
template <class Element, class VTile>
__device__ __forceinline__ void wgmma_pv(WgmmaTile<VTile::kCols>& o, const unsigned (&p)[VTile::kRows / 4],
                                         unsigned long long v, bool accumulate = true) {
#pragma unroll
    for (int step = 0; step < VTile::kRows / 16; step++) {
        Wgmma<VTile::kCols, Element>::rs(o.data, p + 4 * step, VTile::advance(v, VTile::mn_major_step(step)),
                                         step > 0 || accumulate);
    }
    wgmma_commit_group();
}

// Starts sums = A^T B^T; `a` is the MN-major descriptor of a panel of 64 columns of ATile, `b` the K-major one of a BTile,
// whose columns are the rows of A.
template <class Element, class ATile, class BTile, class Sums>
__device__ __forceinline__ void wgmma_at(Sums& sums, unsigned long long a, unsigned long long b) {
#pragma unroll
    for (int step = 0; step < ATile::kRows / 16; step++) {
        Wgmma<2 * Sums::kSize, Element>::template ss<1>(sums.data, ATile::advance(a, ATile::mn_major_step(step)),
                                                        BTile::advance(b, BTile::k_major_step(step)), step > 0);
    }
    wgmma_commit_group();
}

// Starts sums += A^T B; `a` and `b` are the MN-major descriptors of a panel of 64 columns of ATile and of columns of a BTile
// with the same rows.
template <class Element, class ATile, class BTile, int kN>
__device__ __forceinline__ void wgmma_atb(WgmmaTile<kN>& sums, unsigned long long a, unsigned long long b) {
#pragma unroll
    for (int step = 0; step < ATile::kRows / 16; step++) {
        Wgmma<kN, Element>::template ss<1, 1>(sums.data, ATile::advance(a, ATile::mn_major_step(step)),
                                              BTile::advance(b, BTile::mn_major_step(step)), 1);
    }
    wgmma_commit_group();
}

// Issues sums = or += A B, without closing the group; `a` is the K-major descriptor of 64 rows of ATile, `b` the MN-major one
// of a BTile whose rows are the columns of A.
template <class Element, class ATile, class BTile, int kN>
__device__ __forceinline__ void wgmma_ab(WgmmaTile<kN>& sums, unsigned long long a, unsigned long long b, bool accumulate) {
#pragma unroll
    for (int step = 0; step < BTile::kRows / 16; step++) {
        Wgmma<kN, Element>::template ss<0, 1>(sums.data, a + ATile::k_major_step(step), b + BTile::mn_major_step(step),
                                              accumulate || step > 0);
    }
}

// Accumulators as 16-bit elements in pairs: the A operand of a product that sums over the columns of the 64 rows.
template <class Element, class Sums>
__device__ __forceinline__ void pack_operand(unsigned (&operand)[Sums::kSize / 2], const Sums& sums) {
#pragma unroll
    for (int x = 0; x < Sums::kSize; x += 2) operand[x / 2] = pack_pair<Element>(sums.data[x], sums.data[x + 1]);
}

// Stores the operand of a WgmmaTile's 64 columns to a panel, of as many rows, or of a warp's 16.
__device__ __forceinline__ void store_operand_rows(unsigned panel, const unsigned (&operand)[16]) {
    const unsigned lane = threadIdx.x % 32, to = panel + lane % 16 * 128;
#pragma unroll
    for (unsigned x = 0; x < 4; x++) stmatrix_x4(to + ((2 * x + lane / 16) ^ (lane % 8)) * 16, operand + 4 * x);
}
__device__ __forceinline__ void store_operand(unsigned panel, const unsigned (&operand)[16]) {
    store_operand_rows(panel + threadIdx.x % 128 / 32 * 16 * 128, operand);
}

// Stores the operand of a WgmmaTransposedTile to a panel of 64 columns as rows again, from row 0 of `panel`.
template <int kSize>
__device__ __forceinline__ void store_panel(unsigned panel, const unsigned (&operand)[kSize]) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const unsigned to = panel + (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int x = 0; x < kSize; x += 4) stmatrix_x4_trans(to + x / 4 * 16 * 128, operand + x);
}

// The reverse: a panel of 64 columns as the operand of a WgmmaTransposedTile.
template <int kSize>
__device__ __forceinline__ void load_panel(unsigned (&operand)[kSize], unsigned panel) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const unsigned from = panel + (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int x = 0; x < kSize; x += 4) {
        unsigned four[4];
        ldmatrix_x4_trans(four, from + x / 4 * 16 * 128);
#pragma unroll
        for (int i = 0; i < 4; i++) operand[x + i] = four[i];
    }
}

// Stores the elements of a WgmmaTransposedTile as rows of floats: two panels of 32 columns, their 16-byte units swizzled as in
// PanelTile. No two lanes of a warp meet in a bank.
template <int kSize>
__device__ __forceinline__ void store_float_panels(char* panels, const float (&elements)[kSize]) {
    constexpr int kPanelBytes = 2 * kSize * 128;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x % 128 / 32);
    char* const rows = panels + warp / 2 * kPanelBytes + lane % 4 * 2 * 128 + lane / 4 % 4 * 4;
    const int unit = (warp % 2 * 4 + lane / 16) ^ (lane % 4 * 2);
#pragma unroll
    for (int x = 0; x < kSize; x++) {
        char* const to = rows + (unit ^ (x % 4 / 2 * 2 + x % 2)) * 16;
        *reinterpret_cast<float*>(to + (x / 4 * 8 + x % 2) * 128) = elements[x];
    }
}

// Four lanes hold two columns each of four groups of eight; afterwards lane i holds all eight columns of group i.
__device__ __forceinline__ void transpose_quad(unsigned (&pairs)[4]) {
    const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const bool upper = (lane & bit) != 0;
            const unsigned received = __shfl_xor_sync(0xffffffffu, upper ? pairs[i] : pairs[i | bit], bit);
            if (upper) {
                pairs[i] = received;
            } else {
                pairs[i | bit] = received;
            }
        }
    }
}

// Stores this thread's elements of row 8 half + row(0) times `factor` to `target`, the start of that row; kVecBytes is what
// its alignment allows. All lanes of a warp take part, those with `inside` store.
template <class Element, int kVecBytes, int kN>
__device__ __forceinline__ void store_row(const WgmmaTile<kN>& o, int half, float factor, Element* target, int cols,
                                          bool inside) {
    const int lane = static_cast<int>(threadIdx.x % 4);
    if (kVecBytes == 16 && kN % 32 == 0 && cols == kN) {  // no branch: all that follows may overlap
#pragma unroll
        for (int u = 0; u < kN / 8; u += 4) {
            unsigned pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int x = 4 * (u + i) + 2 * half;
                pairs[i] = pack_pair<Element>(o.data[x] * factor, o.data[x + 1] * factor);
            }
            transpose_quad(pairs);
            if (inside) *reinterpret_cast<uint4*>(target + 8 * (u + lane)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        return;
    }
#pragma unroll
    for (int u = 0; u < kN / 8; u += 4) {  // 32 columns at a time
        unsigned pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int x = 4 * (u + i < kN / 8 ? u + i : 0) + 2 * half;
            pairs[i] = pack_pair<Element>(o.data[x] * factor, o.data[x + 1] * factor);
        }
        transpose_quad(pairs);
        const int col = 8 * (u + lane);
        if (!inside || col >= cols) continue;
        if (kVecBytes == 16 && col + 8 <= cols) {
            *reinterpret_cast<uint4*>(target + col) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else {
            const Element* elements = reinterpret_cast<const Element*>(pairs);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (col + e < cols) target[col + e] = elements[e];
            }
        }
    }
}

}  // namespace cuattn
