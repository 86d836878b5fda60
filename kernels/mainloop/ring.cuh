// Rings of buffers in shared memory that one role fills and others read.
#pragma once

namespace cuattn {

// A place in a ring of kStages buffers, and the parity of the phase in which it is being filled.
template <int kStages>
struct RingSlot {
    int stage = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

}  // namespace cuattn
