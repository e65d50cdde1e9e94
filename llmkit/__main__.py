"""`python -m llmkit run ...`: the console script, where it is not on the path."""

from __future__ import annotations

import sys

from llmkit.cli import main

sys.exit(main())
