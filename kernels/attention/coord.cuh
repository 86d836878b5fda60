// Where in the problem a score lies. Queries i and keys j count from the start of their own sequence.
#pragma once

namespace cuattn {

struct Coord {
    int batch, head;         // sequence, query head
    int seqlen_q, seqlen_k;  // this sequence's own lengths
};

// A key of a tile, as the tile's first key of this thread and how far on it is. A thread knows `step` when it is compiled.
struct TileColumn {
    int start, step;
    __device__ __forceinline__ operator int() const { return start + step; }
};

// row - j as a number. Conversions are as slow as exponentials: one serves all columns of a tile.
template <class Real>
__device__ __forceinline__ Real distance(int row, int j) {
    return static_cast<Real>(row - j);
}
template <class Real>
__device__ __forceinline__ Real distance(int row, const TileColumn& j) {
    return static_cast<Real>(row - j.start) - static_cast<Real>(j.step);
}

struct Range {
    int start, stop;  // start <= x < stop
};

}  // namespace cuattn
