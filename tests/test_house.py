"""The rules of the house: who may import whom, how long things are, what is public, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nearkin
import nearkin.functional

SOURCE = Path(nearkin.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Each room may import the rooms before it in this list, and itself.
FLOORS = [
    {
        "errors",
        "types",
        "files",
        "process",
        "functional",
        "hints",
        "imports",
        "catalogue",
        "config",
        "settings",
        "device",
        "distributed",
        "yaml_files",
    },
    {"bank", "teacher", "network"},
    {"objectives"},
    {"data"},
    {"evaluation"},
    {"export"},
    {"report"},  # takes plain values, so that all that trains can use it
    {"training"},
    {"doctor"},
    {"comparison"},
    {"contrib"},
    {"cli"},
    {"__main__", "__init__"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Every module that a file imports at run time; `if TYPE_CHECKING` does not count."""
    found: set[str] = set()
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(path: Path, tree: ast.AST) -> set[str]:
    mine = FLOOR[room(path)]
    rooms = {m.split(".")[1] for m in imports(tree) if m.startswith("nearkin.")}
    return {r for r in rooms if r in FLOOR and FLOOR[r] > mine}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    assert room(path) in FLOOR, f"{path} is in a room that FLOORS does not know"
    assert upward(path, ast.parse(path.read_text())) == set()


def test_an_upward_import_would_be_found():
    tree = ast.parse("def f():\n    from nearkin.training import loop\n")
    assert upward(SOURCE / "bank.py", tree) == {"training"}


def test_data_and_objectives_do_not_know_each_other():
    for path in FILES:
        if room(path) == "data":
            known = {
                m.split(".")[1] for m in imports(ast.parse(path.read_text())) if "nearkin." in m
            }
            assert known <= {"data", "types", "config", "errors", "files", "imports", "process"}, (
                path
            )


def test_functional_imports_torch_only():
    for path in FILES:
        if room(path) == "functional":
            tops = {m.split(".")[0] for m in imports(ast.parse(path.read_text()))}
            assert tops - set(sys.stdlib_module_names) <= {"torch", "jaxtyping", "nearkin"}, path


def functions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstring_lines(tree: ast.AST) -> int:
    """Lines of all docstrings in a file."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [n.body[0] for n in ast.walk(tree) if isinstance(n, owners) and ast.get_docstring(n)]
    return sum((node.end_lineno or 0) - node.lineno + 1 for node in first)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") - docstring_lines(tree) <= 400
    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= 50, f"{path.name}:{function.lineno} {function.name} has {length} lines"


FORBIDDEN = ("pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal")


def test_nothing_runs_foreign_code():
    for path in FILES:
        text = path.read_text()
        tree = ast.parse(text)
        assert not {m.split(".")[0] for m in imports(tree)} & set(FORBIDDEN), path
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        names = [ast.unparse(call.func) for call in calls]
        assert not {"eval", "exec", "os.system", "torch.jit.load", "torch.hub.load"} & set(names), (
            path
        )
        for name, call in zip(names, calls, strict=True):
            if name == "torch.load":
                assert path.name == "tensor_files.py"
                assert "weights_only=True" in ast.unparse(call)
            assert "allow_pickle=True" not in ast.unparse(call), path


def test_the_public_names():
    assert sorted(nearkin.__all__) == [
        "Classifier",
        "Comparison",
        "ConfigError",
        "DataError",
        "DivergedError",
        "Evaluation",
        "ExportError",
        "FewShot",
        "ModelError",
        "NearkinError",
        "Prediction",
        "Result",
        "ResumableError",
        "Stopped",
        "__version__",
        "compare",
        "evaluate",
        "fewshot",
        "load",
        "predict",
        "train",
    ]
    for name in nearkin.__all__:
        assert getattr(nearkin, name) is not None


def test_all_that_ends_with_75_can_be_caught_at_once():
    """A caller may then start the same run again, as a scheduler does."""
    from nearkin.data.loader import WorkersDied
    from nearkin.errors import ProcessDied, ProcessHangs
    from nearkin.files import SaveFailed

    for error in (nearkin.Stopped, SaveFailed, WorkersDied, ProcessDied, ProcessHangs):
        assert issubclass(error, nearkin.ResumableError)
        assert error.code == 75


def test_no_room_hides_a_public_function():
    """Importing a package `nearkin.train` would replace the function of that name."""
    program = (
        "import nearkin, nearkin.training.api, nearkin.evaluation.evaluate; "
        "print(all(callable(getattr(nearkin, n)) for n in ('train', 'evaluate', 'predict')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
    rooms = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in FILES}
    assert not rooms & set(nearkin.__all__)


def test_the_public_functions():
    expected = set(
        "supcon_out supcon_in instance_nce sincere schane sigsup neighbour_nll neighbour_target consistency_kl "
        "symmetric_ce triplet_batch_hard cosface_logits arcface_logits gpaco varcon "
        "orthogonal_projection PerAnchor SoftPairs mean_valid cross_entropy soft_pairs".split()
    )
    assert expected <= set(nearkin.functional.__all__)  # relied upon by others
    for name in expected:
        assert getattr(nearkin.functional, name).__doc__


HEAVY = (
    "torch",
    "numpy",
    "timm",
    "lightning_fabric",
    "matplotlib",
    "sklearn",
    "PIL",
    "pydantic",
    "rich",
    "jinja2",
)


@pytest.mark.parametrize("code", ["import nearkin", "from nearkin.cli import run; run(['--help'])"])
def test_importing_and_helping_load_nothing_heavy(code):
    program = f"import sys; {code}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_train_loads_no_torch():
    program = (
        "import sys; from nearkin.cli import run; run(['train', '--help']); "
        "print([m for m in ('torch', 'timm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--batch-size" in done.stdout
