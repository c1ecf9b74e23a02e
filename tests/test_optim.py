import math
from dataclasses import replace

import pytest
import torch

import train_gpt2
from common import UserError
from trackers import Norms
from train_gpt2 import GPT, Config, TrainState, lr_at, make_optimizer, train_step

# ---------------------------------------------------------------- learning rate

GPT2_SCHEDULE = {  # lr_min + (lr - lr_min) cos^2(x pi / 2) after the warm-up, computed elsewhere
    0: 8.391608392e-07, 1: 1.678321678e-06, 2: 2.517482517e-06, 100: 8.475524476e-05,
    356: 2.995804196e-04, 713: 5.991608392e-04, 714: 6.000000000e-04, 715: 6.000000000e-04,
    716: 5.999999960e-04, 1000: 5.996789398e-04, 2000: 5.934981305e-04, 3000: 5.796195246e-04,
    5000: 5.306037514e-04, 5304: 5.209351661e-04, 7000: 4.583175468e-04, 9000: 3.711462534e-04,
    9894: 3.300000000e-04, 10000: 3.251025465e-04, 12000: 2.347852879e-04, 14483: 1.390975057e-04,
    15000: 1.229734309e-04, 17000: 7.681210123e-05, 19000: 6.002106798e-05, 19073: 6.0e-05,
    25000: 6.0e-05,
}  # fmt: skip


@pytest.mark.parametrize("step, expected", GPT2_SCHEDULE.items())
def test_learning_rates_of_gpt2s_schedule(step, expected):
    assert lr_at(step, Config(), 19_073) == pytest.approx(expected, rel=1e-9)


def test_learning_rate_is_never_zero_in_warm_up_and_peaks_once_it_is_over():
    cfg = replace(Config(), learning_rate=1.0, warmup_steps=4)
    assert [lr_at(step, cfg, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warm_up_may_be_absent_or_longer_than_the_run():
    cfg = replace(Config(), learning_rate=1.0, min_lr_ratio=0.0)
    assert lr_at(0, replace(cfg, warmup_steps=0), 10) == 1.0
    assert lr_at(0, replace(cfg, warmup_steps=0), 0) == 1.0
    assert [lr_at(s, replace(cfg, warmup_steps=8), 4) for s in range(4)] == [
        0.125,
        0.25,
        0.375,
        0.5,
    ]
    assert lr_at(4, replace(cfg, warmup_steps=4), 4) == 1.0


# ---------------------------------------------------------------- parameter groups


def test_each_parameter_is_in_one_group_and_only_matrices_decay(tiny, toggles):
    model = GPT(replace(tiny, weight_decay=0.3, beta1=0.8, beta2=0.9, **toggles))
    decay = {}
    for group in make_optimizer(model, model.cfg).param_groups:
        assert group["betas"] == (0.8, 0.9)
        for p in group["params"]:
            assert id(p) not in decay, "in two groups"
            decay[id(p)] = group["weight_decay"]
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay.keys() == names.keys()
    for p in model.parameters():
        assert decay[id(p)] == (0.3 if p.dim() >= 2 else 0.0), names[id(p)]


def test_first_update_is_adamws_for_the_smallest_gradients_too(tiny):
    """From zero moments it is lr g / (|g| + eps), after the weight's own decay."""
    model = GPT(replace(tiny, weight_decay=0.3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
            p.grad = 1e-8 * torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_optimizer(model, model.cfg).step()
    for name, p in model.named_parameters():
        kept = before[name] * (1 - tiny.learning_rate * (0.3 if p.dim() >= 2 else 0.0))
        expected = kept - tiny.learning_rate * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- one optimizer step


@pytest.fixture
def sgd(make_model):
    """A state whose optimizer subtracts the gradient, so that a step shows it."""

    def make(cfg):
        model = make_model(cfg).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))

    return make


def examples(rows, seed=0):
    idx = torch.randint(512, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return idx[:, :-1], idx[:, 1:]


def moved(state, step):
    """What `step()` has subtracted from each parameter."""
    before = [p.detach().clone() for p in state.model.parameters()]
    step()
    return [old - p for old, p in zip(before, state.model.parameters(), strict=True)]


def total_norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@pytest.mark.parametrize("micro_steps", [1, 2, 8])
def test_accumulation_equals_one_big_batch(tiny, toggles, sgd, runtime, micro_steps):
    cfg = replace(tiny, grad_clip=0.0, **toggles)
    state, reference = sgd(cfg), sgd(cfg)
    inputs, targets = examples(8)
    expected_loss = reference.model(inputs, targets)
    expected_loss.backward()
    gradients = [p.grad for p in reference.model.parameters()]

    batches = zip(inputs.chunk(micro_steps), targets.chunk(micro_steps), strict=True)
    told = []

    def step():
        told.extend(train_step(state.model, state, batches, micro_steps, 1.0, runtime))

    for actual, expected in zip(moved(state, step), gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    loss, norm, stop = told
    assert loss == pytest.approx(expected_loss.item(), abs=1e-6)
    assert norm == pytest.approx(total_norm(gradients), rel=1e-5)
    assert not stop and state.step == 1


@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 100.0])
def test_clipping_bounds_the_update_and_the_norm_is_told_before_it(tiny, sgd, runtime, grad_clip):
    state = sgd(replace(tiny, grad_clip=grad_clip))
    norms = []

    def step():
        norms.append(train_step(state.model, state, iter([examples(8)]), 1, 1.0, runtime)[1])

    update = total_norm(moved(state, step))
    assert 0.5 < norms[0] < 100
    assert update == pytest.approx(min(norms[0], grad_clip or math.inf), rel=1e-4)


def test_learning_rate_given_is_the_one_used(tiny, sgd, runtime):
    slow, fast = (
        moved(s, lambda s=s, lr=lr: train_step(s.model, s, iter([examples(8)]), 1, lr, runtime))
        for s, lr in ((sgd(tiny), 0.25), (sgd(tiny), 0.5))
    )
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(2 * a, b, atol=1e-6, rtol=1e-4)


def test_step_at_a_learning_rate_of_zero_moves_no_weight_of_any_group(tiny, runtime):
    model = GPT(tiny)
    optimizer = make_optimizer(model, tiny)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    update = moved(state, lambda: train_step(model, state, iter([examples(8)]), 1, 0.0, runtime))
    assert total_norm(update) == 0 < len(optimizer.state)


def test_dropout_is_drawn_from_seed_step_and_rank_alone(tiny, sgd, runtime):
    def loss(step, rank, seed=1):
        state = sgd(replace(tiny, dropout=0.5, seed=seed))
        state.step, runtime.rank = step, rank
        return train_step(state.model, state, iter([examples(8)]), 1, 0.0, runtime)[0]

    drawn = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 2)]
    losses = [loss(*where) for where in drawn]
    assert len(set(losses)) == len(drawn)
    assert [loss(*where) for where in drawn] == losses


def test_gradients_meet_between_ranks_in_the_last_micro_step_alone(tiny, sgd, runtime):
    state, seen = sgd(tiny), []

    def look(model, _):  # in the forward pass, as DDP does
        seen.append(model.require_backward_grad_sync)

    state.model.register_forward_pre_hook(look)
    train_step(state.model, state, iter([examples(2)] * 3), 3, 1.0, runtime)
    assert seen == [False, False, True]


@pytest.mark.parametrize(("mine", "other"), [(False, False), (True, False), (False, True)])
def test_all_ranks_stop_when_one_is_asked_to_and_tell_the_mean_loss(
    tiny, sgd, runtime, mine, other
):
    def add_other(sums):
        told.append(sums[0].item())
        return sums + torch.stack((sums[0] + 2, sums[1], sums.new_tensor(float(other))))

    told, state = [], sgd(tiny)
    runtime.world, runtime.sum = 2, add_other
    batches = iter([examples(8)])
    loss, _, stop = train_step(state.model, state, batches, 1, 1.0, runtime, stop=mine)
    assert stop == (mine or other)
    assert loss == pytest.approx(told[0] + 1)


def test_scale_of_the_loss_is_in_no_norm_and_no_update(tiny, sgd, runtime):
    """float16's: clipping and what is told are of the gradients without it."""

    def step(scaled):
        state = sgd(replace(tiny, grad_clip=0.5))
        state.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        norms, told = Norms(state.model), []

        def one():
            batches = iter([examples(8)])
            told.extend(train_step(state.model, state, batches, 1, 1.0, runtime, norms=norms))

        return moved(state, one), told, norms.values

    (update, told, norms), (expected, expected_told, expected_norms) = step(True), step(False)
    torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-4)
    assert told == pytest.approx(expected_told, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-3)


# ---------------------------------------------------------------- losses that are not finite


@pytest.fixture
def poison(monkeypatch):
    """Make the training loss of the given steps (by number) NaN."""
    steps, now = set(), [None]
    train_step, forward = train_gpt2.train_step, GPT.forward

    def noting_step(model, state, *args, **kwargs):
        now[0] = state.step
        told = train_step(model, state, *args, **kwargs)
        now[0] = None
        return told

    def poisoned_forward(self, idx, targets=None):
        out = forward(self, idx, targets)
        return out * math.nan if now[0] in steps else out

    monkeypatch.setattr(train_gpt2, "train_step", noting_step)
    monkeypatch.setattr(GPT, "forward", poisoned_forward)
    return steps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_changes_nothing_but_the_count(tiny, runtime, bad, where):
    model = GPT(tiny)
    optimizer = make_optimizer(model, tiny)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))

    def step():
        train_step(model, state, iter([examples(8)]), 1, 1e-3, runtime)

    step()
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    if where == "loss":
        hook = model.register_forward_hook(lambda *args: args[-1] * bad)
    else:
        hook = model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * bad)
    assert total_norm(moved(state, step)) == 0
    assert state.step == 2
    for s, moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(s["exp_avg"], moment)
    hook.remove()
    update = total_norm(moved(state, step))
    assert math.isfinite(update) and update > 0


@pytest.mark.parametrize("spoilt", [0, 1], ids=["loss", "norm"])
def test_number_of_another_rank_that_is_not_finite_is_skipped_here_too(tiny, sgd, runtime, spoilt):
    def add_other(sums):
        other = sums.clone()
        other[spoilt] = math.nan
        return sums + other

    state, runtime.world, runtime.sum = sgd(tiny), 2, add_other
    batches = iter([examples(8)])
    update = moved(state, lambda: train_step(state.model, state, batches, 1, 1.0, runtime))
    assert total_norm(update) == 0


def test_skipped_steps_are_logged_and_nine_in_a_row_go_on(tiny_run, train, poison):
    poison |= {*range(2, 11), *range(12, 21)}
    _, log = train(replace(tiny_run, max_steps=24))
    losses = log["train"]
    assert {step for step in losses if not math.isfinite(losses[step])} == poison
    assert list(losses) == list(range(24))


@pytest.mark.parametrize("checkpoint_interval", [0, 2])
def test_ten_in_a_row_end_the_run_with_a_checkpoint_from_before(
    tiny_run, train, poison, checkpoint_interval
):
    reference, _ = train(replace(tiny_run, run_name="three", max_steps=3, warmup_steps=99))
    poison |= set(range(3, 100))
    cfg = replace(tiny_run, max_steps=20, warmup_steps=99, checkpoint_interval=checkpoint_interval)
    cfg = replace(cfg, keep_checkpoints=1)
    with pytest.raises(UserError, match=r"10 steps in a row .*\n.* step 3, from before") as told:
        train(cfg)
    assert ("an older one" in str(told.value)) == bool(checkpoint_interval)  # where there is one
    folder = reference.parent / "run"
    kept, expected = (
        torch.load(path / "step_000003.pt", weights_only=True) for path in (folder, reference)
    )
    assert kept["step"] == 3
    torch.testing.assert_close(kept["model"], expected["model"], rtol=0, atol=0)

    assert len(list(folder.glob("step_*.pt"))) == 1 + bool(checkpoint_interval)  # none is deleted
    poison.clear()
    _, log = train(replace(cfg, resume=True))
    assert all(math.isfinite(loss) for loss in log["train"].values())
    assert list(log["train"]) == list(range(20))
