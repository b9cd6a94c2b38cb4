// A launch: its blocks one after another in an order of the seed's choice, or all at once.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "arena.h"
#include "block.h"
#include "global_memory.h"
#include "options.h"
#include "report.h"

namespace emulator {
namespace {

uint64_t random_state;

std::runtime_error error(const std::string& what, const std::string& why) {
  return std::runtime_error("emulator: " + what + ": " + why);
}

}  // namespace

uint32_t random_bits() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 20);
}

void launch(dim3 grid, dim3 block, int shared_bytes, const std::string& what,
            const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Options& o = options();
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (threads < 32 || threads > 1024 || threads % 32 != 0) {
    throw error(what,
                "a block of " + std::to_string(threads) + " threads, not of 32 … 1024 in warps");
  }
  if (grid.x == 0 || grid.y - 1u >= 65535 || grid.z - 1u >= 65535 || grid.x > 0x7fffffffu) {
    throw error(what, "a grid of " + std::to_string(grid.x) + " × " + std::to_string(grid.y) +
                          " × " + std::to_string(grid.z) + " blocks");
  }
  if (shared_bytes > o.shared_limit) {
    throw error(what, std::to_string(shared_bytes) + " bytes of shared memory, more than the " +
                          std::to_string(o.shared_limit) + " there are");
  }
  random_state = (o.seed + 1) * 0x9e3779b97f4a7c15ull;
  clear_reports();
  begin_global_launch();

  const int64_t at_once = o.co_scheduled ? blocks : 1;
  unsigned char* const stacks = reserve_stacks(at_once * threads);
  unsigned char* const shared = reserve_shared(at_once);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (o.seed != 0) {
    for (int64_t i = blocks - 1; i > 0; --i) {
      std::swap(order[i], order[random_bits() % (i + 1)]);
    }
  }
  std::vector<Block> slots(at_once);
  for (int64_t i = 0; i < at_once; ++i) {
    Block& b = slots[i];
    b.threads = static_cast<int>(threads);
    b.thread.resize(threads);
    b.warp.resize(threads / 32);
    b.shared = shared + i * kSharedStride;
    b.shared_bytes = shared_bytes;
  }
  for (int64_t first = 0; first < blocks; first += at_once) {
    std::vector<Block*> running;
    for (int64_t i = 0; i < at_once; ++i) {
      Block& b = slots[i];
      const int64_t index = order[first + i];
      std::memset(b.shared, 0xff, shared_bytes);
      start_block(b, index, kernel, stacks + i * threads * kStackBytes, kStackBytes);
      const dim3 at(static_cast<unsigned>(index % grid.x),
                    static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y));
      for (int t = 0; t < threads; ++t) {
        const dim3 thread(t % block.x, t / block.x % block.y, t / block.x / block.y);
        *b.thread[t].ids = {thread, at, block, grid};
      }
      running.push_back(&b);
    }
    if (!run_blocks(running)) break;
  }
  if (any_reports()) throw std::runtime_error(reports(what));
}

const char* guarded(const std::function<void()>& body) {
  static std::string text;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}

}  // namespace emulator

extern "C" const char* emulator_set_options(const char* text) {
  return emulator::guarded([&] { emulator::options() = emulator::parse_options(text); });
}
