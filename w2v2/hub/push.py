"""The push to the Hugging Face Hub: in the background, and never at the expense of the run.

Only what belongs to the model is sent: weights, configurations, card, curves, metrics and results.
"""

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import yaml
from accelerate import Accelerator
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from w2v2.errors import HUB_TOKEN, UserError, one_line
from w2v2.hub.card import publishable, write_finetuned_card
from w2v2.hub.curves import FINETUNING_PICTURES, draw_plots
from w2v2.train.log import read_metrics

logger = logging.getLogger(__name__)

PUBLISHED = ("*.safetensors", "*.json", "*_config.yaml", "README.md", "LICENSE", "metrics.jsonl", "plots/*.png")
UNPUBLISHED = ("optimizer*", "scheduler*", "trainer_state*", "training_state*", "plan.json")
NAMES_PATHS = ("pretrain_config.yaml", "finetune_config.yaml", "results.json")  # sent without tokens and paths
SILENCE_SECONDS = 300  # of the Hub, after which a request has failed; huggingface_hub itself would wait for ever
_STAGED = ".hub_push-"


class HubPusher:
    """Pushes folders to one Hub repository, one at a time, on threads that can neither stop nor hold up the run.

    What is to be pushed is set aside at once, so rotation may delete the original. A checkpoint that comes while a
    push is under way is not pushed. huggingface_hub itself tries again what fails on the way; its `run_as_future` is
    not used, since Python waits for those threads at its end, however long a dead connection lasts.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        repo_id: str | None,
        private: bool | None,
        token: str | None = None,
        every_save: bool,
    ) -> None:
        """Start to create the repository, so that a refused token shows in the first minute of the run.

        Args:
            repo_id: as `user/name`; the folder's name where none is given.
            private: whether a new repository is private; None leaves it to the account's default.
            every_save: without it only pushes of `output_dir` itself are carried out, not those of checkpoints.

        Raises:
            UserError: `repo_id` cannot be the name of a repository.
        """
        self._output_dir = Path(output_dir).resolve()
        self._repo_id = repo_id or self._output_dir.name
        try:
            validate_repo_id(self._repo_id)
        except HFValidationError as error:
            raise UserError(f"--hub_model_id {self._repo_id}: {one_line(error)}; give it as user/name") from None
        self._private, self._token, self._every_save = private, token, every_save
        self._api = HfApi(token=token)
        self._url: str | None = None
        self._job: Future | None = None  # the newest; it waits for the one before
        disable_progress_bars()  # they would tear the run's own bar
        # What a killed run had set aside takes up room.
        self._output_dir.mkdir(parents=True, exist_ok=True)
        for left_over in self._output_dir.glob(f"{_STAGED}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        self._creation = self._start("cannot create the repository", self._create)

    def push(self, folder: str | os.PathLike, message: str) -> None:
        """Push the folder's publishable files to the repository's root, in the background; a failure only warns."""
        folder = Path(folder).resolve()
        is_busy = self._job is not self._creation and not self._job.done()
        if folder != self._output_dir and (is_busy or not self._every_save):
            return
        try:
            staged = _stage(folder, self._output_dir)
        except OSError as error:
            return self._warn(f"cannot push {folder.name}", error)
        self._start("the push failed", self._upload, staged, message)

    def finish(self, timeout_seconds: float = 300) -> str | None:
        """Wait for what was pushed, at most so long; the repository's address if the last push arrived."""
        try:
            return self._job.result(timeout_seconds)
        except TimeoutError:
            self._warn(f"not done after {timeout_seconds:.0f} s", "given up; all files are in the output_dir")

    def _start(self, what: str, action: Callable, *arguments: object) -> Future:
        """Have a daemon thread carry out `action` after the job before; the result is None where it fails."""
        # One job at a time: each waits for the one before it.
        before, self._job = self._job, Future()

        def work(job: Future) -> None:
            if before:
                before.result()
            result = None
            try:
                get_session().timeout = SILENCE_SECONDS
                result = action(*arguments)
            except BaseException as error:  # a panic in the transfer library is no Exception
                self._warn(what, error)
            job.set_result(result)

        threading.Thread(target=work, args=(self._job,), name="hub-push", daemon=True).start()
        return self._job

    def _create(self) -> None:
        url = self._api.create_repo(self._repo_id, private=self._private, exist_ok=True)
        self._repo_id, self._url = url.repo_id, str(url)

    def _upload(self, staged: Path, message: str) -> str:
        try:
            if self._url is None:
                self._create()
            self._api.upload_folder(repo_id=self._repo_id, folder_path=staged, commit_message=message)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return self._url

    def _warn(self, what: str, why: BaseException | str) -> None:
        text = why if isinstance(why, str) else f"{type(why).__name__}: {one_line(why)[:300]}; the run goes on"
        logger.warning(
            "Hub: %s (%s): %s", what, self._repo_id, HUB_TOKEN.sub("…", text.replace(self._token or "\0", "…"))
        )


def _stage(folder: Path, output_dir: Path) -> Path:
    """Set the publishable files aside in a new folder: weights, which never change, as links."""
    # Beside the originals, since links do not reach another disk.
    staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=output_dir))
    for path in (path for pattern in PUBLISHED for path in folder.glob(pattern)):
        if any(path.match(pattern) for pattern in UNPUBLISHED) or not path.is_file():
            continue
        target = staged / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        if path.name in NAMES_PATHS:
            target.write_text(_without_paths(path), encoding="utf-8")
        elif path.suffix == ".safetensors":
            _link_or_copy(path, target)
        else:
            shutil.copyfile(path, target)
    return staged


def _without_paths(path: Path) -> str:
    """A file of flags or results as it may be published."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.dumps(publishable(json.loads(text)), indent=2, ensure_ascii=False) + "\n"
    return yaml.safe_dump(publishable(yaml.safe_load(text) or {}), sort_keys=False, allow_unicode=True)


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)


def start_pusher(args, accelerator: Accelerator) -> HubPusher | None:
    """None without `--push_to_hub`, and on other processes than the main one."""
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    private = args.hub_private_repo or None  # None: as the account's default says
    return HubPusher(
        args.output_dir, repo_id=args.hub_model_id, private=private, every_save=args.hub_strategy == "every_save"
    )


class HubCallback(TrainerCallback):
    """The same for `Trainer`: checkpoints as they are saved (unless `hub_strategy` is `end`), the folder at the end.

    Make it before the `Trainer`: it switches `args.push_to_hub` off. `Trainer`'s own push creates the repository when
    the `Trainer` is built, where a refused token ends the run, and waits without limit for what is under way at the
    end.
    """

    def __init__(self, args: TrainingArguments):
        """Raises UserError where `hub_model_id` cannot be a repository's name."""
        self.pusher: HubPusher | None = None
        self._started: float | None = None
        self._device_hours: float | None = None
        if args.push_to_hub and args.process_index == 0:
            self.pusher = HubPusher(
                args.output_dir,
                repo_id=args.hub_model_id,
                private=args.hub_private_repo,
                token=args.hub_token,
                every_save=args.hub_strategy != HubStrategy.END,
            )
        args.push_to_hub = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter() if state.global_step == 0 else None  # resumed: the rest was not measured

    def on_train_end(self, args, state, control, **kwargs):
        if self._started is not None:
            self._device_hours = (time.perf_counter() - self._started) / 3600 * args.world_size

    def on_save(self, args, state, control, **kwargs):
        if self.pusher:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.pusher.push(folder, f"Weights after {state.global_step} updates")

    def hand_over(self, args: TrainingArguments) -> None:
        """Card and curves from `results.json` and `metrics.jsonl`, then the last push. Call it on every rank."""
        if args.process_index != 0:
            return
        folder = Path(args.output_dir)
        log = folder / "metrics.jsonl"
        draw_plots(folder, read_metrics(log) if log.exists() else [], FINETUNING_PICTURES, over=("step", "update"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        config = {**vars(args), "batch": _describe_batch(args)}
        write_finetuned_card(folder, config=config, results=results, device_hours=self._device_hours)
        if self.pusher:
            self.pusher.push(folder, "Fine-tuned model")
            print(f"   pushed to: {self.pusher.finish() or 'nowhere: see the warnings above'}", flush=True)


def _describe_batch(args: TrainingArguments) -> str:
    """The effective batch in words: in seconds where the flags say so."""
    if seconds := getattr(args, "batch_seconds", None):
        return f"{seconds:g} s of audio"
    return f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size} utterances"
