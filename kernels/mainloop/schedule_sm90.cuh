// The order in which the CTAs of forward_sm90 take query tiles. A grid smaller than the number of tiles is persistent: its CTAs
// take turns, back and forth (0 ... n - 1, n - 1 ... 0, ...), so that each gets long and short ones.
#pragma once
#include "mainloop/work.cuh"

namespace cuattn {

template <class Config>
struct TileSchedule {
    // Sequence-head pairs form sections whose keys and values fit into L2 together. A section is finished before the next one
    // begins. Within it, tiles that run side by side read different heads, and the last query tiles, which under a causal mask
    // are the longest, go first.
    static constexpr int kSectionBytes = 32 << 20;

    int pairs, section, count;

    __device__ __forceinline__ static TileSchedule of(const ForwardParams& p) {
        TileSchedule s;
        s.pairs = p.num_heads * (p.batch + (Config::kPacked ? 1 : 0));
        const long long bytes = static_cast<long long>(p.seqlen_k) * (2 * (Config::kHeadDim + Config::kHeadDimV));
        const long long fitting = kSectionBytes / (bytes > 0 ? bytes : 1) * p.group;
        s.section = static_cast<int>(min(max(fitting, 1ll), static_cast<long long>(s.pairs)));
        s.count = s.pairs * p.m_blocks;
        return s;
    }
    // The tile of this CTA in round `round`, or at least `count` when there is none.
    __device__ __forceinline__ static int tile(int round) {
        const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
        return round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta);
    }
    __device__ __forceinline__ Work work(const ForwardParams& p, int tile) const {
        const int first = tile / (section * p.m_blocks) * section;
        const int size = min(section, pairs - first), rest = tile - first * p.m_blocks;
        const int pair = first + rest % size;
        Work w;
        w.m_block = p.m_blocks - 1 - rest / size;
        w.split = 0;
        w.dv_start = 0;
        w.at.batch = pair / p.num_heads;
        w.at.head = pair - w.at.batch * p.num_heads;
        w.head_kv = w.at.head / p.group;
        w.seq = Sequence::of<Config::kPacked, Config::kLens>(p, w.at.batch);
        w.at.seqlen_q = w.seq.seqlen_q;
        w.at.seqlen_k = w.seq.seqlen_k;
        return w;
    }
};

}  // namespace cuattn
