#pragma once

#include "tile.h"

namespace lcr2s::cuda {

// 2 x 4 warps of 64 x 32 elements, or 4 x 2 of 32 x 32 where kCols is 64; inside, blocks of 16 x 8 as mma.m16n8k16
// leaves them.
template <class T, int kCols_>
struct MmaLayout {
  using Element = T;
  using Value = float;
  static constexpr int kCols = kCols_;
  static constexpr int kWarpCols = kCols / 32;
  static constexpr int kWarpRows = 8 / kWarpCols;
  static constexpr int kLaneCols = 4;
  static constexpr int kThreadRows = kTileRows / kWarpRows / 8;
  static constexpr int kThreadCols = 8;
  static constexpr bool kPairs = true;
  static_assert(kCols == 128 || kCols == 64);

  __device__ __forceinline__ static int first_row() {
    return tile_detail::warp() / kWarpCols * (kTileRows / kWarpRows);
  }
  __device__ __forceinline__ static int first_col() { return tile_detail::warp() % kWarpCols * 32; }
  __device__ __forceinline__ static int row(int r) { return first_row() + 8 * r + tile_detail::lane() / kLaneCols; }
  __device__ __forceinline__ static int col(int j) {
    return first_col() + 8 * (j / 2) + 2 * (tile_detail::lane() % kLaneCols) + j % 2;
  }
  // Block (r / 2, j / 2), then the order of its four values.
  __device__ __forceinline__ static constexpr int index(int r, int j) {
    return (r / 2 * (kThreadCols / 2) + j / 2) * 4 + r % 2 * 2 + j % 2;
  }
};

// T is BFloat16 or Half.
template <class T, int kCols = 128>
class TileMma : public TileFragments<MmaLayout<T, kCols>> {
 public:
  using Base = TileFragments<MmaLayout<T, kCols>>;
  using typename Base::Accumulator;
  using Pipeline = CopyPipeline<kCols, 2>;
  static constexpr bool kAvailable = true;
  static constexpr int kScratchBytes = Pipeline::kBytes;
  static constexpr int kSharedBytes = kScratchBytes;

  __device__ __forceinline__ explicit TileMma(char* shared) : pipeline_(shared) {}

  __device__ __forceinline__ void multiply(Accumulator& c, const Panels& a, int64_t row_tile, const Panels& b,
                                           int64_t column_tile) const {
    const int lane = tile_detail::lane();
    const int b_row = Base::first_col() + lane % 8 + lane / 16 * 8;
    const int b_byte = lane / 8 % 2 * kPackBytes;
    clear(c);
    pipeline_.run_nt(a, row_tile, b, column_tile, [&](const char* a_chunk, const char* b_chunk) {
      steps(c, a_chunk, [&](int step, int block, uint32_t (&out)[4]) {
        // Rows are columns of the product: two blocks of eight, for each the lower and the upper half of k.
        ptx::load_matrices(out, b_chunk + panel_offset(b_row + 8 * block, step * kStepBytes + b_byte));
      });
    });
  }

  __device__ __forceinline__ void multiply_nn(Accumulator& c, const Panels& a, int64_t row_tile, const Panels& b,
                                              int64_t column_tile) const {
    constexpr int kChunk = kPanelColumns<T>;
    const int lane = tile_detail::lane();
    const int b_row = lane % 16;
    clear(c);
    pipeline_.template run_nn<kChunk>(a, row_tile, b, column_tile, [&](const char* a_chunk, const char* b_chunk) {
      steps(c, a_chunk, [&](int step, int block, uint32_t (&out)[4]) {
        const int col = Base::first_col() + 8 * block + lane / 16 * 8;
        ptx::load_matrices_transposed(
            out, b_chunk + col / kChunk * kChunk * kPanelRowBytes + panel_offset(16 * step + b_row, col % kChunk * 2));
      });
    });
  }

 private:
  static constexpr int kRowBlocks = Base::kThreadRows / 2;
  static constexpr int kColBlocks = Base::kThreadCols / 2;
  // A step of 16 in k.
  static constexpr int kStepBytes = 32;

  __device__ __forceinline__ static void clear(Accumulator& c) {
#pragma unroll
    for (float& value : c.value) value = 0.0f;
  }

  // load_b(step, block, out): the operands of column blocks `block` and `block` + 1, two registers each.
  template <class LoadB>
  __device__ __forceinline__ static void steps(Accumulator& c, const char* a_chunk, const LoadB& load_b) {
    const int lane = tile_detail::lane();
    const int a_row = Base::first_row() + lane % 16;
    const int a_byte = lane / 16 * kPackBytes;
#pragma unroll
    for (int step = 0; step < kPanelRowBytes / kStepBytes; ++step) {
      uint32_t y[kColBlocks / 2][4];
#pragma unroll
      for (int n = 0; n < kColBlocks; n += 2) load_b(step, n, y[n / 2]);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        uint32_t x[4];
        ptx::load_matrices(x, a_chunk + panel_offset(a_row + 16 * m, step * kStepBytes + a_byte));
#pragma unroll
        for (int n = 0; n < kColBlocks; ++n)
          ptx::mma<T>(reinterpret_cast<float (&)[4]>(c.value[(m * kColBlocks + n) * 4]), x, y[n / 2][n % 2 * 2],
                      y[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  Pipeline pipeline_;
};

}  // namespace lcr2s::cuda
