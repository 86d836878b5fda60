// Warp products of fp16 q and P with keys and values of 8 bits, which become fp16 on their way from shared memory to the
// fragments: exactly, for both formats fit into it. Interface of MmaHalf. Queries in bf16 become fp16 too, times a power of two
// for each row (narrow_row): e4m3 has a conversion to fp16 alone.
//
// ldmatrix moves pairs of bytes. A lane that would get 16-bit elements 2 t and 2 t + 1 of a key thus gets bytes 4 t ... 4 t +
// 3, so the columns of q are taken in that order too; and of a transposed pair of keys it gets two neighbouring columns of v
// each, which go to the even and the odd of two accumulator tiles.
#pragma once
#include "ptx/bytes.cuh"
#include "tile/mma_half.cuh"

namespace cuattn {

// kConverts: see ptx/bytes.cuh.
template <class Byte, bool kConverts>
struct MmaByte {
    using Element = __half;
    using Accum = float;
    using Lanes = MmaLanes;
    static constexpr int kGroupK = 32, kTilesK = 2, kDepth = 16, kTilesV = 4;
    static constexpr int kParts = 1, kProducts = 2;
    static constexpr bool kPromote = false;
    static constexpr float kProbabilityExponent = 0.0f;
    struct Pair {
        unsigned r[2][4];  // for the columns 0 ... 15 and 16 ... 31
    };
    struct Bytes {
        unsigned r[4][2];
    };
    using Q = Pair;
    using K = Bytes;
    using P = typename MmaHalf<Element>::P;
    using V = Bytes;
    template <int kRows, int kCols>
    using QTile = SwizzledTile<Element, kRows, kCols>;
    template <int kRows, int kCols>
    using KTile = SwizzledTile<Byte, kRows, kCols>;
    template <int kRows, int kCols>
    using VTile = KTile<kRows, kCols>;

    // A row of bf16 becomes fp16 in place, by kLanes neighbouring lanes: times the power of two that brings its largest element
    // to [2^14, 2^15), so that nothing above 2^-32 of it is rounded. Returns the power's reciprocal.
    template <int kLanes, class Tile>
    __device__ __forceinline__ static float narrow_row(const Tile& tile, int row, int lane) {
        constexpr unsigned kMagnitude = 0x7fff7fffu;
        unsigned top = 0;
#pragma unroll 1
        for (int col = 8 * lane; col < Tile::kCols; col += 8 * kLanes) {
            const uint4 x = *reinterpret_cast<const uint4*>(tile.at(row, col));
            top = __vmaxu2(
                top, __vmaxu2(__vmaxu2(x.x & kMagnitude, x.y & kMagnitude), __vmaxu2(x.z & kMagnitude, x.w & kMagnitude)));
        }
        top = max(top & 0xffffu, top >> 16);
#pragma unroll
        for (int s = 1; s < kLanes; s *= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, s));
        const unsigned exponent = max(top >> 7, 16u);  // biased; both powers below are normal numbers
        const float factor = __uint_as_float((268 - exponent) << 23);
#pragma unroll 1
        for (int col = 8 * lane; col < Tile::kCols; col += 8 * kLanes) {
            uint4& x = *reinterpret_cast<uint4*>(tile.at(row, col));
            unsigned pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float2 pair = unpack_pair<__nv_bfloat16>(pairs[n]);
                pairs[n] = pack_pair<__half>(pair.x * factor, pair.y * factor);
            }
            x = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        return __uint_as_float((exponent - 14) << 23);
    }
    template <class Tile>
    __device__ __forceinline__ static Q load_q(const Tile& tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        Q a;
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int half = x / 2, down = x % 2;
            const uint2 four =
                *reinterpret_cast<const uint2*>(tile.at(row + lane / 4 + 8 * down, k + 16 * half + lane % 4 * 4));
            a.r[half][down] = four.x, a.r[half][down + 2] = four.y;
        }
        return a;
    }
    // Of tile i, columns 0 ... 15 in r[2 i] and 16 ... 31 in r[2 i + 1].
    template <class Tile>
    __device__ __forceinline__ static K load_k(const Tile& tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        unsigned r[4];
        ldmatrix_x4(r, Tile::moved(tile.address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16), row, k));
        K b;
#pragma unroll
        for (int x = 0; x < 4; x++) widen<kConverts>(r[x], b.r[x], Byte());
        return b;
    }
    // Of accumulator tile i, keys 0 ... 7 in r[i][0] and 8 ... 15 in r[i][1].
    template <class Tile>
    __device__ __forceinline__ static V load_v(const Tile& tile, int k, int col) {
        const int lane = threadIdx.x % 32;
        unsigned r[4];
        ldmatrix_x4_trans(r, Tile::moved(tile.address(lane % 16, lane / 16 * 16), k, col));
        V b;
#pragma unroll
        for (int x = 0; x < 4; x++) {
            unsigned wide[2];
            widen<kConverts>(swap_middle_bytes(r[x]), wide, Byte());
            b.r[x / 2 * 2][x % 2] = wide[0], b.r[x / 2 * 2 + 1][x % 2] = wide[1];
        }
        return b;
    }
    template <int kTiles>
    __device__ __forceinline__ static P to_p(const Accum (&p)[kTiles][4], int step) {
        return MmaHalf<Element>::to_p(p, step);
    }
    __device__ __forceinline__ static void multiply_qk(Accum (&s)[4], const Q& q, const K& k, int tile, int part) {
        mma_m16n8k16(s, q.r[part], k.r[2 * tile + part][0], k.r[2 * tile + part][1], Element());
    }
    __device__ __forceinline__ static void multiply_pv(Accum (&o)[4], const P& p, const V& v, int tile, int = 0) {
        mma_m16n8k16(o, p.r, v.r[tile][0], v.r[tile][1], Element());
    }
    __device__ __forceinline__ static int column(int u, int e) {
        return u / 2 * 16 + 2 * (2 * static_cast<int>(threadIdx.x % 4) + e) + u % 2;
    }
};

}  // namespace cuattn
