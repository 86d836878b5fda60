// Where in the problem a score lies. Queries i and keys j count from the start of their own sequence.
#pragma once

namespace cuattn {

struct Coord {
    int batch, head;         // sequence, query head
    int seqlen_q, seqlen_k;  // this sequence's own lengths
};

struct Range {
    int start, stop;  // start <= x < stop
};

}  // namespace cuattn
