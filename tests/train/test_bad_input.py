"""What is wrong is refused in one sentence, before any weight is loaded, and by all ranks together.

``refusals`` is a table of command lines, each with what its sentence must say. One process runs it
line by line; then two ranks run it together, and both have to come back from every line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gem_ds.files.checkpoint import Checkpoint, list_checkpoints
from gem_ds.train import main as train
from gem_ds.train import run
from tests.ranks import run_ranks
from tests.tiny_model import REPOSITORY, Tiny, joined, make_tiny, one_rank, write_jsonl

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]

LAYER = "model.layers.0.self_attn.v_proj.weight"


@dataclass(frozen=True)
class Refusal:
    """A command line, and a regular expression that its sentence matches."""

    flags: list[str]
    message: str


class Workshop:
    """Makes the files that the bad command lines name; one run has gone well before."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.run = tiny.folder / "run"
        train.main(tiny.flags(self.run, max_steps=4, save_steps=2))

    def flags(self, *switches: str, **values: object) -> list[str]:
        """A good command line but for ``values``; its output folder does not exist."""
        return self.tiny.flags(self.tiny.folder / "new", *switches, **{"max_steps": 3} | values)

    def resume(self, checkpoint: object = "last", **values: object) -> list[str]:
        defaults = {
            "output_dir": self.run,
            "resume_from_checkpoint": checkpoint,
            "max_steps": 6,
        }
        return self.flags(**defaults | values)

    def file(self, name: str, content: object) -> Path:
        path = self.tiny.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def deepspeed(self, name: str, **content: object) -> list[str]:
        return self.flags(deepspeed=self.file(f"{name}.json", content))

    def data(self, name: str, *rows: dict[str, object]) -> Path:
        """A data folder whose training file has these rows."""
        folder = self.tiny.folder / name
        write_jsonl(folder / "train.jsonl", list(rows))
        shutil.copy(self.tiny.data / "test.jsonl", folder)
        return folder

    def model(self, name: str, edit: Callable[[Path], object], **config: object) -> Path:
        """A copy of the model folder after ``edit``."""
        folder = self.tiny.variant(name, **config)
        edit(folder)
        return folder

    def weights(self, name: str, edit: Callable[[dict[str, Any]], object]) -> Path:
        """A copy of the model with other weights."""
        folder = self.tiny.variant(name)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def spoiled(
        self, source: Path, name: str, edit: Callable[[dict[str, Any], Any], object]
    ) -> Path:
        """A copy of a mask or delta file with other tensors or metadata."""
        with safe_open(source, framework="pt") as file:
            header = json.loads(file.metadata()["gem"])
        tensors = load_file(source)
        edit(tensors, header)
        path = self.tiny.folder / f"{name}.safetensors"
        save_file(tensors, path, metadata={"gem": json.dumps(header)})
        return path


def _rename(tensors: dict[str, Any], header: Any) -> None:
    for key in [key for key in tensors if key.startswith(LAYER)]:
        tensors[key.replace("layers.0", "layers.9")] = tensors.pop(key)
    header["weights"] = json.loads(json.dumps(header["weights"]).replace(LAYER, _far(LAYER)))


def _far(name: str) -> str:
    return name.replace("layers.0", "layers.9")


def _reshape(tensors: dict[str, Any], header: Any) -> None:
    header["weights"][LAYER]["shape"] = [32, 32]


def _of_flags(shop: Workshop) -> dict[str, Refusal]:
    flags = shop.flags
    recipe = shop.file("recipe.yaml", "densitty: 0.1\n")
    return {
        "density 0": Refusal(flags(density="0"), "density is 0: give the share"),
        "density of nothing": Refusal(flags(density="1e-9"), r"selects none .* raise it"),
        "density beyond targets": Refusal(
            flags(density="0.9"), r"the 4 target layers hold 3,072: lower --density or widen"
        ),
        "unknown flag": Refusal(flags(densitty="0.1"), "There is no flag --densitty"),
        "nothing said": Refusal([], "Pass --model_name_or_path and --task and --output_dir"),
        "fp16 without scaling": Refusal(flags("--fp16"), "needs a GPU|needs ZeRO stage 1, 2 or 3"),
        "schedule": Refusal(flags(lr_scheduler_type="step"), "must be one of linear, cosine"),
        "recipe": Refusal(flags(config=recipe), "recipe.yaml: there is no flag --densitty"),
        "targets match nothing": Refusal(
            flags(target_modules="query"), "matches no module .* are named down_proj, gate_proj"
        ),
        "target is no layer": Refusal(flags(target_modules="self_attn"), "only linear layers"),
        "target is tied": Refusal(flags(target_modules="lm_head"), "leave it out of --target_mod"),
        "targets are no pattern": Refusal(flags(target_modules="q_["), "nor a regular expression"),
    }


def _of_models(shop: Workshop) -> dict[str, Refusal]:
    def refuse(message: str, name: str, edit: Any = len, **config: object) -> Refusal:
        folder = shop.model(name, lambda f: edit(str(f)), **config)
        return Refusal(shop.flags(model_name_or_path=folder), message)

    def of_type(message: str, model_type: str, **config: object) -> Refusal:
        def only_config(folder: str) -> None:
            content = {"model_type": model_type, "vocab_size": 300, **config}
            Path(folder, "config.json").write_text(json.dumps(content))

        return refuse(message, model_type, only_config)

    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    neox = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "no model": Refusal(shop.flags(model_name_or_path="/no/model"), "/no/model is no folder"),
        "no config": refuse("cannot be loaded", "a", lambda f: os.unlink(f"{f}/config.json")),
        "config is no JSON": refuse(
            "cannot be loaded", "b", lambda f: Path(f, "config.json").write_text("{")
        ),
        "no weights": refuse(
            r"holds no weights \(model.safetensors or",
            "c",
            lambda f: os.unlink(f"{f}/model.safetensors"),
        ),
        "weights truncated": refuse(
            "weights of .*w3 are damaged",
            "w3",
            lambda f: os.truncate(f"{f}/model.safetensors", 999),
        ),
        "no tokenizer": refuse(
            "holds no tokenizer",
            "d",
            lambda f: [os.unlink(path) for path in Path(f).glob("*token*")],
        ),
        "another tokenizer": refuse("model knows 90 tokens", "e", vocab_size=90),
        "quantized": refuse("is quantized", "f", quantization_config={"quant_method": "fp8"}),
        "xlnet": of_type("is of type xlnet, whose tokens see the answer", "xlnet"),
        "cpmant": of_type("is of type cpmant, whose tokens see the answer", "cpmant"),
        "encoder-decoder": of_type("is an encoder-decoder model: pass a causal", "t5"),
        "no language model": of_type("vit model, which transformers does not know", "vit"),
        "fused gpt2": of_type("pass --target_modules c_attn", "gpt2", **gpt2),
        "fused gpt_neox": of_type("pass --target_modules query_key_value", "gpt_neox", **neox),
    }


def _of_masks(shop: Workshop) -> dict[str, Refusal]:
    mask = shop.run / "mask.safetensors"

    def refuse(message: str, name: str, edit: Callable[[dict[str, Any], Any], object]) -> Refusal:
        return Refusal(shop.flags(mask=shop.spoiled(mask, name, edit)), message)

    return {
        "no mask": Refusal(shop.flags(mask="/no/mask"), "no mask file at /no/mask"),
        "mask of other layers": refuse("which .*model does not have: use the base", "m1", _rename),
        "mask of other shape": refuse(
            r"of shape \(32, 32\), and .* \(16, 32\): use", "m2", _reshape
        ),
        "mask and targets": Refusal(
            shop.flags(mask=mask, target_modules="q_proj"), "leave the flag out"
        ),
        "mask and density": Refusal(
            shop.flags(mask=mask, density="0.1"),
            "is 2,377 of 23,776 parameters and the mask has 475: leave --density out",
        ),
        "mask and calibration": Refusal(
            shop.flags(mask=mask, calibration_examples=3), "leave --calibration_examples out"
        ),
        "a head's steps without a head": Refusal(
            shop.flags(calibration_head_steps=3), "llama has none: leave it out"
        ),
    }


def _of_deepspeed(shop: Workshop) -> dict[str, Refusal]:
    flags, deepspeed = shop.flags, shop.deepspeed
    return {
        "no JSON file": Refusal(flags(deepspeed="/no.json"), "--deepspeed /no.json cannot be read"),
        "micro-batch": Refusal(
            deepspeed("j2", train_micro_batch_size_per_gpu=3),
            "is 3 in the DeepSpeed JSON but --per_device_train_batch_size makes it 4",
        ),
        "clipping": Refusal(deepspeed("j4", gradient_clipping=0.5), "--max_grad_norm makes it 1.0"),
        "bf16": Refusal(deepspeed("j5", bf16={"enabled": True}), "--bf16 makes it false"),
    }


def _of_data(shop: Workshop) -> dict[str, Refusal]:
    flags, good = shop.flags, {"question": "Why?", "answer": "So."}
    jsonl = {"task": "jsonl", "prompt_field": "question", "target_field": "answer"}
    long = shop.data("d2", good, {"question": "Why? " * 40, "answer": "So."})
    no_template = shop.model("d3", lambda f: os.unlink(f / "chat_template.jinja"))
    chat = shop.data("d4", {"messages": [{"role": "user", "content": "a"}] * 2})
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {
        "task": Refusal(
            flags(task="gsm9k"), "There is no task 'gsm9k': pass one of boolq, cb, cola"
        ),
        "no data": Refusal(flags(data_dir="/no/data"), "There is no file /no/data/train.jsonl"),
        "long prompt": Refusal(flags(data_dir=long, max_length=60), "Example 2 has a prompt of"),
        "long example": Refusal(
            flags(data_dir=shop.data("d6", {"question": "?", "answer": "So. " * 50})),
            "has 2.. tokens and the model reads 128: pass --max_length 128 or less",
        ),
        "own fields": Refusal(flags(prompt_field="q"), "has no meaning for --task gsm8k"),
        "one field": Refusal(flags(**jsonl | {"target_field": None}), "Pass both --prompt_field"),
        "another field": Refusal(
            flags(**jsonl | {"prompt_field": "q"}), "line 1: there is no field 'q'"
        ),
        "chat without answer": Refusal(
            flags(task="jsonl", data_dir=chat), "line 1: 'messages' must end with the assistant"
        ),
        "chat without template": Refusal(
            flags(
                task="jsonl",
                data_dir=shop.data("d7", {"messages": talk}),
                test_file="train.jsonl",
                model_name_or_path=no_template,
            ),
            "has no chat template",
        ),
    }


def _of_output(shop: Workshop) -> dict[str, Refusal]:
    flags, resume, tiny = shop.flags, shop.resume, shop.tiny
    fewer = shop.data(
        "o1", *map(json.loads, (tiny.data / "train.jsonl").read_text().splitlines()[1:])
    )
    half = tiny.folder / "half"
    shutil.copytree(shop.run / "checkpoint-2", half / "checkpoint-2")
    (half / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"")
    early = shop.run / "checkpoint-2"
    return {
        "holds a run": Refusal(flags(output_dir=shop.run), "holds a run: pass --resume_from_check"),
        "is a file": Refusal(flags(output_dir=shop.file("a_file", "")), "is a file: name a folder"),
        "below a file": Refusal(flags(output_dir=tiny.folder / "a_file" / "o"), "Not a directory"),
        "nothing to resume": Refusal(resume(output_dir=tiny.folder / "new"), "holds no checkpoint"),
        "resume of nothing": Refusal(resume("/no/ckpt"), "/no/ckpt is not a checkpoint of gem_ds"),
        "resume of half": Refusal(resume(output_dir=half), "not a whole safetensors file"),
        "resume of the past": Refusal(
            resume(early), "checkpoint-4, which is later than checkpoint"
        ),
        "resume into a run": Refusal(
            resume(early, output_dir=half),
            "holds a run",
        ),
        "resume other data": Refusal(resume(data_dir=fewer), "was trained on other examples"),
        "resume other length": Refusal(resume(max_length=40), "was trained on other examples"),
        "resume packed": Refusal([*resume(), "--packing"], "was trained on other examples"),
        "resume grouped": Refusal(
            resume(train_sampling_strategy="group_by_length"), "or in another order"
        ),
        "resume other seed": Refusal(resume(seed=1), "trained with --seed 42: pass it again"),
        "resume other dtype": Refusal(
            [*resume(), "--bf16"], "in float32 and the flags say bfloat16"
        ),
        "resume and targets": Refusal(resume(target_modules="q_proj"), "leave the flag out"),
        "resume and overwrite": Refusal([*resume(), "--overwrite_output_dir"], "would delete what"),
    }


def _of_weights(shop: Workshop) -> dict[str, Refusal]:
    """What only the weights show."""

    def refuse(message: str, name: str, edit: Callable[[dict[str, Any]], object]) -> Refusal:
        return Refusal(shop.flags(model_name_or_path=shop.weights(name, edit)), message)

    def stop_gradient(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()

    other = shop.weights("w0", lambda t: t[LAYER].mul_(2))
    return {
        "weight missing": refuse(
            f"lacks 1 of the weights that its config.json asks for.* for example {LAYER}",
            "w1",
            lambda t: t.pop(LAYER),
        ),
        "weight of another shape": refuse(
            "or has them in another shape, for example model.norm.weight: pass a complete",
            "w2",
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        ),
        "infinite weight": refuse(
            "The loss is not finite during calibration",
            "w4",
            lambda t: t["model.layers.0.mlp.up_proj.weight"][0, 0].fill_(float("inf")),
        ),
        "no gradient": refuse(
            "No gradient reaches model.layers.1.self_attn.q_proj.weight, "
            "model.layers.1.self_attn.v_proj.weight: leave such layers out",
            "w5",
            stop_gradient,
        ),
        "mask of other weights": Refusal(
            shop.flags(model_name_or_path=other, mask=shop.run / "mask.safetensors"),
            "this mask was made for other base weights",
        ),
        "resume beyond the end": Refusal(
            shop.resume(max_steps=3), "stands at step 4 and the flags end the run at step 3"
        ),
        "resume on other weights": Refusal(
            shop.resume(shop.run / "checkpoint-4", model_name_or_path=other),
            "this mask was made for other base weights",
        ),
        "too fast": Refusal(
            shop.flags(  # the warmup's first step has a rate of zero, the second one is deadly
                output_dir=shop.tiny.folder / "fast",
                learning_rate=1e30,
                warmup_steps=4,
                save_steps=1,
                save_total_limit=1,
                max_steps=9,
            ),
            r"The (loss|gradient) is not finite at step 3: lower --learning_rate,.* before "
            "checkpoint-2 are good",
        ),
    }


TABLES = (_of_flags, _of_models, _of_masks, _of_deepspeed, _of_data, _of_output)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with one_rank():
        yield Workshop(make_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def early(shop: Workshop) -> dict[str, Refusal]:
    """What is refused without the weights."""
    return {name: refusal for table in TABLES for name, refusal in table(shop).items()}


@pytest.fixture(scope="module")
def late(shop: Workshop) -> dict[str, Refusal]:
    return _of_weights(shop)


def _problem(error: BaseException | None, message: str) -> str | None:
    """What is wrong with how a command line was refused; None if nothing is."""
    if not isinstance(error, (ValueError, OSError)):
        return f"ended in {error!r}"
    if "\n" in str(error) or not re.search(message, str(error)):
        return f"does not say {message!r}: {error}"
    return None


def _refused(flags: list[str]) -> BaseException | None:
    try:
        train.main(flags)
    except Exception as error:
        return error
    return None


def _snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_needs_no_weights_is_refused_before_they_are_loaded(shop, early, monkeypatch):
    monkeypatch.setattr(run, "load_for_training", lambda *_, **__: pytest.fail("loaded weights"))
    before = _snapshot(shop.run)
    problems = {}
    for name, refusal in early.items():
        problems[name] = _problem(_refused(refusal.flags), refusal.message)
        assert not (shop.tiny.folder / "new").exists(), name
    assert {name: problem for name, problem in problems.items() if problem} == {}
    assert _snapshot(shop.run) == before


def test_what_the_weights_show_is_refused_and_checkpoints_stay(shop, late):
    problems = {}
    for name, refusal in late.items():
        problems[name] = _problem(_refused(refusal.flags), refusal.message)
        shutil.rmtree(shop.tiny.folder / "new", ignore_errors=True)
    assert {name: problem for name, problem in problems.items() if problem} == {}
    _assert_diverged(shop.tiny.folder / "fast")


def _assert_diverged(folder: Path) -> None:
    """The run has kept the good checkpoint beside the bad one, and written no delta."""
    checkpoints = list_checkpoints(folder)
    good, bad = (
        float(Checkpoint.load(path).vectors["master"].abs().max()) for path in checkpoints.values()
    )
    assert list(checkpoints) == [1, 2]
    assert good < 1 < bad
    assert not (folder / "delta.safetensors").exists()


# Two ranks

#: Of what is refused before any weight, a few: all of it goes through the same agreement.
EARLY = ("density of nothing", "unknown flag", "no model", "resume other data")


def _unreadable(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "no permission to read", "train.jsonl")


def _full_disk(self: Checkpoint, folder: Path) -> None:
    if self.state.global_step == 2:
        raise OSError(errno.ENOSPC, "the disk is full: free space")
    Checkpoint.write_whole(self, folder)  # type: ignore[attr-defined]


def _closed(*_: object) -> None:
    raise OSError(errno.ENOSPC, "metrics.jsonl: the disk is full")


#: What happens on one rank only: the rank, what is patched there, and how.
ACCIDENTS: dict[str, tuple[int, str, Callable[..., None]]] = {
    "unreadable on rank 1": (1, "gem_ds.train.examples.load_task", _unreadable),
    "unreadable on rank 0": (0, "gem_ds.train.examples.load_task", _unreadable),
    "disk full at a checkpoint": (0, "gem_ds.files.checkpoint.Checkpoint._write", _full_disk),
    "disk full at a log entry": (0, "gem_ds.train.reporting.Reporter.log", _closed),
    "disk full at the mask": (0, "gem_ds.files.mask.Mask.save", _closed),
    "disk full at the delta": (0, "gem_ds.files.delta.Delta.save", _closed),
}


def _refuse_all(commands: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """On each rank: how each command line ended, as the error's class and text."""
    Checkpoint.write_whole = Checkpoint._write  # type: ignore[attr-defined]
    rank, ends = int(os.environ["RANK"]), {}
    with joined():
        for name, flags in commands.items():
            victim, target, accident = ACCIDENTS.get(name, (None, "", _closed))
            with mock.patch(target, accident) if rank == victim else nullcontext():
                error = _refused(flags)
            ends[name] = (type(error).__name__, str(error))
    return ends


@pytest.fixture(scope="module")
def partitioned(shop: Workshop, late: dict[str, Refusal]) -> dict[str, Refusal]:
    """What the weights show while they are loaded into ZeRO-3 partitions."""
    flags = ["--deepspeed", str(REPOSITORY / "ds_configs" / "zero3.json")]
    table = {
        f"{name}, ZeRO-3": Refusal([*refusal.flags, *flags], refusal.message)
        for name, refusal in late.items()
    }
    table["too fast, ZeRO-3"].flags.extend(["--output_dir", str(shop.tiny.folder / "fast3")])
    return table


@pytest.fixture(scope="module")
def endings(shop, early, late, partitioned) -> list[dict[str, tuple[str, str]]]:
    """Per rank of two, how every bad command line and every accident ended."""
    commands = {name: early[name].flags for name in EARLY}
    commands |= {name: refusal.flags for name, refusal in (late | partitioned).items()}
    shutil.rmtree(shop.tiny.folder / "fast", ignore_errors=True)
    for name in ACCIDENTS:
        folder = shop.tiny.folder / name.replace(" ", "_")
        commands[name] = shop.flags(output_dir=folder, save_steps=1, logging_steps=2)
    return run_ranks(2, _refuse_all, commands, timeout=300)


def test_both_ranks_refuse_everything(early, late, partitioned, endings):
    """Rank 0 with the sentence; rank 1 knows that it only follows."""
    problems = {}
    for name, refusal in ({n: early[n] for n in EARLY} | late | partitioned).items():
        (kind, text), (other_kind, other_text) = (ending[name] for ending in endings)
        if not re.search(refusal.message, text) or "\n" in text:
            problems[name] = f"rank 0: {kind}: {text}"
        if other_kind != "PeerError":
            problems[name] = f"rank 1: {other_kind}: {other_text}"
    assert problems == {}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_on_one_rank_stops_both(shop, endings, name):
    (kind, text), (other_kind, _) = (ending[name] for ending in endings)
    rank, _, _ = ACCIDENTS[name]
    assert kind == ("ValueError" if rank else "PermissionError" if "unread" in name else "OSError")
    assert text.startswith("On rank 1:") == (rank == 1)
    assert other_kind == "PeerError"


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(shop, endings):
    folder = shop.tiny.folder / "disk_full_at_a_checkpoint"
    assert list(list_checkpoints(folder)) == [1]
    assert Checkpoint.load(folder / "checkpoint-1").state.global_step == 1
    assert not list(folder.glob(".*")), "no temporary is left"


@pytest.mark.parametrize("name", ["fast", "fast3"])
def test_a_diverged_run_of_two_ranks_keeps_its_checkpoints(shop, endings, name):
    _assert_diverged(shop.tiny.folder / name)
