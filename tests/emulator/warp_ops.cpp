// Shuffles and votes, ldmatrix and mma, as the PTX ISA defines them for 32 lanes.
#include <cstring>

#include "bits.h"
#include "block.h"
#include "coarse.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"

namespace emulator {

const char* const warp_op_names[] = {"nothing",    "a shuffle", "a vote",
                                     "__syncwarp", "ldmatrix",  "mma"};

void fail_to_meet(const Warp& w, WarpOp op, Site site) {
  fail(site, "lanes of one warp meet in different instructions: %s here, %s at line %d",
       warp_op_names[static_cast<int>(op)], warp_op_names[static_cast<int>(w.op)], w.site.line);
}

namespace {

void check_mask(uint32_t mask, const char* what, Site site) {
  if (mask != 0xffffffffu) fail(site, "%s of lanes %08x: only full masks are emulated", what, mask);
}

}  // namespace

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Site site) {
  check_mask(mask, "shuffle", site);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(site, "shuffle of width %d", width);
  struct Lane {
    uint32_t value, result;
    int source;
  };
  const int lane = current->lane, first = lane & -width, last = first + width - 1;
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = first + (operand & (width - 1));
      break;
    case Shuffle::kUp:
      source = lane - operand < first ? lane : lane - operand;
      break;
    case Shuffle::kDown:
      source = lane + operand > last ? lane : lane + operand;
      break;
    case Shuffle::kXor:
      source = (lane ^ operand) > last ? lane : lane ^ operand;
      break;
  }
  Lane mine{value, 0, source & 31};
  warp_instruction(WarpOp::kShuffle, static_cast<int>(kind), &mine, site,
                   [](Warp&, Lane* const* lanes) {
                     for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->source]->value;
                   });
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  check_mask(mask, "vote", site);
  uint32_t mine = predicate;
  warp_instruction(WarpOp::kBallot, 0, &mine, site, [](Warp&, uint32_t* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= *lanes[i] << i;
    for (int i = 0; i < 32; ++i) *lanes[i] = all;
  });
  return mine;
}

void sync_warp(uint32_t mask, Site site) {
  check_mask(mask, "__syncwarp", site);
  if (is_left_out(site)) return;
  Thread* t = current;
  warp_instruction(WarpOp::kSyncWarp, 0, t, site, [](Warp&, Thread* const* lanes) {
    if (!options().races) return;
    Join join;
    for (int i = 0; i < 32; ++i) join.add(lanes[i]->known, lanes[i]->id, lanes[i]->clock);
    const Knowledge joined = join.take();
    for (int i = 0; i < 32; ++i) {
      lanes[i]->known = joined;
      advance_clock(*lanes[i]);
    }
  });
}

void ldmatrix(uint32_t* r, const void* row, int count, bool transposed, Site site) {
  struct Lane {
    uint32_t* r;
    const void* row;
    Thread* thread;
  };
  Lane mine{r, row, current};
  warp_instruction(
      WarpOp::kLdmatrix, 2 * count + transposed, &mine, site, [=](Warp&, Lane* const* lanes) {
        uint16_t matrix[4][8][8];
        Thread* const self = current;
        for (int i = 0; i < 8 * count; ++i) {  // lane i brings a row of matrix i / 8
          current = lanes[i]->thread;          // whom reports name
          if (reinterpret_cast<uintptr_t>(lanes[i]->row) % 16 != 0) {
            fail(site, "ldmatrix: the row of lane %d isn't aligned to 16 bytes", i);
          }
          access_shared(*current, lanes[i]->row, 16, Access::kRead, "ldmatrix", site);
          std::memcpy(matrix[i / 8][i % 8], lanes[i]->row, 16);
        }
        current = self;
        for (int i = 0; i < 32; ++i) {
          const int group = i / 4, pair = 2 * (i % 4);
          for (int m = 0; m < count; ++m) {
            const auto& x = matrix[m];
            lanes[i]->r[m] = transposed ? x[pair][group] | uint32_t(x[pair + 1][group]) << 16
                                        : x[group][pair] | uint32_t(x[group][pair + 1]) << 16;
          }
        }
      });
}

namespace {

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// Elements lie in pairs along k: register q of a holds row group + 8 · (q % 2), columns 2t and 2t +
// 1 of the half q / 2; of b rows 2t and 2t + 1 of the half q, column group.
template <class ToFloat>
void gather(MmaLane* const* lanes, int k, ToFloat to_float, float (&a)[16][16], float (&b)[16][8]) {
  for (int i = 0; i < 32; ++i) {
    const int group = i / 4, pair = 2 * (i % 4);
    for (int q = 0; q < k / 4; ++q) {
      float* to = &a[group + q % 2 * 8][pair + q / 2 * 8];
      to[0] = to_float(static_cast<uint16_t>(lanes[i]->a[q]));
      to[1] = to_float(static_cast<uint16_t>(lanes[i]->a[q] >> 16));
    }
    for (int q = 0; q < k / 8; ++q) {
      b[pair + q * 8][group] = to_float(static_cast<uint16_t>(lanes[i]->b[q]));
      b[pair + q * 8 + 1][group] = to_float(static_cast<uint16_t>(lanes[i]->b[q] >> 16));
    }
  }
}

}  // namespace

void mma(float* d, const uint32_t* a, const uint32_t* b, Format format, int k, Site site) {
  MmaLane mine{d, a, b};
  warp_instruction(WarpOp::kMma, static_cast<int>(format) + 4 * k, &mine, site,
                   [=](Warp&, MmaLane* const* lanes) {
                     float a[16][16], b[16][8], c[16][8];
                     if (format == Format::kBF16) {
                       gather(lanes, k, [](uint16_t x) { return bf16_to_float(x); }, a, b);
                     } else {
                       gather(lanes, k, [](uint16_t x) { return fp16_to_float(x); }, a, b);
                     }
                     for (int i = 0; i < 32; ++i) {
                       for (int q = 0; q < 4; ++q)
                         c[i / 4 + q / 2 * 8][2 * (i % 4) + q % 2] = lanes[i]->d[q];
                     }
                     for (int row = 0; row < 16; ++row) {
                       if (options().coarse) {
                         for (int col = 0; col < 8; ++col)
                           c[row][col] = coarse_sum(c[row][col], a[row], &b[0][col], 8, k);
                         continue;
                       }
                       for (int x = 0; x < k; ++x) {
                         for (int col = 0; col < 8; ++col) c[row][col] += a[row][x] * b[x][col];
                       }
                     }
                     for (int i = 0; i < 32; ++i) {
                       for (int q = 0; q < 4; ++q)
                         lanes[i]->d[q] = c[i / 4 + q / 2 * 8][2 * (i % 4) + q % 2];
                     }
                   });
}

}  // namespace emulator
