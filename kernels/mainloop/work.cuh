// Which part of the problem a CTA works on, and which key tiles it visits.
#pragma once
#include "attention/mask.cuh"
#include "attention/seqlen.cuh"
#include "attention/tile_map.cuh"
#include "ptx/special_registers.cuh"

namespace cuattn {

struct Work {
    Coord at;
    Sequence seq;
    int m_block, split, dv_start;
    int head_kv;

    // NOTE: call it again after the main loop rather than keep the result, whose two dozen registers the loop needs.
    // blockIdx.x counts, fastest first: query tiles (last first, which under a causal mask is the longest first), column chunks
    // of out, heads, batches, splits. CTAs that run together thus share keys and values in L2.
    template <class Config>
    __device__ __forceinline__ static Work of(const ForwardParams& p) {
        unsigned index = cta_index();
        Work w;
        w.m_block = p.m_blocks - 1 - static_cast<int>(index % p.m_blocks);
        index /= p.m_blocks;
        w.dv_start = static_cast<int>(index % p.dv_chunks) * Config::kHeadDimV;
        index /= p.dv_chunks;
        w.at.head = static_cast<int>(index % p.num_heads);
        index /= p.num_heads;
        const unsigned batches = p.batch + (Config::kPacked ? 1 : 0);
        w.at.batch = static_cast<int>(index % batches);
        w.split = static_cast<int>(index / batches);
        w.head_kv = w.at.head / p.group;
        w.seq = Sequence::of<Config::kPacked, Config::kLens>(p, w.at.batch);
        w.at.seqlen_q = w.seq.seqlen_q;
        w.at.seqlen_k = w.seq.seqlen_k;
        return w;
    }
};

// The key tiles of one query tile, in order: `next(n)` is the first one to visit at or after n. kSplits: the plan may divide
// them.
template <class Mask, int kBlockM, int kBlockN, bool kSplits = true>
struct KeyTiles {
    Range blocks;
    TileMap map;
    Range rows;

    __device__ __forceinline__ static KeyTiles of(const ForwardParams& p, const Mask& mask, const Work& w) {
        KeyTiles tiles;
        tiles.rows = {w.m_block * kBlockM, min((w.m_block + 1) * kBlockM, w.at.seqlen_q)};
        tiles.blocks = {0, 0};
        if (tiles.rows.start < tiles.rows.stop && w.at.seqlen_k > 0) {
            const Range keys = mask.kv_range(w.at, tiles.rows);
            if (keys.start < keys.stop) tiles.blocks = {keys.start / kBlockN, (keys.stop + kBlockN - 1) / kBlockN};
        }
        if (kSplits && p.num_splits > 1) {  // each split takes an equal run of the tiles
            const int count = tiles.blocks.stop - tiles.blocks.start;
            const int each = (count + p.num_splits - 1) / p.num_splits;
            tiles.blocks.start = min(tiles.blocks.start + w.split * each, tiles.blocks.stop);
            tiles.blocks.stop = min(tiles.blocks.start + each, tiles.blocks.stop);
        }
        tiles.map = TileMap::of(p, w.at, w.m_block);
        return tiles;
    }
    __device__ __forceinline__ int next(int n) const {
        if constexpr (Mask::kTiled) return map.next(n, blocks.stop);
        return n;
    }
    // Every pair of the tile is visible and exists.
    __device__ __forceinline__ bool full(const Mask& mask, const Coord& at, int n) const {
        if ((n + 1) * kBlockN > at.seqlen_k) return false;
        if constexpr (Mask::kTiled) return map.full(n);
        return mask.covers(at, rows, {n * kBlockN, (n + 1) * kBlockN});
    }
};

}  // namespace cuattn
