"""Plan a study, run it and write its report.

Run: python examples/study.py STUDY OUT
STUDY is a study file, or the name of a shipped one ("demo" takes about ten minutes); OUT its folder.
"""

import sys

import secateur

study = secateur.Study.load(sys.argv[1], out=sys.argv[2])
print(study.plan())
study.run(jobs=2)
results = study.results()
print(f"{len(results.cells)} runs, parent's held-out loss {results.parents[0].evaluation.loss:.3f} nats per token")
print(f"report: {study.report()}")
