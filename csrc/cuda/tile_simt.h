#pragma once

#include "tile.h"

namespace lcr2s::cuda {

// 4 x 2 warps of 4 x 8 lanes. A thread's rows are 4 apart and its columns 8 apart: 16-byte loads of eight neighbouring
// rows of a panel meet every bank once.
template <class T, int kCols_>
struct SimtLayout {
  using Element = T;
  using Value = T;
  static constexpr int kCols = kCols_;
  static constexpr int kWarpRows = 4;
  static constexpr int kWarpCols = 2;
  static constexpr int kLaneCols = 8;
  static constexpr int kThreadRows = 8;
  static constexpr int kThreadCols = kCols / 16;
  static constexpr bool kPairs = false;
  static_assert(kCols == 128 || kCols == 64);

  __device__ __forceinline__ static int row(int r) {
    return tile_detail::warp() / kWarpCols * (kTileRows / kWarpRows) + 4 * r + tile_detail::lane() / kLaneCols;
  }
  __device__ __forceinline__ static int col(int j) {
    return tile_detail::warp() % kWarpCols * (kCols / kWarpCols) + kLaneCols * j + tile_detail::lane() % kLaneCols;
  }
  __device__ __forceinline__ static constexpr int index(int r, int j) { return r * kThreadCols + j; }
};

// T is float or double. Every element is summed over k in order or, where `kChunkSums`, over each chunk first: the
// error of a long sum falls by the square root of the number of chunks, for twice the registers.
template <class T, int kCols = 128, bool kChunkSums = false>
class TileSimt : public TileFragments<SimtLayout<T, kCols>> {
 public:
  using Base = TileFragments<SimtLayout<T, kCols>>;
  using typename Base::Accumulator;
  using Pipeline = CopyPipeline<kCols, 2>;
  static constexpr bool kAvailable = true;
  static constexpr int kScratchBytes = Pipeline::kBytes;
  static constexpr int kSharedBytes = kScratchBytes;

  __device__ __forceinline__ explicit TileSimt(char* shared) : pipeline_(shared) {}

  __device__ __forceinline__ void multiply(Accumulator& c, const Panels& a, int64_t row_tile, const Panels& b,
                                           int64_t column_tile) const {
    clear(c);
    pipeline_.run_nt(a, row_tile, b, column_tile, [&](const char* a_chunk, const char* b_chunk) {
      Accumulator part;
      Accumulator& sum = start(c, part);
#pragma unroll 1
      for (int byte = 0; byte < kPanelRowBytes; byte += kPackBytes) {
        KPack x[Base::kThreadRows];
        load_rows(a_chunk, byte, x);
#pragma unroll
        for (int j = 0; j < Base::kThreadCols; ++j) {
          const KPack y = load_pack<T, kPack>(reinterpret_cast<const T*>(b_chunk + panel_offset(Base::col(j), byte)));
#pragma unroll
          for (int u = 0; u < kPack; ++u)
#pragma unroll
            for (int r = 0; r < Base::kThreadRows; ++r) sum.at(r, j) += x[r].at[u] * y.at[u];
        }
      }
      if constexpr (kChunkSums) add(c, part);
    });
  }

  __device__ __forceinline__ void multiply_nn(Accumulator& c, const Panels& a, int64_t row_tile, const Panels& b,
                                              int64_t column_tile) const {
    constexpr int kChunk = kPanelColumns<T>;
    clear(c);
    pipeline_.template run_nn<kChunk>(a, row_tile, b, column_tile, [&](const char* a_chunk, const char* b_chunk) {
      Accumulator part;
      Accumulator& sum = start(c, part);
#pragma unroll 1
      for (int byte = 0; byte < kPanelRowBytes; byte += kPackBytes) {
        KPack x[Base::kThreadRows];
        load_rows(a_chunk, byte, x);
#pragma unroll
        for (int u = 0; u < kPack; ++u) {
          const int k = byte / static_cast<int>(sizeof(T)) + u;
#pragma unroll
          for (int j = 0; j < Base::kThreadCols; ++j) {
            const int col = Base::col(j);
            const T y = *reinterpret_cast<const T*>(b_chunk + col / kChunk * kChunk * kPanelRowBytes +
                                                    panel_offset(k, col % kChunk * static_cast<int>(sizeof(T))));
#pragma unroll
            for (int r = 0; r < Base::kThreadRows; ++r) sum.at(r, j) += x[r].at[u] * y;
          }
        }
      }
      if constexpr (kChunkSums) add(c, part);
    });
  }

 private:
  static constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
  using KPack = Pack<T, kPack>;

  __device__ __forceinline__ static void clear(Accumulator& c) {
#pragma unroll
    for (T& value : c.value) value = T{0};
  }
  // Where a chunk is summed.
  __device__ __forceinline__ static Accumulator& start(Accumulator& c, Accumulator& part) {
    if constexpr (!kChunkSums) return c;
    clear(part);
    return part;
  }
  __device__ __forceinline__ static void add(Accumulator& c, const Accumulator& part) {
#pragma unroll
    for (int i = 0; i < Base::kThreadRows * Base::kThreadCols; ++i) c.value[i] += part.value[i];
  }
  __device__ __forceinline__ static void load_rows(const char* a_chunk, int byte, KPack (&x)[Base::kThreadRows]) {
#pragma unroll
    for (int r = 0; r < Base::kThreadRows; ++r)
      x[r] = load_pack<T, kPack>(reinterpret_cast<const T*>(a_chunk + panel_offset(Base::row(r), byte)));
  }

  Pipeline pipeline_;
};

}  // namespace lcr2s::cuda
