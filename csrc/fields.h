// Binding of argument structs, with the extent of the memory behind every pointer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "binding.h"

namespace unitsface {

// Converts a value into the member at `member`; returns the bytes of a span.
template <class T>
int64_t set_member(void* member, PyObject* value) {
  T& target = *static_cast<T*>(member);
  if constexpr (!std::is_pointer_v<T>) {
    target = from_python<T>(value);
    return 0;
  } else {
    const Span span = from_span(value);
    target = reinterpret_cast<T>(span.first);
    return span.second;
  }
}

// The fields of a struct, of whichever type.
class FieldTable {
 public:
  static constexpr size_t kMost = 64;
  using Bytes = std::array<int64_t, kMost>;

  void add(const char* name, size_t offset, int64_t (*set)(void*, PyObject*)) {
    if (names_.size() == kMost) throw std::length_error("too many fields");
    names_.push_back(checked(PyUnicode_InternFromString(name)));
    fields_.push_back({offset, set});
  }

  size_t size() const { return fields_.size(); }
  std::string name(size_t k) const { return from_text(names_[k]); }

  // Sets the members of the struct at `target` that are given by keyword.
  void read(char* target, Bytes& bytes, PyObject* const* values, PyObject* keywords) const {
    if (keywords == nullptr) return;
    const Py_ssize_t count = PyTuple_Size(keywords);
    size_t place = 0;
    for (Py_ssize_t k = 0; k < count; ++k) {
      place = find(PyTuple_GetItem(keywords, k), place);
      bytes[place] = fields_[place].set(target + fields_[place].offset, values[k]);
      ++place;
    }
  }

 private:
  struct Field {
    size_t offset;
    int64_t (*set)(void*, PyObject*);
  };

  // The field of a name. Names in calls are interned, and mostly in the order of the fields.
  size_t find(PyObject* name, size_t expected) const {
    const size_t count = names_.size();
    for (size_t k = expected; k < count; ++k) {
      if (names_[k] == name) return k;
    }
    for (size_t k = 0; k < expected; ++k) {
      if (names_[k] == name) return k;
    }
    for (size_t k = 0; k < count; ++k) {
      if (PyUnicode_Compare(names_[k], name) == 0) return k;
    }
    type_error("no field " + from_text(name));
  }

  std::vector<PyObject*> names_;
  std::vector<Field> fields_;
};

// Binds an argument struct, constructed from keywords. Pointers are given as spans, of which None
// is null. Each is bound with the extent that the kernels read or write: a span that is shorter, or
// missing, is refused.
template <class Args>
class Fields {
 public:
  using Extent = int64_t (*)(const Args&);

  Fields(Module& m, const char* name) : constructor_(new Constructor(name)) {
    m.set_object(name, constructor_->function(name));
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
    constructor_->checks.push_back({holds, message});
    return *this;
  }

 private:
  // A pointer with an extent.
  struct Vector {
    size_t place;
    Extent extent;
    int64_t element_size;
    bool optional;
  };

  struct Constructor final : Callable {
    explicit Constructor(const char* name)
        : full_name(std::string("unitsface_kernels._native.") + name) {
      PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&release)}, {0, nullptr}};
      PyType_Spec spec = {full_name.c_str(), sizeof(Instance<Args>), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
      instance_type<Args> = reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpec(&spec)));
    }

    static void release(PyObject* self) {
      PyTypeObject* type = Py_TYPE(self);
      PyObject_Free(self);
      Py_DECREF(reinterpret_cast<PyObject*>(type));
    }

    PyObject* call(PyObject* const* values, Py_ssize_t count, PyObject* names) override {
      if (count != 0) type_error("arguments are given by keyword");
      Args args = Args();  // fields that are not given are 0
      FieldTable::Bytes bytes;
      std::memset(bytes.data(), 0, table.size() * sizeof(int64_t));
      table.read(reinterpret_cast<char*>(&args), bytes, values, names);
      for (const auto& [holds, message] : checks) {
        if (!holds(args)) throw std::invalid_argument(message);
      }
      for (const Vector& vector : vectors) {
        const int64_t given = bytes[vector.place];
        if (vector.optional && given == 0) continue;
        const int64_t needed = vector.extent(args) * vector.element_size;
        if (given >= needed) continue;
        throw std::invalid_argument(table.name(vector.place) + " has " + std::to_string(given) +
                                    " bytes of " + std::to_string(needed));
      }
      PyObject* made = checked(PyType_GenericAlloc(instance_type<Args>, 0));
      reinterpret_cast<Instance<Args>*>(made)->args = args;
      return made;
    }

    const std::string full_name;  // Python keeps its address.
    FieldTable table;
    std::vector<Vector> vectors;
    std::vector<std::pair<bool (*)(const Args&), const char*>> checks;
  };

  template <class T>
  Fields& add(const char* name, T Args::* member, Extent extent, bool optional) {
    static_assert(std::is_trivially_copyable_v<Args>);
    const Args args{};
    const auto offset =
        reinterpret_cast<const char*>(&(args.*member)) - reinterpret_cast<const char*>(&args);
    if constexpr (std::is_pointer_v<T>) {
      using Element = std::remove_pointer_t<T>;
      int64_t element_size = 1;
      if constexpr (!std::is_void_v<Element>) element_size = sizeof(Element);
      if (extent != nullptr) {
        constructor_->vectors.push_back(
            {constructor_->table.size(), extent, element_size, optional});
      }
    }
    constructor_->table.add(name, static_cast<size_t>(offset), &set_member<T>);
    return *this;
  }

  Constructor* constructor_;  // of the module, as long as the process
};

}  // namespace unitsface
