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

template <class T>
LCR2S_INLINE Accumulate<T> dot(const T* a, const T* b, int64_t width) {
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
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
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

// out = scale * sum over j < count of weight(j) * row(j), in the order of j, `Vectors` vectors of one head at a time.
template <int Vectors, class T, class Row, class Weight>
LCR2S_INLINE void sum_block(int64_t count, const Row& row, const Weight& weight, Accumulate<T> scale, int64_t offset,
                            T* out) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  Vec<A> totals[Vectors] = {};
  for (int64_t run = 0; run < count; run += kRun) {
    const int64_t end = count - run < kRun ? count : run + kRun;
    Vec<A> sums[Vectors] = {};
    for (int64_t j = run; j < end; ++j) {
      const A w = weight(j);
      const T* source = row(j) + offset;
#pragma GCC unroll 8
      for (int u = 0; u < Vectors; ++u) sums[u] += w * load_accumulate(source + u * lanes);
    }
#pragma GCC unroll 8
    for (int u = 0; u < Vectors; ++u) totals[u] += sums[u];
  }
#pragma GCC unroll 8
  for (int u = 0; u < Vectors; ++u) store_accumulate(out + offset + u * lanes, scale * totals[u]);
}

// The same for all heads of one row: weight(j) points to the heads' weights of the j-th summand.
template <class T, class Row, class Weights>
LCR2S_INLINE void weighted_sum(int64_t count, int64_t heads, int64_t width, const Row& row, const Weights& weights,
                               Accumulate<T> scale, T* out) {
  using A = Accumulate<T>;
  constexpr int lanes = kLanes<A>;
  for (int64_t head = 0; head < heads; ++head) {
    const auto weight = [&](int64_t j) { return weights(j)[head]; };
    const int64_t begin = head * width;
    int64_t at = 0;
    for (; at + 8 * lanes <= width; at += 8 * lanes) sum_block<8>(count, row, weight, scale, begin + at, out);
    for (; at + 2 * lanes <= width; at += 2 * lanes) sum_block<2>(count, row, weight, scale, begin + at, out);
    for (; at + lanes <= width; at += lanes) sum_block<1>(count, row, weight, scale, begin + at, out);
    if (at < width) {
      const int rest = static_cast<int>(width - at);
      const Vec<A> sum =
          sum_in_runs<A>(count, [&](int64_t j) { return weight(j) * load_accumulate(row(j) + begin + at, rest); });
      store_accumulate(out + begin + at, scale * sum, rest);
    }
  }
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

// No software prefetch: the hardware follows rows of this length, and on Zen 3 prefetching them made this pass 1.4x
// slower.
template <class T>
void forward(const SupportAttentionArgs& args, const Parallel& parallel) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const RowsOf<T> query(args.query), key(args.key), value(args.value);
  const A scale = static_cast<A>(s.scale);
  A* probs = static_cast<A*>(args.probs);
  T* out = static_cast<T*>(args.out);
  const int64_t value_elements = s.heads * s.value_width;
  const int64_t row_elements = s.heads * (s.width + s.value_width);
  for_row_ranges(parallel, s.indptr, s.queries, row_elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = s.indptr[i];
      const int64_t count = s.indptr[i + 1] - first;
      const int64_t* rows = s.indices + first;
      A* weights = probs + first * s.heads;
      for (int64_t j = 0; j < count; ++j) {
        const T* source = key[rows[j]];
        for (int64_t head = 0; head < s.heads; ++head)
          weights[j * s.heads + head] = scale * dot(query[i] + head * s.width, source + head * s.width, s.width);
      }
      softmax(count, s.heads, weights);
      weighted_sum(
          count, s.heads, s.value_width, [&](int64_t j) { return value[rows[j]]; },
          [&](int64_t j) { return weights + j * s.heads; }, A{1}, out + i * value_elements);
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

  // Query pass: the gradient of the scores, kept, and that of the query.
  if (grad_query || grad_key) {
    for_row_ranges(parallel, s.indptr, s.queries, key_elements + value_elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = s.indptr[i];
        const int64_t count = s.indptr[i + 1] - first;
        const int64_t* rows = s.indices + first;
        A* weights = grad_scores + first * s.heads;
        for (int64_t j = 0; j < count; ++j) {
          const T* source = value[rows[j]];
          for (int64_t head = 0; head < s.heads; ++head)
            weights[j * s.heads + head] =
                dot(grad_out[i] + head * s.value_width, source + head * s.value_width, s.value_width);
        }
        softmax_backward(count, s.heads, probs + first * s.heads, weights);
        if (grad_query)
          weighted_sum(
              count, s.heads, s.width, [&](int64_t j) { return key[rows[j]]; },
              [&](int64_t j) { return weights + j * s.heads; }, scale, grad_query + i * key_elements);
      }
    });
  }

  // Pool-row pass over the transposed index: every row has one writer and sums its users in one order.
  if (grad_key || grad_value) {
    for_row_ranges(
        parallel, args.t_indptr, s.pool_rows, key_elements + value_elements, [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const int64_t first = args.t_indptr[r];
            const int64_t count = args.t_indptr[r + 1] - first;
            const int64_t* entries = args.t_entries + first;
            if (grad_key)
              weighted_sum(
                  count, s.heads, s.width, [&](int64_t j) { return query[args.entry_rows[entries[j]]]; },
                  [&](int64_t j) { return grad_scores + entries[j] * s.heads; }, scale, grad_key + r * key_elements);
            if (grad_value)
              weighted_sum(
                  count, s.heads, s.value_width, [&](int64_t j) { return grad_out[args.entry_rows[entries[j]]]; },
                  [&](int64_t j) { return probs + entries[j] * s.heads; }, A{1}, grad_value + r * value_elements);
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
