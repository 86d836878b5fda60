// Division by a number that the host knows: a multiplication and a shift.
#pragma once

namespace cuattn {

// floor(n / d) for 0 <= n < 2^31, with shift = 31 + ceil(log2 d) and multiplier = ceil(2^shift / d). The product exceeds the
// quotient's by n (multiplier d - 2^shift) / (d 2^shift) < 1 / d, which never reaches the next integer.
struct Divisor {
    unsigned multiplier;
    int shift;

    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>((static_cast<unsigned long long>(static_cast<unsigned>(n)) * multiplier) >> shift);
    }
};

}  // namespace cuattn
