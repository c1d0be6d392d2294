"""The push to the Hugging Face Hub: in the background, and never at the expense of the run.

Only what belongs to the model is sent: weights, configurations, card, curves, metrics and results.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from w2v2.errors import UserError
from w2v2.hub.card import write_model_card
from w2v2.hub.card_parts import publishable
from w2v2.hub.curves import draw_plots

__all__ = ["HubPusher", "draw_plots", "write_model_card"]

logger = logging.getLogger(__name__)

PUBLISHED = ("*.safetensors", "*.json", "*_config.yaml", "README.md", "LICENSE", "metrics.jsonl", "plots/*.png")
UNPUBLISHED = ("optimizer*", "scheduler*", "trainer_state*", "training_state*", "plan.json")
NAMES_PATHS = ("pretrain_config.yaml", "finetune_config.yaml", "results.json")  # sent without tokens and paths
RETRY_DELAYS_SECONDS = (10, 30, 90)
SILENCE_SECONDS = 300  # of the Hub, after which a request has failed; huggingface_hub itself would wait for ever
_STAGING_PREFIX = ".hub_push-"


class HubPusher:
    """Pushes folders to one Hub repository, one at a time, on a thread that can neither stop nor hold up the run.

    What is to be pushed is set aside at once (checkpoints by hard link), so rotation may delete the original.
    A push that waits while another one is under way gives way to a newer one. One that fails is tried again after
    each of `retry_delays_seconds`, unless the Hub refused it (a 4xx but 408, 409 and 429) or a newer one waits.
    The thread is a daemon of our own: `run_as_future` of huggingface_hub keeps the interpreter from ending while a
    dead connection lasts.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        repo_id: str | None,
        private: bool | None,
        token: str | None = None,
        every_save: bool,
        retry_delays_seconds: Sequence[float] | None = None,
    ) -> None:
        """Start to create the repository, so that a refused token shows in the first minute of the run.

        Args:
            repo_id: as `user/name`; the folder's name where none is given.
            private: whether a new repository is private; None leaves it to the account's default.
            every_save: without it only pushes of `output_dir` itself are carried out, not those of checkpoints.
            retry_delays_seconds: `RETRY_DELAYS_SECONDS` where none are given.

        Raises:
            UserError: `repo_id` cannot be the name of a repository.
        """
        self._output_dir = Path(output_dir).resolve()
        self._repo_id = repo_id or self._output_dir.name
        try:
            validate_repo_id(self._repo_id)
        except HFValidationError as error:
            raise UserError(f"--hub_model_id {self._repo_id}: {_one_line(error)}; give it as user/name") from None
        self._private = private
        self._token = token
        self._every_save = every_save
        self._retry_delays = RETRY_DELAYS_SECONDS if retry_delays_seconds is None else tuple(retry_delays_seconds)
        self._api = HfApi(token=token)
        self._url: str | None = None
        self._pushed = False
        self._state = threading.Condition()
        self._waiting: tuple[Path, str] | None = None
        self._busy = True
        self._finishing = False
        disable_progress_bars()  # they would tear the run's own bar
        self._output_dir.mkdir(parents=True, exist_ok=True)
        for left_over in self._output_dir.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        threading.Thread(target=self._work, name="hub-push", daemon=True).start()

    def push(self, folder: str | os.PathLike, message: str) -> None:
        """Push the folder's publishable files to the root of the repository, later and elsewhere; never raises."""
        folder = Path(folder).resolve()
        if folder != self._output_dir and not self._every_save:
            return
        try:
            job = _stage(folder, self._output_dir), message
        except Exception as error:
            self._warn(f"cannot push {folder.name}", error)
            return
        with self._state:
            replaced, self._waiting = self._waiting, job
            self._state.notify_all()
        if replaced is not None:
            logger.info("Hub: '%s' gives way to '%s'", replaced[1], message)
            shutil.rmtree(replaced[0], ignore_errors=True)

    def finish(self, timeout_seconds: float = 300) -> str | None:
        """Wait for what was pushed, at most so long; the repository's address if the last push arrived."""
        with self._state:
            self._finishing = True
            self._state.notify_all()
            done = self._state.wait_for(lambda: not self._busy and self._waiting is None, timeout_seconds)
        if not done:
            logger.warning(
                "Hub: the push to %s had not ended after %.0f s and is given up; all files are in the output_dir",
                self._repo_id,
                timeout_seconds,
            )
        return self._url if done and self._pushed else None

    def _work(self) -> None:
        self._attempt("cannot create the repository", self._create)
        while True:
            with self._state:
                self._busy = False
                self._state.notify_all()
                self._state.wait_for(lambda: self._waiting is not None or self._finishing)
                if self._waiting is None:
                    return
                (staged, message), self._waiting = self._waiting, None
                self._busy = True
            self._pushed = self._upload_in_the_end(staged, message)
            shutil.rmtree(staged, ignore_errors=True)

    def _upload_in_the_end(self, staged: Path, message: str) -> bool:
        """Whether the push arrived, at once or after a retry."""
        for delay in self._retry_delays:
            error = self._attempt("the push failed", self._upload, staged, message, then=f"next try in {delay:g} s")
            if error is None or _is_final(error):
                return error is None
            with self._state:
                if self._state.wait_for(lambda: self._waiting is not None, delay):
                    logger.info("Hub: '%s' gives way to '%s'", message, self._waiting[1])
                    return False
        return self._attempt("the push failed", self._upload, staged, message) is None

    def _attempt(
        self, what: str, action: Callable[..., None], *arguments: object, then: str = ""
    ) -> BaseException | None:
        """The error that `action` ended with, after a warning; None where it did not fail."""
        try:
            get_session().timeout = SILENCE_SECONDS
            action(*arguments)
        except BaseException as error:  # a panic in the transfer library is no Exception
            self._warn(what, error, "" if _is_final(error) else then)
            return error
        return None

    def _create(self) -> None:
        url = self._api.create_repo(self._repo_id, private=self._private, exist_ok=True)
        self._repo_id, self._url = url.repo_id, str(url)

    def _upload(self, staged: Path, message: str) -> None:
        if self._url is None:
            self._create()
        self._api.upload_folder(repo_id=self._repo_id, folder_path=staged, commit_message=message)

    def _warn(self, what: str, error: BaseException, then: str = "") -> None:
        text = re.sub(r"hf_\w+", "hf_…", _one_line(error).replace(self._token or "\0", "…"))
        logger.warning("Hub: %s (%s): %s; %s", what, self._repo_id, text, then or "the run goes on")


def _stage(folder: Path, output_dir: Path) -> Path:
    """Set the publishable files aside in a new folder; weights of a checkpoint, which never change, as links."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.name} is no folder")
    staged = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=output_dir))
    for path in (path for pattern in PUBLISHED for path in folder.glob(pattern)):
        if any(path.match(pattern) for pattern in UNPUBLISHED) or not path.is_file():
            continue
        target = staged / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        if folder != output_dir and path.suffix == ".safetensors":
            _link_or_copy(path, target)
        else:
            shutil.copyfile(path, target)
        if path.name in NAMES_PATHS:
            _rewrite_publishable(target)
    return staged


def _rewrite_publishable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = json.dumps(publishable(json.loads(text)), indent=2, ensure_ascii=False) + "\n"
    else:
        text = yaml.safe_dump(publishable(yaml.safe_load(text) or {}), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_final(error: BaseException) -> bool:
    """Whether the same request would be refused again."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return (400 <= status < 500 and status not in (408, 409, 429)) or isinstance(
        error, HFValidationError | LocalTokenNotFoundError
    )
