// How often shared memory has to be asked for what a warp accesses at once, by the lanes'
// addresses.
//
// Of its 32 banks of 4 bytes each gives one word a wavefront, to all lanes that want it. An access
// is carried out in phases of lanes that make up 128 bytes: all 32 with 4 bytes or less each, 16
// with 8, 8 with 16, as ldmatrix's rows have. What a phase needs beyond one wavefront are
// conflicts.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "site.h"

namespace emulator {

// What the lanes of a warp have accessed since they last met. They run one after another: the nth
// access of a lane at a place belongs to the nth of the others. Where some come more often than
// others, as in a loop that not all run to the end, nobody knows which belong together.
class WarpAccesses {
 public:
  void note(int lane, std::ptrdiff_t offset, size_t bytes, const char* what, Site site,
            const void* pc);
  // The lanes meet: adds up what there is.
  void settle();

 private:
  struct Place {
    Site site;
    const void* pc;
    size_t bytes;
    bool operator<(const Place& other) const;
  };
  struct Accesses {
    const char* what;
    std::array<size_t, 32> count{};                  // of each lane
    std::vector<std::array<std::ptrdiff_t, 32>> at;  // offsets; −1 where a lane has none
  };
  std::map<Place, Accesses> places_;
};

}  // namespace emulator

// "place instruction accesses wavefronts conflicts uncounted", a line for each, of launches with
// the option `banks` since the last call.
extern "C" const char* emulator_bank_conflicts();
