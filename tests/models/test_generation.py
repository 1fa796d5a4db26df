"""Decoding: states that stay in place, CUDA graphs, and what is drawn."""

import pytest
import torch

from householder.models import CausalLM, CausalLMConfig, Decoder
from householder.models.generation import draw
from householder.nn.key_value_buffer import KeyValueBuffer

V = 11
MIXERS = "delta,gated_delta,delta_product,gated_delta_product,path,path_fox,rope,swa,fox"


def make(pattern=MIXERS, **options):
    shape = {"d_model": 32, "num_layers": len(pattern.split(",")), "head_dim": 8, "window": 4}
    config = CausalLMConfig(V, pattern=pattern, init_std=None, **{**shape, **options})
    return CausalLM(config)


def some_tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def left_padded(length, *lengths):
    return torch.arange(length) >= length - torch.tensor(lengths)[:, None]


def decoded(model, tokens, prompt, **options):
    decoder = Decoder(model, tokens[:, :prompt], max_new_tokens=tokens.shape[1], **options)
    logits = [decoder.logits.clone()]
    logits += [decoder.step(token).clone() for token in tokens[:, prompt:].unbind(1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("pattern", [*MIXERS.split(","), MIXERS])
@pytest.mark.parametrize("prompt", [1, 7])
def test_decoder_gives_the_logits_of_a_whole_pass(pattern, prompt):
    # The window of "swa" is passed by more than once, the prompt of 7 being longer than it.
    model, tokens = make(pattern), some_tokens(2, 18)
    with torch.no_grad():
        whole = model(tokens)[:, prompt - 1 :]
    torch.testing.assert_close(decoded(model, tokens, prompt), whole, atol=2e-5, rtol=1e-4)


def test_decoder_leaves_out_what_fills_rows_up():
    model, tokens = make(), some_tokens(3, 12)
    mask = left_padded(7, 7, 4, 1)
    logits = decoded(model, tokens, 7, mask=mask)
    for row, length in enumerate((7, 4, 1)):
        alone = decoded(model, tokens[row : row + 1, 7 - length :], length)
        torch.testing.assert_close(logits[row : row + 1], alone, atol=2e-5, rtol=1e-4)


def test_decoder_changes_memory_that_stays_in_place():
    model = make()
    states = model.reserve(model.init_state(2), num_tokens=9)
    matrices = [state.matrix for state in states[:4]]
    before = [(x.data_ptr(), x.clone()) for x in matrices]
    with torch.no_grad():
        model.step_(torch.tensor([1, 2]), states)
    for x, (address, old) in zip(matrices, before, strict=True):
        assert x.data_ptr() == address
        assert not torch.equal(x, old)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, d: d.step(some_tokens(3)), ValueError, r"must be \[B=2\], got shape \[3\]"),
        (lambda m, d: d.step(torch.ones(2)), TypeError, "must be int64, got torch.float32"),
        (
            lambda m, d: [d.step(some_tokens(2)) for _ in range(3)],
            ValueError,
            "there must be room for another token",
        ),
        (
            lambda m, d: Decoder(m, some_tokens(2, 0), max_new_tokens=1),
            ValueError,
            r"must be \[B, T\] with a token at least, got shape \[2, 0\]",
        ),
        (
            lambda m, d: Decoder(m, some_tokens(1, 2), max_new_tokens=1, graph=True),
            ValueError,
            "got True: it needs a CUDA device",
        ),
        (
            lambda m, d: m.generate(some_tokens(1, 2), max_new_tokens=1, temperature=-1.0),
            ValueError,
            "`temperature` must be finite and at least 0",
        ),
        (
            lambda m, d: m.generate(some_tokens(1, 2), max_new_tokens=1, temperature=float("nan")),
            ValueError,
            "`temperature` must be finite and at least 0, got nan",
        ),
        (
            lambda m, d: m.generate(some_tokens(1, 2), max_new_tokens=1, temperature="hot"),
            TypeError,
            "`temperature` must be a number, got 'hot'",
        ),
        (
            lambda m, d: m.generate(some_tokens(1, 2), max_new_tokens=1, num_tokens=0),
            ValueError,
            "`num_tokens` must be at least 1, got 0",
        ),
        (
            lambda m, d: m.reserve(m(some_tokens(1, 5), return_states=True)[1], 4),
            ValueError,
            "`num_tokens` must be at least 5",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    model = make("delta,rope")
    decoder = Decoder(model, some_tokens(2, 3), max_new_tokens=2)
    with pytest.raises(error, match=message):
        call(model, decoder)


def test_steps_in_place_have_no_gradients():
    model = make("delta")
    with pytest.raises(NotImplementedError, match="gradients are on"):
        model.step_(torch.tensor([1]), model.reserve(model.init_state(1), 4))


def test_greedy_generation_takes_the_likeliest_token():
    model, tokens = make("gated_delta,swa"), some_tokens(2, 3)
    generated = model.generate(tokens, max_new_tokens=6, temperature=0)
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


def test_what_a_vocabulary_is_padded_with_is_never_drawn():
    model, tokens = make("delta"), some_tokens(4, 3)
    greedy = model.generate(tokens, max_new_tokens=1, temperature=0, num_tokens=4)[:, -1]
    assert torch.equal(greedy, model(tokens)[:, -1, :4].argmax(-1))
    drawn = model.generate(tokens, max_new_tokens=30, temperature=9.0, num_tokens=4)[:, 3:]
    assert drawn.unique().tolist() == [0, 1, 2, 3]


def test_generation_ends_with_the_last_sequence_and_fills_the_others_up():
    model, tokens = make("gated_delta"), some_tokens(4, 3)
    torch.manual_seed(2)
    free = model.generate(tokens, max_new_tokens=80, temperature=20.0)[:, 3:]
    torch.manual_seed(2)
    stopped = model.generate(tokens, max_new_tokens=80, temperature=20.0, stop=0)[:, 3:]
    lengths = [row.tolist().index(0) + 1 for row in free]
    assert len(set(lengths)) > 1
    assert stopped.shape[1] == max(lengths) < 80
    for row, ended, length in zip(free, stopped, lengths, strict=True):
        assert torch.equal(ended[:length], row[:length])
        assert (ended[length:] == 0).all()


def test_rows_are_drawn_from_their_own_likeliest():
    torch.manual_seed(0)
    logits = torch.randn(5, V)
    assert torch.equal(draw(logits, 0, None, None, None), logits.argmax(-1))
    assert torch.equal(draw(logits, 3.0, 1, None, None), logits.argmax(-1))
    assert torch.equal(draw(logits, 3.0, None, 1e-6, None), logits.argmax(-1))
    best = logits.topk(2).indices
    drawn = torch.stack([draw(logits, 1.0, 2, None, None) for _ in range(50)], dim=1)
    assert (drawn[..., None] == best[:, None]).any(-1).all()
    assert len(drawn.unique()) > 2


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.5, 2), (0.69, 2), (0.71, 3), (0.91, 4), (1.0, 4)]
)
def test_those_are_drawn_that_together_have_the_probability(top_p, kept):
    probabilities = torch.tensor([0.3, 0.4, 0.1, 0.2])
    logits = probabilities.log().expand(20_000, 4)
    counts = draw(logits, 1.0, None, top_p, None).bincount(minlength=4) / 20_000
    probabilities[probabilities.argsort(descending=True)[kept:]] = 0
    torch.testing.assert_close(counts, probabilities / probabilities.sum(), atol=0.02, rtol=0)
    assert (counts[probabilities == 0] == 0).all()


def test_a_token_is_left_out_where_those_before_it_reach_the_probability():
    even = torch.zeros(2_000, 4)
    assert len(draw(even, 1.0, None, 0.5, None).unique()) == 2


def test_drawn_tokens_have_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    counts = draw(logits, 2.0, None, None, generator).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)


def test_key_value_buffer_with_a_window_forgets_the_oldest():
    k = torch.randn(1, 5, 2, 4)
    buffer = KeyValueBuffer(k, k, None, None, num_tokens=20, window=3)
    q, new = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    o = buffer.append(q, new, new)
    seen = torch.cat([k[:, 3:], new], dim=1)
    weights = torch.einsum("bqhk,bthk->bhqt", q, seen).div(2).softmax(-1)
    torch.testing.assert_close(o, torch.einsum("bhqt,bthk->bqhk", weights, seen))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*MIXERS.split(","), MIXERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_gives_what_separate_launches_give(pattern, dtype):
    # 80 tokens: PaTH makes blocks of 64.
    model = make(pattern, d_model=64, head_dim=16).cuda().to(dtype)
    tokens = some_tokens(3, 90).cuda()
    mask = left_padded(7, 7, 4, 1).cuda()
    for options in ({}, {"mask": mask}):
        plain = decoded(model, tokens, 7, graph=False, **options)
        graph = decoded(model, tokens, 7, graph=True, **options)
        if "path" in pattern:
            # Its kernels cut the tokens by how many there are, or by how many there may be.
            limit = 1e-4 if dtype == torch.float32 else 3e-2
            assert (graph - plain).norm() <= limit * plain.norm()
        else:
            assert torch.equal(graph, plain)


@pytest.mark.gpu
def test_graph_is_refused_under_autocast():
    model = make("gated_delta", head_dim=16).cuda()
    with (
        torch.autocast("cuda", torch.bfloat16),
        pytest.raises(ValueError, match="autocast is on"),
    ):
        Decoder(model, some_tokens(1, 3).cuda(), max_new_tokens=4, graph=True)


@pytest.mark.gpu
def test_generation_on_a_gpu_repeats_what_the_cpu_takes():
    model, tokens = make("delta_product,rope", head_dim=16), some_tokens(2, 5)
    expected = model.generate(tokens, max_new_tokens=20, temperature=0)
    assert torch.equal(
        model.cuda().generate(tokens.cuda(), max_new_tokens=20, temperature=0).cpu(), expected
    )
