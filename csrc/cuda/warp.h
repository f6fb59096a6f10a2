#pragma once

#include <cuda_runtime.h>

#include "element.h"

// Lanes of a warp together. Every lane that a mask names must call, and all get the result. Sums and maxima are fixed
// trees over the lanes: the same bits in every run and in every lane.
namespace lcr2s::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// The larger one; NaN where either is NaN (fmax would drop it).
template <class T>
LCR2S_HOST_DEVICE T max_or_nan(T a, T b) {
  return a > b || a != a ? a : b;
}

// T is int, unsigned, (unsigned) long long, float or double.
template <class T>
__device__ __forceinline__ T shuffle(T x, int source, unsigned mask = kFullMask) {
  return __shfl_sync(mask, x, source);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int step, unsigned mask = kFullMask) {
  return __shfl_xor_sync(mask, x, step);
}

// Over each `size` neighbouring lanes (a power of two); combine(a, b) must not depend on the order of its arguments.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, const Combine& combine, int size = kWarp, unsigned mask = kFullMask) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    if (step < size) x = combine(x, shuffle_xor(x, step, mask));
  return x;
}
template <class T>
__device__ __forceinline__ T warp_sum(T x, int size = kWarp, unsigned mask = kFullMask) {
  return warp_reduce(x, [](T a, T b) { return a + b; }, size, mask);
}
// NaN where any lane has NaN.
template <class T>
__device__ __forceinline__ T warp_max(T x, int size = kWarp, unsigned mask = kFullMask) {
  return warp_reduce(x, [](T a, T b) { return max_or_nan(a, b); }, size, mask);
}

// Over the threads of a block, a multiple of 32, in a fixed order; every thread gets the result. `scratch` is shared
// memory for kWarp values, free for the next use after the call.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, const Combine& combine, T* scratch) {
  x = warp_reduce(x, combine);
  if (lane_index() == 0) scratch[warp_index()] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) x = combine(x, scratch[i]);
  __syncthreads();
  return x;
}
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  return block_reduce(x, [](T a, T b) { return a + b; }, scratch);
}
template <class T>
__device__ __forceinline__ T block_max(T x, T* scratch) {
  return block_reduce(x, [](T a, T b) { return max_or_nan(a, b); }, scratch);
}

}  // namespace lcr2s::cuda
