// What all CPU kernels stand on, at the vector width that the test compiles it for.
#include <stdlib.h>

#include "cpu/gemm.h"

using namespace lcr2s::cpu;
using namespace lcr2s::cpu::LCR2S_ISA;

namespace {

const Parallel kSerial{[](int64_t tasks, Parallel::Body body, void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(task, context);
}};

template <class T>
void product(const T* a, int64_t a_row, int64_t a_col, int64_t m, int64_t k, const T* b, int64_t b_row, int64_t b_col,
             int64_t n, T* c, int64_t ldc, bool accumulate) {
  T* packed = static_cast<T*>(malloc((packed_size<T>(k, n) + 1) * sizeof(T)));
  pack_panels(kSerial, b, b_row, b_col, k, n, packed);
  gemm(kSerial, a, a_row, a_col, m, k, packed, n, c, ldc, accumulate);
  free(packed);
}

}  // namespace

extern "C" {

int vector_bytes() { return LCR2S_VECTOR_BYTES; }

void exp_f32(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) store(y + i, exp(load(x + i)));
}

void gemm_f32(const float* a, int64_t a_row, int64_t a_col, int64_t m, int64_t k, const float* b, int64_t b_row,
              int64_t b_col, int64_t n, float* c, int64_t ldc, bool accumulate) {
  product(a, a_row, a_col, m, k, b, b_row, b_col, n, c, ldc, accumulate);
}

void gemm_f64(const double* a, int64_t a_row, int64_t a_col, int64_t m, int64_t k, const double* b, int64_t b_row,
              int64_t b_col, int64_t n, double* c, int64_t ldc, bool accumulate) {
  product(a, a_row, a_col, m, k, b, b_row, b_col, n, c, ldc, accumulate);
}
}
