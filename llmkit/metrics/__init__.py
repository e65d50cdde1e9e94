"""What is measured: an observer of the event hooks, and the numbers made of what it saw. Torch-free.

Names and formulas follow vLLM's `bench serve`, so scripts that read its JSON read ours: `ttft`, `tpot`, `itl`, `e2el`
in milliseconds, throughputs per second. Elsewhere "ITL" also means vLLM's TPOT (a mean per request) or the time per
decode step; here it is every single gap between two successive tokens of a request.
"""
