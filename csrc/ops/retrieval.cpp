#include "../cpu/retrieval.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "common.h"
#include "features.h"

namespace lcr2s {

// The emulated flavour runs the CUDA kernels on the CPU's tensors.
#ifndef LCR2S_EMULATE_CUDA

namespace {

constexpr const char* kTopk = "topk_similarity";
constexpr const char* kMetrics = "retrieval_metrics";

// Query and gallery of one call.
class Ranking {
 public:
  Ranking(const char* op, const Tensor& query, const Tensor& gallery, int64_t workspace_bytes)
      : op_(op), query_(op, "query", query), gallery_(op, "gallery", gallery), workspace_bytes_(workspace_bytes) {
    check(query.scalar_type() == gallery.scalar_type(), op, "`gallery` must have the dtype of `query`");
    check_size(op, "gallery", gallery, 1, query.size(1));
    check(workspace_bytes >= 0, op, "`workspace_bytes` must not be negative, got ", workspace_bytes);
  }

  ScalarType dtype() const { return query_.wide() ? ScalarType::Double : ScalarType::Float; }

  cpu::RankingArgs args() {
    return {query_.view(), gallery_.view(), query_.wide(), workspace_bytes_, workspace_.memory(), &status_};
  }

  void check_status() const {
    check(status_ != cpu::RankingStatus::query_not_finite, op_,
          "`query` must hold finite numbers, got NaN or infinity");
    check(status_ != cpu::RankingStatus::gallery_not_finite, op_,
          "`gallery` must hold finite numbers, got NaN or infinity");
  }

 private:
  const char* op_;
  FeatureRows query_;
  FeatureRows gallery_;
  int64_t workspace_bytes_;
  Workspace workspace_;
  cpu::RankingStatus status_ = cpu::RankingStatus::complete;
};

std::tuple<Tensor, Tensor> topk_similarity(Tensor query, Tensor gallery, int64_t k, int64_t workspace_bytes) {
  Ranking ranking(kTopk, query, gallery, workspace_bytes);
  check(k >= 1 && k <= gallery.size(0), kTopk, "`k` must be in 1..", gallery.size(0), " (rows of `gallery`), got ", k);
  Tensor values = torch::stable::empty({query.size(0), k}, ranking.dtype());
  Tensor indices = torch::stable::empty({query.size(0), k}, ScalarType::Long);
  cpu::topk_similarity(
      {ranking.args(), k, values.mutable_data_ptr(), static_cast<int64_t*>(indices.mutable_data_ptr())},
      torch_parallel());
  ranking.check_status();
  return {values, indices};
}

Tensor check_ids(const char* name, const Tensor& ids, int64_t rows) {
  check_cpu(kMetrics, name, ids);
  check_dim(kMetrics, name, ids, 1);
  check_int64(kMetrics, name, ids);
  check_size(kMetrics, name, ids, 0, rows);
  return torch::stable::contiguous(ids);
}

int64_t* integers(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }
double* doubles(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> retrieval_metrics(Tensor query, Tensor gallery, Tensor query_ids,
                                                                     Tensor gallery_ids, int64_t workspace_bytes) {
  Ranking ranking(kMetrics, query, gallery, workspace_bytes);
  const int64_t queries = query.size(0);
  const int64_t rows = gallery.size(0);
  const Tensor wanted = check_ids("query_ids", query_ids, queries);
  const Tensor owned = check_ids("gallery_ids", gallery_ids, rows);
  const auto* query_id = static_cast<const int64_t*>(wanted.const_data_ptr());
  const auto* gallery_id = static_cast<const int64_t*>(owned.const_data_ptr());

  // Gallery rows by identity: the positives of a query are one range.
  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return gallery_id[a] < gallery_id[b]; });
  std::vector<int64_t> first(static_cast<size_t>(queries));
  Tensor positives = torch::stable::empty({queries}, ScalarType::Long);
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t id = query_id[q];
    const auto begin = std::lower_bound(order.begin(), order.end(), id,
                                        [=](int64_t row, int64_t value) { return gallery_id[row] < value; });
    const auto end =
        std::upper_bound(begin, order.end(), id, [=](int64_t value, int64_t row) { return value < gallery_id[row]; });
    first[static_cast<size_t>(q)] = begin - order.begin();
    integers(positives)[q] = end - begin;
  }

  Tensor first_rank = torch::stable::empty({queries}, ScalarType::Long);
  Tensor last_rank = torch::stable::empty({queries}, ScalarType::Long);
  Tensor average_precision = torch::stable::empty({queries}, ScalarType::Double);
  Tensor trapezoid = torch::stable::empty({queries}, ScalarType::Double);
  cpu::retrieval_metrics({ranking.args(), order.data(), first.data(), integers(positives), integers(first_rank),
                          integers(last_rank), doubles(average_precision), doubles(trapezoid)},
                         torch_parallel());
  ranking.check_status();
  return {positives, first_rank, last_rank, average_precision, trapezoid};
}

}  // namespace

#endif

STABLE_TORCH_LIBRARY_FRAGMENT(lcr2s, m) {
  m.def("topk_similarity(Tensor query, Tensor gallery, int k, int workspace_bytes) -> (Tensor, Tensor)");
  m.def(
      "retrieval_metrics(Tensor query, Tensor gallery, Tensor query_ids, Tensor gallery_ids, int workspace_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#ifndef LCR2S_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(lcr2s, CPU, m) {
  m.impl("topk_similarity", TORCH_BOX(&topk_similarity));
  m.impl("retrieval_metrics", TORCH_BOX(&retrieval_metrics));
}
#endif

}  // namespace lcr2s
