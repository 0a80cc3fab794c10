"""The architecture, read from the source: who may import whom, which door is whose, what is never done."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stores", "flows")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
TREES = {name: ast.parse(file.read_text()) for name, file in zip(NAMES, FILES, strict=True)}

FORBIDDEN = {
    "pipeline": {"stores", "flows", "prefect"},
    "stores": {"pipeline", "flows", "prefect", "torch"},
    "flows": set(),
}
DOORS = {
    "transformers": {"pipeline/policy.py", "pipeline/pretrained.py", "pipeline/embedded/warm_start.py"},
    "peft": {"pipeline/pretrained.py"},
    "tokenizers": {"pipeline/embedded/warm_start.py"},
    "datasets": {"pipeline/prompts.py"},
    "reasoning_gym": {"pipeline/gym.py", "pipeline/verifiers.py"},
    "vllm": {"pipeline/generation/vllm.py"},
    "httpx": {"pipeline/generation/server.py", "flows/deploy.py"},
    "faiss": {"stores/index.py", "stores/foreign.py"},
    "sqlalchemy": {
        *(f"stores/{name}.py" for name in ("catalog", "database", "leases", "rows", "schema", "migrations/__init__")),
        *(f"stores/migrations/versions/{name}.py" for name in ("v0001_artifacts", "v0002_seals")),
    },
    "alembic": {
        *(f"stores/migrations/{name}.py" for name in ("__init__", "env")),
        *(f"stores/migrations/versions/{name}.py" for name in ("v0001_artifacts", "v0002_seals")),
    },
    "fsspec": {"stores/remote.py"},
    "prefect": {f"flows/{name}.py" for name in ("cluster", "deploy", "deployments", "orchestration", "pages")},
    "prefect_ray": {"flows/cluster.py"},
    "ray": {"flows/cluster.py"},
    "accelerate": {"flows/tracking.py"},
    "mlflow": {"flows/tracking.py"},
    "trackio": {"flows/tracking.py"},
    "rich": {"flows/progress.py"},
    "pebble": {"pipeline/rewards.py"},
}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "torch.save", "torch.load"}
UNSAFE_OPTIONS = {"allow_pickle", "weights_only", "trust_remote_code"}  # only ever as False, True, False
LONGEST = 250
TOO_LONG = {"flows/config.py": "every key of a run, its default and its checks, side by side"}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_one_way(name):
    """``pipeline`` and ``stores`` know neither each other nor what composes them; stores know no torch."""
    assert not imported(TREES[name]) & FORBIDDEN[name.split("/")[0]]


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_heavy_library_has_its_doors(library):
    """A heavy library is imported by its door and by nothing else."""
    assert {name for name, tree in TREES.items() if library in imported(tree)} == DOORS[library]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_unpickled_or_evaluated(name):
    """No file loads code with its data: no pickle, no torch.save or torch.load, no eval, no exec."""
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}
    options = {
        (word.arg, ast.unparse(word.value))
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg in UNSAFE_OPTIONS
    }
    assert not imported(TREES[name]) & UNSAFE_MODULES
    assert not calls & UNSAFE_CALLS
    assert options <= {("allow_pickle", "False"), ("weights_only", "True"), ("trust_remote_code", "False")}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_short_and_named_for_what_they_do(name):
    """A file has at most 250 lines, or a reason, and none is a drawer for leftovers."""
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST or name in TOO_LONG
    assert Path(name).stem not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_what_it_is(name):
    """Every file with code begins with a docstring."""
    assert not TREES[name].body or ast.get_docstring(TREES[name])


def test_computing_and_keeping_do_not_start_prefect():
    """Importing all of ``pipeline`` and ``stores`` loads neither Prefect nor an inference engine."""
    names = [
        name for name in NAMES if not name.startswith("flows") and name != "stores/migrations/env.py"
    ]  # alembic runs it
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in names]
    program = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"prefect", "vllm"} & {module.split(".")[0] for module in loaded.stdout.split()}
