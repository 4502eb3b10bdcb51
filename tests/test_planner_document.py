"""docs/planner.md says what the code assumes and predicts."""

import dataclasses
import json
import pathlib
import re

import pytest

from benchmarks import cases, sweep
from configs import balanced, slow_network
from disag_jax.compare import twin_of
from disag_jax.config import Recompute
from disag_jax.planner import costs, hardware, search
from disag_jax.planner.prediction import assumed_load_factor, predict
from disag_jax.planner.sizes import Sizes
from mesh.roles import Role

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
SHEETS = [one for one in map(hardware.load, hardware.known()) if one.source == "datasheet"]


def section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of tables that begin with code."""
    lines = (line for line in text.split("\n") if line.startswith("| `"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_assumptions_are_those_of_the_data_sheets_and_of_the_code():
    table = {row[0]: (float(row[1]), row[2]) for row in rows(section("Assumptions")) if row[2:]}
    shares = ("product_efficiency", "score_efficiency", "memory_efficiency", "usable_memory_share")
    for sheet in SHEETS:
        expected = {name: getattr(sheet, name) for name in shares}
        for name in ("unit_overhead_microseconds", "host_milliseconds"):
            expected[name] = getattr(sheet, name)
        for where in ("intra_node", "inter_node"):
            for field in dataclasses.fields(hardware.Link):
                transfer = getattr(getattr(sheet, where), field.name)
                for name in ("efficiency", "latency_microseconds"):
                    key = f"{where}.{name}"
                    assert expected.setdefault(key, getattr(transfer, name)) == getattr(
                        transfer, name
                    )
        assert {
            name: value for name, (value, where) in table.items() if where == "JSON"
        } == expected
    constants = {name: value for name, value in table.items() if value[1] != "JSON"}
    for hop, passes in costs.BOX_PASSES.items():
        assert constants.pop(f"BOX_PASSES[{hop}]") == (sum(passes), "costs.py")
    modules = {"costs.py": costs, "search.py": search}
    for module, names in {
        "costs.py": ("SCORE_BACKWARD", "UPDATE_BYTES_PER_PARAMETER", "GRADIENT_PASSES"),
        "search.py": ("RATIO_PARTS", "MOST_TOKENS_PER_WORKER", "TOKEN_TOLERANCE"),
    }.items():
        for name in names:
            assert constants.pop(name) == (getattr(modules[module], name), module)
    assert not constants


@pytest.mark.parametrize("recompute", Recompute)
def test_passes_over_memory_are_those_of_the_units(recompute):
    config = balanced.get_config()
    config.split.attention_workers, config.split.expert_workers = 2, 3
    config.run.recompute = recompute
    sizes = Sizes.of(config.validate(), assumed_load_factor(config, None))
    model, item, wide = config.model, sizes.item_bytes, sizes.wide_bytes
    tokens, sorted_rows = config.batch.tokens_per_worker, sizes.bucket.sorted_rows
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    share, *_ = costs.loss_tokens(sizes)
    chunk = min(share, config.run.loss_chunk)
    logits = -(-share // chunk) * chunk * model.vocab_size
    arrays = {
        "f": config.fanout, "h": tokens * model.d_model * item, "q": tokens * heads * item,
        "m": sizes.placement.rounds * sizes.bucket.rows * model.d_model * item,
        "k": sum(sizes.attention_kept_bytes), "r": sizes.rows * model.d_model * item,
        "d": sorted_rows * model.d_model * item, "i": sorted_rows * model.expert_width * item,
        "l": logits * wide, "c": logits * item, "n": -(-share // chunk),
    }  # fmt: skip
    formulas = {row[0]: row[1] for row in rows(section("Assumptions")) if len(row) == 2}
    parameters = {
        "attention": sizes.layer_parameters[Role.ATTENTION],
        "expert": sizes.layer_parameters[Role.EXPERT],
        "loss": model.vocab_size * model.d_model,
    }
    work = costs.unit_work(sizes)
    assert formulas.keys() == work.keys()
    for unit, formula in formulas.items():
        count = parameters[unit.split("_")[0]]
        found = eval(formula, {}, arrays | {"w": count * item, "g": count * wide})
        assert found == pytest.approx(work[unit].num_bytes, rel=1e-12), unit


def test_predictions_beside_measurements_are_those_of_the_code():
    text = section("Against measurement")
    profile, sheet = hardware.load("h100x2_nvlink"), hardware.load("h100")
    rows = re.findall(r"\| (AF-Pipe|twin) \| (\d+) x (\d+),(\d+) \| (\d\.\d+) s \|.*", text)
    assert len(rows) == 4
    for placement, _, thousands, tokens, seconds in rows:
        config, tokens = balanced.get_config(), 1000 * int(thousands) + int(tokens)
        of_worker = config.batch.tokens_per_worker * config.batch.micro_batches
        config.batch.tokens_per_worker = tokens
        config.batch.micro_batches = of_worker // tokens
        config = twin_of(config.validate()) if placement == "twin" else config.validate()
        found = [predict(config, one) for one in (profile, sheet)]
        predicted = " | ".join(
            f"{one.step_seconds:.3f} s ({one.step_seconds / float(seconds) - 1:+.1%})"
            for one in found
        )
        batch = f"{config.batch.micro_batches} x {tokens:,}"
        row = f"| {placement} | {batch} | {seconds} s | {predicted} |"
        memory = " / ".join(f"{one.total / 2**30:.1f}" for one in found[0].memory.values())
        (line,) = (line for line in text.splitlines() if line.startswith(row))
        assert line.endswith(f" | {memory} |")


def test_cells_of_the_sweep_are_predicted():
    """Shapes, and ways to overlap, that the profile does not contain."""
    text = section("Against measurement")
    profile = cases.hardware_here("h100x2_nvlink", 2, "default")
    base, far = balanced.get_config(), []
    base.model.num_layers = 2
    for r in json.loads((ROOT / "benchmarks" / "results" / "sweep_nvlink.json").read_text()):
        cell = r["sequence_length"], r["expert_width"], r["top_k"]
        made, _ = sweep.sweep_cases(base, profile, 2, *([value] for value in cell))
        (config,) = (c.config for c in made if (c.group, c.way) == (r["group"], r["way"]))
        assert config.split.hop == (2 if "hop 2" in r["name"] else 1)
        found = predict(config, profile)
        error = found.step_seconds / r["seconds"] - 1
        row = f"| {', '.join(map(str, cell))} | {r['way']} | {r['seconds']:.3f} s |"
        assert f"{row} {found.step_seconds:.3f} s ({error:+.1%}) |" in text
        gib = max(memory.total for memory in found.memory.values()) / 2**30
        assert gib == pytest.approx(r["gib"], rel=0.036)
        if abs(error) > (0.1 if r["way"] == "chunked" else 0.088):
            far.append((*cell, r["way"]))
    # As the document says of it.
    assert far == [(4096, 704, 2, "chunked")]


@pytest.mark.parametrize(("heads", "micro_batches"), [(160, 32), (176, 64)])
def test_cells_of_a_slow_network_are_predicted(heads, micro_batches):
    results = ROOT / "benchmarks" / "results"
    profile = hardware.load(str(results / "slow_processes.json"))
    profiles = profile, dataclasses.replace(profile, lost_beside_transfers={})
    config = slow_network.get_config()
    config.model.num_heads, config.batch.micro_batches = heads, micro_batches
    cells = [
        {c.way: c for c in sweep.sweep_cases(config.validate(), one, 2, [8192], [8192], [8])[0]}
        for one in profiles
    ]
    measured = json.loads((results / f"sweep_slow_network_{heads}_heads.json").read_text())
    for r in measured:
        predicted = " | ".join(
            f"{of_one[r['way']].predicted_seconds:.3f} s "
            f"({of_one[r['way']].predicted_seconds / r['seconds'] - 1:+.1%})"
            for of_one in cells
        )
        row = f"| {heads}, {micro_batches} | {r['way']} | {r['seconds']:.3f} s | {predicted} |"
        assert row in section("Against measurement")
        assert cells[1][r["way"]].predicted_seconds == pytest.approx(r["seconds"], rel=0.08)
    assert min(measured, key=lambda r: r["seconds"])["way"] == sweep.AF_PIPE
    assert all(min(c, key=lambda way: c[way].predicted_seconds) == sweep.AF_PIPE for c in cells)
