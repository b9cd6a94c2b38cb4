#include "planted_fault.h"

#include "runtime.h"

#include <cstring>
#include <set>
#include <string>
#include <utility>

namespace emulator {
namespace {

std::set<std::pair<std::string, int>> passed;  // file and line

std::string to_string(const std::pair<std::string, int>& place) {
  return place.first + ":" + std::to_string(place.second);
}

}  // namespace

bool is_planted(int fault) { return options().fault == fault; }

bool is_missing(Site site) {
  const char* name = std::strrchr(site.file, '/');
  const auto place = *passed.emplace(name == nullptr ? site.file : name + 1, site.line).first;
  return to_string(place) == options().without;
}

}  // namespace emulator

extern "C" const char* emulator_passed_places() {
  static std::string text;
  text.clear();
  for (const auto& place : emulator::passed) text += emulator::to_string(place) + "\n";
  emulator::passed.clear();
  return text.c_str();
}
