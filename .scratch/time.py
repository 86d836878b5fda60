import sys, os, time, statistics as st, dataclasses
sys.path.insert(0,'.'); os.environ.setdefault('CUATTN_CACHE_DIR','/tmp/cuattn_cache')
import torch, torch.nn.functional as F, numpy as np
from torch.nn.attention import sdpa_kernel, SDPBackend as B
import cuattn
from cuattn import registry, api
from cuattn.registry import Tiles
def bench(fs, rounds=5, target_ms=4):
    ok={}
    for n,f in fs.items():
        try:
            f(); torch.cuda.synchronize(); ok[n]=f
        except Exception as e: print('  !',n,str(e)[:300])
    per={}
    for n,f in ok.items():
        a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record(); f(); b.record(); b.synchronize(); per[n]=max(1,min(50,int(target_ms/max(a.elapsed_time(b),1e-3))))
    ts={n:[] for n in ok}
    for _ in range(rounds):
        for n,f in ok.items():
            a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record()
            for _ in range(per[n]): f()
            b.record(); b.synchronize(); ts[n].append(a.elapsed_time(b)/per[n])
    return {n:st.median(v) for n,v in ts.items()}
def variant(table, tiles):
    def w(f):
        def g():
            old=getattr(registry,'_tiles_sm80'); 
            return f()
        return g
    return w
import functools
def ours(q,k,v,tiles=None,name='forward_sm80',**kw):
    """a closure over a forced tile"""
    def f():
        if tiles is None: return cuattn.attention(q,k,v,**kw)
        saved=registry.FORWARD, api._prepared
        registry_FORWARD=tuple(dataclasses.replace(s,candidates=(lambda p,d:(tiles,))) if s.name==name else s for s in registry.FORWARD)
        import cuattn.plan as plan
        plan.FORWARD=registry_FORWARD; api._prepared=cache.setdefault(tiles,{})
        try: return cuattn.attention(q,k,v,**kw)
        finally: plan.FORWARD=saved[0]; api._prepared=saved[1]
    return f
cache={}
