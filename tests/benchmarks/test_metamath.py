"""The data of PEFT's comparison, made from folders: what is kept, and how it is asked."""

import json

from benchmarks import metamath
from gem_ds.data.tasks import load_task


def test_short_examples_are_asked_to_think_step_by_step(tmp_path):
    rows = [("2 + 2?", "4\nThe answer is: 4"), ("x" * 700, "y" * 599), ("x" * 700, "y" * 600)]
    (tmp_path / "metamath").mkdir()
    lines = [json.dumps({"query": query, "response": response}) for query, response in rows]
    (tmp_path / "metamath" / "train.jsonl").write_text("\n".join(lines))  # the last: 1,301 long
    (tmp_path / "gsm8k").mkdir()
    test = json.dumps({"question": "How many?", "answer": "Two. #### 2"})
    (tmp_path / "gsm8k" / "test.jsonl").write_text(test + "\n")

    out = tmp_path / "runs" / "data"
    folders = ["--metamath", str(tmp_path / "metamath"), "--gsm8k", str(tmp_path / "gsm8k")]
    metamath.main([str(out), *folders])

    data = load_task("gsm8k", data_dir=str(out))
    prompts = [example.prompt for example in data.train]
    assert prompts == [f"Question: {q} Think step by step.\nAnswer:" for q in ("2 + 2?", "x" * 700)]
    assert data.train[0].target == " 4\nThe answer is: 4"
    assert data.test is not None
    (problem,) = data.test
    assert problem.prompt == "Question: How many? Think step by step.\nAnswer:"
    assert problem.target == " Two. #### 2"
