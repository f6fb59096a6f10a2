#pragma once

#include "dispatch.h"
#include "features.h"

// Relation distillation between the cosine matrices of a student and a teacher, B image rows by N text rows.
// Arithmetic and results are float, double where `wide`. Gradients are with respect to the student's raw features,
// dense; null where not asked for.
namespace lcr2s::cpu {

struct RelationArgs {
  Features student_image;
  Features student_text;
  Features teacher_image;
  Features teacher_text;
  bool wide;
  // Budget of the tiles of cosines, beside memory proportional to the rows.
  int64_t workspace_bytes;
  Memory memory;
  void* loss;
  void* grad_image;
  void* grad_text;
};

// loss = factor * sum over i, j of (student cosine - teacher cosine)^2
struct RelationFrobeniusArgs {
  RelationArgs relation;
  double factor;
};

// loss = mean over rows of KL(softmax(teacher_scale * teacher cosine) || softmax(student_scale * student cosine)), plus
// the same over columns. The scales point at one number of the arithmetic's type.
struct RelationKlArgs {
  RelationArgs relation;
  const void* student_scale;
  const void* teacher_scale;
  void* grad_scale;
  // 1 / rows and 1 / columns, of the whole matrix where this is a block of one.
  double row_weight;
  double column_weight;
  // Where this is a block of a larger matrix, one pass alone; all null otherwise. kRelationKlStatistics x rows,
  // dense: shift and sum of e^(logit - shift), student's then teacher's.
  // Out, pass 1.
  void* row_statistics;
  void* column_statistics;
  // In, pass 2: those of whole rows and columns. The loss is the block's part.
  const void* whole_row_statistics;
  const void* whole_column_statistics;
};

constexpr int64_t kRelationKlStatistics = 4;

LCR2S_KERNEL(relation_frobenius, RelationFrobeniusArgs)
LCR2S_KERNEL(relation_kl, RelationKlArgs)

}  // namespace lcr2s::cpu
