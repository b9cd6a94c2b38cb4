#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "block.h"

namespace emulator {
namespace {

constexpr int kKeptOfAKind = 2;  // reports with one format: the first of them tells the story
constexpr size_t kKept = 8;

std::vector<std::string> kept;
std::map<std::string, int> count_of_kind;
int count;

void keep(Site site, const char* format, va_list arguments) {
  ++count;
  const char* file = site.file == nullptr ? nullptr : std::strrchr(site.file, '/');
  char where[256] = "";
  if (site.file != nullptr) {
    std::snprintf(where, sizeof where, " at %s:%d", file == nullptr ? site.file : file + 1,
                  site.line);
  }
  if (++count_of_kind[std::string(format) + where] > kKeptOfAKind || kept.size() == kKept) return;
  char text[2048];
  std::vsnprintf(text, sizeof text, format, arguments);
  std::string line = text;
  if (current != nullptr) {
    const ThreadIds& ids = *current->ids;
    char who[128];
    std::snprintf(who, sizeof who, "block (%u, %u, %u) thread %d: ", ids.block.x, ids.block.y,
                  ids.block.z, current->id);
    line = who + line;
  }
  kept.push_back(line + where);
}

}  // namespace

void report(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep(site, format, arguments);
  va_end(arguments);
}

void fail(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep(site, format, arguments);
  va_end(arguments);
  abandon_launch();
}

void clear_reports() {
  kept.clear();
  count_of_kind.clear();
  count = 0;
}

bool any_reports() { return count > 0; }

std::string reports(const std::string& what) {
  std::string text =
      "emulator: " + std::to_string(count) + (count == 1 ? " fault" : " faults") + " in " + what;
  for (const std::string& line : kept) text += "\n  " + line;
  if (count > static_cast<int>(kept.size())) text += "\n  …";
  return text;
}

}  // namespace emulator
