"""Rows of a task of one's own, as JSON lines: `python docs/examples/falling.py > falling.jsonl`.

Digits, to be put in falling order: the task of docs/tutorial.md.
"""

import json
import random

chance = random.Random(0)
for _ in range(2000):
    digits = [chance.choice("0123456789") for _ in range(4)]
    print(json.dumps({"question": "".join(digits), "solution": "".join(sorted(digits, reverse=True))}))
