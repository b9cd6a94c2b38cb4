static void attn_decode(const AttnDecodeParams&, const Pool&) {}
static void cache_append(const CacheAppendParams&, const Pool&) {}
