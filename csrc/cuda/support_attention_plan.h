#pragma once

#include <cstdint>

#include "../support_attention.h"
#include "element.h"

// Launch geometry of support attention: plain functions of the shape, tested apart from any launch.
namespace lcr2s::cuda::support_attention_plan {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Blocks that a multiprocessor holds at once, as the kernels' launch bounds promise.
constexpr int kResidentBlocks = 2;
// Scores that a warp keeps in shared memory: sets of up to 32 rows, times the most heads that it works on.
constexpr int kSharedScores = 32 * 4;
// A pool row with more than 2^6 users has them summed in segments of as many.
constexpr int kSegmentShift = 6;

// How a warp's lanes share rows: a head takes `lanes` of them, each holding a vector of `size` elements of every block
// of lanes * size, and the warp takes neighbouring heads. Packed: a vector is 16 bytes; else it is one element.
struct Layout {
  bool packed;
  int size;
  int lanes;
  int slices;  // warps that a row takes

  int heads_per_warp() const { return 32 / lanes; }
};

inline int element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline int statistic_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// `aligned`: every row of every operand starts at a multiple of 16 bytes.
inline Layout layout(const SupportAttentionShape& shape, bool aligned) {
  const int pack = 16 / element_bytes(shape.dtype);
  Layout result{aligned && shape.width % pack == 0 && shape.value_width % pack == 0, 1, 8, 0};
  if (result.packed) result.size = pack;
  const int64_t widest = shape.width > shape.value_width ? shape.width : shape.value_width;
  while (result.lanes < 32 && static_cast<int64_t>(result.lanes) * result.size < widest) result.lanes *= 2;
  result.slices = static_cast<int>((shape.heads + result.heads_per_warp() - 1) / result.heads_per_warp());
  return result;
}

// Work of `units` warps on `blocks` blocks, each of which takes `units_per_block` neighbouring units: what follows in
// the index is then found in the block's cache.
struct Grid {
  int64_t blocks;
  int units_per_block;
};

inline Grid grid(int64_t units, int multiprocessors) {
  const int64_t resident = static_cast<int64_t>(multiprocessors > 0 ? multiprocessors : 1) * kResidentBlocks;
  const int64_t needed = (units + kWarps - 1) / kWarps;
  // Up to eight grids' worth of blocks where there is enough work for each, so that uneven sets even out.
  int64_t waves = needed / (16 * resident);
  waves = waves < 1 ? 1 : waves > 8 ? 8 : waves;
  const int64_t rounds = (needed + waves * resident - 1) / (waves * resident);
  return rounds == 0 ? Grid{0, 0} : Grid{(needed + rounds - 1) / rounds, static_cast<int>(rounds * kWarps)};
}

// Pool rows with more than `length` users are summed in segments of `length`, each by a warp of its own and into a slot
// of its own. With step = length / 2, slot w may hold a segment of the row to whose users position
// w * step + step - 1 of the transposed index belongs, and of no other: the slots of two rows never meet.
struct Segments {
  int shift;  // length = 2^shift
  int64_t slots;

  int64_t length() const { return int64_t{1} << shift; }
  int64_t step() const { return length() / 2; }
};

// The slots of the row whose users are at begin .. end: `first` and those after it.
struct Slots {
  int64_t first;
  int64_t count;
};

LCR2S_HOST_DEVICE Slots slots_of(int64_t begin, int64_t end, int shift) {
  return {begin >> (shift - 1), (end - begin + (int64_t{1} << shift) - 1) >> shift};
}

// Longer segments where there would be so many slots that they took more memory than a part of the gradients.
inline Segments segments(const SupportAttentionShape& shape) {
  const int64_t rows = (shape.queries + shape.pool_rows) / 8;
  const int64_t most = rows > 1024 ? rows : 1024;
  Segments result{kSegmentShift, 0};
  while (shape.entries / result.step() > most) ++result.shift;
  if (shape.entries > result.length()) result.slots = shape.entries / result.step();
  return result;
}

// Memory of the backward: partial sums of the segments, [slot][heads of the keys, then of the values] in the
// statistics' type, then one counter for each slot and slice.
struct Workspace {
  int64_t partial_elements;
  int64_t counters;

  int64_t bytes(DType dtype) const {
    return partial_elements * statistic_bytes(dtype) + counters * static_cast<int64_t>(sizeof(unsigned));
  }
};

inline Workspace workspace(const SupportAttentionShape& shape, int64_t slices) {
  const int64_t slots = segments(shape).slots;
  return {slots * shape.heads * (shape.width + shape.value_width), slots * slices};
}

// The backward: a query pass, which also zeroes the counters, then a pool pass. In one cooperative launch where no warp
// has more than one unit of either pass, else one launch each; no blocks, no launch.
struct Backward {
  Grid query;
  Grid pool;
  Segments segments;
  bool cooperative;
  int64_t first_blocks;
  int64_t second_blocks;
};

inline Backward backward(const SupportAttentionShape& shape, int slices, bool queries, bool pool, int multiprocessors) {
  Backward result{grid(queries ? shape.queries * slices : 0, multiprocessors),
                  grid(pool ? shape.pool_rows * slices : 0, multiprocessors),
                  pool ? segments(shape) : Segments{kSegmentShift, 0},
                  false,
                  0,
                  0};
  const int64_t zeroing = grid((result.segments.slots * slices + 31) / 32, multiprocessors).blocks;
  result.first_blocks = result.query.blocks > 0 ? result.query.blocks : zeroing;
  result.second_blocks = result.pool.blocks;
  result.cooperative = result.first_blocks > 0 && result.second_blocks > 0 && result.query.units_per_block <= kWarps &&
                       result.pool.units_per_block <= kWarps;
  if (result.cooperative) {
    result.first_blocks = result.first_blocks > result.second_blocks ? result.first_blocks : result.second_blocks;
    result.second_blocks = 0;
  }
  return result;
}

}  // namespace lcr2s::cuda::support_attention_plan
