// Programmatic dependent launch (PTX ISA 9.7.13.13 griddepcontrol; sm_90): a grid that is launched so may be in place before
// the one ahead of it in the stream is done. For a grid launched otherwise both do nothing.
#pragma once

namespace cuattn {

// Waits until all grids ahead are done and what they wrote is visible. NOTE: nothing in global memory may be touched before, by
// any CTA, but inputs if the grid ahead was not launched so itself; and each must call it, or one that outlasts the others, for
// the grid after this one knows only that this one is done.
__device__ __forceinline__ void wait_for_grids_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The grid after this one may be put in place once all CTAs have said so.
__device__ __forceinline__ void admit_grid_behind() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace cuattn
