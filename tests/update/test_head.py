"""The chunked head against log_softmax over full logits: values, gradients, memory."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from components.update.head import fused_head_loss, linear_logprobs
from components.update.tied import TiedEmbedding, TiedGradient

TOKENS, HIDDEN, VOCABULARY = 150, 16, 5003  # three chunks of 64 at the smallest, a vocabulary tile and a rest
TEMPERATURE = 0.7
SMALL = 64 * VOCABULARY * 4


def inputs(dtype, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight_VH = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets_N = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    coefficients = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    return hidden_NH, weight_VH, targets_N, coefficients


def plain(hidden_NH, weight_VH, targets_N):
    logits_NV = hidden_NH @ weight_VH.t() / TEMPERATURE
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N


def token_loss(coefficients, uses):
    """A loss that is not linear in either argument, so that gradients depend on values."""

    def function(logprobs_n, entropy_n, chunk):
        a_n, b_n = coefficients[:, chunk].to(logprobs_n.dtype)
        loss_n = torch.zeros_like(logprobs_n)
        if "logprobs" in uses:
            loss_n = loss_n + a_n * torch.sin(logprobs_n)
        if "entropy" in uses:
            loss_n = loss_n + b_n * entropy_n.square()
        return loss_n

    return function


def run(way, dtype, uses="logprobs and entropy", tokens=TOKENS, chunk_bytes=SMALL):
    hidden_NH, weight_VH, targets_N, coefficients = inputs(dtype, tokens)
    reference_dtype = torch.float64 if way == "plain" else dtype
    hidden_NH, weight_VH = (x.to(reference_dtype).requires_grad_() for x in (hidden_NH, weight_VH))
    function = token_loss(coefficients, uses)
    if way == "fused":
        options = {"temperature": TEMPERATURE, "chunk_bytes": chunk_bytes}
        result = fused_head_loss(hidden_NH, weight_VH, targets_N, function, **options)
        loss, logprobs_N, entropy_N = result.loss, result.logprobs_N, result.entropy_N
    else:
        if way == "plain":
            logprobs_N, entropy_N = plain(hidden_NH, weight_VH, targets_N)
        else:
            logprobs_N, entropy_N = linear_logprobs(
                hidden_NH, weight_VH, targets_N, temperature=TEMPERATURE, chunk_bytes=chunk_bytes
            )
        loss = function(logprobs_N, entropy_N, slice(0, tokens)).sum()
    (3.0 * loss).backward()  # a factor, as a launcher's scaling would put there
    return [x.detach().double() for x in (logprobs_N, entropy_N, loss, hidden_NH.grad, weight_VH.grad)]


# float32 values and gradients to 1e-5 of the largest; bfloat16 gradients are rounded to 8 bits when handed back
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 5e-3)],
)
@pytest.mark.parametrize("way", ["recomputed", "fused"])
@pytest.mark.parametrize("uses", ["logprobs", "entropy", "logprobs and entropy"])
def test_equals_full_logits(way, uses, dtype, tolerance, gradient_tolerance):
    """Against float64 log_softmax of the same inputs."""
    expected, got = run("plain", dtype, uses), run(way, dtype, uses)
    for name, one, other in zip(["logprobs", "entropy", "loss", "d hidden", "d weight"], expected, got, strict=True):
        error = (one - other).abs().max() / one.abs().max()
        assert error < (gradient_tolerance if name.startswith("d ") else tolerance), (name, error)


@pytest.mark.parametrize("way", ["recomputed", "fused"])
def test_one_chunk_or_many_give_the_same(way):
    for one, other in zip(run(way, torch.float64), run(way, torch.float64, chunk_bytes=2**30), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden_NH, weight_VH, targets_N, _ = inputs(torch.float64, tokens=3)
    weight_VH = weight_VH[:7].clone().requires_grad_()

    def function(hidden, weight):
        return linear_logprobs(hidden, weight, targets_N % 7, temperature=1.3)

    assert torch.autograd.gradcheck(function, (hidden_NH.requires_grad_(), weight_VH))


def test_certain_and_impossible_tokens():
    """Logits of 0 and 1e4: log-probability 0 or -1e4, entropy 0, everything finite."""
    weight_VH = torch.tensor([[1e4], [0.0]])
    hidden_NH = torch.ones(2, 1, requires_grad=True)
    logprobs_N, entropy_N = linear_logprobs(hidden_NH, weight_VH, torch.tensor([0, 1]))
    assert logprobs_N.tolist() == [0.0, -1e4] and entropy_N.tolist() == [0.0, 0.0]
    (logprobs_N + entropy_N).sum().backward()
    assert hidden_NH.grad.flatten().tolist() == [0.0, -1e4]


@pytest.mark.parametrize("way", ["recomputed", "fused"])
def test_no_tokens(way):
    logprobs_N, entropy_N, loss, grad_hidden_NH, grad_weight_VH = run(way, torch.float32, tokens=0)
    assert logprobs_N.shape == entropy_N.shape == (0,) and loss.item() == 0.0
    assert grad_hidden_NH.shape == (0, HIDDEN) and not grad_weight_VH.any()


def test_frozen_weight_and_no_grad():
    """LoRA: the head is frozen and gets no gradient; scoring under no_grad keeps nothing."""
    hidden_NH, weight_VH, targets_N, coefficients = inputs(torch.float32)
    expected = run("plain", torch.float32)
    hidden_NH.requires_grad_()
    result = fused_head_loss(
        hidden_NH, weight_VH, targets_N, token_loss(coefficients, "logprobs and entropy"), temperature=TEMPERATURE
    )
    (3.0 * result.loss).backward()
    assert weight_VH.grad is None
    assert torch.allclose(hidden_NH.grad.double(), expected[3], rtol=1e-4, atol=1e-5 * expected[3].abs().max())
    with torch.no_grad():
        logprobs_N, _ = linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=TEMPERATURE)
    assert not logprobs_N.requires_grad


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_tied_weight_has_both_gradients(fused, padding_idx):
    """One weight as embedding and head, two micro-batches: the plain gradient, and nothing left over."""
    _, weight_VH, targets_N, coefficients = inputs(torch.float64)
    tokens_N, function, tied = targets_N.flip(0), token_loss(coefficients, "logprobs"), TiedGradient()
    tokens_N[:3] = 7
    grads = []
    for way in ("plain", "tied"):
        embedding = torch.nn.Embedding(*weight_VH.shape, padding_idx, _weight=weight_VH.clone())
        weight = embedding.weight
        embedding = embedding if way == "plain" else TiedEmbedding(embedding, tied)
        for _ in range(2):
            hidden_NH = torch.tanh(embedding(tokens_N))
            options = {"temperature": TEMPERATURE, "tied": tied}
            if way == "plain":
                loss = function(*plain(hidden_NH, weight, targets_N), slice(0, TOKENS)).sum()
            elif fused:
                loss = fused_head_loss(hidden_NH, weight, targets_N, function, **options).loss
            else:
                scores = linear_logprobs(hidden_NH, weight, targets_N, **options)
                loss = function(*scores, slice(0, TOKENS)).sum()
            loss.backward()
        grads.append(weight.grad)
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-10)
    assert tied.waiting is None


def test_wrong_input_is_refused():
    hidden_NH, weight_VH, targets_N, coefficients = inputs(torch.float32)
    with pytest.raises(ValueError, match="pass one row a target"):
        linear_logprobs(hidden_NH[1:], weight_VH, targets_N)
    with pytest.raises(ValueError, match="pass one row a target"):
        linear_logprobs(hidden_NH, weight_VH.double(), targets_N)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=0)
    loss = fused_head_loss(hidden_NH.requires_grad_(), weight_VH, targets_N, token_loss(coefficients, "logprobs")).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


MEASURE = """
    import re, sys, torch
    from components.update.head import fused_head_loss, linear_logprobs
    torch.set_num_threads(1)
    N, H, V = 2048, 32, 32768
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    def peak_kib():  # ru_maxrss would begin at what the process that started this one held
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    before = peak_kib()
    if sys.argv[1] == "plain":
        loss = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).sum()
    elif sys.argv[1] == "recomputed":
        loss = linear_logprobs(hidden, weight, targets, chunk_bytes=2**23)[0].sum()
    else:
        loss = fused_head_loss(hidden, weight, targets, lambda l, e, c: l, chunk_bytes=2**23).loss
    loss.backward()
    print(peak_kib() - before)
"""


def peak_kib(way: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), way]
    root = Path(__file__).parents[2]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


def test_peak_memory_is_at_least_eight_times_smaller():
    """Resident peak of loss and backward: 2,048 tokens by 32,768 words, 256 MiB of logits the plain way."""
    plain_kib = peak_kib("plain")
    assert plain_kib > 2 * 2048 * 32768 * 4 / 1024  # the measurement sees logits and log-probabilities
    assert peak_kib("recomputed") * 8 < plain_kib
    assert peak_kib("fused") * 8 < plain_kib


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["recomputed", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(way, dtype):
    """The GPU's path (half precision in, float32 out) against the CPU's in float64; bfloat16 gradients to 8 bits."""
    hidden_NH, weight_VH, targets_N, coefficients = inputs(dtype)
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        hidden, weight = (x.to(device, kind).requires_grad_() for x in (hidden_NH, weight_VH))
        targets, on_device = targets_N.to(device), token_loss(coefficients.to(device), "logprobs and entropy")
        options = {"temperature": TEMPERATURE, "chunk_bytes": SMALL}
        if way == "fused":
            loss = fused_head_loss(hidden, weight, targets, on_device, **options).loss
        else:
            loss = on_device(*linear_logprobs(hidden, weight, targets, **options), slice(0, TOKENS)).sum()
        loss.backward()
        found.append([x.detach().double().cpu() for x in (loss, hidden.grad, weight.grad)])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() / one.abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)
