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
        const TileColumn column = {col0 + Tile::col(0), Tile::col(x) - Tile::col(0)};
        const int j = column;
        if constexpr (!kFoldScale) {
            if constexpr (kChecked && ScoreMod::kReadsMemory) {
                s[x] = score_mod.apply(s[x] * scale, at, i, min(j, at.seqlen_k - 1));
            } else {
                s[x] = score_mod.apply(s[x] * scale, at, i, column);
            }
        }
        if constexpr (kChecked) {
            if constexpr (Mask::kBand) {  // the limits of a row against what is known of a column when the kernel is compiled
                const Range seen = mask.row(at, i);
                const bool before = Mask::kHasStart && column.step < seen.start - column.start;
                if (before | (column.step >= seen.stop - column.start)) s[x] = negative_infinity<Real>();
            } else if constexpr (Mask::kByElement) {  // no branch: all loads are in flight together
                const bool kept = mask.keep(at, i, min(j, at.seqlen_k - 1));
                if (!kept | (j >= at.seqlen_k)) s[x] = negative_infinity<Real>();
            } else {
                if (j >= at.seqlen_k || !mask.keep(at, i, j)) s[x] = negative_infinity<Real>();
            }
        }
    }
}

// Probabilities that dropout removes become 0; the others keep their size (out is rescaled once, at the end). kAligned: col0 is
// a multiple of 32, and a thread's columns are pairs eight apart.
template <bool kAligned = false, class Tile>
__device__ __forceinline__ void drop_probabilities(Tile& p, const Coord& at, int row0, int col0, unsigned long long seed,
                                                   int threshold) {
#pragma unroll
    for (int x = 0; x < Tile::kSize; x++) {
        const int i = row0 + Tile::row(x);
        if constexpr (kAligned) {
            const TileColumn column = {col0 + Tile::col(0), Tile::col(x) - Tile::col(0)};
            if (!dropout_keep(seed, threshold, at, i, column)) p[x] = 0;
        } else {
            if (!dropout_keep(seed, threshold, at, i, col0 + Tile::col(x))) p[x] = 0;
        }
    }
}

// The elementwise part of the backward, in place: raw products s = q k and dp = dout v become the probabilities that reached
// out (dropped ones 0, not rescaled) and the gradients of the raw, scaled scores. stats(r) gives the RowStats of the thread's
// row r. `factor` turns a score into the exponent of 2.
template <class Config, bool kChecked, class Tile, class Real, class Mask, class ScoreMod, class Stats, class Sums>
__device__ __forceinline__ void score_gradients(Tile& s, Tile& dp, const Coord& at, int row0, int col0, Real scale, Real factor,
                                                const Mask& mask, const ScoreMod& score_mod, const Stats& stats, Sums& sums,
                                                unsigned long long seed, int threshold, Real dropout_scale) {
    row0 = opaque(row0);
    constexpr bool kReads = Mask::kTiled || ScoreMod::kReadsMemory;
#pragma unroll
    for (int x = 0; x < Tile::kSize; x++) {
        const int row = row0 + Tile::row(x), i = kReads ? min(row, at.seqlen_q - 1) : row;
        const int col = col0 + Tile::col(x), j = kChecked && ScoreMod::kReadsMemory ? min(col, at.seqlen_k - 1) : col;
        const Real raw = Config::kFoldScale ? s[x] : s[x] * scale;
        sums.x = x;
        Real score = raw;
        if constexpr (!Config::kFoldScale) score = score_mod.apply(raw, at, i, j);
        const auto row_stats = stats(Tile::thread_row(x));
        Real p = row_stats.probability(score, factor), gradient = dp[x];
        bool kept = true;
        if constexpr (Config::kDropout) {
            kept = dropout_keep(seed, threshold, at, row, col);
            gradient = kept ? gradient * dropout_scale : Real(0);
        }
        gradient = p * (gradient - row_stats.delta);
        if constexpr (kChecked) {
            const bool visible = col < at.seqlen_k && mask.keep(at, i, col);
            p = visible ? p : Real(0), gradient = visible ? gradient : Real(0);
        }
        if constexpr (ScoreMod::kReadsMemory) {  // what a clamped row read may not be finite
            p = row < at.seqlen_q ? p : Real(0), gradient = row < at.seqlen_q ? gradient : Real(0);
        }
        s[x] = kept ? p : Real(0);
        if constexpr (!Config::kFoldScale) {
            // Where nothing is visible, a derivative may be anything.
            const Real pulled = score_mod.pull(raw, gradient, at, i, j, sums);
            gradient = kChecked && gradient == Real(0) ? gradient : pulled;
        }
        dp[x] = gradient;
    }
}

// Which elements of a tile a band mask shows: of the thread's columns the rows that see them, counted from its first, are the
// limits against what is known of a row when the kernel is compiled.
template <class Tile, class Mask>
struct SeenRows {
    Range seen[Tile::kThreadCols];

    __device__ __forceinline__ static SeenRows of(const Mask& mask, const Coord& at, int row0, int col0) {
        SeenRows rows;
#pragma unroll
        for (int c = 0; c < Tile::kThreadCols; c++) {
            const int j = col0 + Tile::col_at(c), first = row0 + Tile::row(0);
            const Range range = mask.column(at, j);
            rows.seen[c].start = j >= at.seqlen_k ? kLastRow : range.start == kLeastRow ? kLeastRow : range.start - first;
            rows.seen[c].stop = range.stop == kLastRow ? kLastRow : range.stop - first;
        }
        return rows;
    }
    __device__ __forceinline__ bool show(int x) const {
        const Range rows = seen[Tile::thread_col(x)];
        const int step = Tile::row(x) - Tile::row(0);
        return step >= rows.start & (!Mask::kHasStart || step < rows.stop);
    }
};

// score_gradients where nothing but a band mask is between products and exponentials. What it hides is hidden first, so that
// the rest is the same for all tiles: one run of instructions, in which exponentials and the arithmetic of others overlap.
// stats.lse_of(r) and delta_of(r) give four rows from the thread's row r on.
template <class Tile, class Mask>
__device__ __forceinline__ void hide(Tile& sums, float by, const Coord& at, int row0, int col0, const Mask& mask) {
    const auto rows = SeenRows<Tile, Mask>::of(mask, at, opaque(row0), col0);
#pragma unroll
    for (int x = 0; x < Tile::kSize; x++) {
        if (!rows.show(x)) sums[x] = by;
    }
}
template <class Tile, class Stats>
__device__ __forceinline__ void plain_exponents(Tile& s, float factor, const Stats& stats) {
    constexpr int kGroup = 4 * Tile::kSize / Tile::kThreadRows;  // elements of four rows
#pragma unroll
    for (int x = 0; x < Tile::kSize; x += kGroup) {
        const auto lse = stats.lse_of(Tile::thread_row(x));
#pragma unroll
        for (int e = x; e < x + kGroup; e++) s[e] = s[e] * factor - lse.row[Tile::thread_row(e) % 4];
    }
}
// Of elements [kFirst, kStop). kSpared of eight are left to the units that add and multiply, which wait for the exponentials of
// the others.
template <int kFirst, int kStop, int kSpared, class Tile>
__device__ __forceinline__ void plain_probabilities(Tile& s) {
#pragma unroll
    for (int x = kFirst; x < kStop; x++) s[x] = x % 8 < kSpared ? exp2_cubic(s[x]) : exp2_fast(s[x]);
}
template <class Tile, class Stats>
__device__ __forceinline__ void plain_gradients(Tile& s, Tile& dp, const Stats& stats) {
    constexpr int kGroup = 4 * Tile::kSize / Tile::kThreadRows;
#pragma unroll
    for (int x = 0; x < Tile::kSize; x += kGroup) {
        const auto delta = stats.delta_of(Tile::thread_row(x));
#pragma unroll
        for (int e = x; e < x + kGroup; e++) dp[e] = s[e] * (dp[e] - delta.row[Tile::thread_row(e) % 4]);
    }
}

// score_gradients in two parts, for a loop that uses the probabilities before dp is there. For scores that are not dropped, and
// modified by nothing but a StagedBias, which pulls gradients back without knowing the scores. The first leaves -0 where
// nothing is visible, which no exponential yields, for the second to know it by.
constexpr int kHiddenBits = -0x7fffffff - 1;  // of -0.0f
template <class Config, bool kChecked, class Tile, class Real, class Mask, class ScoreMod, class Stats, class Sums>
__device__ __forceinline__ void score_probabilities(Tile& s, const Coord& at, int row0, int col0, Real scale, Real factor,
                                                    const Mask& mask, const ScoreMod& score_mod, const Stats& stats,
                                                    Sums& sums) {
    row0 = opaque(row0);
    SeenRows<Tile, Mask> rows;
    if constexpr (kChecked && Mask::kBand) rows = SeenRows<Tile, Mask>::of(mask, at, row0, col0);
#pragma unroll
    for (int x = 0; x < Tile::kSize; x++) {
        const int i = row0 + Tile::row(x), j = col0 + Tile::col(x);
        sums.x = x;
        const Real score = Config::kFoldScale ? s[x] : score_mod.apply(s[x] * scale, at, i, j);
        const Real p = stats(Tile::thread_row(x)).probability(score, factor);
        bool visible = true;
        if constexpr (kChecked && Mask::kBand) {
            visible = rows.show(x);
        } else if constexpr (kChecked) {
            visible = j < at.seqlen_k && mask.keep(at, i, j);
        }
        s[x] = visible ? p : __int_as_float(kHiddenBits);
    }
}
template <class Config, bool kChecked, class Tile, class Mask, class ScoreMod, class Stats, class Sums>
__device__ __forceinline__ void probability_gradients(Tile& dp, Tile& p, const Coord& at, int row0, int col0, const Mask& mask,
                                                      const ScoreMod& score_mod, const Stats& stats, Sums& sums) {
    row0 = opaque(row0);
#pragma unroll
    for (int x = 0; x < Tile::kSize; x++) {
        const int i = row0 + Tile::row(x), j = col0 + Tile::col(x);
        const auto gradient = p[x] * (dp[x] - stats(Tile::thread_row(x)).delta);
        // What is hidden may have a dp or a delta that is not finite.
        dp[x] = !kChecked || __float_as_int(p[x]) != kHiddenBits ? gradient : 0;
        sums.x = x;
        if constexpr (!Config::kFoldScale) dp[x] = score_mod.pull(dp[x], dp[x], at, i, j, sums);
    }
}

}  // namespace cuattn
