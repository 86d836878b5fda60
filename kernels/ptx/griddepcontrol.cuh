// Programmatic dependent launch (PTX ISA 9.7.13.13 griddepcontrol; sm_90): a grid that is launched so may be in place before
// the one ahead of it in the stream is done. For a grid launched otherwise both do nothing.
#pragma once

namespace cuattn {

// Waits until all grids ahead are done and what they wrote is visible. NOTE: before, nothing may be touched in global memory,
// by any CTA, but inputs that were there when the grid ahead began, if that one was not launched so. And each CTA must call it,
// for the grid after this one knows only that this one is done.
__device__ __forceinline__ void wait_for_grids_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The grid after this one may be put in place once all CTAs have said so.
__device__ __forceinline__ void admit_grid_behind() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace cuattn
