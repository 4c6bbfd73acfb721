"""Settings of the documentation: Markdown pages, and the API reference from docstrings."""

from pellm_lightning import __version__

project = "pellm_lightning"
author = "The pellm_lightning contributors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["style"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
# Lightning's docstrings refer to labels that do not exist here, so a hook shows only what is written here.
autodoc_inherit_docstrings = False
# Otherwise the fields of a dataclass are described twice, by "Attributes:" and by autodoc.
napoleon_use_ivar = True
