#include "relation.h"

#include "gemm.h"
#include "unit_rows.h"

// Both losses take a matrix of cosines tile by tile, in blocks whose rows are packed from the features as they are
// needed: no copy of the unit rows exists. Tiles of dL/dcosine stay as they are, each contiguous, and enter the
// gradients' products a block at a time.
namespace lcr2s::cpu::LCR2S_ISA {

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A tile stays in the second-level cache. Its columns, and half of them, are whole panels and whole strips: it is an
// operand from either side.
constexpr int64_t kTileRows = kMc;
template <class T>
constexpr int64_t kTileColumns = (kMr == 14 ? 896 : 960) / static_cast<int64_t>(sizeof(T));
template <class T>
constexpr int64_t kTileSize = kTileRows * kTileColumns<T>;
static_assert(kTileColumns<float> % kNr<float> == 0 && kTileColumns<double> % kNr<double> == 0);
static_assert(kTileColumns<float> / 2 % kMr == 0 && kTileColumns<double> / 2 % kMr == 0);

// Tiles of a block: large enough that adding to the gradients costs little beside the products, small enough for a
// cache.
constexpr int64_t kBlockRowTiles = 16;
constexpr int64_t kBlockColumnTiles = 8;

// ---- Unit rows as operands

static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      break;
  }
  return 2;
}

// Columns [begin, begin + count) of all rows.
static inline Features columns_of(const Features& features, int64_t begin, int64_t count) {
  const char* data = static_cast<const char*>(features.data) + begin * element_size(features.dtype);
  return {data, features.dtype, features.rows, count, features.stride};
}

struct UnitRows {
  Features features;
  double* inverse;

  UnitRows(const Features& rows, const Memory& memory, const Parallel& parallel)
      : features(rows), inverse(memory.take<double>(rows.rows)) {
    for_rows(parallel, 0, rows.rows, [&](int64_t row) { inverse[row] = inverse_norm(features, row); });
  }

  int64_t count() const { return features.rows; }
  int64_t width() const { return features.width; }

  template <class T>
  void write(int64_t row, int64_t begin, int64_t columns, T* out) const {
    scale_row(columns_of(features, begin, columns), row, inverse[row], out);
  }
};

// Rows [begin, begin + count) as pack_rows leaves them.
template <class T, class Rows>
static void pack_left(const Parallel& parallel, const Rows& rows, int64_t begin, int64_t count, T* packed) {
  const int64_t width = rows.width();
  parallel.for_each(ceil_div(count, kMr), [&](int64_t strip) {
    alignas(64) T part[kMr * kKc];
    const int64_t i0 = strip * kMr;
    const int64_t first = i0 / kMc * kMc;
    const int64_t m = smaller(kMr, count - i0);
    for (int64_t k0 = 0; k0 < width; k0 += kKc) {
      const int64_t kc = smaller(kKc, width - k0);
      for (int64_t i = 0; i < m; ++i) rows.template write<T>(begin + i0 + i, k0, kc, part + i * kKc);
      pack_strips<T>(part, kKc, 1, m, kc, packed + first * width + k0 * kMc + (i0 - first) * kc);
    }
  });
}

// Rows [begin, begin + count) as the columns of a right operand, as pack_panels leaves it.
template <class T, class Rows>
static void pack_right_transposed(const Parallel& parallel, const Rows& rows, int64_t begin, int64_t count, T* packed) {
  const int64_t width = rows.width();
  parallel.for_each(ceil_div(count, kNr<T>), [&](int64_t panel) {
    alignas(64) T part[kNr<T> * kKc];
    const int64_t j0 = panel * kNr<T>;
    const int64_t n = smaller(kNr<T>, count - j0);
    for (int64_t k0 = 0; k0 < width; k0 += kKc) {
      const int64_t kc = smaller(kKc, width - k0);
      for (int64_t j = 0; j < n; ++j) rows.template write<T>(begin + j0 + j, k0, kc, part + j * kKc);
      pack_panels<T>(parallel, part, 1, kKc, kc, n, packed + j0 * width + k0 * kNr<T>);
    }
  });
}

// Rows of a segment that fit the first-level cache.
constexpr int64_t kGroup = 16;
static_assert(kKc % kGroup == 0);

// Calls body(row, column, rows, columns, part) for groups of rows and their segments, whole panels and whole strips
// wide: part[i * kKc + j] is element (row + i, column + j) of rows [begin, begin + count), zero beyond the last column.
template <class T, class Rows, class F>
static void for_parts(const Parallel& parallel, const Rows& rows, int64_t begin, int64_t count, const F& body) {
  constexpr int64_t segment = kTileColumns<float>;
  static_assert(segment <= kKc);
  parallel.for_each(ceil_div(count, kGroup), [&](int64_t task) {
    alignas(64) T part[kGroup * kKc] = {};
    const int64_t row = task * kGroup;
    const int64_t m = smaller(kGroup, count - row);
    for (int64_t column = 0; column < rows.width(); column += segment) {
      const int64_t n = smaller(segment, rows.width() - column);
      for (int64_t i = 0; i < m; ++i) {
        rows.template write<T>(begin + row + i, column, n, part + i * kKc);
        for (int64_t j = n; j < segment; ++j) part[i * kKc + j] = T{0};
      }
      body(row, column, m, n, part);
    }
  });
}

// Copies a part's columns, `Wide` at a time, to where `at(first column)` says; rows go to consecutive places.
template <int Wide, class T, class F>
LCR2S_INLINE void copy_part(const T* part, int64_t m, int64_t n, const F& at) {
  for (int64_t j = 0; j < n; j += Wide) {
    T* out = at(j);
    for (int64_t i = 0; i < m; ++i) __builtin_memcpy(out + i * Wide, part + i * kKc + j, Wide * sizeof(T));
  }
}

// Rows [begin, begin + count) as a right operand, k = count, as pack_panels leaves it.
template <class T, class Rows>
static void pack_right(const Parallel& parallel, const Rows& rows, int64_t begin, int64_t count, T* packed) {
  for_parts<T>(parallel, rows, begin, count, [=](int64_t row, int64_t column, int64_t m, int64_t n, const T* part) {
    copy_part<kNr<T>>(part, m, n, [=](int64_t j) { return packed + (column + j) * count + row * kNr<T>; });
  });
}

// A row of the gradient through the normalisation, in place, as project_row does.
template <class T>
static void project(const UnitRows& rows, int64_t row, double factor, T* gradient) {
  constexpr int64_t part = kSegment;
  T unit[part];
  const int64_t width = rows.width();
  double along = 0;
  for (int64_t begin = 0; begin < width; begin += part) {
    const int64_t n = smaller(part, width - begin);
    rows.write<T>(row, begin, n, unit);
    EightSums sums;
    int64_t at = 0;
    for (; at + 8 <= n; at += 8)
      sums.add([&](int i) __attribute__((always_inline)) {
        return load_double(gradient + begin + at + i) * load_double(unit + at + i);
      });
    along += sums.total();
    for (; at < n; ++at) along += static_cast<double>(gradient[begin + at]) * static_cast<double>(unit[at]);
  }
  const double scale = factor * rows.inverse[row];
  for (int64_t begin = 0; begin < width; begin += part) {
    const int64_t n = smaller(part, width - begin);
    if (width > part) rows.write<T>(row, begin, n, unit);
    T* g = gradient + begin;
    int64_t i = 0;
    for (; i + kLanes<double> <= n; i += kLanes<double>)
      store_double(g + i, scale * load_double(g + i) - scale * along * load_double(unit + i));
    for (; i < n; ++i)
      g[i] = static_cast<T>(scale * static_cast<double>(g[i]) - scale * along * static_cast<double>(unit[i]));
  }
}

template <class T>
static void project(const Parallel& parallel, const UnitRows& rows, double factor, T* gradient) {
  for_rows(parallel, 0, rows.count(), [&](int64_t row) { project(rows, row, factor, gradient + row * rows.width()); });
}

// ---- Blocks of tiles

struct Block {
  int64_t i0, m;
  int64_t j0, n;
};

// Rows and columns of the blocks of a matrix.
struct BlockShape {
  int64_t rows;
  int64_t columns;

  template <class T>
  static BlockShape within(int64_t rows, int64_t columns, int64_t bytes) {
    const int64_t tiles = bytes / static_cast<int64_t>(kTileSize<T> * sizeof(T));
    int64_t down = smaller(ceil_div(rows, kTileRows), kBlockRowTiles);
    int64_t across = smaller(ceil_div(columns, kTileColumns<T>), kBlockColumnTiles);
    while (down > 1 && down * across > tiles) --down;
    while (across > 1 && down * across > tiles) --across;
    return {down * kTileRows, across * kTileColumns<T>};
  }

  // Calls body for all blocks, column by column.
  template <class F>
  void for_each(int64_t all_rows, int64_t all_columns, const F& body) const {
    for (int64_t j0 = 0; j0 < all_columns; j0 += columns)
      for (int64_t i0 = 0; i0 < all_rows; i0 += rows)
        body(Block{i0, smaller(rows, all_rows - i0), j0, smaller(columns, all_columns - j0)});
  }
};

template <class T>
struct Tiles {
  T* first;
  int64_t stride;  // from a row of tiles to the next

  T* at(int64_t row, int64_t column) const { return first + row * stride + column * kTileSize<T>; }
};

template <class T>
static Tiles<T> take_tiles(const Memory& memory, int64_t rows, int64_t columns) {
  const int64_t stride = ceil_div(columns, kTileColumns<T>) * kTileSize<T>;
  return {memory.take<T>(ceil_div(rows, kTileRows) * stride), stride};
}

struct TileAt {
  int64_t row, column;  // of tiles in the block
  int64_t i, m;         // rows and columns of the matrix
  int64_t j, n;
};

// Calls body(tile, task) for every tile of a block, in parallel.
template <class T, class F>
static void for_tiles(const Parallel& parallel, const Block& block, const F& body) {
  const int64_t across = ceil_div(block.n, kTileColumns<T>);
  parallel.for_each(ceil_div(block.m, kTileRows) * across, [&](int64_t task) {
    const int64_t row = task / across;
    const int64_t column = task % across;
    const int64_t i = row * kTileRows;
    const int64_t j = column * kTileColumns<T>;
    body(TileAt{row, column, block.i0 + i, smaller(kTileRows, block.m - i), block.j0 + j,
                smaller(kTileColumns<T>, block.n - j)},
         task);
  });
}

// A product of image rows with text rows: the operands of the block at hand.
template <class T, class Rows>
struct Product {
  const Rows& image;
  const Rows& text;
  T* left;
  T* right;
  int64_t image_at = -1;
  int64_t text_at = -1;

  Product(const Rows& image_rows, const Rows& text_rows, const BlockShape& shape, const Memory& memory)
      : image(image_rows),
        text(text_rows),
        left(memory.take<T>(packed_rows_size<T>(shape.rows, image_rows.width()))),
        right(memory.take<T>(packed_size<T>(image_rows.width(), shape.columns))) {}

  void pack(const Parallel& parallel, const Block& block) {
    if (block.j0 != text_at) pack_right_transposed<T>(parallel, text, block.j0, block.n, right);
    if (block.i0 != image_at) pack_left<T>(parallel, image, block.i0, block.m, left);
    text_at = block.j0;
    image_at = block.i0;
  }

  void tile(const TileAt& at, T* out) const {
    const int64_t width = image.width();
    gemm_tile_packed<T>(left + at.row * kTileRows * width, at.m, width, right + at.column * kTileColumns<T> * width,
                        at.n, out, kTileColumns<T>);
  }
};

// Columns of a task's share of a product with `tasks` rows of tiles: wide ones, which pack less often, where there are
// enough.
static inline int64_t columns_of_task(int64_t tasks) { return tasks >= 16 ? 512 : 256; }

// out (rows x width) = or += G right
template <class T>
static void multiply(const Parallel& parallel, const Tiles<T>& g, int64_t rows, int64_t columns, const T* right,
                     int64_t width, T* out, bool add) {
  const int64_t row_tiles = ceil_div(rows, kTileRows);
  const int64_t share = columns_of_task(row_tiles);
  const int64_t parts = ceil_div(width, share);
  parallel.for_each(row_tiles * parts, [=](int64_t task) {
    alignas(64) T strips[kTileSize<T>];
    const int64_t row = task / parts;
    const int64_t j0 = task % parts * share;
    const int64_t m = smaller(kTileRows, rows - row * kTileRows);
    for (int64_t k0 = 0; k0 < columns; k0 += kTileColumns<T>) {
      const int64_t kc = smaller(kTileColumns<T>, columns - k0);
      pack_strips<T>(g.at(row, k0 / kTileColumns<T>), kTileColumns<T>, 1, m, kc, strips);
      multiply_strips<T>(strips, m, kc, right + j0 * columns + k0 * kNr<T>, kNr<T> * columns,
                         smaller(share, width - j0), out + row * kTileRows * width + j0, width, add || k0 > 0);
    }
  });
}

// out (columns x width) = or += G' right
template <class T>
static void multiply_transposed(const Parallel& parallel, const Tiles<T>& g, int64_t rows, int64_t columns,
                                const T* right, int64_t width, T* out, bool add) {
  // Rows of tiles that are summed over before `out` is touched: about kKc rows.
  constexpr int64_t depth = (kKc + kTileRows / 2) / kTileRows * kTileRows;
  const int64_t column_tasks = 2 * ceil_div(columns, kTileColumns<T>);
  const int64_t share = columns_of_task(column_tasks);
  const int64_t parts = ceil_div(width, share);
  parallel.for_each(column_tasks * parts, [=](int64_t task) {
    alignas(64) T strips[kTileColumns<T> / 2 * depth];
    // Half of a tile's columns, the last tile's as well.
    const int64_t tile = task / parts / 2;
    const int64_t of_tile = smaller(kTileColumns<T>, columns - tile * kTileColumns<T>);
    const int64_t half = ceil_div(ceil_div(of_tile, 2), kMr) * kMr;
    const int64_t first = task / parts % 2 * half;
    const int64_t m = smaller(half, of_tile - first);
    if (m <= 0) return;
    const int64_t column = tile * kTileColumns<T> + first;
    const int64_t j0 = task % parts * share;
    for (int64_t k0 = 0; k0 < rows; k0 += depth) {
      const int64_t kc = smaller(depth, rows - k0);
      for (int64_t p = 0; p < kc; ++p) {
        const T* source = g.at((k0 + p) / kTileRows, tile) + (k0 + p) % kTileRows * kTileColumns<T> + first;
        for (int64_t i = 0; i < m; i += kMr) __builtin_memcpy(strips + i * kc + p * kMr, source + i, kMr * sizeof(T));
      }
      multiply_strips<T>(strips, m, kc, right + j0 * rows + k0 * kNr<T>, kNr<T> * rows, smaller(share, width - j0),
                         out + column * width + j0, width, add || k0 > 0);
    }
  });
}

// Gradients with respect to the student's unit rows, from dL/dcosine block by block.
template <class T>
struct Gradients {
  const UnitRows& image;
  const UnitRows& text;
  T* grad_image;  // null where not wanted, like grad_text
  T* grad_text;
  T* image_rows = nullptr;
  T* text_rows = nullptr;
  int64_t text_at = -1;

  Gradients(const RelationArgs& args, const UnitRows& image_rows_of, const UnitRows& text_rows_of,
            const BlockShape& shape)
      : image(image_rows_of),
        text(text_rows_of),
        grad_image(static_cast<T*>(args.grad_image)),
        grad_text(static_cast<T*>(args.grad_text)) {
    // Those of all images: blocks of the same images come back for every block of columns.
    if (grad_text != nullptr) image_rows = args.memory.take<T>(packed_size<T>(image.count(), image.width()));
    if (grad_image != nullptr) text_rows = args.memory.take<T>(packed_size<T>(shape.columns, image.width()));
  }

  bool wanted() const { return grad_image != nullptr || grad_text != nullptr; }

  void add(const Parallel& parallel, const Tiles<T>& g, const Block& block) {
    const int64_t width = image.width();
    if (grad_image != nullptr) {
      if (block.j0 != text_at) pack_right<T>(parallel, text, block.j0, block.n, text_rows);
      text_at = block.j0;
      multiply<T>(parallel, g, block.m, block.n, text_rows, width, grad_image + block.i0 * width, block.j0 > 0);
    }
    if (grad_text != nullptr) {
      T* packed = image_rows + packed_size<T>(block.i0, width);
      if (block.j0 == 0) pack_right<T>(parallel, image, block.i0, block.m, packed);
      multiply_transposed<T>(parallel, g, block.m, block.n, packed, width, grad_text + block.j0 * width, block.i0 > 0);
    }
  }

  void finish(const Parallel& parallel, double factor) const {
    if (grad_image != nullptr) project(parallel, image, factor, grad_image);
    if (grad_text != nullptr) project(parallel, text, factor, grad_text);
  }
};

// Calls body(j, false) for whole vectors of n columns and body(j, true) for the rest, as constants.
template <bool B>
struct Constant {
  static constexpr bool value = B;
};
template <class T, class F>
LCR2S_INLINE void for_vectors(int64_t n, const F& body) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) body(j, Constant<false>{});
  if (j < n) body(j, Constant<true>{});
}

template <class T>
LCR2S_INLINE Mask<T> first_lanes(int64_t n) {
  Mask<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<int>(n);
}

// ---- Frobenius

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
