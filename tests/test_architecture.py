"""The house's rules: imports point downward only, and light rooms stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import smalti

SOURCE = Path(smalti.__file__).parent

# A room may import from rooms on lines above its own. Rooms of one line may not import each other.
FLOORS = [
    ["errors"],
    ["rng", "types", "child_process", "pages"],
    ["nn"],
    ["models", "diffusion"],
    ["sampling"],
    ["data"],
    ["conditioning"],
    ["autoencoders"],
    ["optim"],
    ["config"],
    ["checkpoint", "run_folder", "images"],
    ["interop"],
    ["pipeline_arguments", "pipeline_editing"],
    ["pipeline"],
    ["training"],
    ["evaluation"],
    ["recipes"],
    ["comparison"],
    ["scaling"],
    ["serving"],
    ["describe"],
    [
        "cli_options",
        "cli_progress",
        "cli_compare_arguments",
        "cli_data_arguments",
        "cli_ema_arguments",
        "cli_evaluate_arguments",
        "cli_latents_arguments",
        "cli_mup_arguments",
        "cli_plan_arguments",
        "cli_scaling_arguments",
        "cli_serve_arguments",
    ],
    ["cli_arguments"],
    ["cli_sampler"],
    [
        "cli_evaluate",
        "cli_weights",
        "cli_latents",
        "cli_doctor",
        "cli_ema",
        "cli_chaos",
        "cli_mup",
        "cli_plan",
        "cli_scaling",
        "cli_serve",
        "cli_top",
        "cli_compare",
    ],
    ["cli_data"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """Rooms of smalti that a file imports anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + ([f"smalti.{a.name}" for a in node.names] if node.module == "smalti" else [])
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("smalti.")}
    return rooms & set(LEVEL)


def test_every_room_has_a_floor():
    rooms = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in SOURCE.rglob("*.py")} - {"__init__"}
    assert rooms == set(LEVEL)


def test_imports_point_upward_in_the_list_only():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        wrong += [
            f"{path.relative_to(SOURCE)} imports {other}"
            for other in imports_of(path)
            if other != room and LEVEL[other] >= LEVEL[room]
        ]
    assert not wrong


def test_files_stay_readable():
    long = {p.name: n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_imports_are_light():
    program = (
        "import sys, smalti; light = 'torch' not in sys.modules; import smalti.sampling, smalti.cli;"
        "heavy = {'fastapi', 'ray', 'transformers', 'diffusers', 'tensorboard', 'matplotlib'} & set(sys.modules);"
        "print(light, sorted(heavy))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "True []"


def test_no_machine_paths_or_registry_hosts_in_the_project():
    root = SOURCE.parent.parent
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    here = Path(__file__).name
    banned = ["/wo" + "rk/", "/ro" + "ot/", "py" + "pi.org", "pythonh" + "osted"]
    wrong = [
        (name, word)
        for name in tracked
        if Path(name).suffix in {".py", ".md", ".toml", ".txt", ".yaml", ""} and Path(name).name != here
        for word in banned
        if (root / name).is_file() and word in (root / name).read_text(errors="ignore")
    ]
    assert not wrong
