"""The answer loss in chunks against the one of whole logits, on models of many kinds."""

from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutput

from gem_ds.data.dataset import answer_positions
from gem_ds.data.packing import pack
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.models import loss as losses
from gem_ds.models.attention import padded_on_the_right
from gem_ds.models.loss import (
    answer_logits,
    answer_loss_of,
    chunked_answer_loss,
    summed_answer_loss,
)
from gem_ds.sparse.target_layers import TargetLayers
from tests.largest_tensor import LargestTensor
from tests.operations import Operations
from tests.ranks import run_ranks
from tests.tiny import (
    MAX_LENGTH,
    PAD_TOKEN_ID,
    Setting,
    checkpointed,
    make_engine,
    model_of,
    naive_examples,
    naive_loss,
    random_examples,
)

pytestmark = pytest.mark.slow  # starts engines or programs

VOCABULARY = 40
EXAMPLES = random_examples(5)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "ffn_dim": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "initializer_range": 0.2, "init_std": 0.2, "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
#: By name: a type of model, and what its configuration has beside the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "untied gpt2": ("gpt2", {"tie_word_embeddings": False}),
    "opt": ("opt", {"word_embed_proj_dim": 8}),
    "untied opt": ("opt", {"word_embed_proj_dim": 8, "tie_word_embeddings": False}),
    "gptj, with a bias": ("gptj", {"rotary_dim": 4}),
    "gemma2 without a softcap": ("gemma2", {"final_logit_softcapping": None}),
    "mistral, in windows": ("mistral", {"sliding_window": 3}),
}
CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 2.0}),
}


ALONE = Comm(torch.device("cpu"))


def make(
    name: str = "llama", make_model: Any = AutoModelForCausalLM.from_config, **more: Any
) -> Any:
    model_type, own = (MODELS | CHANGING)[name]
    config = AutoConfig.for_model(model_type, **SIZES | own | more)
    return model_of(config, make_model).eval()


def batch_of(*, packed: bool = False) -> dict[str, Tensor]:
    dataset = pack(EXAMPLES, MAX_LENGTH) if packed else EXAMPLES
    return dataset.collate(range(len(dataset)), PAD_TOKEN_ID)


def whole_logits_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss as a model of transformers is commonly asked for it."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "answer_positions")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, found, strict=True) if g is not None}


def assert_same(model: nn.Module, batch: dict[str, Tensor], relative: float = 1e-5) -> None:
    """The same loss and the same gradient of every trained parameter.

    Gradients are known to an error that is relative to their largest entry; some (of the biases of
    keys) are nothing but such errors of others.
    """
    expected = whole_logits_loss(model, batch)
    whole = gradients(model, expected)
    scales = {name: gradient.abs().max().item() for name, gradient in whole.items()}
    for loss_of in (chunked_answer_loss, summed_answer_loss):
        with mock.patch.object(losses, "rows_of_chunk", return_value=3):
            found = loss_of(model, batch)
        torch.testing.assert_close(found, expected, rtol=relative, atol=0)
        own = gradients(model, found)
        assert own.keys() == whole.keys()
        for name, gradient in own.items():
            error = (gradient - whole[name]).abs().max().item()
            assert error <= relative * max(scales[name], 0.01 * max(scales.values())), name


@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_in_chunks_is_what_whole_logits_give(name):
    """In bf16 both round the logits; a model that returns them in fp32 changes none of them."""
    for dtype, relative in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        model = make(name).to(dtype)
        assert answer_loss_of(model, ALONE) is chunked_answer_loss
        assert_same(model, batch_of(), relative)


def loss_alone(model: nn.Module) -> Tensor:
    """The sum of the examples' losses, each by itself."""
    return sum(naive_loss(model, e) for e in naive_examples(EXAMPLES, range(len(EXAMPLES))))  # type: ignore[return-value]


def test_the_loss_is_that_of_examples_alone():
    model = make()
    for loss_of in (summed_answer_loss, chunked_answer_loss):
        for packed in (False, True):
            found = loss_of(model, batch_of(packed=packed))
            torch.testing.assert_close(found, loss_alone(model), rtol=1e-5, atol=0)


def test_parts_that_are_trained_and_blocks_that_are_recomputed():
    """Through a frozen output layer the gradient goes on to the layers that are selected from."""
    model = make()
    model.lm_head.weight.requires_grad_(False)
    assert_same(model, batch_of(packed=True))
    assert_same(checkpointed(make()).train(), batch_of())  # type: ignore[arg-type]
    adapted = LoraConfig(r=2, target_modules=["q_proj"])
    assert_same(get_peft_model(make(), adapted), batch_of())


def test_no_rows_are_a_batch_of_weight_zero():
    """A rank without examples runs its backward all the same, and adds nothing."""
    model = make("tied llama")
    loss = chunked_answer_loss(model, EXAMPLES.collate([], PAD_TOKEN_ID))
    assert loss.item() == 0
    for gradient in gradients(model, loss).values():
        assert gradient.abs().max() == 0


class NotCalling(LlamaForCausalLM):
    """Reads the weight of its output layer without calling the layer."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=hidden @ self.lm_head.weight.t())


class Doubling(LlamaForCausalLM):
    """Changes its logits in place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits.mul_(2)
        return output


@pytest.mark.parametrize("kind", [*CHANGING, NotCalling, Doubling])
def test_models_whose_logits_are_not_their_output_layers_keep_them(kind):
    model = make(kind) if isinstance(kind, str) else make("llama", kind)
    assert answer_loss_of(model, ALONE) is summed_answer_loss
    if kind is not Doubling:
        found = summed_answer_loss(model, batch_of())
        torch.testing.assert_close(found, loss_alone(model), rtol=1e-5, atol=0)
    if kind in list(CHANGING):
        with pytest.raises(AssertionError, match="changed its logits"):
            chunked_answer_loss(model, batch_of())


def lora_on_the_output() -> Any:
    return get_peft_model(make(), LoraConfig(r=2, target_modules=["lm_head"]))


def test_output_layers_that_are_more_than_a_product_keep_them_whole():
    """Adapted by peft in two ways, selected from, and of a class of its own."""
    own = make()
    own.lm_head = type("Linear4bit", (nn.Linear,), {})(16, VOCABULARY, bias=False)
    selected = make()
    TargetLayers(selected, {"lm_head.weight": selected.lm_head}, 3)  # type: ignore[dict-item]
    copied = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for model in (own, selected, lora_on_the_output(), get_peft_model(make(), copied)):
        assert answer_loss_of(model, ALONE) is summed_answer_loss
        assert summed_answer_loss(model, batch_of()) > 0


def test_the_output_layer_is_itself_again_after_an_error():
    model = make()
    tokens = torch.full((1, 3), VOCABULARY)  # no such token
    with pytest.raises(IndexError):
        chunked_answer_loss(
            model,
            {"input_ids": tokens, "labels": tokens, "answer_positions": answer_positions(tokens)},
        )
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=tokens - 1).logits.shape == (1, 3, VOCABULARY)


def test_a_step_makes_nothing_of_the_size_of_the_logits():
    """The largest is a chunk, where inner layers are trained."""
    vocabulary, chunk_rows = 3000, 4
    model = make(vocab_size=vocabulary)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    batch = batch_of()
    with mock.patch.object(losses, "rows_of_chunk", return_value=chunk_rows):
        with LargestTensor() as largest:
            chunked_answer_loss(model, batch).backward()
        with LargestTensor() as largest_whole:
            whole_logits_loss(model, batch).backward()
        with torch.no_grad(), LargestTensor() as largest_of_logits:
            answer_logits(model, batch)
    assert largest_whole.num_entries == batch["labels"].numel() * vocabulary
    assert largest.num_entries == chunk_rows * vocabulary
    assert largest_of_logits.num_entries == len(batch["answer_positions"]) * vocabulary


# Padding, which no token of causal attention reads


@pytest.mark.parametrize("name", ["llama", "opt", "mistral, in windows"])
def test_padding_costs_no_wait_and_no_mask(name):
    """But for windows, which need a mask; that results are the same is seen above."""
    model, batch = make(name), batch_of()
    assert not batch["attention_mask"].all()
    is_causal = "windows" not in name
    attention = mock.Mock(wraps=F.scaled_dot_product_attention)
    for loss_of in (chunked_answer_loss, summed_answer_loss):
        attention.reset_mock()
        with mock.patch.object(F, "scaled_dot_product_attention", attention), Operations() as run:
            loss_of(model, batch).backward()
        assert run.num_waits == 0
        for call in attention.call_args_list:
            assert call.kwargs["is_causal"] == is_causal
            assert (call.kwargs["attn_mask"] is None) == is_causal
    with Operations() as run:
        whole_logits_loss(model, batch)
    assert run.num_waits == 2 * is_causal, "as transformers does it by itself"


def test_masks_that_are_not_causal_keep_the_padding():
    """And what makes masks is as before in the end."""
    own = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    model = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).eval()
    inputs = {key: batch_of()[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs).last_hidden_state
    with padded_on_the_right():
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == own
    with mock.patch.dict(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, sdpa=print):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is print, "what is registered later holds"


# Logits of answers only


@pytest.mark.parametrize("name", [*MODELS, *CHANGING, "lora"])
def test_answer_logits_are_the_models_own(name):
    """Where it changes what its output layer returns, too."""
    model = lora_on_the_output() if name == "lora" else make(name)
    batch = batch_of()
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = whole.flatten(0, 1)[batch["answer_positions"]]
    torch.testing.assert_close(answer_logits(model, batch), expected, rtol=1e-5, atol=1e-6)


# On ranks


def _losses_at_stage_3() -> dict[str, tuple[bool, float]]:
    """By model: whether the loss is chunked, and what it is; no weight stays gathered."""
    comm = init_distributed()
    found = {}
    for name in ("llama", "tied llama", "gemma2"):
        model = make(name)
        engine, _ = make_engine(Setting(3, variant="gathered"), comm, model, 3)
        loss_of = answer_loss_of(engine.model, comm)
        with torch.no_grad():
            loss = loss_of(engine.model, batch_of())
        weight = model.get_output_embeddings().weight
        assert weight.numel() == 0, "released after the forward"
        found[name] = loss_of is chunked_answer_loss, loss.item()
    return found


def test_partitioned_weights_on_two_ranks():
    """The swapped layer is the one whose weight ZeRO-3 gathers, and for its call only."""
    for found in run_ranks(2, _losses_at_stage_3):
        for name, (is_chunked, loss) in found.items():
            assert is_chunked == (name in MODELS)
            expected = summed_answer_loss(make(name), batch_of()).item()
            assert loss == pytest.approx(expected, rel=1e-5)
