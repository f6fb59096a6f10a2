#pragma once

#include <cmath>

#include "element.h"

// Arithmetic of the relation KL loss, for the host too, where it is tested. x are the student's logits of a row or a
// column, z the teacher's. With u = (z - lse z) - (x - lse x) of every entry, p_S = p_T e^-u and
//   KL = sum p_T (u + e^-u - 1),  dKL/dx = p_T (e^-u - 1):
// no term cancels where the student is near the teacher, and because E_T[1 - e^-u] = 0 an error of the log-sum-exps
// enters the loss squared.
namespace lcr2s::cuda {

template <class T>
struct KlLimits;
// |cosine| <= 1, so logits lie within [-scale, scale]: up to this scale their exponentials are normal numbers and sums
// of 10^5 of them are finite, and no shift is needed. (A shift by `scale` would round every logit at the size of
// `scale`.)
template <>
struct KlLimits<float> {
  static constexpr float kScale = 75;
  static constexpr int kTerms = 8;
};
template <>
struct KlLimits<double> {
  static constexpr double kScale = 300;
  static constexpr int kTerms = 16;
};

LCR2S_HOST_DEVICE float exponential(float x) { return expf(x); }
LCR2S_HOST_DEVICE double exponential(double x) { return exp(x); }

template <class T>
LCR2S_HOST_DEVICE constexpr T lowest() {
  return -static_cast<T>(INFINITY);
}

template <class T>
LCR2S_HOST_DEVICE bool needs_shift(T scale) {
  return !(scale <= KlLimits<T>::kScale && scale >= -KlLimits<T>::kScale);
}

// sum of e^(x - shift) over some entries; none: shift -infinity, sum 0. NaN among them is in the sum, not in the shift.
template <class T>
struct ExponentialSum {
  T shift;
  T sum;

  LCR2S_HOST_DEVICE void merge(const ExponentialSum& other) {
    if (other.shift > shift) {
      sum = sum * exponential(shift - other.shift) + other.sum;
      shift = other.shift;
    } else {
      sum += other.shift == shift ? other.sum : other.sum * exponential(other.shift - shift);
    }
  }
};

// x - shift where the shift may be -infinity because all entries are -infinity or NaN.
template <class T>
LCR2S_HOST_DEVICE T below(T x, T shift) {
  return shift == lowest<T>() ? x : x - shift;
}

// What the entries of a row or a column need to know of it.
template <class T>
struct KlLine {
  T student_shift;
  T student_inverse;
  T teacher_shift;
  T teacher_inverse;
  T delta;  // lse z - lse x
};

template <class T>
LCR2S_HOST_DEVICE KlLine<T> finish_line(const ExponentialSum<double>& student, const ExponentialSum<double>& teacher) {
  return KlLine<T>{static_cast<T>(student.shift), static_cast<T>(1 / student.sum), static_cast<T>(teacher.shift),
                   static_cast<T>(1 / teacher.sum),
                   static_cast<T>((teacher.shift - student.shift) + (log(teacher.sum) - log(student.sum)))};
}

// (-1)^k / k!
LCR2S_HOST_DEVICE constexpr double alternating_inverse_factorial(int k) {
  double product = 1;
  for (int factor = 2; factor <= k; ++factor) product *= factor;
  return (k % 2 == 0 ? 1 : -1) / product;
}

// sum of (-u)^k / k! from k = kFirst, divided by u^kFirst
template <int kFirst, class T>
LCR2S_HOST_DEVICE T exponential_series(T u) {
  constexpr T coefficient = static_cast<T>(alternating_inverse_factorial(kFirst));
  if constexpr (kFirst > KlLimits<T>::kTerms) {
    return coefficient;
  } else {
    return exponential_series<kFirst + 1>(u) * u + coefficient;
  }
}

template <class T>
struct KlTerm {
  T slope;  // dKL/dx
  T loss;
};

template <class T>
LCR2S_HOST_DEVICE KlTerm<T> divergence(T teacher, T student, T u) {
  // By the series where |u| < 1/2, from the probabilities elsewhere.
  const T curved = exponential_series<2>(u) * u * u;
  const T far = student - teacher;
  const bool near = u < static_cast<T>(0.5) && u > static_cast<T>(-0.5);
  return near ? KlTerm<T>{teacher * (curved - u), teacher * curved} : KlTerm<T>{far, teacher * u + far};
}

// The term of one entry in its row or its column; `apart` is z - x.
template <class T>
LCR2S_HOST_DEVICE KlTerm<T> line_term(const KlLine<T>& line, T student, T teacher, T apart) {
  return divergence(exponential(teacher - line.teacher_shift) * line.teacher_inverse,
                    exponential(student - line.student_shift) * line.student_inverse, apart - line.delta);
}

// z - x, exact where scales agree and cosines are close.
template <class T>
LCR2S_HOST_DEVICE T logits_apart(T student_scale, T student_cosine, T teacher_scale, T teacher_cosine) {
  return teacher_scale * (teacher_cosine - student_cosine) + (teacher_scale - student_scale) * student_cosine;
}

}  // namespace lcr2s::cuda
