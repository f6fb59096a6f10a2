#include "relation_blocks.h"

namespace lcr2s::cpu::LCR2S_ISA {

namespace {

// The difference of the relations as one product: R_student - R_teacher = U R' with rows
//   U = [V - E, E], R = [T, T - F]   where the widths agree: terms that cancel never appear,
//   U = [V, E],     R = [T, -F]      where they differ,
// V, T the student's unit rows and E, F the teacher's.
enum class Part { image, text };

struct Side {
  UnitRows student;
  UnitRows teacher;
  Part part;

  Side(const Features& student_rows, const Features& teacher_rows, Part which, const Memory& memory,
       const Parallel& parallel)
      : student(student_rows, memory, parallel), teacher(teacher_rows, memory, parallel), part(which) {}

  bool difference() const { return student.width() == teacher.width(); }
  int64_t count() const { return student.count(); }
  int64_t width() const { return student.width() + teacher.width(); }

  // Columns [begin, begin + columns) of a row of U or R.
  template <class T>
  void write(int64_t row, int64_t begin, int64_t columns, T* out) const {
    const int64_t out_width = student.width();
    const int64_t left = smaller(larger(out_width - begin, 0), columns);
    if (left > 0) {
      if (part == Part::image && difference()) {
        write_difference(row, begin, left, out);
      } else {
        student.write<T>(row, begin, left, out);
      }
    }
    if (left == columns) return;
    const int64_t at = begin + left - out_width;
    if (part == Part::image) {
      teacher.write<T>(row, at, columns - left, out + left);
    } else if (difference()) {
      write_difference(row, at, columns - left, out + left);
    } else {
      scale_row(columns_of(teacher.features, at, columns - left), row, -teacher.inverse[row], out + left);
    }
  }

 private:
  template <class T>
  void write_difference(int64_t row, int64_t begin, int64_t columns, T* out) const {
    scale_difference(columns_of(student.features, begin, columns), columns_of(teacher.features, begin, columns), row,
                     student.inverse[row], teacher.inverse[row], out);
  }
};

// Rows that the Gram matrices take at a time.
constexpr int64_t kGramRows = 1024;
static_assert(kGramRows % kKc == 0);

// Strips of the columns of `count` rows: kKc rows at a time, each strip contiguous.
LCR2S_INLINE int64_t padded_columns(int64_t width) { return ceil_div(width, kMr) * kMr; }

// gram = A' A over all rows of a side, on and above the diagonal.
template <class T>
static void gram_matrix(const Side& side, const Parallel& parallel, T* strips, T* panels, T* gram) {
  const int64_t width = side.width();
  const int64_t padded = padded_columns(width);
  constexpr int64_t columns = 8 * kNr<T>;
  const int64_t row_blocks = ceil_div(width, kMc);
  // Of a block of rows, the columns from the panel on that holds its first diagonal element.
  const auto first_column = [](int64_t block) { return block * kMc / kNr<T> * kNr<T>; };
  int64_t tiles = 0;
  for (int64_t block = 0; block < row_blocks; ++block) tiles += ceil_div(width - first_column(block), columns);
  for (int64_t begin = 0; begin < side.count(); begin += kGramRows) {
    const int64_t count = smaller(kGramRows, side.count() - begin);
    for_parts<T>(parallel, side, begin, count, [=](int64_t row, int64_t column, int64_t m, int64_t n, const T* part) {
      copy_part<kNr<T>>(part, m, n, [=](int64_t j) { return panels + (column + j) * count + row * kNr<T>; });
      const int64_t k0 = row / kKc * kKc;
      const int64_t kc = smaller(kKc, count - k0);
      copy_part<kMr>(part, m, n,
                     [=](int64_t j) { return strips + k0 * padded + (column + j) * kc + (row - k0) * kMr; });
    });
    parallel.for_each(tiles, [&](int64_t task) {
      int64_t block = 0;
      for (;; ++block) {
        const int64_t across = ceil_div(width - first_column(block), columns);
        if (task < across) break;
        task -= across;
      }
      const int64_t i0 = block * kMc;
      const int64_t m = smaller(kMc, width - i0);
      const int64_t j0 = first_column(block) + task * columns;
      const int64_t j1 = smaller(j0 + columns, width);
      for (int64_t k0 = 0; k0 < count; k0 += kKc) {
        const int64_t kc = smaller(kKc, count - k0);
        const T* left = strips + k0 * padded + i0 * kc;
        const auto multiply_columns = [&](int64_t first, int64_t last, int64_t rows) {
          multiply_strips<T>(left, rows, kc, panels + first * count + k0 * kNr<T>, kNr<T> * count, last - first,
                             gram + i0 * width + first, width, begin + k0 > 0);
        };
        // Near the diagonal a panel at a time, down to the diagonal.
        int64_t j = j0;
        for (; j < j1 && j + kNr<T> < i0 + m; j += kNr<T>)
          multiply_columns(j, smaller(j + kNr<T>, j1), ceil_div(j + kNr<T> - i0, kMr) * kMr);
        if (j < j1) multiply_columns(j, j1, m);
      }
    });
  }
}

// Columns [begin, begin + columns) of a Gram matrix as a right operand, from its half.
template <class T>
static void pack_gram(const Parallel& parallel, const T* gram, int64_t width, int64_t begin, int64_t columns,
                      T* packed) {
  parallel.for_each(ceil_div(columns, kNr<T>), [&](int64_t panel) {
    const int64_t j0 = panel * kNr<T>;
    const int64_t n = smaller(kNr<T>, columns - j0);
    const int64_t at = begin + j0;
    T* out = packed + j0 * width;
    pack_panels<T>(parallel, gram + at, width, 1, at, n, out);
    for (int64_t i = at; i < at + n; ++i)
      for (int64_t j = 0; j < kNr<T>; ++j)
        out[i * kNr<T> + j] = j >= n ? T{0} : i <= at + j ? gram[i * width + at + j] : gram[(at + j) * width + i];
    const int64_t rest = at + n;
    pack_panels<T>(parallel, gram + at * width + rest, 1, width, width - rest, n, out + rest * kNr<T>);
  });
}

// Gradient of one side: factor * rows (other side's Gram matrix, columns of its student part), through the
// normalisation.
template <class T>
static void gram_gradient(const Side& side, const Parallel& parallel, double factor, const T* coefficients, T* grad) {
  const int64_t width = side.width();
  const int64_t out = side.student.width();
  // Half of the usual rows: enough tasks where rows are few.
  constexpr int64_t height = kMc / 2;
  static_assert(height % kMr == 0);
  parallel.for_each(ceil_div(side.count(), height), [&](int64_t task) {
    alignas(64) T part[kMr * kKc];
    alignas(64) T strips[height * kKc];
    const int64_t i0 = task * height;
    const int64_t m = smaller(height, side.count() - i0);
    for (int64_t k0 = 0; k0 < width; k0 += kKc) {
      const int64_t kc = smaller(kKc, width - k0);
      for (int64_t i = 0; i < m; i += kMr) {
        const int64_t rows = smaller(kMr, m - i);
        for (int64_t row = 0; row < rows; ++row) side.write<T>(i0 + i + row, k0, kc, part + row * kKc);
        pack_strips<T>(part, kKc, 1, rows, kc, strips + i * kc);
      }
      multiply_strips<T>(strips, m, kc, coefficients + k0 * kNr<T>, kNr<T> * width, out, grad + i0 * out, out, k0 > 0);
    }
    for (int64_t i = i0; i < i0 + m; ++i) project(side.student, i, factor, grad + i * out);
  });
}

// |U R'|^2 = <U'U, R'R>; dV = 2 U (R'R)[:, student], dT = 2 R (U'V) with V = U[:, student] (+ U[:, teacher] where U
// holds the difference).
template <class T>
static void frobenius_gram(const RelationFrobeniusArgs& args, const Side& image, const Side& text,
                           const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Memory& memory = relation.memory;
  const int64_t width = image.width();
  const int64_t out = image.student.width();
  const int64_t chunk = smaller(kGramRows, larger(image.count(), text.count()));
  T* strips = memory.take<T>(chunk * padded_columns(width));
  T* panels = memory.take<T>(packed_size<T>(chunk, width));
  T* image_gram = memory.take<T>(width * width);
  T* text_gram = memory.take<T>(width * width);
  gram_matrix<T>(image, parallel, strips, panels, image_gram);
  gram_matrix<T>(text, parallel, strips, panels, text_gram);

  double* row_sums = memory.take<double>(width);
  for_rows(parallel, 0, width, [&](int64_t i) {
    const T* a = image_gram + i * width;
    const T* b = text_gram + i * width;
    EightSums sums;
    int64_t j = i + 1;
    for (; j + 8 <= width; j += 8)
      sums.add([&](int at)
                   __attribute__((always_inline)) { return load_double(a + j + at) * load_double(b + j + at); });
    double above = sums.total();
    for (; j < width; ++j) above += static_cast<double>(a[j]) * static_cast<double>(b[j]);
    row_sums[i] = static_cast<double>(a[i]) * static_cast<double>(b[i]) + 2 * above;
  });
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += row_sums[i];
  *static_cast<T*>(relation.loss) = static_cast<T>(args.factor * sum);

  if (relation.grad_image == nullptr && relation.grad_text == nullptr) return;
  const int64_t packed = packed_size<T>(width, out);
  T* coefficients = memory.take<T>(packed);
  if (relation.grad_image != nullptr) {
    pack_gram<T>(parallel, text_gram, width, 0, out, coefficients);
    gram_gradient<T>(image, parallel, 2 * args.factor, coefficients, static_cast<T*>(relation.grad_image));
  }
  if (relation.grad_text != nullptr) {
    pack_gram<T>(parallel, image_gram, width, 0, out, coefficients);
    if (image.difference()) {
      T* of_teacher = memory.take<T>(packed);
      pack_gram<T>(parallel, image_gram, width, out, out, of_teacher);
      parallel.for_each(packed / kNr<T>, [=](int64_t task) {
        T* at = coefficients + task * kNr<T>;
        for (int half = 0; half < kNr<T>; half += kLanes<T>)
          store(at + half, load(at + half) + load(of_teacher + task * kNr<T> + half));
      });
    }
    gram_gradient<T>(text, parallel, 2 * args.factor, coefficients, static_cast<T*>(relation.grad_text));
  }
}

// The relations themselves, block by block: cheaper than Gram matrices where rows are few.
template <class T>
static void frobenius_direct(const RelationFrobeniusArgs& args, const Side& image, const Side& text,
                             const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Memory& memory = relation.memory;
  const int64_t count = image.count();
  const int64_t columns = text.count();
  const BlockShape shape = BlockShape::within<T>(count, columns, relation.workspace_bytes);
  Product<T, Side> product(image, text, shape, memory);
  Gradients<T> gradients(relation, image.student, text.student, shape);
  const Tiles<T> difference = take_tiles<T>(memory, shape.rows, shape.columns);
  double* sums = memory.take<double>(shape.rows / kTileRows * (shape.columns / kTileColumns<T>));

  double total = 0;
  shape.for_each(count, columns, [&](const Block& block) {
    product.pack(parallel, block);
    for_tiles<T>(parallel, block, [&](const TileAt& at, int64_t task) {
      T* tile = difference.at(at.row, at.column);
      product.tile(at, tile);
      double sum = 0;
      for (int64_t i = 0; i < at.m; ++i) {
        const T* row = tile + i * kTileColumns<T>;
        Vec<T> squares{};
        for_vectors<T>(at.n, [&](int64_t j, auto tail) __attribute__((always_inline)) {
          Vec<T> value = load(row + j);
          if constexpr (tail.value) value = first_lanes<T>(at.n - j) ? value : Vec<T>{};
          squares += value * value;
        });
        sum += static_cast<double>(sum_lanes<T>(squares));
      }
      sums[task] = sum;
    });
    const int64_t tiles = ceil_div(block.m, kTileRows) * ceil_div(block.n, kTileColumns<T>);
    for (int64_t task = 0; task < tiles; ++task) total += sums[task];
    gradients.add(parallel, difference, block);
  });
  gradients.finish(parallel, 2 * args.factor);
  *static_cast<T*>(relation.loss) = static_cast<T>(args.factor * total);
}

template <class T>
static void frobenius(const RelationFrobeniusArgs& args, const Parallel& parallel) {
  const RelationArgs& relation = args.relation;
  const Side image(relation.student_image, relation.teacher_image, Part::image, relation.memory, parallel);
  const Side text(relation.student_text, relation.teacher_text, Part::text, relation.memory, parallel);
  const double rows = static_cast<double>(image.count());
  const double columns = static_cast<double>(text.count());
  const double width = static_cast<double>(image.width());
  const double out = static_cast<double>(image.student.width());
  const double with_image = relation.grad_image != nullptr ? 1 : 0;
  const double with_text = relation.grad_text != nullptr ? 1 : 0;
  // Multiplications of each form; of a Gram matrix half is computed.
  const double direct = rows * columns * (width + out * (with_image + with_text));
  const double gram = (rows + columns) * width * width / 2 + (rows * with_image + columns * with_text) * width * out;
  if (gram < direct) {
    frobenius_gram<T>(args, image, text, parallel);
  } else {
    frobenius_direct<T>(args, image, text, parallel);
  }
}

}  // namespace

void relation_frobenius(const RelationFrobeniusArgs& args, const Parallel& parallel) {
  if (args.relation.wide) {
    frobenius<double>(args, parallel);
  } else {
    frobenius<float>(args, parallel);
  }
}

}  // namespace lcr2s::cpu::LCR2S_ISA
