// The order in which the CTAs of forward_sm90 take query tiles. A persistent grid has fewer CTAs than there are tiles: each
// starts with the tile of its own number and then draws the next one from a counter in global memory.
#pragma once
#include "mainloop/work.cuh"
#include "ptx/global_memory.cuh"

namespace cuattn {

// Lies in workspace that holds anything at all when the kernel starts. `call` equals that of the parameters, which no other
// call has, while `drawn` is valid.
struct TileCounter {
    unsigned long long call;
    int drawn;
};

// A query tile, as the producer hands it to the consumers.
struct alignas(16) QueryTile {
    int m_block;  // -1: there are no more
    int head, batch;
    int unused;
};

template <class Config>
struct TileSchedule {
    int pairs, count;     // of sequences and heads; of tiles
    bool opened = false;  // as far as this thread knows

    __device__ __forceinline__ static TileSchedule of(const ForwardParams& p) {
        const int pairs = p.num_heads * (p.batch + (Config::kPacked ? 1 : 0));
        TileSchedule s;
        s.pairs = pairs, s.count = pairs * p.m_blocks;
        return s;
    }
    // Pairs form sections whose keys and values fit into L2 together. A section is finished before the next one begins. Within
    // it, tiles that run side by side read different heads, and the last query tiles, which under a causal mask are the
    // longest, go first.
    __device__ __forceinline__ QueryTile place(const ForwardParams& p, int tile) const {
        if (tile >= count) return {-1, 0, 0, 0};
        const int first = tile / (p.section * p.m_blocks) * p.section;
        const int size = min(p.section, pairs - first), rest = tile - first * p.m_blocks;
        const int row = rest / size, pair = first + rest - row * size, batch = pair / p.num_heads;
        return {p.m_blocks - 1 - row, pair - batch * p.num_heads, batch, 0};
    }
    __device__ __forceinline__ static Work work(const ForwardParams& p, const QueryTile& tile) {
        Work w;
        w.m_block = tile.m_block;
        w.split = 0;
        w.dv_start = 0;
        w.at.batch = tile.batch;
        w.at.head = tile.head;
        w.head_kv = w.at.head / p.group;
        w.seq = Sequence::of<Config::kPacked, Config::kLens>(p, w.at.batch);
        w.at.seqlen_q = w.seq.seqlen_q;
        w.at.seqlen_k = w.seq.seqlen_k;
        return w;
    }

    // The first CTA, which no other can precede, makes the counter valid.
    __device__ __forceinline__ void open(const ForwardParams& p) const {
        TileCounter* counter = static_cast<TileCounter*>(p.tile_counter);
        if (blockIdx.x != 0) return;
        counter->drawn = 0;
        st_release(&counter->call, p.call);
    }
    // Draws a number, whose tile is `drawn_tile`, or at least `count`. Apart, so that what is done in between hides the
    // latency. NOTE: once for every tile; the last of these draws in a launch closes the counter, so that the same launch can
    // be repeated (by a graph).
    __device__ __forceinline__ int draw(const ForwardParams& p) {
        TileCounter* counter = static_cast<TileCounter*>(p.tile_counter);
        while (!opened && ld_acquire(&counter->call) != p.call) {
        }
        opened = true;
        return atomicAdd(&counter->drawn, 1);
    }
    __device__ __forceinline__ int drawn_tile(const ForwardParams& p, int drawn) const {
        if (drawn == count - 1) st_release(&static_cast<TileCounter*>(p.tile_counter)->call, 0);
        return drawn + static_cast<int>(gridDim.x);
    }
};

}  // namespace cuattn
