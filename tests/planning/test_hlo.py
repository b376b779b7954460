"""Collectives read from programs: texts in each form that compilers write, and programs whose data is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles.compiler import needs_compiler

from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.hlo import bytes_by_axes, collectives, sent_fraction
from mixtral_jax.planning.hlo_text import array_bytes
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh

MESH = SimpleNamespace(shape={"data": 1, "fsdp": 2, "expert": 4})


def _program(line, others=""):
    return f"""HloModule m
{others}
ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {{
  %x = bf16[8,16]{{1,0:T(8,128)(2,1)}} parameter(0)
  %i = s32[4]{{0}} parameter(1)
  %small = bf16[2,16]{{1,0}} parameter(2)
  {line}
}}
"""


def _one(line, mesh=MESH):
    (found,) = collectives(_program(line), mesh)
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("fsdp",), 2),
        ("{{0,4,1,5,2,6,3,7}}", ("fsdp", "expert"), 8),
        ("{}", ("fsdp", "expert"), 8),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("[2,4]<=[8]", ("expert",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("fsdp",), 2),
        ("[1,8]<=[8]", ("fsdp", "expert"), 8),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", ("fsdp", "expert"), 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("fsdp",), 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("expert",), 4),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ("fsdp",), 2),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", ("expert",), 4),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("fsdp",), 2),
    ],
)
def test_groups_in_each_form(groups, axes, size):
    line = f"ROOT %r = bf16[8,16]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    found = _one(line)
    assert (found.kind, found.axes, found.group_size, found.bytes) == ("all-reduce", axes, size, 256)


@pytest.mark.parametrize(
    ("line", "kind", "bytes_"),
    [
        (
            "%g = bf16[32,16]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "all-gather",
            1024,
        ),
        (
            "%g = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
            "all-gather",
            1024,
        ),
        ("%s = bf16[2,16]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add", "reduce-scatter", 256),
        (
            "%a = (bf16[2,16]{1,0}, bf16[2,16]{1,0}) all-to-all(%small, %small), replica_groups=[2,4]<=[8]",
            "all-to-all",
            128,
        ),
        (
            "%e = bf16[8,16]{1,0} ragged-all-to-all(%x, %small, %i, %i, %i, /*index=5*/%i), replica_groups=[2,4]<=[8]",
            "ragged-all-to-all",
            64,
        ),
    ],
)
def test_data_of_each_kind(line, kind, bytes_):
    found = _one(line)
    assert (found.kind, found.bytes, found.axes) == (kind, bytes_, ("expert",))


def test_a_permutation_lies_on_the_axis_of_its_pairs():
    line = "%p = bf16[8,16]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{4,5}}"
    assert (_one(line).axes, _one(line).sent_bytes) == (("expert",), 256)
    assert _one(line.replace("{{0,1},{1,2},{4,5}}", "{{0,4}}")).axes == ("fsdp",)
    assert _one(line.replace("{{0,1},{1,2},{4,5}}", "{}")).axes == ()


def test_done_is_not_counted_again():
    line = "%d = bf16[8,16]{1,0} all-gather-done(%x)"
    assert not collectives(_program(line), MESH)


def test_an_all_reduce_of_parts_in_zeros_is_a_gather():
    line = """%zero = bf16[] constant(0)
  %zeros = bf16[8,16]{1,0} broadcast(%zero), dimensions={}
  %k = s32[] constant(0)
  %put = bf16[8,16]{1,0} dynamic-update-slice(%zeros, %small, %k, %k)
  %c = bf16[8,16]{1,0} copy(%put)
  ROOT %r = bf16[8,16]{1,0} all-reduce(%c), replica_groups=[2,4]<=[8], to_apply=%add"""
    found = _one(line)
    assert (found.kind, found.written, found.bytes) == ("all-gather", "all-reduce", 256)


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_scatter():
    line = """%r = bf16[8,16]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %k = s32[] constant(0)
  ROOT %s = bf16[2,16]{1,0} dynamic-slice(%r, %k, %k), dynamic_slice_sizes={2,16}"""
    assert _one(line).kind == "reduce-scatter"
    both = line.replace("ROOT", "") + "\n  ROOT %t = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) tuple(%s, %r)"
    assert _one(both).kind == "all-reduce"


LOOP = """%body (p: (s32[], bf16[8,16], s32[])) -> (s32[], bf16[8,16], s32[]) {
  %p = (s32[], bf16[8,16]{1,0}, s32[]) parameter(0)
  %v = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %r = bf16[8,16]{1,0} all-reduce(%v), replica_groups=[2,4]<=[8], to_apply=%add
}

%cond (q: (s32[], bf16[8,16], s32[])) -> pred[] {
  %q = (s32[], bf16[8,16]{1,0}, s32[]) parameter(0)
  %n = s32[] get-tuple-element(%q), index=0
  LIMIT
  ROOT %lt = pred[] compare(%n, %limit), direction=LT
}
"""
CALL = """%zero = s32[] constant(0)
  %seven = s32[] constant(7)
  %t = (s32[], bf16[8,16]{1,0}, s32[]) tuple(%zero, %x, SEVEN)
  %w = (s32[], bf16[8,16]{1,0}, s32[]) while(%t), condition=%cond, body=%body"""


@pytest.mark.parametrize(
    ("limit", "seven", "attributes", "count", "known"),
    [
        ("%limit = s32[] constant(5)", "%seven", "", 5, True),
        ("%limit = s32[] get-tuple-element(%q), index=2", "%seven", "", 7, True),
        ("%limit = s32[] get-tuple-element(%q), index=2", "%i", "", 1, False),
        ("%limit = s32[] add(%n, %n)", "%seven", ', backend_config={"known_trip_count":{"n":"3"}}', 3, True),
    ],
)
def test_loops_count_their_rounds(limit, seven, attributes, count, known):
    text = _program(CALL.replace("SEVEN", seven) + attributes, LOOP.replace("LIMIT", limit))
    (found,) = collectives(text, MESH)
    assert (found.count, found.count_is_known, found.total_bytes) == (count, known, 256 * count)


def test_loops_within_loops():
    outer = LOOP.replace("%r = bf16[8,16]{1,0} all-reduce(%v), replica_groups=[2,4]<=[8], to_apply=%add", CALL)
    outer = outer.replace("SEVEN", "%seven").replace("%x,", "%v,").replace("LIMIT", "%limit = s32[] constant(2)")
    outer = outer.replace("%body (", "%outer (").replace("%cond (", "%until (")
    inner = LOOP.replace("LIMIT", "%limit = s32[] constant(5)")
    call = CALL.replace("SEVEN", "%seven").replace("%cond", "%until").replace("%body", "%outer")
    (found,) = collectives(_program(call, inner + outer), MESH)
    assert found.count == 10


def test_types():
    assert array_bytes("(f32[2,2]{1,0}, bf16[4]{0}, pred[3], s32[], u4[4])") == 16 + 8 + 3 + 4 + 2


def test_what_a_ring_sends():
    assert [sent_fraction(kind, 4) for kind in ("all-gather", "all-reduce", "collective-permute")] == [0.75, 1.5, 1]


def _exchange(mesh, rows=1024, layers=5):
    """A scan whose steps gather and scatter a weight over fsdp, and exchange rows over expert and to a neighbour."""

    def on_shard(x, w):
        def step(x, w):
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            # At the highest precision, or TPUs would exchange what the product needs of it.
            x = jnp.dot(jax.lax.all_to_all(x, "expert", 0, 0, tiled=True), whole, precision="highest")
            x = jax.lax.ppermute(x, "fsdp", [(0, 1)])
            return x, jax.lax.psum_scatter(whole, "fsdp", scatter_dimension=0, tiled=True)

        x, w = jax.lax.scan(step, x, w)
        return jax.lax.psum(x, ("fsdp", "expert")), w

    weight, tokens = PartitionSpec(None, "fsdp"), PartitionSpec(("fsdp", "expert"))
    mapped = jax.shard_map(
        on_shard, mesh=mesh, in_specs=(tokens, weight), out_specs=(PartitionSpec(), weight), check_vma=False
    )
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32, sharding=NamedSharding(mesh, tokens))
    w = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32, sharding=NamedSharding(mesh, weight))
    return compile_ahead(jax.jit(mapped).lower(x, w)).as_text()


def _check_exchange(mesh):
    found = {each.kind: each for each in collectives(_exchange(mesh), mesh)}
    rows, weight = 4 * 1024 * 64 // 8, 4 * 64 * 64
    expected = {
        "all-gather": (("fsdp",), weight, 5),
        "reduce-scatter": (("fsdp",), weight, 5),
        "all-to-all": (("expert",), rows, 5),
        "collective-permute": (("fsdp",), rows, 5),
        "all-reduce": (("fsdp", "expert"), rows, 1),
    }
    assert {kind: (each.axes, each.bytes, each.count) for kind, each in found.items()} == expected
    assert all(each.count_is_known for each in found.values())
    sums = bytes_by_axes(list(found.values()))
    assert sums[("expert",), "all-to-all"] == 5 * rows * 3 / 4
    assert sums[("fsdp", "expert"), "all-reduce"] == rows * 2 * 7 / 8


def test_a_program_for_cpu():
    _check_exchange(make_mesh(MeshConfig(data=1, fsdp=2, expert=4)))


@needs_compiler
def test_a_program_for_tpu():
    _check_exchange(make_mesh(MeshConfig(data=1, fsdp=2, expert=4), devices(topology("v5p:2x2x2"))))
