#include "../cuda/support_attention.h"

#include "cuda_features.h"
#include "support_attention.h"

namespace lcr2s {

namespace {

using namespace support_attention_ops;

void check_launch(const char* op, const char* error) { check(error == nullptr, op, "CUDA: ", error ? error : ""); }

std::tuple<Tensor, Tensor> support_attention(Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices,
                                             Tensor entry_rows, Tensor t_indptr, Tensor t_entries, double scale,
                                             bool need_probs) {
  check_cuda(kForward, "query", query);
  const CudaScope scope(kForward, query);
  return forward(
      query, key, value, indptr, indices, entry_rows, t_indptr, t_entries, scale, need_probs,
      [&](const SupportAttentionArgs& args) { check_launch(kForward, cuda::support_attention(args, scope.stream())); });
}

std::tuple<Tensor, Tensor, Tensor> support_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                              Tensor probs, Tensor indptr, Tensor indices,
                                                              Tensor entry_rows, Tensor t_indptr, Tensor t_entries,
                                                              double scale, bool need_query, bool need_key,
                                                              bool need_value) {
  check_cuda(kBackward, "query", query);
  const CudaScope scope(kBackward, query);
  return backward(
      grad_out, query, key, value, probs, indptr, indices, entry_rows, t_indptr, t_entries, scale, need_query, need_key,
      need_value, [&](const SupportAttentionBackwardArgs& args) {
        const int64_t bytes = need_key || need_value ? cuda::support_attention_backward_workspace(args.shape) : 0;
        Tensor workspace = empty_on_device(query, {bytes}, ScalarType::Byte);
        check_launch(kBackward, cuda::support_attention_backward(args, workspace.mutable_data_ptr(), scope.stream()));
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, LCR2S_CUDA_KEY, m) {
  m.impl("support_attention", TORCH_BOX(&support_attention));
  m.impl("support_attention_backward", TORCH_BOX(&support_attention_backward));
}

}  // namespace lcr2s
