"""A training loop of your own with lemo: gradient accumulation, a learning-rate schedule, checkpoints and resumption.

  python examples/own_loop.py                 # the demo's model on this project's sources: a minute or two on a CPU
  python examples/own_loop.py --resume        # continues a run that was interrupted, with the same arguments
  python examples/own_loop.py --model meta-llama/Llama-3.1-8B --data books/ --context 32768 --steps 300

lemo asks three things of a loop: set `controller.total_steps` before it, call `controller.step()` after every optimizer
step, and `controller.seek(step)` after a resume.
"""

import argparse
from pathlib import Path

import lemo
import torch
from lemo.data import PackedWindows, load_documents
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder or name on the hub (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["python/lemo/**/*.py"], help="what to train on")
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="windows per optimizer step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--out", default="runs/own_loop", help="folder for the adapter (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Windows are a pure function of seed and index, so a resumed run reads on at the step's number.
    windows = PackedWindows(
        load_documents(args.data, tokenizer), args.context, seed=0, length=args.steps * args.accumulate
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)

    controller = lemo.apply(model, lemo.LemoConfig(recompute="full"))  # half of the tokens, then exact steps at the end
    controller.total_steps = args.steps
    model.train()

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    first = 0
    if args.resume:
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first = state["step"]
        controller.seek(first)  # the phase and every random choice of lemo are functions of the step's number

    for step in range(first, args.steps):
        total = 0.0
        for i in range(step * args.accumulate, (step + 1) * args.accumulate):
            batch = {name: tensor[None].to(device) for name, tensor in windows[i].items()}
            loss = model(**batch).loss / args.accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mode, kept = controller.phase.mode, controller.kept_ratios
        controller.step()
        print(f"step {step + 1}/{args.steps}  {mode:5}  kept {sum(kept) / len(kept):.2f}  loss {total:.4f}", flush=True)
        if (step + 1) % args.save_every == 0:
            state = {"step": step + 1, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(state | {"adapter": get_peft_model_state_dict(model)}, out / "checkpoint.part")
            (out / "checkpoint.part").replace(out / "checkpoint.pt")  # never half of a checkpoint

    lemo.remove(model)
    model.save_pretrained(out)
    print(f"adapter in {out}")


if __name__ == "__main__":
    main()
