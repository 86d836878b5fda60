// Programmatic dependent launch (PTX ISA 9.7.13.13 griddepcontrol; sm_90): a grid that is launched so may be in place before
// the one ahead of it in the stream is done. For a grid launched otherwise both do nothing, as for older devices.
#pragma once

namespace cuattn {

// Waits until all grids ahead are done and what they wrote is visible. NOTE: before, nothing may be touched in global memory but
// what was there already when the grid ahead began, and that only if this one was not launched so; and each CTA must call it,
// for the grid after this one knows only that this one is done.
__device__ __forceinline__ void wait_for_grids_ahead() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The grid after this one may be put in place once all CTAs have said so.
__device__ __forceinline__ void admit_grid_behind() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace cuattn
