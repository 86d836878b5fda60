// Masks, score modifications and dropout on a tile of scores held in registers. Tile::row(x) and Tile::col(x) place element x,
// so the same loops serve every fragment layout, transposed ones included.
#pragma once
#include "attention/dropout.cuh"
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "ptx/math.cuh"
#include "ptx/opaque.cuh"

namespace cuattn {

// Raw products to scores: scaled and modified (unless the scale is folded into the exponential), -inf where invisible.
// kChecked: some pair of the tile may be invisible or past the end of the keys.
template <bool kFoldScale, bool kChecked, class Tile, class Real, class Mask, class ScoreMod>
__device__ __forceinline__ void modify_scores(Tile& s, const Coord& at, int row0, int col0, Real scale, const Mask& mask,
                                              const ScoreMod& score_mod) {
    // NOTE: opaque, or every row's limits are hoisted out of the main loop into registers that it needs.
    row0 = opaque(row0);
    constexpr bool kReads = Mask::kTiled || ScoreMod::kReadsMemory;
#pragma unroll
    for (int x = 0; x < (kFoldScale && !kChecked ? 0 : Tile::kSize); x++) {
        // Memory is read inside the sequences only; what a clamped coordinate yields is discarded.
        const int i = kReads ? min(row0 + Tile::row(x), at.seqlen_q - 1) : row0 + Tile::row(x);
        const int j = col0 + Tile::col(x);
        if constexpr (!kFoldScale) {
            s[x] = score_mod.apply(s[x] * scale, at, i, kChecked && ScoreMod::kReadsMemory ? min(j, at.seqlen_k - 1) : j);
        }
        if constexpr (kChecked) {
            if (j >= at.seqlen_k || !mask.keep(at, i, j)) s[x] = negative_infinity<Real>();
        }
    }
}

// Probabilities that dropout removes become 0; the others keep their size (out is rescaled once, at the end).
template <class Tile>
__device__ __forceinline__ void drop_probabilities(Tile& p, const Coord& at, int row0, int col0, unsigned long long seed,
                                                   int threshold) {
#pragma unroll
    for (int x = 0; x < Tile::kSize; x++) {
        if (!dropout_keep(seed, threshold, at, row0 + Tile::row(x), col0 + Tile::col(x))) p[x] = 0;
    }
}

}  // namespace cuattn
