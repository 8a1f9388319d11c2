"""Data: token borders, labels, packing and order, each against a naive way to get the same."""

import io
import time

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

from gem_ds.data.encode import encode, encode_prompt
from gem_ds.data.packing import pack_rows
from gem_ds.data.schedule import BatchSchedule, permutation
from gem_ds.data.tasks import Example, load_task
from gem_ds.data.texts import EncodedDataset, collate

CORPUS = ["Question: How many clips?\nAnswer: She sold 48 clips.\n#### 72", "xyz xyz xyz"] * 20
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "How many?"}]
WIDE = 10_000


def byte_level(*, add_bos=False, add_eos=False, **names):
    """A small byte-level BPE tokenizer; `names` replaces its special tokens (None removes one)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos or add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' * add_bos}$A{' </s>' * add_eos}",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    special = {"bos_token": "<s>", "eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def tokenizers(sentencepiece_folder):
    """Both families, with each habit of adding special tokens."""
    habits = [(False, False), (True, False), (False, True), (True, True)]
    return {
        (family, bos, eos): byte_level(add_bos=bos, add_eos=eos)
        if family == "byte-level"
        else LlamaTokenizer.from_pretrained(
            sentencepiece_folder, add_bos_token=bos, add_eos_token=eos
        )
        for family in ("byte-level", "sentencepiece")
        for bos, eos in habits
    }


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_encode_is_what_the_tokenizer_does_with_the_whole_text(
    tokenizers, family, add_bos, add_eos
):
    """An eos after the prompt would teach the model to answer an ended text."""
    tokenizer = tokenizers[family, add_bos, add_eos]
    example = Example(prompt="Question: How many clips?\nAnswer:", target=" She sold\n#### 72")
    input_ids, prompt_length = encode(example, tokenizer, WIDE)

    whole = tokenizer(example.prompt + example.target)["input_ids"]
    assert input_ids == (whole if add_eos else [*whole, tokenizer.eos_token_id])
    prompt = tokenizer(example.prompt)["input_ids"]
    assert input_ids[:prompt_length] == (prompt[:-1] if add_eos else prompt)
    assert encode_prompt(example.prompt, tokenizer) == input_ids[:prompt_length]
    assert (input_ids[0] == tokenizer.bos_token_id) == add_bos
    text = tokenizer.decode(input_ids, skip_special_tokens=True)
    assert text.removeprefix(" ") == example.prompt + example.target


def test_a_token_across_the_border_is_not_used():
    """Generation starts from the prompt's own tokens, so training must too."""
    tokenizer = byte_level()
    assert len(tokenizer("xyz")["input_ids"]) == 1
    input_ids, prompt_length = encode(Example(prompt="x", target="yz xyz"), tokenizer, WIDE)
    assert input_ids[:prompt_length] == tokenizer("x")["input_ids"]
    assert input_ids[prompt_length:-1] == tokenizer("yz xyz")["input_ids"]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=12), target=st.text(max_size=12))
def test_any_text_survives_in_two_parts(tokenizers, prompt, target):
    """Byte-level tokens decode to their text exactly, on both sides of the border."""
    tokenizer = tokenizers["byte-level", True, False]
    input_ids, prompt_length = encode(Example(prompt=prompt, target=target), tokenizer, WIDE)
    assert input_ids[0] == tokenizer.bos_token_id
    assert input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(input_ids[1:prompt_length]) == prompt
    assert tokenizer.decode(input_ids[prompt_length:-1]) == target


def test_an_empty_prompt_is_the_bos_token():
    example = Example(prompt="", target="xyz")
    tokenizer = byte_level()
    assert encode(example, tokenizer, WIDE) == ([0, *tokenizer("xyz")["input_ids"], 1], 1)
    assert encode(example, byte_level(add_bos=True, add_eos=True), WIDE)[1] == 1
    assert encode_prompt("", tokenizer) == [0]
    with pytest.raises(ValueError, match="empty prompt and the tokenizer has no bos"):
        encode(example, byte_level(bos_token=None), WIDE)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(Example(prompt="x", target="y"), byte_level(eos_token=None), WIDE)


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
def test_chat_messages_go_through_the_template(tokenizers, family, monkeypatch):
    """The template writes its own bos: a second one from the tokenizer would be wrong."""
    tokenizer = tokenizers[family, True, True]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    input_ids, prompt_length = encode(Example(prompt=CHAT, target=" 72"), tokenizer, WIDE)
    ids = tokenizer("<s>user: How many?\nassistant:", add_special_tokens=False)["input_ids"]
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert input_ids[:prompt_length] == ids == rendered["input_ids"]
    assert input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(input_ids[prompt_length:-1]).strip() == "72"
    assert encode_prompt(CHAT, tokenizer) == ids


def test_chat_messages_that_cannot_be_rendered_are_refused():
    tokenizer = byte_level()
    examples = [Example(prompt="x", target="y"), Example(prompt=CHAT, target="72")]
    with pytest.raises(ValueError, match=r"Example 2 holds chat .* no chat template"):
        EncodedDataset.encode(examples, tokenizer, WIDE)
    tokenizer.chat_template = TEMPLATE
    system = Example(prompt=[{"role": "system", "content": "s"}], target="y")
    with pytest.raises(ValueError, match=r"messages of example 3 \(no system role\)"):
        EncodedDataset.encode([*examples, system], tokenizer, WIDE)


def test_a_long_answer_is_cut_and_a_long_prompt_refused():
    tokenizer = byte_level()
    example = Example(prompt="abcd", target="efgh")
    full, prompt_length = encode(example, tokenizer, WIDE)
    for max_length in range(prompt_length + 1, len(full) + 2):
        assert encode(example, tokenizer, max_length) == (full[:max_length], prompt_length)
    short = Example(prompt="a", target="b")
    cut = EncodedDataset.encode([example, short, example], tokenizer, len(full) - 1)
    assert cut.truncated.tolist() == [True, False, True]
    assert cut.num_truncated == 2
    assert EncodedDataset.encode([example], tokenizer, len(full)).num_truncated == 0
    with pytest.raises(ValueError, match=r"Example 2 has a prompt of 4 .* max_length of 4: raise"):
        EncodedDataset.encode([short, example], tokenizer, prompt_length)


def test_errors_count_examples_across_chunks():
    examples = [Example(prompt="a", target="b")] * 2500 + [Example(prompt="a" * 99, target="b")]
    with pytest.raises(ValueError, match="Example 2501 has a prompt of 99 tokens"):
        EncodedDataset.encode(examples, byte_level(), 9)


def test_a_dataset_is_its_examples_encoded_one_by_one(tokenizers):
    tokenizer = tokenizers["sentencepiece", True, False]
    examples = [Example(prompt=f"How many {i}?", target=f" {i}" * (i % 5)) for i in range(1100)]
    dataset = EncodedDataset.encode(examples, tokenizer, 12)
    single = [encode(example, tokenizer, 12) for example in examples]
    assert len(dataset) == 1100
    for i, (input_ids, prompt_length) in enumerate(single):
        assert dataset.input_ids(i).tolist() == input_ids
        assert dataset.length(i) == len(input_ids)
        assert dataset.prompt_length(i) == prompt_length
        assert dataset.lengths[i] == len(input_ids)
        assert dataset.weight([i]) == len(input_ids) - prompt_length > 0
    assert dataset.weight(range(len(dataset))) == sum(len(ids) - length for ids, length in single)
    assert dataset.tokens.dtype == dataset.prompt_lengths.dtype == torch.int32

    indices = [7, 3, 7, 1099]
    selected = dataset.select(indices)
    same = EncodedDataset.encode([examples[i] for i in indices], tokenizer, 12)
    assert selected.fingerprint() == same.fingerprint()
    assert selected.truncated.tolist() == same.truncated.tolist()
    assert len(dataset.select([])) == len(EncodedDataset.encode([], tokenizer, 12)) == 0


def test_real_gsm8k_encodes_within_its_usual_lengths(gem_data_dir):
    examples = load_task("gsm8k", data_dir=str(gem_data_dir / "gsm8k")).test
    tokenizer = byte_level(add_bos=True)
    dataset = EncodedDataset.encode(examples, tokenizer, 4096)
    assert dataset.num_truncated == 0
    for i in (0, 700, 1318):
        ids, prompt_length = dataset.input_ids(i).tolist(), dataset.prompt_length(i)
        assert tokenizer.decode(ids[1:prompt_length]) == examples[i].prompt
        assert tokenizer.decode(ids[prompt_length:-1]) == examples[i].target


def make_dataset(shape, seed=0):
    """Random tokens 1..49 for a list of (prompt length, answer length)."""
    lengths = torch.tensor([0] + [prompt + answer for prompt, answer in shape])
    generator = torch.Generator().manual_seed(seed)
    return EncodedDataset(
        tokens=torch.randint(1, 50, (int(lengths.sum()),), generator=generator).int(),
        offsets=lengths.cumsum(0),
        prompt_lengths=torch.tensor([prompt for prompt, _ in shape], dtype=torch.int32),
        truncated=torch.zeros(len(shape), dtype=torch.bool),
    )


def test_a_fingerprint_sees_every_part_and_nothing_else():
    base = make_dataset([(2, 3), (1, 4), (3, 2)])
    same = make_dataset([(2, 3), (1, 4), (3, 2)])
    assert base.fingerprint() == same.fingerprint()
    changed = same.tokens.clone()
    changed[4] += 1
    others = [
        make_dataset([(2, 3), (2, 3), (3, 2)]),
        make_dataset([(2, 2), (1, 5), (3, 2)]),
        base.select([0, 2, 1]),
        base.select([0, 1]),
        EncodedDataset(
            tokens=changed,
            offsets=base.offsets,
            prompt_lengths=base.prompt_lengths,
            truncated=base.truncated,
        ),
    ]
    assert len({d.fingerprint() for d in [base, *others]}) == 6


def test_collate_by_hand():
    dataset = EncodedDataset(
        tokens=torch.tensor([11, 12, 13, 21, 22, 23, 24, 31, 32], dtype=torch.int32),
        offsets=torch.tensor([0, 3, 7, 9]),
        prompt_lengths=torch.tensor([1, 3, 1], dtype=torch.int32),
        truncated=torch.zeros(3, dtype=torch.bool),
    )
    plain = collate(dataset, [[1], [2]], pad_token_id=9, packed=False)
    assert {key: value.tolist() for key, value in plain.items()} == {
        "input_ids": [[21, 22, 23, 24], [31, 32, 9, 9]],
        "labels": [[-100, -100, -100, 24], [-100, 32, -100, -100]],
        "answer_positions": [2, 4],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    }
    packed = collate(dataset, [[0, 1], [2]], pad_token_id=9, packed=True)
    assert {key: value.tolist() for key, value in packed.items()} == {
        "input_ids": [[11, 12, 13, 21, 22, 23, 24], [31, 32, 9, 9, 9, 9, 9]],
        "labels": [
            [-100, 12, 13, -100, -100, -100, 24],
            [-100, 32, -100, -100, -100, -100, -100],
        ],
        "answer_positions": [0, 1, 5, 7],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]],
    }
    for value in (*plain.values(), *packed.values()):
        assert value.dtype == torch.int64


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


def summed_loss(model, batch):
    """The sum of answer-token losses, from the model's logits and the batch's labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = -log_softmax(logits[:, :-1], -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return losses[labels != -100].sum().item()


def loss_alone(model, dataset, i):
    """The same for one example alone: no padding, no mask, no labels, position by position."""
    ids = dataset.input_ids(i).long()
    with torch.no_grad():
        log_probabilities = log_softmax(model(ids[None], use_cache=False).logits[0], -1)
    answer = range(dataset.prompt_length(i), dataset.length(i))
    return -sum(log_probabilities[t - 1, ids[t]].item() for t in answer)


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99), room=st.integers(12, 40))
def test_packed_and_padded_rows_lose_what_their_examples_lose_alone(llama, shapes, seed, room):
    """An example that sees its neighbour in a packed row would have another loss."""
    dataset = make_dataset(shapes, seed)
    alone = sum(loss_alone(llama, dataset, i) for i in range(len(dataset)))
    packed = collate(dataset, pack_rows(dataset, room), pad_token_id=0, packed=True)
    padded = collate(dataset, [[i] for i in range(len(dataset))], pad_token_id=0, packed=False)
    assert summed_loss(llama, packed) == pytest.approx(alone, rel=1e-5)
    assert summed_loss(llama, padded) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_are_a_batch_of_weight_zero_with_finite_logits(llama, packed):
    """A rank that has no rows left still runs the model, and a NaN would reach the others."""
    batch = collate(make_dataset([(1, 1)]), [], pad_token_id=7, packed=packed)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[7, 7]],
        "labels": [[-100, -100]],
        "answer_positions": [],
    } | ({"position_ids": [[0, 1]]} if packed else {"attention_mask": [[1, 1]]})
    inputs = {key: batch[key] for key in batch.keys() - {"labels", "answer_positions"}}
    assert llama(**inputs).logits.isfinite().all()


def naive_best_fit_decreasing(lengths, max_length):
    """The rows' fill levels, by looking at every open row for every example."""
    fills = []
    for length in sorted(lengths, reverse=True):
        open_rows = [r for r, fill in enumerate(fills) if fill + length <= max_length]
        if open_rows:
            fills[max(open_rows, key=lambda r: fills[r])] += length
        else:
            fills.append(length)
    return sorted(fills)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=40), data=st.data()
)
def test_packing_is_best_fit_decreasing_and_complete(shapes, data):
    dataset = make_dataset(shapes)
    lengths = [sum(shape) for shape in shapes]
    max_length = data.draw(st.integers(max(lengths, default=1), 40))
    rows = pack_rows(dataset, max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(shapes)))
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert fills == naive_best_fit_decreasing(lengths, max_length)
    assert max(fills, default=0) <= max_length
    assert rows == pack_rows(dataset, max_length)


def test_packing_scales_and_fills():
    """A quadratic search over 1e5 examples would take minutes."""
    lengths = torch.randint(20, 300, (100_000,), generator=torch.Generator().manual_seed(1))
    dataset = make_dataset([(1, n - 1) for n in lengths.tolist()])
    start = time.perf_counter()
    rows = pack_rows(dataset, 1024)
    assert time.perf_counter() - start < 10
    assert int(lengths.sum()) / (len(rows) * 1024) > 0.99


def test_packing_refuses_an_example_longer_than_a_row():
    with pytest.raises(ValueError, match="Example 2 has 5 tokens and a row holds 4"):
        pack_rows(make_dataset([(1, 1), (2, 3)]), 4)


def schedules(num_rows, global_batch_size, micro_batch_size, world_size, seed=0, lengths=None):
    return [
        BatchSchedule(
            num_rows=num_rows,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            lengths=lengths,
        )
        for rank in range(world_size)
    ]


@settings(max_examples=150, deadline=None)
@given(
    num_rows=st.integers(1, 50),
    global_batch_size=st.integers(1, 60),
    micro_batch_size=st.integers(1, 8),
    world_size=st.integers(1, 7),
    seed=st.integers(-(2**40), 2**70),
    is_grouped=st.booleans(),
)
def test_every_epoch_reads_every_row_once_on_any_world(
    num_rows, global_batch_size, micro_batch_size, world_size, seed, is_grouped
):
    lengths = torch.arange(num_rows) % 7 if is_grouped else None
    ranks = schedules(num_rows, global_batch_size, micro_batch_size, world_size, seed, lengths)
    (alone,) = schedules(num_rows, global_batch_size, 1, 1, seed, lengths)
    steps = alone.steps_per_epoch
    assert (steps - 1) * global_batch_size < num_rows <= steps * global_batch_size
    for epoch in (0, 1):
        read = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = alone.global_batch(step)
            parts = [rank.micro_batches(step) for rank in ranks]
            assert all(rank.global_batch(step) == batch for rank in ranks)
            assert {len(part) for part in parts} == {ranks[0].num_micro_batches}
            assert max(len(micro) for part in parts for micro in part) <= micro_batch_size
            assert sorted(i for part in parts for micro in part for i in micro) == sorted(batch)
            shares = [sum(map(len, part)) for part in parts]
            assert max(shares) - min(shares) <= 1
            assert step == epoch * steps + steps - 1 or len(batch) == global_batch_size
            read += batch
        assert is_grouped or read == permutation(num_rows, seed, epoch).tolist()
        assert sorted(read) == list(range(num_rows))


def test_rows_of_a_batch_are_of_about_one_length():
    """And every epoch has other batches, in an order that does not go by length."""
    lengths = torch.randint(5, 100, (1000,), generator=torch.Generator().manual_seed(0))
    (grouped,) = schedules(1000, 8, 8, 1, lengths=lengths)
    (shuffled,) = schedules(1000, 8, 8, 1)

    def padding(schedule, steps):
        batches = [lengths[schedule.global_batch(step)] for step in steps]
        return sum(int(batch.max()) * len(batch) - int(batch.sum()) for batch in batches)

    whole = range(124)  # the smaller batch is step 124
    assert padding(grouped, range(125)) < 0.1 * padding(shuffled, range(125))
    first, second = (
        {tuple(sorted(grouped.global_batch(125 * epoch + step))) for step in whole}
        for epoch in (0, 1)
    )
    assert not first & second
    means = torch.stack([lengths[grouped.global_batch(step)].float().mean() for step in whole])
    following = torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]
    assert abs(following) < 0.3


def test_no_micro_batch_is_run_in_vain():
    """One micro-batch more than the largest share needs would be a wasted forward pass."""
    for world_size, micro, expected in [(1, 4, 3), (2, 4, 2), (2, 5, 1), (3, 2, 2), (7, 8, 1)]:
        ranks = schedules(100, 10, micro, world_size)
        assert ranks[0].num_micro_batches == expected
        assert any(rank.micro_batches(0)[-1] for rank in ranks)


def test_order_depends_on_seed_and_epoch_apart():
    """A generator seeded with seed + epoch would give run 1 the second epoch of run 0."""
    orders = {
        tuple(permutation(30, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25
    assert list(range(30)) not in map(list, orders)


def test_an_order_is_the_same_in_whatever_sequence_it_is_asked_for():
    (schedule,) = schedules(1000, 8, 1, 1)
    steps = [400, 3, 126, 124, 125, 3, 400]
    batches = [schedule.global_batch(step) for step in steps]
    batches[0].reverse()
    assert batches[1] == batches[5]
    assert batches[0][::-1] == batches[6]
    state = torch.get_rng_state()
    schedule.global_batch(999)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1, 1), "no training examples"),
        ((1, 0, 1, 1), "global_batch_size is 0"),
        ((1, 1, -2, 1), "micro_batch_size is -2"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        schedules(*sizes)
