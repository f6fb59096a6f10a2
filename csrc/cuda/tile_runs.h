#pragma once

#include "tile_mma.h"

namespace lcr2s::cuda {

// Whether the architecture that is compiled for ever runs a kernel with this engine: where wgmma is, mma is not asked
// for. Kernels that never run are left empty.
template <class Tile>
constexpr bool kTileRuns = Tile::kAvailable;
#if LCR2S_WGMMA && !defined(LCR2S_EMULATE_CUDA)
template <class Element, int kCols>
constexpr bool kTileRuns<TileMma<Element, kCols>> = false;
#endif

}  // namespace lcr2s::cuda
