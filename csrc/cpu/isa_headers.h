// All that kernels include from outside, gathered before any isa_*.cpp opens its target region.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "elements.h"
#include "kernels.h"
#include "kv_cache.h"
#include "scratch.h"
#include "segments.h"
