// Score tiles whose rows are the queries of all heads of a group: row r is query r / group of the group's head r % group.
#pragma once
#include "attention/divisor.cuh"
#include "attention/scores.cuh"

namespace cuattn {

struct PackedRows {
    Divisor divisor;  // by group
    int group;
    int row0;  // of the tile
    int head_kv;

    __device__ __forceinline__ int query(int row) const { return divisor.quotient(row0 + row); }
    // Of a row whose query is known.
    __device__ __forceinline__ int head(int row, int query) const { return head_kv * group + row0 + row - query * group; }
};

// As modify_scores, for such a tile; the scale, one for each of the thread's rows, is always applied.
template <bool kChecked, class Tile, class Real, class Mask, class ScoreMod>
__device__ __forceinline__ void modify_packed_scores(Tile& s, const Coord& at, const PackedRows& rows, int col0,
                                                     const Real (&scale)[Tile::kThreadRows], const Mask& mask,
                                                     const ScoreMod& score_mod) {
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; r++) {
        const int row = Tile::row_at(r);
        const int query = rows.query(row), i = min(query, at.seqlen_q - 1);
        const Coord own{at.batch, rows.head(row, query), at.seqlen_q, at.seqlen_k};
#pragma unroll
        for (int x = 0; x < Tile::kSize; x++) {
            if (Tile::thread_row(x) != r) continue;
            const int j = col0 + Tile::col(x);
            s[x] = score_mod.apply(s[x] * scale[r], own, i, kChecked && ScoreMod::kReadsMemory ? min(j, at.seqlen_k - 1) : j);
            if constexpr (kChecked) {
                if (j >= at.seqlen_k || !mask.keep(own, i, j)) s[x] = negative_infinity<Real>();
            }
        }
    }
}

// With one scale for all rows.
template <bool kChecked, class Tile, class Real, class Mask, class ScoreMod>
__device__ __forceinline__ void modify_packed_scores(Tile& s, const Coord& at, const PackedRows& rows, int col0, Real scale,
                                                     const Mask& mask, const ScoreMod& score_mod) {
    Real scales[Tile::kThreadRows];
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; r++) scales[r] = scale;
    modify_packed_scores<kChecked>(s, at, rows, col0, scales, mask, score_mod);
}

}  // namespace cuattn
