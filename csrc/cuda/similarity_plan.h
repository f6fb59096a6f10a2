#pragma once

#include <cstdint>

#include "panel.h"

// Sizes and choices of the similarity losses, apart from anything that launches.
namespace lcr2s::cuda {

enum class SimilarityLoss { info_nce, sdm, cmpm, tal };

// Numbers a row at most: statistics (maxima, sums, positives) and coefficients of the gradient (similarity_math.h).
constexpr int kStatistics = 7;
constexpr int kCoefficients = 4;

enum class SimilarityPath {
  // One cooperative launch, each block with one tile of cosines; the products of the gradients in the kernel.
  cooperative,
  // Cosines are written in pass 1 and read in pass 2.
  kept,
  // Cosines are formed again in pass 2, in blocks of rows and columns.
  formed_twice,
};

struct SimilarityShape {
  int64_t rows;
  int64_t columns;
  int64_t width;
  int64_t element_bytes;     // of a matrix product's operands
  int64_t arithmetic_bytes;  // of its result
  int64_t workspace_bytes;   // budget of cosines and their gradients
  bool need_image;
  bool need_text;
  // Blocks of the cooperative kernel that the device holds at once.
  int64_t cooperative_blocks;
};

// Rows or columns whose statistics one block finishes; so many have one loss partial.
constexpr int64_t kFinaliseRows = 256;
constexpr int64_t kLossPartials = 4;

// Offsets into the workspace of what is kept for the rows of one side, and their sizes.
struct SimilaritySidePlan {
  int64_t rows;
  int64_t padded;
  int64_t tiles;
  // Blocks of pass 1 that meet a row, each with statistics of its own.
  int64_t strips;
  int64_t panels;
  int64_t ids;
  int64_t inverse;
  int64_t factor;
  int64_t scale;
  int64_t statistics;
  int64_t coefficient;
  int64_t along;
  int64_t loss_partials;
  // Cooperative path: rows of dL/dc as operand.
  int64_t gradient_panels;
};

struct SimilarityPlan {
  SimilarityPath path;
  bool gradient;
  int64_t tile_columns;
  // Tiles, each way, of one block in pass 1: squares keep the statistics' memory at O(rows + columns).
  int64_t strip;
  SimilaritySidePlan image;
  SimilaritySidePlan text;
  int64_t scalars;
  int64_t barrier;
  int64_t bytes;
  // Tensors beside the workspace, none where a size is 0: cosines kept (rows x kept_stride) and a block of dL/dc
  // (block_rows x block_columns), which is the same memory where both have one type.
  int64_t kept_stride;
  int64_t block_rows;
  int64_t block_columns;
  int64_t cooperative_blocks;
};

namespace similarity_plan {

constexpr int64_t kBlocksMost = 1024;
constexpr int64_t kCooperativeRowsMost = 1024;
constexpr int64_t kTile = kPanelRows;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

class Layout {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = end_;
    end_ += round_up(bytes, 1024);
    return at;
  }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = 0;
};

// Writing a cosine and reading it again moves 8 bytes; forming it again costs 2 width FLOPs. With 2-byte operands,
// whose products run two orders of magnitude faster than memory moves bytes, narrow ones are formed again, unless the
// cosines stay in the L2 cache. An estimate from data sheets.
inline bool keeping_pays(const SimilarityShape& s, int64_t kept_bytes) {
  constexpr int64_t kWide = 768;
  constexpr int64_t kCached = int64_t{24} << 20;
  return s.element_bytes > 2 || s.width >= kWide || kept_bytes <= kCached;
}

inline void plan_block(const SimilarityShape& s, SimilarityPlan& plan) {
  // As square as it can be: each block's products are added to the gradients of its rows and of its columns.
  const int64_t elements = s.workspace_bytes / s.element_bytes;
  int64_t side = kTile;
  while ((side + kTile) * (side + kTile) <= elements) side += kTile;
  const auto whole = [](int64_t n) { return round_up(n, kTile); };
  const auto cut = [&](int64_t n, int64_t most) { return whole(ceil_div(n, ceil_div(whole(n), most))); };
  const auto fitting = [&](int64_t other) { return at_least(elements / other / kTile * kTile, kTile); };
  const bool narrow_rows = whole(s.rows) <= side;
  if (narrow_rows) {
    plan.block_rows = whole(s.rows);
    plan.block_columns = cut(s.columns, fitting(plan.block_rows));
  } else {
    plan.block_columns = whole(s.columns) <= side ? whole(s.columns) : cut(s.columns, side);
    plan.block_rows = cut(s.rows, fitting(plan.block_columns));
  }
}

inline void plan_side(const SimilarityShape& s, int64_t rows, int64_t others, int64_t tiles, int64_t strips,
                      bool panels, Layout& layout, SimilaritySidePlan& side) {
  const int64_t a = s.arithmetic_bytes;
  side.rows = rows;
  side.padded = round_up(rows, kTile);
  side.tiles = tiles;
  side.strips = strips;
  side.panels = layout.take(panels_bytes(rows, s.width, s.element_bytes));
  side.ids = layout.take(side.padded * 8);
  side.inverse = layout.take(side.padded * 8);
  side.factor = layout.take(side.padded * a);
  side.scale = layout.take(side.padded * a);
  side.statistics = layout.take(strips * kStatistics * side.padded * a);
  side.coefficient = layout.take(kCoefficients * side.padded * a);
  side.along = layout.take(side.padded * a);
  side.loss_partials = layout.take(ceil_div(rows, kFinaliseRows) * kLossPartials * 8);
  side.gradient_panels = layout.take(panels ? panels_bytes(rows, others, s.element_bytes) : 0);
}

}  // namespace similarity_plan

// Whether a problem is small enough for the cooperative path.
inline bool may_cooperate(const SimilarityShape& s) {
  return s.rows <= similarity_plan::kCooperativeRowsMost && s.columns <= similarity_plan::kCooperativeRowsMost;
}

inline SimilarityPlan plan_similarity(const SimilarityShape& s) {
  using namespace similarity_plan;
  SimilarityPlan plan{};
  plan.gradient = s.need_image || s.need_text;
  const int64_t panels = (s.need_image ? panels_bytes(s.rows, s.columns, s.element_bytes) : 0) +
                         (s.need_text ? panels_bytes(s.columns, s.rows, s.element_bytes) : 0);
  const int64_t kept_stride = round_up(s.columns, kTile);
  const int64_t kept_bytes = s.rows * kept_stride * s.arithmetic_bytes;
  const int64_t block_bytes =
      s.element_bytes < s.arithmetic_bytes ? round_up(s.rows, kTile) * kept_stride * s.element_bytes : 0;
  const int64_t row_tiles = ceil_div(s.rows, kTile);
  const int64_t narrow_tiles = ceil_div(s.columns, kTile / 2);
  if (may_cooperate(s) && row_tiles * narrow_tiles <= s.cooperative_blocks && panels <= s.workspace_bytes) {
    plan.path = SimilarityPath::cooperative;
  } else if (plan.gradient && kept_bytes + block_bytes <= s.workspace_bytes && keeping_pays(s, kept_bytes)) {
    plan.path = SimilarityPath::kept;
    plan.kept_stride = kept_stride;
    plan.block_rows = round_up(s.rows, kTile);
    plan.block_columns = kept_stride;
  } else {
    plan.path = SimilarityPath::formed_twice;
    if (plan.gradient) plan_block(s, plan);
  }

  const bool cooperative = plan.path == SimilarityPath::cooperative;
  // Small problems in narrow tiles, which are more and keep more of the device busy.
  plan.tile_columns = cooperative || s.arithmetic_bytes == 8 ? kTile / 2 : kTile;
  const int64_t column_tiles = ceil_div(s.columns, plan.tile_columns);
  plan.strip = 1;
  while (ceil_div(row_tiles, plan.strip) * ceil_div(column_tiles, plan.strip) > kBlocksMost) plan.strip *= 2;
  Layout layout;
  plan_side(s, s.rows, s.columns, row_tiles, ceil_div(column_tiles, plan.strip), cooperative && s.need_image, layout,
            plan.image);
  plan_side(s, s.columns, s.rows, column_tiles, ceil_div(row_tiles, plan.strip), cooperative && s.need_text, layout,
            plan.text);
  plan.scalars = layout.take(8 * 8);
  plan.barrier = layout.take(sizeof(unsigned));
  plan.bytes = layout.bytes();
  if (cooperative) {
    // The products of the gradients have tiles of their own.
    const int64_t across = ceil_div(s.width, plan.tile_columns);
    const int64_t products =
        (s.need_image ? row_tiles * across : 0) + (s.need_text ? ceil_div(s.columns, kTile) * across : 0);
    plan.cooperative_blocks = at_most(at_least(row_tiles * column_tiles, products), s.cooperative_blocks);
  }
  return plan;
}

}  // namespace lcr2s::cuda
