// Writes new keys and values behind what a cache holds, keys rotated by their positions, 8-bit elements divided by their scale
// and rounded to the nearest. One warp per (token, KV head).
#include <cuda_fp8.h>
#include "attention/kv_cache.cuh"
#include "attention/mask.cuh"
#include "attention/score_mod.cuh"
#include "attention/seqlen.cuh"
#include "ptx/bytes.cuh"

namespace cuattn {

template <class Element, class Real>
__device__ __forceinline__ Element to_cache(Real x, float, Element) {
    return static_cast<Element>(x);
}
template <class Real>
__device__ __forceinline__ E4M3 to_cache(Real x, float scale, E4M3 y) {
    y.bits = __nv_cvt_float_to_fp8(static_cast<float>(x) / scale, __NV_SATFINITE, __NV_E4M3);
    return y;
}
template <class Real>
__device__ __forceinline__ Int8 to_cache(Real x, float scale, Int8 y) {
    const float quotient = rintf(static_cast<float>(x) / scale);  // a NaN becomes -128
    y.bits = static_cast<signed char>(fminf(fmaxf(quotient, -128.0f), 127.0f));
    return y;
}

template <class Config>
__device__ __forceinline__ void append(const DecodeArguments<Config>& arguments) {
    using Element = typename Config::Element;
    using Cache = typename Config::Cache;
    using Real = typename Config::Real;
    using Rotary = typename Config::Rotary;
    const DecodeParams& p = arguments.base;
    const int lane = threadIdx.x % 32;
    const long long index = static_cast<long long>(blockIdx.x) * (Config::kThreads / 32) + threadIdx.x / 32;
    const int head = static_cast<int>(index % p.num_heads_kv);
    const long long token = index / p.num_heads_kv;
    int batch, n;
    if constexpr (Config::kPacked) {
        if (token >= min(p.total_q, p.cu_seqlens_q[p.batch])) return;
        batch = sequence_of(p.cu_seqlens_q, p.batch, static_cast<int>(token));
        n = static_cast<int>(token) - p.cu_seqlens_q[batch];
    } else {
        batch = static_cast<int>(token / p.seqlen_new), n = static_cast<int>(token % p.seqlen_new);
        if (batch >= p.batch) return;
    }
    const CachedSequence seq = CachedSequence::of<Config::kPacked>(p, batch);
    const int place = seq.first_new + n;
    if (place < seq.leftpad || place >= seq.leftpad + seq.seqlen_k) return;
    const auto [page, slot] = place_of<Config::kPaged>(p, seq, place, true);
    if (static_cast<unsigned>(page) >= static_cast<unsigned>(p.pages)) return;
    const Element* k = static_cast<const Element*>(p.k_new) + (Config::kPacked ? 0 : batch * p.k_new_batch) +
                       (Config::kPacked ? token : n) * p.k_new_row + head * p.k_new_head;
    const Element* v = static_cast<const Element*>(p.v_new) + (Config::kPacked ? 0 : batch * p.v_new_batch) +
                       (Config::kPacked ? token : n) * p.v_new_row + head * p.v_new_head;
    Cache* to_k = static_cast<Cache*>(p.k) + page * p.k_page + slot * p.k_row + head * p.k_head;
    Cache* to_v = static_cast<Cache*>(p.v) + page * p.v_page + slot * p.v_row + head * p.v_head;
    const float k_scale = cache_scale(p.k_scale, p.k_scale_batch, p.k_scale_head, batch, head);
    const float v_scale = cache_scale(p.v_scale, p.v_scale_batch, p.v_scale_head, batch, head);
    int rotated = 0;
    if constexpr (Config::kRotary) {
        rotated = p.rotary_dim;
        const int half = rotated / 2, position = min(place - seq.leftpad, p.rotary_len - 1);
        for (int d = lane; d < half; d += 32) {
            const Real cosine = static_cast<Real>(static_cast<const Rotary*>(p.rotary_cos)[position * p.rotary_row + d]);
            const Real sine = static_cast<Real>(static_cast<const Rotary*>(p.rotary_sin)[position * p.rotary_row + d]);
            const int first = Config::kInterleaved ? 2 * d : d, second = Config::kInterleaved ? 2 * d + 1 : d + half;
            const Real a = static_cast<Real>(k[first]), b = static_cast<Real>(k[second]);
            to_k[first] = to_cache(a * cosine - b * sine, k_scale, Cache());
            to_k[second] = to_cache(a * sine + b * cosine, k_scale, Cache());
        }
    }
    for (int d = rotated + lane; d < p.head_dim; d += 32) to_k[d] = to_cache(static_cast<Real>(k[d]), k_scale, Cache());
    for (int d = lane; d < p.head_dim_v; d += 32) to_v[d] = to_cache(static_cast<Real>(v[d]), v_scale, Cache());
}

}  // namespace cuattn
