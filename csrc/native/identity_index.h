// Which rows belong to which identity, and the support sets drawn from that.
#pragma once

#include <cstdint>
#include <vector>

namespace lcr2s::native {

struct DrawOptions {
  int64_t max_support = 0;
  bool include_self = true;
  bool distinct_items = false;  // at most one row of an item in a set
  uint64_t seed = 0;
  uint64_t epoch = 0;
};

struct Draws {
  std::vector<int64_t> indptr;
  std::vector<int64_t> indices;
};

// Rows sorted by (identity, item, row). Rows of an identity that share an item, such as two captions of one image, are
// never in each other's support set.
class IdentityIndex {
 public:
  // `items` empty: every row is an item of its own.
  IdentityIndex(std::vector<int64_t> ids, const std::vector<int64_t>& items);

  int64_t num_rows() const { return static_cast<int64_t>(group_of_row_.size()); }
  int64_t num_identities() const { return static_cast<int64_t>(identities_.size()); }
  const std::vector<int64_t>& identities() const { return identities_; }
  // Number of the identity's group, -1 where there is none.
  int64_t find(int64_t identity) const;
  // The rows of a group in ascending order.
  std::vector<int64_t> rows_of(int64_t group) const;
  int64_t size_of(int64_t group) const { return group_start_[group + 1] - group_start_[group]; }

  // Set i holds up to max_support rows of the identity of rows[i], in ascending order, drawn without replacement from a
  // stream keyed by (seed, epoch, keys[i]); rows[i] itself goes first where asked for. Rows must be in [0, num_rows).
  Draws draw(const std::vector<int64_t>& rows, const std::vector<int64_t>& keys, const DrawOptions& options) const;

 private:
  std::vector<int64_t> identities_;    // ascending
  std::vector<int64_t> group_start_;   // (identities + 1) into sorted_rows_
  std::vector<int64_t> unit_start_;    // (identities + 1) into unit_bounds_: the items of a group
  std::vector<int64_t> unit_bounds_;   // (items + 1) into sorted_rows_
  std::vector<int64_t> sorted_rows_;   // by identity, item, row
  std::vector<int64_t> group_of_row_;  // position in identities_
  std::vector<int64_t> unit_of_row_;   // position in unit_bounds_
};

}  // namespace lcr2s::native
