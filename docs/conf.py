"""How Sphinx builds the site.

sphinx-build -W --keep-going -n docs build/docs
"""

from importlib.metadata import version as version_of

project = "mlx_modswap"
author = "mlx_modswap contributors"
copyright = author
release = version = version_of("mlx-modswap")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
pygments_dark_style = "github-dark"  # the theme's own underlines the names of modules
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
highlight_language = "none"  # a block without a language is what a program prints
highlight_options = {"pycon": {"stripnl": True}}  # the empty line at the end is for doctest

# Anchors like GitHub's, so that a link such as pitfalls.md#... works in both.
myst_heading_anchors = 3

# The types are in words under "Parameters".
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False

# A build needs no network, so names of MLX and mlx-lm are not looked up.
nitpick_ignore_regex = [("py:.*", r"mlx(_lm)?\..*")]

# For `sphinx-build -b linkcheck`.
linkcheck_retries = 3
linkcheck_timeout = 30
