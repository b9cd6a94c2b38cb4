#include "bulk_copy.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "block.h"
#include "global_memory.h"
#include "options.h"
#include "planted_fault.h"
#include "report.h"
#include "emulated_tensor_map.h"

namespace emulator {
namespace {

constexpr int kPieceBytes = 16;  // bytes that stay together

struct Box {
  const CUtensorMap* map;
  std::array<int, 4> at;

  // Calls body(offset in the box, address in the tensor or null, bytes that are there) for pieces.
  template <class Body>
  void for_each_piece(const Body& body) const {
    const int row = static_cast<int>(map->box[0]) * map->element_bytes;
    int64_t offset = 0;
    for (uint32_t w = 0; w < map->box[3]; ++w) {
      for (uint32_t z = 0; z < map->box[2]; ++z) {
        for (uint32_t y = 0; y < map->box[1]; ++y) {
          const int64_t outer[3] = {at[1] + int64_t{y}, at[2] + int64_t{z}, at[3] + int64_t{w}};
          unsigned char* address = map->base;
          bool inside = true;
          for (int i = 0; i < 3; ++i) {
            inside = inside && outer[i] >= 0 && outer[i] < static_cast<int64_t>(map->size[i + 1]);
            address += outer[i] * map->stride[i + 1];
          }
          for (int x = 0; x < row; x += kPieceBytes, offset += kPieceBytes) {
            const int64_t first = int64_t{at[0]} * map->element_bytes + x;
            const int64_t left = static_cast<int64_t>(map->size[0]) * map->element_bytes - first;
            const bool there = inside && first >= 0 && left > 0;
            body(offset, there ? address + first : nullptr,
                 there ? static_cast<int>(std::min<int64_t>(left, kPieceBytes)) : 0);
          }
        }
      }
    }
  }
};

unsigned char* in_shared(const Box& box, unsigned char* tile, int64_t offset) {
  if (!box.map->swizzled) return tile + offset;
  return reinterpret_cast<unsigned char*>(swizzle(reinterpret_cast<uintptr_t>(tile) + offset));
}

// Bounds, alignment and races of the tile in shared memory and the box in global memory.
void check(Thread& t, const Box& box, const void* tile, Agent agent, Access shared, Access global,
           const char* what, Site site) {
  Block& b = *t.block;
  const auto offset = static_cast<const unsigned char*>(tile) - b.shared;
  const int bytes = box.map->box_bytes(), alignment = box.map->swizzled ? 1024 : 128;
  if (offset < 0 || offset + bytes > b.shared_bytes) {
    fail(site, "%s of %d bytes at byte %td of shared memory, which has %d", what, bytes, offset,
         b.shared_bytes);
  }
  if (offset % alignment != 0) {
    fail(site, "%s at byte %td of shared memory, not aligned to %d", what, offset, alignment);
  }
  if (box.at[0] < 0) fail(site, "%s: only outer coordinates are emulated below 0", what);
  box.for_each_piece([&](int64_t, unsigned char* address, int count) {
    if (count > 0) access_global(t, address, count, global, what, site);
  });
  if (!options().races) return;
  Join before;  // what the issuing thread has read is over
  before.add(t.known, t.id, t.clock);
  advance_clock(t);
  const Knowledge known = before.take();
  b.shadow.access(offset, bytes, shared, observer(b, agent, known.own.get(), t.known.async.get()),
                  what, site);
}

void store_or_add(const CUtensorMap* map, const int (&at)[4], const void* tile, bool adds,
                  Site site) {
  Thread& t = *current;
  Block& b = *t.block;
  const Box box{map, {at[0], at[1], at[2], at[3]}};
  const Agent agent = new_copy_agent(b);
  const char* what = adds ? "cp.reduce.async.bulk" : "a bulk store";
  if (adds && map->element_bytes != 4) fail(site, "%s: only fp32 is emulated", what);
  check(t, box, tile, agent, Access::kRead, adds ? Access::kAtomic : Access::kWrite, what, site);
  auto store = std::make_shared<BulkStores::Store>();
  store->group = t.bulk_stores.open_group;
  store->owner = &t;
  store->agent = agent;
  t.bulk_stores.stores.push_back(store);
  const auto advance = [store](BulkStores::State state) {
    store->state = state;
    if (store->owner->bulk_stores.waits) wake(store->owner);
    store->owner->bulk_stores.waits = false;
  };
  const auto write = [=](const std::vector<unsigned char>& data) {
    box.for_each_piece([&](int64_t offset, unsigned char* to, int count) {
      if (!adds) return static_cast<void>(std::memcpy(to, &data[offset], count));
      for (int i = 0; i < count; i += 4) {
        float sum, x;
        std::memcpy(&sum, to + i, 4);
        std::memcpy(&x, &data[offset + i], 4);
        sum += x;
        std::memcpy(to + i, &sum, 4);
      }
    });
    advance(BulkStores::State::kWritten);
  };
  auto* const from = static_cast<unsigned char*>(const_cast<void*>(tile));
  start_operation(
      b, {AsyncProxy::kNoQueue, [=, &b] {
            std::vector<unsigned char> data(box.map->box_bytes());
            for (size_t i = 0; i < data.size(); i += kPieceBytes) {
              std::memcpy(&data[i], in_shared(box, from, static_cast<int64_t>(i)), kPieceBytes);
            }
            advance(BulkStores::State::kRead);
            start_operation(b,
                            {AsyncProxy::kNoQueue, [=, data = std::move(data)] { write(data); }});
          }});
}

void wait_for_stores(int groups_left, BulkStores::State state, Site site) {
  if (is_left_out(site)) return;
  Thread& t = *current;
  auto& stores = t.bulk_stores.stores;
  const int end = t.bulk_stores.open_group - groups_left;
  const auto is_left = [&](const std::shared_ptr<BulkStores::Store>& s) {
    return s->group < end && s->state < state;
  };
  while (std::any_of(stores.begin(), stores.end(), is_left)) {
    t.bulk_stores.waits = true;
    wait("cp.async.bulk.wait_group", site);
  }
  if (options().races) {
    Join join;
    join.add(t.known);
    for (const auto& s : stores) {
      if (s->group < end) join.add_async(s->agent.id, s->agent.clock);
    }
    t.known = join.take();
  }
  if (state == BulkStores::State::kRead) return;
  stores.erase(
      std::remove_if(stores.begin(), stores.end(), [&](const auto& s) { return s->group < end; }),
      stores.end());
}

}  // namespace

void tma_load(void* tile, const CUtensorMap* map, void* barrier, const int (&at)[4], Site site) {
  Thread& t = *current;
  Block& b = *t.block;
  const Box box{map, {at[0], at[1], at[2], at[3]}};
  const Agent agent = new_copy_agent(b);
  check_visible_to_copies(t, barrier, site);
  check(t, box, tile, agent, Access::kWrite, Access::kRead, "a bulk load", site);
  const int bytes = map->box_bytes();
  auto* const to = static_cast<unsigned char*>(tile);
  if (options().completion != Completion::kEager) std::memset(to, 0xff, bytes);
  start_operation(b, {AsyncProxy::kNoQueue, [=, &b] {
                        box.for_each_piece([&](int64_t offset, unsigned char* from, int count) {
                          unsigned char* piece = in_shared(box, to, offset);
                          std::memset(piece, 0, kPieceBytes);
                          if (count > 0) std::memcpy(piece, from, count);
                        });
                        complete_bytes(b, barrier, bytes, agent);
                      }});
}

void tma_store(const CUtensorMap* map, const void* tile, const int (&at)[4], Site site) {
  store_or_add(map, at, tile, false, site);
}
void tma_reduce_add(const CUtensorMap* map, const void* tile, const int (&at)[4], Site site) {
  store_or_add(map, at, tile, true, site);
}
void bulk_commit() { ++current->bulk_stores.open_group; }
void bulk_wait(int groups_left, Site site) {
  wait_for_stores(groups_left, BulkStores::State::kWritten, site);
}
void bulk_wait_read(int groups_left, Site site) {
  wait_for_stores(groups_left, BulkStores::State::kRead, site);
}

void check_bulk_stores_at_exit(const Thread& t) {
  for (const auto& store : t.bulk_stores.stores) {
    if (store->state == BulkStores::State::kIssued) {
      report(Site{}, "exits with a bulk store whose shared memory hasn't been read");
      return;
    }
  }
}

}  // namespace emulator
