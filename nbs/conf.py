"""Sphinx settings: the site is the notebooks themselves, read through nbdev's own filters, with their saved outputs."""
import importlib
import json
import os
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here.parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def read_notebook(app, docname, source):
    """Replace a notebook's text, as Sphinx reads it, by what nbdev's filters (hide, show_doc) make of it."""
    from execnb.nbio import dict2nb, nb2dict
    from nbdev.processors import FilterDefaults, NBProcessor

    path = here / f"{docname}.ipynb"
    if not path.exists():
        return
    notebook = dict2nb(json.loads(source[0]))
    notebook.path_ = path
    module = re.search(r"#\|\s*default_exp\s+([\w.]+)", source[0])
    module = module and importlib.import_module(f"{cfg['lib_path']}.{module[1]}")
    exported = {c.id for c in notebook.cells if re.match(r"#\|\s*export", c.source)}
    filters = [f for f in FilterDefaults().procs() if f.__name__ not in SKIPPED]
    NBProcessor(nb=notebook, procs=filters).process()
    for cell in notebook.cells:
        cell.pop("has_sd", None)  # a note of nbdev's to itself, which the notebook format does not know
    notebook = tidy(nbformat.reads(json.dumps(nb2dict(notebook)), as_version=4), exported, module)
    if docname == "index":
        notebook.cells.append(nbformat.v4.new_markdown_cell(contents()))
    source[0] = nbformat.writes(notebook)


# Quarto's own, or done in `tidy`. The cells are not executed again: their saved outputs are shown.
SKIPPED = {"FrontmatterProc", "add_links", "add_fold", "mv_exports", "rm_export", "insert_warning", "exec_show_docs"}


ROOMS = {
    "Core": "00_core", "Synthetic slides": "01_synthetic", "Slides": "02_slides", "Data sets": "03_datasets",
    "Models": "04_models", "Training": "05_training", "Metrics": "06_metrics", "Probes": "07_probe",
    "Pre-training": "08_pretrain", "Curation": "09_curate", "Segmentation": "10_segment", "Annotation": "11_annotate",
    "Transfer": "12_transfer", "Studies": "13_studies", "Commands": "14_commands",
    "Command line": "[0-9]*", "Reports": "reports"}


def contents():
    """The site's table of contents: a list for every room that has notebooks, in reading order."""
    rooms = {title: room if "*" in room else f"{room}/*" for title, room in ROOMS.items()}
    return "\n\n".join(f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {t}\n\n{g}\n```" for t, g in rooms.items())


def tidy(notebook, exported, module):
    """A page for reading: signatures as text, the code they stand for folded under them, no directives."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if re.search(r"^#\|\s*echo:\s*false", cell.source, flags=re.M):
                cell.metadata["tags"] = ["remove-input"]
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            if cell.id in exported:
                if re.fullmatch(r"((from|import) .*\n?|\s+|\)|    .*\n?)*", cell.source):
                    continue  # imports only
            if cell.source.startswith("show_doc("):
                cells[-1].metadata["tags"] = ["hide-input"]
                cells.insert(len(cells) - 1, nbformat.v4.new_markdown_cell(signature(cell.source, module)))
                continue
        if cell.source.strip() or cell.get("outputs"):
            cells.append(cell)
    notebook.cells = cells
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "python3", "language": "python"})
    return notebook


def signature(source, module):
    """What show_doc says of a symbol of the library, without Quarto's rule and link attributes."""
    from nbdev.showdoc import show_doc

    name = re.match(r"show_doc\(([\w.]+)", source)[1]
    text = show_doc(eval(name, vars(module)))._repr_markdown_()
    return re.sub(r"^---\n+(\[source\].*\n+)?", "", text)


project, author, copyright, version = cfg["title"], cfg["author"], cfg["copyright"], cfg["version"]
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
exclude_patterns = ["**/.ipynb_checkpoints", "_*"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.xref_missing", "myst.header"]
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
html_theme = "furo"
html_title = cfg["title"]
html_math_renderer = "mathml"
html_show_sphinx = False


def show_math(translator, node):
    """Formulas as MathML, which browsers draw themselves: no script and no network."""
    from docutils import nodes
    from latex2mathml.converter import convert

    display = "inline" if isinstance(node, nodes.math) else "block"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", read_notebook)
    app.add_html_math_renderer("mathml", (show_math, None), (show_math, None))
