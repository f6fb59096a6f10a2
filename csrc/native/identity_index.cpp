#include "identity_index.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "random.h"

namespace lcr2s::native {

IdentityIndex::IdentityIndex(std::vector<int64_t> ids, const std::vector<int64_t>& items) {
  const int64_t n = static_cast<int64_t>(ids.size());
  sorted_rows_.resize(n);
  std::iota(sorted_rows_.begin(), sorted_rows_.end(), int64_t{0});
  auto item = [&](int64_t row) { return items.empty() ? row : items[row]; };
  std::sort(sorted_rows_.begin(), sorted_rows_.end(), [&](int64_t a, int64_t b) {
    if (ids[a] != ids[b]) return ids[a] < ids[b];
    if (item(a) != item(b)) return item(a) < item(b);
    return a < b;
  });
  group_of_row_.resize(n);
  unit_of_row_.resize(n);
  for (int64_t position = 0; position < n; ++position) {
    const int64_t row = sorted_rows_[position];
    const bool new_group = position == 0 || ids[row] != identities_.back();
    if (new_group) {
      identities_.push_back(ids[row]);
      group_start_.push_back(position);
      unit_start_.push_back(static_cast<int64_t>(unit_bounds_.size()));
    }
    if (new_group || item(row) != item(sorted_rows_[position - 1])) unit_bounds_.push_back(position);
    group_of_row_[row] = static_cast<int64_t>(identities_.size()) - 1;
    unit_of_row_[row] = static_cast<int64_t>(unit_bounds_.size()) - 1;
  }
  group_start_.push_back(n);
  unit_start_.push_back(static_cast<int64_t>(unit_bounds_.size()));
  unit_bounds_.push_back(n);
}

int64_t IdentityIndex::find(int64_t identity) const {
  const auto found = std::lower_bound(identities_.begin(), identities_.end(), identity);
  if (found == identities_.end() || *found != identity) return -1;
  return found - identities_.begin();
}

std::vector<int64_t> IdentityIndex::rows_of(int64_t group) const {
  std::vector<int64_t> rows(sorted_rows_.begin() + group_start_[group], sorted_rows_.begin() + group_start_[group + 1]);
  std::sort(rows.begin(), rows.end());
  return rows;
}

// `count` different numbers below `total` into `chosen`.
static void sample(int64_t total, int64_t count, CounterRandom& random, std::vector<int64_t>& chosen) {
  chosen.clear();
  if (count >= total) {
    chosen.resize(total);
    std::iota(chosen.begin(), chosen.end(), int64_t{0});
  } else if (count <= 32) {
    // Floyd's algorithm (Bentley and Floyd, CACM 1987): no memory of the size of `total`.
    for (int64_t last = total - count; last < total; ++last) {
      const int64_t pick = static_cast<int64_t>(random.below(static_cast<uint64_t>(last) + 1));
      const bool taken = std::find(chosen.begin(), chosen.end(), pick) != chosen.end();
      chosen.push_back(taken ? last : pick);
    }
  } else {
    chosen.resize(total);
    std::iota(chosen.begin(), chosen.end(), int64_t{0});
    for (int64_t place = 0; place < count; ++place) {
      const int64_t other = place + static_cast<int64_t>(random.below(static_cast<uint64_t>(total - place)));
      std::swap(chosen[place], chosen[other]);
    }
    chosen.resize(count);
  }
}

Draws IdentityIndex::draw(const std::vector<int64_t>& rows, const std::vector<int64_t>& keys,
                          const DrawOptions& options) const {
  Draws draws;
  draws.indptr.reserve(rows.size() + 1);
  draws.indptr.push_back(0);
  std::vector<int64_t> chosen;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t row = rows[i];
    const int64_t group = group_of_row_[row];
    const int64_t unit = unit_of_row_[row];
    CounterRandom random({options.seed, options.epoch, static_cast<uint64_t>(keys[i])});
    if (options.include_self) draws.indices.push_back(row);
    const size_t first = draws.indices.size();
    // The row's own item is a stretch [own, own + length) of the candidates [start, start + total + length).
    int64_t start, own, length, total;
    if (options.distinct_items) {
      start = unit_start_[group];
      own = unit;
      length = 1;
      total = unit_start_[group + 1] - start - length;
    } else {
      start = group_start_[group];
      own = unit_bounds_[unit];
      length = unit_bounds_[unit + 1] - own;
      total = group_start_[group + 1] - start - length;
    }
    sample(total, options.max_support, random, chosen);
    for (int64_t pick : chosen) {
      int64_t candidate = start + pick;
      if (candidate >= own) candidate += length;
      draws.indices.push_back(sorted_rows_[options.distinct_items ? unit_bounds_[candidate] : candidate]);
    }
    std::sort(draws.indices.begin() + static_cast<std::ptrdiff_t>(first), draws.indices.end());
    draws.indptr.push_back(static_cast<int64_t>(draws.indices.size()));
  }
  return draws;
}

}  // namespace lcr2s::native
