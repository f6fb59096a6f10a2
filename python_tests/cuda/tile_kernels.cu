// Kernels around the tile products (csrc/cuda/tile.h) and pack_unit_rows, which test_tiles.py compiles for the emulator
// and calls through ctypes, and compiles for GPUs to see what they use.
#include "cuda/launch.h"
#include "cuda/tile_mma.h"
#include "cuda/tile_simt.h"
#include "cuda/tile_wgmma.h"
#include "pack.h"

using namespace lcr2s;
using namespace lcr2s::cuda;

namespace {

// out = A B^T, row-major.
template <class Tile, class Out, int kBlocks>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks) product_kernel(Panels a, Panels b, Out* out) {
  if constexpr (Tile::kAvailable) {
    Tile tile(dynamic_shared());
    typename Tile::Accumulator c;
    const TileIndex at = tile_of_block(blockIdx.x, ceil_div(a.rows, Tile::kRows), ceil_div(b.rows, Tile::kCols));
    tile.multiply(c, a, at.row, b, at.column);
    const int64_t row = at.row * Tile::kRows, column = at.column * Tile::kCols;
    Tile::store_rows(c, out + row * b.rows + column, b.rows, a.rows - row, b.rows - column);
  }
}

// out = A B^T - 2 C D^T: two products live at once, every tile of a row in one block.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    dual_kernel(Panels a, Panels b, Panels c, Panels d, typename Tile::Value* out) {
  if constexpr (Tile::kAvailable) {
    Tile tile(dynamic_shared());
    typename Tile::Accumulator x, y;
    for (int64_t column = 0; column < ceil_div(b.rows, Tile::kCols); ++column) {
      tile.multiply(x, a, blockIdx.x, b, column);
      tile.multiply(y, c, blockIdx.x, d, column);
#pragma unroll
      for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
        for (int j = 0; j < Tile::kThreadCols; ++j) {
          const int64_t row = int64_t{blockIdx.x} * Tile::kRows + Tile::row(r);
          const int64_t col = column * Tile::kCols + Tile::col(j);
          if (row < a.rows && col < b.rows) out[row * b.rows + col] = x.at(r, j) - 2 * y.at(r, j);
        }
      }
    }
  }
}

template <class Value>
struct Statistics {
  Value maximum;
  Value sum;
  Value weighted;
};

// Of every tile of A B^T, by row and by column: the maximum, the sum of e^(c - maximum), the sum of c (column + 1) or
// of c (row + 1); columns and rows count in the tile. Elements outside the matrix are left out. One block a row of
// tiles.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    statistics_kernel(Panels a, Panels b, Statistics<typename Tile::Value>* rows,
                      Statistics<typename Tile::Value>* columns) {
  if constexpr (Tile::kAvailable) {
    using Value = typename Tile::Value;
    using State = Statistics<Value>;
    char* shared = dynamic_shared();
    Tile tile(shared);
    typename Tile::Accumulator c;
    const int64_t row_tile = blockIdx.x, row_end = a.rows - row_tile * Tile::kRows;
    constexpr Value low = -1e30f;
    const auto merge = [](State& into, const State& from) {
      const Value top = into.maximum > from.maximum ? into.maximum : from.maximum;
      into.sum = into.sum * exp(into.maximum - top) + from.sum * exp(from.maximum - top);
      into.weighted += from.weighted;
      into.maximum = top;
    };
    for (int64_t column_tile = 0; column_tile < ceil_div(b.rows, Tile::kCols); ++column_tile) {
      const int64_t col_end = b.rows - column_tile * Tile::kCols;
      tile.multiply(c, a, row_tile, b, column_tile);
      Tile::template reduce_rows<State>(
          shared,
          [&](int r) {
            State state{low, 0, 0};
#pragma unroll
            for (int j = 0; j < Tile::kThreadCols; ++j)
              if (Tile::col(j) < col_end && c.at(r, j) > state.maximum) state.maximum = c.at(r, j);
#pragma unroll
            for (int j = 0; j < Tile::kThreadCols; ++j) {
              if (Tile::col(j) >= col_end) continue;
              state.sum += exp(c.at(r, j) - state.maximum);
              state.weighted += c.at(r, j) * static_cast<Value>(Tile::col(j) + 1);
            }
            return state;
          },
          merge,
          [&](int row, const State& state) {
            if (row < row_end) rows[column_tile * a.rows + row_tile * Tile::kRows + row] = state;
          });
      Tile::template reduce_cols<State>(
          shared,
          [&](int j) {
            State state{low, 0, 0};
#pragma unroll
            for (int r = 0; r < Tile::kThreadRows; ++r)
              if (Tile::row(r) < row_end && c.at(r, j) > state.maximum) state.maximum = c.at(r, j);
#pragma unroll
            for (int r = 0; r < Tile::kThreadRows; ++r) {
              if (Tile::row(r) >= row_end) continue;
              state.sum += exp(c.at(r, j) - state.maximum);
              state.weighted += c.at(r, j) * static_cast<Value>(Tile::row(r) + 1);
            }
            return state;
          },
          merge,
          [&](int col, const State& state) {
            if (col < col_end) columns[row_tile * b.rows + column_tile * Tile::kCols + col] = state;
          });
    }
  }
}

// The panels of A B^T and of its transpose, as a further product's operands.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) repack_kernel(Panels a, Panels b, Panels out, Panels transposed) {
  if constexpr (Tile::kAvailable) {
    Tile tile(dynamic_shared());
    typename Tile::Accumulator c;
    const int64_t column_tiles = ceil_div(b.rows, kPanelRows) * (kPanelRows / Tile::kCols);
    const int64_t row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x % column_tiles;
    tile.multiply(c, a, row_tile, b, column_tile);
    Tile::template store_panels<typename Tile::Element>(c, out, row_tile, column_tile);
    Tile::template store_panels_transposed<typename Tile::Element>(c, transposed, row_tile, column_tile);
  }
}

// out = G B of width columns, row-major.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) product_nn_kernel(Panels g, Panels b, typename Tile::Value* out) {
  Tile tile(dynamic_shared());
  typename Tile::Accumulator c;
  const int64_t column_tiles = ceil_div(b.width, Tile::kCols);
  const int64_t row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x % column_tiles;
  tile.multiply_nn(c, g, row_tile, b, column_tile);
  const int64_t row = row_tile * Tile::kRows, column = column_tile * Tile::kCols;
  Tile::store_rows(c, out + row * b.width + column, b.width, g.rows - row, b.width - column);
}

struct Operands {
  Panels a;
  Panels b;
  Panels c;
  Panels d;
  void* out;
  void* more;
};

enum Task { product, dual, statistics, repack, product_nn };

template <class Tile>
const char* run_product(const Operands& x) {
  using Value = typename Tile::Value;
  constexpr int kBlocks = sizeof(Value) == 4 ? 2 : 1;
  return launch(product_kernel<Tile, Value, kBlocks>, ceil_div(x.a.rows, Tile::kRows) * ceil_div(x.b.rows, Tile::kCols),
                Tile::kThreads, Tile::kSharedBytes, nullptr, x.a, x.b, static_cast<Value*>(x.out));
}

template <class Tile>
const char* run_nt(int task, const Operands& x) {
  using Value = typename Tile::Value;
  const int64_t rows = ceil_div(x.a.rows, Tile::kRows);
  const int64_t padded = ceil_div(x.b.rows, kPanelRows) * (kPanelRows / Tile::kCols);
  constexpr int kThreads = Tile::kThreads, kBytes = Tile::kSharedBytes;
  switch (task) {
    case product:
      return run_product<Tile>(x);
    case dual:
      if constexpr (sizeof(Value) == 8 && Tile::kCols == 128)
        return "two products of this size do not fit";
      else
        return launch(dual_kernel<Tile>, rows, kThreads, kBytes, nullptr, x.a, x.b, x.c, x.d,
                      static_cast<Value*>(x.out));
    case statistics:
      return launch(statistics_kernel<Tile>, rows, kThreads, kBytes, nullptr, x.a, x.b,
                    static_cast<Statistics<Value>*>(x.out), static_cast<Statistics<Value>*>(x.more));
    case repack:
      return launch(repack_kernel<Tile>, rows * padded, kThreads, kBytes, nullptr, x.a, x.b, x.c, x.d);
  }
  return "no such task";
}

template <class Tile>
const char* run(int task, const Operands& x) {
  if (task != product_nn) return run_nt<Tile>(task, x);
  const int64_t blocks = ceil_div(x.a.rows, Tile::kRows) * ceil_div(x.b.width, Tile::kCols);
  return launch(product_nn_kernel<Tile>, blocks, Tile::kThreads, Tile::kSharedBytes, nullptr, x.a, x.b,
                static_cast<typename Tile::Value*>(x.out));
}

// For a GPU some are enough to see what they use: no second width, one dtype of two bytes.
#ifdef LCR2S_TILES_FEW

const char* by_engine(int engine, int dtype, int, int task, const Operands& x) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return run<TileSimt<float>>(task, x);
    case DType::float64:
      return run_product<TileSimt<double>>(x);
    default:
      return engine ? run_nt<TileWgmma<BFloat16>>(task, x) : run<TileMma<BFloat16>>(task, x);
  }
}

#else

template <int kCols>
const char* by_dtype(int engine, int dtype, int task, const Operands& x) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return engine ? run_product<TileSimt<float, kCols, true>>(x) : run<TileSimt<float, kCols>>(task, x);
    case DType::float64:
      return run<TileSimt<double, kCols>>(task, x);
    case DType::bfloat16:
      return engine ? run_nt<TileWgmma<BFloat16, kCols>>(task, x) : run<TileMma<BFloat16, kCols>>(task, x);
    case DType::float16:
      return engine ? run_nt<TileWgmma<Half, kCols>>(task, x) : run<TileMma<Half, kCols>>(task, x);
  }
  return "no such dtype";
}

const char* by_engine(int engine, int dtype, int columns, int task, const Operands& x) {
  return columns == 128 ? by_dtype<128>(engine, dtype, task, x) : by_dtype<64>(engine, dtype, task, x);
}

#endif

}  // namespace

extern "C" {

int64_t tiles_panels_bytes(int64_t rows, int64_t width, int64_t element_bytes) {
  return panels_bytes(rows, width, element_bytes);
}

int64_t tiles_panel_offset(int64_t row, int64_t column, int64_t rows, int64_t width, int64_t element_bytes) {
  const Panels panels = make_panels(nullptr, rows, width, element_bytes);
  switch (element_bytes) {
    case 2:
      return reinterpret_cast<intptr_t>(panel_element<Half>(panels, row, column));
    case 4:
      return reinterpret_cast<intptr_t>(panel_element<float>(panels, row, column));
    default:
      return reinterpret_cast<intptr_t>(panel_element<double>(panels, row, column));
  }
}

void tiles_of_block(int64_t block, int64_t row_tiles, int64_t column_tiles, int64_t* at) {
  const TileIndex index = tile_of_block(block, row_tiles, column_tiles);
  at[0] = index.row;
  at[1] = index.column;
}

const char* tiles_pack(const void* data, int dtype, int64_t rows, int64_t width, int64_t stride, int element,
                       int normalise, void* panels, void* unit, int64_t unit_stride, void* norms) {
  return pack_unit_rows(PackArgs{{data, static_cast<DType>(dtype), rows, width, stride},
                                 static_cast<DType>(element),
                                 normalise != 0,
                                 panels,
                                 unit,
                                 unit_stride,
                                 norms},
                        nullptr);
}

// `bases`, `rows` and `widths` of the panels a, b, c, d.
const char* tiles_run(int task, int engine, int dtype, int columns, void* const* bases, const int64_t* rows,
                      const int64_t* widths, void* out, void* more) {
  const int bytes = static_cast<DType>(dtype) == DType::float32   ? 4
                    : static_cast<DType>(dtype) == DType::float64 ? 8
                                                                  : 2;
  const auto panels = [&](int i) { return make_panels(bases[i], rows[i], widths[i], bytes); };
  const Operands operands{panels(0), panels(1), panels(2), panels(3), out, more};
  return by_engine(engine, dtype, columns, task, operands);
}

}  // extern "C"
