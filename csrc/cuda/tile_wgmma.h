#pragma once

#include "tile.h"

namespace lcr2s::cuda {

// Two warpgroups of 64 rows; a warp holds 16 of them and all columns, as wgmma leaves them.
template <class T, int kCols_>
struct WgmmaLayout {
  using Element = T;
  using Value = float;
  static constexpr int kCols = kCols_;
  static constexpr int kWarpRows = 8;
  static constexpr int kWarpCols = 1;
  static constexpr int kLaneCols = 4;
  static constexpr int kThreadRows = 2;
  static constexpr int kThreadCols = kCols / 4;
  static constexpr bool kPairs = true;
  static_assert(kCols == 128 || kCols == 64);

  __device__ __forceinline__ static int row(int r) {
    return tile_detail::warp() * 16 + 8 * r + tile_detail::lane() / kLaneCols;
  }
  __device__ __forceinline__ static int col(int j) {
    return 8 * (j / 2) + 2 * (tile_detail::lane() % kLaneCols) + j % 2;
  }
  __device__ __forceinline__ static constexpr int index(int r, int j) { return j / 2 * 4 + r * 2 + j % 2; }
};

// T is BFloat16 or Half. Thread 0 orders bulk copies of whole panels ahead of time; `full` says that a stage has
// arrived, `empty` that all warps are done with it.
template <class T, int kCols = 128, int kStages = kCols == 128 ? 3 : 4>
class TileWgmma : public TileFragments<WgmmaLayout<T, kCols>> {
 public:
  using Base = TileFragments<WgmmaLayout<T, kCols>>;
  using typename Base::Accumulator;
  static constexpr bool kAvailable = LCR2S_WGMMA;
  static constexpr int kABytes = kPanelBytes;
  static constexpr int kBBytes = kCols * kPanelRowBytes;
  static constexpr int kScratchBytes = kStages * (kABytes + kBBytes);
  static constexpr int kSharedBytes = kScratchBytes + 2 * kStages * static_cast<int>(sizeof(uint64_t));

#if LCR2S_WGMMA
  __device__ __forceinline__ explicit TileWgmma(char* shared)
      : shared_(shared), full_(reinterpret_cast<uint64_t*>(shared + kScratchBytes)), empty_(full_ + kStages) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::barrier_init(full_ + stage, 1);
        ptx::barrier_init(empty_ + stage, kTileThreads / 32);
      }
      ptx::fence_barrier_init();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void multiply(Accumulator& c, const Panels& a, int64_t row_tile, const Panels& b,
                                           int64_t column_tile) {
    const char* a_source = panel_at(a, row_tile, 0);
    const char* b_source =
        panel_at(b, column_tile * kCols / kPanelRows, 0) + column_tile * kCols % kPanelRows * kPanelRowBytes;
    const int chunks = static_cast<int>(a.k_chunks);
    // What the caller did with its scratch comes before the copies into it.
    ptx::fence_async();
    __syncthreads();
    for (int chunk = 0; chunk < kStages && chunk < chunks; ++chunk) order(a_source, b_source, chunk);
    __syncwarp();
    const int group_rows = tile_detail::warp() / 4 * 64;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int turn = turn_ + chunk;
      const char* stage = stage_of(turn);
      ptx::barrier_wait(full_ + turn % kStages, turn / kStages % 2);
      const uint64_t x = ptx::matrix_descriptor(stage + group_rows * kPanelRowBytes);
      const uint64_t y = ptx::matrix_descriptor(stage + kABytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        // 16 in k are 32 bytes, and addresses count in 16.
        ptx::wgmma<T>(c.value, x + 2 * step, y + 2 * step, chunk > 0 || step > 0);
      }
      ptx::wgmma_commit();
      if (chunk > 0) {
        ptx::wgmma_wait<1>();
        release(turn - 1);
        if (chunk - 1 + kStages < chunks) order(a_source, b_source, chunk - 1 + kStages);
        __syncwarp();
      }
    }
    ptx::wgmma_wait<0>();
    ptx::hold(c.value);
    turn_ += chunks;
    release(turn_ - 1);
    __syncthreads();
  }

 private:
  __device__ __forceinline__ char* stage_of(int turn) const { return shared_ + turn % kStages * (kABytes + kBBytes); }

  // This warp no longer reads the stage.
  __device__ __forceinline__ void release(int turn) const {
    if (tile_detail::lane() == 0) ptx::barrier_arrive(empty_ + turn % kStages);
  }

  __device__ __forceinline__ void order(const char* a, const char* b, int chunk) const {
    if (threadIdx.x != 0) return;
    const int turn = turn_ + chunk;
    uint64_t* full = full_ + turn % kStages;
    if (turn >= kStages) ptx::barrier_wait(empty_ + turn % kStages, turn / kStages % 2 ^ 1);
    ptx::barrier_expect(full, kABytes + kBBytes);
    ptx::copy_bulk(stage_of(turn), a + int64_t{chunk} * kPanelBytes, kABytes, full);
    ptx::copy_bulk(stage_of(turn) + kABytes, b + int64_t{chunk} * kPanelBytes, kBBytes, full);
  }

  char* shared_;
  uint64_t* full_;
  uint64_t* empty_;
  // Chunks that earlier products have taken.
  int turn_ = 0;
#endif
};

}  // namespace lcr2s::cuda
