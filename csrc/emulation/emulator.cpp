#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace lcr2s::emulation {

namespace {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kMaxThreads = 1024;

struct Block;

struct Thread {
  enum class State { ready, waiting, ended };

  Fiber* fiber = nullptr;
  Block* block = nullptr;
  int index = 0;
  State state = State::ready;
  // What a waiting thread waits for: a barrier or a rendezvous, or, where this is null, its predicate.
  const void* waits_on = nullptr;
  bool (*predicate)(const void*) = nullptr;
  const void* predicate_data = nullptr;
  const char* what = "";
  Site site{};
  void* operand = nullptr;
  std::any user_state;
};

struct Barrier {
  int arrived = 0;
  Site site{};
};

// A collective of the lanes in `mask` (all 128 threads of a warpgroup) for which some have come.
struct Rendezvous {
  uint32_t mask = 0;
  int arrived = 0;
  const char* what = "";
  CollectiveBody run = nullptr;
  const void* body = nullptr;
};

struct Warp {
  uint32_t live = 0;
  int open = 0;
  // Lanes that have parted may each be at a collective with a mask of its own.
  std::array<Rendezvous, kWarp> collectives;
};

struct Block {
  uint3 index{};
  char* shared = nullptr;
  std::vector<Thread> threads;
  int live = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Rendezvous> warpgroups;
  std::deque<std::function<void()>> later;
};

struct Launch {
  const char* kernel;
  void (*run)(const void*);
  const void* closure;
  size_t shared_bytes;
};

enum class Order { forward, reverse, random };

Order order = Order::forward;
uint64_t random_state = 0;
Launch current_launch{};
Thread* current = nullptr;
Fiber scheduler;
std::deque<Fiber> fibers;

[[noreturn]] void die(const std::string& message) {
  std::fprintf(stderr, "CUDA emulator: %s\n  in %s\n", message.c_str(), current_launch.kernel);
  if (current != nullptr)
    std::fprintf(stderr, "  block %u of %u, thread %d of %u\n", current->block->index.x, gridDim.x, current->index,
                 blockDim.x);
  std::fflush(stderr);
  std::abort();
}

std::string place(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line()) + " (" + site.function_name() + ")";
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

uint64_t next_random(uint64_t below) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (random_state >> 33) % below;
}

void choose_order() {
  const char* variable = std::getenv("LCR2S_EMULATE_ORDER");
  const std::string wanted = variable ? variable : "forward";
  if (wanted == "forward") {
    order = Order::forward;
  } else if (wanted == "reverse") {
    order = Order::reverse;
  } else if (wanted.rfind("random:", 0) == 0) {
    order = Order::random;
    random_state = std::strtoull(wanted.c_str() + 7, nullptr, 10);
  } else {
    die("LCR2S_EMULATE_ORDER must be forward, reverse or random:<seed>, got " + wanted);
  }
}

template <class Item>
void arrange(std::vector<Item>& items) {
  if (order == Order::reverse) std::reverse(items.begin(), items.end());
  if (order == Order::random)
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random(i)]);
}

void suspend(const void* waits_on, const char* what, const Site& site) {
  Thread& me = *current;
  me.state = Thread::State::waiting;
  me.waits_on = waits_on;
  me.what = what;
  me.site = site;
  switch_fiber(*me.fiber, scheduler);
}

// Lets the threads at the block's barrier go on if nobody is missing.
bool pass_barrier(Block& block) {
  if (block.barrier.arrived == 0 || block.barrier.arrived < block.live) return false;
  block.barrier.arrived = 0;
  for (Thread& thread : block.threads)
    if (thread.state == Thread::State::waiting && thread.waits_on == &block.barrier)
      thread.state = Thread::State::ready;
  return true;
}

Warp& current_warp() { return current->block->warps[static_cast<size_t>(current->index / kWarp)]; }

// The open collective with this mask, or room for one.
Rendezvous& collective_of(Warp& warp, uint32_t mask) {
  Rendezvous* room = nullptr;
  int left = warp.open;
  for (Rendezvous& open : warp.collectives) {
    if (open.arrived == 0) {
      if (room == nullptr) room = &open;
    } else {
      if (open.mask == mask) return open;
      --left;
    }
    if (left == 0 && room != nullptr) break;
  }
  return *room;
}

bool complete(const Rendezvous& open, int group) {
  if (group == kWarpgroup) return open.arrived == kWarpgroup;
  return open.arrived > 0 && open.arrived == std::popcount(open.mask & current_warp().live);
}

// Runs the collective over the threads that wait for it, and the current one if it has come, and lets them go on.
void finish(Block& block, Rendezvous& open, int group, bool with_current) {
  void* operands[kWarpgroup];
  const int first = current->index / group * group;
  const int count = std::min(group, static_cast<int>(block.threads.size()) - first);
  std::fill_n(operands, group, nullptr);
  for (int i = 0; i < count; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(first + i)];
    const bool waits = thread.state == Thread::State::waiting && thread.waits_on == &open;
    if (waits || (with_current && &thread == current)) operands[i] = thread.operand;
    if (waits) thread.state = Thread::State::ready;
  }
  open.arrived = 0;
  if (group == kWarp) --current_warp().open;
  open.run(operands, open.body);
}

// The end of a thread completes what only waited for it.
void end_thread() {
  Thread& me = *current;
  Block& block = *me.block;
  me.state = Thread::State::ended;
  --block.live;
  Warp& warp = current_warp();
  warp.live &= ~(1u << me.index % kWarp);
  pass_barrier(block);
  if (warp.open == 0) return;
  for (Rendezvous& open : warp.collectives)
    if (complete(open, kWarp)) finish(block, open, kWarp, false);
}

void thread_main() {
  entered();
  current_launch.run(current_launch.closure);
  end_thread();
  leave(*current->fiber, scheduler);
}

// Until stop(), what runs is this thread's.
void start(Thread& thread) {
  current = &thread;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
  blockIdx = thread.block->index;
}
void stop() { current = nullptr; }

void resume(Thread& thread) {
  start(thread);
  switch_fiber(scheduler, *thread.fiber);
  stop();
}

[[noreturn]] void report_deadlock(const std::vector<Thread*>& threads) {
  std::map<std::string, std::pair<int, const Thread*>> groups;
  for (const Thread* thread : threads) {
    const std::string key = thread->state == Thread::State::ended
                                ? "have ended"
                                : "wait for " + std::string(thread->what) + " at " + place(thread->site);
    const auto [group, fresh] = groups.try_emplace(key, 0, thread);
    ++group->second.first;
    static_cast<void>(fresh);
  }
  std::string message = "deadlock";
  for (const auto& [key, group] : groups)
    message += "\n  " + std::to_string(group.first) + " thread(s) " + key + ", first: thread " +
               std::to_string(group.second->index) + " of block " + std::to_string(group.second->block->index.x);
  die(message);
}

// A warp or warpgroup that waits until nobody else can go on: the others get as far ahead of it as they can.
struct Held {
  const Block* block = nullptr;
  int size = kWarp;
  int index = 0;

  bool holds(const Thread& thread) const { return thread.block == block && thread.index / size == index; }
};

// Runs all threads of these blocks to their end.
void run_together(std::vector<std::unique_ptr<Block>>& blocks) {
  std::vector<Thread*> threads;
  for (const auto& block : blocks)
    for (Thread& thread : block->threads) threads.push_back(&thread);
  while (fibers.size() < threads.size()) create(fibers.emplace_back());
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i]->fiber = &fibers[i];
    prepare(fibers[i], thread_main);
  }
  if (order == Order::reverse) arrange(threads);
  size_t running = threads.size();
  Held held;
  while (running > 0) {
    if (order == Order::random) {
      arrange(threads);
      if (held.block == nullptr && next_random(4) == 0) {
        const Thread& one = *threads.front();
        held.block = one.block;
        held.size = next_random(2) == 0 ? kWarp : kWarpgroup;
        held.index = one.index / held.size;
      }
    }
    bool progress = false;
    for (Thread* thread : threads) {
      if (held.holds(*thread)) continue;
      if (thread->state == Thread::State::waiting && thread->waits_on == nullptr) {
        start(*thread);
        if (thread->predicate(thread->predicate_data)) thread->state = Thread::State::ready;
        stop();
      }
      if (thread->state != Thread::State::ready) continue;
      resume(*thread);
      progress = true;
      running -= thread->state == Thread::State::ended;
    }
    for (const auto& block : blocks) {
      if (progress || block->later.empty()) continue;
      const std::function<void()> work = std::move(block->later.front());
      block->later.pop_front();
      start(block->threads.front());
      work();
      stop();
      progress = true;
    }
    if (!progress && held.block != nullptr) {
      held.block = nullptr;
      progress = true;
    }
    if (!progress) report_deadlock(threads);
  }
}

std::unique_ptr<Block> make_block(unsigned index, int threads) {
  auto block = std::make_unique<Block>();
  block->index = {index, 0, 0};
  block->threads = std::vector<Thread>(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) {
    block->threads[static_cast<size_t>(i)].block = block.get();
    block->threads[static_cast<size_t>(i)].index = i;
  }
  block->live = threads;
  for (int i = 0; i < threads; i += kWarp)
    block->warps.emplace_back().live = threads - i >= kWarp ? 0xffffffffu : (1u << (threads - i)) - 1u;
  block->warpgroups.resize(static_cast<size_t>((threads + kWarpgroup - 1) / kWarpgroup));
  // Exactly as large as asked for, so that AddressSanitizer sees what lies outside; NaN to begin with.
  void* memory = nullptr;
  if (current_launch.shared_bytes > 0 && posix_memalign(&memory, 1024, current_launch.shared_bytes) != 0)
    die("no memory for shared memory");
  if (memory != nullptr) std::memset(memory, 0xff, current_launch.shared_bytes);
  block->shared = static_cast<char*>(memory);
  return block;
}

void finish_block(Block& block) {
  if (!block.later.empty())
    die("block " + std::to_string(block.index.x) + " ended before its asynchronous work was done");
  std::free(block.shared);
}

int environment_number(const char* name, int fallback) {
  const char* value = std::getenv(name);
  return value == nullptr ? fallback : std::atoi(value);
}

int capability() { return environment_number("LCR2S_EMULATE_CAPABILITY", 90); }

int shared_limit() {
  switch (capability()) {
    case 80:
      return 163 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

int multiprocessors() { return environment_number("LCR2S_EMULATE_MULTIPROCESSORS", 4); }

std::recursive_mutex launch_mutex;
std::map<const void*, int> shared_limits;

}  // namespace

void fail(const char* message, Site site) { die(std::string(message) + " at " + place(site)); }

char* dynamic_shared() { return current->block->shared; }
int64_t dynamic_shared_bytes() { return static_cast<int64_t>(current_launch.shared_bytes); }

void wait_until_true(bool (*predicate)(const void*), const void* data, const char* what, Site site) {
  if (predicate(data)) return;
  current->predicate = predicate;
  current->predicate_data = data;
  suspend(nullptr, what, site);
}

void barrier(const char* what, Site site) {
  Block& block = *current->block;
  Barrier& barrier = block.barrier;
  if (barrier.arrived > 0 && !same_place(barrier.site, site))
    die("divergent " + std::string(what) + ": this thread is at " + place(site) + ", another waits at " +
        place(barrier.site));
  barrier.site = site;
  ++barrier.arrived;
  if (!pass_barrier(block)) suspend(&barrier, what, site);
}

bool work_at_once() { return order == Order::reverse || (order == Order::random && next_random(2) == 0); }

void later(std::function<void()> work) {
  if (work_at_once())
    work();
  else
    current->block->later.push_back(std::move(work));
}

std::any& thread_state() { return current->user_state; }

void collective(int group, uint32_t mask, void* operand, CollectiveBody run, const void* body, const char* what,
                Site site) {
  Thread& me = *current;
  Block& block = *me.block;
  const int first = me.index / group * group;
  if (group == kWarp && !(mask >> (me.index - first) & 1u))
    die(std::string(what) + " at " + place(site) + ": the mask leaves out the calling lane");
  Rendezvous& open = group == kWarp ? collective_of(current_warp(), mask)
                                    : block.warpgroups[static_cast<size_t>(me.index / kWarpgroup)];
  if (open.arrived > 0 && std::strcmp(open.what, what) != 0)
    die("divergent warp: this lane is at " + std::string(what) + " " + place(site) + ", others wait for " + open.what);
  if (group == kWarp && open.arrived == 0) ++current_warp().open;
  open.mask = mask;
  open.what = what;
  open.run = run;
  open.body = body;
  ++open.arrived;
  me.operand = operand;
  if (complete(open, group))
    finish(block, open, group, true);
  else
    suspend(&open, what, site);
}

cudaError_t set_shared_limit(const void* kernel, int bytes) {
  const std::lock_guard<std::recursive_mutex> lock(launch_mutex);
  if (bytes < 0 || bytes > shared_limit()) return cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t blocks_per_multiprocessor(int* blocks, const void*, int threads, size_t shared_bytes) {
  if (threads < 1 || threads > kMaxThreads) return cudaErrorInvalidValue;
  const auto by_shared = static_cast<int>((static_cast<size_t>(shared_limit()) + 1024) / (shared_bytes + 1024));
  *blocks = std::min({2, 2048 / threads, by_shared});
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* name, void (*run)(const void*),
                   const void* closure) {
  const std::lock_guard<std::recursive_mutex> lock(launch_mutex);
  current_launch = {name, run, closure, config.dynamicSmemBytes};
  if (current != nullptr) die("a kernel launches a kernel");
  const int threads = static_cast<int>(config.blockDim.x);
  const auto limit = shared_limits.find(kernel);
  if (threads < 1 || threads > kMaxThreads || config.blockDim.y != 1 || config.blockDim.z != 1 ||
      config.gridDim.x < 1 || config.gridDim.y != 1 || config.gridDim.z != 1 ||
      config.dynamicSmemBytes > static_cast<size_t>(limit == shared_limits.end() ? 48 * 1024 : limit->second))
    return cudaErrorInvalidValue;
  choose_order();
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative != 0;
  std::vector<std::unique_ptr<Block>> together;
  if (cooperative) {
    int per_multiprocessor = 0;
    blocks_per_multiprocessor(&per_multiprocessor, kernel, threads, config.dynamicSmemBytes);
    if (config.gridDim.x > static_cast<unsigned>(per_multiprocessor * multiprocessors()))
      return cudaErrorCooperativeLaunchTooLarge;
    for (unsigned i = 0; i < gridDim.x; ++i) together.push_back(make_block(i, threads));
    run_together(together);
    for (const auto& block : together) finish_block(*block);
    return cudaSuccess;
  }
  std::vector<unsigned> indices(gridDim.x);
  std::iota(indices.begin(), indices.end(), 0u);
  arrange(indices);
  for (const unsigned index : indices) {
    together.clear();
    together.push_back(make_block(index, threads));
    run_together(together);
    finish_block(*together.front());
  }
  return cudaSuccess;
}

}  // namespace lcr2s::emulation

using namespace lcr2s::emulation;

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return "invalid argument";
  }
}

// What callers cache by device stays right when the environment changes: each setting is a device of its own.
cudaError_t cudaGetDevice(int* device) {
  *device = 1000 * multiprocessors() + capability();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability() % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit();
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
