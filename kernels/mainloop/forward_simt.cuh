// Forward in exact fp32: every product is an FFMA, no tensor cores. sm_80 and up.
//
//   S = scale * Q K^T, modified and masked     P = exp(S - lse)     O = P V        (FlashAttention-2, algorithm 1)
//
// Issue slots are what is scarce (an FFMA takes one, and so does everything else), so a thread keeps a large piece of S and of
// O in registers, and operands arrive from shared memory 16 bytes at a time. kWarpsN = kThreads / kBlockM warps share 32 rows:
//
//   lane (ty, tx) of 4 x 8, warp wn of kWarpsN     rows ty + 4 i (i < 8), keys kN * 8 * wn + tx + 8 j (j < kN),
//                                                  columns of out kGroups * 32 * wn + 32 c + 4 tx + e (c < kGroups, e < 4)
//   S = Q K^T                                      four d at a time: 8 + kN loads for 32 kN FFMA
//   O = P V                                        one key at a time: 2 + kGroups loads for 32 kGroups FFMA
//
// Registers lie in two banks, the odd and the even numbers, each of which supplies one operand per FFMA. An FFMA reads three,
// so one must come from the operand reuse cache, which keeps a register of each bank for each operand position, and the other
// two must not share a bank. The compiler roughly keeps the order of the FFMAs below; .reuse in SASS tells how well that works.
//
// Bit 0 of the lane is one of ty and bit 1 one of tx. A 16-byte load in which lanes x and x ^ 1, or x and x ^ 2, always agree
// on the address returns its registers at twice the rate of others, which is what keeps shared memory off the critical path.
//
// Shared memory   sQ (kBlockM x D, unless it is streamed with K) | sP (for each 32 rows, kBlockN keys x 32)
//                 | sRow (kWarpsN x kBlockM) | ring of kStages chunks
// Chunk           kBlockN keys x kDepth of K, and kBlockM queries x kDepth of a streamed Q; or kKeys keys x Dv of V
// Loop            for each kDepth of D: wait chunk; load the one kStages - 1 ahead; S += Q K^T
//                 modify, mask; online softmax, the maximum through sRow; P to sP
//                 for each kKeys of the tile: wait chunk; load the one kStages - 1 ahead; O += P V
#pragma once
#include "attention/scores.cuh"
#include "attention/softmax.cuh"
#include "mainloop/epilogue.cuh"
#include "mainloop/work.cuh"
#include "tile/copy.cuh"

namespace cuattn {

// The kRows x kN elements of one thread out of a warp's 4 kRows x 8 kN.
template <int kRows, int kN>
struct ThreadTile {
    static constexpr int kSize = kRows * kN;
    float data[kRows][kN];

    __device__ __forceinline__ float& operator[](int x) { return data[x / kN][x % kN]; }
    __device__ __forceinline__ static int ty() { return static_cast<int>((threadIdx.x & 1) | (threadIdx.x / 16 % 2 * 2)); }
    __device__ __forceinline__ static int tx() { return static_cast<int>(threadIdx.x / 2 % 8); }
    __device__ __forceinline__ static int row(int x) { return ty() + 4 * (x / kN); }
    __device__ __forceinline__ static int col(int x) { return tx() + 8 * (x % kN); }
};

// The probabilities of 32 rows, transposed: eight units of 16 bytes for each key, unit 4 h + ty being rows 4 h ... 4 h + 3 of
// the threads at ty. Eight lanes that write four keys at two ty hit all banks once owing to the exclusive or.
struct SharedProbabilities {
    float4* data;

    __device__ __forceinline__ float4* at(int key, int h, int ty) const {
        const int swizzle = 2 * (key % 4);
        return data + key * 8 + ((4 * h) ^ (swizzle & 4)) + (ty ^ (swizzle & 2));
    }
};

// Four consecutive floats of shared memory, 16-byte aligned.
__device__ __forceinline__ void load_four(float* to, const void* from) {
    const float4 four = *static_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

template <class Config>
struct ForwardSimt {
    using Mask = typename Config::Mask;
    using ScoreMod = typename Config::ScoreMod;
    static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kThreads = Config::kThreads;
    static constexpr int kHeadDim = Config::kHeadDim, kHeadDimV = Config::kHeadDimV;
    static constexpr int kStages = Config::kStages, kAhead = kStages - 1;
    static constexpr int kM = 8, kWarpRows = 4 * kM, kWarpsN = kThreads / kBlockM;
    static constexpr int kN = kBlockN / (8 * kWarpsN), kGroups = (kHeadDimV + 32 * kWarpsN - 1) / (32 * kWarpsN);
    static constexpr int kColsV = 32 * kWarpsN * kGroups;
    static_assert(kThreads % kBlockM == 0 && kBlockM % kWarpRows == 0 && kBlockN % (16 * kWarpsN) == 0 && kAhead >= 1);
    using Scores = ThreadTile<kM, kN>;
    // About 512 FFMA in the body of S and 1024 in that of O, which the instruction cache must hold.
    static constexpr int kUnrollQk = kN >= 16 ? 1 : 16 / kN, kUnrollPv = kGroups >= 8 ? 1 : 8 / kGroups;

    // A chunk of V has as many keys as fit into the space that one of K needs anyway.
    __host__ __device__ static constexpr int keys(int depth, bool resident) {
        int count = 32;
        while (count > 4 && (kBlockN % count != 0 || kBlockN / count < kAhead ||
                             4 * count * kColsV > 4 * (depth + 4) * (kBlockN + (resident ? 0 : kBlockM)))) {
            count /= 2;
        }
        return count;
    }
    __host__ __device__ static constexpr int stage_bytes(int depth, bool resident) {
        const int k = 4 * (depth + 4) * (kBlockN + (resident ? 0 : kBlockM)), v = 4 * keys(depth, resident) * kColsV;
        return k > v ? k : v;
    }
    static constexpr int kBytesP = 4 * kBlockM * kBlockN, kBytesRow = 4 * kWarpsN * kBlockM;
    __host__ __device__ static constexpr int bytes(int depth, bool resident) {
        return (resident ? 4 * kBlockM * (kHeadDim + 4) : 0) + kBytesP + kBytesRow + kStages * stage_bytes(depth, resident);
    }
    // In this order of preference: Q stays in shared memory, chunks are 32 deep.
    static constexpr bool kDeep = kHeadDim % 32 == 0 && kHeadDim / 32 >= kAhead;
    static constexpr bool kResidentQ = bytes(16, true) <= Config::kSmemBytes;
    static constexpr int kDepth = kDeep && bytes(32, kResidentQ) <= Config::kSmemBytes ? 32 : 16;
    static constexpr int kKeys = keys(kDepth, kResidentQ), kStageBytes = stage_bytes(kDepth, kResidentQ);
    static constexpr int kChunksK = kHeadDim / kDepth, kChunksV = kBlockN / kKeys;
    static_assert(kHeadDim % kDepth == 0 && kAhead <= kChunksK && kAhead <= kChunksV);
    static_assert(bytes(kDepth, kResidentQ) <= Config::kSmemBytes, "the plan's shared memory is too small");
    static constexpr int kOffsetP = kResidentQ ? 4 * kBlockM * (kHeadDim + 4) : 0, kOffsetRow = kOffsetP + kBytesP;
    static constexpr int kOffsetRing = kOffsetRow + kBytesRow;

    using QTile = SmemTile<float, kBlockM, kResidentQ ? kHeadDim : kDepth, 1>;
    using KTile = SmemTile<float, kBlockN, kDepth, 1>;
    using VTile = SmemTile<float, kKeys, kColsV, 0>;

    const ForwardParams& p;
    const Mask& mask;
    const ScoreMod& score_mod;
    char* smem;
    float o[kM][4 * kGroups];
    RowState<float> rows[kM];  // max: of the row; sum: over this thread's keys

    __device__ __forceinline__ static int warp_n() { return static_cast<int>(threadIdx.x / 32) % kWarpsN; }
    __device__ __forceinline__ static int warp_row() { return static_cast<int>(threadIdx.x / 32) / kWarpsN * kWarpRows; }
    __device__ __forceinline__ static int warp_col() { return warp_n() * 8 * kN; }
    // First of this thread's columns of out.
    __device__ __forceinline__ static int column() { return warp_n() * 32 * kGroups + 4 * Scores::tx(); }

    __device__ __forceinline__ float* ring(int stage) const {
        return reinterpret_cast<float*>(smem + kOffsetRing + stage * kStageBytes);
    }
    __device__ __forceinline__ QTile sQ(int stage) const {
        return {kResidentQ ? reinterpret_cast<float*>(smem) : ring(stage) + KTile::kBytes / 4};
    }
    __device__ __forceinline__ KTile sK(int stage) const { return {ring(stage)}; }
    __device__ __forceinline__ VTile sV(int stage) const { return {ring(stage)}; }
    __device__ __forceinline__ SharedProbabilities sP(int key) const {
        return {reinterpret_cast<float4*>(smem + kOffsetP) + warp_row() / 4 * kBlockN + key * 8};
    }
    // What warp `n` has to say about this thread's row i.
    __device__ __forceinline__ float& sRow(int n, int i) const {
        return reinterpret_cast<float*>(smem + kOffsetRow)[n * kBlockM + warp_row() + Scores::ty() + 4 * i];
    }
    __device__ __forceinline__ static int after(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }
    __device__ __forceinline__ static int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }

    // What turns a score into the exponent of 2.
    __device__ __forceinline__ float factor() const { return exponent_factor<Config, float>(p); }
    __device__ __forceinline__ int cols_v(const Work& w) const { return min(kHeadDimV, p.head_dim_v - w.dv_start); }
    __device__ __forceinline__ Work work() const { return Work::of<Config>(p); }

    __device__ __forceinline__ void load_q(const Work& w, int chunk, int stage) const {
        const int start = w.m_block * kBlockM, d = chunk * kDepth;
        const float* q = static_cast<const float*>(p.q) + w.seq.q + w.at.head * p.q_head + start * p.q_row + d;
        load_tile<kThreads, Config::kVecQ>(sQ(stage), q, p.q_row, w.at.seqlen_q - start, p.head_dim - d);
    }
    __device__ __forceinline__ void load_k(const Work& w, int n, int chunk, int stage) const {
        const int d = chunk * kDepth;
        const float* k = static_cast<const float*>(p.k) + w.seq.k + w.head_kv * p.k_head + n * kBlockN * p.k_row + d;
        load_tile<kThreads, Config::kVecK>(sK(stage), k, p.k_row, w.at.seqlen_k - n * kBlockN, p.head_dim - d);
        if constexpr (!kResidentQ) load_q(w, chunk, stage);
    }
    __device__ __forceinline__ void load_v(const Work& w, int n, int chunk, int stage) const {
        const int j = n * kBlockN + chunk * kKeys;
        const float* v = static_cast<const float*>(p.v) + w.seq.v + w.head_kv * p.v_head + j * p.v_row + w.dv_start;
        load_tile<kThreads, Config::kVecV>(sV(stage), v, p.v_row, w.at.seqlen_k - j, cols_v(w));
    }
    // The chunk to be used now is there, and nobody reads the one before it, whose place is loaded next.
    __device__ __forceinline__ static void wait_chunk() {
        cp_async_wait_group<kAhead - 1>();
        __syncthreads();
    }

    // `d`: where in sQ the chunk begins.
    __device__ __forceinline__ static void multiply_qk(Scores& s, const QTile& tile_q, int d, const KTile& tile_k) {
        const float* q0 = tile_q.at(warp_row() + Scores::ty(), d);
        const float* k0 = tile_k.at(warp_col() + Scores::tx(), 0);
#pragma unroll kUnrollQk
        for (int u = 0; u < kDepth; u += 4) {
            float q[kM][4], k[2][4];
#pragma unroll
            for (int i = 0; i < kM; i++) load_four(q[i], q0 + 4 * i * QTile::kPitch + u);
            // Two keys at a time, back and forth over the rows. Component e of every q and k is in the same bank, so components
            // of either bank take turns: e of even rows, e ^ 1 of odd ones.
#pragma unroll
            for (int x = 0; x < 4 * kM * kN; x++) {
                const int j = x / (8 * kM) * 2, second = x / kM % 2;
                const int i = second ? kM - 1 - x % kM : x % kM, e = (x / (2 * kM) % 4) ^ (i % 2);
                if (x % (8 * kM) == 0) {
                    load_four(k[0], k0 + 8 * j * KTile::kPitch + u);
                    load_four(k[1], k0 + 8 * (j + 1) * KTile::kPitch + u);
                }
                s.data[i][j + second] += q[i][e] * k[second][e];
            }
        }
    }

    // `key`: of the tile, where the chunk begins.
    __device__ __forceinline__ void multiply_pv(int key, const VTile& tile_v) {
        const float* v0 = tile_v.at(0, column());
#pragma unroll kUnrollPv
        for (int t = 0; t < kKeys; t += 4) {
            const SharedProbabilities four = sP(key + t);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float p_of_row[kM], v[4];
                load_four(p_of_row, four.at(e, 0, Scores::ty())), load_four(p_of_row + 4, four.at(e, 1, Scores::ty()));
#pragma unroll
                for (int x = 0; x < 4 * kM * kGroups; x++) {  // one column at a time, back and forth over the rows
                    const int col = x / kM, i = col % 2 == 0 ? x % kM : kM - 1 - x % kM;
                    if (x % (4 * kM) == 0) load_four(v, v0 + (t + e) * VTile::kPitch + 8 * col);
                    o[i][col] += p_of_row[i] * v[col % 4];
                }
            }
        }
    }

    // The maximum of each row over the tile's keys.
    __device__ __forceinline__ void row_maxima(float (&top)[kM], const Scores& s) const {
#pragma unroll
        for (int i = 0; i < kM; i++) {
            top[i] = s.data[i][0];
#pragma unroll
            for (int j = 1; j < kN; j++) top[i] = maximum(top[i], s.data[i][j]);
#pragma unroll
            for (int lane = 2; lane <= 8; lane *= 2) top[i] = maximum(top[i], __shfl_xor_sync(0xffffffffu, top[i], lane));
            if (kWarpsN > 1 && Scores::tx() == 0) sRow(warp_n(), i) = top[i];
        }
        if constexpr (kWarpsN > 1) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kM; i++) {
#pragma unroll
                for (int n = 0; n < kWarpsN; n++) top[i] = maximum(top[i], sRow(n, i));
            }
        }
    }

    // Scores to probabilities in place; rescales what has been accumulated.
    __device__ __forceinline__ void softmax(Scores& s) {
        const float f = factor();
        float top[kM];
        row_maxima(top, s);
        bool grew = false;
#pragma unroll
        for (int i = 0; i < kM; i++) {
            top[i] = rows[i].rescale(top[i], f);  // from here on the factor by which the row shrinks
            grew |= top[i] != 1.0f;
        }
        if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
            for (int x = 0; x < 4 * kM * kGroups; x++) o[x / (4 * kGroups)][x % (4 * kGroups)] *= top[x / (4 * kGroups)];
        }
#pragma unroll
        for (int i = 0; i < kM; i++) {
            const float offset = rows[i].offset(f);
            float sum = 0;
#pragma unroll
            for (int j = 0; j < kN; j++) {
                s.data[i][j] = exp2_fast(s.data[i][j] * f - offset);
                sum += s.data[i][j];
            }
            rows[i].sum += sum;
        }
    }

    __device__ __forceinline__ void score_and_softmax(Scores& s, const Work& w, const KeyTiles<Mask, kBlockM, kBlockN>& tiles,
                                                      int n) {
        const int row0 = w.m_block * kBlockM + warp_row(), col0 = n * kBlockN + warp_col();
        const float scale = static_cast<float>(p.scale);
        if (tiles.full(mask, w.at, n)) {
            modify_scores<Config::kFoldScale, false>(s, w.at, row0, col0, scale, mask, score_mod);
        } else {
            modify_scores<Config::kFoldScale, true>(s, w.at, row0, col0, scale, mask, score_mod);
        }
        softmax(s);
        if constexpr (Config::kDropout) drop_probabilities(s, w.at, row0, col0, p.seed, p.dropout_threshold);
        const SharedProbabilities mine = sP(warp_col());
#pragma unroll
        for (int j = 0; j < kN; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                *mine.at(Scores::tx() + 8 * j, h, Scores::ty()) =
                    make_float4(s.data[4 * h][j], s.data[4 * h + 1][j], s.data[4 * h + 2][j], s.data[4 * h + 3][j]);
            }
        }
    }

    __device__ __forceinline__ void visit_keys(const Work& w) {
        const auto tiles = KeyTiles<Mask, kBlockM, kBlockN>::of(p, mask, w);
        int n = tiles.next(tiles.blocks.start);
#pragma unroll
        for (int x = 0; x < 4 * kM * kGroups; x++) o[x / (4 * kGroups)][x % (4 * kGroups)] = 0;
        if (n >= tiles.blocks.stop) return;
        if constexpr (kResidentQ) load_q(w, 0, 0);
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
                multiply_qk(s, sQ(stage), kResidentQ ? chunk * kDepth : 0, sK(stage));
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

    __device__ __forceinline__ void total_sums() {
#pragma unroll
        for (int i = 0; i < kM; i++) {
#pragma unroll
            for (int lane = 2; lane <= 8; lane *= 2) rows[i].sum += __shfl_xor_sync(0xffffffffu, rows[i].sum, lane);
            if (kWarpsN > 1 && Scores::tx() == 0) sRow(warp_n(), i) = rows[i].sum;
        }
        if constexpr (kWarpsN > 1) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kM; i++) {
                rows[i].sum = 0;
#pragma unroll
                for (int n = 0; n < kWarpsN; n++) rows[i].sum += sRow(n, i);
            }
        }
    }

    __device__ __forceinline__ void finish(const Work& w) {
        total_sums();
#pragma unroll
        for (int i = 0; i < kM; i++) {
            const RowState<float>& row = rows[i];
            const float top = row.max == negative_infinity<float>() ? row.max : row.max * factor();
            const int query = w.m_block * kBlockM + warp_row() + Scores::ty() + 4 * i;
            const bool stores = warp_n() == 0 && Scores::tx() == 0;
            const float scale = finish_output_row<Config>(p, w, query, top, row.sum, stores);
#pragma unroll
            for (int x = 0; x < 4 * kGroups; x++) o[i][x] *= scale;
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
                const int col = column() + 32 * c;
                float* to = target + row * pitch + col;
                if (vectors && col + 4 <= cols) {
                    *reinterpret_cast<float4*>(to) =
                        make_float4(o[i][4 * c], o[i][4 * c + 1], o[i][4 * c + 2], o[i][4 * c + 3]);
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
