#include "../cpu/similarity.h"

#include <limits>
#include <optional>
#include <tuple>

#include "common.h"
#include "features.h"

namespace lcr2s {

#ifndef LCR2S_EMULATE_CUDA

namespace {

// Identities as labels from 0 in order of appearance: an open-addressing table twice as large as the number of rows.
class Relabel {
 public:
  explicit Relabel(int64_t rows) {
    size_t size = 16;
    while (size < 2 * static_cast<size_t>(rows)) size *= 2;
    keys_.resize(size);
    labels_.assign(size, -1);
  }

  int32_t operator()(int64_t id) {
    uint64_t hash = static_cast<uint64_t>(id);
    hash = (hash ^ (hash >> 31)) * 0x9e3779b97f4a7c15u;
    const size_t mask = keys_.size() - 1;
    for (size_t at = (hash ^ (hash >> 32)) & mask;; at = (at + 1) & mask) {
      if (labels_[at] < 0) {
        keys_[at] = id;
        labels_[at] = count_;
        return count_++;
      }
      if (keys_[at] == id) return labels_[at];
    }
  }

  int32_t count() const { return count_; }

 private:
  std::vector<int64_t> keys_;
  std::vector<int32_t> labels_;
  int32_t count_ = 0;
};

std::vector<int32_t> relabel(const char* op, const char* name, const Tensor& ids, int64_t rows, Relabel& labels) {
  check_cpu(op, name, ids);
  check_dim(op, name, ids, 1);
  check_size(op, name, ids, 0, rows);
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  check(narrow || ids.scalar_type() == ScalarType::Long, op, "`", name, "` must be int32 or int64");
  const Tensor dense = torch::stable::contiguous(ids);
  const auto* as_int = static_cast<const int32_t*>(dense.const_data_ptr());
  const auto* as_long = static_cast<const int64_t*>(dense.const_data_ptr());
  std::vector<int32_t> result(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) result[i] = labels(narrow ? as_int[i] : as_long[i]);
  return result;
}

// Number of `others` with each row's label.
std::vector<int32_t> count_positives(const std::vector<int32_t>& rows, const std::vector<int32_t>& others,
                                     int32_t labels) {
  std::vector<int32_t> histogram(static_cast<size_t>(labels));
  for (const int32_t label : others) ++histogram[label];
  std::vector<int32_t> result(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) result[i] = histogram[rows[i]];
  return result;
}

// One call: checked features and identities, results and memory.
class Similarity {
 public:
  Similarity(const char* op, const Tensor& image, const Tensor& text, const std::optional<Tensor>& image_ids,
             const std::optional<Tensor>& text_ids, int64_t workspace_bytes, bool need_image, bool need_text)
      : image_(op, "image", image),
        text_(op, "text", text),
        wide_(image_.wide() || text_.wide()),
        workspace_bytes_(workspace_bytes),
        need_image_(need_image),
        need_text_(need_text) {
    const int64_t rows = image.size(0), columns = text.size(0);
    check_size(op, "text", text, 1, image.size(1));
    check(rows + columns < std::numeric_limits<int32_t>::max(), op, "`image` and `text` have more than 2^31 rows");
    check(workspace_bytes >= 0, op, "`workspace_bytes` must not be negative, got ", workspace_bytes);
    check(image_ids.has_value() == text_ids.has_value(), op, "`image_ids` and `text_ids` must be given together");
    int32_t labels = static_cast<int32_t>(rows);
    if (image_ids.has_value()) {
      Relabel relabelled(rows + columns);
      image_labels_ = relabel(op, "image_ids", *image_ids, rows, relabelled);
      text_labels_ = relabel(op, "text_ids", *text_ids, columns, relabelled);
      labels = relabelled.count();
    } else {
      check_size(op, "text", text, 0, rows);
      for (int32_t i = 0; i < labels; ++i) image_labels_.push_back(i);
      text_labels_ = image_labels_;
    }
    image_positives_ = count_positives(image_labels_, text_labels_, labels);
    text_positives_ = count_positives(text_labels_, image_labels_, labels);
    loss_ = empty({});
    grad_image_ = need_image ? empty({rows, image.size(1)}) : empty({0});
    grad_text_ = need_text ? empty({columns, image.size(1)}) : empty({0});
  }

  ScalarType dtype() const { return wide_ ? ScalarType::Double : ScalarType::Float; }
  Tensor empty(std::vector<int64_t> sizes) const { return prefer_huge_pages(torch::stable::empty(sizes, dtype())); }

  cpu::SimilarityArgs args(cpu::SimilarityLoss kind) {
    cpu::SimilarityArgs args{};
    args.kind = kind;
    args.image = image_.view();
    args.text = text_.view();
    args.wide = wide_;
    args.image_labels = image_labels_.data();
    args.text_labels = text_labels_.data();
    args.image_positives = image_positives_.data();
    args.text_positives = text_positives_.data();
    args.workspace_bytes = workspace_bytes_;
    args.memory = workspace_.memory();
    args.loss = loss_.mutable_data_ptr();
    args.grad_image = need_image_ ? grad_image_.mutable_data_ptr() : nullptr;
    args.grad_text = need_text_ ? grad_text_.mutable_data_ptr() : nullptr;
    return args;
  }

  const Tensor& loss() const { return loss_; }
  const Tensor& grad_image() const { return grad_image_; }
  const Tensor& grad_text() const { return grad_text_; }

 private:
  FeatureRows image_;
  FeatureRows text_;
  bool wide_;
  int64_t workspace_bytes_;
  bool need_image_;
  bool need_text_;
  std::vector<int32_t> image_labels_;
  std::vector<int32_t> text_labels_;
  std::vector<int32_t> image_positives_;
  std::vector<int32_t> text_positives_;
  Workspace workspace_;
  Tensor loss_;
  Tensor grad_image_;
  Tensor grad_text_;
};

using LossAndGradients = std::tuple<Tensor, Tensor, Tensor>;
using LossGradientsAndScale = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_eps(const char* op, double eps) {
  check(eps > 0 && eps < std::numeric_limits<double>::infinity(), op, "`eps` must be a finite number above 0, got ",
        eps);
}

void check_tau(const char* op, double tau) {
  check(tau > 0 && tau < std::numeric_limits<double>::infinity(), op, "`tau` must be a finite number above 0, got ",
        tau);
}

Tensor logit_scale_of(const char* op, const Tensor& logit_scale, ScalarType dtype) {
  check_cpu(op, "logit_scale", logit_scale);
  check_dim(op, "logit_scale", logit_scale, 0);
  check_floating(op, "logit_scale", logit_scale);
  return torch::stable::to(logit_scale, dtype);
}

LossGradientsAndScale with_scale(const char* op, Similarity& call, cpu::SimilarityArgs args, const Tensor& logit_scale,
                                 bool need_scale) {
  const Tensor scale = logit_scale_of(op, logit_scale, call.dtype());
  Tensor grad_scale = need_scale ? call.empty({}) : call.empty({0});
  args.logit_scale = scale.const_data_ptr();
  args.grad_scale = need_scale ? grad_scale.mutable_data_ptr() : nullptr;
  cpu::similarity(args, torch_parallel());
  return {call.loss(), call.grad_image(), call.grad_text(), grad_scale};
}

LossGradientsAndScale info_nce(Tensor image, Tensor text, std::optional<Tensor> image_ids,
                               std::optional<Tensor> text_ids, Tensor logit_scale, int64_t workspace_bytes,
                               bool need_image, bool need_text, bool need_scale) {
  Similarity call("info_nce", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  return with_scale("info_nce", call, call.args(cpu::SimilarityLoss::info_nce), logit_scale, need_scale);
}

LossGradientsAndScale sdm(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, Tensor logit_scale, double eps,
                          int64_t workspace_bytes, bool need_image, bool need_text, bool need_scale) {
  Similarity call("sdm", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  check_eps("sdm", eps);
  cpu::SimilarityArgs args = call.args(cpu::SimilarityLoss::sdm);
  args.eps = eps;
  return with_scale("sdm", call, args, logit_scale, need_scale);
}

LossAndGradients cmpm(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, bool l2_target, double eps,
                      int64_t workspace_bytes, bool need_image, bool need_text) {
  Similarity call("cmpm", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  check_eps("cmpm", eps);
  cpu::SimilarityArgs args = call.args(cpu::SimilarityLoss::cmpm);
  args.eps = eps;
  args.l2_target = l2_target;
  cpu::similarity(args, torch_parallel());
  return {call.loss(), call.grad_image(), call.grad_text()};
}

LossAndGradients tal(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, double margin, double tau,
                     int64_t workspace_bytes, bool need_image, bool need_text) {
  Similarity call("tal", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  check(margin - margin == 0, "tal", "`margin` must be finite, got ", margin);
  check_tau("tal", tau);
  cpu::SimilarityArgs args = call.args(cpu::SimilarityLoss::tal);
  args.margin = margin;
  args.tau = tau;
  cpu::similarity(args, torch_parallel());
  return {call.loss(), call.grad_image(), call.grad_text()};
}

cpu::SimilarityLoss loss_of(const char* op, int64_t loss) {
  check(loss >= 0 && loss <= 3, op, "`loss` must be 0 (InfoNCE), 1 (SDM), 2 (CMPM) or 3 (TAL), got ", loss);
  return static_cast<cpu::SimilarityLoss>(loss);
}

std::tuple<Tensor, Tensor> similarity_statistics(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids,
                                                 Tensor logit_scale, int64_t loss, double tau,
                                                 int64_t workspace_bytes) {
  constexpr const char* op = "similarity_statistics";
  Similarity call(op, image, text, image_ids, text_ids, workspace_bytes, false, false);
  check_tau(op, tau);
  cpu::SimilarityArgs args = call.args(loss_of(op, loss));
  args.tau = tau;
  const Tensor scale = logit_scale_of(op, logit_scale, call.dtype());
  const int64_t fields = cpu::similarity_statistics(args.kind);
  Tensor of_images = call.empty({fields, image.size(0)}), of_texts = call.empty({fields, text.size(0)});
  args.logit_scale = scale.const_data_ptr();
  args.image_statistics = of_images.mutable_data_ptr();
  args.text_statistics = of_texts.mutable_data_ptr();
  cpu::similarity(args, torch_parallel());
  return {of_images, of_texts};
}

Tensor coefficients_of(const char* op, const char* name, const Tensor& coefficients, int64_t rows, ScalarType dtype) {
  check_cpu(op, name, coefficients);
  check_dim(op, name, coefficients, 2);
  check_size(op, name, coefficients, 0, cpu::kSimilarityCoefficients);
  check_size(op, name, coefficients, 1, rows);
  check(coefficients.scalar_type() == dtype, op, "`", name, "` must have the dtype of the statistics");
  return torch::stable::contiguous(coefficients);
}

LossAndGradients similarity_gradients(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, Tensor logit_scale,
                                      Tensor image_coefficients, Tensor text_coefficients, int64_t loss, double tau,
                                      int64_t workspace_bytes, bool need_image, bool need_text, bool need_scale) {
  constexpr const char* op = "similarity_gradients";
  Similarity call(op, image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  check_tau(op, tau);
  cpu::SimilarityArgs args = call.args(loss_of(op, loss));
  args.tau = tau;
  const Tensor scale = logit_scale_of(op, logit_scale, call.dtype());
  const Tensor of_images = coefficients_of(op, "image_coefficients", image_coefficients, image.size(0), call.dtype());
  const Tensor of_texts = coefficients_of(op, "text_coefficients", text_coefficients, text.size(0), call.dtype());
  Tensor grad_scale = need_scale ? call.empty({}) : call.empty({0});
  args.logit_scale = scale.const_data_ptr();
  args.grad_scale = need_scale ? grad_scale.mutable_data_ptr() : nullptr;
  args.image_coefficients = of_images.const_data_ptr();
  args.text_coefficients = of_texts.const_data_ptr();
  cpu::similarity(args, torch_parallel());
  return {call.grad_image(), call.grad_text(), grad_scale};
}

}  // namespace

#endif

STABLE_TORCH_LIBRARY_FRAGMENT(lcr2s, m) {
  m.def(
      "info_nce(Tensor image, Tensor text, Tensor? image_ids, Tensor? text_ids, Tensor logit_scale, "
      "int workspace_bytes, bool need_image, bool need_text, bool need_scale) -> "
      "(Tensor loss, Tensor grad_image, Tensor grad_text, Tensor grad_scale)");
  m.def(
      "sdm(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, Tensor logit_scale, float eps, "
      "int workspace_bytes, bool need_image, bool need_text, bool need_scale) -> "
      "(Tensor loss, Tensor grad_image, Tensor grad_text, Tensor grad_scale)");
  m.def(
      "cmpm(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, bool l2_target, float eps, "
      "int workspace_bytes, bool need_image, bool need_text) -> (Tensor loss, Tensor grad_image, Tensor grad_text)");
  m.def(
      "tal(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, float margin, float tau, "
      "int workspace_bytes, bool need_image, bool need_text) -> (Tensor loss, Tensor grad_image, Tensor grad_text)");
  // The two passes over a block of a larger matrix. `loss`: 0 InfoNCE, 1 SDM, 2 CMPM, 3 TAL, which alone has tau.
  m.def(
      "similarity_statistics(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, Tensor logit_scale, "
      "int loss, float tau, int workspace_bytes) -> (Tensor of_images, Tensor of_texts)");
  m.def(
      "similarity_gradients(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, Tensor logit_scale, "
      "Tensor image_coefficients, Tensor text_coefficients, int loss, float tau, int workspace_bytes, "
      "bool need_image, bool need_text, bool need_scale) -> (Tensor grad_image, Tensor grad_text, Tensor grad_scale)");
}

#ifndef LCR2S_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(lcr2s, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("sdm", TORCH_BOX(&sdm));
  m.impl("cmpm", TORCH_BOX(&cmpm));
  m.impl("tal", TORCH_BOX(&tal));
  m.impl("similarity_statistics", TORCH_BOX(&similarity_statistics));
  m.impl("similarity_gradients", TORCH_BOX(&similarity_gradients));
}
#endif

}  // namespace lcr2s
