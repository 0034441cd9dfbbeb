// Binding of argument structs, with the extent of the memory behind every pointer.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace unitsface {

namespace py = pybind11;

// The Python value of a pointer: address and bytes of a dense tensor.
using Span = std::pair<std::uintptr_t, int64_t>;

// Binds an argument struct, constructed from keywords. Pointers are given as spans, or None for
// null. Each is bound with the extent that the kernels read or write: a span that is shorter,
// or missing, is refused.
template <class Args>
class Fields {
 public:
  using Extent = int64_t (*)(const Args&);

  Fields(py::module_& m, const char* name) : table_(std::make_shared<Table>()) {
    py::class_<Args>(m, name).def(
        py::init([table = table_](const py::kwargs& values) { return table->construct(values); }));
  }

  // A number, or a pointer without an extent; of the struct or of its base.
  template <class T, class Base>
  Fields& field(const char* name, T Base::* member) {
    return add<T>(name, member, nullptr, false);
  }

  // A pointer to `extent` elements, or to `extent` bytes if it is void.
  template <class T, class Base>
  Fields& field(const char* name, T* Base::* member, Extent extent) {
    return add<T*>(name, member, extent, false);
  }

  // The same, or null.
  template <class T, class Base>
  Fields& optional(const char* name, T* Base::* member, Extent extent) {
    return add<T*>(name, member, extent, true);
  }

  // A further condition, and the message of its failure.
  Fields& check(bool (*holds)(const Args&), const char* message) {
    table_->checks.push_back({holds, message});
    return *this;
  }

 private:
  struct Field {
    std::function<int64_t(Args&, const py::handle&)> set;  // returns the bytes of a span
    Extent extent;
    int64_t element_size;
    bool optional;
  };

  struct Table {
    std::vector<std::string> names;
    std::vector<Field> fields;
    std::unordered_map<std::string, size_t> places;
    std::vector<std::pair<bool (*)(const Args&), const char*>> checks;

    std::unique_ptr<Args> construct(const py::kwargs& values) const {
      auto args = std::make_unique<Args>();
      std::vector<int64_t> bytes(fields.size(), 0);
      for (const auto& [name, value] : values) {
        const auto found = places.find(py::cast<std::string>(name));
        if (found == places.end()) throw py::type_error("no field " + std::string(py::str(name)));
        bytes[found->second] = fields[found->second].set(*args, value);
      }
      for (const auto& [holds, message] : checks) {
        if (!holds(*args)) throw std::invalid_argument(message);
      }
      for (size_t k = 0; k < fields.size(); ++k) {
        const Field& field = fields[k];
        if (field.extent == nullptr || (field.optional && bytes[k] == 0)) continue;
        const int64_t needed = field.extent(*args) * field.element_size;
        if (bytes[k] >= needed) continue;
        throw std::invalid_argument(names[k] + " has " + std::to_string(bytes[k]) + " bytes of " +
                                    std::to_string(needed));
      }
      return args;
    }
  };

  template <class T>
  Fields& add(const char* name, T Args::* member, Extent extent, bool optional) {
    int64_t element_size = 1;
    if constexpr (std::is_pointer_v<T>) {
      using Element = std::remove_pointer_t<T>;
      if constexpr (!std::is_void_v<Element>) element_size = sizeof(Element);
    }
    const auto set = [member](Args& args, const py::handle& value) -> int64_t {
      if constexpr (std::is_pointer_v<T>) {
        if (value.is_none()) return 0;
        const auto span = value.cast<Span>();
        args.*member = reinterpret_cast<T>(span.first);
        return span.second;
      } else if constexpr (std::is_enum_v<T>) {
        args.*member = static_cast<T>(value.cast<int>());
      } else {
        args.*member = value.cast<T>();
      }
      return 0;
    };
    table_->places[name] = table_->fields.size();
    table_->names.push_back(name);
    table_->fields.push_back({set, extent, element_size, optional});
    return *this;
  }

  std::shared_ptr<Table> table_;
};

}  // namespace unitsface
