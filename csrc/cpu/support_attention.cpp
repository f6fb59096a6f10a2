#include "support_attention.h"

#include "scalar.h"

namespace lcr2s::cpu::LCR2S_ISA {

namespace {

// Rows per task follow from the work: a task touches at least this many elements, so that small calls stay on one
// thread.
constexpr int64_t kTaskElements = 65536;
constexpr int64_t kMaxTasks = 1024;

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
  tasks = tasks < 1 ? 1 : tasks > kMaxTasks ? kMaxTasks : tasks;
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

// The products of two heads, summed down to one vector.
template <class T>
LCR2S_INLINE Vec<Accumulate<T>> multiply(const T* a, const T* b, int64_t width) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * lanes <= width; at += 4 * lanes)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sums[u] += load_accumulate(a + at + u * lanes) * load_accumulate(b + at + u * lanes);
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
// the entries first .. first + count, or the ones that `entries` lists.
template <class T>
struct Summands {
  int64_t count;
  int64_t first;
  const int64_t* entries;
  const int64_t* rows;
  RowsOf<T> source;
  const Accumulate<T>* weights;
  int64_t heads;

  LCR2S_INLINE int64_t entry(int64_t j) const { return entries ? entries[j] : first + j; }
};

// out[offset ..] = scale * the weighted sum of `Vectors` vectors of one head, in the order of the entries.
template <int Vectors, class T>
LCR2S_INLINE void sum_block(const Summands<T>& summands, int64_t head, int64_t offset, Accumulate<T> scale, T* out) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  const RowsOf<T> columns = summands.source.from(offset);
  const auto add_run = [&](int64_t begin, int64_t end, Vec<A>* sums) __attribute__((always_inline)) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t entry = summands.entry(j);
      const A weight = summands.weights[entry * summands.heads + head];
      const T* source = columns[summands.rows[entry]];
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
#pragma GCC unroll 8
  for (int u = 0; u < Vectors; ++u) store_accumulate(out + offset + u * lanes, scale * totals[u]);
}

// The same for all heads of one row.
template <class T>
__attribute__((noinline)) void weighted_sum(const Summands<T>& given, int64_t width, Accumulate<T> scale, T* out) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  const Summands<T> summands = given;
  for (int64_t head = 0; head < summands.heads; ++head) {
    const int64_t begin = head * width;
    int64_t at = 0;
    for (; at + 8 * lanes <= width; at += 8 * lanes) sum_block<8>(summands, head, begin + at, scale, out);
    for (; at + 2 * lanes <= width; at += 2 * lanes) sum_block<2>(summands, head, begin + at, scale, out);
    for (; at + lanes <= width; at += lanes) sum_block<1>(summands, head, begin + at, scale, out);
    if (at < width) {
      const int rest = static_cast<int>(width - at);
      const Vec<A> sum = sum_in_runs<A>(summands.count, [&](int64_t j) {
        const int64_t entry = summands.entry(j);
        return summands.weights[entry * summands.heads + head] *
               load_accumulate(summands.source[summands.rows[entry]] + begin + at, rest);
      });
      store_accumulate(out + begin + at, scale * sum, rest);
    }
  }
}

// scores(entry, head) = scale * the dot product of the head of `a` with that of the entry's row. A vector's worth of
// them is summed over its lanes at once.
template <class T>
__attribute__((noinline)) void dot_products(const T* a, const Summands<T>& given, int64_t width, Accumulate<T> scale,
                                            Accumulate<T>* scores) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  const Summands<T> summands = given;
  scores += summands.first * summands.heads;
  Vec<A> products[lanes];
  int held = 0;
  for (int64_t j = 0; j < summands.count; ++j) {
    const T* b = summands.source[summands.rows[summands.first + j]];
    for (int64_t head = 0; head < summands.heads; ++head) {
      products[held++] = multiply(a + head * width, b + head * width, width);
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

// No software prefetch: the lines of the next pass or of the next query, asked for ahead, made it slower on Zen 3.
template <class T>
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
      const Summands<T> keys{count, first, nullptr, s.indices, key, nullptr, s.heads};
      dot_products(query[i], keys, s.width, static_cast<A>(s.scale), probs);
      softmax(count, s.heads, probs + first * s.heads);
      const Summands<T> values{count, first, nullptr, s.indices, value, probs, s.heads};
      weighted_sum(values, s.value_width, A{1}, out + i * value_elements);
    }
  });
}

template <class T>
void backward(const SupportAttentionBackwardArgs& args, const Parallel& parallel) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const RowsOf<T> grad_out(args.grad_out), query(args.query), key(args.key), value(args.value);
  const A scale = static_cast<A>(s.scale);
  const A* probs = static_cast<const A*>(args.probs);
  A* grad_scores = static_cast<A*>(args.grad_scores);
  T* grad_query = static_cast<T*>(args.grad_query);
  T* grad_key = static_cast<T*>(args.grad_key);
  T* grad_value = static_cast<T*>(args.grad_value);
  const int64_t key_elements = s.heads * s.width;
  const int64_t value_elements = s.heads * s.value_width;
  const int64_t row_elements = key_elements + value_elements;

  // Query pass: the gradient of the scores, kept, and that of the query.
  if (grad_query || grad_key) {
    for_row_ranges(parallel, s.indptr, s.queries, row_elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = s.indptr[i];
        const int64_t count = s.indptr[i + 1] - first;
        const Summands<T> values{count, first, nullptr, s.indices, value, nullptr, s.heads};
        dot_products(grad_out[i], values, s.value_width, A{1}, grad_scores);
        softmax_backward(count, s.heads, probs + first * s.heads, grad_scores + first * s.heads);
        if (!grad_query) continue;
        const Summands<T> keys{count, first, nullptr, s.indices, key, grad_scores, s.heads};
        weighted_sum(keys, s.width, scale, grad_query + i * key_elements);
      }
    });
  }

  // Pool-row pass over the transposed index: every row has one writer and sums its users in one order.
  if (grad_key || grad_value) {
    for_row_ranges(parallel, args.t_indptr, s.pool_rows, row_elements, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t first = args.t_indptr[r];
        const int64_t count = args.t_indptr[r + 1] - first;
        const int64_t* users = args.t_entries + first;
        const Summands<T> queries{count, 0, users, args.entry_rows, query, grad_scores, s.heads};
        const Summands<T> upstream{count, 0, users, args.entry_rows, grad_out, probs, s.heads};
        if (grad_key) weighted_sum(queries, s.width, scale, grad_key + r * key_elements);
        if (grad_value) weighted_sum(upstream, s.value_width, A{1}, grad_value + r * value_elements);
      }
    });
  }
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
