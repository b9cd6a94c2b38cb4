// What the tests' kernels have in common: arguments, and a table to start them by name from.
#pragma once

#include <map>
#include <string>

#include "launch.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {

constexpr unsigned kAll = 0xffffffffu;  // lanes

struct Arguments {
  void* pointer[4];
  int number[4];
};
template <class T>
FASTATTN_DEVICE T* pointer(const Arguments& a, int i) {
  return static_cast<T*>(a.pointer[i]);
}

using Kernel = void (*)(Arguments);
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> table;
  return table;
}
struct Registered {
  Registered(const char* name, Kernel kernel) { kernels()[name] = kernel; }
};
#define TEST_KERNEL(name) const Registered name##_registered(#name, name)

}  // namespace fastattn::cuda
