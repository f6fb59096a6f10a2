#pragma once

#include "dispatch.h"
#include "features.h"

// Losses over the cosines c_ij of B image rows and N text rows. Arithmetic and results are float, double where `wide`.
namespace lcr2s::cpu {

enum class SimilarityLoss { info_nce, sdm, cmpm, tal };

struct SimilarityArgs {
  SimilarityLoss kind;
  Features image;
  Features text;
  bool wide;
  // Identities as labels from 0, and for every row and column its number of positives.
  const int32_t* image_labels;
  const int32_t* text_labels;
  const int32_t* image_positives;
  const int32_t* text_positives;
  // InfoNCE, SDM: one number of the arithmetic's type.
  const void* logit_scale;
  // SDM, CMPM
  double eps;
  // CMPM: target y / |y|_2 instead of y / sum y
  bool l2_target;
  // TAL
  double margin;
  double tau;
  // Budget of the tiles of cosines, beside memory proportional to the rows.
  int64_t workspace_bytes;
  Memory memory;
  void* loss;
  // Gradients of the raw features, dense, and of the logit scale; null where not asked for.
  void* grad_image;
  void* grad_text;
  void* grad_scale;
  // Where this is a block of a larger matrix, one pass alone; all null otherwise.
  // Out, pass 1: similarity_statistics() x rows, dense, of what merges with that of other blocks: maxima, sums,
  // positives.
  void* image_statistics;
  void* text_statistics;
  // In, pass 2: kSimilarityCoefficients x rows, dense, from the statistics of whole rows.
  const void* image_coefficients;
  const void* text_coefficients;
};

// Fields of a row: maximum (TAL: over positives, over negatives), sums, number of positives.
constexpr int64_t similarity_statistics(SimilarityLoss kind) {
  return kind == SimilarityLoss::info_nce ? 4 : kind == SimilarityLoss::tal ? 6 : 5;
}
constexpr int64_t kSimilarityCoefficients = 4;

LCR2S_KERNEL(similarity, SimilarityArgs)

}  // namespace lcr2s::cpu
