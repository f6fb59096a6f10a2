#include "../cuda/relation.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../cuda/relation_plan.h"
#include "../cuda/scaled_rows.h"
#include "cuda_features.h"
#include "cuda_gemm.h"

namespace lcr2s {

namespace {

constexpr const char* kFrobenius = "relation_frobenius";
constexpr const char* kKl = "relation_kl";

void check_launch(const char* op, const char* error) { check(error == nullptr, op, "CUDA: ", error ? error : ""); }

bool half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// The features of one call, its gradients and its memory.
class Relation {
 public:
  Relation(const char* op, const Tensor& student_image, const Tensor& student_text, const Tensor& teacher_image,
           const Tensor& teacher_text, int64_t workspace_bytes, bool need_image, bool need_text, bool half_operands)
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
    // Features of one half type may be operands as they are, mixtures in the type that holds them all.
    bool same = half_operands && half(student_image.scalar_type());
    for (const Tensor* tensor : {&student_image, &student_text, &teacher_image, &teacher_text}) {
      wide |= tensor->scalar_type() == ScalarType::Double;
      same &= tensor->scalar_type() == student_image.scalar_type();
    }
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
  const CudaFeatureRows& student_image() const { return student_image_; }
  const CudaFeatureRows& student_text() const { return student_text_; }
  const CudaFeatureRows& teacher_image() const { return teacher_image_; }
  const CudaFeatureRows& teacher_text() const { return teacher_text_; }
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
        cuda::relation_operands({relation_.wide(),
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
    relation_.launched(cuda::relation_dot(
        {relation_.wide(), image_gram.const_data_ptr(), text_gram.const_data_ptr(), width * width, doubles(partials)},
        relation_.stream()));
    total(partials, factor_);

    cuda::RelationProjectArgs project = projection(2 * factor_);
    const int64_t columns = plan_.student_columns;
    Tensor image_product = empty(relation_.need_image() ? rows_ : 0, columns);
    Tensor text_product = empty(relation_.need_text() ? columns_ : 0, columns);
    Tensor folded = empty(relation_.need_text() && difference() ? width : 0, columns);
    if (relation_.need_image()) {
      multiply_into(image_product, image_, part_of(text_gram, 1, 0, columns));
      project.sides[0].product = image_product.const_data_ptr();
    }
    if (relation_.need_text()) {
      if (difference())
        relation_.launched(cuda::relation_fold(
            {relation_.wide(), image_gram.const_data_ptr(), width, columns, folded.mutable_data_ptr()},
            relation_.stream()));
      multiply_into(text_product, text, difference() ? folded : part_of(image_gram, 1, 0, columns));
      project.sides[1].product = text_product.const_data_ptr();
    }
    relation_.launched(cuda::relation_project(project, relation_.stream()));
  }

  // The relations themselves, a slab of rows at a time: cheaper than Gram matrices where rows are few.
  void direct() {
    const int64_t slab = plan_.slab;
    const int64_t across = plan_.text_rows;
    Tensor differences = empty(slab, across);
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
      relation_.launched(cuda::relation_dot({relation_.wide(), difference.const_data_ptr(), difference.const_data_ptr(),
                                             count * across, doubles(partials) + block},
                                            relation_.stream()));
      block += cuda::relation_dot_blocks(count * across);
      if (relation_.need_image()) multiply_into(part_of(image_product, 0, begin, count), difference, text_unit);
      if (relation_.need_text()) {
        Tensor& out = begin == 0 ? text_product : text_part;
        multiply_into(out, transposed(difference), part_of(unit_, 0, begin, count));
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
    const auto side = [&](const CudaFeatureRows& rows, Tensor& grad) {
      return cuda::RelationProjectSide{rows.view(), nullptr, plan_.student_columns, grad.mutable_data_ptr()};
    };
    return {relation_.wide(),
            false,
            {side(relation_.student_image(), relation_.grad_image()),
             side(relation_.student_text(), relation_.grad_text())},
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

class KullbackLeibler {
 public:
  KullbackLeibler(Relation& relation, const Tensor& student_scale, const Tensor& teacher_scale, void* grad_scale)
      : relation_(relation),
        shape_(relation.shape()),
        plan_(cuda::plan_kl(shape_)),
        grad_scale_(grad_scale),
        workspace_(relation.empty({plan_.bytes}, ScalarType::Byte)) {
    const int64_t widths[2] = {shape_.student_width, shape_.teacher_width};
    const Tensor* scales[2] = {&student_scale, &teacher_scale};
    for (int model = 0; model < 2; ++model) {
      const cuda::KlModelPlan& of = plan_.models[model];
      kept_[model] = relation_.empty({of.kept_bytes}, ScalarType::Byte);
      models_[model] = {cuda::make_panels(at(of.image_panels), shape_.rows, widths[model], shape_.element_bytes),
                        cuda::make_panels(at(of.text_panels), shape_.columns, widths[model], shape_.element_bytes),
                        at(of.image_factor),
                        at(of.text_factor),
                        scales[model]->const_data_ptr(),
                        of.keep ? kept_[model].mutable_data_ptr() : nullptr,
                        at(of.row_parts),
                        at(of.column_parts)};
    }
    // The other side's rows multiply dL/dcosine; those beyond the texts are zeros.
    image_ = operand(relation_.need_text(), shape_.rows);
    text_ = operand(relation_.need_image(), plan_.block_stride);
  }

  void run() {
    pack();
    for (int64_t tile = 0; tile < plan_.row_tiles; tile += plan_.sums_tiles) sum(tile);
    image_product_ = product(relation_.need_image(), shape_.rows);
    text_product_ = product(relation_.need_text(), plan_.block_stride);
    const bool slabs = plan_.slopes_tiles < plan_.row_tiles;
    text_part_ = product(relation_.need_text() && slabs, plan_.block_stride);
    block_ = gradient()
                 ? relation_.empty({std::min(plan_.slopes_tiles * cuda::kPanelRows, shape_.rows), plan_.block_stride},
                                   relation_.element())
                 : Tensor(relation_.loss());
    for (int64_t tile = 0; tile < plan_.row_tiles; tile += plan_.slopes_tiles) slope(tile);
    if (gradient()) project();
  }

 private:
  bool gradient() const { return relation_.need_image() || relation_.need_text(); }
  char* at(int64_t offset) { return static_cast<char*>(workspace_.mutable_data_ptr()) + offset; }
  Tensor operand(bool wanted, int64_t rows) const {
    return relation_.empty({wanted ? rows : 0, plan_.operand_stride}, relation_.element());
  }
  Tensor product(bool wanted, int64_t rows) const {
    return relation_.empty({wanted ? rows : 0, plan_.operand_stride}, relation_.arithmetic());
  }
  double row_weight() const { return 1.0 / static_cast<double>(shape_.rows); }
  double column_weight() const { return 1.0 / static_cast<double>(shape_.columns); }

  // What float16 slopes are multiplied by: the product of two scaled rows' norms is about 2^17, and no slope exceeds
  // the sum of the weights.
  double block_scale() const {
    if (relation_.element() != ScalarType::Half) return 1;
    return std::ldexp(1.0, 30 - std::ilogb(row_weight() + column_weight()));
  }

  void pack() {
    const auto side = [](const CudaFeatureRows& rows, const cuda::Panels& panels, const void* factor, Tensor* operand) {
      const bool wanted = operand != nullptr && operand->size(0) > 0;
      return cuda::ScaledRows{rows.view(),
                              nullptr,
                              panels.base,
                              const_cast<void*>(factor),
                              wanted ? operand->mutable_data_ptr() : nullptr,
                              wanted ? operand->size(0) : 0,
                              wanted ? operand->size(1) : 0,
                              nullptr};
    };
    relation_.launched(
        cuda::scaled_rows({relation_.element_dtype(),
                           4,
                           {side(relation_.student_image(), models_[0].image, models_[0].image_factor, &image_),
                            side(relation_.student_text(), models_[0].text, models_[0].text_factor, &text_),
                            side(relation_.teacher_image(), models_[1].image, models_[1].image_factor, nullptr),
                            side(relation_.teacher_text(), models_[1].text, models_[1].text_factor, nullptr)}},
                          relation_.stream()));
  }

  void sum(int64_t first_tile) {
    const int64_t tiles = std::min(plan_.sums_tiles, plan_.row_tiles - first_tile);
    const bool slabs = plan_.sums_tiles < plan_.row_tiles;
    const bool last = first_tile + tiles == plan_.row_tiles;
    const int64_t slab = plan_.sums_tiles * cuda::kPanelRows;
    relation_.launched(cuda::relation_kl_sums({relation_.element_dtype(),
                                               {models_[0], models_[1]},
                                               shape_.rows,
                                               shape_.columns,
                                               first_tile,
                                               tiles,
                                               plan_.column_tiles,
                                               slab,
                                               plan_.padded_columns},
                                              relation_.stream()));
    const auto running = [&](int model) { return slabs ? at(plan_.models[model].running) : nullptr; };
    const int64_t line_bytes = 5 * relation_.arithmetic_bytes();
    relation_.launched(cuda::relation_kl_lines({relation_.wide(),
                                                first_tile == 0,
                                                {{tiles * cuda::kPanelRows,
                                                  plan_.column_tiles,
                                                  slab,
                                                  {models_[0].row_parts, models_[1].row_parts},
                                                  {nullptr, nullptr},
                                                  at(plan_.row_lines + first_tile * cuda::kPanelRows * line_bytes)},
                                                 {plan_.padded_columns,
                                                  tiles,
                                                  plan_.padded_columns,
                                                  {models_[0].column_parts, models_[1].column_parts},
                                                  {running(0), running(1)},
                                                  last ? at(plan_.column_lines) : nullptr}}},
                                               relation_.stream()));
  }

  void slope(int64_t first_tile) {
    const int64_t tiles = std::min(plan_.slopes_tiles, plan_.row_tiles - first_tile);
    auto* partials = reinterpret_cast<double*>(at(plan_.partials));
    const bool last = first_tile + tiles == plan_.row_tiles;
    relation_.launched(cuda::relation_kl_slopes({relation_.element_dtype(),
                                                 {models_[0], models_[1]},
                                                 shape_.rows,
                                                 shape_.columns,
                                                 first_tile,
                                                 tiles,
                                                 plan_.column_tiles,
                                                 at(plan_.row_lines),
                                                 at(plan_.column_lines),
                                                 row_weight(),
                                                 column_weight(),
                                                 gradient() ? block_.mutable_data_ptr() : nullptr,
                                                 plan_.block_stride,
                                                 block_scale(),
                                                 partials},
                                                relation_.stream()));
    relation_.launched(
        cuda::relation_kl_total({relation_.wide(), first_tile == 0, last, partials, tiles * plan_.column_tiles,
                                 reinterpret_cast<double*>(at(plan_.totals)), row_weight(), column_weight(),
                                 relation_.loss().mutable_data_ptr(), grad_scale_},
                                relation_.stream()));
    if (!gradient()) return;
    const int64_t begin = first_tile * cuda::kPanelRows;
    const int64_t count = std::min(tiles * cuda::kPanelRows, shape_.rows - begin);
    const Tensor block = part_of(block_, 0, 0, count);
    if (relation_.need_image()) multiply_into(part_of(image_product_, 0, begin, count), block, text_);
    if (!relation_.need_text()) return;
    multiply_into(begin == 0 ? text_product_ : text_part_, transposed(block), part_of(image_, 0, begin, count));
    if (begin > 0)
      relation_.launched(
          cuda::relation_accumulate({relation_.wide(), text_product_.mutable_data_ptr(), text_part_.const_data_ptr(),
                                     plan_.block_stride * plan_.operand_stride},
                                    relation_.stream()));
  }

  void project() {
    const auto side = [&](const CudaFeatureRows& rows, bool wanted, Tensor& product, Tensor& grad) {
      return cuda::RelationProjectSide{rows.view(), wanted ? product.const_data_ptr() : nullptr, plan_.operand_stride,
                                       grad.mutable_data_ptr()};
    };
    relation_.launched(cuda::relation_project(
        {relation_.wide(),
         true,
         {side(relation_.student_image(), relation_.need_image(), image_product_, relation_.grad_image()),
          side(relation_.student_text(), relation_.need_text(), text_product_, relation_.grad_text())},
         1 / block_scale(),
         models_[0].scale},
        relation_.stream()));
  }

  Relation& relation_;
  cuda::RelationShape shape_;
  cuda::KlPlan plan_;
  void* grad_scale_;
  Tensor workspace_;
  Tensor kept_[2];
  cuda::RelationKlModel models_[2];
  Tensor image_;
  Tensor text_;
  Tensor block_;
  Tensor image_product_;
  Tensor text_product_;
  Tensor text_part_;
};

Tensor check_scale(const char* name, const Tensor& scale, const Tensor& student_image, ScalarType dtype) {
  check_same_device(kKl, name, scale, "student_image", student_image);
  check_dim(kKl, name, scale, 0);
  check_floating(kKl, name, scale);
  return torch::stable::to(scale, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relation_kl(Tensor student_image, Tensor student_text, Tensor teacher_image,
                                                       Tensor teacher_text, Tensor student_scale, Tensor teacher_scale,
                                                       int64_t workspace_bytes, bool need_image, bool need_text,
                                                       bool need_scale) {
  Relation relation(kKl, student_image, student_text, teacher_image, teacher_text, workspace_bytes, need_image,
                    need_text, true);
  const Tensor student = check_scale("student_scale", student_scale, student_image, relation.arithmetic());
  const Tensor teacher = check_scale("teacher_scale", teacher_scale, student_image, relation.arithmetic());
  Tensor grad_scale =
      need_scale ? relation.empty({}, relation.arithmetic()) : relation.empty({0}, relation.arithmetic());
  KullbackLeibler(relation, student, teacher, need_scale ? grad_scale.mutable_data_ptr() : nullptr).run();
  return {relation.loss(), relation.grad_image(), relation.grad_text(), grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, LCR2S_CUDA_KEY, m) {
  m.impl("relation_frobenius", TORCH_BOX(&relation_frobenius));
  m.impl("relation_kl", TORCH_BOX(&relation_kl));
}

}  // namespace lcr2s
