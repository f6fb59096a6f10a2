#include "cuda/relation_plan.h"

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda/relation_math.h"

// Every plan over edge sizes, and the arithmetic of the KL loss against long double.
using namespace lcr2s::cuda;

namespace {

RelationShape current{};

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s: rows %lld, columns %lld, widths %lld %lld, element %lld, budget %lld\n", what,
              static_cast<long long>(current.rows), static_cast<long long>(current.columns),
              static_cast<long long>(current.student_width), static_cast<long long>(current.teacher_width),
              static_cast<long long>(current.element_bytes), static_cast<long long>(current.workspace_bytes));
  std::exit(1);
}

void check_frobenius(const RelationShape& s) {
  const FrobeniusPlan plan = plan_frobenius(s);
  const int64_t pack = 16 / s.element_bytes;
  for (const auto& [size, least] :
       {std::pair{plan.student_columns, s.student_width}, std::pair{plan.teacher_columns, s.teacher_width},
        std::pair{plan.text_rows, s.columns}})
    expect(size >= least && size < least + pack && size % pack == 0, "padded by less than 16 bytes");
  expect(plan.slab >= 1 && plan.slab <= s.rows, "a slab of some rows");
  expect(plan.slab == s.rows || plan.slab % kSlabRows == 0, "whole tiles");
  const int64_t row_bytes = plan.text_rows * s.arithmetic_bytes;
  expect(plan.slab <= kSlabRows || plan.slab * row_bytes <= s.workspace_bytes, "within the budget");
  // Never far from the cheaper form.
  if (s.rows > 64 * plan.width() && s.columns > 64 * plan.width()) expect(plan.gram, "Gram matrices for many rows");
  if (s.rows < plan.width() / 4 && s.columns < plan.width() / 4) expect(!plan.gram, "differences for few rows");
}

struct Area {
  int64_t begin;
  int64_t bytes;
};

void check_kl(const RelationShape& s) {
  const KlPlan plan = plan_kl(s);
  const bool gradient = s.need_image || s.need_text;
  expect(plan.row_tiles * kPanelRows == plan.padded_rows && plan.padded_rows >= s.rows, "row tiles cover the rows");
  expect(plan.column_tiles * kKlColumns >= s.columns && plan.column_tiles * kKlColumns <= plan.padded_columns,
         "column tiles cover the columns, and padding covers them");
  expect(plan.block_stride >= s.columns && plan.block_stride <= plan.padded_columns &&
             plan.block_stride * s.element_bytes % 16 == 0,
         "aligned rows of slopes");
  expect(plan.operand_stride >= s.student_width && plan.operand_stride * s.element_bytes % 16 == 0,
         "aligned operand rows");
  expect(plan.operand_stride <= panel_chunks(s.student_width, s.element_bytes) * kPanelRowBytes / s.element_bytes,
         "operands are written with the panels");
  expect(plan.sums_tiles >= 1 && plan.sums_tiles <= plan.row_tiles, "a slab of sums");
  expect(plan.slopes_tiles >= 1 && plan.slopes_tiles <= plan.row_tiles, "a slab of slopes");
  const int64_t block = gradient ? plan.slopes_tiles * kPanelRows * plan.block_stride * s.element_bytes : 0;
  const int64_t kept = plan.models[0].kept_bytes + plan.models[1].kept_bytes;
  expect(!gradient || plan.slopes_tiles == 1 || block <= s.workspace_bytes / 2, "slopes within half the budget");
  expect(kept == 0 || kept + block <= s.workspace_bytes / 4 * 3, "kept cosines within what is left");
  const int64_t tile_bytes = kPanelRows * kKlColumns * s.arithmetic_bytes;
  const int64_t sum = 2 * s.arithmetic_bytes;
  const int64_t widths[2] = {s.student_width, s.teacher_width};
  std::vector<Area> areas;
  for (int model = 0; model < 2; ++model) {
    const KlModelPlan& of = plan.models[model];
    expect(of.keep ? of.kept_bytes == plan.row_tiles * plan.column_tiles * tile_bytes : of.kept_bytes == 0,
           "all tiles or none are kept");
    expect(!of.keep || keeping_pays(widths[model], s.element_bytes, s.arithmetic_bytes), "kept where it pays");
    areas.push_back({of.image_panels, panels_bytes(s.rows, widths[model], s.element_bytes)});
    areas.push_back({of.text_panels, panels_bytes(s.columns, widths[model], s.element_bytes)});
    areas.push_back({of.image_factor, plan.padded_rows * s.arithmetic_bytes});
    areas.push_back({of.text_factor, plan.padded_columns * s.arithmetic_bytes});
    areas.push_back({of.row_parts, plan.column_tiles * plan.sums_tiles * kPanelRows * sum});
    areas.push_back({of.column_parts, plan.sums_tiles * plan.padded_columns * sum});
    areas.push_back(
        {of.running, plan.sums_slabs() > 1 ? plan.padded_columns * int64_t{sizeof(ExponentialSum<double>)} : 0});
  }
  const int64_t line = s.arithmetic_bytes == 8 ? sizeof(KlLine<double>) : sizeof(KlLine<float>);
  areas.push_back({plan.row_lines, plan.padded_rows * line});
  areas.push_back({plan.column_lines, plan.padded_columns * line});
  areas.push_back({plan.partials, plan.slopes_tiles * plan.column_tiles * 3 * int64_t{sizeof(double)}});
  areas.push_back({plan.totals, 3 * int64_t{sizeof(double)}});
  int64_t end = 0;
  for (const Area& area : areas) {
    expect(area.begin % 1024 == 0, "places are aligned");
    expect(area.begin + area.bytes <= plan.bytes, "places lie inside");
    for (const Area& other : areas)
      expect(&area == &other || area.bytes == 0 || other.bytes == 0 || area.begin + area.bytes <= other.begin ||
                 other.begin + other.bytes <= area.begin,
             "places do not overlap");
    if (area.begin + area.bytes > end) end = area.begin + area.bytes;
  }
  expect(plan.bytes - end < 1024, "nothing in vain");
}

template <class T>
void check_divergence(long double tolerance) {
  for (int step = -400; step <= 400; ++step) {
    // Not 0: the expected loss would be rounding alone.
    const long double u = 0.01L * step + 0.005L;
    const long double teacher = 0.25L;
    const long double student = teacher * std::exp(-u);
    const KlTerm<T> term = divergence(static_cast<T>(teacher), static_cast<T>(student), static_cast<T>(u));
    const long double rounded = static_cast<T>(u);
    const long double slope = teacher * std::expm1(-rounded);
    const long double loss = teacher * (rounded + std::expm1(-rounded));
    expect(std::abs(term.slope - slope) <= tolerance * (std::abs(slope) + teacher * (std::abs(u) > 0.5L)), "slope");
    expect(std::abs(term.loss - loss) <= tolerance * (std::abs(loss) + teacher * (std::abs(u) > 0.5L)), "loss");
  }
}

void check_sums() {
  // However the entries are divided, and with parts that hold none.
  for (const double scale : {1.0, 80.0, 700.0}) {
    ExponentialSum<double> all{lowest<double>(), 0};
    ExponentialSum<double> halves[2] = {all, all};
    for (int i = 0; i < 40; ++i) {
      const ExponentialSum<double> one{scale * std::sin(i), 1};
      all.merge(one);
      halves[i % 2].merge(one);
    }
    halves[0].merge(ExponentialSum<double>{lowest<double>(), 0});
    halves[0].merge(halves[1]);
    expect(halves[0].shift == all.shift && std::abs(halves[0].sum - all.sum) <= 1e-14 * all.sum, "merged sums");
    ExponentialSum<double> none{lowest<double>(), 0};
    none.merge(ExponentialSum<double>{lowest<double>(), std::nan("")});
    expect(std::isnan(none.sum), "NaN without a maximum");
    all.merge(none);
    expect(std::isnan(all.sum), "NaN stays");
  }
}

}  // namespace

int main() {
  const std::vector<int64_t> sizes = {1, 7, 63, 64, 65, 127, 128, 129, 1000, 4096, 70000, int64_t{1} << 22};
  for (const int64_t rows : sizes)
    for (const int64_t columns : sizes)
      for (const int64_t width : {1, 8, 100, 513, 1024})
        for (const int64_t teacher_width : {1, 100, 1024})
          for (const int64_t bytes : {2, 4, 8})
            for (const int64_t budget : {int64_t{0}, int64_t{1} << 20, int64_t{256} << 20})
              for (const bool need : {false, true}) {
                const int64_t arithmetic = bytes == 8 ? 8 : 4;
                current = {rows, columns, width, teacher_width, bytes, arithmetic, budget, need, !need || bytes == 4};
                check_frobenius(current);
                check_kl(current);
                current.need_text = false;
                check_kl(current);
              }
  check_divergence<float>(1e-6L);
  check_divergence<double>(1e-14L);
  check_sums();
}
