"""What a table may be, how foreign ones are read, and that every bad one ends in one clear line."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from planted import CHINCHILLA, DATA, SMALL, gadre, olmo, study

from megatron_xact import cli
from megatron_xact.studies.reading import Mapping, read
from megatron_xact.studies.table import Run, Table, budgets

HEADER = "activation,size,params,tokens,seed,loss,tokenizer,step_time_s,batch,schedule"


def rows(activations=("swiglu", "xielu"), sizes=(1e8, 2e8, 4e8), ratios=(10, 20, 40), seeds=(0, 1)) -> list[list]:
    """A good study, as cells."""
    made = []
    for k, activation in enumerate(activations):
        for N in sizes:
            for r in ratios:
                for seed in seeds:
                    loss = 1.7 + 400 * N**-0.34 + 400 * (N * r) ** -0.28 + 1e-3 * np.sin(7 * seed + r + k + N / 1e8)
                    made.append([activation, f"{N / 1e6:.0f}M", int(N), int(N * r), seed, round(loss, 6), "bpe", 0.1,
                                 1000, "wsd"])  # fmt: skip
    return made


def written(path, cells, header=HEADER):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *cells])
    return path


def test_a_good_table_is_taken_and_written_back_the_same(tmp_path):
    table = read(written(tmp_path / "runs.csv", rows()))
    assert len(table) == 36 and table.activations == ["swiglu", "xielu"] and table.sizes == ["100M", "200M", "400M"]
    table.write(tmp_path / "again.csv")
    again = read(tmp_path / "again.csv")
    assert again.runs == table.runs and again.csv() == table.csv()


def test_the_order_of_rows_does_not_matter(tmp_path):
    cells = rows()
    one = read(written(tmp_path / "one.csv", cells))
    other = read(written(tmp_path / "other.csv", cells[::-1]))
    assert one.csv() == other.csv()


def test_the_public_tables_through_their_mappings():
    table = olmo()
    assert len(table) == 30 and table.sizes == ["190M", "370M", "760M", "1B", "3B"]
    assert {r.seed for r in table.runs} == {0, 1} and sum(r.seed for r in table.runs) == 5
    assert {r.params for r in table.runs if r.size == "3B"} == {3169537280}
    corpora = {corpus: len(gadre(corpus)) for corpus in ("c4_original", "rpj", "rw_original")}
    assert corpora == {"c4_original": 34, "rpj": 35, "rw_original": 35}


def test_columns_on_the_command_line(tmp_path):
    cells = [["a", 100, 2.5, 3.1], ["b", 100, 5, 3.0], ["broken", 100, 5, "nan"]]
    path = written(tmp_path / "wandb.csv", cells, "Name,millions,billions,val")
    mapping = Mapping.of(None, ["params=millions*1e6", "tokens=billions*1e9", "loss=val"], ["activation=xielu"],
                         ["Name!=broken"])  # fmt: skip
    table = read(path, mapping)
    assert [(r.params, r.tokens, r.loss) for r in table.runs] == [(1e8, 2.5e9, 3.1), (1e8, 5e9, 3.0)]
    assert {(r.activation, r.size) for r in table.runs} == {("xielu", "100M")}


def test_small_counts_are_taken_where_there_is_no_doubt(tmp_path):
    """In a table of ours, and in another one that says that they are plain."""
    ours = Table([Run(params=N, tokens=r * N, loss=3.0) for N in (500, 900) for r in (1, 2)])
    ours.write(tmp_path / "ours.csv")
    assert read(tmp_path / "ours.csv").runs == ours.runs
    path = written(tmp_path / "theirs.csv", [[500, 900, 3.0]], "params,tokens,loss")
    (run,) = read(path, Mapping.of(None, ["params=params*1", "tokens=tokens*1"])).runs
    assert (run.params, run.tokens) == (500, 900)


def test_budgets_that_end_on_different_steps_are_one():
    runs = [Run(params=1e8, tokens=t, loss=3.0, size="s") for t in (1.0e9, 1.004e9, 2.0e9, 1.99e9, 4e9)]
    assert budgets(runs) == [1.0e9, 1.0e9, 1.99e9, 1.99e9, 4e9]


def test_collect_joins_tables(tmp_path, capsys):
    cells = rows()
    first, second = written(tmp_path / "a.csv", cells[:18]), written(tmp_path / "b.csv", cells[18:])
    assert cli.main(["study", "collect", str(first), str(second), "--out", str(tmp_path / "all.csv")]) == 0
    assert "36 runs, 3 sizes 100M..400M" in capsys.readouterr().out
    assert read(tmp_path / "all.csv").csv() == read(written(tmp_path / "c.csv", cells)).csv()
    assert cli.main(["study", "collect", str(first), str(first), "--out", str(tmp_path / "twice.csv")]) == 2
    assert "there 2 times: a.csv line 2, a.csv line 2" in capsys.readouterr().err
    assert not (tmp_path / "twice.csv").exists()


def test_collect_keeps_run_folders_reachable(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    cells = [[1e8, 1e9, 3.1, "runs/x"], [1e8, 2e9, 3.0, ""]]
    path = written(there / "runs.csv", cells, "params,tokens,loss,run")
    assert cli.main(["study", "collect", str(path), "--out", str(tmp_path / "all.csv")]) == 0
    assert {r.run for r in read(tmp_path / "all.csv").runs} == {"there/runs/x", ""}


def changed(where: dict, change: dict) -> list[list]:
    """`rows()` with cells of those rows replaced; where and change by column name; None drops the row."""
    names = HEADER.split(",")
    found = []
    for row in rows():
        if all(row[names.index(column)] == value for column, value in where.items()):
            if change is None:
                continue
            row = [change.get(name, value) for name, value in zip(names, row, strict=True)]
        found.append(row)
    return found


CELL = {"activation": "swiglu", "size": "100M", "tokens": 2_000_000_000, "seed": 1}
BAD = {
    "nan": (changed(CELL, {"loss": "nan"}), "fit", "in line 5: 'nan'; leave such runs out with --where 'loss!=VALUE'"),
    "empty": (changed(CELL, {"loss": ""}), "fit", "loss is not a finite number in line 5: ''"),
    "diverged": (changed(CELL, {"loss": "inf"}), "fit", "in line 5: 'inf'; leave such runs out with --where 'loss!="),
    "negative": (changed(CELL, {"loss": -1}), "fit", "loss must be positive and finite, but is -1 in line 5"),
    "perplexity": (changed(CELL, {"loss": 25}), "fit", "a loss above 20 nats per token in line 5: is it a perplexity"),
    "duplicate": (rows() + rows()[3:4], "fit", "seed 1 is there 2 times: line 5, line 38"),
    "tokenizers": (changed(CELL, {"tokenizer": "other"}), "fit", "mixes tokenizer: bpe (35 runs), other (1 run)"),
    "params of a size": (changed(CELL, {"params": 1.1e8}), "fit", "one size has one number of parameters"),
    "billions": (changed({}, {"tokens": 2}), "fit", "tokens below 100000 in line 2, line 3, line 4, line 5 and 32"),
    "millions": (changed({}, {"params": 100}), "fit", "params below 1000 in"),
    "units": (changed({}, {"tokens": 2}), "fit", "'tokens=tokens*1e9', or 'tokens=tokens*1' if they are plain counts"),
    "step time": (changed(CELL, {"step_time_s": -1}), "fit", "step_time_s must be positive"),
    "empty table": ([], "fit", "has no runs"),
    "too few runs": (rows(ratios=(20, 40), sizes=(1e8, 2e8), seeds=(0,)), "fit", "4 runs are too few for a law"),
    "one size": (rows(sizes=(1e8,), ratios=(5, 10, 20, 40)), "fit", "one size only (100M); a law in N needs at least"),
    "two sizes": (rows(sizes=(1e8, 2e8)), "fit", "swiglu: 2 sizes (100M, 200M); a law in N needs at least 3"),
    "two sizes each": (rows(sizes=(1e8, 2e8)), "compare swiglu xielu", "swiglu and xielu: 2 sizes (100M, 200M); a law"),
    "two sizes to report": (
        rows(sizes=(1e8, 2e8)),
        "report --out OUT",
        "swiglu: 2 sizes (100M, 200M); a law in N needs at least 3; not done either: law of xielu, xielu against",
    ),
    "one budget": (rows(ratios=(20,), seeds=(0, 1, 2)), "fit", "one token budget per size (20 tokens per parameter)"),
    "nobody": (rows(), "fit --activation gelu", "has no activation 'gelu'; it has swiglu, xielu"),
    "budget": (rows(), "fit --budget -3", "--budget -3 must be a positive number of FLOPs"),
    "one activation": (rows(), "compare swiglu gelu", "has no activation 'gelu'; it has swiglu, xielu"),
    "itself": (rows(), "compare xielu xielu", "cannot be compared with itself"),
    "seeds apart": (
        [[*r[:4], r[4] + 5 * (r[0] == "xielu"), *r[5:]] for r in rows()],
        "compare swiglu xielu",
        "no run of xielu has the size, tokens and seed of one of swiglu; swiglu has sizes 100M, 200M, 400M and seeds "
        "0, 1; xielu has sizes 100M, 200M, 400M and seeds 5, 6",
    ),
    "one budget to compare": (rows(ratios=(20,), seeds=(0, 1, 2)), "compare swiglu xielu", "one token budget per size"),
    "batch": (changed(CELL, {"batch": 500}), "compare swiglu xielu", "xielu differ in batch in the pairs of line 5"),
    "schedule": (changed(CELL, {"schedule": "cosine"}), "compare swiglu xielu", "differ in schedule in the pairs of"),
    "unmatched": (
        [[*r[:2], r[2] * (1.5 if r[0] == "xielu" else 1), *r[3:]] for r in rows()],
        "compare swiglu xielu",
        "differ by more than 10 % in parameters",
    ),
    "level": (rows(), "compare swiglu xielu --level 95", "--level 95 must be from 0.5 to below 1"),
    "no baseline": (rows(("relu2", "xielu")), "report --out OUT", "say which one is the baseline: --baseline NAME"),
    "where": (rows(), "fit --where size=1T", "has no runs that --where lets through"),
    "column": (rows(), "fit --columns loss=los", "has no column 'los' for loss; it has activation, size, params"),
    "field": (rows(), "fit --columns los=loss", "'los' is not a column of a study's table; those are activation"),
    "word": (rows(), "fit --columns loss", "--columns 'loss' must be NAME=COLUMN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_clear_line(name, tmp_path, capsys):
    cells, words, said = BAD[name]
    step, *more = [str(tmp_path / "out") if word == "OUT" else word for word in words.split()]
    assert cli.main(["study", step, str(written(tmp_path / "runs.csv", cells)), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("xact: error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.csv"]


def test_missing_columns_name_those_that_are_there(tmp_path, capsys):
    path = written(tmp_path / "runs.csv", [[1, 2]], "N,val_loss")
    assert cli.main(["study", "fit", str(path)]) == 2
    error = capsys.readouterr().err
    assert "has no column 'params'" in error and "it has N, val_loss" in error and "--columns params=COLUMN" in error


def test_optional_columns_with_nearly_their_name_are_told(tmp_path, capsys):
    path = written(tmp_path / "runs.csv", rows(), HEADER.replace("seed", "Seeds").replace("schedule", "trunk_id"))
    with pytest.raises(ValueError, match="is there 2 times"):  # without its seed
        read(path)
    told = capsys.readouterr().err
    assert told == (f"xact: warning: {path} has columns that are not read: 'Seeds' (meant as seed?), 'trunk_id' (meant "
                    "as trunk?). If so: --columns 'seed=Seeds' 'trunk=trunk_id'\n")  # fmt: skip
    assert len(read(path, Mapping.of(columns=["seed=Seeds", "trunk=trunk_id"]))) == 36
    olmo(), gadre("rpj")
    assert capsys.readouterr().err == ""


def test_files_that_are_no_tables(tmp_path, capsys):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty.csv").touch()
    none = tmp_path / "none.csv"
    for path, said in ((none, f"error: no such table: {none}\n"), (tmp_path, "is a folder"),
                       (tmp_path / "binary.csv", "is not a CSV file in UTF-8"),
                       (tmp_path / "empty.csv", "empty.csv is empty; a table has a header")):  # fmt: skip
        assert cli.main(["study", "fit", str(path)]) == 2
        assert said in capsys.readouterr().err


def test_rows_that_do_not_fit_the_header_are_refused(tmp_path, capsys):
    """A decimal comma or a lost cell would shift the row; a second column of one name would replace the first."""
    good = "params,tokens,loss,seed\n100000000,1000000000,3.5,0\n"
    for text, said in (
        (good + "\n100000000,2000000000,3,25,0\n", "t.csv line 4 has 5 cells, but the header has 4; a row has one for"),
        (good + "100000000,3.25,0\n", "t.csv line 3 has 3 cells, but the header has 4; a row has one for each column"),
        (good.replace("seed", "loss"), "t.csv line 1: 2 columns are called 'loss'; a column that is used needs a name"),
        (good.replace("loss", "Loss"), "no column 'loss' (validation cross-entropy, nats per token); it has params, "
                                       "tokens, Loss, seed. If it is 'Loss': --columns 'loss=Loss'"),
        (good.replace(",", ";").replace("3.5", "3,5"), "loss is not a finite number in line 2: '3,5'"),
    ):  # fmt: skip
        (tmp_path / "t.csv").write_text(text)
        assert cli.main(["study", "fit", str(tmp_path / "t.csv")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    (tmp_path / "t.csv").write_bytes(good.encode() + "100000000,2000000000,3.2,Zürich\n".encode("latin-1"))
    assert cli.main(["study", "fit", str(tmp_path / "t.csv")]) == 2
    assert "is not a CSV file in UTF-8: line 3 has the byte 0xfc; save it as UTF-8" in capsys.readouterr().err


def test_separators_and_spaces_do_not_matter(tmp_path):
    table = read(written(tmp_path / "runs.csv", rows()))
    text = (tmp_path / "runs.csv").read_text()
    for other in (text.replace(",", ";"), text.replace(",", "\t"), text.replace(",", " , "), text + ",\n"[1:] * 2):
        (tmp_path / "other.csv").write_text(other)
        assert read(tmp_path / "other.csv").runs == table.runs


def test_a_bad_mapping_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such mapping: .*none.toml"):
        Mapping.of(tmp_path / "none.toml")
    for text, said in (("[column]\n", "unknown table 'column'"), ("[columns]\nloss = {colum = 'x'}\n", "columns.loss"),
                       ("[columns]\nloss = 3\n", "columns.loss"), ("[columns\n", "mapping.toml: "),
                       ("columns = 3\n", "columns = 3 must be a table"), ("where = 3\n", "where = 3 must be a table"),
                       ("[columns]\nloss = {column = 'x', scale = '2'}\n", "columns.loss.scale = '2' must be a number"),
                       ("[columns]\nloss = {column = 'x', pattern = '('}\n", "= '(' is no regular expression"),
                       ("[columns]\nparams = {column = 'size', values = {1B = 1}}\n", "'190M' is not among the values")
                       ):  # fmt: skip
        (tmp_path / "mapping.toml").write_text(text)
        table = str(DATA / "olmo_ladder_final_losses.csv")
        words = ["study", "fit", table, "--mapping", str(tmp_path / "mapping.toml"), "--columns",
                 "tokens=throughput/total_tokens", "loss=c4_en"]  # fmt: skip
        assert cli.main(words if "190M" in said else words[:5]) == 2
        assert said in capsys.readouterr().err


def test_fit_and_compare_on_the_command_line(tmp_path, capsys):
    study(CHINCHILLA, SMALL, 1.1, 0.001, np.random.default_rng(0), step_time=1.02).write(tmp_path / "runs.csv")
    path = str(tmp_path / "runs.csv")
    words = ["study", "compare", path, "a", "b", "--bootstraps", "50", "--json", str(tmp_path / "found.json")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "a needs 1.0997 [1.09" in out and "times the compute of b for the same loss" in out and "wall clock" in out
    assert (tmp_path / "found.json").exists()
    assert cli.main(["study", "fit", path, "--bootstraps", "50", "--budget", "1e20"]) == 0
    out = capsys.readouterr().out
    assert "1e+20 FLOPs" in out and out.count("law  ") == 2


def test_mixed_data_is_refused_in_memory_too():
    runs = [replace(r, data="pile" if i else "c4") for i, r in enumerate(olmo().runs)]
    with pytest.raises(ValueError, match=r"mixes data: c4 \(1 run\), pile \(29 runs\)"):
        Table(runs)
