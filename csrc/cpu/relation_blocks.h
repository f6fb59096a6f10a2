#pragma once

#include "gemm.h"
#include "relation.h"
#include "unit_rows.h"

// What both relation losses share: they take a matrix of cosines tile by tile, in blocks whose rows are packed from the
// features as they are needed: no copy of the unit rows exists. Tiles of dL/dcosine stay as they are, each contiguous,
// and enter the gradients' products a block at a time.
namespace lcr2s::cpu::LCR2S_ISA {

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

}  // namespace lcr2s::cpu::LCR2S_ISA
