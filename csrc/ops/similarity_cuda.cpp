#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../cuda/similarity.h"
#include "cuda_features.h"
#include "cuda_gemm.h"

namespace lcr2s {

namespace {

using LossAndGradients = std::tuple<Tensor, Tensor, Tensor>;
using LossGradientsAndScale = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// One call: checked arguments, results and memory.
class Similarity {
 public:
  Similarity(const char* op, const Tensor& image, const Tensor& text, const std::optional<Tensor>& image_ids,
             const std::optional<Tensor>& text_ids, int64_t workspace_bytes, bool need_image, bool need_text)
      : op_(op), image_(op, "image", image), text_(op, "text", text), scope_(op, image) {
    check_same_device(op, "text", text, "image", image);
    check_size(op, "text", text, 1, image.size(1));
    check(workspace_bytes >= 0, op, "`workspace_bytes` must not be negative, got ", workspace_bytes);
    check(image_ids.has_value() == text_ids.has_value(), op, "`image_ids` and `text_ids` must be given together");
    const bool wide = image_.wide() || text_.wide();
    arithmetic_ = wide ? ScalarType::Double : ScalarType::Float;
    // Half features are multiplied as such; of mixtures the type that holds them all.
    element_ = image.scalar_type() == text.scalar_type() ? image.scalar_type() : arithmetic_;
    args_.element = dtype_of(element_);
    args_.image.features = image_.view();
    args_.text.features = text_.view();
    if (image_ids.has_value()) {
      image_ids_ = take_ids("image_ids", *image_ids, image, args_.image);
      text_ids_ = take_ids("text_ids", *text_ids, text, args_.text);
    } else {
      check_size(op, "text", text, 0, image.size(0));
    }
    loss_ = empty({}, arithmetic_);
    grad_image_ = need_image ? empty({image.size(0), image.size(1)}, arithmetic_) : empty({0}, arithmetic_);
    grad_text_ = need_text ? empty({text.size(0), text.size(1)}, arithmetic_) : empty({0}, arithmetic_);
    args_.loss = loss_.mutable_data_ptr();
    args_.image.gradient = need_image ? grad_image_.mutable_data_ptr() : nullptr;
    args_.text.gradient = need_text ? grad_text_.mutable_data_ptr() : nullptr;
    workspace_bytes_ = workspace_bytes;
  }

  // After the checks: `with_scale` or `without_scale`, once.
  LossGradientsAndScale with_scale(cuda::SimilarityLoss kind, const Tensor& logit_scale, bool need_scale) {
    check_same_device(op_, "logit_scale", logit_scale, "image", image_.tensor());
    check_dim(op_, "logit_scale", logit_scale, 0);
    check_floating(op_, "logit_scale", logit_scale);
    const Tensor scale =
        logit_scale.scalar_type() == arithmetic_ ? logit_scale : torch::stable::to(logit_scale, arithmetic_);
    Tensor grad_scale = need_scale ? empty({}, arithmetic_) : empty({0}, arithmetic_);
    args_.logit_scale = scale.const_data_ptr();
    args_.grad_scale = need_scale ? grad_scale.mutable_data_ptr() : nullptr;
    run(kind);
    return {loss_, grad_image_, grad_text_, grad_scale};
  }
  LossAndGradients without_scale(cuda::SimilarityLoss kind) {
    run(kind);
    return {loss_, grad_image_, grad_text_};
  }

  cuda::SimilarityArgs& args() { return args_; }

 private:
  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const {
    return empty_on_device(image_.tensor(), std::move(sizes), dtype);
  }
  int64_t bytes_of(ScalarType dtype) const {
    return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  }
  void launched(const char* error) const { check(error == nullptr, op_, "CUDA: ", error ? error : ""); }

  Tensor take_ids(const char* name, const Tensor& ids, const Tensor& features, cuda::SimilaritySide& side) {
    check_same_device(op_, name, ids, "image", image_.tensor());
    check_dim(op_, name, ids, 1);
    check_size(op_, name, ids, 0, features.size(0));
    side.wide_ids = ids.scalar_type() == ScalarType::Long;
    check(side.wide_ids || ids.scalar_type() == ScalarType::Int, op_, "`", name, "` must be int32 or int64");
    const Tensor dense = ids.is_contiguous() ? ids : torch::stable::contiguous(ids);
    side.ids = dense.const_data_ptr();
    return dense;
  }

  void run(cuda::SimilarityLoss kind) {
    const int64_t rows = args_.image.features.rows, columns = args_.text.features.rows,
                  width = args_.image.features.width;
    const bool need_image = args_.image.gradient != nullptr, need_text = args_.text.gradient != nullptr;
    args_.kind = kind;
    cuda::SimilarityShape shape{
        rows, columns, width, bytes_of(element_), bytes_of(arithmetic_), workspace_bytes_, need_image, need_text, 0};
    // Asked for only where it decides.
    if (cuda::may_cooperate(shape)) shape.cooperative_blocks = cuda::similarity_cooperative_blocks(args_.element);
    const cuda::SimilarityPlan& plan = args_.plan = cuda::plan_similarity(shape);
    Tensor workspace = empty({plan.bytes}, ScalarType::Byte);
    args_.workspace = static_cast<char*>(workspace.mutable_data_ptr());
    if (plan.path == cuda::SimilarityPath::cooperative || !plan.gradient)
      return launched(cuda::similarity(args_, scope_.stream()));

    Tensor kept, block, image_operand, text_operand, part;
    if (plan.path == cuda::SimilarityPath::kept) {
      kept = empty({rows, plan.kept_stride}, arithmetic_);
      args_.kept = kept.mutable_data_ptr();
    }
    block = plan.path == cuda::SimilarityPath::kept && element_ == arithmetic_
                ? kept
                : empty({std::min(plan.block_rows, rows), plan.block_columns}, element_);
    args_.block = block.mutable_data_ptr();
    const auto operand = [&](bool needed, cuda::SimilaritySide& side) {
      // Rows of whole packs of 16 bytes, which the library's products want.
      const int64_t pack = 16 / bytes_of(element_);
      side.operand_stride = (width + pack - 1) / pack * pack;
      Tensor result = empty({needed ? side.features.rows : 0, side.operand_stride}, element_);
      side.operand = needed ? result.mutable_data_ptr() : nullptr;
      return part_of(result, 1, 0, width);
    };
    image_operand = operand(need_text, args_.image);
    text_operand = operand(need_image, args_.text);
    if (plan.block_rows < rows || plan.block_columns < columns)
      part =
          empty({std::min(std::max(plan.block_rows, plan.block_columns), std::max(rows, columns)), width}, arithmetic_);

    launched(cuda::similarity(args_, scope_.stream()));
    // sum[begin, begin + count) = or += a b
    const auto multiply = [&](const Tensor& sum, int64_t begin, int64_t count, bool add, const Tensor& a,
                              const Tensor& b) {
      Tensor rows_of_sum = part_of(sum, 0, begin, count);
      if (!add) return multiply_into(rows_of_sum, a, b);
      Tensor rows_of_part = part_of(part, 0, 0, count);
      multiply_into(rows_of_part, a, b);
      launched(cuda::similarity_add(arithmetic_ == ScalarType::Double, rows_of_sum.mutable_data_ptr(),
                                    rows_of_part.const_data_ptr(), count * width, scope_.stream()));
    };
    for (int64_t j = 0; j < columns; j += plan.block_columns) {
      const int64_t n = std::min(plan.block_columns, columns - j);
      for (int64_t i = 0; i < rows; i += plan.block_rows) {
        const int64_t m = std::min(plan.block_rows, rows - i);
        launched(cuda::similarity_block(args_, i, j, scope_.stream()));
        const Tensor gradient = part_of(part_of(block, 0, 0, m), 1, 0, n);
        if (need_image) multiply(grad_image_, i, m, j > 0, gradient, part_of(text_operand, 0, j, n));
        if (need_text) multiply(grad_text_, j, n, i > 0, transposed(gradient), part_of(image_operand, 0, i, m));
      }
    }
    launched(cuda::similarity_finish(args_, scope_.stream()));
  }

  const char* op_;
  CudaFeatureRows image_;
  CudaFeatureRows text_;
  CudaScope scope_;
  cuda::SimilarityArgs args_{};
  ScalarType arithmetic_;
  ScalarType element_;
  int64_t workspace_bytes_;
  Tensor image_ids_;
  Tensor text_ids_;
  Tensor loss_;
  Tensor grad_image_;
  Tensor grad_text_;
};

bool positive_and_finite(double x) { return x > 0 && x < std::numeric_limits<double>::infinity(); }

void set_eps(const char* op, Similarity& call, double eps) {
  check(positive_and_finite(eps), op, "`eps` must be a finite number above 0, got ", eps);
  call.args().eps = eps;
}

LossGradientsAndScale info_nce(Tensor image, Tensor text, std::optional<Tensor> image_ids,
                               std::optional<Tensor> text_ids, Tensor logit_scale, int64_t workspace_bytes,
                               bool need_image, bool need_text, bool need_scale) {
  Similarity call("info_nce", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  return call.with_scale(cuda::SimilarityLoss::info_nce, logit_scale, need_scale);
}

LossGradientsAndScale sdm(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, Tensor logit_scale, double eps,
                          int64_t workspace_bytes, bool need_image, bool need_text, bool need_scale) {
  Similarity call("sdm", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  set_eps("sdm", call, eps);
  return call.with_scale(cuda::SimilarityLoss::sdm, logit_scale, need_scale);
}

LossAndGradients cmpm(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, bool l2_target, double eps,
                      int64_t workspace_bytes, bool need_image, bool need_text) {
  Similarity call("cmpm", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  set_eps("cmpm", call, eps);
  call.args().l2_target = l2_target;
  return call.without_scale(cuda::SimilarityLoss::cmpm);
}

LossAndGradients tal(Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, double margin, double tau,
                     int64_t workspace_bytes, bool need_image, bool need_text) {
  Similarity call("tal", image, text, image_ids, text_ids, workspace_bytes, need_image, need_text);
  check(margin - margin == 0, "tal", "`margin` must be finite, got ", margin);
  check(positive_and_finite(tau), "tal", "`tau` must be a finite number above 0, got ", tau);
  call.args().margin = margin;
  call.args().tau = tau;
  return call.without_scale(cuda::SimilarityLoss::tal);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, LCR2S_CUDA_KEY, m) {
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("sdm", TORCH_BOX(&sdm));
  m.impl("cmpm", TORCH_BOX(&cmpm));
  m.impl("tal", TORCH_BOX(&tal));
}

}  // namespace lcr2s
