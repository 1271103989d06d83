"""Fine-tune on long documents with the transformers Trainer, PEFT and lemo; save a plain PEFT adapter.

  python examples/trainer.py                  # the demo's model on this project's sources: a minute or two on a CPU
  python examples/trainer.py --model meta-llama/Llama-3.1-8B --data books/ --context 16384 --steps 300

--data takes text files, folders, globs, JSON lines, Parquet and token files: see `help(lemo.data)`. The held-out loss
is that of the dense model, before and after: nothing is eliminated while a model is evaluated.
"""

import argparse

import lemo
import torch
from lemo.data import PackedWindows, load_documents, split_held_out
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder or name on the hub (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["python/lemo/**/*.py"], help="what to train on")
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the tokens kept (default: %(default)s)")
    parser.add_argument("--out", default="runs/trainer", help="folder for the adapter (default: %(default)s)")
    args = parser.parse_args()

    # Windows of documents laid end to end, with position_ids that restart at every document: attention stays within.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, held_out = split_held_out(load_documents(args.data, tokenizer), fraction=0.1, seed=0)
    evaluation = PackedWindows(held_out, args.context, seed=0)

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32
    )
    model.config.use_cache = False  # with a cache, transformers does not look for documents in position_ids
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))

    # Skip tokens for most of the steps, then end with exact ones, so that the adapter fits the model that is served.
    phases = [lemo.Phase("skip", keep=args.keep, share=0.85), lemo.Phase("dense", share=0.15)]
    # recompute="full" takes the place of gradient checkpointing: lemo runs the layers itself.
    controller = lemo.apply(model, lemo.LemoConfig(phases=phases, recompute="full"))

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            prediction_loss_only=True,
            report_to="none",
        ),
        train_dataset=PackedWindows(train, args.context, seed=0, length=args.steps),
        eval_dataset=torch.utils.data.Subset(evaluation, range(min(8, len(evaluation)))),
        callbacks=[controller.callback()],  # tells lemo which step it is, and logs what was kept
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    lemo.remove(model)
    model.save_pretrained(args.out)
    print(f"held-out loss of the dense model: {before:.4f} before, {after:.4f} after; adapter in {args.out}")


if __name__ == "__main__":
    main()
