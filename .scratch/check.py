import sys, time, os, itertools, traceback
sys.path.insert(0,'.')
os.environ.setdefault('CUATTN_CACHE_DIR','/tmp/cuattn_cache')
import numpy as np, ml_dtypes, cupy as cp
import cuattn
from cuattn import reference
rng=np.random.default_rng(0)
def run(name, dt, B,Sq,Sk,H,Hk,D,Dv, ref_kw=None, tol=None, **kw):
    t0=time.time()
    q,k,v=[rng.standard_normal(s).astype(np.float32).astype(dt) for s in ((B,Sq,H,D),(B,Sk,Hk,D),(B,Sk,Hk,Dv))]
    try:
        cq,ck,cv=cp.asarray(q),cp.asarray(k),cp.asarray(v)
        out=cp.full((B,Sq,H,Dv),float('nan'),dtype=cq.dtype)
        g={n:(cp.asarray(x) if isinstance(x,np.ndarray) else x) for n,x in kw.items()}
        o,l=cuattn.attention(cq,ck,cv,return_lse=True,out=out,**g)
        o=cp.asnumpy(o).astype(np.float64); l=cp.asnumpy(l).astype(np.float64)
        o2=cp.asnumpy(cuattn.attention(cq,ck,cv,**g)).astype(np.float64)
        from cuattn.problem import parse_mask, parse_mods
        m=parse_mask(kw.get('causal',False),kw.get('window'),kw.get('mask')); mods=parse_mods(kw.get('softcap'),kw.get('alibi_slopes'),kw.get('bias'),kw.get('score_mod'))
        ro,rl=reference.forward(q,k,v,scale=kw.get('scale') or D**-.5,mask=m,mods=mods,sinks=kw.get('sinks'),q_lens=kw.get('q_lens'),kv_lens=kw.get('kv_lens'),dropout=kw.get('dropout',0.),seed=kw.get('seed',0))
        err=np.abs(o-ro).max()/max(1e-30,np.abs(ro).max()); fin=np.isfinite(rl); le=np.abs(l[fin]-rl[fin]).max() if fin.any() else 0
        ok=np.array_equal(np.isfinite(l),fin) and np.array_equal(o,o2,equal_nan=True)
        print(f'{"OK " if ok and err<(tol or {"float64":1e-12,"float32":2e-5}.get(np.dtype(dt).name,1.2e-2)) and le<1e-3 else "BAD"} {name:34s} err {err:.2e} lse {le:.2e} same {np.array_equal(o,o2,equal_nan=True)} {time.time()-t0:.2f}s',flush=True)
    except Exception as e:
        print('EXC',name,str(e)[:1500],flush=True); traceback.print_exc(limit=4)
bf,f16,f32,f64=ml_dtypes.bfloat16,np.float16,np.float32,np.float64
for dt,pr in ((bf,'ieee'),(f16,'ieee'),(f32,'tf32x3'),(f32,'tf32'),(f64,'ieee'),(f32,'ieee')):
    n=np.dtype(dt).name+pr
    kw=dict(precision=pr, tol=2e-3 if pr=='tf32' else None)
    run(n+' d64',dt,1,128,128,2,2,64,64,**kw)
    run(n+' d64 ragged',dt,2,300,500,4,2,64,64,**kw)
    run(n+' d128 causal',dt,2,500,300,4,2,128,128,causal=True,**kw)
    run(n+' d128 window',dt,1,513,700,2,2,128,128,window=(50,20),**kw)
    run(n+' d256',dt,1,200,333,2,1,256,256,causal=True,**kw)
    run(n+' d40/72',dt,1,77,91,2,1,40,72,**kw)
    run(n+' d1/3',dt,1,17,33,2,1,1,3,**kw)
    run(n+' d512',dt,1,65,130,1,1,512,512,**kw)
    run(n+' split',dt,1,3,8192,2,1,64,64,**kw)
b4=rng.standard_normal((1,4,300,500)).astype(np.float32)
for dt in (bf,f64):
    n=np.dtype(dt).name
    run(n+' bias',dt,2,300,500,4,2,64,64,bias=b4.astype(dt))
    run(n+' bias bcast',dt,2,300,500,4,2,64,64,bias=b4[:,:,:1].astype(dt))
    run(n+' alibi causal',dt,2,300,500,4,2,64,64,causal=True,alibi_slopes=np.linspace(.1,.5,4).astype(np.float32))
    run(n+' softcap',dt,2,300,500,4,2,64,64,softcap=3.)
    run(n+' user',dt,2,300,500,4,2,64,64,score_mod=cuattn.UserMod("s*a - w[h]*fabs(Real(i-j))",params=dict(a=1.5,w=0)) if 0 else "s - Real(0.01)*fabs(Real(i-j)) + h")
    run(n+' bool',dt,2,300,500,4,2,64,64,mask=rng.random((2,1,300,500))>.5)
    run(n+' bool blocks',dt,2,300,500,4,2,64,64,causal=True,mask=np.kron(rng.random((5,8))>.5,np.ones((64,64)))[:300,:500]>0)
    run(n+' sinks',dt,2,300,500,4,2,64,64,sinks=rng.standard_normal(4).astype(np.float32))
    run(n+' lens',dt,2,300,500,4,2,64,64,causal=True,q_lens=np.array([300,17],np.int32),kv_lens=np.array([100,0],np.int32))
    run(n+' dropout',dt,2,300,500,4,2,64,64,dropout=.3,seed=12345678901)
    run(n+' neg scale',dt,2,300,500,4,2,64,64,scale=-.2)
    run(n+' all',dt,2,300,500,4,2,64,64,causal=True,softcap=5.,bias=b4.astype(dt),sinks=np.ones(4,np.float32),dropout=.1,seed=3,mask=rng.random((2,1,300,500))>.2)
