#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "../cuda/element.h"
#include "cuda_runtime.h"

// The instructions of csrc/cuda/ptx.h on the host, written from the PTX ISA: fragment layouts, descriptors and swizzles
// element by element, whatever the kernels make of them.
//
// Asynchronous instructions are carried out as soon as they are issued in reverse order of threads, and otherwise as
// late as a wait allows. A forgotten wait then leaves poison (NaN) or old data, a buffer that is refilled too early
// changes what is still to be read. Registers that wgmma has not yet delivered hold NaN.
namespace lcr2s::cuda::ptx {

using emulation::Site;

namespace detail {

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

struct Wgmma {
  uint64_t a;
  uint64_t b;
  bool accumulate;
  float* c;
  int count;
  float (*widen)(uint16_t);
};

// Accumulators in flight: their value so far.
struct Shadow {
  float* c;
  std::vector<float> value;
  int in_flight;
};

struct ThreadState {
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Wgmma> open_wgmma;
  std::deque<std::vector<Wgmma>> wgmma_groups;
  std::deque<Shadow> shadows;
  bool fenced = false;

  Shadow* shadow_of(const float* c) {
    for (Shadow& shadow : shadows)
      if (shadow.c == c) return &shadow;
    return nullptr;
  }
};

inline ThreadState& state() { return emulation::thread_state_of<ThreadState>(); }

inline void check_aligned(const void* pointer, uintptr_t bytes, const char* message, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) emulation::fail(message, site);
}
inline void check_shared(const void* pointer, int64_t bytes, const char* message, Site site) {
  const int64_t at = static_cast<const char*>(pointer) - emulation::dynamic_shared();
  if (at < 0 || at + bytes > emulation::dynamic_shared_bytes()) emulation::fail(message, site);
}

template <class T>
float widen(uint16_t bits) {
  return to_accumulate(T{bits});
}

inline void carry_out(const Copy& copy) {
  std::memset(copy.target, 0, 16);
  std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
}

// Shared addresses start above zero, as on a GPU, whose first KiB is the system's.
constexpr uint32_t kSharedBase = 1024;

// 2-byte element k of row `row` of a wgmma operand.
inline uint16_t operand_element(uint64_t descriptor, int row, int k, const char* shared, int64_t shared_bytes) {
  const uint64_t start = (descriptor & 0x3fff) << 4;
  const uint64_t stride = (descriptor >> 32 & 0x3fff) << 4;
  uint64_t address = start + static_cast<uint64_t>(row / 8) * stride + static_cast<uint64_t>(row % 8) * 128 +
                     static_cast<uint64_t>(k) * 2;
  // 128-byte swizzle: bits 4..6 of the address are combined with bits 7..9.
  address ^= (address >> 7 & 7) << 4;
  const int64_t at = static_cast<int64_t>(address) - kSharedBase;
  if (at < 0 || at + 2 > shared_bytes) emulation::fail("wgmma reads outside the block's shared memory");
  uint16_t bits;
  std::memcpy(&bits, shared + at, sizeof(bits));
  return bits;
}

// One instruction for the lanes of one warp, number `warp` in its warpgroup.
inline void carry_out(ThreadState* const* lanes, const Wgmma* const* operations, int warp) {
  const Wgmma& first = *operations[0];
  const int columns = 2 * first.count;
  const char* shared = emulation::dynamic_shared();
  const int64_t bytes = emulation::dynamic_shared_bytes();
  double a[16][16];
  std::vector<double> b(static_cast<size_t>(columns) * 16);
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row)
      a[row][k] = first.widen(operand_element(first.a, 16 * warp + row, k, shared, bytes));
    for (int column = 0; column < columns; ++column)
      b[static_cast<size_t>(column) * 16 + k] = first.widen(operand_element(first.b, column, k, shared, bytes));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Wgmma& operation = *operations[lane];
    Shadow& shadow = *lanes[lane]->shadow_of(operation.c);
    for (int i = 0; i < operation.count; ++i) {
      const int row = lane / 4 + (i % 4 >= 2 ? 8 : 0);
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float& c = shadow.value[static_cast<size_t>(i)];
      double sum = operation.accumulate ? static_cast<double>(c) : 0.0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[static_cast<size_t>(column) * 16 + k];
      c = static_cast<float>(sum);
    }
    if (--shadow.in_flight == 0) {
      std::copy(shadow.value.begin(), shadow.value.end(), operation.c);
      std::erase_if(lanes[lane]->shadows, [&](const Shadow& other) { return &other == &shadow; });
    }
  }
}

// The same for what group(lane's state) holds, which is empty afterwards.
template <class Group>
void carry_out(ThreadState* const* lanes, int warp, const Group& group) {
  const size_t count = group(*lanes[0]).size();
  for (size_t at = 0; at < count; ++at) {
    const Wgmma* operations[32];
    for (int lane = 0; lane < 32; ++lane) operations[lane] = &group(*lanes[lane])[at];
    carry_out(lanes, operations, warp);
  }
  for (int lane = 0; lane < 32; ++lane) group(*lanes[lane]).clear();
}

// The 64-bit object behind a barrier.
struct Barrier {
  uint64_t phase : 1;
  uint64_t expected : 12;
  uint64_t pending : 12;
  int64_t bytes : 39;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_of(uint64_t* barrier, Site site) {
  check_aligned(barrier, 8, "a barrier is not aligned to 8 bytes", site);
  check_shared(barrier, 8, "a barrier is not in shared memory", site);
  return *reinterpret_cast<Barrier*>(barrier);
}

inline void turn(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
}

}  // namespace detail

inline uint32_t shared_address(const void* pointer) {
  return detail::kSharedBase + static_cast<uint32_t>(static_cast<const char*>(pointer) - emulation::dynamic_shared());
}

namespace detail {

template <bool kTransposed>
void load_matrices(uint32_t (&out)[4], const void* row, Site site) {
  check_aligned(row, 16, "ldmatrix: a row is not aligned to 16 bytes", site);
  check_shared(row, 16, "ldmatrix: a row is not in shared memory", site);
  struct Operand {
    const char* row;
    uint32_t* out;
  } operand{static_cast<const char*>(row), out};
  emulation::warp_collective(
      0xffffffffu, operand,
      [](Operand* const* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t element[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(element[i], lanes[8 * matrix + i]->row, 16);
          for (int lane = 0; lane < 32; ++lane) {
            const int group = lane / 4, pair = lane % 4 * 2;
            const uint32_t low = kTransposed ? element[pair][group] : element[group][pair];
            const uint32_t high = kTransposed ? element[pair + 1][group] : element[group][pair + 1];
            lanes[lane]->out[matrix] = low | high << 16;
          }
        }
      },
      "ldmatrix", site);
}

}  // namespace detail

inline void load_matrices(uint32_t (&out)[4], const void* row, Site site = Site::current()) {
  detail::load_matrices<false>(out, row, site);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row, Site site = Site::current()) {
  detail::load_matrices<true>(out, row, site);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current()) {
  struct Operand {
    const uint32_t* a;
    uint32_t b[2];
    float* c;
  } operand{a, {b0, b1}, c};
  emulation::warp_collective(
      0xffffffffu, operand,
      [](Operand* const* lanes) {
        const auto half = [](uint32_t pair, int i) {
          return static_cast<double>(detail::widen<T>(static_cast<uint16_t>(pair >> 16 * i)));
        };
        double a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / 4, member = lane % 4;
          for (int i = 0; i < 8; ++i) {
            const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const int column = 2 * member + i % 2 + (i < 4 ? 0 : 8);
            a[row][column] = half(lanes[lane]->a[i / 2], i % 2);
          }
          for (int i = 0; i < 4; ++i)
            b[2 * member + i % 2 + (i < 2 ? 0 : 8)][group] = half(lanes[lane]->b[i / 2], i % 2);
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + (i < 2 ? 0 : 8);
            const int column = lane % 4 * 2 + i % 2;
            double sum = static_cast<double>(lanes[lane]->c[i]);
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            lanes[lane]->c[i] = static_cast<float>(sum);
          }
        }
      },
      "mma", site);
}

inline void copy_async(void* shared, const void* global, int bytes = 16, Site site = Site::current()) {
  detail::check_aligned(shared, 16, "cp.async: the target is not aligned to 16 bytes", site);
  detail::check_aligned(global, 16, "cp.async: the source is not aligned to 16 bytes", site);
  detail::check_shared(shared, 16, "cp.async: the target is not in shared memory", site);
  if (bytes < 0 || bytes > 16) emulation::fail("cp.async: more than 16 bytes", site);
  const detail::Copy copy{shared, global, bytes};
  if (emulation::work_at_once()) {
    detail::carry_out(copy);
  } else {
    detail::state().open_copies.push_back(copy);
  }
}
inline void commit_copies() {
  detail::ThreadState& state = detail::state();
  state.copy_groups.push_back(std::move(state.open_copies));
  state.open_copies.clear();
}
template <int kPending>
void wait_copies() {
  detail::ThreadState& state = detail::state();
  for (; state.copy_groups.size() > kPending; state.copy_groups.pop_front())
    for (const detail::Copy& copy : state.copy_groups.front()) detail::carry_out(copy);
}

inline void barrier_init(uint64_t* barrier, int arrivals, Site site = Site::current()) {
  detail::Barrier& b = detail::barrier_of(barrier, site);
  if (arrivals < 1 || arrivals > 4095) emulation::fail("mbarrier.init: number of arrivals", site);
  b.phase = 0;
  b.expected = b.pending = static_cast<uint64_t>(arrivals) & 0xfff;
  b.bytes = 0;
}
inline void fence_barrier_init() {}
inline void fence_async() {}
inline void barrier_arrive(uint64_t* barrier, Site site = Site::current()) {
  detail::Barrier& b = detail::barrier_of(barrier, site);
  if (b.pending == 0) emulation::fail("mbarrier.arrive: all have arrived in this phase", site);
  b.pending -= 1;
  detail::turn(b);
}
inline void barrier_expect(uint64_t* barrier, int bytes, Site site = Site::current()) {
  detail::Barrier& b = detail::barrier_of(barrier, site);
  b.bytes += bytes;
  barrier_arrive(barrier, site);
}
inline void barrier_wait(uint64_t* barrier, int parity, Site site = Site::current()) {
  const detail::Barrier& b = detail::barrier_of(barrier, site);
  emulation::wait_until([&] { return b.phase != static_cast<uint64_t>(parity); }, "mbarrier.try_wait", site);
}

inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Site site = Site::current()) {
  detail::check_aligned(shared, 16, "cp.async.bulk: the target is not aligned to 16 bytes", site);
  detail::check_aligned(global, 16, "cp.async.bulk: the source is not aligned to 16 bytes", site);
  detail::check_shared(shared, bytes, "cp.async.bulk: the target is not in shared memory", site);
  if (bytes <= 0 || bytes % 16 != 0) emulation::fail("cp.async.bulk: not a multiple of 16 bytes", site);
  detail::Barrier& b = detail::barrier_of(barrier, site);
  emulation::later([=, &b] {
    std::memcpy(shared, global, static_cast<size_t>(bytes));
    b.bytes -= bytes;
    detail::turn(b);
  });
}

inline void wgmma_fence() { detail::state().fenced = true; }

inline void wgmma_commit() {
  detail::ThreadState& state = detail::state();
  state.wgmma_groups.push_back(std::move(state.open_wgmma));
  state.open_wgmma.clear();
}

template <int kPending>
void wgmma_wait(Site site = Site::current()) {
  struct Operand {
    detail::ThreadState* state;
    int thread;
  } operand{&detail::state(), static_cast<int>(threadIdx.x)};
  emulation::warp_collective(
      0xffffffffu, operand,
      [](Operand* const* lanes) {
        detail::ThreadState* states[32];
        for (int lane = 0; lane < 32; ++lane) states[lane] = lanes[lane]->state;
        while (states[0]->wgmma_groups.size() > kPending) {
          detail::carry_out(states, lanes[0]->thread / 32 % 4,
                            [](detail::ThreadState& state) -> auto& { return state.wgmma_groups.front(); });
          for (detail::ThreadState* state : states) state->wgmma_groups.pop_front();
        }
        for (detail::ThreadState* state : states) state->fenced = state->fenced && !state->wgmma_groups.empty();
      },
      "wgmma.wait_group", site);
}

template <int kCount>
void hold(float (&)[kCount]) {}

namespace detail {

inline void issue(float* c, int count, uint64_t a, uint64_t b, bool accumulate, float (*widen)(uint16_t), Site site) {
  struct Operand {
    Wgmma operation;
    ThreadState* state;
  } operand{{a, b, accumulate, c, count, widen}, &state()};
  emulation::warpgroup_collective(
      operand,
      [site](Operand* const* threads) {
        for (int i = 0; i < 128; ++i) {
          const Wgmma& operation = threads[i]->operation;
          const Wgmma& first = threads[0]->operation;
          ThreadState& state = *threads[i]->state;
          if (operation.a != first.a || operation.b != first.b || operation.accumulate != first.accumulate)
            emulation::fail("wgmma: the operands differ between the threads of a warpgroup", site);
          for (const uint64_t descriptor : {operation.a, operation.b})
            if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
              emulation::fail("wgmma: only the 128-byte swizzle without base offset is emulated", site);
          Shadow* shadow = state.shadow_of(operation.c);
          if (shadow == nullptr) {
            if (!state.fenced) emulation::fail("wgmma: no wgmma.fence since the accumulators were free", site);
            state.shadows.push_back({operation.c, {operation.c, operation.c + operation.count}, 0});
            shadow = &state.shadows.back();
            std::fill(operation.c, operation.c + operation.count, emulation::poison<float>());
          }
          ++shadow->in_flight;
        }
        for (int i = 0; i < 128; ++i) threads[i]->state->open_wgmma.push_back(threads[i]->operation);
        for (int warp = 0; warp < 4; ++warp) {
          ThreadState* states[32];
          for (int lane = 0; lane < 32; ++lane) states[lane] = threads[32 * warp + lane]->state;
          if (!emulation::work_at_once()) continue;
          for (size_t group = 0; group < states[0]->wgmma_groups.size(); ++group)
            carry_out(states, warp, [group](ThreadState& state) -> auto& { return state.wgmma_groups[group]; });
          carry_out(states, warp, [](ThreadState& state) -> auto& { return state.open_wgmma; });
        }
      },
      "wgmma", site);
}

}  // namespace detail

template <class T>
void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool accumulate, Site site = Site::current()) {
  detail::issue(c, 64, a, b, accumulate, detail::widen<T>, site);
}
template <class T>
void wgmma(float (&c)[32], uint64_t a, uint64_t b, bool accumulate, Site site = Site::current()) {
  detail::issue(c, 32, a, b, accumulate, detail::widen<T>, site);
}

}  // namespace lcr2s::cuda::ptx
