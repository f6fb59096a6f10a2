#include "similarity.h"

#include "launch.h"
#include "loss_common.h"
#include "similarity_tile.h"
#include "tile_mma.h"
#include "tile_simt.h"
#include "tile_wgmma.h"

namespace lcr2s::cuda {

namespace {

template <class Tile>
using ArithmeticOf = typename Tile::Value;

using TileFloat = TileSimt<float, 128, true>;
using TileDouble = TileSimt<double, 64>;

// Blocks a multiprocessor: of those that need twice the registers, one.
template <class Tile>
constexpr int kResident = sizeof(typename Tile::Element) == 2 ? 2 : 1;

// Of the kernels without a tile product: said, lest ptxas spill for the sake of more.
template <class T>
constexpr int kLightResident = sizeof(T) == 8 ? 1 : 2;

// Whether this architecture ever runs a kernel with this engine: where wgmma is, plain mma is not asked for.
template <class Tile>
constexpr bool kRuns = Tile::kAvailable;
#if LCR2S_WGMMA && !defined(LCR2S_EMULATE_CUDA)
template <class Element>
constexpr bool kRuns<TileMma<Element>> = false;
#endif

template <class Tile>
using MemoryOf = TileMemory<typename Tile::Value, Tile::kCols>;

// Pass 1: statistics of a square of tiles, and their cosines where they are kept. Pass 2, where there is a block to
// write: dL/dc of one tile, its cosines formed again. One kernel, for the products are most of its code.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Tile>)
    similarity_tile_kernel(const __grid_constant__ SimilarityCall<ArithmeticOf<Tile>> call,
                           const __grid_constant__ SimilarityBlock block) {
  if constexpr (kRuns<Tile>) {
    using T = ArithmeticOf<Tile>;
    Tile tile(dynamic_shared());
    const MemoryOf<Tile> memory(dynamic_shared(), true);
    const bool gradient = block.out != nullptr;
    const int strip = gradient ? 1 : static_cast<int>(call.strip);
#pragma unroll 1
    for (int step = 0; step < strip * strip; ++step) {
      // Worked out anew for every tile: a product leaves no registers for what could be kept.
      const int index = opaque(static_cast<int>(blockIdx.x)), across = static_cast<int>(call.image.strips);
      const int strip_row = index / across, strip_column = index % across;
      int i = strip_row * strip + step / strip, j = strip_column * strip + step % strip;
      if (gradient) {
        const TileIndex at = tile_of_block(index, block.row_tiles, block.column_tiles);
        i = static_cast<int>(block.first_row_tile + at.row);
        j = static_cast<int>(block.first_column_tile + at.column);
      }
      if (i >= call.image.tiles || j >= call.text.tiles) continue;
      form_tile(tile, call, i, j, memory);
      if (gradient) {
        load_coefficients(call, i, j, call.scalars->weight, memory);
        __syncthreads();
        gradient_to_block<typename Tile::Element, T>(call, i, j, memory.tile, MemoryOf<Tile>::kStride, true, block,
                                                     memory);
      } else {
        tile_statistics(call, i, j, step % strip == 0, step < strip, strip_column, strip_row, memory);
        if (call.kept != nullptr) keep_tile(call, i, j, memory);
        __syncthreads();
      }
    }
  }
}

// Tiles of kept cosines, as large as those that wrote them.
template <class T>
using KeptMemory = TileMemory<T, sizeof(T) == 8 ? 64 : 128>;

// Pass 2 from the kept cosines.
template <class Element>
__global__ void __launch_bounds__(kTileThreads, kLightResident<Accumulate<Element>>)
    similarity_gradient_kept_kernel(const __grid_constant__ SimilarityCall<Accumulate<Element>> call,
                                    const __grid_constant__ SimilarityBlock block) {
  using T = Accumulate<Element>;
  const KeptMemory<T> memory(dynamic_shared(), false);
  const TileIndex at = tile_of_block(blockIdx.x, block.row_tiles, block.column_tiles);
  const int64_t i = block.first_row_tile + at.row, j = block.first_column_tile + at.column;
  load_sides(call, i, j, memory);
  load_coefficients(call, i, j, call.scalars->weight, memory);
  __syncthreads();
  const T* kept = call.kept + i * kTileRows * call.kept_stride + j * KeptMemory<T>::kCols;
  gradient_to_block<Element, T>(call, i, j, kept, call.kept_stride, false, block, memory);
}

template <class Element>
__global__ void __launch_bounds__(kTileThreads, kLightResident<Accumulate<Element>>)
    similarity_pack_kernel(const __grid_constant__ SimilarityCall<Accumulate<Element>> call) {
  pack_rows<Element>(call);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kLightResident<T>)
    similarity_finalise_kernel(const __grid_constant__ SimilarityCall<T> call) {
  finalise_rows(call, reinterpret_cast<double*>(dynamic_shared()));
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kLightResident<T>)
    similarity_total_kernel(const __grid_constant__ SimilarityCall<T> call) {
  total(call, reinterpret_cast<double*>(dynamic_shared()), true);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kLightResident<T>)
    similarity_finish_kernel(const __grid_constant__ SimilarityCall<T> call) {
  finish_rows(call, *call.scalars);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kLightResident<T>)
    similarity_add_kernel(T* sum, const T* part, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += step)
    sum[at] += part[at];
}

// Functions of their own in the cooperative kernel, for ptxas takes several times as long over one large one.
template <class Element, class T>
__device__ __attribute__((noinline)) void pack_rows_apart(const SimilarityCall<T>& call) {
  pack_rows<Element>(call);
}
template <class T>
__device__ __attribute__((noinline)) void finalise_rows_apart(const SimilarityCall<T>& call, double* scratch) {
  finalise_rows(call, scratch);
}
template <class T>
__device__ __attribute__((noinline)) SimilarityScalars<T> total_apart(const SimilarityCall<T>& call, double* scratch,
                                                                      bool write) {
  return total(call, scratch, write);
}
template <class T>
__device__ __attribute__((noinline)) void finish_rows_apart(const SimilarityCall<T>& call,
                                                            const SimilarityScalars<T>& scalars) {
  finish_rows(call, scalars);
}

// All of it in one launch: each block forms one tile of cosines, which stays in its shared memory until dL/dc is made
// of it, and the products with dL/dc are tile products too.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResident<Tile>)
    similarity_cooperative_kernel(const __grid_constant__ SimilarityCall<ArithmeticOf<Tile>> call) {
  using T = ArithmeticOf<Tile>;
  using Element = typename Tile::Element;
  Tile tile(dynamic_shared());
  const MemoryOf<Tile> memory(dynamic_shared(), true);
  double* scratch = memory.scratch;
  const int64_t i = blockIdx.x / call.text.tiles, j = blockIdx.x % call.text.tiles;
  const bool has_tile = blockIdx.x < call.image.tiles * call.text.tiles;
  pack_rows_apart<Element>(call);
  grid_barrier(call.barrier);
  if (has_tile) {
    form_tile(tile, call, i, j, memory);
    tile_statistics(call, i, j, true, true, j, i, memory);
  }
  grid_barrier(call.barrier);
  finalise_rows_apart(call, scratch);
  grid_barrier(call.barrier);
  const SimilarityScalars<T> scalars = total_apart(call, scratch, blockIdx.x == 0);
  if (!call.gradient) return;
  if (has_tile) {
    load_coefficients(call, i, j, scalars.weight, memory);
    __syncthreads();
    gradient_in_place(call, i, j, scalars.block_scale, memory);
    __syncthreads();
    gradient_to_panels<Element>(call, i, j, memory);
  }
  grid_barrier(call.barrier);
  const int64_t across = ceil_div(call.image.features.width, Tile::kCols);
  const int64_t of_image = call.image.gradient ? panel_row_tiles(call.image.rows) * across : 0;
  const int64_t of_text = call.text.gradient ? panel_row_tiles(call.text.rows) * across : 0;
  for (int64_t task = blockIdx.x; task < of_image + of_text; task += gridDim.x) {
    const bool first = task < of_image;
    const SimilarityRows<T>& side = first ? call.image : call.text;
    const SimilarityRows<T>& other = first ? call.text : call.image;
    const int64_t at = first ? task : task - of_image;
    product_tile(tile, side, other.panels, at / across, at % across, memory);
  }
  grid_barrier(call.barrier);
  finish_rows_apart(call, scalars);
}

// ---- Launches ----

template <class T>
SimilarityRows<T> rows_of(const SimilarityArgs& args, const SimilaritySide& side, const SimilaritySidePlan& plan,
                          int64_t others, int64_t element_bytes) {
  char* base = args.workspace;
  SimilarityRows<T> rows{};
  rows.features = side.features;
  rows.ids = side.ids;
  rows.wide_ids = side.wide_ids;
  rows.rows = plan.rows;
  rows.padded = plan.padded;
  rows.tiles = plan.tiles;
  rows.strips = plan.strips;
  rows.entries = others;
  rows.panels = make_panels(base + plan.panels, plan.rows, side.features.width, element_bytes);
  rows.gradient_panels = make_panels(base + plan.gradient_panels, plan.rows, others, element_bytes);
  rows.id = reinterpret_cast<int64_t*>(base + plan.ids);
  rows.inverse = reinterpret_cast<double*>(base + plan.inverse);
  rows.factor = reinterpret_cast<T*>(base + plan.factor);
  rows.scale = reinterpret_cast<T*>(base + plan.scale);
  rows.statistics = reinterpret_cast<T*>(base + plan.statistics);
  rows.coefficient = reinterpret_cast<T*>(base + plan.coefficient);
  rows.along = reinterpret_cast<T*>(base + plan.along);
  rows.loss_partials = reinterpret_cast<double*>(base + plan.loss_partials);
  rows.operand = static_cast<char*>(side.operand);
  rows.operand_stride = side.operand_stride;
  rows.gradient = static_cast<T*>(side.gradient);
  return rows;
}

template <class T>
SimilarityCall<T> call_of(const SimilarityArgs& args) {
  const SimilarityPlan& plan = args.plan;
  const int64_t element_bytes = args.element == DType::float64 ? 8 : args.element == DType::float32 ? 4 : 2;
  SimilarityCall<T> call{};
  call.kind = args.kind;
  call.parameters = SimilarityParameters{log(args.eps), args.eps, args.margin, args.tau,
                                         args.kind == SimilarityLoss::cmpm && args.l2_target};
  call.image = rows_of<T>(args, args.image, plan.image, plan.text.rows, element_bytes);
  call.text = rows_of<T>(args, args.text, plan.text, plan.image.rows, element_bytes);
  call.strip = plan.strip;
  call.gradient = plan.gradient;
  call.scale_gradient_block = args.element == DType::float16;
  call.logit_scale = static_cast<const T*>(args.logit_scale);
  call.scalars = reinterpret_cast<SimilarityScalars<T>*>(args.workspace + plan.scalars);
  call.barrier = reinterpret_cast<unsigned*>(args.workspace + plan.barrier);
  call.kept = plan.path == SimilarityPath::kept ? static_cast<T*>(args.kept) : nullptr;
  call.kept_stride = plan.kept_stride;
  call.loss = static_cast<T*>(args.loss);
  call.grad_scale = static_cast<T*>(args.grad_scale);
  return call;
}

template <class Tile>
constexpr int64_t tile_shared_bytes() {
  constexpr int64_t bytes = MemoryOf<Tile>::bytes(Tile::kScratchBytes, Tile::kSharedBytes);
  static_assert(bytes > 0);
  return bytes;
}

int64_t blocks_for_rows(const SimilarityPlan& plan) {
  const int64_t wanted = ceil_div(plan.image.padded + plan.text.padded, kTileThreads / kWarp);
  return wanted < 4096 ? wanted : 4096;
}

int64_t finalise_tasks(const SimilarityPlan& plan) {
  return ceil_div(plan.image.rows, kFinaliseRows) + ceil_div(plan.text.rows, kFinaliseRows);
}

// Steps until one fails.
class Launches {
 public:
  template <class F>
  Launches& then(const F& step) {
    if (error_ == nullptr) error_ = step();
    return *this;
  }
  const char* error() const { return error_; }

 private:
  const char* error_ = nullptr;
};

template <class Tile>
const char* statistics(const SimilarityArgs& args, void* stream) {
  using T = ArithmeticOf<Tile>;
  using Element = typename Tile::Element;
  const SimilarityCall<T> call = call_of<T>(args);
  const int64_t scratch = MemoryOf<Tile>::kScratchBytes;
  return Launches()
      .then([&] {
        return launch(similarity_pack_kernel<Element>, blocks_for_rows(args.plan), kTileThreads, 0, stream, call);
      })
      .then([&] {
        return launch(similarity_tile_kernel<Tile>, args.plan.image.strips * args.plan.text.strips, Tile::kThreads,
                      tile_shared_bytes<Tile>(), stream, call, SimilarityBlock{});
      })
      .then([&] {
        return launch(similarity_finalise_kernel<T>, finalise_tasks(args.plan), kTileThreads, scratch, stream, call);
      })
      .then([&] { return launch(similarity_total_kernel<T>, 1, kTileThreads, scratch, stream, call); })
      .error();
}

template <class Tile>
const char* cooperative(const SimilarityArgs& args, void* stream) {
  using T = ArithmeticOf<Tile>;
  const SimilarityCall<T> call = call_of<T>(args);
  return Launches()
      .then([&] { return zero(call.barrier, sizeof(unsigned), stream); })
      .then([&] {
        return launch_cooperative(similarity_cooperative_kernel<Tile>, args.plan.cooperative_blocks, Tile::kThreads,
                                  tile_shared_bytes<Tile>(), stream, call);
      })
      .error();
}

template <class Tile>
const char* gradient_block(const SimilarityArgs& args, const SimilarityBlock& block, void* stream) {
  using T = ArithmeticOf<Tile>;
  const SimilarityCall<T> call = call_of<T>(args);
  const int64_t tiles = block.row_tiles * block.column_tiles;
  if (args.plan.path == SimilarityPath::kept)
    return launch(similarity_gradient_kept_kernel<typename Tile::Element>, tiles, kTileThreads,
                  KeptMemory<T>::kSideBytes, stream, call, block);
  return launch(similarity_tile_kernel<Tile>, tiles, Tile::kThreads, tile_shared_bytes<Tile>(), stream, call, block);
}

template <class Tile>
struct Engine {
  using Type = Tile;
};

// step(Engine<Tile>{}) with the fastest engine for `element` here.
template <class F>
const char* with_tile(DType element, const F& step) {
  const bool wgmma = wgmma_runs_on(current_device().capability);
  switch (element) {
    case DType::float32:
      return step(Engine<TileFloat>{});
    case DType::float64:
      return step(Engine<TileDouble>{});
    case DType::bfloat16:
      return wgmma ? step(Engine<TileWgmma<BFloat16>>{}) : step(Engine<TileMma<BFloat16>>{});
    case DType::float16:
      return wgmma ? step(Engine<TileWgmma<Half>>{}) : step(Engine<TileMma<Half>>{});
  }
  return "unknown dtype";
}

// With one that has multiply_nn too; the problems are small, and fewer kernels are quicker built. That is also why
// float64, which is there for tests, has this path in the emulator only.
template <class F>
const char* with_cooperative_tile(DType element, const F& step) {
  switch (element) {
    case DType::float32:
      return step(Engine<TileSimt<float, 64, true>>{});
    case DType::float64:
#ifdef LCR2S_EMULATE_CUDA
      return step(Engine<TileDouble>{});
#else
      return "float64 has no cooperative kernel";
#endif
    case DType::bfloat16:
      return step(Engine<TileMma<BFloat16, 64>>{});
    case DType::float16:
      return step(Engine<TileMma<Half, 64>>{});
  }
  return "unknown dtype";
}

template <class T>
const char* finish(const SimilarityArgs& args, void* stream) {
  return launch(similarity_finish_kernel<T>, blocks_for_rows(args.plan), kTileThreads, 0, stream, call_of<T>(args));
}

template <class T>
const char* add(void* sum, const void* part, int64_t count, void* stream) {
  const int64_t wanted = ceil_div(count, kTileThreads);
  return launch(similarity_add_kernel<T>, wanted < 4096 ? wanted : 4096, kTileThreads, 0, stream, static_cast<T*>(sum),
                static_cast<const T*>(part), count);
}

}  // namespace

int64_t similarity_cooperative_blocks(DType element) {
  int64_t blocks = 0;
  with_cooperative_tile(element, [&](auto engine) -> const char* {
    using Tile = typename decltype(engine)::Type;
    blocks = max_cooperative_blocks(similarity_cooperative_kernel<Tile>, Tile::kThreads, tile_shared_bytes<Tile>());
    return nullptr;
  });
  return blocks;
}

const char* similarity(const SimilarityArgs& args, void* stream) {
  if (args.plan.path == SimilarityPath::cooperative)
    return with_cooperative_tile(
        args.element, [&](auto engine) { return cooperative<typename decltype(engine)::Type>(args, stream); });
  return with_tile(args.element,
                   [&](auto engine) { return statistics<typename decltype(engine)::Type>(args, stream); });
}

const char* similarity_block(const SimilarityArgs& args, int64_t row, int64_t column, void* stream) {
  const SimilarityPlan& plan = args.plan;
  const auto tiles = [](int64_t begin, int64_t size, int64_t end, int64_t tile) {
    return ceil_div(end - begin < size ? end - begin : size, tile);
  };
  const SimilarityBlock block{row / kTileRows,
                              column / plan.tile_columns,
                              tiles(row, plan.block_rows, plan.image.rows, kTileRows),
                              tiles(column, plan.block_columns, plan.text.rows, plan.tile_columns),
                              static_cast<char*>(args.block),
                              plan.block_columns};
  return with_tile(args.element,
                   [&](auto engine) { return gradient_block<typename decltype(engine)::Type>(args, block, stream); });
}

const char* similarity_finish(const SimilarityArgs& args, void* stream) {
  return args.element == DType::float64 ? finish<double>(args, stream) : finish<float>(args, stream);
}

const char* similarity_add(bool wide, void* sum, const void* part, int64_t count, void* stream) {
  return wide ? add<double>(sum, part, count, stream) : add<float>(sum, part, count, stream);
}

}  // namespace lcr2s::cuda
