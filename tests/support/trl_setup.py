"""A tiny chat tokenizer, model and data sets for TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from support.models import ATTENTION, lora
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the hungry bear"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}<end>{% else %}<assistant>"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        [TEXT], BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def model(vocabulary: int) -> Any:
    """Not trained, with random adapters, so that no gradient is zero by construction."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(vocabulary: int) -> Any:
    return lora(model(vocabulary), ATTENTION["llama"])


def untouched(vocabulary: int) -> Any:
    """With adapters that change nothing yet: the policy is the reference."""
    made = adapted(vocabulary)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return made


WORDS = TEXT.split()


def texts() -> Dataset:
    return Dataset.from_list([{"text": " ".join(WORDS[i:] + WORDS[: 2 * i])} for i in range(8)])


def chats() -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": " ".join(WORDS[i : i + 6])},
                    {"role": "assistant", "content": " ".join(WORDS[: i + 3])},
                ]
            }
            for i in range(8)
        ]
    )


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(WORDS[: i + 3]),
                "chosen": " " + " ".join(WORDS[i:]),
                "rejected": " " + " ".join(reversed(WORDS[i:])),
            }
            for i in range(8)
        ]
    )


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-2, "gradient_checkpointing": False, **options,
    }  # fmt: skip
