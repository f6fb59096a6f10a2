#include "retrieval.h"

#include <cmath>

#include "launch.h"
#include "retrieval_plan.h"
#include "tile_runs.h"
#include "tile_simt.h"
#include "tile_wgmma.h"
#include "warp.h"

namespace lcr2s::cuda {

namespace {

constexpr int kThreads = 256;

// Place of tile `tile` among a query's tiles, which rise; -1: not among them.
__device__ int find_tile(const int32_t* tiles, int64_t count, int64_t tile) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (tiles[middle] < tile) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && tiles[low] == tile ? static_cast<int>(low) : -1;
}

// What a block knows of the tile's queries and gallery rows while it looks at the scores.
template <class Tile>
struct RetrievalMemory {
  // Of each query: place of the tile among its own (scores), -1 for none; or its number of positives.
  int64_t query[Tile::kRows];
  // Of each query, its first positive and that one's place in the buffers.
  int64_t first[Tile::kRows];
  int64_t place[Tile::kRows];
  int64_t order[Tile::kCols];
  int wanted;
};

template <class Tile>
struct Best {
  typename Tile::Value value;
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(typename Tile::Element) == 2 ? 2 : 1)
    retrieval_tile_kernel(const __grid_constant__ RetrievalTileArgs args) {
  if constexpr (kTileRuns<Tile>) {
    using T = typename Tile::Value;
    using Memory = RetrievalMemory<Tile>;
    char* shared = dynamic_shared();
    Tile tile(shared);
    // Behind the engine's own.
    Memory& memory = *reinterpret_cast<Memory*>(shared + Tile::kSharedBytes);
    const int64_t first_row_tile = args.first_query / Tile::kRows;
    const int64_t row_tiles = (args.first_query + args.query_count - 1) / Tile::kRows + 1 - first_row_tile;
    const TileIndex at = tile_of_block(blockIdx.x, row_tiles, ceil_div(args.gallery.rows, Tile::kCols));
    // The tile's corner; queries count from the buffers' first one.
    const int64_t row0 = (first_row_tile + at.row) * Tile::kRows - args.first_query;
    const int64_t col0 = at.column * Tile::kCols;
    const int64_t gallery_tile = args.first_tile + at.column;
    const int t = static_cast<int>(threadIdx.x);
    const bool ranked = args.pass == RetrievalPass::own || args.pass == RetrievalPass::count;

    if (args.pass != RetrievalPass::maxima) {
      if (t == 0) memory.wanted = 0;
      __syncthreads();
      if (t < Tile::kRows) {
        const int64_t q = row0 + t;
        const bool inside = q >= 0 && q < args.query_count;
        bool wanted = inside;
        if (ranked) {
          const int64_t count = inside ? args.positives[args.first_query + q] : 0;
          const int64_t first = inside ? args.first[args.first_query + q] : 0;
          memory.query[t] = count;
          memory.first[t] = first;
          memory.place[t] = inside ? args.ends[args.first_query + q] - count - args.buffer_begin : 0;
          wanted =
              count > 0 && (args.pass == RetrievalPass::count || (first < col0 + Tile::kCols && first + count > col0));
        } else {
          const int64_t place = !inside ? -1
                                : args.tiles == nullptr
                                    ? gallery_tile
                                    : find_tile(args.tiles + q * args.kept_tiles, args.kept_tiles, gallery_tile);
          memory.query[t] = place;
          wanted = place >= 0;
        }
        if (wanted) atomicOr(&memory.wanted, 1);
      } else if (ranked && t - Tile::kRows < Tile::kCols) {
        const int64_t col = col0 + t - Tile::kRows;
        memory.order[t - Tile::kRows] = col < args.gallery.rows ? args.gallery_order[col] : 0;
      }
      __syncthreads();
      if (memory.wanted == 0) return;
    }

    typename Tile::Accumulator c;
    tile.multiply(c, args.queries, first_row_tile + at.row, args.gallery, at.column);
    const T* query_factor = static_cast<const T*>(args.query_factor) + (first_row_tile + at.row) * Tile::kRows;
    const T* gallery_factor = static_cast<const T*>(args.gallery_factor) + col0;
    Tile::for_each(c, [&](int row, int col, T& value) {
      const T score = value * (query_factor[row] * gallery_factor[col]);
      value = col0 + col < args.gallery.rows ? score : -static_cast<T>(INFINITY);
    });

    switch (args.pass) {
      case RetrievalPass::maxima: {
        T* maxima = static_cast<T*>(args.maxima) + gallery_tile;
        Tile::template reduce_rows<Best<Tile>>(
            shared,
            [&](int r) {
              Best<Tile> best{c.at(r, 0)};
#pragma unroll
              for (int j = 1; j < Tile::kThreadCols; ++j)
                best.value = c.at(r, j) > best.value ? c.at(r, j) : best.value;
              return best;
            },
            [](Best<Tile>& into, const Best<Tile>& from) {
              into.value = from.value > into.value ? from.value : into.value;
            },
            [&](int row, const Best<Tile>& best) {
              const int64_t q = row0 + row;
              if (q >= 0 && q < args.query_count) maxima[q * args.tile_count] = best.value;
            });
        break;
      }
      case RetrievalPass::scores:
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          const int row = Tile::row(r);
          const int64_t place = memory.query[row];
          if (place < 0) continue;
          T* out = static_cast<T*>(args.scores) + ((row0 + row) * args.kept_tiles + place) * Tile::kCols;
#pragma unroll
          for (int j = 0; j < Tile::kThreadCols; ++j) out[Tile::col(j)] = c.at(r, j);
        }
        break;
      case RetrievalPass::own:
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          const int row = Tile::row(r);
          // The query's positives, counted from the tile's first column.
          const int64_t first = memory.first[row] - col0;
          const int64_t end = first + memory.query[row];
          const int low = first > 0 ? (first < Tile::kCols ? static_cast<int>(first) : Tile::kCols) : 0;
          const int high = end < Tile::kCols ? static_cast<int>(end) : Tile::kCols;
          T* out = static_cast<T*>(args.own) + (memory.place[row] - first);
#pragma unroll
          for (int j = 0; j < Tile::kThreadCols; ++j)
            if (Tile::col(j) >= low && Tile::col(j) < high) out[Tile::col(j)] = c.at(r, j);
        }
        break;
      case RetrievalPass::count: {
        const T* own = static_cast<const T*>(args.own);
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          const int row = Tile::row(r);
          const int64_t count = memory.query[row];
          // Lanes of one warp hold several queries and go on together.
          const int64_t most = warp_max(static_cast<long long>(count));
          for (int64_t p = 0; p < most; ++p) {
            int hits = 0;
            if (p < count) {
              const T score = own[memory.place[row] + p];
              const int64_t index = args.gallery_order[memory.first[row] + p];
              bool equal = false;
#pragma unroll
              for (int j = 0; j < Tile::kThreadCols; ++j) {
                hits += c.at(r, j) > score ? 1 : 0;
                equal |= c.at(r, j) == score;
              }
              if (equal) {
#pragma unroll
                for (int j = 0; j < Tile::kThreadCols; ++j)
                  if (c.at(r, j) == score) hits += memory.order[Tile::col(j)] < index ? 1 : 0;
              }
            }
            hits = warp_sum(hits, Tile::kLaneCols);
            if (hits > 0 && lane_index() % Tile::kLaneCols == 0)
              atomicAdd(args.above + memory.place[row] + p, static_cast<unsigned>(hits));
          }
        }
        break;
      }
    }
  }
}

// Numbers that rise with the value, as the digits of a radix selection want them. +0 and -0 are one.
template <class T>
struct Key;
template <>
struct Key<float> {
  using Bits = uint32_t;
  __device__ static Bits of(float x) {
    const uint32_t bits = bits_of_float(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
};
template <>
struct Key<double> {
  using Bits = uint64_t;
  __device__ static Bits of(double x) {
    const double y = x + 0.0;
    uint64_t bits;
    memcpy(&bits, &y, sizeof(bits));
    return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
  }
};

struct SelectMemory {
  unsigned histogram[256];
  unsigned counts[2][kThreads / kWarp];
  unsigned long long prefix;
  unsigned long long left;
};

// How many threads before this one, and in the block, say yes.
__device__ unsigned count_before(bool yes, unsigned* counts, unsigned* total) {
  const unsigned votes = __ballot_sync(kFullMask, yes);
  if (lane_index() == 0) counts[warp_index()] = static_cast<unsigned>(__popc(votes));
  __syncthreads();
  unsigned before = static_cast<unsigned>(__popc(votes & ((1u << lane_index()) - 1u)));
  unsigned sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    if (warp < warp_index()) before += counts[warp];
    sum += counts[warp];
  }
  *total = sum;
  return before;
}

// One block a row: the k-th largest value digit by digit, then one walk in order that takes what lies above it and the
// first of its equals.
template <class T>
__global__ void __launch_bounds__(kThreads) retrieval_select_kernel(const __grid_constant__ RetrievalSelectArgs args) {
  using Bits = typename Key<T>::Bits;
  constexpr int kBits = 8 * static_cast<int>(sizeof(Bits));
  SelectMemory& memory = *reinterpret_cast<SelectMemory*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const T* values = static_cast<const T*>(args.values) + row * args.count;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    memory.prefix = 0;
    memory.left = static_cast<unsigned long long>(args.k);
  }
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    memory.histogram[t] = 0;
    __syncthreads();
    const Bits prefix = static_cast<Bits>(memory.prefix);
    // Of the digits above.
    const Bits mask = shift + 8 == kBits ? Bits{0} : static_cast<Bits>(~Bits{0} << (shift + 8) % kBits);
    for (int64_t i = t; i < args.count; i += kThreads) {
      const Bits key = Key<T>::of(values[i]);
      if ((key & mask) == prefix) atomicAdd(memory.histogram + static_cast<int>((key >> shift) & 0xff), 1u);
    }
    __syncthreads();
    if (t == 0) {
      unsigned long long left = memory.left;
      int digit = 255;
      for (; digit > 0 && memory.histogram[digit] < left; --digit) left -= memory.histogram[digit];
      memory.left = left;
      memory.prefix = static_cast<unsigned long long>(prefix | static_cast<Bits>(static_cast<Bits>(digit) << shift));
    }
    __syncthreads();
  }
  const Bits threshold = static_cast<Bits>(memory.prefix);
  const int64_t equals_wanted = static_cast<int64_t>(memory.left);
  int64_t equals = 0;
  int64_t taken = 0;
  for (int64_t begin = 0; begin < args.count && taken < args.k; begin += kThreads) {
    const int64_t i = begin + t;
    const Bits key = i < args.count ? Key<T>::of(values[i]) : Bits{0};
    const bool equal = i < args.count && key == threshold;
    unsigned total;
    const int64_t equals_before = equals + count_before(equal, memory.counts[0], &total);
    equals += total;
    const bool take = (i < args.count && key > threshold) || (equal && equals_before < equals_wanted);
    const int64_t place = taken + count_before(take, memory.counts[1], &total);
    taken += total;
    if (take) {
      if (args.places != nullptr) {
        args.places[row * args.k + place] = static_cast<int32_t>(i);
      } else {
        const int64_t slot = i / args.tile_columns;
        const int64_t tile = args.tiles == nullptr ? slot : args.tiles[row * args.kept_tiles + slot];
        static_cast<T*>(args.best)[row * args.k + place] = values[i] + T{0};
        args.indices[row * args.k + place] = tile * args.tile_columns + i % args.tile_columns;
      }
    }
  }
}

// Number of `ids` below `id` or, where `with_equal`, not above it.
__device__ int64_t count_below(const int64_t* ids, int64_t count, int64_t id, bool with_equal) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ids[middle] < id || (with_equal && ids[middle] == id)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) retrieval_range_kernel(const __grid_constant__ RetrievalRangeArgs args) {
  const int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (q >= args.queries) return;
  const int64_t first = count_below(args.gallery_ids, args.gallery, args.query_ids[q], false);
  const int64_t count = count_below(args.gallery_ids, args.gallery, args.query_ids[q], true) - first;
  args.first[q] = first;
  args.positives[q] = count;
  args.positives_out[args.query_order[q]] = count;
}

// One block a query.
__global__ void __launch_bounds__(kThreads) retrieval_finish_kernel(const __grid_constant__ RetrievalFinishArgs args) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  const int64_t q = args.first_query + blockIdx.x;
  const int64_t count = args.positives[q];
  const uint32_t* above = args.above + args.ends[q] - count - args.buffer_begin;
  double precision_sum = 0;
  double trapezoid_sum = 0;
  unsigned fewest = 0xffffffffu;
  unsigned most = 0;
  for (int64_t p = threadIdx.x; p < count; p += kThreads) {
    const uint32_t own = above[p];
    int64_t hits = 1;
    for (int64_t other = 0; other < count; ++other) hits += above[other] < own ? 1 : 0;
    const double rank = static_cast<double>(own) + 1;
    const double precision = static_cast<double>(hits) / rank;
    const double before = own > 0 ? static_cast<double>(hits - 1) / static_cast<double>(own) : 1.0;
    precision_sum += precision;
    trapezoid_sum += (precision + before) / 2;
    fewest = own < fewest ? own : fewest;
    most = own > most ? own : most;
  }
  precision_sum = block_sum(precision_sum, scratch);
  trapezoid_sum = block_sum(trapezoid_sum, scratch);
  unsigned* words = reinterpret_cast<unsigned*>(scratch);
  fewest = block_reduce(fewest, [](unsigned a, unsigned b) { return a < b ? a : b; }, words);
  most = block_max(most, words);
  if (threadIdx.x != 0) return;
  const int64_t out = args.query_order[q];
  const double divisor = count > 0 ? static_cast<double>(count) : 1;
  args.first_rank[out] = count > 0 ? int64_t{fewest} + 1 : 0;
  args.last_rank[out] = count > 0 ? int64_t{most} + 1 : 0;
  args.average_precision[out] = precision_sum / divisor;
  args.average_precision_trapezoid[out] = trapezoid_sum / divisor;
}

template <class Tile>
const char* launch_tiles(const RetrievalTileArgs& args, void* stream) {
  static_assert(Tile::template kReduceRowsBytes<Best<Tile>> <= Tile::kScratchBytes);
  static_assert(Tile::kSharedBytes % alignof(int64_t) == 0);
  const int64_t first = args.first_query / Tile::kRows;
  const int64_t row_tiles = (args.first_query + args.query_count - 1) / Tile::kRows + 1 - first;
  const int64_t blocks = row_tiles * ceil_div(args.gallery.rows, Tile::kCols);
  const int64_t shared = Tile::kSharedBytes + static_cast<int64_t>(sizeof(RetrievalMemory<Tile>));
  return launch(retrieval_tile_kernel<Tile>, blocks, Tile::kThreads, shared, stream, args);
}

}  // namespace

const char* retrieval_tiles(const RetrievalTileArgs& args, void* stream) {
  const bool wgmma = wgmma_runs_on(current_device().capability);
  switch (args.element) {
    case DType::float32:
      return launch_tiles<TileSimt<float, retrieval_columns(4)>>(args, stream);
    case DType::float64:
      return launch_tiles<TileSimt<double, retrieval_columns(8)>>(args, stream);
    case DType::bfloat16:
      return wgmma ? launch_tiles<TileWgmma<BFloat16, retrieval_columns(4)>>(args, stream)
                   : launch_tiles<TileMma<BFloat16, retrieval_columns(4)>>(args, stream);
    case DType::float16:
      return wgmma ? launch_tiles<TileWgmma<Half, retrieval_columns(4)>>(args, stream)
                   : launch_tiles<TileMma<Half, retrieval_columns(4)>>(args, stream);
  }
  return "unknown dtype";
}

const char* retrieval_select(const RetrievalSelectArgs& args, void* stream) {
  return args.wide ? launch(retrieval_select_kernel<double>, args.rows, kThreads, sizeof(SelectMemory), stream, args)
                   : launch(retrieval_select_kernel<float>, args.rows, kThreads, sizeof(SelectMemory), stream, args);
}

const char* retrieval_ranges(const RetrievalRangeArgs& args, void* stream) {
  return launch(retrieval_range_kernel, ceil_div(args.queries, kThreads), kThreads, 0, stream, args);
}

const char* retrieval_finish(const RetrievalFinishArgs& args, void* stream) {
  return launch(retrieval_finish_kernel, args.query_count, kThreads, kWarp * sizeof(double), stream, args);
}

}  // namespace lcr2s::cuda
