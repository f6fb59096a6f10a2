#include "support_attention.h"

#include "../cpu/support_attention.h"

#include <algorithm>
#include <atomic>

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

// Threads take tasks in turn: where another program holds a core, the others do its share. Which thread runs a task
// changes no bit.
cpu::Parallel shared_tasks() {
  return cpu::Parallel{[](int64_t tasks, cpu::Parallel::Body body, void* context) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, context);
    });
  }};
}

std::tuple<Tensor, Tensor> support_attention(Tensor query, Tensor key, Tensor value, Tensor indptr, Tensor indices,
                                             Tensor entry_rows, Tensor t_indptr, Tensor t_entries, double scale,
                                             bool need_probs) {
  check_cpu(kForward, "query", query);
  return forward(query, key, value, indptr, indices, entry_rows, t_indptr, t_entries, scale, need_probs,
                 [](const SupportAttentionArgs& args) { cpu::support_attention(args, shared_tasks()); });
}

std::tuple<Tensor, Tensor, Tensor> support_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                              Tensor probs, Tensor indptr, Tensor indices,
                                                              Tensor entry_rows, Tensor t_indptr, Tensor t_entries,
                                                              double scale, bool need_query, bool need_key,
                                                              bool need_value) {
  check_cpu(kBackward, "query", query);
  return backward(grad_out, query, key, value, probs, indptr, indices, entry_rows, t_indptr, t_entries, scale,
                  need_query, need_key, need_value, [](const SupportAttentionBackwardArgs& args) {
                    cpu::support_attention_backward(args, shared_tasks());
                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcr2s, CPU, m) {
  m.impl("support_attention", TORCH_BOX(&support_attention));
  m.impl("support_attention_backward", TORCH_BOX(&support_attention_backward));
}
#endif

}  // namespace lcr2s
