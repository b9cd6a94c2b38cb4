static void attn_bwd(const AttnBwdParams&, const Pool&) {}
