// Products of a warpgroup, as the PTX ISA's sections on wgmma define fragments, descriptors and
// groups.
#include <cmath>
#include <cstring>

#include "bits.h"
#include "block.h"
#include "coarse.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"

namespace emulator {
namespace {

constexpr int kM = 64, kK = 16, kMostN = 256;
constexpr int kPieceElements = 8;  // elements in 16 bytes, which stay together under the swizzle

// A tile in shared memory as a descriptor has it: rows of 128 bytes in groups of 8, swizzled.
struct Tile {
  uint32_t start, leading, stride;

  Tile(uint64_t descriptor, Site site)
      : start(field(descriptor, 0)), leading(field(descriptor, 16)), stride(field(descriptor, 32)) {
    if (descriptor >> 62 != 1) fail(site, "wgmma: only tiles of the 128-byte swizzle are emulated");
    if ((descriptor >> 49 & 7) != 0) fail(site, "wgmma: a base offset isn't emulated");
  }
  static uint32_t field(uint64_t descriptor, int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  }

  // Where element (x, k) of an operand lies, the first of its piece: x is the row of A or the
  // column of B. K-major: k runs along rows, else (MN-major) x does.
  uint32_t k_major(int x, int k) const { return start + x / 8 * stride + x % 8 * 128 + 2 * k; }
  uint32_t mn_major(int x, int k) const {
    return start + k / 8 * stride + k % 8 * 128 + x / 64 * leading + x % 64 * 2;
  }
};

float to_float(uint16_t x, Format format) {
  return format == Format::kBF16 ? bf16_to_float(x) : fp16_to_float(x);
}

// Reads the (size, 16) operand behind a descriptor: set(x, k, value) for each element.
template <class Set>
void read_tile(const Block& b, const Tile& tile, int size, bool transposed, Format format,
               const Set& set) {
  for (int x = 0; x < size; x += transposed ? kPieceElements : 1) {
    for (int k = 0; k < kK; k += transposed ? 1 : kPieceElements) {
      const uint32_t from = transposed ? tile.mn_major(x, k) : tile.k_major(x, k);
      uint16_t piece[kPieceElements];
      std::memcpy(piece, b.shared + swizzle(from), sizeof piece);
      for (int i = 0; i < kPieceElements; ++i) {
        set(transposed ? x + i : x, transposed ? k : k + i, to_float(piece[i], format));
      }
    }
  }
}

// Bounds and races of what read_tile will read.
void check_tile(Block& b, const Tile& tile, int size, bool transposed, const Observer& who,
                Site site) {
  for (int x = 0; x < size; x += transposed ? kPieceElements : 1) {
    for (int k = 0; k < kK; k += transposed ? 1 : kPieceElements) {
      const auto from =
          static_cast<uint32_t>(swizzle(transposed ? tile.mn_major(x, k) : tile.k_major(x, k)));
      if (from + 16 > static_cast<uint32_t>(b.shared_bytes)) {
        fail(site, "wgmma reads byte %u of shared memory, which has %d", from, b.shared_bytes);
      }
      if (options().races) b.shadow.access(from, 16, Access::kRead, who, "wgmma", site);
    }
  }
}

// Register i of thread t: row and column of accumulators.
struct Place {
  int row, column;
};
Place place(int t, int i) {
  return {t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2};
}

struct Lane {
  float* d;
  Operands operands;
};

// The registers of A: (64, 16).
void gather_a(const Lane* const* lanes, Format format, float (&a)[kM][kK]) {
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    for (int q = 0; q < 4; ++q) {
      float* to = &a[t / 32 * 16 + t % 32 / 4 + q % 2 * 8][t % 4 * 2 + q / 2 * 8];
      const uint32_t pair = lanes[t]->operands.a[q];
      to[0] = to_float(static_cast<uint16_t>(pair), format);
      to[1] = to_float(static_cast<uint16_t>(pair >> 16), format);
    }
  }
}

// Those in flight to the same registers already, or the registers' values, which are NaN from now
// on until they are waited for.
std::shared_ptr<Accumulators> accumulators(Warpgroup& w, const Lane* const* lanes, int n,
                                           Site site) {
  for (const Products::InFlight& f : w.threads[0].products.in_flight) {
    if (f.d != lanes[0]->d) continue;
    if (f.accumulators->n != n)
      fail(site, "wgmma: n %d on accumulators of %d", n, f.accumulators->n);
    return f.accumulators;
  }
  auto result = std::make_shared<Accumulators>();
  result->n = n;
  result->values.resize(static_cast<size_t>(kM) * n);
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    float* d = lanes[t]->d;
    for (int i = 0; i < n / 2; ++i) {
      const Place at = place(t, i);
      if (lanes[0]->operands.accumulate) result->values[at.row * n + at.column] = d[i];
      d[i] = NAN;
    }
    w.threads[t].products.in_flight.push_back({result, d});
  }
  return result;
}

// What all threads of the warpgroup know to be written for the asynchronous proxy.
const Clock* known_written(Warpgroup& w) {
  std::vector<std::shared_ptr<const Clock>> known_of;
  for (int t = 0; t < kWarpgroupThreads; ++t) known_of.push_back(w.threads[t].known.async);
  if (w.known == nullptr || known_of != w.known_of) {
    Join join;
    for (int t = 0; t < kWarpgroupThreads; ++t) {
      Knowledge written;
      written.async = w.threads[t].known.async;
      join.add(written);
    }
    w.known = join.take().async;
    w.known_of = std::move(known_of);
  }
  return w.known.get();
}

void issue(Warpgroup& w, const Lane* const* lanes, int n, Site site) {
  Thread& t = *current;
  Block& b = *t.block;
  const Operands first = lanes[0]->operands;
  const int group = w.threads[0].products.open_group;
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const Operands& o = lanes[i]->operands;
    if (o.a_tile != first.a_tile || o.b_tile != first.b_tile || o.accumulate != first.accumulate) {
      fail(site, "wgmma: operands differ between the threads of a warpgroup");
    }
    if (w.threads[i].products.open_group != group) fail(site, "wgmma: groups differ");
    if (!w.threads[i].products.fenced) {
      fail(site, "wgmma without a wgmma.fence since registers were last waited for");
    }
  }
  const Tile b_tile(first.b_tile, site);
  const Clock* known = known_written(w);
  const Agent agent{kFirstAgent + w.index, ++w.issued};
  const Observer who = observer(b, agent, known, known);
  check_tile(b, b_tile, n, first.b_transposed, who, site);
  struct Product {
    float a[kM][kK], b[kK][kMostN];
  };
  auto product = std::make_shared<Product>();
  Tile a_tile = b_tile;
  if (first.a != nullptr) {
    gather_a(lanes, first.format, product->a);
  } else {
    a_tile = Tile(first.a_tile, site);
    check_tile(b, a_tile, kM, first.a_transposed, who, site);
  }
  const std::shared_ptr<Accumulators> sums = accumulators(w, lanes, n, site);
  sums->group = group;
  w.last_of_group[group] = agent.clock;
  start_operation(b, {w.index, [=, &b, &w] {
                        Product& p = *product;
                        if (first.a == nullptr) {
                          read_tile(b, a_tile, kM, first.a_transposed, first.format,
                                    [&](int row, int k, float x) { p.a[row][k] = x; });
                        }
                        read_tile(b, b_tile, n, first.b_transposed, first.format,
                                  [&](int column, int k, float x) { p.b[k][column] = x; });
                        for (int row = 0; row < kM; ++row) {
                          float* to = &sums->values[static_cast<size_t>(row) * n];
                          if (!first.accumulate) std::fill(to, to + n, 0.0f);
                          if (options().coarse) {
                            for (int column = 0; column < n; ++column)
                              to[column] =
                                  coarse_sum(to[column], p.a[row], &p.b[0][column], kMostN, kK);
                            continue;
                          }
                          for (int k = 0; k < kK; ++k) {
                            for (int column = 0; column < n; ++column)
                              to[column] += p.a[row][k] * p.b[k][column];
                          }
                        }
                        w.completed = agent.clock;
                        for (Thread* waiting : w.waiting) wake(waiting);
                        w.waiting.clear();
                      }});
}

}  // namespace

void wgmma(float* d, int n, const Operands& operands, Site site) {
  Warpgroup& w = warpgroup_of(*current, site);
  if (n % 8 != 0 || n < 8 || n > kMostN) fail(site, "wgmma of n %d", n);
  Lane mine{d, operands};
  const int detail = n * 16 + (operands.a != nullptr) * 8 + operands.a_transposed * 4 +
                     operands.b_transposed * 2 + (operands.format == Format::kBF16);
  meet(w, WarpgroupOp::kWgmma, detail, &mine, site, [&](void* const* arguments) {
    issue(w, reinterpret_cast<const Lane* const*>(arguments), n, site);
  });
}

void wgmma_fence(Site site) {
  if (!is_left_out(site)) current->products.fenced = true;
}

void wgmma_commit() { ++current->products.open_group; }

void wgmma_wait(int groups_left, Site site) {
  if (is_left_out(site)) return;
  Thread& t = *current;
  Warpgroup& w = warpgroup_of(t, site);
  t.products.fenced = false;
  const int end = t.products.open_group - groups_left;
  const auto behind = w.last_of_group.lower_bound(end);
  if (behind == w.last_of_group.begin()) return;
  const uint32_t last = std::prev(behind)->second;
  while (w.completed < last) {
    w.waiting.push_back(&t);
    wait("wgmma.wait_group", site);
  }
  auto& in_flight = t.products.in_flight;
  size_t kept = 0;
  for (Products::InFlight& f : in_flight) {
    const Accumulators& sums = *f.accumulators;
    if (sums.group >= end) {
      in_flight[kept++] = f;
      continue;
    }
    for (int i = 0; i < sums.n / 2; ++i) {
      const Place at = place(t.id % kWarpgroupThreads, i);
      f.d[i] = sums.values[at.row * sums.n + at.column];
    }
  }
  in_flight.resize(kept);
  if (!options().races) return;
  Join join;
  join.add(t.known);
  join.add_async(kFirstAgent + w.index, last);
  t.known = join.take();
}

void check_products_at_exit(const Thread& t) {
  if (!t.products.in_flight.empty()) report(Site{}, "exits with a wgmma it hasn't waited for");
}

}  // namespace emulator
