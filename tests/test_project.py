"""The project around the code: public names, style, types, and the commands people are told to run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparc_fast as sf
from sparc_fast.ops import backends, reference

ROOT = Path(__file__).parents[1]


def test_public_names() -> None:
    assert sf.__all__ == [
        "SPARC",
        "SparcAdam",
        "SparcLoss",
        "SparcOutput",
        "SparseLatents",
        "__version__",
        "attribution",
        "available_backends",
        "compat",
        "data",
        "demo",
        "distributed",
        "evaluate",
        "explain",
        "extract",
        "functional",
        "fvu",
        "interop",
        "nmse",
        "planning",
        "training",
    ]
    assert dir(sf) == sf.__all__
    assert all(hasattr(sf, name) for name in sf.__all__)
    with pytest.raises(AttributeError, match="module 'sparc_fast' has no attribute 'utils'"):
        sf.utils  # noqa: B018


def test_importing_the_package_needs_only_torch_and_numpy_and_its_modules_are_loaded_on_first_use() -> None:
    optional = ["matplotlib", "sklearn", "skimage", "rich", "safetensors", "jinja2", "triton", "h5py", "pandas"]
    optional.append("huggingface_hub")
    later = [
        f"sparc_fast.{n}"
        for n in ("attribution", "compat", "data", "demo", "evaluate", "explain", "extract", "interop", "training")
    ]
    code = (
        "import sys, torch; loaded = set(sys.modules); import sparc_fast as sf; "
        f"early = [name for name in {optional + later} if name in set(sys.modules) - loaded]; "
        "print(early, sf.compat.get_sae_model_class.__name__, sf.data.open.__name__, sf.data.glyphs.__name__, "
        "sf.evaluate.table.__name__, sf.explain.write_report.__name__, sf.training.Trainer.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] get_sae_model_class open glyphs table write_report Trainer"


@pytest.mark.parametrize(
    "line",
    [
        "from sparc_fast.compat import MultiStreamSparseAutoencoder, get_sae_model_class, unit_norm_decoder_",
        "import sparc_fast.compat",
        "from sparc_fast.convert import from_upstream, read_config, to_upstream",
        "from sparc_fast.data import AlignedFiles, Loader, glyphs, open",
        "from sparc_fast.evaluate import evaluate, table",
        "from sparc_fast.functional import global_topk",
        "from sparc_fast.training import Config, Trainer, read_metrics",
    ],
)
def test_what_the_documentation_imports_can_be_imported(line: str) -> None:
    exec(line, {})


def test_every_module_people_import_from_says_what_is_public() -> None:
    for folder in ("attribution", "cli", "data", "demo", "evaluate", "explain", "interop"):
        for path in (ROOT / "sparc_fast" / folder).glob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            module = importlib.import_module(name)
            assert sorted(module.__all__) == sorted(set(module.__all__)), name
            assert all(hasattr(module, public) for public in module.__all__), name


def test_every_folder_of_the_package_is_installed() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    folders = {path.parent.name for path in (ROOT / "sparc_fast").glob("*/__init__.py")}
    assert not [folder for folder in sorted(folders) if f'"sparc_fast.{folder}",' not in listed]


def test_sources_that_hide_a_compiled_installation_say_once_what_to_do(tmp_path: Path) -> None:
    compiled = importlib.util.find_spec("sparc_fast._cpu")
    if compiled is None or compiled.origin is None:
        pytest.skip("nothing is compiled here")
    for place in ("checkout", "site"):
        shutil.copytree(ROOT / "sparc_fast", tmp_path / place / "sparc_fast", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(compiled.origin, tmp_path / "site" / "sparc_fast")
    others = [path for path in sys.path if path and not (Path(path) / "sparc_fast").exists()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *others])}

    def warnings_in(folder: Path) -> str:
        code = "import sparc_fast, sparc_fast.data; print(sparc_fast.__file__)"
        command = [sys.executable, "-S", "-c", code]  # -S: no editable installation joins in
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(tmp_path / ("checkout" if folder.name == "checkout" else "site")))
        return done.stderr

    said = warnings_in(tmp_path / "checkout")
    assert said.count("UserWarning") == 1
    assert (
        f"instead of {tmp_path / 'site' / 'sparc_fast'}, where it is installed: start Python in another folder" in said
    )
    assert f"pip install -e {tmp_path / 'checkout'}" in said
    assert warnings_in(tmp_path) == ""


def test_the_reference_speaks_the_whole_vocabulary_of_backends() -> None:
    vocabulary = [name for name in vars(backends.Backend) if not name.startswith("_")]
    assert len(vocabulary) > 10
    assert all(callable(getattr(reference, name)) for name in vocabulary)


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_style_and_types_are_clean(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith(".venv/bin/pytest")
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_the_map_of_the_code_names_every_place_and_only_places_there_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`([\w./]+)`", text[text.index("| place |") : text.index("One operator has one name")])
    places = [path for path in (ROOT / "sparc_fast").glob("*.py") if path.name != "__init__.py"]
    places += [path.parent for path in (ROOT / "sparc_fast").glob("*/__init__.py") if path.parent.name != "ops"]
    places += [path for path in (ROOT / "sparc_fast" / "ops").glob("*.py") if path.name != "__init__.py"]
    assert {path.name for path in places} <= {name.rstrip("/").split("/")[-1] for name in names}
    assert not [name for name in names if "/" in name and not (ROOT / name).exists()]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Wherever in a file: in functions, for types alone, by a name in a string. The package's own face loads on use."""
    files = [path for top in ("sparc_fast", "kernels", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for path, module in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())) if module != "sparc_fast" else ():
            for name in imported(node, package):
                name = name.replace("sparc_fast.kernels", "kernels").replace("sparc_fast.benchmarks", "benchmarks")
                while name and name not in modules.values():
                    name = name.rpartition(".")[0]
                if name not in ("", module, "sparc_fast"):
                    sorter.add(module, name)
    sorter.prepare()


def imported(node: ast.AST, package: str) -> list[str]:
    """What an import, or a call of import_module, names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        return [".".join(filter(None, (above, node.module, alias.name))) for alias in node.names]
    match node:
        case ast.Call(ast.Name("import_module") | ast.Attribute(attr="import_module"), [ast.Constant(str(name)), *_]):
            return [f"{package}{name}" if name.startswith(".") else name]
    return []
