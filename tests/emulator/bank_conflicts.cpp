#include "bank_conflicts.h"

#include <algorithm>
#include <tuple>

#include "report.h"

namespace emulator {
namespace {

constexpr int kBanks = 32, kWordBytes = 4, kPhaseBytes = 128;

struct Tally {
  int64_t accesses = 0, wavefronts = 0, conflicts = 0, uncounted = 0;
};
std::map<std::string, Tally> tallies;  // by place and instruction

// Of the lanes [first, first + lanes), `bytes` each.
int wavefronts(const std::array<std::ptrdiff_t, 32>& at, int first, int lanes, size_t bytes) {
  std::vector<std::ptrdiff_t> words;
  for (int lane = first; lane < first + lanes; ++lane) {
    if (at[lane] < 0) continue;
    const auto end = at[lane] + static_cast<std::ptrdiff_t>(bytes);
    for (auto word = at[lane] / kWordBytes; word * kWordBytes < end; ++word) words.push_back(word);
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  std::array<int, kBanks> wanted{};
  for (const auto word : words) ++wanted[word % kBanks];
  return *std::max_element(wanted.begin(), wanted.end());
}

}  // namespace

bool WarpAccesses::Place::operator<(const Place& other) const {
  return std::tie(site.file, site.line, pc, bytes) <
         std::tie(other.site.file, other.site.line, other.pc, other.bytes);
}

void WarpAccesses::note(int lane, std::ptrdiff_t offset, size_t bytes, const char* what, Site site,
                        const void* pc) {
  if (bytes > 16) return;  // no lane's own
  Accesses& accesses = places_[{site, pc, bytes}];
  accesses.what = what;
  const size_t n = accesses.count[lane]++;
  if (n == accesses.at.size()) accesses.at.emplace_back().fill(-1);
  accesses.at[n][lane] = offset;
}

void WarpAccesses::settle() {
  for (const auto& [place, accesses] : places_) {
    const int lanes = std::min<int>(32, kPhaseBytes / static_cast<int>(place.bytes));
    Tally& tally = tallies[place_name(place.site, place.pc) + " " + accesses.what];
    const auto comes = [&](size_t count) { return count == 0 || count == accesses.at.size(); };
    if (!std::all_of(accesses.count.begin(), accesses.count.end(), comes)) {
      tally.uncounted += static_cast<int64_t>(accesses.at.size());
      continue;
    }
    for (const auto& at : accesses.at) {
      ++tally.accesses;
      for (int first = 0; first < 32; first += lanes) {
        const int needed = wavefronts(at, first, lanes, place.bytes);
        tally.wavefronts += needed;
        tally.conflicts += std::max(0, needed - 1);
      }
    }
  }
  places_.clear();
}

}  // namespace emulator

extern "C" const char* emulator_bank_conflicts() {
  static std::string text;
  text.clear();
  for (const auto& [name, tally] : emulator::tallies) {
    text += name + " " + std::to_string(tally.accesses) + " " + std::to_string(tally.wavefronts) +
            " " + std::to_string(tally.conflicts) + " " + std::to_string(tally.uncounted) + "\n";
  }
  emulator::tallies.clear();
  return text.c_str();
}
