"""Adapters of PEFT: the gradients of plain training, or a refusal by name; and models that are spread out."""

from typing import Any

import lemo
import peft
import pytest
import torch
from lemo.engine.families import UnsupportedModelError
from support.models import LAYERS, base, lora, tuned
from torch import nn

TARGETS = ["q_proj", "v_proj"]
DENSE = lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")])

# Without an initialization that makes gradients zero, where the kind can do that.
RANDOM = {"init_weights": False}
WORKS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": TARGETS, "init_lora_weights": False},
    "DoRA": {"kind": "LoraConfig", "target_modules": TARGETS, "init_lora_weights": False, "use_dora": True},
    "embedding and head": {
        "kind": "LoraConfig",
        "target_modules": [*TARGETS, "embed_tokens", "lm_head"],
        "init_lora_weights": False,
    },
    "saved modules": {
        "kind": "LoraConfig",
        "target_modules": TARGETS,
        "modules_to_save": ["norm", "mlp"],
        "init_lora_weights": False,
    },
    "new tokens": {
        "kind": "LoraConfig",
        "target_modules": TARGETS,
        "trainable_token_indices": [5, 6],
        "init_lora_weights": False,
    },
    "target parameters": {
        "kind": "LoraConfig",
        "target_modules": [],
        "target_parameters": ["mlp.gate_proj.weight"],
        "init_lora_weights": False,
    },
    "biases": {"kind": "LoraConfig", "target_modules": TARGETS, "bias": "lora_only", "init_lora_weights": False},
    "bias of B": {"kind": "LoraConfig", "target_modules": TARGETS, "lora_bias": True, "init_lora_weights": False},
    "MiCA": {
        "kind": "LoraConfig",
        "needs": "MiCALinearVariant",
        "target_modules": TARGETS,
        "init_lora_weights": "mica",
    },
    "layer replication": {"kind": "LoraConfig", "target_modules": TARGETS, "layer_replication": [[0, 2], [1, 2]]},
    "AdaLoraConfig": {"target_modules": TARGETS, "total_step": 10, "tinit": 1, "tfinal": 1},
    "IA3Config": {
        "target_modules": [*TARGETS, "down_proj"],
        "feedforward_modules": ["down_proj"],
        "init_ia3_weights": False,
    },
    "LoHaConfig": {"target_modules": TARGETS, **RANDOM},
    "LoKrConfig": {"target_modules": TARGETS, **RANDOM},
    "OFTConfig": {"target_modules": TARGETS, "r": 0, "oft_block_size": 8, **RANDOM},
    "BOFTConfig": {"target_modules": TARGETS, "boft_block_size": 8, **RANDOM},
    "HRAConfig": {"target_modules": TARGETS, **RANDOM},
    "VeraConfig": {"target_modules": TARGETS, **RANDOM},
    "VBLoRAConfig": {"target_modules": TARGETS, "vector_length": 8, "num_vectors": 16},
    "FourierFTConfig": {"target_modules": TARGETS, "n_frequency": 10, **RANDOM},
    "MissConfig": {"target_modules": TARGETS, "r": 8, **RANDOM},
    "ShiraConfig": {"target_modules": TARGETS, "r": 4, **RANDOM},
    "C3AConfig": {"target_modules": TARGETS, "block_size": 8, **RANDOM},
    "RoadConfig": {"target_modules": TARGETS, "group_size": 16, **RANDOM},
    "BeftConfig": {"target_modules": TARGETS},
    "DeftConfig": {"target_modules": TARGETS},
    "DeloraConfig": {"target_modules": TARGETS},
    "GloraConfig": {"target_modules": TARGETS},
    "GraloraConfig": {"target_modules": TARGETS, "r": 8},
    "HiraConfig": {"target_modules": TARGETS},
    "LilyConfig": {"target_modules": TARGETS},
    "OSFConfig": {"target_modules": TARGETS},
    "PeanutConfig": {"target_modules": TARGETS},
    "PsoftConfig": {"target_modules": TARGETS, "r": 8},
    "RandLoraConfig": {"target_modules": TARGETS, "r": 4},
    "SupertuningConfig": {"target_modules": TARGETS},
    "TinyLoraConfig": {"target_modules": TARGETS},
    "UniLoraConfig": {"target_modules": TARGETS},
    "WaveFTConfig": {"target_modules": TARGETS, "n_frequency": 10},
    "TrainableTokensConfig": {"token_indices": [5, 6]},
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "MultitaskPromptTuningConfig": {"num_virtual_tokens": 4, "num_tasks": 2},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PrefixTuningConfig": ({"num_virtual_tokens": 4}, "PrefixTuningConfig: it trains a cache"),
    "CPTConfig": (
        {"cpt_token_ids": [7, 8], "cpt_tokens_type_mask": [1, 2], "cpt_mask": [1, 1]},
        "CPTConfig: its own loss reads the logits",
    ),
    "PolyConfig": ({"target_modules": TARGETS, "n_tasks": 2, "n_skills": 2}, "Poly .*q_proj.*the rows of a batch"),
    "aLoRA": (
        {"kind": "LoraConfig", "target_modules": TARGETS, "alora_invocation_tokens": [5, 6]},
        "aLoRA.*the rows of a batch",
    ),
    "ShadowConfig": ({}, "ShadowConfig: it runs a second stack of states"),
    "MonteCLoRA": (
        {
            "kind": "LoraConfig",
            "needs": "MontecloraLinearVariant",
            "target_modules": TARGETS,
            "monteclora_config": {},
        },
        "MonteCLoRA.*q_proj.*buffer",
    ),
    "LNTuningConfig": ({}, r"model\.(norm|layers\.0\.input_layernorm).*LNTuningLayer"),
    "AdaptionPromptConfig": ({"adapter_len": 4, "adapter_layers": 1}, r"self_attn.*AdaptedAttention"),
}


def adapted(name, options, family="llama"):
    options = dict(options)
    kind = getattr(peft, options.pop("kind", name), None)
    if kind is None:
        pytest.skip(f"this PEFT has no {name}")
    if not hasattr(peft.tuners.lora.variants, options.pop("needs", "DoraLinearVariant")):
        pytest.skip(f"this PEFT has no {name}")
    if "monteclora_config" in options:
        options["monteclora_config"] = peft.MontecloraConfig()
    torch.manual_seed(1)
    model = peft.get_peft_model(base(family, layers=2), kind(task_type="CAUSAL_LM", **options)).train()
    for p in model.parameters():
        if p.requires_grad and p.numel() > 1 and not p.any():
            nn.init.normal_(p, std=0.05)
    return model


def batch(name):
    torch.manual_seed(2)
    ids = torch.randint(7, 89, (2, 40))
    return {"input_ids": ids, "labels": ids} | ({"task_ids": torch.tensor([0, 1])} if "Multitask" in name else {})


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Every kind on one family; on the others, those that differ in what they put where.
OTHERS = ("DoRA", "embedding and head", "saved modules", "new tokens", "PromptTuningConfig")


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", name) for name in WORKS] + [(family, name) for family in LAYERS if family != "llama" for name in OTHERS],
)
def test_gradients_are_those_of_plain_training(family, name):
    options = dict(WORKS[name])
    if family == "opt" and name == "saved modules":
        options["modules_to_save"] = ["final_layer_norm", "fc1", "fc2"]
    model, inputs = adapted(name, options, family), batch(name)
    expected = gradients(model, inputs)
    controller = lemo.apply(model, DENSE)
    got = gradients(model, inputs)
    assert set(controller.kept_ratios) == {1.0}
    assert got.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (got[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, parameter


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    options, message = REFUSED[name]
    model = adapted(name, options)
    with pytest.raises(UnsupportedModelError, match=message):
        lemo.apply(model, DENSE)
    assert "forward" not in model.get_base_model().__dict__


@pytest.mark.parametrize("name", ["PolyConfig", "aLoRA", "PrefixTuningConfig"])
def test_an_adapter_that_comes_later_is_refused_in_the_first_step(name):
    plain = base("llama", layers=2)
    lemo.apply(plain, DENSE)
    options = dict(REFUSED[name][0])
    model = peft.get_peft_model(plain, getattr(peft, options.pop("kind", name))(task_type="CAUSAL_LM", **options))
    inputs = batch(name) | ({"task_ids": torch.tensor([0, 1])} if name == "PolyConfig" else {})
    inputs["input_ids"][:, 3:5] = torch.tensor([5, 6])
    with pytest.raises(ValueError, match=r"lemo does not support (Poly|aLoRA)|prefix tuning, cartridges"):
        model.train()(**inputs)


def test_two_active_adapters():
    model = tuned("llama")
    config = peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    inputs = batch("two")
    expected = gradients(model, inputs)
    lemo.apply(model, DENSE)
    got = gradients(model, inputs)
    assert got.keys() == expected.keys() and any("second" in n for n in got)
    for parameter, gradient in expected.items():
        assert (got[parameter] - gradient).norm() <= 1e-4 * gradient.norm()


# --- models that are spread out ---------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fully_sharded(group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = tuned("llama")
    lemo.apply(model, DENSE)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model.get_base_model().model.layers[1], mesh=mesh)
    with pytest.raises(UnsupportedModelError, match=r"fully_shard was called on 1 of 3 layers.*FSDP2"):
        model(**batch("fsdp"))
    with pytest.raises(UnsupportedModelError, match="does not support FullyShardedDataParallel"):
        lemo.apply(FullyShardedDataParallel(base("llama"), device_id=torch.device("cpu")), DENSE)


@pytest.mark.parametrize("original", [False, True])
def test_sharded_as_a_whole(group, original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = base("llama").train()
    lemo.apply(model, DENSE)
    outer = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(UnsupportedModelError, match=r"whole weights of a layer.*FSDP .version 1. shards them"):
        outer(**batch("fsdp"))


def test_zero_3():
    model = tuned("llama")
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.ds_id = 0
    with pytest.raises(UnsupportedModelError, match="ZeRO-3 partitions them"):
        lemo.apply(model, DENSE)


def test_a_batch_on_another_device():
    model = base("llama").train()
    lemo.apply(model, DENSE)
    ids = batch("meta")["input_ids"].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"the batch is on meta, the model on cpu.*DataParallel"):
        model(input_ids=ids)


def test_distributed_data_parallel(group):
    plain, spread, inputs = tuned("llama"), tuned("llama"), batch("ddp")
    expected = gradients(plain, inputs)
    outer = nn.parallel.DistributedDataParallel(spread)
    controller = lemo.apply(outer, DENSE)
    got = gradients(outer, inputs)
    assert len(controller.kept_ratios) == 3
    for name, gradient in expected.items():
        torch.testing.assert_close(got[f"module.{name}"], gradient, rtol=1e-4, atol=1e-6)
    lemo.remove(outer)
    assert "forward" not in spread.get_base_model().__dict__


def test_lora_below_a_device_map(tmp_path):
    """One device, as Accelerate dispatches it, works; several are refused."""
    model = lora(base("llama"), TARGETS).train()
    model.get_base_model().model.layers[2].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"whole model on one device.*cpu, meta.*device_map"):
        lemo.apply(model, DENSE)
