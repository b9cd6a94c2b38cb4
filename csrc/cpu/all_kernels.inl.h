// Every kernel, in dependency order; included once per instruction set, after its vec_*.h.
#include "vec_math.inl.h"
#include "tiles.inl.h"
#include "gemm_tile.inl.h"
#ifdef FASTATTN_DOTS_BF16
#include "pairs.inl.h"
#endif
#include "operands.inl.h"
#include "philox.inl.h"
#include "score_mods.inl.h"
#include "key_blocks.inl.h"
#include "attn_fwd.inl.h"
#include "attn_entropy.inl.h"
#include "attn_bwd.inl.h"
#include "cache_append.inl.h"
#include "decode_tile.inl.h"
#include "attn_decode.inl.h"
#include "cross_entropy.inl.h"
#include "matmul.inl.h"

#define FASTATTN_KERNEL_TABLE(isa)                                            \
  {isa,         fit,          attn_fwd,          attn_entropy,      attn_bwd, \
   attn_decode, cache_append, cross_entropy_fwd, cross_entropy_bwd, matmul_in_fp32}
