"""Models that learn: toys (`toys`), small vision-language organisms (`organisms`, `vlm`), adapters for given models (`adapting`), grids of runs (`sweeps`).

Every run has a folder (`runs`) that it can be killed and resumed in to the same bytes. Measures come from `analysis`; nothing here draws.
"""
