// Forward in exact fp32: every product is an FFMA, no tensor cores. sm_80 and up.
//
//   S = scale * Q K^T, modified and masked     P = exp(S - lse)     O = P V        (FlashAttention-2, algorithm 1)
//
// A CTA takes kBlockM queries of one head. Issue slots are what is scarce (an FFMA takes one, and so does everything else), so a
// thread keeps a large piece of S and of O in registers and every operand comes as 16 bytes:
//
//   lane (ty, tx) of 4 x 8     rows ty + 4 i (i < kM), keys tx + 8 j (j < kN), columns of out 4 tx + 32 c + e (c < kGroups)
//   S = Q K^T                  four d at a time: kM + kN loads for 4 kM kN FFMA
//   O = P V                    one key at a time: kM / 4 + kGroups loads for 4 kM kGroups FFMA
//
// A warp owns its 4 kM rows with all keys and columns: row statistics stay inside eight lanes, P inside the warp.
// Bit 0 of the lane is one of ty and bit 1 one of tx: a 16-byte load whose neighbours (lane ^ 1, or lane ^ 2) agree on their
// address takes one pass over the banks for each half of the warp instead of two, which here holds for all operands.
//
// Shared memory   sQ (kBlockM x D, when it fits) | sP (a warp after the other, kBlockN keys x 4 kM rows) | ring of kStages chunks
//                 a chunk is kBlockN keys x kDepth of K (with kBlockM rows x kDepth of Q when sQ does not fit),
//                 or kKeys keys x Dv of V
// Loop            for each kDepth of D: wait chunk; load the one kStages - 1 ahead; S += Q K^T
//                 modify, mask; online softmax; P to sP
//                 for each kKeys of the tile: wait chunk; load the one kStages - 1 ahead; O += P V
#pragma once
#include "attention/scores.cuh"
#include "attention/softmax.cuh"
#include "mainloop/epilogue.cuh"
#include "mainloop/work.cuh"
#include "tile/copy.cuh"

namespace cuattn {

// The kM x kN elements of one thread out of a warp's 4 kM x 8 kN.
template <int kM, int kN>
struct ThreadTile {
    static constexpr int kSize = kM * kN;
    float data[kM][kN];

    __device__ __forceinline__ float& operator[](int x) { return data[x / kN][x % kN]; }
    __device__ __forceinline__ static int ty() { return static_cast<int>((threadIdx.x & 1) | (threadIdx.x / 16 % 2 * 2)); }
    __device__ __forceinline__ static int tx() { return static_cast<int>(threadIdx.x / 2 % 8); }
    __device__ __forceinline__ static int row(int x) { return ty() + 4 * (x / kN); }
    __device__ __forceinline__ static int col(int x) { return tx() + 8 * (x % kN); }
};

// A warp's probabilities, transposed: kBlockN keys of kM units of 16 bytes, unit 4 h + ty being rows 4 h ... 4 h + 3 of the
// threads at ty. Eight lanes that write four keys at two ty take eight different units modulo 8 owing to the exclusive or.
template <int kM>
struct WarpProbabilities {
    static_assert(kM == 4 || kM == 8, "the swizzle is made for 4 or 8 units");
    float* data;

    __device__ __forceinline__ float4* at(int key, int h, int ty) const {
        const int swizzle = 2 * (key / (8 / kM) % (kM / 2));
        return reinterpret_cast<float4*>(data) + key * kM + ((4 * h) ^ (swizzle & 4)) + (ty ^ (swizzle & 2));
    }
};

template <class Config>
struct ForwardSimt {
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kThreads = Config::kThreads;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV, kStages = Config::kStages;
    static constexpr int kWarpRows = kBlockM / (kThreads / 32);
    static constexpr int kM = kWarpRows / 4, kN = kBlockN / 8, kGroups = (kHeadDimV + 31) / 32;
    using Scores = ThreadTile<kM, kN>;

    static constexpr int kDepth = 16;
    using QTile = SmemTile<float, kBlockM, kHeadDim, 1>;
    using QChunk = SmemTile<float, kBlockM, kDepth, 1>;
    using KChunk = SmemTile<float, kBlockN, kDepth, 1>;
    static constexpr int kRowBytesV = 128 * kGroups, kBytesP = 4 * kBlockM * kBlockN;

    // As many keys as fit into the space that K needs anyway.
    __host__ __device__ static constexpr int keys_of(int bytes) {
        int keys = 32;
        while (keys > 4 && (kBlockN % keys != 0 || keys * kRowBytesV > bytes)) keys /= 2;
        return keys;
    }
    __host__ __device__ static constexpr int stage_bytes(bool resident) {
        const int bytes = KChunk::kBytes + (resident ? 0 : QChunk::kBytes), bytes_v = keys_of(bytes) * kRowBytesV;
        return bytes > bytes_v ? bytes : bytes_v;
    }
    static constexpr bool kResidentQ = QTile::kBytes + kBytesP + kStages * stage_bytes(true) <= Config::kSmemBytes;
    static constexpr int kStageBytes = stage_bytes(kResidentQ);
    static constexpr int kKeys = keys_of(kStageBytes);
    using VChunk = SmemTile<float, kKeys, 32 * kGroups, 0>;
    static constexpr int kChunksK = kHeadDim / kDepth, kChunksV = kBlockN / kKeys, kAhead = kStages - 1;
    static constexpr int kOffsetP = kResidentQ ? QTile::kBytes : 0, kOffsetRing = kOffsetP + kBytesP;
    static_assert(kHeadDim % kDepth == 0 && kBlockN % 8 == 0 && kAhead >= 1 && kAhead <= kChunksK && kAhead <= kChunksV);
    static_assert(kOffsetRing + kStages * kStageBytes <= Config::kSmemBytes, "the plan's shared memory is too small");

    const ForwardParams& p;
    const Mask& mask;
    const ScoreMod& score_mod;
    char* smem;
    float o[kM][4 * kGroups];
    RowState<float> rows[kM];

    __device__ __forceinline__ QTile sQ() const { return {reinterpret_cast<float*>(smem)}; }
    __device__ __forceinline__ WarpProbabilities<kM> sP() const {
        return {reinterpret_cast<float*>(smem + kOffsetP) + warp_row() * kBlockN};
    }
    __device__ __forceinline__ float* ring(int stage) const {
        return reinterpret_cast<float*>(smem + kOffsetRing + stage * kStageBytes);
    }
    __device__ __forceinline__ KChunk sK(int stage) const { return {ring(stage)}; }
    __device__ __forceinline__ QChunk sQ(int stage) const { return {ring(stage) + KChunk::kBytes / 4}; }
    __device__ __forceinline__ VChunk sV(int stage) const { return {ring(stage)}; }
    __device__ __forceinline__ static int warp_row() { return static_cast<int>(threadIdx.x / 32) * kWarpRows; }
    __device__ __forceinline__ static int after(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }
    __device__ __forceinline__ static int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
    // What turns a score into the exponent of 2.
    __device__ __forceinline__ float factor() const {
        return Config::kFoldScale ? static_cast<float>(p.scale * 1.4426950408889634) : kLog2e;
    }
    __device__ __forceinline__ int cols_v(const Work& w) const { return min(kHeadDimV, p.head_dim_v - w.dv_start); }
    __device__ __forceinline__ Work work() const { return Work::of<Config>(p); }

    // load_tile for the common case that the whole tile exists: nothing to compare, a tenth of the instructions.
    template <int kVecBytes, class Tile>
    __device__ __forceinline__ static void load(const Tile& tile, const float* source, long long pitch, int rows, int cols) {
        constexpr int kVec = kVecBytes / 4, kVecsPerRow = Tile::kCols / kVec, kStep = kThreads / kVecsPerRow;
        constexpr bool kWhole = kThreads % kVecsPerRow == 0 && Tile::kRows % (kStep > 0 ? kStep : 1) == 0;
        if (!kWhole || rows < Tile::kRows || cols < Tile::kCols) {
            load_tile<kThreads, kVecBytes>(tile, source, pitch, rows, cols);
        } else if constexpr (kWhole) {
            const int row = threadIdx.x / kVecsPerRow, col = threadIdx.x % kVecsPerRow * kVec;
            const float* from = source + row * pitch + col;
            const unsigned to = smem_address(tile.at(row, col));
#pragma unroll
            for (int step = 0; step < Tile::kRows; step += kStep, from += kStep * pitch) {
                cp_async<kVecBytes>(to + 4 * step * Tile::kPitch, from, kVecBytes);
            }
        }
    }
    template <class Tile>
    __device__ __forceinline__ void load_q(const Tile& tile, const Work& w, int d) const {
        const int start = w.m_block * kBlockM;
        const float* q = static_cast<const float*>(p.q) + w.seq.q + w.at.head * p.q_head + start * p.q_row + d;
        load<Config::kVecQ>(tile, q, p.q_row, w.at.seqlen_q - start, p.head_dim - d);
    }
    __device__ __forceinline__ void load_k(const Work& w, int n, int chunk, int stage) const {
        const int d = chunk * kDepth;
        const float* k = static_cast<const float*>(p.k) + w.seq.k + w.head_kv * p.k_head + n * kBlockN * p.k_row + d;
        load<Config::kVecK>(sK(stage), k, p.k_row, w.at.seqlen_k - n * kBlockN, p.head_dim - d);
        if constexpr (!kResidentQ) load_q(sQ(stage), w, d);
    }
    __device__ __forceinline__ void load_v(const Work& w, int n, int chunk, int stage) const {
        const int j = n * kBlockN + chunk * kKeys;
        const float* v = static_cast<const float*>(p.v) + w.seq.v + w.head_kv * p.v_head + j * p.v_row + w.dv_start;
        load<Config::kVecV>(sV(stage), v, p.v_row, w.at.seqlen_k - j, cols_v(w));
    }
    // The chunk to be used now is there, and nobody reads the one before it, whose place is loaded next.
    __device__ __forceinline__ static void wait_chunk() {
        cp_async_wait_group<kAhead - 1>();
        __syncthreads();
    }

    template <class Tile>
    __device__ __forceinline__ static void multiply_qk(Scores& s, const Tile& tile_q, int d, const KChunk& tile_k) {
        const float* q0 = tile_q.at(warp_row() + Scores::ty(), d);
        const float* k0 = tile_k.at(Scores::tx(), 0);
#pragma unroll
        for (int u = 0; u < kDepth; u += 4) {
            float4 q[kM];
#pragma unroll
            for (int i = 0; i < kM; i++) q[i] = *reinterpret_cast<const float4*>(q0 + 4 * i * Tile::kPitch + u);
#pragma unroll
            for (int j = 0; j < kN; j++) {
                const float4 k = *reinterpret_cast<const float4*>(k0 + 8 * j * KChunk::kPitch + u);
#pragma unroll
                for (int i = 0; i < kM; i++) s.data[i][j] += q[i].x * k.x;
#pragma unroll
                for (int i = 0; i < kM; i++) s.data[i][j] += q[i].y * k.y;
#pragma unroll
                for (int i = 0; i < kM; i++) s.data[i][j] += q[i].z * k.z;
#pragma unroll
                for (int i = 0; i < kM; i++) s.data[i][j] += q[i].w * k.w;
            }
        }
    }

    // `key`: of the tile, where the chunk begins.
    __device__ __forceinline__ void multiply_pv(int key, const VChunk& tile_v) {
        const WarpProbabilities<kM> probabilities{sP().data + key * 4 * kM};
        const float* v0 = tile_v.at(0, 4 * Scores::tx());
#pragma unroll
        for (int t = 0; t < kKeys; t++) {
            float x[kM];
#pragma unroll
            for (int h = 0; h < kM / 4; h++) {
                const float4 unit = *probabilities.at(t, h, Scores::ty());
                x[4 * h] = unit.x, x[4 * h + 1] = unit.y, x[4 * h + 2] = unit.z, x[4 * h + 3] = unit.w;
            }
#pragma unroll
            for (int c = 0; c < kGroups; c++) {
                const float4 v = *reinterpret_cast<const float4*>(v0 + t * VChunk::kPitch + 32 * c);
#pragma unroll
                for (int i = 0; i < kM; i++) {
                    o[i][4 * c] += x[i] * v.x, o[i][4 * c + 1] += x[i] * v.y;
                    o[i][4 * c + 2] += x[i] * v.z, o[i][4 * c + 3] += x[i] * v.w;
                }
            }
        }
    }

    // Scores to probabilities in place; rescales what has been accumulated.
    __device__ __forceinline__ void softmax(Scores& s) {
        const float f = factor();
#pragma unroll
        for (int i = 0; i < kM; i++) {
            float top = rows[i].max;
#pragma unroll
            for (int j = 0; j < kN; j++) top = maximum(top, s.data[i][j]);
#pragma unroll
            for (int lane = 2; lane <= 8; lane *= 2) top = maximum(top, __shfl_xor_sync(0xffffffffu, top, lane));
            const float shrink = rows[i].rescale(top, f);
            const float offset = rows[i].offset(f);
            float sum = 0;
#pragma unroll
            for (int j = 0; j < kN; j++) {
                s.data[i][j] = exp2_fast(s.data[i][j] * f - offset);
                sum += s.data[i][j];
            }
            rows[i].sum += sum;
#pragma unroll
            for (int x = 0; x < 4 * kGroups; x++) o[i][x] *= shrink;
        }
    }

    __device__ __forceinline__ void score_and_softmax(Scores& s, const Work& w, const KeyTiles<Mask, kBlockM, kBlockN>& tiles,
                                                      int n) {
        const int row0 = w.m_block * kBlockM + warp_row(), col0 = n * kBlockN;
        const float scale = static_cast<float>(p.scale);
        if (tiles.full(mask, w.at, n)) {
            modify_scores<Config::kFoldScale, false>(s, w.at, row0, col0, scale, mask, score_mod);
        } else {
            modify_scores<Config::kFoldScale, true>(s, w.at, row0, col0, scale, mask, score_mod);
        }
        softmax(s);
        if constexpr (Config::kDropout) drop_probabilities(s, w.at, row0, col0, p.seed, p.dropout_threshold);
#pragma unroll
        for (int j = 0; j < kN; j++) {
#pragma unroll
            for (int h = 0; h < kM / 4; h++) {
                *sP().at(Scores::col(j), h, Scores::ty()) = make_float4(s.data[4 * h][j], s.data[4 * h + 1][j],
                                                                        s.data[4 * h + 2][j], s.data[4 * h + 3][j]);
            }
        }
    }

    __device__ __forceinline__ void visit_keys(const Work& w) {
        const auto tiles = KeyTiles<Mask, kBlockM, kBlockN>::of(p, mask, w);
        int n = tiles.next(tiles.blocks.start);
#pragma unroll
        for (int i = 0; i < kM; i++) {
#pragma unroll
            for (int x = 0; x < 4 * kGroups; x++) o[i][x] = 0;
        }
        if (n >= tiles.blocks.stop) return;
        if constexpr (kResidentQ) load_q(sQ(), w, 0);
#pragma unroll
        for (int chunk = 0; chunk < kAhead; chunk++) {
            load_k(w, n, chunk, chunk);
            cp_async_commit_group();
        }
        int stage = 0;
        while (n < tiles.blocks.stop) {
            Scores s;
#pragma unroll
            for (int x = 0; x < Scores::kSize; x++) s[x] = 0;
#pragma unroll 1
            for (int chunk = 0; chunk < kChunksK; chunk++, stage = after(stage)) {
                wait_chunk();
                if (chunk + kAhead < kChunksK) {
                    load_k(w, n, chunk + kAhead, before(stage));
                } else {
                    load_v(w, n, chunk + kAhead - kChunksK, before(stage));
                }
                cp_async_commit_group();
                if constexpr (kResidentQ) {
                    multiply_qk(s, sQ(), chunk * kDepth, sK(stage));
                } else {
                    multiply_qk(s, sQ(stage), 0, sK(stage));
                }
            }
            score_and_softmax(s, w, tiles, n);  // the barrier of the next chunk makes P visible
            const int following = tiles.next(n + 1);
#pragma unroll 1
            for (int chunk = 0; chunk < kChunksV; chunk++, stage = after(stage)) {
                wait_chunk();
                if (chunk + kAhead < kChunksV) {
                    load_v(w, n, chunk + kAhead, before(stage));
                } else if (following < tiles.blocks.stop) {
                    load_k(w, following, chunk + kAhead - kChunksV, before(stage));
                }
                cp_async_commit_group();
                multiply_pv(chunk * kKeys, sV(stage));
            }
            n = following;
        }
    }

    __device__ __forceinline__ float sink_log2(const Work& w) const {
        if constexpr (!Config::kSinks || Config::kSplit) return negative_infinity<float>();
        return static_cast<const float*>(p.sinks)[w.at.head] * kLog2e;
    }

    __device__ __forceinline__ void finish(const Work& w) {
        const int row0 = w.m_block * kBlockM + warp_row() + Scores::ty();
#pragma unroll
        for (int i = 0; i < kM; i++) {
            RowState<float>& row = rows[i];
#pragma unroll
            for (int lane = 2; lane <= 8; lane *= 2) row.sum += __shfl_xor_sync(0xffffffffu, row.sum, lane);
            const float top = row.max == negative_infinity<float>() ? row.max : row.max * factor();
            const RowResult<float> result = finish_row(top, row.sum, sink_log2(w));
            const float scale = Config::kDropout ? result.factor * static_cast<float>(p.dropout_scale) : result.factor;
#pragma unroll
            for (int x = 0; x < 4 * kGroups; x++) o[i][x] *= scale;
            const int query = row0 + 4 * i;
            if (Scores::tx() == 0 && query < w.at.seqlen_q) {
                if constexpr (!Config::kSplit) {
                    store_lse(p, w, query, result.lse_log2);
                } else if (w.dv_start == 0) {
                    static_cast<float*>(p.partial_lse)[partial_row(p, w, query)] = result.lse_log2;
                }
            }
        }
    }

    // Straight from registers: eight lanes hold 128 consecutive bytes. `target` is row 0 of the tile; `vectors`: whether groups
    // of four columns are aligned to 16 bytes.
    __device__ __forceinline__ void store(const Work& w, float* target, long long pitch, bool vectors) const {
        const int cols = cols_v(w), limit = w.at.seqlen_q - w.m_block * kBlockM;
#pragma unroll
        for (int i = 0; i < kM; i++) {
            const int row = warp_row() + Scores::ty() + 4 * i;
            if (row >= limit) continue;
#pragma unroll
            for (int c = 0; c < kGroups; c++) {
                const int col = 32 * c + 4 * Scores::tx();
                float* to = target + row * pitch + col;
                if (vectors && col + 4 <= cols) {
                    *reinterpret_cast<float4*>(to) = make_float4(o[i][4 * c], o[i][4 * c + 1], o[i][4 * c + 2], o[i][4 * c + 3]);
                } else {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        if (col + e < cols) to[e] = o[i][4 * c + e];
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void run() {
        visit_keys(work());
        const Work w = work();
        const int start = w.m_block * kBlockM;
        if (start < w.at.seqlen_q) {
            finish(w);
            if constexpr (Config::kSplit) {
                float* out = static_cast<float*>(p.partial_out) + partial_row(p, w, start) * p.head_dim_v + w.dv_start;
                store(w, out, p.head_dim_v, p.head_dim_v % 4 == 0);
            } else {
                float* out = static_cast<float*>(p.out) + w.seq.out + w.at.head * p.out_head + start * p.out_row + w.dv_start;
                store(w, out, p.out_row, Config::kVecOut == 16);
            }
        }
        if constexpr (!Config::kSplit) store_padding<float, float, kBlockM, kThreads>(p, w, cols_v(w));
    }
};

}  // namespace cuattn
