"""Continuous batching: a text is what it is alone, whatever comes and goes beside it."""

import dataclasses
import threading
from functools import partial
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.errors import InputError
from mixtral_jax.inference import compiling, decode, generate
from mixtral_jax.inference.engine import Engine, _piece
from mixtral_jax.inference.requests import EngineConfig, Request
from mixtral_jax.inference.runner import Loaded
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.inference.weights import assemble, prepare
from mixtral_jax.model.tensors import look_up
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("blocks_of_three_slots")

EXECUTION = Execution(attention_chunk=8)
WINDOW = 6
SHAPES = EngineConfig(slots=4, max_length=64, prefill_chunk=16, prefix_blocks=6)
GREEDY = SamplingConfig()
WARM = SamplingConfig(temperature=1.0, top_p=0.9, top_k=20, repetition_penalty=1.2)
NEW = 20  # over three windows


def _config(family):
    # The Mixtral without a window: the two differ in all that matters.
    return tiny.config(family, sliding_window=WINDOW if family == "mistral" else None)


def _loaded(config, seed=0):
    return Loaded(prepare(tiny.params(config, seed), config, EXECUTION), config, EXECUTION)


_ENGINES = {}


def _engine(family, **changes):
    """One engine for each shape, warm, in the whole module."""
    shapes = dataclasses.replace(SHAPES, **changes)
    if (family, shapes) not in _ENGINES:
        engine = Engine(_loaded(_config(family)), shapes)
        engine.warm_up()
        _ENGINES[family, shapes] = engine
    return _ENGINES[family, shapes]


def _prompt(length, seed):
    """Prompts of one seed begin alike."""
    return tuple(np.random.default_rng(seed).integers(0, 40, 64)[:length].tolist())


def _run(engine, texts, arrivals=None, cancelled=()):
    """Runs requests, each submitted at its step: (ids, how it ended) of each.

    Args:
      arrivals: the step at which each comes.
      cancelled: pairs (index, step).
    """
    arrivals = arrivals or [0] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: arrivals[index])
    tickets, ids, ended = {}, [[] for _ in texts], [None] * len(texts)
    step = 0
    while order or engine.busy:
        while order and (arrivals[order[0]] <= step or not engine.busy):
            index = order.pop(0)
            tickets[engine.submit(texts[index])] = index
        for index, when in cancelled:
            if when == step:
                engine.cancel(next((ticket for ticket, own in tickets.items() if own == index), -1))
        for update in engine.step():
            index = tickets[update.ticket]
            assert ended[index] is None, "an update after the end"
            ids[index] += [token.id for token in update.tokens]
            ended[index] = update.ended
        step += 1
    assert not engine.running
    return list(zip(ids, ended, strict=True))


def _alone(engine, request):
    ((ids, _),) = _run(engine, [request])
    return ids


class Case(NamedTuple):
    """A request by what hypothesis draws."""

    length: int
    seed: int
    new: int
    is_warm: bool

    @property
    def request(self):
        sampling = WARM if self.is_warm else GREEDY
        return Request(
            prompt=_prompt(self.length, self.seed), max_new_tokens=self.new, sampling=sampling, seed=self.seed
        )


CASES = st.builds(Case, st.integers(1, 44), st.integers(0, 2), st.integers(1, NEW), st.booleans())
TRAFFIC = st.lists(
    st.tuples(CASES, st.integers(0, 12), st.one_of(st.none(), st.integers(0, 20))), min_size=8, max_size=16
)


class Reference:
    """What `generate` says of a request alone, and where it is clear about it."""

    def __init__(self):
        self.seen = {}
        self.texts = self.unclear = 0

    def check(self, family, case, ids):
        config = _config(family)
        loaded = _loaded(config)
        key = family, case._replace(new=NEW)
        request = case.request
        if key not in self.seen:
            run = {"max_new_tokens": NEW, "config": config, "execution": EXECUTION, "seed": case.seed}
            *_, state = generate.generate(loaded.weights, [request.prompt], sampling=request.sampling, **run)
            self.seen[key] = generate.outputs(state)[0]
        self.texts += 1
        expected = self.seen[key][: case.new]
        if ids != expected:
            place = next(n for n, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b)
            tokens = np.asarray([[*request.prompt, *expected[:place]]], np.int32)
            logits = decode.logits(
                loaded.weights, tokens, np.ones(tokens.shape, bool), config=config, execution=EXECUTION
            )[0, -1]
            first, second = np.sort(np.asarray(logits))[:-3:-1]
            assert case.is_warm or first - second < 1e-4 * np.std(logits)
            self.unclear += 1


REFERENCE = Reference()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_hundred_texts_in_random_traffic_equal_themselves_alone_and_generate(family):
    engine, alone = _engine(family), {}
    texts = 0

    @settings(max_examples=9, deadline=None, derandomize=True)
    @given(TRAFFIC)
    def run(traffic):
        nonlocal texts
        cases = [case for case, _, _ in traffic]
        cancelled = [(index, when) for index, (_, _, when) in enumerate(traffic) if when is not None]
        results = _run(engine, [case.request for case in cases], [arrival for _, arrival, _ in traffic], cancelled)
        for case, (ids, ended) in zip(cases, results, strict=True):
            if case not in alone:
                alone[case] = _alone(engine, case.request)
                REFERENCE.check(family, case, alone[case])
            if ended == "cancelled":
                assert ids == alone[case][: len(ids)]
            else:
                assert (ids, ended) == (alone[case], "length")
            texts += 1

    run()
    assert texts >= 100  # in each of the two families
    assert REFERENCE.unclear < 0.005 * REFERENCE.texts


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("changes", [{"prefix_blocks": 0}, {"prefill_chunk": 4}, {"prefill_chunk": 32, "slots": 2}])
def test_any_shapes_give_the_texts_of_generate(family, changes):
    engine = _engine(family, **changes)
    cases = [Case(length, seed, NEW, bool(seed)) for length in (1, 5, 6, 7, 33, 44) for seed in (0, 1)]
    for case, (ids, _) in zip(cases, _run(engine, [case.request for case in cases]), strict=True):
        REFERENCE.check(family, case, ids)


def test_a_cache_kept_as_bits_gives_the_texts_of_one_in_numbers(monkeypatch):
    """In bfloat16, as on a CPU and as elsewhere: with prefixes that are found again, and more texts than slots."""
    config, execution = _config("mistral"), dataclasses.replace(EXECUTION, cache_dtype="bfloat16")
    loaded = Loaded(prepare(tiny.params(config, 0), config, execution), config, execution)
    requests = [Case(length, seed, 8, bool(seed)).request for length in (5, 33, 44) for seed in (0, 1)]
    found, engines = [], []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr("mixtral_jax.model.cache.platform", lambda platform=platform: platform)
        engines.append(Engine(loaded, dataclasses.replace(SHAPES, slots=2)))
        found.append(_run(engines[-1], requests))
    assert found[0] == found[1]
    assert all(engine.statistics().cached_tokens > 0 for engine in engines)


def test_many_texts_begin_in_one_step():
    """More than one call begins."""
    engine = _engine("mixtral", slots=12, prefill_chunk=256, prefix_blocks=0)
    cases = [Case(length, seed, NEW, seed > 1) for length in (1, 2, 5, 9) for seed in (0, 1, 2)]
    tickets = [engine.submit(case.request) for case in cases]
    first = engine.step()
    assert {update.ticket for update in first if update.tokens} == set(tickets)
    found = {update.ticket: [token.id for token in update.tokens] for update in first}
    while engine.busy:
        for update in engine.step():
            found[update.ticket] += [token.id for token in update.tokens]
    for case, ticket in zip(cases, tickets, strict=True):
        REFERENCE.check("mixtral", case, found[ticket])


def test_a_beginning_that_was_met_before_is_not_taken_in_again():
    engine = _engine("mistral")
    request = Request(prompt=_prompt(43, 91), max_new_tokens=NEW)
    before = engine.statistics()
    first = _alone(engine, request)
    between = engine.statistics()
    assert between.cached_tokens == before.cached_tokens
    assert _alone(engine, request) == first
    other = Request(prompt=(*request.prompt[:35], 1, 2, 3), max_new_tokens=NEW)
    _run(engine, [other, other])
    # Two whole blocks of 16 tokens for each of three texts.
    assert engine.statistics().cached_tokens - between.cached_tokens == 96


def test_texts_of_one_prompt_share_it_while_it_is_taken_in():
    engine = _engine("mixtral")
    before = engine.statistics().cached_tokens
    requests = [Request(prompt=_prompt(40, 92), max_new_tokens=4, sampling=WARM, index=index) for index in range(3)]
    texts = [tuple(ids) for ids, _ in _run(engine, requests)]
    assert engine.statistics().cached_tokens - before == 2 * 32
    assert len(set(texts)) == 3


@pytest.fixture
def compiled():
    """What is traced, lowered and compiled meanwhile: which of it, functions' names, and those of threads."""
    found = []

    def listen(event, _, fun_name="", **__):
        if "compile" in event:
            name = fun_name.removeprefix("jit(").removesuffix(")")
            found.append((event.rpartition("/")[2], name, threading.current_thread().name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_once_an_engine_is_warm(compiled):
    engine = _engine("mistral")
    compiled.clear()
    kinds = [Case(length, 7, 5, is_warm).request for length in (1, 16, 17, 50) for is_warm in (False, True)]
    kinds += [dataclasses.replace(kinds[0], logprobs=3), dataclasses.replace(kinds[1], seed=2**40, index=2)]
    _run(engine, kinds, cancelled=[(2, 1)])
    assert not compiled


@pytest.mark.parametrize("on_mesh", [False, True])
def test_programs_for_an_accelerator_are_compiled_beside_each_other(monkeypatch, compiled, on_mesh):
    """By threads of their own; and what was compiled so is what is called."""
    monkeypatch.setattr(compiling, "platform", lambda: "tpu")
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]) if on_mesh else None
    config = tiny.config("mixtral", num_kv_heads=2)
    weights = assemble(partial(look_up, tiny.params(config)), config, EXECUTION, mesh)
    shapes = dataclasses.replace(SHAPES, slots=5, max_length=48, prefill_chunk=64)  # no other test's
    engine = Engine(Loaded(weights, config, EXECUTION), shapes, mesh=mesh)
    engine.warm_up()
    compiled = [(name, thread) for what, name, thread in compiled if what == "backend_compile_duration"]
    beside = sorted(name for name, thread in compiled if thread.startswith("compiling"))
    assert beside == ["decode", *["prefill"] * 4]  # of pieces of 64 and 16 tokens, with which texts begin or not
    others = {name for name, thread in compiled if not thread.startswith("compiling")}
    assert not others & {"prefill", "decode"}
    request = Case(20, 7, 5, is_warm=False).request
    assert [len(ids) for ids, _ in _run(engine, [request])] == [5]


def test_a_long_prompt_delays_no_other_by_more_than_a_chunk(monkeypatch):
    engine = _engine("mixtral")
    taken = []
    take_in = engine._runner.take_in
    monkeypatch.setattr(
        engine._runner,
        "take_in",
        lambda pieces, size, fresh: taken.append(size * engine._runner.rows(size)) or take_in(pieces, size, fresh),
    )
    early = [engine.submit(Request(prompt=_prompt(3, seed), max_new_tokens=30)) for seed in (3, 4)]
    engine.step()
    late = engine.submit(Request(prompt=_prompt(60, 93), max_new_tokens=2))
    steps = 0
    while late is not None and engine.busy:
        taken.clear()
        updates = engine.step()
        assert sum(taken) <= SHAPES.prefill_chunk
        grown = {update.ticket for update in updates if update.tokens}
        if any(update.ticket == late for update in updates):
            late = None
        else:
            steps += 1
            assert grown == set(early)
    assert steps >= 3  # four pieces of 16, the last of which brings the first token
    while engine.busy:
        engine.step()


def test_a_short_prompt_passes_a_long_one():
    engine = _engine("mixtral")
    tickets = [engine.submit(Request(prompt=_prompt(length, 94), max_new_tokens=1)) for length in (60, 3)]
    ended = []
    while engine.busy:
        ended += [update.ticket for update in engine.step() if update.ended]
    assert ended == tickets[::-1]


def test_more_texts_than_slots_wait_and_a_stop_id_ends_one():
    engine = _engine("mistral")
    free = _alone(engine, Request(prompt=_prompt(5, 1), max_new_tokens=NEW))
    stop = free[4]
    request = Request(prompt=_prompt(5, 1), max_new_tokens=NEW, stop_ids=(39 if stop != 39 else 38, stop))
    tickets = [engine.submit(request) for _ in range(9)]
    engine.step()
    assert (engine.running, engine.waiting) == (SHAPES.slots, 9 - SHAPES.slots)
    ended = {}
    ids = {ticket: [] for ticket in tickets}
    while engine.busy:
        for update in engine.step():
            ended[update.ticket] = update.ended or ended.get(update.ticket)
    assert set(ended.values()) == {"stop"}
    ((ids, how),) = _run(engine, [request])
    assert (ids, how) == (free[: free.index(stop) + 1], "stop")


def test_logprobs_are_the_models():
    engine = _engine("mixtral")
    config = _config("mixtral")
    request = Request(prompt=_prompt(9, 2), max_new_tokens=6, sampling=WARM, logprobs=3)
    engine.submit(request)
    plain = engine.submit(dataclasses.replace(request, logprobs=None))
    tokens = []
    while engine.busy:
        for update in engine.step():
            if update.ticket == plain:
                assert all(token.logprob is None and not token.alternatives for token in update.tokens)
            else:
                tokens += update.tokens
    ids = [*request.prompt, *(token.id for token in tokens)]
    logits = decode.logits(
        _loaded(config).weights, np.asarray([ids], np.int32), np.ones((1, 15), bool), config=config, execution=EXECUTION
    )
    logprob_TV = np.asarray(jax.nn.log_softmax(logits[0, 8:-1]))
    for token, logprob_V in zip(tokens, logprob_TV, strict=True):
        np.testing.assert_allclose(token.logprob, logprob_V[token.id], atol=1e-5)
        likeliest = np.argsort(-logprob_V)[:3]
        assert [each for each, _ in token.alternatives] == likeliest.tolist()
        np.testing.assert_allclose([value for _, value in token.alternatives], logprob_V[likeliest], atol=1e-5)


class EvenThenStop:
    """Allows even tokens, and after five of them only token 1."""

    def __init__(self):
        self.told = []

    def allowed(self):
        bits = np.zeros(64, bool)
        bits[:40:2] = len(self.told) < 5
        bits[1] = len(self.told) >= 5
        return np.packbits(bits.reshape(2, 32), axis=1, bitorder="little").view(np.uint32).ravel()

    def accept(self, token):
        self.told.append(token)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_a_constraint_is_heeded_and_told_and_bothers_no_other(sampling):
    engine = _engine("mistral")
    constraint = EvenThenStop()
    free = Request(prompt=_prompt(5, 1), max_new_tokens=12, sampling=sampling)
    bound = dataclasses.replace(free, constraint=constraint, stop_ids=(1,))
    expected = _alone(engine, free)
    (ids, ended), (others, _) = _run(engine, [bound, free])
    assert all(token % 2 == 0 for token in ids[:5])
    assert (ids[5:], ended, constraint.told) == ([1], "stop", ids)
    assert others == expected


class Spells:
    """Allows one token at each place."""

    def __init__(self, *tokens):
        self.left = list(tokens)

    def allowed(self):
        words = np.zeros(2, np.uint32)
        words[self.left[0] // 32] = 1 << self.left[0] % 32
        return words

    def accept(self, token):
        assert token == self.left.pop(0)


def test_a_right_guess_does_not_pass_a_constraint_by():
    """6 and 8 are guessed after 2 4; what the model would say after 6 is not what it may."""
    engine = _engine("mistral", speculation="lookup", speculated_tokens=2)
    request = Request(prompt=(2, 4, 6, 8, 2, 4), max_new_tokens=9, stop_ids=(1,), constraint=Spells(6, 8, 39, 1))
    assert _run(engine, [request]) == [([6, 8, 39, 1], "stop")]


def test_a_mesh_gives_the_texts_of_one_device(compiled):
    config = tiny.config("mixtral", num_kv_heads=2, hidden_dim=32)
    axes = (AxisType.Auto,) * 5
    mesh = jax.make_mesh((1, 1, 4, 1, 2), ("data", "fsdp", "expert", "context", "tensor"), axis_types=axes)
    params = tiny.params(config)
    spread = assemble(lambda tensor: look_up(params, tensor), config, EXECUTION, mesh)
    shapes = dataclasses.replace(SHAPES, slots=2)
    engines = [Engine(_loaded(config), shapes), Engine(Loaded(spread, config, EXECUTION), shapes, mesh=mesh)]
    requests = [Case(length, 1, NEW, is_warm).request for length in (3, 37) for is_warm in (False, True)]
    alone, together = (_run(engine, requests) for engine in engines)
    assert together == alone
    engines[1].warm_up()
    compiled.clear()
    assert _run(engines[1], requests) == alone
    assert not compiled


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (1000, (256, 256)),
        (256, (256, 256)),
        (200, (256, 200)),
        (100, (64, 64)),  # and then 64 with 36, rather than 256 with 100
        (36, (64, 36)),
        (20, (16, 16)),
        (4, (16, 4)),
    ],
)
def test_pieces(left, expected):
    assert _piece(left, 256) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, r"prompt = \[\]: at least one token"),
        ({"prompt": (3, 40)}, "prompt = 40: token ids go from 0 to 39"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: one or more"),
        ({"max_new_tokens": 63}, "prompt = 2: tokens, with max_new_tokens 65: over 64"),
        ({"seed": -1}, "seed = -1: from 0 to 18446744073709551615"),
        ({"logprobs": 21}, "logprobs = 21: from 0 to 20"),
        ({"stop_ids": tuple(range(17))}, "stop_ids = 17: at most 16"),
    ],
)
def test_refuses(changes, message):
    engine = _engine("mistral")
    with pytest.raises(InputError, match=message):
        engine.submit(dataclasses.replace(Request(prompt=(1, 2), max_new_tokens=4), **changes))
    assert not engine.busy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "slots = 0: one or more"),
        ({"prefix_blocks": -1}, "prefix_blocks = -1: zero"),
        ({"max_length": 40000}, "max_length = 40000: at most the model's 32768 positions"),
        ({"speculation": "draft"}, "speculation = 'draft': 'draft' goes with a draft model"),
        ({"speculation": "luck"}, "speculation = 'luck': 'lookup', 'draft' or None"),
    ],
)
def test_refuses_shapes(changes, message):
    with pytest.raises(InputError, match=message):
        Engine(_loaded(_config("mistral")), EngineConfig(**changes))
