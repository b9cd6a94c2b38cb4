// Faults found while a kernel runs. They are collected, and thrown when the launch is over.
#pragma once

#include <string>

#include "site.h"

namespace emulator {

// Plain loads and stores have no Site, but an address of code, which the report finds the line of.
extern const void* plain_access_at;

// Such as "attn_fwd.cuh:101": of an instruction, or of a plain access by its code's address.
std::string place_name(Site site, const void* pc);

// Of the running thread, which goes on. The same fault is kept a few times only.
void report(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Ends the launch at once: for what would crash, or never end.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// For a launch: forget earlier reports; has anything been reported; the text to throw.
void clear_reports();
bool any_reports();
std::string reports(const std::string& what);

}  // namespace emulator
