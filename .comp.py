import sys, os, re, time
from cuattn.catalogue import *
from cuattn.catalogue import _features
from cuattn import jit, backward, codegen
from cuattn.registry import DEVICES
D=DEVICES['sm_90a']
def go(name, p, det=False, only='backward'):
    plan=backward.make_backward_plan(backward_problem_of(p,det),D)
    for role,u in codegen.backward_units(plan).items():
        if only and role not in only.split(): continue
        t=time.time()
        try: c=jit.build(u.source,'sm_90a')
        except Exception as e: print(name,role,'FAIL',str(e)[:3000]); continue
        m=re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",c.log); r=re.search(r"Used (\d+) registers",c.log)
        w=re.findall(r".*(?:warning|serialized|ignored|C75\d\d).*",c.log)
        print(name,role,plan.kernel,f'{plan.tiles.block_m}x{plan.tiles.block_n}',m and m.groups(),r and r.group(1),w[:2],f'{time.time()-t:.1f}s',c.path, flush=True)
C=SlidingWindow(None,0)
f=_features('bfloat16')
J={
 'd128':lambda:go('d128',problem_of('bfloat16'),only='backward convert prepare'),
 'd128c':lambda:go('d128c',problem_of('bfloat16',mask=C)),
 'd64':lambda:go('d64',problem_of('bfloat16',dims=(64,64))),
 'd64c':lambda:go('d64c',problem_of('bfloat16',dims=(64,64),mask=C)),
 'fp16':lambda:go('fp16 d128c',problem_of('float16',mask=C)),
 'mixed':lambda:(go('40/72',problem_of('bfloat16',dims=(40,72))),go('128/64',problem_of('bfloat16',dims=(128,64)))),
 'det':lambda:(go('det d128c',problem_of('bfloat16',mask=C),True),go('det d64c',problem_of('bfloat16',mask=C,dims=(64,64)),True)),
 'qs':lambda:(go('qsplit',problem_of('bfloat16',seqlens=(4096,64),heads=(2,1)),only='backward combine'),),
}
for n in range(9):
    J[f'f{n}']=lambda n=n:(go(f'f{n} d128',problem_of('bfloat16',**f[n]),only='backward tile_map'),go(f'f{n} d64',problem_of('bfloat16',dims=(64,64),**f[n])))
J['keys']=lambda:go('keys d64',problem_of('bfloat16',dims=(64,64),mods=(Bias(view((16,1,4096),'bfloat16')),),extras=('sinks',)),True)
for k in (sys.argv[1:] or J): J[k]()
