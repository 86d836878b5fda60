// Masks: the struct of each class of cuattn/masks.py. Members, for forward, backward and decode alike:
//   keep(at, i, j)         whether query i sees key j; both inside their sequences
//   kv_range(at, rows)     keys that some query of `rows` may see (a superset inside which tiles are visited)
//   q_range(at, keys)      queries that some key of `keys` may be seen by
//   covers(at, rows, keys) every query of `rows` sees every key of `keys`: keep() need not be asked
//   classify(at, rows, keys) for masks that read memory: what the tile map stores of a tile
// kTiled says that which tiles to visit is data, read from a tile map built by tile_map.cu; kByElement that keep() does nothing
// but read a number of each pair, so that it is better asked of all pairs at once than behind a branch. kBand: row(at, i)
// yields the keys that query i sees, which may begin before 0, and without kHasStart begin at 0; column(at, j) the queries that
// see key j, from the least integer or to the largest where nothing limits them. `rows` and `keys` are never empty.
#pragma once
#include "attention/coord.cuh"
#include "ptx/special_registers.cuh"

namespace cuattn {

constexpr int kLeastRow = -0x7fffffff - 1, kLastRow = 0x7fffffff;
enum TileClass { kTileEmpty, kTilePartial, kTileFull };

struct alignas(8) FullMask {
    static constexpr bool kTiled = false, kByElement = false, kBand = true, kHasStart = false;
    long long unused;
    __device__ __forceinline__ Range row(const Coord& at, int) const { return {0, at.seqlen_k}; }
    __device__ __forceinline__ Range column(const Coord&, int) const { return {kLeastRow, kLastRow}; }
    __device__ __forceinline__ bool keep(const Coord&, int, int) const { return true; }
    __device__ __forceinline__ Range kv_range(const Coord& at, Range) const { return {0, at.seqlen_k}; }
    __device__ __forceinline__ Range q_range(const Coord& at, Range) const { return {0, at.seqlen_q}; }
    __device__ __forceinline__ bool covers(const Coord&, Range, Range) const { return true; }
    __device__ __forceinline__ TileClass classify(const Coord&, Range, Range) const { return kTileFull; }
};

template <class Mask>
constexpr bool kSeesAll = false;
template <>
constexpr bool kSeesAll<FullMask> = true;

// Keys i + shift - left ... i + shift + right, inclusive: causal, window, any shift.
template <bool kHasLeft, bool kHasRight, bool kBottomRight>
struct alignas(8) BandMask {
    static constexpr bool kTiled = false, kByElement = false, kBand = true, kHasStart = kHasLeft;
    alignas(8) int left;
    alignas(8) int right;

    __device__ __forceinline__ int lo(const Coord& at) const { return (kBottomRight ? at.seqlen_k - at.seqlen_q : 0) - left; }
    __device__ __forceinline__ int hi(const Coord& at) const { return (kBottomRight ? at.seqlen_k - at.seqlen_q : 0) + right; }

    __device__ __forceinline__ bool keep(const Coord& at, int i, int j) const {
        return (!kHasLeft || j >= i + lo(at)) && (!kHasRight || j <= i + hi(at));
    }
    __device__ __forceinline__ Range row(const Coord& at, int i) const {
        return {kHasLeft ? i + lo(at) : 0, kHasRight ? min(at.seqlen_k, i + hi(at) + 1) : at.seqlen_k};
    }
    __device__ __forceinline__ Range column(const Coord& at, int j) const {
        return {kHasRight ? j - hi(at) : kLeastRow, kHasLeft ? j + 1 - lo(at) : kLastRow};
    }
    __device__ __forceinline__ Range kv_range(const Coord& at, Range rows) const {
        return {kHasLeft ? max(0, rows.start + lo(at)) : 0, kHasRight ? min(at.seqlen_k, rows.stop + hi(at)) : at.seqlen_k};
    }
    __device__ __forceinline__ Range q_range(const Coord& at, Range keys) const {
        return {kHasRight ? max(0, keys.start - hi(at)) : 0, kHasLeft ? min(at.seqlen_q, keys.stop - lo(at)) : at.seqlen_q};
    }
    __device__ __forceinline__ bool covers(const Coord& at, Range rows, Range keys) const {
        return (!kHasLeft || keys.start >= rows.stop - 1 + lo(at)) && (!kHasRight || keys.stop - 1 <= rows.start + hi(at));
    }
    __device__ __forceinline__ TileClass classify(const Coord& at, Range rows, Range keys) const {
        const Range visible = kv_range(at, rows);
        if (visible.start >= keys.stop || visible.stop <= keys.start) return kTileEmpty;
        return covers(at, rows, keys) ? kTileFull : kTilePartial;
    }
};

// The class of a tile from what the lanes of a warp have seen of it.
__device__ __forceinline__ TileClass class_of(bool any, bool all) {
    if (!__any_sync(0xffffffffu, any)) return kTileEmpty;
    return __all_sync(0xffffffffu, all) ? kTileFull : kTilePartial;
}
// A tile by its elements. Called by all 32 lanes of a warp, which share them.
template <class Mask>
__device__ __forceinline__ TileClass classify_elements(const Mask& mask, const Coord& at, Range rows, Range keys) {
    bool any = false, all = true;
    for (int i = rows.start; i < rows.stop; i++) {
        for (int j = keys.start + lane_index(); j < keys.stop; j += 32) {
            const bool kept = mask.keep(at, i, j);
            any |= kept, all &= kept;
        }
    }
    return class_of(any, all);
}

// An array of bytes over (batch, heads, queries, keys), strides 0 along broadcast axes.
struct alignas(8) BooleanMask {
    static constexpr bool kTiled = true, kByElement = true, kBand = false;
    const unsigned char* array;
    long long stride_batch, stride_head, stride_q, stride_k;

    __device__ __forceinline__ bool keep(const Coord& at, int i, int j) const {
        return array[at.batch * stride_batch + at.head * stride_head + i * stride_q + j * stride_k] != 0;
    }
    __device__ __forceinline__ Range kv_range(const Coord& at, Range) const { return {0, at.seqlen_k}; }
    __device__ __forceinline__ Range q_range(const Coord& at, Range) const { return {0, at.seqlen_q}; }
    __device__ __forceinline__ bool covers(const Coord&, Range, Range) const { return false; }

    __device__ __forceinline__ TileClass classify(const Coord& at, Range rows, Range keys) const {
        const unsigned char* first = array + at.batch * stride_batch + at.head * stride_head + keys.start;
        const long long misaligned = reinterpret_cast<long long>(first) | stride_q | (keys.stop - keys.start);
        if (stride_k != 1 || misaligned % 16 != 0) return classify_elements(*this, at, rows, keys);
        const int units = (keys.stop - keys.start) / 16;  // of 16 bytes in a row
        bool any = false, all = true;
#pragma unroll 4
        for (int index = lane_index(); index < (rows.stop - rows.start) * units; index += 32) {
            const int row = index / units, unit = index - row * units;
            const uint4 bytes = *reinterpret_cast<const uint4*>(first + (rows.start + row) * stride_q + 16 * unit);
            any |= (bytes.x | bytes.y | bytes.z | bytes.w) != 0;
            all &= (__vcmpeq4(bytes.x, 0) | __vcmpeq4(bytes.y, 0) | __vcmpeq4(bytes.z, 0) | __vcmpeq4(bytes.w, 0)) == 0;
        }
        return class_of(any, all);
    }
};

// The last `columns` keys by an array of bytes over (batch, heads, queries, columns); those before them are visible.
struct alignas(8) TreeMask {
    static constexpr bool kTiled = true, kByElement = false, kBand = false;
    const unsigned char* array;
    long long stride_batch, stride_head, stride_q, stride_k;
    alignas(8) int columns;

    __device__ __forceinline__ bool keep(const Coord& at, int i, int j) const {
        const int column = j - (at.seqlen_k - columns);
        return column < 0 || array[at.batch * stride_batch + at.head * stride_head + i * stride_q + column * stride_k] != 0;
    }
    __device__ __forceinline__ Range kv_range(const Coord& at, Range) const { return {0, at.seqlen_k}; }
    __device__ __forceinline__ Range q_range(const Coord& at, Range) const { return {0, at.seqlen_q}; }
    __device__ __forceinline__ bool covers(const Coord& at, Range, Range keys) const {
        return keys.stop <= at.seqlen_k - columns;
    }
    __device__ __forceinline__ TileClass classify(const Coord& at, Range rows, Range keys) const {
        return covers(at, rows, keys) ? kTileFull : classify_elements(*this, at, rows, keys);
    }
};

// Blocks of block_q x block_k: 0 invisible, 1 visible, 2 + n the elements of partial[n].
template <class Code, bool kPartial>
struct alignas(8) BlockSparse {
    static constexpr bool kTiled = true, kByElement = false, kBand = false;
    const Code* blocks;
    const unsigned char* partial;
    long long stride_batch, stride_head, stride_q, stride_k;
    alignas(8) int block_q;
    alignas(8) int block_k;

    __device__ __forceinline__ int code(const Coord& at, int bi, int bj) const {
        return static_cast<int>(blocks[at.batch * stride_batch + at.head * stride_head + bi * stride_q + bj * stride_k]);
    }
    __device__ __forceinline__ bool keep(const Coord& at, int i, int j) const {
        const int c = code(at, i / block_q, j / block_k);
        if (!kPartial || c < 2) return c != 0;
        return partial[(static_cast<long long>(c - 2) * block_q + i % block_q) * block_k + j % block_k] != 0;
    }
    __device__ __forceinline__ Range kv_range(const Coord& at, Range) const { return {0, at.seqlen_k}; }
    __device__ __forceinline__ Range q_range(const Coord& at, Range) const { return {0, at.seqlen_q}; }
    __device__ __forceinline__ bool covers(const Coord&, Range, Range) const { return false; }
    __device__ __forceinline__ TileClass classify(const Coord& at, Range rows, Range keys) const {
        bool any = false, all = true;
        for (int bi = rows.start / block_q; bi <= (rows.stop - 1) / block_q; bi++) {
            for (int bj = keys.start / block_k; bj <= (keys.stop - 1) / block_k; bj++) {
                const int c = code(at, bi, bj);
                any |= c != 0, all &= c == 1 || (!kPartial && c != 0);
            }
        }
        return !any ? kTileEmpty : all ? kTileFull : kTilePartial;
    }
};

template <class First, class Second>
struct alignas(8) And {
    static constexpr bool kTiled = First::kTiled || Second::kTiled, kByElement = false, kBand = false;
    First first;
    Second second;

    __device__ __forceinline__ bool keep(const Coord& at, int i, int j) const {
        return first.keep(at, i, j) && second.keep(at, i, j);
    }
    __device__ __forceinline__ Range kv_range(const Coord& at, Range rows) const {
        const Range a = first.kv_range(at, rows), b = second.kv_range(at, rows);
        return {max(a.start, b.start), min(a.stop, b.stop)};
    }
    __device__ __forceinline__ Range q_range(const Coord& at, Range keys) const {
        const Range a = first.q_range(at, keys), b = second.q_range(at, keys);
        return {max(a.start, b.start), min(a.stop, b.stop)};
    }
    __device__ __forceinline__ bool covers(const Coord& at, Range rows, Range keys) const {
        return first.covers(at, rows, keys) && second.covers(at, rows, keys);
    }
    __device__ __forceinline__ TileClass classify(const Coord& at, Range rows, Range keys) const {
        const TileClass a = first.classify(at, rows, keys), b = second.classify(at, rows, keys);
        return a < b ? a : b;
    }
};

}  // namespace cuattn
