#include "support_attention.h"

#include "../cpu/support_attention.h"

namespace lcr2s {

STABLE_TORCH_LIBRARY_FRAGMENT(lcr2s, m) {
  m.def(
      "support_attention(Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices, Tensor entry_rows, "
      "Tensor t_indptr, Tensor t_entries, float scale, bool need_probs) -> (Tensor out, Tensor probs)");
  m.def(
      "support_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor probs, "
      "Tensor indptr, Tensor indices, Tensor entry_rows, Tensor t_indptr, Tensor t_entries, float scale, "
      "bool need_query, bool need_key, bool need_value) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

#ifndef LCR2S_EMULATE_CUDA
namespace {

using namespace support_attention_ops;

std::tuple<Tensor, Tensor> support_attention(Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices,
                                             Tensor entry_rows, Tensor t_indptr, Tensor t_entries, double scale,
                                             bool need_probs) {
  check_cpu(kForward, "query", query);
  return forward(query, key, value, indptr, indices, entry_rows, t_indptr, t_entries, scale, need_probs,
                 [](const SupportAttentionArgs& args) { cpu::support_attention(args, torch_parallel()); });
}

std::tuple<Tensor, Tensor, Tensor> support_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                              Tensor probs, Tensor indptr, Tensor indices,
                                                              Tensor entry_rows, Tensor t_indptr, Tensor t_entries,
                                                              double scale, bool need_query, bool need_key,
                                                              bool need_value) {
  check_cpu(kBackward, "query", query);
  return backward(grad_out, query, key, value, probs, indptr, indices, entry_rows, t_indptr, t_entries, scale,
                  need_query, need_key, need_value, [](const SupportAttentionBackwardArgs& args) {
                    cpu::support_attention_backward(args, torch_parallel());
                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, CPU, m) {
  m.impl("support_attention", TORCH_BOX(&support_attention));
  m.impl("support_attention_backward", TORCH_BOX(&support_attention_backward));
}
#endif

}  // namespace lcr2s
