"""Optimisers of the Adam family, from the 2014 algorithm on: usable with any PyTorch code, dependent on torch alone.

>>> import torch, likely.optim
>>> likely.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-3).defaults["decay"]
'lr'
"""

from likely.optim.adam import Adam, AdaMax, AdamW, NAdam
from likely.optim.averaging import Average, ScheduleFree
from likely.optim.clipping import clip_by_global_norm
from likely.optim.frame import UpdateRule
from likely.optim.muon import Muon
from likely.optim.shampoo import Shampoo
from likely.optim.soap import SOAP

__all__ = [
    "SOAP",
    "AdaMax",
    "Adam",
    "AdamW",
    "Average",
    "Muon",
    "NAdam",
    "ScheduleFree",
    "Shampoo",
    "UpdateRule",
    "clip_by_global_norm",
]
