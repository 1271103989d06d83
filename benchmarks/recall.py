"""Recall of predictor-chosen blocks against the exact scores of the frozen model, on text not trained on.

Trains predictors on --train and measures them on the --dev files (raw uint16 tokens): per layer and per file, at the
calibrated budget and a tighter one. `position_recall` is what keeping the earliest blocks reaches without a predictor.

  python benchmarks/recall.py --model MODEL --train train.bin --dev dev_*.bin
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import table, write_results

# "dense": layers see what the frozen model shows them; "with elimination": what they see in training, where blocks that
# the exact scores did not choose were left out of the layers before.
READINGS = ("dense", "with elimination")


def windows(path: str, context: int) -> np.ndarray:
    tokens = np.fromfile(path, dtype=np.uint16)
    count = len(tokens) // context
    if count == 0:
        raise SystemExit(f"{path}: {len(tokens)} tokens, fewer than one window of {context}")
    return tokens[: count * context].reshape(count, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, nargs="+")
    parser.add_argument("--dev", required=True, nargs="+")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3], help="the first one is calibrated for")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--documents", type=int, default=64, help="windows of training text the model reads")
    parser.add_argument("--dev-windows", type=int, default=4, help="windows of each dev file, evenly spaced")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--pool", choices=("mean", "max"), default="max")
    parser.add_argument("--normalize", action="store_true", help="exact scores per visible query block")
    parser.add_argument("--rope-factor", type=float, default=1.0, help="position interpolation for longer contexts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="recall-lm46", help="result file, or a name in results/")
    parser.add_argument("--save", help="keep the predictors in this folder")
    args = parser.parse_args()

    from lemo.predictors import calibrate
    from lemo.predictors.report import evaluate_budgets, format_report
    from transformers import AutoConfig, AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    if args.rope_factor != 1.0:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": args.rope_factor}
        config.max_position_embeddings = int(config.max_position_embeddings * args.rope_factor)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=dtype, trust_remote_code=False).to(
        "cuda" if cuda else "cpu"
    )
    train = [windows(path, args.context) for path in args.train]

    def batches() -> Iterator[torch.Tensor]:
        rng = np.random.default_rng(args.seed)
        sizes = np.array([len(w) for w in train], float)
        while True:
            source = train[rng.choice(len(train), p=sizes / sizes.sum())]
            yield torch.from_numpy(source[rng.integers(len(source))].astype(np.int64))

    start = time.perf_counter()
    predictors = calibrate(
        model,
        batches(),
        block_size=args.block_size,
        keep=args.keep[0],
        steps=args.steps,
        max_documents=args.documents,
        batch_size=args.batch_size,
        pool=args.pool,
        normalize=args.normalize,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start
    if args.save:
        predictors.save(args.save, overwrite=True)
    rows = []
    columns = ("recall", "precision", "position_recall", "informativeness_kept")
    for path in args.dev:
        held = windows(path, args.context)
        picked = held[np.linspace(0, len(held) - 1, min(len(held), args.dev_windows)).astype(int)]
        pieces = [torch.from_numpy(w.astype(np.int64)) for w in picked]
        for reading in READINGS:
            eliminating = reading == "with elimination"
            for report in evaluate_budgets(model, predictors, pieces, args.keep, eliminating=eliminating):
                place = {"file": Path(path).stem, "reading": reading, "keep": report["keep"]}
                rows += [{**place, "layer": layer, **row} for layer, row in enumerate(report["layers"])]
    summary = []
    for reading, keep in itertools.product(READINGS, args.keep):
        chosen = [r for r in rows if r["keep"] == keep and r["reading"] == reading]
        place = {"reading": reading, "keep": keep}
        by_layer = [
            {**place, "layer": i} | {c: float(np.mean([r[c] for r in chosen if r["layer"] == i])) for c in columns}
            for i in sorted({r["layer"] for r in chosen})
        ]
        summary.append({**place, "layer": "mean"} | {c: float(np.mean([r[c] for r in by_layer])) for c in columns})
        print(table([*by_layer, summary[-1]], ("reading", "keep", "layer", *columns)))
    print(format_report(predictors.report))
    parameters = predictors.report["parameters"]
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "train", "dev", "out", "save")}
    path = write_results(
        args.out,
        rows,
        model=Path(args.model).name,
        settings=settings,
        mean=summary,
        parameters={k: sum(v) for k, v in parameters.items()},
        calibration_seconds=round(seconds, 1),
        loss=predictors.report["loss"],
    )
    print(path)


if __name__ == "__main__":
    main()
