#pragma once

#include "loss_common.h"
#include "similarity_math.h"
#include "tile.h"

// The device side of the similarity losses, pass by pass. Each pass is a function of one block, called by a kernel of
// its own or, one after the other, by the cooperative kernel. Cosines are formed from rows scaled by powers of two,
// which loses nothing in any dtype; one factor a row, 1 / |scaled row|, makes unit rows of them. The texts' factors
// carry the sign of the logit scale.
namespace lcr2s::cuda {

// One side, images or texts. Arrays hold `padded` rows, a multiple of the tile's.
template <class T>
struct SimilarityRows {
  Features features;
  const void* ids;
  bool wide_ids;
  int64_t rows;
  int64_t padded;
  int64_t tiles;
  int64_t strips;
  // Rows of the other side.
  int64_t entries;
  Panels panels;
  Panels gradient_panels;
  int64_t* id;
  double* inverse;
  T* factor;
  T* scale;
  // Field f of strip p of row i: at (p * kStatistics + f) * padded + i.
  T* statistics;
  T* coefficient;
  T* along;
  double* loss_partials;
  char* operand;
  int64_t operand_stride;
  T* gradient;
};

template <class T>
struct SimilarityScalars {
  // Of the image rows' and of the text rows' losses.
  T weight[2];
  // dL/dc is stored times this power of two.
  T block_scale;
  // dL/dc is this times what the policies' gradients give.
  T factor;
};

template <class T>
struct SimilarityCall {
  SimilarityLoss kind;
  SimilarityParameters parameters;
  SimilarityRows<T> image;
  SimilarityRows<T> text;
  int64_t strip;
  bool gradient;
  bool scale_gradient_block;
  const T* logit_scale;
  SimilarityScalars<T>* scalars;
  unsigned* barrier;
  T* kept;
  int64_t kept_stride;
  T* loss;
  T* grad_scale;
};

struct SimilarityBlock {
  int64_t first_row_tile;
  int64_t first_column_tile;
  int64_t row_tiles;
  int64_t column_tiles;
  char* out;
  int64_t stride;
};

// What a block keeps in shared memory about its tile; the tile takes the place of the product's operands.
template <class T_, int kCols_>
struct TileMemory {
  using T = T_;
  static constexpr int kCols = kCols_;
  static constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowPacks = kCols / kPack;
  // Odd in packs: packs of neighbouring rows, and elements of neighbouring columns, lie in different banks.
  static constexpr int kStride = kCols + kPack;
  static constexpr int kTileBytes = kTileRows * kStride * static_cast<int>(sizeof(T));
  static constexpr int kScratchBytes = kWarp * static_cast<int>(sizeof(double));
  // For each row of the tile, then for each column.
  static constexpr int kSides = 2 * kTileRows;
  static constexpr int kSideBytes =
      kSides * (static_cast<int>(sizeof(int64_t)) + (kCoefficients + 2) * static_cast<int>(sizeof(T))) + kScratchBytes;

  // Of an engine that keeps something of its own behind its scratch memory, the tile must fit the latter.
  static constexpr int64_t bytes(int64_t scratch, int64_t shared) {
    const int64_t own = kTileBytes + kSideBytes;
    return own > scratch && shared > scratch ? -1 : own > shared ? own : shared;
  }

  T* tile;
  T* coefficient;
  T* factor;
  T* scale;
  int64_t* id;
  double* scratch;

  __device__ __forceinline__ TileMemory(char* shared, bool with_tile) : tile(reinterpret_cast<T*>(shared)) {
    coefficient = reinterpret_cast<T*>(shared + (with_tile ? kTileBytes : 0));
    factor = coefficient + kCoefficients * kSides;
    scale = factor + kSides;
    id = reinterpret_cast<int64_t*>(scale + kSides);
    scratch = reinterpret_cast<double*>(id + kSides);
  }
};

template <class T, class F>
__device__ __forceinline__ void with_policy(SimilarityLoss kind, const F& f) {
  switch (kind) {
    case SimilarityLoss::info_nce:
      return f(InfoNce<T>{});
    case SimilarityLoss::sdm:
    case SimilarityLoss::cmpm:
      return f(Matching<T>{});
    case SimilarityLoss::tal:
      return f(Tal<T>{});
  }
}

// The same number, but not known to be: what follows from it is not computed ahead of a loop, where it would take the
// registers of a tile product.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Pass 0: operands, norms, identities; one warp a row ----

template <class T>
__device__ T logit_factor(const SimilarityCall<T>& call) {
  if (call.logit_scale != nullptr) return *call.logit_scale;
  return static_cast<T>(call.kind == SimilarityLoss::tal ? 1 / call.parameters.tau : 1.0);
}

template <class Element, class T>
__device__ void pack_row(const SimilarityCall<T>& call, const SimilarityRows<T>& side, bool is_text, int64_t row) {
  constexpr int kPack = kPackBytes / static_cast<int>(sizeof(Element));
  const int lane = lane_index();
  const Features& features = side.features;
  const bool inside = row < side.rows;
  double largest = 0;
  for (int64_t j = lane; inside && j < features.width; j += kWarp)
    largest = max_or_nan(fabs(element_at(features, row, j)), largest);
  largest = warp_max(largest);
  const bool finite = largest - largest == 0;
  const int exponent = finite && largest > 0 ? -ilogb(largest) : 0;
  // 2^exponent may leave the range of double.
  const double first = scalbn(1.0, exponent / 2), second = scalbn(1.0, exponent - exponent / 2);
  double squares = 0;
  const int64_t packs = side.panels.k_chunks * (kPanelRowBytes / kPackBytes);
  for (int64_t pack = lane; pack < packs; pack += kWarp) {
    Pack<Element, kPack> out;
#pragma unroll
    for (int u = 0; u < kPack; ++u) {
      const int64_t column = pack * kPack + u;
      double x = 0;
      if (inside && column < features.width) x = element_at(features, row, column) * first * second;
      squares += x * x;
      out.at[u] = narrowed<Element>(x);
    }
    store_pack(panel_element<Element>(side.panels, row, pack * kPack), out);
    if (inside && side.operand != nullptr && pack * kPack < side.operand_stride)
      store_pack(reinterpret_cast<Element*>(side.operand) + row * side.operand_stride + pack * kPack, out);
  }
  const double norm = finite ? sqrt(warp_sum(squares)) : static_cast<double>(NAN);
  if (lane != 0) return;
  const T logit = logit_factor(call);
  const double inverse = norm == 0 ? 0.0 : 1 / norm * first * second;
  side.inverse[row] = inverse;
  const T factor = norm == 0 ? T(1) : static_cast<T>(1 / norm);
  side.factor[row] = is_text && logit < 0 ? -factor : factor;
  side.scale[row] =
      call.kind == SimilarityLoss::cmpm ? static_cast<T>(norm / first / second) : static_cast<T>(fabs(logit));
  int64_t id = row;
  if (inside && side.ids != nullptr)
    id = side.wide_ids ? static_cast<const int64_t*>(side.ids)[row] : static_cast<const int32_t*>(side.ids)[row];
  side.id[row] = id;
}

template <class Element, class T>
__device__ void pack_rows(const SimilarityCall<T>& call) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kTileThreads / kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kTileThreads / kWarp) + warp_index();
  for (int64_t row = first; row < call.image.padded + call.text.padded; row += warps) {
    const bool is_text = row >= call.image.padded;
    pack_row<Element>(call, is_text ? call.text : call.image, is_text, is_text ? row - call.image.padded : row);
  }
}

// ---- Pass 1: a tile of cosines and its statistics ----

// Factors, identities and logit scales of the tile's rows and columns.
template <class T, class Memory>
__device__ void load_sides(const SimilarityCall<T>& call, int64_t i, int64_t j, const Memory& memory) {
  const int t = opaque(static_cast<int>(threadIdx.x));
  const bool is_text = t >= kTileRows;
  if (is_text && t - kTileRows >= Memory::kCols) return;
  const SimilarityRows<T>& side = is_text ? call.text : call.image;
  const int64_t at = is_text ? j * Memory::kCols + t - kTileRows : i * kTileRows + t;
  memory.factor[t] = side.factor[at];
  memory.id[t] = side.id[at];
  memory.scale[t] = side.scale[at];
}

// A tile's elements into shared memory.
template <class Tile, class Memory>
__device__ __forceinline__ void stage_tile(const typename Tile::Accumulator& c, const Memory& memory) {
  using T = typename Tile::Value;
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
    for (int u = 0; u < Tile::kThreadCols; u += 2) {
      T* place = memory.tile + Tile::row(r) * Memory::kStride + Tile::col(u);
      if constexpr (Tile::kPairs) {
        store_pack(place, Pack<T, 2>{{c.at(r, u), c.at(r, u + 1)}});
      } else {
        place[0] = c.at(r, u);
        place[Tile::col(u + 1) - Tile::col(u)] = c.at(r, u + 1);
      }
    }
  }
}

// Products of scaled rows, and what belongs to the tile's rows and columns.
template <class Tile, class T, class Memory>
__device__ __forceinline__ void form_tile(Tile& tile, const SimilarityCall<T>& call, int64_t i, int64_t j,
                                          const Memory& memory) {
  // Set, so that ptxas does not take what the last tile left for something that is still wanted.
  typename Tile::Accumulator c{};
  tile.multiply(c, call.image.panels, i, call.text.panels, j);
  stage_tile<Tile>(c, memory);
  load_sides(call, i, j, memory);
  __syncthreads();
}

// Cosines a thread takes at once: each time the sums are rescaled. Few doubles, whose exponentials are long.
template <class T>
constexpr int kStep = sizeof(T) == 8 ? 2 : 8;

// The statistics of one row of the tile or, where `is_column`, of one column, of `count` cosines, added to those at
// `place` unless there are none yet. One code for both: a warp has rows or columns only.
template <class Policy, class T, class Memory>
__device__ __forceinline__ void line_statistics(bool is_column, int line, int count, T* place, int64_t stride,
                                                bool first, const Memory& memory) {
  constexpr int kPack = Memory::kPack;
  constexpr int kStride = Memory::kStride;
  const int own = (is_column ? kTileRows : 0) + line, crossing = is_column ? 0 : kTileRows;
  const T* products = memory.tile + (is_column ? line : line * kStride);
  const T a = memory.scale[own], factor = memory.factor[own];
  const int64_t id = memory.id[own];
  RowState<T, Policy> state;
  if (first) {
    state.clear();
  } else {
    state.load(place, stride);
  }
#pragma unroll 1
  for (int at = 0; at < count; at += kStep<T>) {
    T c[kStep<T>];
    bool positive[kStep<T>], inside[kStep<T>];
#pragma unroll
    for (int u = 0; u < kStep<T>; u += kPack) {
      const Pack<T, kPack> other = load_pack<T, kPack>(memory.factor + crossing + at + u);
      Pack<T, kPack> product;
      if (is_column) {
#pragma unroll
        for (int v = 0; v < kPack; ++v) product.at[v] = products[(at + u + v) * kStride];
      } else {
        product = load_pack<T, kPack>(products + at + u);
      }
#pragma unroll
      for (int v = 0; v < kPack; v += 2) {
        const Pack<int64_t, 2> pair = load_pack<int64_t, 2>(memory.id + crossing + at + u + v);
        positive[u + v] = pair.at[0] == id;
        positive[u + v + 1] = pair.at[1] == id;
      }
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        // The product of the factors first, and so the same bits in the cosine's row and in its column.
        c[u + v] = product.at[v] * (factor * other.at[v]);
        inside[u + v] = at + u + v < count;
      }
    }
    state.template add<kStep<T>>(c, positive, inside, a);
  }
  state.store(place, stride);
}

// Half of the threads take a row of the tile each, the others a column.
template <class T, class Memory>
__device__ __forceinline__ void tile_statistics(const SimilarityCall<T>& call, int64_t i, int64_t j, bool first_of_row,
                                                bool first_of_column, int64_t row_strip, int64_t column_strip,
                                                const Memory& memory) {
  constexpr int kCols = Memory::kCols;
  const int64_t row0 = i * kTileRows, column0 = j * kCols;
  const int rows = static_cast<int>(smaller(call.image.rows - row0, kTileRows));
  const int columns = static_cast<int>(smaller(call.text.rows - column0, kCols));
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const bool is_column = thread >= kTileRows;
  const int line = thread - (is_column ? kTileRows : 0);
  if (line >= (is_column ? columns : rows)) return;
  const SimilarityRows<T>& side = is_column ? call.text : call.image;
  T* place = side.statistics + (is_column ? column_strip : row_strip) * kStatistics * side.padded +
             (is_column ? column0 : row0) + line;
  const bool first = is_column ? first_of_column : first_of_row;
  with_policy<T>(call.kind, [&](auto policy) {
    line_statistics<decltype(policy)>(is_column, line, is_column ? rows : columns, place, side.padded, first, memory);
  });
}

// Calls f(row, column) for packs of the tile's first `rows` rows. A thread's packs are all in one column.
template <class Memory>
__device__ __forceinline__ int pack_column() {
  return lane_index() % Memory::kRowPacks * Memory::kPack;
}
template <class Memory, class F>
__device__ __forceinline__ void for_packs(int rows, const F& f) {
  constexpr int kStep = kTileThreads / Memory::kRowPacks;
  for (int row = static_cast<int>(threadIdx.x) / Memory::kRowPacks; row < rows; row += kStep)
    f(row, pack_column<Memory>());
}

template <class T, class Memory>
__device__ void keep_tile(const SimilarityCall<T>& call, int64_t i, int64_t j, const Memory& memory) {
  constexpr int kPack = Memory::kPack;
  T* out = call.kept + i * kTileRows * call.kept_stride + j * Memory::kCols;
  for_packs<Memory>(static_cast<int>(smaller(call.image.rows - i * kTileRows, kTileRows)), [&](int row, int column) {
    Pack<T, kPack> c = load_pack<T, kPack>(memory.tile + row * Memory::kStride + column);
#pragma unroll
    for (int u = 0; u < kPack; ++u) c.at[u] *= memory.factor[row] * memory.factor[kTileRows + column + u];
    store_pack(out + row * call.kept_stride + column, c);
  });
}

// ---- Losses and coefficients from the statistics; one thread a row ----

template <class Policy, class T>
__device__ __forceinline__ RowResult finalise_row(const SimilarityCall<T>& call, const SimilarityRows<T>& side,
                                                  int64_t row, int64_t& positives) {
  const T a = side.scale[row];
  const auto part = [&](int64_t strip) { return side.statistics + strip * kStatistics * side.padded + row; };
  RowState<T, Policy> state, other;
  state.load(part(0), side.padded);
  positives = static_cast<int64_t>(state.positives);
  for (int64_t strip = 1; strip < side.strips; ++strip) {
    other.load(part(strip), side.padded);
    positives += static_cast<int64_t>(other.positives);
    state.merge(other, a);
  }
  T coefficient[kCoefficients];
  RowResult result = Policy::finish(call.parameters, static_cast<double>(a), positives, side.entries, state.maxima,
                                    state.sums, coefficient);
  for (int f = 0; f < kCoefficients; ++f) side.coefficient[f * side.padded + row] = coefficient[f];
  side.along[row] = static_cast<T>(result.along);
  if (call.kind == SimilarityLoss::cmpm) result.bound *= static_cast<double>(a);
  return result;
}

// `scratch` is shared memory for kWarp numbers.
template <class T>
__device__ void finalise_rows(const SimilarityCall<T>& call, double* scratch) {
  const int64_t of_image = ceil_div(call.image.rows, kTileThreads);
  const int64_t tasks = of_image + ceil_div(call.text.rows, kTileThreads);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const SimilarityRows<T>& side = task < of_image ? call.image : call.text;
    const int64_t at = task < of_image ? task : task - of_image;
    const int64_t row = at * kTileThreads + threadIdx.x;
    RowResult result{0, 0, 0};
    int64_t positives = 0;
    if (row < side.rows)
      with_policy<T>(call.kind,
                     [&](auto policy) { result = finalise_row<decltype(policy)>(call, side, row, positives); });
    const double loss = block_sum(result.loss, scratch);
    const double along = block_sum(result.along, scratch);
    const double valid = block_sum(positives > 0 ? 1.0 : 0.0, scratch);
    const double bound = block_reduce(result.bound, [](double a, double b) { return greater_of(a, b); }, scratch);
    if (threadIdx.x == 0) {
      double* partial = side.loss_partials + at * kLossPartials;
      partial[0] = loss;
      partial[1] = along;
      partial[2] = valid;
      partial[3] = bound;
    }
  }
}

// The loss, the gradient of the logit scale and the scalars of pass 2, by one block; written where `write`.
template <class T>
__device__ SimilarityScalars<T> total(const SimilarityCall<T>& call, double* scratch, bool write) {
  SimilarityScalars<T> scalars{};
  double sums[2][2];
  double bound = 0;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const SimilarityRows<T>& side = s == 0 ? call.image : call.text;
    const int64_t tasks = ceil_div(side.rows, kTileThreads);
    double loss = 0, along = 0, valid = 0, largest = 0;
    for (int64_t task = threadIdx.x; task < tasks; task += kTileThreads) {
      const double* partial = side.loss_partials + task * kLossPartials;
      loss += partial[0];
      along += partial[1];
      valid += partial[2];
      largest = greater_of(partial[3], largest);
    }
    loss = block_sum(loss, scratch);
    along = block_sum(along, scratch);
    valid = block_sum(valid, scratch);
    largest = block_reduce(largest, [](double a, double b) { return greater_of(a, b); }, scratch);
    double weight = 1;
    if (call.kind == SimilarityLoss::info_nce) weight = valid > 0 ? 0.5 / valid : 0.0;
    if (call.kind == SimilarityLoss::sdm || call.kind == SimilarityLoss::cmpm)
      weight = 1 / static_cast<double>(side.rows);
    scalars.weight[s] = static_cast<T>(weight);
    sums[s][0] = weight * loss;
    sums[s][1] = weight * along;
    bound += weight * largest;
  }
  const T logit = logit_factor(call);
  scalars.block_scale = T(1);
  // float16 reaches from 2^-24 to 2^15: the largest possible value is put at its upper end.
  if (call.scale_gradient_block && bound > 0) {
    const int exponent = 13 - ilogb(bound);
    scalars.block_scale = static_cast<T>(scalbn(1.0, exponent < -100 ? -100 : exponent > 100 ? 100 : exponent));
  }
  scalars.factor =
      call.kind == SimilarityLoss::info_nce || call.kind == SimilarityLoss::sdm ? static_cast<T>(fabs(logit)) : T(1);
  if (write && threadIdx.x == 0) {
    *call.loss = static_cast<T>(sums[0][0] + sums[1][0]);
    if (call.grad_scale != nullptr) *call.grad_scale = static_cast<T>((sums[0][1] + sums[1][1]) * (logit < 0 ? -1 : 1));
    *call.scalars = scalars;
  }
  return scalars;
}

// ---- Pass 2: dL/dc of a tile ----

// Coefficients of the tile's rows and columns, weighted; zero outside.
template <class T, class Memory>
__device__ void load_coefficients(const SimilarityCall<T>& call, int64_t i, int64_t j, const T* weight,
                                  const Memory& memory) {
  const int t = static_cast<int>(threadIdx.x);
  const bool is_text = t >= kTileRows;
  if (is_text && t - kTileRows >= Memory::kCols) return;
  const SimilarityRows<T>& side = is_text ? call.text : call.image;
  const int64_t at = is_text ? j * Memory::kCols + t - kTileRows : i * kTileRows + t;
  T k[kCoefficients] = {};
  if (at < side.rows) {
    for (int f = 0; f < kCoefficients; ++f) k[f] = side.coefficient[f * side.padded + at];
    // CMPM: dL/dc = |v| dL/d(logit).
    const T by = weight[is_text ? 1 : 0] * (call.kind == SimilarityLoss::cmpm ? side.scale[at] : T(1));
    with_policy<T>(call.kind, [&](auto policy) { decltype(policy)::weigh(by, k); });
  }
  for (int f = 0; f < kCoefficients; ++f) memory.coefficient[t * kCoefficients + f] = k[f];
}

// Calls sink(row, column, pack) with packs of dL/dc, times the factors that make a product with scaled rows of one with
// unit rows, and times `block_scale`. The source holds products of scaled rows where `raw`, else cosines.
template <class Policy, class T, class Sink, class Memory>
__device__ __forceinline__ void tile_gradient(const T* source, int64_t stride, bool raw, int rows, T block_scale,
                                              const Memory& memory, const Sink& sink) {
  constexpr int kPack = Memory::kPack;
  const int column = pack_column<Memory>();
  T of_column[kPack][kCoefficients], column_factor[kPack], column_scale[kPack];
  int64_t column_id[kPack];
#pragma unroll
  for (int u = 0; u < kPack; ++u) {
    const int at = kTileRows + column + u;
#pragma unroll
    for (int f = 0; f < kCoefficients; ++f) of_column[u][f] = memory.coefficient[at * kCoefficients + f];
    column_factor[u] = memory.factor[at];
    column_scale[u] = memory.scale[at];
    column_id[u] = memory.id[at];
  }
  for_packs<Memory>(rows, [&](int row, int at) {
    Pack<T, kPack> c = load_pack<T, kPack>(source + row * stride + at);
    T of_row[kCoefficients];
#pragma unroll
    for (int f = 0; f < kCoefficients; ++f) of_row[f] = memory.coefficient[row * kCoefficients + f];
    const T row_scale = memory.scale[row], row_factor = memory.factor[row];
    const int64_t id = memory.id[row];
#pragma unroll
    for (int u = 0; u < kPack; ++u) {
      const bool positive = column_id[u] == id;
      const T factors = row_factor * column_factor[u];
      const T cosine = raw ? c.at[u] * factors : c.at[u];
      const T both = Policy::gradient(cosine, row_scale, positive, of_row) +
                     Policy::gradient(cosine, column_scale[u], positive, of_column[u]);
      c.at[u] = both * (factors * block_scale);
    }
    sink(row, at, c);
  });
}

template <class Element, class T, class Memory>
__device__ __forceinline__ void gradient_to_block(const SimilarityCall<T>& call, int64_t i, int64_t j, const T* source,
                                                  int64_t stride, bool raw, const SimilarityBlock& block,
                                                  const Memory& memory) {
  constexpr int kPack = Memory::kPack;
  Element* out = reinterpret_cast<Element*>(block.out) + (i - block.first_row_tile) * kTileRows * block.stride +
                 (j - block.first_column_tile) * Memory::kCols;
  const int rows = static_cast<int>(smaller(call.image.rows - i * kTileRows, kTileRows));
  with_policy<T>(call.kind, [&](auto policy) {
    tile_gradient<decltype(policy)>(source, stride, raw, rows, call.scalars->block_scale, memory,
                                    [&](int row, int column, const Pack<T, kPack>& g) {
                                      Pack<Element, kPack> narrow;
#pragma unroll
                                      for (int u = 0; u < kPack; ++u) narrow.at[u] = from_accumulate<Element>(g.at[u]);
                                      store_pack(out + row * block.stride + column, narrow);
                                    });
  });
}

// Zero outside the matrix.
template <class T, class Memory>
__device__ __forceinline__ void gradient_in_place(const SimilarityCall<T>& call, int64_t i, int64_t j, T block_scale,
                                                  const Memory& memory) {
  constexpr int kPack = Memory::kPack;
  constexpr int kStride = Memory::kStride;
  const int64_t rows = call.image.rows - i * kTileRows, columns = call.text.rows - j * Memory::kCols;
  with_policy<T>(call.kind, [&](auto policy) {
    tile_gradient<decltype(policy)>(memory.tile, kStride, true, kTileRows, block_scale, memory,
                                    [&](int row, int column, Pack<T, kPack> g) {
#pragma unroll
                                      for (int u = 0; u < kPack; ++u)
                                        if (row >= rows || column + u >= columns) g.at[u] = T(0);
                                      store_pack(memory.tile + row * kStride + column, g);
                                    });
  });
}

// dL/dc in shared memory as operand of the images' gradient and, transposed, of the texts'.
template <class Element, class T, class Memory>
__device__ void gradient_to_panels(const SimilarityCall<T>& call, int64_t i, int64_t j, const Memory& memory) {
  constexpr int kCols = Memory::kCols;
  constexpr int kStride = Memory::kStride;
  constexpr int kPack = kPackBytes / static_cast<int>(sizeof(Element));
  const auto write = [](const Panels& panels, int64_t row, int64_t column, const T* source, int step) {
    if (column >= panels.k_chunks * kPanelColumns<Element>) return;
    Pack<Element, kPack> out;
#pragma unroll
    for (int u = 0; u < kPack; ++u) out.at[u] = from_accumulate<Element>(source[u * step]);
    store_pack(panel_element<Element>(panels, row, column), out);
  };
  const int t = static_cast<int>(threadIdx.x);
  if (call.image.gradient != nullptr)
    for (int at = t; at < kTileRows * kCols / kPack; at += kTileThreads) {
      const int row = at / (kCols / kPack), column = at % (kCols / kPack) * kPack;
      write(call.image.gradient_panels, i * kTileRows + row, j * kCols + column, memory.tile + row * kStride + column,
            1);
    }
  if (call.text.gradient != nullptr)
    for (int at = t; at < kTileRows * kCols / kPack; at += kTileThreads) {
      const int column = at % kCols, row = at / kCols * kPack;
      write(call.text.gradient_panels, j * kCols + column, i * kTileRows + row, memory.tile + row * kStride + column,
            kStride);
    }
}

// A tile of a product with dL/dc, its columns counted in the engine's, into `out`.
template <class Tile, class T, class Memory>
__device__ __forceinline__ void product_tile(Tile& tile, const SimilarityRows<T>& side, const Panels& other,
                                             int64_t row_tile, int64_t column_tile, const Memory& memory) {
  typename Tile::Accumulator c;
  tile.multiply_nn(c, side.gradient_panels, row_tile, other, column_tile);
  stage_tile<Tile>(c, memory);
  __syncthreads();
  const int64_t width = side.features.width, row0 = row_tile * kTileRows, column0 = column_tile * Tile::kCols;
  const int rows = static_cast<int>(smaller(side.rows - row0, kTileRows));
  const int columns = static_cast<int>(smaller(width - column0, Tile::kCols));
  T* out = side.gradient + row0 * width + column0;
  for (int row = warp_index(); row < rows; row += kTileThreads / kWarp)
    for (int column = lane_index(); column < columns; column += kWarp)
      out[row * width + column] = memory.tile[row * Memory::kStride + column];
  __syncthreads();
}

// ---- From products with dL/dc to gradients, in place; one warp a row ----

template <class T>
__device__ void finish_rows(const SimilarityCall<T>& call, const SimilarityScalars<T>& scalars) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kTileThreads / kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kTileThreads / kWarp) + warp_index();
  const int64_t of_image = call.image.gradient ? call.image.rows : 0;
  const int64_t of_text = call.text.gradient ? call.text.rows : 0;
  for (int64_t at = first; at < of_image + of_text; at += warps) {
    const bool is_text = at >= of_image;
    const SimilarityRows<T>& side = is_text ? call.text : call.image;
    const int64_t row = is_text ? at - of_image : at;
    const int64_t width = side.features.width;
    T* gradient = side.gradient + row * width;
    const double inverse = side.inverse[row];
    const T of_unit = T(1) / (static_cast<T>(fabs(side.factor[row])) * scalars.block_scale);
    const auto unit = [&](int64_t k) { return static_cast<T>(element_at(side.features, row, k) * inverse); };
    T along = 0;
    for (int64_t k = lane_index(); k < width; k += kWarp) along += gradient[k] * of_unit * unit(k);
    along = warp_sum(along);
    const double by = static_cast<double>(scalars.factor) * inverse;
    T of_norm = 0;
    if (call.kind == SimilarityLoss::cmpm) of_norm = scalars.weight[is_text ? 1 : 0] * side.along[row];
    for (int64_t k = lane_index(); k < width; k += kWarp) {
      const T u = unit(k);
      gradient[k] = static_cast<T>(by * static_cast<double>(gradient[k] * of_unit - along * u)) + of_norm * u;
    }
  }
}

}  // namespace lcr2s::cuda
