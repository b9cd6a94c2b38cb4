static void attn_fwd(const AttnFwdParams&, const Pool&) {}
