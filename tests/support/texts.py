"""Text that the tiny tokenizer of these tests knows."""

from __future__ import annotations

import torch

SENTENCE = "the block of tokens keeps its own place while every other layer may leave it out and come back later"
WORDS = SENTENCE.split(" ")


def make_text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in picks) + "."
