"""Reward functions that misbehave: each costs the completion it misbehaves on, is counted, and stops nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from components.common.errors import DataError, SettingsError, StageError
from components.common.settings import dump_stage
from components.reward import landlock
from components.reward.config import RewardSettings
from components.reward.process import Worker, WorkerLost
from components.reward.scoring import _encoded

QUICK = {"max_error_share": 1.0, "timeout_seconds": 1.5, "batch_timeout_seconds": 2.0}

MISBEHAVING = """
import os, re, signal, sys, time

def judge(completions, **columns):
    return [score(text) for text in completions]

def score(text):
    if text == "raise":
        raise RuntimeError("cannot read this")
    if text == "leave":
        sys.exit(3)
    if text == "hang":
        while True:
            time.sleep(60)
    if text == "regex":
        return float(bool(re.fullmatch("(a+)+b", "a" * 64)))
    if text == "exit":
        os._exit(7)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "memory":
        return len(bytearray(64 << 30))
    if text == "print":
        print("noise on the output" * 100)
        sys.stderr.write("noise on the errors")
    return {"nan": float("nan"), "inf": float("inf"), "text": "high", "none": None, "bool": True}.get(text, len(text))
"""


def test_each_completion_bears_its_own_fault(case, rows_of):
    name = case.write(MISBEHAVING)
    texts = [
        "a", "raise", "leave", "nan", "inf", "text", "none", "bool", "print", "memory", "ab",
        "hang", "exit", "segfault", "regex", "abc",
    ]  # fmt: skip
    rows = case.score(rows_of("p", texts), functions=[{"name": f"{name}:judge"}], error_score=-1.0, **QUICK)
    got = {row["completion"]: (row["reward"], row["error"]) for row in rows}
    assert {text: got[text] for text in ("a", "ab", "abc", "print", "bool", "none")} == {
        "a": (1, None), "ab": (2, None), "abc": (3, None), "print": (5, None), "bool": (1, None), "none": (None, None)
    }  # fmt: skip
    errors = {text: error.partition(" (mine.py")[0] for text, (_, error) in got.items() if error is not None}
    assert all(got[text][0] == -1 for text in errors)
    expected = {
        "raise": "judge: RuntimeError: cannot read this",
        "leave": "judge: SystemExit: 3",
        "nan": "judge: want a finite number, got nan",
        "inf": "judge: want a finite number, got inf",
        "text": "judge: want a number or None, got ValueError: could not convert string to float: 'high'",
        "memory": "judge: MemoryError: ",
        "hang": "judge: it hung, so its process was killed",
        "regex": "judge: it hung, so its process was killed",
        "exit": "judge: its process died (exit status 7)",
        "segfault": "judge: its process died (signal SIGSEGV)",
    }
    assert errors == expected
    assert got["raise"][1] == f"{expected['raise']} (mine.py, line 9, in score)"
    assert case.manifest.metrics["reward/errors"] == len(expected)


ODD_RESULTS = """
def too_few(completions, **columns):
    return [1.0] * (len(completions) - 1)

def nothing(completions, **columns):
    return None

def a_word(completions, **columns):
    return "x" * len(completions)

async def later(completions, **columns):
    return [float(len(text)) for text in completions]

def arrays(completion_ids):
    import numpy
    return numpy.array([sum(ids) for ids in completion_ids], dtype=numpy.float32)

def by_group(completions, prompt_id):
    longest = max(map(len, completions))
    return [float(len(text) == longest and name == prompt_id[0]) for text, name in zip(completions, prompt_id)]
"""


@pytest.mark.parametrize(
    ("function", "reward", "error"),
    [
        ("too_few", 0, "too_few: ValueError: want 1 scores, one a completion, got 0"),
        ("nothing", 0, "nothing: TypeError: want a list of 1 scores, got NoneType"),
        ("a_word", 0, "a_word: TypeError: want a list of 1 scores, got str"),
        ("later", 2, None),
        ("arrays", ord("a") + ord("b"), None),
    ],
)
def test_what_a_function_returns_is_checked(function, reward, error, case, rows_of):
    name = case.write(ODD_RESULTS)
    rows = case.score(rows_of("p", ["ab", "ab"]), functions=[{"name": f"{name}:{function}"}], **QUICK)
    assert [(row["reward"], row["error"]) for row in rows] == [(reward, error)] * 2


FAILS_ON_SOME = """
def some(completions, **columns):
    return [1 / (text != "bad") for text in completions]

async def later(completions, **columns):
    return some(completions)
"""


@pytest.mark.parametrize(("function", "line"), [("some", 3), ("later", 3)])
def test_a_function_that_fails_on_most_completions_ends_the_stage(function, line, case, rows_of):
    name = case.write(FAILS_ON_SOME)
    chosen = {"functions": [{"name": f"{name}:{function}"}]}
    case.score(rows_of("p", ["bad", "bad", "a", "b"]), **chosen)
    assert case.manifest.metrics["reward/errors"] == 2
    failed = f"reward function {function} failed on 3 of 4 completions"
    first = rf"first with ZeroDivisionError: division by zero \(mine\.py, line {line}, in "
    with pytest.raises(StageError, match=f"(?s){failed}, {first}.*at most 50% may fail.*reward.max_error_share"):
        case.score(rows_of("p", ["bad", "bad", "bad", "b"]), **chosen)
    case.score(rows_of("p", ["bad", "bad", "bad", "b"]), max_error_share=0.75, **chosen)
    assert case.manifest.metrics["reward/errors"] == 3


def test_completions_that_were_not_generated_are_nobodys_fault(case, rows_of):
    name = case.write(FAILS_ON_SOME)
    rows = rows_of("p", ["bad", "", "", "a"])
    rows[1]["finish_reason"] = rows[2]["finish_reason"] = "error"
    case.score(rows, functions=[{"name": f"{name}:some"}])
    with pytest.raises(StageError, match="failed on 1 of 1 completions"):
        case.score(rows[:3], functions=[{"name": f"{name}:some"}])


def test_groups_stay_whole_in_a_batch(case, rows_of):
    name = case.write(ODD_RESULTS)
    rows = rows_of("p", ["a", "abc", "ab"]) + rows_of("q", ["abcde", "ab"])
    scored = case.score(rows, functions=[{"name": f"{name}:by_group"}], batch_size=2)
    assert [row["reward"] for row in scored] == [0, 1, 0, 1, 0]


PRYING = """
import os, socket, subprocess, sys

def tell(completions, **columns):
    return [look(text) for text in completions]

def look(what):
    try:
        raise AssertionError("got " + str(LOOKS[what]()))
    except OSError as error:
        raise AssertionError(type(error).__name__) from None

def parent_environment():
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if b"GRPO_TEST_SECRET" in open("/proc/" + name + "/environ", "rb").read():
                    return "the parent's secret"
            except OSError:
                pass
    return "nothing"

def network():
    socket.create_connection(("127.0.0.1", PORT), timeout=1)
    return "a connection"

LOOKS = {
    "variables": lambda: sorted(set(os.environ) - ALLOWED),
    "parent": parent_environment,
    "network": network,
    "write": lambda: open(OUTSIDE + "/written", "w").write("x"),
    "read": lambda: open(OUTSIDE + "/secret").read(),
    "own": lambda: open("mine", "w").write("x"),
    "kill": lambda: os.kill(PARENT, 9),
    "run": lambda: subprocess.run(["true"]).returncode,
}
ALLOWED = {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "PYTHONPATH",
           "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE",
           "PYTHONUNBUFFERED"}
"""


@pytest.mark.skipif(landlock.abi() < 6, reason="this kernel's Landlock cannot shut processes in")
def test_a_function_sees_no_credentials_no_network_and_no_other_files(case, rows_of, tmp_path, monkeypatch):
    import socket

    for name in ("AWS_SECRET_ACCESS_KEY", "KUBERNETES_SERVICE_HOST", "MLFLOW_TRACKING_TOKEN", "GRPO_TEST_SECRET"):
        monkeypatch.setenv(name, "GRPO_TEST_SECRET")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"PORT = {server.getsockname()[1]}\nOUTSIDE = {str(outside)!r}\nPARENT = {os.getpid()}\n"
        name = case.write(head + PRYING)
        texts = ["variables", "parent", "network", "write", "read", "own", "kill", "run"]
        rows = case.score(rows_of("p", texts), functions=[{"name": f"{name}:tell"}], max_error_share=1)
    found = {row["completion"]: row["error"].removeprefix("tell: AssertionError: ") for row in rows}
    found = {what: text.partition(" (mine.py")[0] for what, text in found.items()}
    assert found.pop("network") in ("PermissionError", "OSError", "ConnectionRefusedError")
    assert found.pop("kill") in ("PermissionError", "ProcessLookupError")
    assert found == {
        "variables": "got []", "parent": "got nothing", "write": "PermissionError", "read": "PermissionError",
        "own": "got 1", "run": "got 0",
    }  # fmt: skip
    assert not (outside / "written").exists()


def test_files_that_are_allowed_can_be_read(case, rows_of, tmp_path):
    words = tmp_path / "words"
    words.write_text("blue green")
    name = case.write(
        f"WORDS = open({str(words)!r}).read().split()\n"
        "def known(completions):\n    return [text in WORDS for text in completions]"
    )
    rows = case.score(rows_of("p", ["blue", "red"]), functions=[{"name": f"{name}:known"}], read_paths=[str(words)])
    assert [row["reward"] for row in rows] == [1, 0]


def test_nothing_a_function_starts_outlives_the_stage(case, rows_of, tmp_path):
    mark = f"{os.getpid()}{tmp_path.name}"
    name = case.write(
        "import subprocess\n"
        "def start(completions):\n"
        f"    subprocess.Popen(['sleep', '600', {mark!r}], start_new_session=True)\n"
        "    return [1.0] * len(completions)\n"
    )
    case.score(rows_of("p", ["a"]), functions=[{"name": f"{name}:start"}])
    wait_until(lambda: not commands_with(mark))  # the kernel ends what is left in a namespace, beside us


def commands_with(mark):
    """Command lines, of all processes, that hold a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if mark.encode() in command:
            found.append(command)
    return found


def test_the_exit_status_is_told_when_it_comes_late(case, tmp_path):
    """A worker's processes end one after another; on a busy machine the outermost ends late."""
    name = case.write("import os\ndef die(completions):\n    os._exit(7)")
    settings = RewardSettings(functions=[{"name": f"{name}:die"}]).embedded(tmp_path)
    batch, worker = _encoded(pa.table({"completions": ["a"]})), Worker(settings.functions[0], settings, tmp_path)
    worker.ready()
    os.kill(worker.process.pid, signal.SIGSTOP)
    late = threading.Timer(1.0, os.kill, (worker.process.pid, signal.SIGCONT))
    late.start()
    with pytest.raises(WorkerLost, match=r"its process died \(exit status 7\)"):
        worker.score(batch, 1, 60)
    late.join()


def test_a_function_that_hangs_on_everything_ends_the_stage(case, rows_of):
    name = case.write("import os\ndef die(completions):\n    os._exit(1)")
    with pytest.raises(StageError, match=r"hung or crashed 4 times, last .*die: its process died \(exit status 1\)"):
        case.score(rows_of("p", list("abcdef")), functions=[{"name": f"{name}:die"}], max_lost_workers=3)


UNUSABLE = {
    "missing function": ("def accuracy(completions): return []", "accuracies", {}, "did you mean accuracy"),
    "not callable": ("limit = 3", "limit", {}, "is a int, want a function"),
    "fails on import": ("1 / 0\ndef f(completions): pass", "f", {}, "failed while it was imported: ZeroDivisionError"),
    "exits on import": (
        "import os\nos._exit(3)\ndef f(completions): pass", "f", {}, r"its process died \(exit status 3\) while",
    ),
    "imports what is not there": (
        "import absent_package\ndef f(completions): pass", "f", {}, "No module named 'absent_package'; install it",
    ),
    "wants an unknown column": (
        "def f(completions, solution): pass", "f", {},
        r"it wants solution: neither a column of the data set; there are answer nor among its arguments",
    ),
    "a column that is not there": (
        "def f(completions, solution): pass", "f", {"columns": {"solution": "answers"}},
        "solution = 'answers': the data set has no such column; did you mean answer",
    ),
    "takes no such argument": (
        "def f(completions, answer, tolerance=0): pass", "f", {"arguments": {"tolerence": 1}},
        "it takes no argument tolerence; did you mean tolerance",
    ),
    "takes nothing": ("def f(): pass", "f", {}, "it takes none of prompts, completions, completion_ids, answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_function_that_cannot_be_used_is_refused_before_anything_is_scored(name, case, rows_of):
    source, function, options, message = UNUSABLE[name]
    path = case.write(source)
    with pytest.raises((DataError, SettingsError), match=message):
        case.score(rows_of("p", ["a"]), functions=[{"name": f"{path}:{function}"} | options])


def test_every_unusable_function_is_named_at_once(case, rows_of):
    path = case.write("def f(completions, solution): pass\ndef g(completions, proof): pass")
    with pytest.raises(DataError, match=r"(?s)it wants solution.*it wants proof"):
        case.score(rows_of("p", ["a"]), functions=[{"name": f"{path}:f"}, {"name": f"{path}:g"}])


def test_a_function_of_a_package(case, rows_of):
    rows = case.score(
        rows_of("p", ["#### 4", "#### 5"]),
        functions=[{"name": "components.reward.functions.matching:numeric_match", "label": "packaged"}],
    )
    assert [row["rewards/packaged"] for row in rows] == [1, 0]
    with pytest.raises(DataError, match=r"numbers does not define find_numbr; did you mean find_number"):
        case.score(rows_of("p", ["a"]), functions=[{"name": "components.common.numbers:find_numbr"}])


def test_trls_own_reward_functions_take_messages(case, rows_of):
    pytest.importorskip("trl.rewards", reason="TRL is installed for development only")
    rows = case.score(
        rows_of("p", ["<think>a</think>b", "b"]),
        functions=[{"name": "trl.rewards.format_rewards:think_format_reward", "messages": True}], memory_gb=64,
    )  # fmt: skip
    assert [row["reward"] for row in rows] == [1, 0]


CONVERSATION = [{"role": "system", "content": "add"}, {"role": "user", "content": "2+2="}]


@pytest.mark.parametrize(
    ("kept", "messages"),
    [
        ({"prompt_messages": json.dumps(CONVERSATION)}, CONVERSATION),
        ({}, [{"role": "user", "content": "prompt of p"}]),
    ],
)
def test_messages_are_those_the_prompt_was_rendered_from(kept, messages, case, rows_of):
    name = case.write(
        f"WANT = {messages!r}\n"
        "def f(prompts, completions, **columns):\n"
        "    assert prompts == [WANT] * 2 and sorted(columns) == ['answer', 'completion_ids'], (prompts, columns)\n"
        "    return [float(message['content']) for (message,) in completions]\n"
        "def plain(prompts):\n"
        "    return [float(prompt == 'prompt of p') for prompt in prompts]\n"
    )
    functions = [{"name": f"{name}:f", "messages": True}, {"name": f"{name}:plain"}]
    rows = case.score(rows_of("p", ["3", "4"], **kept), functions=functions)
    assert [(row["reward"], row["error"]) for row in rows] == [(4, None), (5, None)]


def test_a_column_taken_for_the_prompts_comes_as_a_users_message(case, rows_of):
    name = case.write(
        "def f(prompts, completions):\n"
        "    return [float(prompt == [{'role': 'user', 'content': '4'}]) for prompt in prompts]\n"
    )
    function = {"name": f"{name}:f", "messages": True, "columns": {"prompts": "answer"}}
    rows = case.score(rows_of("p", ["a", "b"], prompt_messages=json.dumps(CONVERSATION)), functions=[function])
    assert [(row["reward"], row["error"]) for row in rows] == [(1, None)] * 2


def test_columns_and_arguments_reach_the_function(case, rows_of):
    name = case.write(
        "def f(prompts, completions, completion_ids, truth, finish_reason, *, bonus, **columns):\n"
        "    assert sorted(columns) == ['answer'], columns\n"
        "    assert prompts == ['prompt of p'] * 2 and finish_reason == ['stop'] * 2\n"
        "    return [float(t) + bonus + len(i) for t, i in zip(truth, completion_ids)]\n"
    )
    function = {"name": f"{name}:f", "columns": {"truth": "answer"}, "arguments": {"bonus": 100}}
    rows = case.score(rows_of("p", ["a", "abc"]), functions=[function])
    assert [(row["reward"], row["error"]) for row in rows] == [(105, None), (107, None)]


def test_what_a_dishonest_function_answers_is_not_believed(case, rows_of):
    name = case.write(
        "import os, struct\n"
        "def forge(completions):\n"
        '    reply = b\'{"scores": [9, 9, 9, 9], "errors": {}}\'\n'
        "    for fd in range(3, 4096):\n"  # a worker's end has the number it had in the stage
        "        try:\n"
        "            os.write(fd, struct.pack('>Q', len(reply)) + reply)\n"
        "        except OSError:\n"
        "            pass\n"
        "    return [1.0] * len(completions)\n"
    )
    rows = case.score(rows_of("p", ["a", "b"]), functions=[{"name": f"{name}:forge"}], max_error_share=1)
    assert {row["error"] for row in rows} == {"forge: its process answered out of turn"}
    assert math.isclose(sum(row["reward"] for row in rows), 0)


HANGING_STAGE = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in its background
from components.reward.stage import run
run(Path(sys.argv[1]).read_text(), [Path(sys.argv[2])], Path(sys.argv[3]))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_die_with_the_stage(end, case, rows_of, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    name = case.write("import time\ndef hang(completions):\n    time.sleep(600)")
    settings = tmp_path / "settings.json"
    hanging = RewardSettings(functions=[{"name": f"{name}:hang"}], timeout_seconds=600, batch_timeout_seconds=600)
    settings.write_text(dump_stage(case.context, hanging))
    shard = case.rollout(train=rows_of("p", ["a"]))
    command = [sys.executable, "-c", HANGING_STAGE, settings, shard, tmp_path / "scored.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as stage:
        wait_until(lambda: workers_below(scratch))
        stage.send_signal(end)
        stage.communicate(timeout=120)
    wait_until(lambda: not workers_below(scratch))


def workers_below(folder):
    """Processes that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [path] if path.readlink().is_relative_to(folder) else []
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found


def wait_until(condition, seconds=120.0):
    """Waits for a condition that must come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
