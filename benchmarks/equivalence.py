"""Keep everything = the dense model: logits and LoRA gradients against the unpatched transformers model.

For both families, the reference is the same model in fp32 (fp64 on the CPU). `error` is ours, `dense_error` that of the
unpatched model at our dtype, both relative to the reference (norm of the difference over norm of the reference, the
worst of all tensors of that kind). On the CPU in fp32 ours must stay below 1e-5; on CUDA in bf16 below 2 x dense_error.

  python benchmarks/equivalence.py
"""

from __future__ import annotations

import argparse
import copy
import sys

import lemo
import torch
from common import write_results


def families(size: str) -> dict[str, torch.nn.Module]:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    width, layers, vocab = (512, 4, 4096) if size == "small" else (128, 3, 512)
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=vocab,
        max_position_embeddings=4096,
    )
    opt = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=vocab,
        max_position_embeddings=4096,
        dropout=0.0,
    )
    return {"llama": LlamaForCausalLM(llama), "opt": OPTForCausalLM(opt)}


def with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    out = "out_proj" if model.config.model_type == "opt" else "o_proj"
    targets = ["q_proj", "k_proj", "v_proj", out]
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:  # zero at initialization: the gradient of A would vanish
            torch.nn.init.normal_(p, std=0.02)
    return wrapped


def measure(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Logits and the gradients of every trainable parameter for the language-model loss."""
    model.train()
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits.detach()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = {n: p.grad.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": {"logits": logits}, "lora gradients": grads}


def worst_error(got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    errors = []
    for name, ref in reference.items():
        difference = got[name].double().cpu() - ref.double().cpu()
        errors.append((difference.norm() / ref.double().norm()).item())
    return max(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens per sequence (no multiple of the block)")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    rows, failed = [], False
    for family, base in families("small" if cuda else "tiny").items():
        reference_model = with_adapters(base).to(device=device, dtype=torch.float32 if cuda else torch.float64)
        ids = torch.randint(0, base.config.vocab_size, (2, args.tokens), device=device)
        reference = measure(reference_model, ids)
        model = copy.deepcopy(reference_model).to(dtype)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        dense = measure(model, ids)
        for recompute in ("none", "attention", "full"):
            lemo.apply(
                model,
                lemo.LemoConfig(
                    block_size=64,
                    recompute=recompute,
                    phases=[lemo.Phase("skip", keep=1.0, share=1.0, policy="random")],
                ),
            )
            ours = measure(model, ids)
            lemo.remove(model)
            for kind in reference:
                error, dense_error = worst_error(ours[kind], reference[kind]), worst_error(dense[kind], reference[kind])
                limit = 2 * dense_error if cuda else 1e-5
                failed |= not error <= limit
                rows.append(
                    {
                        "family": family,
                        "recompute": recompute,
                        "what": kind,
                        "dtype": str(dtype).removeprefix("torch."),
                        "error": error,
                        "dense_error": dense_error,
                        "limit": limit,
                        "ok": error <= limit,
                    }
                )
                print(rows[-1])
    write_results(args.out or f"equivalence-{device.type}", rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
