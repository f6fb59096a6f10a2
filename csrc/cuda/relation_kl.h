#pragma once

#include "loss_common.h"
#include "relation.h"
#include "relation_math.h"
#include "tile_runs.h"

// Kernels of the relation KL loss: log-sum-exps of every row and column of both models, then, knowing them, the loss
// and dL/dcosine. Tiles are 128 rows by kCols columns.
namespace lcr2s::cuda {

template <class T>
using KlSum = ExponentialSum<T>;

// Two tiles of doubles take a multiprocessor's registers.
template <class Tile>
constexpr int kKlBlocks = sizeof(typename Tile::Value) == 8 ? 1 : 2;

// A tile of one model's cosines: formed, or read where the first pass kept it. A thread finds its own again.
template <class Tile>
__device__ __forceinline__ void cosine_tile(Tile& tile, typename Tile::Accumulator& c, const RelationKlModel& model,
                                            int64_t row_tile, int64_t column_tile, int64_t column_tiles, bool first) {
  using T = typename Tile::Value;
  constexpr int kValues = Tile::kThreadRows * Tile::kThreadCols;
  T* kept = static_cast<T*>(model.kept);
  if (kept != nullptr) kept += (row_tile * column_tiles + column_tile) * kValues * Tile::kThreads + threadIdx.x;
  if (kept != nullptr && !first) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) c.value[i] = kept[i * Tile::kThreads];
    return;
  }
  tile.multiply(c, model.image, row_tile, model.text, column_tile);
  const T* row_factor = static_cast<const T*>(model.image_factor) + row_tile * Tile::kRows;
  const T* column_factor = static_cast<const T*>(model.text_factor) + column_tile * Tile::kCols;
  Tile::for_each(c, [&](int row, int col, T& value) { value *= row_factor[row] * column_factor[col]; });
  if (kept != nullptr) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) kept[i * Tile::kThreads] = c.value[i];
  }
}

// Shared memory of a tile of values. Eight neighbouring lanes along a row, four rows apart from the next eight, and
// four along a column meet no bank twice.
template <class Tile>
constexpr int kKlStride = Tile::kCols + 8;

template <class Tile>
__device__ __forceinline__ void store_tile(const typename Tile::Accumulator& c, typename Tile::Value* out, int first,
                                           int rows) {
  Tile::for_each(c, [&](int row, int col, typename Tile::Value value) {
    if (row >= first && row < first + rows) out[(row - first) * kKlStride<Tile> + col] = value;
  });
}

// Of `kCount` values `stride` apart, which are logits where `shifted` and their exponentials otherwise.
template <int kCount, class T>
__device__ __forceinline__ KlSum<T> line_sum(const T* values, int stride, bool shifted) {
  KlSum<T> line{T{0}, T{0}};
  if (shifted) {
    line.shift = lowest<T>();
#pragma unroll 4
    for (int i = 0; i < kCount; ++i) line.shift = values[i * stride] > line.shift ? values[i * stride] : line.shift;
#pragma unroll 4
    for (int i = 0; i < kCount; ++i) line.sum += exponential(below(values[i * stride], line.shift));
  } else {
#pragma unroll 4
    for (int i = 0; i < kCount; ++i) line.sum += values[i * stride];
  }
  return line;
}

// Over kLanes neighbouring lanes.
template <int kLanes, class T>
__device__ __forceinline__ KlSum<T> merge_lanes(KlSum<T> line) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const KlSum<T> other{shuffle_xor(line.shift, step), shuffle_xor(line.sum, step)};
    line.merge(other);
  }
  return line;
}

template <class Tile>
constexpr int kKlSumsBytes = Tile::kRows * kKlStride<Tile> * static_cast<int>(sizeof(typename Tile::Value));

// Pass 1. Blocks: tiles of the student, then of the teacher.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kKlBlocks<Tile>)
    relation_kl_sums_kernel(const __grid_constant__ RelationKlSums args) {
  if constexpr (kTileRuns<Tile>) {
    using T = typename Tile::Value;
    char* shared = dynamic_shared();
    Tile tile(shared);
    typename Tile::Accumulator c;
    const int64_t tiles = args.row_tiles * args.column_tiles;
    const bool teacher = blockIdx.x >= tiles;
    const RelationKlModel& model = args.models[teacher ? 1 : 0];
    const TileIndex at =
        tile_of_block(static_cast<int64_t>(blockIdx.x) - (teacher ? tiles : 0), args.row_tiles, args.column_tiles);
    const int64_t row0 = (args.first_row_tile + at.row) * Tile::kRows;
    const int64_t col0 = at.column * Tile::kCols;
    cosine_tile(tile, c, model, args.first_row_tile + at.row, at.column, args.column_tiles, true);

    const T scale = *static_cast<const T*>(model.scale);
    const bool shifted = needs_shift(scale);
    Tile::for_each(c, [&](int row, int col, T& value) {
      const T logit = row0 + row < args.rows && col0 + col < args.columns ? scale * value : lowest<T>();
      value = shifted ? logit : exponential(logit);
    });
    // The product's stages are free.
    T* values = reinterpret_cast<T*>(shared);
    store_tile<Tile>(c, values, 0, Tile::kRows);
    __syncthreads();
    constexpr int kRowLanes = 8;
    KlSum<T>* row_parts =
        static_cast<KlSum<T>*>(model.row_parts) + at.column * args.row_parts_stride + at.row * Tile::kRows;
    const int row_lane = static_cast<int>(threadIdx.x) % kRowLanes;
    for (int row = static_cast<int>(threadIdx.x) / kRowLanes; row < Tile::kRows; row += Tile::kThreads / kRowLanes) {
      const KlSum<T> sum = merge_lanes<kRowLanes>(
          line_sum<Tile::kCols / kRowLanes>(values + row * kKlStride<Tile> + row_lane, kRowLanes, shifted));
      if (row_lane == 0) row_parts[row] = sum;
    }
    constexpr int kColumnLanes = Tile::kThreads / Tile::kCols;
    const int column_lane = static_cast<int>(threadIdx.x) % kColumnLanes;
    const int col = static_cast<int>(threadIdx.x) / kColumnLanes;
    const KlSum<T> sum = merge_lanes<kColumnLanes>(line_sum<Tile::kRows / kColumnLanes>(
        values + column_lane * kKlStride<Tile> + col, kColumnLanes * kKlStride<Tile>, shifted));
    if (column_lane == 0)
      static_cast<KlSum<T>*>(model.column_parts)[at.row * args.column_parts_stride + col0 + col] = sum;
  }
}

// Partial sums of a slab, merged in order; one thread a line.
template <class T>
__global__ void __launch_bounds__(kRelationThreads)
    relation_kl_lines_kernel(const __grid_constant__ RelationKlLines args) {
  int64_t line = static_cast<int64_t>(blockIdx.x) * kRelationThreads + threadIdx.x;
  const bool second = line >= args.sides[0].padded;
  if (second) line -= args.sides[0].padded;
  const RelationKlSide& side = args.sides[second ? 1 : 0];
  if (line >= side.padded) return;
  KlSum<double> sums[2];
  for (int model = 0; model < 2; ++model) {
    KlSum<double>* running =
        side.running[model] == nullptr ? nullptr : static_cast<KlSum<double>*>(side.running[model]);
    KlSum<double> sum{lowest<double>(), 0};
    if (running != nullptr && !args.first) sum = running[line];
    const KlSum<T>* parts = static_cast<const KlSum<T>*>(side.parts[model]) + line;
    for (int64_t part = 0; part < side.part_count; ++part) {
      const KlSum<T> next = parts[part * side.part_stride];
      sum.merge(KlSum<double>{static_cast<double>(next.shift), static_cast<double>(next.sum)});
    }
    if (running != nullptr) running[line] = sum;
    sums[model] = sum;
  }
  if (side.lines != nullptr) static_cast<KlLine<T>*>(side.lines)[line] = finish_line<T>(sums[0], sums[1]);
}

// Shared memory of the second pass: both models' cosines, in parts of rows that fit, and the lines of the tile's rows.
template <class Tile>
struct KlTileMemory {
  using T = typename Tile::Value;
  static constexpr int kStride = kKlStride<Tile>;
  static constexpr int kParts = static_cast<int>(sizeof(T)) / 4;
  static constexpr int kRows = Tile::kRows / kParts;
  static constexpr int kCosines = kRows * kStride;
  static constexpr int kBytes =
      2 * kCosines * static_cast<int>(sizeof(T)) + Tile::kRows * static_cast<int>(sizeof(KlLine<T>) + sizeof(T));
  // An engine may keep something of its own behind its scratch memory.
  static_assert(kBytes <= Tile::kScratchBytes || Tile::kSharedBytes == Tile::kScratchBytes);
  static constexpr int kSharedBytes = kBytes > Tile::kSharedBytes ? kBytes : Tile::kSharedBytes;
};

// Pass 2: loss terms of a tile and, unless `block` is null, dL/dcosine times both rows' factors as an operand. A thread
// goes down a column.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kKlBlocks<Tile>)
    relation_kl_slopes_kernel(const __grid_constant__ RelationKlSlopes args) {
  if constexpr (kTileRuns<Tile>) {
    using T = typename Tile::Value;
    using Element = typename Tile::Element;
    using Line = KlLine<T>;
    using Memory = KlTileMemory<Tile>;
    char* shared = dynamic_shared();
    Tile tile(shared);
    typename Tile::Accumulator x;
    typename Tile::Accumulator z;
    const TileIndex at = tile_of_block(blockIdx.x, args.row_tiles, args.column_tiles);
    const int64_t row_tile = args.first_row_tile + at.row;
    const int64_t row0 = row_tile * Tile::kRows;
    const int64_t col0 = at.column * Tile::kCols;
    cosine_tile(tile, x, args.models[0], row_tile, at.column, args.column_tiles, false);
    cosine_tile(tile, z, args.models[1], row_tile, at.column, args.column_tiles, false);

    // The product's stages are free.
    T* student_cosines = reinterpret_cast<T*>(shared);
    T* teacher_cosines = student_cosines + Memory::kCosines;
    T* row_factors = teacher_cosines + Memory::kCosines;
    Line* row_lines = reinterpret_cast<Line*>(row_factors + Tile::kRows);
    if (threadIdx.x < Tile::kRows) {
      row_lines[threadIdx.x] = static_cast<const Line*>(args.row_lines)[row0 + threadIdx.x];
      row_factors[threadIdx.x] = static_cast<const T*>(args.models[0].image_factor)[row0 + threadIdx.x];
    }
    const int col = static_cast<int>(threadIdx.x) % Tile::kCols;
    const Line column_line = static_cast<const Line*>(args.column_lines)[col0 + col];
    const T student_scale = *static_cast<const T*>(args.models[0].scale);
    const T teacher_scale = *static_cast<const T*>(args.models[1].scale);
    const T row_weight = static_cast<T>(args.row_weight);
    const T column_weight = static_cast<T>(args.column_weight);
    const T column_factor =
        static_cast<const T*>(args.models[0].text_factor)[col0 + col] * static_cast<T>(args.block_scale);
    const bool inside = col0 + col < args.columns;
    const int64_t last = args.rows - row0;
    Element* block = args.block == nullptr || col0 + col >= args.block_stride
                         ? nullptr
                         : static_cast<Element*>(args.block) + at.row * Tile::kRows * args.block_stride + col0 + col;
    T row_loss = 0, column_loss = 0, scale_slope = 0;
    for (int part = 0; part < Memory::kParts; ++part) {
      const int first = part * Memory::kRows;
      store_tile<Tile>(x, student_cosines, first, Memory::kRows);
      store_tile<Tile>(z, teacher_cosines, first, Memory::kRows);
      __syncthreads();
#pragma unroll 2
      for (int row = static_cast<int>(threadIdx.x) / Tile::kCols; row < Memory::kRows;
           row += Tile::kThreads / Tile::kCols) {
        if (first + row >= last) break;
        const T student_cosine = student_cosines[row * Memory::kStride + col];
        const T teacher_cosine = teacher_cosines[row * Memory::kStride + col];
        const T student = student_scale * student_cosine;
        const T teacher = teacher_scale * teacher_cosine;
        const T apart = logits_apart(student_scale, student_cosine, teacher_scale, teacher_cosine);
        const KlTerm<T> by_row = line_term(row_lines[first + row], student, teacher, apart);
        const KlTerm<T> by_column = line_term(column_line, student, teacher, apart);
        const T slope = inside ? row_weight * by_row.slope + column_weight * by_column.slope : T{0};
        row_loss += inside ? by_row.loss : T{0};
        column_loss += inside ? by_column.loss : T{0};
        scale_slope += inside ? slope * student_cosine : T{0};
        if (block != nullptr)
          block[(first + row) * args.block_stride] =
              from_accumulate<Element>(slope * (row_factors[first + row] * column_factor));
      }
      __syncthreads();
    }
    double* scratch = reinterpret_cast<double*>(shared);
    const double of_rows = block_sum(static_cast<double>(row_loss), scratch);
    const double of_columns = block_sum(static_cast<double>(column_loss), scratch);
    const double of_scale = block_sum(static_cast<double>(scale_slope), scratch);
    if (threadIdx.x == 0) {
      double* out = args.partials + 3 * static_cast<int64_t>(blockIdx.x);
      out[0] = of_rows;
      out[1] = of_columns;
      out[2] = of_scale;
    }
  }
}

// Adds a slab's partials to the totals; after the last one, the results.
template <class T>
__global__ void __launch_bounds__(kRelationThreads)
    relation_kl_total_kernel(const __grid_constant__ RelationKlTotal args) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  double totals[3];
  for (int part = 0; part < 3; ++part) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < args.count; i += kRelationThreads) sum += args.partials[3 * i + part];
    totals[part] = block_sum(sum, scratch) + (args.first ? 0 : args.totals[part]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int part = 0; part < 3; ++part) args.totals[part] = totals[part];
  if (!args.last) return;
  *static_cast<T*>(args.loss) = static_cast<T>(totals[0] * args.row_weight + totals[1] * args.column_weight);
  if (args.grad_scale != nullptr) *static_cast<T*>(args.grad_scale) = static_cast<T>(totals[2]);
}

}  // namespace lcr2s::cuda
