#pragma once

#include "dispatch.h"
#include "features.h"

// Exact ranking of gallery rows by cosine, equal scores by gallery index. Arithmetic is float, double where `wide`.
namespace lcr2s::cpu {

// What a kernel found before it ranked anything.
enum class RankingStatus : int32_t { complete, query_not_finite, gallery_not_finite };

struct RankingArgs {
  Features query;
  Features gallery;
  bool wide;
  // Budget of the temporary memory that would otherwise grow with the gallery.
  int64_t workspace_bytes;
  Memory memory;
  RankingStatus* status;
};

// The k best of every query, best first: values (Q, k) of the arithmetic's type, indices (Q, k).
struct TopkSimilarityArgs {
  RankingArgs ranking;
  int64_t k;
  void* values;
  int64_t* indices;
};

// The positives of query q are gallery rows order[first[q] .. first[q] + positives[q]).
struct RetrievalMetricsArgs {
  RankingArgs ranking;
  const int64_t* order;
  const int64_t* first;
  const int64_t* positives;
  // (Q,), 0 for a query without a positive
  int64_t* first_rank;
  int64_t* last_rank;
  double* average_precision;
  double* average_precision_trapezoid;
};

LCR2S_KERNEL(topk_similarity, TopkSimilarityArgs)
LCR2S_KERNEL(retrieval_metrics, RetrievalMetricsArgs)

}  // namespace lcr2s::cpu
