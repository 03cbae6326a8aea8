"""What a network is known by."""

import torch
from torch import nn

from longtake.hosts.digest import weights_digest


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 2, bias=False))


def test_the_same_weights_are_known_in_any_type_and_others_are_not():
    known = weights_digest(network())
    assert len(known) == 16 and weights_digest(network().bfloat16()) == known == weights_digest(network().double())
    assert weights_digest(network(1)) != known
    wider = nn.Sequential(nn.Linear(40, 31), nn.LayerNorm(31), nn.Linear(31, 2, bias=False))
    assert weights_digest(wider) != known


def test_one_changed_end_of_a_parameter_is_seen():
    changed = network()
    with torch.no_grad():
        changed[2].weight[-1, -1] += 1
    assert weights_digest(changed) != weights_digest(network())
