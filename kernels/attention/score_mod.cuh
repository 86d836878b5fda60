// Score modifications: the struct of each class of cuattn/score_mods.py. User code is generated as one more such struct.
//   apply(s, at, i, j)  the modified score of query i and key j; s is already scaled
//   grad(s, at, i, j)   d apply / d s at the unmodified s
//   pull(s, ds, at, i, j, sums)   the gradient of the loss by s, from ds, that by the modified score; what parameters get of it
//                       goes to `sums` (attention/mod_sums.cuh)
//   flush(sums, at)     hands over what `sums` has gathered for one head
// kReadsMemory: i and j must lie inside their sequences, so callers clamp them in ragged tiles.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "attention/coord.cuh"
#include "ptx/math.cuh"
#include "ptx/opaque.cuh"

namespace cuattn {

struct alignas(8) NoScoreMod {
    static constexpr bool kIdentity = true, kReadsMemory = false;
    long long unused;
    template <class Real>
    __device__ __forceinline__ Real apply(Real s, const Coord&, int, int) const {
        return s;
    }
    template <class Real>
    __device__ __forceinline__ Real grad(Real, const Coord&, int, int) const {
        return Real(1);
    }
    template <class Real, class Sums>
    __device__ __forceinline__ Real pull(Real, Real ds, const Coord&, int, int, Sums&) const {
        return ds;
    }
    template <class Sums>
    __device__ __forceinline__ void flush(Sums&, const Coord&) const {}
};

// tanh of a float. The single-instruction form has an error of 2^-11.
//
// 1 - 2 / (e^2x + 1), absolute error 2e-7; the series where that is no longer small beside x.
struct ExponentialTanh {
    __device__ __forceinline__ static float of(float x) {
        const float wide = 1.0f - 2.0f * reciprocal_fast(exp2_fast(x * static_cast<float>(2.0 * kLog2e)) + 1.0f);
        const float x2 = x * x;
        const float narrow = x * (1.0f + x2 * (-1.0f / 3.0f + x2 * (2.0f / 15.0f)));
        return fabsf(x) < 0.06f ? narrow : wide;
    }
};
// x P(x^2) / Q(x^2), of the least relative error (2e-7) on [-8, 8], beyond which tanh is 1 up to 2.3e-7. One MUFU instead of
// two, for a loop whose exponentials are bound by them; it takes more registers.
struct RationalTanh {
    __device__ __forceinline__ static float of(float x) {
        x = clamp(x, -8.0f, 8.0f);
        const float y = x * x;
        const float p = (((-6.14229556e-09f * y + 7.16249588e-06f) * y + 0.00269640866f) * y + 0.127123103f) * y + 0.999999762f;
        const float q = ((0.000196745081f * y + 0.0228502955f) * y + 0.460454702f) * y + 1.0f;
        return x * p * reciprocal_fast(q);
    }
};

// cap * tanh(s / cap)
template <class Real, class Tanh>
struct alignas(8) SoftCap {
    static constexpr bool kIdentity = false, kReadsMemory = false;
    alignas(8) Real cap;
    alignas(8) Real inverse;

    __device__ __forceinline__ static float tanh_of(float x) { return Tanh::of(x); }
    __device__ __forceinline__ static double tanh_of(double x) { return tanh(x); }
    __device__ __forceinline__ Real apply(Real s, const Coord&, int, int) const { return cap * tanh_of(s * inverse); }
    __device__ __forceinline__ Real grad(Real s, const Coord&, int, int) const {
        const Real t = tanh_of(s * inverse);
        return Real(1) - t * t;
    }
    template <class Sums>
    __device__ __forceinline__ Real pull(Real s, Real ds, const Coord& at, int i, int j, Sums&) const {
        return ds * grad(s, at, i, j);
    }
    template <class Sums>
    __device__ __forceinline__ void flush(Sums&, const Coord&) const {}
};

// s - slope * |i + seqlen_k - seqlen_q - j|
template <class Real, class Slope>
struct alignas(8) Alibi {
    static constexpr bool kIdentity = false, kReadsMemory = false;
    const Slope* slopes;
    long long stride_batch, stride_head;

    template <class Column>
    __device__ __forceinline__ Real apply(Real s, const Coord& at, int i, const Column& j) const {
        const Real slope = static_cast<Real>(slopes[at.batch * stride_batch + at.head * stride_head]);
        return s - slope * magnitude(distance<Real>(i + at.seqlen_k - at.seqlen_q, j));
    }
    __device__ __forceinline__ Real grad(Real, const Coord&, int, int) const { return Real(1); }
    template <class Sums>
    __device__ __forceinline__ Real pull(Real, Real ds, const Coord&, int, int, Sums&) const {
        return ds;
    }
    template <class Sums>
    __device__ __forceinline__ void flush(Sums&, const Coord&) const {}
};

// s + array[batch, head, i, j], strides 0 along broadcast axes. kWanted: the backward returns its gradient. kPairs: elements 2
// n and 2 n + 1 of a row lie in one aligned word, so a thread that holds neighbouring scores loads it once.
template <class Real, class Element, bool kWanted, bool kPairs>
struct alignas(8) Bias {
    static constexpr bool kIdentity = false, kReadsMemory = true;
    const Element* array;
    long long stride_batch, stride_head, stride_q, stride_k;

    struct alignas(2 * sizeof(Element)) Pair {
        Element even, odd;
    };
    __device__ __forceinline__ Real apply(Real s, const Coord& at, int i, int j) const {
        const Element* row = array + at.batch * stride_batch + at.head * stride_head + i * stride_q;
        if constexpr (kPairs) {
            const Pair pair = *reinterpret_cast<const Pair*>(row + (j & ~1));
            return s + static_cast<Real>(j & 1 ? pair.odd : pair.even);
        } else {
            return s + static_cast<Real>(row[j * stride_k]);
        }
    }
    __device__ __forceinline__ Real grad(Real, const Coord&, int, int) const { return Real(1); }
    template <class Sums>
    __device__ __forceinline__ Real pull(Real, Real ds, const Coord&, int i, int j, Sums& sums) const {
        if constexpr (kWanted) sums.bias(ds, i, j);
        return ds;
    }
    template <class Sums>
    __device__ __forceinline__ void flush(Sums&, const Coord&) const {}
};

// A Bias whose tile has been brought nearer: `source(i, j)` yields the elements of rows row0 ... and columns col0 ...
template <class Real, class Source, bool kWanted>
struct StagedBias {
    static constexpr bool kIdentity = false, kReadsMemory = false;
    Source source;
    int row0, col0;

    template <class Any>
    __device__ __forceinline__ Any apply(Any s, const Coord&, int i, int j) const {
        return s + static_cast<Any>(source(i - row0, j - col0));
    }
    template <class Any, class Sums>
    __device__ __forceinline__ Any pull(Any, Any ds, const Coord&, int i, int j, Sums& sums) const {
        if constexpr (kWanted) sums.bias(ds, i, j);
        return ds;
    }
};

template <bool kFirst, class First, class Second>
struct Either {
    using Type = First;
};
template <class First, class Second>
struct Either<false, First, Second> {
    using Type = Second;
};

// Modifications that a loop may apply to a whole tile of raw products instead of `apply`, for one head and a positive scale.
// Afterwards they are scores in units of which factor(), positive too, makes exponents of 2. For loops that the number of
// instructions bounds.
// kLinear: in a tile of which all keys lie on one side of the diagonal, exponents are linear in the column (`line`). kAsksAll:
// where `asks`, what becomes of a product depends on all of its warp.
template <class Mod>
struct WholeTile {
    static constexpr bool kExists = false, kLinear = false, kAsksAll = false;
};

// What an exponent of 2 is besides a score times the factor: start[r] + step * columns, in row r of a thread, counted from the
// thread's first column.
struct Line {
    float step, start[2];
};

template <class Tanh>
struct WholeTile<SoftCap<float, Tanh>> {
    static constexpr bool kExists = true, kLinear = false, kAsksAll = true;
    float unit;  // makes four times the argument of tanh out of a product

    __device__ __forceinline__ static float factor(const SoftCap<float, Tanh>& mod, float) {
        return mod.cap * static_cast<float>(kLog2e);
    }
    __device__ __forceinline__ static WholeTile of(const SoftCap<float, Tanh>& mod, const Coord&, float scale) {
        return {4.0f * scale * mod.inverse};
    }
    // Scores are mostly much smaller than the cap. While all of a warp's are below half of it, a polynomial replaces the
    // division: x P(x^2), of the least relative error (2.3e-5). Four times the argument is below 2 if the uppermost bit of its
    // exponent is 0.
    template <class Tile>
    __device__ __forceinline__ void apply(Tile& s, const Coord&, int, int, bool asks) const {
        unsigned bits[4] = {};  // four chains, or each operation waits for the last
#pragma unroll
        for (int x = 0; x < Tile::kSize; x++) {
            s[x] *= unit;
            bits[x / 2 % 4] |= __float_as_uint(s[x]);
        }
        const unsigned all = bits[0] | bits[1] | bits[2] | bits[3];
        if (asks && __all_sync(0xffffffffu, (all & 0x40000000u) == 0)) {
#pragma unroll
            for (int x = 0; x < Tile::kSize; x++) {
                const float y = s[x] * s[x];
                s[x] *= (0.000112509615f * y - 0.00518268019f) * y + 0.249994359f;
            }
        } else {
#pragma unroll
            for (int x = 0; x < Tile::kSize; x++) s[x] = Tanh::of(0.25f * s[x]);
        }
    }
};

// Modifications that bound scores so closely to 0 that no maximum is needed: from raw products to exponents of 2. Where
// within_reach(), exponent(x) is that of each element; `cap` is for any. kScaledQueries: the products are with queries times
// power(), of bfloat16; otherwise within_reach() scales them.
template <class Mod, bool kScaledQueries>
struct BoundedTile {
    static constexpr bool kExists = false;
};

template <class Tanh, bool kScaledQueries>
struct BoundedTile<SoftCap<float, Tanh>, kScaledQueries> {
    static constexpr bool kExists = true;
    using Mod = SoftCap<float, Tanh>;
    float linear, cubic;  // of the exponent in a scaled product: the least relative error (6.3e-5) to a quarter of the cap
    float unit;           // scales a product where queries are not scaled
    float offset;         // what exponents are taken relative to, so that probabilities are small, but no less than 2^-100

    // Eight times the argument of tanh, by a product; and the power of two that is no less.
    __device__ __forceinline__ static float eighth(const Mod& mod, float scale) { return 8.0f * scale * mod.inverse; }
    __device__ __forceinline__ static float power(const Mod& mod, float scale) {
        return __uint_as_float((__float_as_uint(eighth(mod, scale)) + 0x7fffffu) & 0x7f800000u);
    }
    // Eight times the argument of tanh, by a scaled product: at most 1.
    __device__ __forceinline__ static float rest(const Mod& mod, float scale) {
        return kScaledQueries ? eighth(mod, scale) / power(mod, scale) : 1.0f;
    }
    __device__ __forceinline__ static float most(const Mod& mod) { return mod.cap * static_cast<float>(kLog2e); }
    __device__ __forceinline__ static BoundedTile of(const Mod& mod, float scale) {
        const float x = rest(mod, scale);
        const float offset = min(most(mod), 100.0f - most(mod));
        return {0.124992081f * most(mod) * x, -0.000635126957f * most(mod) * (x * x * x), eighth(mod, scale), offset};
    }
    // All of the warp's scaled products are below 2: the uppermost bits of their exponents are 0.
    template <class Tile>
    __device__ __forceinline__ bool within_reach(Tile& s) const {
        unsigned bits[4] = {};  // four chains, or each operation waits for the last
#pragma unroll
        for (int x = 0; x < Tile::kSize; x++) {
            if constexpr (!kScaledQueries) s[x] *= unit;
            bits[x / 2 % 4] |= __float_as_uint(s[x]);
        }
        const unsigned all = bits[0] | bits[1] | bits[2] | bits[3];
        return __all_sync(0xffffffffu, (all & 0x40000000u) == 0);
    }
    __device__ __forceinline__ float exponent(float x) const { return x * (cubic * (x * x) + linear) - offset; }
    // bfloat16 rounds a score by four times the error of tanh_fast.
    template <class Tile>
    __device__ __forceinline__ void cap(Tile& s, bool near, const Mod& mod, float scale) const {
        if (near) {
#pragma unroll
            for (int x = 0; x < Tile::kSize; x++) s[x] = exponent(s[x]);
        } else {
            const float argument = 0.125f * rest(mod, scale);
#pragma unroll
            for (int x = 0; x < Tile::kSize; x++) s[x] = most(mod) * tanh_fast(argument * s[x]) - offset;
        }
    }
};

template <class Slope>
struct WholeTile<Alibi<float, Slope>> {
    static constexpr bool kExists = true, kLinear = true, kAsksAll = false;
    float slope;

    __device__ __forceinline__ static float factor(const Alibi<float, Slope>&, float scale) {
        return scale * static_cast<float>(kLog2e);
    }
    __device__ __forceinline__ static WholeTile of(const Alibi<float, Slope>& mod, const Coord& at, float scale) {
        return {static_cast<float>(mod.slopes[at.batch * mod.stride_batch + at.head * mod.stride_head]) / scale};
    }
    template <class Tile>
    __device__ __forceinline__ void apply(Tile& s, const Coord& at, int row0, int col0, bool) const {
        row0 = opaque(row0);
#pragma unroll
        for (int x = 0; x < Tile::kSize; x++) {
            const TileColumn column = {col0 + Tile::col(0), Tile::col(x) - Tile::col(0)};
            const int i = row0 + Tile::row(x);
            s[x] -= slope * magnitude(distance<float>(i + at.seqlen_k - at.seqlen_q, column));
        }
    }
    // Whether all keys of kCols columns are before or after the diagonal of kRows rows, or on it; 0: neither.
    template <int kRows, int kCols>
    __device__ __forceinline__ static int side(const Coord& at, int row0, int col0) {
        const int first = row0 + at.seqlen_k - at.seqlen_q;
        return col0 + kCols - 1 <= first ? 1 : col0 >= first + kRows - 1 ? -1 : 0;
    }
    // By how much the score of row i with its nearest key may exceed those of kCols columns; to 2^most in probabilities.
    template <int kCols>
    __device__ __forceinline__ float rise(const Coord& at, int i, int col0, float factor, float most) const {
        const int nearest = max(0, min(i + at.seqlen_k - at.seqlen_q, at.seqlen_k - 1));
        const int columns = max(0, max(nearest - (col0 + kCols - 1), col0 - nearest));
        return min(max(slope, 0.0f) * static_cast<float>(columns), most / factor);
    }
    // The line of a tile on one side, for rows with such maxima, by which exponents are diminished.
    template <class Tile>
    __device__ __forceinline__ Line line(int side, const Coord& at, int row0, int col0, float factor,
                                         const float (&offset)[2]) const {
        const float step = static_cast<float>(side) * slope * factor;
        Line result = {step, {}};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = row0 + Tile::row_at(r) + at.seqlen_k - at.seqlen_q;
            result.start[r] = -step * distance<float>(i, col0 + Tile::col(0)) - offset[r];
        }
        return result;
    }
};

// second(first(s))
template <class First, class Second>
struct alignas(8) Chain {
    static constexpr bool kIdentity = First::kIdentity && Second::kIdentity;
    static constexpr bool kReadsMemory = First::kReadsMemory || Second::kReadsMemory;
    First first;
    Second second;

    template <class Real, class Column>
    __device__ __forceinline__ Real apply(Real s, const Coord& at, int i, const Column& j) const {
        return second.apply(first.apply(s, at, i, j), at, i, j);
    }
    template <class Real>
    __device__ __forceinline__ Real grad(Real s, const Coord& at, int i, int j) const {
        return second.grad(first.apply(s, at, i, j), at, i, j) * first.grad(s, at, i, j);
    }
    template <class Real, class Sums>
    __device__ __forceinline__ Real pull(Real s, Real ds, const Coord& at, int i, int j, Sums& sums) const {
        return first.pull(s, second.pull(first.apply(s, at, i, j), ds, at, i, j, sums), at, i, j, sums);
    }
    template <class Sums>
    __device__ __forceinline__ void flush(Sums& sums, const Coord& at) const {
        first.flush(sums, at), second.flush(sums, at);
    }
};

// The functions that user code finds by these names: the library's, or, beside elements of 16 bits, those that compile to a few
// instructions. Their error, 2^-21 of the result or of 1, is far below such an element's.
struct LibraryFunctions {};
struct FastFunctions {
    __device__ __forceinline__ static float exp(float x) { return exp2_fast(x * static_cast<float>(kLog2e)); }
    __device__ __forceinline__ static float exp2(float x) { return exp2_fast(x); }
    __device__ __forceinline__ static float log(float x) { return log2_fast(x) * static_cast<float>(kLn2); }
    __device__ __forceinline__ static float log2(float x) { return log2_fast(x); }
    __device__ __forceinline__ static float tanh(float x) { return RationalTanh::of(x); }
};

// The one Bias among modifications, for a kernel that stages its tiles: `get` finds it, `stage` puts a StagedBias in its place.
template <class Mod>
struct BiasIn {
    static constexpr bool kFound = false;
    using Item = void;
    template <class Source>
    __device__ __forceinline__ static Mod stage(const Mod& mod, const Source&, int, int) {
        return mod;
    }
};
template <class Real, class Element, bool kWanted, bool kPairs>
struct BiasIn<Bias<Real, Element, kWanted, kPairs>> {
    static constexpr bool kFound = true;
    using Item = Element;
    using Mod = Bias<Real, Element, kWanted, kPairs>;
    __device__ __forceinline__ static const Mod& get(const Mod& mod) { return mod; }
    template <class Source>
    __device__ __forceinline__ static auto stage(const Mod&, const Source& source, int row0, int col0) {
        return StagedBias<Real, Source, kWanted>{source, row0, col0};
    }
};
template <class First, class Second>
struct BiasIn<Chain<First, Second>> {
    static constexpr bool kFound = BiasIn<First>::kFound || BiasIn<Second>::kFound;
    static constexpr bool kInFirst = BiasIn<First>::kFound;
    using Item = typename Either<kInFirst, BiasIn<First>, BiasIn<Second>>::Type::Item;
    template <class Source>
    __device__ __forceinline__ static auto stage(const Chain<First, Second>& mod, const Source& source, int row0, int col0) {
        auto first = BiasIn<First>::stage(mod.first, source, row0, col0);
        auto second = BiasIn<Second>::stage(mod.second, source, row0, col0);
        return Chain<decltype(first), decltype(second)>{first, second};
    }
    __device__ __forceinline__ static const auto& get(const Chain<First, Second>& mod) {
        if constexpr (kInFirst) {
            return BiasIn<First>::get(mod.first);
        } else {
            return BiasIn<Second>::get(mod.second);
        }
    }
};

}  // namespace cuattn
