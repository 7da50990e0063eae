"""Results as figures, tables and pages. `plots.plot` draws any result, `report` writes the offline page, `page` is the only one that writes a file.

Views know results, never a model: nothing here runs, measures or tests. What lays a figure out gives plain data; `plots` alone hands it to plotly, `attention` alone to circuitsvis.
"""
