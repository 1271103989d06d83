"""A training loop of your own on several GPUs: data parallel, with divided weights, or one sequence over all of them.

  torchrun --nproc-per-node 2 examples/several_gpus.py                     # on a CPU: the demo's model, a minute or two
  torchrun --nproc-per-node 8 examples/several_gpus.py --engine fsdp --model meta-llama/Llama-3.1-8B --data books/
  torchrun --nproc-per-node 8 examples/several_gpus.py --engine sequence --context 524288 --model ... --data books/

--engine ddp: every process has the model, and windows of its own. fsdp: the same, but each has a part of the weights.
sequence: all processes are given the same windows, and divide each among themselves.
"""

import argparse
import os
from pathlib import Path

import lemo
import torch
from lemo.data import PackedWindows, load_documents
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["ddp", "fsdp", "sequence"], default="ddp", help="(default: %(default)s)")
    parser.add_argument("--model", default="demo/model", help="folder or name on the hub (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["python/lemo/**/*.py"], help="what to train on")
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--out", default="runs/several_gpus", help="folder for the adapter (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args, cuda = arguments(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the adapter's first weights are the same in every process

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows_per_step = 1 if args.engine == "sequence" else count
    documents = load_documents(args.data, tokenizer)
    windows = PackedWindows(documents, args.context, seed=0, length=args.steps * windows_per_step)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    if args.engine == "fsdp":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        model = model.to(device)

    group = distributed.group.WORLD if args.engine == "sequence" else None
    controller = lemo.apply(model, lemo.LemoConfig(recompute="full"), sequence_group=group)
    controller.total_steps = args.steps
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    # With FSDP2 and with a sequence group, the gradients are those of all processes after backward() already.
    called = DistributedDataParallel(model, [device.index] if cuda else None) if args.engine == "ddp" else model

    for step in range(args.steps):
        number = step if args.engine == "sequence" else step * count + rank
        batch = {name: tensor[None].to(device) for name, tensor in windows[number].items()}
        loss = called(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mode = controller.phase.mode
        controller.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}/{args.steps}  {mode:5}  loss {mean.item() / count:.4f}", flush=True)

    lemo.remove(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)  # every process takes part
    if rank == 0:
        model.save_pretrained(Path(args.out), state_dict=state)
        print(f"adapter in {args.out}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
