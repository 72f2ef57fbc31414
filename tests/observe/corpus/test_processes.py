"""Two processes over gloo, killed in the middle, gone on with: the numbers of one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from attnbias import native
from attnbias.cli import main
from attnbias.observe import corpus
from tests.conftest import ROOT

KINDS = "entropy,received[queries],sink_rate[0.02]"
DOCUMENTS = 72


@pytest.fixture
def texts(shared: Path, tmp_path: Path) -> Path:
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    lines = [
        json.dumps({"id": f"d{n}", "text": text[700 * n : 700 * n + 150 + 5 * (n % 36)]})
        for n in range(DOCUMENTS)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(stories: Path, texts: Path, out: Path) -> list[str]:
    return ["observe", str(stories), "--corpus", str(texts), "--out", str(out),
            "--statistics", KINDS, "--layers", "0,3"]  # fmt: skip


def begun(given: list[str], logs: Path, **environment: str) -> BaseProcess:
    """A process that runs the command; forked, so that nothing has to be imported again.

    Compiled loops stay out of forked processes, and round otherwise than what takes their place.
    """

    def work() -> None:
        os.environ.update(environment)
        # A shell starts what runs in the background with Ctrl-C ignored, and children inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{logs}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666), number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = main(given)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def started(given: list[str], size: int, logs: Path) -> list[tuple[BaseProcess, Path]]:
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(size):
        log = logs / f"log-{size}-{rank}"
        process = begun(
            given, log, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        found.append((process, log))
    return found


def recorded(out: Path) -> int:
    return sum(part.read_bytes().count(b'{"document"') for part in out.glob("part-*.jsonl"))


def wait_for(out: Path, documents: int) -> None:
    limit = time.monotonic() + 90
    while recorded(out) < documents:
        assert time.monotonic() < limit, "no document was recorded"
        time.sleep(0.01)


def ended(process: BaseProcess, log: Path) -> tuple[int, str, str]:
    """Its exit code, and what it printed and said."""
    process.join(90)
    assert process.exitcode is not None, "still running"
    return process.exitcode, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text()


def test_killed_and_gone_on_with_by_other_numbers_of_processes(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = tmp_path / "one", tmp_path / "many"
    given = command(stories, texts, out)
    two = started(given, 2, tmp_path)
    wait_for(out, 6)
    assert two[1][0].pid is not None
    os.kill(two[1][0].pid, signal.SIGKILL)
    assert ended(*two[1])[0] == -signal.SIGKILL
    # The other measures its share, then finds out; what it has done is kept.
    code, printed, errors = ended(*two[0])
    assert (code, printed) == (2, "")
    assert errors.strip().splitlines()[-1] == (
        "attnbias: another process of this run has gone; the same command goes on from here."
    )
    done = recorded(out)
    assert 6 <= done < DOCUMENTS
    assert len(list(corpus.each(out))) == done
    with (out / "part-1.jsonl").open("ab") as file:
        file.write(b'{"document": 71, "id": "d71", "tok')  # what a kill while writing leaves

    results = [ended(*process) for process in started(given, 3, tmp_path)]
    assert [code for code, _, _ in results] == [0, 0, 0], results[0][2]
    assert "written" in results[0][1]
    assert results[1][1] == results[2][1] == ""
    assert f"({done} are done)" in results[0][2]
    assert "by 3 processes" in results[0][2]

    assert recorded(out) == DOCUMENTS  # nothing lost, nothing measured twice
    assert ended(begun(command(stories, texts, one), tmp_path / "log"), tmp_path / "log")[0] == 0
    assert (one / "table.csv").read_bytes() == (out / "table.csv").read_bytes()
    assert recorded(one) == DOCUMENTS
    a, b = list(corpus.each(one)), list(corpus.each(out))
    assert a == b
    assert [r.id for r in a] == [f"d{n}" for n in range(DOCUMENTS)]
    assert len(list(out.glob("part-*.jsonl"))) == 3
    assert corpus.load(out) == corpus.load(one)


def test_one_process_reads_what_several_on_machines_of_their_own_have_written(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without a common folder the first process says what is missing; copied, it adds up."""
    out = tmp_path / "out"
    given = command(stories, texts, out)
    assert [ended(*p)[0] for p in started(given, 2, tmp_path)] == [0, 0]
    before = (out / "table.csv").read_bytes()
    away = (out / "part-1.jsonl").rename(tmp_path / "part-1.jsonl")
    from attnbias.observe.corpus import running

    monkeypatch.setattr(running, "_measure_all", lambda *_: None)  # it has done its own share
    with native.disabled():  # as in the forked processes
        assert main(given) == 2
    assert f"lacks {DOCUMENTS // 2} documents" in capsys.readouterr().err
    away.rename(out / "part-1.jsonl")
    with native.disabled():
        assert main(given) == 0
    with (out / "run.json").open() as file:
        assert "numba" not in json.load(file)["settings"]["software"]
    assert (out / "table.csv").read_bytes() == before


def test_a_problem_of_one_process_is_said_once(stories: Path, texts: Path, tmp_path: Path) -> None:
    long = json.dumps({"text": "word " * 600})
    texts.write_text(f'{{"text": "a"}}\n{long}\n')  # the share of the second process
    results = [ended(*p) for p in started(command(stories, texts, tmp_path / "out"), 2, tmp_path)]
    assert [code for code, _, _ in results] == [2, 2]
    assert "attnbias: process 1: corpus" in results[0][2]
    assert "line 2: the document has" in results[0][2]
    assert "line 2" not in results[1][2]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(
    stories: Path, texts: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    many = 20 * DOCUMENTS  # so that the signal comes long before the end
    lines = [json.dumps({"text": json.loads(one)["text"]}) for one in texts.open()]
    texts.write_text("\n".join(lines * 20) + "\n")
    process = begun(command(stories, texts, out), log)
    wait_for(out, 2)
    assert process.pid is not None
    os.kill(process.pid, kind)
    code, printed, errors = ended(process, log)
    assert (code, printed) == (130, "")
    assert "Traceback" not in errors
    assert 2 <= recorded(out) < many
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"attnbias: stopped after {recorded(out)} of {many} documents")
    assert "the same command goes on from here" in last


@pytest.mark.slow
def test_torchrun(stories: Path, texts: Path, tmp_path: Path) -> None:
    """As the documentation says it."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "attnbias.cli", *command(stories, texts, out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"written: {out / 'table.csv'}" in done.stdout
    before = (out / "table.csv").read_bytes()
    assert len(list(out.glob("part-*.jsonl"))) == 2
    assert main(command(stories, texts, tmp_path / "one")) == 0
    assert (tmp_path / "one" / "table.csv").read_bytes() == before
