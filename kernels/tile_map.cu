// Builds the tile map of a mask that reads memory (attention/tile_map.cuh). One warp per 32 key tiles of a query tile: the warp
// classifies them one after the other and writes one word of each kind.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"
#include "attention/tile_map.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void tile_map(const ForwardArguments<Config>& arguments) {
    const ForwardParams& p = arguments.base;
    const int lane = threadIdx.x % 32;
    unsigned index = blockIdx.x * (Config::kThreads / 32) + threadIdx.x / 32;
    const int word = static_cast<int>(index % p.map_words);
    index /= p.map_words;
    const int m_block = static_cast<int>(index % p.m_blocks);
    index /= p.m_blocks;
    const int heads = p.map_head != 0 ? p.num_heads : 1, batches = p.map_batch != 0 ? p.batch : 1;
    Coord at{0, 0, 0, 0};
    at.head = static_cast<int>(index % heads);
    at.batch = static_cast<int>(index / heads);
    if (at.batch >= batches) return;
    const Sequence seq = Sequence::of<Config::kPacked, Config::kLens>(p, at.batch);
    at.seqlen_q = seq.seqlen_q, at.seqlen_k = seq.seqlen_k;
    unsigned visible = 0, full = 0;
    const Range rows{m_block * Config::kBlockM, min((m_block + 1) * Config::kBlockM, at.seqlen_q)};
    for (int bit = 0; bit < 32 && rows.start < rows.stop; bit++) {
        const int n = word * 32 + bit;
        const Range keys{n * Config::kBlockN, min((n + 1) * Config::kBlockN, at.seqlen_k)};
        if (keys.start >= keys.stop) break;
        const TileClass c = arguments.mask.classify(at, rows, keys);
        visible |= (c != kTileEmpty ? 1u : 0u) << bit;
        full |= (c == kTileFull ? 1u : 0u) << bit;
    }
    if (lane == 0) {
        unsigned* words = const_cast<unsigned*>(p.tile_map) + TileMap::offset(p, at, m_block);
        words[word] = visible;
        words[p.map_words + word] = full;
    }
}

}  // namespace cuattn
