"""Fine-tune on conversations with TRL's SFTTrainer and lemo: the loss is over the assistant's answers alone.

  python examples/trl_chat.py     # the demo's model, questions on this project's sources: a minute or two on a CPU
  python examples/trl_chat.py --model meta-llama/Llama-3.1-8B-Instruct --data chats.jsonl --context 16384 --steps 300

--data is JSON lines, each with "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].
If answers are short compared with their prompts, lemo always keeps the blocks that hold them and eliminates others.
"""

import argparse
import ast
from pathlib import Path

import lemo
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

# For tokenizers without a template, such as the demo's. {% generation %} marks what the loss is over.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '## ' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)


def questions_on_sources() -> Dataset:
    """A module of this project and what it is for, by its first lines."""
    chats = []
    for path in sorted(Path("python/lemo").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if answer := ast.get_docstring(ast.parse(source)):
            question = f"{source[: 2 * len(answer) + 1500]}\n\nWhat is this module for?"
            chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return Dataset.from_dict({"messages": chats})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder or name on the hub (default: %(default)s)")
    parser.add_argument("--data", help="JSON lines of conversations (default: questions on this project's sources)")
    parser.add_argument("--context", type=int, default=2048, help="tokens per conversation (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--out", default="runs/trl_chat", help="folder for the adapter (default: %(default)s)")
    args = parser.parse_args()

    data = load_dataset("json", data_files=args.data, split="train") if args.data else questions_on_sources()
    parts = data.train_test_split(test_size=max(1, len(data) // 10), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.out,
            assistant_only_loss=True,
            max_length=args.context,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            bf16=cuda,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    controller = lemo.apply(trainer.model, lemo.LemoConfig())  # SFTTrainer added the adapters: apply to its model
    trainer.add_callback(controller.callback())

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    lemo.remove(trainer.model)
    trainer.save_model(args.out)
    print(f"held-out loss of the dense model: {before:.4f} before, {after:.4f} after; adapter in {args.out}")


if __name__ == "__main__":
    main()
