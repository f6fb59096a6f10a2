// Small kernels for test_emulator.py, right and wrong ones: `emulator_kernels CASE` runs one and prints what came out.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/warp.h"

using namespace lcr2s::cuda;

namespace {

constexpr int kThreads = 96;

template <class T>
void print(const std::vector<T>& values) {
  for (const T& value : values) std::printf("%.9g ", static_cast<double>(value));
  std::printf("\n");
}

void print_error(const char* error) { std::printf("%s\n", error ? error : "launched"); }

__global__ void reverse_kernel(float* out, bool synchronise) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (synchronise) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void poison_kernel(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1;
}

__global__ void shuffle_kernel(float* out) {
  const int lane = lane_index();
  const double x = 100 + static_cast<int>(threadIdx.x);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  float* row = out + threadIdx.x;
  const int n = static_cast<int>(blockDim.x);
  row[0 * n] = static_cast<float>(shuffle(x, 5));
  row[1 * n] = static_cast<float>(shuffle_xor(x, 3));
  row[2 * n] = static_cast<float>(__shfl_sync(kFullMask, x, 9, 8));
  row[3 * n] = static_cast<float>(__popc(__ballot_sync(kFullMask, lane % 3 == 0)));
  row[4 * n] = static_cast<float>(__popc(__ballot_sync(half, lane % 16 < lane / 2)));
}

__global__ void reduce_kernel(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const float x = static_cast<float>(threadIdx.x);
  const int n = static_cast<int>(blockDim.x);
  float* row = out + threadIdx.x;
  row[0 * n] = warp_sum(x);
  row[1 * n] = warp_max(x == 40 ? NAN : x);
  row[2 * n] = warp_sum(x, 8);
  // Lanes of a warp may part.
  row[3 * n] = lane_index() < 8 ? warp_max(x, 8, 0xffu) : -1;
  row[4 * n] = block_sum(x, shared);
  row[5 * n] = block_max(-x, shared);
}

// Phase after phase, every block adds up what all blocks wrote in the one before.
__global__ void cooperative_kernel(float* out, unsigned* barrier, int phases) {
  float* now = out;
  float* next = out + gridDim.x;
  for (int phase = 0; phase < phases; ++phase) {
    if (threadIdx.x == 0) {
      float sum = 1;
      for (unsigned i = 0; i < gridDim.x; ++i) sum += now[i];
      next[blockIdx.x] = sum;
    }
    grid_barrier(barrier);
    float* then = now;
    now = next;
    next = then;
  }
}

__global__ void order_kernel(int* out, int* count) {
  if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(count, 1);
}

__global__ void early_exit_kernel(float* out) {
  if (threadIdx.x >= 40) return;
  out[threadIdx.x] = 1;
  __syncthreads();
  // Lanes 8 to 31 of the second warp have ended.
  out[threadIdx.x] += static_cast<float>(__popc(__ballot_sync(kFullMask, 1)));
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void divergent_warp_kernel(float* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_sync(kFullMask, 1.0f, 0);
  else
    __syncwarp();
}

__global__ void wrong_mask_kernel() { __syncwarp(0xffffu); }

__global__ void forgotten_kernel() {
  if (threadIdx.x == 3) spin_until([] { return false; });
  __syncthreads();
}

__global__ void spin_kernel(volatile int* flag) {
  if (threadIdx.x == 0) spin_until([=] { return *flag == 1; });
  if (threadIdx.x == blockDim.x - 1) *flag = 1;
}

__global__ void warpgroup_kernel(float* out) {
  float x = static_cast<float>(threadIdx.x);
  lcr2s::emulation::warpgroup_collective(
      x,
      [](float* const* threads) {
        float sum = 0;
        for (int i = 0; i < 128; ++i) sum += *threads[i];
        for (int i = 0; i < 128; ++i) *threads[i] = sum;
      },
      "sum");
  out[threadIdx.x] = x;
}

// The block may end before the work is done.
__global__ void later_kernel(float* out, bool wait) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  bool done = false;
  if (threadIdx.x == 0) {
    lcr2s::emulation::later([=, &done] {
      shared[0] = 5;
      done = true;
    });
    if (wait) lcr2s::emulation::wait_until([&] { return done; }, "work");
    out[0] = shared[0];
  }
}

__global__ void device_check_kernel(int* out) {
  device_check(threadIdx.x < 5);
  out[threadIdx.x] = 1;
}

__global__ void shared_overrun_kernel(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void global_overrun_kernel(float* out) { out[threadIdx.x + 1] = 1; }

int run(const std::string& name) {
  constexpr int n = kThreads;
  constexpr int64_t floats = n * static_cast<int64_t>(sizeof(float));
  std::vector<float> out(n * 8);
  std::vector<int> integers(n);
  const auto done = [&](const char* error, size_t size) {
    if (error) {
      print_error(error);
    } else {
      out.resize(size);
      print(out);
    }
    return 0;
  };
  if (name == "reverse") return done(launch(reverse_kernel, 1, n, floats, nullptr, out.data(), true), n);
  if (name == "race") return done(launch(reverse_kernel, 1, n, floats, nullptr, out.data(), false), n);
  if (name == "poison") return done(launch(poison_kernel, 3, 32, 128, nullptr, out.data()), 96);
  if (name == "shuffle") return done(launch(shuffle_kernel, 1, n, 0, nullptr, out.data()), n * 5);
  if (name == "reduce") return done(launch(reduce_kernel, 1, n, floats, nullptr, out.data()), n * 6);
  if (name == "early_exit") return done(launch(early_exit_kernel, 1, n, 0, nullptr, out.data()), 40);
  if (name == "warpgroup") return done(launch(warpgroup_kernel, 1, 256, 0, nullptr, out.data()), 256);
  if (name == "later") return done(launch(later_kernel, 1, n, 4, nullptr, out.data(), true), 1);
  if (name == "never_waited") return done(launch(later_kernel, 1, n, 4, nullptr, out.data(), false), 1);
  if (name == "divergent_warp") return done(launch(divergent_warp_kernel, 1, n, 0, nullptr, out.data()), 1);
  if (name == "divergent_barrier") return done(launch(divergent_barrier_kernel, 1, n, 0, nullptr), 1);
  if (name == "wrong_mask") return done(launch(wrong_mask_kernel, 1, n, 0, nullptr), 1);
  if (name == "forgotten") return done(launch(forgotten_kernel, 1, n, 0, nullptr), 1);
  if (name == "spin") return done(launch(spin_kernel, 1, n, 0, nullptr, integers.data()), 1);
  if (name == "device_check") return done(launch(device_check_kernel, 1, n, 0, nullptr, integers.data()), 1);
  if (name == "shared_overrun") return done(launch(shared_overrun_kernel, 1, n, floats, nullptr, out.data()), n);
  if (name == "global_overrun") {
    std::vector<float> exact(n);
    return done(launch(global_overrun_kernel, 1, n, 0, nullptr, exact.data()), n);
  }
  if (name == "order") {
    int count = 0;
    const char* error = launch(order_kernel, 6, 32, 0, nullptr, integers.data(), &count);
    out.assign(integers.begin(), integers.begin() + 6);
    return done(error, 6);
  }
  if (name == "cooperative") {
    // One barrier for launches of different sizes, never set back.
    unsigned barrier = 1;
    print_error(zero(&barrier, sizeof(barrier), nullptr));
    for (const int blocks : {3, 1, 8}) {
      out.assign(static_cast<size_t>(2 * blocks), 0);
      const char* error = launch_cooperative(cooperative_kernel, blocks, n, 0, nullptr, out.data(), &barrier, 3);
      out.resize(static_cast<size_t>(2 * blocks));
      done(error, static_cast<size_t>(2 * blocks));
    }
    std::printf("%d\n", static_cast<int>(max_cooperative_blocks(cooperative_kernel, n, 0)));
    print_error(launch_cooperative(cooperative_kernel, 9, n, 0, nullptr, out.data(), &barrier, 3));
    return 0;
  }
  if (name == "limits") {
    const Device device = current_device();
    std::printf("%d %d %d\n", device.multiprocessors, device.capability, static_cast<int>(device.shared_limit));
    for (const int64_t bytes : {int64_t{100 * 1024}, device.shared_limit, device.shared_limit + 1})
      print_error(launch(reverse_kernel, 1, n, bytes, nullptr, out.data(), true));
    print_error(launch(reverse_kernel, 1, 1025, floats, nullptr, out.data(), true));
    print_error(launch(reverse_kernel, 0, n, floats, nullptr, out.data(), true));
    print_error(launch(reverse_kernel, int64_t{1} << 31, n, floats, nullptr, out.data(), true));
    std::printf("%d\n", static_cast<int>(max_cooperative_blocks(reverse_kernel, n, device.shared_limit + 1)));
    return 0;
  }
  std::fprintf(stderr, "no case %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int, char** arguments) { return run(arguments[1]); }
