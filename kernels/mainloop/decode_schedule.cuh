// Who works on what in decode.cu, computed from the lengths on the device by every CTA for itself.
//
// An item is one (sequence, KV head, row tile): the rows of a tile are (query, head of the group) pairs that share keys. It
// consists of units, in order. CTAs come in teams of head_lanes, whose members do the same for neighbouring KV heads at the
// same time, so that the whole of a token's keys is read together. To a team, items are numbered with the row tile fastest,
// then the set of heads, and the sequence slowest.
//
//   even division   a unit is a tile of keys. Of all T, W teams take T / W each, the first T mod W one more: work is equal to
//                   within a tile, and a CTA shares at most its first and its last item with others.
//   kParted         a unit is a part of the item, whose size is a function of this sequence's length alone: what a sequence
//                   yields does not depend, to the bit, on the others.
//
// CTA (lane, team) of the grid has number c = team * head_lanes + lane. An item that is not done by one CTA leaves partial
// results in slots: even division, 2 c for an item that CTA c did not begin and 2 c + 1 for one that it did; otherwise item *
// max_parts + part. A ticket of the item (number c of the CTA that began it, or the item's own) tells the last CTA to arrive,
// which merges the parts in order.
//
// NOTE: a launch over few keys takes as long as its instructions take to come from memory: loops here stay loops, and what only
// one kind of division needs is not compiled for the other.
#pragma once
#include "attention/kv_cache.cuh"
#include "attention/mask.cuh"
#include "ptx/red.cuh"
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
    int owner;  // team that takes the first of them (even division)
    int parts;
};

template <class Config>
struct DecodeSchedule {
    static constexpr int kThreads = Config::kThreads, kRows = 16 * Config::kWarpsM, kBlockN = Config::kBlockN;
    static constexpr bool kParted = Config::kParted;
    using Mask = typename Config::Mask;

    const DecodeParams& p;
    const Mask& mask;
    unsigned each, longer;  // units of a team, and the number of teams that take one more
    unsigned start, stop;   // units of this one
    int batch;              // the sequence of unit `start`,
    unsigned first;         // and its first unit

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
        if constexpr (!kParted) return 1;
        return max(p.min_part, (blocks + p.max_parts - 1) / p.max_parts);
    }
    // At least one unit: rows without keys are written too.
    __device__ __forceinline__ static int units_of(const DecodeParams& p, int blocks) {
        if constexpr (!kParted) return max(1, blocks);
        const int chunk = chunk_of(p, blocks);
        return max(1, (blocks + chunk - 1) / chunk);
    }
    __device__ __forceinline__ static unsigned head_units(const DecodeParams& p, const Mask& mask, const CachedSequence& s,
                                                          int batch) {
        unsigned sum = 0;
        const int count = m_blocks(p, s);
#pragma unroll 1
        for (int m = 0; m < count; m++) {
            const Range blocks = key_blocks(p, mask, s, batch, m);
            sum += units_of(p, blocks.stop - blocks.start);
        }
        return sum;
    }
    __device__ __forceinline__ unsigned sequence_units(int b) const {
        return head_units(p, mask, CachedSequence::of<Config::kPacked>(p, b), b) * p.head_sets;
    }

    __device__ __forceinline__ unsigned boundary(unsigned team) const { return team * each + min(team, longer); }
    // The team that takes a unit.
    __device__ __forceinline__ int owner(unsigned unit) const {
        const unsigned split = longer * (each + 1);
        const bool early = unit < split;
        return static_cast<int>((early ? unit : unit - split) / (early ? each + 1 : each) + (early ? 0 : longer));
    }
    __device__ __forceinline__ static int team() { return static_cast<int>(blockIdx.y); }
    __device__ __forceinline__ static int lane() { return static_cast<int>(blockIdx.x); }

    static constexpr int kWords = kThreads / 32 + 2;  // of shared memory that open() needs

    // Finds this CTA's range. All threads take part; each counts the units of as many neighbouring sequences.
    __device__ __forceinline__ void open(unsigned* memory) {
        const int thread = static_cast<int>(threadIdx.x), thread_lane = thread % 32;
        const int count = (p.batch + kThreads - 1) / kThreads, stop_b = min((thread + 1) * count, p.batch);
        unsigned own = 0;
#pragma unroll 1
        for (int b = thread * count; b < stop_b; b++) own += sequence_units(b);
        unsigned inclusive = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned other = __shfl_up_sync(0xffffffffu, inclusive, step);
            if (thread_lane >= step) inclusive += other;
        }
        if (thread_lane == 31) memory[thread / 32] = inclusive;
        __syncthreads();
        unsigned before = inclusive - own, total = 0;
#pragma unroll
        for (int w = 0; w < kThreads / 32; w++) {
            if (w < thread / 32) before += memory[w];
            total += memory[w];
        }
        const int teams = static_cast<int>(min(gridDim.y, max(1u, total >> p.min_units_log2)));
        each = total / teams, longer = total - each * teams;
        start = team() < teams ? boundary(team()) : total;
        stop = team() < teams ? boundary(team() + 1) : total;
        if (start < stop && before <= start && start < before + own) {
            int b = thread * count;
#pragma unroll 1
            for (unsigned units; count > 1 && start - before >= (units = sequence_units(b)); b++) before += units;
            memory[kThreads / 32] = b, memory[kThreads / 32 + 1] = before;
        }
        __syncthreads();
        batch = static_cast<int>(memory[kThreads / 32]), first = memory[kThreads / 32 + 1];
    }

    __device__ __forceinline__ void enter(DecodeItem& item) const {
        const Range blocks = key_blocks(p, mask, item.seq, item.batch, item.m_block);
        item.blocks = blocks;
        item.chunk = chunk_of(p, blocks.stop - blocks.start);
        item.units = units_of(p, blocks.stop - blocks.start);
    }
    // Who else works on an item: needed once its keys are on their way.
    __device__ __forceinline__ void share(DecodeItem& item) const {
        item.owner = 0, item.parts = item.units;
        if constexpr (kParted) return;
        item.owner = item.first >= start ? team() : owner(item.first);
        const unsigned end = item.first + item.units;
        item.parts = (end <= stop ? team() : owner(end - 1)) - item.owner + 1;
    }
    // The item of unit `start`.
    __device__ __forceinline__ DecodeItem first_item() const {
        DecodeItem item;
        item.batch = batch;
        item.seq = CachedSequence::of<Config::kPacked>(p, batch);
        item.head_kv = lane();
        item.first = first;
        if (p.head_sets > 1) {
            const unsigned units = head_units(p, mask, item.seq, batch), set = (start - first) / units;
            item.head_kv += static_cast<int>(set) * p.head_lanes;
            item.first += set * units;
        }
        item.m_block = 0;
        enter(item);
#pragma unroll 1
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
#pragma unroll 1
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
    // Where part n of an item lies; from part 1 on, slots are slot_step() apart.
    __device__ __forceinline__ int slot(const DecodeItem& item, int n) const {
        if constexpr (kParted) return number(item) * p.max_parts + n;
        return 2 * ((item.owner + n) * p.head_lanes + lane()) + (n == 0 ? 1 : 0);
    }
    __device__ __forceinline__ int slot_step() const { return kParted ? 1 : 2 * p.head_lanes; }
    // Which part of its item a unit of this CTA belongs to.
    __device__ __forceinline__ int part(const DecodeItem& item, unsigned unit) const {
        return kParted ? static_cast<int>(unit - item.first) : team() - item.owner;
    }
    __device__ __forceinline__ unsigned long long* ticket(const DecodeItem& item) const {
        return p.tickets + (kParted ? number(item) : item.owner * p.head_lanes + lane());
    }

    // A ticket holds anything at all before a call. Whoever shares an item makes it this call's before arriving; that takes as
    // long as the memory does, and is begun before keys are there. The upper 48 bits say whose count the lower 16 are: of a
    // number that no other call has. All are called by one thread; what begin_claim() returns is on its way until claim() looks
    // at it.
    __device__ __forceinline__ static unsigned long long begin_claim(unsigned long long* ticket, unsigned long long call) {
        return atomicCAS(ticket, 0ull, call << 16);
    }
    __device__ __forceinline__ static void claim(unsigned long long* ticket, unsigned long long call, unsigned long long seen) {
        const unsigned long long mine = call << 16;
        unsigned long long found = 0;
        while (seen != found && (seen & ~0xffffull) != mine) {
            found = seen;
            seen = atomicCAS(ticket, found, mine);
        }
    }
    __device__ __forceinline__ static void claim(unsigned long long* ticket, unsigned long long call) {
        claim(ticket, call, begin_claim(ticket, call));
    }
    // Whether this is the last of `parts` arrivals. It leaves the ticket so that the same launch can be repeated (by a graph).
    __device__ __forceinline__ static bool arrive(unsigned long long* ticket, int parts) {
        const bool last = static_cast<int>(count_and_order(ticket) & 0xffffull) + 1 == parts;
        if (last) atomicExch(ticket, 0ull);
        return last;
    }
};

}  // namespace cuattn
