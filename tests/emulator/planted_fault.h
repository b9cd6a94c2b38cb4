// What becomes of a kernel that lacks a barrier, a wait or a fence, without compiling it anew.
#pragma once

#include "options.h"
#include "site.h"

namespace emulator {

bool is_missing(Site site);

// Whether the barrier, wait or fence at `site` is to do nothing; see Options::without.
inline bool is_left_out(Site site) { return !options().without.empty() && is_missing(site); }

}  // namespace emulator
