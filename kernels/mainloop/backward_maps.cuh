// What the backward on Hopper is called with.
#pragma once
#include "attention/mod_sums.cuh"
#include "params.cuh"
#include "ptx/tma.cuh"

namespace cuattn {

// Tensor maps of q, k, v and dout over (d, row, head, batch), packed (d, token, head, 1), with boxes of 64 columns and the rows
// of a tile.
// kBiasTiles: also of the bias and, where it is wanted, of its gradient or bias_sum over (key, query, head, batch), with boxes
// of 128 bytes and the rows of a tile.
enum BackwardMapIndex { kBackwardMapQ, kBackwardMapK, kBackwardMapV, kBackwardMapDout, kBackwardMapBias, kBackwardMapDbias };
template <class Config>
struct BackwardTmaArguments {
    static constexpr bool kBiasTiles = Config::kStageBias && !Config::kBiasRow;
    TensorMap maps[!kBiasTiles ? 4 : Config::kBiasKind == kBiasNone ? 5 : 6];
    BackwardArguments<Config> variant;
};

}  // namespace cuattn
