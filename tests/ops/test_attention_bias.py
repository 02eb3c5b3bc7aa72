"""The tables behind T5's bias: buckets, ends of the line, strips, and the way back to the table's gradient."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from fat5.model.ops_attention_bias import bias_line, expand_table
from fat5.model.ops_attention_strips import expand_strips, strip_origin
from fat5.model.ops_attention_table import line_of_table, table_gradient

TABLES = [(True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 8, 20), (True, 64, 256), (False, 64, 128)]


@pytest.mark.parametrize("table", TABLES)
def test_line_holds_the_bucket_of_every_distance(table):
    buckets, left, right = bias_line(*table)
    r = torch.arange(-5000, 5001)
    expected = T5Attention._relative_position_bucket(r, *table)
    if not table[0]:
        expected = torch.where(r > 0, 0, expected)
    assert torch.equal(buckets[r.clamp(-left, right) + left], expected)


@pytest.mark.parametrize(("table", "edges"), [((True, 32, 128), (91, 91)), ((False, 32, 128), (113, 1))])
def test_line_is_as_short_as_it_can_be(table, edges):
    assert bias_line(*table)[1:] == edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", TABLES)
def test_line_and_its_transpose(device, dtype, options):
    buckets = bias_line(*options).buckets
    table = torch.randn(3, options[1]).to(dtype).t().requires_grad_()
    line = expand_table(table, buckets)
    grad = torch.randn_like(line)
    (expected,) = torch.autograd.grad(expand_table(table.double(), buckets), table, grad.double())
    on_device = buckets.to(device)
    assert torch.equal(line_of_table(table.detach().to(device), on_device).cpu(), line)
    got = table_gradient(grad.to(device), on_device, table.detach().to(device))
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_table_in_double_precision_stays_so():
    table = torch.randn(8, 2, dtype=torch.float64)
    buckets = bias_line(True, 8, 20).buckets
    assert torch.equal(expand_table(table, buckets), table[buckets].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", [0, 3])
def test_strips_are_the_line_in_the_order_of_the_accumulator(device, dtype, phase):
    _, left, right = bias_line(True, 8, 20)
    line = torch.randn(2, left + right + 1)
    strips = expand_strips(line.to(device), left, right, phase, 64, 1.0, dtype).cpu()
    h, x, l4, lm, jj, e = (torch.arange(n) for n in strips.shape)
    grid = torch.meshgrid(h, x - strip_origin(left, 64), l4, lm, jj, e, indexing="ij")
    distance = 8 * (grid[1] + grid[4]) + 2 * grid[3] + grid[5] - grid[2] - phase
    expected = line[grid[0], distance.clamp(-left, right) + left].to(dtype)
    rounding = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates
    torch.testing.assert_close(strips, expected, rtol=rounding, atol=0)
