// Where in a kernel's source an emulated instruction stands. Every instruction takes one as its
// last argument, whose default is the caller's line: reports can name it, and lanes that meet in
// different instructions are told apart.
#pragma once

namespace emulator {

struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace emulator
