// Which query tiles the CTA of a key tile of the backward visits, in which order.
#pragma once
#include "attention/mask.cuh"
#include "attention/tile_map.cuh"
#include "params.cuh"
#include "ptx/opaque.cuh"

namespace cuattn {

// A query head of the group, counted from its first, and a query tile.
struct Place {
    int head, m;
};

// The query tiles that a key tile's CTA visits, over all query heads of its KV head. kEither: those of a head maybe from the
// last to the first; places count as if it were the other way round.
template <class Mask, int kBlockM, int kBlockN, bool kEither = false>
struct QueryTiles {
    int first, count, heads, step;  // first query tile, tiles per head, heads, tiles from one visit to the next
    int n;
    bool descending;
    const unsigned* map;  // of the sequence
    int map_row, map_head, head0, map_words;

    __device__ __forceinline__ static QueryTiles of(const ForwardParams& p, const BackwardParams& g, const Mask& mask,
                                                    const Coord& at, int n, bool descending = false) {
        QueryTiles tiles;
        tiles.descending = descending;
        tiles.n = n, tiles.step = g.q_splits, tiles.first = 0, tiles.count = 0;
        const Range keys{n * kBlockN, min((n + 1) * kBlockN, at.seqlen_k)};
        if (keys.start < keys.stop && at.seqlen_q > 0) {
            const Range rows = mask.q_range(at, keys);
            if (rows.start < rows.stop) {
                tiles.first = rows.start / kBlockM;
                tiles.count = (rows.stop + kBlockM - 1) / kBlockM - tiles.first;
            }
        }
        tiles.heads = tiles.count > 0 ? p.group : 0;
        if constexpr (Mask::kTiled) {
            tiles.map = p.tile_map + at.batch * p.map_batch + at.head * p.map_head;
            tiles.map_row = 2 * p.map_words, tiles.map_head = static_cast<int>(p.map_head), tiles.map_words = p.map_words;
        }
        return tiles;
    }
    __device__ __forceinline__ Place at(Place place) const {
        // NOTE: opaque, or a sum of the two takes a register of its own throughout the loop.
        return kEither && descending ? Place{place.head, 2 * opaque(first) + count - 1 - place.m} : place;
    }
    __device__ __forceinline__ bool visits(Place place) const {
        return place.m >= first && place.m < first + count && (!Mask::kTiled || bit(place, 0));
    }
    __device__ __forceinline__ bool bit(Place place, int kind) const {
        const unsigned* words = map + static_cast<long long>(place.head) * map_head + static_cast<long long>(place.m) * map_row;
        return words[kind * map_words + n / 32] >> (n % 32) & 1;
    }
    __device__ __forceinline__ bool is_end(Place place) const { return place.head >= heads; }
    // The first place to visit that is `ahead` tiles after one, or after that.
    __device__ __forceinline__ Place after(Place place, int ahead) const {
        for (;;) {
            place.m += ahead;
            while (place.m >= first + count && place.head < heads) place.m -= count, place.head++;
            if (!Mask::kTiled || is_end(place) || bit(at(place), 0)) return place;
            ahead = step;
        }
    }
    // Every pair of the tile is visible and exists.
    __device__ __forceinline__ bool full(const Mask& mask, const Coord& at, Place place) const {
        if ((n + 1) * kBlockN > at.seqlen_k) return false;
        if constexpr (Mask::kTiled) return bit(place, 1);
        const int m = place.m;
        return mask.covers(at, {m * kBlockM, min((m + 1) * kBlockM, at.seqlen_q)}, {n * kBlockN, (n + 1) * kBlockN});
    }
};

}  // namespace cuattn
