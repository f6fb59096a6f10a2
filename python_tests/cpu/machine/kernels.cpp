// Every CPU kernel in its AVX2 and its AVX-512 copy, whose results must agree: `kernels` prints which copy would be
// chosen, `kernels all` runs them. Exits with the number of results that do not agree.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "cpu/relation.h"
#include "cpu/retrieval.h"
#include "cpu/similarity.h"
#include "cpu/support_attention.h"

using namespace lcr2s;
using namespace lcr2s::cpu;

namespace {

const Parallel kSerial{[](int64_t tasks, Parallel::Body body, void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(task, context);
}};

struct Blocks {
  std::vector<void*> blocks;

  ~Blocks() {
    for (void* block : blocks) free(block);
  }
  static void* take(int64_t bytes, void* context) {
    const size_t size = (static_cast<size_t>(bytes) + 64) / 64 * 64;
    void* block = aligned_alloc(64, size);
    if (block == nullptr) abort();
    memset(block, 0xff, size);  // NaN where nothing was written
    static_cast<Blocks*>(context)->blocks.push_back(block);
    return block;
  }
  Memory memory() { return {take, this}; }
};

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-53;
}
int64_t below(int64_t n) { return static_cast<int64_t>(uniform() * static_cast<double>(n)); }

size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

void put(DType dtype, void* at, double value) {
  const float single = static_cast<float>(value);
  if (dtype == DType::float64) {
    memcpy(at, &value, 8);
  } else if (dtype == DType::float32) {
    memcpy(at, &single, 4);
  } else if (dtype == DType::float16) {
    const _Float16 half = static_cast<_Float16>(single);
    memcpy(at, &half, 2);
  } else {
    memcpy(at, reinterpret_cast<const char*>(&single) + 2, 2);  // bfloat16, truncated
  }
}

double get(DType dtype, const void* at) {
  double value = 0;
  float single = 0;
  _Float16 half;
  switch (dtype) {
    case DType::float64:
      memcpy(&value, at, 8);
      return value;
    case DType::float32:
      memcpy(&single, at, 4);
      return single;
    case DType::float16:
      memcpy(&half, at, 2);
      return static_cast<float>(half);
    case DType::bfloat16:
      memcpy(reinterpret_cast<char*>(&single) + 2, at, 2);
      return single;
  }
  return value;
}

// Rows of random numbers around one centre for each label, aligned to one element only.
struct Matrix {
  DType dtype;
  int64_t rows, width, stride;
  std::vector<char> bytes;

  Matrix(DType type, const std::vector<int32_t>& labels, int64_t columns, int64_t padding = 0)
      : dtype(type),
        rows(static_cast<int64_t>(labels.size())),
        width(columns),
        stride(columns + padding),
        bytes((labels.size() * static_cast<size_t>(stride) + 1) * size_of(type)) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const double centre = static_cast<double>((labels[static_cast<size_t>(i)] * 37 + j * j * 11) % 29) / 14.5 - 1;
        put(dtype, at(i, j), centre + 2 * uniform() - 1);
      }
  }
  char* at(int64_t i, int64_t j) { return bytes.data() + static_cast<size_t>(i * stride + j + 1) * size_of(dtype); }
  Features features() { return {at(0, 0), dtype, rows, width, stride}; }
  Rows all() { return {at(0, 0), stride}; }
};

struct Result {
  std::string name;
  DType dtype;
  std::vector<char> bytes;
};
// One copy's results of one call.
struct Results {
  std::vector<Result> all;
  Blocks blocks;

  Results() { all.reserve(16); }
  void* take(const char* name, DType dtype, int64_t count) {
    all.push_back({name, dtype, std::vector<char>(static_cast<size_t>(count) * size_of(dtype))});
    return all.back().bytes.data();
  }
};

int failures = 0;
int64_t numbers = 0;

// Two copies of a call: `run(in_avx512, results)`.
template <class Run>
void compare(const std::string& call, bool wide, const Run& run) {
  Results avx2, avx512;
  run(false, avx2);
  run(true, avx512);
  for (size_t k = 0; k < avx2.all.size(); ++k) {
    const Result &expected = avx2.all[k], &ours = avx512.all[k];
    const size_t size = size_of(expected.dtype), count = expected.bytes.size() / size;
    // A single number, loss or scale's gradient, is a sum that may cancel.
    double magnitude = count == 1 ? 0.05 : 1e-3, deviation = 0;
    for (size_t i = 0; i < count; ++i)
      magnitude = fmax(magnitude, fabs(get(expected.dtype, &expected.bytes[i * size])));
    for (size_t i = 0; i < count; ++i) {
      const double error =
          fabs(get(ours.dtype, &ours.bytes[i * size]) - get(expected.dtype, &expected.bytes[i * size]));
      if (!(error <= deviation)) deviation = error;
    }
    deviation /= magnitude;
    numbers += static_cast<int64_t>(count);
    // A half type's results may differ by a rounding to it.
    const double allowed = expected.dtype == DType::bfloat16  ? 0x1p-7
                           : expected.dtype == DType::float16 ? 0x1p-10
                           : wide                             ? 1e-12
                                                              : 2e-5;
    const bool agree = deviation <= allowed;
    printf("%s %s: %.3g%s\n", call.c_str(), expected.name.c_str(), deviation, agree ? "" : " TOO MUCH");
    failures += !agree;
  }
}

std::vector<int32_t> draw_labels(int64_t rows, int64_t labels) {
  std::vector<int32_t> drawn;
  for (int64_t i = 0; i < rows; ++i) drawn.push_back(static_cast<int32_t>(below(labels)));
  return drawn;
}
std::vector<int32_t> count_positives(const std::vector<int32_t>& rows, const std::vector<int32_t>& others) {
  std::vector<int32_t> counts;
  for (const int32_t label : rows) {
    counts.push_back(0);
    for (const int32_t other : others) counts.back() += label == other;
  }
  return counts;
}

// A number of the arithmetic's type.
struct Scale {
  double wide;
  float single;

  explicit Scale(double value) : wide(value), single(static_cast<float>(value)) {}
  const void* of(bool in_double) const { return in_double ? static_cast<const void*>(&wide) : &single; }
};

void similarity_losses(DType dtype, bool wide, const std::string& type, int64_t rows, int64_t columns, int64_t width,
                       int64_t workspace_bytes) {
  const DType out = wide ? DType::float64 : DType::float32;
  const std::vector<int32_t> of_images = draw_labels(rows, 20), of_texts = draw_labels(columns, 20);
  const std::vector<int32_t> image_positives = count_positives(of_images, of_texts);
  const std::vector<int32_t> text_positives = count_positives(of_texts, of_images);
  Matrix image(dtype, of_images, width, 3), text(dtype, of_texts, width);
  const Scale scale(20);
  for (int kind = 0; kind < 4; ++kind)
    compare("similarity " + std::to_string(kind) + type, wide, [&](bool in_avx512, Results& results) {
      SimilarityArgs args{};
      args.kind = static_cast<SimilarityLoss>(kind);
      args.image = image.features();
      args.text = text.features();
      args.wide = wide;
      args.image_labels = of_images.data();
      args.text_labels = of_texts.data();
      args.image_positives = image_positives.data();
      args.text_positives = text_positives.data();
      args.logit_scale = scale.of(wide);
      args.eps = 1e-8;
      args.margin = 0.1;
      args.tau = 0.015;
      args.workspace_bytes = workspace_bytes;
      args.memory = results.blocks.memory();
      args.loss = results.take("loss", out, 1);
      args.grad_image = results.take("image", out, rows * width);
      args.grad_text = results.take("text", out, columns * width);
      if (kind < 2) args.grad_scale = results.take("scale", out, 1);
      (in_avx512 ? avx512::similarity : avx2::similarity)(args, kSerial);
    });
}

void relations(DType dtype, bool wide, const std::string& type, int64_t rows, int64_t columns, int64_t width,
               int64_t teacher_width, double student, double teacher, int64_t workspace_bytes) {
  const DType out = wide ? DType::float64 : DType::float32;
  const std::vector<int32_t> of_images = draw_labels(rows, 20), of_texts = draw_labels(columns, 20);
  Matrix image(dtype, of_images, width, 3), text(dtype, of_texts, width);
  Matrix teacher_image(dtype, of_images, teacher_width), teacher_text(dtype, of_texts, teacher_width, 1);
  const Scale student_scale(student), teacher_scale(teacher);
  const auto relation = [&](Results& results) {
    return RelationArgs{image.features(),
                        text.features(),
                        teacher_image.features(),
                        teacher_text.features(),
                        wide,
                        workspace_bytes,
                        results.blocks.memory(),
                        results.take("loss", out, 1),
                        results.take("image", out, rows * width),
                        results.take("text", out, columns * width)};
  };
  compare("relation_kl" + type, wide, [&](bool in_avx512, Results& results) {
    RelationKlArgs args{};
    args.relation = relation(results);
    args.student_scale = student_scale.of(wide);
    args.teacher_scale = teacher_scale.of(wide);
    args.grad_scale = results.take("scale", out, 1);
    args.row_weight = 1.0 / static_cast<double>(rows);
    args.column_weight = 1.0 / static_cast<double>(columns);
    (in_avx512 ? avx512::relation_kl : avx2::relation_kl)(args, kSerial);
  });
  compare("relation_frobenius" + type, wide, [&](bool in_avx512, Results& results) {
    const RelationFrobeniusArgs args{relation(results), 0.01};
    (in_avx512 ? avx512::relation_frobenius : avx2::relation_frobenius)(args, kSerial);
  });
}

void attention(DType dtype, bool wide, const std::string& type, int64_t heads, int64_t width, int64_t value_width) {
  const int64_t queries = 21, pool = 40;
  const DType statistics = wide ? DType::float64 : DType::float32;
  const std::vector<int32_t> of_queries = draw_labels(queries, 20), of_pool = draw_labels(pool, 20);
  Matrix query(dtype, of_queries, heads * width), key(dtype, of_pool, heads * width, 5);
  Matrix value(dtype, of_pool, heads * value_width), upstream(dtype, of_queries, heads * value_width);
  std::vector<int64_t> first{0}, rows, entry_rows;
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t entry = i == 3 ? 0 : i == 5 ? 50 : 1 + below(9); entry > 0; --entry) {
      rows.push_back(below(pool));
      entry_rows.push_back(i);
    }
    first.push_back(static_cast<int64_t>(rows.size()));
  }
  const int64_t entries = static_cast<int64_t>(rows.size());
  std::vector<int64_t> users_of{0}, users;
  for (int64_t row = 0; row < pool; ++row) {
    for (int64_t entry = 0; entry < entries; ++entry)
      if (rows[static_cast<size_t>(entry)] == row) users.push_back(entry);
    users_of.push_back(static_cast<int64_t>(users.size()));
  }
  compare("support_attention" + type, wide, [&](bool in_avx512, Results& results) {
    const SupportAttentionShape shape{dtype, queries,     pool, entries,      heads,
                                      width, value_width, 0.3,  first.data(), rows.data()};
    void* probs = results.take("probs", statistics, entries * heads);
    const SupportAttentionArgs forward{
        shape, query.all(), key.all(), value.all(), probs, results.take("out", dtype, queries * heads * value_width)};
    (in_avx512 ? avx512::support_attention : avx2::support_attention)(forward, kSerial);
    const SupportAttentionBackwardArgs backward{shape,
                                                entry_rows.data(),
                                                users_of.data(),
                                                users.data(),
                                                upstream.all(),
                                                query.all(),
                                                key.all(),
                                                value.all(),
                                                probs,
                                                results.take("scores", statistics, entries * heads),
                                                results.take("query", dtype, queries * heads * width),
                                                results.take("key", dtype, pool * heads * width),
                                                results.take("value", dtype, pool * heads * value_width)};
    (in_avx512 ? avx512::support_attention_backward : avx2::support_attention_backward)(backward, kSerial);
  });
}

void retrieval(DType dtype, bool wide, const std::string& type, int64_t queries, int64_t gallery, int64_t width,
               int64_t labels) {
  const DType out = wide ? DType::float64 : DType::float32;
  const std::vector<int32_t> of_queries = draw_labels(queries, labels), of_gallery = draw_labels(gallery, labels);
  Matrix query(dtype, of_queries, width), rows(dtype, of_gallery, width);
  std::vector<int64_t> order, first_of, first, count;
  for (int32_t label = 0; label <= labels; ++label) {
    first_of.push_back(static_cast<int64_t>(order.size()));
    for (int64_t row = 0; row < gallery; ++row)
      if (of_gallery[static_cast<size_t>(row)] == label) order.push_back(row);
  }
  for (const int32_t label : of_queries) {
    first.push_back(first_of[static_cast<size_t>(label)]);
    count.push_back(first_of[static_cast<size_t>(label) + 1] - first.back());
  }
  RankingStatus status{};
  const auto ranking = [&](Results& results) {
    return RankingArgs{query.features(), rows.features(), wide, 1 << 16, results.blocks.memory(), &status};
  };
  // Ranks as doubles, to be compared like all else.
  const auto keep = [&](Results& results, const char* name, const std::vector<int64_t>& ranks) {
    auto* kept = static_cast<double*>(results.take(name, DType::float64, static_cast<int64_t>(ranks.size())));
    for (size_t i = 0; i < ranks.size(); ++i) kept[i] = static_cast<double>(ranks[i]);
  };
  compare("topk_similarity" + type, wide, [&](bool in_avx512, Results& results) {
    const int64_t k = 10;
    std::vector<int64_t> indices(static_cast<size_t>(queries * k));
    const TopkSimilarityArgs args{ranking(results), k, results.take("values", out, queries * k), indices.data()};
    (in_avx512 ? avx512::topk_similarity : avx2::topk_similarity)(args, kSerial);
    keep(results, "indices", indices);
  });
  compare("retrieval_metrics" + type, true, [&](bool in_avx512, Results& results) {
    std::vector<int64_t> best(static_cast<size_t>(queries)), worst(best);
    auto* precision = static_cast<double*>(results.take("precision", DType::float64, queries));
    auto* trapezoid = static_cast<double*>(results.take("trapezoid", DType::float64, queries));
    const RetrievalMetricsArgs args{ranking(results), order.data(), first.data(), count.data(),
                                    best.data(),      worst.data(), precision,    trapezoid};
    (in_avx512 ? avx512::retrieval_metrics : avx2::retrieval_metrics)(args, kSerial);
    keep(results, "best", best);
    keep(results, "worst", worst);
  });
}

}  // namespace

int main(int count, char**) {
  printf("chosen: %s\n", isa_name(current_isa()));
  if (count < 2) return 0;
  const char* names[] = {" float32", " float64", " bfloat16", " float16"};
  for (int i = 0; i < 4; ++i) {
    const auto dtype = static_cast<DType>(i);
    const bool wide = dtype == DType::float64;
    similarity_losses(dtype, wide, names[i], 37, 53, 40, 1 << 20);
    similarity_losses(dtype, wide, names[i], 115, 270, 19, 0);
    relations(dtype, wide, names[i], 37, 53, 40, 40, 20, 30, 1 << 20);
    relations(dtype, wide, names[i], 37, 53, 33, 25, 90, 80, 0);
    relations(dtype, wide, names[i], 120, 130, 5, 5, 20, 30, 1 << 20);
    attention(dtype, wide, names[i], 3, 40, 72);
    attention(dtype, wide, names[i], 20, 16, 5);
    attention(dtype, wide, names[i], 1, 130, 300);
    retrieval(dtype, wide, names[i], 37, 600, 40, 30);
    retrieval(dtype, wide, names[i], 20, 300, 40, 3);
  }
  printf("%ld numbers, %d results do not agree\n", static_cast<long>(numbers), failures);
  return failures;
}
