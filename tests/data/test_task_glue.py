"""GLUE: the official files and the Hub's rows become the same examples; bad files are refused."""

from collections import Counter

import datasets
import pytest

from gem_ds.data.tasks import NumberExample, TaskData, load_task
from tests.tiny_tasks import choice

PLANES = ("A plane rises.", "A plane takes off.")
ENTAILMENT = ("entailment", "not_entailment")

#: By task: what a file starts with and a row, both with "|" for tabs; the same row as the Hub has
#: it; the labels, and of its example the prompt, the candidates, the answer and the pair.
CASES = {
    "cola": (
        *(None, "gj04|0|*|They drank."),
        {"sentence": "They drank.", "label": 0},
        ("unacceptable", "acceptable"),
        "They drank.\nQuestion: Is this sentence grammatically acceptable?\nAnswer:",
        *((" no", " yes"), 0, ("They drank.", None)),
    ),
    "sst2": (
        *("sentence|label", 'a "smile |1'),  # the spare space is the data set's own
        {"sentence": 'a "smile ', "label": 1},
        ("negative", "positive"),
        'a "smile\nQuestion: Is this review negative or positive?\nAnswer:',
        *((" negative", " positive"), 1, ('a "smile', None)),
    ),
    "mrpc": (
        "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String",
        '1|7|8|He said "yes.|Yes, he said.',
        {"sentence1": 'He said "yes.', "sentence2": "Yes, he said.", "label": 1},
        ("not_equivalent", "equivalent"),
        'Sentence 1: He said "yes.\nSentence 2: Yes, he said.\n'
        "Question: Do both sentences mean the same thing?\nAnswer:",
        *((" no", " yes"), 1, ('He said "yes.', "Yes, he said.")),
    ),
    "stsb": (
        "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
        f"0|main|MSR|2012|0001|none|none|{PLANES[0]}|{PLANES[1]}|4.750",
        {"sentence1": PLANES[0], "sentence2": PLANES[1], "label": 4.75},
        (),
        f"Sentence 1: {PLANES[0]}\nSentence 2: {PLANES[1]}\nQuestion: How similar in meaning are "
        "the sentences, from 0.0 (not at all) to 5.0 (the same)?\nAnswer:",
        *((" 4.8",), 4.75, PLANES),
    ),
    "qqp": (
        *("id|qid1|qid2|question1|question2|is_duplicate", "5|11|12|How old?|What age?|1"),
        {"question1": "How old?", "question2": "What age?", "label": 1},
        ("not_duplicate", "duplicate"),
        "Question 1: How old?\nQuestion 2: What age?\n"
        "Question: Do both questions ask the same thing?\nAnswer:",
        *((" no", " yes"), 1, ("How old?", "What age?")),
    ),
    "mnli": (
        "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|"
        "sentence1_parse|sentence2_parse|sentence1|sentence2|label1|gold_label",
        "0|1|1n|fiction|( a )|( b )|(R a)|(R b)|He sat.|He stood.|neutral|contradiction",
        {"premise": "He sat.", "hypothesis": "He stood.", "label": 2},
        ("entailment", "neutral", "contradiction"),
        "He sat.\nQuestion: He stood. True, False or Neither?\nAnswer:",
        *((" True", " Neither", " False"), 2, ("He sat.", "He stood.")),
    ),
    "qnli": (
        *("index|question|sentence|label", "0|Who won?|It rained.|not_entailment"),
        {"question": "Who won?", "sentence": "It rained.", "label": 1},
        ENTAILMENT,
        "Who won?\nIt rained.\nQuestion: Does this sentence answer the question?\nAnswer:",
        *((" yes", " no"), 1, ("Who won?", "It rained.")),
    ),
    "rte": (
        *("index|sentence1|sentence2|label", "0|A dog ran.|It ran.|entailment"),
        {"sentence1": "A dog ran.", "sentence2": "It ran.", "label": 0},
        ENTAILMENT,
        "A dog ran.\nQuestion: It ran. True or False?\nAnswer:",
        *((" True", " False"), 0, ("A dog ran.", "It ran.")),
    ),
    "wnli": (
        *("index|sentence1|sentence2|label", "0|It fell.|The cup fell.|1"),
        {"sentence1": "It fell.", "sentence2": "The cup fell.", "label": 1},
        ENTAILMENT[::-1],
        "It fell.\nQuestion: The cup fell. True or False?\nAnswer:",
        *((" False", " True"), 1, ("It fell.", "The cup fell.")),
    ),
}


def table_of(task):
    """The first line and a row of its file."""
    return [cells and cells.replace("|", "\t") for cells in CASES[task][:2]]


def data_of(task, num_test):
    """Two training examples of a task, and as many held out as told."""
    labels, prompt, candidates, answer, pair = CASES[task][3:]
    if task == "stsb":
        text = {"prompt": prompt, "target": candidates[0]}
        example = NumberExample(**text, pairs=(pair,), value=answer)
    else:
        example = choice(prompt, candidates, answer, (pair,))
    kind = "number" if task == "stsb" else "labels"
    return TaskData(train=[example] * 2, test=[example] * num_test, kind=kind, labels=labels)


def write(folder, name, *lines):
    text = "".join(f"{line}\n" for line in lines if line is not None)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("task", CASES)
def test_files_and_the_hub_give_the_same_examples(tmp_path, monkeypatch, task):
    header, row = table_of(task)
    write(tmp_path, "train.tsv", header, row, row)
    assert load_task(task, data_dir=str(tmp_path)) == data_of(task, num_test=0)
    write(tmp_path, "dev_matched.tsv" if task == "mnli" else "dev.tsv", header, row)
    assert load_task(task, data_dir=str(tmp_path)) == data_of(task, num_test=1)

    def load_dataset(*names):
        assert names == ("nyu-mll/glue", task)
        row = CASES[task][2] | {"idx": 0}  # asking for the test set is an error
        validation = "validation_matched" if task == "mnli" else "validation"
        return {"train": [row, row], validation: [row]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task(task) == data_of(task, num_test=1)


def test_mnli_holds_out_one_of_its_two_validation_sets(tmp_path, monkeypatch):
    header, row = table_of("mnli")
    for name, num_rows in (("train", 1), ("dev_matched", 1), ("dev_mismatched", 2)):
        write(tmp_path, f"{name}.tsv", header, *[row] * num_rows)
    assert len(load_task("mnli", data_dir=str(tmp_path)).test) == 1
    assert len(load_task("mnli_mismatched", data_dir=str(tmp_path)).test) == 2
    row = CASES["mnli"][2]
    splits = {"train": [row], "validation_mismatched": [row] * 3}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    assert len(load_task("mnli_mismatched").test) == 3


def counts(examples):
    return Counter(example.target for example in examples)


def test_rte_is_read_whole(gem_data_dir):
    """454 training rows hold quotation marks: one that is taken for a quote swallows its rows."""
    data = load_task("rte", data_dir=str(gem_data_dir / "glue" / "RTE"))
    assert counts(data.train) == {" True": 1249, " False": 1241}
    assert counts(data.test) == {" True": 146, " False": 131}
    texts = [f"{w}eapons of Mass Destruction Found in Iraq" for w in ("No W", "W")]
    pair = (f"{texts[0]} Yet.", f"{texts[1]}.")
    prompt = f"{pair[0]}\nQuestion: {pair[1]} True or False?\nAnswer:"
    assert data.train[0] == choice(prompt, (" True", " False"), 1, (pair,))


def test_cola_is_read_whole(gem_data_dir):
    """The folder's val.tsv is nobody's official split, and stays out."""
    data = load_task("cola", data_dir=str(gem_data_dir / "glue" / "CoLA"))
    assert counts(data.train) == {" no": 2162, " yes": 5088}
    assert counts(data.test) == {" no": 322, " yes": 721}
    assert data.test[0].pairs == (("The sailors rode the breeze clear of the rocks.", None),)


HEADER, ROW = table_of("rte")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, ROW, "1\ta\tb"], r"line 3: the row has 3 cells and the table 4 columns"),
        ([HEADER, "", f"{ROW}\tc"], r"line 3: the row has 5 cells and the table 4 columns"),
        ([HEADER, '1\ta\t"b\tx'], r'line 2: the label is "x"; it must be one of "entailment", "n'),
        ([HEADER.replace("sentence2", "s"), ROW], r"line 2: there is no field 'sentence2'; the "),
        ([HEADER.replace("label", "gold"), ROW], r"line 2: there is no field 'label'; the line "),
        ([HEADER, "0\ta\udcff\tb\tentailment"], r"line 2: byte 4 of the line is not UTF-8"),
        ([HEADER], r"is empty: it must hold a row on each line"),
    ],
)
def test_a_bad_table_is_named(tmp_path, lines, message):
    write(tmp_path, "train.tsv", *lines)
    with pytest.raises(ValueError, match=rf"train\.tsv.*{message}"):
        load_task("rte", data_dir=str(tmp_path))


def test_broken_rows_of_qqp_are_left_out_and_no_others(tmp_path):
    header, row = table_of("qqp")
    write(tmp_path, "train.tsv", header, row, "5\t11\t12\tHow old", row)
    assert len(load_task("qqp", data_dir=str(tmp_path)).train) == 2
    write(tmp_path, "train.tsv", header, row, f"{row}\t1")
    with pytest.raises(ValueError, match=r"line 3: the row has 7 cells and the table 6 columns"):
        load_task("qqp", data_dir=str(tmp_path))


def test_a_missing_column_has_the_name_of_the_file(tmp_path):
    header, row = table_of("mrpc")
    write(tmp_path, "train.tsv", header.replace("#2 String", "other"), row)
    with pytest.raises(ValueError, match=r"line 2: there is no field '#2 String'; the line has 'Q"):
        load_task("mrpc", data_dir=str(tmp_path))


@pytest.mark.parametrize("label", ["5.1", "-0.1", "nan", ""])
def test_a_similarity_outside_its_scale_is_refused(tmp_path, label):
    header, row = table_of("stsb")
    write(tmp_path, "train.tsv", header, row.replace("4.750", label))
    with pytest.raises(ValueError, match=r"line 2: the label is '.*'; it must be a number from 0"):
        load_task("stsb", data_dir=str(tmp_path))


def test_a_row_of_the_hub_without_a_label_is_refused(monkeypatch):
    row = CASES["rte"][2] | {"label": -1}  # what the Hub writes where the label is secret
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: {"train": [row]})
    with pytest.raises(ValueError, match=r"glue/rte/train, row 1: the label is -1; .* of 0, 1"):
        load_task("rte")


def test_missing_files_and_options_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*train\.tsv or .*train\.jsonl: check the path"):
        load_task("rte", data_dir=str(tmp_path))
    for task in ("rte", "squad"):
        with pytest.raises(ValueError, match=f"--train_file has no meaning for --task {task}"):
            load_task(task, data_dir="anywhere", train_file="x")


def test_lines_end_in_newlines_only_and_quotes_are_characters(tmp_path):
    """Rows that hold U+2028, U+0085 or a lone quotation mark stay one row each."""
    odd = 'a\u2028b\u0085c "d'
    (tmp_path / "train.tsv").write_bytes(f"{HEADER}\r\n0\t{odd}\t{odd}\tentailment\r\n".encode())
    (example,) = load_task("rte", data_dir=str(tmp_path)).train
    assert example.pairs == ((odd, odd),)
