"""The command line. Every command imports what it needs when it runs, so that `mechicl --help` is quick.

    mechicl report --model demo --task concepts --out report.html
    mechicl heads --model demo
    mechicl ablate --model demo --top 4 --by induction
    mechicl patch --pairs swap_exemplars --sites resid_pre,z --out runs/patch
    mechicl circuit --method EAP-IG --target 0.85 --out runs/circuit
    mechicl kv --factors --margin --out runs/kv
    mechicl doctor Qwen/Qwen2.5-VL-3B-Instruct
    mechicl train vlm --family qwen2_5_vl --out runs/organism
    mechicl adapt demo --strategy 2-way-random --out runs/link
    mechicl eval lcl --data generated --shots 0,2,4,8,16 --out runs/lcl
    mechicl eval link --model runs/base --adapted runs/link --out runs/circuit
    mechicl data check photos
    mechicl study huang2026 --model demo --out runs/huang2026
    mechicl study heads-at-odds --model demo --out runs/odds
    mechicl compare demo runs/adapted/model --improve induction --out runs/compared
    mechicl series runs/checkpoints --out runs/series
    mechicl sweep spec.toml --out runs/sweep --workers 2

The model is --model (-m) or the command's argument, the bundled one where none is named; `compare` takes two, `series` its source. What can be refused is refused before a model is loaded. Numbers go to stdout, everything else to stderr; a mistake is one line and exit code 2.
"""

from __future__ import annotations

from mechicl.cli import adapt, compare, data, heads, kv, patch, report, study_heads, study_protocol, sweep, train
from mechicl.cli.app import app, command, evaluation, sets, study, training
from mechicl.cli.eval import lcl
from mechicl.cli.eval_tasks import tasks
from mechicl.cli.heads import parse_heads
from mechicl.cli.link import link

__all__ = ["app", "parse_heads"]

command(app, report.report)
command(app, heads.heads)
command(app, heads.ablate)
command(app, patch.patch)
command(app, patch.circuit)
command(app, kv.kv)
command(app, heads.doctor)
command(training, train.train_vlm, "vlm")
command(training, train.train_toy, "toy")
command(app, sweep.sweep)
command(app, compare.compare)
command(app, compare.series)
command(app, adapt.adapt)
command(evaluation, lcl, "lcl")
command(evaluation, link, "link")
command(evaluation, tasks, "tasks")
command(sets, data.vl_icl, "vl-icl")
command(sets, data.isekai, "isekai")
command(sets, data.memes, "memes")
command(sets, data.check, "check")
command(study, study_protocol.huang2026, "huang2026")
command(study, study_heads.heads_at_odds, "heads-at-odds")
