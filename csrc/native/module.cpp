// The host-side module `lcr2s_ext.native`: checks its arguments, then calls plain C++ without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "identity_index.h"
#include "random.h"

#ifndef LCR2S_VERSION
#define LCR2S_VERSION ""
#endif
#ifndef LCR2S_CUDA_ARCHS
#define LCR2S_CUDA_ARCHS ""
#endif
#ifndef LCR2S_CUDA_COMPILER
#define LCR2S_CUDA_COMPILER ""
#endif
#ifndef LCR2S_CXX_COMPILER
#define LCR2S_CXX_COMPILER ""
#endif
#ifndef LCR2S_TORCH_BUILT_WITH
#define LCR2S_TORCH_BUILT_WITH ""
#endif

namespace py = pybind11;

namespace lcr2s::native {
namespace {

using Int64Array = py::array_t<int64_t>;

std::string type_name(const py::handle& value) { return py::str(py::type::handle_of(value).attr("__name__")); }

template <typename T>
void copy_strided(const py::array& array, std::vector<int64_t>& out) {
  const char* data = static_cast<const char*>(array.data());
  const py::ssize_t stride = array.strides(0);
  for (size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, data + static_cast<py::ssize_t>(i) * stride, sizeof(T));
    out[i] = static_cast<int64_t>(value);
  }
}

std::vector<int64_t> integers(const char* name, const py::object& value) {
  if (!py::isinstance<py::array>(value)) {
    throw py::type_error(std::string("`") + name + "` must be a numpy array of int32 or int64, got " +
                         type_name(value));
  }
  const py::array array = py::reinterpret_borrow<py::array>(value);
  const bool wide = array.dtype().equal(py::dtype::of<int64_t>());
  if (!wide && !array.dtype().equal(py::dtype::of<int32_t>())) {
    throw py::type_error(std::string("`") + name + "` must be int32 or int64, got dtype " +
                         std::string(py::str(array.dtype())));
  }
  if (array.ndim() != 1) {
    throw py::value_error(std::string("`") + name + "` must have one dimension, got " + std::to_string(array.ndim()));
  }
  std::vector<int64_t> result(static_cast<size_t>(array.shape(0)));
  if (wide) {
    copy_strided<int64_t>(array, result);
  } else {
    copy_strided<int32_t>(array, result);
  }
  return result;
}

uint64_t natural(const char* name, const py::object& value) {
  if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) {
    throw py::type_error(std::string("`") + name + "` must be an int, got " + type_name(value));
  }
  const uint64_t result = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string("`") + name + "` must be in [0, 2**64), got " + std::string(py::str(value)));
  }
  return result;
}

int64_t count(const char* name, const py::object& value) {
  const uint64_t result = natural(name, value);
  if (result > static_cast<uint64_t>(INT64_MAX)) {
    throw py::value_error(std::string("`") + name + "` must be in [0, 2**63), got " + std::string(py::str(value)));
  }
  return static_cast<int64_t>(result);
}

void check_length(const char* name, size_t length, const char* other, size_t expected) {
  if (length != expected) {
    throw py::value_error(std::string("`") + name + "` must have as many elements as `" + other + "` (" +
                          std::to_string(expected) + "), got " + std::to_string(length));
  }
}

// Hands a vector's memory to numpy without a copy.
Int64Array to_array(std::vector<int64_t> values) {
  auto owner = std::make_unique<std::vector<int64_t>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owner->size());
  const int64_t* data = owner->data();
  py::capsule base(owner.release(), [](void* pointer) { delete static_cast<std::vector<int64_t>*>(pointer); });
  return Int64Array({size}, {static_cast<py::ssize_t>(sizeof(int64_t))}, data, base);
}

std::unique_ptr<IdentityIndex> make_index(const py::object& ids, const py::object& item_ids) {
  std::vector<int64_t> id_values = integers("ids", ids);
  std::vector<int64_t> items;
  if (!item_ids.is_none()) {
    items = integers("item_ids", item_ids);
    check_length("item_ids", items.size(), "ids", id_values.size());
  }
  const py::gil_scoped_release unlocked;
  return std::make_unique<IdentityIndex>(std::move(id_values), items);
}

py::tuple draw(const IdentityIndex& index, const py::object& rows, const py::object& max_support,
               const py::object& keys, bool include_self, bool distinct_items, const py::object& seed,
               const py::object& epoch) {
  std::vector<int64_t> row_values;
  if (rows.is_none()) {
    row_values.resize(static_cast<size_t>(index.num_rows()));
    std::iota(row_values.begin(), row_values.end(), int64_t{0});
  } else {
    row_values = integers("rows", rows);
  }
  for (int64_t row : row_values) {
    if (row < 0 || row >= index.num_rows()) {
      throw py::value_error("`rows` must lie in [0, " + std::to_string(index.num_rows()) + "), got " +
                            std::to_string(row));
    }
  }
  std::vector<int64_t> key_values = keys.is_none() ? row_values : integers("keys", keys);
  check_length("keys", key_values.size(), "rows", row_values.size());
  DrawOptions options;
  options.max_support = count("max_support", max_support);
  options.include_self = include_self;
  options.distinct_items = distinct_items;
  options.seed = natural("seed", seed);
  options.epoch = natural("epoch", epoch);
  Draws draws;
  {
    const py::gil_scoped_release unlocked;
    draws = index.draw(row_values, key_values, options);
  }
  return py::make_tuple(to_array(std::move(draws.indptr)), to_array(std::move(draws.indices)));
}

Int64Array permutation(const py::object& size, const py::object& seed, const py::object& epoch) {
  std::vector<int64_t> order(static_cast<size_t>(count("size", size)));
  CounterRandom random({natural("seed", seed), natural("epoch", epoch)});
  {
    const py::gil_scoped_release unlocked;
    std::iota(order.begin(), order.end(), int64_t{0});
    for (size_t left = order.size(); left > 1; --left) std::swap(order[left - 1], order[random.below(left)]);
  }
  return to_array(std::move(order));
}

py::dict build_info() {
  py::dict info;
  info["version"] = LCR2S_VERSION;
  info["C++ compiler"] = LCR2S_CXX_COMPILER;
  info["CUDA compiler"] = LCR2S_CUDA_COMPILER;
  info["CUDA architectures"] = LCR2S_CUDA_ARCHS;
  info["built with torch"] = LCR2S_TORCH_BUILT_WITH;
  return info;
}

}  // namespace
}  // namespace lcr2s::native

PYBIND11_MODULE(native, m) {
  using lcr2s::native::IdentityIndex;
  m.doc() = "Host-side C++ of lcr2s_ext: identity index, seeded support draws, build information.";

  py::class_<IdentityIndex>(m, "IdentityIndex",
                            "Rows grouped by identity; draws support sets.\n\n"
                            "Args:\n"
                            "    ids: (n,) int32 or int64, the identity of each row.\n"
                            "    item_ids: (n,) int32 or int64; rows of one identity with the same item are never in\n"
                            "        each other's support. None: every row is an item of its own.")
      .def(py::init(&lcr2s::native::make_index), py::arg("ids"), py::arg("item_ids") = py::none())
      .def("__len__", &IdentityIndex::num_rows)
      .def_property_readonly("num_rows", &IdentityIndex::num_rows, "n, the number of rows.")
      .def_property_readonly("num_identities", &IdentityIndex::num_identities, "Number of different identities.")
      .def_property_readonly(
          "identities", [](const IdentityIndex& index) { return lcr2s::native::to_array(index.identities()); },
          "(num_identities,) int64, ascending.")
      .def_property_readonly(
          "sizes",
          [](const IdentityIndex& index) {
            std::vector<int64_t> sizes(static_cast<size_t>(index.num_identities()));
            for (size_t group = 0; group < sizes.size(); ++group) {
              sizes[group] = index.size_of(static_cast<int64_t>(group));
            }
            return lcr2s::native::to_array(std::move(sizes));
          },
          "(num_identities,) int64, the number of rows of each identity in `identities`.")
      .def(
          "rows",
          [](const IdentityIndex& index, int64_t identity) {
            const int64_t group = index.find(identity);
            if (group < 0) throw py::key_error("no row has identity " + std::to_string(identity));
            return lcr2s::native::to_array(index.rows_of(group));
          },
          py::arg("identity"), "The rows of an identity, int64, ascending. KeyError where there is none.")
      .def("draw", &lcr2s::native::draw, py::arg("rows") = py::none(), py::kw_only(), py::arg("max_support"),
           py::arg("keys") = py::none(), py::arg("include_self") = true, py::arg("distinct_items") = false,
           py::arg("seed"), py::arg("epoch") = 0,
           "Draws a support set for each of `rows` (None: every row): up to `max_support` other rows of its identity,\n"
           "without replacement, never one of its own item.\n\n"
           "The draw of row i depends on (seed, epoch, keys[i]) alone; keys default to the rows themselves.\n"
           "`distinct_items` takes at most one row of an item, its first. Returns (indptr (B + 1,), indices (nnz,)),\n"
           "int64: the row itself first where `include_self`, then the drawn rows in ascending order.");

  m.def(
      "draw_support",
      [](const py::object& ids, const py::object& max_support, const py::object& item_ids, const py::object& rows,
         const py::object& keys, bool include_self, bool distinct_items, const py::object& seed,
         const py::object& epoch) {
        return lcr2s::native::draw(*lcr2s::native::make_index(ids, item_ids), rows, max_support, keys, include_self,
                                   distinct_items, seed, epoch);
      },
      py::arg("ids"), py::arg("max_support"), py::kw_only(), py::arg("item_ids") = py::none(),
      py::arg("rows") = py::none(), py::arg("keys") = py::none(), py::arg("include_self") = true,
      py::arg("distinct_items") = false, py::arg("seed"), py::arg("epoch") = 0,
      "IdentityIndex(ids, item_ids).draw(rows, ...) for an index that is used once.");
  m.def("permutation", &lcr2s::native::permutation, py::arg("size"), py::kw_only(), py::arg("seed"),
        py::arg("epoch") = 0, "A permutation of 0..size-1, int64, determined by (seed, epoch).");
  m.def("build_info", &lcr2s::native::build_info,
        "What the build says of itself: names to text, empty where there is nothing to say.");
}
