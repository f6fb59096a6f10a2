#include "support_attention.h"

#include <cuda_runtime.h>

#include "support_attention_body.h"

namespace lcr2s::cuda {

namespace {

constexpr int kThreads = 128;

// `size` neighbouring lanes of a warp, a power of two, that work on one head of one row.
class LaneGroup {
 public:
  __device__ explicit LaneGroup(int size)
      : lane_(static_cast<int>(threadIdx.x) % size),
        size_(size),
        mask_((size == 32 ? 0xffffffffu : (1u << size) - 1u) << (static_cast<int>(threadIdx.x) % 32 / size * size)) {}
  __device__ int lane() const { return lane_; }
  __device__ int lanes() const { return size_; }
  __device__ void sync() const { __syncwarp(mask_); }
  template <class A>
  __device__ A sum(A x) const {
    for (int step = size_ / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask_, x, step);
    return x;
  }

 private:
  int lane_;
  int size_;
  unsigned mask_;
};

template <class F>
__device__ void for_each_head(int64_t rows, int64_t heads, int group_size, const F& body) {
  const LaneGroup group(group_size);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / group_size);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / group_size) + threadIdx.x / group_size;
  for (int64_t item = first; item < rows * heads; item += groups) body(item / heads, item % heads, group);
}

template <class T, int Size>
__global__ void __launch_bounds__(kThreads)
    support_attention_forward_kernel(const __grid_constant__ SupportAttentionArgs args, int group_size) {
  for_each_head(args.shape.queries, args.shape.heads, group_size,
                [&](int64_t row, int64_t head, const LaneGroup& group) { attend<T, Size>(args, row, head, group); });
}

template <class T, int Size>
__global__ void __launch_bounds__(kThreads)
    support_attention_backward_query_kernel(const __grid_constant__ SupportAttentionBackwardArgs args, int group_size) {
  for_each_head(args.shape.queries, args.shape.heads, group_size,
                [&](int64_t row, int64_t head, const LaneGroup& group) {
                  attend_backward_query<T, Size>(args, row, head, group);
                });
}

template <class T, int Size>
__global__ void __launch_bounds__(kThreads)
    support_attention_backward_pool_kernel(const __grid_constant__ SupportAttentionBackwardArgs args, int group_size) {
  for_each_head(args.shape.pool_rows, args.shape.heads, group_size,
                [&](int64_t row, int64_t head, const LaneGroup& group) {
                  attend_backward_pool<T, Size>(args, row, head, group);
                });
}

template <class Args>
const char* launch(void (*kernel)(Args, int), const Args& args, int64_t rows, int pack, void* stream) {
  const SupportAttentionShape& s = args.shape;
  const int64_t widest = s.width > s.value_width ? s.width : s.value_width;
  int group_size = 1;
  while (group_size < 32 && group_size * pack < widest) group_size *= 2;
  const int64_t items = rows * s.heads;
  if (items == 0) return nullptr;
  const int64_t per_block = kThreads / group_size;
  const int64_t wanted = (items + per_block - 1) / per_block;
  const unsigned blocks = static_cast<unsigned>(wanted < 0x7fffffff ? wanted : 0x7fffffff);
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, group_size);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
bool aligned(const Rows& rows, int64_t pack) { return aligned(rows.data) && rows.stride % pack == 0; }
bool aligned(const SupportAttentionShape& s, int64_t pack) { return s.width % pack == 0 && s.value_width % pack == 0; }

template <class T>
const char* forward(const SupportAttentionArgs& args, void* stream) {
  constexpr int pack = 16 / sizeof(T);
  const int64_t rows = args.shape.queries;
  if (aligned(args.shape, pack) && aligned(args.query, pack) && aligned(args.key, pack) && aligned(args.value, pack) &&
      aligned(args.out))
    return launch(support_attention_forward_kernel<T, pack>, args, rows, pack, stream);
  return launch(support_attention_forward_kernel<T, 1>, args, rows, 1, stream);
}

template <class T>
const char* backward(const SupportAttentionBackwardArgs& args, void* stream) {
  constexpr int pack = 16 / sizeof(T);
  const bool packed = aligned(args.shape, pack) && aligned(args.grad_out, pack) && aligned(args.query, pack) &&
                      aligned(args.key, pack) && aligned(args.value, pack) && aligned(args.grad_query) &&
                      aligned(args.grad_key) && aligned(args.grad_value);
  const SupportAttentionShape& s = args.shape;
  const char* error = nullptr;
  if (args.grad_query || args.grad_key)
    error = packed ? launch(support_attention_backward_query_kernel<T, pack>, args, s.queries, pack, stream)
                   : launch(support_attention_backward_query_kernel<T, 1>, args, s.queries, 1, stream);
  if (!error && (args.grad_key || args.grad_value))
    error = packed ? launch(support_attention_backward_pool_kernel<T, pack>, args, s.pool_rows, pack, stream)
                   : launch(support_attention_backward_pool_kernel<T, 1>, args, s.pool_rows, 1, stream);
  return error;
}

}  // namespace

const char* support_attention(const SupportAttentionArgs& args, void* stream) {
  switch (args.shape.dtype) {
    case DType::float32:
      return forward<float>(args, stream);
    case DType::float64:
      return forward<double>(args, stream);
    case DType::bfloat16:
      return forward<BFloat16>(args, stream);
    case DType::float16:
      return forward<Half>(args, stream);
  }
  return "float64 has no kernel, use the reference";
}

const char* support_attention_backward(const SupportAttentionBackwardArgs& args, void* stream) {
  switch (args.shape.dtype) {
    case DType::float32:
      return backward<float>(args, stream);
    case DType::float64:
      return backward<double>(args, stream);
    case DType::bfloat16:
      return backward<BFloat16>(args, stream);
    case DType::float16:
      return backward<Half>(args, stream);
  }
  return "float64 has no kernel, use the reference";
}

}  // namespace lcr2s::cuda
