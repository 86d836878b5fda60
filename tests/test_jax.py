"""JAX: the public verbs under jit, grad, vmap and shard_map, against the oracle and beside jax.nn.

A test that takes `platform` runs on JAX's CPU through the NumPy backend and, marked `gpu`, on the CUDA kernels.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuattn
from tests.cases import FEATURES, Case
from tests.tolerance import ABSOLUTE, assert_close, limit, verify, verify_gradients

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the GPU's memory from the others
jax = pytest.importorskip("jax")
adapter = pytest.importorskip("cuattn.jax")
jnp = jax.numpy

ROOT = Path(__file__).resolve().parent.parent
Array = Any
CASES = tuple(c for c in FEATURES if c.seqlen_q * c.seqlen_k <= 1 << 14)[::5]
GRADIENT_CASES = tuple(c for c in CASES if not {"alibi", "alibi_batch"} & set(c.mods))[::2]


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        device = jax.devices(request.param)[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no such device: {error}")
    with jax.default_device(device):
        yield str(request.param)


def put(x: np.ndarray) -> Array:
    return jnp.asarray(np.ascontiguousarray(x))


def normal(*shape: int, dtype: Any = np.float64, seed: int = 0) -> Array:
    return put(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def qkv(dtype: Any = np.float64) -> tuple[Array, Array, Array]:
    return normal(2, 5, 4, 8, dtype=dtype), normal(2, 7, 2, 8, dtype=dtype, seed=1), normal(2, 7, 2, 6, dtype=dtype, seed=2)


def exactly(actual: Array, expected: Array) -> None:
    assert_close("result", np.asarray(actual), np.asarray(expected), 10 * ABSOLUTE["float64"])


# Against the oracle ------------------------------------------------------------------------------------------------------


def function_of(case: Case) -> tuple[Callable[..., Any], list[Array]]:
    """The call of a case as a function of all its arrays that can be differentiated, for jit, and these arrays."""
    arguments = case.arguments(put)
    verb = adapter.attention_varlen if case.packed else adapter.attention
    names = [name for name in ("q", "k", "v", "bias", "sinks") if name in arguments]
    mods = arguments.pop("score_mod", None)
    mods = mods if isinstance(mods, list) else [] if mods is None else [mods]
    learned = [(n, name) for n, mod in enumerate(mods) if isinstance(mod, cuattn.UserMod) for name in mod.param_gradients]

    def run(*leaves: Array) -> Any:
        given = {**arguments, **dict(zip(names, leaves, strict=False))}
        score = list(mods)
        for (n, name), x in zip(learned, leaves[len(names) :], strict=True):
            mod = score[n]
            score[n] = cuattn.UserMod(mod.expression, mod.gradient, {**mod.params, name: x}, mod.param_gradients)
        return verb(**given, score_mod=score or None, return_lse=True)

    return run, [*(arguments[name] for name in names), *(mods[n].params[name] for n, name in learned)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_call_matches_the_oracle(platform: str, case: Case) -> None:
    run, leaves = function_of(case)
    out, lse = jax.jit(run)(*leaves)
    assert out.devices() == {jax.devices(platform)[0]}
    verify(case, np.asarray(out), np.asarray(lse))


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_backward_matches_the_oracle(platform: str, case: Case) -> None:
    run, leaves = function_of(case)

    @jax.jit
    def gradients(dout: Array, dlse: Array, *leaves: Array) -> Any:
        (_, lse), pullback = jax.vjp(run, *leaves)
        return lse, pullback((dout, dlse))

    lse, found = gradients(*map(put, case.cotangents()), *leaves)
    given = case.arguments(put)
    names = [f"d{name}" for name in ("q", "k", "v", "bias", "sinks") if name in given]
    named = dict.fromkeys(("dbias", "dsinks")) | dict(zip(names, found, strict=False))
    result = cuattn.Gradients(*(named[f"d{name}"] for name in ("q", "k", "v", "bias", "sinks")))
    result.dparams = tuple({str(n): x} for n, x in enumerate(found[len(names) :]))
    verify_gradients(case, result, np.asarray(lse), np.asarray)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_and_equality_with_the_eager_call(platform: str, dtype: str) -> None:
    q, k, v = (x.astype(dtype) for x in qkv())
    options = {"causal": True, "softcap": 2.0, "return_lse": True}
    out, lse = jax.jit(functools.partial(adapter.attention, **options))(q, k, v)
    same, same_lse = cuattn.attention(q, k, v, **options)
    assert out.dtype == dtype and lse.dtype == ("float64" if dtype == "float64" else "float32")
    assert (out == same).all() and (lse == same_lse).all()


# Transformations ---------------------------------------------------------------------------------------------------------


MAPPED: dict[str, tuple[dict[str, Array], set[str]]] = {
    "plain": ({}, set()),
    "shared keys": ({}, {"k", "v"}),
    "bias": ({"bias": (3, 4, 5, 7)}, set()),
    "bias of batches": ({"bias": (3, 2, 1, 5, 1)}, set()),
    "one bias": ({"bias": (2, 1, 5, 7)}, {"bias"}),
    "mask": ({"mask": (3, 5, 7)}, set()),
    "slopes": ({"alibi_slopes": (3, 4)}, set()),
    "shared slopes": ({"alibi_slopes": (2, 4)}, {"alibi_slopes"}),
    "sinks": ({"sinks": (3, 4)}, set()),
    "lengths": ({"kv_lens": (3, 2)}, set()),
}


def mapped_arguments(kind: str) -> tuple[list[Array], list[int | None], list[str]]:
    """Arrays, their mapped axes and names; three elements along axis 0."""
    more, shared = MAPPED[kind]
    shapes: dict[str, Any] = {"q": (3, 2, 5, 4, 8), "k": (3, 2, 7, 2, 8), "v": (3, 2, 7, 2, 6), **more}
    found, axes = [], list[int | None]()
    for n, (name, shape) in enumerate(shapes.items()):
        axes.append(None if name in shared else 0)
        shape = shape[1:] if name in shared and name in ("k", "v") else shape
        x = normal(*shape, seed=n)
        found.append({"mask": x > -1, "kv_lens": jnp.array([[7, 1], [0, 3], [5, 6]], jnp.int32)}.get(name, x))
    if "alibi_slopes" in shapes:
        found[-1] = jnp.abs(found[-1]).astype(jnp.float32)
    return found, axes, list(shapes)


@pytest.mark.parametrize("kind", MAPPED)
def test_vmap_equals_a_loop_and_so_do_its_gradients(platform: str, kind: str) -> None:
    arguments, axes, names = mapped_arguments(kind)

    def call(*values: Array) -> Array:
        return adapter.attention(**dict(zip(names, values, strict=True)), causal=True)

    def loop(*values: Array) -> Array:
        return jnp.stack([call(*(x if axis is None else x[n] for x, axis in zip(values, axes, strict=True))) for n in range(3)])

    mapped = jax.vmap(call, in_axes=axes)
    exactly(mapped(*arguments), loop(*arguments))
    leaves = [n for n, name in enumerate(names) if name in ("q", "k", "v", "bias", "sinks")]
    weights = normal(3, 2, 5, 4, 6, seed=9)
    one, other = (jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), argnums=leaves)(*arguments) for f in (mapped, loop))
    for mine, theirs in zip(one, other, strict=True):
        exactly(mine, theirs)
    each = jax.vmap(jax.grad(lambda *a: call(*a).sum(), argnums=leaves), in_axes=axes)(*arguments)
    for mine, theirs in zip(each, jax.grad(lambda *a: loop(*a).sum(), argnums=leaves)(*arguments), strict=True):
        exactly(mine if mine.shape == theirs.shape else mine.sum(0), theirs)


def test_vmap_of_calls_without_a_batch_is_one_call() -> None:
    q, k, v = qkv()
    call = functools.partial(adapter.attention, causal=True)
    exactly(jax.vmap(call)(q, k, v), call(q, k, v))
    text = str(jax.make_jaxpr(jax.vmap(call))(q, k, v))
    assert text.count("ffi_call[") == 1 and "scan[" not in text and "while[" not in text


@pytest.mark.parametrize("kind", ["packed", "dropout", "batch index"])
def test_vmap_runs_element_by_element_where_a_fold_would_differ(platform: str, kind: str) -> None:
    q, k, v = (normal(3, *x.shape, seed=n) for n, x in enumerate(qkv()))
    if kind == "packed":
        cu = jnp.array([[0, 2, 5], [0, 0, 4], [0, 5, 5]], jnp.int32)
        arguments = [*(normal(3, 5, 2, 8, seed=n) for n in range(3)), cu]

        def call(q: Array, k: Array, v: Array, cu: Array) -> Array:
            return adapter.attention_varlen(q, k, v, cu, cu, 5, 5, causal=True)
    else:
        mod = cuattn.UserMod("s * Real(b + 1)", "Real(b + 1)") if kind == "batch index" else None
        arguments = [q, k, v]
        call = functools.partial(adapter.attention, dropout=0.5 * (mod is None), seed=3, score_mod=mod)
    expected = jnp.stack([call(*(x[n] for x in arguments)) for n in range(3)])
    exactly(jax.vmap(call)(*arguments), expected)


def test_a_traced_seed_draws_the_same_bits(platform: str) -> None:
    q, k, v = qkv()
    call = jax.jit(lambda seed: adapter.attention(q, k, v, dropout=0.5, seed=seed))
    for seed in (0, 7, 2**40 + 1):
        assert (call(jnp.asarray(seed, jnp.uint64)) == adapter.attention(q, k, v, dropout=0.5, seed=seed)).all()
    assert (call(jnp.asarray(1)) != call(jnp.asarray(2))).any()


def test_only_what_is_differentiated_costs_a_gradient() -> None:
    q, k, v = qkv()
    bias = normal(4, 5, 7)

    def loss(q: Array, bias: Array) -> Array:
        return adapter.attention(q, k, v, bias=bias).sum()

    alone, both = (jax.jit(jax.grad(loss, argnums)).lower(q, bias).as_text() for argnums in ((0,), (0, 1)))
    assert "('out', 'lse', 'dout'), (False,))" in alone
    assert "('out', 'lse', 'dout'), (True,))" in both


def test_compiled_programs_name_nothing_of_this_process() -> None:
    """JAX may keep a compiled program on disk: it must hold all that a call needs to know."""
    q, k, v = qkv()
    table = cuattn.UserMod("s + t[h]", "1", {"t": normal(4)}, {"t": ("h", "1")})
    lowered = jax.jit(lambda q: adapter.attention(q, k, v, score_mod=table)).lower(q).as_text()
    assert "UserMod" in lowered and hex(id(table)) not in lowered and "0x7" not in lowered


SHARDED = """
import ctypes
import functools
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import cuattn.jax
from jax.sharding import AxisType, PartitionSpec as P
mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((8, 6, 4, 8))) for _ in range(3))
sinks = jnp.asarray(rng.standard_normal(4))
call = functools.partial(cuattn.jax.attention, causal=True)
def part(sinks, q, k, v):
    assert q.shape[0] == 2
    return call(q, k, v, sinks=sinks)
sharded = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("b"), P("b"), P("b")), out_specs=P("b"))
out = jax.jit(sharded)(sinks, q, k, v)
assert out.sharding.spec == P("b"), out.sharding
assert (out == call(q, k, v, sinks=sinks)).all()
one = jax.jit(jax.grad(lambda *a: (sharded(*a) ** 2).sum(), argnums=(0, 1, 2, 3)))(sinks, q, k, v)
two = jax.grad(lambda s, *a: (call(*a, sinks=s) ** 2).sum(), argnums=(0, 1, 2, 3))(sinks, q, k, v)
for mine, theirs in zip(one, two):
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
print("sharded")
"""


def test_shard_map_calls_once_for_each_shard() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "sharded", result.stderr


# jax.nn ------------------------------------------------------------------------------------------------------------------


NN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.3},
    "bias": {"bias": (1, 4, 5, 7)},
    "mask": {"mask": (2, 1, 1, 7)},
    "key lengths": {"key_value_seq_lengths": [7, 3], "is_causal": True},
    "query lengths": {"query_seq_lengths": [2, 5]},
    "window": {"local_window_size": (2, 4)},
    "symmetric window": {"local_window_size": 2, "is_causal": True},
}


@pytest.mark.parametrize("kind", NN)
def test_dot_product_attention_equals_that_of_jax_nn(platform: str, kind: str) -> None:
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 8, seed=2)
    options = dict(NN[kind])
    for name in ("bias", "mask"):
        if name in options:
            options[name] = normal(*options[name], seed=3)
    if "mask" in options:
        options["mask"] = options["mask"] > -1
    for name in ("key_value_seq_lengths", "query_seq_lengths"):
        if name in options:
            options[name] = jnp.asarray(options[name], jnp.int32)
    compare_with_jax_nn(q, k, v, options)


def compare_with_jax_nn(q: Array, k: Array, v: Array, options: dict[str, Any]) -> None:
    """Results and gradients; jax.nn takes its softmax in float32 whatever the inputs are, so that is what is compared."""
    theirs = jax.nn.dot_product_attention(q, k, v, **options)
    mine = (
        jax.jit(adapter.dot_product_attention)(q, k, v, **options)
        if not any_static(options)
        else (adapter.dot_product_attention(q, k, v, **options))
    )
    exact = np.asarray(theirs, np.float64)
    assert_close("out", np.asarray(mine), exact, limit(exact, exact, "float32", "float32"))
    gradients = (
        jax.grad(lambda *a, f=f: (f(*a, **options) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
        for f in (adapter.dot_product_attention, jax.nn.dot_product_attention)
    )
    for one, other in zip(*gradients, strict=True):
        exact = np.asarray(other, np.float64)
        assert_close("gradient", np.asarray(one), exact, limit(exact, exact, "float32", "float32"))


def any_static(options: dict[str, Any]) -> bool:
    return not all(isinstance(x, jax.Array) for x in options.values())


def test_dot_product_attention_without_a_batch_and_with_its_residual(platform: str) -> None:
    q, k, v = (normal(n, h, 8, seed=n) for n, h in ((5, 4), (7, 2), (7, 2)))
    out, residual = adapter.dot_product_attention(q, k, v, return_residual=True)
    theirs, their_residual = jax.nn.dot_product_attention(q, k, v, return_residual=True)
    assert out.shape == theirs.shape
    for mine, other in ((out, theirs), (residual.reshape(their_residual.shape), their_residual)):
        exact = np.asarray(other, np.float64)
        assert_close("result", np.asarray(mine), exact, limit(exact, exact, "float32", "float32"))


def test_a_window_may_be_a_list() -> None:
    q, k, _ = qkv()
    compare_with_jax_nn(q, k, k, {"local_window_size": [2, 1]})


def test_signature_is_that_of_jax_nn() -> None:
    """Another version of JAX may have keywords that are not here; positions, names and defaults are the same."""
    mine, theirs = (inspect.signature(f).parameters for f in (adapter.dot_product_attention, jax.nn.dot_product_attention))
    assert [p for p in mine.values() if p.kind is not p.KEYWORD_ONLY] == [
        p.replace(annotation=mine[p.name].annotation) for p in theirs.values() if p.kind is not p.KEYWORD_ONLY
    ]
    for parameter in mine.values():
        assert theirs[parameter.name].default == parameter.default, parameter.name


# Wrong use ---------------------------------------------------------------------------------------------------------------


def test_wrong_use_names_the_argument_and_the_way_out() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="v: got 6 tokens, expected 7 as k has"):
        jax.jit(adapter.attention)(q, k, v[:, :6])
    with pytest.raises(TypeError, match=r"k: got builtins\.list, expected a JAX or NumPy array"):
        adapter.attention(q, [1.0], v)
    with pytest.raises(TypeError, match="seed: got float64 of shape"):
        adapter.attention(q, k, v, dropout=0.5, seed=jnp.ones(()))
    with pytest.raises(NotImplementedError, match=r"alibi_slopes: has no gradient here; wrap it in jax\.lax\.stop_gradient"):
        jax.grad(lambda slopes: adapter.attention(q, k, v, alibi_slopes=slopes).sum())(jnp.ones(4, jnp.float32))
    with pytest.raises(ValueError, match=r"local_window_size: got \(-1, 2\)"):
        adapter.dot_product_attention(q, k, v, local_window_size=(-1, 2))
    with pytest.raises(ValueError, match="value: got 6 tokens, expected 7 as key has"):
        adapter.dot_product_attention(q, k, v[:, :6])
    with pytest.raises(ValueError, match="key_value_seq_lengths: got shape"):
        adapter.dot_product_attention(q, k, v, key_value_seq_lengths=jnp.ones(3, jnp.int32))
    with pytest.raises(TypeError, match=r"query: got builtins\.list"):
        adapter.dot_product_attention([1.0], k, v)
    with pytest.raises(TypeError, match=r"q: got a traced JAX value .* cuattn\.jax\.attention"):
        jax.jit(cuattn.attention)(q, k, v)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match=r"q: got a float64 NumPy array, .*jax_enable_x64"):
        adapter.attention(np.zeros((1, 2, 1, 8)), jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 2, 1, 8)))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_a_second_derivative_is_refused_by_name(wrap: Any) -> None:
    q, k, v = (x[None] for x in qkv())

    def once(q: Array) -> Array:
        return jax.grad(lambda q: wrap(adapter.attention)(q, k, v).sum())(q).sum()

    first = q if wrap is jax.vmap else q[0]
    k, v = (k, v) if wrap is jax.vmap else (k[0], v[0])
    assert jnp.isfinite(once(first))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        jax.grad(once)(first)


def test_lengths_that_the_host_sees_are_checked_when_the_program_runs() -> None:
    q, k, v = qkv()
    if jax.default_backend() != "cpu":
        pytest.skip("lengths on a GPU are the caller's promise")
    with pytest.raises(Exception, match="kv_lens: got values from 3 to 9, expected 0 to 7"):
        jax.jit(adapter.attention)(q, k, v, kv_lens=jnp.array([3, 9], jnp.int32)).block_until_ready()


@pytest.mark.gpu
def test_a_call_takes_nothing_from_cupys_pool() -> None:
    """Everything lies in XLA's memory, the workspace of a split call included."""
    import cupy

    q, k = normal(1, 16, 2, 64, dtype=np.float16), normal(1, 40_000, 2, 64, dtype=np.float16)
    if q.devices() == {jax.devices("cpu")[0]}:
        pytest.skip("this JAX sees no GPU")
    run = jax.jit(jax.value_and_grad(lambda q: adapter.attention(q, k, k).astype(jnp.float32).sum()))
    before = cupy.get_default_memory_pool().used_bytes()
    value, gradient = run(q)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert cupy.get_default_memory_pool().used_bytes() <= before


def test_memory_that_xla_refuses_is_an_error_with_its_reason() -> None:
    """XLA's CPU has no allocator for calls."""
    handler = adapter.xla.handler(lambda frame: frame.allocate(512))
    address = ctypes.cast(handler, ctypes.c_void_p).value
    jax.ffi.register_ffi_target("cuattn_test_allocate", jax.ffi.pycapsule(address), platform="cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        call = jax.ffi.ffi_call("cuattn_test_allocate", jax.ShapeDtypeStruct((4,), np.float32), has_side_effect=True)
        with pytest.raises(Exception, match=r"no room for a workspace of 512 bytes: \S+.*not available"):
            jax.jit(functools.partial(call, text="unread"))(np.zeros(4, np.float32)).block_until_ready()
