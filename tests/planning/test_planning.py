"""The forecast of what a run needs: against hand-counted programs, and against runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, FalconConfig, GPTJConfig, LlamaConfig, OPTConfig

from gem_ds.distributed.zero_config import read_config
from gem_ds.planning import advice
from gem_ds.planning.advice import HEADROOM, changes, fits, least_change
from gem_ds.planning.forecast import Setting, forecast
from gem_ds.planning.gathers import Gathers
from gem_ds.planning.live import LiveBytes
from gem_ds.planning.main import main
from gem_ds.train.arguments import parse_arguments
from tests.tiny_model import REPOSITORY

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings(  # of peft's calls
        "ignore:`is_gradient_checkpointing`:FutureWarning"
    ),
]

CONFIGS = REPOSITORY / "ds_configs"
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)
OPT = OPTConfig(hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, vocab_size=80, **HEADS)
BERT = BertConfig(hidden_size=64, intermediate_size=128, vocab_size=90, **HEADS)


def setting_of(
    *flags: str, config: Any = LLAMA, stage: int = 3, world_size: int = 4, **changed: Any
) -> Setting:
    common = "--model_name_or_path m --max_length 64 --per_device_train_batch_size 2"
    args = parse_arguments([*common.split(), *flags], needed=[])
    return Setting(
        args=args,
        config=config,
        deepspeed=read_config(CONFIGS / f"zero{stage}.json"),
        world_size=world_size,
        **changed,
    )


# Counting


def test_bytes_live_from_the_operator_to_the_last_reference() -> None:
    live = LiveBytes()
    with live:
        a = torch.empty(100, device="meta")
        b = a * 2
        assert live.now[live.OWN] == 800
        view = b[10:]
        del b
        assert live.now[live.OWN] == 800, "a view holds all of its storage"
        del view
        assert live.now[live.OWN] == 400
        with live.held("told", 4):
            assert live.at_peak == {live.OWN: 800}
            assert live.now["told"] == 4
    assert live.now["told"] == 0
    assert live.peak == 800


def test_autograd_keeps_what_the_backward_pass_reads() -> None:
    live, x = LiveBytes(), torch.empty(10, 10, device="meta", requires_grad=True)
    model = nn.Linear(10, 10, bias=False, device="meta")
    live.know(model)
    with live:
        h = x.exp()  # its result is saved
        y = model(h).sum()
        del h
        assert live.now[live.OWN] == 400 + 4
        y.backward()
        del y
    gradients = sum(t.grad.numel() * 4 for t in (x, model.weight) if t.grad is not None)
    assert live.now[live.OWN] == gradients == 800


class MostGathered(LiveBytes):
    """Remembers the most gathered weights that lived at once."""

    most = 0

    def add(self, kind: str, num_bytes: int) -> None:
        super().add(kind, num_bytes)
        self.most = max(self.most, self.now[Gathers.KIND])


class Block(nn.Module):
    """Layers that run one after another; the last may share the weight of the first."""

    def __init__(self, num_layers: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        layers = (nn.Linear(10, 10, bias=False, device="meta") for _ in range(num_layers))
        self.layers = nn.ModuleList(layers)
        if tied:
            self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def gathers_of(model: nn.Module, **options: int) -> Gathers:
    """Of weights of more than 50 entries, unless told."""
    told = {"persistence_threshold": 50, "prefetch_size": 0, "max_live": 10**9} | options
    return Gathers(model, copies=False, **told)


def step(gathers: Gathers, run: Callable[[torch.Tensor], torch.Tensor]) -> MostGathered:
    """Both passes; nothing stays gathered."""
    live, x = MostGathered(), torch.empty(2, 10, device="meta", requires_grad=True)
    with gathers.step(live), live:
        run(x).sum().backward()
    assert live.now[Gathers.KIND] == 0
    return live


@pytest.mark.parametrize(("tied", "times"), [(False, 6), (True, 4)])
def test_weights_are_gathered_for_each_pass_and_let_go(tied: bool, times: int) -> None:
    model = Block(tied=tied)
    gathers = gathers_of(model)
    assert step(gathers, model).most == 400 * (2 if tied else 1)
    assert gathers.num_bytes == times * 400
    small = gathers_of(model, persistence_threshold=100)
    step(small, model)
    assert small.knows_order
    assert small.num_bytes == 0


@pytest.mark.parametrize(("trains", "most"), [(False, 1), (True, 4)])
def test_recomputed_blocks_let_their_weights_go(trains: bool, most: int) -> None:
    """Frozen ones after each use, trained ones when the block's backward has used them."""
    for num_blocks in (2, 5):
        blocks = nn.ModuleList(Block(4) for _ in range(num_blocks)).requires_grad_(trains)

        def run(x: torch.Tensor, blocks: nn.ModuleList = blocks) -> torch.Tensor:
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

        gathers = gathers_of(blocks)
        assert step(gathers, run).most == 400 * most
        assert gathers.num_bytes == 400 * 4 * num_blocks * (2 if trains else 3)


def test_gathering_ahead_moves_no_bytes_more_and_holds_more() -> None:
    model, held = nn.Sequential(*Block().layers), {}
    for prefetch_size in (0, 100):
        gathers = gathers_of(model, prefetch_size=prefetch_size, max_live=200)
        step(gathers, model)
        held[prefetch_size] = step(gathers, model).most
        assert gathers.num_bytes == 2400
    assert held == {0: 400, 100: 800}


# Forecasts that follow from sizes


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (3, "bf16")])
def test_state_is_twelve_bytes_for_each_selected_entry_and_shared_from_stage_1(
    stage: int, dtype: str
) -> None:
    flags = [] if dtype == "fp32" else ["--bf16"]
    found = forecast(setting_of("--density", "0.01", *flags, stage=stage, world_size=3))
    k = found.num_trained
    assert k == int(0.01 * found.num_parameters)
    assert k % 3, "the ranks' parts are rounded up"
    assert found.state == 12 * k * (3 if stage == 0 else 1)
    own = k if stage == 0 else -(-k // 3)
    words = 2 if stage == 0 and dtype == "fp32" else 3  # the values are the masters
    assert found.training["masters and moments"] == 4 * words * own


def test_a_rank_holds_its_share_of_the_weights_at_stage_3_only() -> None:
    whole = forecast(setting_of("--bf16", stage=2)).training["weights"]
    assert whole == 2 * forecast(setting_of()).num_parameters
    shares = [forecast(setting_of("--bf16", world_size=n)).training["weights"] for n in (1, 2, 8)]
    assert shares[0] == whole
    persistent = 10 * 256  # entries below which weights stay whole: those of the norms
    small = 2 * sum(n for n in [256] * 7 if n <= persistent)
    for n, share in zip((2, 8), shares[1:], strict=True):
        assert share == pytest.approx(whole / n + small, rel=1e-3)


def test_full_fine_tuning_needs_sixteen_bytes_a_parameter_and_gem_hardly_more_than_two() -> None:
    full = forecast(setting_of("--method", "full", "--bf16", stage=0, world_size=1))
    gem = forecast(setting_of("--bf16", stage=0, world_size=1))
    n = full.num_parameters
    lasting = full.training["weights"] + full.training["masters and moments"]
    assert lasting == 14 * n  # and gradients of two bytes
    assert sum(full.training.values()) >= 16 * n
    lasting = sum(v for kind, v in gem.training.items() if kind != LiveBytes.OWN)
    assert lasting < 2.1 * n


@pytest.mark.parametrize("method", ["gem", "bitfit", "lora"])
def test_the_head_of_an_encoder_is_trained_and_sent(method: str) -> None:
    """Its pooler and a classifier of two outputs; under a method's own entries."""
    head = 64 * 64 + 64 + 2 * 64 + 2
    own = {
        "gem": int(0.001 * forecast(setting_of(config=BERT)).num_parameters),
        "bitfit": 64 + 2 * (4 * 64 + 128 + 64 + 2 * 64),  # of the norms too
        "lora": 2 * 2 * 8 * (64 + 64),
    }[method]
    found = forecast(setting_of("--method", method, config=BERT, stage=0, world_size=1))
    assert found.num_trained == own + head
    assert found.state == 12 * (own + head)
    assert found.step_messages == 4 * (own + head)


def test_statistics_are_shared_and_a_buffer_keeps_whole_gradients() -> None:
    targets = 3 * (256 * 256 + 256 * 128)
    plain = forecast(setting_of())
    assert plain.calibration["statistics"] == 4 * targets / 4
    assert plain.calibration_messages == 4 * targets
    buffered = forecast(setting_of("--calibration_buffer_gb", "1"))
    assert buffered.calibration["statistics"] == 4 * targets
    assert buffered.calibration_messages == 0
    assert not forecast(setting_of("--method", "random")).calibration


def test_a_gpu_adds_a_product_of_16_bits_to_a_buffer() -> None:
    config = LlamaConfig(  # whose targets are larger than anything else
        hidden_size=512,
        intermediate_size=16,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=16,
    )

    def calibration(*flags: str, on_cpu: bool = False) -> Any:
        flags = "--calibration_buffer_gb", "1", "--max_length", "8", *flags
        setting = setting_of(*flags, config=config, stage=0, on_cpu=on_cpu)
        return forecast(setting).calibration

    fp32, bf16 = calibration(), calibration("--bf16")
    assert bf16["statistics"] == fp32["statistics"]
    assert not fp32.get("products")
    assert bf16["products"] == 4 * 512 * 512
    assert not calibration("--bf16", on_cpu=True).get("products")


def test_a_step_sends_gradients_and_new_values() -> None:
    """Those of entries in fp32, those of whole parameters in the dtype of the model."""
    for stage, num_bytes in ((0, 4), (1, 6), (3, 6)):
        found = forecast(setting_of("--bf16", stage=stage))
        assert found.step_messages == num_bytes * found.num_trained
    found = forecast(setting_of("--bf16", "--method", "full", stage=3))
    assert found.step_messages == 2 * found.num_trained


def test_recomputing_and_smaller_batches_hold_fewer_activations() -> None:
    def activations(*flags: str) -> int:
        return forecast(setting_of(*flags, stage=0)).training[LiveBytes.OWN]

    whole = activations()
    assert activations("--gradient_checkpointing") < 0.8 * whole
    assert activations("--per_device_train_batch_size", "1") < 0.7 * whole


@pytest.mark.parametrize("stage", [0, 3])
def test_evaluation_is_a_forward_pass_of_its_own_batch(stage: int) -> None:
    def held(size: int) -> Any:
        return forecast(setting_of("--per_device_eval_batch_size", f"{size}", stage=stage))

    few, many = held(32), held(64)
    factor = many.evaluation[LiveBytes.OWN] / few.evaluation[LiveBytes.OWN]
    assert factor == pytest.approx(2, rel=0.1)
    assert many.training == few.training
    assert many.peak == sum(many.evaluation.values()), "a large batch is the peak of a run"
    alike = held(2)  # as in training, whose backward pass needs more
    assert alike.peak == max(sum(alike.training.values()), sum(alike.calibration.values()))
    assert alike.evaluation[LiveBytes.OWN] < 0.5 * alike.training[LiveBytes.OWN]


def test_offloaded_weights_and_state_are_not_on_the_device() -> None:
    setting = setting_of("--bf16")
    setting = replace(setting, deepspeed=read_config(CONFIGS / "zero3_offload.json"))
    found = forecast(setting).training
    assert found.get("masters and moments", 0) == 0
    assert found["weights"] < 0.05 * forecast(setting_of("--bf16")).training["weights"]


@pytest.mark.parametrize(
    ("config", "method"),
    [*((OPT, method) for method in ("random", "lora", "ia3")), (BERT, "full")],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_every_method_and_kind_of_model_can_be_planned(config: Any, method: str) -> None:
    found = forecast(setting_of("--method", method, config=config))
    assert 0 < found.num_trained <= 1.05 * found.num_parameters
    assert found.peak > 0


def test_a_model_whose_attention_cannot_be_replaced_keeps_its_own() -> None:
    for config in (
        FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100),
        GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=100),
    ):
        needed = forecast(setting_of("--target_modules", "all-linear", config=config, stage=1))
        assert needed.training[LiveBytes.OWN] > 0


# Advice


def test_what_fits_leaves_a_share_to_others() -> None:
    found = forecast(setting_of())
    assert fits(found, found.peak / (1 - HEADROOM) + 1)
    assert not fits(found, found.peak)


def test_the_least_change_fits_and_none_before_it_does() -> None:
    setting = setting_of("--bf16", config=OPT, stage=0, world_size=2)
    needs = [(told, forecast(changed).peak) for told, changed in islice(changes(setting), 4)]
    assert needs[0][0] == ["--gradient_checkpointing"]
    for told, _ in needs:
        assert len({words.split()[0] for words in told}) == len(told), "each flag is told once"
    for told, peak in needs[1:4:2]:
        memory = peak / (1 - HEADROOM) + 1
        found = least_change(setting, memory)
        assert found is not None
        first = next(words for words, other in needs if other <= (1 - HEADROOM) * memory)
        assert found[0] == first
        assert len(first) <= len(told)


def test_batch_sizes_that_the_json_spells_out_follow_a_change() -> None:
    setting = setting_of(config=OPT, stage=0, world_size=2)
    written = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
    }
    spelt = replace(setting, deepspeed={**setting.deepspeed, **written})
    memory = forecast(setting).peak / 1.5
    found = least_change(spelt, memory)
    assert found is not None
    assert found == least_change(setting, memory)
    assert {"--per_device_train_batch_size 1", "--gradient_accumulation_steps 2"} < set(found[0])


# The command


@pytest.mark.parametrize("file", advice.CONFIGS)
def test_advice_knows_the_repositorys_configurations_without_their_files(file: str) -> None:
    setting = setting_of("--bf16")
    read, known = read_config(REPOSITORY / file), advice.CONFIGS[file]
    assert forecast(replace(setting, deepspeed=known)) == forecast(replace(setting, deepspeed=read))


def test_the_command_needs_a_configuration_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    OPT.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--world_size", "8", "--bf16"]
    main([*flags, "--deepspeed", str(CONFIGS / "zero3.json"), "--gpu_memory_gb", "80"])
    told = capsys.readouterr().out
    for words in ("8 ranks, ZeRO stage 3, bf16", "8 x 1,024 tokens", "calibration", "It fits"):
        assert words in told
    monkeypatch.setattr("gem_ds.planning.advice._MOST_RANKS", 2)
    main([*flags[:2], "--gpu_memory_gb", "1e-6"])
    assert "Nothing that this program knows makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--world_size", "0"], "--world_size must be at least 1, not 0"),
        (["--gpu_memory_gb", "0"], "--gpu_memory_gb must be above 0"),
        (["--mask", "m.safetensors"], "leave --mask out"),
        (["--no_such_flag", "1"], "There is no flag --no_such_flag"),
        (["--method", "gme"], "--method must be one of gem"),
        (["--density", "0.9"], "lower --density"),
        (["--method", "shira"], "cannot be planned"),
        (["--attn_implementation", "eager"], "cannot be planned"),
        (["--method", "bitfit"], "has no biases"),
        (["--fp16"], "fp16 needs ZeRO stage 1"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path: Path, flags: list[str], words: str) -> None:
    LLAMA.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        main(["--model_name_or_path", str(tmp_path), *flags])
    assert "\n" not in str(error.value)


def test_a_missing_model_is_told(tmp_path: Path) -> None:
    for flags, words in (
        (["--model_name_or_path", str(tmp_path / "none")], "is no folder"),
        ([], "Pass --model_name_or_path"),
    ):
        with pytest.raises(ValueError, match=words):
            main(flags)


# Against runs


def test_a_forecast_agrees_with_a_run(tmp_path: Path) -> None:
    """Of a model that is large against what libraries take, on one rank."""
    command = [sys.executable, "benchmarks/step.py", "--shape", "opt-125m", "--layers", "2"]
    command += ["--tokens", "256", "--rounds", "1", "--steps", "1", "--output_dir", str(tmp_path)]
    command += ["--contenders", "gem", "full"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    flags = "--max_length", "256", "--per_device_train_batch_size", "4"
    config = OPTConfig(num_hidden_layers=2, dropout=0.0)
    shape = {"config": config, "stage": 0, "world_size": 1, "on_cpu": True}
    for method, found in json.loads((tmp_path / "numbers.json").read_text()).items():
        told = forecast(setting_of("--method", method, *flags, **shape))
        assert told.state == pytest.approx(found["state_bytes"], rel=0.05)
        assert told.step_messages == pytest.approx(found["others"], rel=0.05)
        assert sum(told.training.values()) == pytest.approx(found["peak_bytes"], rel=0.15)
        if method == "gem":
            calibration = sum(told.calibration.values())
            assert calibration == pytest.approx(found["calibration_peak_bytes"], rel=0.15)
