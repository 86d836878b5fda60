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
// kStoreTma: of dk and dv, before those, with boxes of 64 columns and the keys of a warp.
// kInOnePass: of out after all others, as of dout.
enum BackwardMapIndex { kBackwardMapQ, kBackwardMapK, kBackwardMapV, kBackwardMapDout, kBackwardMapDk, kBackwardMapDv };
template <class Config>
struct BackwardTmaArguments {
    static constexpr bool kBiasTiles = Config::kStageBias && !Config::kBiasRow;
    static constexpr int kMapBias = Config::kStoreTma ? 6 : 4, kMapDbias = kMapBias + 1;
    static constexpr int kMapOut = kMapBias + (!kBiasTiles ? 0 : Config::kBiasKind == kBiasNone ? 1 : 2);
    TensorMap maps[kMapOut + Config::kInOnePass];
    BackwardArguments<Config> variant;
};

}  // namespace cuattn
