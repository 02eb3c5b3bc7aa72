"""Constants that are kept serve wherever they were asked for first."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fat5.model.constant_tensors import kept
from fat5.model.ops_attention import attention
from fat5.model.ops_attention_bias import T5Bias, bias_line, line_buckets
from fat5.model.position_alibi import alibi_slopes


def test_a_constant_is_made_once():
    calls = []

    @kept
    def ramp(count: int) -> torch.Tensor:
        calls.append(count)
        return torch.arange(count)

    assert ramp(3) is ramp(3)
    assert calls == [3]


def test_inference_then_training():
    q, table = (torch.randn(shape, requires_grad=True) for shape in ((1, 2, 9, 4), (12, 2)))

    def step():
        return attention(q, q, q, bias=T5Bias(table, True, 27)).square().sum()  # a table asked for nowhere else

    with torch.inference_mode():
        step()
    step().backward()
    assert table.grad.any()


def test_fake_tensors_are_not_kept():
    with FakeTensorMode():
        fake = alibi_slopes(7, torch.device("cpu"))
    assert type(alibi_slopes(7, torch.device("cpu"))) is torch.Tensor is not type(fake)


def test_the_line_is_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert bias_line(True, 14, 29).buckets.device.type == "cpu"
        assert line_buckets(True, 14, 29, torch.device("cpu")).sum() > 0
