#include "support_attention.h"

#include <cuda_runtime.h>

#include <cmath>
#ifndef LCR2S_EMULATE_CUDA
#include <cooperative_groups.h>
#endif

#include "element.h"
#include "launch.h"
#include "support_attention_plan.h"
#include "warp.h"

// A warp works on a slice of one query (or pool row): neighbouring heads of 8, 16 or 32 lanes each, so that a gathered
// row is read in contiguous pieces of up to 512 bytes, 16 bytes a lane. Four rows of keys and as many of values are
// asked for before the first is used, and no row is asked for twice. The indices of 32 entries are one load, handed
// round by shuffles. The scores of four entries are summed over the lanes together; those of up to 32 stay in shared
// memory, those of a larger set in the result that is theirs (probs, grad_scores). The softmax is over whole sets, no
// running maximum.
//
// Bytes moved for one query with 8 heads of 128 floats and 4 rows: query 4096, keys and values 8 x 4096, out 4096,
// which is the gather's floor of 40960; besides that the index, 48, and probs, 128: 0.4 %. Backward: the query pass
// reads grad_out and the same 8 rows and writes grad_query, 40960, and the index, probs and grad_scores, 304; the pool
// pass, for a row with 4 users, reads 4 queries and 4 rows of grad_out and writes two gradients, 40960, and 4 x (16 of
// the transposed index + 64 of weights).
//
// Sums have a fixed order, so results are the same in every run. The host cannot look at an index that lives on the
// device: entries that point outside give NaN and are never followed; a debug build stops there instead.
namespace lcr2s::cuda {

namespace plan = support_attention_plan;

namespace {

constexpr int kWarps = plan::kWarps;

template <class A>
__device__ __forceinline__ A exponential(A x) {
  if constexpr (sizeof(A) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}

// Of memory that nothing in the launch writes.
__device__ __forceinline__ int64_t read_index(const int64_t* p) {
  static_assert(sizeof(long long) == sizeof(int64_t));
  return static_cast<int64_t>(__ldg(reinterpret_cast<const long long*>(p)));
}

// Rows that start at multiples of 16 bytes, read 16 bytes at a time, kChunk rows at once.
template <class T>
struct Packed {
  using A = Accumulate<T>;
  using Vector = uint4;
  static constexpr int kSize = 16 / sizeof(T);
  static constexpr int kChunk = 4;

  __device__ __forceinline__ static Vector load(const void* data, int64_t at, DType) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(data) + at));
  }
  __device__ __forceinline__ static void convert(const Vector& from, A (&to)[kSize]) {
    if constexpr (sizeof(T) > 2) {
      memcpy(to, &from, sizeof(from));
    } else {
      const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[2 * i] = to_accumulate(T{static_cast<uint16_t>(words[i] & 0xffffu)});
        to[2 * i + 1] = to_accumulate(T{static_cast<uint16_t>(words[i] >> 16)});
      }
    }
  }
  __device__ __forceinline__ static void store(void* data, int64_t at, DType, const A (&from)[kSize]) {
    Pack<T, kSize> pack;
#pragma unroll
    for (int u = 0; u < kSize; ++u) pack.at[u] = from_accumulate<T>(from[u]);
    store_pack<T, kSize>(static_cast<T*>(data) + at, pack);
  }
};

// Rows of any alignment, element by element and one row at a time. The types with float arithmetic are told apart while
// running: one kernel for all of them.
template <class Arithmetic>
struct General {
  using A = Arithmetic;
  using Vector = A;
  static constexpr int kSize = 1;
  static constexpr int kChunk = 1;

  __device__ __forceinline__ static Vector load(const void* data, int64_t at, DType dtype) {
    if constexpr (sizeof(A) == 8) return static_cast<const double*>(data)[at];
    if (dtype == DType::float32) return static_cast<const float*>(data)[at];
    if (dtype == DType::bfloat16) return to_accumulate(static_cast<const BFloat16*>(data)[at]);
    return to_accumulate(static_cast<const Half*>(data)[at]);
  }
  __device__ __forceinline__ static void convert(const Vector& from, A (&to)[kSize]) { to[0] = from; }
  __device__ __forceinline__ static void store(void* data, int64_t at, DType dtype, const A (&from)[kSize]) {
    if constexpr (sizeof(A) == 8) {
      static_cast<double*>(data)[at] = from[0];
    } else if (dtype == DType::float32) {
      static_cast<float*>(data)[at] = from[0];
    } else if (dtype == DType::bfloat16) {
      static_cast<BFloat16*>(data)[at] = from_accumulate<BFloat16>(from[0]);
    } else {
      static_cast<Half*>(data)[at] = from_accumulate<Half>(from[0]);
    }
  }
};

struct Range {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ bool inside(int64_t index, int64_t limit) {
  device_check(index >= 0 && index < limit);
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(limit);
}

__device__ __forceinline__ Range entry_range(const int64_t* indptr, int64_t row, int64_t entries) {
  const Range range{read_index(indptr + row), read_index(indptr + row + 1)};
  const bool sound = range.begin >= 0 && range.begin <= range.end && range.end <= entries;
  device_check(sound);
  return sound ? range : Range{0, 0};
}

// Where a lane stands in its warp's slice. A lane whose head does not exist goes along and touches nothing.
struct Lane {
  int index;  // within the head
  int lanes;
  int slice;
  int head;
  bool active;

  __device__ __forceinline__ Lane(int64_t heads, int lanes, int slice)
      : index(lane_index() % lanes), lanes(lanes), slice(slice), head(slice * (kWarp / lanes) + lane_index() / lanes) {
    active = head < heads;
  }
};

// The rows of an operand or a result as one lane sees them: every `step` elements one vector, in block after block.
template <class L>
struct Heads {
  const void* data;
  int64_t stride;
  DType dtype;
  int first;
  int left;  // elements from the first to the end of the head, not positive where the lane has none
  int step;

  __device__ __forceinline__ Heads(const void* data, int64_t stride, DType dtype, int64_t width, const Lane& lane)
      : data(data),
        stride(stride),
        dtype(dtype),
        first(lane.head * static_cast<int>(width) + lane.index * L::kSize),
        left(lane.active ? static_cast<int>(width) - lane.index * L::kSize : 0),
        step(lane.lanes * L::kSize) {}

  __device__ __forceinline__ int blocks(int64_t width) const { return (static_cast<int>(width) + step - 1) / step; }
  __device__ __forceinline__ bool has(int block) const { return block * step < left; }
  __device__ __forceinline__ int64_t at(int64_t row, int block) const { return row * stride + first + block * step; }

  // Zeros where there is no such row, or the head ends before.
  __device__ __forceinline__ typename L::Vector load(int64_t row, int block) const {
    return row >= 0 && has(block) ? L::load(data, at(row, block), dtype) : typename L::Vector{};
  }
  // The parts of the rows whose numbers the lanes from `lane` on hold.
  __device__ __forceinline__ void gather(int64_t row, int lane, int block,
                                         typename L::Vector (&parts)[L::kChunk]) const {
#pragma unroll
    for (int j = 0; j < L::kChunk; ++j) parts[j] = load(shuffle(row, lane + j), block);
  }
  __device__ __forceinline__ void store(int64_t row, int block, const typename L::A (&sums)[L::kSize],
                                        typename L::A scale) const {
    typename L::A scaled[L::kSize];
#pragma unroll
    for (int u = 0; u < L::kSize; ++u) scaled[u] = scale * sums[u];
    if (has(block)) L::store(const_cast<void*>(data), at(row, block), dtype, scaled);
  }
};

// The sums over a head's lanes of kChunk values at once: sum j ends up in lane j of every kChunk neighbours.
template <int Chunk, class A>
__device__ __forceinline__ A sum_lanes(A (&values)[Chunk], int lanes) {
#pragma unroll
  for (int half = Chunk / 2; half > 0; half /= 2) {
    const bool upper = (lane_index() & half) != 0;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const A given = upper ? values[j] : values[j + half];
      values[j] = (upper ? values[j + half] : values[j]) + shuffle_xor(given, half);
    }
  }
  A sum = values[0];
#pragma unroll
  for (int step = Chunk; step < kWarp; step *= 2)
    if (step < lanes) sum += shuffle_xor(sum, step);
  return sum;
}

// sums += sum over j < count of part j times the weight that lane j of every kChunk neighbours holds.
template <class L>
__device__ __forceinline__ void add_weighted(typename L::A (&sums)[L::kSize],
                                             const typename L::Vector (&parts)[L::kChunk], typename L::A weight,
                                             int count) {
#pragma unroll
  for (int j = 0; j < L::kChunk; ++j) {
    const typename L::A w = __shfl_sync(kFullMask, weight, j, L::kChunk);
    if (j >= count) continue;
    typename L::A x[L::kSize];
    L::convert(parts[j], x);
#pragma unroll
    for (int u = 0; u < L::kSize; ++u) sums[u] += w * x[u];
  }
}

// The set of one query.
struct Set {
  const int64_t* indices;
  int64_t size;
  int64_t pool_rows;
};

// The pool rows of 32 neighbouring entries of a set, one in each lane; -1 where there is no such entry or it points
// outside, which bit j of `outside` tells for lane j.
struct SetRows {
  int64_t row;
  unsigned outside;

  __device__ __forceinline__ void read(const Set& set, int64_t first) {
    const int64_t entry = first + lane_index();
    row = entry < set.size ? read_index(set.indices + entry) : 0;
    const bool found = inside(row, entry < set.size ? set.pool_rows : 1);
    outside = __ballot_sync(kFullMask, !found);
    if (!found || entry >= set.size) row = -1;
  }
};

// The scores of a set, for one head: entry j's at data[j * stride]. Those of a small set are in shared memory, those of
// a larger one in `stored`, where all end up, at [j * heads].
template <class A>
struct Scores {
  A* data;
  int64_t stride;
  A* stored;
  int64_t heads;
  int64_t size;

  // `stored` is that of the head.
  __device__ __forceinline__ Scores(A* stored, int64_t heads, int64_t size, const Lane& lane)
      : data(stored), stride(heads), stored(stored), heads(heads), size(lane.active ? size : 0) {
    if (size > kWarp) return;
    stride = kWarp / lane.lanes;
    data = reinterpret_cast<A*>(dynamic_shared()) + warp_index() * plan::kSharedScores + lane_index() / lane.lanes;
  }
  __device__ __forceinline__ A& operator[](int64_t j) const { return data[j * stride]; }
  __device__ __forceinline__ void finish(int64_t j, A score) const {
    data[j * stride] = score;
    if (data != stored) stored[j * heads] = score;
  }
};

// Scores to probabilities.
template <class A>
__device__ __forceinline__ void softmax(const Lane& lane, const Scores<A>& scores) {
  A maximum = -static_cast<A>(INFINITY);
  for (int64_t j = lane.index; j < scores.size; j += lane.lanes) maximum = scores[j] > maximum ? scores[j] : maximum;
  maximum = warp_reduce(maximum, [](A a, A b) { return a > b ? a : b; }, lane.lanes);
  A sum = 0;
  for (int64_t j = lane.index; j < scores.size; j += lane.lanes) {
    const A x = exponential(scores[j] - maximum);
    scores[j] = x;
    sum += x;
  }
  sum = warp_sum(sum, lane.lanes);
  for (int64_t j = lane.index; j < scores.size; j += lane.lanes) scores.finish(j, scores[j] / sum);
}

// Gradients of the probabilities to those of the scores. `first_prob` is that of entry lane.index.
template <class A>
__device__ __forceinline__ void softmax_backward(const Lane& lane, const A* probs, A first_prob,
                                                 const Scores<A>& scores) {
  const auto prob = [&](int64_t j) { return j == lane.index ? first_prob : probs[j * scores.heads]; };
  A sum = 0;
  for (int64_t j = lane.index; j < scores.size; j += lane.lanes) sum += prob(j) * scores[j];
  sum = warp_sum(sum, lane.lanes);
  for (int64_t j = lane.index; j < scores.size; j += lane.lanes) scores.finish(j, prob(j) * (scores[j] - sum));
}

// The forward, and the backward's pass over the queries. A query's row of `left` times the rows of its entries in
// `right` gives the entries' scores, times scale; these become probabilities or, where `probs` are given, the gradients
// of the scores, and are stored in `scores`; their sum over the rows in `other`, times result_scale, is the query's row
// of `result`, unless that is null.
struct QueryPass {
  Rows left;
  Rows right;
  int64_t width;
  double scale;
  const void* probs;
  void* scores;
  Rows other;
  int64_t other_width;
  double result_scale;
  void* result;
};

template <class L>
__device__ __forceinline__ void query_unit(const SupportAttentionShape& s, const QueryPass& pass, const Lane& lane,
                                           int64_t query) {
  using A = typename L::A;
  const Range range = entry_range(s.indptr, query, s.entries);
  const Set set{s.indices + range.begin, range.end - range.begin, s.pool_rows};
  const int64_t scores_at = range.begin * s.heads + lane.head;
  const Heads<L> left(pass.left.data, pass.left.stride, s.dtype, pass.width, lane);
  const Heads<L> right(pass.right.data, pass.right.stride, s.dtype, pass.width, lane);
  const Heads<L> other(pass.other.data, pass.other.stride, s.dtype, pass.other_width, lane);
  const Scores<A> scores(static_cast<A*>(pass.scores) + scores_at, s.heads, set.size, lane);
  const A* probs = static_cast<const A*>(pass.probs) + scores_at;
  // On its way while the rows are.
  const A first_prob = pass.probs && lane.index < scores.size ? probs[lane.index * s.heads] : A(0);
  typename L::Vector others[L::kChunk] = {};
  SetRows rows{};
  for (int64_t first = 0; first < set.size; first += kWarp) {
    rows.read(set, first);
    const int count = static_cast<int>(min(set.size - first, static_cast<int64_t>(kWarp)));
    for (int from = 0; from < count; from += L::kChunk) {
      A products[L::kChunk] = {};
      for (int block = 0; block < right.blocks(pass.width); ++block) {
        typename L::Vector parts[L::kChunk];
        const typename L::Vector part = left.load(query, block);
        right.gather(rows.row, from, block, parts);
        // The rows that the sums begin with come meanwhile.
        if (first + from + block == 0 && pass.result) other.gather(rows.row, 0, 0, others);
        A x[L::kSize];
        L::convert(part, x);
#pragma unroll
        for (int j = 0; j < L::kChunk; ++j) {
          if (from + j >= count) continue;
          A y[L::kSize];
          L::convert(parts[j], y);
#pragma unroll
          for (int u = 0; u < L::kSize; ++u) products[j] += x[u] * y[u];
        }
      }
      const A score = static_cast<A>(pass.scale) * sum_lanes(products, lane.lanes);
      const bool outside = (rows.outside >> (from + lane_index() % L::kChunk) & 1u) != 0;
      const int64_t entry = first + from + lane.index;
      if (lane.index < L::kChunk && entry < scores.size) scores[entry] = outside ? static_cast<A>(NAN) : score;
    }
  }
  __syncwarp();
  if (pass.probs)
    softmax_backward(lane, probs, first_prob, scores);
  else
    softmax(lane, scores);
  __syncwarp();
  if (!pass.result) return;
  const Heads<L> result(pass.result, s.heads * pass.other_width, s.dtype, pass.other_width, lane);
  for (int block = 0; block < other.blocks(pass.other_width); ++block) {
    A totals[L::kSize] = {};
    for (int64_t first = 0; first < set.size; first += kWarp) {
      // Long sums are taken 32 at a time, so that their rounding errors grow slowly.
      A sums[L::kSize] = {};
      if (set.size > kWarp) rows.read(set, first);
      const int count = static_cast<int>(min(set.size - first, static_cast<int64_t>(kWarp)));
      for (int from = 0; from < count; from += L::kChunk) {
        if (first + from + block > 0) other.gather(rows.row, from, block, others);
        const int64_t entry = first + from + lane_index() % L::kChunk;
        add_weighted<L>(sums, others, entry < scores.size ? scores[entry] : A(0), count - from);
      }
#pragma unroll
      for (int u = 0; u < L::kSize; ++u) totals[u] += sums[u];
    }
    result.store(query, block, totals, static_cast<A>(pass.result_scale));
  }
  // The scores have been read before the next unit's are written.
  __syncwarp();
}

// The backward's pass over the pool. For both sides: a row of `result` is scale times the sum over its users of their
// rows of `source`, weighted by the entry's `weights`. A null result is not asked for.
struct PoolSide {
  Rows source;
  const void* weights;
  int64_t width;
  double scale;
  void* result;
};

struct PoolPass {
  const int64_t* entry_rows;
  const int64_t* t_indptr;
  const int64_t* t_entries;
  PoolSide key;
  PoolSide value;
  // Segments of rows with many users: `slots` of them at most, their sums, and a counter for each slot and slice.
  int segment_shift;
  int64_t slots;
  void* partials;
  unsigned* counters;
};

// Some users of a pool row, by their positions in the transposed index: those of a slot, or all of them, slot -1.
struct Users {
  int64_t row;
  int64_t begin;
  int64_t end;
  int64_t slot;
};

// A pool row with many users, whose segments have neighbouring slots; no row where a slot holds none.
struct BusyRow {
  int64_t row;
  Range users;
  int64_t first_slot;
  int segments;
};

__device__ __forceinline__ BusyRow busy_row(const SupportAttentionShape& s, const PoolPass& pass, int64_t slot) {
  const BusyRow none{-1, {0, 0}, 0, 0};
  const int64_t step = int64_t{1} << (pass.segment_shift - 1);
  const int64_t entry = read_index(pass.t_entries + slot * step + step - 1);
  if (!inside(entry, s.entries)) return none;
  const int64_t row = read_index(s.indices + entry);
  if (!inside(row, s.pool_rows)) return none;
  const Range users = entry_range(pass.t_indptr, row, s.entries);
  const plan::Slots slots = plan::slots_of(users.begin, users.end, pass.segment_shift);
  if (slots.count < 2 || slot < slots.first || slot >= slots.first + slots.count) return none;
  return {row, users, slots.first, static_cast<int>(slots.count)};
}

// One side of the pool pass as one lane sees it.
template <class L>
struct PoolSums {
  using A = typename L::A;
  const PoolSide& side;
  Heads<L> source;
  A sums[L::kSize];
  typename L::Vector parts[L::kChunk];
  A weight;

  __device__ __forceinline__ PoolSums(const SupportAttentionShape& s, const PoolSide& side, const Lane& lane)
      : side(side), source(side.source.data, side.source.stride, s.dtype, side.width, lane), parts{} {}

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int u = 0; u < L::kSize; ++u) sums[u] = 0;
  }
  // Reads ahead for the users from lane `from` on; `at` is the place of this lane's weight, negative where it has none.
  __device__ __forceinline__ void read(int64_t row, int from, int block, int64_t at) {
    if (!side.result) return;
    source.gather(row, from, block, parts);
    // A plain read: the same launch may have written it.
    weight = at < 0 ? static_cast<A>(NAN) : static_cast<const A*>(side.weights)[at];
  }
  __device__ __forceinline__ void add(int count) {
    if (side.result) add_weighted<L>(sums, parts, weight, count);
  }
  __device__ __forceinline__ void store(int64_t row, int block, int64_t heads) const {
    if (!side.result || !source.has(block)) return;
    const int64_t at = row * heads * side.width + source.first + block * source.step;
    A scaled[L::kSize];
#pragma unroll
    for (int u = 0; u < L::kSize; ++u) scaled[u] = static_cast<A>(side.scale) * sums[u];
    L::store(side.result, at, source.dtype, scaled);
  }
  __device__ __forceinline__ void write_partial(A* partial, int block) const {
    if (!side.result || !source.has(block)) return;
#pragma unroll
    for (int u = 0; u < L::kSize; ++u) partial[source.first + block * source.step + u] = sums[u];
  }
  // Past the first-level cache.
  __device__ __forceinline__ void add_partial(const A* partial, int block) {
    if (!side.result || !source.has(block)) return;
#pragma unroll
    for (int u = 0; u < L::kSize; ++u) sums[u] += __ldcg(partial + source.first + block * source.step + u);
  }
};

// The gradients of a pool row from its users, or their share of them; whoever is last with a row's segments adds them
// up, in order.
template <class L>
__device__ __forceinline__ void pool_unit(const SupportAttentionShape& s, const PoolPass& pass, int slices,
                                          const Lane& lane, const Users& users) {
  using A = typename L::A;
  PoolSums<L> key(s, pass.key, lane);
  PoolSums<L> value(s, pass.value, lane);
  A* const partials = static_cast<A*>(pass.partials);
  const int64_t key_elements = s.heads * pass.key.width;
  const int64_t elements = key_elements + s.heads * pass.value.width;
  const int blocks = key.source.blocks(max(pass.key.width, pass.value.width));
  for (int block = 0; block < blocks; ++block) {
    key.zero();
    value.zero();
    for (int64_t first = users.begin; first < users.end; first += kWarp) {
      // 32 users at once, one in each lane.
      const int count = static_cast<int>(min(users.end - first, static_cast<int64_t>(kWarp)));
      int64_t entry = -1;
      int64_t row = -1;
      if (lane_index() < count) {
        entry = read_index(pass.t_entries + first + lane_index());
        if (inside(entry, s.entries)) row = read_index(pass.entry_rows + entry);
        if (!inside(row, s.queries)) entry = row = -1;
      }
      for (int from = 0; from < count; from += L::kChunk) {
        const int64_t mine = shuffle(entry, from + lane_index() % L::kChunk);
        const int64_t at = mine < 0 || !lane.active ? -1 : mine * s.heads + lane.head;
        key.read(row, from, block, at);
        value.read(row, from, block, at);
        key.add(count - from);
        value.add(count - from);
      }
    }
    if (users.slot < 0) {
      key.store(users.row, block, s.heads);
      value.store(users.row, block, s.heads);
    } else {
      A* const partial = partials + users.slot * elements;
      key.write_partial(partial, block);
      value.write_partial(partial + key_elements, block);
    }
  }
  if (users.slot < 0) return;
  __threadfence();
  __syncwarp();
  const BusyRow busy = busy_row(s, pass, users.slot);
  unsigned before = 0;
  if (lane_index() == 0) before = atomicAdd(pass.counters + busy.first_slot * slices + lane.slice, 1u);
  before = shuffle(before, 0);
  if (before + 1 != static_cast<unsigned>(busy.segments)) return;
  __threadfence();
  for (int block = 0; block < blocks; ++block) {
    key.zero();
    value.zero();
    const A* partial = partials + busy.first_slot * elements;
#pragma unroll 1
    for (int left = busy.segments; left > 0; --left, partial += elements) {
      key.add_partial(partial, block);
      value.add_partial(partial + key_elements, block);
    }
    key.store(users.row, block, s.heads);
    value.store(users.row, block, s.heads);
  }
}

// A block's warps take the units (rows x slices) of its share in turn.
struct Units {
  int64_t row;
  int slice;
  int left;

  __device__ __forceinline__ Units(int64_t rows, int slices, int units_per_block) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * units_per_block + warp_index();
    row = unit / slices;
    slice = static_cast<int>(unit - row * slices);
    const int64_t end = min(static_cast<int64_t>(blockIdx.x + 1) * units_per_block, rows * slices);
    left = static_cast<int>(max(end - unit + kWarps - 1, int64_t{0}) / kWarps);
  }
  __device__ __forceinline__ void next(int slices) {
    row += kWarps / slices;
    slice += kWarps % slices;
    if (slice >= slices) {
      slice -= slices;
      ++row;
    }
    --left;
  }
};

// How a pass is cut up: `units` for a block, none where the launch leaves the pass out. The passes do not share one, so
// that registers with what follows from it are not kept for the other pass.
struct Cut {
  int lanes;
  int slices;
  int units;
};

// Segments of rows with many users first: every lane looks at one slot and slice, and the warp works on those that hold
// a segment.
template <class L>
__device__ __forceinline__ void pool_pass(const SupportAttentionShape& s, const PoolPass& pass, const Cut& cut) {
  const int slices = cut.slices;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t next = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  unsigned found = 0;
  Units units(s.pool_rows, slices, cut.units);
  while (true) {
    Users users{units.row, 0, 0, -1};
    int slice = units.slice;
    if (found != 0) {
      const int64_t item = next + (__ffs(static_cast<int>(found)) - 1 - kWarp) * stride;
      found &= found - 1;
      const int64_t slot = item / slices;
      const BusyRow busy = busy_row(s, pass, slot);
      const int64_t begin = busy.users.begin + ((slot - busy.first_slot) << pass.segment_shift);
      users = {busy.row, begin, min(begin + (int64_t{1} << pass.segment_shift), busy.users.end), slot};
      slice = static_cast<int>(item % slices);
    } else if (next < pass.slots * slices) {
      const int64_t item = next + lane_index() * stride;
      found = __ballot_sync(kFullMask, item < pass.slots * slices && busy_row(s, pass, item / slices).row >= 0);
      next += kWarp * stride;
      continue;
    } else {
      if (units.left == 0) return;
      const Range range = entry_range(pass.t_indptr, units.row, s.entries);
      users.begin = range.begin;
      users.end = range.end;
      units.next(slices);
      if (pass.slots > 0 && (range.end - range.begin - 1) >> pass.segment_shift > 0) continue;
    }
    pool_unit<L>(s, pass, slices, Lane(s.heads, cut.lanes, slice), users);
  }
}

// All blocks of a cooperative launch.
__device__ __forceinline__ void meet() {
#ifdef LCR2S_EMULATE_CUDA
  static unsigned state = 0;
  grid_barrier(&state);
#else
  cooperative_groups::this_grid().sync();
#endif
}

// What one launch does: either pass, or one after the other, then a cooperative one.
struct Passes {
  SupportAttentionShape shape;
  QueryPass query;
  PoolPass pool;
  Cut query_cut;
  Cut pool_cut;
  bool zero_counters;
};

template <class L>
__global__ void __launch_bounds__(plan::kThreads, plan::kResidentBlocks)
    support_attention_kernel(const __grid_constant__ Passes passes) {
  const SupportAttentionShape& s = passes.shape;
  if (passes.zero_counters) {
    const int64_t counters = passes.pool.slots * passes.pool_cut.slices;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * plan::kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * plan::kThreads + threadIdx.x; i < counters; i += threads)
      passes.pool.counters[i] = 0;
  }
  const Cut& cut = passes.query_cut;
  if (cut.units > 0)
    for (Units units(s.queries, cut.slices, cut.units); units.left > 0; units.next(cut.slices))
      query_unit<L>(s, passes.query, Lane(s.heads, cut.lanes, units.slice), units.row);
  if (passes.pool_cut.units == 0) return;
  if (cut.units > 0 || passes.zero_counters) meet();
  pool_pass<L>(s, passes.pool, passes.pool_cut);
}

// The kernel of a layout and what it is told.
const char* launch_passes(const plan::Layout& layout, const Passes& passes, int64_t blocks, bool cooperative,
                          void* stream) {
  const int64_t shared_bytes = kWarps * plan::kSharedScores * plan::statistic_bytes(passes.shape.dtype);
  const auto run = [&](auto kernel) {
    return cooperative ? launch_cooperative(kernel, blocks, plan::kThreads, shared_bytes, stream, passes)
                       : launch(kernel, blocks, plan::kThreads, shared_bytes, stream, passes);
  };
  const DType dtype = passes.shape.dtype;
  if (dtype == DType::float64) {
#ifdef LCR2S_EMULATE_CUDA
    if (layout.packed) return run(support_attention_kernel<Packed<double>>);
#endif
    // On a GPU float64 is for tests: one kernel is enough.
    return run(support_attention_kernel<General<double>>);
  }
  if (!layout.packed) return run(support_attention_kernel<General<float>>);
  if (dtype == DType::float32) return run(support_attention_kernel<Packed<float>>);
  if (dtype == DType::bfloat16) return run(support_attention_kernel<Packed<BFloat16>>);
  return run(support_attention_kernel<Packed<Half>>);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
bool aligned(const Rows& rows, DType dtype) {
  return aligned(rows.data) && rows.stride * plan::element_bytes(dtype) % 16 == 0;
}

const char* refused(const SupportAttentionShape& s) {
  return s.heads * (s.width > s.value_width ? s.width : s.value_width) < (int64_t{1} << 31)
             ? nullptr
             : "a row must have fewer than 2^31 elements";
}

}  // namespace

const char* support_attention(const SupportAttentionArgs& args, void* stream) {
  const SupportAttentionShape& s = args.shape;
  if (const char* error = refused(s)) return error;
  const plan::Layout layout = plan::layout(s, aligned(args.query, s.dtype) && aligned(args.key, s.dtype) &&
                                                  aligned(args.value, s.dtype) && aligned(args.out));
  const plan::Grid grid = plan::grid(s.queries * layout.slices, current_device().multiprocessors);
  Passes passes{};
  passes.shape = s;
  passes.query = {args.query, args.key, s.width, s.scale, nullptr, args.probs, args.value, s.value_width, 1, args.out};
  passes.query_cut = {layout.lanes, layout.slices, grid.units_per_block};
  return launch_passes(layout, passes, grid.blocks, false, stream);
}

int64_t support_attention_backward_workspace(const SupportAttentionShape& shape) {
  // No layout takes more slices than there are heads.
  return plan::workspace(shape, shape.heads).bytes(shape.dtype);
}

const char* support_attention_backward(const SupportAttentionBackwardArgs& args, void* workspace, void* stream) {
  const SupportAttentionShape& s = args.shape;
  if (const char* error = refused(s)) return error;
  const plan::Layout layout =
      plan::layout(s, aligned(args.grad_out, s.dtype) && aligned(args.query, s.dtype) && aligned(args.key, s.dtype) &&
                          aligned(args.value, s.dtype) && aligned(args.grad_query) && aligned(args.grad_key) &&
                          aligned(args.grad_value));
  const bool queries = args.grad_query || args.grad_key;
  const bool pool = args.grad_key || args.grad_value;
  const plan::Backward plan = plan::backward(s, layout.slices, queries, pool, current_device().multiprocessors);
  const int64_t partial_bytes = plan::workspace(s, layout.slices).partial_elements * plan::statistic_bytes(s.dtype);
  Passes passes{};
  passes.shape = s;
  passes.query = {args.grad_out,    args.value, s.value_width, 1,       args.probs,
                  args.grad_scores, args.key,   s.width,       s.scale, args.grad_query};
  passes.pool = {args.entry_rows,
                 args.t_indptr,
                 args.t_entries,
                 {args.query, args.grad_scores, s.width, s.scale, args.grad_key},
                 {args.grad_out, args.probs, s.value_width, 1, args.grad_value},
                 plan.segments.shift,
                 plan.segments.slots,
                 workspace,
                 reinterpret_cast<unsigned*>(static_cast<char*>(workspace) + partial_bytes)};
  passes.query_cut = {layout.lanes, layout.slices, plan.query.units_per_block};
  passes.pool_cut = {layout.lanes, layout.slices, plan.cooperative ? plan.pool.units_per_block : 0};
  passes.zero_counters = plan.segments.slots > 0;
  const char* error = launch_passes(layout, passes, plan.first_blocks, plan.cooperative, stream);
  if (error || plan.cooperative) return error;
  passes.query_cut.units = 0;
  passes.pool_cut.units = plan.pool.units_per_block;
  passes.zero_counters = false;
  return launch_passes(layout, passes, plan.second_blocks, false, stream);
}

}  // namespace lcr2s::cuda
