"""Products and dropout of the CPU's own form against the stock functions and the definition."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_function

from w2v2.model.cpu import dropout, linear, product

pytestmark = pytest.mark.usefixtures("large_model_kernels")


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (3, 1, 2, 12)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_and_its_gradients_are_the_stock_ones(shape, has_bias):
    inputs = [torch.randn(size, requires_grad=True) for size in (shape, (8, 12), *[8] * has_bias)]
    assert_same_function(linear(*inputs), F.linear(*inputs), inputs, rtol=1e-5, atol=1e-5)


def test_strided_operands_and_other_types_give_the_same():
    x, weight = torch.randn(9, 6), torch.randn(6, 4)
    torch.testing.assert_close(product(x[::2], weight.T), x[::2] @ weight, rtol=1e-5, atol=1e-5)
    wide = x.double()
    assert torch.equal(linear(wide, weight.T.double()), F.linear(wide, weight.T.double()))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_and_its_gradient_are_those_of_the_definition(p):
    x = torch.ones(501, 203, requires_grad=True)
    torch.manual_seed(3)
    out, other = dropout(x, p, training=True), dropout(x, p, training=True)
    torch.manual_seed(3)
    assert torch.equal(out, dropout(x, p, training=True)) and not torch.equal(out, other)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    kept = float((out != 0).double().mean())
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    columns = (out != 0).double()
    assert float(torch.corrcoef(columns.T[:40]).fill_diagonal_(0.0).abs().max()) < 0.25  # neighbours decide apart
    assert dropout(x, p, training=False) is x and dropout(x, 0.0, training=True) is x
    assert not dropout(x, 1.0, training=True).any()
