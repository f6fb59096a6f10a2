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
  Tensor empty(std::vector<int64_t> sizes) const { return prefer_huge_pages(torch::stable::empty(sizes, dtype())); }

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

Tensor check_scale(const char* op, const char* name, const Tensor& scale, ScalarType dtype) {
  check_cpu(op, name, scale);
  check_dim(op, name, scale, 0);
  check_floating(op, name, scale);
  return torch::stable::to(scale, dtype);
}

cpu::RelationKlArgs kl_args(Relation& relation, const Tensor& student_scale, const Tensor& teacher_scale) {
  cpu::RelationKlArgs args{};
  args.relation = relation.args();
  args.student_scale = student_scale.const_data_ptr();
  args.teacher_scale = teacher_scale.const_data_ptr();
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation_kl(Tensor student_image, Tensor student_text, Tensor teacher_image,
                                                       Tensor teacher_text, Tensor student_scale, Tensor teacher_scale,
                                                       int64_t workspace_bytes, bool need_image, bool need_text,
                                                       bool need_scale) {
  Relation relation(kKl, student_image, student_text, teacher_image, teacher_text, workspace_bytes, need_image,
                    need_text);
  const Tensor student = check_scale(kKl, "student_scale", student_scale, relation.dtype());
  const Tensor teacher = check_scale(kKl, "teacher_scale", teacher_scale, relation.dtype());
  Tensor grad_scale = need_scale ? relation.empty({}) : relation.empty({0});
  cpu::RelationKlArgs args = kl_args(relation, student, teacher);
  args.grad_scale = need_scale ? grad_scale.mutable_data_ptr() : nullptr;
  args.row_weight = 1.0 / static_cast<double>(student_image.size(0));
  args.column_weight = 1.0 / static_cast<double>(student_text.size(0));
  cpu::relation_kl(args, torch_parallel());
  return {relation.loss(), relation.grad_image(), relation.grad_text(), grad_scale};
}

std::tuple<Tensor, Tensor> relation_kl_statistics(Tensor student_image, Tensor student_text, Tensor teacher_image,
                                                  Tensor teacher_text, Tensor student_scale, Tensor teacher_scale,
                                                  int64_t workspace_bytes) {
  constexpr const char* op = "relation_kl_statistics";
  Relation relation(op, student_image, student_text, teacher_image, teacher_text, workspace_bytes, false, false);
  const Tensor student = check_scale(op, "student_scale", student_scale, relation.dtype());
  const Tensor teacher = check_scale(op, "teacher_scale", teacher_scale, relation.dtype());
  Tensor of_rows = relation.empty({cpu::kRelationKlStatistics, student_image.size(0)});
  Tensor of_columns = relation.empty({cpu::kRelationKlStatistics, student_text.size(0)});
  cpu::RelationKlArgs args = kl_args(relation, student, teacher);
  args.row_statistics = of_rows.mutable_data_ptr();
  args.column_statistics = of_columns.mutable_data_ptr();
  cpu::relation_kl(args, torch_parallel());
  return {of_rows, of_columns};
}

Tensor check_statistics(const char* op, const char* name, const Tensor& statistics, int64_t rows, ScalarType dtype) {
  check_cpu(op, name, statistics);
  check_dim(op, name, statistics, 2);
  check_size(op, name, statistics, 0, cpu::kRelationKlStatistics);
  check_size(op, name, statistics, 1, rows);
  check(statistics.scalar_type() == dtype, op, "`", name, "` must have the dtype of the loss");
  return torch::stable::contiguous(statistics);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation_kl_gradients(
    Tensor student_image, Tensor student_text, Tensor teacher_image, Tensor teacher_text, Tensor student_scale,
    Tensor teacher_scale, Tensor row_statistics, Tensor column_statistics, double row_weight, double column_weight,
    int64_t workspace_bytes, bool need_image, bool need_text, bool need_scale) {
  constexpr const char* op = "relation_kl_gradients";
  Relation relation(op, student_image, student_text, teacher_image, teacher_text, workspace_bytes, need_image,
                    need_text);
  const Tensor student = check_scale(op, "student_scale", student_scale, relation.dtype());
  const Tensor teacher = check_scale(op, "teacher_scale", teacher_scale, relation.dtype());
  const Tensor of_rows =
      check_statistics(op, "row_statistics", row_statistics, student_image.size(0), relation.dtype());
  const Tensor of_columns =
      check_statistics(op, "column_statistics", column_statistics, student_text.size(0), relation.dtype());
  Tensor grad_scale = need_scale ? relation.empty({}) : relation.empty({0});
  cpu::RelationKlArgs args = kl_args(relation, student, teacher);
  args.grad_scale = need_scale ? grad_scale.mutable_data_ptr() : nullptr;
  args.row_weight = row_weight;
  args.column_weight = column_weight;
  args.whole_row_statistics = of_rows.const_data_ptr();
  args.whole_column_statistics = of_columns.const_data_ptr();
  cpu::relation_kl(args, torch_parallel());
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
  // The two passes over a block of a larger matrix; the weights are 1 / rows and 1 / columns of that.
  m.def(
      "relation_kl_statistics(Tensor student_image, Tensor student_text, Tensor teacher_image, Tensor teacher_text, "
      "Tensor student_scale, Tensor teacher_scale, int workspace_bytes) -> (Tensor of_rows, Tensor of_columns)");
  m.def(
      "relation_kl_gradients(Tensor student_image, Tensor student_text, Tensor teacher_image, Tensor teacher_text, "
      "Tensor student_scale, Tensor teacher_scale, Tensor row_statistics, Tensor column_statistics, "
      "float row_weight, float column_weight, int workspace_bytes, bool need_image, bool need_text, "
      "bool need_scale) -> (Tensor loss, Tensor grad_image, Tensor grad_text, Tensor grad_scale)");
}

#ifndef LCR2S_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(lcr2s, CPU, m) {
  m.impl("relation_frobenius", TORCH_BOX(&relation_frobenius));
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
  m.impl("relation_kl_statistics", TORCH_BOX(&relation_kl_statistics));
  m.impl("relation_kl_gradients", TORCH_BOX(&relation_kl_gradients));
}
#endif

}  // namespace lcr2s
