import pytest
from dataclasses import replace
from cuattn import jit
from cuattn.backward import make_backward_plan
from cuattn.catalogue import *
from cuattn.codegen import backward_units
from tests.test_compile import complaints
from tests.test_compile_backward import PAIRS, OWN, KEYS, SHARED
from cuattn.score_mods import *
W=SlidingWindow(127,0)
def test_all():
    jobs={}
    for dim in (64,128):
        for det in (0,1):
            for kw in ({},dict(packed=True,extras=("kv_lens",)),dict(extras=("sinks","q_lens","kv_lens")),dict(mods=(SoftCap(30.),)),dict(mods=(KEYS,)),dict(mods=(PAIRS,)),dict(mods=(OWN,)),dict(mods=(SHARED,)),dict(dropout=.1),dict(mods=(SoftCap(30.),PAIRS)),dict(mods=(Alibi(view((16,),"float32")),)),dict(mods=(Alibi(view((16,),"float32")),SoftCap(30.)))):
                p=make_backward_plan(backward_problem_of(problem_of("bfloat16",dims=(dim,dim),mask=W,**kw),bool(det)),DEVICES["sm_90a"])
                jobs[backward_units(p)["backward"].source]=p
    bad=0
    for s,p in jobs.items():
        c=complaints(jit.build(s,"sm_90a").log)
        print(p.kernel, p.tiles.block_m,p.tiles.block_n,p.threads, p.head_dim, p.backward.deterministic, p.problem.mods and [type(m).__name__ for m in p.problem.mods], p.problem.dropout, p.problem.packed, c, p.declined)
        bad+=bool(c) and p.kernel=='backward_sm90'
    assert not bad
