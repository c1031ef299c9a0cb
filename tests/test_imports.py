"""timm and torchvision are imported without torch's compiler, and work with it afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def fresh(program, **env):
    """Run `program` in a fresh process; it must end well. Its output."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EAGER = """
import sys, torch
from nearkin.imports import import_eager

timm = import_eager("timm")
functional = import_eager("torchvision.transforms.v2.functional")
assert timm is sys.modules["timm"] and timm.is_model("resnet18")
model = timm.create_model("test_resnet", num_classes=2).eval()
with torch.inference_mode():
    model(functional.resize(torch.zeros(1, 3, 64, 64), [32]))
print([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "sympy"))])
print("_dynamo" in vars(torch))

# Now the compiler: it is the real one, and the functions that were given out find it.
roi_align, naflexvit = sys.modules["torchvision.ops.roi_align"], sys.modules["timm.models.naflexvit"]
supported = roi_align.is_compile_supported("cpu")
import torch._dynamo
assert torch._dynamo.__file__
assert supported == torch._dynamo.utils.is_compile_supported("cpu")
functional.resize(sys.modules["torchvision.tv_tensors"].Image(torch.zeros(3, 8, 8)), [4])
compiled = torch.compile(model, backend="eager")
compiled(torch.zeros(1, 3, 32, 32))
"""


def test_the_compiler_is_loaded_when_something_is_compiled():
    assert fresh(EAGER).splitlines() == ["[]", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["timm", "torch._dynamo", "torchvision"])
def test_modules_that_the_caller_has_imported_stay_as_they_are(first):
    fresh(
        f"import sys, {first}\n"
        f"before = sys.modules['{first}']\n"
        "from nearkin.imports import import_eager\n"
        "assert import_eager('timm') is sys.modules['timm']\n"
        f"assert sys.modules['{first}'] is before\n"
        "import torch._dynamo\n"
        "assert torch._dynamo.__file__\n"
    )


def test_a_package_that_needs_more_of_the_compiler_is_imported_with_it(tmp_path):
    (tmp_path / "torch" / "_dynamo").mkdir(parents=True)  # stands for torch: this is about modules
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "_compile.py").write_text("_disable_dynamo = None\n")
    (tmp_path / "torch" / "_dynamo" / "__init__.py").write_text("config = 'real'\n")
    (tmp_path / "package.py").write_text("from torch._dynamo import config\n")
    program = "from nearkin.imports import import_eager; print(import_eager('package').config)"
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    assert fresh(program, PYTHONPATH=path) == "real\n"
