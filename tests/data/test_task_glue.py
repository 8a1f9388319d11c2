"""GLUE: the official files and the Hub's rows become the same examples; bad files are refused."""

from collections import Counter

import datasets
import pytest

from gem_ds.data.tasks import NumberExample, TaskData, load_task
from tests.tiny_tasks import choice

#: By task: what a file starts with, a row, the same row as the Hub has it, and its example.
CASES = {
    "cola": (
        None,
        "gj04\t0\t*\tThey drank the pub.",
        {"sentence": "They drank the pub.", "label": 0, "idx": 0},
        choice(
            prompt=(
                "They drank the pub.\nQuestion: Is this sentence grammatically acceptable?\nAnswer:"
            ),
            candidates=(" no", " yes"),
            answer=0,
            pairs=(("They drank the pub.", None),),
        ),
    ),
    "sst2": (
        "sentence\tlabel",
        'a "smile \t1',  # the spare space is the data set's own
        {"sentence": 'a "smile ', "label": 1, "idx": 0},
        choice(
            prompt='a "smile\nQuestion: Is this review negative or positive?\nAnswer:',
            candidates=(" negative", " positive"),
            answer=1,
            pairs=(('a "smile', None),),
        ),
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t7\t8\tHe said "yes.\tYes, he said.',
        {"sentence1": 'He said "yes.', "sentence2": "Yes, he said.", "label": 1, "idx": 0},
        choice(
            prompt=(
                'Sentence 1: He said "yes.\nSentence 2: Yes, he said.\n'
                "Question: Do both sentences mean the same thing?\nAnswer:"
            ),
            candidates=(" no", " yes"),
            answer=1,
            pairs=(('He said "yes.', "Yes, he said."),),
        ),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t0001\tnone\tnone\tA plane rises.\tA plane takes off.\t4.750",
        {"sentence1": "A plane rises.", "sentence2": "A plane takes off.", "label": 4.75, "idx": 0},
        NumberExample(
            prompt=(
                "Sentence 1: A plane rises.\nSentence 2: A plane takes off.\n"
                "Question: How similar in meaning are the sentences, from 0.0 (not at all) to 5.0 "
                "(the same)?\nAnswer:"
            ),
            target=" 4.8",
            pairs=(("A plane rises.", "A plane takes off."),),
            value=4.75,
        ),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "5\t11\t12\tHow old is he?\tWhat is his age?\t1",
        {"question1": "How old is he?", "question2": "What is his age?", "label": 1, "idx": 0},
        choice(
            prompt=(
                "Question 1: How old is he?\nQuestion 2: What is his age?\n"
                "Question: Do both questions ask the same thing?\nAnswer:"
            ),
            candidates=(" no", " yes"),
            answer=1,
            pairs=(("How old is he?", "What is his age?"),),
        ),
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t( a )\t( b )\t(R a)\t(R b)\tHe sat.\tHe stood.\tneutral\tcontradiction",
        {"premise": "He sat.", "hypothesis": "He stood.", "label": 2, "idx": 0},
        choice(
            prompt="He sat.\nQuestion: He stood. True, False or Neither?\nAnswer:",
            candidates=(" True", " Neither", " False"),
            answer=2,
            pairs=(("He sat.", "He stood."),),
        ),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\tWho won?\tIt rained.\tnot_entailment",
        {"question": "Who won?", "sentence": "It rained.", "label": 1, "idx": 0},
        choice(
            prompt=(
                "Who won?\nIt rained.\nQuestion: Does this sentence answer the question?\nAnswer:"
            ),
            candidates=(" yes", " no"),
            answer=1,
            pairs=(("Who won?", "It rained."),),
        ),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA dog ran.\tAn animal ran.\tentailment",
        {"sentence1": "A dog ran.", "sentence2": "An animal ran.", "label": 0, "idx": 0},
        choice(
            prompt="A dog ran.\nQuestion: An animal ran. True or False?\nAnswer:",
            candidates=(" True", " False"),
            answer=0,
            pairs=(("A dog ran.", "An animal ran."),),
        ),
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tIt fell.\tThe cup fell.\t1",
        {"sentence1": "It fell.", "sentence2": "The cup fell.", "label": 1, "idx": 0},
        choice(
            prompt="It fell.\nQuestion: The cup fell. True or False?\nAnswer:",
            candidates=(" False", " True"),
            answer=1,
            pairs=(("It fell.", "The cup fell."),),
        ),
    ),
}
LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "stsb": (),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}


def write(folder, name, *lines):
    (folder / name).write_bytes("".join(f"{x}\n" for x in lines if x is not None).encode())


def kind_of(task):
    return "number" if task == "stsb" else "labels"


@pytest.mark.parametrize("task", CASES)
def test_an_official_file_becomes_examples(tmp_path, task):
    header, row, _, example = CASES[task]
    write(tmp_path, "train.tsv", header, row, row)
    train = [example, example]
    assert load_task(task, data_dir=str(tmp_path)) == TaskData(
        train=train, test=[], kind=kind_of(task), labels=LABELS[task]
    )
    write(tmp_path, "dev_matched.tsv" if task == "mnli" else "dev.tsv", header, row)
    assert load_task(task, data_dir=str(tmp_path)).test == [example]


@pytest.mark.parametrize("task", CASES)
def test_the_hub_gives_the_same_examples(monkeypatch, task):
    _, _, row, example = CASES[task]
    validation = "validation_matched" if task == "mnli" else "validation"

    def load_dataset(*names):
        assert names == ("nyu-mll/glue", task)
        return {"train": [row, row], validation: [row]}  # asking for the test set is an error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task(task) == TaskData(
        train=[example, example], test=[example], kind=kind_of(task), labels=LABELS[task]
    )


def test_mnli_holds_out_one_of_its_two_validation_sets(tmp_path, monkeypatch):
    header, row, fields, _ = CASES["mnli"]
    write(tmp_path, "train.tsv", header, row)
    write(tmp_path, "dev_matched.tsv", header, row)
    write(tmp_path, "dev_mismatched.tsv", header, row, row)
    assert len(load_task("mnli", data_dir=str(tmp_path)).test) == 1
    assert len(load_task("mnli_mismatched", data_dir=str(tmp_path)).test) == 2
    splits = {"train": [fields], "validation_mismatched": [fields] * 3}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits)
    assert len(load_task("mnli_mismatched").test) == 3


def counts(examples):
    return Counter(example.target for example in examples)


def test_rte_is_read_whole(gem_data_dir):
    """454 training rows hold quotation marks: one that is taken for a quote swallows its rows."""
    data = load_task("rte", data_dir=str(gem_data_dir / "glue" / "RTE"))
    assert counts(data.train) == {" True": 1249, " False": 1241}
    assert counts(data.test) == {" True": 146, " False": 131}
    assert data.train[0] == choice(
        prompt=(
            "No Weapons of Mass Destruction Found in Iraq Yet.\n"
            "Question: Weapons of Mass Destruction Found in Iraq. True or False?\nAnswer:"
        ),
        candidates=(" True", " False"),
        answer=1,
        pairs=(
            (
                "No Weapons of Mass Destruction Found in Iraq Yet.",
                "Weapons of Mass Destruction Found in Iraq.",
            ),
        ),
    )


def test_cola_is_read_whole(gem_data_dir):
    """The folder's val.tsv is nobody's official split, and stays out."""
    data = load_task("cola", data_dir=str(gem_data_dir / "glue" / "CoLA"))
    assert counts(data.train) == {" no": 2162, " yes": 5088}
    assert counts(data.test) == {" no": 322, " yes": 721}
    sentence = "The sailors rode the breeze clear of the rocks."
    assert data.test[0] == choice(
        prompt=f"{sentence}\nQuestion: Is this sentence grammatically acceptable?\nAnswer:",
        candidates=(" no", " yes"),
        answer=1,
        pairs=((sentence, None),),
    )


HEADER, ROW = CASES["rte"][:2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, ROW, "1\ta\tb"], r"line 3: the row has 3 cells and the table 4 columns"),
        ([HEADER, "", f"{ROW}\tc"], r"line 3: the row has 5 cells and the table 4 columns"),
        (
            [HEADER, '1\ta\t"b\tx'],
            r'line 2: the label is "x"; it must be one of "entailment", "not',
        ),
        ([HEADER.replace("sentence2", "s"), ROW], r"line 2: there is no field 'sentence2'; the "),
        ([HEADER.replace("label", "gold"), ROW], r"line 2: there is no field 'label'; the line "),
        ([HEADER], r"is empty: it must hold a row on each line"),
        ([], r"is empty"),
    ],
)
def test_a_bad_table_is_named(tmp_path, lines, message):
    write(tmp_path, "train.tsv", *lines)
    with pytest.raises(ValueError, match=rf"train\.tsv.*{message}"):
        load_task("rte", data_dir=str(tmp_path))


def test_broken_rows_of_qqp_are_left_out_and_no_others(tmp_path):
    header, row = CASES["qqp"][:2]
    write(tmp_path, "train.tsv", header, row, "5\t11\t12\tHow old", row)
    assert len(load_task("qqp", data_dir=str(tmp_path)).train) == 2
    write(tmp_path, "train.tsv", header, row, f"{row}\t1")
    with pytest.raises(ValueError, match=r"line 3: the row has 7 cells and the table 6 columns"):
        load_task("qqp", data_dir=str(tmp_path))


def test_a_missing_column_has_the_name_of_the_file(tmp_path):
    header, row = CASES["mrpc"][:2]
    write(tmp_path, "train.tsv", header.replace("#2 String", "other"), row)
    with pytest.raises(ValueError, match=r"line 2: there is no field '#2 String'; the line has 'Q"):
        load_task("mrpc", data_dir=str(tmp_path))


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "train.tsv").write_bytes(f"{HEADER}\n".encode() + b"0\ta\xff\tb\tentailment\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: byte 4 of the line is not UTF-8"):
        load_task("rte", data_dir=str(tmp_path))


@pytest.mark.parametrize("label", ["5.1", "-0.1", "nan", "high", ""])
def test_a_similarity_outside_its_scale_is_refused(tmp_path, label):
    header, row = CASES["stsb"][:2]
    write(tmp_path, "train.tsv", header, row.replace("4.750", label))
    with pytest.raises(ValueError, match=r"line 2: the label is '.*'; it must be a number from 0"):
        load_task("stsb", data_dir=str(tmp_path))


def test_a_row_of_the_hub_without_a_label_is_refused(monkeypatch):
    row = CASES["rte"][2] | {"label": -1}  # what the Hub writes where the label is secret
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: {"train": [row]})
    with pytest.raises(ValueError, match=r"glue/rte/train, row 1: the label is -1; .* of 0, 1"):
        load_task("rte")


def test_a_folder_without_the_training_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*train\.tsv or .*train\.jsonl: check the path"):
        load_task("rte", data_dir=str(tmp_path))


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_options_of_other_tasks_are_refused(task):
    with pytest.raises(ValueError, match=f"--train_file has no meaning for --task {task}"):
        load_task(task, data_dir="anywhere", train_file="x")


def test_lines_end_in_newlines_only_and_quotes_are_characters(tmp_path):
    """Rows that hold U+2028, U+0085 or a lone quotation mark stay one row each."""
    odd = 'a\u2028b\u0085c "d'
    (tmp_path / "train.tsv").write_bytes(f"{HEADER}\r\n0\t{odd}\t{odd}\tentailment\r\n".encode())
    (example,) = load_task("rte", data_dir=str(tmp_path)).train
    assert example.pairs == ((odd, odd),)
