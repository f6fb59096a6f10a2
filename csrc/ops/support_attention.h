#pragma once

#include "../support_attention.h"

#include <array>
#include <tuple>

#include "features.h"

// What the CPU's and the CUDA operator of support attention share: argument checks and allocation. Index contents are
// checked where the host can read them.
namespace lcr2s::support_attention_ops {

inline constexpr const char* kForward = "support_attention";
inline constexpr const char* kBackward = "support_attention_backward";

struct Index {
  Tensor indptr;
  Tensor indices;
  Tensor entry_rows;
  Tensor t_indptr;
  Tensor t_entries;
};

inline const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

inline ScalarType statistics_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  check(tensor.is_cpu() == query.is_cpu() && tensor.is_cuda() == query.is_cuda() &&
            tensor.get_device_index() == query.get_device_index(),
        op, "`", name, "` must be on the device of `query`");
}

inline void check_operand(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  check_dim(op, name, tensor, 3);
  check(tensor.scalar_type() == query.scalar_type(), op, "`", name, "` must have the dtype of `query`");
  check_same_device(op, name, tensor, query);
}

// Asks before it calls: a call through the dispatcher costs more than everything else on this side of a small problem.
inline Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor check_integers(const char* op, const char* name, const Tensor& tensor, int64_t size,
                             const Tensor& query) {
  check_dim(op, name, tensor, 1);
  check_int64(op, name, tensor);
  check_size(op, name, tensor, 0, size);
  check_same_device(op, name, tensor, query);
  return contiguous_of(tensor);
}

// Shapes, dtypes and devices; what the index holds is checked apart, where the host can read it.
inline Index check_shapes(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& indptr, const Tensor& indices, const Tensor& entry_rows, const Tensor& t_indptr,
                          const Tensor& t_entries) {
  check_dim(op, "query", query, 3);
  check_floating(op, "query", query);
  check_operand(op, "key", key, query);
  check_operand(op, "value", value, query);
  check_size(op, "key", key, 1, query.size(1));
  check_size(op, "key", key, 2, query.size(2));
  check_size(op, "value", value, 0, key.size(0));
  check_size(op, "value", value, 1, query.size(1));
  check_dim(op, "indices", indices, 1);
  const int64_t entries = indices.size(0);
  return Index{check_integers(op, "indptr", indptr, query.size(0) + 1, query),
               check_integers(op, "indices", indices, entries, query),
               check_integers(op, "entry_rows", entry_rows, entries, query),
               check_integers(op, "t_indptr", t_indptr, key.size(0) + 1, query),
               check_integers(op, "t_entries", t_entries, entries, query)};
}

inline void check_offsets(const char* op, const char* name, const Tensor& offsets, int64_t entries) {
  const int64_t* at = integers(offsets);
  const int64_t rows = offsets.size(0) - 1;
  bool rises = at[0] == 0 && at[rows] == entries;
  for (int64_t i = 0; i < rows; ++i) rises &= at[i] <= at[i + 1];
  check(rises, op, "`", name, "` must start with 0, never fall, and end with the number of entries, ", entries);
}

inline void check_range(const char* op, const char* name, const Tensor& values, int64_t limit) {
  const int64_t* at = integers(values);
  const int64_t count = values.size(0);
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= static_cast<uint64_t>(at[i]) < static_cast<uint64_t>(limit);
  check(inside, op, "`", name, "` must lie in [0, ", limit, ")");
}

// The tensor itself when its rows are dense, so that views of a fused projection are read in place.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const bool dense =
      (tensor.size(2) <= 1 || tensor.stride(2) == 1) && (tensor.size(1) <= 1 || tensor.stride(1) == tensor.size(2));
  return dense ? tensor : torch::stable::contiguous(tensor);
}

inline Rows rows_of(const Tensor& tensor) { return Rows{tensor.const_data_ptr(), tensor.stride(0)}; }

inline SupportAttentionShape shape(const Tensor& query, const Tensor& value, const Index& index, double scale) {
  return SupportAttentionShape{dtype_of(query.scalar_type()),
                               query.size(0),
                               value.size(0),
                               index.indices.size(0),
                               query.size(1),
                               query.size(2),
                               value.size(2),
                               scale,
                               integers(index.indptr),
                               integers(index.indices)};
}

// Checks, allocates and runs the forward: run(args).
template <class Run>
std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices,
                                   Tensor entry_rows, Tensor t_indptr, Tensor t_entries, double scale, bool need_probs,
                                   const Run& run) {
  const Index index = check_shapes(kForward, query, key, value, indptr, indices, entry_rows, t_indptr, t_entries);
  if (query.is_cpu()) {
    check_offsets(kForward, "indptr", index.indptr, indices.size(0));
    check_range(kForward, "indices", index.indices, key.size(0));
  }
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  value = with_dense_rows(value);
  const ScalarType statistics = statistics_dtype(query.scalar_type());
  Tensor out = prefer_huge_pages(torch::stable::new_empty(query, {query.size(0), query.size(1), value.size(2)}));
  Tensor probs = torch::stable::new_empty(query, {indices.size(0), query.size(1)}, statistics);
  const SupportAttentionArgs args{
      shape(query, value, index, scale), rows_of(query),        rows_of(key), rows_of(value),
      probs.mutable_data_ptr(),          out.mutable_data_ptr()};
  run(args);
  if (!need_probs) probs = torch::stable::new_empty(query, {0, query.size(1)}, statistics);
  return {out, probs};
}

// The same for the backward.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor probs,
                                            Tensor indptr, Tensor indices, Tensor entry_rows, Tensor t_indptr,
                                            Tensor t_entries, double scale, bool need_query, bool need_key,
                                            bool need_value, const Run& run) {
  const Index index = check_shapes(kBackward, query, key, value, indptr, indices, entry_rows, t_indptr, t_entries);
  const int64_t entries = indices.size(0);
  if (query.is_cpu()) {
    check_offsets(kBackward, "indptr", index.indptr, entries);
    check_offsets(kBackward, "t_indptr", index.t_indptr, entries);
    check_range(kBackward, "indices", index.indices, key.size(0));
    check_range(kBackward, "entry_rows", index.entry_rows, query.size(0));
    check_range(kBackward, "t_entries", index.t_entries, entries);
  }
  const ScalarType statistics = statistics_dtype(query.scalar_type());
  check_operand(kBackward, "grad_out", grad_out, query);
  check_size(kBackward, "grad_out", grad_out, 0, query.size(0));
  check_size(kBackward, "grad_out", grad_out, 1, query.size(1));
  check_size(kBackward, "grad_out", grad_out, 2, value.size(2));
  check_dim(kBackward, "probs", probs, 2);
  check(probs.scalar_type() == statistics, kBackward, "`probs` must be float32, float64 for a float64 query");
  check_same_device(kBackward, "probs", probs, query);
  check(probs.size(0) == entries && probs.size(1) == query.size(1), kBackward, "`probs` must have shape (", entries,
        ", ", query.size(1), "): run the forward with need_probs=True");
  grad_out = with_dense_rows(grad_out);
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  value = with_dense_rows(value);
  probs = contiguous_of(probs);
  const auto result = [](bool needed, const Tensor& like) {
    if (!needed) return torch::stable::new_empty(like, {0});
    return prefer_huge_pages(torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)}));
  };
  Tensor grad_query = result(need_query, query);
  Tensor grad_key = result(need_key, key);
  Tensor grad_value = result(need_value, value);
  Tensor grad_scores =
      torch::stable::new_empty(query, {need_query || need_key ? entries : 0, query.size(1)}, statistics);
  const SupportAttentionBackwardArgs args{shape(query, value, index, scale),
                                          integers(index.entry_rows),
                                          integers(index.t_indptr),
                                          integers(index.t_entries),
                                          rows_of(grad_out),
                                          rows_of(query),
                                          rows_of(key),
                                          rows_of(value),
                                          probs.const_data_ptr(),
                                          grad_scores.mutable_data_ptr(),
                                          need_query ? grad_query.mutable_data_ptr() : nullptr,
                                          need_key ? grad_key.mutable_data_ptr() : nullptr,
                                          need_value ? grad_value.mutable_data_ptr() : nullptr};
  run(args);
  return {grad_query, grad_key, grad_value};
}

}  // namespace lcr2s::support_attention_ops
