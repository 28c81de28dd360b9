"""What the training pass computes with: the attention kernels, on processors that are here or may not be."""

import pytest
import torch

from diptych.utils.machine import attending, computing


def test_on_a_gpu_cudnn_does_not_attend_in_training():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attending("bfloat16", torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_in_float32_torch_chooses():
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with attending("float32", torch.device("cuda")):
        assert (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_gradients_of_a_small_canvas_are_numbers(name):
    device = torch.device(name)
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(32, 64, 3, 64, generator=generator).to(device).requires_grad_() for _ in range(3))
    with attending("bfloat16", device):
        with computing("bfloat16", device):
            heads = [x.bfloat16().transpose(1, 2) for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        out.float().square().mean().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
