"""What an activation is worth: tables of runs, the law they follow, paired comparisons, a report. No torch here.

table.py     the table of runs: its columns, and every reason to refuse one
reading.py   CSV files, foreign ones through a mapping, into a table
law.py       L(N, D) = E + A N^-alpha + B D^-beta: objective and derivatives
solver.py    its minimiser, for thousands of problems at once, and the starts
forms.py     which form of the law, by hold-out or by the noise of seeds
uncertainty.py   draws of laws for intervals: noise between runs and between trunks; the profile of E
diagnostics.py   where a law fails: residuals by group, misfit, outliers
fit.py       one law for one activation, with its intervals and compute-optimal N and D
isoflop.py   IsoFLOP parabolas, as a diagnostic only
pairs.py     which runs of two activations belong together
compare.py   activation against baseline in pairs: compute multiplier, its interval, does it depend on size
effects.py   what compare.py estimates from the pairs, and the intervals of that
words.py, numbers.py   fits and comparisons as sentences, and as JSON and CSV
report.py, page.py, figures.py, *_plots.py, curves.py   the folder of numbers, pictures and one HTML page
recipe.py, ladder.py, planning.py, expectation.py, measuring.py   STUDY.toml -> configs of runs, and what to expect
running.py, state.py, progress.py, slurm.py, collecting.py        the runs, here or as job arrays, and their table
fp8_gate.py, gate.py, gate_plot.py   a BF16/FP8 pair of one config: the runs, the verdict, its picture
cli.py, commands.py   `xact study`
outside.py   what the command line hands in from the rooms with torch
"""
