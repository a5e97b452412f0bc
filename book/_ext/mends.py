"""Sphinx extension: mends that the book needs to be read offline and from notebooks."""

import json

from docutils import nodes
from IPython.lib.lexers import IPython3Lexer

from fmd.config import load_experiment, results_dir
from fmd.errors import FmdError
from fmd.records import finished

BADGE = "https://colab.research.google.com/assets/"
# Without its record, a notebook would train while the book is built, and leave records behind.
SHOWS = {"notebooks/train_teacher.ipynb": "teacher", "notebooks/distill.ipynb": "decoupled"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def setup(app):
    # Cells hold lines such as `%pip install`; the notebooks' metadata says only "python".
    app.add_lexer("python", IPython3Lexer)
    app.add_js_file("wide.js")
    app.connect("config-inited", run_what_is_stored)
    app.connect("source-read", show_stored_run)
    app.connect("doctree-read", badges_to_text)
    # After sphinx-book-theme has added its buttons (priority 501).
    app.connect("html-page-context", drop_launch_buttons, priority=502)
    app.connect("html-page-context", drop_thebe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def run_what_is_stored(app, config):
    """Execute the notebooks that show a run if that is stored; else only their code is shown."""
    digits = load_experiment("digits")
    for notebook, variant in SHOWS.items():
        try:
            stored = finished(digits.run(variant)) is not None
        except FmdError:  # a record that is damaged, or of other settings
            stored = False
        if not stored:
            config.nb_execution_excludepatterns.append(notebook)


def show_stored_run(app, docname, source):
    """Show ``results/<docname>.ipynb``, if there is one, with its outputs but for progress bars."""
    stored = results_dir() / f"{docname}.ipynb"
    if not stored.exists():
        return
    notebook = json.loads(stored.read_text())
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [x for x in cell["outputs"] if WIDGET not in x.get("data", {})]
    source[0] = json.dumps(notebook)


def badges_to_text(app, doctree):
    """Show the Colab badge as a plain link: its picture would have to come from the network."""
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].startswith(BADGE):
            image.replace_self(nodes.Text(image["alt"]))


def drop_launch_buttons(app, pagename, templatename, context, doctree):
    """Keep the launch button on notebooks: Colab cannot open the book's Markdown pages."""
    if not app.env.doc2path(pagename).endswith(".ipynb"):
        buttons = context.get("header_buttons", [])
        context["header_buttons"] = [b for b in buttons if b.get("label") != "launch-buttons"]


def drop_thebe(app, pagename, templatename, context, doctree):
    """Leave out the scripts of live cells: unused here, and declared twice, which is an error."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename} {s.attributes}"]
