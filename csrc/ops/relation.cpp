#include "../cpu/relation.h"

#include <tuple>

#include "common.h"
#include "features.h"

namespace lcr2s {

// The emulated flavour runs the CUDA kernels on the CPU's tensors.
#ifndef LCR2S_EMULATE_CUDA

namespace {

constexpr const char* kFrobenius = "relation_frobenius";
constexpr const char* kKl = "relation_kl";

// The features of one call, its gradients and its memory.
class Relation {
 public:
  Relation(const char* op, const Tensor& student_image, const Tensor& student_text, const Tensor& teacher_image,
           const Tensor& teacher_text, int64_t workspace_bytes, bool need_image, bool need_text)
      : student_image_(op, "student_image", student_image),
        student_text_(op, "student_text", student_text),
        teacher_image_(op, "teacher_image", teacher_image),
        teacher_text_(op, "teacher_text", teacher_text),
        workspace_bytes_(workspace_bytes),
        wide_(student_image_.wide() || student_text_.wide() || teacher_image_.wide() || teacher_text_.wide()) {
    check_size(op, "student_text", student_text, 1, student_image.size(1));
    check_size(op, "teacher_text", teacher_text, 1, teacher_image.size(1));
    check_size(op, "teacher_image", teacher_image, 0, student_image.size(0));
    check_size(op, "teacher_text", teacher_text, 0, student_text.size(0));
    check(workspace_bytes >= 0, op, "`workspace_bytes` must not be negative, got ", workspace_bytes);
    loss_ = empty({});
    grad_image_ = need_image ? empty({student_image.size(0), student_image.size(1)}) : empty({0});
    grad_text_ = need_text ? empty({student_text.size(0), student_text.size(1)}) : empty({0});
    need_image_ = need_image;
    need_text_ = need_text;
  }

  ScalarType dtype() const { return wide_ ? ScalarType::Double : ScalarType::Float; }
  Tensor empty(std::vector<int64_t> sizes) const { return torch::stable::empty(sizes, dtype()); }

  cpu::RelationArgs args() {
    return {student_image_.view(),
            student_text_.view(),
            teacher_image_.view(),
            teacher_text_.view(),
            wide_,
            workspace_bytes_,
            workspace_.memory(),
            loss_.mutable_data_ptr(),
            need_image_ ? grad_image_.mutable_data_ptr() : nullptr,
            need_text_ ? grad_text_.mutable_data_ptr() : nullptr};
  }

  const Tensor& loss() const { return loss_; }
  const Tensor& grad_image() const { return grad_image_; }
  const Tensor& grad_text() const { return grad_text_; }

 private:
  FeatureRows student_image_;
  FeatureRows student_text_;
  FeatureRows teacher_image_;
  FeatureRows teacher_text_;
  int64_t workspace_bytes_;
  bool wide_;
  bool need_image_;
  bool need_text_;
  Workspace workspace_;
  Tensor loss_;
  Tensor grad_image_;
  Tensor grad_text_;
};

enum Reduction : int64_t { kSum, kRow, kMean };

std::tuple<Tensor, Tensor, Tensor> relation_frobenius(Tensor student_image, Tensor student_text, Tensor teacher_image,
                                                      Tensor teacher_text, int64_t reduction, int64_t workspace_bytes,
                                                      bool need_image, bool need_text) {
  Relation relation(kFrobenius, student_image, student_text, teacher_image, teacher_text, workspace_bytes, need_image,
                    need_text);
  check(reduction >= kSum && reduction <= kMean, kFrobenius, "`reduction` must be 0 (sum), 1 (row) or 2 (mean), got ",
        reduction);
  double factor = 1;
  if (reduction != kSum) factor /= static_cast<double>(student_image.size(0));
  if (reduction == kMean) factor /= static_cast<double>(student_text.size(0));
  cpu::relation_frobenius({relation.args(), factor}, torch_parallel());
  return {relation.loss(), relation.grad_image(), relation.grad_text()};
}

Tensor check_scale(const char* name, const Tensor& scale, ScalarType dtype) {
  check_cpu(kKl, name, scale);
  check_dim(kKl, name, scale, 0);
  check_floating(kKl, name, scale);
  return torch::stable::to(scale, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation_kl(Tensor student_image, Tensor student_text, Tensor teacher_image,
                                                       Tensor teacher_text, Tensor student_scale, Tensor teacher_scale,
                                                       int64_t workspace_bytes, bool need_image, bool need_text,
                                                       bool need_scale) {
  Relation relation(kKl, student_image, student_text, teacher_image, teacher_text, workspace_bytes, need_image,
                    need_text);
  const Tensor student = check_scale("student_scale", student_scale, relation.dtype());
  const Tensor teacher = check_scale("teacher_scale", teacher_scale, relation.dtype());
  Tensor grad_scale = need_scale ? relation.empty({}) : relation.empty({0});
  cpu::relation_kl({relation.args(), student.const_data_ptr(), teacher.const_data_ptr(),
                    need_scale ? grad_scale.mutable_data_ptr() : nullptr},
                   torch_parallel());
  return {relation.loss(), relation.grad_image(), relation.grad_text(), grad_scale};
}

}  // namespace

#endif

STABLE_TORCH_LIBRARY_FRAGMENT(lcr2s, m) {
  m.def(
      "relation_frobenius(Tensor student_image, Tensor student_text, Tensor teacher_image, Tensor teacher_text, "
      "int reduction, int workspace_bytes, bool need_image, bool need_text) -> (Tensor, Tensor, Tensor)");
  m.def(
      "relation_kl(Tensor student_image, Tensor student_text, Tensor teacher_image, Tensor teacher_text, "
      "Tensor student_scale, Tensor teacher_scale, int workspace_bytes, bool need_image, bool need_text, "
      "bool need_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

#ifndef LCR2S_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(lcr2s, CPU, m) {
  m.impl("relation_frobenius", TORCH_BOX(&relation_frobenius));
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
}
#endif

}  // namespace lcr2s
