// In which order the blocks of a grid take tiles of queries.
//
// Blocks start in the order of their index. Under a causal mask the last queries of a head see most
// keys, so they go first, and the short ones fill the gaps at the end. Heads run side by side in
// sections whose keys and values fit the L2 cache together; the heads of a group share theirs.
#pragma once

#include "../block_range.h"

namespace fastattn::cuda {

// Of K and V that heads in flight may hold: within the 40 to 50 MB of A100 and H100 with room for
// Q and O. A T4 has 4 MB, where heads of a group are all that meets.
constexpr int64_t kSectionBytes = 16 << 20;

struct WorkOrder {
  int m_blocks, heads_q, heads, section, group_size;  // heads = B · H_q; section: heads in one
  bool ascending = false;                             // the first rows of a head go first

  struct Item {
    int batch, head, m_block;
  };

  FASTATTN_HD int64_t items() const { return int64_t{m_blocks} * heads; }

  FASTATTN_HD Item item(int index) const {
    const int first = index / (m_blocks * section) * section;
    const int size = heads - first < section ? heads - first : section;
    const int rest = index - first * m_blocks;
    const int head = first + rest % size, m_block = rest / size;
    return {head / heads_q, head % heads_q, ascending ? m_block : m_blocks - 1 - m_block};
  }

  // What the `block`-th of `blocks` blocks of threads that stay takes in a round: there and back,
  // so that who took a longer tile takes a shorter one next. Of 16 causal heads of 16k queries the
  // busiest of 132 has 6 % more than the average if all rounds go the same way, and 0.2 % so.
  FASTATTN_HD static int nth_item(int round, int block, int blocks) {
    return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  }
};

inline WorkOrder make_work_order(const AttnFwdParams& p, int block_m, int element_bytes) {
  const int64_t bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * element_bytes;  // a KV head
  const int64_t heads = p.batch * p.heads_q, group_size = p.heads_q / p.heads_k;
  const int64_t section = greater(1, kSectionBytes / greater(1, bytes)) * group_size;
  return {static_cast<int>(ceil_div(p.seqlen_q, block_m)), static_cast<int>(p.heads_q),
          static_cast<int>(heads), static_cast<int>(lesser(section, greater(1, heads))),
          static_cast<int>(group_size)};
}

// The same for blocks of keys and KV heads, the first of which are seen by most queries. By counts
// of blocks, one causal sequence of 4k and 16 heads keeps 132 SMs 18 % shorter than if the last
// keys went first.
inline WorkOrder make_key_order(const AttnFwdParams& p, int block_m, int element_bytes) {
  const int64_t bytes = p.seqlen_q * (p.head_dim + p.head_dim_v) * element_bytes;  // a query head
  const int64_t heads = p.batch * p.heads_k, group_size = p.heads_q / p.heads_k;
  const int64_t section = greater(1, kSectionBytes / greater(1, bytes * group_size));
  return {static_cast<int>(ceil_div(p.seqlen_k, block_m)),
          static_cast<int>(p.heads_k),
          static_cast<int>(heads),
          static_cast<int>(lesser(section, greater(1, heads))),
          static_cast<int>(group_size),
          true};
}

}  // namespace fastattn::cuda
