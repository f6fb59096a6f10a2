#pragma once

#include <cuda_runtime.h>

#include "panel.h"
#include "ptx.h"

// Tile products: 128 x kCols elements of A B^T by a block of 256 threads, in registers, from panels (panel.h).
//
//   TileSimt<T, kCols>   (tile_simt.h)   float, double: plain multiply-add, exact
//   TileMma<T, kCols>    (tile_mma.h)    BFloat16, Half: mma.sync
//   TileWgmma<T, kCols>  (tile_wgmma.h)  BFloat16, Half: wgmma, on sm_90a alone; wgmma_runs_on(capability) says when
//
// kCols is 128 (the default) or 64. Every engine offers the same:
//
//   template <class Tile>
//   __global__ void __launch_bounds__(Tile::kThreads, 2) kernel(Panels a, Panels b, ...) {
//     if constexpr (Tile::kAvailable) {                         // empty where the architecture lacks the instructions
//       char* shared = dynamic_shared();                        // Tile::kSharedBytes at least, aligned to 1024
//       Tile tile(shared);                                      // once in a kernel
//       typename Tile::Accumulator c;
//       tile.multiply(c, a, row_tile, b, column_tile);          // the tiles count in 128 rows and in kCols columns
//       Tile::for_each(c, [&](int row, int col, float& value) { // inside the tile; unrolled
//         if (row0 + row < a.rows && col0 + col < b.rows) ...   // beyond: 0, or NaN where the other operand has NaN
//       });
//     }
//   }
//
// All threads of the block call everything here together. The operands have the same k_chunks.
//
// After `multiply` (it ends with a barrier) and until the next one begins, the first kScratchBytes of `shared` are the
// caller's, for instance for the reductions; the caller synchronises its own uses. Two products may be live at once, in
// two accumulators: with kCols = 128 that is 128 registers a thread (one block a multiprocessor), with 64 half of it.
//
// A thread holds all crossings of kThreadRows rows with kThreadCols columns: Tile::row(r) and Tile::col(c) are their
// places in the tile, c.at(r, j) the value. r and j are to be constants after unrolling.
//
// Reductions. State is any trivially copyable struct of 4-byte words.
//   Tile::template reduce_rows<State>(
//       scratch,                       // kReduceRowsBytes<State> of shared memory, not in use by other threads
//       [&](int r) { State s; for (int j = 0; j < Tile::kThreadCols; ++j) ... c.at(r, j) ...; return s; },
//       [](State& into, const State& from) { ... },
//       [&](int row, const State& s) { ... });    // once for each of the tile's 128 rows, by some one thread
//   Tile::template reduce_cols<State>(scratch, [&](int j) { ... over r < Tile::kThreadRows ... }, merge, emit);
// Both end with a barrier if they used scratch. The order of merging is fixed, lower rows and
// columns first, so the bits are the same in every run. `#pragma unroll` belongs on loops over r and j.
//
// Where the result goes: store_rows<Out>(c, out, stride, rows, cols) writes rows x cols of the tile (clipped) to a
// row-major matrix; store_panels<Out>(c, panels, row_tile, column_tile) and store_panels_transposed write it as operand
// of a further product. Padding must be written too: set values outside the matrix to zero first.
//
// TileSimt and TileMma also offer multiply_nn(c, a, row_tile, b, column_tile): A B rather than A B^T, where the columns
// of A (panels) are the rows of B (panels): 128 rows by columns [kCols column_tile, + kCols) of B. The k chunks of A
// must not reach beyond the row tiles of B; both are padded with zeros there. Columns beyond B's chunks hold copies.
//
// Nothing here has been timed. By design: TileWgmma keeps three chunks of 32 KiB (four of 24 KiB for kCols = 64) in
// flight and leaves room for two blocks a multiprocessor, whose products hide each other's epilogues; TileMma and
// TileSimt have two stages, which fits the 99 KiB of the smallest supported architecture. Two blocks have 128 registers
// a thread: enough for a product, reductions and one tile a block; a block that loops over tiles and reduces wants
// more. In double take kCols = 64: two products at once spill with 128, and unrolled epilogues take seconds to compile.
namespace lcr2s::cuda {

// Whether a launch on a device of this capability takes TileWgmma. Its kernels are empty unless built for sm_90a.
inline bool wgmma_runs_on(int capability) {
#if defined(LCR2S_EMULATE_CUDA) || defined(LCR2S_CUDA_SM90A)
  return capability == 90;
#else
  static_cast<void>(capability);
  return false;
#endif
}

constexpr int kTileRows = kPanelRows;
constexpr int kTileThreads = 256;

namespace tile_detail {

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

template <class State>
struct Words {
  static_assert(sizeof(State) % 4 == 0);
  static constexpr int kCount = sizeof(State) / 4;
  uint32_t word[kCount];

  __device__ __forceinline__ explicit Words(const State& state) { memcpy(word, &state, sizeof(State)); }
  __device__ __forceinline__ State state() const {
    State result;
    memcpy(&result, word, sizeof(State));
    return result;
  }
};

// Word by word: a choice between two structs would be one between addresses, and put them in local memory.
template <class State>
__device__ __forceinline__ State select(bool first, const State& a, const State& b) {
  Words<State> x(a);
  const Words<State> y(b);
#pragma unroll
  for (int i = 0; i < Words<State>::kCount; ++i) x.word[i] = first ? x.word[i] : y.word[i];
  return x.state();
}

template <class State>
__device__ __forceinline__ State shuffle_xor(const State& state, int distance) {
  Words<State> x(state);
#pragma unroll
  for (int i = 0; i < Words<State>::kCount; ++i) x.word[i] = __shfl_xor_sync(0xffffffffu, x.word[i], distance);
  return x.state();
}

// kItems states in each of kLanes lanes (kStep apart, this one being number `slot`): each round halves the lanes, and
// while there are items to share out, the items too. Leaves item slot / (kLanes / kItems), merged, in state[0].
template <int kItems, int kLanes, int kStep, class State, class Merge>
__device__ __forceinline__ void merge_lanes(State* state, int slot, const Merge& merge) {
  if constexpr (kLanes > 1) {
    constexpr int kHalf = kLanes / 2;
    constexpr int kKept = kItems > 1 ? kItems / 2 : 1;
    const bool upper = (slot & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const State high = state[kItems > 1 ? kKept + i : i];
      const State mine = select(upper, high, state[i]);
      const State other = tile_detail::shuffle_xor(select(upper, state[i], high), kHalf * kStep);
      State merged = select(upper, other, mine);
      merge(merged, select(upper, mine, other));
      state[i] = merged;
    }
    merge_lanes<kKept, kHalf, kStep>(state, slot, merge);
  }
}

}  // namespace tile_detail

// What all engines share, given where a thread's elements lie. A layout has
//   Element, Value        of the operands, of the accumulators
//   kCols, kThreadRows, kThreadCols
//   kWarpRows, kWarpCols  how the eight warps divide the tile
//   kLaneCols             neighbouring lanes that hold the same rows; 32 / kLaneCols lanes hold the same columns
//   kPairs                columns 2 j and 2 j + 1 of a thread are neighbours
//   row(r), col(j), index(r, j)
template <class Layout>
class TileFragments : public Layout {
 public:
  using Layout::kThreadCols;
  using Layout::kThreadRows;
  using typename Layout::Value;
  static constexpr int kRows = kTileRows;
  static constexpr int kThreads = kTileThreads;

  struct Accumulator {
    Value value[kThreadRows * kThreadCols];

    __device__ __forceinline__ Value& at(int r, int j) { return value[Layout::index(r, j)]; }
    __device__ __forceinline__ Value at(int r, int j) const { return value[Layout::index(r, j)]; }
  };

  // A is Accumulator, const or not.
  template <class A, class F>
  __device__ __forceinline__ static void for_each(A& c, const F& f) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) f(Layout::row(r), Layout::col(j), c.value[Layout::index(r, j)]);
    }
  }

  template <class State>
  static constexpr int kReduceRowsBytes =
      Layout::kWarpCols > 1 ? Layout::kWarpCols * kRows * static_cast<int>(sizeof(State)) : 0;
  template <class State>
  static constexpr int kReduceColsBytes =
      Layout::kWarpRows > 1 ? Layout::kWarpRows * Layout::kCols * static_cast<int>(sizeof(State)) : 0;

  template <class State, class Partial, class Merge, class Emit>
  __device__ __forceinline__ static void reduce_rows(char* scratch, const Partial& partial, const Merge& merge,
                                                     const Emit& emit) {
    reduce<State, kThreadRows, Layout::kLaneCols, 1, Layout::kWarpCols, kRows>(
        scratch, tile_detail::lane() % Layout::kLaneCols, tile_detail::warp() % Layout::kWarpCols,
        [](int r) { return Layout::row(r); }, partial, merge, emit);
  }
  template <class State, class Partial, class Merge, class Emit>
  __device__ __forceinline__ static void reduce_cols(char* scratch, const Partial& partial, const Merge& merge,
                                                     const Emit& emit) {
    reduce<State, kThreadCols, 32 / Layout::kLaneCols, Layout::kLaneCols, Layout::kWarpRows, Layout::kCols>(
        scratch, tile_detail::lane() / Layout::kLaneCols, tile_detail::warp() / Layout::kWarpCols,
        [](int j) { return Layout::col(j); }, partial, merge, emit);
  }

  // `out` points at the tile's corner; of the tile, `rows` x `cols` are inside the matrix (more than the tile has:
  // all).
  template <class Out>
  __device__ __forceinline__ static void store_rows(const Accumulator& c, Out* out, int64_t stride, int64_t rows,
                                                    int64_t cols) {
    const bool aligned = stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Out)) == 0;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int row = Layout::row(r);
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < kThreadCols; j += 2) {
        const Pack<Out, 2> pair = converted<Out>(c, r, j);
        const int col = Layout::col(j);
        Out* place = out + row * stride + col;
        if (Layout::kPairs && aligned && col + 1 < cols) {
          store_pack(place, pair);
        } else {
          if (col < cols) place[0] = pair.at[0];
          const int next = Layout::col(j + 1);
          if (next < cols) place[next - col] = pair.at[1];
        }
      }
    }
  }

  template <class Out>
  __device__ __forceinline__ static void store_panels(const Accumulator& c, const Panels& panels, int64_t row_tile,
                                                      int64_t column_tile) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int j = 0; j < kThreadCols; j += 2) {
        const Pack<Out, 2> pair = converted<Out>(c, r, j);
        const int64_t row = row_tile * kRows + Layout::row(r);
        const int64_t col = column_tile * Layout::kCols + Layout::col(j);
        if constexpr (Layout::kPairs) {
          if (col < panels.k_chunks * kPanelColumns<Out>) store_pack(panel_element<Out>(panels, row, col), pair);
        } else {
          const int64_t next = column_tile * Layout::kCols + Layout::col(j + 1);
          if (col < panels.k_chunks * kPanelColumns<Out>) *panel_element<Out>(panels, row, col) = pair.at[0];
          if (next < panels.k_chunks * kPanelColumns<Out>) *panel_element<Out>(panels, row, next) = pair.at[1];
        }
      }
    }
  }

  // The tile's transpose: its rows are columns of `panels`.
  template <class Out>
  __device__ __forceinline__ static void store_panels_transposed(const Accumulator& c, const Panels& panels,
                                                                 int64_t row_tile, int64_t column_tile) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int64_t column = row_tile * kRows + Layout::row(r);
      if (column >= panels.k_chunks * kPanelColumns<Out>) continue;
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        const int64_t row = column_tile * Layout::kCols + Layout::col(j);
        if (row < panel_row_tiles(panels.rows) * kPanelRows)
          *panel_element<Out>(panels, row, column) = convert<Out>(c.at(r, j));
      }
    }
  }

 private:
  template <class Out>
  __device__ __forceinline__ static Out convert(Value value) {
    return from_accumulate<Out>(static_cast<Accumulate<Out>>(value));
  }
  template <class Out>
  __device__ __forceinline__ static Pack<Out, 2> converted(const Accumulator& c, int r, int j) {
    return Pack<Out, 2>{{convert<Out>(c.at(r, j)), convert<Out>(c.at(r, j + 1))}};
  }

  template <class State, int kItems, int kLanes, int kStep, int kWarps, int kCount, class Place, class Partial,
            class Merge, class Emit>
  __device__ __forceinline__ static void reduce(char* scratch, int slot, int warp_slot, const Place& place,
                                                const Partial& partial, const Merge& merge, const Emit& emit) {
    constexpr int kGroup = kItems < kLanes ? kItems : kLanes;
    constexpr int kCopies = kLanes / kGroup;
    State* states = reinterpret_cast<State*>(scratch);
#pragma unroll
    for (int first = 0; first < kItems; first += kGroup) {
      State state[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) state[i] = partial(first + i);
      tile_detail::merge_lanes<kGroup, kLanes, kStep>(state, slot, merge);
      if (slot % kCopies == 0) {
        const int at = place(first + slot / kCopies);
        if constexpr (kWarps == 1) {
          emit(at, state[0]);
        } else {
          states[warp_slot * kCount + at] = state[0];
        }
      }
    }
    if constexpr (kWarps > 1) {
      __syncthreads();
      for (int at = static_cast<int>(threadIdx.x); at < kCount; at += kThreads) {
        State state = states[at];
        for (int w = 1; w < kWarps; ++w) merge(state, states[w * kCount + at]);
        emit(at, state);
      }
      __syncthreads();
    }
  }
};

// The way of the operands into shared memory by cp.async, for the engines that read them with ordinary loads. A stage
// holds one chunk of A, kTileRows rows of 128 bytes, and as much of B as kCols rows of 128 bytes.
template <int kCols, int kStages>
class CopyPipeline {
 public:
  static constexpr int kABytes = kPanelBytes;
  static constexpr int kBBytes = kCols * kPanelRowBytes;
  static constexpr int kBytes = kStages * (kABytes + kBBytes);

  __device__ __forceinline__ explicit CopyPipeline(char* shared) : shared_(shared) {}

  // source_a(chunk): the panel; source_b(chunk, pack): the 16 bytes that become number `pack` of B's share of the
  // stage; compute(a, b): with the two shares, in order of the chunks.
  template <class SourceA, class SourceB, class Compute>
  __device__ __forceinline__ void run(int chunks, const SourceA& source_a, const SourceB& source_b,
                                      const Compute& compute) const {
    const auto load = [&](int chunk) {
      if (chunk < chunks) {
        char* stage = shared_ + chunk % kStages * (kABytes + kBBytes);
        const char* a = source_a(chunk);
#pragma unroll
        for (int i = 0; i < kABytes / kPackBytes / kTileThreads; ++i) {
          const int pack = i * kTileThreads + static_cast<int>(threadIdx.x);
          ptx::copy_async(stage + pack * kPackBytes, a + pack * kPackBytes);
        }
#pragma unroll
        for (int i = 0; i < kBBytes / kPackBytes / kTileThreads; ++i) {
          const int pack = i * kTileThreads + static_cast<int>(threadIdx.x);
          ptx::copy_async(stage + kABytes + pack * kPackBytes, source_b(chunk, pack));
        }
      }
      ptx::commit_copies();
    };
    // The caller may still be reading its scratch.
    __syncthreads();
    for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::wait_copies<kStages - 2>();
      // Everyone's copies of this chunk have arrived, and everyone is done with the stage that is filled next.
      __syncthreads();
      load(chunk + kStages - 1);
      const char* stage = shared_ + chunk % kStages * (kABytes + kBBytes);
      compute(stage, stage + kABytes);
    }
    __syncthreads();
  }

  // A B^T: B's share is a run of kCols rows of a panel.
  template <class Compute>
  __device__ __forceinline__ void run_nt(const Panels& a, int64_t a_tile, const Panels& b, int64_t b_tile,
                                         const Compute& compute) const {
    const char* a_source = panel_at(a, a_tile, 0);
    const char* b_source = panel_at(b, b_tile * kCols / kPanelRows, 0) + b_tile * kCols % kPanelRows * kPanelRowBytes;
    run(
        static_cast<int>(a.k_chunks), [&](int chunk) { return a_source + int64_t{chunk} * kPanelBytes; },
        [&](int chunk, int pack) { return b_source + int64_t{chunk} * kPanelBytes + pack * kPackBytes; }, compute);
  }

  // A B: B's share is kChunk rows (the columns of this chunk of A) of each of kCols / kChunk panels.
  template <int kChunk, class Compute>
  __device__ __forceinline__ void run_nn(const Panels& a, int64_t a_tile, const Panels& b, int64_t column_tile,
                                         const Compute& compute) const {
    constexpr int kPanelsAcross = kCols / kChunk;
    constexpr int kPacks = kChunk * kPanelRowBytes / kPackBytes;
    const char* a_source = panel_at(a, a_tile, 0);
    run(
        static_cast<int>(a.k_chunks), [&](int chunk) { return a_source + int64_t{chunk} * kPanelBytes; },
        [&](int chunk, int pack) {
          const int64_t wanted = column_tile * kPanelsAcross + pack / kPacks;
          const int64_t across = wanted < b.k_chunks ? wanted : b.k_chunks - 1;
          const int row = chunk * kChunk;
          return panel_at(b, row / kPanelRows, across) + row % kPanelRows * kPanelRowBytes + pack % kPacks * kPackBytes;
        },
        compute);
  }

 private:
  char* shared_;
};

}  // namespace lcr2s::cuda
