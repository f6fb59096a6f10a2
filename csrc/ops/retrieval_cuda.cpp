#include "../cuda/retrieval.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../cuda/retrieval_plan.h"
#include "../cuda/scaled_rows.h"
#include "cuda_features.h"

namespace lcr2s {

namespace {

constexpr const char* kTopk = "topk_similarity";
constexpr const char* kMetrics = "retrieval_metrics";

int64_t* integers(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }
const int64_t* integers_of(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
double* doubles(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

// Values of the last dimension in order, equal ones as they came, and where each was.
std::pair<Tensor, Tensor> sorted(const Tensor& tensor, bool descending) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(tensor), from(std::optional<bool>(true)), from(int64_t{-1}), from(descending)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor gathered(const Tensor& tensor, const Tensor& places) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(tensor), from(int64_t{-1}), from(places), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gather", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor running_sum(const Tensor& tensor) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(tensor), from(int64_t{0}), from(std::optional<ScalarType>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows as operands.
struct Operand {
  Tensor panels;
  Tensor factor;
};

// Query and gallery of one call.
class Ranking {
 public:
  Ranking(const char* op, const Tensor& query, const Tensor& gallery, int64_t workspace_bytes)
      : op_(op),
        query_(op, "query", query),
        gallery_(op, "gallery", gallery),
        scope_(op, query),
        workspace_bytes_(workspace_bytes) {
    check_same_device(op, "gallery", gallery, "query", query);
    check(query.scalar_type() == gallery.scalar_type(), op, "`gallery` must have the dtype of `query`");
    check_size(op, "gallery", gallery, 1, query.size(1));
    check(workspace_bytes >= 0, op, "`workspace_bytes` must not be negative, got ", workspace_bytes);
    check(gallery.size(0) < int64_t{1} << 31, op, "`gallery` must have fewer than 2^31 rows, got ", gallery.size(0));
  }

  int64_t queries() const { return query_.tensor().size(0); }
  int64_t rows() const { return gallery_.tensor().size(0); }
  int64_t width() const { return query_.tensor().size(1); }
  bool wide() const { return query_.wide(); }
  int64_t arithmetic_bytes() const { return wide() ? 8 : 4; }
  int64_t element_bytes() const {
    const ScalarType dtype = query_.tensor().scalar_type();
    return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? 2 : arithmetic_bytes();
  }
  ScalarType arithmetic() const { return wide() ? ScalarType::Double : ScalarType::Float; }
  DType element() const { return dtype_of(query_.tensor().scalar_type()); }
  int64_t workspace_bytes() const { return workspace_bytes_; }
  cuda::Features query() const { return query_.view(); }
  cuda::Features gallery() const { return gallery_.view(); }
  void* stream() const { return scope_.stream(); }
  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const {
    return empty_on_device(query_.tensor(), std::move(sizes), dtype);
  }
  Tensor zeros(std::vector<int64_t> sizes, ScalarType dtype) const {
    Tensor tensor = empty(std::move(sizes), dtype);
    torch::stable::zero_(tensor);
    return tensor;
  }
  void launched(const char* error) const { check(error == nullptr, op_, "CUDA: ", error ? error : ""); }

  Operand operand(int64_t rows) const {
    return {empty({cuda::panels_bytes(rows, width(), element_bytes())}, ScalarType::Byte),
            empty({cuda::padded_rows(rows)}, arithmetic())};
  }
  cuda::Panels panels(Operand& operand, int64_t rows) const {
    return cuda::make_panels(operand.panels.mutable_data_ptr(), rows, width(), element_bytes());
  }
  void pack(const cuda::Features& features, const int64_t* order, Operand& operand, int64_t* not_finite) const {
    launched(cuda::scaled_rows({element(),
                                1,
                                {{features, order, operand.panels.mutable_data_ptr(), operand.factor.mutable_data_ptr(),
                                  nullptr, 0, 0, reinterpret_cast<int*>(not_finite)}}},
                               stream()));
  }

  // Flags of a tensor on the host: the one place where the operators wait for the device.
  Tensor read(const Tensor& tensor) const {
    return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  }
  void check_finite(bool query_not_finite, bool gallery_not_finite) const {
    check(!query_not_finite, op_, "`query` must hold finite numbers, got NaN or infinity");
    check(!gallery_not_finite, op_, "`gallery` must hold finite numbers, got NaN or infinity");
  }

 private:
  const char* op_;
  CudaFeatureRows query_;
  CudaFeatureRows gallery_;
  CudaScope scope_;
  int64_t workspace_bytes_;
};

std::tuple<Tensor, Tensor> topk_similarity(Tensor query, Tensor gallery, int64_t k, int64_t workspace_bytes) {
  const Ranking ranking(kTopk, query, gallery, workspace_bytes);
  const int64_t queries = ranking.queries();
  const int64_t rows = ranking.rows();
  check(k >= 1 && k <= rows, kTopk, "`k` must be in 1..", rows, " (rows of `gallery`), got ", k);
  const cuda::TopkPlan plan = cuda::plan_topk(
      {queries, rows, ranking.width(), k, ranking.element_bytes(), ranking.arithmetic_bytes(), workspace_bytes});
  Tensor not_finite = ranking.zeros({2}, ScalarType::Long);
  Operand query_operand = ranking.operand(queries);
  ranking.pack(ranking.query(), nullptr, query_operand, integers(not_finite));
  Operand gallery_operand = ranking.operand(std::min(plan.part, rows));
  // A gallery that comes in parts comes anew for each pass.
  int64_t packed = -1;
  Tensor best = ranking.empty({queries, k}, ranking.arithmetic());
  Tensor indices = ranking.empty({queries, k}, ScalarType::Long);
  Tensor maxima = ranking.empty({plan.direct ? 0 : plan.slab, plan.tiles}, ranking.arithmetic());
  Tensor tiles = ranking.empty({plan.direct ? 0 : plan.slab, k}, ScalarType::Int);
  Tensor scores = ranking.empty({plan.slab, plan.kept_tiles * plan.tile_columns}, ranking.arithmetic());
  auto* const tile_list = plan.direct ? nullptr : static_cast<int32_t*>(tiles.mutable_data_ptr());
  for (int64_t begin = 0; begin < queries; begin += plan.slab) {
    const int64_t count = std::min(plan.slab, queries - begin);
    const auto pass = [&](cuda::RetrievalPass which) {
      for (int64_t first = 0; first < rows; first += plan.part) {
        cuda::Features part = ranking.gallery();
        part.data =
            static_cast<const char*>(part.data) + first * part.stride * static_cast<int64_t>(gallery.element_size());
        part.rows = std::min(plan.part, rows - first);
        if (packed != first) ranking.pack(part, nullptr, gallery_operand, integers(not_finite) + 1);
        packed = first;
        cuda::RetrievalTileArgs args{};
        args.pass = which;
        args.element = ranking.element();
        args.queries = ranking.panels(query_operand, queries);
        args.gallery = ranking.panels(gallery_operand, part.rows);
        args.query_factor = query_operand.factor.const_data_ptr();
        args.gallery_factor = gallery_operand.factor.const_data_ptr();
        args.first_query = begin;
        args.query_count = count;
        args.first_tile = first / plan.tile_columns;
        args.tile_count = plan.tiles;
        args.maxima = maxima.mutable_data_ptr();
        args.tiles = tile_list;
        args.kept_tiles = plan.kept_tiles;
        args.scores = scores.mutable_data_ptr();
        ranking.launched(cuda::retrieval_tiles(args, ranking.stream()));
      }
    };
    cuda::RetrievalSelectArgs select{};
    select.wide = ranking.wide();
    select.rows = count;
    select.k = k;
    if (!plan.direct) {
      pass(cuda::RetrievalPass::maxima);
      select.values = maxima.const_data_ptr();
      select.count = plan.tiles;
      select.places = tile_list;
      ranking.launched(cuda::retrieval_select(select, ranking.stream()));
      select.places = nullptr;
    }
    pass(cuda::RetrievalPass::scores);
    select.values = scores.const_data_ptr();
    select.count = plan.kept_tiles * plan.tile_columns;
    select.best = static_cast<char*>(best.mutable_data_ptr()) + begin * k * ranking.arithmetic_bytes();
    select.indices = integers(indices) + begin * k;
    select.tiles = tile_list;
    select.kept_tiles = plan.kept_tiles;
    select.tile_columns = plan.tile_columns;
    ranking.launched(cuda::retrieval_select(select, ranking.stream()));
  }
  const Tensor flags = ranking.read(not_finite);
  ranking.check_finite(integers_of(flags)[0] != 0, integers_of(flags)[1] != 0);
  if (k == 1) return {best, indices};
  const auto [values, places] = sorted(best, true);
  return {values, gathered(indices, places)};
}

Tensor check_ids(const char* name, const Tensor& ids, int64_t rows, const Tensor& query) {
  check_same_device(kMetrics, name, ids, "query", query);
  check_dim(kMetrics, name, ids, 1);
  check_int64(kMetrics, name, ids);
  check_size(kMetrics, name, ids, 0, rows);
  return ids;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> retrieval_metrics(Tensor query, Tensor gallery, Tensor query_ids,
                                                                     Tensor gallery_ids, int64_t workspace_bytes) {
  const Ranking ranking(kMetrics, query, gallery, workspace_bytes);
  const int64_t queries = ranking.queries();
  const int64_t rows = ranking.rows();
  check_ids("query_ids", query_ids, queries, query);
  check_ids("gallery_ids", gallery_ids, rows, query);

  // Both in order of identity: the positives of a query are one range, and those of neighbouring queries are near.
  auto [wanted, query_order] = sorted(query_ids, false);
  auto [owned, gallery_order] = sorted(gallery_ids, false);
  Tensor first = ranking.empty({queries}, ScalarType::Long);
  // The number of positives of each query, and at the end what holds NaN or infinity.
  Tensor counts = ranking.zeros({queries + 2}, ScalarType::Long);
  Tensor positives = ranking.empty({queries}, ScalarType::Long);
  ranking.launched(cuda::retrieval_ranges({integers_of(wanted), integers_of(owned), integers_of(query_order), queries,
                                           rows, integers(first), integers(counts), integers(positives)},
                                          ranking.stream()));
  Tensor ends = running_sum(counts);
  Operand query_operand = ranking.operand(queries);
  Operand gallery_operand = ranking.operand(rows);
  ranking.pack(ranking.query(), integers_of(query_order), query_operand, integers(counts) + queries);
  ranking.pack(ranking.gallery(), integers_of(gallery_order), gallery_operand, integers(counts) + queries + 1);
  const Tensor on_host = ranking.read(counts);
  const int64_t* count_of = integers_of(on_host);
  ranking.check_finite(count_of[queries] != 0, count_of[queries + 1] != 0);

  // Waves of queries whose positives fit the budget; one query at least.
  const int64_t positive_bytes = ranking.arithmetic_bytes() + static_cast<int64_t>(sizeof(uint32_t));
  const int64_t most = *std::max_element(count_of, count_of + queries);
  int64_t total = 0;
  for (int64_t q = 0; q < queries; ++q) total += count_of[q];
  const int64_t room = std::min(std::max(workspace_bytes / positive_bytes, most), total);
  Tensor own = ranking.empty({room}, ranking.arithmetic());
  Tensor above = ranking.empty({room}, ScalarType::Int);
  Tensor first_rank = ranking.empty({queries}, ScalarType::Long);
  Tensor last_rank = ranking.empty({queries}, ScalarType::Long);
  Tensor average_precision = ranking.empty({queries}, ScalarType::Double);
  Tensor trapezoid = ranking.empty({queries}, ScalarType::Double);
  int64_t buffer_begin = 0;
  for (int64_t begin = 0; begin < queries;) {
    int64_t used = 0;
    int64_t end = begin;
    for (; end < queries && used + count_of[end] <= room; ++end) used += count_of[end];
    cuda::RetrievalTileArgs args{};
    args.element = ranking.element();
    args.queries = ranking.panels(query_operand, queries);
    args.gallery = ranking.panels(gallery_operand, rows);
    args.query_factor = query_operand.factor.const_data_ptr();
    args.gallery_factor = gallery_operand.factor.const_data_ptr();
    args.first_query = begin;
    args.query_count = end - begin;
    args.first = integers_of(first);
    args.positives = integers_of(counts);
    args.ends = integers_of(ends);
    args.buffer_begin = buffer_begin;
    args.gallery_order = integers_of(gallery_order);
    args.own = own.mutable_data_ptr();
    args.above = static_cast<uint32_t*>(above.mutable_data_ptr());
    if (used > 0) {
      torch::stable::zero_(above);
      args.pass = cuda::RetrievalPass::own;
      ranking.launched(cuda::retrieval_tiles(args, ranking.stream()));
      args.pass = cuda::RetrievalPass::count;
      ranking.launched(cuda::retrieval_tiles(args, ranking.stream()));
    }
    ranking.launched(cuda::retrieval_finish(
        {begin, end - begin, integers_of(counts), integers_of(ends), buffer_begin, args.above, integers_of(query_order),
         integers(first_rank), integers(last_rank), doubles(average_precision), doubles(trapezoid)},
        ranking.stream()));
    buffer_begin += used;
    begin = end;
  }
  return {positives, first_rank, last_rank, average_precision, trapezoid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, LCR2S_CUDA_KEY, m) {
  m.impl("topk_similarity", TORCH_BOX(&topk_similarity));
  m.impl("retrieval_metrics", TORCH_BOX(&retrieval_metrics));
}

}  // namespace lcr2s
