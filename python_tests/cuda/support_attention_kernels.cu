// The CUDA kernels of support attention and their plan, compiled for the emulator: what test_support_attention.py
// calls.
#include "cuda/support_attention.cu"

#include <set>
#include <string>
#include <vector>

using namespace lcr2s;
using namespace lcr2s::cuda;

namespace {

std::string complaint;

bool complain(bool wrong, const char* what, int64_t a, int64_t b = 0, int64_t c = 0) {
  if (wrong && complaint.empty())
    complaint = std::string(what) + ": " + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c);
  return wrong;
}

// Every unit has one block, no block is empty, and what runs at once fits.
void check_grids() {
  for (int multiprocessors : {1, 2, 4, 132}) {
    const int64_t resident = multiprocessors * plan::kResidentBlocks;
    for (int64_t units = 0; units < 40000; units += units < 5000 ? 1 : 97) {
      const plan::Grid grid = plan::grid(units, multiprocessors);
      complain(grid.blocks * grid.units_per_block < units, "units left out", units, multiprocessors);
      complain(grid.blocks > 0 && (grid.blocks - 1) * grid.units_per_block >= units, "an empty block", units,
               multiprocessors);
      complain((grid.blocks == 0) != (units == 0), "blocks without units", units, multiprocessors);
      complain(grid.blocks > 8 * resident, "too many blocks", units, multiprocessors);
      complain(grid.units_per_block <= plan::kWarps && grid.blocks > resident, "more blocks than run at once", units,
               multiprocessors);
    }
  }
  for (const int64_t units : {int64_t{1} << 33, (int64_t{1} << 40) + 1}) {
    const plan::Grid grid = plan::grid(units, 132);
    complain(grid.units_per_block <= 0 || grid.blocks * grid.units_per_block < units, "units left out", units);
  }
}

// Lanes hold a head, a warp whole heads, the slices all heads; packed exactly where every head starts at 16 bytes.
void check_layouts() {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
    for (int64_t heads = 1; heads < 20; ++heads)
      for (int64_t width = 1; width < 600; width += width < 300 ? 1 : 31)
        for (const int64_t value_width : {width, int64_t{1}, int64_t{64}, int64_t{600}}) {
          const SupportAttentionShape shape{dtype, 5, 5, 9, heads, width, value_width, 1, nullptr, nullptr};
          for (const bool aligned : {false, true}) {
            const plan::Layout layout = plan::layout(shape, aligned);
            const int bytes = plan::element_bytes(dtype);
            complain(layout.packed != (aligned && width * bytes % 16 == 0 && value_width * bytes % 16 == 0), "packed",
                     width, value_width, bytes);
            complain(layout.size != (layout.packed ? 16 / bytes : 1), "elements of a vector", width, value_width);
            complain(layout.lanes != 8 && layout.lanes != 16 && layout.lanes != 32, "lanes", layout.lanes);
            const int64_t widest = std::max(width, value_width);
            complain(layout.lanes < 32 && layout.lanes * layout.size < widest, "a head that its lanes do not hold",
                     width, value_width);
            complain(layout.lanes > 8 && layout.lanes / 2 * layout.size >= widest, "idle lanes", width, value_width);
            complain(int64_t{layout.slices} * layout.heads_per_warp() < heads, "heads left out", heads, layout.lanes);
            complain((layout.slices - 1) * layout.heads_per_warp() >= heads, "an empty slice", heads, layout.lanes);
            complain(plan::kSharedScores < 32 * layout.heads_per_warp(), "scores in shared memory", layout.lanes);
          }
        }
}

// Rows side by side in the transposed index, of lengths around what matters: no slot twice, each within the memory and
// found from its own position.
void check_slots(int shift) {
  const int64_t length = int64_t{1} << shift;
  const int64_t step = length / 2;
  const std::vector<int64_t> sizes = {
      0,          1,          step - 1,       step,       step + 1,       length - 1,        length,
      length + 1, length + 5, 2 * length - 1, 2 * length, 2 * length + 1, 3 * length + step, 5 * length - 1};
  for (int64_t start = 0; start < 2 * length; start += length > 64 ? 7 : 1)
    for (const int64_t first : sizes)
      for (const int64_t second : sizes)
        for (const int64_t third : sizes) {
          std::set<int64_t> taken;
          int64_t begin = start;
          const int64_t entries = start + first + second + third;
          for (const int64_t size : {first, second, third}) {
            const int64_t end = begin + size;
            const plan::Slots slots = plan::slots_of(begin, end, shift);
            if (size > length) {
              complain(slots.count * length < size || (slots.count - 1) * length >= size, "segments", begin, end);
              for (int64_t slot = slots.first; slot < slots.first + slots.count; ++slot) {
                const int64_t position = slot * step + step - 1;
                complain(!taken.insert(slot).second, "a slot of two segments", slot, begin, end);
                complain(position < begin || position >= end, "a slot that does not find its row", slot, begin, end);
                complain(slot >= entries / step, "a slot outside the memory", slot, entries);
              }
            }
            begin = end;
          }
        }
}

void check_backward() {
  for (const int64_t queries : {0, 1, 7, 8, 64, 65, 4096, 65536})
    for (const int64_t pool_rows : {0, 1, 8, 63, 4096, 100000})
      for (const int64_t entries : {0, 1, 63, 64, 65, 2000, 3000000})
        for (const int64_t heads : {1, 8, 9})
          for (const int wanted : {1, 2, 3}) {
            if (entries > 0 && (queries == 0 || pool_rows == 0)) continue;
            const SupportAttentionShape shape{DType::float32, queries, pool_rows, entries, heads, 16, 32, 1,
                                              nullptr,        nullptr};
            const plan::Layout layout = plan::layout(shape, true);
            const bool wants_queries = (wanted & 1) != 0, wants_pool = (wanted & 2) != 0;
            const plan::Backward backward = plan::backward(shape, layout.slices, wants_queries, wants_pool, 132);
            const plan::Segments segments = plan::segments(shape);
            complain(segments.shift < plan::kSegmentShift || segments.slots * segments.step() > entries, "segments",
                     entries, segments.length());
            complain(segments.slots == 0 && entries > segments.length(), "rows that nobody sums", entries,
                     segments.length());
            complain(backward.segments.slots != (wants_pool ? segments.slots : 0), "slots", entries);
            complain(wants_queries && queries > 0 && backward.first_blocks == 0, "no query pass", queries);
            complain(backward.segments.slots > 0 && backward.first_blocks == 0, "counters that nobody zeroes", entries);
            complain(wants_pool && pool_rows > 0 && backward.second_blocks == 0 && !backward.cooperative,
                     "no pool pass", pool_rows);
            complain(backward.cooperative && backward.first_blocks > 132 * plan::kResidentBlocks,
                     "a cooperative grid that does not fit", backward.first_blocks);
            const plan::Workspace enough = plan::workspace(shape, heads),
                                  needed = plan::workspace(shape, layout.slices);
            complain(enough.bytes(shape.dtype) < needed.bytes(shape.dtype), "workspace", heads, layout.slices);
          }
}

}  // namespace

extern "C" {

const char* kernels_forward(const SupportAttentionArgs* args) { return support_attention(*args, nullptr); }
const char* kernels_backward(const SupportAttentionBackwardArgs* args, void* workspace) {
  return support_attention_backward(*args, workspace, nullptr);
}
int64_t kernels_workspace(const SupportAttentionShape* shape) { return support_attention_backward_workspace(*shape); }

// Launches of the backward, all gradients wanted, with so many multiprocessors.
int kernels_launches(const SupportAttentionShape* shape, int multiprocessors) {
  const plan::Layout layout = plan::layout(*shape, true);
  const plan::Backward backward = plan::backward(*shape, layout.slices, true, true, multiprocessors);
  return (backward.first_blocks > 0) + (backward.second_blocks > 0);
}

// Null, or the first thing that is wrong with the plan.
const char* kernels_plan() {
  complaint.clear();
  check_grids();
  check_layouts();
  check_slots(plan::kSegmentShift);
  check_slots(8);
  check_backward();
  return complaint.empty() ? nullptr : complaint.c_str();
}

void kernels_half_to_float(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_accumulate(Half{from[i]});
}
void kernels_bfloat16_to_float(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_accumulate(BFloat16{from[i]});
}
void kernels_float_to_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_accumulate<Half>(from[i]).bits;
}
void kernels_float_to_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_accumulate<BFloat16>(from[i]).bits;
}
}
