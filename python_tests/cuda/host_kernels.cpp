// The device code of support attention, compiled for the host: what test_support_attention_body.py calls through
// ctypes.
#include <cstdint>

#include "cuda/support_attention_body.h"

using namespace lcr2s;
using namespace lcr2s::cuda;

namespace {

// One lane of a group; alone it is the whole group, and sums over lanes are left to the caller otherwise.
struct HostLane {
  int index = 0;
  int count = 1;
  int lane() const { return index; }
  int lanes() const { return count; }
  void sync() const {}
  template <class A>
  A sum(A x) const {
    return x;
  }
};

template <class T, int Size>
void forward(const SupportAttentionArgs& args) {
  for (int64_t row = 0; row < args.shape.queries; ++row)
    for (int64_t head = 0; head < args.shape.heads; ++head) attend<T, Size>(args, row, head, HostLane{});
}

template <class T, int Size>
void backward(const SupportAttentionBackwardArgs& args) {
  for (int64_t row = 0; row < args.shape.queries; ++row)
    for (int64_t head = 0; head < args.shape.heads; ++head) attend_backward_query<T, Size>(args, row, head, HostLane{});
  for (int64_t row = 0; row < args.shape.pool_rows; ++row)
    for (int64_t head = 0; head < args.shape.heads; ++head) attend_backward_pool<T, Size>(args, row, head, HostLane{});
}

template <class Args>
void by_dtype(const Args& args, int packed, void (*const (&kernels)[4][2])(const Args&)) {
  kernels[static_cast<int>(args.shape.dtype)][packed](args);
}

}  // namespace

extern "C" {

void host_forward(const SupportAttentionArgs* args, int packed) {
  by_dtype<SupportAttentionArgs>(*args, packed,
                                 {{forward<float, 1>, forward<float, 4>},
                                  {forward<double, 1>, forward<double, 2>},
                                  {forward<BFloat16, 1>, forward<BFloat16, 8>},
                                  {forward<Half, 1>, forward<Half, 8>}});
}

void host_backward(const SupportAttentionBackwardArgs* args, int packed) {
  by_dtype<SupportAttentionBackwardArgs>(*args, packed,
                                         {{backward<float, 1>, backward<float, 4>},
                                          {backward<double, 1>, backward<double, 2>},
                                          {backward<BFloat16, 1>, backward<BFloat16, 8>},
                                          {backward<Half, 1>, backward<Half, 8>}});
}

// Sum over the lanes of a group of what each lane holds.
double host_dot(const double* a, const double* b, int64_t width, int lanes) {
  double sum = 0;
  for (int lane = 0; lane < lanes; ++lane) sum += dot<double, 1>(a, b, width, HostLane{lane, lanes});
  return sum;
}

void host_weighted_sum(const double* rows, const double* weights, int64_t count, int64_t width, double scale,
                       double* out, int lanes) {
  for (int lane = 0; lane < lanes; ++lane)
    weighted_sum<double, 2>(
        count, width, [=](int64_t j) { return rows + j * width; }, [=](int64_t j) { return weights[j]; }, scale, out,
        HostLane{lane, lanes});
}

void host_half_to_float(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_accumulate(Half{from[i]});
}
void host_bfloat16_to_float(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_accumulate(BFloat16{from[i]});
}
void host_float_to_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_accumulate<Half>(from[i]).bits;
}
void host_float_to_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_accumulate<BFloat16>(from[i]).bits;
}
}
