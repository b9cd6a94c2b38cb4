// Global memory as kernels see it: the buffers the host has named.
#pragma once

#include <cstddef>

#include "shadow.h"

namespace emulator {

struct Thread;

// Accesses outside of all buffers, and writes to read-only ones, end the launch; races are
// reported.
void access_global(Thread& t, const void* p, size_t bytes, Access access, const char* what,
                   Site site);

// A kernel's end orders everything it did before the next one.
void begin_global_launch();

}  // namespace emulator
