#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>

#include "element.h"

// How every kernel is launched, on a GPU and in the emulator (csrc/emulation): no kernel uses <<<>>>, __shared__
// variables, a grid of more than one dimension, or a spin loop of its own.
//
//   __global__ void __launch_bounds__(128) scale_kernel(const __grid_constant__ Args args) {
//     float* tile = reinterpret_cast<float*>(dynamic_shared());
//     ...
//   }
//   const char* error = launch(scale_kernel, blocks, 128, 64 * sizeof(float), stream, args);   // null: launched
//
// A cooperative kernel's blocks all run at once and may meet:
//
//   __global__ void sum_kernel(const float* x, float* out, unsigned* barrier) { ... grid_barrier(barrier); ... }
//   if (blocks <= max_cooperative_blocks(sum_kernel, 256, shared_bytes)) {
//     error = zero(barrier, sizeof(unsigned), stream);            // once, before the first launch that uses it
//     if (!error) error = launch_cooperative(sum_kernel, blocks, 256, shared_bytes, stream, x, out, barrier);
//   }
//
// Nothing here synchronises with the host, and all of it can be captured in a CUDA graph.
namespace lcr2s::cuda {

// The block's dynamic shared memory, aligned to 1024 bytes.
__device__ __forceinline__ char* dynamic_shared() {
#ifdef LCR2S_EMULATE_CUDA
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(1024) char lcr2s_dynamic_shared[];
  return lcr2s_dynamic_shared;
#endif
}

// Waits, without a barrier, for what another thread or engine does. `ready` must read memory anew each time (volatile,
// an atomic, PTX).
template <class Ready>
__device__ __forceinline__ void spin_until(const Ready& ready) {
#ifdef LCR2S_EMULATE_CUDA
  emulation::wait_until(ready, "spin_until");
#else
  while (!ready()) {
  }
#endif
}

// device_check(condition): in a debug build (LCR2S_DEBUG=1) a condition that does not hold is printed and ends the
// kernel with an error, in the emulator the process. Not evaluated otherwise.
#ifdef LCR2S_DEBUG
__device__ inline void device_check_failed(const char* condition, const char* file, int line) {
#ifdef LCR2S_EMULATE_CUDA
  std::fprintf(stderr, "%s:%d: device_check(%s) failed\n", file, line, condition);
  emulation::fail("device_check failed");
#else
  printf("%s:%d: device_check(%s) failed in block %u, thread %u\n", file, line, condition, blockIdx.x, threadIdx.x);
  __trap();
#endif
}
#define device_check(condition) \
  ((condition) ? static_cast<void>(0) : ::lcr2s::cuda::device_check_failed(#condition, __FILE__, __LINE__))
#else
#define device_check(condition) static_cast<void>(0)
#endif

// All threads of all blocks of a cooperative launch meet; what each wrote before is seen by all after. `state` is one
// word in device memory that was zero before the first launch that used it; a finished launch leaves it ready for the
// next, with a grid of any size. What other blocks wrote must not be read through __ldg or a const __restrict__
// pointer.
//
// Blocks other than the first add 1 and the first adds what is missing to 2^31: when all have come the upper bit has
// flipped and the rest is zero again.
__device__ __forceinline__ void grid_barrier(unsigned* state) {
  constexpr unsigned upper = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned before = atomicAdd(state, blockIdx.x == 0 ? upper - (gridDim.x - 1) : 1u);
    spin_until([&] { return ((*static_cast<volatile unsigned*>(state) ^ before) & upper) != 0; });
    __threadfence();
  }
  __syncthreads();
}

struct Device {
  int multiprocessors = 0;
  int capability = 0;        // 80, 90, 100, 120
  int64_t shared_limit = 0;  // bytes of dynamic shared memory that one block may have
};

// The current device; all zero where CUDA does not answer, and a launch then says why.
inline Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return Device{};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  int multiprocessors = 0, major = 0, minor = 0, shared = 0;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) != cudaSuccess)
    return Device{};
  return known[index] = Device{multiprocessors, 10 * major + minor, shared};
}

namespace detail {

// Null, or what CUDA has to say, which is then forgotten: the next call of anybody else starts clean.
inline const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(error);
}

template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), int64_t shared_bytes) {
  // More than 48 KiB has to be asked for.
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
}

template <class... Params, class... Args>
const char* launch(bool cooperative, void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
                   void* stream, const Args&... args) {
  if (blocks == 0) return nullptr;
  if (blocks < 0 || blocks > 0x7fffffff) return "the grid must have at most 2^31 - 1 blocks";
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return message_of(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return message_of(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace detail

// Launches `blocks` blocks (none: nothing happens) of `threads` threads on `stream`, which belongs to the current
// device. Null, or what CUDA has to say against the launch.
template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                   const Args&... args) {
  return detail::launch(false, kernel, blocks, threads, shared_bytes, stream, args...);
}

// The same with all blocks running at once, at most max_cooperative_blocks of them.
template <class... Params, class... Args>
const char* launch_cooperative(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
                               void* stream, const Args&... args) {
  return detail::launch(true, kernel, blocks, threads, shared_bytes, stream, args...);
}

// How many blocks of such a launch the current device holds at once; 0 where it cannot run even one.
template <class... Params>
int64_t max_cooperative_blocks(void (*kernel)(Params...), int threads, int64_t shared_bytes) {
  int blocks = 0;
  cudaError_t error = detail::allow_shared(kernel, shared_bytes);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
  if (detail::message_of(error) != nullptr) return 0;
  return static_cast<int64_t>(blocks) * current_device().multiprocessors;
}

// Zeroes `bytes` of device memory on `stream`. Null, or what CUDA has to say.
inline const char* zero(void* pointer, int64_t bytes, void* stream) {
  return detail::message_of(cudaMemsetAsync(pointer, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace lcr2s::cuda
