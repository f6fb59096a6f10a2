#include "relation.h"

#include "gemm.h"
#include "unit_rows.h"

namespace lcr2s::cpu::LCR2S_ISA {

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Columns of the tile that one task works on: with kMc rows it stays in the second-level cache.
template <class T>
constexpr int64_t kTileColumns = 1024 / static_cast<int64_t>(sizeof(T));
static_assert(kTileColumns<float> / 2 % kNr<float> == 0 && kTileColumns<double> / 2 % kNr<double> == 0);

template <class T>
static T* take_packed(const Memory& memory, int64_t k, int64_t n) {
  return memory.take<T>(packed_size<T>(k, n));
}

// Rows of a slab of a rows x columns matrix within `bytes`: whole tiles, at least one, and no more than the product
// with the slab gains from.
template <class T>
static int64_t slab_rows(int64_t rows, int64_t columns, int64_t bytes) {
  const int64_t fitting = bytes / (columns * static_cast<int64_t>(sizeof(T))) / kMc * kMc;
  const int64_t limited = smaller(larger(fitting, kMc), 16 * kMc);
  return smaller(limited, rows);
}

// Gradients with respect to the unit rows, for dL/dcosine given as slabs of rows.
template <class T>
struct SlabGradients {
  int64_t columns;  // rows of text
  int64_t width;    // of the student
  T* grad_image;    // null where not wanted, like grad_text
  T* grad_text;
  const T* packed_text;  // unit text rows as the right operand, columns x width
  T* packed_image;       // room for a slab's unit image rows as the right operand

  // grad_image[begin ..] = G text; grad_text += G' image. `image` holds the slab's unit rows.
  void add(const Parallel& parallel, const T* g, int64_t begin, int64_t rows, const T* image) const {
    if (grad_image != nullptr)
      gemm<T>(parallel, g, columns, 1, rows, columns, packed_text, width, grad_image + begin * width, width, false);
    if (grad_text != nullptr) {
      pack_panels<T>(parallel, image, width, 1, rows, width, packed_image);
      gemm<T>(parallel, g, 1, columns, columns, rows, packed_image, width, grad_text, width, begin > 0);
    }
  }
};

template <class T>
static SlabGradients<T> slab_gradients(const RelationArgs& args, const Parallel& parallel, const T* text,
                                       int64_t text_stride, int64_t rows_of_slab) {
  const int64_t columns = args.student_text.rows;
  const int64_t width = args.student_text.width;
  SlabGradients<T> gradients{columns, width,  static_cast<T*>(args.grad_image), static_cast<T*>(args.grad_text),
                             nullptr, nullptr};
  if (gradients.grad_image != nullptr) {
    T* packed = take_packed<T>(args.memory, columns, width);
    pack_panels<T>(parallel, text, text_stride, 1, columns, width, packed);
    gradients.packed_text = packed;
  }
  if (gradients.grad_text != nullptr) gradients.packed_image = take_packed<T>(args.memory, rows_of_slab, width);
  return gradients;
}

// ---- Frobenius

// The difference of the relations as one product: R_student - R_teacher = U R' with rows
//   U = [V - E, E], R = [T, T - F]   where the widths agree: terms that cancel never appear,
//   U = [V, E],     R = [T, -F]      where they differ,
// V, T the student's unit rows and E, F the teacher's.
enum class Part { image, text };

struct Side {
  Features student;
  Features teacher;
  Part part;
  double* student_inverse;
  double* teacher_inverse;

  Side(const Features& student_rows, const Features& teacher_rows, Part which, const Memory& memory,
       const Parallel& parallel)
      : student(student_rows),
        teacher(teacher_rows),
        part(which),
        student_inverse(memory.take<double>(student.rows)),
        teacher_inverse(memory.take<double>(student.rows)) {
    for_rows(parallel, 0, student.rows, [&](int64_t row) {
      student_inverse[row] = inverse_norm(student, row);
      teacher_inverse[row] = inverse_norm(teacher, row);
    });
  }

  bool difference() const { return student.width == teacher.width; }
  int64_t width() const { return student.width + teacher.width; }

  // A row of U or R and, unless null, the student's unit row.
  template <class T>
  void row(int64_t index, T* out, T* unit) const {
    const double of_student = student_inverse[index];
    const double of_teacher = teacher_inverse[index];
    T* second = out + student.width;
    if (part == Part::image) {
      if (difference()) {
        scale_difference(student, teacher, index, of_student, of_teacher, out);
      } else {
        scale_row(student, index, of_student, out);
      }
      scale_row(teacher, index, of_teacher, second);
    } else {
      scale_row(student, index, of_student, out);
      if (difference()) {
        scale_difference(student, teacher, index, of_student, of_teacher, second);
      } else {
        scale_row(teacher, index, -of_teacher, second);
      }
    }
    if (unit != nullptr) scale_row(student, index, of_student, unit);
  }
};

// Rows that the Gram matrices take at a time.
constexpr int64_t kGramRows = 1024;

// gram = A' A over all rows of a side. Tiles on and above the diagonal are computed, the rest is mirrored.
template <class T>
static void gram_matrix(const Side& side, const Parallel& parallel, T* rows, T* packed, T* gram) {
  const int64_t width = side.width();
  // Narrow tiles: less of them lies below the diagonal in vain.
  constexpr int64_t columns = kTileColumns<T> / 2;
  const int64_t col_blocks = ceil_div(width, columns);
  const int64_t row_blocks = ceil_div(width, kMc);
  int64_t tiles = 0;
  for (int64_t block = 0; block < row_blocks; ++block) tiles += col_blocks - block * kMc / columns;
  for (int64_t begin = 0; begin < side.student.rows; begin += kGramRows) {
    const int64_t count = smaller(kGramRows, side.student.rows - begin);
    for_rows(parallel, begin, begin + count,
             [&](int64_t row) { side.row<T>(row, rows + (row - begin) * width, nullptr); });
    pack_panels<T>(parallel, rows, width, 1, count, width, packed);
    parallel.for_each(tiles, [&](int64_t task) {
      int64_t block = 0;
      int64_t first = 0;
      for (; task >= col_blocks - first; first = ++block * kMc / columns) task -= col_blocks - first;
      const int64_t i0 = block * kMc;
      const int64_t j0 = (first + task) * columns;
      gemm_tile<T>(rows + i0, 1, width, smaller(kMc, width - i0), count, packed + j0 * count,
                   smaller(columns, width - j0), gram + i0 * width + j0, width, begin > 0);
    });
  }
  for_rows(parallel, 0, width, [&](int64_t i) {
    for (int64_t j = 0; j < i; ++j) gram[i * width + j] = gram[j * width + i];
  });
}

// Gradient of one side: factor * rows (other side's Gram matrix, columns of its student part), through the
// normalisation.
template <class T>
static void gram_gradient(const Side& side, const Parallel& parallel, double factor, const T* packed, T* rows, T* unit,
                          T* grad) {
  const int64_t width = side.width();
  const int64_t out = side.student.width;
  for (int64_t begin = 0; begin < side.student.rows; begin += kGramRows) {
    const int64_t end = smaller(begin + kGramRows, side.student.rows);
    for_rows(parallel, begin, end, [&](int64_t row) {
      const int64_t at = row - begin;
      side.row<T>(row, rows + at * width, unit + at * out);
    });
    gemm<T>(parallel, rows, width, 1, end - begin, width, packed, out, grad + begin * out, out, false);
    for_rows(parallel, begin, end, [&](int64_t row) {
      const int64_t at = row - begin;
      project_row(grad + row * out, unit + at * out, out, factor, side.student_inverse[row]);
    });
  }
}

// |U R'|^2 = <U'U, R'R>; dV = 2 U (R'R)[:, student], dT = 2 R (U'V) with V = U[:, student] (+ U[:, teacher] where U
// holds the difference).
template <class T>
static void frobenius_gram(const RelationFrobeniusArgs& args, const Side& image, const Side& text,
                           const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Memory& memory = relation.memory;
  const int64_t width = image.width();
  const int64_t out = image.student.width;
  const int64_t chunk = smaller(kGramRows, larger(image.student.rows, text.student.rows));
  T* rows = memory.take<T>(chunk * width);
  T* packed = take_packed<T>(memory, chunk, width);
  T* image_gram = memory.take<T>(width * width);
  T* text_gram = memory.take<T>(width * width);
  gram_matrix<T>(image, parallel, rows, packed, image_gram);
  gram_matrix<T>(text, parallel, rows, packed, text_gram);

  double* row_sums = memory.take<double>(width);
  for_rows(parallel, 0, width, [&](int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < width; ++j)
      sum += static_cast<double>(image_gram[i * width + j]) * static_cast<double>(text_gram[i * width + j]);
    row_sums[i] = sum;
  });
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += row_sums[i];
  *static_cast<T*>(relation.loss) = static_cast<T>(args.factor * sum);

  if (relation.grad_image == nullptr && relation.grad_text == nullptr) return;
  T* coefficients = take_packed<T>(memory, width, out);
  T* unit = memory.take<T>(chunk * out);
  if (relation.grad_image != nullptr) {
    pack_panels<T>(parallel, text_gram, width, 1, width, out, coefficients);
    gram_gradient<T>(image, parallel, 2 * args.factor, coefficients, rows, unit, static_cast<T*>(relation.grad_image));
  }
  if (relation.grad_text != nullptr) {
    if (image.difference())
      for_rows(parallel, 0, width, [&](int64_t i) {
        for (int64_t j = 0; j < out; ++j) image_gram[i * width + j] += image_gram[i * width + out + j];
      });
    pack_panels<T>(parallel, image_gram, width, 1, width, out, coefficients);
    gram_gradient<T>(text, parallel, 2 * args.factor, coefficients, rows, unit, static_cast<T*>(relation.grad_text));
  }
}

// The relations themselves, a slab of rows at a time: cheaper than Gram matrices where rows are few.
template <class T>
static void frobenius_direct(const RelationFrobeniusArgs& args, const Side& image, const Side& text,
                             const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Memory& memory = relation.memory;
  const int64_t width = image.width();
  const int64_t out = image.student.width;
  const int64_t count = image.student.rows;
  const int64_t columns = text.student.rows;

  T* text_rows = memory.take<T>(columns * width);
  for_rows(parallel, 0, columns, [&](int64_t row) { text.row<T>(row, text_rows + row * width, nullptr); });
  T* packed = take_packed<T>(memory, width, columns);
  pack_panels<T>(parallel, text_rows, 1, width, width, columns, packed);

  const int64_t slab = slab_rows<T>(count, columns, relation.workspace_bytes);
  T* difference = memory.take<T>(slab * columns);
  T* image_rows = memory.take<T>(slab * width);
  T* image_unit = memory.take<T>(slab * out);
  const SlabGradients<T> gradients = slab_gradients<T>(relation, parallel, text_rows, width, slab);
  const int64_t col_blocks = ceil_div(columns, kTileColumns<T>);
  double* sums = memory.take<double>(ceil_div(slab, kMc) * col_blocks);

  double total = 0;
  for (int64_t begin = 0; begin < count; begin += slab) {
    const int64_t rows = smaller(slab, count - begin);
    for_rows(parallel, 0, rows,
             [&](int64_t row) { image.row<T>(begin + row, image_rows + row * width, image_unit + row * out); });
    const int64_t tasks = ceil_div(rows, kMc) * col_blocks;
    parallel.for_each(tasks, [&](int64_t task) {
      const int64_t i0 = task / col_blocks * kMc;
      const int64_t j0 = task % col_blocks * kTileColumns<T>;
      const int64_t m = smaller(kMc, rows - i0);
      const int64_t n = smaller(kTileColumns<T>, columns - j0);
      T* tile = difference + i0 * columns + j0;
      gemm_tile<T>(image_rows + i0 * width, width, 1, m, width, packed + j0 * width, n, tile, columns, false);
      double sum = 0;
      for (int64_t i = 0; i < m; ++i) {
        const T* row = tile + i * columns;
        Vec<T> squares{};
        int64_t j = 0;
        for (; j + kLanes<T> <= n; j += kLanes<T>) squares += load(row + j) * load(row + j);
        if (j < n) {
          const Vec<T> rest = load_partial(row + j, static_cast<int>(n - j));
          squares += rest * rest;
        }
        sum += static_cast<double>(sum_lanes<T>(squares));
      }
      sums[task] = sum;
    });
    for (int64_t task = 0; task < tasks; ++task) total += sums[task];
    gradients.add(parallel, difference, begin, rows, image_unit);
    if (gradients.grad_image != nullptr)
      for_rows(parallel, 0, rows, [&](int64_t row) {
        project_row(gradients.grad_image + (begin + row) * out, image_unit + row * out, out, 2 * args.factor,
                    image.student_inverse[begin + row]);
      });
  }
  if (gradients.grad_text != nullptr)
    for_rows(parallel, 0, columns, [&](int64_t row) {
      project_row(gradients.grad_text + row * out, text_rows + row * width, out, 2 * args.factor,
                  text.student_inverse[row]);
    });
  *static_cast<T*>(relation.loss) = static_cast<T>(args.factor * total);
}

template <class T>
static void frobenius(const RelationFrobeniusArgs& args, const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Side image(relation.student_image, relation.teacher_image, Part::image, relation.memory, parallel);
  const Side text(relation.student_text, relation.teacher_text, Part::text, relation.memory, parallel);
  const double rows = static_cast<double>(image.student.rows);
  const double columns = static_cast<double>(text.student.rows);
  const double width = static_cast<double>(image.width());
  const double out = static_cast<double>(image.student.width);
  const double with_image = relation.grad_image != nullptr ? 1 : 0;
  const double with_text = relation.grad_text != nullptr ? 1 : 0;
  // Multiplications of each form; a Gram matrix is half computed, half mirrored.
  const double direct = rows * columns * (width + out * (with_image + with_text));
  const double gram = (rows + columns) * width * width / 2 + (rows * with_image + columns * with_text) * width * out;
  if (gram < direct) {
    frobenius_gram<T>(args, image, text, parallel);
  } else {
    frobenius_direct<T>(args, image, text, parallel);
  }
}

// ---- Kullback-Leibler

// Two passes over tiles of both cosine matrices. The first leaves log-sum-exp of every row and column, student and
// teacher. The second knows u = (z - lse z) - (x - lse x) of every entry (x student, z teacher), so that p_S = p_T e^-u
// and
//   KL = sum p_T (u + e^-u - 1),  dKL/dx = p_T (e^-u - 1):
// no term cancels where the student is near the teacher, and because E_T[1 - e^-u] = 0 an error of the log-sum-exps
// enters the loss squared.

// Sums of e^(x - shift), one for each row or each column.
template <class T>
struct Sums {
  T* shift;
  T* sum;
};

// Rows or columns whose sums are complete.
template <class T>
struct Axis {
  T* student_shift;
  T* student_inverse;
  T* teacher_shift;
  T* teacher_inverse;
  T* delta;  // lse z - lse x

  Axis(const Memory& memory, int64_t count)
      : student_shift(memory.take<T>(count)),
        student_inverse(memory.take<T>(count)),
        teacher_shift(memory.take<T>(count)),
        teacher_inverse(memory.take<T>(count)),
        delta(memory.take<T>(count)) {}
};

// One model's cosines: computed tile by tile, the first `kept` rows stored.
template <class T>
struct Cosines {
  const T* image;
  const T* packed_text;
  int64_t width;
  int64_t columns;
  T scale;
  T* store;
  int64_t kept;

  // Rows [i0, i0 + m) and columns [j0, j0 + n); `first` on the pass that fills the store.
  const T* tile(int64_t i0, int64_t m, int64_t j0, int64_t n, T* scratch, bool first, int64_t* stride) const {
    const bool stored = i0 < kept;
    T* out = stored ? store + i0 * columns + j0 : scratch;
    *stride = stored ? columns : kTileColumns<T>;
    if (first || !stored)
      gemm_tile<T>(image + i0 * width, width, 1, m, width, packed_text + j0 * width, n, out, *stride, false);
    return out;
  }
};

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

template <class T>
LCR2S_INLINE Mask<T> first_lanes(int n) {
  Mask<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < n;
}

// Entries of a tile's row; lanes beyond n are -infinity, whose exponential is 0.
template <class T>
LCR2S_INLINE Vec<T> load_logits(const T* row, int64_t n, T scale) {
  if (n >= kLanes<T>) return scale * load(row);
  const Vec<T> logits = scale * load_partial(row, static_cast<int>(n));
  return first_lanes<T>(static_cast<int>(n)) ? logits : broadcast<T>(-static_cast<T>(__builtin_inf()));
}

// Shifts and sums of a tile: row i at rows.*[i * row_stride], column j at columns.*[j].
template <class T>
static void tile_sums(const T* tile, int64_t stride, int64_t m, int64_t n, T scale, bool shifted, Sums<T> rows,
                      int64_t row_stride, Sums<T> columns) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T column_sums[kTileColumns<T>];
  alignas(64) T column_shifts[kTileColumns<T>];
  const T lowest = -static_cast<T>(__builtin_inf());
  for (int64_t j = 0; j < n; j += lanes) store(column_sums + j, Vec<T>{});
  if (!shifted) {
    for (int64_t i = 0; i < m; ++i) {
      Vec<T> sum{};
      for (int64_t j = 0; j < n; j += lanes) {
        const Vec<T> e = exp(load_logits(tile + i * stride + j, n - j, scale));
        sum += e;
        store(column_sums + j, load(column_sums + j) + e);
      }
      rows.sum[i * row_stride] = sum_lanes<T>(sum);
      rows.shift[i * row_stride] = 0;
    }
    for (int64_t j = 0; j < n; ++j) column_shifts[j] = 0;
  } else {
    for (int64_t j = 0; j < n; j += lanes) store(column_shifts + j, broadcast<T>(lowest));
    for (int64_t i = 0; i < m; ++i) {
      Vec<T> best = broadcast<T>(lowest);
      for (int64_t j = 0; j < n; j += lanes) {
        const Vec<T> logits = load_logits(tile + i * stride + j, n - j, scale);
        best = vector_max<T>(best, logits);
        store(column_shifts + j, vector_max<T>(load(column_shifts + j), logits));
      }
      const T row_shift = max_lanes<T>(best);
      Vec<T> sum{};
      for (int64_t j = 0; j < n; j += lanes) sum += exp(load_logits(tile + i * stride + j, n - j, scale) - row_shift);
      rows.sum[i * row_stride] = sum_lanes<T>(sum);
      rows.shift[i * row_stride] = row_shift;
    }
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; j += lanes)
        store(column_sums + j,
              load(column_sums + j) + exp(load_logits(tile + i * stride + j, n - j, scale) - load(column_shifts + j)));
  }
  __builtin_memcpy(columns.sum, column_sums, static_cast<size_t>(n) * sizeof(T));
  __builtin_memcpy(columns.shift, column_shifts, static_cast<size_t>(n) * sizeof(T));
}

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

template <class T>
static void finish(const Axis<T>& axis, int64_t at, const RunningSum& student, const RunningSum& teacher) {
  axis.student_shift[at] = static_cast<T>(student.shift);
  axis.student_inverse[at] = static_cast<T>(1 / student.sum);
  axis.teacher_shift[at] = static_cast<T>(teacher.shift);
  axis.teacher_inverse[at] = static_cast<T>(1 / teacher.sum);
  axis.delta[at] =
      static_cast<T>((teacher.shift - student.shift) + (__builtin_log(teacher.sum) - __builtin_log(student.sum)));
}

// Field f of row `at` of an axis of `rows` rows, as other processes merge and return it.
template <class T>
static void write_sums(void* statistics, int64_t rows, int64_t at, const RunningSum& student,
                       const RunningSum& teacher) {
  T* out = static_cast<T*>(statistics) + at;
  out[0] = static_cast<T>(student.shift);
  out[rows] = static_cast<T>(student.sum);
  out[2 * rows] = static_cast<T>(teacher.shift);
  out[3 * rows] = static_cast<T>(teacher.sum);
}

template <class T>
static void finish_given(const Axis<T>& axis, const void* statistics, int64_t rows, const Parallel& parallel) {
  for_rows(parallel, 0, rows, [&](int64_t at) {
    const T* in = static_cast<const T*>(statistics) + at;
    finish(axis, at, RunningSum{in[0], in[rows]}, RunningSum{in[2 * rows], in[3 * rows]});
  });
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
  double rows;
  double columns;
  double scale;
};

// Loss terms of a tile and, unless `gradient` is null, dL/dx.
template <class T, bool kShifted>
static TileLoss tile_loss(const T* student, int64_t student_stride, T student_scale, const T* teacher,
                          int64_t teacher_stride, T teacher_scale, int64_t i0, int64_t m, int64_t j0, int64_t n,
                          const Axis<T>& rows, const Axis<T>& columns, T row_weight, T column_weight, T* gradient,
                          int64_t gradient_stride) {
  constexpr int lanes = kLanes<T>;
  TileLoss loss{0, 0, 0};
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = i0 + i;
    const T row_student_shift = rows.student_shift[row];
    const T row_teacher_shift = rows.teacher_shift[row];
    const T row_student_inverse = rows.student_inverse[row];
    const T row_teacher_inverse = rows.teacher_inverse[row];
    const T row_delta = rows.delta[row];
    Vec<T> row_sum{};
    Vec<T> column_sum{};
    Vec<T> scale_sum{};
    for (int64_t j = 0; j < n; j += lanes) {
      const bool whole = n - j >= lanes;
      const int count = static_cast<int>(whole ? lanes : n - j);
      const auto get = [&](const T* p) { return whole ? load(p) : load_partial(p, count); };
      const Vec<T> student_cosine = get(student + i * student_stride + j);
      const Vec<T> teacher_cosine = get(teacher + i * teacher_stride + j);
      const Vec<T> x = student_scale * student_cosine;
      const Vec<T> z = teacher_scale * teacher_cosine;
      // z - x, exact where scales agree and cosines are close.
      const Vec<T> apart =
          teacher_scale * (teacher_cosine - student_cosine) + (teacher_scale - student_scale) * student_cosine;
      const Vec<T> student_exp = exp(kShifted ? x - row_student_shift : x);
      const Vec<T> teacher_exp = exp(kShifted ? z - row_teacher_shift : z);
      Vec<T> row_slope, row_term, column_slope, column_term;
      divergence<T>(teacher_exp * row_teacher_inverse, student_exp * row_student_inverse, apart - row_delta, row_slope,
                    row_term);
      const int64_t column = j0 + j;
      const Vec<T> column_student = kShifted ? exp(x - get(columns.student_shift + column)) : student_exp;
      const Vec<T> column_teacher = kShifted ? exp(z - get(columns.teacher_shift + column)) : teacher_exp;
      divergence<T>(column_teacher * get(columns.teacher_inverse + column),
                    column_student * get(columns.student_inverse + column), apart - get(columns.delta + column),
                    column_slope, column_term);
      const Vec<T> slope = row_weight * row_slope + column_weight * column_slope;
      if (whole) {
        row_sum += row_term;
        column_sum += column_term;
        if (gradient != nullptr) store(gradient + i * gradient_stride + j, slope);
      } else {
        const Mask<T> valid = first_lanes<T>(count);
        row_sum += valid ? row_term : Vec<T>{};
        column_sum += valid ? column_term : Vec<T>{};
        if (gradient != nullptr) store_partial(gradient + i * gradient_stride + j, slope, count);
      }
      // Lanes beyond the last column have cosine 0.
      scale_sum += slope * student_cosine;
    }
    loss.rows += static_cast<double>(sum_lanes<T>(row_sum));
    loss.columns += static_cast<double>(sum_lanes<T>(column_sum));
    loss.scale += static_cast<double>(sum_lanes<T>(scale_sum));
  }
  return loss;
}

// Unit rows as the right operand of a product with their transpose, k = width, n = rows; a part at a time, so that no
// second copy of all rows is needed.
template <class T>
static T* pack_unit_rows(const Features& features, const Memory& memory, const Parallel& parallel) {
  constexpr int64_t part = 64 * kNr<T>;
  const int64_t width = features.width;
  T* packed = take_packed<T>(memory, width, features.rows);
  T* rows = memory.take<T>(smaller(part, features.rows) * width);
  for (int64_t begin = 0; begin < features.rows; begin += part) {
    const int64_t end = smaller(begin + part, features.rows);
    unit_rows<T>(parallel, features, begin, end, rows, nullptr);
    pack_panels<T>(parallel, rows, 1, width, width, end - begin, packed + begin * width);
  }
  return packed;
}

template <class T>
static void kullback_leibler(const RelationKlArgs& args, const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Memory& memory = relation.memory;
  const int64_t count = relation.student_image.rows;
  const int64_t columns = relation.student_text.rows;
  const int64_t width = relation.student_image.width;
  const int64_t teacher_width = relation.teacher_image.width;
  const bool with_gradient = relation.grad_image != nullptr || relation.grad_text != nullptr;

  T* image = memory.take<T>(count * width);
  T* text = memory.take<T>(columns * width);
  T* teacher_image = memory.take<T>(count * teacher_width);
  double* image_inverse = memory.take<double>(count);
  double* text_inverse = memory.take<double>(columns);
  unit_rows<T>(parallel, relation.student_image, 0, count, image, image_inverse);
  unit_rows<T>(parallel, relation.student_text, 0, columns, text, text_inverse);
  unit_rows<T>(parallel, relation.teacher_image, 0, count, teacher_image, nullptr);
  T* packed_text = take_packed<T>(memory, width, columns);
  pack_panels<T>(parallel, text, 1, width, width, columns, packed_text);

  Cosines<T> student{image, packed_text, width, columns, *static_cast<const T*>(args.student_scale), nullptr, 0};
  Cosines<T> teacher{teacher_image,
                     pack_unit_rows<T>(relation.teacher_text, memory, parallel),
                     teacher_width,
                     columns,
                     *static_cast<const T*>(args.teacher_scale),
                     nullptr,
                     0};

  // A quarter of the budget for a slab of dL/dcosine; what is left keeps cosines from the first pass for the second,
  // the costlier model's first.
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const int64_t slab = slab_rows<T>(count, columns, relation.workspace_bytes / 4);
  const int64_t row_blocks = ceil_div(slab, kMc);
  const int64_t col_blocks = ceil_div(columns, kTileColumns<T>);
  int64_t left = relation.workspace_bytes - (with_gradient ? slab * row_bytes : 0) - 4 * row_blocks * row_bytes;
  const auto keep = [&](Cosines<T>& cosines) {
    const int64_t fitting = larger(left / row_bytes, 0);
    cosines.kept = fitting >= count ? count : fitting / kMc * kMc;
    cosines.store = memory.take<T>(cosines.kept * columns);
    left -= cosines.kept * row_bytes;
  };
  const bool second_pass_only = args.whole_row_statistics != nullptr;
  if (!second_pass_only && args.row_statistics == nullptr) {
    keep(teacher_width >= width ? teacher : student);
    keep(teacher_width >= width ? student : teacher);
  }

  const auto needs_no_shift = [](T scale) { return scale <= Limits<T>::scale && scale >= -Limits<T>::scale; };
  const bool shifted = !(needs_no_shift(student.scale) && needs_no_shift(teacher.scale));

  // Partial sums of a slab: rows by column block, columns by row block; index 0 student, 1 teacher.
  Sums<T> row_parts[2];
  Sums<T> column_parts[2];
  RunningSum* column_sums[2];
  for (int model = 0; model < 2; ++model) {
    row_parts[model] = {memory.take<T>(slab * col_blocks), memory.take<T>(slab * col_blocks)};
    column_parts[model] = {memory.take<T>(row_blocks * columns), memory.take<T>(row_blocks * columns)};
    column_sums[model] = memory.take<RunningSum>(columns);
    for (int64_t j = 0; j < columns; ++j) column_sums[model][j] = RunningSum{};
  }
  const Axis<T> row_axis(memory, count);
  const Axis<T> column_axis(memory, columns);

  for (int64_t begin = second_pass_only ? count : 0; begin < count; begin += slab) {
    const int64_t rows = smaller(slab, count - begin);
    const int64_t blocks = ceil_div(rows, kMc);
    parallel.for_each(blocks * col_blocks, [&](int64_t task) {
      alignas(64) T scratch[kMc * kTileColumns<T>];
      const int64_t block = task / col_blocks;
      const int64_t col_block = task % col_blocks;
      const int64_t i0 = block * kMc;
      const int64_t j0 = col_block * kTileColumns<T>;
      const int64_t m = smaller(kMc, rows - i0);
      const int64_t n = smaller(kTileColumns<T>, columns - j0);
      for (int model = 0; model < 2; ++model) {
        const Cosines<T>& cosines = model == 0 ? student : teacher;
        int64_t stride;
        const T* tile = cosines.tile(begin + i0, m, j0, n, scratch, true, &stride);
        const Sums<T> to_rows{row_parts[model].shift + i0 * col_blocks + col_block,
                              row_parts[model].sum + i0 * col_blocks + col_block};
        const Sums<T> to_columns{column_parts[model].shift + block * columns + j0,
                                 column_parts[model].sum + block * columns + j0};
        tile_sums<T>(tile, stride, m, n, cosines.scale, shifted, to_rows, col_blocks, to_columns);
      }
    });
    for_rows(parallel, 0, rows, [&](int64_t row) {
      RunningSum sums[2];
      for (int model = 0; model < 2; ++model)
        for (int64_t part = row * col_blocks; part < (row + 1) * col_blocks; ++part)
          sums[model].add(static_cast<double>(row_parts[model].shift[part]),
                          static_cast<double>(row_parts[model].sum[part]));
      if (args.row_statistics != nullptr) {
        write_sums<T>(args.row_statistics, count, begin + row, sums[0], sums[1]);
      } else {
        finish(row_axis, begin + row, sums[0], sums[1]);
      }
    });
    parallel.for_each(col_blocks, [&](int64_t task) {
      const int64_t end = smaller((task + 1) * kTileColumns<T>, columns);
      for (int model = 0; model < 2; ++model)
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t j = task * kTileColumns<T>; j < end; ++j)
            column_sums[model][j].add(static_cast<double>(column_parts[model].shift[block * columns + j]),
                                      static_cast<double>(column_parts[model].sum[block * columns + j]));
    });
  }
  if (args.column_statistics != nullptr) {
    for (int64_t j = 0; j < columns; ++j)
      write_sums<T>(args.column_statistics, columns, j, column_sums[0][j], column_sums[1][j]);
    return;
  }
  if (second_pass_only) {
    finish_given(row_axis, args.whole_row_statistics, count, parallel);
    finish_given(column_axis, args.whole_column_statistics, columns, parallel);
  } else {
    for_rows(parallel, 0, columns,
             [&](int64_t column) { finish(column_axis, column, column_sums[0][column], column_sums[1][column]); });
  }

  T* gradient = with_gradient ? memory.take<T>(slab * columns) : nullptr;
  const SlabGradients<T> gradients = slab_gradients<T>(relation, parallel, text, width, slab);
  TileLoss* losses = memory.take<TileLoss>(row_blocks * col_blocks);
  TileLoss total{0, 0, 0};
  for (int64_t begin = 0; begin < count; begin += slab) {
    const int64_t rows = smaller(slab, count - begin);
    const int64_t tasks = ceil_div(rows, kMc) * col_blocks;
    parallel.for_each(tasks, [&](int64_t task) {
      alignas(64) T student_scratch[kMc * kTileColumns<T>];
      alignas(64) T teacher_scratch[kMc * kTileColumns<T>];
      const int64_t i0 = task / col_blocks * kMc;
      const int64_t j0 = task % col_blocks * kTileColumns<T>;
      const int64_t m = smaller(kMc, rows - i0);
      const int64_t n = smaller(kTileColumns<T>, columns - j0);
      int64_t student_stride;
      int64_t teacher_stride;
      const T* x = student.tile(begin + i0, m, j0, n, student_scratch, false, &student_stride);
      const T* z = teacher.tile(begin + i0, m, j0, n, teacher_scratch, false, &teacher_stride);
      const auto compute = shifted ? &tile_loss<T, true> : &tile_loss<T, false>;
      losses[task] = compute(x, student_stride, student.scale, z, teacher_stride, teacher.scale, begin + i0, m, j0, n,
                             row_axis, column_axis, static_cast<T>(args.row_weight), static_cast<T>(args.column_weight),
                             gradient == nullptr ? nullptr : gradient + i0 * columns + j0, columns);
    });
    for (int64_t task = 0; task < tasks; ++task) {
      total.rows += losses[task].rows;
      total.columns += losses[task].columns;
      total.scale += losses[task].scale;
    }
    gradients.add(parallel, gradient, begin, rows, image + begin * width);
  }
  const double scale = static_cast<double>(student.scale);
  if (gradients.grad_image != nullptr)
    for_rows(parallel, 0, count, [&](int64_t row) {
      project_row(gradients.grad_image + row * width, image + row * width, width, scale, image_inverse[row]);
    });
  if (gradients.grad_text != nullptr)
    for_rows(parallel, 0, columns, [&](int64_t row) {
      project_row(gradients.grad_text + row * width, text + row * width, width, scale, text_inverse[row]);
    });
  *static_cast<T*>(relation.loss) = static_cast<T>(total.rows * args.row_weight + total.columns * args.column_weight);
  if (args.grad_scale != nullptr) *static_cast<T*>(args.grad_scale) = static_cast<T>(total.scale);
}

}  // namespace

void relation_frobenius(const RelationFrobeniusArgs& args, const Parallel& parallel) {
  if (args.relation.wide) {
    frobenius<double>(args, parallel);
  } else {
    frobenius<float>(args, parallel);
  }
}

void relation_kl(const RelationKlArgs& args, const Parallel& parallel) {
  if (args.relation.wide) {
    kullback_leibler<double>(args, parallel);
  } else {
    kullback_leibler<float>(args, parallel);
  }
}

}  // namespace lcr2s::cpu::LCR2S_ISA
