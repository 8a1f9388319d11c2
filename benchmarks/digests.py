"""Whether a change changed nothing: what the commands write, to the bit, beside an earlier record.

    python benchmarks/digests.py --record           # run every case, write benchmarks/digests.json
    python benchmarks/digests.py                    # run every case, compare
    python benchmarks/digests.py --only resume bf16 --keep /tmp/outputs

The cases are command lines, as a user types them, and nothing of the product is imported, so that
its modules may move. Of what they write each part has a digest of its own (the first 16 digits of a
SHA-256), so that a difference that was meant can be told from one that was not:

    safetensors    tensors: names, dtypes, shapes and bytes; and each field of the metadata
    JSON, JSONL    each key: its values with their places in the file, all digits kept
    CSV            each column
    Markdown       each section

Lists, and mappings whose values are alike (the weights of a mask), are tables: a key of theirs is
one column. Commands run in a folder that links to this checkout's, so that no path in their files
is of this machine. Bits depend on the processor and the libraries: where these are not those of the
record, the first lines say so. Then there is a line for each part, `same`, `DIFFERS`, `missing`
(recorded and not found) or `new`; the exit status is 1 unless all are the same.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import deserialize, safe_open
from transformers import BertConfig, BertModel, BertTokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_suffix(".json")

#: Keys, columns and files that are in no digest.
NAMES_LEFT_OUT = {
    *("seconds", "tokens_per_second", "seconds_per_step", "calibration_seconds"),  # time
    *("runtime_seconds", "s per step", "calibration s"),
    *("peak_memory_bytes", "peak memory"),  # of the process, libraries included
    *("versions", "transformers_version"),  # those that decide bits are recorded
    *("peft_version", "adapter/README.md"),
    *("digest", "digests", "file_digests"),  # of what is digested here, times included
    *("exported/tokenizer.json", "model/tokenizer.json"),  # the base model's
}
#: Lists that were sets: peft writes them in another order each time.
UNORDERED = ("target_modules",)

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(REPOSITORY),
}

BASE = "--model_name_or_path launch/demo/model"
DELTA = f"{BASE} --delta {{out}}/delta.safetensors"
LAUNCHER = "deepspeed --quiet --master_port {port} --num_accelerators"
DEMO = (
    "launch/train.py --config launch/recipes/demo.yaml --data_dir inputs/sums --disable_tqdm"
    " --output_dir {out}"
)
SMALL = f"python {DEMO} --max_steps 4 --logging_steps 1"
RESUMABLE = f"python {DEMO}/RUN --max_steps 6 --save_steps 3"
SUMS = (
    f"python -m eval.gsm8k {DELTA} --data_dir inputs/sums --output_dir {{out}}/eval"
    " --limit 20 --max_new_tokens 48 --dtype float32 --disable_tqdm"
)
PROGRAMS = (
    "--data_dir inputs/programs --prompt_template '{{header}}' --k 1 2 --allow_weak_sandbox"
    " --disable_tqdm"
)
RTE = "--model_name_or_path inputs/bert --task rte --data_dir inputs/rte --disable_tqdm"

#: The commands of each case; they write to {out}.
CASES: Mapping[str, Sequence[str]] = {
    "one_rank": [
        f"{LAUNCHER} 1 {DEMO} --max_steps 20",
        SUMS,
        f"python launch/export.py {DELTA} --output_dir {{out}}/exported",
    ],
    "two_ranks_zero3": [
        f"{LAUNCHER} 2 {DEMO} --max_steps 12 --deepspeed ds_configs/zero3.json",
        SUMS,
    ],
    "encoder": [
        f"python launch/train.py {RTE} --density 0.02 --learning_rate 1e-2 --max_steps 8"
        " --logging_steps 2 --calibration_head_steps 5 --output_dir {out}",
        f"python -m eval.classification {RTE} --delta {{out}}/delta.safetensors"
        " --output_dir {out}/eval",
    ],
    "resume": [
        RESUMABLE.replace("RUN", "whole"),
        "mkdir {out}/resumed",
        "cp -r {out}/whole/checkpoint-3 {out}/resumed",
        RESUMABLE.replace("RUN", "resumed") + " --resume_from_checkpoint last",
    ],
    "bf16": [f"{SMALL} --bf16"],
    **{m: [f"{SMALL} --method {m}"] for m in ("ratio", "random", "supertuning", "lora")},
    "full": [
        f"python launch/train.py {BASE} --task gsm8k --data_dir inputs/sums --method full"
        " --max_length 96 --max_steps 4 --logging_steps 1 --disable_tqdm --output_dir {out}"
    ],
    "answers": [
        "python -m eval.score --task gsm8k --data_dir inputs/sums --output_dir {out}"
        " inputs/answers.jsonl"
    ],
    "programs": [
        f"python -m eval.passk {BASE} {PROGRAMS} --n 2 --temperature 0.8 --seed 1"
        " --max_new_tokens 48 --dtype float32 --output_dir {out}",
        f"python -m eval.score --task mbpp {PROGRAMS} --output_dir {{out}}/again"
        " {out}/samples.jsonl",
    ],
    "comparison": [
        "python launch/compare.py --config inputs/comparison.yaml --data_dir inputs"
        " --output_dir {out}"
    ],
}

#: What of {out} is digested: the files of these folders that have one of these formats.
FOLDERS = (
    *("", "eval", "exported", "again", "adapter", "model", "whole", "resumed"),
    *("whole/checkpoint-6", "resumed/checkpoint-6"),
)
FORMATS = (".safetensors", ".json", ".jsonl", ".csv", ".md")

COMPARISON = """\
output_dir: runs/digests
num_parallel: 2
seeds: [42]
dev_examples: 16
common:
  model_name_or_path: launch/demo/model
  max_length: 96
  density: 0.02
  target_modules: [q_proj, v_proj]
  per_device_train_batch_size: 16
  max_steps: 12
  disable_tqdm: true
methods:
  gem: {learning_rates: [1e-2, 4e-2]}
  lora: {learning_rates: [1e-3, 1e-2]}
tasks:
  gsm8k:
    data_dir: sums
    evaluate:
      command: >-
        python -m eval.gsm8k --model_name_or_path {model} {weights} --data_dir {data_dir}
        --output_dir {output_dir}/eval --max_new_tokens 24 --dtype float32 --disable_tqdm
      score: exact_match.numeric.accuracy
      metric: numeric
      correct: numeric
"""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUESTION = "How many are {} eggs and {} eggs?"
ANSWERS = ("\n#### {}", " #### 1{}", " The answer is ${}.00.", " {}. Wait, it is 7.", " {}", "")
COLUMNS = "index\tsentence1\tsentence2\tlabel"
WORDS = ["red", "green", "blue", "warm", "cold", "is", "not", "very"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, then write the record or compare with it; 0 if nothing differs."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/digests.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", action="store_true", help="write the record of these cases")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="of these cases")
    parser.add_argument("--keep", type=Path, help="a new folder for what the commands write")
    args = parser.parse_args(argv)
    if args.keep and args.keep.exists():
        parser.error(f"--keep {args.keep} exists: name a new folder.")
    os.environ |= ENVIRONMENT
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    transformers.utils.logging.disable_progress_bar()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"machine": {}, "digests": {}}
    here = machine()
    for fact, value in here.items() if not args.record else ():
        if value != (recorded := record["machine"].get(fact)):
            print(f"{fact} is {value} and the record's is {recorded}: bits may differ")
    digests, counts = record["digests"], Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary) / "run").resolve()
        make_inputs(folder / "inputs")
        for name in ("launch", "ds_configs"):  # what the commands name
            (folder / name).symlink_to(REPOSITORY / name)
        for case in args.only or CASES:
            found = run_case(case, folder)
            if not args.record:
                counts += compare(case, digests.get(case, {}), found)
            elif not found:
                return 1
            digests[case] = found
    if args.record:
        record = {"machine": here, "digests": {case: digests[case] for case in CASES}}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    print(", ".join(f"{count:,} {verdict}" for verdict, count in counts.items()))
    return 0 if set(counts) == {"same"} else 1


def run_case(case: str, folder: Path) -> dict[str, str]:
    """Run the commands of a case; the digests of what they wrote, or none if one failed."""
    out = folder / "runs" / case
    out.mkdir(parents=True)
    for command in CASES[case]:
        words = shlex.split(command.format(out=f"runs/{case}", port=free_port()))
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            print(f"{done.stdout}{done.stderr}"[-3000:])
            print(f"{case} failed with {shlex.join(words)}")
            return {}
    found: dict[str, str] = {}
    for path in (path for part in FOLDERS for path in sorted((out / part).glob("*.*"))):
        name = str(path.relative_to(out))
        if path.suffix in FORMATS and name not in NAMES_LEFT_OUT:
            found |= {f"{name} {part}": digest for part, digest in digests_of(path).items()}
    return found


def compare(case: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> Counter[str]:
    """Print a line for each part of a case; returns how many lines there are of each kind."""
    counts: Counter[str] = Counter()
    for part in dict.fromkeys([*recorded, *found]):
        verdict = "same" if recorded.get(part) == found.get(part) else "DIFFERS"
        verdict = "new" if part not in recorded else "missing" if part not in found else verdict
        print(f"{verdict:8}{case}/{part}", flush=True)
        counts[verdict] += 1
    return counts


def machine() -> dict[str, str]:
    """What bits depend on beside the code."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cpu = re.findall(r"^(?:cpu family|model|model name)\s*: (.+)", text, re.MULTILINE)[:3]
    processor = ", ".join([*cpu, torch.backends.cpu.get_cpu_capability()])
    packages = ("torch", "transformers", "deepspeed")
    return {"processor": processor} | {package: metadata.version(package) for package in packages}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# From a file to digests


def digests_of(path: Path) -> dict[str, str]:
    """The digests of a file by part."""
    if path.suffix == ".safetensors":
        return _of_tensors(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return _of_sections(text)
    lines = text.splitlines()
    if path.suffix == ".csv":
        return _of_values(list(csv.DictReader(lines)))
    return _of_values([*map(json.loads, lines)] if path.suffix == ".jsonl" else json.loads(text))


def _of_tensors(path: Path) -> dict[str, str]:
    digest = hashlib.sha256()
    for name, tensor in sorted(deserialize(path.read_bytes())):
        digest.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
        digest.update(tensor["data"])
    with safe_open(path, framework="pt") as file:
        fields = file.metadata() or {}
    parsed = {n: json.loads(text) if text[:1] in ("{", "[") else text for n, text in fields.items()}
    of_metadata = {f"metadata {name}": part for name, part in _of_values(parsed).items()}
    return {"tensors": digest.hexdigest()[:16], **of_metadata}


def _of_values(value: Any) -> dict[str, str]:
    columns: dict[str, list[Any]] = defaultdict(list)
    for name, place, leaf in _leaves(value):
        columns[name].append([place, leaf])
    return {name: _digest(json.dumps(column)) for name, column in columns.items()}


def _leaves(value: Any, name: str = "", place: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Of each number, text, ... in a JSON value: its column, its place in that, itself."""
    if isinstance(value, list) and value:
        for i, item in enumerate(sorted(value) if name in UNORDERED else value):
            yield from _leaves(item, f"{name}[]", (*place, i))
    elif isinstance(value, dict) and value:
        keys = {tuple(item) if isinstance(item, dict) else () for item in value.values()}
        is_table = len(value) > 1 and len(keys) == 1 and keys != {()}
        for key, item in value.items():
            if is_table:
                yield from _leaves(item, f"{name}{{}}", (*place, key))
            elif key not in NAMES_LEFT_OUT:
                yield from _leaves(item, f"{name}.{key}".removeprefix("."), place)
    else:
        yield name, place, value


def _of_sections(text: str) -> dict[str, str]:
    """Of Markdown, without the columns of its tables that are left out."""
    sections: dict[str, list[str]] = defaultdict(list)
    title, header = "beginning", None
    for line in text.splitlines():
        if line.startswith("##"):
            title = line.strip("# ")
        if not line.startswith("|"):
            header = None
        else:
            cells = [cell.strip() for cell in line.split("|")]
            header = header or cells
            columns = zip(header, cells, strict=False)
            line = "|".join(cell for name, cell in columns if name not in NAMES_LEFT_OUT)
        sections[title].append(line.rstrip())
    return {title: _digest("\n".join(lines)) for title, lines in sections.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What the commands read beside the embedded model and its data


def make_inputs(folder: Path) -> None:
    """Write sums in GSM8K's form, programs, a comparison; a BERT that drops out, and its task."""
    rng = random.Random(0)
    sums = [(rng.randint(1, 60), rng.randint(1, 39)) for _ in range(120)]
    programs = (REPOSITORY / "launch/demo/programs/mbpp.jsonl").read_text().splitlines()
    files = {
        "sums/train.jsonl": [_problem(a, b) for a, b in sums[:96]],
        "sums/test.jsonl": [_problem(a, b) for a, b in sums[96:]],
        "answers.jsonl": [_answer(i, a, b) for i, (a, b) in enumerate(sums[96:])],
        "programs/mbpp.jsonl": programs[::4],  # ten
        "rte/train.tsv": [COLUMNS, *(_pair(rng, i) for i in range(48))],
        "rte/dev.tsv": [COLUMNS, *(_pair(rng, i) for i in range(16))],
        "comparison.yaml": [COMPARISON],
    }
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    BertTokenizer(vocab=vocab).save_pretrained(folder / "bert")
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3}
    config = BertConfig(vocab_size=len(vocab), num_hidden_layers=2, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")


def _problem(a: int, b: int) -> str:
    answer = f"{a}+{b}={a + b}\n#### {a + b}"
    return json.dumps({"question": QUESTION.format(a, b), "answer": answer})


def _answer(i: int, a: int, b: int) -> str:
    """A sample as a model might have written it."""
    prompt, completion = QUESTION.format(a, b), ANSWERS[i % len(ANSWERS)].format(a + b)
    sample = {"task_id": f"gsm8k/test/{i}", "sample": 0, "prompt": f"Question: {prompt}\nAnswer:"}
    told = {"finish_reason": "eos", "num_tokens": 9, "settings": {}}
    return json.dumps(sample | {"completion": completion} | told)


def _pair(rng: random.Random, index: int) -> str:
    """A row of RTE; one text entails the other where they end alike."""
    first, second = (rng.choices(WORDS, k=rng.randint(2, 6)) for _ in range(2))
    second[-1] = rng.choice([first[-1], second[-1]])
    label = "entailment" if first[-1] == second[-1] else "not_entailment"
    return f"{index}\t{' '.join(first)}\t{' '.join(second)}\t{label}"


if __name__ == "__main__":
    sys.exit(main())
