#pragma once

#include <cmath>

#include "../support_attention.h"
#include "element.h"

// The work of one group of lanes on one head of one row. A group is up to 32 lanes of a warp; on the host, where the
// tests run it, it is a single lane. Sums over lanes are fixed trees and sums over entries go in order, so results are
// the same in every run. The host cannot look at an index that lives on the device: entries that point outside give NaN
// and are never followed.
namespace lcr2s::cuda {

LCR2S_HOST_DEVICE float exponential(float x) { return expf(x); }
LCR2S_HOST_DEVICE double exponential(double x) { return exp(x); }

struct Range {
  int64_t begin;
  int64_t end;
};

LCR2S_HOST_DEVICE Range entry_range(const int64_t* indptr, int64_t row, int64_t entries) {
  const int64_t begin = indptr[row];
  const int64_t end = indptr[row + 1];
  return begin < 0 || end < begin || end > entries ? Range{0, 0} : Range{begin, end};
}

LCR2S_HOST_DEVICE bool inside(int64_t index, int64_t limit) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(limit);
}

template <class T>
LCR2S_HOST_DEVICE const T* head_of(const Rows& rows, int64_t row, int64_t offset) {
  return static_cast<const T*>(rows.data) + row * rows.stride + offset;
}

template <class T, int Size, class Group>
LCR2S_HOST_DEVICE Accumulate<T> dot(const T* a, const T* b, int64_t width, const Group& group) {
  Accumulate<T> sum = 0;
  for (int64_t at = group.lane() * Size; at < width; at += group.lanes() * Size) {
    const Pack<T, Size> x = load_pack<T, Size>(a + at);
    const Pack<T, Size> y = load_pack<T, Size>(b + at);
#pragma unroll
    for (int u = 0; u < Size; ++u) sum += to_accumulate(x.at[u]) * to_accumulate(y.at[u]);
  }
  return group.sum(sum);
}

// out = scale * sum over j < count of weight(j) * row(j), where a null row counts as NaN.
template <class T, int Size, class Row, class Weight, class Group>
LCR2S_HOST_DEVICE void weighted_sum(int64_t count, int64_t width, const Row& row, const Weight& weight,
                                    Accumulate<T> scale, T* out, const Group& group) {
  using A = Accumulate<T>;
  for (int64_t at = group.lane() * Size; at < width; at += group.lanes() * Size) {
    A sum[Size] = {};
    for (int64_t j = 0; j < count; ++j) {
      const T* source = row(j);
      const A w = source ? weight(j) : static_cast<A>(NAN);
      const Pack<T, Size> x = source ? load_pack<T, Size>(source + at) : Pack<T, Size>{};
#pragma unroll
      for (int u = 0; u < Size; ++u) sum[u] += w * to_accumulate(x.at[u]);
    }
    Pack<T, Size> result;
#pragma unroll
    for (int u = 0; u < Size; ++u) result.at[u] = from_accumulate<T>(scale * sum[u]);
    store_pack<T, Size>(out + at, result);
  }
}

template <class T, int Size, class Group>
LCR2S_HOST_DEVICE void attend(const SupportAttentionArgs& args, int64_t row, int64_t head, const Group& group) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const Range range = entry_range(s.indptr, row, s.entries);
  const int64_t count = range.end - range.begin;
  const int64_t* rows = s.indices + range.begin;
  A* probs = static_cast<A*>(args.probs) + range.begin * s.heads + head;
  const T* query = head_of<T>(args.query, row, head * s.width);

  A maximum = -static_cast<A>(INFINITY);
  for (int64_t j = 0; j < count; ++j) {
    A score = static_cast<A>(NAN);
    if (inside(rows[j], s.pool_rows))
      score =
          static_cast<A>(s.scale) * dot<T, Size>(query, head_of<T>(args.key, rows[j], head * s.width), s.width, group);
    maximum = score > maximum ? score : maximum;
    if (group.lane() == 0) probs[j * s.heads] = score;
  }
  group.sync();
  A sum = 0;
  for (int64_t j = group.lane(); j < count; j += group.lanes()) {
    const A x = exponential(probs[j * s.heads] - maximum);
    probs[j * s.heads] = x;
    sum += x;
  }
  sum = group.sum(sum);
  for (int64_t j = group.lane(); j < count; j += group.lanes()) probs[j * s.heads] /= sum;
  group.sync();
  T* out = static_cast<T*>(args.out) + (row * s.heads + head) * s.value_width;
  weighted_sum<T, Size>(
      count, s.value_width,
      [&](int64_t j) {
        return inside(rows[j], s.pool_rows) ? head_of<T>(args.value, rows[j], head * s.value_width) : nullptr;
      },
      [&](int64_t j) { return probs[j * s.heads]; }, A(1), out, group);
}

// The gradient of the scores, kept, and that of the query.
template <class T, int Size, class Group>
LCR2S_HOST_DEVICE void attend_backward_query(const SupportAttentionBackwardArgs& args, int64_t row, int64_t head,
                                             const Group& group) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const Range range = entry_range(s.indptr, row, s.entries);
  const int64_t count = range.end - range.begin;
  const int64_t* rows = s.indices + range.begin;
  const A* probs = static_cast<const A*>(args.probs) + range.begin * s.heads + head;
  A* grad_scores = static_cast<A*>(args.grad_scores) + range.begin * s.heads + head;
  const T* grad_out = head_of<T>(args.grad_out, row, head * s.value_width);

  for (int64_t j = 0; j < count; ++j) {
    A gradient = static_cast<A>(NAN);
    if (inside(rows[j], s.pool_rows))
      gradient = dot<T, Size>(grad_out, head_of<T>(args.value, rows[j], head * s.value_width), s.value_width, group);
    if (group.lane() == 0) grad_scores[j * s.heads] = gradient;
  }
  group.sync();
  A sum = 0;
  for (int64_t j = group.lane(); j < count; j += group.lanes()) sum += probs[j * s.heads] * grad_scores[j * s.heads];
  sum = group.sum(sum);
  for (int64_t j = group.lane(); j < count; j += group.lanes())
    grad_scores[j * s.heads] = probs[j * s.heads] * (grad_scores[j * s.heads] - sum);
  group.sync();
  if (!args.grad_query) return;
  T* grad_query = static_cast<T*>(args.grad_query) + (row * s.heads + head) * s.width;
  weighted_sum<T, Size>(
      count, s.width,
      [&](int64_t j) { return inside(rows[j], s.pool_rows) ? head_of<T>(args.key, rows[j], head * s.width) : nullptr; },
      [&](int64_t j) { return grad_scores[j * s.heads]; }, static_cast<A>(s.scale), grad_query, group);
}

// The gradients of one pool row: its users in the order of the transposed index.
template <class T, int Size, class Group>
LCR2S_HOST_DEVICE void attend_backward_pool(const SupportAttentionBackwardArgs& args, int64_t row, int64_t head,
                                            const Group& group) {
  using A = Accumulate<T>;
  const SupportAttentionShape& s = args.shape;
  const Range range = entry_range(args.t_indptr, row, s.entries);
  const int64_t count = range.end - range.begin;
  const int64_t* users = args.t_entries + range.begin;
  const auto user = [&](const Rows& rows, int64_t j, int64_t width) -> const T* {
    if (!inside(users[j], s.entries) || !inside(args.entry_rows[users[j]], s.queries)) return nullptr;
    return head_of<T>(rows, args.entry_rows[users[j]], head * width);
  };
  if (args.grad_key) {
    const A* grad_scores = static_cast<const A*>(args.grad_scores);
    weighted_sum<T, Size>(
        count, s.width, [&](int64_t j) { return user(args.query, j, s.width); },
        [&](int64_t j) { return grad_scores[users[j] * s.heads + head]; }, static_cast<A>(s.scale),
        static_cast<T*>(args.grad_key) + (row * s.heads + head) * s.width, group);
  }
  if (args.grad_value) {
    const A* probs = static_cast<const A*>(args.probs);
    weighted_sum<T, Size>(
        count, s.value_width, [&](int64_t j) { return user(args.grad_out, j, s.value_width); },
        [&](int64_t j) { return probs[users[j] * s.heads + head]; }, A(1),
        static_cast<T*>(args.grad_value) + (row * s.heads + head) * s.value_width, group);
  }
}

}  // namespace lcr2s::cuda
