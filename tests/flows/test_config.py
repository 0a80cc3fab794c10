"""Settings: what is read is what is meant, and what is not understood is refused by name."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config import Config, ConfigError, load_config, recipes, to_toml

MINIMAL: dict[str, Any] = {
    "name": "x",
    "policy": {"checkpoint": "somewhere"},
    "prompts": {
        "pool": [{"path": "a.jsonl"}],
        "validation": {"v": [{"path": "b.jsonl"}]},
        "test": [{"path": "c.jsonl"}],
    },
}
EMBEDDED = '\nname = "x"\npolicy.checkpoint = "embedded"\nprompts.source = "embedded"\n'
Read = Callable[[str], Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads the embedded settings with some text after, or instead of, them."""

    def of(text: str) -> Config:
        file = tmp_path / "x.toml"
        file.write_text(text if "name" in text else EMBEDDED + text)
        return load_config(file)

    return of


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads(name: str):
    """Each recipe is read by its name, and the files that it names come with it."""
    config = load_config(name)
    sources = [*config.prompts.pool, *config.prompts.test, *(s for v in config.prompts.validation.values() for s in v)]
    paths = [Path(s["path"]) for s in sources if not s["path"].startswith("reasoning-gym/")]
    assert all(path.is_file() for path in paths)
    assert all("/" in str(path) for path in paths)


def test_there_are_recipes():
    """The default recipe and the one of a pretrained model come with the package."""
    assert {"embedded", "smollm2"} <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_resolved_settings_read_back_the_same(name: str, tmp_path: Path):
    """What is written with a run is the same settings when read, every default spelled out."""
    config = load_config(name)
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "resolved.toml") == config
    written = tomllib.loads(to_toml(config))
    assert set(written) == set(Config.model_fields)
    assert written["train"]["save_every"] == config.train.save_every


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("sede = 1", "sede", "'seed'"),
        ("[trian]\nlr = 1.0", "trian", "'train'"),
        ("[train]\nlearning_rate = 1.0", "train.learning_rate", "known keys here: stages, batch"),
        ("[select]\nshares = 0.1", "select.shares", "'share'"),
        ("[evidence]\nrollout = 4", "evidence.rollout", "'rollouts'"),
        ("[policy.lora]\nrnak = 4", "policy.lora.rnak", "'rank'"),
    ],
)
def test_unknown_keys_are_refused_with_the_near_one(read: Read, text: str, key: str, remedy: str):
    """An unknown key or section at any level fails, named in full, with the key that was perhaps meant."""
    text = text.replace("[policy.lora]\n", "policy.lora.")
    with pytest.raises(ConfigError) as refused:
        read(text)
    assert repr(key) in str(refused.value)
    assert remedy in str(refused.value)


def test_every_problem_is_named_at_once(read: Read):
    """A file with several mistakes is refused with all of them, a line each, beginning with the file."""
    with pytest.raises(ConfigError) as refused:
        read("[train]\nlr = -1\nbatsh = 2\n[select]\nshare = 2")
    lines = str(refused.value).splitlines()
    assert len(lines) == 3 and all("x.toml: " in line for line in lines)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("[select]\nshare = 0", "select.share", "0"),
        ("[select]\nfloor = 1.5", "select.floor", "1.5"),
        ("[train]\nlr = 0", "train.lr", "0"),
        ("[train]\nrollouts = 1", "train.rollouts", "1"),
        ('[train]\nsampler = "luck"', "train.sampler", "luck"),
        ("[insight]\nmu = 3.0", "insight.mu", "3.0"),
        ("[diem]\nstrength = 2", "diem.strength", "2"),
        ("[beliefs]\ndiscount = 0", "beliefs.discount", "0"),
        ("[sampling]\ntemperature = 0", "sampling.temperature", "0"),
        ('[features]\ndim = "wide"', "features.dim", "wide"),
        ('[evidence]\nsource = "guess"', "evidence.source", "guess"),
        ("[verifiers]\ntimeout = -1", "verifiers.timeout", "-1"),
    ],
)
def test_values_out_of_range_are_refused(read: Read, text: str, key: str, value: str):
    """A value that cannot be meant fails, with its key and itself."""
    with pytest.raises(ConfigError) as refused:
        read(text)
    assert f"{key}: " in str(refused.value)
    assert value in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": {}}, ("prompts", "pool", "validation", "test")),
        ({"prompts": {"source": "embedded"}}, ("prompts.source", "policy.checkpoint", "'somewhere'")),
        ({"evidence": {"source": "import"}}, ("evidence.source", "evidence.path")),
        ({"evidence": {"source": "collect", "path": "x"}}, ("evidence.source", "evidence.path", "'x'")),
        ({"train": {"stages": []}}, ("train.stages", "at least one stage")),
        ({"train": {"stages": [3, 0]}}, ("train.stages", "at least one step")),
    ],
)
def test_combinations_without_meaning_are_refused(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]):
    """Settings that contradict each other fail, naming the keys and what to change."""
    import tomli_w

    (tmp_path / "x.toml").write_text(tomli_w.dumps(MINIMAL | changes))
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "x.toml")
    assert all(word in str(refused.value) for word in words)


def test_a_missing_key_is_named(tmp_path: Path):
    """Settings without a checkpoint are refused by the name of that key."""
    (tmp_path / "x.toml").write_text('name = "x"\n[policy]\n[prompts]\nsource = "embedded"\n')
    with pytest.raises(ConfigError, match=r"policy\.checkpoint"):
        load_config(tmp_path / "x.toml")


def test_what_is_no_toml_is_refused_with_the_line(read: Read):
    """A file that is not TOML is refused with its name and the line."""
    with pytest.raises(ConfigError, match=r"x\.toml: not TOML: .*line 2"):
        read('name = "x"\npolicy =\n')


def test_an_unknown_recipe_names_the_known_ones():
    """A name that is neither a file nor a recipe is refused with the recipes that there are."""
    with pytest.raises(ConfigError, match="'embeded' is neither a file nor a recipe; recipes: embedded, smollm2"):
        load_config("embeded")


def test_a_file_wins_over_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file in the working directory is read before a recipe with the same name."""
    monkeypatch.chdir(tmp_path)
    Path("embedded").write_text(EMBEDDED.replace('"x"', '"mine"'))
    assert load_config("embedded").name == "mine"


def test_paths_mean_files_beside_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A path that is not found from the working directory, and is found beside the settings, is the one beside them."""
    import tomli_w

    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "a.jsonl").touch()
    (tmp_path / "settings" / "b.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    Path("b.jsonl").touch()
    (tmp_path / "settings" / "x.toml").write_text(tomli_w.dumps(MINIMAL))
    prompts = load_config("settings/x.toml").prompts
    assert prompts.pool[0]["path"] == "settings/a.jsonl"  # beside the settings only
    assert prompts.validation["v"][0]["path"] == "b.jsonl"  # in both places
    assert prompts.test[0]["path"] == "c.jsonl"  # nowhere: refused by name when it is read


def test_settings_cannot_be_changed(read: Read):
    """Settings are frozen once they are read."""
    with pytest.raises(ValueError, match="frozen"):
        read("").train.lr = 1.0


def test_a_chat_template_is_text_or_a_file(tmp_path: Path):
    """A template beside the settings is found from anywhere and read; text with braces is the template itself."""
    from flows.desk import read_template

    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    body = 'name = "x"\nprompts.source = "embedded"\npolicy.checkpoint = "embedded"\npolicy.chat = true\n'
    (tmp_path / "x.toml").write_text(body + 'policy.chat_template = "own.jinja"\n')
    assert read_template(load_config(tmp_path / "x.toml").policy.chat_template) == "{{ messages[0]['content'] }}"
    inline = "{% for m in messages %}" + "{{ m['content'] }}" * 50 + "{% endfor %}"
    (tmp_path / "y.toml").write_text(body + f'policy.chat_template = "{inline}"\n')
    assert read_template(load_config(tmp_path / "y.toml").policy.chat_template) == inline
    with pytest.raises(FileNotFoundError, match=r"policy\.chat_template = 'none\.jinja' is neither"):
        read_template("none.jinja")


def test_a_chat_template_without_chat_is_refused(tmp_path: Path):
    """A template that would never be used is refused when the file is read."""
    (tmp_path / "x.toml").write_text(
        'name = "x"\nprompts.source = "embedded"\npolicy.checkpoint = "embedded"\npolicy.chat_template = "{{ x }}"\n'
    )
    with pytest.raises(ConfigError, match=r"only used with policy\.chat = true"):
        load_config(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[generation]\nsequences = 8", "sequences = 8 is a setting of engine = 'vllm'"),
        ('[generation]\nengine = "vllm"\nurl = "http://x"', "url = 'http://x' is a setting of engine = 'server'"),
        ('[generation]\nengine = "server"', "url = ''.*give the address"),
        ('[generation]\nengine = "server"\nurl = "http://x"', "evidence.source = 'first_stage'.*only 'collect'"),
        ('[generation]\nengine = "vllm"\ndistributed_backend = "ray"', "tensor_parallel_size = 1.*needs no workers"),
        ('[generation]\nengine = "vllm"\nsleep = true', "policy.device = 'cpu'"),
        ("[features]\ncompare_full = true", "it needs .policy.lora.*'collect', 'import' or 'rescore'"),
    ],
)
def test_engines_are_set_up_as_they_can_be_meant(read: Read, text: str, said: str):
    """A setting of another engine, or a combination that no engine can follow, is refused with its value and a remedy."""
    with pytest.raises(ConfigError, match=re.compile(said, re.DOTALL)):
        read(text)


ON_GPUS = '[policy]\ncheckpoint = "somewhere"\ndevice = "cuda"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cluster]\nparts = 8", "parts = 8 without a runner: set runner = 'ray'"),
        ('[cluster]\nrunner = "ray"\naddress = "auto"', "address = 'auto' with catalog = ''.*in Postgres"),
        ('catalog = "postgresql://x/y"\n[cluster]\nrunner = "ray"\naddress = "auto"', "objects = ''.*a bucket"),
        ('[cluster]\nrunner = "ray"\ngpus = 1', "gpus = 1 with policy.device = 'cpu'.*or policy.device = 'cpu'"),
        (ON_GPUS + '[cluster]\nrunner = "ray"', "gpus = 0 with policy.device = 'cuda'.*give cluster.gpus = 1"),
        (ON_GPUS.replace("cuda", "cuda:1") + '[cluster]\nrunner = "ray"\ngpus = 1', "use policy.device = 'cuda'"),
        (ON_GPUS + '[cluster]\nrunner = "ray"\ngpus = 1.5', "gpus = 1.5.*give a whole number"),
        (
            ON_GPUS + '[generation]\nengine = "vllm"\ntensor_parallel_size = 2\n[cluster]\nrunner = "ray"\ngpus = 1',
            "tensor_parallel_size = 2 with cluster.gpus = 1.*give it as many",
        ),
        (
            ON_GPUS + '[generation]\nengine = "vllm"\ntensor_parallel_size = 2\ndistributed_backend = "ray"\n'
            '[cluster]\nrunner = "ray"\ngpus = 2',
            "distributed_backend = 'ray' with cluster.runner = 'ray'.*use distributed_backend = 'mp'",
        ),
        (
            ON_GPUS + '[features]\nranks = 2\n[cluster]\nrunner = "ray"\ngpus = 1',
            "ranks = 2 with cluster.gpus = 1.*give it as many",
        ),
        ('[timeouts]\ncollect = 60\n[cluster]\nrunner = "ray"', "timeouts = {'collect': 60.0} with.*leave out the one"),
    ],
)
def test_a_cluster_is_set_up_as_it_can_be_meant(tmp_path: Path, text: str, said: str):
    """Parts without a runner, several machines without shared stores, or accelerators that do not add up are refused."""
    import tomli_w

    settings = MINIMAL | tomllib.loads(text)
    (tmp_path / "x.toml").write_text(tomli_w.dumps(settings))
    with pytest.raises(ConfigError, match=re.compile(said, re.DOTALL)):
        load_config(tmp_path / "x.toml")


def test_a_cluster_that_can_be_meant_is_read(tmp_path: Path):
    """A Ray of this machine, and one of several with shared stores and two accelerators a part, are accepted."""
    import tomli_w

    far = 'catalog = "postgresql+psycopg://x/y"\nobjects = "s3://b/i"\n' + ON_GPUS + "[cluster]\ngpus = 2\n"
    for text in ('[cluster]\nrunner = "ray"', far + 'runner = "ray"\naddress = "ray://head:10001"'):
        (tmp_path / "x.toml").write_text(tomli_w.dumps(MINIMAL | tomllib.loads(text)))
        assert load_config(tmp_path / "x.toml").cluster.runner == "ray"


def test_the_address_of_a_server_holds_no_password(tiny: Config):
    """A password in generation.url is refused, and the refusal does not show it."""
    server = {"engine": "server", "url": "http://me:hunter2@host:8000"}
    with pytest.raises(ValueError, match=r"key_variable") as refused:
        Config.model_validate(tiny.model_dump() | {"generation": server})
    assert "key_variable" in refused.value.errors()[0]["msg"] and "hunter2" not in refused.value.errors()[0]["msg"]
