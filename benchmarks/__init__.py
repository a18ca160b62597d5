"""How much the server costs: CPU and memory as ratios to a bare app on the same SDK.

Leans on processes of its own for each part: servers, mock model, client. Refuses to compare
figures of different runs: each ratio comes from interleaved rounds of one run.
"""
