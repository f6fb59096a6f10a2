#include "relation.h"

#include "panel.h"
#include "relation_frobenius.h"

namespace lcr2s::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kRelationThreads)
    relation_project_kernel(const __grid_constant__ RelationProjectArgs args) {
  const int lane = lane_index();
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kRelationThreads / kWarp) + warp_index();
  const bool second = args.sides[0].product == nullptr || row >= args.sides[0].features.rows;
  if (second && args.sides[0].product != nullptr) row -= args.sides[0].features.rows;
  const RelationProjectSide& side = args.sides[second ? 1 : 0];
  if (side.product == nullptr || row >= side.features.rows) return;
  const T* g = static_cast<const T*>(side.product) + row * side.product_stride;
  T* out = static_cast<T*>(side.out) + row * side.features.width;
  const double inverse = inverse_norm(side.features, row, lane);
  double along = 0;
  for (int64_t j = lane; j < side.features.width; j += kWarp)
    along += static_cast<double>(g[j]) * (element_at(side.features, row, j) * inverse);
  along = warp_sum(along);
  const double length = args.scaled && inverse != 0 ? scalbn(1.0, row_exponent(inverse)) : inverse;
  const double factor =
      args.factor * length *
      (args.multiplier == nullptr ? 1.0 : static_cast<double>(*static_cast<const T*>(args.multiplier)));
  for (int64_t j = lane; j < side.features.width; j += kWarp)
    out[j] =
        static_cast<T>(factor * (static_cast<double>(g[j]) - along * (element_at(side.features, row, j) * inverse)));
}

template <class T>
__global__ void __launch_bounds__(kRelationThreads)
    relation_total_kernel(const __grid_constant__ RelationTotalArgs args) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < args.count; i += kRelationThreads) sum += args.partials[i];
  sum = block_sum(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) *static_cast<T*>(args.loss) = static_cast<T>(args.factor * sum);
}

template <class T>
__global__ void __launch_bounds__(kRelationThreads)
    relation_accumulate_kernel(const __grid_constant__ RelationAccumulateArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRelationThreads + threadIdx.x;
  if (i < args.count) static_cast<T*>(args.sum)[i] += static_cast<const T*>(args.part)[i];
}

constexpr int64_t kBlockSumBytes = kWarp * sizeof(double);

}  // namespace

const char* relation_operands(const RelationOperandArgs& args, void* stream) {
  const int64_t blocks = ceil_div(args.sides[0].rows + args.sides[1].rows, kRelationThreads / kWarp);
  return args.wide ? launch(relation_operand_kernel<double>, blocks, kRelationThreads, 0, stream, args)
                   : launch(relation_operand_kernel<float>, blocks, kRelationThreads, 0, stream, args);
}

int64_t relation_dot_blocks(int64_t count) { return ceil_div(count, kFrobeniusChunk); }

const char* relation_dot(const RelationDotArgs& args, void* stream) {
  const int64_t blocks = relation_dot_blocks(args.count);
  return args.wide ? launch(relation_dot_kernel<double>, blocks, kRelationThreads, kBlockSumBytes, stream, args)
                   : launch(relation_dot_kernel<float>, blocks, kRelationThreads, kBlockSumBytes, stream, args);
}

const char* relation_total(const RelationTotalArgs& args, void* stream) {
  return args.wide ? launch(relation_total_kernel<double>, 1, kRelationThreads, kBlockSumBytes, stream, args)
                   : launch(relation_total_kernel<float>, 1, kRelationThreads, kBlockSumBytes, stream, args);
}

const char* relation_fold(const RelationFoldArgs& args, void* stream) {
  const int64_t blocks = ceil_div(args.width * args.columns, kRelationThreads);
  return args.wide ? launch(relation_fold_kernel<double>, blocks, kRelationThreads, 0, stream, args)
                   : launch(relation_fold_kernel<float>, blocks, kRelationThreads, 0, stream, args);
}

const char* relation_accumulate(const RelationAccumulateArgs& args, void* stream) {
  const int64_t blocks = ceil_div(args.count, kRelationThreads);
  return args.wide ? launch(relation_accumulate_kernel<double>, blocks, kRelationThreads, 0, stream, args)
                   : launch(relation_accumulate_kernel<float>, blocks, kRelationThreads, 0, stream, args);
}

const char* relation_project(const RelationProjectArgs& args, void* stream) {
  int64_t rows = 0;
  for (const RelationProjectSide& side : args.sides) rows += side.product == nullptr ? 0 : side.features.rows;
  const int64_t blocks = ceil_div(rows, kRelationThreads / kWarp);
  return args.wide ? launch(relation_project_kernel<double>, blocks, kRelationThreads, 0, stream, args)
                   : launch(relation_project_kernel<float>, blocks, kRelationThreads, 0, stream, args);
}

}  // namespace lcr2s::cuda
