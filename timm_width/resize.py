import torch
from torch import nn
def owner(model, name):
    path,_,leaf=name.rpartition('.')
    return model.get_submodule(path), leaf

def bind(model, space, widths):
    steps=space.steps(widths)
    for b in space.bindings:
        m=model.get_submodule(b.module)
        v=space.length(b.axis,steps)*b.mul//b.div
        if not b.key: setattr(m,b.attribute,v)
        else:
            set_at(m,b.attribute,b.key,v)

def set_at(holder, attribute, key, value):
    held=getattr(holder,attribute)
    setattr(holder,attribute,_replaced(held,key,value))

def _replaced(held,key,value):
    if not key: return value
    k,rest=key[0],key[1:]
    if isinstance(held,tuple):
        return tuple(_replaced(h,rest,value) if i==k else h for i,h in enumerate(held))
    held[k]=_replaced(held[k],rest,value)
    return held

def resize_meta(meta, space, widths):
    shapes=space.shapes(widths)
    mods=dict(meta.named_modules())
    for path,m in mods.items():
        pre=path+'.' if path else ''
        for n,p in list(m._parameters.items()):
            if p is not None and pre+n in shapes: m._parameters[n]=nn.Parameter(torch.empty(shapes[pre+n],device='meta',dtype=p.dtype),requires_grad=False)
        for n,p in list(m._buffers.items()):
            if p is not None and pre+n in shapes: m._buffers[n]=torch.empty(shapes[pre+n],device='meta',dtype=p.dtype)
    bind(meta,space,widths)
