r"""The tasks of GLUE (arXiv 1804.07461) and SuperGLUE (arXiv 1905.00537): one entry each.

Prompts are in the style of the community harness: the texts, a question, `Answer:`, and answers
that start with the one separating space. Judging what a model writes is `gem_ds.data.metrics`.

- rte is in both benchmarks with the same examples; a folder may hold either form.
- mnli has two validation sets: `mnli` holds out the matched one (the genres of the training set),
  `mnli_mismatched` the other. They train on the same examples.
- qqp's official training file has two dozen broken rows; the Hub has left them out.
- multirc makes one example of each answer; `group` tells the question.
- record asks for the entity that fills the query's blank. The model has read the whole query when
  it answers, so training moves the choice of the name and nothing else; the names are of different
  lengths, so compare likelihoods per token. Encoders read the query with the name filled in.
- wsc marks noun and pronoun in the text, as either may occur several times. The Hub's `wsc.fixed`
  has the official examples with some spans corrected.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from gem_ds.data.tasks import superglue
from gem_ds.data.tasks.classification import ClassificationTask, Files

GLUE = "nyu-mll/glue"
SUPERGLUE = "aps/super_glue"

_tsv = partial(Files, train="train.tsv", test="dev.tsv")
_jsonl = partial(Files, train="train.jsonl", test="val.jsonl")
_ZERO_ONE = ("0", "1")

_MNLI = ClassificationTask(
    hub=(GLUE, "mnli"),
    files=(
        _tsv(
            test="dev_matched.tsv",
            names={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        ),
    ),
    test_split="validation_matched",
    prompt="{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
    answers={"entailment": " True", "neutral": " Neither", "contradiction": " False"},
    pair=("{premise}", "{hypothesis}"),
)

#: Every task by its short name.
TASKS: Mapping[str, ClassificationTask] = {
    "cola": ClassificationTask(
        hub=(GLUE, "cola"),
        files=(_tsv(header=("source", "label", "mark", "sentence"), labels=_ZERO_ONE),),
        prompt="{sentence}\nQuestion: Is this sentence grammatically acceptable?\nAnswer:",
        answers={"unacceptable": " no", "acceptable": " yes"},
        pair=("{sentence}", None),
    ),
    "sst2": ClassificationTask(
        hub=(GLUE, "sst2"),
        files=(_tsv(labels=_ZERO_ONE),),
        prompt="{sentence}\nQuestion: Is this review negative or positive?\nAnswer:",
        answers={"negative": " negative", "positive": " positive"},
        pair=("{sentence}", None),
    ),
    "mrpc": ClassificationTask(
        hub=(GLUE, "mrpc"),
        files=(
            _tsv(
                names={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
                labels=_ZERO_ONE,
            ),
        ),
        prompt=(
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Question: Do both sentences mean the same thing?\nAnswer:"
        ),
        answers={"not_equivalent": " no", "equivalent": " yes"},
        pair=("{sentence1}", "{sentence2}"),
    ),
    "stsb": ClassificationTask(
        hub=(GLUE, "stsb"),
        files=(_tsv(names={"label": "score"}),),
        kind="number",
        prompt=(
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Question: How similar in meaning are the sentences, from 0.0 (not at all) to 5.0 "
            "(the same)?\nAnswer:"
        ),
        pair=("{sentence1}", "{sentence2}"),
    ),
    "qqp": ClassificationTask(
        hub=(GLUE, "qqp"),
        files=(_tsv(names={"label": "is_duplicate"}, labels=_ZERO_ONE, skip_short=True),),
        prompt=(
            "Question 1: {question1}\nQuestion 2: {question2}\n"
            "Question: Do both questions ask the same thing?\nAnswer:"
        ),
        answers={"not_duplicate": " no", "duplicate": " yes"},
        pair=("{question1}", "{question2}"),
    ),
    "mnli": _MNLI,
    "mnli_mismatched": replace(
        _MNLI,
        files=(replace(_MNLI.files[0], test="dev_mismatched.tsv"),),
        test_split="validation_mismatched",
    ),
    "qnli": ClassificationTask(
        hub=(GLUE, "qnli"),
        files=(_tsv(),),
        prompt="{question}\n{sentence}\nQuestion: Does this sentence answer the question?\nAnswer:",
        answers={"entailment": " yes", "not_entailment": " no"},
        pair=("{question}", "{sentence}"),
    ),
    "rte": ClassificationTask(
        hub=(GLUE, "rte"),
        files=(_tsv(), _jsonl(names={"sentence1": "premise", "sentence2": "hypothesis"})),
        prompt="{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        answers={"entailment": " True", "not_entailment": " False"},
        pair=("{sentence1}", "{sentence2}"),
    ),
    "wnli": ClassificationTask(
        hub=(GLUE, "wnli"),
        files=(_tsv(labels=_ZERO_ONE),),
        prompt="{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        answers={"not_entailment": " False", "entailment": " True"},
        pair=("{sentence1}", "{sentence2}"),
    ),
    "boolq": ClassificationTask(
        hub=(SUPERGLUE, "boolq"),
        files=(_jsonl(labels=(False, True)),),
        prompt="{passage}\nQuestion: {question}?\nAnswer:",
        answers={"False": " no", "True": " yes"},
        pair=("{question}", "{passage}"),
    ),
    "cb": ClassificationTask(
        hub=(SUPERGLUE, "cb"),
        files=(_jsonl(),),
        prompt="{premise}\nQuestion: {hypothesis}. True, False or Neither?\nAnswer:",
        answers={"entailment": " True", "contradiction": " False", "neutral": " Neither"},
        pair=("{premise}", "{hypothesis}"),
    ),
    "copa": ClassificationTask(
        hub=(SUPERGLUE, "copa"),
        files=(_jsonl(labels=(0, 1)),),
        kind="choices",
        num_choices=2,
        derive=superglue.derive_copa,
        prompt="{beginning}",
        choice=" {choice}",
        pair=("{beginning}", "{choice}"),
    ),
    "multirc": ClassificationTask(
        hub=(SUPERGLUE, "multirc"),
        files=(_jsonl(labels=(0, 1), unfold=superglue.unfold_multirc),),
        group=("paragraph", "question"),
        prompt="{paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs this answer correct?",
        answers={"False": " no", "True": " yes"},
        pair=("{paragraph}", "{question} {answer}"),
    ),
    "record": ClassificationTask(
        hub=(SUPERGLUE, "record"),
        files=(_jsonl(unfold=superglue.unfold_record),),
        kind="choices",
        group=("passage", "query"),
        derive=superglue.derive_record,
        prompt="{passage}\n\n{blank}\nQuestion: Which name fills the blank?\nAnswer:",
        choice=" {entity}",
        pair=("{passage}", "{filled}"),
    ),
    "wic": ClassificationTask(
        hub=(SUPERGLUE, "wic"),
        files=(_jsonl(labels=(False, True)),),
        prompt=(
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            'Question: Does the word "{word}" have the same meaning in both sentences?\nAnswer:'
        ),
        answers={"False": " no", "True": " yes"},
        pair=("{word}: {sentence1}", "{sentence2}"),
    ),
    "wsc": ClassificationTask(
        hub=(SUPERGLUE, "wsc.fixed"),
        files=(_jsonl(labels=(False, True), unfold=superglue.unfold_wsc),),
        derive=superglue.derive_wsc,
        prompt=(
            'Passage: {marked}\nQuestion: Does the pronoun "*{span2_text}*" refer to '
            '"*{span1_text}*"?\nAnswer:'
        ),
        answers={"False": " no", "True": " yes"},
        pair=("{marked}", "{span2_text} refers to {span1_text}."),
    ),
}
