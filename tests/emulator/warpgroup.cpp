#include "warpgroup.h"

#include "block.h"
#include "report.h"

namespace emulator {
namespace {

constexpr int kRegisterFile = 65536, kMostRegisters = 255;

const char* const op_names[] = {"nothing", "wgmma", "setmaxnreg"};

}  // namespace

// Registers at the start are what __launch_bounds__ lets ptxas give to each thread, in eights.
void start_warpgroups(Block& b) {
  b.warpgroup.clear();
  b.want_registers.clear();
  b.warpgroup.resize(b.threads / kWarpgroupThreads);
  for (size_t i = 0; i < b.warpgroup.size(); ++i) {
    Warpgroup& w = b.warpgroup[i];
    w.index = static_cast<int>(i);
    w.threads = &b.thread[i * kWarpgroupThreads];
    w.registers = std::min(kRegisterFile / b.threads, kMostRegisters) / 8 * 8;
  }
}

Warpgroup& warpgroup_of(const Thread& t, Site site) {
  std::vector<Warpgroup>& warpgroups = t.block->warpgroup;
  const size_t index = t.id / kWarpgroupThreads;
  if (index < warpgroups.size()) return warpgroups[index];
  fail(site, "thread %d of a block of %d is in no warpgroup", t.id, t.block->threads);
}

void meet(Warpgroup& w, WarpgroupOp op, int detail, void* argument, Site site,
          const std::function<void(void* const* arguments)>& execute) {
  Thread& t = *current;
  if (w.arrived == 0) {
    w.op = op;
    w.detail = detail;
    w.site = site;
  } else if (w.op != op || w.detail != detail || w.site.line != site.line) {
    fail(site, "threads of a warpgroup meet in different instructions: %s here, %s at line %d",
         op_names[static_cast<int>(op)], op_names[static_cast<int>(w.op)], w.site.line);
  }
  w.arguments[t.id % kWarpgroupThreads] = argument;
  if (++w.arrived < kWarpgroupThreads) {
    wait(op_names[static_cast<int>(op)], site);
    return;
  }
  w.arrived = 0;
  void* arguments[kWarpgroupThreads];
  std::copy(w.arguments, w.arguments + kWarpgroupThreads, arguments);
  execute(arguments);
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    if (&w.threads[i] != &t) wake(&w.threads[i]);
  }
}

// Taking registers waits until others have given up as many.
void set_max_registers(int count, bool more, Site site) {
  Thread& t = *current;
  Block& b = *t.block;
  Warpgroup& w = warpgroup_of(t, site);
  if (count % 8 != 0 || count < 24 || count > 256) fail(site, "setmaxnreg of %d", count);
  meet(w, WarpgroupOp::kSetMaxRegisters, 2 * count + more, nullptr, site, [&](void* const*) {
    if (more ? count < w.registers : count > w.registers) {
      fail(site, "setmaxnreg.%s to %d from %d", more ? "inc" : "dec", count, w.registers);
    }
    if (!more) w.registers = count;
  });
  const auto fits = [&] {
    int used = count;
    for (const Warpgroup& other : b.warpgroup) used += &other == &w ? 0 : other.registers;
    return used * kWarpgroupThreads <= kRegisterFile;
  };
  while (w.registers != count) {
    if (fits()) {
      w.registers = count;
    } else {
      b.want_registers.push_back(&t);
      wait("setmaxnreg.inc", site);
    }
  }
  for (Thread* other : b.want_registers) wake(other);
  b.want_registers.clear();
}

}  // namespace emulator
