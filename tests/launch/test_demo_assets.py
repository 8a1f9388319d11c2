"""The embedded default: generators that reproduce what is committed, and a model that loads."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_ds.data.tasks.mbpp import load_problems
from launch.demo import compare, corpus, pretrain, programs, task
from tests.tiny_evaluation import refusal

DEMO = Path(task.__file__).parent
MODEL = DEMO / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)


def test_corpus_depends_on_the_seed_alone():
    first = list(corpus.generate_documents(5, 200))
    assert first == list(corpus.generate_documents(5, 200))
    assert first[:50] == list(corpus.generate_documents(5, 50))
    assert first != list(corpus.generate_documents(6, 200))
    assert "pass 0 or more" in refusal(next, corpus.generate_documents(0, -1))


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_what_the_corpus_says_is_right(seed):
    for document in corpus.generate_documents(seed, 20):
        if document.startswith("def "):
            source, _, calls = document.partition("\n\n")
            namespace: dict[str, object] = {}
            exec(source, namespace)
            for call, result in re.findall(r"print\((.*)\)  # (\d+)", calls):
                assert eval(call, namespace) == int(result)
            continue
        for left, right in re.findall(r"([\d+*-]+)=(\d+)", document):
            assert eval(left) == int(right)
        if document.startswith("Question:"):
            *_, step, result = document.split("\n")
            assert result == f"The answer is {step.rpartition('=')[2]}."


def test_corpus_shows_neither_the_comparison_nor_the_ending_of_the_task():
    """The demo measures learning only if pretraining did not already teach the task."""
    for document in corpus.generate_documents(17, 5000):
        assert not re.search(r"\bthan\b|fewer|times as|#### \d", document)


def test_committed_data_are_reproduced_byte_for_byte(tmp_path):
    task.main(["--output_dir", str(tmp_path)])
    programs.main(["--output_dir", str(tmp_path)])
    for name in ("task/train.jsonl", "task/test.jsonl", "programs/mbpp.jsonl"):
        assert (tmp_path / Path(name).name).read_bytes() == (DEMO / name).read_bytes()
    assert "lower --train_examples" in refusal(task.generate_examples, 0, 10**6)


def test_task_answers_are_right_and_no_problem_is_in_both_parts():
    """Recomputed from the words of the question, not from the answer's own equations."""
    problems = []
    for part in ("train", "test"):
        problems.append(set())
        for line in (DEMO / "task" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            first, by = map(int, re.findall(r"\d+", row["question"]))
            (relation,) = re.findall(r"more than|fewer than|times as many as", row["question"])
            sign = {"more than": "+", "fewer than": "-", "times as many as": "*"}[relation]
            second = eval(f"{first}{sign}{by}")
            assert second > 0
            total = first + second
            steps = f"{first}{sign}{by}={second}\n{first}+{second}={total}"
            assert row["answer"] == f"{steps}\n#### {total}"
            problems[-1].add((first, relation, by))
    assert [len(part) for part in problems] == [2000, 200]
    assert not problems[0] & problems[1]  # one would count memory as skill


def asked_for(text: str, x: int) -> int:
    """What a function must return, from the words of its task."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if "larger" in text:
        return min(x, numbers[0])
    factor = numbers.pop(0) if "multiplies" in text else 1
    return factor * x + (numbers.pop() if "adds" in text else 0)


def test_programs_do_what_their_text_asks_for_and_are_partly_beyond_the_pretraining():
    problems = load_problems(DEMO / "programs").split("test")
    assert len({problem.text for problem in problems}) == len(problems) == 40
    for problem in problems:
        namespace: dict[str, object] = {}
        exec(problem.code, namespace)
        for test in problem.tests:
            exec(test, namespace)
            argument, result = map(int, re.findall(r"\((\d+)\) == (\d+)", test)[0])
            assert result == asked_for(problem.text, argument)
    known = {document.partition("(")[0] for document in corpus.generate_documents(17, 20_000)}
    headers = [problem.code.partition("(")[0] for problem in problems]
    assert [header.removeprefix("def ") for header in headers if header not in known] == [
        *(f"times_{word}" for word in ("six", "seven", "eight", "nine")),
        *(f"at_most_{limit}" for limit in range(38, 59, 4)),
    ]


def test_model_fits_its_tokenizer(model, tokenizer):
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12_000_000
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert model.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_pretraining_command_makes_this_kind_of_folder(tmp_path, model, tokenizer):
    """The recorded command must still run, and give this tokenizer and this shape of model."""
    threads = torch.get_num_threads()
    flags = f"--output_dir {tmp_path} --steps 1 --rows 1 --threads {threads}"
    pretrain.main(flags.split())
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    made = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in made.items()] == [
        (k, v.shape, v.dtype) for k, v in model.state_dict().items()
    ]
    assert "--steps 1 --rows 1" in (tmp_path / "README.md").read_text(encoding="utf-8")
    flags = ["--output_dir", str(tmp_path), "--steps", "0"]
    assert "pass 1 or more" in refusal(pretrain.main, flags)


def test_packed_rows_hold_whole_documents(tokenizer):
    rows = [row for _, row in zip(range(5), pretrain.packed_rows(tokenizer, 17), strict=False)]
    text = tokenizer.decode([token for row in rows for token in row]).split("</s>")
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    assert max(map(len, rows)) <= pretrain.ROW_LENGTH
    assert text[:-1] == list(corpus.generate_documents(18, len(text) - 1))


def test_model_has_learned_its_text(model, tokenizer):
    """Far below the uniform guess (6.6 nats) on text it was not trained on."""
    total = 0.0
    for document in corpus.generate_documents(10**9, 20):
        input_ids = torch.tensor([[*tokenizer.encode(document), tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(input_ids=input_ids, labels=input_ids).loss.item()
    assert total / 20 < 1.0


@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60))
@example("How much?\nAnswer: Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n#### 10")
@example("def f(x):\n    return {x: 1}\n\n\n\t# 2  spaces ")
@example(" lead")
@settings(max_examples=100, deadline=None)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_splits_digits_and_adds_no_special_token(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("#### 1234"))
    assert tokens == ["####", "▁", "1", "2", "3", "4"]
    prompt, target = "Question: 1?\nAnswer:", " 2+3=5\n#### 5"
    assert tokenizer.encode(prompt) + tokenizer.encode(target) == tokenizer.encode(prompt + target)


@pytest.mark.parametrize("after", [93, 31, 28, 0])
def test_a_demo_fails_where_its_score_does_not_rise(tmp_path, capsys, after):
    for name, num_right in (("before", 1), ("after", after)):
        for kind, file, field in (
            ("real", "predictions.jsonl", "correct"),
            ("demo", "verdicts.jsonl", "strict_match"),
        ):
            (tmp_path / kind / name).mkdir(parents=True)
            lines = [json.dumps({field: i < num_right}) + "\n" for i in range(100)]
            (tmp_path / kind / name / file).write_text("".join(lines))
    for kind, flags in (("demo", []), ("real", ["--points", "20"]), ("real", ["--points", "95"])):
        is_enough = after - 1 >= float(flags[-1] if flags else 30)
        folders = [str(tmp_path / kind / name) for name in ("before", "after")]
        assert compare.main([*folders, *flags]) == (0 if is_enough else 1)
        said = capsys.readouterr().out
        assert f"by {after - 1:.1f} points" in said
        assert f"from 1.0% to {after:.1f}%" in said
        low, high = map(float, re.search(r"interval (\S+) to (\S+)\)", said).groups())
        share = max(after - 1, 1) / 100  # of the examples whose answer has changed
        width = 2 * 1.96 * 100 * (share * (1 - share) / 100) ** 0.5
        assert low <= after - 1 <= high
        assert high - low == pytest.approx(width, abs=1.6)
