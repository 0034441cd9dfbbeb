// Functions and values of an extension module, in Python's stable ABI: one build serves Python 3.10
// and every later one. A C++ function's own signature says how its arguments are converted.
#pragma once

// Defined by setup.py where there is no stable ABI.
#if !defined(Py_LIMITED_API) && !defined(UF_ONE_PYTHON)
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <array>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace unitsface {

// The Python value of a pointer: a dense tensor, its address and bytes, or None.
using Span = std::pair<std::uintptr_t, int64_t>;

// Thrown where a Python exception is already set.
struct PythonError {};

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

[[noreturn]] inline void type_error(const std::string& message) {
  PyErr_SetString(PyExc_TypeError, message.c_str());
  throw PythonError();
}

class Owned {
 public:
  explicit Owned(PyObject* object) : object_(checked(object)) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_DECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

inline std::string name_of(PyTypeObject* type);

inline std::string from_text(PyObject* value) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(value, &size);
  if (text != nullptr) return {text, static_cast<size_t>(size)};
  if (!PyUnicode_Check(value)) type_error("expected a string, got " + name_of(Py_TYPE(value)));
  throw PythonError();
}

inline std::string name_of(PyTypeObject* type) {
  const Owned name(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__name__"));
  return from_text(name.get());
}

// The Python exception of the C++ exception that is being handled.
inline PyObject* raised() noexcept {
  try {
    throw;
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// --- types ------------------------------------------------------------------------------------

// A Python object that is an argument struct, and its type; see fields.h.
template <class Args>
struct Instance {
  PyObject_HEAD Args args;
};

template <class Args>
inline PyTypeObject* instance_type = nullptr;

// --- conversions ------------------------------------------------------------------------------

using Params = std::vector<float>;

template <class T>
T from_integer(PyObject* value) {
  if constexpr (std::is_signed_v<T>) {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred() != nullptr) throw PythonError();
    if (static_cast<T>(number) == number) return static_cast<T>(number);
  } else {
    const unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (number == ~0ULL && PyErr_Occurred() != nullptr) throw PythonError();
    if (static_cast<T>(number) == number) return static_cast<T>(number);
  }
  PyErr_SetString(PyExc_OverflowError, "integer too large");
  throw PythonError();
}

inline double from_float(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred() != nullptr) throw PythonError();
  return number;
}

// What a tensor says of itself, by the name of an attribute or of a method without arguments.
struct TensorNames {
  PyObject* address = checked(PyUnicode_InternFromString("data_ptr"));
  PyObject* bytes = checked(PyUnicode_InternFromString("nbytes"));
  PyObject* element_size = checked(PyUnicode_InternFromString("element_size"));
  PyObject* dense = checked(PyUnicode_InternFromString("is_contiguous"));
  PyObject* shape = checked(PyUnicode_InternFromString("shape"));
  PyObject* stride = checked(PyUnicode_InternFromString("stride"));
};

inline const TensorNames& tensor_names() {
  static const TensorNames names;  // as long as the process
  return names;
}

template <class T>
T call_for(PyObject* object, PyObject* method) {
  return from_integer<T>(Owned(PyObject_CallMethodObjArgs(object, method, nullptr)).get());
}

inline Span from_tensor(PyObject* tensor) {
  const TensorNames& names = tensor_names();
  if (call_for<int>(tensor, names.dense) == 0) throw std::invalid_argument("a tensor is not dense");
  const Owned bytes(PyObject_GetAttr(tensor, names.bytes));
  return {call_for<std::uintptr_t>(tensor, names.address), from_integer<int64_t>(bytes.get())};
}

inline Span from_span(PyObject* value) {
  if (value == Py_None) return {0, 0};
  if (!PyTuple_Check(value) && PyObject_HasAttr(value, tensor_names().address)) {
    return from_tensor(value);
  }
  if (!PyTuple_Check(value) || PyTuple_Size(value) != 2) {
    type_error("expected a tensor, or an address and a size in bytes, got " +
               name_of(Py_TYPE(value)));
  }
  return {from_integer<std::uintptr_t>(PyTuple_GetItem(value, 0)),
          from_integer<int64_t>(PyTuple_GetItem(value, 1))};
}

inline Params from_numbers(PyObject* value) {
  const Owned numbers(PySequence_Tuple(value));
  const Py_ssize_t count = PyTuple_Size(numbers.get());
  Params params(static_cast<size_t>(count));
  for (Py_ssize_t k = 0; k < count; ++k) {
    params[static_cast<size_t>(k)] =
        static_cast<float>(from_float(PyTuple_GetItem(numbers.get(), k)));
  }
  return params;
}

// A matrix of a tensor, with any strides.
struct Matrix {
  std::uintptr_t address;
  int64_t element_size;
  std::array<int64_t, 2> size, stride;
};

inline std::array<int64_t, 2> from_two(PyObject* value) {
  if (PyTuple_Size(value) != 2) throw std::invalid_argument("a tensor is not a matrix");
  return {from_integer<int64_t>(PyTuple_GetItem(value, 0)),
          from_integer<int64_t>(PyTuple_GetItem(value, 1))};
}

inline Matrix from_matrix(PyObject* tensor) {
  const TensorNames& names = tensor_names();
  const Owned shape(PyObject_GetAttr(tensor, names.shape));
  const Owned stride(PyObject_CallMethodObjArgs(tensor, names.stride, nullptr));
  return {call_for<std::uintptr_t>(tensor, names.address),
          call_for<int64_t>(tensor, names.element_size), from_two(shape.get()),
          from_two(stride.get())};
}

template <class T>
constexpr bool kIsVector = false;
template <class T>
constexpr bool kIsVector<std::vector<T>> = true;

template <class T>
constexpr bool kIsTuple = false;
template <class... T>
constexpr bool kIsTuple<std::tuple<T...>> = true;

template <class T>
decltype(auto) from_python(PyObject* value);

template <class T, size_t... k>
T from_tuple(PyObject* value, std::index_sequence<k...>) {
  return T{from_python<std::tuple_element_t<k, T>>(PyTuple_GetItem(value, k))...};
}

// A parameter of type T; of an argument struct, a reference to the one in `value`.
template <class T>
decltype(auto) from_python(PyObject* value) {
  using Value = std::decay_t<T>;
  if constexpr (std::is_same_v<Value, bool>) {
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw PythonError();
    return truth != 0;
  } else if constexpr (std::is_integral_v<Value>) {
    return from_integer<Value>(value);
  } else if constexpr (std::is_enum_v<Value>) {
    return static_cast<Value>(from_integer<int>(value));
  } else if constexpr (std::is_floating_point_v<Value>) {
    return static_cast<Value>(from_float(value));
  } else if constexpr (std::is_same_v<Value, std::string>) {
    return from_text(value);
  } else if constexpr (std::is_same_v<Value, Span>) {
    return from_span(value);
  } else if constexpr (std::is_same_v<Value, Params>) {
    return from_numbers(value);
  } else if constexpr (std::is_same_v<Value, Matrix>) {
    return from_matrix(value);
  } else if constexpr (kIsVector<Value>) {
    const Owned items(PySequence_Tuple(value));
    Value values;
    for (Py_ssize_t k = 0; k < PyTuple_Size(items.get()); ++k) {
      values.push_back(from_python<typename Value::value_type>(PyTuple_GetItem(items.get(), k)));
    }
    return values;
  } else if constexpr (kIsTuple<Value>) {
    constexpr auto kSize = std::tuple_size_v<Value>;
    if (!PyTuple_Check(value) || PyTuple_Size(value) != static_cast<Py_ssize_t>(kSize)) {
      type_error("expected a tuple of " + std::to_string(kSize));
    }
    return from_tuple<Value>(value, std::make_index_sequence<kSize>());
  } else {
    PyTypeObject* type = instance_type<Value>;
    if (Py_TYPE(value) != type) {
      type_error("expected " + name_of(type) + ", got " + name_of(Py_TYPE(value)));
    }
    return static_cast<const Value&>(reinterpret_cast<Instance<Value>*>(value)->args);
  }
}

template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
PyObject* to_python(T value) {
  if constexpr (std::is_same_v<T, bool>) return PyBool_FromLong(value);
  if constexpr (std::is_signed_v<T>) return PyLong_FromLongLong(value);
  return PyLong_FromUnsignedLongLong(value);
}

inline PyObject* to_python(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}

template <class T>
PyObject* to_python(const std::vector<T>& values) {
  PyObject* list = checked(PyList_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t k = 0; k < values.size(); ++k) {
    PyList_SetItem(list, static_cast<Py_ssize_t>(k), to_python(values[k]));
  }
  return list;
}

template <class A, class B>
PyObject* to_python(const std::pair<A, B>& values) {
  const Owned first(to_python(values.first)), second(to_python(values.second));
  return PyTuple_Pack(2, first.get(), second.get());
}

// --- functions --------------------------------------------------------------------------------

// The interpreter's lock is released while the function runs.
struct Unlock {};

class Unlocked {
 public:
  explicit Unlocked(bool unlock) : state_(unlock ? PyEval_SaveThread() : nullptr) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
};

// What a function of the module calls; lives as long as the process.
class Callable {
 public:
  virtual ~Callable() = default;
  virtual PyObject* call(PyObject* const* args, Py_ssize_t count, PyObject* names) = 0;

  // A new function of Python, which keeps the address of its name.
  PyObject* function(std::string name) {
    const auto run = &Callable::run;
    name_ = std::move(name);
    definition_ = {name_.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)),
                   METH_FASTCALL | METH_KEYWORDS, nullptr};
    const Owned self(PyCapsule_New(this, nullptr, nullptr));
    return checked(PyCFunction_NewEx(&definition_, self.get(), nullptr));
  }

 private:
  static PyObject* run(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    try {
      auto* callable = static_cast<Callable*>(PyCapsule_GetPointer(self, nullptr));
      return callable->call(args, count, names);
    } catch (...) {
      return raised();
    }
  }

  std::string name_;
  PyMethodDef definition_ = {};
};

template <class F, class R, class... Parameters>
class Function final : public Callable {
 public:
  Function(F function, bool unlock) : function_(std::move(function)), unlock_(unlock) {}

  PyObject* call(PyObject* const* args, Py_ssize_t count, PyObject* names) override {
    constexpr auto kCount = static_cast<Py_ssize_t>(sizeof...(Parameters));
    if (count != kCount || names != nullptr) {
      type_error("expected " + std::to_string(kCount) + " positional arguments, got " +
                 std::to_string(count) + (names == nullptr ? "" : " and keywords"));
    }
    return call(args, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... k>
  PyObject* call(PyObject* const* args, std::index_sequence<k...>) {
    // Braces: converted in order.
    std::tuple<decltype(from_python<Parameters>(nullptr))...> values{
        from_python<Parameters>(args[k])...};
    if constexpr (std::is_void_v<R>) {
      run(std::move(std::get<k>(values))...);
      Py_INCREF(Py_None);
      return Py_None;
    } else {
      return to_python(run(std::move(std::get<k>(values))...));
    }
  }

  template <class... Values>
  R run(Values&&... values) {
    const Unlocked unlocked(unlock_);
    return function_(std::forward<Values>(values)...);
  }

  F function_;
  bool unlock_;
};

template <class F, class R, class... Parameters>
Callable* callable(F f, bool unlock, R (*)(Parameters...)) {
  return new Function<F, R, Parameters...>(std::move(f), unlock);
}

template <class F, class R, class L, class... Parameters>
Callable* callable(F f, bool unlock, R (L::*)(Parameters...) const) {
  return new Function<F, R, Parameters...>(std::move(f), unlock);
}

class Module {
 public:
  explicit Module(PyObject* module) : module_(module) {}

  // A function, function pointer or lambda; with Unlock(), without the interpreter's lock.
  template <class F>
  void def(const char* name, F function) {
    add(name, function, false);
  }

  template <class F>
  void def(const char* name, F function, Unlock) {
    add(name, function, true);
  }

  template <class T>
  void set(const char* name, const T& value) {
    set_object(name, to_python(value));
  }

  // Takes the reference.
  void set_object(const char* name, PyObject* value) {
    const Owned owned(value);
    if (PyObject_SetAttrString(module_, name, value) < 0) throw PythonError();
  }

  // An attribute of the module; not imported by its name.
  Module submodule(const char* name) {
    const std::string full = std::string(PyModule_GetName(module_)) + "." + name;
    PyObject* made = checked(PyModule_New(full.c_str()));
    set_object(name, made);
    return Module(made);  // alive as long as this module
  }

 private:
  template <class F>
  void add(const char* name, F function, bool unlock) {
    if constexpr (std::is_pointer_v<F>) {
      set_object(name, callable(function, unlock, function)->function(name));
    } else {
      set_object(name, callable(function, unlock, &F::operator())->function(name));
    }
  }

  PyObject* module_;
};

}  // namespace unitsface
