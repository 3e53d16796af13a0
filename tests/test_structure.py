"""The design's import rules, read from the sources: who may import whom, downward only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OWN = ("streamserve", "pallas_kernels", "experiments", "configs")
# Part of the package -> own parts it may import. `root` are the records and settings that everybody shares.
ROOT_RECORDS = {"types", "config", "sampling_params"}
ALLOWED = {
    "sampling_params": set(),
    "types": {"sampling_params"},
    "config": set(),
    "mesh": ROOT_RECORDS,
    "sampling": ROOT_RECORDS,
    "tokenizer": ROOT_RECORDS,
    "metrics": ROOT_RECORDS,
    "report_table": set(),
    "trace": set(),
    "lifecycle": set(),
    "waiting": ROOT_RECORDS,
    "ending": ROOT_RECORDS | {"lifecycle"},
    "roster": ROOT_RECORDS | {"sequence", "waiting"},
    "jsonl": ROOT_RECORDS,
    "workload": ROOT_RECORDS | {"jsonl", "workload_fields"},
    "workload_fields": ROOT_RECORDS,
    "answers": ROOT_RECORDS | {"jsonl", "metrics", "workload", "workload_fields"},
    "bandits": set(),
    "kv": ROOT_RECORDS,
    "models": ROOT_RECORDS | {"mesh", "kv", "pallas_kernels"},
    "specustream": ROOT_RECORDS | {"bandits", "sampling", "kv"},
    "pipeserve": ROOT_RECORDS | {"mesh", "sampling", "specustream", "kv"},
    "flowguard": ROOT_RECORDS | {"bandits"},
    "sequence": ROOT_RECORDS | {"tokenizer", "lifecycle"},
    "pair_protocol": ROOT_RECORDS,
    "audit": ROOT_RECORDS,
    "lane_log": {"trace"},
    "lane_meter": ROOT_RECORDS,
    "lane_counters": set(),
    "lane_prompts": {"sequence", "lane_log", "lane_meter", "lane_counters", "pair_protocol"},
    "lane_slots": {"sequence", "lane_log", "lane_meter", "lane_counters", "pair_protocol", "specustream"},
    "lane": ROOT_RECORDS
    | {"sequence", "lifecycle", "trace", "lane_log", "lane_meter", "lane_counters", "lane_prompts", "lane_slots"}
    | {"pair_protocol", "specustream"},
    "scheduler": ROOT_RECORDS
    | {"flowguard", "specustream", "sequence", "lane", "lane_counters", "pair_protocol"}
    | {"lifecycle", "trace", "roster", "ending"},
    "parts": ROOT_RECORDS | {"bandits", "flowguard", "models", "specustream"},
    "assembly": ROOT_RECORDS
    | {"mesh", "flowguard", "models", "pair_protocol", "parts", "pipeserve", "specustream", "tokenizer"},
    "lane_costs": ROOT_RECORDS | {"models", "pipeserve", "specustream"},
    "engine_logs": ROOT_RECORDS | {"flowguard", "specustream", "trace"},
    "prompts": ROOT_RECORDS | {"ending", "tokenizer"},
}
EVERYTHING = {"llm", "__init__"}


def _sources(*packages: str) -> list[pathlib.Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def _part(path: pathlib.Path) -> str:
    """Name of the part that a file belongs to: its folder or module below `streamserve`."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    return inside[1] if inside[0] == "streamserve" else inside[0]


def _imports(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """Modules imported anywhere in a file, with the names taken from them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", [alias.name for alias in node.names]))
    return found


def _own_parts(tree: ast.AST) -> set[str]:
    """Own parts that a file imports."""
    parts = set()
    for module, names in _imports(tree):
        head, *rest = module.split(".")
        if head == "streamserve":
            parts |= {rest[0]} if rest else set(names)
        elif head in OWN:
            parts.add(head)
    return parts


@pytest.mark.parametrize("path", _sources("streamserve"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_imports_only_what_the_design_allows(path):
    part = _part(path)
    if part in EVERYTHING:
        return
    assert part in ALLOWED, f"{part} has no row in the table"
    assert _own_parts(ast.parse(path.read_text())) - {part} <= ALLOWED[part]


def test_kernels_know_nothing_of_the_engine_and_configs_nothing_of_ours():
    for path in _sources("pallas_kernels"):
        assert _own_parts(ast.parse(path.read_text())) <= {"pallas_kernels"}, path
    for path in _sources("configs"):
        assert _own_parts(ast.parse(path.read_text())) <= {"configs"}, path


def test_there_are_no_cycles():
    graph = {part: set() for part in ALLOWED}
    for path in _sources("streamserve"):
        if _part(path) in graph:
            graph[_part(path)] |= _own_parts(ast.parse(path.read_text())) & set(graph) - {_part(path)}
    order = []
    while graph:
        free = {part for part, needs in graph.items() if not needs & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        order += sorted(free)
        graph = {part: needs for part, needs in graph.items() if part not in free}
    assert len(order) == len(ALLOWED)


@pytest.mark.parametrize("path", _sources(*OWN), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_jax_no_torch_and_no_own_import_inside_functions(path):
    tree = ast.parse(path.read_text())
    for module, names in _imports(tree):
        full = [module, *(f"{module}.{name}" for name in names)]
        assert not any(name.startswith(("jax._src", "torch")) for name in full), full
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = _own_parts(ast.Module(body=list(ast.iter_child_nodes(function)), type_ignores=[]))
            assert not inside, f"{function} imports {inside}"


@pytest.mark.parametrize("path", _sources(*OWN), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_reads_the_environment_or_keeps_globals(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"{path}: global"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"{path}:{node.lineno}"


def test_records_are_of_three_kinds():
    """Every class with fields is a flax.struct dataclass, a NamedTuple or a frozen dataclass with slots."""
    for path in _sources("streamserve", "pallas_kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for decorator in map(ast.unparse, node.decorator_list):
                if "dataclass" in decorator and not decorator.startswith("flax.struct"):
                    missing = [word for word in ("frozen=True", "slots=True") if word not in decorator]
                    assert not missing, f"{path}: {node.name} lacks {missing}"


def test_the_public_surface_is_small_and_complete():
    tree = ast.parse((ROOT / "streamserve" / "__init__.py").read_text())
    names = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert len(names) <= 25
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(names)
