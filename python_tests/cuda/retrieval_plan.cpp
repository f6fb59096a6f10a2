#include "cuda/retrieval_plan.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

// Every plan of top-k over edge sizes.
using namespace lcr2s::cuda;

namespace {

void expect(bool condition, const char* what, const TopkShape& s) {
  if (condition) return;
  std::printf("%s: queries %lld, gallery %lld, width %lld, k %lld, element %lld, budget %lld\n", what,
              static_cast<long long>(s.queries), static_cast<long long>(s.gallery), static_cast<long long>(s.width),
              static_cast<long long>(s.k), static_cast<long long>(s.element_bytes),
              static_cast<long long>(s.workspace_bytes));
  std::exit(1);
}

void check(const TopkShape& s) {
  const TopkPlan plan = plan_topk(s);
  expect(plan.tiles * plan.tile_columns >= s.gallery && (plan.tiles - 1) * plan.tile_columns < s.gallery,
         "tiles cover the gallery", s);
  expect(plan.direct ? plan.kept_tiles == plan.tiles : plan.kept_tiles == s.k && s.k < plan.tiles,
         "the k best tiles hold the k best rows", s);
  expect(plan.kept_tiles * plan.tile_columns >= s.k, "enough candidates", s);
  expect(plan.slab >= 1 && plan.slab <= s.queries, "a slab of some queries", s);
  expect(plan.slab == s.queries || plan.slab < kPanelRows || plan.slab % kPanelRows == 0, "whole tiles of queries", s);
  expect(plan.part >= kPanelRows && plan.part % kPanelRows == 0, "whole tiles of the gallery", s);
  expect(plan.part % plan.tile_columns == 0, "a part begins with a tile", s);
  const int64_t query_bytes = plan.kept_tiles * plan.tile_columns * s.arithmetic_bytes +
                              (plan.direct ? 0 : plan.tiles * s.arithmetic_bytes + s.k * 4);
  expect(plan.slab == 1 || plan.slab * query_bytes <= s.workspace_bytes / 2, "a slab within half the budget", s);
  const int64_t part_bytes = panels_bytes(plan.part, s.width, s.element_bytes);
  expect(plan.part == kPanelRows || part_bytes <= s.workspace_bytes / 2, "a part within half the budget", s);
}

}  // namespace

int main() {
  const std::vector<int64_t> sizes = {
      1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 5000, 1000000, (int64_t{1} << 31) - 1};
  for (const int64_t queries : sizes)
    for (const int64_t gallery : sizes)
      for (const int64_t k : {int64_t{1}, int64_t{2}, int64_t{10}, int64_t{500}, gallery / 2, gallery})
        for (const int64_t width : {1, 64, 65, 1024})
          for (const int64_t bytes : {2, 4, 8})
            for (const int64_t budget : {int64_t{0}, int64_t{1} << 20, int64_t{256} << 20})
              if (k >= 1 && k <= gallery) check({queries, gallery, width, k, bytes, bytes == 8 ? 8 : 4, budget});
}
