#pragma once

// CUDA on the host: what csrc/cuda needs of the language and the runtime, so that every .cu file also compiles as plain
// C++20 (with LCR2S_EMULATE_CUDA defined and this folder first on the include path) and its kernels run whole, launch
// included, where there is no GPU. docs/emulator.md says what is emulated and how to run it.
//
// Not offered, and therefore an error of the compiler: __shared__ and __constant__ variables, atomics on floats, 2-D
// blocks, __activemask, textures, device-side launches. Spin loops go through spin_until (csrc/cuda/launch.h).

#ifndef LCR2S_EMULATE_CUDA
#error "csrc/emulation is for builds with LCR2S_EMULATE_CUDA"
#endif

#include <any>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define LCR2S_VECTOR_TYPES(T, name)                                                  \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LCR2S_VECTOR_TYPES(int, int)
LCR2S_VECTOR_TYPES(unsigned, uint)
LCR2S_VECTOR_TYPES(float, float)
LCR2S_VECTOR_TYPES(double, double)
#undef LCR2S_VECTOR_TYPES

// The running thread's coordinates; they change with every switch between threads.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

// ---- What the emulation of further instructions (csrc/cuda/ptx.h) builds on ----
namespace lcr2s::emulation {

using Site = std::source_location;

// Prints which kernel, block and thread is running and what is wrong, and aborts.
[[noreturn]] void fail(const char* message, Site site = Site::current());

char* dynamic_shared();
int64_t dynamic_shared_bytes();

// The running thread sleeps until `predicate` holds. Where nobody can run any more, the launch is reported as a
// deadlock with `what` and the place of the call.
void wait_until_true(bool (*predicate)(const void*), const void* data, const char* what, Site site);
template <class Predicate>
void wait_until(const Predicate& predicate, const char* what, Site site = Site::current()) {
  wait_until_true([](const void* p) -> bool { return (*static_cast<const Predicate*>(p))(); }, &predicate, what, site);
}

// All threads of the block that have not ended meet.
void barrier(const char* what, Site site);

// Whether an asynchronous instruction that is issued now is carried out at once (always in reverse order of threads,
// never in forward order, by chance in random order) or as late as can be, so that a missing wait shows in one of them.
bool work_at_once();
// Work of an asynchronous engine (a bulk copy, say), which as late as can be is when no thread of the block can go on
// without it. A block must not end before its work is done.
void later(std::function<void()> work);

// State of the running thread that outlives a call, default-constructed in each launch: one type a program (ptx.h's).
std::any& thread_state();
template <class State>
State& thread_state_of() {
  std::any& state = thread_state();
  if (!state.has_value()) state.emplace<State>();
  return *std::any_cast<State>(&state);
}

// The threads of a group (a warp's lanes in `mask`, or the 128 threads of a warpgroup) each bring an operand; the last
// one to come runs body(operands), and all go on. operands[i] is lane i's, null where lane i is not in the mask or has
// ended; the body writes results into them. What the body captures must be the same in every thread, as any one's may
// run.
using CollectiveBody = void (*)(void* const* operands, const void* body);
void collective(int group, uint32_t mask, void* operand, CollectiveBody run, const void* body, const char* what,
                Site site);
template <int Group, class Operand, class Body>
void group_collective(uint32_t mask, Operand& operand, const Body& body, const char* what, Site site) {
  collective(
      Group, mask, &operand,
      [](void* const* operands, const void* body) {
        Operand* typed[Group];
        for (int i = 0; i < Group; ++i) typed[i] = static_cast<Operand*>(operands[i]);
        (*static_cast<const Body*>(body))(static_cast<Operand* const*>(typed));
      },
      &body, what, site);
}
template <class Operand, class Body>
void warp_collective(uint32_t mask, Operand& operand, const Body& body, const char* what, Site site = Site::current()) {
  group_collective<32>(mask, operand, body, what, site);
}
template <class Operand, class Body>
void warpgroup_collective(Operand& operand, const Body& body, const char* what, Site site = Site::current()) {
  group_collective<128>(0xffffffffu, operand, body, what, site);
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// What a lane gets that reads from a lane which is not there.
template <class T>
T poison() {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof(value));
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, int source, const char* what, Site site) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles integers and floating-point numbers");
  struct Operand {
    T value;
    int source;
    T result;
  } operand{value, source, poison<T>()};
  warp_collective(
      mask, operand,
      [](Operand* const* lanes) {
        for (int i = 0; i < 32; ++i)
          if (lanes[i] && lanes[lanes[i]->source]) lanes[i]->result = lanes[lanes[i]->source]->value;
      },
      what, site);
  return operand.result;
}

}  // namespace lcr2s::emulation

// ---- Threads of a block and of a warp ----
inline void __syncthreads(std::source_location site = std::source_location::current()) {
  lcr2s::emulation::barrier("__syncthreads", site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location site = std::source_location::current()) {
  char nothing = 0;
  lcr2s::emulation::warp_collective(mask, nothing, [](char* const*) {}, "__syncwarp", site);
}
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32,
              std::source_location site = std::source_location::current()) {
  const int base = lcr2s::emulation::lane() / width * width;
  return lcr2s::emulation::shuffle(mask, x, base + (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int step, int width = 32,
                  std::source_location site = std::source_location::current()) {
  const int lane = lcr2s::emulation::lane();
  const int end = lane / width * width + width;
  return lcr2s::emulation::shuffle(mask, x, (lane ^ step) < end ? lane ^ step : lane, "__shfl_xor_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location site = std::source_location::current()) {
  struct Operand {
    bool set;
    unsigned result;
  } operand{predicate != 0, 0};
  lcr2s::emulation::warp_collective(
      mask, operand,
      [](Operand* const* lanes) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= lanes[i] && lanes[i]->set ? 1u << i : 0u;
        for (int i = 0; i < 32; ++i)
          if (lanes[i]) lanes[i]->result = votes;
      },
      "__ballot_sync", site);
  return operand.result;
}
// ---- Memory ----
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
// Threads are switched at barriers and collectives only, hence plain reads and writes; integers only (the order of
// floating-point atomics is not fixed).
template <class T>
concept AtomicInteger = std::is_integral_v<T> && sizeof(T) >= 4;
template <AtomicInteger T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  using Unsigned = std::make_unsigned_t<T>;
  return std::exchange(*p, static_cast<T>(static_cast<Unsigned>(*p) + static_cast<Unsigned>(x)));
}
template <AtomicInteger T>
T atomicOr(T* p, std::type_identity_t<T> x) {
  return std::exchange(*p, *p | x);
}
// ---- Arithmetic ----
template <class T, class U>
  requires std::is_arithmetic_v<T> && std::is_arithmetic_v<U>
std::common_type_t<T, U> min(T a, U b) {
  using C = std::common_type_t<T, U>;
  if constexpr (std::is_floating_point_v<C>)
    return std::fmin(static_cast<C>(a), static_cast<C>(b));
  else
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
template <class T, class U>
  requires std::is_arithmetic_v<T> && std::is_arithmetic_v<U>
std::common_type_t<T, U> max(T a, U b) {
  using C = std::common_type_t<T, U>;
  if constexpr (std::is_floating_point_v<C>)
    return std::fmax(static_cast<C>(a), static_cast<C>(b));
  else
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }

// ---- Runtime: one device, whose capability and number of multiprocessors the environment sets ----
struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream);

namespace lcr2s::emulation {

cudaError_t set_shared_limit(const void* kernel, int bytes);
cudaError_t blocks_per_multiprocessor(int* blocks, const void* kernel, int threads, size_t shared_bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* name,
                   void (*run)(const void* closure), const void* closure);

}  // namespace lcr2s::emulation

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  return lcr2s::emulation::set_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}
template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Params...), int threads,
                                                          size_t shared_bytes) {
  return lcr2s::emulation::blocks_per_multiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads,
                                                     shared_bytes);
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const std::tuple<Params...> values(std::forward<Args>(args)...);
  const auto body = [&] { std::apply(kernel, values); };
  return lcr2s::emulation::launch(
      *config, reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__,
      [](const void* closure) { (*static_cast<decltype(&body)>(closure))(); }, &body);
}
