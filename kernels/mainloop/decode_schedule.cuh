// Who works on what in decode.cu, computed from the lengths on the device by every CTA for itself.
//
// An item is one (sequence, KV head, row tile): the rows of a tile are (query, head of the group) pairs that share keys. It
// consists of units, in order. CTAs come in teams of head_lanes, whose members do the same for neighbouring KV heads at the
// same time, so that the whole of a token's keys is read together. To a team, items are numbered with the row tile fastest,
// then the set of heads, and the sequence slowest.
//
//   max_parts == 0   a unit is a tile of keys. Team c of W takes units [c T / W, (c + 1) T / W) of all T, so work is equal to
//                    within a tile and a CTA shares at most its first and its last item with others.
//   max_parts > 0    a unit is a part of the item, whose size is a function of this sequence's length alone: what a sequence
//                    yields does not depend, to the bit, on the others.
//
// An item that is not done by one CTA leaves partial results in slots: even division, 2 c for an item that CTA c did not begin
// and 2 c + 1 for one that it did; otherwise item * max_parts + part. A ticket of the item (number c of the CTA that began it,
// or the item's own) tells the last CTA to arrive, which merges the parts in order.
#pragma once
#include "attention/kv_cache.cuh"
#include "attention/mask.cuh"
#include "ptx/special_registers.cuh"

namespace cuattn {

// Part of the work of a CTA.
struct DecodeItem {
    int batch, head_kv, m_block;
    CachedSequence seq;
    Range blocks;    // tiles of keys that some row may see
    int chunk;       // of them in a unit
    unsigned first;  // unit
    int units;
};

template <class Config>
struct DecodeSchedule {
    static constexpr int kThreads = Config::kThreads, kRows = 16 * Config::kWarpsM, kBlockN = Config::kBlockN;
    using Mask = typename Config::Mask;

    const DecodeParams& p;
    const Mask& mask;
    unsigned total;        // units
    int teams;             // of CTAs, that have work
    unsigned start, stop;  // units of this one
    int batch;             // the sequence of unit `start`,
    unsigned first;        // and its first unit

    __device__ __forceinline__ static int m_blocks(const DecodeParams& p, const CachedSequence& s) {
        return (s.seqlen_q * p.group + kRows - 1) / kRows;
    }
    // Queries of a row tile.
    __device__ __forceinline__ static Range queries(const DecodeParams& p, const CachedSequence& s, int m_block) {
        const Divisor group{p.group_multiplier, p.group_shift};
        return {group.quotient(m_block * kRows), min(group.quotient(m_block * kRows + kRows - 1) + 1, s.seqlen_q)};
    }
    __device__ __forceinline__ static Range key_blocks(const DecodeParams& p, const Mask& mask, const CachedSequence& s,
                                                       int batch, int m_block) {
        if (s.seqlen_k <= 0) return {0, 0};
        const Range keys = mask.kv_range(s.at(batch), queries(p, s, m_block));
        if (keys.start >= keys.stop) return {0, 0};
        return {keys.start / kBlockN, (keys.stop + kBlockN - 1) / kBlockN};
    }
    __device__ __forceinline__ static int chunk_of(const DecodeParams& p, int blocks) {
        return p.max_parts == 0 ? 1 : max(p.min_part, (blocks + p.max_parts - 1) / p.max_parts);
    }
    // At least one unit: rows without keys are written too.
    __device__ __forceinline__ static int units_of(const DecodeParams& p, int blocks) {
        const int chunk = chunk_of(p, blocks);
        return max(1, (blocks + chunk - 1) / chunk);
    }
    __device__ __forceinline__ static unsigned head_units(const DecodeParams& p, const Mask& mask, const CachedSequence& s,
                                                          int batch) {
        unsigned sum = 0;
        for (int m = 0; m < m_blocks(p, s); m++) {
            const Range blocks = key_blocks(p, mask, s, batch, m);
            sum += units_of(p, blocks.stop - blocks.start);
        }
        return sum;
    }
    // Units of the sequence that this thread counts, if there is one.
    __device__ __forceinline__ unsigned own_units(int base) const {
        const int b = base + static_cast<int>(threadIdx.x);
        if (b >= p.batch) return 0;
        return head_units(p, mask, CachedSequence::of<Config::kPacked>(p, b), b) * p.head_sets;
    }
    // (sum over the threads before this one, sum over all)
    __device__ __forceinline__ static uint2 scan(unsigned x, unsigned* sums) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        unsigned inclusive = x;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned other = __shfl_up_sync(0xffffffffu, inclusive, step);
            if (lane >= step) inclusive += other;
        }
        __syncthreads();  // nobody reads the sums of the scan before
        if (lane == 31) sums[warp] = inclusive;
        __syncthreads();
        uint2 result{inclusive - x, 0};
#pragma unroll
        for (int w = 0; w < kThreads / 32; w++) {
            if (w < warp) result.x += sums[w];
            result.y += sums[w];
        }
        return result;
    }

    // floor(a b / c); the product rarely needs 64 bits, and their division is slow.
    __device__ __forceinline__ static unsigned scaled(unsigned a, unsigned b, unsigned c, unsigned less) {
        if (__umulhi(a, b) == 0) return (a * b - less) / c;
        return static_cast<unsigned>((static_cast<unsigned long long>(a) * b - less) / c);
    }
    __device__ __forceinline__ unsigned boundary(int team) const { return scaled(team, total, teams, 0); }
    // The team that takes a unit: the last one whose boundary is not past it.
    __device__ __forceinline__ int owner(unsigned unit) const { return static_cast<int>(scaled(unit + 1, teams, total, 1)); }
    __device__ __forceinline__ int team() const { return static_cast<int>(blockIdx.x) / p.head_lanes; }
    __device__ __forceinline__ int lane() const { return static_cast<int>(blockIdx.x) % p.head_lanes; }

    // Finds this CTA's range. All threads take part; `memory`: kThreads / 32 + 2 words of shared memory.
    __device__ __forceinline__ void open(unsigned* memory) {
        unsigned own = own_units(0);
        uint2 sums = scan(own, memory);
        total = sums.y;
        for (int base = kThreads; base < p.batch; base += kThreads) total += scan(own_units(base), memory).y;
        teams = static_cast<int>(min(gridDim.x / p.head_lanes, max(1u, total / static_cast<unsigned>(p.min_units))));
        start = team() < teams ? boundary(team()) : total;
        stop = team() < teams ? boundary(team() + 1) : total;
        unsigned before = 0;
        for (int base = 0; base < p.batch && start < stop; base += kThreads) {
            if (p.batch > kThreads) {
                own = own_units(base);
                sums = scan(own, memory);
            }
            if (before + sums.x <= start && start < before + sums.x + own) {
                memory[kThreads / 32] = base + threadIdx.x;
                memory[kThreads / 32 + 1] = before + sums.x;
            }
            before += sums.y;
        }
        __syncthreads();
        batch = static_cast<int>(memory[kThreads / 32]);
        first = memory[kThreads / 32 + 1];
        __syncthreads();
    }

    __device__ __forceinline__ void enter(DecodeItem& item) const {
        const Range blocks = key_blocks(p, mask, item.seq, item.batch, item.m_block);
        item.blocks = blocks;
        item.chunk = chunk_of(p, blocks.stop - blocks.start);
        item.units = units_of(p, blocks.stop - blocks.start);
    }
    // The item of unit `start`.
    __device__ __forceinline__ DecodeItem first_item() const {
        DecodeItem item;
        item.batch = batch;
        item.seq = CachedSequence::of<Config::kPacked>(p, batch);
        const unsigned each = head_units(p, mask, item.seq, batch);
        const unsigned set = (start - first) / each;
        item.head_kv = static_cast<int>(set) * p.head_lanes + lane();
        item.first = first + set * each;
        item.m_block = 0;
        enter(item);
        while (start - item.first >= static_cast<unsigned>(item.units)) {
            item.first += item.units;
            item.m_block++;
            enter(item);
        }
        return item;
    }
    // The one after it. Sequences without queries have no items.
    __device__ __forceinline__ void advance(DecodeItem& item) const {
        item.first += item.units;
        item.m_block++;
        if (item.m_block >= m_blocks(p, item.seq)) {
            item.m_block = 0;
            item.head_kv += p.head_lanes;
        }
        if (item.head_kv >= p.num_heads_kv) {
            item.head_kv = lane();
            do {
                item.batch++;
                item.seq = CachedSequence::of<Config::kPacked>(p, item.batch);
            } while (item.seq.seqlen_q <= 0);
        }
        enter(item);
    }

    // Number of an item, in the order in which they are counted with the longest sequence's row tiles.
    __device__ __forceinline__ int number(const DecodeItem& item) const {
        return (item.batch * p.num_heads_kv + item.head_kv) * p.m_blocks + item.m_block;
    }
    __device__ __forceinline__ int parts(const DecodeItem& item) const {
        return p.max_parts > 0 ? item.units : owner(item.first + item.units - 1) - owner(item.first) + 1;
    }
    // Where part n of an item lies; from part 1 on, slots are slot_step() apart.
    __device__ __forceinline__ int slot(const DecodeItem& item, int n) const {
        if (p.max_parts > 0) return number(item) * p.max_parts + n;
        return 2 * ((owner(item.first) + n) * p.head_lanes + lane()) + (n == 0 ? 1 : 0);
    }
    __device__ __forceinline__ int slot_step() const { return p.max_parts > 0 ? 1 : 2 * p.head_lanes; }
    // Which part of its item a unit of this CTA belongs to.
    __device__ __forceinline__ int part(const DecodeItem& item, unsigned unit) const {
        return p.max_parts > 0 ? static_cast<int>(unit - item.first) : team() - owner(item.first);
    }
    __device__ __forceinline__ int ticket(const DecodeItem& item) const {
        return p.max_parts > 0 ? number(item) : owner(item.first) * p.head_lanes + lane();
    }

    // Whether this is the last of `parts` arrivals. The memory of a ticket holds anything at all before the first one; the last
    // one leaves it so that the same launch can be repeated (by a graph). Called by one thread.
    __device__ __forceinline__ static bool arrive(unsigned long long* ticket, unsigned long long call, int parts) {
        // The upper 48 bits say whose count the lower 16 are: of a number that no other call has.
        const unsigned long long mine = call << 16;
        unsigned long long found = 0, count;
        while (true) {
            count = (found & ~0xffffull) == mine ? (found & 0xffffull) + 1 : 1;
            const unsigned long long next = static_cast<int>(count) == parts ? 0 : mine | count;
            const unsigned long long seen = atomicCAS(ticket, found, next);
            if (seen == found) return static_cast<int>(count) == parts;
            found = seen;
        }
    }
};

}  // namespace cuattn
