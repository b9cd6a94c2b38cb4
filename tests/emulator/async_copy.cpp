#include "async_copy.h"

#include <cstring>

#include "block.h"
#include "global_memory.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"

namespace emulator {
namespace {

void carry_out(PendingCopies::Copy* copy) {
  std::memcpy(copy->shared, copy->global, copy->bytes);
  std::memset(copy->shared + copy->bytes, 0, kCopyBytes - copy->bytes);
  copy->done = true;
}

}  // namespace

void complete_at_random(Thread& t) {
  for (PendingCopies::Copy& copy : t.copies.copies) {
    if (!copy.done && random_bits() % 8 == 0) carry_out(&copy);
  }
}

void cp_async(void* shared, const void* global, int bytes, Site site) {
  Thread& t = *current;
  Block& b = *t.block;
  if (bytes < 0 || bytes > kCopyBytes) {
    fail(site, "cp.async reads %d of %d bytes", bytes, kCopyBytes);
  }
  const auto offset = static_cast<unsigned char*>(shared) - b.shared;
  if (offset < 0 || offset + kCopyBytes > b.shared_bytes) {
    fail(site, "cp.async writes outside shared memory: %td of %d bytes", offset, b.shared_bytes);
  }
  if (offset % kCopyBytes != 0) {
    fail(site, "cp.async to shared memory %td, not aligned to %d", offset, kCopyBytes);
  }
  if (reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0) {
    fail(site, "cp.async from %p, not aligned to %d", global, kCopyBytes);
  }
  if (bytes > 0) access_global(t, global, bytes, Access::kRead, "cp.async", site);
  note_banks(t, offset, kCopyBytes, "cp.async", site);
  if (options().races) b.shadow.begin_copy(offset, kCopyBytes, observer(t), site);
  PendingCopies::Copy copy{static_cast<unsigned char*>(shared),
                           static_cast<const unsigned char*>(global), bytes, t.copies.open_group,
                           false};
  if (options().completion == Completion::kEager) {
    carry_out(&copy);
  } else {
    std::memset(shared, 0xff, kCopyBytes);
  }
  t.copies.copies.push_back(copy);
}

void cp_async_commit() { ++current->copies.open_group; }

void cp_async_wait(int groups_left, Site site) {
  if (is_left_out(site)) return;
  Thread& t = *current;
  auto& copies = t.copies.copies;
  size_t kept = 0;
  for (size_t i = 0; i < copies.size(); ++i) {
    if (copies[i].group >= t.copies.open_group - groups_left) {
      copies[kept++] = copies[i];
      continue;
    }
    if (!copies[i].done) carry_out(&copies[i]);
    if (options().races) {
      t.block->shadow.end_copy(copies[i].shared - t.block->shared, kCopyBytes, observer(t));
    }
  }
  copies.resize(kept);
}

}  // namespace emulator
