"""Plots of a comparison of depth policies, and of a log of decisions. The only file that needs matplotlib."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import common
from experiments.depth_arms import curve, fixed_depth
from experiments.depth_verdicts import Row, Verdict, judge
from streamserve.specustream import decision_log
from streamserve.specustream.depth import expected_tokens

try:
    import matplotlib as mpl
    from matplotlib import figure
    from matplotlib.backends import backend_agg
except ImportError:  # an optional dependency: tables do without
    mpl = backend_agg = figure = None

# Of viridis, from shallow to deep.
_DEPTH_COLORS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_POSITIONS = "spec_decode_per_position_acceptance_rates"


def write_plots(header: Row, rows: Sequence[Row], output_dir: pathlib.Path) -> list[pathlib.Path]:
    """Draw what the rows have: one repeat, or the first seed at the last batch of the first cost; speed over all."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        if header["mode"] == "engine":
            if row["repeat"] == 0:
                groups.setdefault(row["workload"], {})[row["arm"]] = row
        elif row["regret_curve"] is not None and (row["cost"], row["batch"]) == (rows[0]["cost"], rows[-1]["batch"]):
            groups.setdefault(f"{row['cell']}\n{row['cost']}, batch {row['batch']}", {})[row["policy"]] = row
    verdicts = judge(header, rows)
    speeds = {name: [v for v in verdicts if v.group == name and v.to_plain] for name in {v.group: 0 for v in verdicts}}
    canvas = _Canvas(output_dir, synthetic=header["synthetic"])
    return [*_draw_groups(canvas, groups), *canvas.draw("speed", "Speed over other arms", speeds, _draw_speed)]


def write_decision_plots(path: pathlib.Path, output_dir: pathlib.Path) -> list[pathlib.Path]:
    """Draw a log of decisions.

    Raises:
      RunError: it cannot be read.
    """
    try:
        header, logged = decision_log.read_log(path)
    except (OSError, ValueError) as error:
        raise common.RunError(str(error)) from None
    lanes = {f"lane {lane}": _logged_row([d for d in logged if d.lane == lane]) for lane in {d.lane: 0 for d in logged}}
    canvas = _Canvas(output_dir, synthetic=bool(header.get("synthetic")), prefix="decisions_")
    return _draw_groups(canvas, {str(header.get("policy", "decisions")): lanes})


def _logged_row(decisions: Sequence[decision_log.Logged]) -> Row:
    """Say of a lane's decisions what a row says of an arm. Regret needs the true acceptance, hence synthetic runs."""
    tiers = decisions[0].context.tiers_A
    arms, lost = [one.plan.arm for one in decisions], []
    accepted = np.concatenate(
        [o.outcome.stats.accepted_BR.ravel() for o in decisions if o.outcome] or [np.zeros(0, int)]
    )
    drafted = np.concatenate([o.outcome.stats.drafted_BR.ravel() for o in decisions if o.outcome] or [np.zeros(0, int)])
    accepted = accepted[drafted > 0]
    for context, plan, outcome in ((one.context, one.plan, one.outcome) for one in decisions):
        if context.acceptance_K is not None and outcome is not None:
            rate_A = context.batch * expected_tokens(np.asarray(context.acceptance_K), tiers) / context.cost_A
            lost.append((rate_A.max() - rate_A[plan.arm]) * context.cost_A[plan.arm] * outcome.stats.rounds)
    return {
        "shares": {str(tier): arms.count(arm) / len(arms) for arm, tier in enumerate(tiers)},
        "depth_curve": curve(tiers[arms]),
        "regret_curve": curve(np.cumsum(lost)) if lost else None,
        _POSITIONS: [
            float((accepted > position).mean()) for position in range(max(drafted, default=0)) if len(accepted)
        ],
    }


class _Canvas:
    """Writes figures of panels, the same bytes for the same numbers."""

    def __init__(self, folder: pathlib.Path, *, synthetic: bool, prefix: str = ""):
        if mpl is None:
            raise common.RunError("plots need matplotlib: install the extra `plots`, as in pip install -e '.[plots]'")
        self._folder, self._prefix, self._mark = folder, prefix, "SYNTHETIC. " if synthetic else ""

    def draw(self, name: str, title: str, panels: Mapping[str, Any], draw: Any) -> list[pathlib.Path]:
        """Draw a panel each, with one legend; nothing where there is none."""
        panels = {panel: content for panel, content in panels.items() if content}
        if not panels:
            return []
        assert mpl is not None  # as `__init__` has seen; the same import brought all three
        assert figure is not None
        assert backend_agg is not None
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        picture = figure.Figure(figsize=(4.2 * columns + 1, 3.4 * lines + 1.6), layout="constrained")
        backend_agg.FigureCanvasAgg(picture)
        handles: dict[str, Any] = {}
        for axes, (panel, content) in zip(
            picture.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False
        ):
            draw(axes, content)
            axes.set_title(panel, fontsize=9)
            handles |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        for axes in picture.axes[len(panels) :]:
            axes.set_axis_off()
        picture.suptitle(self._mark + title)
        picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=7)
        paths = [self._folder / f"{self._prefix}{name}.{kind}" for kind in ("png", "svg")]
        with mpl.rc_context({"svg.hashsalt": name}):
            picture.savefig(paths[0], dpi=110, metadata={"Software": None})
            picture.savefig(paths[1], metadata={"Date": None})
        return paths


def _draw_groups(canvas: _Canvas, groups: Mapping[str, Mapping[str, Row]]) -> list[pathlib.Path]:
    def having(key: str, *, fixed: bool) -> dict[str, dict[str, Any]]:
        return {
            group: {arm: row[key] for arm, row in rows.items() if row.get(key) and (fixed or fixed_depth(arm) is None)}
            for group, rows in groups.items()
        }

    return [
        *canvas.draw("depth", "Depth over time", having("depth_curve", fixed=False), _curves("depth (tokens a round)")),
        *canvas.draw(
            "regret",
            "Regret to the best depth of each tick",
            having("regret_curve", fixed=True),
            _curves("lost (tokens)", "symlog"),
        ),
        *canvas.draw("pulls", "Which depth ran", having("shares", fixed=False), _draw_shares),
        *canvas.draw("acceptance", "Acceptance by position", having(_POSITIONS, fixed=True), _draw_positions),
    ]


def _style(arm: str, index: int) -> dict[str, Any]:
    """Policies have colours, fixed depths are grey."""
    depth = fixed_depth(arm)
    if depth is not None:
        return {"color": str(0.8 - 0.08 * depth), "linestyle": ":", "linewidth": 1}
    return {"color": f"C{index % 10}", "linestyle": "-" if index % 20 < 10 else "--", "linewidth": 1.3}


def _curves(label: str, scale: str = "linear") -> Any:
    def draw(axes: Any, curves: Mapping[str, Any]) -> None:
        for index, (arm, points) in enumerate(curves.items()):
            axes.plot(points["tick"], points["value"], label=arm, **_style(arm, index))
        axes.set(xlabel="time (ticks)", ylabel=label, yscale=scale)

    return draw


def _draw_shares(axes: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
    tiers = sorted({int(tier) for share in shares.values() for tier in share})
    left = np.zeros(len(shares))
    for index, tier in enumerate(tiers):
        width = np.array([100 * share.get(str(tier), 0.0) for share in shares.values()])
        axes.barh(list(shares), width, left=left, color=_DEPTH_COLORS[index], label=f"depth {tier}")
        left += width
    axes.set(xlabel="share of ticks (%)", ylabel="arm")
    axes.tick_params(labelsize=7)


def _draw_positions(axes: Any, rates: Mapping[str, Sequence[float]]) -> None:
    for index, (arm, values) in enumerate(rates.items()):
        axes.plot(range(1, len(values) + 1), values, marker=".", label=arm, **_style(arm, index))
    axes.set(xlabel="position (drafted token of a round)", ylabel="accepted (fraction of drafts)", ylim=(0, 1.02))
    axes.set_xticks(range(1, 1 + max(map(len, rates.values()))))


def _draw_speed(axes: Any, verdicts: Sequence[Verdict]) -> None:
    for shift, color, label in ((-0.15, "C0", "over plain decoding"), (0.15, "C1", "over the best fixed depth")):
        spans = [verdict.to_plain if shift < 0 else verdict.to_fixed for verdict in verdicts]
        values = np.array(spans, np.float64)
        bounds = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1])).T
        axes.errorbar(values[:, 0], np.arange(len(spans)) + shift, xerr=bounds, fmt=".", color=color, label=label)
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(verdicts)), [verdict.arm for verdict in verdicts], fontsize=7)
    axes.set(xlabel="tokens a second, ratio", ylabel="arm")
