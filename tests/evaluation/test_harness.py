"""The evaluation harness over our model, against its own backend for transformers over the same weights."""

import json

import pytest

import mixtral_jax as mj
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source

# What the harness and its many libraries warn of, at import and later, is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"text": f"def f{n}(x):\n    return x", "choices": [f" + {n}", " - 1", f"({n})"], "answer": 0} for n in range(7)
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
TASKS = {
    "toy_choice": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    "fewshot_split: test\nnum_fewshot: 1\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "toy_rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{text}}{{text}}{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "toy_words": 'output_type: generate_until\ndoc_to_target: " + 1"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\nmetric_list: [{metric: exact_match}]\n',
}


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """A trained toy as transformers reads it."""
    target = tmp_path_factory.mktemp("evaluation") / "model"
    convert(open_source(whole[0]), target, "huggingface")
    return target


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + COMMON.format(data=json.dumps(str(data))) + text)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    from mixtral_jax.evaluation.harness import HarnessModel

    return HarnessModel(mj.load(folder, dtype="float32"), batch_size=3)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)


def _requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_backend_for_transformers(ours, theirs):
    pairs = [(each["text"], choice) for each in QUESTIONS for choice in each["choices"]]
    pairs += [("", "def f"), ("x ", "y"), ("return x " * 40, " + 1"), ("a", " b" * 15)]
    requests = _requests("loglikelihood", pairs)
    for mine, expected in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine == (pytest.approx(expected[0], rel=1e-4), expected[1])


def test_whole_texts_are_scored_as_by_the_backend_for_transformers(ours, theirs):
    requests = _requests("loglikelihood_rolling", [("def f1(x):\n" * count,) for count in (1, 7, 30)])
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-4)


def test_generated_text_is_that_of_the_backend_for_transformers(ours, theirs):
    settings = [{"until": ["\n"], "max_gen_toks": 8}, {"until": [")"], "max_gen_toks": 12, "do_sample": False}]
    requests = _requests("generate_until", [(each["text"], settings[n % 2]) for n, each in enumerate(QUESTIONS)])
    assert [text.strip() for text in ours.generate_until(requests)] == [
        text.strip() for text in theirs.generate_until(requests)
    ]


def test_an_answer_longer_than_the_model_reads_is_refused(ours):
    with pytest.raises(mj.InputError, match=r"--max-length = 64: an answer to be scored has \d+ tokens"):
        ours.loglikelihood(_requests("loglikelihood", [("a", " b" * 90)]))


def test_drawn_answers_differ_between_batches(ours):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    texts = ours.generate_until(_requests("generate_until", [("def f", settings)] * 6))
    assert len(set(texts)) > 3


def test_a_tasks_numbers_are_those_of_the_backend_for_transformers(ours, theirs, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mixtral_jax.evaluation.harness import evaluate

    mine = evaluate(ours, list(TASKS), include=tasks)["results"]
    expected = simple_evaluate(
        theirs, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)), log_samples=False
    )["results"]
    assert mine.keys() == expected.keys() == TASKS.keys()
    for name in TASKS:
        for metric, value in expected[name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert mine[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def test_the_command(run, folder, tasks, tmp_path):
    out = tmp_path / "all.json"
    options = ("--include", tasks, "--limit", 2, "--max-length", 64, "--dtype", "float32")
    status, text, err = run("eval", folder, "--tasks", "toy_choice,toy_words", *options, "--output", out)
    assert status == 0, err
    assert "toy_choice" in text
    assert json.loads(out.read_text())["results"].keys() == {"toy_choice", "toy_words"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "toy_chioce"), "--tasks = 'toy_chioce': no such task; did you mean 'toy_choice'"),
        (("--tasks", "toy_choice", "--max-length", 65), "--max-length = 65: from 2 to the model's 64 positions"),
        (("--tasks", "toy_words", "--max-length", 8), "max_gen_toks = 8: less than the 8 tokens"),
    ],
)
def test_refuses(run, folder, tasks, options, message):
    status, _, err = run("eval", folder, "--include", tasks, *options)
    assert status == 2
    assert message in err
