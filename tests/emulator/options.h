// What a launch checks, and how adversarial it is.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

// When an asynchronous copy is carried out; until then its destination is all ones (NaN).
enum class Completion {
  kEager,   // as it is issued
  kLazy,    // as it is waited for
  kRandom,  // somewhere between
};

struct Options {
  Completion completion = Completion::kLazy;
  uint64_t seed = 0;    // of the order of warps and blocks; 0: as numbered
  bool races = true;    // races and reads of uninitialised shared memory
  bool banks = false;   // counts conflicts of shared memory's banks: emulator_bank_conflicts
  bool coarse = false;  // arithmetic is as inexact as a GPU's may be: coarse.h
  bool co_scheduled =
      false;  // all blocks of a grid are in flight, for those that wait on each other
  int shared_limit = 227 * 1024;  // bytes a block may ask for
  // Plants a fault: the barriers, waits and fences at this place, such as "attn_fwd.cuh:101", do
  // nothing. "?" only lists the places that are passed (emulator_passed_places).
  std::string without;
  int fault = 0;  // of those planted in the kernels themselves: runtime.h's is_planted
};

// The options of the next launch: at first those in the environment variable FASTATTN_EMULATOR.
Options& options();

// From a text such as
// "lazy,seed=3,races=0,co_scheduled=1,banks=1,shared_limit=65536,without=x.cuh:5,fault=7"; what
// isn't named has its default. Throws std::invalid_argument.
Options parse_options(const std::string& text);

}  // namespace emulator
