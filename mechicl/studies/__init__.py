"""Whole protocols: published studies, run from one call to one page. They need analysis, training and views, and only the command line stands above them."""
