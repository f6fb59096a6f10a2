#pragma once

#include <cmath>

#include "similarity_plan.h"

// What the similarity losses compute for one row of cosines, for the host too, where it is tested. Row logits are a c
// with a >= 0: a negative logit scale changes the sign of the cosines instead, so that the largest logit always belongs
// to the largest cosine. Statistics are kept in units of the cosine: c less the row's maximum m is nearly exact, which
// a c less a m is not, and the derivative with respect to a falls out without a division by a.
//
// A loss is a policy:
//   kMaxima        1, or 2: over positives, over negatives
//   kSums          sums of e = exp(a (c - m)) and of what is multiplied with it
//   add            one cosine into the sums; `below` is c - m
//   rescale        sums when the maxima rise: `shift` is old less new maximum, `by` is exp(a shift)
//   finish         a row's loss and the coefficients of dL/d(logit), from everything
//   gradient       dL/d(logit) of one cosine, by the row's coefficients
//   weigh          multiplies coefficients such that `gradient` grows by `weight`
// the same for rows and columns.
namespace lcr2s::cuda {

// Below every cosine, but not so far that its square leaves the range.
template <class T>
constexpr T kBelowAll = T(-4);

LCR2S_HOST_DEVICE float exponential_of(float x) { return expf(x); }
LCR2S_HOST_DEVICE double exponential_of(double x) { return exp(x); }

// x where it is greater; NaN in x does not count, its exponential will show it.
template <class T>
LCR2S_HOST_DEVICE T greater_of(T x, T than) {
  return x > than ? x : than;
}

struct SimilarityParameters {
  double log_eps;
  double eps;
  double margin;
  double tau;
  bool l2_target;
};

struct RowResult {
  double loss;
  // sum over the row of dL/d(logit) c
  double along;
  // |dL/d(logit)| is at most this.
  double bound;
};

template <class T>
struct InfoNce {
  static constexpr int kMaxima = 1, kSums = 3;

  // sum e, sum e (c - m), sum of c over positives
  LCR2S_HOST_DEVICE static void add(T c, T below, T e, bool positive, T* sums) {
    sums[0] += e;
    sums[1] += e * below;
    sums[2] += positive ? c : T(0);
  }
  LCR2S_HOST_DEVICE static void rescale(T* sums, const T* shift, const T* by) {
    sums[1] = by[0] * (sums[1] + sums[0] * shift[0]);
    sums[0] *= by[0];
  }
  // A row without a positive is left out: its factor is 0, which keeps NaN.
  LCR2S_HOST_DEVICE static RowResult finish(const SimilarityParameters&, double a, int64_t positives, int64_t,
                                            const T* maxima, const T* sums, T* coefficient) {
    const double factor = positives > 0 ? 1 : 0;
    const double mean = double(sums[2]) / (positives > 0 ? double(positives) : 1.0);
    const double total = sums[0];
    coefficient[0] = maxima[0];
    coefficient[1] = static_cast<T>(factor / total);
    coefficient[2] = static_cast<T>(positives > 0 ? 1 / double(positives) : 0.0);
    coefficient[3] = T(0);
    return RowResult{factor * (a * (double(maxima[0]) - mean) + log(total)),
                     factor * (double(maxima[0]) + double(sums[1]) / total - mean), factor};
  }
  LCR2S_HOST_DEVICE static T gradient(T c, T a, bool positive, const T* k) {
    return exponential_of(a * (c - k[0])) * k[1] - (positive ? k[2] : T(0));
  }
  LCR2S_HOST_DEVICE static void weigh(T weight, T* k) {
    k[1] *= weight;
    k[2] *= weight;
  }
};

// SDM and CMPM: KL of the softmax from a target that is la on positives and lb elsewhere, in logarithms.
template <class T>
struct Matching {
  static constexpr int kMaxima = 1, kSums = 5;

  // over positives and over negatives (the small mass of the two keeps its digits) sum e and sum e (c - m), over all
  // sum e (c - m)^2
  LCR2S_HOST_DEVICE static void add(T, T below, T e, bool positive, T* sums) {
    const T first = e * below;
    sums[0] += positive ? e : T(0);
    sums[1] += positive ? T(0) : e;
    sums[2] += positive ? first : T(0);
    sums[3] += positive ? T(0) : first;
    sums[4] += first * below;
  }
  LCR2S_HOST_DEVICE static void rescale(T* sums, const T* shift, const T* by) {
    const T d = shift[0];
    sums[4] = by[0] * (sums[4] + d * (2 * (sums[2] + sums[3]) + d * (sums[0] + sums[1])));
    sums[2] = by[0] * (sums[2] + sums[0] * d);
    sums[3] = by[0] * (sums[3] + sums[1] * d);
    sums[0] *= by[0];
    sums[1] *= by[0];
  }
  LCR2S_HOST_DEVICE static RowResult finish(const SimilarityParameters& p, double a, int64_t positives, int64_t,
                                            const T* maxima, const T* sums, T* coefficient) {
    const double lb = p.log_eps;
    double la = lb;
    if (positives > 0) {
      const double count = double(positives);
      la = log(1 / (p.l2_target ? sqrt(count) : count) + p.eps);
    }
    const double of_positive = sums[0], of_negative = sums[1];
    const double first_positive = sums[2], first_negative = sums[3];
    const double total = of_positive + of_negative;
    const double log_total = log(total);
    const double loss =
        (a * (first_positive + first_negative) - la * of_positive - lb * of_negative) / total - log_total;
    const double at_positive = log_total + la + loss, at_negative = log_total + lb + loss;
    coefficient[0] = maxima[0];
    coefficient[1] = static_cast<T>(1 / total);
    coefficient[2] = static_cast<T>(at_positive);
    coefficient[3] = static_cast<T>(at_negative);
    // p |a (c - m)| is at most 1 / e.
    return RowResult{loss, (a * double(sums[4]) - at_positive * first_positive - at_negative * first_negative) / total,
                     0.5 + (fabs(at_positive) > fabs(at_negative) ? fabs(at_positive) : fabs(at_negative))};
  }
  LCR2S_HOST_DEVICE static T gradient(T c, T a, bool positive, const T* k) {
    const T below = a * (c - k[0]);
    return exponential_of(below) * k[1] * (below - (positive ? k[2] : k[3]));
  }
  LCR2S_HOST_DEVICE static void weigh(T weight, T* k) { k[1] *= weight; }
};

// `gradient` is dL/dc itself: the tau of the loss cancels the 1 / tau of the logits.
template <class T>
struct Tal {
  static constexpr int kMaxima = 2, kSums = 3;

  // over positives sum e and sum e (c - m), over negatives sum e
  LCR2S_HOST_DEVICE static void add(T, T below, T e, bool positive, T* sums) {
    sums[0] += positive ? e : T(0);
    sums[1] += positive ? e * below : T(0);
    sums[2] += positive ? T(0) : e;
  }
  LCR2S_HOST_DEVICE static void rescale(T* sums, const T* shift, const T* by) {
    sums[1] = by[0] * (sums[1] + sums[0] * shift[0]);
    sums[0] *= by[0];
    sums[2] *= by[1];
  }
  LCR2S_HOST_DEVICE static RowResult finish(const SimilarityParameters& p, double, int64_t positives, int64_t entries,
                                            const T* maxima, const T* sums, T* coefficient) {
    coefficient[0] = maxima[0];
    coefficient[2] = maxima[1];
    coefficient[1] = coefficient[3] = T(0);
    const double of_positive = sums[0], of_negative = sums[2];
    // Without a positive or without a negative the row is 0, which keeps NaN.
    if (positives == 0 || positives == entries) return RowResult{0 * (of_positive + of_negative), 0, 0};
    const double hinge =
        p.margin - (double(maxima[0]) + double(sums[1]) / of_positive) + (double(maxima[1]) + p.tau * log(of_negative));
    if (hinge <= 0) return RowResult{0, 0, 0};
    coefficient[1] = static_cast<T>(-1 / of_positive);
    coefficient[3] = static_cast<T>(1 / of_negative);
    return RowResult{hinge, 0, 1};
  }
  LCR2S_HOST_DEVICE static T gradient(T c, T a, bool positive, const T* k) {
    return exponential_of(a * (c - (positive ? k[0] : k[2]))) * (positive ? k[1] : k[3]);
  }
  LCR2S_HOST_DEVICE static void weigh(T weight, T* k) {
    k[1] *= weight;
    k[3] *= weight;
  }
};

// Running statistics of one row (or column).
template <class T, class Policy>
struct RowState {
  T maxima[Policy::kMaxima];
  T sums[Policy::kSums];
  // A number of entries, exact: no state covers more than a float can count.
  T positives;

  LCR2S_HOST_DEVICE void clear() {
    for (int g = 0; g < Policy::kMaxima; ++g) maxima[g] = kBelowAll<T>;
    for (int f = 0; f < Policy::kSums; ++f) sums[f] = T(0);
    positives = T(0);
  }

  // Field f at p[f * stride].
  static_assert(Policy::kMaxima + Policy::kSums + 1 <= kStatistics);
  LCR2S_HOST_DEVICE void load(const T* p, int64_t stride) {
    for (int g = 0; g < Policy::kMaxima; ++g) maxima[g] = p[g * stride];
    for (int f = 0; f < Policy::kSums; ++f) sums[f] = p[(Policy::kMaxima + f) * stride];
    positives = p[(Policy::kMaxima + Policy::kSums) * stride];
  }
  LCR2S_HOST_DEVICE void store(T* p, int64_t stride) const {
    for (int g = 0; g < Policy::kMaxima; ++g) p[g * stride] = maxima[g];
    for (int f = 0; f < Policy::kSums; ++f) p[(Policy::kMaxima + f) * stride] = sums[f];
    p[(Policy::kMaxima + Policy::kSums) * stride] = positives;
  }

  LCR2S_HOST_DEVICE T maximum(bool positive) const {
    if constexpr (Policy::kMaxima == 2) return positive ? maxima[0] : maxima[1];
    return maxima[0];
  }

  LCR2S_HOST_DEVICE void raise_to(const T* best, T a) {
    T shift[Policy::kMaxima], by[Policy::kMaxima];
    for (int g = 0; g < Policy::kMaxima; ++g) {
      shift[g] = maxima[g] - best[g];
      by[g] = exponential_of(a * shift[g]);
      maxima[g] = best[g];
    }
    Policy::rescale(sums, shift, by);
  }

  // kCount cosines; those not `inside` count for nothing.
  template <int kCount>
  LCR2S_HOST_DEVICE void add(const T (&c)[kCount], const bool (&positive)[kCount], const bool (&inside)[kCount], T a) {
    T best[Policy::kMaxima];
    for (int g = 0; g < Policy::kMaxima; ++g) best[g] = maxima[g];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const T x = inside[u] ? c[u] : kBelowAll<T>;
      if constexpr (Policy::kMaxima == 2) {
        best[0] = greater_of(positive[u] ? x : kBelowAll<T>, best[0]);
        best[1] = greater_of(positive[u] ? kBelowAll<T> : x, best[1]);
      } else {
        best[0] = greater_of(x, best[0]);
      }
    }
    raise_to(best, a);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const bool counts = positive[u] && inside[u];
      const T below = inside[u] ? c[u] - maximum(positive[u]) : T(0);
      Policy::add(c[u], below, inside[u] ? exponential_of(a * below) : T(0), counts, sums);
      positives += counts ? T(1) : T(0);
    }
  }

  LCR2S_HOST_DEVICE void merge(RowState other, T a) {
    T best[Policy::kMaxima];
    for (int g = 0; g < Policy::kMaxima; ++g) best[g] = greater_of(other.maxima[g], maxima[g]);
    raise_to(best, a);
    other.raise_to(best, a);
    for (int f = 0; f < Policy::kSums; ++f) sums[f] += other.sums[f];
    positives += other.positives;
  }
};

}  // namespace lcr2s::cuda
