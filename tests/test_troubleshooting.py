"""docs/troubleshooting.md: what it quotes exists, and its cells are short."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PROGRAMS = [path for pattern in ("*.py", "w2v2/**/*.py", "data_scripts/*.py") for path in ROOT.glob(pattern)]
OF_OTHERS = {"--shm-size", "hf upload", "hf auth login", "/dev/shm", "MASTER_ADDR", "NCCL_SOCKET_IFNAME",
             "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_TOKEN"}  # fmt: skip


def read_program() -> tuple[set[str], str]:
    """Names of fields and of groups in records, and all text of the program, f-strings without what they fill in."""
    names, texts = set(), []
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(f"--{node.target.id}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return names, "\n".join(texts)


FLAGS, TEXT = read_program()


def exists(quoted: str) -> bool:
    """Whether the program has this flag, file, key or environment variable."""
    if quoted.startswith("--"):
        return quoted.split()[0].split("=")[0] in FLAGS | OF_OTHERS
    if "/" in quoted or quoted.endswith(".py"):
        return quoted in OF_OTHERS or (ROOT / quoted).exists()
    return quoted in OF_OTHERS or re.search(rf"\b{re.escape(quoted.removeprefix('eval_'))}\b", TEXT) is not None


def test_flags_keys_and_files_of_the_page_exist():
    quoted = set(re.findall(r"`([^`]+)`", PAGE))
    assert len(quoted) > 60
    assert not sorted(name for name in quoted if not exists(name))
    assert not exists("--batch_hour") and not exists("codebook_perplexities")


def test_messages_of_the_page_are_the_programs():
    messages = set(re.findall(r'"([^"]+)"', PAGE))
    assert len(messages) > 30
    assert not sorted(message for message in messages if message not in TEXT)


def test_cells_have_under_fifteen_words():
    cells = [cell for line in PAGE.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if len(cell.split()) >= 15]
