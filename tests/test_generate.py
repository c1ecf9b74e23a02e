import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from common import UserError
from fineweb import END_OF_TEXT, tokenizer
from sample import GraphedStep
from train_gpt2 import (
    GPT,
    Config,
    KVCache,
    Sampling,
    complete,
    generate,
    next_logits,
    sample_token,
)  # fmt: skip

GREEDY = Sampling(temperature=0.0)


def prompt(rows, length, seed=0):
    return torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(seed))


def continued(model, idx, n, how=GREEDY, seed=0):
    """The new ids (B, <= n) of idx's continuation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(list(generate(model, idx, n, how, generator)), dim=1)


def drawn(probabilities, rows=4000, seen=None, **how):
    """How often sample_token draws each id, as a list of frequencies."""
    logits = torch.tensor(probabilities).log().expand(rows, -1)
    seen = torch.zeros(rows, 0, dtype=torch.long) if seen is None else seen.expand(rows, -1)
    ids = sample_token(logits, seen, Sampling(**how), torch.Generator().manual_seed(0))
    assert ids.shape == (rows, 1)
    return (ids.flatten().bincount(minlength=len(probabilities)) / rows).tolist()


# ---------------------------------------------------------------- cache and context


def test_a_model_that_recomputes_blocks_generates_the_same_in_training_mode(tiny, make_model):
    model, idx = make_model(tiny), prompt(2, 5)
    expected = continued(model, idx, 20)
    saving = make_model(replace(tiny, gradient_checkpointing=True)).train()
    assert torch.equal(continued(saving, idx, 20), expected)


@torch.inference_mode()
def test_cached_logits_equal_the_full_forward(tiny, toggles, make_model):
    model, idx = make_model(replace(tiny, **toggles)), prompt(3, 16)
    expected = model(idx)
    for first, size in ((1, 16), (7, 20), (16, 16)):  # tokens read at once, before one at a time
        cache, keys = KVCache(size), torch.arange(size)

        def read(a, b, cache=cache, keys=keys):
            mask = keys <= keys[a:b, None]
            return model.logits(model.features(idx[:, a:b], keys[a:b], mask, cache))

        parts = [read(0, first), *(read(t, t + 1) for t in range(first, 16))]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 40])
@torch.inference_mode()
def test_generation_equals_full_forwards_past_the_block_size_too(tiny, toggles, make_model, length):
    model, idx = make_model(replace(tiny, **toggles)), prompt(2, length)
    generator, window, expected = torch.Generator().manual_seed(0), idx[:, -16:], []
    for _ in range(40):
        if window.size(1) > 16:
            window = window[:, -9:]  # the later half of the context, and the newest token
        new = sample_token(model(window)[:, -1], window, Sampling(), generator)
        window = torch.cat((window, new), dim=1)
        expected.append(new)
    assert torch.equal(continued(model, idx, 40, Sampling()), torch.cat(expected, dim=1))


class FakeGraph:
    """Stands for a CUDA graph: what is captured is computed again, from the same tensors."""

    def __init__(self, step, made):
        self.step, self.made = step, made

    def replay(self):
        self.made.append(1)
        self.step.logits.copy_(self.step.compute())


@pytest.fixture
def graphed():
    """Make a GraphedStep with a stand-in for its graph; returns it and a list of its replays."""

    def make(step=next_logits):
        replays = []

        class Step(GraphedStep):
            def capture(self, model, cache, *inputs):
                self.inputs = [x.clone() for x in inputs]
                self.compute = lambda: self.step(model, *self.inputs, cache)
                self.logits, self.graph = self.compute(), FakeGraph(self, replays)

        return Step(step), replays

    return make


@pytest.mark.parametrize("length", [1, 5, 15, 40])
def test_graphed_steps_continue_as_plain_ones_do(tiny, toggles, make_model, graphed, length):
    model, idx, (step, replays) = make_model(replace(tiny, **toggles)), prompt(2, length), graphed()
    generator = torch.Generator().manual_seed(0)
    made = torch.cat(list(generate(model, idx, 40, Sampling(), generator, step)), dim=1)
    assert torch.equal(made, continued(model, idx, 40, Sampling()))
    assert len(replays) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5])
def test_compiled_steps_continue_as_plain_ones_do(tiny, toggles, make_model, graphed, length):
    model, idx = make_model(replace(tiny, **toggles)), prompt(2, length)
    step, replays = graphed(torch.compile(next_logits, dynamic=False))
    made = torch.cat(list(generate(model, idx, 40, Sampling(temperature=0), step=step)), dim=1)
    assert torch.equal(made, continued(model, idx, 40))
    assert len(replays) >= 30


# ---------------------------------------------------------------- sampling


def test_greedy_takes_the_likeliest_and_ignores_the_seed(tiny, make_model):
    model, idx = make_model(tiny), prompt(2, 4)
    first = continued(model, idx, 30)
    assert torch.equal(first[:, :1], model(idx)[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(continued(model, idx, 30, seed=1), first)


def test_top_k_one_is_greedy(tiny, make_model):
    model, idx = make_model(tiny), prompt(2, 4)
    assert torch.equal(
        continued(model, idx, 30, Sampling(top_k=1, temperature=5.0)), continued(model, idx, 30)
    )


def test_same_seed_gives_the_same_text_and_another_seed_another(tiny, make_model):
    model, idx = make_model(tiny), prompt(2, 4)
    first = continued(model, idx, 20, Sampling())
    assert torch.equal(continued(model, idx, 20, Sampling()), first)
    assert not torch.equal(continued(model, idx, 20, Sampling(), seed=1), first)


def test_rows_of_one_prompt_are_sampled_independently(tiny, make_model):
    new = continued(make_model(tiny), prompt(1, 4).repeat(8, 1), 10, Sampling())
    assert len({tuple(row) for row in new.tolist()}) == 8


def test_a_row_does_not_depend_on_the_other_rows(tiny, make_model):
    model, idx = make_model(tiny), prompt(3, 4)
    together = continued(model, idx, 30)
    alone = torch.cat([continued(model, row[None], 30) for row in idx])
    assert torch.equal(together, alone)


def test_frequencies_are_the_probabilities_at_temperature_one():
    assert drawn([0.5, 0.3, 0.15, 0.05]) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens_and_flattens():
    # p^(1/T), normalized
    assert drawn([0.8, 0.2], temperature=0.5) == pytest.approx([16 / 17, 1 / 17], abs=0.03)
    assert drawn([0.8, 0.2], temperature=2.0) == pytest.approx([2 / 3, 1 / 3], abs=0.03)


def test_top_k_keeps_k_tokens_in_proportion():
    assert drawn([0.1, 0.4, 0.3, 0.2], top_k=2) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=0.03)
    assert drawn([0.9, 0.1], top_k=100) == pytest.approx([0.9, 0.1], abs=0.03)


@pytest.mark.parametrize(
    "top_p, kept", [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.99, 4)]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    likeliest = probabilities.argsort(descending=True)[:kept]
    expected = torch.zeros(4)
    expected[likeliest] = probabilities[likeliest] / probabilities[likeliest].sum()
    actual = drawn(probabilities.tolist(), top_p=top_p)
    assert actual == pytest.approx(expected.tolist(), abs=0.03)


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign():
    seen = torch.tensor([[0, 0, 3]])
    plain = Sampling(temperature=0.0)
    firm = Sampling(temperature=0.0, repetition_penalty=2.0)
    for logits in ([3.0, 2.0, 0.0, 2.5], [-1.0, -1.5, -3.0, -1.2]):
        logits = torch.tensor([logits])
        assert sample_token(logits, seen, plain, None).item() == 0
        assert sample_token(logits, seen, firm, None).item() == 1
    # once, however often it was seen: e^(2/2) against e^0 twice
    often = torch.zeros(1, 5, dtype=torch.long)
    e = 2.718281828
    expected = [e / (e + 2), 1 / (e + 2), 1 / (e + 2)]
    actual = drawn([e * e, 1.0, 1.0], seen=often, repetition_penalty=2.0)
    assert actual == pytest.approx(expected, abs=0.03)


def test_repetition_penalty_sees_the_prompt_and_all_that_followed(tiny, make_model):
    model, idx = make_model(tiny), prompt(1, 4)
    new = continued(model, idx, 60, Sampling(temperature=0.0, repetition_penalty=1e9))
    told = torch.cat((idx, new), dim=1).flatten().tolist()
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    "how", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
            {"repetition_penalty": 0.0}, {"temperature": math.nan}],
)  # fmt: skip
def test_impossible_sampling_is_refused_by_name(how):
    with pytest.raises(UserError, match=f"{next(iter(how))}=.* is not possible: it must be"):
        Sampling(**how)


def test_temperature_next_to_zero_is_greedy(tiny, make_model):
    model, idx = make_model(tiny), prompt(2, 4)
    cold = continued(model, idx, 30, Sampling(temperature=1e-45))
    assert torch.equal(cold, continued(model, idx, 30))


def test_draws_are_those_of_multinomial():
    logits = 5 * torch.randn(64, 3000, generator=torch.Generator().manual_seed(1))
    logits[:, 2900:] = -math.inf
    for seed in range(20):
        drawn, expected = (torch.Generator().manual_seed(seed) for _ in range(2))
        ids = torch.multinomial(logits.softmax(-1), 1, generator=expected)
        assert torch.equal(sample_token(logits, None, Sampling(), drawn), ids)
        assert torch.equal(drawn.get_state(), expected.get_state())


def test_top_p_reaches_beyond_the_likeliest_thousand_where_it_has_to():
    logits = torch.linspace(0.01, 0, 5000).expand(4000, -1)  # nearly alike: half are 2,500 ids
    generator = torch.Generator().manual_seed(0)
    ids = sample_token(logits, None, Sampling(top_p=0.5), generator)
    assert 2400 < ids.max() < 2500 and ids.float().mean() == pytest.approx(1250, abs=50)


# ---------------------------------------------------------------- GPT-2's vocabulary


@pytest.fixture
def favouring():
    """A model with logits 0 at every position, but for {id or range of ids: logit}."""

    def make(favoured):
        cfg = Config(n_layer=1, n_head=1, n_embd=8, block_size=8, tie_embeddings=False)
        model = GPT(cfg).eval()
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.fill_(1 / 8)
            model.lm_head.weight.zero_()
            for ids, logit in favoured.items():
                model.lm_head.weight[np.array(ids)] = float(logit)
        return model

    return make


@pytest.mark.parametrize("how", [GREEDY, Sampling(), Sampling(top_k=50), Sampling(top_p=0.9)])
def test_padded_ids_are_never_sampled(favouring, how):
    model = favouring({range(50257, 50304): 1000, range(100): 20})
    assert model(prompt(1, 3)).argmax(-1).min() > END_OF_TEXT
    new = continued(model, prompt(50, 3), 10, how)
    assert new.shape == (50, 10) and new.max() < 100
    complete(model, "Hello", how, num_samples=3)  # and so the tokenizer can read all


def test_generation_stops_at_end_of_text(favouring):
    new = continued(favouring({END_OF_TEXT: 50}), prompt(3, 2), 10)
    assert new.tolist() == [[END_OF_TEXT]] * 3


def test_ended_row_stays_ended_until_all_have(favouring):
    new = continued(favouring({END_OF_TEXT: 50, 5: 51}), prompt(6, 2), 100, Sampling())
    ends = [row.index(END_OF_TEXT) for row in new.tolist()]
    assert len(set(ends)) > 1 and new.size(1) == max(ends) + 1 < 100
    for row, end in zip(new.tolist(), ends, strict=True):
        assert row == [5] * end + [END_OF_TEXT] * (len(row) - end)


def test_completion_is_text_without_prompt_and_end_of_text(favouring):
    word = tokenizer().encode_ordinary(" word")[0]
    model = favouring({word: 50, END_OF_TEXT: 48})
    texts = complete(model, "A prompt of a few", Sampling(), num_samples=8, max_new_tokens=12)
    assert len(texts) == 8 and len(set(texts)) > 1
    assert all(text == " word" * text.count("word") for text in texts)
    assert complete(model, "", GREEDY, max_new_tokens=3) == [" word word word"]


def test_the_seed_alone_decides_a_completion(favouring):
    model = favouring({range(100): 20})
    first = complete(model, "Hello", Sampling(), seed=1)
    assert complete(model, "Hello", Sampling(), seed=1) == first
    assert complete(model, "Hello", Sampling(), seed=2) != first


def test_special_token_in_a_prompt_is_ordinary_text(favouring):
    model = favouring({5: 50})
    assert complete(model, "<|endoftext|>", GREEDY, max_new_tokens=2) == [
        tokenizer().decode([5] * 2)
    ]


def test_model_of_a_checkpoint_continues_a_text(favouring, tmp_path):
    word = tokenizer().encode_ordinary(" word")[0]
    model = favouring({word: 50})
    content = {"model": model.state_dict(), "config": asdict(model.cfg)}
    torch.save(content, tmp_path / "best.pt")
    model = GPT.from_checkpoint(tmp_path / "best.pt")
    assert model.generate("Hello world,", max_new_tokens=3) == " word word word"
    assert model.generate("", 2, temperature=0.5, top_k=1) == " word word"


def test_checkpoint_of_a_model_before_it_was_edited_is_refused_in_a_line(favouring, tmp_path):
    model = favouring({5: 50})
    content = {"config": asdict(model.cfg)}
    weights = {f"old.{key}": p for key, p in model.state_dict().items()}
    refusals = {"edited.pt": r"does not fit \(.*\w+", "none.pt": r"is not .* \(.* it lacks model"}
    for name, more in zip(refusals, ({"model": weights}, {}), strict=True):
        torch.save(content | more, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} {refusals[name]}") as caught:
            GPT.from_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
