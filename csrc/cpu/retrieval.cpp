#include "retrieval.h"

#include "gemm.h"
#include "unit_rows.h"

namespace lcr2s::cpu::LCR2S_ISA {

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Gallery rows of a tile of scores: with kMc queries it stays in the second-level cache.
template <class T>
constexpr int64_t kTileColumns = 2048 / static_cast<int64_t>(sizeof(T));

// Queries of one task: a full tile where there are many, fewer where a full tile would leave threads without work.
static int64_t task_queries(int64_t queries) {
  const int64_t share = ceil_div(ceil_div(queries, 8), kMr) * kMr;
  return smaller(kMc, larger(share, 2 * kMr));
}

static bool all_finite(const double* inverse_norms, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(inverse_norms[i] >= 0)) return false;
  return true;
}

// Scored gallery rows of one query as a heap whose root ranks last: lowest score, highest index among equals.
template <class T>
struct Heap {
  T* scores;
  int64_t* indices;

  bool after(int64_t a, int64_t b) const {
    return scores[a] < scores[b] || (scores[a] == scores[b] && indices[a] > indices[b]);
  }
  void swap(int64_t a, int64_t b) const {
    const T score = scores[a];
    const int64_t index = indices[a];
    scores[a] = scores[b];
    indices[a] = indices[b];
    scores[b] = score;
    indices[b] = index;
  }
  void sift_down(int64_t at, int64_t size) const {
    for (;;) {
      int64_t last = at;
      if (2 * at + 1 < size && after(2 * at + 1, last)) last = 2 * at + 1;
      if (2 * at + 2 < size && after(2 * at + 2, last)) last = 2 * at + 2;
      if (last == at) return;
      swap(at, last);
      at = last;
    }
  }
  void push(int64_t size, T score, int64_t index) const {
    scores[size] = score;
    indices[size] = index;
    for (int64_t at = size; at > 0 && after(at, (at - 1) / 2); at = (at - 1) / 2) swap(at, (at - 1) / 2);
  }
  void replace_root(int64_t size, T score, int64_t index) const {
    scores[0] = score;
    indices[0] = index;
    sift_down(0, size);
  }
  // Best first; the elements must form a heap.
  void sort(int64_t size) const {
    for (int64_t end = size - 1; end > 0; --end) {
      swap(0, end);
      sift_down(0, end);
    }
  }
};

template <class T>
LCR2S_INLINE bool any_lane(Mask<T> mask) {
  uint64_t words[LCR2S_VECTOR_BYTES / 8];
  __builtin_memcpy(words, &mask, sizeof(mask));
  uint64_t any = 0;
  for (int i = 0; i < LCR2S_VECTOR_BYTES / 8; ++i) any |= words[i];
  return any != 0;
}

// Offers the scores of gallery rows first, first + 1, ... to a heap of at most k, after all rows before `first`.
template <class T>
static void offer(const Heap<T>& heap, int64_t k, const T* scores, int64_t count, int64_t first) {
  constexpr int lanes = kLanes<T>;
  int64_t j = 0;
  for (; j < count && first + j < k; ++j) heap.push(first + j, scores[j], first + j);
  // A later row of equal score ranks behind.
  const auto offer_one = [&](int64_t at) {
    if (scores[at] > heap.scores[0]) heap.replace_root(k, scores[at], first + at);
  };
  for (; j + lanes <= count; j += lanes)
    if (any_lane<T>(load(scores + j) > heap.scores[0]))
      for (int i = 0; i < lanes; ++i) offer_one(j + i);
  for (; j < count; ++j) offer_one(j);
}

template <class T>
static void topk(const TopkSimilarityArgs& args, const Parallel& parallel) {
  const RankingArgs& ranking = args.ranking;
  const Memory& memory = ranking.memory;
  const int64_t queries = ranking.query.rows;
  const int64_t gallery = ranking.gallery.rows;
  const int64_t width = ranking.query.width;
  constexpr int64_t columns = kTileColumns<T>;
  static_assert(columns % kNr<T> == 0);

  T* unit_queries = memory.take<T>(queries * width);
  double* query_norms = memory.take<double>(queries);
  unit_rows<T>(parallel, ranking.query, 0, queries, unit_queries, query_norms);
  if (!all_finite(query_norms, queries)) {
    *ranking.status = RankingStatus::query_not_finite;
    return;
  }
  // The gallery passes by in parts of whole tiles, normalised and packed.
  const int64_t fitting = ranking.workspace_bytes / (2 * width * static_cast<int64_t>(sizeof(T))) / columns * columns;
  const int64_t part = smaller(larger(fitting, columns), gallery);
  T* rows = memory.take<T>(part * width);
  T* packed = memory.take<T>(packed_size<T>(width, part));
  double* norms = memory.take<double>(gallery);
  const int64_t block = task_queries(queries);
  T* values = static_cast<T*>(args.values);
  const int64_t k = args.k;
  for (int64_t begin = 0; begin < gallery; begin += part) {
    const int64_t count = smaller(part, gallery - begin);
    unit_rows<T>(parallel, ranking.gallery, begin, begin + count, rows, norms);
    if (!all_finite(norms + begin, count)) {
      *ranking.status = RankingStatus::gallery_not_finite;
      return;
    }
    pack_panels<T>(parallel, rows, 1, width, width, count, packed);
    parallel.for_each(ceil_div(queries, block), [&](int64_t task) {
      alignas(64) T scores[kMc * columns];
      const int64_t i0 = task * block;
      const int64_t m = smaller(block, queries - i0);
      for (int64_t j0 = 0; j0 < count; j0 += columns) {
        const int64_t n = smaller(columns, count - j0);
        gemm_tile<T>(unit_queries + i0 * width, width, 1, m, width, packed + j0 * width, n, scores, columns, false);
        for (int64_t i = 0; i < m; ++i)
          offer(Heap<T>{values + (i0 + i) * k, args.indices + (i0 + i) * k}, k, scores + i * columns, n, begin + j0);
      }
    });
  }
  parallel.for_each(ceil_div(queries, block), [&](int64_t task) {
    const int64_t end = smaller((task + 1) * block, queries);
    for (int64_t q = task * block; q < end; ++q) Heap<T>{values + q * k, args.indices + q * k}.sort(k);
  });
}

// Positives of one query, best first, with the number of gallery rows that rank above each.
template <class T>
struct Positives {
  T* scores;
  int64_t* indices;
  int64_t* above;
  int64_t count;
};

// Beyond this many positives a search for each score beats a comparison of each score with each positive.
constexpr int64_t kCompared = 64;

// Number of scores above `score`, equal ones included.
template <class T, bool kWithEqual>
LCR2S_INLINE int64_t count_above(const T* scores, int64_t count, T score) {
  constexpr int lanes = kLanes<T>;
  Mask<T> hits{};
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes)
    hits -= kWithEqual ? (Mask<T>)(load(scores + j) >= score) : (Mask<T>)(load(scores + j) > score);
  int64_t total = 0;
  for (int i = 0; i < lanes; ++i) total += hits[i];
  for (; j < count; ++j) total += kWithEqual ? scores[j] >= score : scores[j] > score;
  return total;
}

// Adds what ranks above each positive among gallery rows first, first + 1, ...
template <class T>
static void count_tile(const Positives<T>& positives, const T* scores, int64_t count, int64_t first) {
  if (positives.count <= kCompared) {
    for (int64_t p = 0; p < positives.count; ++p) {
      const T score = positives.scores[p];
      const int64_t before = smaller(larger(positives.indices[p] - first, 0), count);
      positives.above[p] +=
          count_above<T, true>(scores, before, score) + count_above<T, false>(scores + before, count - before, score);
    }
    return;
  }
  // above[p] counts here the rows between positive p - 1 (included) and positive p in rank.
  for (int64_t j = 0; j < count; ++j) {
    int64_t low = 0;
    int64_t high = positives.count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      const T score = positives.scores[middle];
      if (score > scores[j] || (score == scores[j] && positives.indices[middle] <= first + j)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low < positives.count) ++positives.above[low];
  }
}

template <class T>
static void finish(const RetrievalMetricsArgs& args, int64_t query, const Positives<T>& positives) {
  double precision_sum = 0;
  double trapezoid_sum = 0;
  int64_t rank = 0;
  int64_t between = 0;
  for (int64_t p = 0; p < positives.count; ++p) {
    between += positives.above[p];
    rank = 1 + (positives.count <= kCompared ? positives.above[p] : between);
    const double precision = static_cast<double>(p + 1) / static_cast<double>(rank);
    const double before = rank > 1 ? static_cast<double>(p) / static_cast<double>(rank - 1) : 1.0;
    precision_sum += precision;
    trapezoid_sum += (precision + before) / 2;
    if (p == 0) args.first_rank[query] = rank;
  }
  args.last_rank[query] = rank;
  args.average_precision[query] = precision_sum / static_cast<double>(positives.count);
  args.average_precision_trapezoid[query] = trapezoid_sum / static_cast<double>(positives.count);
}

template <class T>
struct MetricsTask {
  const RetrievalMetricsArgs& args;
  const T* queries;
  const T* gallery;
  const T* packed;
  int64_t width;

  // Scores of the positives of queries [begin, end), by the product that scores the whole gallery, so that they carry
  // the same bits. A few queries share one panel of gathered rows; queries of one identity share its columns.
  void score(int64_t begin, int64_t end, const Positives<T>* positives, T* panel) const {
    constexpr int columns = kNr<T>;
    alignas(64) T scores[kMr * columns];
    for (int64_t q = begin; q < end;) {
      if (positives[q - begin].count > columns) {
        for (int64_t at = 0; at < positives[q - begin].count; at += columns) {
          const int64_t n = smaller(columns, positives[q - begin].count - at);
          for (int64_t c = 0; c < n; ++c) gather(positives[q - begin].indices[at + c], c, panel);
          gemm_tile<T>(queries + q * width, width, 1, 1, width, panel, n, scores, columns, false);
          __builtin_memcpy(positives[q - begin].scores + at, scores, static_cast<size_t>(n) * sizeof(T));
        }
        ++q;
        continue;
      }
      int64_t first_column[kMr];
      int64_t rows = 0;
      int64_t used = 0;
      for (; q + rows < end && rows < kMr; ++rows) {
        const Positives<T>& own = positives[q + rows - begin];
        if (rows > 0 && args.first[q + rows] == args.first[q + rows - 1] &&
            own.count == positives[q + rows - 1 - begin].count) {
          first_column[rows] = first_column[rows - 1];
          continue;
        }
        if (used + own.count > columns) break;
        first_column[rows] = used;
        for (int64_t c = 0; c < own.count; ++c) gather(own.indices[c], used++, panel);
      }
      if (used > 0) {
        gemm_tile<T>(queries + q * width, width, 1, rows, width, panel, used, scores, columns, false);
        for (int64_t i = 0; i < rows; ++i) {
          const Positives<T>& own = positives[q + i - begin];
          __builtin_memcpy(own.scores, scores + i * columns + first_column[i],
                           static_cast<size_t>(own.count) * sizeof(T));
        }
      }
      q += rows;
    }
  }

  // Gallery row `row` as column `column` of a packed panel; columns that are not filled hold old values, never read.
  void gather(int64_t row, int64_t column, T* panel) const {
    const T* source = gallery + row * width;
    for (int64_t p = 0; p < width; ++p) panel[p * kNr<T> + column] = source[p];
  }
};

template <class T>
static void metrics(const RetrievalMetricsArgs& args, const Parallel& parallel) {
  const RankingArgs& ranking = args.ranking;
  const Memory& memory = ranking.memory;
  const int64_t queries = ranking.query.rows;
  const int64_t gallery = ranking.gallery.rows;
  const int64_t width = ranking.query.width;
  constexpr int64_t columns = kTileColumns<T>;

  T* unit_queries = memory.take<T>(queries * width);
  T* unit_gallery = memory.take<T>(gallery * width);
  double* norms = memory.take<double>(larger(queries, gallery));
  unit_rows<T>(parallel, ranking.query, 0, queries, unit_queries, norms);
  if (!all_finite(norms, queries)) {
    *ranking.status = RankingStatus::query_not_finite;
    return;
  }
  unit_rows<T>(parallel, ranking.gallery, 0, gallery, unit_gallery, norms);
  if (!all_finite(norms, gallery)) {
    *ranking.status = RankingStatus::gallery_not_finite;
    return;
  }
  T* packed = memory.take<T>(packed_size<T>(width, gallery));
  pack_panels<T>(parallel, unit_gallery, 1, width, width, gallery, packed);
  const MetricsTask<T> shared{args, unit_queries, unit_gallery, packed, width};

  // Waves of queries whose positives fit the budget; one query at least.
  constexpr int64_t positive_bytes = static_cast<int64_t>(sizeof(T) + 2 * sizeof(int64_t));
  const int64_t block = task_queries(queries);
  int64_t most = 1;
  int64_t total = 0;
  for (int64_t q = 0; q < queries; ++q) {
    most = larger(most, args.positives[q]);
    total += args.positives[q];
  }
  const int64_t room = smaller(larger(ranking.workspace_bytes / positive_bytes, most), total);
  T* scores = memory.take<T>(room);
  int64_t* indices = memory.take<int64_t>(room);
  int64_t* above = memory.take<int64_t>(room);
  Positives<T>* positives = memory.take<Positives<T>>(queries);
  const int64_t panel_size = packed_size<T>(width, 1);
  T* panels = memory.take<T>(ceil_div(queries, block) * panel_size);
  __builtin_memset(panels, 0, static_cast<size_t>(ceil_div(queries, block) * panel_size) * sizeof(T));

  for (int64_t begin = 0; begin < queries;) {
    int64_t used = 0;
    int64_t end = begin;
    for (; end < queries && used + args.positives[end] <= room; ++end) {
      positives[end] = {scores + used, indices + used, above + used, args.positives[end]};
      used += args.positives[end];
    }
    parallel.for_each(ceil_div(end - begin, block), [&](int64_t task) {
      alignas(64) T tile[kMc * columns];
      const int64_t i0 = begin + task * block;
      const int64_t m = smaller(block, end - i0);
      for (int64_t q = i0; q < i0 + m; ++q)
        for (int64_t p = 0; p < positives[q].count; ++p) {
          positives[q].indices[p] = args.order[args.first[q] + p];
          positives[q].above[p] = 0;
        }
      shared.score(i0, i0 + m, positives + i0, panels + task * panel_size);
      for (int64_t q = i0; q < i0 + m; ++q) {
        const Heap<T> heap{positives[q].scores, positives[q].indices};
        for (int64_t at = positives[q].count / 2 - 1; at >= 0; --at) heap.sift_down(at, positives[q].count);
        heap.sort(positives[q].count);
      }
      for (int64_t j0 = 0; j0 < gallery; j0 += columns) {
        const int64_t n = smaller(columns, gallery - j0);
        gemm_tile<T>(unit_queries + i0 * width, width, 1, m, width, packed + j0 * width, n, tile, columns, false);
        for (int64_t i = 0; i < m; ++i) count_tile(positives[i0 + i], tile + i * columns, n, j0);
      }
      for (int64_t q = i0; q < i0 + m; ++q) {
        if (positives[q].count > 0) {
          finish(args, q, positives[q]);
        } else {
          args.first_rank[q] = args.last_rank[q] = 0;
          args.average_precision[q] = args.average_precision_trapezoid[q] = 0;
        }
      }
    });
    begin = end;
  }
}

}  // namespace

void topk_similarity(const TopkSimilarityArgs& args, const Parallel& parallel) {
  if (args.ranking.wide) {
    topk<double>(args, parallel);
  } else {
    topk<float>(args, parallel);
  }
}

void retrieval_metrics(const RetrievalMetricsArgs& args, const Parallel& parallel) {
  if (args.ranking.wide) {
    metrics<double>(args, parallel);
  } else {
    metrics<float>(args, parallel);
  }
}

}  // namespace lcr2s::cpu::LCR2S_ISA
