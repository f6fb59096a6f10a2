#include "../cuda/relation.h"

#include <tuple>

#include "../cuda/relation_plan.h"
#include "cuda_features.h"
#include "cuda_gemm.h"

namespace lcr2s {

namespace {

constexpr const char* kFrobenius = "relation_frobenius";

void check_launch(const char* op, const char* error) { check(error == nullptr, op, "CUDA: ", error ? error : ""); }

bool half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// The features of one call, its gradients and its memory.
class Relation {
 public:
  Relation(const char* op, const Tensor& student_image, const Tensor& student_text, const Tensor& teacher_image,
           const Tensor& teacher_text, int64_t workspace_bytes, bool need_image, bool need_text, bool float16_operands)
      : op_(op),
        student_image_(op, "student_image", student_image),
        student_text_(op, "student_text", student_text),
        teacher_image_(op, "teacher_image", teacher_image),
        teacher_text_(op, "teacher_text", teacher_text),
        scope_(op, student_image),
        workspace_bytes_(workspace_bytes),
        need_image_(need_image),
        need_text_(need_text) {
    for (const auto& [name, tensor] :
         {std::pair{"student_text", &student_text}, std::pair{"teacher_image", &teacher_image},
          std::pair{"teacher_text", &teacher_text}})
      check_same_device(op, name, *tensor, "student_image", student_image);
    check_size(op, "student_text", student_text, 1, student_image.size(1));
    check_size(op, "teacher_text", teacher_text, 1, teacher_image.size(1));
    check_size(op, "teacher_image", teacher_image, 0, student_image.size(0));
    check_size(op, "teacher_text", teacher_text, 0, student_text.size(0));
    check(workspace_bytes >= 0, op, "`workspace_bytes` must not be negative, got ", workspace_bytes);
    bool wide = false;
    bool same = half(student_image.scalar_type());
    for (const Tensor* tensor : {&student_image, &student_text, &teacher_image, &teacher_text}) {
      wide |= tensor->scalar_type() == ScalarType::Double;
      same &= tensor->scalar_type() == student_image.scalar_type();
    }
    // Features of one half type are operands as they are, mixtures in the type that holds them all.
    same &= float16_operands || student_image.scalar_type() != ScalarType::Half;
    arithmetic_ = wide ? ScalarType::Double : ScalarType::Float;
    element_ = same ? student_image.scalar_type() : arithmetic_;
    loss_ = empty({}, arithmetic_);
    grad_image_ =
        need_image ? empty({student_image.size(0), student_image.size(1)}, arithmetic_) : empty({0}, arithmetic_);
    grad_text_ = need_text ? empty({student_text.size(0), student_text.size(1)}, arithmetic_) : empty({0}, arithmetic_);
  }

  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const {
    return empty_on_device(student_image_.tensor(), std::move(sizes), dtype);
  }
  void launched(const char* error) const { check_launch(op_, error); }

  cuda::RelationShape shape() const {
    const cuda::Features image = student_image_.view();
    return {image.rows,
            student_text_.view().rows,
            image.width,
            teacher_image_.view().width,
            half(element_) ? 2 : arithmetic_bytes(),
            arithmetic_bytes(),
            workspace_bytes_,
            need_image_,
            need_text_};
  }

  bool wide() const { return arithmetic_ == ScalarType::Double; }
  int64_t arithmetic_bytes() const { return wide() ? 8 : 4; }
  ScalarType arithmetic() const { return arithmetic_; }
  ScalarType element() const { return element_; }
  DType element_dtype() const { return dtype_of(element_); }
  void* stream() const { return scope_.stream(); }
  const FeatureRows& student_image() const { return student_image_; }
  const FeatureRows& student_text() const { return student_text_; }
  const FeatureRows& teacher_image() const { return teacher_image_; }
  const FeatureRows& teacher_text() const { return teacher_text_; }
  bool need_image() const { return need_image_; }
  bool need_text() const { return need_text_; }
  Tensor& loss() { return loss_; }
  Tensor& grad_image() { return grad_image_; }
  Tensor& grad_text() { return grad_text_; }

 private:
  const char* op_;
  CudaFeatureRows student_image_;
  CudaFeatureRows student_text_;
  CudaFeatureRows teacher_image_;
  CudaFeatureRows teacher_text_;
  CudaScope scope_;
  int64_t workspace_bytes_;
  bool need_image_;
  bool need_text_;
  ScalarType arithmetic_;
  ScalarType element_;
  Tensor loss_;
  Tensor grad_image_;
  Tensor grad_text_;
};

enum Reduction : int64_t { kSum, kRow, kMean };

class Frobenius {
 public:
  Frobenius(Relation& relation, double factor)
      : relation_(relation),
        plan_(cuda::plan_frobenius(relation.shape())),
        factor_(factor),
        rows_(relation.shape().rows),
        columns_(relation.shape().columns) {
    image_ = relation_.empty({rows_, plan_.width()}, relation_.element());
    // The direct form multiplies by all rows of the texts' operand: those beyond the texts are zeros.
    text_ = relation_.empty({plan_.text_rows, plan_.width()}, relation_.element());
    unit_ = relation_.empty({plan_.gram ? 0 : rows_, plan_.student_columns}, relation_.element());
    relation_.launched(
        cuda::relation_operands({relation_.element_dtype(),
                                 {{relation_.student_image().view(), relation_.teacher_image().view(),
                                   image_.mutable_data_ptr(), plan_.gram ? nullptr : unit_.mutable_data_ptr(), rows_},
                                  {relation_.student_text().view(), relation_.teacher_text().view(),
                                   text_.mutable_data_ptr(), nullptr, plan_.text_rows}},
                                 plan_.student_columns,
                                 plan_.teacher_columns,
                                 difference()},
                                relation_.stream()));
  }

  void run() {
    if (plan_.gram) {
      gram();
    } else {
      direct();
    }
  }

 private:
  bool difference() const { return relation_.shape().student_width == relation_.shape().teacher_width; }
  static double* doubles(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }
  Tensor empty(int64_t rows, int64_t columns) const { return relation_.empty({rows, columns}, relation_.arithmetic()); }

  void total(Tensor& partials, double factor) {
    relation_.launched(cuda::relation_total(
        {relation_.wide(), doubles(partials), partials.size(0), factor, relation_.loss().mutable_data_ptr()},
        relation_.stream()));
  }

  // |U R'|^2 = <U'U, R'R>; dV = 2 U (R'R)[:, student], dT = 2 R (U'V) with V = U[:, student] (+ U[:, teacher] where U
  // holds the difference).
  void gram() {
    const int64_t width = plan_.width();
    Tensor image_gram = empty(width, width);
    Tensor text_gram = empty(width, width);
    Tensor text = part_of(text_, 0, 0, columns_);
    multiply_into(image_gram, transposed(image_), image_);
    multiply_into(text_gram, transposed(text), text);
    Tensor partials = relation_.empty({cuda::relation_dot_blocks(width * width)}, ScalarType::Double);
    relation_.launched(cuda::relation_dot({relation_.element_dtype(), image_gram.const_data_ptr(),
                                           text_gram.const_data_ptr(), width * width, nullptr, doubles(partials)},
                                          relation_.stream()));
    total(partials, factor_);

    Tensor image_product, text_product;
    const auto product = [&](const Tensor& gram, const Tensor& operand, bool fold) {
      Tensor coefficients = relation_.empty({width, plan_.student_columns}, relation_.element());
      relation_.launched(cuda::relation_coefficients({relation_.element_dtype(), gram.const_data_ptr(), width,
                                                      plan_.student_columns, fold, coefficients.mutable_data_ptr()},
                                                     relation_.stream()));
      Tensor result = empty(operand.size(0), plan_.student_columns);
      multiply_into(result, operand, coefficients);
      return result;
    };
    cuda::RelationProjectArgs project = projection(2 * factor_);
    if (relation_.need_image()) {
      image_product = product(text_gram, image_, false);
      project.sides[0].product = image_product.const_data_ptr();
    }
    if (relation_.need_text()) {
      text_product = product(image_gram, text, difference());
      project.sides[1].product = text_product.const_data_ptr();
    }
    relation_.launched(cuda::relation_project(project, relation_.stream()));
  }

  // The relations themselves, a slab of rows at a time: cheaper than Gram matrices where rows are few.
  void direct() {
    const int64_t slab = plan_.slab;
    const int64_t across = plan_.text_rows;
    const bool copied = half(relation_.element());
    Tensor differences = empty(slab, across);
    Tensor copies = relation_.empty({copied ? slab : 0, across}, relation_.element());
    Tensor image_product = empty(relation_.need_image() ? rows_ : 0, plan_.student_columns);
    Tensor text_product = empty(relation_.need_text() ? across : 0, plan_.student_columns);
    Tensor text_part = empty(relation_.need_text() && slab < rows_ ? across : 0, plan_.student_columns);
    Tensor text_unit = part_of(text_, 1, 0, plan_.student_columns);
    int64_t blocks = 0;
    for (int64_t begin = 0; begin < rows_; begin += slab)
      blocks += cuda::relation_dot_blocks(std::min(slab, rows_ - begin) * across);
    Tensor partials = relation_.empty({blocks}, ScalarType::Double);
    int64_t block = 0;
    for (int64_t begin = 0; begin < rows_; begin += slab) {
      const int64_t count = std::min(slab, rows_ - begin);
      Tensor difference = part_of(differences, 0, 0, count);
      multiply_into(difference, part_of(image_, 0, begin, count), transposed(text_));
      relation_.launched(
          cuda::relation_dot({relation_.element_dtype(), difference.const_data_ptr(), difference.const_data_ptr(),
                              count * across, copied ? copies.mutable_data_ptr() : nullptr, doubles(partials) + block},
                             relation_.stream()));
      block += cuda::relation_dot_blocks(count * across);
      const Tensor operand = copied ? part_of(copies, 0, 0, count) : difference;
      if (relation_.need_image()) multiply_into(part_of(image_product, 0, begin, count), operand, text_unit);
      if (relation_.need_text()) {
        Tensor& out = begin == 0 ? text_product : text_part;
        multiply_into(out, transposed(operand), part_of(unit_, 0, begin, count));
        if (begin > 0)
          relation_.launched(cuda::relation_accumulate({relation_.wide(), text_product.mutable_data_ptr(),
                                                        text_part.const_data_ptr(), across * plan_.student_columns},
                                                       relation_.stream()));
      }
    }
    total(partials, factor_);
    cuda::RelationProjectArgs project = projection(2 * factor_);
    if (relation_.need_image()) project.sides[0].product = image_product.const_data_ptr();
    if (relation_.need_text()) project.sides[1].product = text_product.const_data_ptr();
    relation_.launched(cuda::relation_project(project, relation_.stream()));
  }

  cuda::RelationProjectArgs projection(double factor) {
    return {
        relation_.wide(),
        {{relation_.student_image().view(), nullptr, plan_.student_columns, relation_.grad_image().mutable_data_ptr()},
         {relation_.student_text().view(), nullptr, plan_.student_columns, relation_.grad_text().mutable_data_ptr()}},
        factor,
        nullptr};
  }

  Relation& relation_;
  cuda::FrobeniusPlan plan_;
  double factor_;
  int64_t rows_;
  int64_t columns_;
  Tensor image_;
  Tensor text_;
  Tensor unit_;
};

std::tuple<Tensor, Tensor, Tensor> relation_frobenius(Tensor student_image, Tensor student_text, Tensor teacher_image,
                                                      Tensor teacher_text, int64_t reduction, int64_t workspace_bytes,
                                                      bool need_image, bool need_text) {
  // Unit rows and differences rounded to float16 would cost the digits that make float16 worth choosing.
  Relation relation(kFrobenius, student_image, student_text, teacher_image, teacher_text, workspace_bytes, need_image,
                    need_text, false);
  check(reduction >= kSum && reduction <= kMean, kFrobenius, "`reduction` must be 0 (sum), 1 (row) or 2 (mean), got ",
        reduction);
  double factor = 1;
  if (reduction != kSum) factor /= static_cast<double>(student_image.size(0));
  if (reduction == kMean) factor /= static_cast<double>(student_text.size(0));
  Frobenius(relation, factor).run();
  return {relation.loss(), relation.grad_image(), relation.grad_text()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, LCR2S_CUDA_KEY, m) { m.impl("relation_frobenius", TORCH_BOX(&relation_frobenius)); }

}  // namespace lcr2s
