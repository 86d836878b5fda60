// Builds the tile map of a mask that reads memory (attention/tile_map.cuh). One CTA per 32 key tiles of a query tile: each warp
// classifies one of them, and together they are a word of each kind.
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"
#include "attention/tile_map.cuh"

namespace cuattn {

template <class Config>
__device__ __forceinline__ void tile_map(const ForwardArguments<Config>& arguments) {
    const ForwardParams& p = arguments.base;
    static_assert(Config::kThreads == 1024);
    __shared__ TileClass classes[32];
    const int lane = static_cast<int>(threadIdx.x % 32), bit = static_cast<int>(threadIdx.x / 32);
    unsigned index = blockIdx.x;
    const int word = static_cast<int>(index % p.map_words);
    index /= p.map_words;
    const int m_block = static_cast<int>(index % p.m_blocks);
    index /= p.m_blocks;
    const int heads = p.map_head != 0 ? p.num_heads : 1;
    Coord at{0, 0, 0, 0};
    at.head = static_cast<int>(index % heads);
    at.batch = static_cast<int>(index / heads);
    const Sequence seq = Sequence::of<Config::kPacked, Config::kLens>(p, at.batch);
    at.seqlen_q = seq.seqlen_q, at.seqlen_k = seq.seqlen_k;
    const int n = word * 32 + bit;
    const Range rows{m_block * Config::kBlockM, min((m_block + 1) * Config::kBlockM, at.seqlen_q)};
    const Range keys{n * Config::kBlockN, min((n + 1) * Config::kBlockN, at.seqlen_k)};
    TileClass found = kTileEmpty;
    if (rows.start < rows.stop && keys.start < keys.stop) found = arguments.mask.classify(at, rows, keys);
    if (lane == 0) classes[bit] = found;
    __syncthreads();
    if (bit != 0) return;
    const unsigned visible = __ballot_sync(0xffffffffu, classes[lane] != kTileEmpty);
    const unsigned full = __ballot_sync(0xffffffffu, classes[lane] == kTileFull);
    if (lane == 0) {
        unsigned* words = const_cast<unsigned*>(p.tile_map) + TileMap::offset(p, at, m_block);
        words[word] = visible;
        words[p.map_words + word] = full;
    }
}

}  // namespace cuattn
