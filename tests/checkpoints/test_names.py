"""Official names of weights, and ours."""

import torch

from mmslak.checkpoints.files import read_state_dict, save_state_dict
from mmslak.checkpoints.names import convert
from mmslak.checkpoints.pretrained import load_pretrained
from tests.checkpoints.official import OFFICIAL, from_pretrained, same, slak, weights


def test_official_names_load_through_any_loader():
    official = weights(from_pretrained(OFFICIAL))
    model = slak()
    missing, unexpected = model.load_state_dict(read_state_dict(OFFICIAL), strict=False)
    assert same(weights(model), official)
    assert all(name.startswith('norm') for name in missing)
    assert set(unexpected) == {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}


def test_converted_classifier_keeps_head_and_final_norm(tmp_path):
    clean = convert(OFFICIAL)
    assert {'backbone.norm.weight', 'head.fc.weight', 'head.fc.bias'} <= clean.keys()
    model = slak(out_indices=(3,), gap_before_final_norm=True)
    load_pretrained(model, OFFICIAL)
    assert torch.equal(model.norm3.weight, clean['backbone.norm.weight'])
    save_state_dict(clean, tmp_path / 'clean.pth')
    again = convert(tmp_path / 'clean.pth')
    assert same(again, clean)
