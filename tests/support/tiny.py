"""A tiny random model whose exact scores depend on content."""

from __future__ import annotations

import torch

HIDDEN, LAYERS, BLOCK = 32, 2, 8


def build(seed: int = 0, family: str = "llama") -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    if family == "opt":
        config = OPTConfig(
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=256,
            dropout=0.0,
        )
        return OPTForCausalLM(config).eval()
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    # Tokens of the upper half say so in coordinate 0, and every token has the same coordinate 1. Queries look for the
    # latter, keys show the former, in the dimension of each head that rotates least: upper blocks inform, lower do not.
    head = HIDDEN // 2
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(64) < 32, -3.0, 3.0)
        model.model.embed_tokens.weight[:, 1] = 3.0
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[head // 2 - 1 :: head, 1] += 2.0
            layer.self_attn.k_proj.weight[head // 2 - 1 :: head, 0] += 2.0
    return model.eval()
