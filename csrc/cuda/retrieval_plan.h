#pragma once

#include <cstdint>

#include "panel.h"

// Sizes and choices of the retrieval operators, apart from anything that launches.
namespace lcr2s::cuda {

// Gallery rows of a tile of scores, whose best one pass of top-k keeps; fewer where a tile of doubles would not fit the
// registers.
constexpr int64_t retrieval_columns(int64_t arithmetic_bytes) { return arithmetic_bytes == 8 ? 64 : 128; }

struct TopkShape {
  int64_t queries;
  int64_t gallery;
  int64_t width;
  int64_t k;
  int64_t element_bytes;
  int64_t arithmetic_bytes;
  int64_t workspace_bytes;
};

struct TopkPlan {
  int64_t tile_columns;
  int64_t tiles;  // of the gallery
  // Scores of all tiles, rather than tile maxima and then scores of the best tiles.
  bool direct;
  // Tiles of each query whose scores are kept.
  int64_t kept_tiles;
  // Queries of a slab; whole tiles, unless not even one tile's fit.
  int64_t slab;
  // Gallery rows packed at a time, whole tiles of panels.
  int64_t part;
};

inline TopkPlan plan_topk(const TopkShape& shape) {
  TopkPlan plan{};
  plan.tile_columns = retrieval_columns(shape.arithmetic_bytes);
  plan.tiles = ceil_div(shape.gallery, plan.tile_columns);
  // The second product covers, for a tile of queries, up to 128 k tiles of the gallery; writing and selecting among all
  // scores costs about as much as half a product.
  plan.direct = plan.tiles <= 2 * shape.k;
  plan.kept_tiles = plan.direct ? plan.tiles : shape.k;
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  const int64_t query_bytes = plan.kept_tiles * plan.tile_columns * shape.arithmetic_bytes +
                              (plan.direct ? 0 : plan.tiles * shape.arithmetic_bytes + plan.kept_tiles * 4);
  int64_t slab = shape.workspace_bytes / 2 / query_bytes;
  if (slab > kPanelRows) slab = slab / kPanelRows * kPanelRows;
  plan.slab = clamp(slab, 1, shape.queries);
  const int64_t row_bytes = panel_chunks(shape.width, shape.element_bytes) * kPanelRowBytes;
  const int64_t part = shape.workspace_bytes / 2 / row_bytes / kPanelRows * kPanelRows;
  plan.part = clamp(part, kPanelRows, panel_row_tiles(shape.gallery) * kPanelRows);
  return plan;
}

}  // namespace lcr2s::cuda
