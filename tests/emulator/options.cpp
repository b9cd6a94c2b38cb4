#include "options.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace emulator {

Options parse_options(const std::string& text) {
  Options o;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const auto number = [&]() -> uint64_t {
      size_t used = 0;
      const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
      uint64_t n = 0;
      try {
        n = std::stoull(value, &used);
      } catch (const std::exception&) {
      }
      if (used == 0 || used != value.size()) {
        throw std::invalid_argument("emulator: option " + name + " takes a number, not \"" + value +
                                    "\"");
      }
      return n;
    };
    if (word.empty()) continue;
    if (word == "eager") {
      o.completion = Completion::kEager;
    } else if (word == "lazy") {
      o.completion = Completion::kLazy;
    } else if (word == "random") {
      o.completion = Completion::kRandom;
    } else if (name == "seed") {
      o.seed = number();
    } else if (name == "races") {
      o.races = number() != 0;
    } else if (name == "banks") {
      o.banks = number() != 0;
    } else if (name == "coarse") {
      o.coarse = number() != 0;
    } else if (name == "co_scheduled") {
      o.co_scheduled = number() != 0;
    } else if (name == "without" && equals != std::string::npos) {
      o.without = word.substr(equals + 1);
    } else if (name == "fault") {
      o.fault = static_cast<int>(number());
    } else if (name == "shared_limit") {
      o.shared_limit = static_cast<int>(number());
    } else {
      throw std::invalid_argument("emulator: no option \"" + word +
                                  "\"; there are eager, lazy, random, seed=, races=, "
                                  "banks=, coarse=, co_scheduled=, shared_limit=, without=, "
                                  "fault=");
    }
  }
  return o;
}

Options& options() {
  static Options current = [] {
    const char* text = std::getenv("FASTATTN_EMULATOR");
    return parse_options(text == nullptr ? "" : text);
  }();
  return current;
}

}  // namespace emulator
