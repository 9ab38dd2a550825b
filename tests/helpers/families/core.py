"""Tiny configs of the twelve families that are also launched end to end."""

from tests.helpers.families.settings import MLA, NUM_EXPERTS, Settings

__all__ = ["CORE"]

CORE: dict[str, Settings] = {
    "olmoe": dict(intermediate_size=24, num_experts=NUM_EXPERTS),
    "mixtral": dict(intermediate_size=24, num_local_experts=NUM_EXPERTS, sliding_window=16),
    "qwen2_moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        num_experts=NUM_EXPERTS,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        head_dim=12,
        num_experts=NUM_EXPERTS,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "deepseek_v2": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        **MLA,
    ),
    "deepseek_v3": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        **MLA,
    ),
    "ernie4_5_moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        moe_num_experts=NUM_EXPERTS,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    ),
    "glm4_moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        head_dim=8,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "glm4_moe_lite": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
        **MLA,
    ),
    "gpt_oss": dict(
        intermediate_size=24,
        head_dim=8,
        num_local_experts=NUM_EXPERTS,
        sliding_window=8,
    ),
    "granitemoe": dict(intermediate_size=24, num_local_experts=NUM_EXPERTS),
    "phimoe": dict(intermediate_size=24, num_local_experts=NUM_EXPERTS, sliding_window=16),
}
"""model_type -> settings."""
