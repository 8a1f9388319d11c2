"""The forecast of what a run needs: against hand-counted programs, and against runs."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.steps.ranks import Ranks
from benchmarks.steps.training import Training
from gem_ds.distributed.zero_config import read_config
from gem_ds.planning import advice
from gem_ds.planning.advice import HEADROOM, changes, fits, least_change, lower_stage
from gem_ds.planning.forecast import Forecast, forecast
from gem_ds.planning.gathers import Gathers
from gem_ds.planning.live import LiveBytes
from gem_ds.planning.main import main, read_setting
from gem_ds.planning.subject import Setting
from gem_ds.train.arguments import parse_arguments
from tests.tiny import DS_CONFIGS, tiny_config
from tests.tiny_evaluation import refusal
from tests.tiny_model import REPOSITORY

pytestmark = pytest.mark.slow  # starts engines or programs

CASES = yaml.safe_load(Path(__file__).with_name("planning.yaml").read_text(encoding="utf-8"))
MODELS = {name: AutoConfig.for_model(**values) for name, values in CASES["models"].items()}


def setting_of(
    *flags: str, model: str = "llama", stage: int = 3, world_size: int = 4, on_cpu: bool = False
) -> Setting:
    common = "--model_name_or_path m --max_length 64 --per_device_train_batch_size 2"
    return Setting(
        args=parse_arguments([*common.split(), *flags], needed=[]),
        config=MODELS[model],
        deepspeed=read_config(DS_CONFIGS / f"zero{stage}.json"),
        world_size=world_size,
        on_cpu=on_cpu,
    )


@functools.cache
def foretold(*flags: str, **changed: Any) -> Forecast:
    return forecast(setting_of(*flags, **changed))


# Counting


def test_bytes_live_from_the_operator_to_the_last_reference():
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


class MostGathered(LiveBytes):
    """Remembers the most gathered weights, and messages of such, that lived at once."""

    most, most_messages = 0, 0

    def add(self, kind: str, num_bytes: int) -> None:
        super().add(kind, num_bytes)
        self.most = max(self.most, self.now[Gathers.KIND])
        self.most_messages = max(self.most_messages, self.now["messages"])


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


def gathers_of(
    model: nn.Module,
    *,
    threshold: int = 50,
    prefetch_size: int = 0,
    leaves: tuple[str, ...] = (),
    copies: bool = False,
) -> Gathers:
    """At most two weights are gathered ahead."""
    zero = {
        "leaf_module": {"classes": leaves},
        "stage3_param_persistence_threshold": threshold,
        "stage3_prefetch_bucket_size": prefetch_size,
        "stage3_max_live_parameters": 200,
    }
    return Gathers(model, zero, copies=copies, is_preceded=True)


def step(gathers: Gathers, run: Callable[[torch.Tensor], torch.Tensor]) -> MostGathered:
    """Both passes; nothing stays gathered."""
    live, x = MostGathered(), torch.empty(2, 10, device="meta", requires_grad=True)
    with gathers.step(live), live:
        run(x).sum().backward()
    assert live.now[Gathers.KIND] == 0
    return live


@pytest.mark.parametrize("copies", [False, True])
def test_a_message_of_several_weights_stands_beside_them_until_they_are_copied_out(copies):
    """And on a CPU gloo's own copy of it too: of two weights of 400 bytes."""
    gathers, live = gathers_of(Block(2), copies=copies, leaves=("Block",)), MostGathered()
    x = torch.empty(2, 10, device="meta", requires_grad=True)
    with gathers.step(live), live:
        gathers._model(x).sum().backward()
    assert (live.most, live.most_messages) == (800, 800 * (1 + copies))


@pytest.mark.parametrize(
    ("model", "prefetch_size", "most", "times"),
    [(Block(), 0, 1, 6), (Block(tied=True), 0, 2, 4), (nn.Sequential(*Block().layers), 100, 2, 6)],
    ids=["alone", "a shared weight stays", "gathering ahead holds more and moves no more"],
)
def test_weights_are_gathered_for_each_pass_and_let_go(model, prefetch_size, most, times):
    gathers = gathers_of(model, prefetch_size=prefetch_size)
    step(gathers, model)
    assert gathers.knows_order
    assert step(gathers, model).most == 400 * most
    assert gathers.num_bytes == 400 * times
    small = gathers_of(model, threshold=100)
    step(small, model)
    assert small.num_bytes == 0


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_leaf_is_one_message_a_pass_which_its_weights_are_copied_out_of(is_recomputed):
    """Recomputed or not: checkpointing runs the block's forward, not what hangs on its call."""
    blocks = nn.ModuleList(Block() for _ in range(2)).requires_grad_(False)
    for block in blocks if is_recomputed else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    gathers = gathers_of(blocks, leaves=("Block",))
    live = step(gathers, lambda x: blocks[1](blocks[0](x)))
    assert live.most == live.most_messages == 400 * 3
    assert gathers.num_messages == 2 * 2
    assert gathers.num_bytes == 2 * 2 * live.most


@pytest.mark.parametrize(("trains", "most"), [(False, 1), (True, 4)])
def test_recomputed_blocks_let_their_weights_go(trains, most):
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


# Forecasts that follow from sizes


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (3, "bf16")])
def test_state_is_twelve_bytes_for_each_selected_entry_and_shared_from_stage_1(stage, dtype):
    flags = [] if dtype == "fp32" else ["--bf16"]
    found = foretold("--density", "0.01", *flags, stage=stage, world_size=3)
    k = found.num_trained
    assert k == int(0.01 * found.num_parameters)
    assert k % 3, "the ranks' parts are rounded up"
    assert found.state == 12 * k * (3 if stage == 0 else 1)
    own = k if stage == 0 else -(-k // 3)
    words = 2 if stage == 0 and dtype == "fp32" else 3  # the values are the masters
    assert found.training["masters and moments"] == 4 * words * own


def test_a_rank_holds_its_share_of_the_weights_at_stage_3_only():
    whole = foretold("--bf16", stage=0).training["weights"]
    assert whole == 2 * foretold().num_parameters
    shares = [foretold("--bf16", world_size=n).training["weights"] for n in (1, 4)]
    assert shares[0] == whole
    assert shares[1] == pytest.approx(whole / 4, rel=1e-3), "norms come with their block"
    offloaded = advice.CONFIGS["ds_configs/zero3_offload.json"]
    found = forecast(replace(setting_of("--bf16"), deepspeed=offloaded)).training
    assert found.get("masters and moments", 0) == 0
    assert "weights" not in found, "nor does any weight stay on the device"


def test_full_fine_tuning_needs_sixteen_bytes_a_parameter_and_gem_hardly_more_than_two():
    full = foretold("--method", "full", "--bf16", stage=0)
    n = full.num_parameters
    lasting = full.training["weights"] + full.training["masters and moments"]
    assert lasting == 14 * n  # and gradients of two bytes
    assert sum(full.training.values()) >= 16 * n
    gem = foretold("--bf16", stage=0).training
    assert sum(gem.values()) - gem[LiveBytes.OWN] < 2.1 * n


@pytest.mark.parametrize("method", ["gem", "bitfit", "lora"])
def test_the_head_of_an_encoder_is_trained_and_sent(method):
    """Its pooler and a classifier of two outputs; under a method's own entries."""
    head = 64 * 64 + 64 + 2 * 64 + 2
    found = foretold("--method", method, model="bert", stage=0, world_size=1)
    own = {
        "gem": int(0.001 * found.num_parameters),
        "bitfit": 64 + 2 * (4 * 64 + 128 + 64 + 2 * 64),  # of the norms too
        "lora": 2 * 2 * 8 * (64 + 64),
    }[method]
    assert found.num_trained == own + head
    assert found.state == 12 * (own + head)
    assert found.step_messages == 4 * (own + head)


def test_statistics_are_shared_and_a_buffer_keeps_whole_gradients():
    """To which products are added as they are made."""
    targets = 4 * 512 * 512
    plain = foretold(model="wide")
    assert plain.calibration["statistics"] == 4 * targets / 4
    assert plain.calibration_messages == 4 * targets
    assert not foretold("--method", "random").calibration
    common = ("--calibration_buffer_gb", "1", "--max_length", "8")
    for flags, product in (((), 0), (["--bf16"], 0), (["--method", "gem_abs"], 4 * 512 * 512)):
        buffered = foretold(*common, *flags, model="wide", stage=0)
        assert buffered.calibration["statistics"] == 4 * targets
        assert buffered.calibration.get("products", 0) == product
        assert buffered.calibration_messages == 0


def test_strips_of_a_gpus_kernel_take_eight_bytes_an_entry():
    """If entries are few; and eight for each tile, of 64 strips or fewer."""
    plain, strips = (
        foretold("--density", "0.01", "--sddmm_kernel", name, model="wide")
        for name in ("tiled", "triton")
    )
    added = strips.training["indices"] - plain.training["indices"]
    assert 8 * plain.num_trained < added < 8.2 * plain.num_trained


def test_matrices_that_are_trained_whole_need_no_place_to_be_written_at():
    """Four bytes an entry that says which it is, and eight more where it is not all of them."""
    flags = ("--target_modules", "all-linear", "--sddmm_kernel", "tiled")
    for world_size, stage in ((1, 0), (4, 3)):
        at = {"stage": stage, "world_size": world_size}
        whole = foretold("--method", "auto_rgn", *flags, **at)
        assert whole.training["indices"] == 4 * whole.num_trained
        some = foretold("--density", "0.01", *flags, **at)
        own = -(-some.num_trained // world_size)
        assert some.training["indices"] == 4 * some.num_trained + 8 * own
    part = foretold("--method", "surgical", "--density", "0.3", *flags, stage=0, world_size=1)
    last = part.training["indices"] - 4 * part.num_trained
    assert 0 < last < 8 * 0.1 * part.num_trained, "of the matrix at which the budget ends"


def test_a_buffer_by_itself_is_half_of_what_a_gpu_has_left():
    """Beside what lasts and the statistics: room for two of four layers."""
    setting = setting_of("--calibration_buffer_gb", "auto", "--max_length", "8", model="wide")
    plain, whole = foretold("--max_length", "8", model="wide"), 4 * 512 * 512
    names = ("weights", "masters and moments", "selected values", "indices", "statistics")
    lasting = sum(plain.calibration[name] for name in names)
    buffer = 2.5 * whole * 3 / 4  # what three other ranks' parts of it take
    found = forecast(replace(setting, usable_bytes=lasting + 2 * buffer))
    assert found.buffer_gb == pytest.approx(buffer / 1e9)
    assert found.calibration["statistics"] == 2 * whole + 2 * whole / 4
    assert forecast(replace(setting, usable_bytes=1.0)).buffer_gb == 0


def test_zero_3_puts_the_values_before_together_while_sam_looks_ahead():
    for stage, num_bytes in ((0, 0), (3, 2)):
        plain, sam = (foretold("--bf16", *f, stage=stage) for f in ((), ("--sam_rho", "0.05")))
        told = [found.training["selected values"] for found in (plain, sam)]
        assert told[1] - told[0] == num_bytes * plain.num_trained


def test_a_step_sends_gradients_and_new_values():
    """Those of entries in fp32, those of whole parameters in the dtype of the model."""
    for stage, num_bytes in ((0, 4), (1, 6), (3, 6)):
        found = foretold("--bf16", stage=stage)
        assert found.step_messages == num_bytes * found.num_trained
    found = foretold("--bf16", "--method", "full", stage=3)
    assert found.step_messages == 2 * found.num_trained


def test_recomputing_and_smaller_batches_hold_fewer_activations():
    recomputed, halved = ["--gradient_checkpointing"], ["--per_device_train_batch_size", "1"]
    whole, *less = (
        foretold(*flags, stage=0).training[LiveBytes.OWN] for flags in ([], recomputed, halved)
    )
    assert less[0] < 0.8 * whole
    assert less[1] < 0.7 * whole


@pytest.mark.parametrize("stage", [0, 3])
def test_evaluation_is_a_forward_pass_of_its_own_batch(stage):
    few, many, alike = (
        foretold("--per_device_eval_batch_size", size, stage=stage) for size in ("64", "128", "2")
    )
    factor = many.evaluation[LiveBytes.OWN] / few.evaluation[LiveBytes.OWN]
    assert factor == pytest.approx(2, rel=0.1)
    assert many.training == few.training
    assert many.peak == sum(many.evaluation.values()), "a large batch is the peak of a run"
    # One as in training, whose backward pass needs more.
    assert alike.peak == max(sum(alike.training.values()), sum(alike.calibration.values()))
    assert alike.evaluation[LiveBytes.OWN] < 0.5 * alike.training[LiveBytes.OWN]


@pytest.mark.parametrize(("model", "method"), CASES["planned"])
def test_every_method_and_kind_of_model_can_be_planned(model, method):
    found = foretold("--method", *method.split(), model=model)
    assert 0 < found.num_trained <= 1.05 * found.num_parameters
    assert found.training[LiveBytes.OWN] > 0


# Advice


def test_the_least_change_fits_and_none_before_it_does():
    setting = setting_of("--bf16", model="opt", stage=0, world_size=2)
    needs = [(told, forecast(changed)) for told, changed in islice(changes(setting), 6)]
    assert needs[0][0] == ["--gradient_checkpointing"]
    for told, found in needs:
        assert len({words.split()[0] for words in told}) == len(told), "each flag is told once"
        assert not fits(found, found.peak), "a share is left to others"
    for told, needed in needs[1:6:2]:
        memory = needed.peak / (1 - HEADROOM) + 1
        assert fits(needed, memory)
        change = least_change(setting, memory)
        assert change is not None
        assert change[0] == next(words for words, other in needs if fits(other, memory))
        assert len(change[0]) <= len(told)


def test_the_lowest_stage_that_fits_is_told():
    """Below the setting's own, whatever fits besides."""
    full = setting_of("--method", "full", "--bf16", stage=3)
    needs = [
        forecast(replace(full, deepspeed=advice.CONFIGS[f"ds_configs/zero{n}.json"]))
        for n in range(4)
    ]
    told = set()
    for memory in (needed.peak / (1 - HEADROOM) + 1 for needed in needs):
        fitting = [n for n in range(3) if fits(needs[n], memory)]
        found = lower_stage(full, memory)
        told.add(found and found[0])
        assert found == (
            (f"ds_configs/zero{fitting[0]}.json", needs[fitting[0]]) if fitting else None
        )
    assert {"ds_configs/zero0.json", "ds_configs/zero1.json"} <= told
    assert lower_stage(full, 1e3) is None
    half = lower_stage(setting_of("--fp16", stage=3), 1e12)
    assert half is not None
    assert half[0] == "ds_configs/zero1.json", "as stage 0 scales no loss"


def test_batch_sizes_that_the_json_spells_out_follow_a_change():
    setting = setting_of(model="opt", stage=0, world_size=2)
    written = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
    spelt = replace(
        setting, deepspeed={**setting.deepspeed, **written, "gradient_accumulation_steps": 1}
    )
    memory = forecast(setting).peak / 1.5
    found = least_change(setting, memory)
    assert found is not None
    assert found == least_change(spelt, memory)
    assert {"--per_device_train_batch_size 1", "--gradient_accumulation_steps 2"} < set(found[0])


@pytest.mark.parametrize("file", advice.CONFIGS)
def test_advice_knows_the_repositorys_configurations_without_their_files(file):
    setting = setting_of("--bf16")
    read, known = read_config(REPOSITORY / file), advice.CONFIGS[file]
    assert forecast(replace(setting, deepspeed=known)) == forecast(replace(setting, deepspeed=read))


# The command


def test_the_command_needs_a_configuration_only(tmp_path, capsys, monkeypatch):
    MODELS["opt"].save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path)]
    zero3 = ["--deepspeed", str(DS_CONFIGS / "zero3.json"), "--world_size", "8", "--bf16"]
    main([*flags, *zero3, "--gpu_memory_gb", "80", "--calibration_buffer_gb", "auto"])
    told = capsys.readouterr().out
    for words in (
        "\n8 ranks, ZeRO stage 3, bf16",
        "8 x 1,024 tokens",
        "It fits",
        "buffer_gb auto is  ",
    ):
        assert words in told
    monkeypatch.setattr("gem_ds.planning.advice._MOST_RANKS", 2)
    main([*flags, "--gpu_memory_gb", "1e-6"])
    told = capsys.readouterr().out
    assert "\n1 rank, ZeRO stage 0, fp32" in told
    assert "Nothing that this program knows makes it fit" in told


@pytest.mark.parametrize(("flags", "words"), CASES["refused"])
def test_bad_input_gets_one_sentence(tmp_path, flags, words):
    MODELS["llama"].save_pretrained(tmp_path)
    assert words in refusal(main, ["--model_name_or_path", str(tmp_path), *flags.split()])
    assert "Pass --model_name_or_path" in refusal(main, [])


# Against runs


@pytest.mark.parametrize(("method", "tokens"), [("gem", 256), ("auto_rgn", 64), ("full", 64)])
def test_a_forecast_agrees_with_a_run(tmp_path, method, tokens):
    """Of a model that is large against what libraries take, on one rank."""
    like = "full" if method == "full" else "gem"
    flags = Training(layers=2, tokens=tokens).flags([like], tmp_path)[like]
    if method == "auto_rgn":  # whose masks are as large as the matrices
        at = flags.index("--density")
        flags[at : at + 2] = ["--target_modules", "all-linear"]
        flags[flags.index("--method") + 1] = method
    ranks = Ranks.start(like, flags, 1, is_weighed=True)
    try:
        ranks.wait()
        found = ranks.ask("count") | ranks.ask("report")
    finally:
        ranks.close()
    args = parse_arguments([*flags, "--output_dir", str(tmp_path)])
    told = forecast(read_setting(args, 1, on_cpu=True))
    assert told.state == pytest.approx(found["state_bytes"], rel=0.05)
    assert told.step_messages == pytest.approx(found["others"], rel=0.05)
    assert sum(told.training.values()) == pytest.approx(found["peak_bytes"], rel=0.15)
    if method != "full":  # with the selection, and all else that comes before the first step
        calibration = sum(told.calibration.values())
        assert calibration == pytest.approx(found["calibration_peak_bytes"], rel=0.15)


def test_a_mixture_with_experts_as_targets_is_foretold(tmp_path):
    """Nothing is run of it; a calibration holds the statistics of its experts, and a step no such.

    On one rank they are the whole matrices, fp32.
    """
    config = tiny_config("mixtral")
    config.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--target_modules", "experts"]
    args = parse_arguments([*flags, "--density", "0.01"], needed=[])
    found = forecast(read_setting(args, 1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numel = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    assert numel > 0
    assert found.calibration["statistics"] == 4 * numel
    assert "statistics" not in found.training


def test_experts_that_are_trained_whole_are_added_as_one_product():
    """A GPU would look each entry up in it otherwise, by places of several times its size."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 4}
    config = tiny_config("mixtral", **sizes)
    flags = "--max_length 8 --target_modules experts --method auto_rgn --bf16"
    told = []
    for kernel in ("auto", "tiled"):
        args = parse_arguments([*flags.split(), "--sddmm_kernel", kernel], needed=[])
        setting = Setting(args=args, config=config, deepspeed={}, world_size=1)
        told.append(sum(forecast(setting).training.values()))
    largest = 4 * 256 * 2 * 512
    assert told[1] - told[0] > 16 * largest
