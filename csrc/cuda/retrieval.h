#pragma once

#include "../cpu/features.h"
#include "panel.h"

// Kernels of exact ranking by cosine. Each launches on `stream`, which belongs to the current device, and returns null
// or what CUDA has to say against the launch. Operands are scaled rows (scaled_rows.h); a score is their product times
// both factors, by the same arithmetic wherever the rows lie, so that equal rows have equal scores and a score formed
// twice has the same bits.
namespace lcr2s::cuda {

using cpu::Features;

// What becomes of a tile of scores, 128 queries by retrieval_columns gallery rows.
enum class RetrievalPass {
  // maxima: of each query over the tile
  maxima,
  // scores: of each query with the tiles that `tiles` names
  scores,
  // own: of each query with its positives
  own,
  // above: how many gallery rows rank above each positive
  count,
};

struct RetrievalTileArgs {
  RetrievalPass pass;
  DType element;
  Panels queries;
  Panels gallery;  // or a part of it that begins with tile `first_tile`
  const void* query_factor;
  const void* gallery_factor;
  // Queries [first_query, first_query + query_count) are those of the buffers below.
  int64_t first_query;
  int64_t query_count;
  int64_t first_tile;

  // maxima, scores: tiles of the whole gallery.
  int64_t tile_count;
  void* maxima;          // query_count x tile_count
  const int32_t* tiles;  // query_count x kept_tiles, rising; null: kept_tiles = tile_count, all of them
  int64_t kept_tiles;
  void* scores;  // query_count x kept_tiles x retrieval_columns; -infinity beyond the gallery

  // own, count: queries and gallery lie in order of identity. The positives of query q are gallery rows first[q] ..
  // first[q] + positives[q], their numbers in the buffers begin at ends[q] - positives[q] - buffer_begin.
  const int64_t* first;
  const int64_t* positives;
  const int64_t* ends;
  int64_t buffer_begin;
  const int64_t* gallery_order;  // index of each gallery row as the caller numbers them
  void* own;
  uint32_t* above;
};
const char* retrieval_tiles(const RetrievalTileArgs& args, void* stream);

// For each row of `count` values the k largest, equal ones by position: places in rising order, and the values.
struct RetrievalSelectArgs {
  bool wide;
  const void* values;  // rows x count
  int64_t rows;
  int64_t count;
  int64_t k;
  // Positions, as tiles: rows x k; or
  int32_t* places;
  // values and gallery rows, rows x k, where position p lies in tile p / tile_columns of `tiles` (null: of all).
  void* best;
  int64_t* indices;
  const int32_t* tiles;
  int64_t kept_tiles;
  int64_t tile_columns;
};
const char* retrieval_select(const RetrievalSelectArgs& args, void* stream);

// Queries and gallery in order of identity: the range of each query's positives.
struct RetrievalRangeArgs {
  const int64_t* query_ids;    // rising
  const int64_t* gallery_ids;  // rising
  const int64_t* query_order;
  int64_t queries;
  int64_t gallery;
  int64_t* first;
  int64_t* positives;
  int64_t* positives_out;  // as the caller numbers queries
};
const char* retrieval_ranges(const RetrievalRangeArgs& args, void* stream);

// From counts to what the operator returns, for queries [first_query, first_query + query_count).
struct RetrievalFinishArgs {
  int64_t first_query;
  int64_t query_count;
  const int64_t* positives;
  const int64_t* ends;
  int64_t buffer_begin;
  const uint32_t* above;
  const int64_t* query_order;
  int64_t* first_rank;
  int64_t* last_rank;
  double* average_precision;
  double* average_precision_trapezoid;
};
const char* retrieval_finish(const RetrievalFinishArgs& args, void* stream);

}  // namespace lcr2s::cuda
