#include "support_attention.h"

#include "scalar.h"

#ifdef LCR2S_X86
#include <immintrin.h>
#endif

namespace lcr2s::cpu::LCR2S_ISA {

namespace {

// Rows per task follow from the work: a task touches at least this many elements.
constexpr int64_t kTaskElements = 65536;
// Work of fewer elements, a few tenths of a millisecond, stays on one thread: another saves less than waking it, or
// waiting for it on a busy machine, can cost.
constexpr int64_t kSmallElements = int64_t{1} << 21;
constexpr int64_t kMaxTasks = 1024;
// Gathered matrices of this many bytes and more do not stay in the caches. Below it, asking for rows ahead costs more
// than it saves, and results are left where their reader finds them.
constexpr int64_t kLargeBytes = int64_t{6} << 20;
// How many gathered rows ahead.
constexpr int64_t kAhead = 4;

template <class T>
struct RowsOf {
  const T* data;
  int64_t stride;

  explicit RowsOf(Rows rows) : data(static_cast<const T*>(rows.data)), stride(rows.stride) {}
  const T* operator[](int64_t row) const { return data + row * stride; }
  RowsOf from(int64_t column) const { return RowsOf(Rows{data + column, stride}); }
};

// Calls body(begin, end) on ranges of rows of about equal work (entries + rows), cut by the shape and the index alone.
template <class F>
void for_row_ranges(const Parallel& parallel, const int64_t* indptr, int64_t rows, int64_t row_elements,
                    const F& body) {
  const int64_t work = indptr[rows] + rows;
  int64_t tasks = work * row_elements / kTaskElements;
  tasks = work * row_elements < kSmallElements ? 1 : tasks > kMaxTasks ? kMaxTasks : tasks;
  const auto boundary = [=](int64_t task) {
    // First row whose preceding work reaches the task's share.
    const int64_t share = task * (work / tasks) + (task < work % tasks ? task : work % tasks);
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (indptr[middle] + middle < share) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel.for_each(tasks, [&](int64_t task) { body(boundary(task), boundary(task + 1)); });
}

// Asks for `Count` elements from `p` on.
template <int Count, class T>
LCR2S_INLINE void prefetch(const T* p) {
#pragma GCC unroll 8
  for (int at = 0; at < Count; at += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + at);
}

// Past the caches, and without reading the lines first; p is aligned to a vector. fence_streams() makes it visible to
// other threads.
LCR2S_INLINE void stream(void* p, Vec<float> v) {
#if defined(LCR2S_X86) && LCR2S_VECTOR_BYTES == 64
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(LCR2S_X86) && LCR2S_VECTOR_BYTES == 32
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(LCR2S_X86)
  _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
  store(static_cast<float*>(p), v);
#endif
}
LCR2S_INLINE void fence_streams() {
#ifdef LCR2S_X86
  _mm_sfence();
#endif
}

// The products of two heads, summed down to one vector; asks for the head at `ahead` meanwhile.
template <bool Large, class T>
LCR2S_INLINE Vec<Accumulate<T>> multiply(const T* a, const T* b, const T* ahead, int64_t width) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * lanes <= width; at += 4 * lanes) {
    if constexpr (Large) prefetch<4 * lanes>(ahead + at);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sums[u] += load_accumulate(a + at + u * lanes) * load_accumulate(b + at + u * lanes);
  }
  for (; at + lanes <= width; at += lanes) sums[0] += load_accumulate(a + at) * load_accumulate(b + at);
  if (at < width) {
    const int rest = static_cast<int>(width - at);
    sums[1] += load_accumulate(a + at, rest) * load_accumulate(b + at, rest);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Long sums are taken in runs of this many summands, so that their rounding errors grow slowly.
constexpr int64_t kRun = 32;

// Sum of term(j) over j < count.
template <class A, class F>
LCR2S_INLINE Vec<A> sum_in_runs(int64_t count, const F& term) {
  Vec<A> total{};
  for (int64_t run = 0; run < count; run += kRun) {
    const int64_t end = count - run < kRun ? count : run + kRun;
    Vec<A> sum{};
    for (int64_t j = run; j < end; ++j) sum += term(j);
    total += sum;
  }
  return total;
}

// The summands of one sum: entry e has row rows[e] of `source` and the heads' weights at weights + e * heads. They are
// the entries first .. first + count of all `entries`, or the ones that `order` lists there.
template <class T>
struct Summands {
  int64_t first;
  int64_t count;
  int64_t entries;
  const int64_t* order;
  const int64_t* rows;
  RowsOf<T> source;
  const Accumulate<T>* weights;
  int64_t heads;

  LCR2S_INLINE int64_t entry(int64_t j) const { return order ? order[first + j] : first + j; }
  LCR2S_INLINE const T* row(int64_t j) const { return source[rows[entry(j)]]; }
  // The row that is gathered some rows later, for this sum or another.
  LCR2S_INLINE const T* row_ahead(int64_t j) const {
    const int64_t last = entries - 1 - first;
    return row(j + kAhead < last ? j + kAhead : last);
  }
};

// Where a sum finds its summands, looked up once for all heads and columns.
template <class T>
struct Places {
  static constexpr int64_t kCapacity = 4 * kRun;
  struct Place {
    const T* row;
    const T* ahead;
    const Accumulate<T>* weights;
  };
  Place list[kCapacity];

  template <bool Large>
  __attribute__((noinline)) void find(const Summands<T>& summands, int64_t begin) {
    const int64_t count = summands.count - begin < kCapacity ? summands.count - begin : kCapacity;
    for (int64_t j = 0; j < count; ++j) {
      list[j].row = summands.row(begin + j);
      if constexpr (Large) list[j].ahead = summands.row_ahead(begin + j);
      list[j].weights = summands.weights + summands.entry(begin + j) * summands.heads;
    }
  }
};

// out[offset ..] = scale * the weighted sum of `Vectors` vectors of one head, in the order of the entries.
template <bool Large, int Vectors, class T>
LCR2S_INLINE void sum_block(const Summands<T>& summands, Places<T>& places, int64_t head, int64_t offset,
                            Accumulate<T> scale, bool streamed, T* out) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t capacity = Places<T>::kCapacity;
  const auto add_run = [&](int64_t begin, int64_t end, Vec<A>* sums) __attribute__((always_inline)) {
    if (begin % capacity == 0 && summands.count > capacity) places.template find<Large>(summands, begin);
    const typename Places<T>::Place* place = places.list + begin % capacity;
    for (const auto* stop = place + (end - begin); place < stop; ++place) {
      const A weight = place->weights[head];
      const T* source = place->row + offset;
      if constexpr (Large) prefetch<Vectors * lanes>(place->ahead + offset);
#pragma GCC unroll 8
      for (int u = 0; u < Vectors; ++u) sums[u] += weight * load_accumulate(source + u * lanes);
    }
  };
  Vec<A> totals[Vectors] = {};
  add_run(0, summands.count < kRun ? summands.count : kRun, totals);
  for (int64_t run = kRun; run < summands.count; run += kRun) {
    Vec<A> sums[Vectors] = {};
    add_run(run, summands.count - run < kRun ? summands.count : run + kRun, sums);
#pragma GCC unroll 8
    for (int u = 0; u < Vectors; ++u) totals[u] += sums[u];
  }
  if (Large && Vectors == 8 && streamed) {
    T block[Vectors * lanes];
#pragma GCC unroll 8
    for (int u = 0; u < Vectors; ++u) store_accumulate(block + u * lanes, scale * totals[u]);
    constexpr int width = LCR2S_VECTOR_BYTES / static_cast<int>(sizeof(T));
#pragma GCC unroll 8
    for (int at = 0; at < Vectors * lanes; at += width)
      stream(out + offset + at, load(reinterpret_cast<const float*>(block + at)));
    return;
  }
#pragma GCC unroll 8
  for (int u = 0; u < Vectors; ++u) store_accumulate(out + offset + u * lanes, scale * totals[u]);
}

// The same for all heads of one row.
template <bool Large, class T>
__attribute__((noinline)) void weighted_sum(const Summands<T>& given, int64_t width, Accumulate<T> scale, T* out) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  const Summands<T> summands = given;
  Places<T> places;
  places.template find<Large>(summands, 0);
  const bool streamed = (reinterpret_cast<uintptr_t>(out) | static_cast<uint64_t>(width) * sizeof(T)) % 64 == 0;
  for (int64_t head = 0; head < summands.heads; ++head) {
    const int64_t begin = head * width;
    int64_t at = 0;
    for (; at + 8 * lanes <= width; at += 8 * lanes)
      sum_block<Large, 8>(summands, places, head, begin + at, scale, streamed, out);
    for (; at + 2 * lanes <= width; at += 2 * lanes)
      sum_block<Large, 2>(summands, places, head, begin + at, scale, streamed, out);
    for (; at + lanes <= width; at += lanes)
      sum_block<Large, 1>(summands, places, head, begin + at, scale, streamed, out);
    if (at < width) {
      const int rest = static_cast<int>(width - at);
      const Vec<A> sum = sum_in_runs<A>(summands.count, [&](int64_t j) {
        return summands.weights[summands.entry(j) * summands.heads + head] *
               load_accumulate(summands.row(j) + begin + at, rest);
      });
      store_accumulate(out + begin + at, scale * sum, rest);
    }
  }
}

// scores(entry, head) = scale * the dot product of the head of `a` with that of the entry's row. A vector's worth of
// them is summed over its lanes at once.
template <bool Large, class T>
__attribute__((noinline)) void dot_products(const T* a, const Summands<T>& given, int64_t width, Accumulate<T> scale,
                                            Accumulate<T>* scores) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  const Summands<T> summands = given;
  scores += summands.first * summands.heads;
  Vec<A> products[lanes];
  int held = 0;
  for (int64_t j = 0; j < summands.count; ++j) {
    const T* b = summands.row(j);
    const T* ahead = Large ? summands.row_ahead(j) : b;
    for (int64_t head = 0; head < summands.heads; ++head) {
      products[held++] = multiply<Large>(a + head * width, b + head * width, ahead + head * width, width);
      if (held < lanes) continue;
      store(scores, scale * sum_lanes_of<A>(products));
      scores += lanes;
      held = 0;
    }
  }
  if (held == 0) return;
  for (int i = held; i < lanes; ++i) products[i] = Vec<A>{};
  store_accumulate(scores, scale * sum_lanes_of<A>(products), held);
}

// Calls body(first head, heads in the vector) until all heads are done.
template <class A, class F>
LCR2S_INLINE void for_head_vectors(int64_t heads, const F& body) {
  for (int64_t head = 0; head < heads; head += kLanes<A>)
    body(head, static_cast<int>(heads - head < kLanes<A> ? heads - head : kLanes<A>));
}

// Softmax over the entries, for every head; scores (count, heads) in place.
template <class A>
void softmax(int64_t count, int64_t heads, A* scores) {
  for_head_vectors<A>(heads, [=](int64_t head, int lanes) {
    A* column = scores + head;
    Vec<A> maximum = broadcast(-static_cast<A>(__builtin_inff()));
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> x = load_accumulate(column + j * heads, lanes);
      maximum = x > maximum ? x : maximum;
    }
    const Vec<A> sum = sum_in_runs<A>(count, [=](int64_t j) {
      const Vec<A> x = exp(load_accumulate(column + j * heads, lanes) - maximum);
      store_accumulate(column + j * heads, x, lanes);
      return x;
    });
    for (int64_t j = 0; j < count; ++j)
      store_accumulate(column + j * heads, load_accumulate(column + j * heads, lanes) / sum, lanes);
  });
}

// grad_scores <- probs * (grad_scores - sum over the entries of probs * grad_scores)
template <class A>
void softmax_backward(int64_t count, int64_t heads, const A* probs, A* grad_scores) {
  for_head_vectors<A>(heads, [=](int64_t head, int lanes) {
    const Vec<A> sum = sum_in_runs<A>(count, [=](int64_t j) {
      const int64_t at = j * heads + head;
      return load_accumulate(probs + at, lanes) * load_accumulate(grad_scores + at, lanes);
    });
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = j * heads + head;
      const Vec<A> gradient = load_accumulate(probs + at, lanes) * (load_accumulate(grad_scores + at, lanes) - sum);
      store_accumulate(grad_scores + at, gradient, lanes);
    }
  });
}

template <bool Large, class T>
void forward(const SupportAttentionArgs& args, const Parallel& parallel) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const RowsOf<T> query(args.query), key(args.key), value(args.value);
  A* probs = static_cast<A*>(args.probs);
  T* out = static_cast<T*>(args.out);
  const int64_t value_elements = s.heads * s.value_width;
  const int64_t row_elements = s.heads * (s.width + s.value_width);
  for_row_ranges(parallel, s.indptr, s.queries, row_elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = s.indptr[i];
      const int64_t count = s.indptr[i + 1] - first;
      if (Large && i + 1 < end) __builtin_prefetch(query[i + 1]);
      const Summands<T> keys{first, count, s.entries, nullptr, s.indices, key, nullptr, s.heads};
      dot_products<Large>(query[i], keys, s.width, static_cast<A>(s.scale), probs);
      softmax(count, s.heads, probs + first * s.heads);
      const Summands<T> values{first, count, s.entries, nullptr, s.indices, value, probs, s.heads};
      weighted_sum<Large>(values, s.value_width, A{1}, out + i * value_elements);
    }
    if (Large) fence_streams();
  });
}

// Query pass: the gradient of the scores, kept, and that of the query.
template <bool Large, class T>
void backward_of_queries(const SupportAttentionBackwardArgs& args, const Parallel& parallel) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const RowsOf<T> grad_out(args.grad_out), key(args.key), value(args.value);
  const A* probs = static_cast<const A*>(args.probs);
  A* grad_scores = static_cast<A*>(args.grad_scores);
  T* grad_query = static_cast<T*>(args.grad_query);
  const int64_t key_elements = s.heads * s.width;
  const int64_t row_elements = s.heads * (s.width + s.value_width);
  for_row_ranges(parallel, s.indptr, s.queries, row_elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = s.indptr[i];
      const int64_t count = s.indptr[i + 1] - first;
      if (Large && i + 1 < end) __builtin_prefetch(grad_out[i + 1]);
      const Summands<T> values{first, count, s.entries, nullptr, s.indices, value, nullptr, s.heads};
      dot_products<Large>(grad_out[i], values, s.value_width, A{1}, grad_scores);
      softmax_backward(count, s.heads, probs + first * s.heads, grad_scores + first * s.heads);
      if (!grad_query) continue;
      const Summands<T> keys{first, count, s.entries, nullptr, s.indices, key, grad_scores, s.heads};
      weighted_sum<Large>(keys, s.width, static_cast<A>(s.scale), grad_query + i * key_elements);
    }
    if (Large) fence_streams();
  });
}

// Pool-row pass over the transposed index: every row has one writer and sums its users in one order.
template <bool Large, class T>
void backward_of_pool(const SupportAttentionBackwardArgs& args, const Parallel& parallel) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const RowsOf<T> grad_out(args.grad_out), query(args.query);
  const A* probs = static_cast<const A*>(args.probs);
  const A* grad_scores = static_cast<const A*>(args.grad_scores);
  T* grad_key = static_cast<T*>(args.grad_key);
  T* grad_value = static_cast<T*>(args.grad_value);
  const int64_t key_elements = s.heads * s.width;
  const int64_t value_elements = s.heads * s.value_width;
  for_row_ranges(parallel, args.t_indptr, s.pool_rows, key_elements + value_elements, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = args.t_indptr[r];
      const int64_t count = args.t_indptr[r + 1] - first;
      const int64_t* users = args.t_entries;
      const Summands<T> queries{first, count, s.entries, users, args.entry_rows, query, grad_scores, s.heads};
      const Summands<T> upstream{first, count, s.entries, users, args.entry_rows, grad_out, probs, s.heads};
      if (grad_key) weighted_sum<Large>(queries, s.width, static_cast<A>(s.scale), grad_key + r * key_elements);
      if (grad_value) weighted_sum<Large>(upstream, s.value_width, A{1}, grad_value + r * value_elements);
    }
    if (Large) fence_streams();
  });
}

// Whether the matrices of `rows` rows that a pass gathers from are large.
template <class T>
bool large(const SupportAttentionShape& s, int64_t rows) {
  return rows * s.heads * (s.width + s.value_width) * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
}

template <class T>
void forward(const SupportAttentionArgs& args, const Parallel& parallel) {
  large<T>(args.shape, args.shape.pool_rows) ? forward<true, T>(args, parallel) : forward<false, T>(args, parallel);
}

template <class T>
void backward(const SupportAttentionBackwardArgs& args, const Parallel& parallel) {
  const SupportAttentionShape& s = args.shape;
  if (args.grad_query || args.grad_key)
    large<T>(s, s.pool_rows) ? backward_of_queries<true, T>(args, parallel)
                             : backward_of_queries<false, T>(args, parallel);
  if (args.grad_key || args.grad_value)
    large<T>(s, s.queries) ? backward_of_pool<true, T>(args, parallel) : backward_of_pool<false, T>(args, parallel);
}

}  // namespace

void support_attention(const SupportAttentionArgs& args, const Parallel& parallel) {
  switch (args.shape.dtype) {
    case DType::float32:
      return forward<float>(args, parallel);
    case DType::float64:
      return forward<double>(args, parallel);
    case DType::bfloat16:
      return forward<BFloat16>(args, parallel);
    case DType::float16:
      return forward<Half>(args, parallel);
  }
}

void support_attention_backward(const SupportAttentionBackwardArgs& args, const Parallel& parallel) {
  switch (args.shape.dtype) {
    case DType::float32:
      return backward<float>(args, parallel);
    case DType::float64:
      return backward<double>(args, parallel);
    case DType::bfloat16:
      return backward<BFloat16>(args, parallel);
    case DType::float16:
      return backward<Half>(args, parallel);
  }
}

}  // namespace lcr2s::cpu::LCR2S_ISA
