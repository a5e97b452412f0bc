"""Sphinx extension: mends that the book needs to be read offline and from notebooks."""

from docutils import nodes
from IPython.lib.lexers import IPython3Lexer

from fmd.config import load_experiment

BADGE = "https://colab.research.google.com/assets/"


# Without its record, a notebook would train while the book is built, and leave records behind.
SHOWS = {"notebooks/train_teacher.ipynb": "teacher", "notebooks/distill.ipynb": "decoupled"}


def setup(app):
    # Cells hold lines such as `%pip install`; the notebooks' metadata says only "python".
    app.add_lexer("python", IPython3Lexer)
    app.add_js_file("wide.js")
    app.connect("config-inited", run_what_is_stored)
    app.connect("doctree-read", badges_to_text)
    app.connect("doctree-read", drop_widgets)
    # After sphinx-book-theme has added its buttons (priority 501).
    app.connect("html-page-context", drop_launch_buttons, priority=502)
    app.connect("html-page-context", drop_thebe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def run_what_is_stored(app, config):
    """Execute the notebooks that show a run if that is stored; else only their code is shown."""
    digits = load_experiment("digits")
    for notebook, variant in SHOWS.items():
        if not digits.run(variant).path("runs", ".json").exists():
            config.nb_execution_excludepatterns.append(notebook)


def badges_to_text(app, doctree):
    """Show the Colab badge as a plain link: its picture would have to come from the network."""
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].startswith(BADGE):
            image.replace_self(nodes.Text(image["alt"]))


def drop_widgets(app, doctree):
    """Leave out what notebooks draw by scripts from the network: progress bars."""
    for output in list(doctree.findall(nodes.container)):
        kinds = [part.get("mime_type") for part in output.children if part.tagname == "container"]
        if "application/vnd.jupyter.widget-view+json" in kinds:
            output.parent.remove(output)


def drop_launch_buttons(app, pagename, templatename, context, doctree):
    """Keep the launch button on notebooks: Colab cannot open the book's Markdown pages."""
    if not app.env.doc2path(pagename).endswith(".ipynb"):
        buttons = context.get("header_buttons", [])
        context["header_buttons"] = [b for b in buttons if b.get("label") != "launch-buttons"]


def drop_thebe(app, pagename, templatename, context, doctree):
    """Leave out the scripts of live cells: unused here, and declared twice, which is an error."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename} {s.attributes}"]
