import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, make_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import UserError, to_toml
from pretrained import OPENAI
from train_gpt2 import GPT, Config, batch_layout, load_config

ROOT = Path(__file__).parents[1]
PRESETS = sorted(ROOT.glob("configs/*.toml"))


@pytest.fixture
def toml(tmp_path):
    """Write a config file; returns its path as an argument."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refuse(argv, capsys):
    """What a user is told about arguments that end the program with code 2."""
    with pytest.raises(SystemExit) as ended:
        load_config(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- where values come from


def test_no_argument_gives_the_defaults():
    assert load_config([]) == (Config(), "gpt2")


def test_cli_beats_toml_beats_default(toml):
    first = toml("first.toml", "n_layer = 2\nn_head = 2\nn_embd = 64\nbias = false\n")
    second = toml("second.toml", "n_head = 4\nn_embd = 128\nmlp = 'relu2'\n")
    cfg, name = load_config([first, second, "--n_embd=256", "--dropout", "0.1"])
    assert name == "second"
    assert cfg == replace(
        Config(), n_layer=2, n_head=4, n_embd=256, bias=False, mlp="relu2", dropout=0.1
    )


def test_int_is_accepted_for_float(toml):
    for argv in (["--learning_rate=1"], [toml("x.toml", "learning_rate = 1")]):
        learning_rate = load_config(argv)[0].learning_rate
        assert learning_rate == 1.0 and isinstance(learning_rate, float)


def test_value_may_contain_equals(toml):
    assert load_config(["--run_name=a=b=c"])[0].run_name == "a=b=c"
    assert load_config([toml("x.toml", "run_name = 'a=b=c'")])[0].run_name == "a=b=c"


def test_value_may_be_empty_or_begin_with_dashes():
    cfg, _ = load_config(["--sample_prompt=", "--data_dir=--bias=False"])
    assert (cfg.sample_prompt, cfg.data_dir, cfg.bias) == ("", "--bias=False", True)


def test_config_never_executes_code(toml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "__import__('pathlib').Path('hacked').touch()"
    assert load_config([toml("x.toml", f'sample_prompt = "{code}"')])[0].sample_prompt == code
    for name in ("x.py", "y.toml"):
        with pytest.raises(UserError, match=re.escape(name)):
            load_config([toml(name, f"n_layer = {code}\n")])
    assert not Path("hacked").exists()


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=20),
    number=st.floats(1, 1e9),
    flag=st.booleans(),
)
def test_written_config_reads_back_the_same(toml, text, number, flag):
    cfg = replace(Config(), sample_prompt=text, data_dir=text, rope_theta=number, bias=flag)
    assert load_config([toml("x.toml", to_toml(cfg))])[0] == cfg


def test_odd_strings_read_back_the_same(toml):
    for text in ('"', "'", "\\", "\\n", "a\r\nb", "\t", "\0", "\x1f", "\x7f", "é 🙂 \u2028", "#="):
        cfg = replace(Config(), sample_prompt=text)
        assert load_config([toml("x.toml", to_toml(cfg))])[0] == cfg, repr(text)


def test_resume_is_not_written_down():
    assert "resume" not in to_toml(replace(Config(), resume=True))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("wrong, nearest", [("n_layr", "n_layer"), ("warmup_step", "warmup_steps")])
def test_unknown_key_suggests_the_nearest(toml, capsys, wrong, nearest):
    assert f"--{nearest}" in refuse([f"--{wrong}=3"], capsys)
    path = toml("x.toml", f"{wrong} = 3\n")
    with pytest.raises(UserError, match=re.escape(path)):
        load_config([path])
    assert f"--{nearest}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["n_layer = 'twelve'", "n_layer = 1.5", "bias = 'maybe'", "mlp = 'glu'", "dropout = ''"]
)
def test_wrong_type_names_the_file_and_the_field(toml, capsys, line):
    path = toml("x.toml", f"n_head = 4\n{line}\n")
    with pytest.raises(UserError, match=re.escape(path)):
        load_config([path])
    assert f"--{line.split()[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["n_layer = [1]", "[model]\nn_layer = 3"])
def test_only_plain_values_are_taken(toml, text):
    with pytest.raises(UserError, match=r"x\.toml.* (n_layer|model) "):
        load_config([toml("x.toml", text)])


def test_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml.*No such file"):
        load_config([str(tmp_path / "nowhere.toml")])


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("mlp", "SwiGLU", "gelu or swiglu or relu2"),
        ("norm", "RMSNorm", "layernorm or rmsnorm"),
        ("max_steps", 1e4, "of type int"),
        ("learning_rate", "6e-4", "of type float"),
        ("run_name", None, "of type str"),
        ("n_layer", True, "of type int"),
    ],
)
def test_value_of_another_type_is_refused_in_code_and_as_an_edited_default(key, value, expected):
    told = re.escape(f"{key}={value!r} must be {expected}")
    with pytest.raises(UserError, match=told):
        Config(**{key: value})
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    edited, count = re.subn(rf"(    {key}: [^=]+ = ).+?(?=  #)", rf"\g<1>{value!r}", source)
    assert count == 1
    code = "import sys; sys.argv[1:] = ['--check']; exec(compile(sys.stdin.read(), 'x', 'exec'))"
    how = dict(input=edited, capture_output=True, encoding="utf-8", cwd=ROOT)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == 2 and re.search(told, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "kind, value, told",
    [
        (int | None, None, "new: make it int, float, bool, str, tuple or Literal"),
        (Path, Path("a"), "new: make it int, float, bool, str, tuple or Literal"),
        (Literal[1, 2], 3, "new=3 must be 1 or 2"),
    ],
)
def test_new_field_that_no_toml_file_could_hold_is_refused_at_once(kind, value, told):
    """Else the run would train, and its config.toml could not be read."""
    edited = make_dataclass("Edited", [("new", kind, value)], bases=(Config,), frozen=True)
    with pytest.raises(UserError, match=f"^{told}$"):
        edited()


def test_new_field_that_is_a_tuple_is_written_and_read(toml):
    fields = [("betas", tuple[float, float], (0.9, 0.95)), ("names", tuple[str, ...], ("a b",))]
    edited = make_dataclass("Edited", fields, bases=(Config,), frozen=True)
    cfg = edited(betas=(0.8, 0.99), names=("c", "d e"))
    assert load_config([toml("x.toml", to_toml(cfg))], edited)[0] == cfg


def test_config_that_stands_in_the_wrong_place_or_is_a_folder_is_told(toml, tmp_path):
    path = toml("x.toml", "n_layer = 2\n")
    with pytest.raises(UserError, match=r"x\.toml stands after a --flag: name the TOML"):
        load_config(["--n_head=4", path])
    with pytest.raises(UserError, match=r"is a folder: name a file, such as .*config\.toml"):
        load_config([str(tmp_path)])


@pytest.mark.parametrize(
    "args, message",
    [
        ("--n_head=7", r"n_embd=768 .* n_head=7; try 763"),
        ("--pos_embedding=rope --n_head=256", r"pos_embedding=rope .* n_embd/n_head=3 is odd; try"),
        ("--dropout=1", r"dropout=1\.0.* must be below 1"),
        ("--beta2=1.0", r"beta2=1\.0 must be below 1"),
        ("--n_layer=0", r"n_layer=0 must be 1 or more"),
        ("--learning_rate=-1", r"learning_rate=-1\.0 must be 0 or more"),
        ("--grad_clip=inf", r"grad_clip=inf"),
        ("--max_steps=1000000000000", r"max_steps=1\d+ must be 0 or more, and below 2147483648"),
        ("--seed=18446744073709551616", r"seed=\d+ must be 0 or more, and below \d+"),
        ("--rope_theta=0", r"rope_theta=0\.0 must be 1 or more"),
        ("--run_name=\udcff", r"run_name='\\udcff' must be UTF-8"),
        ("--run_name=a\0", r"run_name='a\\x00' must be a single folder name"),
        ("--weight_decay=nan", r"weight_decay=nan must be 0 or more"),
        ("--vocab_size=70000", r"vocab_size=70000 .* 65536"),
        ("--vocab_size=512", r"vocab_size=512 .* try --hellaswag_examples=0 --sample_prompt="),
        ("--vocab_size=512 --hellaswag_examples=0", r"vocab_size=512 .* --sample_prompt="),
        ("--run_name=a/b", r"run_name='a/b' .* log_dir"),
        ("--run_name=..", r"run_name='\.\.' "),
    ],
)
def test_impossible_value_names_field_value_and_remedy(args, message):
    with pytest.raises(UserError, match=message):
        load_config(args.split())


def test_remedy_for_the_width_works():
    for n_head in (5, 7, 11, 1000):
        with pytest.raises(UserError) as error:
            load_config([f"--n_head={n_head}"])
        width = re.search(r"try (\d+)", str(error.value))[1]
        assert load_config([f"--n_head={n_head}", f"--n_embd={width}"])[0].n_head == n_head


def test_batch_that_does_not_divide_is_told_the_nearest_that_does():
    with pytest.raises(UserError) as error:
        batch_layout(Config(total_batch_size=500_000), 1, 64)
    expected = (
        "total_batch_size=500000 is not a multiple of "
        "micro_batch_size*block_size*world=64*1024*1=65536; try 524288"
    )
    assert str(error.value) == expected


@pytest.mark.parametrize("total, world, micro", [(500_000, 1, 64), (1, 8, 3), (99_999, 7, 5)])
def test_remedy_for_the_batch_works(total, world, micro):
    with pytest.raises(UserError) as error:
        batch_layout(Config(total_batch_size=total), world, micro)
    remedy = int(re.search(r"try (\d+)", str(error.value))[1])
    micro_steps, sequences = batch_layout(Config(total_batch_size=remedy), world, micro)
    assert micro_steps >= 1 and sequences * 1024 == remedy == micro_steps * micro * 1024 * world
    assert abs(remedy - total) <= micro * 1024 * world


def test_grad_accum_steps_overrides_total_batch_size():
    assert batch_layout(Config(grad_accum_steps=3, total_batch_size=1), 2, 4) == (3, 24)


# ---------------------------------------------------------------- presets and commands


def test_presets_are_there():
    sizes = {"tiny", "gpt2_124m", "gpt2_medium", "gpt2_large", "gpt2_xl"}
    variants = {"gpt2_124m_rope", "gpt2_124m_swiglu", "gpt2_124m_rope_swiglu"}
    assert {path.stem for path in PRESETS} >= sizes | variants | {"small_card", "finetune"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_builds(path):
    cfg, name = load_config([str(path)])
    assert name == path.stem
    assert path.read_text(encoding="utf-8").startswith("#"), "it opens with what it is"
    with torch.device("meta"):
        GPT(cfg)
    micro_batch_size = cfg.micro_batch_size or 1
    assert batch_layout(cfg, 1, micro_batch_size)[0] >= 1


@pytest.mark.parametrize("name", OPENAI)
def test_openai_s_models_are_evaluated_as_they_are(name):
    cfg, _ = load_config([str(ROOT / "configs" / f"eval_{name.replace('-', '_')}.toml")])
    assert (cfg.init_from, cfg.eval_only) == (name, True)
    assert replace(cfg, init_from="", eval_only=False) == Config()


def test_help_tells_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert [f.name for f in fields(Config) if f"--{f.name} " not in shown] == []


def test_missing_data_is_told_in_two_lines_and_nothing_is_written(run_cli, tmp_path):
    done = run_cli("train_gpt2.py", "--device=cpu")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no train shards in edu_fineweb10B/")
    assert done.stderr.count("\n") == 2 and "Traceback" not in done.stderr
    for command in ("python fineweb.py", "--source=python-docs", "train_gpt2.py configs/tiny.toml"):
        assert command in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- importing

MODULES = ["fineweb", "hellaswag", "plots.plot", "train_gpt2", "sample", "export", "bench"]
MODULES = [
    m for m in [*MODULES, "plots.attention"] if (ROOT / f"{m.replace('.', '/')}.py").exists()
]

IMPORT_ALL = """
import contextlib, importlib, io, json, os, sys, threading
sys.path.insert(0, sys.argv[1])
import numpy, tiktoken, torch, tyro  # what these do on import is not ours
found, told = {}, io.StringIO()
for module in sys.argv[2:]:
    environment, modules, threads = dict(os.environ), set(sys.modules), threading.active_count()
    generator = torch.get_rng_state()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        importlib.import_module(module)
    found[module] = {
        "printed": told.getvalue(),
        "environment": [k for k in os.environ if os.environ[k] != environment.get(k)],
        "optional": sorted(OPTIONAL & set(sys.modules) - modules),
        "files": os.listdir(),
        "threads": threading.active_count() - threads,
        "seeded": not torch.equal(generator, torch.get_rng_state()),
        "cuda": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
    }
print(json.dumps(found))
"""
OPTIONAL = {"datasets", "huggingface_hub", "gigatoken", "transformers", "matplotlib", "wandb"}
OPTIONAL |= {"tensorboard", "safetensors", "pyarrow", "zstandard", "requests"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What importing each module in turn has done, in a process of its own."""
    code = f"OPTIONAL = {OPTIONAL}\n{IMPORT_ALL}"
    command = [sys.executable, "-B", "-c", code, str(ROOT), *MODULES]
    done = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("empty"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_importing_has_no_side_effect(imported, module):
    found = imported[module]
    assert set(found.pop("environment")) <= {"THP_MEM_ALLOC_ENABLE"}
    if module == "export":  # writing that format is what it is for
        found["optional"].remove("safetensors")
    assert not any(found.values()), found


def test_config_holds_plain_values_alone():
    assert {type(value) for value in asdict(Config()).values()} == {int, float, str, bool}
