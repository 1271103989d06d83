"""Pretrain the demo's tiny Llama on Python's standard library. The weights in demo/model came from this script.

  python demo/pretrain.py prepare --out tokens [--stdlib /usr/lib/python3.11 ...]   tokenizer, train.bin, held.bin
  python demo/pretrain.py train --tokens tokens --out demo/model                    GPU (a few steps run anywhere)

Every step reads 32 windows of 4096 tokens, the native context. Matrices are trained
with Muon (momentum orthogonalised by Newton-Schulz iterations), embeddings and norms with AdamW. Documents follow one
another in path order, so a long window holds files of one package and longer context helps. The corpus is small for
the model: dropout and few epochs matter (a run of 53 epochs without dropout learned it by heart and was worthless
elsewhere). Seeded; training.json keeps the steps, the machine, and the loss by position on files never read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import default_roots, help_documents, library_documents
from torch import Tensor, nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
}
LENGTH = 4096
DROPOUT = 0.1  # of the embeddings and of what every sub-layer adds
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.6  # of the steps, linear to zero


# ---------------------------------------------------------------------------------------------------- text to tokens
def prepare(out: Path, roots: list[Path]) -> None:
    """Write tokenizer.json, tokenizer_config.json, train.bin, held.bin (uint16) and sources.json to `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    out.mkdir(parents=True, exist_ok=True)
    documents = [*help_documents(), *library_documents(roots)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents if not d.held_out), trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|pad|>",
                "model_max_length": LENGTH,
                "clean_up_tokenization_spaces": False,
            },
            indent=1,
        )
        + "\n"
    )
    sources: dict[str, object] = {"python": platform.python_version(), "folders": [root.name for root in roots]}
    for split, held in (("train", False), ("held", True)):
        chosen = [d for d in documents if d.held_out == held]
        ids: list[int] = []
        for start in range(0, len(chosen), 256):
            for encoding in tokenizer.encode_batch([d.text for d in chosen[start : start + 256]]):
                ids += [CONFIG["eos_token_id"], *encoding.ids]
        np.array(ids, dtype=np.uint16).tofile(out / f"{split}.bin")
        sources[split] = {
            "documents": len(chosen),
            "characters": sum(len(d.text) for d in chosen),
            "tokens": len(ids),
        }
    sources["held_out_documents"] = sorted(d.name for d in documents if d.held_out)
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    print(json.dumps({k: sources[k] for k in ("folders", "train", "held")}))


# --------------------------------------------------------------------------------------------------------- the model
class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), CONFIG["rms_norm_eps"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, self.head_dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        queries, keys = CONFIG["num_attention_heads"] * self.head_dim, CONFIG["num_key_value_heads"] * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (x.shape[0], x.shape[1], -1, self.head_dim)
        q, k, v = (p(x).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.post_attention_layernorm = RMSNorm(CONFIG["hidden_size"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), DROPOUT, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), DROPOUT, self.training)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = RMSNorm(CONFIG["hidden_size"])


class LanguageModel(nn.Module):
    """Parameter names are those of transformers' LlamaForCausalLM with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        frequencies = 1.0 / CONFIG["rope_parameters"]["rope_theta"] ** (
            torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"]
        )
        angles = torch.arange(LENGTH)[:, None] * torch.cat((frequencies, frequencies))[None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(p, 0.0, CONFIG["initializer_range"])
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, 0.0, p.shape[1] ** -0.5)

    def token_losses(self, ids: Tensor) -> Tensor:
        """Cross-entropy in nats of ids[:, 1:] given what precedes them: [batch, length - 1], float32."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        x = self.model.embed_tokens(inputs).bfloat16()  # always called under bf16 autocast
        x = F.dropout(x, DROPOUT, self.training)
        cos, sin = (t[: inputs.shape[1]].to(x.dtype) for t in (self.cos, self.sin))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight.to(x.dtype)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


# ------------------------------------------------------------------------------------------------------ the optimizer
def orthogonalise(m: Tensor) -> Tensor:
    """Newton-Schulz iterations towards the nearest orthogonal matrix, for a stack of matrices [n, rows, columns].

    The quintic's coefficients are those of Jordan et al., "Muon" (2024).
    """
    x = m.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of one shape are handled together."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in parameters:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": ps} for ps in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = group["params"]
            gradient = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(gradient.lerp(average, group["momentum"])).to(params[0].dtype)
            rows, columns = params[0].shape
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


# ----------------------------------------------------------------------------------------------------------- training
def rate(step: int, steps: int) -> float:
    """Linear warm-up, constant, linear decay to zero over the last DECAY_SHARE of the run."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - step / steps) / DECAY_SHARE)


@torch.no_grad()
def loss_by_position(model: LanguageModel, tokens: Tensor, windows: int = 256) -> dict[str, float]:
    """Held-out loss (nats per token) by position in windows of LENGTH tokens: it falls if context is used."""
    count = min(windows, (len(tokens) - 1) // LENGTH)
    losses = []
    model.eval()
    for i in range(0, count, 8):
        batch = torch.stack([tokens[j * LENGTH : (j + 1) * LENGTH + 1] for j in range(i, min(count, i + 8))]).long()
        with torch.autocast(batch.device.type, torch.bfloat16):
            losses.append(model.token_losses(batch))
    model.train()
    mean = torch.cat(losses).double().mean(0)
    edges = [0, 128, 256, 512, 1024, 2048, 3072, 4096]
    result = {f"{a}-{b}": round(mean[a:b].mean().item(), 4) for a, b in itertools.pairwise(edges)}
    return result | {"all": round(mean.mean().item(), 4)}


def train(tokens: Path, out: Path, steps: int, batch_tokens: int, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    train_ids, held_ids = (
        torch.from_numpy(np.fromfile(tokens / f"{s}.bin", dtype=np.uint16).astype(np.int32)).to(device)
        for s in ("train", "held")
    )
    model = LanguageModel().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(train_ids) / 1e6:.1f} M tokens, {device.type}", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, MUON_RATE),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    bases = [MUON_RATE, ADAM_RATE]

    def mean_loss(ids: Tensor) -> Tensor:
        return model.token_losses(ids).mean()

    compiled = torch.compile(mean_loss, dynamic=False) if device.type == "cuda" else mean_loss
    generator = torch.Generator(device=device).manual_seed(seed)

    windows = max(1, batch_tokens // LENGTH)

    def train_step(scale: float) -> Tensor:
        starts = torch.randint(len(train_ids) - LENGTH - 1, (windows, 1), generator=generator, device=device)
        ids = train_ids[starts + torch.arange(LENGTH + 1, device=device)].long()
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(ids)
        loss.backward()
        for optimizer, base in zip(optimizers, bases, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    train_step(0.0)  # compiles before the clock starts; a zero rate changes no weight
    begin = time.monotonic()
    for step in range(steps):
        loss = train_step(rate(step, steps))
        if (step + 1) % max(1, steps // 5) == 0:
            value, held = loss.item(), loss_by_position(model, held_ids, 16)["all"]
            print(f"step {step + 1} loss {value:.4f} held out {held:.4f}", flush=True)
            if not math.isfinite(value):
                raise RuntimeError(f"loss is {value} at step {step + 1}: lower the learning rates")
    seconds = time.monotonic() - begin

    out.mkdir(parents=True, exist_ok=True)
    save(model, tokens, out)
    report = {
        "parameters": parameters,
        "steps": steps,
        "tokens_seen": steps * windows * LENGTH,
        "tokens_in_corpus": len(train_ids),
        "seconds": round(seconds, 1),
        "seed": seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "final_train_loss": round(loss.item(), 4),
        "held_out_loss_by_position": loss_by_position(model, held_ids),
        "train_loss_by_position": loss_by_position(model, train_ids, 64),
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def save(model: LanguageModel, tokens: Path, out: Path) -> None:
    """A folder that transformers' from_pretrained loads: bf16 safetensors, config, tokenizer."""
    from safetensors.torch import save_file

    weights = {name: p.detach().to(torch.bfloat16).contiguous().cpu() for name, p in model.named_parameters()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "sources.json"):
        if (tokens / name).resolve() != (out / name).resolve():
            (out / name).write_bytes((tokens / name).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="train the tokenizer and write the token files")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--stdlib", type=Path, action="append", help="a standard library folder; repeatable")
    p = commands.add_parser("train", help="pretrain the model")
    p.add_argument("--tokens", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=1200)
    p.add_argument("--batch-tokens", type=int, default=131072)
    p.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.command == "prepare":
        prepare(a.out, a.stdlib or default_roots())
    else:
        train(a.tokens, a.out, a.steps, a.batch_tokens, a.seed)


if __name__ == "__main__":
    main()
