// Plans of the similarity losses over all edge sizes; prints what is wrong with the first bad one.
#include "cuda/similarity_plan.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

namespace {

using namespace lcr2s::cuda;

SimilarityShape shape;
int64_t plans[3] = {};

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf(
      "%s: rows %lld, columns %lld, width %lld, element %lld, arithmetic %lld, budget %lld, needs %d %d, blocks %lld\n",
      what, static_cast<long long>(shape.rows), static_cast<long long>(shape.columns),
      static_cast<long long>(shape.width), static_cast<long long>(shape.element_bytes),
      static_cast<long long>(shape.arithmetic_bytes), static_cast<long long>(shape.workspace_bytes), shape.need_image,
      shape.need_text, static_cast<long long>(shape.cooperative_blocks));
  std::exit(1);
}

constexpr int64_t kGridMost = 0x7fffffff;

void check_side(const SimilaritySidePlan& side, int64_t rows, int64_t others, int64_t tile, int64_t strip,
                int64_t other_strips, bool panels) {
  expect(side.rows == rows && side.padded >= rows && side.padded % 128 == 0 && side.padded - rows < 128, "padding");
  expect(side.tiles * tile >= rows && (side.tiles - 1) * tile < rows, "tiles cover the rows");
  expect(other_strips * strip >= side.tiles && (other_strips - 1) * strip < side.tiles, "strips cover the tiles");
  // Everything lies apart, in this order, aligned.
  const int64_t a = shape.arithmetic_bytes;
  const int64_t begins[] = {side.panels,     side.ids,         side.inverse, side.factor,        side.scale,
                            side.statistics, side.coefficient, side.along,   side.loss_partials, side.gradient_panels};
  const int64_t sizes[] = {panels_bytes(rows, shape.width, shape.element_bytes),
                           side.padded * 8,
                           side.padded * 8,
                           side.padded * a,
                           side.padded * a,
                           side.strips * kStatistics * side.padded * a,
                           kCoefficients * side.padded * a,
                           side.padded * a,
                           (rows + kFinaliseRows - 1) / kFinaliseRows * kLossPartials * 8,
                           panels ? panels_bytes(rows, others, shape.element_bytes) : 0};
  for (int i = 0; i < 10; ++i) {
    expect(begins[i] >= 0 && begins[i] % 1024 == 0, "alignment");
    if (i < 9) expect(begins[i] + sizes[i] <= begins[i + 1], "arrays overlap");
  }
}

void check_plan() {
  const SimilarityPlan plan = plan_similarity(shape);
  const SimilarityShape& s = shape;
  ++plans[static_cast<int>(plan.path)];
  const bool cooperative = plan.path == SimilarityPath::cooperative;
  expect(plan.gradient == (s.need_image || s.need_text), "gradient");
  check_side(plan.image, s.rows, s.columns, 128, plan.strip, plan.text.strips, cooperative && s.need_image);
  check_side(plan.text, s.columns, s.rows, plan.tile_columns, plan.strip, plan.image.strips,
             cooperative && s.need_text);
  const int64_t of_image = cooperative && s.need_image ? panels_bytes(s.rows, s.columns, s.element_bytes) : 0;
  const int64_t of_text = cooperative && s.need_text ? panels_bytes(s.columns, s.rows, s.element_bytes) : 0;
  expect(plan.image.gradient_panels + of_image <= plan.text.panels &&
             plan.text.gradient_panels + of_text <= plan.scalars && plan.scalars + 64 <= plan.barrier &&
             plan.barrier + 4 <= plan.bytes,
         "order of the workspace");
  expect(plan.image.strips * plan.text.strips <= 1024, "grid of pass 1");
  const int64_t statistics = (plan.image.strips * plan.image.padded + plan.text.strips * plan.text.padded);
  expect(statistics <= 2 * 1024 * (plan.image.padded < plan.text.padded ? plan.image.padded : plan.text.padded) +
                           64 * (plan.image.padded + plan.text.padded),
         "memory of the statistics");

  const int64_t budget = s.workspace_bytes, e = s.element_bytes, a = s.arithmetic_bytes;
  if (cooperative) {
    expect(s.rows <= 1024 && s.columns <= 1024 && plan.strip == 1, "size of the cooperative path");
    expect(plan.image.tiles * plan.text.tiles <= plan.cooperative_blocks, "a block for every tile");
    expect(plan.cooperative_blocks <= s.cooperative_blocks, "blocks that run at once");
    expect(of_image + of_text <= budget, "budget of the cooperative path");
    return;
  }
  if (!plan.gradient) {
    expect(plan.path == SimilarityPath::formed_twice && plan.block_rows == 0, "no gradient, no blocks");
    return;
  }
  expect(plan.block_rows % 128 == 0 && plan.block_columns % 128 == 0 && plan.block_rows > 0 && plan.block_columns > 0,
         "blocks of whole tiles");
  expect(plan.block_rows < s.rows + 128 && plan.block_columns < s.columns + 128, "blocks within the matrix");
  const int64_t rows = plan.block_rows < s.rows ? plan.block_rows : s.rows;
  const int64_t block = rows * plan.block_columns * e;
  expect((plan.block_rows / 128) * (plan.block_columns / plan.tile_columns) <= kGridMost, "grid of pass 2");
  if (plan.path == SimilarityPath::kept) {
    expect(plan.kept_stride == plan.block_columns && plan.block_rows >= s.rows && plan.block_columns >= s.columns,
           "one block where cosines are kept");
    expect(s.rows * plan.kept_stride * a + (e < a ? block : 0) <= budget, "budget of kept cosines");
  } else {
    expect(plan.kept_stride == 0, "nothing kept");
    expect(block <= budget || (plan.block_rows == 128 && plan.block_columns == 128), "budget of a block");
    // Neither budget nor size would allow much more.
    const int64_t blocks = ((s.rows + plan.block_rows - 1) / plan.block_rows) *
                           ((s.columns + plan.block_columns - 1) / plan.block_columns);
    const int64_t whole = (s.rows + 127) / 128 * 128 * ((s.columns + 127) / 128 * 128) * e;
    expect(blocks == 1 || whole > budget, "one block where it fits");
    if (budget >= 4096 * 128 * e) expect(blocks <= 4 * (whole / budget + 1), "blocks fill the budget");
  }
}

}  // namespace

int main() {
  const std::vector<int64_t> sizes = {1,    2,    64,   65,   127,   128,   129,    255,     256,
                                      1023, 1024, 1025, 4096, 11111, 65537, 262144, 1 << 20, 20000001};
  const int64_t types[][2] = {{2, 4}, {4, 4}, {8, 8}};
  for (const int64_t rows : sizes)
    for (const int64_t columns : sizes)
      for (const int64_t width : {1, 64, 512, 767, 768, 4097})
        for (const auto& type : types)
          for (const int64_t budget : {int64_t{0}, int64_t{1} << 16, int64_t{1} << 20, int64_t{64} << 20,
                                       int64_t{256} << 20, int64_t{1} << 36})
            for (const int64_t blocks : {0, 4, 132, 264})
              for (int needs = 0; needs < 4; ++needs) {
                shape = SimilarityShape{
                    rows, columns, width, type[0], type[1], budget, (needs & 1) != 0, (needs & 2) != 0, blocks};
                check_plan();
              }
  for (const int64_t count : plans) expect(count > 1000, "every path is taken");
  return 0;
}
