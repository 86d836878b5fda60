// Generic to shared-window addresses (PTX ISA 9.7.9.20, cvta).
#pragma once

namespace cuattn {

__device__ __forceinline__ unsigned smem_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace cuattn
