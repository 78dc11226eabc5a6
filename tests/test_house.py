"""The rules of the house, read off the source: floors, effects of importing, lengths, what is never used."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("nanochat", "tasks", "scripts")

# The library from the ground up. A room imports from lower floors and from earlier rooms of its own.
FLOORS = (
    ("__init__", "paths", "machines", "runtime"),
    ("schedules", "terminal", "tokenizer",
     "attention_blocked", "attention_flash", "attention", "compilation", "fp8", "losses",
     "optim", "calculator", "sandbox_calls", "sandbox_launcher", "sandbox", "download", "corpora", "tinyworld_tables",
     "tinyworld_facts"),
    ("chat", "dataset", "tinyworld_text", "tinyworld_skills", "tinyworld_documents", "tinyworld_bundle", "tinyworld",
     "gpt", "kv_cache"),
    ("scaling", "memory", "forecast", "training_step", "batches", "checkpoint", "sampling",
     "decoding", "engine", "results", "forecast_text", "progress", "saver", "public_files", "public_run",
     "hf_folder", "core_bundle", "core_references", "laws", "pairs", "sweep"),
    ("samples", "bpb", "scoring", "core_eval", "chat_eval", "train", "probe", "checks", "rollouts", "engine_worker",
     "guard", "api", "server", "report_charts", "report_pages", "report_shapes", "report_run", "report_training",
     "report_sections", "report_compare", "report", "research_pages", "laws_pages", "pairs_page", "rehearsal"),
)  # fmt: skip
ORDER = [room for floor in FLOORS for room in floor]
FOR_TASKS = ("calculator", "dataset", "download", "sandbox", "tinyworld")
READING_PATH = (
    "nanochat/gpt.py", "nanochat/optim.py", "nanochat/attention.py", "nanochat/batches.py",
    "nanochat/training_step.py", "nanochat/train.py", "scripts/base_train.py", "scripts/chat_sft.py",
)  # fmt: skip


@lru_cache
def sources() -> dict[str, str]:
    """Path from the root -> text, for every file of the library, the tasks and the scripts; not of nanochat/hub/, which
    goes out with exported models and is imported by transformers alone."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path.parent.name != "hub"]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@lru_cache
def tree(path: str) -> ast.Module:
    return ast.parse(sources()[path])


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@lru_cache
def imports(path: str) -> tuple[tuple[str, int], ...]:
    """Every module that a file imports anywhere in it, in full, with the line: `from nanochat import chat` is
    nanochat.chat."""
    modules = {module_name(other) for other in sources()}
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.split("/")[: -node.level]
                base = ".".join(package + ([node.module] if node.module else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append((full if full in modules else base, node.lineno))
    return tuple(found)


def report(broken):
    assert not broken, "\n" + "\n".join(broken)


def calls_and_names(path):
    """(dotted name, line) of every name and attribute that a file mentions, aliases of modules resolved."""
    aliases = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Name, ast.Attribute)):
            dotted = ast.unparse(node)
            first, _, rest = dotted.partition(".")
            if first.isidentifier():
                yield ".".join(filter(None, (aliases.get(first, first), rest))), node.lineno


# -- who imports whom


def test_every_room_has_a_floor():
    rooms = {path.removeprefix("nanochat/").removesuffix(".py") for path in sources() if path.startswith("nanochat/")}
    assert sorted(rooms - set(ORDER)) == [], "give the new room a place in FLOORS (and in the README's table)"


def test_a_room_imports_from_below():
    broken = []
    for path in sources():
        if path.startswith("nanochat/"):
            room = path.removeprefix("nanochat/").removesuffix(".py")
            for name, line in imports(path):
                if name.split(".")[0] != "nanochat":
                    continue
                other = name.removeprefix("nanochat").removeprefix(".").split(".")[0] or "__init__"
                if ORDER.index(other) >= ORDER.index(room):
                    broken.append(
                        f"{path}:{line} imports {name}, which stands on its floor or above, and not before it"
                    )
    report(broken)


def test_no_import_goes_in_a_circle():
    graph = {module_name(path): {name for name, _ in imports(path)} for path in sources()}
    done, circles = set(), []

    def visit(module, trail):
        if module in trail:
            circles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module in graph and module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    report(circles)


def test_the_library_imports_neither_tasks_nor_scripts_and_nothing_imports_tests_or_dev():
    report(
        [
            f"{path}:{line} imports {name}"
            for path in sources()
            for name, line in imports(path)
            if name.split(".")[0] in ("tests", "dev")
            or (path.startswith("nanochat/") and name.split(".")[0] in ("tasks", "scripts"))
        ]
    )


def test_no_script_or_task_imports_a_script():
    """One asks others how they read their flags: scripts/rehearse.py, by importlib, and for nothing else. The library
    asks base_train the same once, in a process of its own: a sweep starts its trainings so, too."""
    asking = [path for path in sources() if path.startswith("nanochat/") and "from scripts." in sources()[path]]
    assert (
        asking == ["nanochat/sweep.py"] and sources()[asking[0]].count("from scripts.base_train import parse_args") == 1
    )
    by_name = [
        path for path in sources() if "importlib.import_module" in sources()[path] and path.startswith("scripts/")
    ]
    assert (
        by_name == ["scripts/rehearse.py"] and sources()[by_name[0]].count("import_module(self.module).parse_args") == 1
    )
    report(
        [
            f"{path}:{line} imports {name}"
            for path in sources()
            for name, line in imports(path)
            if name.split(".")[0] == "scripts"
        ]
    )


def test_tasks_import_only_what_they_may_of_the_library():
    broken = []
    for path in sources():
        if path.startswith("tasks/"):
            for name, line in imports(path):
                room = name.partition(".")[2].split("_")[0]
                if name.split(".")[0] == "nanochat" and room not in FOR_TASKS:
                    broken.append(f"{path}:{line} imports {name}; tasks may import {', '.join(FOR_TASKS)}")
    report(broken)


# -- what only some may do


def test_only_runtime_and_paths_read_the_environment():
    readers = ("os.environ", "os.getenv", "os.environb", "os.putenv", "os.unsetenv")
    report(
        [
            f"{path}:{line} uses {name}"
            for path in sources()
            if path not in ("nanochat/runtime.py", "nanochat/paths.py")
            for name, line in calls_and_names(path)
            if name.startswith(readers)
        ]
    )


def test_only_runtime_optim_and_checkpoint_talk_to_other_ranks():
    allowed = ("nanochat/runtime.py", "nanochat/optim.py", "nanochat/checkpoint.py")
    report(
        [
            f"{path}:{line} uses {name}"
            for path in sources()
            if path not in allowed
            for name, line in [*calls_and_names(path), *imports(path)]
            if name.startswith(("torch.distributed", "torch.nn.parallel"))
        ]
    )


def test_no_pickle_no_eval_no_torch_load():
    modules = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    names = {"eval", "exec", "torch.load", "torch.save", "builtins.eval", "builtins.exec"}
    allowed = {
        ("nanochat/sandbox_calls.py", "exec"),  # it runs inside the sandbox
        ("nanochat/public_files.py", "pickle"),  # of strangers: see the next test
        ("nanochat/public_files.py", "torch.load"),
    }
    broken = []
    for path in sources():
        found = [(n.split(".")[0], line) for n, line in imports(path) if n.split(".")[0] in modules]
        found += [(n, line) for n, line in calls_and_names(path) if n in names]
        broken += [f"{path}:{line} uses {n}" for n, line in found if (path, n) not in allowed]
    report(broken)


def test_the_importer_reads_strangers_files_in_the_safe_way_only():
    """Of pickle an unpickler with a find_class of its own, which is in test_import; of torch.load weights_only."""
    path = "nanochat/public_files.py"
    used = {name for name, _ in calls_and_names(path) if name.startswith("pickle.")}
    assert used <= {"pickle.Unpickler", "pickle.UnpicklingError"}
    loads = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert loads and all("weights_only=True" in [ast.unparse(k) for k in n.keywords] for n in loads)
    unpicklers = [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "pickle.Unpickler" for base in node.bases)
    ]
    assert len(unpicklers) == 1 and "find_class" in [f.name for f in unpicklers[0].body if hasattr(f, "name")]


def test_no_error_is_swallowed():
    """No `except:`, and no handler that only passes."""
    broken = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                if node.type is None:
                    broken.append(f"{path}:{node.lineno} except without a kind of error")
                broad = node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
                empty = all(isinstance(s, (ast.Pass, ast.Continue)) or is_ellipsis(s) for s in node.body)
                if empty and (broad or all(isinstance(s, ast.Pass) for s in node.body)):
                    broken.append(f"{path}:{node.lineno} swallows {ast.unparse(node.type) if node.type else 'all'}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
                if any(ast.unparse(arg) in ("Exception", "BaseException") for arg in node.args):
                    broken.append(f"{path}:{node.lineno} suppresses every error")
    report(broken)


def is_ellipsis(statement):
    return (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and statement.value.value is ...
    )


def test_no_path_of_one_machine():
    """Strings and comments name no home, no temporary folder and no disk of the machine they were written on."""
    pattern = re.compile(r"(?<![\w.~/}:<])/(?:work|home|root|tmp|Users|mnt|data|scratch|workspace)\b(?:/|[\"'\s])")
    files = dict(sources())
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.toml"), *(ROOT / "runs").glob("*.sh"), *(ROOT / "dev").glob("*.py")]:
        files[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    report(
        [
            f"{path}:{number} {line.strip()}"
            for path, text in files.items()
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line) and not line.startswith("#!")
        ]
    )


# -- length


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_450_lines(folder):
    lengths = {path: len(text.splitlines()) for path, text in sources().items() if path.startswith(folder)}
    report([f"{path} has {lines} lines" for path, lines in lengths.items() if lines > 450])


def test_the_reading_path_stays_under_1900_lines():
    lengths = {path: len(sources()[path].splitlines()) for path in READING_PATH}
    assert sum(lengths.values()) < 1900, lengths


# -- importing does nothing


def test_scripts_parse_their_arguments_in_main():
    """parse_args(argv=None), main(args), and a guard."""
    broken = []
    for path in sources():
        if path.startswith("scripts/"):
            functions = {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}
            if path.endswith("__init__.py"):
                continue
            for name, arguments in (("parse_args", ["argv"]), ("main", ["args"])):
                if name not in functions or [arg.arg for arg in functions[name].args.args] != arguments:
                    broken.append(f"{path} has no {name}({', '.join(arguments)})")
            if not any(isinstance(n, ast.If) and "__name__" in ast.unparse(n.test) for n in tree(path).body):
                broken.append(f"{path} has no guard")
    report(broken)


IMPORT_ALL = """
import importlib, json, logging, os, sys, threading, warnings
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
effects = []
if dict(os.environ) != before:
    effects.append("the environment was changed")
if logging.getLogger().handlers:
    effects.append("logging was configured")
if [t.name for t in threading.enumerate() if t is not threading.main_thread()]:
    effects.append(f"threads were started: {threading.enumerate()}")
torch = sys.modules.get("torch")
if torch is not None:
    if torch.cuda.is_initialized():
        effects.append("CUDA was initialized")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        effects.append("a process group was made")
    if torch.get_default_dtype() != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        effects.append("numeric switches were set")
for name in ("wandb", "matplotlib", "transformers"):
    if name in sys.modules:
        effects.append(f"{name} was imported")
json.dump({"effects": effects}, sys.stderr)
"""


def test_importing_does_nothing(tmp_path):
    """Every module, in one fresh process: no file, no output, no arguments parsed, no environment, logging, CUDA."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "TMPDIR": str(here),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    modules = [module_name(path) for path in sources()]
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    run = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert json.loads(run.stderr) == {"effects": []}
    assert [path for path in tmp_path.rglob("*") if path not in (home, here)] == []
