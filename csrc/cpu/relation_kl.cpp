#include "relation_blocks.h"

namespace lcr2s::cpu::LCR2S_ISA {

namespace {

// Two passes over tiles of both cosine matrices. The first leaves log-sum-exp of every row and column, student and
// teacher. The second knows u = (z - lse z) - (x - lse x) of every entry (x student, z teacher), so that p_S = p_T e^-u
// and
//   KL = sum p_T (u + e^-u - 1),  dKL/dx = p_T (e^-u - 1):
// no term cancels where the student is near the teacher, and because E_T[1 - e^-u] = 0 an error of the log-sum-exps
// enters the loss squared.

template <class T>
struct Limits;
// |cosine| <= 1, so logits lie within [-scale, scale]: up to this scale their exponentials are normal numbers and sums
// of 10^5 of them are finite, and no shift is needed. (A shift by `scale` would round every logit at the size of
// `scale`.)
template <>
struct Limits<float> {
  static constexpr float scale = 75;
  static constexpr int terms = 8;
};
template <>
struct Limits<double> {
  static constexpr double scale = 300;
  static constexpr int terms = 16;
};

// Sums of e^(x - shift), one for each row or each column.
template <class T>
struct Sums {
  T* shift;
  T* sum;
};

// A running sum of exponentials in double; e^(other shift) terms are rescaled to the larger shift.
struct RunningSum {
  double shift = -__builtin_inf();
  double sum = 0;

  void add(double other_shift, double other_sum) {
    if (other_shift == shift) {
      sum += other_sum;
    } else if (other_shift > shift) {
      sum = sum * __builtin_exp(shift - other_shift) + other_sum;
      shift = other_shift;
    } else {
      // Also where other_shift is NaN or -infinity because all its entries are NaN: the sum says so.
      sum += other_sum == other_sum ? other_sum * __builtin_exp(other_shift - shift) : other_sum;
    }
  }
};

// What the second pass knows of rows or columns, readable to whole vectors.
template <class T>
struct Axis {
  int64_t count;
  double weight;
  RunningSum* sums[2];  // student, teacher
  T* student_shift;
  T* student_inverse;  // weight / sum
  T* teacher_shift;
  T* teacher_inverse;
  T* delta;  // lse z - lse x

  Axis(const Memory& memory, int64_t rows, double weight_of_each)
      : count(rows),
        weight(weight_of_each),
        sums{memory.take<RunningSum>(rows), memory.take<RunningSum>(rows)},
        student_shift(take(memory)),
        student_inverse(take(memory)),
        teacher_shift(take(memory)),
        teacher_inverse(take(memory)),
        delta(take(memory)) {
    for (int64_t at = 0; at < count; ++at) sums[0][at] = sums[1][at] = RunningSum{};
  }

  void finish(const Parallel& parallel) const {
    for_rows(parallel, 0, count, [&](int64_t at) {
      const RunningSum& student = sums[0][at];
      const RunningSum& teacher = sums[1][at];
      student_shift[at] = static_cast<T>(student.shift);
      student_inverse[at] = static_cast<T>(weight / student.sum);
      teacher_shift[at] = static_cast<T>(teacher.shift);
      teacher_inverse[at] = static_cast<T>(weight / teacher.sum);
      delta[at] =
          static_cast<T>((teacher.shift - student.shift) + (__builtin_log(teacher.sum) - __builtin_log(student.sum)));
    });
  }

  // As other processes merge and return them: shift and sum, student's then teacher's.
  void write_statistics(void* statistics) const {
    T* out = static_cast<T*>(statistics);
    for (int model = 0; model < 2; ++model, out += 2 * count)
      for (int64_t at = 0; at < count; ++at) {
        out[at] = static_cast<T>(sums[model][at].shift);
        out[count + at] = static_cast<T>(sums[model][at].sum);
      }
  }
  void read_statistics(const void* statistics) const {
    const T* in = static_cast<const T*>(statistics);
    for (int model = 0; model < 2; ++model, in += 2 * count)
      for (int64_t at = 0; at < count; ++at) sums[model][at] = RunningSum{in[at], in[count + at]};
  }

 private:
  T* take(const Memory& memory) const {
    T* values = memory.take<T>(count + kLanes<T>);
    for (int64_t at = count; at < count + kLanes<T>; ++at) values[at] = T{0};
    return values;
  }
};

template <class T>
LCR2S_INLINE Vec<T> vector_max(Vec<T> a, Vec<T> b) {
  return b > a ? b : a;
}

template <class T>
LCR2S_INLINE T max_lanes(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x for |x| <= Limits<T>::scale, where none of the cases at the ends arises.
LCR2S_INLINE Vec<float> bounded_exp(Vec<float> x) {
  Vec<float> shifted;
  const Vec<float> p = exp_reduced(x, shifted);
  return p * (Vec<float>)(((Mask<float>)shifted + 127) << 23);
}
LCR2S_INLINE Vec<double> bounded_exp(Vec<double> x) { return exp(x); }

// Shifts and sums of a tile: row i at rows.*[i], column j at columns.*[j].
template <class T, bool kShifted>
static void tile_sums(const T* tile, int64_t m, int64_t n, T scale, Sums<T> rows, Sums<T> columns) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T column_sums[kTileColumns<T>];
  alignas(64) T column_shifts[kTileColumns<T>];
  const Vec<T> lowest = broadcast<T>(-static_cast<T>(__builtin_inf()));
  for (int64_t j = 0; j < n; j += lanes) {
    store(column_sums + j, Vec<T>{});
    store(column_shifts + j, kShifted ? lowest : Vec<T>{});
  }
  // Lanes beyond the last column are -infinity, whose exponential is 0.
  const auto logits = [&](const T* row, int64_t j, auto tail) __attribute__((always_inline)) {
    const Vec<T> x = scale * load(row + j);
    if constexpr (tail.value) return first_lanes<T>(n - j) ? x : lowest;
    return x;
  };
  if constexpr (kShifted)
    for (int64_t i = 0; i < m; ++i) {
      const T* row = tile + i * kTileColumns<T>;
      Vec<T> best = lowest;
      for_vectors<T>(n, [&](int64_t j, auto tail) __attribute__((always_inline)) {
        const Vec<T> x = logits(row, j, tail);
        best = vector_max<T>(best, x);
        store(column_shifts + j, vector_max<T>(load(column_shifts + j), x));
      });
      rows.shift[i] = max_lanes<T>(best);
    }
  for (int64_t i = 0; i < m; ++i) {
    const T* row = tile + i * kTileColumns<T>;
    if constexpr (!kShifted) rows.shift[i] = 0;
    const T shift = rows.shift[i];
    Vec<T> sum{};
    for_vectors<T>(n, [&](int64_t j, auto tail) __attribute__((always_inline)) {
      Vec<T> of_row;
      Vec<T> x;
      if constexpr (kShifted) {
        x = logits(row, j, tail);
        of_row = exp_nonpositive(x - shift);
      } else {
        of_row = bounded_exp(scale * load(row + j));
        if constexpr (tail.value) of_row = first_lanes<T>(n - j) ? of_row : Vec<T>{};
      }
      sum += of_row;
      const Vec<T> of_column = kShifted ? exp_nonpositive(x - load(column_shifts + j)) : of_row;
      store(column_sums + j, load(column_sums + j) + of_column);
    });
    rows.sum[i] = sum_lanes<T>(sum);
  }
  __builtin_memcpy(columns.sum, column_sums, static_cast<size_t>(n) * sizeof(T));
  __builtin_memcpy(columns.shift, column_shifts, static_cast<size_t>(n) * sizeof(T));
}

// (-1)^k / k!
constexpr double alternating_inverse_factorial(int k) {
  double product = 1;
  for (int factor = 2; factor <= k; ++factor) product *= factor;
  return (k % 2 == 0 ? 1 : -1) / product;
}

// slope = p_T (e^-u - 1) and term = p_T (u + e^-u - 1).
template <class T>
LCR2S_INLINE void divergence(Vec<T> teacher, Vec<T> student, Vec<T> u, Vec<T>& slope, Vec<T>& term) {
  // (e^-u - 1 + u) / u^2 by its series where |u| < 1/2, from the probabilities elsewhere.
  constexpr int last = Limits<T>::terms + 1;
  Vec<T> series = broadcast<T>(static_cast<T>(alternating_inverse_factorial(last)));
#pragma GCC unroll 16
  for (int k = last - 1; k >= 2; --k) series = series * u + static_cast<T>(alternating_inverse_factorial(k));
  const Vec<T> curved = series * u * u;
  const Vec<T> far = student - teacher;
  const Mask<T> near = (u < static_cast<T>(0.5)) & (u > static_cast<T>(-0.5));
  slope = near ? teacher * (curved - u) : far;
  term = near ? teacher * curved : teacher * u + far;
}

struct TileLoss {
  double loss;
  double scale;
};

// Loss terms of a tile and, unless `gradient` is null, dL/dx, which may take the place of either tile.
template <class T, bool kShifted>
static TileLoss tile_loss(const TileAt& at, const T* student, T student_scale, const T* teacher, T teacher_scale,
                          const Axis<T>& rows, const Axis<T>& columns, T* gradient) {
  TileLoss total{0, 0};
  for (int64_t i = 0; i < at.m; ++i) {
    const int64_t row = at.i + i;
    const T row_student_shift = rows.student_shift[row];
    const T row_teacher_shift = rows.teacher_shift[row];
    const T row_student_inverse = rows.student_inverse[row];
    const T row_teacher_inverse = rows.teacher_inverse[row];
    const T row_delta = rows.delta[row];
    Vec<T> loss{};
    Vec<T> scale{};
    for_vectors<T>(at.n, [&](int64_t j, auto tail) __attribute__((always_inline)) {
      const int64_t place = i * kTileColumns<T> + j;
      const int64_t column = at.j + j;
      const Vec<T> student_cosine = load(student + place);
      const Vec<T> teacher_cosine = load(teacher + place);
      const Vec<T> x = student_scale * student_cosine;
      const Vec<T> z = teacher_scale * teacher_cosine;
      // z - x, exact where scales agree and cosines are close.
      const Vec<T> apart =
          teacher_scale * (teacher_cosine - student_cosine) + (teacher_scale - student_scale) * student_cosine;
      const Vec<T> student_exp = kShifted ? exp_nonpositive(x - row_student_shift) : bounded_exp(x);
      const Vec<T> teacher_exp = kShifted ? exp_nonpositive(z - row_teacher_shift) : bounded_exp(z);
      Vec<T> row_slope, row_term, column_slope, column_term;
      divergence<T>(teacher_exp * row_teacher_inverse, student_exp * row_student_inverse, apart - row_delta, row_slope,
                    row_term);
      const Vec<T> column_student = kShifted ? exp_nonpositive(x - load(columns.student_shift + column)) : student_exp;
      const Vec<T> column_teacher = kShifted ? exp_nonpositive(z - load(columns.teacher_shift + column)) : teacher_exp;
      divergence<T>(column_teacher * load(columns.teacher_inverse + column),
                    column_student * load(columns.student_inverse + column), apart - load(columns.delta + column),
                    column_slope, column_term);
      const Vec<T> slope = row_slope + column_slope;
      const Vec<T> term = row_term + column_term;
      const Vec<T> of_scale = slope * student_cosine;
      if constexpr (tail.value) {
        const Mask<T> inside = first_lanes<T>(at.n - j);
        loss += inside ? term : Vec<T>{};
        scale += inside ? of_scale : Vec<T>{};
      } else {
        loss += term;
        scale += of_scale;
      }
      if (gradient != nullptr) store(gradient + place, slope);
    });
    total.loss += static_cast<double>(sum_lanes<T>(loss));
    total.scale += static_cast<double>(sum_lanes<T>(scale));
  }
  return total;
}

// One model: its cosines are computed tile by tile, those of the first `kept` rows are stored.
template <class T>
struct Model {
  const UnitRows& image;
  Product<T, UnitRows> product;
  T scale;
  Tiles<T> store{};
  int64_t kept = 0;

  Model(const UnitRows& image_rows, const UnitRows& text_rows, const void* scale_value, const BlockShape& shape,
        const Memory& memory)
      : image(image_rows), product(image_rows, text_rows, shape, memory), scale(*static_cast<const T*>(scale_value)) {}

  // Whole blocks of rows, within `bytes` of cosines; returns what is left.
  int64_t keep(int64_t bytes, const BlockShape& shape, int64_t columns, const Memory& memory) {
    const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = bytes / row_bytes;
    kept = fitting >= image.count() ? image.count() : fitting / shape.rows * shape.rows;
    if (kept > 0) store = take_tiles<T>(memory, kept, columns);
    return bytes - kept * row_bytes;
  }

  Tiles<T> stored(int64_t i0, int64_t j0) const {
    return {store.at(i0 / kTileRows, j0 / kTileColumns<T>), store.stride};
  }

  // `first` on the pass that fills the store.
  void pack(const Parallel& parallel, const Block& block, bool first) {
    if (first || block.i0 >= kept) product.pack(parallel, block);
  }

  T* tile(const TileAt& at, T* scratch, bool first) const {
    T* out = at.i < kept ? stored(at.i, at.j).first : scratch;
    if (first || at.i >= kept) product.tile(at, out);
    return out;
  }
};

template <class T>
static void kullback_leibler(const RelationKlArgs& args, const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Memory& memory = relation.memory;
  const int64_t count = relation.student_image.rows;
  const int64_t columns = relation.student_text.rows;
  const UnitRows image(relation.student_image, memory, parallel);
  const UnitRows text(relation.student_text, memory, parallel);
  const UnitRows teacher_image(relation.teacher_image, memory, parallel);
  const UnitRows teacher_text(relation.teacher_text, memory, parallel);
  const BlockShape shape = BlockShape::within<T>(count, columns, relation.workspace_bytes);
  Model<T> student(image, text, args.student_scale, shape, memory);
  Model<T> teacher(teacher_image, teacher_text, args.teacher_scale, shape, memory);
  Gradients<T> gradients(relation, image, text, shape);

  // Cosines are kept from the first pass for the second, the costlier model's first, where that spares much: memory is
  // worth more than a few per cent of the time.
  Model<T>& dear = teacher_image.width() >= image.width() ? teacher : student;
  Model<T>& cheap = teacher_image.width() >= image.width() ? student : teacher;
  const bool first_pass = args.whole_row_statistics == nullptr;
  const bool second_pass = args.row_statistics == nullptr;
  if (first_pass && second_pass && 3 * relation.workspace_bytes >= count * columns * static_cast<int64_t>(sizeof(T)))
    cheap.keep(dear.keep(relation.workspace_bytes, shape, columns, memory), shape, columns, memory);

  const auto needs_no_shift = [](T scale) { return scale <= Limits<T>::scale && scale >= -Limits<T>::scale; };
  const bool shifted = !(needs_no_shift(student.scale) && needs_no_shift(teacher.scale));

  // Sums of a block's tiles: rows by column of tiles, columns by row of tiles; index 0 student, 1 teacher.
  const int64_t row_tiles = shape.rows / kTileRows;
  const int64_t column_tiles = shape.columns / kTileColumns<T>;
  Sums<T> row_parts[2];
  Sums<T> column_parts[2];
  for (int model = 0; model < 2; ++model) {
    row_parts[model] = {memory.take<T>(column_tiles * shape.rows), memory.take<T>(column_tiles * shape.rows)};
    column_parts[model] = {memory.take<T>(row_tiles * shape.columns), memory.take<T>(row_tiles * shape.columns)};
  }
  const Axis<T> row_axis(memory, count, args.row_weight);
  const Axis<T> column_axis(memory, columns, args.column_weight);
  const auto merge = [&](const Axis<T>& axis, int64_t begin, int64_t rows, const Sums<T>* parts, int64_t tiles,
                         int64_t stride) {
    for_rows(parallel, 0, rows, [&](int64_t row) {
      for (int model = 0; model < 2; ++model)
        for (int64_t part = row; part < row + tiles * stride; part += stride)
          axis.sums[model][begin + row].add(static_cast<double>(parts[model].shift[part]),
                                            static_cast<double>(parts[model].sum[part]));
    });
  };

  if (first_pass) {
    shape.for_each(count, columns, [&](const Block& block) {
      student.pack(parallel, block, true);
      teacher.pack(parallel, block, true);
      for_tiles<T>(parallel, block, [&](const TileAt& at, int64_t) {
        alignas(64) T scratch[kTileSize<T>];
        const auto sums = shifted ? &tile_sums<T, true> : &tile_sums<T, false>;
        const int64_t row = at.column * shape.rows + at.i - block.i0;
        const int64_t column = at.row * shape.columns + at.j - block.j0;
        for (int index = 0; index < 2; ++index) {
          const Model<T>& model = index == 0 ? student : teacher;
          sums(model.tile(at, scratch, true), at.m, at.n, model.scale,
               {row_parts[index].shift + row, row_parts[index].sum + row},
               {column_parts[index].shift + column, column_parts[index].sum + column});
        }
      });
      merge(row_axis, block.i0, block.m, row_parts, ceil_div(block.n, kTileColumns<T>), shape.rows);
      merge(column_axis, block.j0, block.n, column_parts, ceil_div(block.m, kTileRows), shape.columns);
    });
  } else {
    row_axis.read_statistics(args.whole_row_statistics);
    column_axis.read_statistics(args.whole_column_statistics);
  }
  if (!second_pass) {
    row_axis.write_statistics(args.row_statistics);
    column_axis.write_statistics(args.column_statistics);
    return;
  }
  row_axis.finish(parallel);
  column_axis.finish(parallel);

  // dL/dcosine takes the place of the cosines that it comes from; blocks without, that of the first block beside them,
  // which is used by then.
  Tiles<T> spare{};
  if (gradients.wanted() && dear.kept == 0) spare = take_tiles<T>(memory, shape.rows, shape.columns);
  TileLoss* losses = memory.take<TileLoss>(row_tiles * column_tiles);
  TileLoss total{0, 0};
  shape.for_each(count, columns, [&](const Block& block) {
    student.pack(parallel, block, false);
    teacher.pack(parallel, block, false);
    Tiles<T> g = spare;
    if (gradients.wanted() && dear.kept > 0) g = dear.stored(block.i0 < dear.kept ? block.i0 : 0, block.j0);
    for_tiles<T>(parallel, block, [&](const TileAt& at, int64_t task) {
      alignas(64) T student_scratch[kTileSize<T>];
      alignas(64) T teacher_scratch[kTileSize<T>];
      const T* x = student.tile(at, student_scratch, false);
      const T* z = teacher.tile(at, teacher_scratch, false);
      const auto compute = shifted ? &tile_loss<T, true> : &tile_loss<T, false>;
      losses[task] = compute(at, x, student.scale, z, teacher.scale, row_axis, column_axis,
                             gradients.wanted() ? g.at(at.row, at.column) : nullptr);
    });
    const int64_t tiles = ceil_div(block.m, kTileRows) * ceil_div(block.n, kTileColumns<T>);
    for (int64_t task = 0; task < tiles; ++task) {
      total.loss += losses[task].loss;
      total.scale += losses[task].scale;
    }
    gradients.add(parallel, g, block);
  });
  gradients.finish(parallel, static_cast<double>(student.scale));
  *static_cast<T*>(relation.loss) = static_cast<T>(total.loss);
  if (args.grad_scale != nullptr) *static_cast<T*>(args.grad_scale) = static_cast<T>(total.scale);
}

}  // namespace

void relation_kl(const RelationKlArgs& args, const Parallel& parallel) {
  if (args.relation.wide) {
    kullback_leibler<double>(args, parallel);
  } else {
    kullback_leibler<float>(args, parallel);
  }
}

}  // namespace lcr2s::cpu::LCR2S_ISA
