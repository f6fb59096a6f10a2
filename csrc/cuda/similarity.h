#pragma once

#include "../cpu/features.h"
#include "similarity_plan.h"

// Kernels of the similarity losses: InfoNCE, SDM, CMPM, TAL. Each call launches on `stream`, which belongs to the
// current device, and returns null or what CUDA has to say against the launch. `element` is the type of the operands of
// matrix products; arithmetic and results are double where it is float64, float otherwise.
namespace lcr2s::cuda {

using cpu::Features;

struct SimilaritySide {
  Features features;
  // int64 where `wide_ids`, else int32; null: a row's identity is its number.
  const void* ids;
  bool wide_ids;
  // Off the cooperative path, where the other side needs its gradient: the rows as a library's product wants them, of
  // `element`, scaled by powers of two and padded with zeros to `operand_stride`.
  void* operand;
  int64_t operand_stride;
  // rows x width, dense; null: not needed. First the product with dL/dc, in the end the gradient.
  void* gradient;
};

struct SimilarityArgs {
  SimilarityLoss kind;
  DType element;
  SimilarityPlan plan;
  SimilaritySide image;
  SimilaritySide text;
  // InfoNCE, SDM: one number of the arithmetic's type.
  const void* logit_scale;
  // SDM, CMPM
  double eps;
  // CMPM: target y / |y|_2 instead of y / sum y
  bool l2_target;
  // TAL
  double margin;
  double tau;
  char* workspace;
  void* kept;
  void* block;
  void* loss;
  // Null where not asked for.
  void* grad_scale;
};

// Blocks of the cooperative kernel that the current device holds at once, for the plan.
int64_t similarity_cooperative_blocks(DType element);

// The loss, dL/d(logit scale), and on the cooperative path the gradients. Off it they want, for each block of
// plan.block_rows x plan.block_columns of dL/dc, similarity_block and two products of a library with the operands,
//   image.gradient (rows of the block)    (+)= block text.operand
//   text.gradient  (columns of the block) (+)= block' image.operand
// and in the end similarity_finish.
const char* similarity(const SimilarityArgs& args, void* stream);
const char* similarity_block(const SimilarityArgs& args, int64_t row, int64_t column, void* stream);
const char* similarity_finish(const SimilarityArgs& args, void* stream);

// sum += part
const char* similarity_add(bool wide, void* sum, const void* part, int64_t count, void* stream);

}  // namespace lcr2s::cuda
