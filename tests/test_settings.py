"""Settings that make no sense are refused when they are read, each with one sentence."""

import ast
import dataclasses
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Len, Lt
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import stackllm
from stackllm.cli import cli
from stackllm.engine import trackers
from stackllm.errors import DataError, MissingInputError, StackllmError, UsageError
from stackllm.llm.locate import anchored, find_backbone, revision_of
from stackllm.members.external import ExternalParams
from stackllm.members.own import OwnParams
from stackllm.members.registry import KINDS
from stackllm.parameters import hints_of
from stackllm.rating.question import read_asked
from stackllm.settings import Settings, as_written, build, given_data, make_settings, read_settings
from stackllm.store.digest import digest

DECODER = '[[member]]\nkind = "decoder"\n'
TRAINING = f"{DECODER}[member.training]\n"


def read(folder, content, overrides=None):
    path = folder / "stackllm.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_settings(path, overrides or {})


def classes_within(params):
    """A parameter class and those of its fields."""
    yield params
    for hint in hints_of(params).values():
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and part.__name__.endswith("Params"):
                yield from classes_within(part)


CLASSES = {
    found.__name__: found
    for start in (Settings, ExternalParams, OwnParams, *(kind.params for kind in KINDS.values()))
    for found in classes_within(start)
    if found is not Settings
}
NEEDED = {"ExternalParams": {"name": "a", "oof": "a.csv", "test": "b.csv"}}
NO_SETTINGS = {
    "TrunkParams": "made of a decoder's settings",
    "BlendParams": "fitted, with a check of its own",
}
NO_LIMITS = {
    ("RaterParams", "url"): "check_url refuses it, without showing what may hold a key",
    ("OwnParams", "params"): "what the user's own class takes is its own affair",
    ("ServerParams", "extra"): "what a server takes is its own affair",
}
FIELDS = [(params, name) for params in CLASSES.values() for name in hints_of(params)]


def nonsense(hint):
    """Values that a field of this type must refuse, with whether None is one; fails without limits."""
    plain, limits = hint, []
    if get_origin(hint) is Annotated:
        plain, *limits = get_args(hint)
    if get_origin(plain) in (Union, types.UnionType):
        parts = [part for part in get_args(plain) if part is not type(None)]
        values = [value for part in parts for value in nonsense(part)]
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        words += [True, False] if bool in parts else []
        return [value for value in values if value is not None and not _among(value, words)]
    if get_origin(plain) is Literal:
        first = get_args(plain)[0]
        return [f"{first}x", first.upper(), "", "another word", 2.5, True, None, [first]]
    if plain is bool:
        return [0, 1, "true", 1.5, [], None]
    if plain in (int, float):
        low = next(limit for limit in limits if isinstance(limit, Ge | Gt))
        high = next(limit for limit in limits if isinstance(limit, Le | Lt))
        below = low.gt if isinstance(low, Gt) else low.ge - (1 if plain is int else 1e-12)
        above = high.lt if isinstance(high, Lt) else high.le + 1
        whole = [1.0, 1.5] if plain is int else []
        ends = [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), -1e300]
        return [below, above, *whole, *ends, True, False, "1", "", [1], {}, None]
    if plain is str:
        length = next(limit for limit in limits if isinstance(limit, Len))
        return ["x" * (length.max_length + 1), *([""] if length.min_length else []), 5, True, ["x"]]
    if get_origin(plain) is tuple:
        empty = [[]] if any(isinstance(limit, Len) and limit.min_length for limit in limits) else []
        return [*empty, *([value] for value in nonsense(get_args(plain)[0])), 5, "x", None]
    assert dataclasses.is_dataclass(plain), f"no limits on {hint}"
    return [5, "x", None, []]


def _among(value, words):
    """Is a value one of these, and no number that only equals it?"""
    return any(type(word) is type(value) and word == value for word in words)


def test_every_class_of_settings_is_known_here():
    found = set()
    for path in Path(stackllm.__file__).parent.rglob("*.py"):
        names = {
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
        }
        found |= {name for name in names if name.endswith("Params")}
    assert found - set(NO_SETTINGS) == set(CLASSES)


@pytest.mark.parametrize(
    ("params", "name"), FIELDS, ids=[f"{params.__name__}.{name}" for params, name in FIELDS]
)
def test_every_field_refuses_nonsense(params, name):
    if (params.__name__, name) in NO_LIMITS:
        return
    needed = NEEDED.get(params.__name__, {})
    for value in nonsense(hints_of(params)[name]):
        with pytest.raises(UsageError, match=rf"^{name}(, entry 1,)? must be ") as direct:
            params(**{**needed, name: value})
        assert "--" not in str(direct.value)
        assert len(str(direct.value)) < 600
        with pytest.raises(StackllmError, match=rf"^f: \[s\],? .*{name}.* must be ") as read:
            build("f: [s]", params, {**needed, name: value})
        assert read.value.exit_code in (2, 65)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_plain_frozen_dataclasses(name):
    params = CLASSES[name](**NEEDED.get(name, {}))
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params) == params
    assert build("f", CLASSES[name], json.loads(json.dumps(dataclasses.asdict(params)))) == params
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        setattr(params, next(iter(hints_of(CLASSES[name]))), 1)


DIGESTS = {
    "RunParams": "d7c8f8efc5fa1cfe",
    "EncoderParams": "64e4706226e5eb3d",
    "RaterParams": "22835ceb7743a78f",
    "ServerParams": "0a4576d35fba79a5",
    "BoostingParams": "e132ef37f94b8336",
    "FrozenParams": "43a9ff8ef02e14d4",
    "LexicalParams": "a4b4c434671dfbd9",
    "DecoderParams": "954cf78c80e7202f",
    "PromptParams": "97573170a2879f25",
    "LoraParams": "c01eeb85e03a6f8d",
    "TrainingParams": "44f98656f3c975f6",
    "PseudoParams": "ca304230b2368449",
}
"""Of the defaults. One that changes makes every unit stale that was stored with it."""


@pytest.mark.parametrize("name", DIGESTS)
def test_stored_units_are_found_again(name):
    assert digest(CLASSES[name]())[:16] == DIGESTS[name]


def test_a_field_that_came_later_counts_where_it_is_set():
    training, decoder = CLASSES["TrainingParams"], CLASSES["DecoderParams"]
    other = training(optimizer="adamw_8bit")
    assert digest(other) != digest(training())
    assert digest(decoder(training=other)) != digest(decoder())
    assert digest(decoder(training=training(optimizer="adamw"))) == digest(decoder())


def test_whole_numbers_and_lists_give_the_same_digest():
    boosting, lexical = CLASSES["BoostingParams"], CLASSES["LexicalParams"]
    assert digest(boosting(l2=1)) == digest(boosting(l2=1.0))
    assert digest(lexical(views=["words"])) == digest(lexical(views=("words",)))
    assert boosting(n_trees=np.int64(5), l2=np.float32(0.5)) == boosting(n_trees=5, l2=0.5)
    with pytest.raises(UsageError, match=r"n_trees must be a whole number .*, not 0\."):
        boosting(n_trees=np.int64(0))


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (f"{DECODER}seeds = [-1]", 2, "seeds, entry 1, must be a whole number from 0 to 2147483647, not -1."),
        (f"{DECODER}seeds = [3, 3]", 2, "[[member]] number 1: seeds must be different whole numbers"),
        ("[run]\nseed = 4294967296", 2, "stackllm.toml: [run] seed must be a whole number from 0 to 2147483647"),
        ("[stack]\nn_tree = 3", 65, '[stack] has no key "n_tree". Did you mean "n_trees"?'),
        ("[stack]\nfolds = 3", 65, '[stack] has no key "folds". It belongs into [run].'),
        ("folds = 3", 65, "there is no section [folds]. It belongs into [run]."),
        ("[pseudo]\nrecipes = ['a.py']", 65, "It must stand above the first [section]."),
        ("[pseudo]\nlabels = 'sofft'", 2, 'must be "soft" or "hard", not "sofft". Did you mean "soft"?'),
        ("[run]\nfolds = 1979-05-27", 65, 'folds must be a whole number from 2 to 1000, not "1979-05-27"'),
        ("[rater]\nurl = 'http://host'", 2, "url and model go together"),
        ("[[run]]\nfolds = 3", 65, "[run] must be a table"),
        ("[member]\nkind = 'lexical'", 65, "members are written [[member]], with double brackets"),
        ("member = []", 65, "member is an empty list. Leave it out"),
        ("recipes = 'a.py'", 65, "recipes must be a list"),
        ("recipes = ['']", 2, "recipes, entry 1, must be the name of a file"),
        ("[[member]]\nkind = ['decoder']", 65, "there is no kind"),
        ("[[member]]\nname = 'a'", 65, '[[member]] number 1 needs "kind"'),
        ("[[member]]\nkind = 'default'\nname = 'a'", 65, "takes no other keys"),
        ("[[member]]\nkind = 'external'\nname = 'a'\noof = 'a.csv'", 65, '[[member]] number 1 needs "test"'),
        ("[[member]]\nkind = 'lexical'\nname = '-x'", 65, "no - in front"),
        ("[[member]]\nkind = 'lexical'\nname = 5", 65, "the name 5 must be"),
        ("[[member]]\nkind = 'lexical'\nname = 'stack'", 65, "Choose another name"),
        (f"[[member]]\nkind = 'lexical'\nname = '{'x' * 300}'", 65, "up to 100 letters"),
        (f"{DECODER}lora = 3", 65, "lora must be a table"),
        (f"{TRAINING}warmup = 2", 2, "number 1, [member.training] warmup must be a number from 0 to below 1, not 2"),
        (f"{TRAINING}warmups = 2", 65, '[member.training] has no key "warmups". Did you mean "warmup"?'),
        (f"{TRAINING}report_to = ['tensorbord']", 2, 'no tracker "tensorbord". Did you mean "tensorboard"?'),
        ("[tracking]\nreport_to = ['mlfow']", 2, 'no tracker "mlfow". Did you mean "mlflow"?'),
        ("[[member]]\nkind = 'no.py:Class'", 66, "[[member]] number 1: "),
        ("[data]\ntrain = '~nobody-of-that-name/train.csv'", 66, "Write the whole path."),
    ],
)  # fmt: skip
def test_what_makes_no_sense(tmp_path, content, status, sentence):
    with pytest.raises(StackllmError) as caught:
        read(tmp_path, content)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == status


BROKEN = {
    "backslash": (
        b'[data]\ntrain = "C:\\Data\\train.csv"\n',
        r"single quotes, 'C:\\Data\\train.csv'",
    ),
    "users": (b'[data]\ntrain = "C:\\Users\\me.csv"\n', '"C:/Users/me.csv"'),
    "escapes": (b'[data]\ntrain = "C:\\new\\train.csv"\n', "in single quotes"),
    "latin": (b"[run]\nfolds = 3 # \xe9\n", "not UTF-8 .* Save it as UTF-8"),
    "utf16": ("[run]\nfolds = 3\n".encode("utf-16"), "not UTF-8 .* Save it as UTF-8"),
    "twice": (b"[run]\nfolds = 3\nfolds = 4\n", "not a TOML file"),
    "no equals": (b"[run]\nfolds 4\n", "Mend that line: folds 4"),
    "deep": (b"a = " + b"[" * 5000, "not a TOML file"),
    "endless": (b"[run]\nfolds = " + b"9" * 5000, "not a TOML file"),
    "unknown": (b"[rnu]\nfolds = 3\n", r"there is no section \[rnu\]"),
    "type": (b"[stack]\nn_trees = '3'\n", "n_trees must be a whole number"),
    "member": (b"[[member]]\nkind = 'lexicl'\n", "there is no kind"),
}
COMMANDS = [
    ["features"], ["stack"], ["pseudo"], ["run"], ["predict", "test.csv"], ["optim", "sub.csv"],
]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_every_command_refuses_a_settings_file_with_the_same_sentence(kaggle, name):
    content, sentence = BROKEN[name]
    (kaggle / "stackllm.toml").write_bytes(content)
    said = set()
    for command in COMMANDS:
        error = CliRunner().invoke(cli, command).exception
        assert isinstance(error, StackllmError), command
        said.add((error.exit_code, str(error)))
    with pytest.raises(StackllmError, match=sentence):
        read_settings(None, {})
    assert len(said) == 1
    assert not (kaggle / "artifacts").exists()


def test_asked_recipes_are_read_by_the_same_reader(tmp_path):
    path = tmp_path / "clear.toml"
    path.write_bytes(b"\xef\xbb\xbfinstruction = 'Is it clear?'\nscale = [1, 5]\n")
    assert read_asked(path).instruction == "Is it clear?"
    for content, sentence in (
        (b'instruction = "C:\\Data"\n', "in single quotes, 'C:\\\\Data'"),
        (b"instruction = '\xe9'\n", "not UTF-8"),
        (b"instruction 'x'\n", "Mend that line"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"clear\.toml: .*{sentence}"):
            read_asked(path)
    path.unlink()
    with pytest.raises(MissingInputError, match=r"clear\.toml: there is no such file"):
        read_asked(path)
    path.mkdir()
    with pytest.raises(DataError, match="this is a folder"):
        read_asked(path)


def test_a_folder_and_a_link_to_nowhere_are_no_settings_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stackllm.toml"
    path.symlink_to(tmp_path / "nowhere")
    for read_it in (lambda: read_settings(None, {}), given_data):
        with pytest.raises(MissingInputError, match=r"stackllm\.toml: there is no such file"):
            read_it()
    path.unlink()
    path.mkdir()
    for read_it in (lambda: read_settings(None, {}), given_data):
        with pytest.raises(DataError, match=r"stackllm\.toml: this is a folder"):
            read_it()


@given(st.text(max_size=40).map(str.encode) | st.binary(max_size=40))
def test_any_file_is_read_or_refused_with_a_sentence(tmp_path_factory, content):
    try:
        settings = read(tmp_path_factory.getbasetemp(), content)
    except StackllmError as error:
        settings = str(error)
    assert isinstance(settings, Settings) or "stackllm.toml: " in settings


def test_options_win_and_are_called_by_their_flags(tmp_path):
    content = "[run]\nfolds = 3\n[data]\nid = 'a'\n"
    settings = read(tmp_path, content, {"run": {"folds": 4}, "data": {"csv_safe": True}})
    assert (settings.run.folds, settings.data.id, settings.data.csv_safe) == (4, "a", True)
    for section, name, value in (
        ("run", "folds", 0),
        ("server", "max_requests", -1),
        ("data", "id", ""),
    ):
        with pytest.raises(
            UsageError, match=f"^the setting {name} must be .*, not {json.dumps(value)}"
        ):
            read(tmp_path, content, {section: {name: value}})
    with pytest.raises(
        UsageError, match=r"^the setting recipes, entry 2, must be the name of a file"
    ):
        read(tmp_path, content, {"recipes": {"files": ("a.py", "")}})


def test_an_option_that_no_setting_is_called_like_is_not_passed_over(tmp_path):
    with pytest.raises(UsageError, match=r"no option sets \[rnu\]. Did you mean \"run\"\?"):
        read(tmp_path, "", {"rnu": {"folds": 3}})
    with pytest.raises(UsageError, match=r'\[run\] has no key "fold"'):
        read(tmp_path, "", {"run": {"fold": 3}})


def test_options_do_not_mend_a_file(tmp_path):
    with pytest.raises(UsageError, match=r"stackllm.toml: \[run\] folds must be"):
        read(tmp_path, "[run]\nfolds = 0", {"run": {"folds": 3}})


def test_a_backbone_on_the_command_line_wins_over_none(kaggle):
    settings = read(kaggle, "[encoder]\nbackbone = 'none'", {"encoder": {"backbone": "/no/such"}})
    assert settings.encoder.backbone == "/no/such"
    assert {member.kind for member in settings.members} == {"lexical", "frozen", "features"}
    error = CliRunner().invoke(cli, ["stack", "--backbone", "/no/such", "--quiet"]).exception
    assert isinstance(error, MissingInputError)
    assert 'backbone "/no/such": there is no such folder' in str(error)


@pytest.mark.parametrize(
    "members", ["", "[[member]]\nkind = 'default'\n[[member]]\nkind = 'lexical'\nname = 'a'\n"]
)
@pytest.mark.parametrize("overrides", [{}, {"encoder": {"backbone": "none"}}])
def test_what_falls_away_without_a_backbone_is_said(tmp_path, members, overrides):
    section = "" if overrides else "[encoder]\nbackbone = 'none'\n"
    settings = read(tmp_path, section + members, overrides)
    assert settings.encoder is None
    assert "frozen" not in {member.kind for member in settings.members}
    assert len(settings.notes) == 1
    assert "the default members frozen and frozen_centred are left out" in settings.notes[0]


def test_a_frozen_member_that_is_asked_for_needs_a_backbone(tmp_path):
    frozen = "[[member]]\nkind = 'frozen'\nname = 'mine'\n"
    assert read(tmp_path, frozen).members[0].name == "mine"
    with pytest.raises(UsageError, match=r'the member "mine" reads with .* the setting backbone'):
        read(tmp_path, f"[encoder]\nbackbone = 'none'\n{frozen}")
    with pytest.raises(UsageError, match='the member "mine"'):
        read(tmp_path, frozen, {"encoder": {"backbone": "none"}})
    assert read(tmp_path, "[encoder]\nbackbone = 'none'\n[[member]]\nkind = 'lexical'").notes == ()


def test_file_names_are_relative_to_the_file_that_holds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    content = (
        "recipes = ['a.py', '~/b.py']\n[data]\ntrain = 'data/train.csv'\ntest = '~/test.csv'\n"
        "sample = '/s.csv'\n[[member]]\nkind = 'external'\nname = 'x'\noof = '../o.csv'\ntest = '~/t.csv'\n"
    )
    (tmp_path / "sub" / "stackllm.toml").write_text(content)
    overrides = {"recipes": {"files": ("c.py", "~/d.py")}}
    settings = read_settings(Path("sub/stackllm.toml"), overrides)
    home = str(tmp_path / "home")
    assert settings.data.train == str(Path("sub/data/train.csv"))
    assert (settings.data.test, settings.data.sample) == (f"{home}/test.csv", "/s.csv")
    assert settings.external[0].oof == str(Path("sub/../o.csv"))
    assert settings.external[0].test == f"{home}/t.csv"
    assert settings.recipes == (str(Path("sub/a.py")), f"{home}/b.py", "c.py", f"{home}/d.py")
    moved = read_settings(None, {"data": {"train": "~/train.csv"}, "rater": {"backbone": "~/llm"}})
    assert (moved.data.train, moved.rater.backbone) == (f"{home}/train.csv", f"{home}/llm")


def test_what_the_project_says_of_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert given_data() == {}
    (tmp_path / "stackllm.toml").write_bytes(b"\xef\xbb\xbf[data]\ntest = 't.csv'\nid = 'key'\n")
    assert given_data() == {"test": "t.csv", "id": "key"}


def reference():
    script = Path(__file__).parents[1] / "docs" / "make_settings.py"
    spec = importlib.util.spec_from_file_location("make_settings", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_classes_say():
    made = reference()
    assert made.TARGET.read_text() == made.page(), "run make docs"
    for params in CLASSES.values():
        names = [name for entry, _ in made.described(params) for name in entry]
        assert sorted(names) == sorted(hints_of(params)), params.__name__


def test_the_default_blocks_copied_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = reference()
    (tmp_path / "stackllm.toml").write_text(made.defaults() + made.members())
    copied, default = read_settings(None, {}), Settings()
    assert copied == default
    for entry in dataclasses.fields(Settings):
        assert digest(getattr(copied, entry.name)) == digest(getattr(default, entry.name))
    for kind in KINDS:
        settings = read(tmp_path, made.every_setting_of(kind))
        assert settings.members[0].params == KINDS[kind].params()


def test_optim_starts_without_the_reader_of_settings(tmp_path):
    rows = "".join(f"{i},{i // 2},0.4,0.6\n" for i in range(8))
    (tmp_path / "sub.csv").write_text(f"id,group,a,b\n{rows}")
    code = (
        "import sys; from stackllm.cli import cli; cli(['optim', 'sub.csv'], standalone_mode=False); "
        "print({'pydantic', 'torch', 'sklearn', 'stackllm.settings'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n")


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda name: name == "wandb")
    with pytest.raises(MissingInputError, match="pip install tensorboard"):
        read(tmp_path, f"{TRAINING}report_to = ['tensorboard']")
    settings = read(tmp_path, f"{TRAINING}report_to = ['wandb']")
    assert settings.members[0].params.training.report_to == ("wandb",)


def test_a_file_that_windows_has_marked(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf[run]\nfolds = 3\n").run.folds == 3


def test_backbones_are_found_from_where_the_settings_stand(tmp_path, monkeypatch):
    (tmp_path / "sub" / "tiny").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    content = '[encoder]\nbackbone = "./tiny"\n[rater]\nbackbone = "tiny"\n' + DECODER
    (tmp_path / "sub" / "stackllm.toml").write_text(f'{content}backbone = "../tiny"\n')
    settings = read_settings((tmp_path / "sub" / "stackllm.toml").relative_to(tmp_path), {})
    assert settings.encoder.backbone == "./sub/tiny"
    assert settings.rater.backbone == "./sub/tiny"
    assert settings.members[0].params.backbone == "./tiny"
    shutil.rmtree(tmp_path / "sub" / "tiny")
    with pytest.raises(MissingInputError, match="there is no such folder"):
        find_backbone(settings.encoder.backbone)


def test_weights_that_change_are_seen_at_once(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = revision_of(str(tmp_path))
    assert revision_of(str(tmp_path)) == before
    weights.write_bytes(b"two")
    assert revision_of(str(tmp_path)) != before


def test_names_in_the_hub_and_whole_paths_stay_as_they_are(tmp_path):
    for name in ("smollm2", "none", "HuggingFaceTB/SmolLM2-135M", str(tmp_path)):
        assert anchored(name, tmp_path / "elsewhere") == name


@pytest.mark.parametrize("name", ["bad name!", "nöne", "a/b/c", "./nope"])
def test_backbones_that_nothing_can_be_called(name):
    with pytest.raises(MissingInputError, match="there is no such folder"):
        find_backbone(name)


@pytest.mark.parametrize("name", ["", "none"])
def test_a_decoder_needs_a_backbone(name):
    with pytest.raises(UsageError, match="is none to read with"):
        find_backbone(name)


def test_numbers_may_be_written_without_a_point(tmp_path):
    settings = read(tmp_path, "[[member]]\nkind = 'frozen'\nc = [1, 0.5]\n")
    assert settings.members[0].params.c == (1.0, 0.5)
    with pytest.raises(DataError, match="c must be a list of one or more, each a number"):
        read(tmp_path, "[[member]]\nkind = 'frozen'\nc = 1\n")


def test_what_a_run_noted_is_read_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        'recipes = ["mine.py"]\n[run]\nfolds = 3\n[rater]\nask = ["gpt_rating"]\nurl = "https://h/v1"\nmodel = "m"\n'
        '[server]\nmax_tokens = 2000\nextra = {reasoning_effort = "low"}\n'
        '[[member]]\nkind = "default"\n[[member]]\nkind = "decoder"\nname = "d"\nseeds = [1, 2]\n'
        '[member.training]\noptimizer = "adamw_8bit"\n'
        '[[member]]\nkind = "external"\nname = "x"\noof = "a.csv"\ntest = "b.csv"\n'
    )
    plain = '[encoder]\nbackbone = "none"\n[[member]]\nkind = "lexical"\n'
    for content in ("", text, plain):
        (tmp_path / "stackllm.toml").write_text(content)
        settings = read_settings(tmp_path / "stackllm.toml", {})
        noted = json.loads(json.dumps(dataclasses.asdict(settings)))
        read = make_settings(as_written(noted))
        assert read == dataclasses.replace(settings, notes=read.notes)
