"""The cases of peft's common tester (its ``tests/testing_common.py``, 0.21), of this tuner.

Each of them is a function of its name here, or stands in :data:`ELSEWHERE` with the test that sees
it, or in :data:`LEFT_OUT` with its reason.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import hub

from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.tuner import GemConfig
from tests.deltas import bits
from tests.tiny import make_model
from tests.tuner.test_tuner import ARCHITECTURES, WEIGHTS, batch, delta_of, fill, logits

#: peft asks transformers by names that it is going to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]

#: Cases of peft's tester that cannot be, and why.
LEFT_OUT = {
    "merge_layers_multi": "an entry has one value, so one adapter is merged at a time",
    "mixed_adapter_batches": "values stand in the weights, one adapter's at a time; refused",
    "generate_with_mixed_adapter_batches_and_beam_search": "as mixed_adapter_batches",
    "weighted_combination_of_adapters": "gem-ds delta merge combines deltas, which adapters are",
    "training_layer_indexing": "the mask says which layers; there is no layers_to_transform",
    "training_prompt_learning_tasks": "no prompt is learnt",
    "adding_multiple_adapters_with_bias_raises": "biases are not trained, modules_to_save does it",
    "lora_conversion": "peft converts additive updates of all of a weight; not supported by most",
}

#: Cases that a test of this folder's other files sees, or that are of peft's own code.
ELSEWHERE = {
    "model_attr": "peft's own",
    "delete_unknown_adapter_raises": "peft's own",
    "generate_pos_args": "peft's own; what is generated: generate",
    "delete_inactive_adapter": "delete_adapter deletes both kinds",
    **dict.fromkeys(
        ("training", "unload_adapter"), "training_is_dense_masked_adamw_and_the_base_stays"
    ),
    "training_gradient_checkpointing": "checkpointing_and_accumulation_change_no_gradient",
    **dict.fromkeys(
        ("save_pretrained", "inference_safetensors"), "a_saved_adapter_is_loaded_to_the_bit"
    ),
    "load_model_low_cpu_mem_usage": "an_adapter_is_saved_loaded_and_a_delta",
}


def base(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return make_model(architecture, dtype, dropout=0.0).eval()


def config_of(delta: Delta) -> GemConfig:
    return GemConfig(mask=delta.mask, task_type="CAUSAL_LM")


def adapted(
    architecture: str, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Any, Delta]:
    """A model with an adapter that changes it, and what that should be."""
    model = base(architecture, dtype)
    delta = delta_of(model)
    model = get_peft_model(model, config_of(delta), **more).eval()
    return fill(model, delta, more.get("adapter_name", "default")), delta


def expected(
    architecture: str, delta: Delta, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    model = base(architecture, dtype)
    apply_delta(model, delta)
    return model


def adapter_name(architecture: str, folder: Path) -> None:
    model, _ = adapted(architecture, adapter_name="test-adapter")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith(".gem_entries.test-adapter.values") for name in trained)
    assert "gem.GemLayer" in repr(model)


def prepare_for_training(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    ids = batch()["input_ids"]
    assert not model.get_input_embeddings()(ids).requires_grad
    frozen = prepare_model_for_kbit_training(base(architecture), use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    model = get_peft_model(frozen, config_of(delta))
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad


def load_multiple_adapters(architecture: str, folder: Path) -> None:
    """Also to where nothing lies in memory before."""
    model, _ = adapted(architecture)
    model.save_pretrained(str(folder))
    loaded: Any = PeftModel.from_pretrained(base(architecture), str(folder))
    for low in (False, True):
        more = {"adapter_name": f"low {low}", "low_cpu_mem_usage": low}
        assert loaded.load_adapter(str(folder), **more).missing_keys == []
        loaded.set_adapter(f"low {low}")
        assert torch.equal(logits(loaded), logits(model))


def state_of(model: Any) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def save_pretrained_selected_adapters(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    model.add_adapter("new_adapter", config_of(delta))
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(base(architecture), str(folder))
    loaded.load_adapter(str(folder / "new_adapter"), "new_adapter")
    assert state_of(loaded) == state_of(model)
    for place in (folder, folder / "new_adapter"):
        names = {path.name for path in place.iterdir()}
        assert {WEIGHTS, "adapter_config.json"} <= names
        assert not names & {"model.safetensors", "config.json"}
    model.save_pretrained(str(folder / "one"), selected_adapters=["default"])
    assert not (folder / "one" / "new_adapter").exists()


def save_pretrained_adapter_name_substring(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    count = len(get_peft_model_state_dict(model))
    assert count == 2 * len(delta.values)
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, config_of(delta))
    model.save_pretrained(str(folder), selected_adapters=["default"])
    assert len(load_file(folder / WEIGHTS)) == count


def from_pretrained_config_construction(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    model.save_pretrained(str(folder))
    config = config_of(delta)
    loaded: Any = PeftModel.from_pretrained(
        base(architecture), str(folder), is_trainable=False, config=config
    )
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert torch.equal(logits(loaded), logits(model))


def merge_layers_fp16(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture, torch.float16)
    merged = model.to(dtype=torch.float16).merge_and_unload()
    assert bits(merged) == bits(expected(architecture, delta, torch.float16))


def merge_layers_nan(architecture: str, folder: Path) -> None:
    model, _ = adapted(architecture)
    for wrong in (torch.nan, torch.inf):
        for name, parameter in model.named_parameters():
            if model.prefix in name:
                parameter.data[0] = wrong
        before = bits(model)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_and_unload(safe_merge=True)
        assert bits(model) == before


def merge_layers(architecture: str, folder: Path) -> None:
    model, _ = adapted(architecture)
    before, with_adapter = logits(base(architecture)), logits(model)
    assert not torch.allclose(before, with_adapter)
    model.merge_adapter()
    assert torch.equal(logits(model), with_adapter)
    model.unmerge_adapter()
    assert torch.equal(logits(model), with_adapter)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    assert torch.equal(logits(merged), with_adapter)
    merged.save_pretrained(folder)
    assert torch.equal(logits(type(merged).from_pretrained(folder)), with_adapter)


def merge_layers_is_idempotent(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert bits(model.unload()) == bits(expected(architecture, delta))


def safe_merge(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    assert bits(model.merge_and_unload(safe_merge=True)) == bits(expected(architecture, delta))


def generate(architecture: str, folder: Path) -> None:
    model, delta = adapted(architecture)
    inputs = {"input_ids": batch()["input_ids"], "max_new_tokens": 3, "do_sample": False}
    found = model.generate(**inputs)
    assert torch.equal(found, expected(architecture, delta).generate(**inputs))


def generate_half_prec(architecture: str, folder: Path) -> None:
    """Merged it says the same."""
    model, _ = adapted(architecture, torch.bfloat16)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    inputs = {"input_ids": torch.tensor([[1, 1, 1], [2, 1, 2]]), "attention_mask": mask}
    found = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert found.shape == (2, 5)
    model.merge_adapter()
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), found)


def peft_model_device_map(architecture: str, folder: Path) -> None:
    model, _ = adapted(architecture)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(base(architecture), str(folder), device_map={"": "cpu"})
    assert torch.equal(logits(loaded.to("cpu")), logits(model))


def delete_adapter(architecture: str, folder: Path) -> None:
    for is_active in (True, False):
        model, delta = adapted(architecture)
        with_adapter = logits(model)
        model.add_adapter("delete_me", config_of(delta))
        if is_active:
            model.set_adapter("delete_me")
        model.delete_adapter("delete_me")
        assert model.active_adapters == ["default"]
        assert not any("delete_me" in name for name in model.state_dict())
        assert torch.equal(logits(model), with_adapter)
        model.delete_adapter("default")
        assert model.active_adapters == []
        assert torch.equal(logits(model.base_model), logits(base(architecture)))


def disable_adapter(architecture: str, folder: Path) -> None:
    """A merged one too."""
    model, delta = adapted(architecture)
    with_adapter = logits(model)
    plain = model.unload()  # whose bits are the base's; sums hang on where in memory it lies
    before = logits(plain)
    assert not torch.allclose(before, with_adapter)
    model = fill(get_peft_model(plain, config_of(delta)).eval(), delta)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), with_adapter)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def passing_input_embeds_works(architecture: str, folder: Path) -> None:
    model, _ = adapted(architecture)
    ids = batch(7)["input_ids"]
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(found, logits(model))


def get_base_model_state_dict_and_set(architecture: str, folder: Path) -> None:
    model, _ = adapted(architecture)
    original = {name: tensor.clone() for name, tensor in base(architecture).state_dict().items()}
    for changes in (False, True):
        if changes:
            for parameter in model.get_base_model().parameters():
                parameter.data.add_(0.1)
            result = set_base_model_state_dict(model, original, strict=False)
            assert not result.missing_keys
            assert not result.unexpected_keys
        found = get_base_model_state_dict(model)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def push_to_hub(architecture: str, folder: Path) -> None:
    """Not of peft's list: what is uploaded, the Hub's API replaced."""
    model, _ = adapted(architecture)
    uploaded: dict[str, bytes] = {}

    def create_commit(**options: Any) -> None:
        for operation in options["operations"]:
            uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id),
        create_commit=create_commit,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "hf_api", lambda: api)
        patch.setattr(hub.ModelCard, "load", classmethod(lambda cls, *_, **__: hub.ModelCard("")))
        model.push_to_hub("someone/adapter")
    assert uploaded.keys() >= {WEIGHTS, "adapter_config.json", "README.md"}
    assert json.loads(uploaded["adapter_config.json"])["peft_type"] == "GEM"
    for name, content in uploaded.items():
        (folder / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(base(architecture), str(folder))
    assert torch.equal(logits(loaded), logits(model))


CASES: list[Callable[[str, Path], None]] = [
    adapter_name,
    prepare_for_training,
    load_multiple_adapters,
    save_pretrained_selected_adapters,
    save_pretrained_adapter_name_substring,
    from_pretrained_config_construction,
    merge_layers_fp16,
    merge_layers_nan,
    merge_layers,
    merge_layers_is_idempotent,
    safe_merge,
    generate,
    generate_half_prec,
    peft_model_device_map,
    delete_adapter,
    disable_adapter,
    passing_input_embeds_works,
    get_base_model_state_dict_and_set,
    push_to_hub,
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_case_of_pefts_tester(case, architecture, tmp_path):
    case(architecture, tmp_path)


def test_what_is_left_out_is_refused_where_it_would_be_wrong():
    model, delta = adapted("llama")
    model.add_adapter("other", config_of(delta))
    with pytest.raises(ValueError, match="cannot be of several adapters"):
        model(**batch(), adapter_names=["default", "other"] * 2)
    with pytest.raises(ValueError, match="cannot be of several adapters"):
        model.generate(input_ids=batch()["input_ids"], adapter_names=["default", "other"] * 2)
    with pytest.raises(ValueError, match="is merged: unmerge it before"):
        model.merge_adapter(["default", "other"])
    with pytest.raises(AttributeError):
        model.add_weighted_adapter(["default", "other"], [1, 1], "both")
    with pytest.raises(TypeError, match="layers_to_transform"):
        GemConfig(mask=delta.mask, layers_to_transform=[0])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="bias"):
        GemConfig(mask=delta.mask, bias="all")  # type: ignore[call-arg]
    assert not model.supports_lora_conversion()
    assert not {case.__name__ for case in CASES} & (LEFT_OUT.keys() | ELSEWHERE.keys())
