"""Settings of the documentation site: Sphinx with furo, pages in Markdown (MyST)."""

from importlib import metadata

project = "Deep Equilibrium Models"
release = metadata.version("deep-equilibrium-models")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = project
html_show_copyright = False
html_show_sourcelink = False
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs; tests execute them

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
