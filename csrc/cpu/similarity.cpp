#include "similarity.h"

#include "gemm.h"
#include "unit_rows.h"

// One engine for the losses over a cosine matrix that is never formed. Row logits are x_ij = a_i c_ij, column logits
// y_ij = b_j c_ij. Pass 1 streams tiles of cosines and keeps, for every row and every column, a few sums of its
// softmax; these give the loss and a few coefficients of dL/dx and dL/dy. Pass 2 takes the tiles again (kept, where all
// fit the budget, or formed anew), turns each into G = dL/dc and adds G T^ and G' V^ to the gradients of the unit rows.
// A loss is a policy: which sums, and what they mean.
namespace lcr2s::cpu::LCR2S_ISA {

namespace {

constexpr int64_t kTileRows = kMc;
constexpr int64_t kTileColumns = 256;
// Block of pass 2: large enough that adding to the gradients costs little beside the products, small enough for a
// cache.
constexpr int64_t kBlockRows = 16 * kTileRows;
constexpr int64_t kBlockColumns = 8 * kTileColumns;
// Rows or columns that one task merges or finishes.
constexpr int64_t kChunk = 256;
// Arrays over rows and columns are padded to whole vectors of any width.
constexpr int64_t kPadding = 64;

LCR2S_INLINE int64_t padded(int64_t n) { return ceil_div(n, kPadding) * kPadding; }
template <class N>
LCR2S_INLINE N at_most(N a, N b) {
  return a < b ? a : b;
}
template <class N>
LCR2S_INLINE N at_least(N a, N b) {
  return a > b ? a : b;
}

// Integers as wide as the lanes of T, so that a comparison of labels selects lanes.
template <class T>
struct LabelOf {
  using type = int32_t;
};
template <>
struct LabelOf<double> {
  using type = int64_t;
};
template <class T>
using Label = typename LabelOf<T>::type;

template <class T>
LCR2S_INLINE Mask<T> load_labels(const Label<T>* p) {
  Mask<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// Below every logit, and finite: differences of two of them are not NaN.
template <class T>
constexpr T kLowest = T{-1e30f};

// x where it is greater; NaN in x does not count, its exponential will show it.
template <class T>
LCR2S_INLINE Vec<T> greater(Vec<T> x, Vec<T> than) {
  return x > than ? x : than;
}

template <class T>
LCR2S_INLINE T max_lanes(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

struct Direction {
  // Rows of this direction and entries of each row.
  int64_t rows;
  int64_t entries;
  // Rows with a positive.
  int64_t valid;
};

// A policy has
//   kMaxima            running maxima; with two, the first is over positives and the second over negatives
//   kSums              sums of exponentials below those maxima
//   kUniform           a_i = b_j for all rows and columns: pass 2 leaves this factor out, `factor` puts it back
//   terms              what one vector of logits adds to the sums; `below` is the logit less its maximum, e its
//   exponential rescale            sums when the maxima fall by `shift`, whose exponential is `by` finish loss of one
//   row and its coefficients, from the maxima followed by the sums gradient           dL/dlogit from the coefficients,
//   the first of which is what `below` is below rebase             the coefficients of another such reference, where
//   rows and columns can share one (kMaxima is 1)
// all of it the same for rows and columns.

template <class T>
struct InfoNce {
  static constexpr int kMaxima = 1, kSums = 2, kCoefficients = 3;
  static constexpr bool kUniform = true;

  // sum e^(x - m), sum of x over positives
  LCR2S_INLINE static void terms(Vec<T> x, Vec<T>, Vec<T> e, Mask<T> positive, Vec<T>* out) {
    out[0] = e;
    out[1] = positive ? x : Vec<T>{};
  }
  LCR2S_INLINE static void scale(Vec<T>* sums, Vec<T> by) { sums[0] *= by; }
  LCR2S_INLINE static void rescale(Vec<T>* sums, const Vec<T>*, const Vec<T>* by) { scale(sums, by[0]); }

  static double finish(const SimilarityArgs&, const Direction& direction, int64_t positives, const T* state, T* out) {
    const double weight = positives > 0 ? 0.5 / static_cast<double>(direction.valid) : 0.0;
    const double count = positives > 0 ? static_cast<double>(positives) : 1.0;
    const double total = state[1];
    out[0] = state[0];
    out[1] = static_cast<T>(weight / total);
    out[2] = static_cast<T>(weight / count);
    // A row that is left out has weight 0, which keeps NaN.
    return weight * (state[0] + __builtin_log(total) - state[2] / count);
  }
  LCR2S_INLINE static Vec<T> gradient(Vec<T>, Vec<T> e, Mask<T> positive, const Vec<T>* c) {
    return e * c[1] - (positive ? c[2] : Vec<T>{});
  }
};

// SDM and CMPM: KL of the softmax from a target that is la on positives and lb elsewhere, in logarithms.
template <class T, bool kProjection>
struct Matching {
  static constexpr int kMaxima = 1, kSums = 3, kCoefficients = 4;
  static constexpr bool kUniform = !kProjection;

  // sum e^(x - m) over positives, sum e^(x - m) (x - m) over all, sum e^(x - m) over negatives: the small one of the
  // two masses keeps its digits
  LCR2S_INLINE static void terms(Vec<T>, Vec<T> below, Vec<T> e, Mask<T> positive, Vec<T>* out) {
    out[0] = positive ? e : Vec<T>{};
    out[1] = e * below;
    out[2] = e - out[0];
  }
  LCR2S_INLINE static void scale(Vec<T>* sums, Vec<T> by) {
    for (int f = 0; f < kSums; ++f) sums[f] *= by;
  }
  LCR2S_INLINE static void rescale(Vec<T>* sums, const Vec<T>* shift, const Vec<T>* by) {
    sums[1] += (sums[0] + sums[2]) * shift[0];
    scale(sums, by[0]);
  }

  static double finish(const SimilarityArgs& args, const Direction& direction, int64_t positives, const T* state,
                       T* out) {
    const double weight = 1.0 / static_cast<double>(direction.rows);
    const double lb = __builtin_log(args.eps);
    double la = lb;
    if (positives > 0) {
      const double count = static_cast<double>(positives);
      la = __builtin_log(1.0 / (args.l2_target ? __builtin_sqrt(count) : count) + args.eps);
    }
    const double of_positive = state[1];
    const double of_negative = state[3];
    const double total = of_positive + of_negative;
    const double log_total = __builtin_log(total);
    const double loss = (state[2] - la * of_positive - lb * of_negative) / total - log_total;
    out[0] = state[0];
    out[1] = static_cast<T>(weight / total);
    out[2] = static_cast<T>(log_total + la + loss);
    out[3] = static_cast<T>(log_total + lb + loss);
    return weight * loss;
  }
  LCR2S_INLINE static Vec<T> gradient(Vec<T> below, Vec<T> e, Mask<T> positive, const Vec<T>* c) {
    return e * c[1] * (below - (positive ? c[2] : c[3]));
  }
};

template <class T>
struct Tal {
  static constexpr int kMaxima = 2, kSums = 3, kCoefficients = 4;
  static constexpr bool kUniform = true;

  // over positives sum e^(x - m) and sum e^(x - m) (x - m), over negatives sum e^(x - m)
  LCR2S_INLINE static void terms(Vec<T>, Vec<T> below, Vec<T> e, Mask<T> positive, Vec<T>* out) {
    out[0] = positive ? e : Vec<T>{};
    out[1] = positive ? e * below : Vec<T>{};
    out[2] = e - out[0];
  }
  LCR2S_INLINE static void rescale(Vec<T>* sums, const Vec<T>* shift, const Vec<T>* by) {
    sums[1] = by[0] * (sums[1] + sums[0] * shift[0]);
    sums[0] *= by[0];
    sums[2] *= by[1];
  }

  static double finish(const SimilarityArgs& args, const Direction& direction, int64_t positives, const T* state,
                       T* out) {
    out[0] = state[0];
    out[2] = state[1];
    out[1] = out[3] = T{0};
    // Without a positive or without a negative the row is 0, which keeps NaN.
    if (positives == 0 || positives == direction.entries) return 0.0 * (state[3] + state[4]);
    const double of_positive = state[2];
    const double of_negative = state[4];
    const double hinge = args.margin - args.tau * (state[0] + state[3] / of_positive) +
                         args.tau * (state[1] + __builtin_log(of_negative));
    if (hinge <= 0.0) return 0.0;
    // dL/dc itself: tau dL/dx cancels the 1 / tau of the logits.
    out[1] = static_cast<T>(-1.0 / of_positive);
    out[3] = static_cast<T>(1.0 / of_negative);
    return hinge;
  }
  LCR2S_INLINE static Vec<T> gradient(Vec<T>, Vec<T> e, Mask<T> positive, const Vec<T>* c) {
    return e * (positive ? c[1] : c[3]);
  }
};

template <class T, class Policy>
LCR2S_INLINE Vec<T> maximum_of(const Vec<T>* maxima, Mask<T> positive) {
  if constexpr (Policy::kMaxima == 2) return positive ? maxima[0] : maxima[1];
  return maxima[0];
}

// What a logit of a row is below in pass 2, from the row's coefficients.
template <class T, class Policy>
LCR2S_INLINE Vec<T> reference_of(const Vec<T>* coefficients, Mask<T> positive) {
  if constexpr (Policy::kMaxima == 2) return positive ? coefficients[0] : coefficients[2];
  return coefficients[0];
}

template <class T, class Policy>
LCR2S_INLINE void raise(Vec<T>* maxima, Vec<T> x, Mask<T> positive) {
  if constexpr (Policy::kMaxima == 2) {
    const Vec<T> low = broadcast(kLowest<T>);
    maxima[0] = greater<T>(positive ? x : low, maxima[0]);
    maxima[1] = greater<T>(positive ? low : x, maxima[1]);
  } else {
    maxima[0] = greater<T>(x, maxima[0]);
  }
}

// Calls body(j, inside) for every vector of columns; `inside` selects the lanes below n.
template <class T, class F>
LCR2S_INLINE void for_columns(int64_t n, const F& body) {
  constexpr int lanes = kLanes<T>;
  Mask<T> lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) body(j, lane >= 0);
  if (j < n) body(j, lane < static_cast<Label<T>>(n - j));
}

template <class T>
struct Range {
  T least = -kLowest<T>;
  T greatest = kLowest<T>;

  LCR2S_INLINE void include(T x) {
    least = x < least ? x : least;
    greatest = x > greatest ? x : greatest;
  }
};

template <class T>
struct Tile {
  int64_t rows;
  int64_t columns;
  // Logit factors and labels of its rows and of its columns.
  const T* row_scale;
  const T* column_scale;
  const Label<T>* row_label;
  const Label<T>* column_label;
};

// Logits of a row and of columns; beyond the last column the row's are below all others.
template <class T, class Policy>
LCR2S_INLINE void logits(const Tile<T>& tile, const T* cosine, Vec<T> a, int64_t j, Mask<T> inside, Vec<T>& x,
                         Vec<T>& y) {
  const Vec<T> value = load(cosine + j);
  x = inside ? rounded<T>(value * a) : broadcast(kLowest<T>);
  y = Policy::kUniform ? x : rounded<T>(value * load(tile.column_scale + j));
}

// Where the maxima of rows and columns lie no farther apart, one exponential below the greatest serves both: what it
// flushes to zero is below 1e-20 of its row and of its column.
template <class T>
constexpr T kSharedRange = 40;

template <class T, class Policy>
constexpr bool kCanShare = Policy::kUniform && Policy::kMaxima == 1;

// Sums of a tile, below its rows' and columns' maxima; kShared: their exponentials are all below `reference`.
template <class T, class Policy, bool kShared>
static void tile_sums(const Tile<T>& tile, const T* cosine, T reference, const T (*row_max)[kTileRows],
                      const T (*column_max)[kTileColumns], T (*row_sum)[kTileRows], T (*column_sum)[kTileColumns]) {
  using V = Vec<T>;
  constexpr int maxima = Policy::kMaxima, sums = Policy::kSums;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* c = cosine + i * kTileColumns;
    const V a = broadcast(tile.row_scale[i]);
    const Mask<T> label = Mask<T>{} + tile.row_label[i];
    V top[maxima];
    for (int g = 0; g < maxima; ++g) top[g] = broadcast(row_max[g][i]);
    V total[sums] = {};
    for_columns<T>(tile.columns, [&](int64_t j, Mask<T> inside) __attribute__((always_inline)) {
      V x, y;
      logits<T, Policy>(tile, c, a, j, inside, x, y);
      const Mask<T> positive = load_labels<T>(tile.column_label + j) == label;
      V column_top[maxima];
      for (int g = 0; g < maxima; ++g) column_top[g] = load(column_max[g] + j);
      const V of_row = x - maximum_of<T, Policy>(top, positive);
      const V of_column = y - maximum_of<T, Policy>(column_top, positive);
      V row_exp, column_exp;
      if constexpr (kShared) {
        row_exp = column_exp = exp_nonpositive(x - reference);
      } else {
        row_exp = exp_nonpositive(of_row);
        column_exp = exp_nonpositive(of_column);
      }
      V terms[sums];
      Policy::terms(x, of_row, row_exp, positive, terms);
      for (int f = 0; f < sums; ++f) total[f] += terms[f];
      Policy::terms(y, of_column, column_exp, positive, terms);
      for (int f = 0; f < sums; ++f) store(column_sum[f] + j, load(column_sum[f] + j) + terms[f]);
    });
    for (int f = 0; f < sums; ++f) row_sum[f][i] = sum_lanes<T>(total[f]);
  }
}

// From exponentials below `reference` to exponentials below each row's maximum.
template <class T, class Policy, int64_t kRows>
LCR2S_INLINE void leave_reference(T reference, const T* maxima, T (*sums)[kRows]) {
  static_assert(kRows % kLanes<T> == 0);
  for (int64_t i = 0; i < kRows; i += kLanes<T>) {
    Vec<T> fields[Policy::kSums];
    for (int f = 0; f < Policy::kSums; ++f) fields[f] = load(sums[f] + i);
    Policy::scale(fields, exp(reference - load(maxima + i)));
    for (int f = 0; f < Policy::kSums; ++f) store(sums[f] + i, fields[f]);
  }
}

// Maxima and sums of a tile (cosines in rows of kTileColumns), for its rows and for its columns: field f of row i at
// row_out[f * row_stride + i], likewise for columns.
template <class T, class Policy>
static void tile_statistics(const Tile<T>& tile, const T* cosine, T* row_out, int64_t row_stride, T* column_out,
                            int64_t column_stride) {
  using V = Vec<T>;
  constexpr int maxima = Policy::kMaxima, sums = Policy::kSums;
  const V low = broadcast(kLowest<T>);
  alignas(64) T column_max[maxima][kTileColumns];
  alignas(64) T column_sum[sums][kTileColumns] = {};
  alignas(64) T row_max[maxima][kTileRows] = {};
  alignas(64) T row_sum[sums][kTileRows] = {};
  for (int g = 0; g < maxima; ++g)
    for (int64_t j = 0; j < kTileColumns; j += kLanes<T>) store(column_max[g] + j, low);

  for (int64_t i = 0; i < tile.rows; ++i) {
    const V a = broadcast(tile.row_scale[i]);
    const Mask<T> label = Mask<T>{} + tile.row_label[i];
    V best[maxima];
    for (int g = 0; g < maxima; ++g) best[g] = low;
    for_columns<T>(tile.columns, [&](int64_t j, Mask<T> inside) __attribute__((always_inline)) {
      V x, y;
      logits<T, Policy>(tile, cosine + i * kTileColumns, a, j, inside, x, y);
      const Mask<T> positive = maxima == 2 ? load_labels<T>(tile.column_label + j) == label : Mask<T>{};
      raise<T, Policy>(best, x, positive);
      V of_column[maxima];
      for (int g = 0; g < maxima; ++g) of_column[g] = load(column_max[g] + j);
      raise<T, Policy>(of_column, y, positive);
      for (int g = 0; g < maxima; ++g) store(column_max[g] + j, of_column[g]);
    });
    for (int g = 0; g < maxima; ++g) row_max[g][i] = max_lanes<T>(best[g]);
  }

  bool shared = false;
  if constexpr (kCanShare<T, Policy>) {
    Range<T> range;
    for (int64_t i = 0; i < tile.rows; ++i) range.include(row_max[0][i]);
    for (int64_t j = 0; j < tile.columns; ++j) range.include(column_max[0][j]);
    shared = range.greatest - range.least <= kSharedRange<T>;
    if (shared) {
      tile_sums<T, Policy, true>(tile, cosine, range.greatest, row_max, column_max, row_sum, column_sum);
      leave_reference<T, Policy>(range.greatest, row_max[0], row_sum);
      leave_reference<T, Policy>(range.greatest, column_max[0], column_sum);
    }
  }
  if (!shared) tile_sums<T, Policy, false>(tile, cosine, T{0}, row_max, column_max, row_sum, column_sum);
  const auto write = [](const T* from, int64_t count, T* to) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  };
  for (int g = 0; g < maxima; ++g) {
    write(row_max[g], tile.rows, row_out + g * row_stride);
    write(column_max[g], tile.columns, column_out + g * column_stride);
  }
  for (int f = 0; f < sums; ++f) {
    write(row_sum[f], tile.rows, row_out + (maxima + f) * row_stride);
    write(column_sum[f], tile.columns, column_out + (maxima + f) * column_stride);
  }
}

// Merges the tiles' statistics of `count` rows into their running state, tile by tile. Field f of tile q is at
// parts + q * tile_stride + f * part_stride; arrays hold whole vectors.
template <class T, class Policy>
static void merge_statistics(const Parallel& parallel, const T* parts, int64_t tiles, int64_t tile_stride,
                             int64_t part_stride, int64_t count, T* state, int64_t state_stride) {
  using V = Vec<T>;
  constexpr int maxima = Policy::kMaxima, sums = Policy::kSums;
  parallel.for_each(ceil_div(count, kChunk), [=](int64_t task) {
    const int64_t end = at_most(count, (task + 1) * kChunk);
    for (int64_t i = task * kChunk; i < end; i += kLanes<T>) {
      V top[maxima], total[sums];
      for (int g = 0; g < maxima; ++g) top[g] = load(state + g * state_stride + i);
      for (int f = 0; f < sums; ++f) total[f] = load(state + (maxima + f) * state_stride + i);
      for (int64_t q = 0; q < tiles; ++q) {
        const T* part = parts + q * tile_stride + i;
        V part_total[sums], shift[maxima], by[maxima], part_shift[maxima], part_by[maxima];
        for (int f = 0; f < sums; ++f) part_total[f] = load(part + (maxima + f) * part_stride);
        for (int g = 0; g < maxima; ++g) {
          const V part_top = load(part + g * part_stride);
          const V best = greater<T>(part_top, top[g]);
          shift[g] = top[g] - best;
          part_shift[g] = part_top - best;
          by[g] = exp_nonpositive(shift[g]);
          part_by[g] = exp_nonpositive(part_shift[g]);
          top[g] = best;
        }
        Policy::rescale(total, shift, by);
        Policy::rescale(part_total, part_shift, part_by);
        for (int f = 0; f < sums; ++f) total[f] += part_total[f];
      }
      for (int g = 0; g < maxima; ++g) store(state + g * state_stride + i, top[g]);
      for (int f = 0; f < sums; ++f) store(state + (maxima + f) * state_stride + i, total[f]);
    }
  });
}

// G of a tile from its cosines, which it may overwrite, and what the factors of the logits need: with one factor for
// all, sum_j G_ij c_ij of every row; with norms, sum_j (dL/dx_ij) c_ij of its rows and sum_i (dL/dy_ij) c_ij of its
// columns. kShared: exponentials are below `reference`, and the coefficients' factors are of such.
template <class T, class Policy, bool kShared>
static void tile_gradient(const Tile<T>& tile, const T* cosine, int64_t ld_cosine, T reference,
                          const T* row_coefficient, int64_t row_stride, const T* column_coefficient,
                          int64_t column_stride, T* out, int64_t ld_out, T* row_sum, T* column_sum) {
  using V = Vec<T>;
  constexpr int coefficients = Policy::kCoefficients;
  alignas(64) T column_total[kTileColumns];
  if constexpr (!Policy::kUniform)
    for (int64_t j = 0; j < kTileColumns; j += kLanes<T>) store(column_total + j, V{});
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* c = cosine + i * ld_cosine;
    T* g = out + i * ld_out;
    const V a = broadcast(tile.row_scale[i]);
    const Mask<T> label = Mask<T>{} + tile.row_label[i];
    V of_row[coefficients];
    for (int f = 0; f < coefficients; ++f) of_row[f] = broadcast(row_coefficient[f * row_stride + i]);
    V row_total{};
    for_columns<T>(tile.columns, [&](int64_t j, Mask<T> inside) __attribute__((always_inline)) {
      const V value = load(c + j);
      const Mask<T> positive = load_labels<T>(tile.column_label + j) == label;
      V of_column[coefficients];
      for (int f = 0; f < coefficients; ++f) of_column[f] = load(column_coefficient + f * column_stride + j);
      const V x = rounded<T>(a * value);
      const auto gradient = [&](V logit, const V* coefficient) __attribute__((always_inline)) {
        const V below = logit - reference_of<T, Policy>(coefficient, positive);
        const V e = kShared ? exp_nonpositive(logit - reference) : exp_nonpositive(below);
        return Policy::gradient(below, e, positive, coefficient);
      };
      if constexpr (Policy::kUniform) {
        const V both = gradient(x, of_row) + gradient(x, of_column);
        store(g + j, both);
        row_total += inside ? both * value : V{};
      } else {
        const V b = load(tile.column_scale + j);
        const V by_row = gradient(x, of_row);
        const V by_column = gradient(rounded<T>(b * value), of_column);
        store(g + j, a * by_row + b * by_column);
        row_total += inside ? by_row * value : V{};
        store(column_total + j, load(column_total + j) + by_column * value);
      }
    });
    row_sum[i] = sum_lanes<T>(row_total);
  }
  if constexpr (!Policy::kUniform)
    __builtin_memcpy(column_sum, column_total, static_cast<size_t>(tile.columns) * sizeof(T));
}

// Rows of one side, everything that the engine keeps about them.
template <class T, class Policy>
struct Side {
  static constexpr int kFields = Policy::kMaxima + Policy::kSums;

  const Features* features;
  Direction direction;
  const int32_t* positives;
  // `rows` rounded up to whole vectors, the stride of state and coefficients.
  int64_t stride;
  T* unit;
  double* inverse_norm;
  T* scale;
  Label<T>* label;
  T* state;
  T* coefficient;
  double* loss;
  // CMPM: sum of (dL/dlogit) c over the row.
  T* norm_gradient;
  T* gradient;

  void start(const SimilarityArgs& args, const Parallel& parallel, const Features& rows, int64_t entries,
             const int32_t* labels, const int32_t* row_positives, T* result) {
    const int64_t n = rows.rows;
    features = &rows;
    positives = row_positives;
    stride = padded(n);
    direction = Direction{n, entries, 0};
    for (int64_t i = 0; i < n; ++i) direction.valid += positives[i] > 0;
    unit = args.memory.take<T>(n * rows.width);
    inverse_norm = args.memory.take<double>(n);
    scale = args.memory.take<T>(stride);
    label = args.memory.take<Label<T>>(stride);
    state = args.memory.take<T>(kFields * stride);
    coefficient = args.memory.take<T>(Policy::kCoefficients * stride);
    loss = args.memory.take<double>(n);
    norm_gradient = Policy::kUniform ? nullptr : args.memory.take<T>(stride);
    gradient = result;
    unit_rows(parallel, rows, 0, n, unit, inverse_norm);
    for (int64_t i = 0; i < stride; ++i) label[i] = i < n ? labels[i] : -1;
    for (int64_t i = 0; i < kFields * stride; ++i) state[i] = i < Policy::kMaxima * stride ? kLowest<T> : T{0};
    for (int64_t i = 0; i < Policy::kCoefficients * stride; ++i) coefficient[i] = T{0};
  }

  // One factor of the logits for all rows, or each row's norm.
  void set_scale(T uniform) {
    for (int64_t i = 0; i < stride; ++i) {
      if constexpr (Policy::kUniform) {
        scale[i] = uniform;
      } else {
        scale[i] = i < direction.rows && inverse_norm[i] != 0 ? static_cast<T>(1.0 / inverse_norm[i]) : T{0};
      }
    }
  }

  double finish(const SimilarityArgs& args, const Parallel& parallel) const {
    parallel.for_each(ceil_div(direction.rows, kChunk), [&](int64_t task) {
      const int64_t end = at_most(direction.rows, (task + 1) * kChunk);
      for (int64_t i = task * kChunk; i < end; ++i) {
        T fields[kFields], out[Policy::kCoefficients];
        for (int f = 0; f < kFields; ++f) fields[f] = state[f * stride + i];
        loss[i] = Policy::finish(args, direction, positives[i], fields, out);
        for (int f = 0; f < Policy::kCoefficients; ++f) coefficient[f * stride + i] = out[f];
      }
    });
    double sum = 0.0;
    for (int64_t i = 0; i < direction.rows; ++i) sum += loss[i];
    return sum;
  }

  void write_statistics(void* statistics) const {
    T* out = static_cast<T*>(statistics);
    const int64_t n = direction.rows;
    for (int f = 0; f < kFields; ++f)
      __builtin_memcpy(out + f * n, state + f * stride, static_cast<size_t>(n) * sizeof(T));
    for (int64_t i = 0; i < n; ++i) out[kFields * n + i] = static_cast<T>(positives[i]);
  }

  void read_coefficients(const void* coefficients) {
    const T* in = static_cast<const T*>(coefficients);
    const int64_t n = direction.rows;
    for (int f = 0; f < Policy::kCoefficients; ++f)
      __builtin_memcpy(coefficient + f * stride, in + f * n, static_cast<size_t>(n) * sizeof(T));
  }

  Range<T> references() const {
    Range<T> range;
    for (int64_t i = 0; i < direction.rows; ++i) range.include(coefficient[i]);
    return range;
  }

  // From exponentials below each row's own reference to exponentials below this one.
  void take_reference(T reference) const {
    for (int64_t i = 0; i < direction.rows; ++i)
      coefficient[stride + i] *=
          static_cast<T>(__builtin_exp(static_cast<double>(reference) - static_cast<double>(coefficient[i])));
  }

  // From the gradient of the unit rows to that of the raw rows, in place.
  void project(const Parallel& parallel, double factor) const {
    const int64_t width = features->width;
    for_rows(parallel, 0, direction.rows, [&](int64_t i) {
      double along_unit = 0;
      if constexpr (!Policy::kUniform) along_unit = static_cast<double>(norm_gradient[i]);
      project_row(gradient + i * width, unit + i * width, width, factor, inverse_norm[i], along_unit);
    });
  }
};

// Tiles of cosines of a block of images and a block of texts, whose operands are packed once a block. Where both are
// bfloat16 and the processor multiplies such pairs, the operands are the features themselves, brought near length 1 by
// powers of two, so that nothing is rounded; the rest of the norms goes into the cosines.
template <class T, class Policy>
class Cosines {
 public:
  Cosines(const SimilarityArgs& args, const Parallel& parallel, const Side<T, Policy>& image,
          const Side<T, Policy>& text, int64_t block_rows, int64_t block_columns)
      : parallel_(parallel),
        width_(args.image.width),
        image_{image.unit, nullptr, nullptr, 0},
        text_{text.unit, nullptr, nullptr, 0},
        in_pairs_(take_pairs(args)) {
    if (in_pairs_) {
      width_ = ceil_div(width_, 2);
      pair_rows(args.memory, image, image_);
      pair_rows(args.memory, text, text_);
    }
    image_strips_ = args.memory.take<T>(packed_rows_size<T>(block_rows, width_));
    text_panels_ = args.memory.take<T>(packed_size<T>(width_, block_columns));
  }

  void pack_images(int64_t begin, int64_t count) {
    image_.begin = begin;
    if constexpr (kMayPair) {
      if (in_pairs_) {
        pack_rows(parallel_, image_.pairs + begin * width_, width_, int64_t{1}, count, width_, paired(image_strips_));
        return;
      }
    }
    pack_rows(parallel_, image_.unit + begin * width_, width_, int64_t{1}, count, width_, image_strips_);
  }

  void pack_texts(int64_t begin, int64_t count) {
    text_.begin = begin;
    if constexpr (kMayPair) {
      if (in_pairs_) {
        pack_panels(parallel_, text_.pairs + begin * width_, int64_t{1}, width_, width_, count, paired(text_panels_));
        return;
      }
    }
    pack_panels(parallel_, text_.unit + begin * width_, int64_t{1}, width_, width_, count, text_panels_);
  }

  // Images [i, i + m) and texts [j, j + n), counted from the blocks; i at a tile's, j at a panel's beginning.
  void tile(int64_t i, int64_t m, int64_t j, int64_t n, T* out) const {
    if constexpr (kMayPair) {
      if (in_pairs_) {
        gemm_tile_packed(paired(image_strips_) + i * width_, m, width_, paired(text_panels_) + j * width_, n, out,
                         kTileColumns);
        const T* of_text = text_.rest + text_.begin + j;
        for (int64_t row = 0; row < m; ++row) {
          const T of_image = image_.rest[image_.begin + i + row];
          T* c = out + row * kTileColumns;
          for (int64_t at = 0; at < n; at += kLanes<T>) store(c + at, load(c + at) * (of_image * load(of_text + at)));
        }
        return;
      }
    }
    gemm_tile_packed(image_strips_ + i * width_, m, width_, text_panels_ + j * width_, n, out, kTileColumns);
  }

 private:
  static constexpr bool kMayPair = sizeof(T) == sizeof(Pair) && LCR2S_VECTOR_BYTES == 64;

  struct Rows {
    const T* unit;
    Pair* pairs;
    // Norms of the paired rows, inverted; to whole vectors.
    T* rest;
    int64_t begin;
  };

  static bool take_pairs(const SimilarityArgs& args) {
    return kMayPair && current_isa() == Isa::avx512_bf16 && args.image.dtype == DType::bfloat16 &&
           args.text.dtype == DType::bfloat16;
  }

  static Pair* paired(T* packed) { return reinterpret_cast<Pair*>(packed); }

  void pair_rows(const Memory& memory, const Side<T, Policy>& side, Rows& rows) const {
    rows.pairs = memory.take<Pair>(side.direction.rows * width_);
    rows.rest = memory.take<T>(side.stride);
    for (int64_t i = side.direction.rows; i < side.stride; ++i) rows.rest[i] = T{0};
    for_rows(parallel_, 0, side.direction.rows, [&](int64_t i) {
      const double scale = binary_scale(side.inverse_norm[i]);
      scale_row_to_pairs(*side.features, i, scale, reinterpret_cast<BFloat16*>(rows.pairs + i * width_));
      rows.rest[i] = static_cast<T>(side.inverse_norm[i] / scale);
    });
  }

  const Parallel& parallel_;
  // Elements of an operand's row.
  int64_t width_;
  Rows image_;
  Rows text_;
  bool in_pairs_;
  T* image_strips_;
  T* text_panels_;
};

template <class T>
struct Uniform {
  // Logits are value * c; dL/dc is factor times what Policy::gradient gives.
  T value;
  double factor;
};

template <class T>
static Uniform<T> uniform_scale(const SimilarityArgs& args) {
  switch (args.kind) {
    case SimilarityLoss::info_nce:
    case SimilarityLoss::sdm: {
      const T scale = *static_cast<const T*>(args.logit_scale);
      return {scale, static_cast<double>(scale)};
    }
    case SimilarityLoss::tal:
      return {static_cast<T>(1.0 / args.tau), 1.0};
    case SimilarityLoss::cmpm:
      break;
  }
  return {T{1}, 1.0};
}

template <class T, class Policy>
static void run(const SimilarityArgs& args, const Parallel& parallel) {
  using S = Side<T, Policy>;
  constexpr int fields = S::kFields;
  const int64_t rows = args.image.rows, columns = args.text.rows, width = args.image.width;
  const bool need_gradient = args.grad_image != nullptr || args.grad_text != nullptr || args.grad_scale != nullptr;
  T* grad_image = static_cast<T*>(args.grad_image);
  T* grad_text = static_cast<T*>(args.grad_text);

  S image, text;
  image.start(args, parallel, args.image, columns, args.image_labels, args.image_positives, grad_image);
  text.start(args, parallel, args.text, rows, args.text_labels, args.text_positives, grad_text);
  const Uniform<T> uniform = uniform_scale<T>(args);
  image.set_scale(uniform.value);
  text.set_scale(uniform.value);

  const int64_t budget = args.workspace_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t ld_kept = padded(columns);
  const bool second_pass_only = args.image_coefficients != nullptr;
  const bool keep = !second_pass_only && need_gradient && rows * ld_kept <= budget;
  // Whole tiles, so that no vector of statistics reaches over the end of a block.
  int64_t block_columns = at_most(ceil_div(columns, kTileColumns) * kTileColumns, kBlockColumns);
  int64_t block_rows = at_most(ceil_div(rows, kTileRows) * kTileRows, kBlockRows);
  while (block_rows > kTileRows && block_rows * block_columns > budget) block_rows -= kTileRows;
  while (block_columns > kTileColumns && block_rows * block_columns > budget) block_columns -= kTileColumns;
  const int64_t row_tiles = ceil_div(block_rows, kTileRows), column_tiles = ceil_div(block_columns, kTileColumns);
  const int64_t row_stride = padded(block_rows), column_stride = padded(block_columns);

  T* row_parts = args.memory.take<T>(column_tiles * fields * row_stride);
  T* column_parts = args.memory.take<T>(row_tiles * fields * column_stride);
  Cosines<T, Policy> cosines(args, parallel, image, text, block_rows, block_columns);
  T* tiles = nullptr;
  if (need_gradient) tiles = args.memory.take<T>(keep ? rows * ld_kept : block_rows * block_columns);

  const auto tile_at = [&](int64_t i, int64_t m, int64_t j, int64_t n) {
    return Tile<T>{m, n, image.scale + i, text.scale + j, image.label + i, text.label + j};
  };
  // Calls body(i, m, j, n, tile row, tile column) for every tile of a block, in parallel; i and j count from the block.
  const auto for_tiles = [&](int64_t m, int64_t n, const auto& body) {
    const int64_t across = ceil_div(n, kTileColumns);
    parallel.for_each(ceil_div(m, kTileRows) * across, [&](int64_t task) {
      const int64_t q = task / across, p = task % across;
      const int64_t i = q * kTileRows, j = p * kTileColumns;
      body(i, at_most(m - i, kTileRows), j, at_most(n - j, kTileColumns), q, p);
    });
  };

  if (!second_pass_only) {
    for (int64_t j0 = 0; j0 < columns; j0 += block_columns) {
      const int64_t n = at_most(columns - j0, block_columns);
      cosines.pack_texts(j0, n);
      for (int64_t i0 = 0; i0 < rows; i0 += block_rows) {
        const int64_t m = at_most(rows - i0, block_rows);
        cosines.pack_images(i0, m);
        for_tiles(m, n, [&](int64_t i, int64_t tm, int64_t j, int64_t tn, int64_t q, int64_t p) {
          alignas(64) T tile[kTileRows * kTileColumns];
          cosines.tile(i, tm, j, tn, tile);
          tile_statistics<T, Policy>(tile_at(i0 + i, tm, j0 + j, tn), tile, row_parts + p * fields * row_stride + i,
                                     row_stride, column_parts + q * fields * column_stride + j, column_stride);
          if (!keep) return;
          for (int64_t r = 0; r < tm; ++r)
            __builtin_memcpy(tiles + (i0 + i + r) * ld_kept + j0 + j, tile + r * kTileColumns,
                             static_cast<size_t>(tn) * sizeof(T));
        });
        merge_statistics<T, Policy>(parallel, row_parts, ceil_div(n, kTileColumns), fields * row_stride, row_stride, m,
                                    image.state + i0, image.stride);
        merge_statistics<T, Policy>(parallel, column_parts, ceil_div(m, kTileRows), fields * column_stride,
                                    column_stride, n, text.state + j0, text.stride);
      }
    }
  }
  if (args.image_statistics != nullptr) {
    image.write_statistics(args.image_statistics);
    text.write_statistics(args.text_statistics);
    return;
  }
  if (second_pass_only) {
    image.read_coefficients(args.image_coefficients);
    text.read_coefficients(args.text_coefficients);
  } else {
    // In this order: the sum is the same bits whoever asks for gradients.
    const double of_rows = image.finish(args, parallel);
    *static_cast<T*>(args.loss) = static_cast<T>(of_rows + text.finish(args, parallel));
  }
  if (!need_gradient) return;

  const Range<T> of_image = image.references(), of_text = text.references();
  const T least = at_most(of_image.least, of_text.least);
  const T reference = at_least(of_image.greatest, of_text.greatest);
  const bool shared = kCanShare<T, Policy> && reference - least <= kSharedRange<T>;
  if (shared) {
    image.take_reference(reference);
    text.take_reference(reference);
  }
  const auto compute_gradient =
      shared ? &tile_gradient<T, Policy, kCanShare<T, Policy>> : &tile_gradient<T, Policy, false>;

  T* text_rows = grad_image == nullptr ? nullptr : args.memory.take<T>(packed_size<T>(block_columns, width));
  T* image_rows = grad_text == nullptr ? nullptr : args.memory.take<T>(packed_size<T>(block_rows, width));
  if constexpr (!Policy::kUniform) {
    for (int64_t i = 0; i < image.stride; ++i) image.norm_gradient[i] = T{0};
    for (int64_t j = 0; j < text.stride; ++j) text.norm_gradient[j] = T{0};
  }
  double of_scale = 0.0;
  const bool one_block = columns <= block_columns && rows <= block_rows;
  for (int64_t j0 = 0; j0 < columns; j0 += block_columns) {
    const int64_t n = at_most(columns - j0, block_columns);
    const T* unit_text = text.unit + j0 * width;
    if (!keep && (second_pass_only || !one_block)) cosines.pack_texts(j0, n);
    if (text_rows != nullptr) pack_panels(parallel, unit_text, width, int64_t{1}, n, width, text_rows);
    for (int64_t i0 = 0; i0 < rows; i0 += block_rows) {
      const int64_t m = at_most(rows - i0, block_rows);
      if (!keep && (second_pass_only || !one_block)) cosines.pack_images(i0, m);
      const int64_t ld = keep ? ld_kept : block_columns;
      T* block = keep ? tiles + i0 * ld_kept + j0 : tiles;
      for_tiles(m, n, [&](int64_t i, int64_t tm, int64_t j, int64_t tn, int64_t q, int64_t p) {
        T* out = block + i * ld + j;
        const T* source = out;
        alignas(64) T tile[kTileRows * kTileColumns];
        if (!keep) {
          cosines.tile(i, tm, j, tn, tile);
          source = tile;
        }
        compute_gradient(tile_at(i0 + i, tm, j0 + j, tn), source, keep ? ld : kTileColumns, reference,
                         image.coefficient + i0 + i, image.stride, text.coefficient + j0 + j, text.stride, out, ld,
                         row_parts + p * row_stride + i, column_parts + q * column_stride + j);
      });
      for (int64_t p = 0; p < ceil_div(n, kTileColumns); ++p)
        for (int64_t i = 0; i < m; ++i) {
          if constexpr (Policy::kUniform) {
            of_scale += static_cast<double>(row_parts[p * row_stride + i]);
          } else {
            image.norm_gradient[i0 + i] += row_parts[p * row_stride + i];
          }
        }
      if constexpr (!Policy::kUniform) {
        for (int64_t q = 0; q < ceil_div(m, kTileRows); ++q)
          for (int64_t j = 0; j < n; ++j) text.norm_gradient[j0 + j] += column_parts[q * column_stride + j];
      }
      if (grad_image != nullptr)
        gemm(parallel, block, ld, int64_t{1}, m, n, text_rows, width, grad_image + i0 * width, width, j0 > 0);
      if (grad_text != nullptr) {
        pack_panels(parallel, image.unit + i0 * width, width, int64_t{1}, m, width, image_rows);
        gemm(parallel, block, int64_t{1}, ld, n, m, image_rows, width, grad_text + j0 * width, width, i0 > 0);
      }
    }
  }
  if (grad_image != nullptr) image.project(parallel, uniform.factor);
  if (grad_text != nullptr) text.project(parallel, uniform.factor);
  if (args.grad_scale != nullptr) *static_cast<T*>(args.grad_scale) = static_cast<T>(of_scale);
}

template <class T>
static void run_kind(const SimilarityArgs& args, const Parallel& parallel) {
  switch (args.kind) {
    case SimilarityLoss::info_nce:
      return run<T, InfoNce<T>>(args, parallel);
    case SimilarityLoss::sdm:
      return run<T, Matching<T, false>>(args, parallel);
    case SimilarityLoss::cmpm:
      return run<T, Matching<T, true>>(args, parallel);
    case SimilarityLoss::tal:
      return run<T, Tal<T>>(args, parallel);
  }
}

}  // namespace

void similarity(const SimilarityArgs& args, const Parallel& parallel) {
  if (args.wide) {
    run_kind<double>(args, parallel);
  } else {
    run_kind<float>(args, parallel);
  }
}

}  // namespace lcr2s::cpu::LCR2S_ISA
