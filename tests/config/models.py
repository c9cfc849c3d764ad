"""Models to check settings against: dense, with experts, and with latent attention and shared experts."""

from dataclasses import replace

from megatron_rl.config.architecture import Architecture, Experts, LatentAttention, Rope

DENSE = Architecture(
    family="llama", layers=8, hidden=1024, heads=8, kv_heads=4, head_dim=128, ffn_hidden=4096, vocab=32000,
    max_positions=8192, norm_eps=1e-6, rope=Rope(base=1e4), tied_embeddings=False,
)  # fmt: skip
EXPERTS = Experts(count=16, top_k=2, hidden=512, scoring="softmax", normalize_top_k=True, softmax_before_top_k=False)
MOE = replace(DENSE, family="qwen3_moe", experts=EXPERTS, moe_layers=(True,) * 8)
LATENT = replace(
    MOE, family="deepseek_v3", heads=32, kv_heads=32, head_dim=192, moe_layers=(False,) + (True,) * 7,
    rope=Rope(base=1e4, interleaved=True),
    experts=replace(EXPERTS, shared_hidden=512, expert_bias=True, scoring="sigmoid"),
    latent_attention=LatentAttention(q_lora_rank=384, kv_lora_rank=512, qk_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)  # fmt: skip
MODELS = {"dense": DENSE, "moe": MOE, "latent": LATENT}
