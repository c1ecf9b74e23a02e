import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import hardware
import train_gpt2
from bench import watch_memory
from common import UserError
from train_gpt2 import GPT, Config, HeadLoss, Runtime, evaluating


def tokens(cfg, rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cfg.vocab_size, (rows, length), generator=generator)


def count_parameters(**keys):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(Config(**keys)).parameters())


# ---------------------------------------------------------------- size and initial state


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, 124_439_808),
        (dict(qkv_bias=False), 124_412_160),
        (dict(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
        (dict(n_layer=36, n_head=20, n_embd=1280), 774_030_080),
        (dict(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
    ],
    ids=["gpt2", "gpt2-no-qkv_bias", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_parameter_counts_are_openais(keys, expected):
    assert count_parameters(vocab_size=50257, **keys) == expected


def test_rope_has_no_parameters_and_swiglu_costs_what_gelu_does():
    gpt2 = count_parameters(bias=False)
    assert count_parameters(bias=False, pos_embedding="rope") == gpt2 - 1024 * 768
    assert count_parameters(bias=False, mlp="swiglu") == gpt2
    assert count_parameters(bias=False, mlp="relu2") == gpt2
    assert count_parameters(bias=False, tie_embeddings=False) == gpt2 + 50304 * 768


def test_gpt2_costs_855_mflop_a_token():
    with torch.device("meta"):
        assert GPT(Config()).flops_per_token() == pytest.approx(855.4e6, abs=0.1e6)


@pytest.mark.parametrize("vocab_size", [512, 50304])
def test_initial_loss_is_near_log_vocab(tiny, toggles, vocab_size):
    torch.manual_seed(1)
    cfg = replace(tiny, vocab_size=vocab_size, **toggles)
    idx = tokens(cfg, 8, 17)
    loss = GPT(cfg)(idx[:, :-1], idx[:, 1:]).item()
    assert loss == pytest.approx(math.log(vocab_size), abs=0.1)


def test_initial_weights_are_gpt2s(tiny, toggles):
    torch.manual_seed(1)
    for name, p in GPT(replace(tiny, n_embd=128, **toggles)).named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * tiny.n_layer) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name
        else:
            constant = 0.0 if name.endswith("bias") else 1.0
            assert (p == constant).all(), name


def test_tied_embeddings_share_storage(tiny):
    tied, untied = GPT(tiny), GPT(replace(tiny, tie_embeddings=False))
    assert tied.lm_head.weight.data_ptr() == tied.transformer.wte.weight.data_ptr()
    assert untied.lm_head.weight.data_ptr() != untied.transformer.wte.weight.data_ptr()


# ---------------------------------------------------------------- forward


def test_no_future_token_changes_a_past_logit(tiny, toggles, make_model):
    cfg = replace(tiny, **toggles)
    model, idx = make_model(cfg), tokens(cfg, 2, 16)
    before = model(idx)
    for t in range(1, 16):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % cfg.vocab_size
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 0.1


def test_every_past_token_can_change_the_last_logit(tiny, toggles, make_model):
    cfg = replace(tiny, **toggles)
    model, idx = make_model(cfg), tokens(cfg, 1, 16)
    before = model(idx)[:, -1]
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % cfg.vocab_size
        assert (model(changed)[:, -1] - before).abs().max() > 1e-3, f"token {t} has no effect"


def test_loss_is_the_mean_cross_entropy_of_the_logits(tiny, toggles, make_model):
    cfg = replace(tiny, **toggles)
    model, idx = make_model(cfg), tokens(cfg, 3, 17)
    inputs, targets = idx[:, :-1], idx[:, 1:]
    expected = -model(inputs).log_softmax(-1).gather(2, targets[..., None]).mean()
    torch.testing.assert_close(model(inputs, targets), expected)


def test_attention_equals_naive_softmax_attention(tiny, make_model):
    attn = make_model(tiny).transformer.h[0].attn
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = attn.c_attn(x).split(32, dim=2)
    heads = []
    for columns in (slice(0, 16), slice(16, 32)):
        score = q[:, :, columns] @ k[:, :, columns].transpose(1, 2) / math.sqrt(16)
        score = score.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        heads.append(score.softmax(-1) @ v[:, :, columns])
    torch.testing.assert_close(attn(x, None), attn.c_proj(torch.cat(heads, dim=2)))


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys(tiny, make_model):
    model, idx = make_model(replace(tiny, qk_norm=True)), tokens(tiny, 2, 16)
    before = model(idx)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:64] *= 7
            block.attn.c_attn.bias[:64] *= 7
    torch.testing.assert_close(model(idx), before, atol=1e-4, rtol=0)


def test_rope_depends_only_on_the_offset(tiny):
    rope = train_gpt2.rope_table(tiny)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 1, 16, 16)
    score = train_gpt2.apply_rope(q, rope) @ train_gpt2.apply_rope(k, rope).transpose(2, 3)
    for offset in range(-15, 16):
        diagonal = score[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert score.std() > 0.1  # and it does depend on that


def test_rope_turns_pairs_as_complex_numbers(tiny):
    x = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :8], x[..., 8:])
    position, i = torch.arange(16.0)[:, None], torch.arange(8.0)
    turned = pairs * torch.exp(1j * position * tiny.rope_theta ** (-i / 8))
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    actual = train_gpt2.apply_rope(x, train_gpt2.rope_table(tiny))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_softcap_bounds_logits_smoothly(tiny, make_model):
    idx = tokens(tiny, 2, 16)
    plain = make_model(tiny)(idx)
    capped = make_model(replace(tiny, logit_softcap=2.0))(idx)
    assert plain.abs().max() > 2 > capped.abs().max()
    torch.testing.assert_close(capped, 2 * torch.tanh(plain / 2))


def test_dropout_acts_in_training_mode_alone(tiny, make_model):
    idx = tokens(tiny, 2, 16)
    plain, model = make_model(tiny), make_model(replace(tiny, dropout=0.5))
    torch.testing.assert_close(model(idx), plain(idx))
    model.train()
    assert (model(idx) - model(idx)).abs().max() > 0.1
    torch.testing.assert_close(plain.train()(idx), plain.eval()(idx))


@pytest.mark.parametrize("place", ["embedding", "attention", "residual of it", "residual of MLP"])
def test_dropout_acts_at_each_of_its_places(tiny, make_model, place):
    model, idx = make_model(replace(tiny, n_layer=1, dropout=0.5)).train(), torch.arange(16)[None]
    block, calls = model.transformer.h[0], []
    if place != "embedding":
        model.transformer.drop.p = 0.0
    if place != "attention":
        block.attn.dropout = 0.0
    if not place.startswith("residual"):
        block.drop.p = 0.0
    other = {"residual of it": block.mlp, "residual of MLP": block.attn}.get(place)
    if other:  # so that it adds nothing, with dropout or without
        other.c_proj.weight.data.zero_(), other.c_proj.bias.data.zero_()
    for seed in (0, 1):
        torch.manual_seed(seed)
        calls.append(model(idx))
    assert not torch.allclose(*calls)


def test_more_tokens_than_the_block_size_are_refused(tiny, make_model):
    for toggles in ({}, {"pos_embedding": "rope"}):
        model = make_model(replace(tiny, **toggles))
        assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 512)
        with pytest.raises(AssertionError, match="more than block_size"):
            model(torch.zeros(1, 17, dtype=torch.long))


def test_ids_that_pad_the_matrices_have_no_chance(tiny, make_model):
    model, idx = make_model(replace(tiny, n_embd=8, vocab_size=50304)), tokens(tiny, 2, 16)
    actual = model.text_logits(model.features(idx)).log_softmax(-1)
    torch.testing.assert_close(actual[..., :50257], model(idx)[..., :50257].log_softmax(-1))
    assert (actual[..., 50257:] == -math.inf).all()


@torch.no_grad()
def test_rows_packed_side_by_side_compute_what_each_computes_alone(tiny, toggles, make_model):
    """A beginning and two ways on, in one row, as HellaSwag's tasks are."""
    model, idx = make_model(replace(tiny, **toggles)), tokens(tiny, 1, 14)
    position = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9]])
    segment = torch.tensor([[0] * 5 + [1] * 4 + [2] * 5])
    mask = ((segment[:, None] == segment[:, :, None]) | (segment == 0)[:, None]).tril()[:, None]
    packed = model.features(idx, position, mask)
    torch.testing.assert_close(packed[:, :9], model.features(idx[:, :9]))
    alone = model.features(torch.cat((idx[:, :5], idx[:, 9:]), dim=1))
    torch.testing.assert_close(packed[:, 9:], alone[:, 5:])


# ---------------------------------------------------------------- memory and kernels


def loss_and_gradients(model, idx):
    """(loss, gradients, bytes that the forward pass keeps for the backward pass)."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(0)  # dropout's
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(idx[:, :-1], idx[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), gradients, sum(kept.values())


def test_float16_gradients_of_many_rows_that_agree_stay_finite():
    x, targets = torch.ones(4096, 8), torch.zeros(4096, dtype=torch.long)
    x[:, 3] = 40.0  # a feature far out: 4,096 rows of it are 163,840, float16 ends at 65,504

    def gradient(enabled):
        head = torch.zeros(64, 8, requires_grad=True)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            HeadLoss.apply(x.requires_grad_(), head, targets, 0.0, 1).backward()
        return head.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("keys", [{}, {"loss_chunks": 4}])
def test_recomputing_blocks_keeps_less_and_changes_no_gradient(
    tiny, toggles, make_model, keys, dropout
):
    cfg, idx = replace(tiny, dropout=dropout, **toggles), tokens(tiny, 2, 16)
    loss, gradients, kept = loss_and_gradients(make_model(cfg).train(), idx)
    model = make_model(replace(cfg, gradient_checkpointing=True, **keys)).train()
    saving_loss, saving_gradients, saving_kept = loss_and_gradients(model, idx)
    assert saving_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(saving_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert saving_kept < kept


def test_blocks_are_recomputed_in_training_alone(tiny, make_model, monkeypatch):
    called, checkpoint = [], train_gpt2.checkpoint
    monkeypatch.setattr(
        train_gpt2,
        "checkpoint",
        lambda *args, **keys: called.append(1) or checkpoint(*args, **keys),
    )
    model, idx = make_model(replace(tiny, gradient_checkpointing=True)), torch.arange(16)[None]
    model(idx)
    assert not called
    model.train()(idx)
    assert len(called) == tiny.n_layer


def test_an_evaluation_computes_no_gradients(tiny, make_model, monkeypatch):
    model, idx, products = make_model(tiny), tokens(tiny, 2, 16), []
    t = torch.Tensor.t  # what the gradient of the head begins with, and its logits
    monkeypatch.setattr(torch.Tensor, "t", lambda x: products.append(x.shape) or t(x))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(idx[:, :-1], idx[:, 1:])
    head, logits = model.lm_head.weight.shape, (30, tiny.vocab_size)
    assert products == [head, head, logits]


@pytest.mark.parametrize("part", ["lm_head", "transformer.wte", "transformer.ln_f"])
def test_a_part_trained_alone_has_the_gradient_that_it_has_among_all(tiny, make_model, part):
    model, idx = make_model(replace(tiny, tie_embeddings=False)).train(), tokens(tiny, 2, 16)
    _, expected, _ = loss_and_gradients(model, idx)
    expected = expected[[name for name, _ in model.named_parameters()].index(f"{part}.weight")]
    model.zero_grad()
    model.requires_grad_(False)
    weight = model.get_parameter(f"{part}.weight").requires_grad_()
    model(idx[:, :-1], idx[:, 1:]).backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("chunks", [0, 1, 5, 30, 40])  # of 2 x 15 tokens
def test_loss_and_its_gradients_are_those_of_cross_entropy(tiny, toggles, make_model, chunks):
    model = make_model(replace(tiny, loss_chunks=chunks, **toggles)).train()
    idx = tokens(tiny, 2, 16)
    loss = model(idx[:, :-1], idx[:, 1:])
    logits, parameters = model(idx[:, :-1]), list(model.parameters())
    expected = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(3 * loss, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, parameters))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_loss_of_low_precision_is_as_near_as_cross_entropy_s(compiled, dtype, cap):
    x, head = torch.randn(100, 32), torch.randn(999, 32)  # loss about 18
    targets = torch.randint(0, 999, (100,))

    def peer(x, head, targets, cap, chunks):
        logits = F.linear(x, head)
        return F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, targets)

    def gradients(loss_of, dtype, chunks=3):  # as a loss scale keeps float16's from vanishing
        leaves = [t.clone().requires_grad_() for t in (x, head)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(*leaves, targets, cap, chunks)
        return loss, *torch.autograd.grad(1024 * loss, leaves)

    exact, theirs = gradients(peer, torch.float32), gradients(peer, dtype)
    own = torch.compile(HeadLoss.apply, fullgraph=True) if compiled else HeadLoss.apply
    for ours, near, expected in zip(gradients(own, dtype), theirs, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() <= 1.2 * (near - expected).norm() + 1e-4 * expected.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_takes_less_memory_the_more_chunks(make_model, tiny, compiled):
    cfg, idx, peaks = replace(tiny, n_layer=1, vocab_size=8192), tokens(tiny, 64, 17), []
    for chunks in (1, 4, 16):
        chunked = make_model(replace(cfg, loss_chunks=chunks))
        chunked = torch.compile(chunked, dynamic=False) if compiled else chunked
        chunked(idx[:, :-1], idx[:, 1:]).backward()
        with watch_memory(Runtime("cpu", "float32")) as peak:
            chunked(idx[:, :-1], idx[:, 1:]).backward()
        peaks += peak
    logits = 64 * 16 * 8192 * 4
    assert peaks[0] - peaks[1] > logits / 2 and peaks[1] > peaks[2]


def test_saving_memory_leaves_evaluation_as_it_is(tiny, make_model):
    model, idx = make_model(tiny), tokens(tiny, 2, 16)
    saving = make_model(replace(tiny, gradient_checkpointing=True, loss_chunks=3))
    assert torch.equal(saving(idx), model(idx))
    torch.testing.assert_close(saving(idx, idx), model(idx, idx))


@pytest.fixture
def kernels():
    """Give the choice of attention kernels back."""
    yield
    hardware.allow_attention("auto")


def test_attention_kernel_is_chosen_and_named(tiny, make_model, runtime, kernels):
    model, idx = make_model(tiny), tokens(tiny, 2, 16)
    expected = model(idx)
    for name, kernel in (
        ("flash", "flash attention"),
        ("math", "math attention"),
        ("auto", "flash attention"),
    ):
        hardware.choose_attention(replace(tiny, attention=name), runtime)
        assert hardware.attention_kernel(tiny, runtime) == kernel
        torch.testing.assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "T, compiled, dtype, kernel",
    [
        (128, False, "bfloat16", "math attention"),
        (256, True, "bfloat16", "math attention"),
        (256, False, "bfloat16", "flash attention"),
        (512, True, "bfloat16", "flash attention"),
        (128, True, "float32", "flash attention"),
    ],
)
def test_short_contexts_in_bfloat16_take_the_plain_kernel_on_a_cpu(
    tiny, kernels, T, compiled, dtype, kernel
):
    cfg, runtime = replace(tiny, block_size=T, compile_model=compiled), Runtime("cpu", dtype)
    hardware.choose_attention(cfg, runtime)
    assert hardware.attention_kernel(cfg, runtime) == kernel


def test_kernel_is_named_that_dropout_leaves(tiny, kernels, runtime):
    cfg = replace(tiny, dropout=0.1)  # on a CPU flash attention knows none
    hardware.choose_attention(cfg, runtime)
    assert hardware.attention_kernel(cfg, runtime) == "math attention"


def test_dropout_is_kept_from_cudnn_which_rounds_it(tiny, kernels, runtime):
    for dropout, attention, taken in ((0, "auto", True), (0.1, "auto", False), (0, "cudnn", True)):
        hardware.choose_attention(replace(tiny, dropout=dropout, attention=attention), runtime)
        assert torch.backends.cuda.cudnn_sdp_enabled() == taken
    with pytest.raises(UserError, match="attention=cudnn rounds dropout to sixteenths: set --att"):
        hardware.refuse_wrong(replace(tiny, dropout=0.1, attention="cudnn"), runtime)


@pytest.mark.filterwarnings("error")
def test_residual_stream_is_bfloat16_in_training_alone(tiny, toggles, make_model):
    """float16 has too small a range for it; evaluation can afford float32."""
    model, idx, seen = make_model(replace(tiny, **toggles)), tokens(tiny, 2, 16), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output.dtype))
    for dtype, training, expected in (
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, True, torch.float32),
    ):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.train(training)(idx, idx).backward()
        assert seen == [expected] * tiny.n_layer
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        seen.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_that_was_cast_is_of_that_dtype(tiny, toggles, make_model, dtype):
    model = make_model(replace(tiny, **toggles)).to(dtype)
    assert model(tokens(tiny, 2, 16)).dtype == dtype


def test_evaluation_leaves_cudnn_out_unless_it_was_asked_for(tiny, make_model, runtime, kernels):
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    for name, before, within in (("auto", True, False), ("cudnn", True, True), ("flash", False, 0)):
        hardware.allow_attention(name)
        assert enabled() == before
        with evaluating(make_model(tiny), runtime):
            assert enabled() == within
        assert enabled() == before


def test_attention_on_mps_is_named_without_asking_torch(tiny, runtime):
    runtime.device = torch.device("mps")  # there is no kernel to ask, nor one here to ask with
    assert hardware.attention_kernel(tiny, runtime) == "attention=auto"


def test_masked_attention_works_whatever_kernel_is_chosen(tiny, make_model, kernels):
    model, idx = make_model(tiny), tokens(tiny, 2, 16)
    position, mask = torch.arange(16), torch.ones(16, 16, dtype=torch.bool).tril()
    for name in ("flash", "cudnn", "efficient", "math"):
        hardware.allow_attention(name)
        packed = model.features(idx, position, mask)
        torch.testing.assert_close(packed, model.features(idx), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- Hugging Face folders


def save_reference(folder, **keys):
    """A GPT-2 of transformers' with random weights, and its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=512)
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, **keys)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return save_reference(tmp_path_factory.mktemp("gpt2"))


@torch.inference_mode()
def test_logits_and_loss_equal_transformers(hugging_face, tiny):
    reference, folder = hugging_face
    model, idx = GPT.from_pretrained(str(folder)), tokens(tiny, 3, 16)
    expected = reference(idx, labels=idx)
    torch.testing.assert_close(model(idx), expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(idx[:, :-1], idx[:, 1:]), expected.loss, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_head_of_its_own_is_read_too(tmp_path, tiny):
    reference, folder = save_reference(tmp_path, tie_word_embeddings=False)
    idx = tokens(tiny, 3, 16)
    actual = GPT.from_pretrained(str(folder))(idx)
    torch.testing.assert_close(actual, reference(idx).logits, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_names_and_masks_of_openais_files_are_understood(hugging_face, tmp_path, tiny):
    """The hub's gpt2 has no prefix, and each layer's causal mask."""
    reference, folder = hugging_face
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def rename(weights):
        for key in list(weights):
            weights[key.removeprefix("transformer.")] = weights.pop(key)
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(16, 16).tril().view(1, 1, 16, 16)

    change_weights(tmp_path, rename)
    idx = tokens(tiny, 3, 16)
    actual = GPT.from_pretrained(str(tmp_path))(idx)
    torch.testing.assert_close(actual, reference(idx).logits, atol=1e-5, rtol=1e-5)


def change_config(folder, **keys):
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


FOREIGN = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another kind of model": lambda folder: change_config(folder, model_type="llama"),
    "config is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "sizes left out": lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
    "fewer layers": lambda folder: change_config(folder, n_layer=1),
    "another width": lambda folder: change_config(folder, n_embd=64),
    "another activation": lambda folder: change_config(folder, activation_function="relu"),
    "a weight too many": lambda f: change_weights(f, lambda w: w.update(more=torch.ones(1))),
    "a weight too few": lambda f: change_weights(f, lambda w: w.pop("transformer.ln_f.bias")),
    "torn weights": cut_weights,
}


@pytest.mark.parametrize("spoil", FOREIGN.values(), ids=FOREIGN)
def test_foreign_folder_is_one_clear_error(hugging_face, tmp_path, spoil):
    for path in hugging_face[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(str(tmp_path))
    assert tmp_path.name in str(error.value) and "\n" not in str(error.value)


def test_unknown_model_name_is_told_what_would_do():
    with pytest.raises(UserError, match=r"gpt3 is not a .*gpt2\[-medium\|-large\|-xl\]"):
        train_gpt2.load_model("gpt3")
