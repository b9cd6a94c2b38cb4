"""How the packages that benchmarks compare with are called: their functions' signatures.

Taken from the source of the versions below, without annotations; where one is installed, from its
source, which need not be importable here.
"""

from __future__ import annotations

import ast
import collections
import inspect
from importlib.machinery import PathFinder
from pathlib import Path

# flash-attn 2.8.3.post2 (and its hopper/ folder, which is flash-attn 3), flash-attn-4 4.0.0b36,
# xformers 0.0.35, flashinfer-python 0.7.2.post1, liger-kernel 0.8.5, cut-cross-entropy 25.1.1,
# quack-kernels 0.6.5.
SIGNATURES = {
    ("flash_attn.flash_attn_interface", "flash_attn_func"): (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    ("flash_attn.flash_attn_interface", "flash_attn_varlen_func"): (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None"
    ),
    ("flash_attn.flash_attn_interface", "flash_attn_with_kvcache"): (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
    ("flash_attn_interface", "flash_attn_func"): (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0"
    ),
    ("flash_attn_interface", "flash_attn_varlen_func"): (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
        "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0"
    ),
    ("flash_attn_interface", "flash_attn_with_kvcache"): (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False"
    ),
    ("flash_attn.cute.interface", "flash_attn_func"): (
        "q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, "
        "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, "
        "mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, "
        "block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, "
        "gather_bwd_token_chunk=None"
    ),
    ("flash_attn.cute.interface", "flash_attn_varlen_func"): (
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, "
        "gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, "
        "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, "
        "mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
        "return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, "
        "disable_scheduler_metadata=False, gather_bwd_recompute_p=False, "
        "gather_bwd_token_chunk=None"
    ),
    ("xformers.ops.fmha", "memory_efficient_attention"): (
        "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None"
    ),
    (
        "xformers.ops.fmha.attn_bias",
        "BlockDiagonalMask.from_seqlens",
    ): "cls, q_seqlen, kv_seqlen=None, *, device=None",
    ("xformers.ops.fmha.attn_bias", "BlockDiagonalMask.make_causal"): "self",
    ("flashinfer.prefill", "BatchPrefillWithRaggedKVCacheWrapper.__init__"): (
        "self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "qo_indptr_buf=None, kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, "
        "backend='auto', jit_args=None, jit_kwargs=None, variant_owns_mask=False"
    ),
    ("flashinfer.prefill", "BatchPrefillWithRaggedKVCacheWrapper.plan"): (
        "self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, "
        "head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, "
        "pos_encoding_mode='NONE', use_fp16_qk_reduction=False, window_left=-1, "
        "logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, "
        "q_data_type='float16', kv_data_type=None, o_data_type=None, non_blocking=True, "
        "prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, "
        "max_item_len_ptr=None, fixed_split_size=None, disable_split_kv=False, seq_lens=None, "
        "seq_lens_q=None, max_token_per_sequence=None, max_sequence_kv=None, v_indptr=None, "
        "o_indptr=None, uniform_q_len=None"
    ),
    ("flashinfer.prefill", "BatchPrefillWithRaggedKVCacheWrapper.run"): (
        "self, q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, "
        "out=None, lse=None, return_lse=False, lse_base='log2', lse_layout='NH', "
        "enable_pdl=None, kv_cache_sf=None"
    ),
    ("flashinfer.decode", "BatchDecodeWithPagedKVCacheWrapper.__init__"): (
        "self, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, "
        "use_tensor_cores=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, "
        "paged_kv_last_page_len_buffer=None, backend='auto', jit_args=None"
    ),
    ("flashinfer.decode", "BatchDecodeWithPagedKVCacheWrapper.plan"): (
        "self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, "
        "page_size, *deprecated_positional_args, **kwargs"
    ),
    ("flashinfer.decode", "BatchDecodeWithPagedKVCacheWrapper.run"): (
        "self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, "
        "lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None, "
        "q_len_per_req=None, skip_softmax_threshold_scale_factor=None, kv_cache_sf=None"
    ),
    ("liger_kernel.transformers.functional", "liger_cross_entropy"): (
        "input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, "
        "reduction='mean', label_smoothing=0.0, lse_square_scale=0.0, softcap=None, "
        "return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False"
    ),
    ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"): (
        "input, weight, target, bias=None, ce_weight=None, ignore_index=-100, "
        "lse_square_scale=0.0, label_smoothing=0.0, reduction='mean', softcap=None, "
        "return_z_loss=False, accum_dtype=None, use_token_scaling=False, "
        "return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1"
    ),
    ("cut_cross_entropy.linear_cross_entropy", "linear_cross_entropy"): (
        "e, c, targets, ignore_index=IGNORE_INDEX, softcap=None, reduction='mean', "
        "shift=False, filter_eps='high', impl=LCE_IMPL_DEFAULT"
    ),
    ("quack.cross_entropy", "cross_entropy"): (
        "x, target, lse_partial=None, weight=None, ignore_index=-100, reduction='mean', "
        "inplace_backward=False"
    ),
    ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"): (
        "x, weight, target, chunk_size=4096, ignore_index=-100, reduction='mean', tuned=True, "
        "use_scaled_exp=None"
    ),
}


def signature(module: str, name: str) -> inspect.Signature:
    """Of a function, or of a Class.method with its self; defaults that are names have no value."""
    text = installed(module, name) or SIGNATURES[module, name]
    return inspect.signature(eval(f"lambda {text}: None", {}, collections.defaultdict(object)))


def installed(module: str, name: str) -> str | None:
    """As the package that is installed has it, which is not imported; None if there is none."""
    package, *rest = module.split(".")
    spec = PathFinder.find_spec(package)  # whatever a test has put into sys.modules
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    roots = [Path(spec.origin or "")] if folders is None else [Path(f, *rest) for f in folders]
    for root in roots:
        for path in (root, root.with_suffix(".py"), root / "__init__.py"):
            if path.is_file():
                return _written(path, name)
    return None


def _written(path: Path, name: str) -> str:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = [n for n in body if isinstance(n, kinds) and n.name == part][-1]  # behind overloads
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(node.args)
