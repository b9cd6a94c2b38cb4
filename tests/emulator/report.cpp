#include "report.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "block.h"

namespace emulator {

const void* plain_access_at;

namespace {

constexpr int kKeptOfAKind = 2;  // reports with one format: the first of them tells the story
constexpr size_t kKept = 8;

std::vector<std::string> kept;
std::map<std::string, int> count_of_kind;
std::map<const void*, std::string> line_of_address;
int count;

// "file:line" of an address of code, as addr2line tells it.
std::string line_of(const void* pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0) return "";
  char command[1024], line[512] = "";
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%tx 2>/dev/null", info.dli_fname,
                offset);
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = '\0';
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = '\0';
  return line;
}

void keep(Site site, const char* format, va_list arguments) {
  ++count;
  if (kept.size() == kKept) return;
  const std::string where = place_name(site, current == nullptr ? nullptr : plain_access_at);
  if (++count_of_kind[format + where] > kKeptOfAKind) return;
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
  kept.push_back(where.empty() ? line : line + " at " + where);
}

}  // namespace

std::string place_name(Site site, const void* pc) {
  std::string where;
  if (site.file != nullptr) {
    where = std::string(site.file) + ":" + std::to_string(site.line);
  } else if (pc != nullptr) {
    std::string& known = line_of_address[pc];
    if (known.empty()) known = line_of(pc);
    where = known;
  }
  if (const size_t slash = where.rfind('/'); slash != std::string::npos) where.erase(0, slash + 1);
  return where;
}

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
